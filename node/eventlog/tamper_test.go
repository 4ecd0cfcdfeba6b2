package eventlog

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/tlog"
	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/recordingtest/s3server"
	"github.com/sallyport/sallyport/recording/upload"
)

// objects is a store in memory that an adversary owns.
type objects map[string][]byte

func (o objects) Get(_ context.Context, key string) ([]byte, error) {
	b, ok := o[key]
	if !ok {
		return nil, recording.ErrNotFound
	}
	return b, nil
}

func (o objects) List(_ context.Context, prefix, after string, fn func(recording.Object) error) error {
	for _, k := range slices.Sorted(maps.Keys(o)) {
		if strings.HasPrefix(k, prefix) && k > after {
			if err := fn(recording.Object{Key: k}); errors.Is(err, recording.ErrStop) {
				return nil
			} else if err != nil {
				return err
			}
		}
	}
	return nil
}

func (o objects) Put(_ context.Context, key string, data []byte) error {
	if _, ok := o[key]; ok {
		return recording.ErrExists
	}
	o[key] = bytes.Clone(data)
	return nil
}

func (o objects) String() string { return "memory" }

func (o objects) clone() objects {
	c := objects{}
	for k, v := range o {
		c[k] = bytes.Clone(v)
	}
	return c
}

func load(t testing.TB, src recording.Store) objects {
	t.Helper()
	out := objects{}
	err := src.List(context.Background(), tlog.Root, "", func(o recording.Object) error {
		b, err := src.Get(context.Background(), o.Key)
		out[o.Key] = b
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// rebuilt is a log made of the given envelopes, all hashes right, with these
// checkpoints: what an adversary who owns the store, and has some keys, can make.
func rebuilt(envelopes [][]byte, checkpoints ...[]byte) objects {
	out := objects{}
	var b tlog.Builder
	b.Full = func(level int, n uint64, hs []tlog.Hash) { out[tlog.TileKey(level, n, len(hs))] = tileBytes(hs) }
	var bundle []byte
	for i, e := range envelopes {
		var large bool
		if bundle, large = tlog.AppendEntry(bundle, e); large {
			out[tlog.LargeKey(uint64(i))] = e
		}
		b.Append(tlog.LeafHash(e))
		if n := i + 1; n%tlog.TileWidth == 0 || n == len(envelopes) {
			out[tlog.EntriesKey(uint64(i)/tlog.TileWidth, i%tlog.TileWidth+1)] = bundle
			bundle = nil
		}
	}
	for l := range b.Levels() {
		if tail := b.Tail(l); tail != nil {
			out[tlog.TileKey(l, b.Size()>>(tlog.TileHeight*(l+1)), len(tail))] = tileBytes(tail)
		}
	}
	for i, c := range checkpoints {
		out[tlog.CheckpointKey(uint64(i)+1)] = c
	}
	return out
}

func tileBytes(hs []tlog.Hash) []byte {
	var b []byte
	for _, h := range hs {
		b = append(b, h[:]...)
	}
	return b
}

func rootOf(envelopes [][]byte) tlog.Hash {
	var b tlog.Builder
	for _, e := range envelopes {
		b.Append(tlog.LeafHash(e))
	}
	return b.Root()
}

// TestTampering: whatever is done to a stored log is found, and named.
func TestTampering(t *testing.T) {
	dest, _ := mustDir(t)
	c := newCluster(t, dest)
	a, b, d := c.add("a"), c.add("b"), c.add("c")
	c.fill(5)
	c.cosigned()
	c.fill(150)
	c.exported()
	middle := load(t, dest)
	c.append(event.TypeConfigApplied, "config", event.ConfigApplied{Files: []event.ConfigFile{{Path: "x", Data: make([]byte, 50<<10)}}})
	c.fill(150)
	c.exported()
	good := load(t, dest)
	rep := c.mustVerify(good, VerifyOptions{})
	seenMiddle := c.mustVerify(middle, VerifyOptions{}).Seen
	for _, m := range []*member{a, b, d} {
		m.halt()
	}
	size, newest := rep.Events, rep.Checkpoints
	var envelopes [][]byte
	large := uint64(0) // leaf of the large event
	for _, e := range c.events[:size] {
		envelopes = append(envelopes, e.Envelope)
		if len(e.Envelope) > 20<<10 {
			large = e.Seq - 1
		}
	}
	last := tlog.CheckpointKey(newest)
	bundle0, tile0 := tlog.EntriesKey(0, tlog.TileWidth), tlog.TileKey(0, 0, tlog.TileWidth)
	tail := int(size % tlog.TileWidth)
	bundle1, tile1 := tlog.EntriesKey(1, tail), tlog.TileKey(0, 1, tail)
	for _, k := range []string{last, bundle0, tile0, bundle1, tile1, tlog.LargeKey(large), tlog.TileKey(1, 0, 1)} {
		if good[k] == nil {
			t.Fatalf("there is no %s: has the fixture changed?", k)
		}
	}
	notes := make([][]byte, newest)
	for i := range notes {
		notes[i] = good[tlog.CheckpointKey(uint64(i)+1)]
	}
	sign := func(cp tlog.Checkpoint, ms ...*member) []byte {
		t.Helper()
		sigs := map[string][]byte{}
		for _, m := range ms {
			s, err := tlog.Cosign(cp, m.name, m.keys[0], c.now)
			if err != nil {
				t.Fatal(err)
			}
			sigs[m.name] = s
		}
		return tlog.Note(cp, sigs)
	}
	flip := func(o objects, key string, at int) { o[key][at] ^= 1 }
	mallory := newCluster(t, nil)
	mkey, mcert := mallory.issue("a")

	for name, x := range map[string]struct {
		do   func(o objects) objects
		o    VerifyOptions
		want []Kind
		at   string // in the first problem's object
	}{
		"nothing":                       {do: func(o objects) objects { return o }, o: VerifyOptions{Seen: seenMiddle}},
		"an event's byte changed":       {do: func(o objects) objects { flip(o, bundle0, 1000); return o }, want: []Kind{AlteredEntry}, at: "event "},
		"an event's byte, last bundle":  {do: func(o objects) objects { flip(o, bundle1, 60); return o }, want: []Kind{AlteredEntry}, at: "event 257"},
		"a hash changed":                {do: func(o objects) objects { flip(o, tile0, 700); return o }, want: []Kind{AlteredTile}, at: tile0},
		"a hash above changed":          {do: func(o objects) objects { flip(o, tlog.TileKey(1, 0, 1), 3); return o }, want: []Kind{AlteredTile}, at: "tile/1"},
		"a bundle deleted":              {do: func(o objects) objects { delete(o, bundle0); return o }, want: []Kind{Missing}, at: bundle0},
		"a tile deleted":                {do: func(o objects) objects { delete(o, tile0); return o }, want: []Kind{Missing}, at: tile0},
		"a bundle and its tile deleted": {do: func(o objects) objects { delete(o, tile1); delete(o, bundle1); return o }, want: []Kind{Missing}, at: "log/"},
		"a bundle cut":                  {do: func(o objects) objects { o[bundle0] = o[bundle0][:900]; return o }, want: []Kind{Truncated}, at: bundle0},
		"a tile cut":                    {do: func(o objects) objects { o[tile0] = o[tile0][:33]; return o }, want: []Kind{Truncated}, at: tile0},
		"a large event deleted":         {do: func(o objects) objects { delete(o, tlog.LargeKey(large)); return o }, want: []Kind{Missing}, at: "large/"},
		"a large event changed":         {do: func(o objects) objects { flip(o, tlog.LargeKey(large), 30000); return o }, want: []Kind{AlteredEntry}, at: "large/"},
		"bundles exchanged": {do: func(o objects) objects {
			o[bundle0], o[bundle1] = o[bundle1], o[bundle0]
			return o
		}, want: []Kind{Truncated}, at: "entries/"},
		"two events exchanged, hashes too": {do: func(o objects) objects {
			es := slices.Clone(envelopes)
			es[99], es[100] = es[100], es[99]
			maps.Copy(o, rebuilt(es))
			return o
		}, want: []Kind{Broken, Forked}, at: "event 100"},
		"an event changed, hashes too": {do: func(o objects) objects {
			es := slices.Clone(envelopes)
			es[199] = other(200)(raftstore.StoredEvent{Seq: 200, Envelope: es[199]}).Envelope
			maps.Copy(o, rebuilt(es))
			return o
		}, want: []Kind{Forked}, at: "checkpoint/"},
		"an event taken out, hashes too": {do: func(o objects) objects {
			maps.Copy(o, rebuilt(slices.Delete(slices.Clone(envelopes), 119, 120)))
			return o
		}, want: []Kind{Broken, Forked}},
		"a checkpoint deleted": {do: func(o objects) objects { delete(o, tlog.CheckpointKey(2)); return o }, want: []Kind{Missing}, at: tlog.CheckpointKey(2)},
		"a checkpoint cut":     {do: func(o objects) objects { o[tlog.CheckpointKey(2)] = o[tlog.CheckpointKey(2)][:40]; return o }, want: []Kind{Truncated}, at: tlog.CheckpointKey(2)},
		"a cosignature taken out": {do: func(o objects) objects {
			o[tlog.CheckpointKey(newest-1)] = []byte(keepLines(string(o[tlog.CheckpointKey(newest-1)]), 2))
			return o
		}, want: []Kind{AlteredCheckpoint}, at: tlog.CheckpointKey(newest - 1)},
		"the newest with one cosignature": {do: func(o objects) objects { o[last] = []byte(keepLines(string(o[last]), 1)); return o }, want: []Kind{NotCosigned}, at: last},
		"the newest with one, twice": {do: func(o objects) objects {
			one := keepLines(string(o[last]), 1)
			o[last] = []byte(one + strings.Replace(one[strings.Index(one, "— "):], "test/a", "test/b", 1))
			return o
		}, want: []Kind{Forged}, at: last},
		"the newest's root changed": {do: func(o objects) objects {
			cp, _, _ := tlog.ParseNote(o[last])
			forged := cp
			forged.Root[3] ^= 1
			o[last] = bytes.Replace(o[last], []byte(cp.Root.String()), []byte(forged.Root.String()), 1)
			return o
		}, want: []Kind{Forged}, at: last},
		"the newest's size changed": {do: func(o objects) objects {
			o[last] = bytes.Replace(o[last], []byte("\n"+itoa(size)+"\n"), []byte("\n"+itoa(size-1)+"\n"), 1)
			return o
		}, want: []Kind{Missing}, at: "tile/0"},
		"an equivocating leader": {do: func(objects) objects { // vouches alone for a history of its own
			es := slices.Clone(envelopes)
			es[size-1] = other(size)(raftstore.StoredEvent{Seq: size, Envelope: es[size-1]}).Envelope
			o := rebuilt(es, notes...)
			maps.Copy(o, certs(good))
			o[last] = sign(tlog.Checkpoint{Origin: clusterID, Size: size, Root: rootOf(es)}, a)
			return o
		}, want: []Kind{NotCosigned}, at: last},
		"a minority throws the others out": {do: func(objects) objects {
			es := slices.Clone(envelopes)
			cp, _, _ := tlog.ParseNote(notes[newest-2])
			es = es[:cp.Size]
			es = append(es, fakeEvent(t, c, cp.Size+1, "node/b", event.TypeNodeRemoved, event.NodeRemoved{Name: "b"}))
			es = append(es, fakeEvent(t, c, cp.Size+2, "node/c", event.TypeNodeRemoved, event.NodeRemoved{Name: "c"}))
			o := rebuilt(es, notes[:newest-1]...)
			maps.Copy(o, certs(good))
			o[last] = sign(tlog.Checkpoint{Origin: clusterID, Size: uint64(len(es)), Root: rootOf(es)}, a)
			return o
		}, want: []Kind{NotCosigned}, at: last},
		"a majority equivocates, and the log was seen": {do: func(objects) objects {
			es := slices.Clone(envelopes)
			n := seenMiddle.Size
			es[n-1] = other(n)(raftstore.StoredEvent{Seq: n, Envelope: es[n-1]}).Envelope
			o := rebuilt(es, notes[0], sign(tlog.Checkpoint{Origin: clusterID, Size: size, Root: rootOf(es)}, a, b))
			maps.Copy(o, certs(good))
			return o
		}, o: VerifyOptions{Seen: seenMiddle}, want: []Kind{Forked}, at: "events 1 to"},
		"rolled back": {do: func(objects) objects { return middle.clone() }, o: VerifyOptions{Seen: rep.Seen}, want: []Kind{RolledBack}, at: "checkpoint/"},
		"cut, newest checkpoints deleted": {do: func(o objects) objects {
			delete(o, last)
			return o
		}, o: VerifyOptions{Seen: rep.Seen}, want: []Kind{RolledBack}, at: "checkpoint/"},
		"all deleted":                 {do: func(objects) objects { return objects{} }, o: VerifyOptions{Seen: rep.Seen}, want: []Kind{RolledBack}},
		"all deleted, seen by nobody": {do: func(objects) objects { return objects{} }, want: []Kind{Missing}},
		"a strange object":            {do: func(o objects) objects { o["log/tile/9/x"] = nil; return o }, want: []Kind{Foreign}, at: "log/tile/9/x"},
		"a certificate exchanged": {do: func(o objects) objects {
			o[tlog.CertKey(a.cert)] = mcert
			return o
		}, want: []Kind{AlteredCertificate}, at: tlog.CertKey(a.cert)},
		"a certificate deleted": {do: func(o objects) objects { delete(o, tlog.CertKey(a.cert)); return o }, want: []Kind{Missing}, at: "cert/"},
		"another cluster": {do: func(objects) objects {
			first := fakeEvent(t, mallory, 1, "cluster", event.TypeClusterCreated, event.ClusterCreated{
				ID: clusterID, CA: mallory.ca.Cert.Raw, Node: event.NodeInfo{Name: "a", Role: pki.Voter, Cert: mcert}})
			es := [][]byte{first}
			s, _ := tlog.Cosign(tlog.Checkpoint{Origin: clusterID, Size: 1, Root: rootOf(es)}, "a", mkey, c.now)
			return rebuilt(es, tlog.Note(tlog.Checkpoint{Origin: clusterID, Size: 1, Root: rootOf(es)}, map[string][]byte{"a": s}))
		}, want: []Kind{WrongCluster}, at: "event 1"},
		"a voter that the CA does not know": {do: func(objects) objects {
			es := [][]byte{envelopes[0], fakeEvent(t, c, 2, "node/z", event.TypeNodeJoined, event.NodeJoined{Node: event.NodeInfo{Name: "a", Role: pki.Voter, Cert: mcert}})}
			cp := tlog.Checkpoint{Origin: clusterID, Size: 2, Root: rootOf(es)}
			s, _ := tlog.Cosign(cp, "a", mkey, c.now)
			o := rebuilt(es, tlog.Note(cp, map[string][]byte{"a": s}))
			maps.Copy(o, certs(good))
			return o
		}, want: []Kind{ForgedMember, Forged}, at: "event 2"},
		"the checkpoint known from elsewhere is another": {do: func(o objects) objects { return o },
			o: VerifyOptions{From: &tlog.Checkpoint{Origin: clusterID, Size: 50}}, want: []Kind{Forked}, at: "events 1 to 50"},
		"the checkpoint known from elsewhere is later": {do: func(o objects) objects { return o },
			o: VerifyOptions{From: &tlog.Checkpoint{Origin: clusterID, Size: size + 1}}, want: []Kind{RolledBack}},
	} {
		t.Run(name, func(t *testing.T) {
			x.o.CA = c.caHash
			got, err := Verify(context.Background(), x.do(good.clone()), x.o)
			if err != nil {
				t.Fatal(err)
			}
			if len(x.want) == 0 != got.OK() || (got.Seen == nil) == got.OK() {
				t.Fatalf("want %v:%s", x.want, problems(got))
			}
			if len(x.want) > 0 && (got.Problems[0].Kind != x.want[0] || !strings.Contains(got.Problems[0].Object, x.at)) {
				t.Errorf("want first %s at %s:%s", x.want[0], x.at, problems(got))
			}
			for _, k := range x.want {
				if !slices.ContainsFunc(got.Problems, func(p Problem) bool { return p.Kind == k }) {
					t.Errorf("no %s:%s", k, problems(got))
				}
			}
		})
	}
}

func itoa(n uint64) string { return strconv.FormatUint(n, 10) }

// certs are the certificates of a log.
func certs(o objects) objects {
	out := objects{}
	for k, v := range o {
		if tlog.ParseKey(k).Kind == tlog.KindCert {
			out[k] = v
		}
	}
	return out
}

// fakeEvent makes an envelope as a node of the adversary's would.
func fakeEvent(t *testing.T, c *cluster, seq uint64, aggregate, typ string, payload any) []byte {
	t.Helper()
	version, data, err := event.Encode(event.Level, typ, payload)
	if err != nil {
		t.Fatal(err)
	}
	p := event.Proposal{ID: event.NewID(), Type: typ, Version: version, Aggregate: aggregate, Expect: event.Any, Payload: data}
	raw, err := p.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return event.MarshalEnvelope(&event.Event{Seq: seq, Index: seq + 2, Term: 2, Time: c.now.Add(time.Duration(seq) * time.Millisecond), AggregateVersion: 9}, raw)
}

// TestFlipEveryObject: one changed byte of any object is found, wherever it is.
func TestFlipEveryObject(t *testing.T) {
	dest, _ := mustDir(t)
	c := newCluster(t, dest)
	c.add("a")
	c.add("b")
	c.add("c")
	c.fill(20)
	c.exported()
	good := load(t, dest)
	newest := c.mustVerify(good, VerifyOptions{}).Events
	n := 0
	for key, data := range good {
		// Partial tiles of earlier checkpoints repeat what later ones have: nobody
		// reads them any more.
		if o := tlog.ParseKey(key); (o.Kind == tlog.KindTile || o.Kind == tlog.KindEntries) && uint64(o.Width) != newest {
			continue
		}
		for at := 0; at < len(data); at += 1 + len(data)/23 {
			bad := maps.Clone(good)
			bad[key] = bytes.Clone(data)
			bad[key][at] ^= 0x04
			if rep := c.verify(bad, VerifyOptions{}); rep.OK() {
				t.Errorf("%s: byte %d changed, and nothing is wrong", key, at)
			}
			n++
		}
	}
	if n < 100 {
		t.Fatalf("only %d changes were tried", n)
	}
}

// TestNewest finds the newest checkpoint whatever is missing before it.
func TestNewest(t *testing.T) {
	for _, numbers := range [][]uint64{nil, {1}, {1, 2}, {7}, {1, 2, 3, 900, 1000, 1001}, {5, 123456789}} {
		o := objects{"log/checkpoint/zzz": nil, "log/entries/000.p/1": nil}
		var want uint64
		for _, n := range numbers {
			o[tlog.CheckpointKey(n)] = []byte("x")
			want = n
		}
		if got, err := Newest(context.Background(), o); err != nil || got != want {
			t.Errorf("%v: %d %v", numbers, got, err)
		}
	}
	if _, err := Newest(context.Background(), failing{objects{}}); err == nil {
		t.Error("no error of a store that fails")
	}
}

// failing is a store that is down.
type failing struct{ objects }

var errDown = errors.New("the store is down")

func (failing) Get(context.Context, string) ([]byte, error) { return nil, errDown }
func (failing) List(context.Context, string, string, func(recording.Object) error) error {
	return errDown
}
func (failing) Put(context.Context, string, []byte) error { return errDown }

// flaky is a store that fails sometimes while an auditor reads it.
type flaky struct {
	objects
	key string
}

func (f flaky) Get(ctx context.Context, key string) ([]byte, error) {
	if key == f.key {
		return nil, errDown
	}
	return f.objects.Get(ctx, key)
}

// TestStoreFails: a store that cannot be read is an error, not a finding, and
// never a success.
func TestStoreFails(t *testing.T) {
	dest, _ := mustDir(t)
	c := newCluster(t, dest)
	c.add("a")
	c.fill(300)
	c.exported()
	good := load(t, dest)
	rep := c.mustVerify(good, VerifyOptions{})
	size := rep.Events
	for _, key := range []string{
		tlog.EntriesKey(0, tlog.TileWidth), tlog.TileKey(0, 0, tlog.TileWidth), tlog.EntriesKey(1, int(size-256)), tlog.TileKey(1, 0, 1),
		tlog.CheckpointKey(1), tlog.CheckpointKey(rep.Checkpoints), tlog.CertKey(c.ca.Cert.Raw),
	} {
		rep, err := Verify(context.Background(), flaky{good, key}, VerifyOptions{CA: c.caHash})
		if err == nil && rep.OK() {
			t.Errorf("%s could not be read, and all is well", key)
		}
	}
	if _, err := Verify(context.Background(), failing{}, VerifyOptions{CA: c.caHash}); !errors.Is(err, errDown) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if rep, err := Verify(ctx, good, VerifyOptions{CA: c.caHash}); err == nil && rep.OK() {
		t.Error("verified although it was told to stop")
	}
}

// TestExport: a store that was down is caught up with, another leader goes on
// where the one before stopped, what differs is an alarm and stays.
func TestExport(t *testing.T) {
	dir, _ := mustDir(t)
	down := &switched{Store: dir, down: true}
	c := newCluster(t, down)
	a := c.add("a")
	c.add("b")
	c.fill(40)
	c.cosigned()
	c.fill(300)
	c.cosigned()
	c.eventually("an error", func() error {
		if st := a.svc.Status().Export; st.LastError == "" || st.Waiting == 0 || st.Oldest.IsZero() {
			return errors.New("status says nothing")
		}
		return nil
	})
	down.set(false)
	c.exported()
	if st := a.svc.Status().Export; st.LastError != "" || st.Alarm != "" || !st.Oldest.IsZero() {
		t.Errorf("%+v", st)
	}
	c.mustVerify(dir, VerifyOptions{})

	// The next leader finds a checkpoint half written: some objects are there.
	c.lead("b")
	c.fill(10)
	c.exported()
	c.lead("a")
	c.exported()
	c.mustVerify(dir, VerifyOptions{})

	// What is there under our key and is not ours is never overwritten.
	down.set(true)
	c.fill(10)
	c.cosigned()
	next := a.svc.checkpoints()
	st, _, err := a.svc.checkpoint(next)
	if err != nil {
		t.Fatal(err)
	}
	key := tlog.EntriesKey(st.Size/tlog.TileWidth, int(st.Size%tlog.TileWidth))
	if err := dir.Put(context.Background(), key, []byte("other")); err != nil {
		t.Fatal(err)
	}
	down.set(false)
	c.eventually("an alarm", func() error {
		if e := a.svc.Status().Export; !strings.Contains(e.Alarm, key) {
			return errors.New(e.LastError)
		}
		return nil
	})
	if b, err := dir.Get(context.Background(), key); err != nil || string(b) != "other" {
		t.Error("it was overwritten")
	}
}

// TestForeignStore: a store that holds another history is not added to.
func TestForeignStore(t *testing.T) {
	dir, _ := mustDir(t)
	first := newCluster(t, dir)
	first.add("a")
	first.fill(20)
	first.exported()
	before := load(t, dir)
	second := newCluster(t, dir)
	m := second.add("a")
	second.fill(20)
	second.cosigned()
	second.eventually("an alarm", func() error {
		if m.svc.Status().Export.Alarm == "" {
			return errors.New("none")
		}
		return nil
	})
	if after := load(t, dir); len(after) != len(before) {
		t.Errorf("%d objects became %d", len(before), len(after))
	}
}

// TestS3 exports to and verifies from a real S3 server.
func TestS3(t *testing.T) {
	srv := s3server.Start(t)
	dest, err := upload.Open(context.Background(), srv.URL("log-test"))
	if err != nil {
		t.Fatal(err)
	}
	c := newCluster(t, dest)
	c.add("a")
	c.add("b")
	c.fill(280)
	c.exported()
	c.lead("b")
	c.fill(5)
	c.exported()
	rep := c.mustVerify(dest, VerifyOptions{})
	p, err := Prove(context.Background(), dest, 270)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.Check(c.caHash, rep.Seen); err != nil {
		t.Fatal(err)
	}
	// One object replaced behind the server's back.
	key := tlog.EntriesKey(0, tlog.TileWidth)
	b, err := dest.Get(context.Background(), key)
	if err != nil {
		t.Fatal(err)
	}
	b[500] ^= 1
	srv.Overwrite(t, "log-test/"+key, b)
	if bad := c.verify(dest, VerifyOptions{Seen: rep.Seen}); bad.OK() || bad.Problems[0].Kind != AlteredEntry {
		t.Error(problems(bad))
	}
}

// switched is a store that can be down.
type switched struct {
	recording.Store
	mu   sync.Mutex
	down bool
}

func (s *switched) set(down bool) { s.mu.Lock(); defer s.mu.Unlock(); s.down = down }

func (s *switched) err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return errDown
	}
	return nil
}

func (s *switched) Put(ctx context.Context, key string, data []byte) error {
	if err := s.err(); err != nil {
		return err
	}
	return s.Store.Put(ctx, key, data)
}

func (s *switched) Get(ctx context.Context, key string) ([]byte, error) {
	if err := s.err(); err != nil {
		return nil, err
	}
	return s.Store.Get(ctx, key)
}

func (s *switched) List(ctx context.Context, prefix, after string, fn func(recording.Object) error) error {
	if err := s.err(); err != nil {
		return err
	}
	return s.Store.List(ctx, prefix, after, fn)
}

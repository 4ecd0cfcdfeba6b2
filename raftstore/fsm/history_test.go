package fsm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/sallyport/sallyport/raftstore/event"
)

// awaitHistory waits for the builder.
func awaitHistory(t *testing.T, n *node) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		err := n.complete()
		if err == nil {
			return
		}
		if !errors.Is(err, ErrBuilding) || time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// past is what a reader finds of every aggregate as of each event.
func past(t *testing.T, n *node) map[uint64]map[string][]uint64 {
	t.Helper()
	all := map[uint64]map[string][]uint64{}
	for seq := uint64(1); seq <= n.Head().Seq; seq++ {
		all[seq] = map[string][]uint64{}
		last := ""
		err := n.Aggregates("", seq, func(a string, newest uint64) bool {
			if a <= last {
				t.Errorf("%q after %q", a, last)
			}
			last = a
			all[seq][a] = []uint64{newest}
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
		for a, seqs := range all[seq] {
			newest := seqs[0]
			seqs = nil
			if err := n.History(a, seq, func(s uint64) bool { seqs = append(seqs, s); return true }); err != nil {
				t.Fatal(err)
			}
			if len(seqs) == 0 || seqs[0] != newest {
				t.Fatalf("%q as of %d: events %v, newest %d", a, seq, seqs, newest)
			}
			all[seq][a] = seqs
		}
	}
	return all
}

// scan is the same by reading all events.
func scan(t *testing.T, n *node) map[uint64]map[string][]uint64 {
	t.Helper()
	all := map[uint64]map[string][]uint64{}
	now := map[string][]uint64{}
	for seq := uint64(1); seq <= n.Head().Seq; seq++ {
		e, err := n.Event(seq)
		if err != nil {
			t.Fatal(err)
		}
		now[e.Aggregate] = append([]uint64{seq}, now[e.Aggregate]...)
		all[seq] = map[string][]uint64{}
		for a, seqs := range now {
			all[seq][a] = seqs
		}
	}
	return all
}

// awkward names: one the beginning of another, zeros, the escape itself.
var names = []string{"a", "a/1", "a/10", "a/2", "a\x00", "a\x00\x01", "a\x00b", "b", "b/\u00ff", "b/\U0010ffff"}

func history(t *testing.T, n *node, events int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	index := n.Head().Applied
	for i := 0; i < events; {
		var ps []event.Proposal
		for range 1 + rng.IntN(4) {
			p := proposal(1, names[rng.IntN(len(names))], event.Any)
			p.ID = event.NewID()
			ps = append(ps, p)
			i++
		}
		index += 1 + rng.Uint64N(3)
		if r := n.apply(t, command(t, index, int64(index)*1000, n.Head(), ps...)); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
}

func TestHistory(t *testing.T) {
	n := fresh(t)
	history(t, n, 60)
	if got, want := past(t, n), scan(t, n); !reflect.DeepEqual(got, want) {
		t.Fatalf("got %v\nwant %v", got, want)
	}
	var found []string
	if err := n.Aggregates("a/", n.Head().Seq, func(a string, _ uint64) bool { found = append(found, a); return len(found) < 2 }); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(found, []string{"a/1", "a/10"}) {
		t.Fatalf("%q", found)
	}
	// By index and by time: every index from before the first event to after
	// the last.
	events, err := n.Events(1, 0)
	if err != nil {
		t.Fatal(err)
	}
	for index := uint64(0); index <= n.Head().Applied+2; index++ {
		want := uint64(0)
		for _, e := range events {
			if e.Index <= index {
				want = e.Seq
			}
		}
		if got, err := n.SeqAt(index); err != nil || got != want {
			t.Fatalf("at index %d: event %d, %v; want %d", index, got, err, want)
		}
	}
	for _, e := range events {
		for _, c := range []struct {
			nanos int64
			want  uint64
		}{{e.Time.UnixNano(), e.Seq}, {e.Time.UnixNano() - 1, e.Seq - 1}} {
			if got, err := n.SeqAtTime(c.nanos); err != nil || got != c.want {
				t.Fatalf("at %d: event %d, %v; want %d", c.nanos, got, err, c.want)
			}
		}
	}
	if got, err := n.SeqAtTime(1 << 62); err != nil || got != n.Head().Seq {
		t.Fatalf("in the far future: %d, %v", got, err)
	}
}

// older makes the state what a build without history and digests left: since
// event seq, or altogether when seq is 0.
func older(t *testing.T, n *node, seq uint64) {
	t.Helper()
	b := n.db.NewBatch()
	defer b.Close()
	var err error
	if seq == 0 {
		err = errors.Join(b.Delete(keyHistory, nil), b.Delete(keyDigest, nil), b.DeleteRange([]byte{prefixHistory}, []byte{prefixHistory + 1}, nil),
			b.DeleteRange([]byte{prefixDigest}, []byte{prefixDigest + 1}, nil))
	} else {
		for s := seq + 1; s <= n.Head().Seq; s++ {
			e, eerr := n.Event(s)
			err = errors.Join(err, eerr, b.Delete(historyKey(e.Aggregate, e.Index, e.Sub), nil))
		}
		err = errors.Join(err, writeHistory(b, seq), (&progress{Head: Head{Seq: seq}}).writeDigest(b))
	}
	if err = errors.Join(err, b.Commit(pebble.Sync)); err != nil {
		t.Fatal(err)
	}
}

func reopen(t *testing.T, n *node) *node {
	t.Helper()
	if err := n.Sync(); err != nil {
		t.Fatal(err)
	}
	return mustOpen(t, n.fs.CrashClone(vfs.CrashCloneCfg{}))
}

// A state written by a build that kept no history has one soon after it is
// opened, the same one, whatever is applied meanwhile; the digest is there at
// once.
func TestHistoryOfOlderBuild(t *testing.T) {
	for _, seq := range []uint64{0, 1, 700} {
		n := fresh(t)
		history(t, n, 1200)
		want := dump(t, n)
		older(t, n, seq)
		m := reopen(t, n)
		if m.now.sum != n.now.sum {
			t.Fatalf("since event %d: the digest was not made up", seq)
		}
		awaitHistory(t, m)
		if seq > 0 {
			if !bytes.Equal(dump(t, m), want) {
				t.Fatalf("since event %d: the state differs", seq)
			}
			continue
		}
		history(t, n, 30)
		if got := past(t, m); len(got) != int(m.Head().Seq) {
			t.Fatal("events are missing")
		}
	}
}

// The builder is stopped by a restart and by a restore, and goes on.
func TestHistoryBuildIsInterrupted(t *testing.T) {
	n := fresh(t)
	history(t, n, 300)
	want := scan(t, n)
	older(t, n, 0)
	b := n.db.NewBatch()
	if err := errors.Join(writeHistory(b, n.Head().Seq), b.Set(keyHistoryGap, gap{1, n.Head().Seq + 1}.marshal(), nil), b.Commit(pebble.Sync), b.Close()); err != nil {
		t.Fatal(err)
	}
	if err := n.Aggregates("", 1, func(string, uint64) bool { return true }); !errors.Is(err, ErrBuilding) {
		t.Fatalf("an incomplete history was read: %v", err)
	}
	if err := n.History("a", 1, func(uint64) bool { return true }); !errors.Is(err, ErrBuilding) {
		t.Fatalf("an incomplete history was read: %v", err)
	}
	// Who gets this state as a snapshot builds what it lacks.
	snap := dump(t, n)
	m := fresh(t)
	history(t, m, 0)
	if err := m.Restore(io.NopCloser(bytes.NewReader(snap))); err != nil {
		t.Fatal(err)
	}
	awaitHistory(t, m)
	if got := past(t, m); !reflect.DeepEqual(got, want) {
		t.Fatal("the restored node's past differs")
	}
	// A crash in the middle.
	r := reopen(t, n)
	awaitHistory(t, r)
	if got := past(t, r); !reflect.DeepEqual(got, want) {
		t.Fatal("the restarted node's past differs")
	}
	r = reopen(t, r)
	if err := r.complete(); err != nil {
		t.Fatal(err)
	}
}

func TestDigestIsOverProjections(t *testing.T) {
	n := fresh(t)
	history(t, n, 50)
	var all sum
	if err := n.sumUp(&all); err != nil || all != n.now.sum {
		t.Fatalf("counted %x, kept %x, %v", all, n.now.sum, err)
	}
	a, b := sum{}, sum{}
	a.add([]byte("k"), []byte("v"))
	a.add([]byte("l"), []byte("w"))
	b.add([]byte("l"), []byte("w"))
	if a == b {
		t.Fatal("a pair more is no difference")
	}
	b.add([]byte("k"), []byte("v"))
	if a != b {
		t.Fatal("the order matters")
	}
	b.remove([]byte("l"), []byte("w"))
	b.add([]byte("lw"), nil)
	if a == b {
		t.Fatal("where the key ends does not matter")
	}
}

// fill stores events in full batches, one nanosecond apart from nanos on,
// until there are n.
func fillTo(t testing.TB, n *node, events uint64, nanos int64) {
	t.Helper()
	for n.Head().Seq < events {
		var ps []event.Proposal
		for range min(MaxBatch, events-n.Head().Seq) {
			p := proposal(1, fmt.Sprint("a", len(ps)), event.Any)
			p.ID = event.NewID()
			ps = append(ps, p)
		}
		if r := n.apply(t, command(t, n.Head().Applied+1, nanos, n.Head(), ps...)); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
}

func TestDigestAlarm(t *testing.T) {
	leader, same := fresh(t), fresh(t)
	for leader.Head().Seq < 2100 {
		var ps []event.Proposal
		for i := range 60 {
			p := proposal(1, fmt.Sprint("a", i), event.Any)
			p.ID = event.NewID()
			ps = append(ps, p)
		}
		l := command(t, leader.Head().Applied+1, 1, leader.Head(), ps...)
		leader.apply(t, l)
		same.apply(t, l)
	}
	if d := leader.Digest(); d.Seq != 2048 || d != same.Digest() {
		t.Fatalf("digests %+v and %+v", d, same.Digest())
	}
	again := reopen(t, leader)
	if again.Digest() != leader.Digest() {
		t.Fatal("the digest was lost in a restart")
	}
	with := func(n *node, d Digest) Result {
		p := proposal(9, "z", event.Any)
		p.ID = event.NewID()
		l := command(t, n.Head().Applied+1, 1, n.Head(), p)
		c, err := unmarshalCommand(l.Data)
		if err != nil {
			t.Fatal(err)
		}
		c.Digest = d
		if l.Data, err = c.Marshal(); err != nil {
			t.Fatal(err)
		}
		return n.apply(t, l)
	}
	if r := with(same, leader.Digest()); r.Err != nil {
		t.Fatal(r.Err)
	}
	// One we never recorded says nothing.
	if err := same.db.Delete(digestKey(1), pebble.NoSync); err != nil {
		t.Fatal(err)
	}
	if r := with(same, Digest{Seq: 1024, Sum: [32]byte{1}}); r.Err != nil {
		t.Fatal(r.Err)
	}
	other := leader.Digest()
	other.Sum[31] ^= 1
	for name, c := range map[string]struct{ d Digest }{
		"another digest":  {other},
		"of the future":   {Digest{Seq: 4096, Sum: other.Sum}},
		"of another kind": {Digest{Seq: 1500, Sum: other.Sum}},
	} {
		n := reopen(t, leader)
		before := n.Head()
		r := with(n, c.d)
		if !errors.Is(r.Err, ErrHalted) || !errors.Is(n.fatal, ErrDiverged) || n.Head() != before {
			t.Errorf("%s: %v; fatal %v", name, r.Err, n.fatal)
		}
	}
}

// A changed pair, of which the chain knows nothing, shows at the next digest.
func TestDamageShowsInDigest(t *testing.T) {
	logs := func() (a, b *node) {
		a, b = fresh(t), fresh(t)
		for a.Head().Seq < 1000 {
			p := proposal(1, fmt.Sprint("a", a.Head().Seq), event.Any)
			p.ID = event.NewID()
			l := command(t, a.Head().Applied+1, 1, a.Head(), p)
			a.apply(t, l)
			b.apply(t, l)
		}
		return a, b
	}
	leader, damaged := logs()
	damaged.now.sum.add([]byte("Vx"), []byte{1}) // as if a projection had written what the others did not
	fillBoth := func(to uint64) Result {
		var r Result
		for leader.Head().Seq < to {
			p := proposal(1, "z", event.Any)
			p.ID = event.NewID()
			l := command(t, leader.Head().Applied+1, 1, leader.Head(), p)
			c, _ := unmarshalCommand(l.Data)
			c.Digest = leader.Digest()
			l.Data, _ = c.Marshal()
			leader.apply(t, l)
			r = damaged.apply(t, l)
		}
		return r
	}
	if r := fillBoth(1024); r.Err != nil {
		t.Fatalf("too early: %v", r.Err)
	}
	if r := fillBoth(1025); !errors.Is(r.Err, ErrHalted) || !errors.Is(damaged.fatal, ErrDiverged) {
		t.Fatalf("%v; fatal %v", r.Err, damaged.fatal)
	}
}

const day = int64(24 * time.Hour)

func TestIDsAreForgotten(t *testing.T) {
	n := fresh(t)
	id := func(b byte) event.ID { return event.ID{0xee, b} }
	put := func(nanos int64, b byte, aggregate string) Result {
		p := proposal(1, aggregate, event.Any)
		p.ID = id(b)
		return n.apply(t, command(t, n.Head().Applied+1, nanos, n.Head(), p))
	}
	known := func(b byte) bool {
		_, ok, err := n.ByID(id(b))
		if err != nil {
			t.Fatal(err)
		}
		return ok
	}
	put(1, 1, "x")
	put(2, 2, "x")
	// Below the level nothing is forgotten, however old.
	fillTo(t, n, rememberEvents+100, 3)
	put(3*day, 3, "y")
	if !known(1) {
		t.Fatal("forgotten below the level")
	}
	n.apply(t, command(t, n.Head().Applied+1, 3*day, n.Head(), event.RaiseTo(2, event.Any, event.NewID(), event.Actor{})))
	if known(1) {
		t.Fatal("a command does not make an old id forgotten")
	}
	// Work per command is bounded, and there is progress with each.
	before := n.now.ids
	put(3*day+1, 4, "y")
	if got := n.now.ids - before; got != 2 {
		t.Fatalf("a command of one event forgot %d ids", got)
	}
	// The newest are kept even if they are old.
	for range 500 {
		p := proposal(1, "w", event.Any)
		p.ID = event.NewID()
		n.apply(t, command(t, n.Head().Applied+1, 9*day, n.Head(), p))
	}
	if !known(3) || n.now.ids+rememberEvents > n.Head().Seq+1 {
		t.Fatalf("ids up to %d of %d are forgotten", n.now.ids, n.Head().Seq)
	}
	// A forgotten id is new again, and its second event is then remembered.
	r := put(9*day, 1, "x")
	if r.Err != nil || len(r.Events) != 1 || r.Events[0].AggregateVersion != 3 {
		t.Fatalf("%+v", r)
	}
	if r = put(9*day, 1, "x"); r.Err != nil || r.Events[0].AggregateVersion != 3 {
		t.Fatalf("the second time is not remembered: %+v", r)
	}
	var all sum
	if err := n.sumUp(&all); err != nil || all != n.now.sum {
		t.Fatalf("counted %x, kept %x, %v", all, n.now.sum, err)
	}
	if again := reopen(t, n); again.now.ids != n.now.ids {
		t.Fatal("how far it has forgotten was lost in a restart")
	}
}

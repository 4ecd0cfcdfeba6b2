package eventlog

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/upload"
)

// cluster is a log that several services follow. Raft is not part of it: it has
// tests of its own, and chaos has whole clusters.
type cluster struct {
	t      testing.TB
	ca     *pki.CA
	caHash [32]byte
	nodes  map[string]*member
	dest   recording.Store

	mu       sync.Mutex
	changed  chan struct{}
	events   []raftstore.StoredEvent
	versions map[string]uint64
	leader   string
	now      time.Time // of events
	level    uint32
}

// member is one node.
type member struct {
	*cluster
	name  string
	keys  []crypto.Signer
	cert  []byte
	dir   string
	svc   *Service
	fatal chan error
	stop  func()
	// lie, when set, changes what this node has as an event.
	lie func(e raftstore.StoredEvent) raftstore.StoredEvent
	// answer, when set, changes what this node answers.
	answer func(*Reply)
	down   bool
}

const clusterID = "test"

func newCluster(t testing.TB, dest recording.Store) *cluster {
	t.Helper()
	ca, err := pki.NewCA(clusterID, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &cluster{
		t: t, ca: ca, caHash: sha256.Sum256(ca.Cert.Raw), nodes: map[string]*member{}, dest: dest,
		changed: make(chan struct{}), versions: map[string]uint64{}, now: time.Now(), level: event.Level,
	}
}

func (c *cluster) issue(name string) (*ecdsa.PrivateKey, []byte) {
	c.t.Helper()
	key, err := pki.NewNodeKey()
	if err != nil {
		c.t.Fatal(err)
	}
	csr, err := pki.CSR(key)
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := c.ca.SignNode(csr, clusterID, pki.Voter, name, pki.SANs{}, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	return key, cert
}

// add makes a member: the first makes the cluster, others join. It is started.
func (c *cluster) add(name string) *member {
	c.t.Helper()
	key, cert := c.issue(name)
	m := &member{cluster: c, name: name, keys: []crypto.Signer{key}, cert: cert, dir: filepath.Join(c.t.TempDir(), "tlog")}
	info := event.NodeInfo{Name: name, Addr: name + ":1", Role: pki.Voter, Cert: cert}
	c.mu.Lock()
	first := len(c.nodes) == 0
	c.nodes[name] = m
	if first {
		c.leader = name
	}
	c.mu.Unlock()
	if first {
		c.append(event.TypeClusterCreated, "cluster", event.ClusterCreated{ID: clusterID, CA: c.ca.Cert.Raw, Node: info})
	} else {
		c.append(event.TypeNodeJoined, "node/"+name, event.NodeJoined{Node: info})
	}
	m.start()
	c.t.Cleanup(func() { m.halt() })
	return m
}

func (m *member) start() {
	m.t.Helper()
	m.fatal = make(chan error, 4)
	var err error
	m.svc, err = Open(Options{
		Dir: m.dir, Node: m.name, Store: m, Keys: func() []crypto.Signer { m.mu.Lock(); defer m.mu.Unlock(); return m.keys },
		FeatureLevel: func() uint32 { m.mu.Lock(); defer m.mu.Unlock(); return m.level },
		Ask:          m.ask, Objects: m.dest, Fatal: func(err error) { m.fatal <- err },
		Log: slog.New(slog.DiscardHandler), Every: 20 * time.Millisecond, Events: 100,
	})
	if err != nil {
		m.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	svc := m.svc
	go func() {
		defer close(done)
		if err := svc.Run(ctx); err != nil && !errors.Is(err, raftstore.ErrDiverged) {
			m.t.Error(m.name, err)
		}
	}()
	m.stop = sync.OnceFunc(func() { cancel(); <-done })
}

func (m *member) halt() { m.stop() }

func (m *member) ask(ctx context.Context, node string, r *Request) (*Reply, error) {
	m.mu.Lock()
	o := m.nodes[node]
	ok := o != nil && !o.down
	var change func(*Reply)
	if o != nil {
		change = o.answer
	}
	m.mu.Unlock()
	if !ok {
		return nil, errors.New("it does not answer")
	}
	rep, err := o.svc.Cosign(ctx, r)
	if err == nil && change != nil {
		change(rep)
	}
	return rep, err
}

// Envelopes, WaitSeq, Append, IsLeader and Leader are the Store.
func (m *member) Envelopes(from uint64, max int) ([]raftstore.StoredEvent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if from > uint64(len(m.events)) {
		return nil, nil
	}
	es := slices.Clone(m.events[from-1 : min(from-1+uint64(max), uint64(len(m.events)))])
	if m.lie != nil {
		for i := range es {
			es[i] = m.lie(es[i])
		}
	}
	return es, nil
}

func (m *member) WaitSeq(ctx context.Context, seq uint64) error {
	for {
		m.mu.Lock()
		n, changed := len(m.events), m.changed
		m.mu.Unlock()
		if uint64(n) >= seq {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (m *member) IsLeader() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.leader == m.name }

func (m *member) Leader() (id, addr string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.leader, ""
}

func (m *member) Append(_ context.Context, batch ...event.Proposal) ([]event.Event, error) {
	if !m.IsLeader() {
		return nil, &raftstore.NotLeaderError{}
	}
	return m.put(batch...)
}

func (c *cluster) put(batch ...event.Proposal) ([]event.Event, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []event.Event
	for _, p := range batch {
		have := c.versions[p.Aggregate]
		if p.Expect != event.Any && p.Expect != have {
			return nil, &raftstore.ConflictError{Aggregate: p.Aggregate, Want: p.Expect, Have: have}
		}
		c.versions[p.Aggregate]++
		raw, err := p.Marshal()
		if err != nil {
			return nil, err
		}
		c.now = c.now.Add(time.Millisecond)
		n := uint64(len(c.events) + 1)
		e := event.Event{Proposal: p, Seq: n, Index: n + 2, Term: 2, Time: c.now.UTC(), AggregateVersion: have + 1}
		st := raftstore.StoredEvent{Seq: n, Envelope: event.MarshalEnvelope(&e, raw)}
		if n > 1 {
			st.Chain = c.events[n-2].Chain
		}
		st.Chain = event.Chain(st.Chain, st.Envelope)
		c.events = append(c.events, st)
		out = append(out, e)
	}
	close(c.changed)
	c.changed = make(chan struct{})
	return out, nil
}

// append appends an event as whoever leads.
func (c *cluster) append(typ, aggregate string, payload any) {
	c.t.Helper()
	version, data, err := event.Encode(event.Level, typ, payload)
	if err == nil {
		_, err = c.put(event.Proposal{
			ID: event.NewID(), Type: typ, Version: version, Aggregate: aggregate, Expect: event.Any, Payload: data,
			Actor: event.Actor{Principal: "admin", Kind: event.Human},
		})
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// fill appends n small events.
func (c *cluster) fill(n int) {
	c.t.Helper()
	for i := range n {
		c.append(event.TypeRevoked, fmt.Sprintf("revocation/%d", i), event.Revoked{ID: fmt.Sprint(i), Subject: "s", Reason: "test"})
	}
}

func (c *cluster) size() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return uint64(len(c.events))
}

// fall has a node answer no more.
func (c *cluster) fall(name string) { c.mu.Lock(); defer c.mu.Unlock(); c.nodes[name].down = true }

func (c *cluster) lead(name string) { c.mu.Lock(); defer c.mu.Unlock(); c.leader = name }

// eventually polls; the limit is for a machine that does other things.
func (c *cluster) eventually(what string, f func() error) {
	c.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// cosigned waits until everything but checkpoints is covered by one, on every
// running node.
func (c *cluster) cosigned() {
	c.t.Helper()
	for _, m := range c.nodes {
		if m.down {
			continue
		}
		c.eventually("checkpoint on "+m.name, func() error {
			if size := m.svc.tree.Size(); size < c.size() || m.svc.pending(size) > 0 {
				b, _ := json.Marshal(m.svc.Status())
				return fmt.Errorf("%d events, %s", c.size(), b)
			}
			return nil
		})
	}
}

// exported waits until the leader has brought all of it to the store.
func (c *cluster) exported() {
	c.t.Helper()
	c.cosigned()
	c.eventually("export", func() error {
		c.mu.Lock()
		m := c.nodes[c.leader]
		c.mu.Unlock()
		st := m.svc.Status()
		if st.Export.Checkpoint != m.svc.checkpoints() || st.Export.Waiting != 0 || st.Checkpoint != st.Export.Checkpoint {
			b, _ := json.Marshal(st)
			return fmt.Errorf("%s", b)
		}
		return nil
	})
}

func (c *cluster) verify(src Source, o VerifyOptions) *Report {
	c.t.Helper()
	o.CA = c.caHash
	rep, err := Verify(context.Background(), src, o)
	if err != nil {
		c.t.Fatal(err)
	}
	return rep
}

func (c *cluster) mustVerify(src Source, o VerifyOptions) *Report {
	c.t.Helper()
	rep := c.verify(src, o)
	if !rep.OK() {
		c.t.Fatalf("a good log: %s", problems(rep))
	}
	return rep
}

func problems(rep *Report) string {
	var b strings.Builder
	for _, p := range rep.Problems {
		fmt.Fprintf(&b, "\n%s %s: %s", p.Kind, p.Object, p.Text)
	}
	return b.String()
}

func mustDir(t testing.TB) (recording.Store, string) {
	t.Helper()
	dir := t.TempDir()
	st, err := upload.Open(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return st, dir
}

// TestCheckpoints: three voters make checkpoints, an idle cluster makes none,
// and what is exported and what a node lends verify.
func TestCheckpoints(t *testing.T) {
	dest, _ := mustDir(t)
	c := newCluster(t, dest)
	a, b, d := c.add("a"), c.add("b"), c.add("c")
	c.fill(300)
	c.append(event.TypeConfigApplied, "config", event.ConfigApplied{Files: []event.ConfigFile{{Path: "x", Data: make([]byte, 100<<10)}}})
	c.fill(10)
	c.exported()
	rep := c.mustVerify(dest, VerifyOptions{})
	if rep.Events < 313 || len(rep.Voters) != 3 || rep.Seen == nil || rep.Cluster != clusterID || rep.Anchored {
		t.Errorf("%+v", rep)
	}
	for _, m := range []*member{a, b, d} {
		live := c.mustVerify(m.svc, VerifyOptions{Seen: rep.Seen})
		if live.Root != rep.Root || live.Chain != rep.Chain || !live.Anchored {
			t.Errorf("%s: %+v, the store %+v", m.name, live, rep)
		}
		if st := m.svc.Status(); len(st.Alarms) > 0 || st.Cosigned != rep.Events {
			t.Errorf("%s: %+v", m.name, st)
		}
	}
	c.mu.Lock()
	chain := fmt.Sprintf("%x", c.events[rep.Events-1].Chain)
	c.mu.Unlock()
	if rep.Chain != chain {
		t.Errorf("chain %s, want %s", rep.Chain, chain)
	}

	// Idle: whatever time passes, no checkpoint follows on a checkpoint alone.
	n := c.size()
	if a.svc.due(a.svc.tree.Size(), time.Now().Add(time.Hour)) || a.svc.pending(n) != 0 {
		t.Error("a checkpoint of checkpoints is due")
	}

	// Proofs hold offline, and for another event they do not.
	for _, seq := range []uint64{1, 2, 257, 304, rep.Events} {
		p, err := Prove(context.Background(), dest, seq)
		if err != nil {
			t.Fatal(seq, err)
		}
		e, cp, err := p.Check(c.caHash, rep.Seen)
		if err != nil || e.Seq != seq || cp.Size != rep.Events {
			t.Fatalf("event %d: %v %v", seq, cp, err)
		}
	}
	if _, err := Prove(context.Background(), dest, rep.Events+1); err == nil {
		t.Error("proved what no checkpoint covers")
	}

	// Another leader goes on; a restarted node knows where it was.
	c.lead("b")
	c.fill(5)
	c.exported()
	a.halt()
	a.start()
	if st := a.svc.Status(); st.Events == 0 || st.Checkpoint == 0 {
		t.Errorf("after a restart: %+v", st)
	}
	c.lead("a")
	c.fill(5)
	c.exported()
	again := c.mustVerify(dest, VerifyOptions{Seen: rep.Seen})
	if again.Events <= rep.Events || !again.Anchored {
		t.Errorf("%+v", again)
	}
	// An old proof's checkpoint is not the one seen, but its cosigners are known.
	p, err := Prove(context.Background(), dest, 7)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.Check(c.caHash, rep.Seen); err != nil {
		t.Error(err)
	}
	for name, f := range map[string]func(p *Proof){
		"another number":  func(p *Proof) { p.Seq++ },
		"another event":   func(p *Proof) { p.Envelope[9] ^= 1 },
		"another path":    func(p *Proof) { p.Hashes[0] = p.Hashes[1] },
		"no path":         func(p *Proof) { p.Hashes = nil },
		"long path":       func(p *Proof) { p.Hashes = make([]string, 1000) },
		"no checkpoint":   func(p *Proof) { p.Checkpoint = "" },
		"event 0":         func(p *Proof) { p.Seq = 0 },
		"one cosignature": func(p *Proof) { p.Checkpoint = keepLines(p.Checkpoint, 1) },
	} {
		q := *p
		q.Envelope = slices.Clone(p.Envelope)
		q.Hashes = slices.Clone(p.Hashes)
		f(&q)
		if _, _, err := q.Check(c.caHash, rep.Seen); err == nil {
			t.Errorf("%s: the proof holds", name)
		}
	}
	if _, _, err := p.Check(c.caHash, nil); err == nil {
		t.Error("a proof holds although nobody knows the voters")
	}
	if _, _, err := p.Check([32]byte{}, rep.Seen); err == nil {
		t.Error("a proof holds for another CA")
	}
}

// keepLines keeps only the first n cosignatures of a note.
func keepLines(note string, n int) string {
	head, sigs, _ := strings.Cut(note, "\n\n")
	return head + "\n\n" + strings.Join(strings.SplitAfter(sigs, "\n")[:n], "")
}

// TestMembersChange: voters come, are renewed and go, and the log verifies all
// along.
func TestMembersChange(t *testing.T) {
	dest, _ := mustDir(t)
	c := newCluster(t, dest)
	c.add("a")
	c.fill(3)
	c.cosigned()
	b := c.add("b")
	c.add("c")
	c.cosigned()
	c.eventually("settled", c.nodes["a"].svc.Settled)

	// b gets a new key: it cosigns with the old one until a checkpoint knows
	// the new one.
	key, cert := c.issue("b")
	c.mu.Lock()
	b.keys = append(slices.Clone(b.keys), key)
	c.mu.Unlock()
	c.append(event.TypeNodeRenewed, "node/b", event.NodeRenewed{Name: "b", Cert: cert})
	c.fill(1)
	c.cosigned()
	c.append(event.TypeNodeRenewed, "node/b", event.NodeRenewed{Name: "b", Cert: cert, Retired: true})
	c.fill(1)
	c.cosigned()
	if k, err := b.svc.signer(); err != nil || !key.PublicKey.Equal(k.Public()) {
		t.Error("b still signs with the old key", err)
	}

	c.append(event.TypeNodeRemoved, "node/c", event.NodeRemoved{Name: "c", Reason: "test"})
	c.fall("c")
	c.fill(1)
	c.cosigned()
	c.eventually("settled", c.nodes["a"].svc.Settled)
	c.append(event.TypeNodeRemoved, "node/b", event.NodeRemoved{Name: "b", Reason: "test"})
	c.fall("b")
	c.fill(1)
	c.exported()
	rep := c.mustVerify(dest, VerifyOptions{})
	if strings.Join(rep.Voters, " ") != "a" {
		t.Errorf("%+v", rep)
	}
}

// TestNoMajority: nothing is vouched for without a majority, and the log goes on.
func TestNoMajority(t *testing.T) {
	c := newCluster(t, nil)
	a := c.add("a")
	c.add("b")
	c.add("c")
	c.cosigned()
	n := a.svc.checkpoints()
	c.mu.Lock()
	for _, m := range c.nodes {
		m.down = m.name != "a"
	}
	c.mu.Unlock()
	c.fill(50)
	c.eventually("a problem", func() error {
		if st := a.svc.Status(); !strings.Contains(st.Problem, "b: it does not answer") {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	if a.svc.checkpoints() != n {
		t.Fatal("a checkpoint without a majority")
	}
	c.mu.Lock()
	c.nodes["b"].down = false
	c.mu.Unlock()
	c.cosigned()
	if st := a.svc.Status(); st.Problem != "" || len(st.Alarms) > 0 {
		t.Errorf("%+v", st)
	}
}

func TestFeatureLevel(t *testing.T) {
	c := newCluster(t, nil)
	c.level = event.BaseLevel
	a := c.add("a")
	c.fill(3)
	if a.svc.due(c.size(), time.Now().Add(time.Hour)) || a.svc.Status().Problem == "" {
		t.Error("a checkpoint is due before every member can read it")
	}
	c.mu.Lock()
	c.level = event.Level
	c.mu.Unlock()
	c.cosigned()
}

// other changes one event as a node has it.
func other(seq uint64) func(raftstore.StoredEvent) raftstore.StoredEvent {
	return func(e raftstore.StoredEvent) raftstore.StoredEvent {
		if e.Seq == seq {
			e.Envelope = slices.Clone(e.Envelope)
			e.Envelope[len(e.Envelope)-4] ^= 1 // inside the payload's last text
		}
		return e
	}
}

func (m *member) awaitFatal() error {
	m.t.Helper()
	select {
	case err := <-m.fatal:
		return err
	case <-time.After(30 * time.Second):
		m.t.Fatalf("%s goes on: %+v", m.name, m.svc.Status())
		return nil
	}
}

// TestDivergence: who has other events than the majority stops, be it a
// follower or the leader; the others go on.
func TestDivergence(t *testing.T) {
	for _, who := range []string{"b", "a"} {
		t.Run(who, func(t *testing.T) {
			c := newCluster(t, nil)
			c.add("a")
			c.add("b")
			c.add("c")
			c.cosigned()
			m := c.nodes[who]
			c.mu.Lock()
			m.lie = other(uint64(len(c.events)) + 2)
			c.mu.Unlock()
			c.fill(5)
			if err := m.awaitFatal(); !errors.Is(err, ErrDiverged) || !errors.Is(err, raftstore.ErrDiverged) {
				t.Fatal(err)
			}
			m.halt()
			if st := m.svc.Status(); len(st.Alarms) == 0 {
				t.Errorf("no alarm: %+v", st)
			}
			c.mu.Lock()
			m.down = true
			c.leader = "c"
			c.mu.Unlock()
			c.fill(3)
			c.cosigned()
		})
	}
}

// TestDamagedTree: damage to the tree's own files is mended, not taken for
// other events.
func TestDamagedTree(t *testing.T) {
	for _, who := range []string{"a", "b"} {
		t.Run(who, func(t *testing.T) {
			c := newCluster(t, nil)
			c.add("a")
			c.add("b")
			c.add("c")
			c.cosigned()
			m := c.nodes[who]
			c.mu.Lock()
			at := uint64(len(c.events)) + 2
			wrong := other(at)
			seen := false
			m.lie = func(e raftstore.StoredEvent) raftstore.StoredEvent {
				if e.Seq == at && !seen { // once: the tree gets it wrong, the events are right
					seen = true
					return wrong(e)
				}
				return e
			}
			c.mu.Unlock()
			c.fill(5)
			c.cosigned()
			select {
			case err := <-m.fatal:
				t.Fatal(err)
			default:
			}
		})
	}
}

// TestVouchesOnce: a node that cosigned one history does not cosign another,
// even when its own disk says so.
func TestVouchesOnce(t *testing.T) {
	c := newCluster(t, nil)
	a := c.add("a")
	c.fill(20)
	c.cosigned()
	size := a.svc.Status().Cosigned
	a.halt()
	c.mu.Lock()
	a.lie = other(size - 1)
	c.mu.Unlock()
	if err := a.svc.tree.Reset(); err == nil {
		t.Log("reset a closed tree") // its files are made anew below in any case
	}
	a.dir = a.svc.o.Dir
	mustRemove(t, filepath.Join(a.dir, "mark"))
	a.start()
	c.eventually("tree", func() error {
		if a.svc.tree.Size() < size {
			return errors.New("it is not computed anew")
		}
		return nil
	})
	if _, err := a.svc.Cosign(context.Background(), &Request{Size: size, Root: make([]byte, 32)}); err == nil {
		t.Error("it vouches for a second history")
	}
}

// TestBadAnswers: what voters answer is checked before it counts.
func TestBadAnswers(t *testing.T) {
	c := newCluster(t, nil)
	a, b := c.add("a"), c.add("b")
	c.add("c")
	c.cosigned()
	c.mu.Lock()
	b.answer = func(r *Reply) { r.Cosignature = slices.Clone(r.Cosignature); r.Cosignature[20] ^= 1 }
	c.mu.Unlock()
	c.fill(5)
	c.cosigned()
	c.mu.Lock()
	b.answer = func(r *Reply) { r.Root = r.Root[:5] }
	c.mu.Unlock()
	c.fill(5)
	c.cosigned()
	if st := a.svc.Status(); len(st.Alarms) > 0 {
		t.Errorf("%+v", st)
	}
	if _, err := a.svc.Cosign(context.Background(), &Request{}); err == nil {
		t.Error("vouched for nothing")
	}
}

func mustRemove(t testing.TB, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

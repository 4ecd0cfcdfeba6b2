package transport_test

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/storetest"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// testFSM remembers what was applied.
type testFSM struct {
	mu        sync.Mutex
	v         []string
	committed func(index uint64) // hears what is about to be applied
}

func (f *testFSM) Apply(l *raft.Log) any {
	f.committed(l.Index)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.v = append(f.v, fmt.Sprintf("%d:%s", l.Index, l.Data))
	return nil
}

func (f *testFSM) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.v, " ")
}

func (f *testFSM) Snapshot() (raft.FSMSnapshot, error) { return nil, errors.New("none") }
func (f *testFSM) Restore(io.ReadCloser) error         { return errors.New("none") }

// hangingStore is a log on a disk that can hang.
type hangingStore struct {
	*raft.InmemStore
	hang  atomic.Bool
	since atomic.Int64
}

func (s *hangingStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

func (s *hangingStore) StoreLogs(ls []*raft.Log) error {
	s.since.Store(time.Now().UnixNano())
	defer s.since.Store(0)
	for s.hang.Load() {
		time.Sleep(5 * time.Millisecond)
	}
	return s.InmemStore.StoreLogs(ls)
}

func (s *hangingStore) busy() time.Duration {
	if t := s.since.Load(); t != 0 {
		return time.Since(time.Unix(0, t))
	}
	return 0
}

const (
	pass = iota
	cut
	heartbeatsOnly
)

// gate lets calls out or not, by destination.
type gate struct {
	*transport.Raft
	mu    sync.Mutex
	state map[raft.ServerID]int
}

func (g *gate) set(id raft.ServerID, s int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.state[id] = s
}

func (g *gate) allows(id raft.ServerID, heartbeat bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if s := g.state[id]; s == cut || s == heartbeatsOnly && !heartbeat {
		return errors.New("cut")
	}
	return nil
}

func (g *gate) AppendEntries(id raft.ServerID, a raft.ServerAddress, q *raft.AppendEntriesRequest, p *raft.AppendEntriesResponse) error {
	if err := g.allows(id, len(q.Entries) == 0 && q.PrevLogEntry == 0 && q.LeaderCommitIndex == 0); err != nil {
		return err
	}
	return g.Raft.AppendEntries(id, a, q, p)
}

func (g *gate) RequestVote(id raft.ServerID, a raft.ServerAddress, q *raft.RequestVoteRequest, p *raft.RequestVoteResponse) error {
	if err := g.allows(id, false); err != nil {
		return err
	}
	return g.Raft.RequestVote(id, a, q, p)
}

func (g *gate) RequestPreVote(id raft.ServerID, a raft.ServerAddress, q *raft.RequestPreVoteRequest, p *raft.RequestPreVoteResponse) error {
	if err := g.allows(id, false); err != nil {
		return err
	}
	return g.Raft.RequestPreVote(id, a, q, p)
}

type raftNode struct {
	id    raft.ServerID
	addr  raft.ServerAddress
	raft  *raft.Raft
	fsm   *testFSM
	gate  *gate
	store *hangingStore
}

// raftNodes are three servers; the first one's timeouts are times slow.
func raftNodes(t *testing.T, heartbeat time.Duration, slow int) []*raftNode {
	t.Helper()
	return raftNodesWith(t, heartbeat, slow, func(*raft.Config) {})
}

// raftNodesWith is raftNodes with a change to their settings.
func raftNodesWith(t *testing.T, heartbeat time.Duration, slow int, tune func(*raft.Config)) []*raftNode {
	t.Helper()
	ca := storetest.NewCA(t)
	var nodes []*raftNode
	var conf raft.Configuration
	for i := range 3 {
		name := fmt.Sprint("n", i)
		e, _ := endpoint(t, ca, name)
		n := &raftNode{id: raft.ServerID(name), addr: raft.ServerAddress(e.Addr().String()), fsm: new(testFSM), store: &hangingStore{InmemStore: raft.NewInmemStore()}}
		tr := transport.NewRaft(transport.RaftConfig{
			Endpoint: e, Addr: string(n.addr), Log: hclog.NewNullLogger(), LogBusy: n.store.busy,
			Admit: func(string) error { return nil },
		})
		n.fsm.committed = tr.Committed
		n.gate = &gate{Raft: tr, state: make(map[raft.ServerID]int)}
		nodes = append(nodes, n)
		conf.Servers = append(conf.Servers, raft.Server{ID: n.id, Address: n.addr})
	}
	for i, n := range nodes {
		c := raft.DefaultConfig()
		c.LocalID = n.id
		c.Logger = hclog.NewNullLogger()
		h := heartbeat
		if i == 0 {
			h *= time.Duration(slow)
		}
		c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = h, h, h
		snaps := raft.NewInmemSnapshotStore()
		if err := raft.BootstrapCluster(c, n.store, n.store, snaps, n.gate, conf); err != nil {
			t.Fatal(err)
		}
		tune(c)
		r, err := raft.NewRaft(c, n.fsm, n.store, n.store, snaps, n.gate)
		if err != nil {
			t.Fatal(err)
		}
		n.raft = r
		n.gate.SetRaft(r)
		t.Cleanup(func() {
			n.store.hang.Store(false)
			f := r.Shutdown()
			n.gate.Close()
			f.Error()
		})
	}
	return nodes
}

func waitLeader(t *testing.T, nodes ...*raftNode) *raftNode {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		for _, n := range nodes {
			if n.raft.State() == raft.Leader {
				return n
			}
		}
	}
	t.Fatal("no leader")
	return nil
}

// hashicorp/raft #695: a heartbeat of a new leader reaches the old one, which
// does not know yet, around its main goroutine. As shipped, the old leader then
// writes its next entry with the new term, and nodes apply different entries at
// one index.
func TestHeartbeatCannotDepose(t *testing.T) {
	nodes := raftNodes(t, 300*time.Millisecond, 10) // the first does not notice time passing
	a := nodes[0]
	for end := time.Now().Add(15 * time.Second); a.raft.State() != raft.Leader; time.Sleep(300 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("leadership could not be moved")
		}
		if l := waitLeader(t, nodes...); l != a {
			l.raft.LeadershipTransferToServer(a.id, a.addr).Error()
		}
	}
	if err := a.raft.Apply([]byte("base"), time.Second).Error(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	for _, n := range nodes[1:] {
		a.gate.set(n.id, cut)
		n.gate.set(a.id, cut)
	}
	b := waitLeader(t, nodes[1:]...)
	if err := b.raft.Apply([]byte("Y"), 5*time.Second).Error(); err != nil {
		t.Fatal(err)
	}
	b.gate.set(a.id, heartbeatsOnly)
	for end := time.Now().Add(time.Second); a.raft.CurrentTerm() < b.raft.CurrentTerm() && time.Now().Before(end); {
		time.Sleep(100 * time.Microsecond)
	}
	f := a.raft.Apply([]byte("X"), time.Second)
	time.Sleep(50 * time.Millisecond)
	for _, n := range nodes[1:] {
		n.gate.set(a.id, pass)
		a.gate.set(n.id, pass)
	}
	if err := f.Error(); err == nil {
		t.Error("a deposed leader's entry was acknowledged")
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		l := waitLeader(t, nodes...)
		if l.raft.Apply([]byte("Z"), time.Second).Error() == nil || time.Now().After(end) {
			break
		}
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		x, y, z := nodes[0].fsm.String(), nodes[1].fsm.String(), nodes[2].fsm.String()
		if x == y && y == z {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("nodes differ:\n%s\n%s\n%s", x, y, z)
		}
	}
}

// The fast path is there for this: a follower whose disk stalls still answers
// heartbeats, so a leader that needs it keeps its seat.
func TestHeartbeatPassesAStalledDisk(t *testing.T) {
	nodes := raftNodes(t, 500*time.Millisecond, 1)
	l := waitLeader(t, nodes...)
	for end := time.Now().Add(15 * time.Second); l.raft.Barrier(time.Second).Error() != nil; l = waitLeader(t, nodes...) {
		if time.Now().After(end) {
			t.Fatal("no stable leader")
		}
	}
	time.Sleep(300 * time.Millisecond) // heartbeats have gone round
	var followers []*raftNode
	for _, n := range nodes {
		if n != l {
			followers = append(followers, n)
		}
	}
	l.gate.set(followers[0].id, cut)
	followers[0].gate.set(l.id, cut)
	followers[0].gate.set(followers[1].id, cut)
	followers[1].store.hang.Store(true)
	f := l.raft.Apply([]byte("x"), time.Second)
	for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if l.raft.State() != raft.Leader {
			t.Fatal("the leader lost its seat")
		}
	}
	followers[1].store.hang.Store(false)
	if err := f.Error(); err != nil {
		t.Fatal(err)
	}
}

// hashicorp/raft #503: a leader whose disk hangs gives way.
func TestLeaderWithHungDiskGivesWay(t *testing.T) {
	nodes := raftNodes(t, 300*time.Millisecond, 1)
	l := waitLeader(t, nodes...)
	for l.raft.Barrier(time.Second).Error() != nil {
		l = waitLeader(t, nodes...)
	}
	var others []*raftNode
	for _, n := range nodes {
		if n != l {
			others = append(others, n)
		}
	}
	l.store.hang.Store(true)
	go l.raft.Apply([]byte("x"), time.Second)
	from := time.Now()
	waitLeader(t, others...)
	t.Logf("a new leader after %v", time.Since(from).Round(10*time.Millisecond))
}

// What a call says of its sender must be what the certificate says.
func TestCallerIsItsCertificate(t *testing.T) {
	ca := storetest.NewCA(t)
	target, _ := endpoint(t, ca, "target")
	var refuse atomic.Bool
	tr := transport.NewRaft(transport.RaftConfig{
		Endpoint: target, Addr: target.Addr().String(), Log: hclog.NewNullLogger(),
		LogBusy: func() time.Duration { return 0 },
		Admit: func(peer string) error {
			if refuse.Load() {
				return fmt.Errorf("%s is not a voter", peer)
			}
			return nil
		},
	})
	defer tr.Close()
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case rpc := <-tr.Consumer():
				if _, ok := rpc.Command.(*raft.AppendEntriesRequest); ok {
					rpc.Respond(&raft.AppendEntriesResponse{Success: true}, nil)
				} else {
					rpc.Respond(&raft.RequestVoteResponse{Granted: true}, nil)
				}
			case <-done:
				return
			}
		}
	}()
	e, _ := endpoint(t, ca, "caller")
	var busy atomic.Int64
	caller := transport.NewRaft(transport.RaftConfig{
		Endpoint: e, Addr: e.Addr().String(), Log: hclog.NewNullLogger(),
		LogBusy: func() time.Duration { return time.Duration(busy.Load()) }, Admit: func(string) error { return nil },
	})
	defer caller.Close()
	addr := raft.ServerAddress(target.Addr().String())
	header := func(id string) raft.RPCHeader {
		return raft.RPCHeader{ProtocolVersion: 3, ID: []byte(id), Addr: []byte(e.Addr().String())}
	}
	entries := func(to, id string, heartbeat bool) error {
		q := &raft.AppendEntriesRequest{RPCHeader: header(id), Term: 1}
		if !heartbeat {
			q.PrevLogEntry, q.PrevLogTerm = 1, 1
		}
		var p raft.AppendEntriesResponse
		err := caller.AppendEntries(raft.ServerID(to), addr, q, &p)
		if err == nil && !p.Success {
			err = errors.New("no success")
		}
		return err
	}
	vote := func(id string) error {
		var p raft.RequestVoteResponse
		return caller.RequestVote("target", addr, &raft.RequestVoteRequest{RPCHeader: header(id), Term: 1}, &p)
	}
	for _, heartbeat := range []bool{false, true} {
		if err := entries("target", "caller", heartbeat); err != nil {
			t.Fatalf("as itself: %v", err)
		}
		if err := entries("target", "n1", heartbeat); err == nil {
			t.Fatal("as another it was heard")
		}
		if err := entries("n2", "caller", heartbeat); !errors.Is(err, transport.ErrWrongPeer) {
			t.Fatalf("sent to another than was meant: %v", err)
		}
		refuse.Store(true)
		if err := entries("target", "caller", heartbeat); err == nil || !strings.Contains(err.Error(), "not a voter") {
			t.Fatalf("refused by Admit: %v", err)
		}
		refuse.Store(false)
		busy.Store(int64(1100 * time.Millisecond))
		if err := entries("target", "caller", heartbeat); !errors.Is(err, transport.ErrDiskStalled) {
			t.Fatalf("with a hanging disk: %v", err)
		}
		busy.Store(0)
	}
	if err := vote("caller"); err != nil {
		t.Fatal(err)
	}
	if err := vote("n1"); err == nil {
		t.Fatal("it voted as another")
	}
	if _, err := caller.AppendEntriesPipeline("target", addr); !errors.Is(err, raft.ErrPipelineReplicationNotSupported) {
		t.Fatalf("pipeline: %v", err)
	}
}

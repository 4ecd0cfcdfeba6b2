package raftstore_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fsm"
	"github.com/sallyport/sallyport/raftstore/storetest"
	"github.com/sallyport/sallyport/raftstore/transport"
)

func TestThreeNodes(t *testing.T) {
	c := storetest.New(t, 3, nil)
	leader := c.Leader()
	follower := c.Followers()[0]

	first := storetest.Proposal("approval/first", 0, "first")
	e := c.Append(first)[0]
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := follower.Store.WaitIndex(ctx, e.Index); err != nil {
		t.Fatal(err)
	}
	if f, ok, err := follower.Store.ByID(first.ID); err != nil || !ok || f.Chain != e.Chain || !f.Time.Equal(e.Time) {
		t.Fatalf("on a follower: %+v %v %v", f, ok, err)
	}
	var not *raftstore.NotLeaderError
	if _, err := follower.Store.Append(ctx, storetest.Proposal("a", 0, "")); !errors.As(err, &not) || not.ID != leader.Name || not.Addr != leader.Addr {
		t.Fatalf("append on a follower: %v", err)
	}
	if id, addr := follower.Store.Leader(); id != leader.Name || addr != leader.Addr {
		t.Fatalf("leader as a follower knows it: %s %s", id, addr)
	}
	ms, err := follower.Store.Members()
	if err != nil || len(ms) != 3 {
		t.Fatalf("members: %v %v", ms, err)
	}

	// Writers on all nodes while the leader goes away: what was acknowledged
	// is there afterwards, once.
	var (
		mu    sync.Mutex
		acked []event.ID
		wg    sync.WaitGroup
	)
	stop := make(chan struct{})
	var stores []*raftstore.Store
	for _, n := range c.Nodes {
		stores = append(stores, n.Store)
	}
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				p := storetest.Proposal(fmt.Sprintf("approval/%d-%d", w, i), event.Any, "x")
				if retry(t, stores, p, stop) {
					mu.Lock()
					acked = append(acked, p.ID)
					mu.Unlock()
				}
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
	changes := follower.Store.LeaderChanges()
	for len(changes) > 0 {
		<-changes
	}
	from := time.Now()
	c.Crash(leader)
	next := c.Leader()
	t.Logf("a new leader after %v", time.Since(from).Round(time.Millisecond))
	if d := time.Since(from); d > 10*time.Second {
		t.Fatalf("a new leader after %v", d)
	}
	select {
	case <-changes:
	case <-ctx.Done():
		t.Fatal("no word of the change of leader")
	}
	time.Sleep(300 * time.Millisecond)
	close(stop)
	wg.Wait()
	if len(acked) < 10 {
		t.Fatalf("only %d acknowledged", len(acked))
	}
	seen := map[event.ID]bool{}
	for seq := uint64(1); ; {
		es, err := next.Store.Events(seq, 100)
		if err != nil {
			t.Fatal(err)
		}
		if len(es) == 0 {
			break
		}
		for _, e := range es {
			if seen[e.ID] {
				t.Fatalf("event %d is there twice", e.Seq)
			}
			seen[e.ID] = true
		}
		seq += uint64(len(es))
	}
	for _, id := range acked {
		if !seen[id] {
			t.Fatalf("an acknowledged event is lost")
		}
	}

	from = time.Now()
	c.Start(leader)
	c.Converge()
	t.Logf("the old leader caught up after %v", time.Since(from).Round(time.Millisecond))
	again := c.Append(first)
	if again[0].Seq != e.Seq || again[0].Chain != e.Chain {
		t.Fatalf("the same append after a change of leader: %+v", again)
	}
}

// retry appends p at whichever store leads until it is acknowledged or stop.
func retry(t *testing.T, stores []*raftstore.Store, p event.Proposal, stop chan struct{}) bool {
	for {
		for _, s := range stores {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			_, err := s.Append(ctx, p)
			cancel()
			if err == nil {
				return true
			}
		}
		select {
		case <-stop:
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// A node that joins when the log is already shortened gets a snapshot.
func TestSnapshotToNewNode(t *testing.T) {
	c := storetest.New(t, 3, func(cfg *raftstore.Config) { cfg.TrailingLogs = 10 })
	for i := range 60 {
		c.Append(storetest.Proposal(fmt.Sprintf("approval/%d", i), 0, fmt.Sprintf("payload %d", i)), storetest.Proposal("approval/all", event.Any, ""))
	}
	for _, n := range c.Nodes {
		if err := n.Store.Snapshot(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	fourth := c.Add()
	c.Join(fourth)
	c.Converge()
	es, err := fourth.Store.Events(1, 1000)
	if err != nil || len(es) != 120 {
		t.Fatalf("%d events, %v", len(es), err)
	}
	if v := fourth.Store.Version("approval/all"); v != 60 {
		t.Fatalf("version %d", v)
	}
	// ... and it survives a restart.
	c.Stop(fourth)
	c.Append(storetest.Proposal("approval/while-away", 0, ""))
	c.Start(fourth)
	c.Converge()
	c.Crash(c.Leader())
	c.Append(storetest.Proposal("approval/all", 60, "")) // three of four: it votes and acknowledges
	c.Converge()
}

// Followers restart while the log behind them is shortened, and come back over
// a snapshot on top of state they have.
func TestSnapshotToOldNode(t *testing.T) {
	c := storetest.New(t, 3, func(cfg *raftstore.Config) { cfg.TrailingLogs = 5 })
	c.Append(storetest.Proposal("approval/a", 0, ""))
	c.Converge()
	f := c.Followers()[0]
	c.Stop(f)
	for range 40 {
		c.Append(storetest.Proposal("approval/a", event.Any, ""))
	}
	if err := c.Leader().Store.Snapshot(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Start(f)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	next := uint64(1) // a reader at work is not disturbed
	err := f.Store.Follow(ctx, 1, func(es []event.Event) error {
		for _, e := range es {
			if e.Seq != next {
				return fmt.Errorf("event %d, want %d", e.Seq, next)
			}
			next++
		}
		if next > 41 {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, errEnough) {
		t.Fatal(err)
	}
	c.Converge()
}

func TestNoQuorum(t *testing.T) {
	c := storetest.New(t, 3, nil)
	l := c.Leader()
	fs := c.Followers()
	for _, f := range fs {
		f.Network.Cut.Store(true)
	}
	p := storetest.Proposal("approval/a", 0, "")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := l.Store.Append(ctx, p); !errors.Is(err, raftstore.ErrUnknownOutcome) {
		t.Fatalf("append without a majority: %v", err)
	}
	end := time.Now().Add(10 * time.Second)
	for l.Store.IsLeader() {
		if time.Now().After(end) {
			t.Fatal("a leader without followers stays leader")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, err := l.Store.Append(t.Context(), p); !errors.Is(err, raftstore.ErrNoLeader) {
		t.Fatalf("append without a leader: %v", err)
	}
	for _, f := range fs {
		f.Network.Cut.Store(false)
	}
	es := c.Append(p)
	c.Append(p)
	c.Converge()
	if seq, _, _ := c.Leader().Store.Head(); seq != es[0].Seq {
		t.Fatalf("the event was stored twice: %d events", seq)
	}
}

func TestRemove(t *testing.T) {
	c := storetest.New(t, 3, nil)
	f := c.Followers()[0]
	if err := c.Leader().Store.Remove(t.Context(), f.Name); err != nil {
		t.Fatal(err)
	}
	ms, err := c.Leader().Store.Members()
	if err != nil || len(ms) != 2 {
		t.Fatalf("members: %v %v", ms, err)
	}
	term := c.Leader().Store.Status().Term
	time.Sleep(2 * time.Second) // what it tries now does not disturb the others
	if now := c.Leader().Store.Status().Term; now != term {
		t.Fatalf("a removed node moved the term from %d to %d", term, now)
	}
	c.Append(storetest.Proposal("approval/a", 0, ""))
}

// A leader that was cut off has entries nobody else has; meanwhile the others
// shortened their logs to a point inside them (hashicorp/raft #697). It gets a
// snapshot and goes on.
func TestSnapshotOntoDivergentLog(t *testing.T) {
	c := storetest.New(t, 3, func(cfg *raftstore.Config) { cfg.TrailingLogs = 1 })
	c.Append(storetest.Proposal("approval/a", 0, ""))
	c.Converge()
	old := c.Leader()
	old.Network.Cut.Store(true)
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := old.Store.Append(ctx, storetest.Proposal("approval/lost", event.Any, "")); err == nil {
				t.Error("acknowledged without a majority")
			}
		})
	}
	wg.Wait()
	last := old.Store.Status().LastIndex
	c.Append(storetest.Proposal("approval/a", 1, ""))
	leader := c.Leader()
	if err := leader.Store.Snapshot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := leader.Store.Status(); st.LastIndex >= last {
		t.Skipf("the old leader stored only up to %d", last)
	}
	old.Network.Cut.Store(false)
	c.Append(storetest.Proposal("approval/a", 2, ""))
	c.Converge()
	if v := old.Store.Version("approval/lost"); v != 0 {
		t.Fatalf("version %d of what was never committed", v)
	}
}

// A node whose events differ from the leader's stops, says so once, and leaves
// the others alone.
func TestFatal(t *testing.T) {
	fatal := make(chan error, 10)
	c := storetest.New(t, 3, func(cfg *raftstore.Config) { cfg.OnFatal = func(err error) { fatal <- err } })
	f := c.Followers()[0]
	c.Append(storetest.Proposal("approval/a", 0, ""))
	c.Converge()
	// The follower forgets its state and makes up another: its chain differs.
	c.Stop(f)
	if err := os.RemoveAll(filepath.Join(f.Dir, "state")); err != nil {
		t.Fatal(err)
	}
	forge(t, f.Dir)
	c.Start(f)
	c.Append(storetest.Proposal("approval/a", 1, ""))
	select {
	case err := <-fatal:
		if !errors.Is(err, raftstore.ErrDiverged) {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("a node with other events goes on")
	}
	if err := f.Store.WaitSeq(t.Context(), 99); !errors.Is(err, raftstore.ErrDiverged) {
		t.Fatalf("waiting on a stopped node: %v", err)
	}
	if _, err := f.Store.Append(t.Context(), storetest.Proposal("approval/b", 0, "")); err == nil {
		t.Fatal("a stopped node appends")
	}
	c.Append(storetest.Proposal("approval/a", 2, "")) // the others go on
	c.Crash(f)
	if len(fatal) != 0 {
		t.Fatalf("told again: %v", <-fatal)
	}
}

// forge writes a state with one event of its own where the true one was.
func forge(t *testing.T, dir string) {
	t.Helper()
	s, err := fsm.Open(fsm.Config{Dir: filepath.Join(dir, "state"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	p := storetest.Proposal("approval/forged", 0, "")
	b, err := p.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	cmd := fsm.Command{TimeNanos: 1, Proposals: [][]byte{b}}
	data, err := cmd.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s.Apply(&raft.Log{Index: 3, Term: 1, Type: raft.LogCommand, Data: data})
	s.Apply(&raft.Log{Index: 4, Term: 1, Type: raft.LogConfiguration})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// A node with a good certificate that is no member cannot disturb a healthy
// cluster, whatever term it claims.
func TestStranger(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Append(storetest.Proposal("approval/a", 0, ""))
	e := storetest.Endpoint(t, c.CA, c.CA.Issue(t, "stranger"), storetest.ListenUDP(t, "127.0.0.1:0"), nil)
	defer e.Close()
	tr := transport.NewRaft(transport.RaftConfig{
		Endpoint: e, Addr: e.Addr().String(), Log: hclog.NewNullLogger(),
		LogBusy: func() time.Duration { return 0 }, Admit: func(string) error { return nil },
	})
	defer tr.Close()
	for _, n := range c.Nodes {
		term := n.Store.Status().Term
		h := raft.RPCHeader{ProtocolVersion: 3, ID: []byte("stranger"), Addr: []byte(e.Addr().String())}
		id, addr := raft.ServerID(n.Name), raft.ServerAddress(n.Addr)
		if err := tr.AppendEntries(id, addr, &raft.AppendEntriesRequest{RPCHeader: h, Term: term + 100}, new(raft.AppendEntriesResponse)); err == nil {
			t.Errorf("%s heard a stranger's heartbeat", n.Name)
		}
		if err := tr.RequestVote(id, addr, &raft.RequestVoteRequest{RPCHeader: h, Term: term + 100, LastLogIndex: 1 << 40, LastLogTerm: term + 99}, new(raft.RequestVoteResponse)); err == nil {
			t.Errorf("%s heard a stranger's candidacy", n.Name)
		}
		if now := n.Store.Status().Term; now != term {
			t.Errorf("%s went from term %d to %d", n.Name, term, now)
		}
	}
}

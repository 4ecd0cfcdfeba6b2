package raftstore_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/storetest"
)

// subscribers is a cluster whose further nodes subscribe: to the nodes named in
// sources, if it has an entry, else to all.
type subscribers struct {
	*storetest.Cluster
	mu      sync.Mutex
	addrs   map[string]string
	sources map[string][]string
}

func newSubscribers(t *testing.T, voters int, conf func(*raftstore.Config)) *subscribers {
	t.Helper()
	s := &subscribers{addrs: map[string]string{}, sources: map[string][]string{}}
	s.Cluster = storetest.New(t, voters, func(c *raftstore.Config) {
		if conf != nil {
			conf(c)
		}
		id := c.NodeID
		c.Subscribe = s.Cluster != nil // New has returned
		c.Sources = func() []raftstore.Source { return s.of(id) }
	})
	s.seen()
	return s
}

func (s *subscribers) seen() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.Nodes {
		s.addrs[n.Name] = n.Addr
	}
}

func (s *subscribers) of(id string) (out []raftstore.Source) {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := s.sources[id]
	if names == nil {
		for n := range s.addrs {
			names = append(names, n)
		}
	}
	for _, n := range names {
		if n != id && s.addrs[n] != "" {
			out = append(out, raftstore.Source{ID: n, Addr: s.addrs[n]})
		}
	}
	return out
}

func (s *subscribers) from(n string, sources ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sources[n] = sources
}

func (s *subscribers) subscriber() *storetest.Node {
	n := s.Add()
	s.seen()
	return n
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	end := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// watch reads all events of a node and fails at a gap or a repetition; stop
// waits for event last and says that no more than that came.
func watch(t *testing.T, n *storetest.Node) (stop func(last uint64)) {
	ctx, cancel := context.WithCancel(t.Context())
	var newest atomic.Uint64
	done := make(chan error, 1)
	store := n.Store
	go func() {
		done <- store.Follow(ctx, 1, func(es []event.Event) error {
			for _, e := range es {
				if e.Seq != newest.Load()+1 {
					return fmt.Errorf("event %d after %d", e.Seq, newest.Load())
				}
				newest.Store(e.Seq)
			}
			return nil
		})
	}()
	return func(last uint64) {
		t.Helper()
		until(t, fmt.Sprintf("event %d on %s", last, n.Name), func() bool { return newest.Load() >= last || len(done) > 0 })
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("following on %s: %v", n.Name, err)
		}
		if got := newest.Load(); got != last {
			t.Errorf("%d events on %s, want %d", got, n.Name, last)
		}
	}
}

func TestSubscriber(t *testing.T) {
	c := newSubscribers(t, 3, nil)
	c.Append(storetest.Proposal("approval/before", 0, "x"))
	a, b := c.subscriber(), c.subscriber()
	c.from(b.Name, a.Name) // a relay
	stop := watch(t, b)
	for i := range 50 {
		c.Append(storetest.Proposal(fmt.Sprintf("approval/%d", i), 0, strings.Repeat("x", i*100)))
	}
	c.Converge()
	until(t, "the relay's subscriber has a source", func() bool { return b.Store.Status().Source == a.Name })
	leader := c.Leader()
	for _, n := range []*storetest.Node{a, b} {
		until(t, n.Name+" knows the leader", func() bool { id, addr := n.Store.Leader(); return id == leader.Name && addr == leader.Addr })
		st := n.Store.Status()
		if st.State != "subscriber" || st.LastContact < 0 || st.LastContact > 20*time.Second || n.Store.IsLeader() || len(st.Members) != 3 {
			t.Errorf("%s: %+v", n.Name, st)
		}
		var not *raftstore.NotLeaderError
		if _, err := n.Store.Append(t.Context(), storetest.Proposal("a", 0, "")); !errors.As(err, &not) || not.ID != leader.Name || not.Addr != leader.Addr {
			t.Errorf("append on %s: %v", n.Name, err)
		}
		if err := n.Store.Barrier(t.Context()); !errors.As(err, &not) {
			t.Errorf("barrier on %s: %v", n.Name, err)
		}
	}
	if st := b.Store.Status(); st.Relays != 1 {
		t.Errorf("through a relay: %+v", st)
	}

	// The source goes away for good, and the relay: it goes on elsewhere.
	c.from(b.Name, c.Nodes[0].Name, c.Nodes[1].Name, c.Nodes[2].Name)
	c.Crash(a)
	source := func() *storetest.Node {
		for _, n := range c.Nodes[:3] {
			if n.Store != nil && n.Name == b.Store.Status().Source {
				return n
			}
		}
		return nil
	}
	until(t, "another source", func() bool { return source() != nil })
	c.Crash(source())
	for i := range 20 {
		c.Append(storetest.Proposal(fmt.Sprintf("approval/after-%d", i), 0, ""))
	}
	c.Converge()
	stop(71)
}

// A subscriber that was away is fed from the log; one that was away for longer
// than the log reaches gets the state.
func TestSubscriberBehind(t *testing.T) {
	c := newSubscribers(t, 1, func(cfg *raftstore.Config) { cfg.TrailingLogs = 5 })
	for i := range 30 {
		c.Append(storetest.Proposal(fmt.Sprintf("approval/%d", i), 0, strings.Repeat("x", 1000*i)))
	}
	s := c.subscriber()
	c.Converge()
	again := func() { // what was kept in memory is gone
		c.Stop(c.Nodes[0])
		c.Start(c.Nodes[0])
	}
	c.Stop(s)
	for range 40 {
		c.Append(storetest.Proposal("approval/log", event.Any, "x"))
	}
	again()
	c.Start(s)
	stop := watch(t, s)
	c.Converge()
	c.Append(storetest.Proposal("approval/more", 0, ""))
	c.Converge()
	stop(71)

	c.Stop(s)
	for range 40 {
		c.Append(storetest.Proposal("approval/state", event.Any, "x"))
	}
	if err := c.Leader().Store.Snapshot(t.Context()); err != nil {
		t.Fatal(err)
	}
	again()
	c.Start(s)
	stop = watch(t, s)
	c.Converge()
	c.Append(storetest.Proposal("approval/more", 1, ""))
	c.Converge()
	stop(112)
	// And one that has nothing.
	fresh := c.subscriber()
	c.Converge()
	if v := fresh.Store.Version("approval/state"); v != 40 {
		t.Errorf("version %d", v)
	}
}

// A subscriber becomes a voter, a subscriber and a voter again, without a
// restart, and never forgets its term and vote.
func TestPromoteAndDemote(t *testing.T) {
	c := newSubscribers(t, 3, nil)
	s := c.subscriber()
	c.Append(storetest.Proposal("approval/a", 0, ""))
	c.Converge()
	stop := watch(t, s)
	call := func(f func(context.Context, *raftstore.Store) error) {
		t.Helper()
		until(t, "the configuration changes", func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			err := f(ctx, c.Leader().Store)
			if err != nil {
				t.Log(err)
			}
			return err == nil
		})
	}
	promote := func() {
		t.Helper()
		call(func(ctx context.Context, l *raftstore.Store) error { return l.AddNonvoter(ctx, s.Name, s.Addr) })
		until(t, "its log is full", func() bool {
			l := c.Leader().Store.Status() // its barrier first
			st := s.Store.Status()
			return st.State == "follower" && st.LastIndex >= l.CommitIndex
		})
		call(func(ctx context.Context, l *raftstore.Store) error { return l.AddVoter(ctx, s.Name, s.Addr) })
		until(t, "it votes", func() bool {
			for _, m := range s.Store.Status().Members {
				if m.ID == s.Name {
					return m.Voter && s.Store.Status().Source == ""
				}
			}
			return false
		})
	}
	demote := func() {
		t.Helper()
		if s.Store.IsLeader() {
			call(func(ctx context.Context, l *raftstore.Store) error { return l.TransferLeadership(ctx) })
		}
		call(func(ctx context.Context, l *raftstore.Store) error { return l.Demote(ctx, s.Name) })
		call(func(ctx context.Context, l *raftstore.Store) error { return l.Remove(ctx, s.Name) })
		until(t, "it subscribes", func() bool { return s.Store.Status().State == "subscriber" && s.Store.LogIsEmpty() })
	}
	promote()
	// One of the first three goes, so that nothing is committed without the new
	// voter; then the leader, so that it has an election to vote in.
	gone := c.Followers()[0]
	if gone == s {
		gone = c.Followers()[1]
	}
	c.Crash(gone)
	leader := c.Leader()
	c.Crash(leader)
	c.Start(gone)
	c.Append(storetest.Proposal("approval/a", 1, ""))
	c.Start(leader)
	before := s.Store.Promises()
	if before.VoteTerm == 0 || before.Vote == "" {
		t.Fatalf("it has not voted: %+v", before)
	}
	kept := func(when string) {
		t.Helper()
		now := s.Store.Promises()
		if now.Term < before.Term || now.VoteTerm < before.VoteTerm || now.VoteTerm == before.VoteTerm && now.Vote != before.Vote {
			t.Errorf("%s: promised %+v, and now %+v", when, before, now)
		}
		before = now
	}
	demote()
	kept("after leaving Raft")
	c.Append(storetest.Proposal("approval/a", 2, ""))
	c.Converge()
	kept("as a subscriber")
	promote()
	kept("in Raft again")
	c.Append(storetest.Proposal("approval/a", 3, ""))
	c.Converge()
	stop(4)
	// It is what it was after a restart.
	c.Stop(s)
	c.Start(s)
	c.Append(storetest.Proposal("approval/a", 4, ""))
	c.Converge()
	if st := s.Store.Status(); st.State == "subscriber" {
		t.Errorf("after a restart: %+v", st)
	}
}

// A voter that was replaced while it was away subscribes when it is back,
// though nobody can tell it through Raft.
func TestReplacedWhileAway(t *testing.T) {
	c := newSubscribers(t, 3, nil)
	s := c.subscriber()
	c.Append(storetest.Proposal("approval/a", 0, ""))
	c.Converge()
	away := c.Followers()[0]
	if away == s {
		away = c.Followers()[1]
	}
	c.Stop(away)
	l := c.Leader().Store
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, err := range []error{
		l.AddNonvoter(ctx, s.Name, s.Addr), l.AddVoter(ctx, s.Name, s.Addr),
		l.Demote(ctx, away.Name), l.Remove(ctx, away.Name),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	c.Append(storetest.Proposal("approval/a", 1, ""))
	term := c.Leader().Store.Status().Term
	c.Start(away)
	until(t, "it subscribes", func() bool { return away.Store.Status().State == "subscriber" })
	c.Append(storetest.Proposal("approval/a", 2, ""))
	c.Converge()
	if now := c.Leader().Store.Status().Term; now != term {
		t.Errorf("it moved the term from %d to %d", term, now)
	}
}

// A subscriber whose events differ from its source's stops.
func TestSubscriberDiverged(t *testing.T) {
	fatal := make(chan error, 1)
	c := newSubscribers(t, 1, func(cfg *raftstore.Config) {
		if cfg.NodeID == "n2" {
			cfg.OnFatal = func(err error) { fatal <- err }
		}
	})
	c.Append(storetest.Proposal("approval/a", 0, ""))
	s := c.subscriber()
	c.Converge()
	c.Stop(s)
	if err := os.RemoveAll(filepath.Join(s.Dir, "state")); err != nil {
		t.Fatal(err)
	}
	forge(t, s.Dir)
	c.Start(s)
	select {
	case err := <-fatal:
		if !errors.Is(err, raftstore.ErrDiverged) {
			t.Fatal(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a subscriber with other events goes on")
	}
}

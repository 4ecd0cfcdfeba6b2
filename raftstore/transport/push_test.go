package transport_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/transport"
)

// wire is what a Push sends on, with answers as a test says.
type wire struct {
	mu    sync.Mutex
	sent  []string
	hold  chan struct{} // calls with entries wait for it; nil: they do not
	fails bool
	leads bool
	came  chan struct{} // a token for each call
}

func (w *wire) send(id raft.ServerID, _ raft.ServerAddress, q *raft.AppendEntriesRequest, a *raft.AppendEntriesResponse) error {
	w.mu.Lock()
	w.sent = append(w.sent, fmt.Sprintf("%s term %d prev %d/%d entries %d commit %d", id, q.Term, q.PrevLogEntry, q.PrevLogTerm, len(q.Entries), q.LeaderCommitIndex))
	hold, fails := w.hold, w.fails
	w.mu.Unlock()
	w.came <- struct{}{}
	if len(q.Entries) > 0 && hold != nil {
		<-hold
	}
	a.Success = !fails
	return nil
}

func (w *wire) depose() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leads = false
}

// take waits for n calls and returns them.
func (w *wire) take(t *testing.T, n int) string {
	t.Helper()
	for range n {
		select {
		case <-w.came:
		case <-time.After(10 * time.Second):
			t.Fatalf("a call did not come; there were %q", w.sent)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := strings.Join(w.sent, "; ")
	w.sent = nil
	return s
}

// none looks that nothing was sent: whatever may be sent was begun by now, and
// Close waits for it.
func (w *wire) none(t *testing.T, p *transport.Push) {
	t.Helper()
	p.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.sent) > 0 {
		t.Errorf("sent %q", w.sent)
	}
}

func newPush() (*wire, *transport.Push) {
	w := &wire{leads: true, came: make(chan struct{}, 16)}
	return w, transport.NewPush(func(term uint64) bool { w.mu.Lock(); defer w.mu.Unlock(); return w.leads && term == 3 }, w.send)
}

// entries is a call with entry index of term 3, on an entry of term 2.
func entries(p *transport.Push, to raft.ServerID, index, commit uint64) error {
	return p.Call(to, "there", &raft.AppendEntriesRequest{
		Term: 3, PrevLogEntry: index - 1, PrevLogTerm: 2, Entries: []*raft.Log{{Index: index, Term: 3}}, LeaderCommitIndex: commit,
	}, new(raft.AppendEntriesResponse))
}

func TestPushTellsOfACommit(t *testing.T) {
	w, p := newPush()
	if err := entries(p, "a", 8, 6); err != nil {
		t.Fatal(err)
	}
	w.take(t, 1)
	p.Committed(8)
	if got := w.take(t, 1); got != "a term 3 prev 8/3 entries 0 commit 8" {
		t.Errorf("sent %q", got)
	}
	p.Committed(8)
	w.none(t, p)
}

// An index above what the follower confirmed in this term could be that of an
// entry which it has of another leader.
func TestPushSaysNoMoreThanTheFollowerHas(t *testing.T) {
	w, p := newPush()
	entries(p, "a", 8, 6)
	w.take(t, 1)
	p.Committed(100)
	if got := w.take(t, 1); got != "a term 3 prev 8/3 entries 0 commit 8" {
		t.Errorf("sent %q", got)
	}
	w.none(t, p)
}

func TestPushNothing(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(*wire, *transport.Push)
	}{
		{"of a term that has passed", func(w *wire, p *transport.Push) { w.depose() }},
		{"behind entries that were refused", func(w *wire, p *transport.Push) {
			w.mu.Lock()
			w.fails = true
			w.mu.Unlock()
		}},
		{"when closed", func(_ *wire, p *transport.Push) { p.Close() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, p := newPush()
			c.do(w, p)
			entries(p, "a", 8, 6)
			w.take(t, 1)
			p.Committed(8)
			w.none(t, p)
		})
	}
}

// Who is being sent entries is told behind them, once they are confirmed.
func TestPushWaitsForEntriesUnderWay(t *testing.T) {
	w, p := newPush()
	entries(p, "a", 8, 6) // it has 8: only what is under way keeps the word of it back
	w.take(t, 1)
	w.hold = make(chan struct{})
	done := make(chan error, 1)
	go func() { done <- entries(p, "a", 9, 6) }()
	w.take(t, 1)
	p.Committed(8)
	close(w.hold)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := w.take(t, 1); got != "a term 3 prev 9/3 entries 0 commit 8" {
		t.Errorf("sent %q", got)
	}
	w.none(t, p)
}

// Raft's own tick is far away: followers apply what is committed all the same.
func TestFollowersHearOfACommitAtOnce(t *testing.T) {
	nodes := raftNodesWith(t, time.Second, 1, func(c *raft.Config) { c.CommitTimeout = time.Hour })
	leader := waitLeader(t, nodes...)
	if err := leader.raft.Apply([]byte("x"), 10*time.Second).Error(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		var missing error
		for _, n := range nodes {
			if !strings.Contains(n.fsm.String(), ":x") {
				missing = errors.Join(missing, fmt.Errorf("%s has not applied it", n.id))
			}
		}
		if missing == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(missing)
		}
	}
}

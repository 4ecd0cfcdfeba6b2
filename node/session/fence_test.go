package session

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport/sallyport/protocols"
)

// testLease is a node's lease that a test takes away and gives back.
type testLease struct {
	mu      sync.Mutex
	lost    bool
	changed chan struct{}
	refuse  *protocols.Refusal // what judging says
	judged  atomic.Int32
}

func (l *testLease) lease() Lease {
	l.changed = make(chan struct{})
	return Lease{
		Check: func() error {
			l.mu.Lock()
			defer l.mu.Unlock()
			if l.lost {
				return errors.New("no lease")
			}
			return nil
		},
		Changed: func() <-chan struct{} { l.mu.Lock(); defer l.mu.Unlock(); return l.changed },
		Judge: func() *protocols.Refusal {
			l.judged.Add(1)
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.refuse
		},
	}
}

func (l *testLease) set(lost bool, refuse *protocols.Refusal) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost, l.refuse = lost, refuse
	close(l.changed)
	l.changed = make(chan struct{})
}

// enter begins a write in the background and returns where its answer comes.
func enter(f *Fence, gone <-chan struct{}) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f.Enter(gone) }()
	return done
}

func mustWait(t *testing.T, done <-chan error) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-done:
		t.Fatalf("a write of a frozen session went on: %v", err)
	default:
	}
}

func mustPass(t *testing.T, done <-chan error) {
	t.Helper()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func mustRefuse(t *testing.T, done <-chan error, rule string) {
	t.Helper()
	var r *protocols.Refusal
	if err := <-done; !errors.As(err, &r) || r.Rule != rule {
		t.Fatalf("%v, want a refusal by %s", err, rule)
	}
}

// Without a lease nothing passes; with a new one, only what is judged anew.
func TestFreezeByLease(t *testing.T) {
	for name, refuse := range map[string]*protocols.Refusal{"resumed": nil, "policy changed": {Rule: "no-more"}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var l testLease
				e := NewEntry(Info{ID: "s"}, l.lease())
				mustPass(t, enter(&e.Fence, nil))
				l.set(true, nil)
				first, second := enter(&e.Fence, nil), enter(&e.Fence, nil)
				mustWait(t, first)
				mustWait(t, second)
				if e.Info().State != "frozen" || e.Fence.Check() != nil {
					t.Fatalf("state %s, check %v", e.Info().State, e.Fence.Check())
				}
				time.Sleep(freezeMax / 2)
				l.set(false, refuse)
				if refuse != nil {
					mustRefuse(t, first, "no-more")
					mustRefuse(t, second, "no-more")
					return
				}
				mustPass(t, first)
				mustPass(t, second)
				if n := l.judged.Load(); n != 1 || e.Info().State != "running" {
					t.Fatalf("judged %d times, state %s", n, e.Info().State)
				}
				// The next freeze has its own minute.
				l.set(true, nil)
				again := enter(&e.Fence, nil)
				time.Sleep(freezeMax - time.Second)
				mustWait(t, again)
				l.set(false, nil)
				mustPass(t, again)
			})
		})
	}
}

// A session that stands still for a minute is cut, whether it has something to
// write or not.
func TestFrozenTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l testLease
		lease := l.lease()
		r := NewRegistry(10)
		busy, idle, fine := NewEntry(Info{ID: "busy"}, lease), NewEntry(Info{ID: "idle"}, lease), NewEntry(Info{ID: "fine"}, Lease{})
		for _, e := range []*Entry{busy, idle, fine} {
			r.Add(e)
			e.OnCut(func() { r.Done(e) })
		}
		ctx, cancel := context.WithCancel(t.Context())
		running := make(chan error, 1)
		go func() { running <- r.Run(ctx, lease.Changed) }()
		l.set(true, nil)
		done := enter(&busy.Fence, nil)
		time.Sleep(freezeMax - 2*time.Second)
		mustWait(t, done)
		if idle.Info().State != "frozen" || fine.Info().State != "running" {
			t.Fatalf("idle %s, of another mode %s", idle.Info().State, fine.Info().State)
		}
		time.Sleep(4 * time.Second)
		mustRefuse(t, done, "no-quorum")
		synctest.Wait()
		if list := r.List(); len(list) != 1 || list[0].ID != "fine" {
			t.Fatalf("left: %v", list)
		}
		cancel()
		if err := <-running; err != nil {
			t.Fatal(err)
		}
	})
}

// An idle session that nothing is written to is judged anew all the same.
func TestIdleIsJudged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l testLease
		lease := l.lease()
		r := NewRegistry(10)
		e := NewEntry(Info{ID: "idle"}, lease)
		r.Add(e)
		e.OnCut(func() { r.Done(e) })
		ctx, cancel := context.WithCancel(t.Context())
		running := make(chan error, 1)
		go func() { running <- r.Run(ctx, lease.Changed) }()
		synctest.Wait()
		l.set(true, nil)
		synctest.Wait()
		l.set(false, &protocols.Refusal{Rule: "expired"})
		synctest.Wait()
		if l.judged.Load() == 0 || len(r.List()) != 0 {
			t.Fatalf("judged %d times, live %v", l.judged.Load(), r.List())
		}
		cancel()
		<-running
	})
}

// A freeze before a revocation stops what it names, and only that; it ends with
// Thaw, and what was frozen is judged anew. Freezes of several revocations stand
// by themselves.
func TestFreezeByProposal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l testLease
		r := NewRegistry(10)
		a, b := NewEntry(Info{ID: "a", Subject: "x"}, l.lease()), NewEntry(Info{ID: "b", Subject: "y"}, Lease{})
		r.Add(a)
		r.Add(b)
		var interrupted atomic.Int32
		a.OnFreeze(func() { interrupted.Add(1) })
		r.Freeze("one", func(i Info) bool { return i.Subject == "x" })
		r.Freeze("two", func(i Info) bool { return i.Subject == "x" })
		if interrupted.Load() == 0 {
			t.Error("a write that waits for its peer would not notice")
		}
		mustPass(t, enter(&b.Fence, nil))
		done := enter(&a.Fence, nil)
		mustWait(t, done)
		r.Thaw("two")
		r.Thaw("of another")
		mustWait(t, done)
		r.Thaw("one")
		mustPass(t, done)
		if l.judged.Load() != 1 {
			t.Errorf("judged %d times", l.judged.Load())
		}

		// Revoked while frozen: it never goes on. Gone while frozen: no wait.
		r.Freeze("three", func(i Info) bool { return true })
		done = enter(&a.Fence, nil)
		gone := make(chan struct{})
		left := enter(&b.Fence, gone)
		mustWait(t, done)
		a.Fence.Trip(why)
		mustRefuse(t, done, why.Rule)
		close(gone)
		if err := <-left; !errors.Is(err, net.ErrClosed) {
			t.Fatalf("gone: %v", err)
		}
		r.Thaw("three")
		if err := a.Fence.Enter(nil); err == nil {
			t.Fatal("a revoked session was thawed")
		}
	})
}

// A write during which the lease ended is found and counted.
func TestViolations(t *testing.T) {
	var l testLease
	e := NewEntry(Info{ID: "s"}, l.lease())
	if err := e.Fence.Enter(nil); err != nil {
		t.Fatal(err)
	}
	e.Fence.Leave(100)
	if w, b := e.Fence.Violations(); w != 0 || b != 0 {
		t.Fatalf("%d writes, %d bytes under a lease", w, b)
	}
	l.set(true, nil)
	e.Fence.Leave(0) // nothing went out
	e.Fence.Leave(4096)
	if i := e.Info(); i.Violations != 1 || i.ViolationBytes != 4096 {
		t.Fatalf("%d writes, %d bytes", i.Violations, i.ViolationBytes)
	}
}

func BenchmarkEnterLeave(b *testing.B) {
	e := NewEntry(Info{}, Lease{Check: func() error { return nil }})
	b.ReportAllocs()
	for b.Loop() {
		if e.Fence.Enter(nil) != nil {
			b.Fatal("frozen")
		}
		e.Fence.Leave(1)
	}
}

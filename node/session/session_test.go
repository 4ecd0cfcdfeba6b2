package session

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/protocols"
)

var why = &protocols.Refusal{Rule: "revocation/1", Reason: "leaked"}

// From the first line of a cut on no write begins; then the legs are reset.
func TestCutOrder(t *testing.T) {
	r := NewRegistry(10)
	e := NewEntry(Info{ID: "s1", Subject: "ci/a"}, Lease{})
	if refusal := r.Add(e); refusal != nil {
		t.Fatal(refusal)
	}
	var order []string
	note := func(s string) {
		if e.Fence.Check() == nil {
			t.Errorf("%s before the fence tripped", s)
		}
		order = append(order, s)
	}
	e.OnFreeze(func() { note("interrupt") })
	e.OnCut(func() { note("reset"); r.Done(e) })

	n, err := r.CutWhere(t.Context(), func(i Info) bool { return i.Subject == "ci/a" }, why)
	if n != 1 || err != nil {
		t.Fatalf("cut %d, %v", n, err)
	}
	if got := slices.Compact(order); !slices.Equal(got, []string{"interrupt", "reset"}) {
		t.Fatalf("order %v", order)
	}
	var refusal *protocols.Refusal
	if err := e.Fence.Enter(nil); !errors.As(err, &refusal) || refusal.Rule != why.Rule {
		t.Fatalf("the fence says %v", err)
	}
	if len(r.List()) != 0 {
		t.Fatal("the session is still listed")
	}
}

// A cut is not reported done before the legs are reset, nor while a write is
// between the fence and a socket. It does not wait for the session's end.
func TestCutWaitsForRest(t *testing.T) {
	e := NewEntry(Info{ID: "s1"}, Lease{})
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	if err := e.Fence.Enter(nil); err != nil {
		t.Fatal(err)
	}
	if err := e.Cut(short(), why); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("cut of a session whose legs nobody has reset: %v", err)
	}
	resetting := make(chan struct{})
	go e.OnCut(func() { <-resetting })
	if err := e.Cut(short(), why); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("cut of a session whose legs are being reset: %v", err)
	}
	close(resetting)
	if err := e.Cut(short(), why); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("cut while a write has entered and not left: %v", err)
	}
	e.Fence.Leave(1)
	if err := e.Cut(t.Context(), why); err != nil {
		t.Fatal(err)
	}
	if err := e.Ended(short()); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("it has not ended, and says: %v", err)
	}
}

// A session that ended by itself is at rest, whatever a cut finds of it.
func TestCutOfTheEnded(t *testing.T) {
	r := NewRegistry(10)
	e := NewEntry(Info{ID: "s1"}, Lease{})
	r.Add(e)
	r.Done(e)
	if err := errors.Join(e.Cut(t.Context(), why), e.Ended(t.Context())); err != nil {
		t.Fatal(err)
	}
}

// Whoever asks the fence and is refused does not count as a write, however
// many ask while it trips.
func TestFenceRests(t *testing.T) {
	for range 200 {
		var f Fence
		var asking sync.WaitGroup
		for range 4 {
			asking.Go(func() {
				for f.Enter(nil) == nil {
					f.Leave(0)
				}
			})
		}
		rested := f.Rested()
		select {
		case <-rested:
			t.Fatal("at rest before it has tripped")
		default:
		}
		f.Trip(why)
		select {
		case <-rested:
		case <-time.After(10 * time.Second):
			t.Fatal("not at rest though nobody writes")
		}
		asking.Wait()
	}
}

// A session cut before it has legs is reset as soon as it has.
func TestCutBeforeOnCut(t *testing.T) {
	e := NewEntry(Info{ID: "s1"}, Lease{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_ = e.Cut(ctx, why)
	reset := false
	e.OnCut(func() { reset = true })
	if !reset {
		t.Fatal("legs set after the cut were not reset")
	}
}

func TestRegistryLimitsAndDrain(t *testing.T) {
	r := NewRegistry(1)
	a, b := NewEntry(Info{ID: "a"}, Lease{}), NewEntry(Info{ID: "b"}, Lease{})
	if refusal := r.Add(a); refusal != nil {
		t.Fatal(refusal)
	}
	if refusal := r.Add(b); refusal == nil || refusal.Rule != "limits" {
		t.Fatalf("one too many: %v", refusal)
	}
	client, server := net.Pipe()
	defer client.Close()
	a.OnCut(func() { server.Close(); r.Done(a) })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	r.Drain(ctx, why)
	if _, err := server.Write([]byte("x")); err == nil {
		t.Fatal("a session outlived the drain")
	}
	if refusal := r.Add(b); refusal == nil || refusal.Rule != "shutdown" {
		t.Fatalf("a session during shutdown: %v", refusal)
	}
}

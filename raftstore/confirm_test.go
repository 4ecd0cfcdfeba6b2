package raftstore_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/storetest"
)

func TestConfirm(t *testing.T) {
	c := storetest.New(t, 3, nil)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	leader := c.Leader()
	events := c.Append(storetest.Proposal("approval/1", 0, "x"))
	last := events[len(events)-1]

	seq, term, err := leader.Store.Newest(ctx)
	if err != nil || seq < last.Seq || term != leader.Store.Status().Term {
		t.Fatalf("event %d in term %d, %v; want at least %d", seq, term, err, last.Seq)
	}
	var wg sync.WaitGroup
	var failed atomic.Int64
	for range 300 { // one round serves many
		wg.Go(func() {
			if _, commit, err := leader.Store.Confirm(ctx); err != nil || commit < last.Index {
				failed.Add(1)
			}
		})
	}
	wg.Wait()
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of 300 were not confirmed", n)
	}
	for _, f := range c.Followers() {
		var not *raftstore.NotLeaderError
		if _, _, err := f.Store.Confirm(ctx); !errors.As(err, &not) || not.ID != leader.Name {
			t.Errorf("a follower: %v", err)
		}
	}

	leader.Network.Cut.Store(true)
	for range 3 { // it may believe to lead for a while, and is not believed
		if _, _, err := leader.Store.Confirm(ctx); err == nil {
			t.Fatal("a leader that is cut off is confirmed")
		}
	}
	next := c.Leader()
	if _, _, err := next.Store.Confirm(ctx); err != nil {
		t.Fatalf("the next leader: %v", err)
	}
}

// What was acknowledged anywhere before a read began, the read sees, whoever
// believes to lead meanwhile.
func TestNewestSeesWhatWasAcknowledged(t *testing.T) {
	c := storetest.New(t, 3, nil)
	var acked atomic.Uint64
	var reads atomic.Int64
	stop := make(chan struct{})
	stopped := func() bool {
		select {
		case <-stop:
			return true
		default:
			return false
		}
	}
	stores := make([]*raftstore.Store, len(c.Nodes))
	for i, n := range c.Nodes {
		stores[i] = n.Store
	}
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() {
			for i := 0; !stopped(); i++ {
				p := storetest.Proposal(fmt.Sprintf("approval/%d-%d", w, i), event.Any, "x")
				ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
				events, err := stores[i%3].Append(ctx, p)
				cancel()
				if err != nil {
					time.Sleep(time.Millisecond)
					continue
				}
				for seq := events[0].Seq; ; {
					old := acked.Load()
					if old >= seq || acked.CompareAndSwap(old, seq) {
						break
					}
				}
			}
		})
	}
	for _, s := range stores {
		wg.Go(func() {
			for !stopped() {
				want := acked.Load()
				ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
				seq, _, err := s.Newest(ctx)
				cancel()
				switch {
				case err != nil:
					time.Sleep(time.Millisecond)
				case seq < want:
					t.Errorf("a read that began after event %d was acknowledged saw %d", want, seq)
					return
				default:
					reads.Add(1)
				}
			}
		})
	}
	for range 2 {
		leader := c.Leader()
		time.Sleep(300 * time.Millisecond)
		leader.Network.Cut.Store(true)
		c.Leader()
		time.Sleep(300 * time.Millisecond)
		leader.Network.Cut.Store(false)
		time.Sleep(200 * time.Millisecond)
	}
	close(stop)
	wg.Wait()
	if reads.Load() < 10 || acked.Load() < 10 {
		t.Errorf("only %d reads and %d events", reads.Load(), acked.Load())
	}
	t.Logf("%d reads, %d events", reads.Load(), acked.Load())
}

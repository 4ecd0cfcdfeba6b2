package raftstore_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/storetest"
)

func TestSingleNode(t *testing.T) {
	c := storetest.New(t, 1, nil)
	n := c.Nodes[0]
	ctx := t.Context()

	if err := n.Store.Bootstrap(); !errors.Is(err, raftstore.ErrNotFresh) {
		t.Fatalf("second Bootstrap: %v", err)
	}
	p := storetest.Proposal("approval/a", 0, `{"id":"a"}`)
	es := c.Append(p, storetest.Proposal("approval/a", 1, `{}`), storetest.Proposal("approval/b", event.Any, `{}`))
	if len(es) != 3 || es[0].Seq != 1 || es[2].Seq != 3 || es[1].Sub != 1 || es[0].Index != es[2].Index ||
		es[1].AggregateVersion != 2 || es[2].AggregateVersion != 1 || !es[1].Time.After(es[0].Time) {
		t.Fatalf("events: %+v", es)
	}
	if string(es[0].Payload) != `{"id":"a"}` || es[0].Actor.Principal != "test" {
		t.Fatalf("event: %+v", es[0])
	}
	// The same again is the same events.
	again := c.Append(p)
	if again[0].Seq != 1 || again[0].Chain != es[0].Chain {
		t.Fatalf("second append of the same: %+v", again)
	}
	var conflict *raftstore.ConflictError
	_, err := n.Store.Append(ctx, storetest.Proposal("approval/c", 0, ""), storetest.Proposal("approval/a", 1, ""))
	if !errors.As(err, &conflict) || conflict.Aggregate != "approval/a" || conflict.Have != 2 {
		t.Fatalf("conflict: %v", err)
	}
	if v := n.Store.Version("approval/c"); v != 0 {
		t.Fatalf("half of a rejected batch was stored: version %d", v)
	}
	other := storetest.Proposal("approval/x", event.Any, "")
	other.ID = p.ID
	if _, err := n.Store.Append(ctx, other); !errors.Is(err, raftstore.ErrIDReused) {
		t.Fatalf("an id used for another aggregate: %v", err)
	}
	bad := storetest.Proposal("approval/x", event.Any, "")
	bad.Type = "no.such"
	if _, err := n.Store.Append(ctx, bad); !errors.Is(err, event.ErrUnknownType) {
		t.Fatalf("unknown type: %v", err)
	}
	if e, ok, err := n.Store.ByID(p.ID); err != nil || !ok || e.Seq != 1 {
		t.Fatalf("ByID: %+v %v %v", e, ok, err)
	}
	if _, ok, err := n.Store.ByID(event.NewID()); err != nil || ok {
		t.Fatalf("ByID of nothing: %v %v", ok, err)
	}
	if got, err := n.Store.AtIndex(es[0].Index); err != nil || len(got) != 3 {
		t.Fatalf("AtIndex: %v %v", got, err)
	}

	seq, index, chain := n.Store.Head()
	c.Stop(n)
	c.Start(n)
	if s, i, ch := n.Store.Head(); s != seq || i != index || ch != chain {
		t.Fatalf("after a restart: %d %d, before %d %d", s, i, seq, index)
	}
	if es = c.Append(storetest.Proposal("approval/a", 2, "")); es[0].Seq != 4 {
		t.Fatalf("after a restart: %+v", es)
	}
}

func TestFollow(t *testing.T) {
	c := storetest.New(t, 1, nil)
	const total = 300
	got := make(chan uint64, total)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		next := uint64(1)
		done <- c.Nodes[0].Store.Follow(ctx, 0, func(es []event.Event) error {
			for _, e := range es {
				if e.Seq != next {
					return fmt.Errorf("event %d, want %d", e.Seq, next)
				}
				next++
				got <- e.Seq
			}
			if next > total {
				return errEnough
			}
			return nil
		})
	}()
	for i := range total / 3 {
		a := fmt.Sprintf("approval/%d", i)
		c.Append(storetest.Proposal(a, 0, "1"), storetest.Proposal(a, 1, "2"), storetest.Proposal(a, 2, "3"))
	}
	if err := <-done; !errors.Is(err, errEnough) {
		t.Fatal(err)
	}
	if len(got) != total {
		t.Fatalf("%d events", len(got))
	}
}

var errEnough = errors.New("enough")

package raftstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
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

// A backup of any node becomes a new cluster of one that goes on with the same
// events.
func TestExportImport(t *testing.T) {
	c := storetest.New(t, 3, func(cfg *raftstore.Config) { cfg.TrailingLogs = 5 })
	for i := range 40 {
		c.Append(storetest.Proposal(fmt.Sprintf("approval/%d", i%7), event.Any, "x"))
	}
	c.Converge()
	var b bytes.Buffer
	f := c.Followers()[0]
	seq, chain, err := f.Store.Export(t.Context(), &b)
	if err != nil || seq != 40 {
		t.Fatalf("%d %v", seq, err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := f.Store.Export(ended, io.Discard); !errors.Is(err, context.Canceled) {
		t.Fatalf("a cancelled export: %v", err)
	}

	n := c.Add()
	c.Stop(n)
	cfg := raftstore.Config{Dir: n.Dir, NodeID: n.Name, Addr: n.Addr}
	if _, _, err := raftstore.Import(cfg, bytes.NewReader(b.Bytes())); !errors.Is(err, raftstore.ErrNotFresh) {
		t.Fatalf("import over a store: %v", err)
	}
	if err := os.RemoveAll(n.Dir); err != nil {
		t.Fatal(err)
	}
	if _, _, err := raftstore.Import(cfg, bytes.NewReader(b.Bytes()[:b.Len()/2])); err == nil {
		t.Fatal("half a backup was imported")
	}
	if _, err := os.Stat(n.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a failed import left something: %v", err)
	}
	if s, ch, err := raftstore.Import(cfg, bytes.NewReader(b.Bytes())); err != nil || s != seq || ch != chain {
		t.Fatalf("import: %d %x %v", s, ch, err)
	}
	for range 2 { // and it restarts
		c.Start(n)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		p := storetest.Proposal("approval/after", event.Any, "")
		for {
			es, err := n.Store.Append(ctx, p)
			if err == nil {
				if seq++; es[0].Seq != seq {
					t.Fatalf("event %d, want %d", es[0].Seq, seq)
				}
				break
			}
			if ctx.Err() != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Millisecond)
		}
		cancel()
		ms, err := n.Store.Members()
		if err != nil || len(ms) != 1 || ms[0].ID != n.Name {
			t.Fatalf("%+v %v", ms, err)
		}
		es, err := n.Store.Events(40, 1)
		if err != nil || es[0].Chain != chain {
			t.Fatalf("%+v %v", es, err)
		}
		c.Stop(n)
	}
}

// The log can be synced elsewhere, also from some day on, and back to a
// second place while the first hangs.
func TestWALDirs(t *testing.T) {
	elsewhere, third := t.TempDir(), t.TempDir()
	moved, failover := false, false
	c := storetest.New(t, 1, func(cfg *raftstore.Config) {
		if moved {
			cfg.WALDir = elsewhere
		}
		if failover {
			cfg.WALFailoverDir = third
		}
	})
	n := c.Nodes[0]
	c.Append(storetest.Proposal("approval/a", 0, ""))
	for _, step := range []func(){func() {}, func() { moved = true }, func() {}, func() { failover = true }, func() {}} {
		step()
		c.Stop(n)
		c.Start(n)
		c.Append(storetest.Proposal("approval/a", event.Any, ""))
	}
	if v := n.Store.Version("approval/a"); v != 6 {
		t.Fatalf("version %d", v)
	}
	wals, err := filepath.Glob(filepath.Join(elsewhere, "*.log"))
	if err != nil || len(wals) == 0 {
		t.Fatalf("nothing is written elsewhere: %v", err)
	}
}

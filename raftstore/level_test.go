package raftstore_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fsm"
	"github.com/sallyport/sallyport/raftstore/storetest"
)

// ofLevel2 is an event that the first release cannot read.
func ofLevel2() event.Proposal {
	p := storetest.Proposal("node/n1", event.Any, `{}`)
	p.Type = event.TypeNodeRenewed
	return p
}

func raiseLevel(t *testing.T, s *raftstore.Store, level uint32) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := s.Append(ctx, event.RaiseTo(level, event.Any, event.NewID(), event.Actor{})); err != nil {
		t.Fatal(err)
	}
}

func TestAppendKeepsToFeatureLevel(t *testing.T) {
	c := storetest.New(t, 1, func(cfg *raftstore.Config) {
		cfg.HeldBack = func() []string { return []string{"n7 supports 1"} }
	})
	s := c.Leader().Store
	last, _, _ := s.Head()
	_, err := s.Append(t.Context(), storetest.Proposal("approval/1", 0, `{}`), ofLevel2())
	var le *event.LevelError
	if !errors.As(err, &le) || le.Needs != 2 || le.Have != 1 || !strings.Contains(err.Error(), "n7 supports 1") {
		t.Fatalf("%v", err)
	}
	if seq, _, _ := s.Head(); seq != last {
		t.Fatal("it was proposed all the same")
	}
	if _, err := s.Append(t.Context(), event.RaiseTo(event.Level+1, event.Any, event.NewID(), event.Actor{})); !errors.Is(err, event.ErrInvalid) {
		t.Fatalf("a level that this build does not support: %v", err)
	}
	raiseLevel(t, s, 2)
	if _, err := s.Append(t.Context(), ofLevel2()); err != nil || s.FeatureLevel() != 2 {
		t.Fatalf("level %d, %v", s.FeatureLevel(), err)
	}
}

// A node of an older build stops when the others go on without it; they lose
// nothing, and it has applied nothing that it cannot read.
func TestOlderBuildStopsAboveItsLevel(t *testing.T) {
	fatal := make(chan error, 1)
	c := storetest.New(t, 3, func(cfg *raftstore.Config) {
		if cfg.NodeID == "n3" {
			cfg.FeatureLevel = 1
			cfg.OnFatal = func(err error) { fatal <- err }
		}
	})
	old := c.Nodes[2]
	l := c.Leader()
	if l == old {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := old.Store.TransferLeadership(ctx); err != nil {
			t.Fatal(err)
		}
		for l = c.Leader(); l == old; l = c.Leader() {
			time.Sleep(10 * time.Millisecond)
		}
	}
	raiseLevel(t, l.Store, 2)
	select {
	case err := <-fatal:
		if !errors.Is(err, event.ErrUnknownType) || !strings.Contains(err.Error(), "newer build") {
			t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the older build went on")
	}
	if old.Store.FeatureLevel() != 1 {
		t.Fatal("the older build applied it")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := l.Store.Append(ctx, ofLevel2()); err != nil {
		t.Fatal(err)
	}
}

// A node whose projections differ from the leader's, with the same events,
// finds out and stops; the others go on.
func TestDivergedProjectionsFireTheAlarm(t *testing.T) {
	fatal := make(chan string, 3)
	var follower atomic.Value // who must not lead: the leader's word counts
	c := storetest.New(t, 3, func(cfg *raftstore.Config) {
		id := cfg.NodeID
		if follower.Load() == id {
			cfg.HeartbeatTimeout = 5 * time.Minute
		}
		cfg.OnFatal = func(err error) {
			if !errors.Is(err, raftstore.ErrDiverged) {
				t.Errorf("%s: %v", id, err)
			}
			fatal <- id
		}
	})
	raiseLevel(t, c.Leader().Store, 2)
	victim := c.Followers()[0]
	seq, _, _ := c.Leader().Store.Head()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	if err := victim.Store.WaitSeq(ctx, seq); err != nil {
		t.Fatal(err)
	}
	c.Stop(victim)
	follower.Store(victim.Name)
	flipDigest(t, filepath.Join(victim.Dir, "state"))
	c.Start(victim)

	for done := 0; done < 1100; {
		var batch []event.Proposal
		for i := range fsm.MaxBatch {
			batch = append(batch, storetest.Proposal(fmt.Sprint("approval/", done+i), event.Any, `{}`))
		}
		if _, err := c.Leader().Store.Append(ctx, batch...); errors.Is(err, raftstore.ErrUnknownOutcome) || errors.Is(err, raftstore.ErrNoLeader) {
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		done += len(batch)
	}
	select {
	case id := <-fatal:
		if id != victim.Name {
			t.Fatalf("%s stopped, %s is the one that differs", id, victim.Name)
		}
	case <-ctx.Done():
		t.Fatal("nobody noticed")
	}
	if err := victim.Store.Err(); !errors.Is(err, raftstore.ErrDiverged) || !strings.Contains(err.Error(), "projections") {
		t.Fatal(err)
	}
	others := slices.DeleteFunc(slices.Clone(c.Nodes), func(n *storetest.Node) bool { return n == victim })
	if _, err := c.Leader().Store.Append(ctx, storetest.Proposal("approval/last", 0, `{}`)); err != nil {
		t.Fatal(err)
	}
	for _, n := range others {
		if err := n.Store.Err(); err != nil {
			t.Errorf("%s stopped too: %v", n.Name, err)
		}
	}
}

// flipDigest damages what a stopped node has kept as the sum of its projections.
func flipDigest(t *testing.T, dir string) {
	t.Helper()
	db, err := pebble.Open(dir, &pebble.Options{FormatMajorVersion: pebble.FormatNewest})
	if err != nil {
		t.Fatal(err)
	}
	v, c, err := db.Get([]byte("Mdigest"))
	if err != nil {
		t.Fatal(err)
	}
	bad := slices.Clone(v)
	bad[len(bad)-1] ^= 1
	if err := errors.Join(c.Close(), db.Set([]byte("Mdigest"), bad, pebble.Sync), db.Close()); err != nil {
		t.Fatal(err)
	}
}

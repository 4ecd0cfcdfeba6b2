package fsm

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/sallyport/sallyport/raftstore/event"
)

// build opens a state as a build that supports levels up to level, in which
// version 1 of revocation.undone needs level 2 and that of revocation.report 3.
func build(t *testing.T, fs *vfs.MemFS, level uint32) (*node, error) {
	t.Helper()
	n := &node{fs: fs}
	f, err := Open(Config{
		Dir: "data/state", FS: fs, Log: slog.New(slog.DiscardHandler), OnFatal: func(err error) { n.fatal = err }, Level: level,
		Needs: func(typ string, version uint32) uint32 {
			switch need := event.Needs(typ, version); typ {
			case event.TypeRevocationUndone:
				return need + 1
			case event.TypeRevocationReport:
				return need + 2
			default:
				return need
			}
		},
	})
	if err != nil {
		return nil, err
	}
	n.FSM = f
	t.Cleanup(func() { n.FSM.Close() })
	return n, nil
}

func typed(id byte, typ string) event.Proposal {
	p := proposal(id, "x", event.Any)
	p.Type = typ
	return p
}

func raise(id byte, level uint32) event.Proposal {
	return event.RaiseTo(level, event.Any, event.ID{id}, event.Actor{})
}

func TestFeatureLevel(t *testing.T) {
	const two, three = event.TypeRevocationUndone, event.TypeRevocationReport
	bad := raise(7, 2)
	bad.Payload = []byte(`{"level":`)
	for _, c := range []struct {
		name  string
		build uint32
		ps    []event.Proposal
		level uint32 // afterwards
		needs uint32 // of the LevelError that rejects it
		fails bool   // rejected otherwise
		halts bool
	}{
		{name: "below", build: 3, ps: []event.Proposal{typed(1, two)}, level: 1, needs: 2},
		{name: "raised before in the batch", build: 3, ps: []event.Proposal{raise(1, 2), typed(2, two)}, level: 2},
		{name: "raised after in the batch", build: 3, ps: []event.Proposal{typed(2, two), raise(1, 2)}, level: 1, needs: 2},
		{name: "not raised enough", build: 3, ps: []event.Proposal{raise(1, 2), typed(2, three)}, level: 1, needs: 3},
		{name: "two steps", build: 3, ps: []event.Proposal{raise(1, 2), raise(2, 3), typed(3, three)}, level: 3},
		{name: "twice the same", build: 3, ps: []event.Proposal{raise(1, 2), raise(2, 2)}, level: 1, fails: true},
		{name: "down", build: 3, ps: []event.Proposal{raise(1, 3), raise(2, 2)}, level: 1, fails: true},
		{name: "undecodable", build: 3, ps: []event.Proposal{bad}, level: 1, fails: true},
		{name: "above the build", build: 2, ps: []event.Proposal{raise(1, 3)}, level: 1, halts: true},
		{name: "a type above the build", build: 1, ps: []event.Proposal{typed(1, two)}, level: 1, halts: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, err := build(t, vfs.NewCrashableMem(), c.build)
			if err != nil {
				t.Fatal(err)
			}
			r := n.apply(t, command(t, 1, 1, n.Head(), c.ps...))
			var le *event.LevelError
			errors.As(r.Err, &le)
			switch {
			case c.halts:
				if !errors.Is(r.Err, ErrHalted) || !errors.Is(n.fatal, event.ErrUnknownType) {
					t.Fatalf("%v; fatal %v", r.Err, n.fatal)
				}
			case n.fatal != nil:
				t.Fatal(n.fatal)
			case c.needs > 0:
				if le == nil || le.Needs != c.needs || len(r.Events) > 0 {
					t.Fatalf("%v, %d events; want it to need %d", r.Err, len(r.Events), c.needs)
				}
			case c.fails != (r.Err != nil):
				t.Fatal(r.Err)
			}
			if n.Level() != c.level {
				t.Fatalf("level %d, want %d", n.Level(), c.level)
			}
		})
	}
}

// The level is part of the state: it is there after a restart and in a
// snapshot, and a build that does not support it does not open it.
func TestFeatureLevelStays(t *testing.T) {
	n, err := build(t, vfs.NewCrashableMem(), 3)
	if err != nil {
		t.Fatal(err)
	}
	n.apply(t, command(t, 1, 1, n.Head(), proposal(1, "a", 0), raise(2, 2)))
	if err := n.Sync(); err != nil {
		t.Fatal(err)
	}
	snap := dump(t, n)
	clone := n.fs.CrashClone(vfs.CrashCloneCfg{})
	again, err := build(t, clone, 3)
	if err != nil || again.Level() != 2 {
		t.Fatalf("level %d, %v", again.Level(), err)
	}
	if err := again.FSM.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := build(t, clone, 1); !errors.Is(err, event.ErrUnknownType) || !strings.Contains(err.Error(), "newer build") {
		t.Fatalf("an older build opened it: %v", err)
	}
	again.FSM, _ = Open(Config{Dir: "other", FS: n.fs, Log: slog.New(slog.DiscardHandler)}) // for Cleanup
	restored, err := build(t, vfs.NewCrashableMem(), 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := restored.Restore(io.NopCloser(bytes.NewReader(snap))); err != nil || restored.Level() != 2 {
		t.Fatalf("restored: level %d, %v", restored.Level(), err)
	}
	older, err := build(t, vfs.NewCrashableMem(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := older.Restore(io.NopCloser(bytes.NewReader(snap))); !errors.Is(err, event.ErrUnknownType) || older.fatal == nil {
		t.Fatalf("an older build restored it: %v", err)
	}
}

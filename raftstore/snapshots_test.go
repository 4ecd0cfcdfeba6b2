package raftstore

import (
	"bytes"
	"errors"
	"log/slog"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fsm"
	"github.com/sallyport/sallyport/raftstore/logstore"
)

func mustLogs(t *testing.T, fs vfs.FS) *logstore.Store {
	t.Helper()
	s, err := logstore.Open(logstore.Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func mustState(t *testing.T, fs vfs.FS) *fsm.FSM {
	t.Helper()
	s, err := fsm.Open(fsm.Config{Dir: "state", FS: fs, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func mustCache(t *testing.T, s raft.LogStore) boundaryLog {
	t.Helper()
	c, err := raft.NewLogCache(16, s)
	if err != nil {
		t.Fatal(err)
	}
	return boundaryLog{c}
}

func mustSnapshots(t *testing.T, logs raft.LogStore) *snapshotStore {
	t.Helper()
	s, err := newSnapshotStore(t.TempDir(), hclog.NewNullLogger(), logs, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// mustEntry is a log entry with one event; the leader it comes from had none.
func mustEntry(t *testing.T, index, term uint64) *raft.Log {
	t.Helper()
	p := event.Proposal{ID: event.ID{byte(index), 1}, Type: event.TypeRevoked, Version: 1, Aggregate: "a", Expect: event.Any}
	b, err := p.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	c := fsm.Command{TimeNanos: 1, Proposals: [][]byte{b}}
	data, err := c.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: data}
}

func TestMend(t *testing.T) {
	for _, c := range []struct {
		name        string
		index, term uint64
		mended, end bool
	}{
		{"agrees", 5, 1, false, false},
		{"beyond the log", 20, 2, true, false},
		{"differs inside", 5, 2, true, false},
		{"differs at the end", 10, 2, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			logs := mustLogs(t, vfs.NewMem())
			cache := mustCache(t, logs).LogCache
			for i := uint64(1); i <= 10; i++ {
				if err := cache.StoreLog(mustEntry(t, i, 1)); err != nil {
					t.Fatal(err)
				}
			}
			var failed error
			snaps := mustSnapshots(t, cache)
			snaps.fail = func(err error) { failed = err }
			_, trans := raft.NewInmemTransport("a")
			sink, err := snaps.Create(1, c.index, c.term, raft.Configuration{}, 1, trans)
			if err != nil {
				t.Fatal(err)
			}
			sink.Write([]byte("state"))
			if err := errors.Join(sink.Close(), sink.Close()); err != nil {
				t.Fatal(err)
			}
			last := max(10, c.index)
			for i := uint64(1); i <= last; i++ {
				if i > 10 && i < last {
					continue
				}
				want := raft.Log{Type: raft.LogCommand, Term: 1}
				if c.mended && i == c.index {
					want = raft.Log{Type: raft.LogNoop, Term: c.term}
				}
				for _, s := range []raft.LogStore{cache, logs} {
					var l raft.Log
					if c.mended && i < c.index { // never to be sent in front of the new one
						if err := s.GetLog(i, &l); !errors.Is(err, raft.ErrLogNotFound) {
							t.Errorf("entry %d is left: %v", i, err)
						}
						continue
					}
					if err := s.GetLog(i, &l); err != nil || l.Term != want.Term || l.Type != want.Type {
						t.Errorf("entry %d: %v of term %d, %v", i, l.Type, l.Term, err)
					}
				}
			}
			if got, _ := logs.LastIndex(); got != last || (failed != nil) != c.end {
				t.Fatalf("last %d, want %d; failed %v", got, last, failed)
			}
		})
	}
}

func TestCatchUp(t *testing.T) {
	t.Run("power failure took the state's last writes", func(t *testing.T) {
		logs, state := mustLogs(t, vfs.NewMem()), mustState(t, vfs.NewMem())
		for i := uint64(1); i <= 5; i++ {
			l := mustEntry(t, i, 1)
			if i == 3 {
				l = &raft.Log{Index: 3, Term: 1, Type: raft.LogNoop}
			}
			if err := logs.StoreLog(l); err != nil {
				t.Fatal(err)
			}
		}
		state.Apply(mustEntry(t, 1, 1))
		logs.StageCommitIndex(4) // 5 and 6 may yet be replaced
		if err := logs.StoreLog(mustEntry(t, 6, 1)); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := catchUp(state, logs, mustSnapshots(t, logs)); err != nil {
				t.Fatal(err)
			}
			if h := state.Head(); h.Applied != 4 || h.Seq != 3 {
				t.Fatalf("%+v", h)
			}
		}
	})
	t.Run("entries are missing", func(t *testing.T) {
		logs, state := mustLogs(t, vfs.NewMem()), mustState(t, vfs.NewMem())
		if err := logs.StoreLog(mustEntry(t, 10, 1)); err != nil {
			t.Fatal(err)
		}
		if err := catchUp(state, logs, mustSnapshots(t, logs)); err == nil {
			t.Fatal("a state that the log does not continue was taken")
		}
	})
	t.Run("crash before a snapshot was restored", func(t *testing.T) {
		source := mustState(t, vfs.NewMem())
		for i := uint64(1); i <= 5; i++ {
			source.Apply(mustEntry(t, i, 1))
		}
		s, err := source.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Release()
		logs, state := mustLogs(t, vfs.NewMem()), mustState(t, vfs.NewMem())
		snaps := mustSnapshots(t, logs)
		_, trans := raft.NewInmemTransport("a")
		// 6 and 7 were barriers. The log is not mended either.
		sink, err := snaps.FileSnapshotStore.Create(1, 7, 1, raft.Configuration{}, 1, trans)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Persist(sink); err != nil {
			t.Fatal(err)
		}
		if err := logs.StoreLog(mustEntry(t, 8, 1)); err != nil {
			t.Fatal(err)
		}
		logs.StageCommitIndex(8)
		if err := logs.StoreLog(mustEntry(t, 9, 1)); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := catchUp(state, logs, snaps); err != nil {
				t.Fatal(err)
			}
			if h := state.Head(); h.Applied != 8 || h.Seq != 6 {
				t.Fatalf("%+v", h)
			}
			var l raft.Log
			if err := logs.GetLog(7, &l); err != nil || l.Term != 1 {
				t.Fatalf("the snapshot's last entry: %+v %v", l, err)
			}
		}
		// One that does not fit what is here stops the start.
		other := mustState(t, vfs.NewMem())
		l := mustEntry(t, 1, 1)
		l.Data = bytes.Clone(mustEntry(t, 2, 1).Data)
		other.Apply(l)
		if err := catchUp(other, logs, snaps); !errors.Is(err, ErrDiverged) {
			t.Fatalf("a contradicting snapshot: %v", err)
		}
	})
}

func TestBoundaryLog(t *testing.T) {
	logs := mustLogs(t, vfs.NewMem())
	l := mustCache(t, logs)
	for i := uint64(1); i <= 10; i++ {
		if err := l.StoreLog(mustEntry(t, i, 1)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ lo, hi, first, last uint64 }{
		{1, 5, 5, 10}, // from the front: 5 stays
		{5, 5, 5, 10}, // nothing else
		{5, 7, 7, 10}, // again
		{9, 10, 7, 8}, // from the end: as told
		{1, 8, 0, 0},  // all
		{1, 1 << 40, 0, 0},
	} {
		if err := l.DeleteRange(c.lo, c.hi); err != nil {
			t.Fatal(err)
		}
		first, _ := l.FirstIndex()
		last, _ := l.LastIndex()
		if first != c.first || last != c.last {
			t.Fatalf("after %d to %d: %d to %d, want %d to %d", c.lo, c.hi, first, last, c.first, c.last)
		}
	}
}

package raftstore

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"strings"
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

func mustSnapshots(t *testing.T, fs vfs.FS, state *fsm.FSM, logs raft.LogStore) *snapshotStore {
	t.Helper()
	s, err := newSnapshotStore(fs, "/", slog.New(slog.DiscardHandler), state, logs, func(err error) { t.Error(err) })
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

// A snapshot that ends before the log begins was overtaken by a newer one. An
// entry in front of a gap would be refused for ever: the node asks to be started
// again, and its log stays as it is.
func TestOvertakenSnapshot(t *testing.T) {
	for index, overtaken := range map[uint64]bool{8: true, 9: false} {
		logs := mustLogs(t, vfs.NewMem())
		cache := mustCache(t, logs).LogCache
		for i := uint64(10); i <= 12; i++ {
			if err := cache.StoreLog(mustEntry(t, i, 1)); err != nil {
				t.Fatal(err)
			}
		}
		var failed error
		fs := vfs.NewMem()
		snaps := mustSnapshots(t, fs, mustState(t, fs), cache)
		snaps.fail = func(err error) { failed = err }
		_, trans := raft.NewInmemTransport("a")
		sink, err := snaps.Create(1, index, 1, raft.Configuration{}, 1, trans)
		if err != nil {
			t.Fatal(err)
		}
		mustCopy(t, sink, mustSource(t, 3))
		err = sink.Close()
		first, _ := logs.FirstIndex()
		last, _ := logs.LastIndex()
		want := uint64(9)
		if overtaken {
			want = 10
		}
		if (err != nil) != overtaken || errors.Is(failed, errStartAgain) != overtaken || first != want || last != 12 {
			t.Errorf("up to %d: %v, failed %v; the log has %d to %d", index, err, failed, first, last)
		}
	}
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
			fs := vfs.NewMem()
			snaps := mustSnapshots(t, fs, mustState(t, fs), cache)
			snaps.fail = func(err error) { failed = err }
			_, trans := raft.NewInmemTransport("a")
			sink, err := snaps.Create(1, c.index, c.term, raft.Configuration{}, 1, trans)
			if err != nil {
				t.Fatal(err)
			}
			mustCopy(t, sink, mustSource(t, 3))
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
			if err := catchUp(state, logs, mustSnapshots(t, vfs.NewMem(), state, logs)); err != nil {
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
		if err := catchUp(state, logs, mustSnapshots(t, vfs.NewMem(), state, logs)); err == nil {
			t.Fatal("a state that the log does not continue was taken")
		}
	})
	t.Run("crash before a snapshot was restored", func(t *testing.T) {
		fs := vfs.NewMem()
		logs, state := mustLogs(t, fs), mustState(t, fs)
		snaps := mustSnapshots(t, fs, state, logs)
		_, trans := raft.NewInmemTransport("a")
		// 6 and 7 were barriers. The log is not mended either.
		sink, err := snaps.Create(1, 7, 1, raft.Configuration{}, 1, trans)
		if err != nil {
			t.Fatal(err)
		}
		mustCopy(t, sink, mustSource(t, 5))
		if err := sink.(*snapshotSink).commit(); err != nil {
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
		otherFS := vfs.NewMem()
		other := mustState(t, otherFS)
		l := mustEntry(t, 1, 1)
		l.Data = bytes.Clone(mustEntry(t, 2, 1).Data)
		other.Apply(l)
		snaps = mustSnapshots(t, otherFS, other, logs)
		if sink, err = snaps.Create(1, 7, 1, raft.Configuration{}, 1, trans); err != nil {
			t.Fatal(err)
		}
		sinkErr := func() error {
			e := mustExport(t, mustSource(t, 5))
			_, err := io.Copy(sink, e)
			return errors.Join(err, sink.Close())
		}()
		if !errors.Is(sinkErr, ErrDiverged) {
			t.Fatalf("a contradicting snapshot: %v", sinkErr)
		}
	})
	t.Run("the snapshot before the log is missing", func(t *testing.T) {
		fs := vfs.NewMem()
		logs, state := mustLogs(t, fs), mustState(t, fs)
		for i := uint64(1); i <= 5; i++ {
			state.Apply(mustEntry(t, i, 1))
		}
		if err := logs.StoreLog(mustEntry(t, 5, 1)); err != nil {
			t.Fatal(err)
		}
		if err := catchUp(state, logs, mustSnapshots(t, fs, state, logs)); err == nil {
			t.Fatal("raft would panic")
		}
	})
	t.Run("the state behind our own snapshot is gone", func(t *testing.T) {
		fs := vfs.NewMem()
		logs, state := mustLogs(t, fs), mustSource(t, 5)
		snaps := mustSnapshots(t, fs, state, logs)
		mustKeep(t, snaps, state)
		snaps = mustSnapshots(t, fs, mustState(t, fs), logs)
		if err := catchUp(snaps.state, logs, snaps); err == nil || !strings.Contains(err.Error(), "join again") {
			t.Fatalf("a state without its data: %v", err)
		}
	})
}

// A snapshot of ours is a manifest; its data is the state at the time it is
// opened, which may be newer. Old ones go.
func TestOwnSnapshot(t *testing.T) {
	fs := vfs.NewMem()
	logs, state := mustLogs(t, fs), mustSource(t, 5)
	snaps := mustSnapshots(t, fs, state, logs)
	mustKeep(t, snaps, state)
	state.Apply(mustEntry(t, 6, 1))
	mustKeep(t, snaps, state)
	mustKeep(t, snaps, state)
	state.Apply(mustEntry(t, 7, 1))
	list, err := snaps.List()
	if err != nil || len(list) != 2 || list[0].Index != 6 || list[1].Index != 6 || list[0].ID <= list[1].ID {
		t.Fatalf("%+v %v", list, err)
	}
	meta, rc, err := snaps.Open(list[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(rc)
	if err = errors.Join(err, rc.Close()); err != nil || int64(len(b)) != meta.Size || meta.Index != 6 {
		t.Fatalf("%d bytes, %+v, %v", len(b), meta, err)
	}
	if h, err := fsm.SnapshotHead(bytes.NewReader(b)); err != nil || h.Applied != 7 {
		t.Fatalf("%+v %v", h, err)
	}
	names, err := fs.List("/snapshots")
	if err != nil || len(names) != 2 {
		t.Fatalf("%v %v", names, err)
	}
	if _, _, err := snaps.Open("1-2-3"); err == nil {
		t.Fatal("opened a snapshot that is not there")
	}
}

// What does not come whole is never a snapshot.
func TestSnapshotRefused(t *testing.T) {
	source := mustExport(t, mustSource(t, 50))
	good, err := io.ReadAll(source)
	if err != nil {
		t.Fatal(err)
	}
	fs := vfs.NewMem()
	logs, state := mustLogs(t, fs), mustState(t, fs)
	snaps := mustSnapshots(t, fs, state, logs)
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 4
	for name, b := range map[string][]byte{
		"nothing": nil, "cut": good[:len(good)-1], "flipped": flipped, "longer": append(bytes.Clone(good), 0), "foreign": []byte("something else entirely"),
	} {
		sink, err := snaps.Create(1, 7, 1, raft.Configuration{}, 1, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(sink, bytes.NewReader(b))
		if err == nil {
			err = sink.Close()
		} else {
			sink.Cancel()
		}
		if err == nil {
			t.Errorf("%s was taken", name)
		}
		if names, _ := fs.List("/snapshots"); len(names) != 0 {
			t.Errorf("%s left %v", name, names)
		}
	}
	// A sender that went away.
	sink, err := snaps.Create(1, 7, 1, raft.Configuration{}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sink.Write(good[:100]); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(sink.Cancel(), sink.Cancel()); err != nil {
		t.Fatal(err)
	}
	// Tables that were damaged between their arrival and their restore.
	if sink, err = snaps.Create(1, 60, 1, raft.Configuration{}, 1, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(sink, bytes.NewReader(good)); err != nil {
		t.Fatal(err)
	}
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
	path := fs.PathJoin("/snapshots", sink.ID(), tablesName, "000000.sst")
	flip(t, fs, path, 100)
	_, rc, err := snaps.Open(sink.ID())
	if err != nil {
		t.Fatal(err)
	}
	if err := state.Restore(rc); err == nil || state.Head().Seq != 0 {
		t.Fatalf("a damaged table was restored: %v", err)
	}
	flip(t, fs, path, 100)
	if err := state.Restore(rc); err != nil || state.Head().Seq != 50 {
		t.Fatal(err)
	}
	if err := state.Restore(rc); err != nil { // again: not newer
		t.Fatal(err)
	}
	if meta, rc, err := snaps.Open(sink.ID()); err != nil || meta.Size != int64(len(good)) {
		t.Fatalf("a restored snapshot cannot be sent on: %+v %v", meta, err)
	} else {
		rc.Close()
	}
}

// flip changes a bit of a file.
func flip(t *testing.T, fs vfs.FS, path string, at int64) {
	t.Helper()
	f, err := fs.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// A snapshot in the files of builds before is restored and sent.
func TestOldSnapshot(t *testing.T) {
	dir := t.TempDir()
	old, err := raft.NewFileSnapshotStoreWithLogger(dir, 2, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	_, trans := raft.NewInmemTransport("a")
	sink, err := old.Create(1, 5, 1, raft.Configuration{Servers: []raft.Server{{ID: "n1", Address: "a"}}}, 1, trans)
	if err != nil {
		t.Fatal(err)
	}
	mustCopy(t, sink, mustSource(t, 5))
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
	logs, state := mustLogs(t, vfs.NewMem()), mustState(t, vfs.NewMem())
	snaps, err := newSnapshotStore(vfs.Default, dir, slog.New(slog.DiscardHandler), state, logs, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	list, err := snaps.List()
	if err != nil || len(list) != 1 || list[0].Index != 5 || len(list[0].Configuration.Servers) != 1 {
		t.Fatalf("%+v %v", list, err)
	}
	if err := catchUp(state, logs, snaps); err != nil || state.Head().Seq != 5 {
		t.Fatalf("%+v %v", state.Head(), err)
	}
	meta, rc, err := snaps.Open(list[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(rc)
	if err = errors.Join(err, rc.Close()); err != nil || int64(len(b)) != meta.Size {
		t.Fatalf("%d bytes of %d, %v", len(b), meta.Size, err)
	}
	for range 2 { // and goes with the others
		mustKeep(t, snaps, state)
	}
	if list, err = snaps.List(); err != nil || len(list) != 2 {
		t.Fatalf("%+v %v", list, err)
	}
	if names, _ := snaps.fs.List(snaps.dir); len(names) != 2 {
		t.Fatalf("left: %v", names)
	}
}

// mustSource is a state with n events.
func mustSource(t *testing.T, n uint64) *fsm.FSM {
	t.Helper()
	s := mustState(t, vfs.NewMem())
	for i := uint64(1); i <= n; i++ {
		s.Apply(mustEntry(t, i, 1))
	}
	if s.Head().Seq != n {
		t.Fatalf("%+v %v", s.Head(), s.Err())
	}
	return s
}

func mustExport(t *testing.T, s *fsm.FSM) *fsm.Export {
	t.Helper()
	e, err := s.Export()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

// mustCopy writes a state's stream into a sink, in pieces of all sizes.
func mustCopy(t *testing.T, sink raft.SnapshotSink, source *fsm.FSM) {
	t.Helper()
	e, err := source.Export()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	n, err := io.CopyBuffer(struct{ io.Writer }{sink}, e, make([]byte, 7))
	if err != nil || n != e.Size {
		t.Fatalf("%d bytes of %d, %v", n, e.Size, err)
	}
}

// mustKeep takes a snapshot as raft does.
func mustKeep(t *testing.T, snaps *snapshotStore, state *fsm.FSM) {
	t.Helper()
	s, err := state.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Release()
	h := state.Head()
	sink, err := snaps.Create(1, h.Applied, h.Term, raft.Configuration{}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Persist(sink); err != nil {
		t.Fatal(err)
	}
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

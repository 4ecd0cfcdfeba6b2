package raftstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/fsm"
	"github.com/sallyport/sallyport/raftstore/logstore"
)

// exportPart is how much Export writes between two looks at its context.
const exportPart = 256 << 10

// Export writes the whole state of this node, as it is now, for a backup. It
// returns the newest event in it. Nothing waits for it but Close, which makes
// it end early; w should have deadlines of its own.
//
// What is written is not encrypted, and whoever can change it can change what
// Import takes but for the chain over the events: keep the chain elsewhere.
func (s *Store) Export(ctx context.Context, w io.Writer) (seq uint64, chain [32]byte, err error) {
	end, err := s.begin()
	if err != nil {
		return 0, chain, err
	}
	defer end()
	e, err := s.state.Export()
	if err != nil {
		return 0, chain, err
	}
	defer e.Close()
	for {
		if err := ctx.Err(); err != nil {
			return 0, chain, context.Cause(ctx)
		}
		if s.use.closing.Load() {
			return 0, chain, ErrClosed
		}
		_, err := io.CopyN(w, e, exportPart)
		if errors.Is(err, io.EOF) {
			return e.Head.Seq, e.Head.Chain, nil
		}
		if err != nil {
			return 0, chain, fmt.Errorf("export the state: %w", err)
		}
	}
}

// Import makes cfg.Dir, which must not exist or be empty, a store with the
// state that Export wrote, and the one voter of a new cluster that goes on
// where the old one was: same events, same chain, higher Raft indexes. Open
// and do not Bootstrap it. Of cfg only Dir, NodeID, Addr and Log are used.
//
// The old cluster must not come back: both would go on from the same events.
// An error leaves cfg.Dir as it was.
func Import(cfg Config, r io.Reader) (seq uint64, chain [32]byte, err error) {
	setDefaults(&cfg)
	fs := cfg.seams.fs
	if cfg.Dir == "" || cfg.NodeID == "" || cfg.Addr == "" {
		return 0, chain, errors.New("raftstore.Import: incomplete configuration")
	}
	if names, err := fs.List(cfg.Dir); err == nil && len(names) > 0 {
		return 0, chain, fmt.Errorf("import into %s: %w", cfg.Dir, ErrNotFresh)
	}
	tmp := cfg.Dir + ".import"
	if err := fs.RemoveAll(tmp); err != nil {
		return 0, chain, fmt.Errorf("import: %w", err)
	}
	if err := fs.MkdirAll(tmp, 0o700); err != nil {
		return 0, chain, fmt.Errorf("import: %w", err)
	}
	h, err := importTo(fs, tmp, &cfg, r)
	if err == nil {
		err = fs.RemoveAll(cfg.Dir) // empty
	}
	if err == nil {
		err = fs.Rename(tmp, cfg.Dir)
	}
	if err == nil {
		err = syncDir(fs, fs.PathDir(cfg.Dir))
	}
	if err != nil {
		return 0, chain, errors.Join(fmt.Errorf("import: %w", err), fs.RemoveAll(tmp))
	}
	return h.Seq, h.Chain, nil
}

func importTo(fs vfs.FS, dir string, cfg *Config, r io.Reader) (_ fsm.Head, err error) {
	state, err := fsm.Open(fsm.Config{Dir: fs.PathJoin(dir, stateDir), FS: fs, Log: cfg.Log})
	if err != nil {
		return fsm.Head{}, err
	}
	defer func() { err = errors.Join(err, state.Close()) }()
	if err := state.Restore(io.NopCloser(r)); err != nil {
		return fsm.Head{}, err
	}
	h := state.Head()
	if h.Applied == 0 {
		return h, errors.New("there is nothing in it")
	}
	logs, err := logstore.Open(logstore.Config{Dir: fs.PathJoin(dir, logDir), FS: fs, Log: cfg.Log})
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, logs.Close()) }()
	// raft continues the terms of the old cluster.
	if err := logs.SetUint64([]byte("CurrentTerm"), h.Term); err != nil {
		return h, err
	}
	snaps, err := newSnapshotStore(fs, dir, slog.New(slog.DiscardHandler), state, logs, nil)
	if err != nil {
		return h, err
	}
	alone := raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(cfg.NodeID), Address: raft.ServerAddress(cfg.Addr)}}}
	sink, err := snaps.Create(raft.SnapshotVersionMax, h.Applied, h.Term, alone, h.Applied, nil)
	if err != nil {
		return h, err
	}
	snapshot, err := state.Snapshot()
	if err != nil {
		return h, err
	}
	defer snapshot.Release()
	return h, snapshot.Persist(sink) // the log gets the entry it ends with
}

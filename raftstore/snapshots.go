package raftstore

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/fsm"
	"github.com/sallyport/sallyport/raftstore/logstore"
)

// boundaryLog is raft's log but that a deletion from the front leaves its last
// entry, unless it deletes everything. That entry may be the one a snapshot
// ends with, and a follower that lacks it while it has later ones refuses the
// leader's next entries, is sent the snapshot again, and so for ever: the
// other half of hashicorp/raft #697, see mend.
type boundaryLog struct{ *raft.LogCache }

func (l boundaryLog) DeleteRange(lo, hi uint64) error {
	first, err := l.FirstIndex()
	if err != nil {
		return err
	}
	last, err := l.LastIndex()
	if err != nil {
		return err
	}
	if lo <= first && hi < last {
		hi--
	}
	if hi < lo {
		return nil
	}
	return l.LogCache.DeleteRange(lo, hi)
}

// snapshotStore is raft's store of snapshots. The state itself is the data of
// those this node takes: at rest a snapshot is a manifest that says how far the
// synced state was. What a follower is sent is read from the state when it is
// sent, so it may be newer than its metadata; entries the state has already are
// skipped. What a leader sends is written as tables while it comes in, next to
// its manifest, and moved into the state by fsm.Restore. A snapshot from the
// leader that contradicts the log mends the log.
//
//	snapshots/ID/manifest.json   see manifest
//	snapshots/ID/tables/*.sst    a received one, until it is the state
//	snapshots/ID.tmp             one that is not complete
//	snapshots/ID/meta.json, state.bin   raft's own files of builds before: read, never written
type snapshotStore struct {
	fs    vfs.FS
	dir   string
	log   *slog.Logger
	state *fsm.FSM
	logs  raft.LogStore // the cache above our log, below boundaryLog
	fail  func(error)

	last atomic.Int64 // milliseconds in the newest id
}

const (
	// retainSnapshots: the newest, and one before in case it is damaged: a
	// person may then look at it. They take no space.
	retainSnapshots = 2

	manifestName = "manifest.json"
	tablesName   = "tables"
	tmpSuffix    = ".tmp"
	// maxManifest bounds what is read: a hundred thousand tables.
	maxManifest = 32 << 20
)

// manifest is a snapshot at rest.
type manifest struct {
	Meta raft.SnapshotMeta `json:"meta"`
	// Head is how far the state is that this snapshot stands for.
	Head fsm.Head `json:"head"`
	// Tables are a received snapshot's; nil for one taken here.
	Tables *fsm.Tables `json:"tables,omitempty"`
}

// newSnapshotStore opens dir/snapshots and removes what a crash left there.
func newSnapshotStore(fs vfs.FS, dir string, log *slog.Logger, state *fsm.FSM, logs raft.LogStore, fail func(error)) (*snapshotStore, error) {
	s := &snapshotStore{fs: fs, dir: fs.PathJoin(dir, snapshotsDir), log: log, state: state, logs: logs, fail: fail}
	err := fs.MkdirAll(s.dir, 0o700)
	if err == nil {
		err = syncDir(fs, dir)
	}
	if err == nil {
		err = s.clean()
	}
	if err != nil {
		return nil, fmt.Errorf("open the snapshots: %w", err)
	}
	return s, nil
}

// clean removes half written snapshots and the tables of those that are the
// state already.
func (s *snapshotStore) clean() error {
	names, err := s.fs.List(s.dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasSuffix(name, tmpSuffix) {
			if err := s.fs.RemoveAll(s.fs.PathJoin(s.dir, name)); err != nil {
				return err
			}
			continue
		}
		m, err := s.read(name)
		if err != nil || m.Tables == nil {
			continue // List reports what cannot be read
		}
		if there, err := s.state.Covers(m.Head); err == nil && there {
			if err := s.fs.RemoveAll(m.Tables.Dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// read reads the manifest of a snapshot, of whatever build.
func (s *snapshotStore) read(id string) (*manifest, error) {
	b, err := readFile(s.fs, s.fs.PathJoin(s.dir, id, manifestName), maxManifest)
	if errors.Is(err, os.ErrNotExist) {
		return s.readOld(id)
	}
	if err != nil {
		return nil, err
	}
	m := new(manifest)
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("manifest of snapshot %s: %w", id, err)
	}
	m.Meta.ID = id
	if m.Tables != nil {
		m.Tables.Dir = s.fs.PathJoin(s.dir, id, tablesName)
	}
	return m, nil
}

// readOld reads a snapshot in raft's own file format: the metadata, and the
// head from the stream's beginning.
func (s *snapshotStore) readOld(id string) (*manifest, error) {
	b, err := readFile(s.fs, s.fs.PathJoin(s.dir, id, "meta.json"), maxManifest)
	if err != nil {
		return nil, err
	}
	m := new(manifest)
	if err := json.Unmarshal(b, &m.Meta); err != nil {
		return nil, fmt.Errorf("metadata of snapshot %s: %w", id, err)
	}
	f, err := s.openOld(id)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m.Head, err = fsm.SnapshotHead(f)
	return m, err
}

func (s *snapshotStore) openOld(id string) (io.ReadCloser, error) {
	return s.fs.Open(s.fs.PathJoin(s.dir, id, "state.bin"), vfs.SequentialReadsOption)
}

func readFile(fs vfs.FS, path string, limit int64) ([]byte, error) {
	f, err := fs.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return b, err
}

// list reads all manifests, newest first. One that cannot be read is left out:
// whether the log can do without is catchUp's to see.
func (s *snapshotStore) list() ([]*manifest, error) {
	names, err := s.fs.List(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list the snapshots: %w", err)
	}
	var ms []*manifest
	for _, name := range names {
		if strings.HasSuffix(name, tmpSuffix) {
			continue
		}
		m, err := s.read(name)
		if err != nil {
			s.log.Warn("a snapshot cannot be read", "id", name, "error", err)
			continue
		}
		ms = append(ms, m)
	}
	slices.SortFunc(ms, func(a, b *manifest) int {
		return -cmp.Or(cmp.Compare(a.Meta.Term, b.Meta.Term), cmp.Compare(a.Meta.Index, b.Meta.Index), cmp.Compare(a.Meta.ID, b.Meta.ID))
	})
	return ms, nil
}

// List is the newest snapshots' metadata, newest first.
func (s *snapshotStore) List() ([]*raft.SnapshotMeta, error) {
	ms, err := s.list()
	if err != nil {
		return nil, err
	}
	var metas []*raft.SnapshotMeta
	for _, m := range ms[:min(len(ms), retainSnapshots)] {
		metas = append(metas, &m.Meta)
	}
	return metas, nil
}

// Open gives a snapshot's data: the state, unless it is older, which is only so
// between the arrival of a snapshot and its restore.
func (s *snapshotStore) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	m, err := s.read(id)
	if err != nil {
		return nil, nil, fmt.Errorf("open snapshot %s: %w", id, err)
	}
	there, contradiction := s.state.Covers(m.Head)
	switch {
	case there:
		e, err := s.state.Export()
		if err != nil {
			return nil, nil, fmt.Errorf("open snapshot %s: %w", id, err)
		}
		m.Meta.Size = e.Size
		return &m.Meta, e, nil
	case m.Tables != nil: // if it contradicts the state, Restore says so
		return &m.Meta, &fsm.Received{Tables: m.Tables}, nil
	}
	f, err := s.openOld(id)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, errors.Join(fmt.Errorf("snapshot %s is of a state this node no longer has; delete this node's data and join again", id), contradiction)
	}
	return &m.Meta, f, err
}

// Create starts a snapshot, one of our own or one from the leader.
func (s *snapshotStore) Create(v raft.SnapshotVersion, index, term uint64, c raft.Configuration, ci uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	if v != raft.SnapshotVersionMax {
		return nil, fmt.Errorf("snapshot version %d, this build knows %d", v, raft.SnapshotVersionMax)
	}
	ms := time.Now().UnixMilli() // ids differ, also of two in one millisecond
	for last := s.last.Load(); ms <= last || !s.last.CompareAndSwap(last, ms); last = s.last.Load() {
		ms = max(ms, last+1)
	}
	sink := &snapshotSink{store: s, m: manifest{Meta: raft.SnapshotMeta{
		Version: v, ID: fmt.Sprintf("%d-%d-%d", term, index, ms), Index: index, Term: term,
		Configuration: c, ConfigurationIndex: ci,
	}}}
	sink.path = s.fs.PathJoin(s.dir, sink.m.Meta.ID)
	if err := s.fs.MkdirAll(sink.path+tmpSuffix, 0o700); err != nil {
		return nil, fmt.Errorf("create a snapshot: %w", err)
	}
	return sink, nil
}

// reap removes all but the newest snapshots.
func (s *snapshotStore) reap() error {
	ms, err := s.list()
	if err != nil {
		return err
	}
	for _, m := range ms[min(len(ms), retainSnapshots):] {
		if err := s.fs.RemoveAll(s.fs.PathJoin(s.dir, m.Meta.ID)); err != nil {
			return fmt.Errorf("remove an old snapshot: %w", err)
		}
	}
	return nil
}

// snapshotSink is a snapshot in the making. It is of one goroutine: KeepState
// or Write, then Close or Cancel.
type snapshotSink struct {
	store  *snapshotStore
	path   string // without tmpSuffix
	m      manifest
	own    bool      // KeepState was called
	in     *incoming // nil until Write
	closed bool
}

// incoming is the goroutine that turns a stream into tables.
type incoming struct {
	w    *io.PipeWriter
	done chan struct{} // closed when the goroutine ended and set what follows
	t    *fsm.Tables
	err  error
}

func (s *snapshotSink) ID() string { return s.m.Meta.ID }

// KeepState makes it a snapshot of our own.
func (s *snapshotSink) KeepState(h fsm.Head) error {
	s.m.Head, s.own = h, true
	return nil
}

// Write takes a part of a received stream.
func (s *snapshotSink) Write(p []byte) (int, error) {
	if s.in == nil {
		s.store.log.Info("a snapshot arrives", "id", s.m.Meta.ID) // raft's log has only its end
		r, w := io.Pipe()
		in := &incoming{w: w, done: make(chan struct{})}
		dir := s.store.fs.PathJoin(s.path+tmpSuffix, tablesName)
		go func() { // ends with finish
			defer close(in.done)
			in.t, in.err = s.store.state.Receive(r, dir)
			if in.err == nil {
				r.Close()
			} else {
				r.CloseWithError(in.err)
			}
		}()
		s.in = in
	}
	return s.in.w.Write(p)
}

// finish ends the goroutine, with err for a stream that has no end.
func (in *incoming) finish(err error) error {
	in.w.CloseWithError(err) // nil means io.EOF
	<-in.done
	return in.err
}

// Cancel gives the snapshot up.
func (s *snapshotSink) Cancel() error {
	if s.closed {
		return nil
	}
	s.closed = true
	if s.in != nil {
		s.in.finish(errors.New("cancelled"))
	}
	return s.store.fs.RemoveAll(s.path + tmpSuffix)
}

// errStartAgain is why a node stops that is well but for what raft remembers of
// its log.
var errStartAgain = errors.New("start this node again")

// Close makes the snapshot durable and then mends the log.
func (s *snapshotSink) Close() error {
	if s.closed {
		return nil
	}
	s.closed = true
	if err := s.commit(); err != nil {
		return errors.Join(fmt.Errorf("store a snapshot: %w", err), s.store.fs.RemoveAll(s.path+tmpSuffix))
	}
	if first, err := s.store.logs.FirstIndex(); err != nil {
		return err
	} else if first > s.m.Meta.Index+1 && !s.own {
		// Another leader had begun to send it before a newer one arrived from the
		// one before. An entry in front of a gap would be refused for ever, as
		// would the leader's next ones without it; a node that starts is asked
		// from its log's end on, where both have the same.
		err := fmt.Errorf("a snapshot up to %d came when the log began at %d already; %w", s.m.Meta.Index, first, errStartAgain)
		s.store.fail(err)
		return err
	}
	atEnd, err := s.store.mend(s.m.Meta.Index, s.m.Meta.Term)
	if atEnd {
		// raft remembers the old term of the last entry and cannot be told.
		s.store.fail(fmt.Errorf("the log was mended at its end; %w", errStartAgain))
	}
	if err != nil {
		return err
	}
	return s.store.reap()
}

// commit gives the snapshot its name, when all of it is synced.
func (s *snapshotSink) commit() error {
	if s.in != nil {
		if err := s.in.finish(nil); err != nil {
			return err
		}
		s.m.Tables, s.m.Head = s.in.t, s.in.t.Head
	} else if !s.own {
		return errors.New("no data")
	}
	b, err := json.Marshal(s.m)
	if err != nil {
		return err
	}
	fs, tmp := s.store.fs, s.path+tmpSuffix
	f, err := fs.Create(fs.PathJoin(tmp, manifestName), vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := syncDir(fs, tmp); err != nil {
		return err
	}
	if err := fs.Rename(tmp, s.path); err != nil {
		return err
	}
	return syncDir(fs, s.store.dir)
}

func syncDir(fs vfs.FS, dir string) error {
	d, err := fs.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// mend makes the log have the entry a snapshot ends with, of the snapshot's
// term. raft sees only the log when it compares its past with what a leader
// sends, not the snapshot. Without the entry, or with another of that index
// (which was never committed, nor was what follows it), it refuses the leader's
// next entries, is sent the snapshot again, and so for ever (hashicorp/raft
// #697; also a new node that restarts between its first snapshot and its first
// acknowledgement). With the entry, the leader's next ones fit, and replace
// what is wrong after it.
//
// The entry is not the true one, whose content only the snapshot has, so this
// node must never send it when it leads: what precedes it is deleted, and
// without that raft sends the snapshot.
//
// It comes after the snapshot is durable: before, a crash would leave an entry
// that fits over others that do not.
func (s *snapshotStore) mend(index, term uint64) (atEnd bool, err error) {
	var l raft.Log
	err = s.logs.GetLog(index, &l)
	if err == nil && l.Term == term {
		return false, nil
	}
	replaced := err == nil
	if replaced {
		s.log.Warn("the log differs from the leader's at the snapshot's end; what follows was never committed", "index", index, "had_term", l.Term, "term", term)
	}
	if replaced || errors.Is(err, raft.ErrLogNotFound) {
		// The deletion is synced with what is stored after it.
		if err = s.logs.DeleteRange(0, index-1); err == nil {
			err = s.logs.StoreLog(&raft.Log{Index: index, Term: term, Type: raft.LogNoop})
		}
	}
	if err != nil {
		return false, fmt.Errorf("mend the log at the snapshot's end: %w", err)
	}
	last, err := s.logs.LastIndex()
	return replaced && last == index, err
}

// catchUp makes the state as new as what this node knows to be committed,
// before raft starts: the newest snapshot, if the state is older or the log not
// mended (a crash between the arrival of a snapshot and its restore), then the
// log up to the commit index stored with it (a power failure may have taken the
// state's last writes). raft.Config.RestoreCommittedLogs would do the second,
// and lose the configuration entries it passes (v1.8.0, api.go NewRaft).
func catchUp(state *fsm.FSM, logs *logstore.Store, snaps *snapshotStore) error {
	list, err := snaps.list()
	if err != nil {
		return err
	}
	have, start := state.Head().Applied, uint64(0)
	if len(list) > 0 {
		newest := list[0].Meta
		start = newest.Index
		if err := restoreIfNewer(state, snaps, list[0]); err != nil {
			return err
		}
		have = max(state.Head().Applied, newest.Index)
		if _, err := snaps.mend(newest.Index, newest.Term); err != nil {
			return err
		}
	}
	first, err := logs.FirstIndex()
	if err != nil {
		return err
	}
	if first > have+1 {
		return fmt.Errorf("the log begins at %d and the state ends at %d: entries are missing; delete this node's data and join again", first, have)
	}
	if first > start+1 { // raft would look for the members in entries that are gone
		return fmt.Errorf("the log begins at %d and the newest snapshot that can be read ends at %d: a snapshot is missing; delete this node's data and join again", first, start)
	}
	commit, err := logs.GetCommitIndex()
	if err != nil {
		return err
	}
	var batch []*raft.Log
	for i := have + 1; i <= commit; i++ {
		l := new(raft.Log)
		if err := logs.GetLog(i, l); err != nil {
			return fmt.Errorf("read log entry %d: %w", i, err)
		}
		if l.Type == raft.LogCommand || l.Type == raft.LogConfiguration {
			batch = append(batch, l)
		}
		if len(batch) == maxAppendEntries {
			state.ApplyBatch(batch)
			batch = nil
		}
	}
	state.ApplyBatch(batch)
	return state.Err()
}

// restoreIfNewer restores a snapshot whose content is newer than the state.
// Its index cannot tell: it may be that of a barrier, which the state does not
// count.
func restoreIfNewer(state *fsm.FSM, snaps *snapshotStore, m *manifest) error {
	if there, err := state.Covers(m.Head); err == nil && there {
		return nil
	}
	_, rc, err := snaps.Open(m.Meta.ID)
	if err != nil {
		return err
	}
	defer rc.Close()
	return state.Restore(rc)
}

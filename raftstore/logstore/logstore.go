// Package logstore keeps Raft's log and its term and vote in one Pebble
// database. It knows nothing of what the entries mean.
//
// A crash at any moment leaves the log without gaps: what StoreLogs returned
// for is there, the rest is there up to some entry and not after it. The
// formats and crash states are in ../DESIGN.md.
package logstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/wal"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/internal/disk"
)

// errNotFound is what raft wants for a key never set; it compares the text.
var errNotFound = errors.New("not found")

// memTableSize is large enough that most entries are truncated before any flush:
// the smaller it is, the larger is the part of it that raft still keeps when it
// is flushed, which is then written twice. It is reached by doubling from
// 256 KiB: a log that never held as much takes no such memory.
const memTableSize = 64 << 20

// walFailoverAfter is how long a write may hang before the other disk is used:
// well below the second after which a leader with a hung disk stops acting as
// one, and above what a busy disk needs.
const walFailoverAfter = 200 * time.Millisecond

// Keys. The first byte tells the family.
//
//	L be64(index)  entry: type u8, term le64, appended le64 ns, len(extensions) le32, extensions, data
//	S key          value of the stable store, as raft gave it
//	M commit       be64, index known committed when the last entries were stored
//	M raft         1 while this node has a part in Raft, 0 while it has none
const (
	prefixLog    = 'L'
	prefixStable = 'S'
	headerSize   = 1 + 8 + 8 + 4
)

var (
	commitKey = []byte("Mcommit")
	raftKey   = []byte("Mraft")
)

const keyCurrentTerm = "CurrentTerm" // raft's name for it

// The vote is two values to raft, which writes them one after the other
// (raft.go persistVote). A crash between them would keep a term without its
// vote; harmless, yet nothing to explain to anybody: the first is held back and
// both are written in one batch with the second.
const (
	keyLastVoteTerm = "LastVoteTerm"
	keyLastVoteCand = "LastVoteCand"
)

// Store is raft's LogStore, StableStore and CommitTrackingLogStore. All
// methods may be called from any goroutine.
type Store struct {
	db     *pebble.DB
	logger *disk.Logger

	// committed tells an index known to be committed; it goes into each
	// StoreLogs batch. nil, or set before the first StoreLogs.
	committed func() uint64

	first, last atomic.Uint64 // 0 when the log is empty
	staged      atomic.Uint64 // commit index for the next StoreLogs
	stored      atomic.Uint64 // commit index on disk
	busySince   atomic.Int64  // when the running StoreLogs began, ns of the monotonic clock plus one; 0 when idle

	// writing is held over writes. It is a channel and no mutex so that a
	// simulated clock goes on while someone waits for a write.
	writing  chan struct{}
	voteTerm []byte // LastVoteTerm waiting for its LastVoteCand; held: writing
}

var (
	_ raft.LogStore               = (*Store)(nil)
	_ raft.StableStore            = (*Store)(nil)
	_ raft.MonotonicLogStore      = (*Store)(nil)
	_ raft.CommitTrackingLogStore = (*Store)(nil)
)

// Config is where the log is and who hears of its troubles.
type Config struct {
	Dir string
	FS  vfs.FS // nil means the operating system's
	// WALDir is where entries are synced, instead of Dir: another partition, so
	// that a sync does not also write what other files changed there.
	WALDir string
	// WALFailoverDir, on another disk, takes the entries while the first one
	// stalls for longer than walFailoverAfter.
	WALFailoverDir string
	// Shared are caches shared with the state's database; nil for its own.
	Shared *disk.Shared
	Log    *slog.Logger
	// OnFatal is called when the database can no longer store. Writes then
	// hang for ever; the node must stop.
	OnFatal func(error)
	// Committed, if set, tells an index that is known to be committed. It is
	// stored with each batch of entries, for CommitIndex after a restart.
	Committed func() uint64
}

// Open opens or creates the log in cfg.Dir.
func Open(cfg Config) (*Store, error) {
	if cfg.FS == nil {
		cfg.FS = vfs.Default
	}
	l := disk.NewLogger(cfg.Log, cfg.OnFatal)
	o, err := cfg.options(l)
	if err != nil {
		return nil, fmt.Errorf("open the raft log: %w", err)
	}
	db, err := disk.Open(cfg.Dir, o, l)
	if err != nil {
		return nil, fmt.Errorf("open the raft log: %w", err)
	}
	s := &Store{db: db, logger: l, committed: cfg.Committed, writing: make(chan struct{}, 1)}
	if err := s.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("read the raft log: %w", err), l.Await(db.Close))
	}
	return s, nil
}

func (cfg *Config) options(l *disk.Logger) (*pebble.Options, error) {
	o := disk.Options(cfg.FS, l, memTableSize, cfg.Shared)
	o.ApplyCompressionSettings(func() pebble.DBCompressionSettings { return pebble.DBCompressionNone })
	dir := cfg.Dir
	if cfg.WALDir != "" {
		dir = cfg.WALDir
		o.WALDir = dir
		// Entries from before it was set.
		o.WALRecoveryDirs = []wal.Dir{{FS: o.FS, Dirname: cfg.Dir}}
	}
	if cfg.WALFailoverDir != "" {
		l.SecondWAL = true
		o.WALFailover = &pebble.WALFailoverOptions{Secondary: wal.Dir{FS: o.FS, Dirname: cfg.WALFailoverDir}}
		o.WALFailover.UnhealthyOperationLatencyThreshold = func() (time.Duration, bool) { return walFailoverAfter, true }
		return o, cfg.FS.MkdirAll(cfg.WALFailoverDir, 0o700)
	}
	// Under the guard: zeros that find no room are not a write that failed, and a
	// WAL that cannot be made of a spare one is.
	spares, err := newSpareFS(cfg.FS, dir)
	if err != nil {
		return nil, err
	}
	o.FS = disk.Guard(spares, l)
	return o, nil
}

func (s *Store) load() error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{prefixLog}, UpperBound: []byte{prefixLog + 1}})
	if err != nil {
		return err
	}
	defer it.Close()
	for _, end := range []struct {
		move func() bool
		to   *atomic.Uint64
	}{{it.First, &s.first}, {it.Last, &s.last}} {
		if end.move() {
			if len(it.Key()) != 9 {
				return fmt.Errorf("log key of %d bytes", len(it.Key()))
			}
			end.to.Store(binary.BigEndian.Uint64(it.Key()[1:]))
		}
	}
	if err := it.Error(); err != nil {
		return err
	}
	v, err := s.get(commitKey)
	if err == nil && len(v) == 8 {
		s.stored.Store(binary.BigEndian.Uint64(v))
	} else if err != nil && !errors.Is(err, errNotFound) {
		return err
	}
	return nil
}

// Close closes the database. After a failure it leaves it as it is.
func (s *Store) Close() error {
	if err := s.logger.Await(s.db.Close); err != nil {
		return fmt.Errorf("close the raft log: %w", err)
	}
	return nil
}

// Metrics is Pebble's account of itself, for benchmarks and tests.
func (s *Store) Metrics() *pebble.Metrics { return s.db.Metrics() }

// Busy is for how long the StoreLogs that runs now has been running, 0 when
// none is.
func (s *Store) Busy() time.Duration {
	since := s.busySince.Load()
	if since == 0 {
		return 0
	}
	return monotonic() - time.Duration(since-1)
}

var epoch = time.Now()

// monotonic is the time since the process began, on the monotonic clock.
func monotonic() time.Duration { return time.Since(epoch) }

// IsMonotonic is false: raft then leaves a gap in the log after a snapshot was
// installed instead of deleting all of it, which panics a follower whose log
// ran ahead of the snapshot (hashicorp/raft #697).
func (s *Store) IsMonotonic() bool { return false }

// FirstIndex is the oldest entry's, 0 when there is none.
func (s *Store) FirstIndex() (uint64, error) { return s.first.Load(), nil }

// LastIndex is the newest entry's, 0 when there is none.
func (s *Store) LastIndex() (uint64, error) { return s.last.Load(), nil }

// GetLog reads an entry, or returns raft.ErrLogNotFound.
func (s *Store) GetLog(index uint64, l *raft.Log) error {
	if index == 0 || index < s.first.Load() || index > s.last.Load() {
		return raft.ErrLogNotFound
	}
	v, c, err := s.db.Get(logKey(index))
	if errors.Is(err, pebble.ErrNotFound) {
		return raft.ErrLogNotFound
	}
	if err != nil {
		return fmt.Errorf("read log entry %d: %w", index, err)
	}
	defer c.Close()
	return decode(v, index, l)
}

func decode(v []byte, index uint64, l *raft.Log) error {
	if len(v) < headerSize {
		return fmt.Errorf("log entry %d has %d bytes", index, len(v))
	}
	n := binary.LittleEndian.Uint32(v[17:])
	if uint64(n) > uint64(len(v)-headerSize) {
		return fmt.Errorf("log entry %d has extensions of %d bytes in %d", index, n, len(v))
	}
	*l = raft.Log{Index: index, Type: raft.LogType(v[0]), Term: binary.LittleEndian.Uint64(v[1:])}
	if at := int64(binary.LittleEndian.Uint64(v[9:])); at != 0 {
		l.AppendedAt = time.Unix(0, at)
	}
	b := append([]byte(nil), v[headerSize:]...) // one allocation for both
	if n > 0 {
		l.Extensions = b[:n:n]
	}
	if uint32(len(b)) > n {
		l.Data = b[n:]
	}
	return nil
}

// StoreLog stores one entry, durably.
func (s *Store) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs stores entries in one synced batch.
func (s *Store) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	s.writing <- struct{}{}
	defer func() { <-s.writing }()
	s.busySince.Store(int64(monotonic()) + 1)
	defer s.busySince.Store(0)

	size := 64
	for _, l := range logs {
		size += headerSize + len(l.Data) + len(l.Extensions) + 32
	}
	b := s.db.NewBatchWithSize(size)
	defer b.Close()
	first, last := s.first.Load(), s.last.Load()
	for _, l := range logs {
		d := b.SetDeferred(9, headerSize+len(l.Extensions)+len(l.Data))
		d.Key[0] = prefixLog
		binary.BigEndian.PutUint64(d.Key[1:], l.Index)
		d.Value[0] = byte(l.Type)
		binary.LittleEndian.PutUint64(d.Value[1:], l.Term)
		var at int64
		if !l.AppendedAt.IsZero() {
			at = l.AppendedAt.UnixNano()
		}
		binary.LittleEndian.PutUint64(d.Value[9:], uint64(at))
		binary.LittleEndian.PutUint32(d.Value[17:], uint32(len(l.Extensions)))
		copy(d.Value[headerSize:], l.Extensions)
		copy(d.Value[headerSize+len(l.Extensions):], l.Data)
		if err := d.Finish(); err != nil {
			return fmt.Errorf("store log entry %d: %w", l.Index, err)
		}
		// An entry may also replace one inside the log: see ../snapshots.go.
		if first == 0 || l.Index < first {
			first = l.Index
		}
		last = max(last, l.Index)
	}
	commit := s.staged.Load()
	if s.committed != nil {
		commit = max(commit, s.committed())
	}
	if commit > s.stored.Load() {
		if err := b.Set(commitKey, binary.BigEndian.AppendUint64(nil, commit), nil); err != nil {
			return fmt.Errorf("store the commit index: %w", err)
		}
	}
	if err := b.Commit(pebble.Sync); err != nil {
		return fmt.Errorf("store log entries %d to %d: %w", logs[0].Index, logs[len(logs)-1].Index, err)
	}
	if commit > s.stored.Load() {
		s.stored.Store(commit)
	}
	s.first.Store(first)
	s.last.Store(last)
	return nil
}

// DeleteRange deletes the entries lo to hi, both included: the oldest ones
// after a snapshot, or the newest ones that a new leader does not have.
//
// It does not sync. A lost deletion at the front comes back and is repeated. A
// deletion at the end stands in the same WAL before the StoreLogs that raft
// calls next, and until then this node has acknowledged nothing in its place.
func (s *Store) DeleteRange(lo, hi uint64) error {
	if lo > hi {
		return nil
	}
	s.writing <- struct{}{}
	defer func() { <-s.writing }()
	end := []byte{prefixLog + 1}
	if hi != ^uint64(0) {
		end = logKey(hi + 1)
	}
	if err := s.db.DeleteRange(logKey(lo), end, pebble.NoSync); err != nil {
		return fmt.Errorf("delete log entries %d to %d: %w", lo, hi, err)
	}
	first, last := s.first.Load(), s.last.Load()
	switch {
	case lo <= first && hi >= last:
		s.first.Store(0)
		s.last.Store(0)
	case lo <= first:
		return s.findFirst(hi + 1)
	case lo <= last && hi >= last:
		return s.findLast(lo)
	}
	return nil
}

// findLast looks for the newest entry before index: there may be a gap in front
// of it.
func (s *Store) findLast(index uint64) error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{prefixLog}, UpperBound: logKey(index)})
	if err != nil {
		return fmt.Errorf("find the newest log entry: %w", err)
	}
	defer it.Close()
	if it.Last() {
		s.last.Store(binary.BigEndian.Uint64(it.Key()[1:]))
	}
	return it.Error()
}

// findFirst looks for the oldest entry from index on: after an installed
// snapshot there may be a gap.
func (s *Store) findFirst(index uint64) error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: logKey(index), UpperBound: []byte{prefixLog + 1}})
	if err != nil {
		return fmt.Errorf("find the oldest log entry: %w", err)
	}
	defer it.Close()
	if it.First() {
		s.first.Store(binary.BigEndian.Uint64(it.Key()[1:]))
	}
	return it.Error()
}

// InRaft says whether this node has a part in Raft: what BeginRaft or Wipe last
// said. known is false when neither was ever called.
func (s *Store) InRaft() (in, known bool, err error) {
	v, err := s.get(raftKey)
	if errors.Is(err, errNotFound) {
		return false, false, nil
	}
	return len(v) == 1 && v[0] == 1, err == nil, err
}

// BeginRaft notes, durably, that this node has a part in Raft from now on. Its
// term becomes at least term; in a term it was not in, it has cast no vote.
func (s *Store) BeginRaft(term uint64) error {
	now, err := s.GetUint64([]byte(keyCurrentTerm))
	if err != nil && !errors.Is(err, errNotFound) {
		return err
	}
	s.writing <- struct{}{}
	defer func() { <-s.writing }()
	b := s.db.NewBatch()
	defer b.Close()
	err = b.Set(raftKey, []byte{1}, nil)
	if term > now {
		err = errors.Join(err, b.Set(stableKey([]byte(keyCurrentTerm)), binary.BigEndian.AppendUint64(nil, term), nil))
	}
	if err = errors.Join(err, b.Commit(pebble.Sync)); err != nil {
		return fmt.Errorf("begin a part in raft: %w", err)
	}
	return nil
}

// Wipe deletes all entries and notes, in the same durable step, that this node
// has no part in Raft. Term and vote stay: they are promises to others. Nobody
// may use the log meanwhile.
func (s *Store) Wipe() error {
	s.writing <- struct{}{}
	defer func() { <-s.writing }()
	b := s.db.NewBatch()
	defer b.Close()
	err := errors.Join(
		b.DeleteRange([]byte{prefixLog}, []byte{prefixLog + 1}, nil),
		b.Delete(commitKey, nil),
		b.Set(raftKey, []byte{0}, nil),
		b.Commit(pebble.Sync),
	)
	if err != nil {
		return fmt.Errorf("wipe the raft log: %w", err)
	}
	s.first.Store(0)
	s.last.Store(0)
	s.staged.Store(0)
	s.stored.Store(0)
	return nil
}

// StageCommitIndex takes an index that is committed; the next StoreLogs stores
// it with its entries.
func (s *Store) StageCommitIndex(index uint64) error {
	s.staged.Store(index)
	return nil
}

// GetCommitIndex is the newest stored commit index, at most LastIndex.
func (s *Store) GetCommitIndex() (uint64, error) {
	return min(s.stored.Load(), s.last.Load()), nil
}

// Set stores a value durably. LastVoteTerm waits for LastVoteCand.
func (s *Store) Set(key, value []byte) error {
	s.writing <- struct{}{}
	defer func() { <-s.writing }()
	if string(key) == keyLastVoteTerm {
		s.voteTerm = append([]byte(nil), value...)
		return nil
	}
	b := s.db.NewBatch()
	defer b.Close()
	if string(key) == keyLastVoteCand && s.voteTerm != nil {
		if err := b.Set(stableKey([]byte(keyLastVoteTerm)), s.voteTerm, nil); err != nil {
			return fmt.Errorf("store %s: %w", key, err)
		}
	}
	if err := b.Set(stableKey(key), value, nil); err != nil {
		return fmt.Errorf("store %s: %w", key, err)
	}
	if err := b.Commit(pebble.Sync); err != nil {
		return fmt.Errorf("store %s: %w", key, err)
	}
	if string(key) == keyLastVoteCand {
		s.voteTerm = nil
	}
	return nil
}

// Get reads a value; its error for a key never set has the text "not found",
// as raft demands. It does not show a LastVoteTerm that waits for its vote.
func (s *Store) Get(key []byte) ([]byte, error) { return s.get(stableKey(key)) }

// SetUint64 is Set of a number.
func (s *Store) SetUint64(key []byte, v uint64) error {
	return s.Set(key, binary.BigEndian.AppendUint64(nil, v))
}

// GetUint64 is Get of a number.
func (s *Store) GetUint64(key []byte) (uint64, error) {
	v, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(v) != 8 {
		return 0, fmt.Errorf("%s has %d bytes, want 8", key, len(v))
	}
	return binary.BigEndian.Uint64(v), nil
}

func (s *Store) get(key []byte) ([]byte, error) {
	v, c, err := s.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, errNotFound
	}
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return append([]byte{}, v...), nil
}

func logKey(index uint64) []byte {
	return binary.BigEndian.AppendUint64(append(make([]byte, 0, 9), prefixLog), index)
}

func stableKey(k []byte) []byte { return append([]byte{prefixStable}, k...) }

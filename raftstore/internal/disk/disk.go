// Package disk holds what our two Pebble instances, the Raft log and the
// state, have in common.
package disk

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// Logger is Pebble's logger. Pebble calls Fatalf when it can no longer keep
// its promises (a failed WAL write, a corrupt table) and relies on it not to
// come back: db.go would go on and report the failed commit as done. The
// library's own ends the process; ours tells the owner, who can let sessions
// end first, and then never returns to the caller. Whatever waits for that
// write waits for ever, so nothing is acknowledged that is not stored. Most
// failures do not come so far: see guard.
type Logger struct {
	Log     *slog.Logger
	onFatal func(error)

	// SecondWAL says that the WAL may go to a second directory. Set before the
	// database is opened.
	SecondWAL bool

	broken   chan struct{} // closed when a write has failed for good
	reported atomic.Bool
	mu       struct {
		sync.Mutex
		err     error           // why broken is closed
		lostWAL map[string]bool // directories that take no WAL at present
	}
}

// NewLogger makes the logger of one database. onFatal, if not nil, is called
// once, from Pebble's goroutine, and must not block.
func NewLogger(log *slog.Logger, onFatal func(error)) *Logger {
	return &Logger{Log: log, onFatal: onFatal, broken: make(chan struct{})}
}

// Infof drops what Pebble tells of its everyday work: flushes, compactions.
func (l *Logger) Infof(format string, args ...any) {}

// Errorf logs.
func (l *Logger) Errorf(format string, args ...any) {
	l.Log.Error("pebble: " + fmt.Sprintf(format, args...))
}

// Fatalf reports and parks the calling goroutine for ever.
func (l *Logger) Fatalf(format string, args ...any) {
	l.fail(fmt.Errorf("pebble: "+format, args...))
}

// fail reports that a write failed, and does not return.
func (l *Logger) fail(err error) {
	l.mu.Lock()
	if l.mu.err == nil {
		l.mu.err = err
		close(l.broken)
	}
	l.mu.Unlock()
	l.report(err)
	select {}
}

// lostWAL notes that a directory takes no WAL, and reports whether both do not.
func (l *Logger) lostWAL(dir string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.lostWAL == nil {
		l.mu.lostWAL = map[string]bool{}
	}
	if !l.mu.lostWAL[dir] {
		l.Log.Error("a directory takes no log of the database", "dir", dir)
	}
	l.mu.lostWAL[dir] = true
	return len(l.mu.lostWAL) > 1
}

// foundWAL notes that a directory takes a WAL.
func (l *Logger) foundWAL(dir string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.mu.lostWAL, dir)
}

// report tells the owner, once, that the node must stop.
func (l *Logger) report(err error) {
	if l.reported.CompareAndSwap(false, true) {
		l.Log.Error("the database cannot go on; this node must stop", "error", err)
		if l.onFatal != nil {
			l.onFatal(err)
		}
	}
}

// corrupt hears that a block or a table is not what was written. The owner
// must stop the node, but whoever reads gets an error and does not hang: the
// library's own answer would be Fatalf, also while the database is opened.
func (l *Logger) corrupt(i pebble.DataCorruptionInfo) {
	l.report(fmt.Errorf("pebble: %s is damaged: %w", i.Path, i.Details))
}

// Err is the write that failed, or nil. After a failure the database is left
// as a crash would leave it: whoever writes, or closes it, waits for the
// parked goroutine, but by Await.
func (l *Logger) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.err
}

// Shared is what both instances share: a cache of blocks, so that neither
// keeps memory the other could use, and one of open files.
type Shared struct {
	cache *pebble.Cache
	files *pebble.FileCache
}

// NewShared makes caches for cacheBytes of blocks and for maxFiles open tables.
func NewShared(cacheBytes int64, maxFiles int) *Shared {
	return &Shared{cache: pebble.NewCache(cacheBytes), files: pebble.NewFileCache(4, maxFiles)}
}

// Release lets go of the caches; databases opened with them keep them until
// they are closed.
func (s *Shared) Release() {
	s.files.Unref()
	s.cache.Unref()
}

// Options are Pebble's, as both instances use them, for Open. memTableSize is in bytes.
// With shared nil the instance has small caches of its own.
func Options(fs vfs.FS, l *Logger, memTableSize uint64, shared *Shared) *pebble.Options {
	o := &pebble.Options{
		FS:     Guard(fs, l),
		Logger: l,
		// The default for a new database is the oldest supported version.
		FormatMajorVersion: pebble.FormatNewest,
		CacheSize:          8 << 20,
		MemTableSize:       memTableSize,
		// A write stop stalls Raft, and a stalled Raft is an election: leave
		// room for four memtables and never stop for L0 files.
		MemTableStopWritesThreshold: 4,
		L0CompactionThreshold:       4,
		L0StopWritesThreshold:       1000,
		MaxOpenFiles:                256,
		// raft gathers entries already, so a sync never waits for more of them,
		// and a WAL is synced whole: see pebble.Options.
		WALMinSyncInterval: nil,
		WALBytesPerSync:    0,
	}
	o.EventListener = &pebble.EventListener{DataCorruption: l.corrupt}
	if shared != nil {
		o.Cache, o.FileCache = shared.cache, shared.files
	}
	return o
}

package disk

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// guard is a file system whose failed writes do not return. Pebble answers a
// failed write in three ways: by Fatalf where it expects one, by a panic where
// it does not (the commit after one that failed, a WAL that cannot be closed
// or made), and for a flush by trying again at once, for ever. Here the first
// failure is told to the owner and its goroutine stands still, as in Fatalf, so
// that none of the three is reached.
//
// Links, renames and removals return their errors: Pebble has another way
// then, or only keeps a file too many.
type guard struct {
	vfs.FS
	l *Logger
}

// Guard wraps the file system of a database. Options does it for the
// database's own; a second directory for its WAL needs it too.
func Guard(fs vfs.FS, l *Logger) vfs.FS { return &guard{fs, l} }

// Open opens a database with Options. When a write fails meanwhile, it returns
// what failed.
func Open(dir string, o *pebble.Options, l *Logger) (db *pebble.DB, err error) {
	opened := make(chan *pebble.DB, 1)
	if err := l.Await(func() error {
		db, err := pebble.Open(dir, o)
		opened <- db
		return err
	}); err != nil {
		return nil, err
	}
	return <-opened, nil
}

// Await calls f, which uses the database, and returns when f has, or when a
// write has failed, now or before: f might wait for that for ever.
func (l *Logger) Await(f func() error) error {
	if err := l.Err(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-l.broken:
		return l.Err()
	}
}

// broke reports a failed write and does not return. But of a WAL with a second
// directory Pebble wants to hear the error: it goes on in the other one. Only
// when neither takes it is that the end.
func (g *guard) broke(op, dir, path string, err error) error {
	// path == dir is the sync of a directory: a new WAL's, perhaps.
	if g.l.SecondWAL && (strings.HasSuffix(path, walSuffix) || g.PathBase(path) == probeFile || path == dir) {
		if !g.l.lostWAL(dir) {
			return err
		}
	}
	g.l.fail(g.describe(op, dir, path, err))
	panic("fail does not return")
}

const (
	walSuffix = ".log"
	// probeFile is what Pebble writes to see whether the first directory is well
	// again.
	probeFile = "probe-file"
)

// headroom is what both databases may write before a compaction gives room
// back: four memtables of 64 MiB and four of 32, as WAL and as tables, and the
// WALs that are kept to be written again, some 450 MiB.
const headroom = 1536 << 20

// describe says what failed and, when the disk is full, what to do.
func (g *guard) describe(op, dir, path string, err error) error {
	var pe *os.PathError
	if !errors.As(err, &pe) {
		err = fmt.Errorf("%s %s: %w", op, path, err)
	}
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("pebble: %w", err)
	}
	free := ""
	if u, uerr := g.GetDiskUsage(dir); uerr == nil {
		free = fmt.Sprintf("%d MiB are free, ", u.AvailBytes>>20)
	}
	return fmt.Errorf("the disk under %s is full: %w; %sat least %d MiB are needed: make room, or move the directory to a larger disk, and start this node again; nothing that was acknowledged is lost",
		dir, err, free, headroom>>20)
}

func (g *guard) file(op, name string, f vfs.File, err error) (vfs.File, error) {
	dir := g.PathDir(name)
	if err != nil {
		return nil, g.broke(op, dir, name, err)
	}
	return &guardedFile{f, g, dir, name}, nil
}

func (g *guard) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := g.FS.Create(name, c)
	return g.file("create", name, f, err)
}

func (g *guard) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := g.FS.ReuseForWrite(oldname, newname, c)
	return g.file("reuse", newname, f, err)
}

// OpenReadWrite returns its error: what was not there has nothing lost.
func (g *guard) OpenReadWrite(name string, c vfs.DiskWriteCategory, o ...vfs.OpenOption) (vfs.File, error) {
	f, err := g.FS.OpenReadWrite(name, c, o...)
	if err != nil {
		return nil, err
	}
	return &guardedFile{f, g, g.PathDir(name), name}, nil
}

// OpenDir returns its error: the directory may not be there yet.
func (g *guard) OpenDir(name string) (vfs.File, error) {
	f, err := g.FS.OpenDir(name)
	if err != nil {
		return nil, err
	}
	return &guardedFile{f, g, name, name}, nil
}

// Unwrap is for vfs.Root.
func (g *guard) Unwrap() vfs.FS { return g.FS }

type guardedFile struct {
	vfs.File
	g         *guard
	dir, name string
}

// met passes on how an operation went, when it went well.
func (f *guardedFile) met(op string, err error) error {
	if err != nil {
		return f.g.broke(op, f.dir, f.name, err)
	}
	return nil
}

func (f *guardedFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	return n, f.met("write", err)
}

func (f *guardedFile) WriteAt(p []byte, at int64) (int, error) {
	n, err := f.File.WriteAt(p, at)
	return n, f.met("write", err)
}

func (f *guardedFile) Sync() error { return f.synced(f.met("sync", f.File.Sync())) }

func (f *guardedFile) SyncData() error { return f.synced(f.met("sync", f.File.SyncData())) }

// synced notes that a directory takes a WAL again.
func (f *guardedFile) synced(err error) error {
	if err == nil && f.g.l.SecondWAL && strings.HasSuffix(f.name, walSuffix) {
		f.g.l.foundWAL(f.dir)
	}
	return err
}

func (f *guardedFile) SyncTo(length int64) (bool, error) {
	full, err := f.File.SyncTo(length)
	return full, f.met("sync", err)
}

// Close may be where a file system says that an earlier write failed.
func (f *guardedFile) Close() error {
	err := f.File.Close()
	if errors.Is(err, os.ErrClosed) {
		return err
	}
	return f.met("close", err)
}

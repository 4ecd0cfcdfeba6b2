package logstore

import (
	"log/slog"
	"strings"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// walSizes is the size of all WALs; an old one may still be there.
func walSizes(t *testing.T, fs vfs.FS, dir string) (size int64) {
	t.Helper()
	names, err := fs.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if !strings.HasSuffix(name, walSuffix) {
			continue
		}
		info, err := fs.Stat(fs.PathJoin(dir, name))
		if err == nil {
			size += info.Size()
		} // else it was removed meanwhile
	}
	return size
}

// A file that grows makes each sync half as slow again: entries go where there
// are bytes already, in a new log too.
func TestWALsAreOverwritten(t *testing.T) {
	fs := vfs.NewMem()
	s, err := Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	grown, size := 0, walSizes(t, fs, "log")
	for i := uint64(1); i <= 1000; i++ {
		if err := s.StoreLogs(made(i, i, 1)); err != nil {
			t.Fatal(err)
		}
		now := walSizes(t, fs, "log")
		if now > size {
			grown++
		}
		size = now
	}
	if grown == 0 || grown > 2 {
		t.Errorf("WALs grew %d times in 1000 entries, to %d bytes", grown, size)
	}
}

// What could not be written ahead is no reason to refuse an entry that fits.
func TestNoRoomAhead(t *testing.T) {
	fs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind == errorfs.OpFileWriteAt {
			return syscall.ENOSPC
		}
		return nil
	}))
	s, err := Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler), OnFatal: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.StoreLogs(made(1, 50, 1)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if last, _ := s.LastIndex(); last != 50 {
		t.Errorf("the log ends at %d", last)
	}
}

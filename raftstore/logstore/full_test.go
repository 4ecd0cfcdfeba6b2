package logstore

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/hashicorp/raft"
)

// fills is a disk under dir that is full from its n-th write on.
type fills struct {
	dir    string
	n      int64
	writes atomic.Int64
}

func (f *fills) MaybeError(op errorfs.Op) error {
	switch op.Kind {
	case errorfs.OpCreate, errorfs.OpReuseForWrite, errorfs.OpRename, errorfs.OpLink, errorfs.OpFileWrite, errorfs.OpFileWriteAt,
		errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo, errorfs.OpFileClose, errorfs.OpFilePreallocate:
		if strings.HasPrefix(op.Path, f.dir) && f.writes.Add(1) >= f.n {
			return syscall.ENOSPC
		}
	}
	return nil
}

func (f *fills) String() string { return fmt.Sprintf("full from write %d on", f.n) }

// large is what one entry has here: a few of them fill a memtable, which
// begins small, and so have the WAL replaced and tables written.
var large = bytes.Repeat([]byte("entry 40 bytes long, not to be compressed"), 1000)

// The disk is full from one write on, which is each in turn: the owner hears
// it once, with the directory and what to do, nothing panics, nothing that was
// acknowledged is lost, and with room again the log goes on.
func TestFullDiskAtEveryWrite(t *testing.T) {
	const last = 24
	rng := seeded(t)
	for n := int64(1); ; n++ {
		mem := vfs.NewCrashableMem()
		full := &fills{dir: "log", n: n}
		acked, err := untilFull(errorfs.Wrap(mem, full), Config{}, last)
		if err == nil && full.writes.Load() < n {
			if n < 100 {
				t.Fatalf("only %d writes: no WAL was replaced, no table written", n)
			}
			break
		}
		if err == nil {
			continue // only what may fail failed
		}
		if s := err.Error(); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(s, "the disk under log is full") || !strings.Contains(s, "make room") {
			t.Fatalf("full from write %d on: %v", n, err)
		}
		// What was not synced is lost in every second one.
		if err := goesOn(mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: int(n%2) * 100, RNG: rng}), acked); err != nil {
			t.Fatalf("full from write %d on: %v", n, err)
		}
	}
}

// breaks is a disk on which one kind of operation fails for WALs, kept ones
// included, once it is armed.
type breaks struct {
	kind  errorfs.OpKind
	armed atomic.Bool
	met   atomic.Int64
}

func (b *breaks) MaybeError(op errorfs.Op) error {
	if b.armed.Load() && op.Kind == b.kind && (strings.HasSuffix(op.Path, walSuffix) || strings.Contains(op.Path, sparePrefix)) {
		b.met.Add(1)
		return syscall.EIO
	}
	return nil
}

func (b *breaks) String() string { return fmt.Sprint("breaks at ", b.kind) }

// A WAL that cannot be made of a kept one, or opened, is a failed write, too:
// the owner hears it, and Pebble, which would panic in the middle of a commit,
// does not.
func TestWALThatCannotBeMade(t *testing.T) {
	for name, kind := range map[string]errorfs.OpKind{"rename": errorfs.OpRename, "open": errorfs.OpOpen} {
		t.Run(name, func(t *testing.T) {
			broken := &breaks{kind: kind}
			fs := errorfs.Wrap(vfs.NewMem(), broken)
			// The first opening leaves WALs to be kept.
			for range 3 {
				if _, err := untilFull(fs, Config{}, 24); err != nil {
					t.Fatal(err)
				}
			}
			fatal := make(chan error, 1)
			s, err := Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler), OnFatal: func(err error) { fatal <- err }})
			if err != nil {
				t.Fatal(err)
			}
			broken.armed.Store(true)
			go func() { // parked for ever
				for i := uint64(1); i <= 4096; i++ {
					if s.StoreLog(&raft.Log{Index: i, Term: 1, Data: large}) != nil {
						return
					}
				}
			}()
			select {
			case err := <-fatal:
				if !errors.Is(err, syscall.EIO) {
					t.Fatal(err)
				}
			case <-time.After(20 * time.Second):
				t.Fatalf("nobody was told; it was met %d times", broken.met.Load())
			}
			_ = s.Close()
		})
	}
}

// untilFull stores entries until one is not stored, and returns the last that
// was, with what the owner heard, or Open said.
func untilFull(fs vfs.FS, cfg Config, last uint64) (acked uint64, err error) {
	fatal := make(chan error, 2)
	cfg.Dir, cfg.FS, cfg.Log, cfg.OnFatal = "log", fs, slog.New(slog.DiscardHandler), func(err error) { fatal <- err }
	s, err := Open(cfg)
	if err != nil {
		return 0, err
	}
	stored, ended := make(chan uint64, last), make(chan error, 1)
	go func() { // parked for ever when the disk is full
		for i := uint64(1); i <= last; i++ {
			if err := s.StoreLog(&raft.Log{Index: i, Term: 1, Data: large}); err != nil {
				ended <- fmt.Errorf("an error came back from a disk that failed: %w", err)
				return
			}
			stored <- i
		}
		ended <- nil
	}()
	select {
	case err = <-fatal:
	case err = <-ended:
	case <-time.After(20 * time.Second):
		return acked, errors.New("hangs, and nobody was told")
	}
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	select {
	case cerr := <-closed: // which writes, too
		if err == nil {
			err = cerr
		} else if cerr == nil {
			err = errors.New("closed as if all were well")
		}
	case <-time.After(20 * time.Second):
		return acked, fmt.Errorf("Close hangs; before that: %v", err)
	}
	if len(fatal) > 1 {
		return acked, errors.New("the owner was told twice")
	}
	for len(stored) > 0 {
		acked = <-stored
	}
	return acked, err
}

// goesOn opens what is left, looks for the entries that were acknowledged and
// stores another.
func goesOn(fs vfs.FS, acked uint64) error {
	if _, err := fs.Stat("log"); err != nil && acked == 0 {
		return nil
	}
	s, err := Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	for i := uint64(1); i <= acked; i++ {
		var l raft.Log
		if err := s.GetLog(i, &l); err != nil || !bytes.Equal(l.Data, large) {
			return fmt.Errorf("entry %d of %d: %v", i, acked, err)
		}
	}
	return errors.Join(s.StoreLog(&raft.Log{Index: acked + 1, Term: 2, Data: large}), s.Close())
}

// With a second directory for the WAL a full first one is not the end, and two
// full ones are.
func TestFullDiskOfTheFirstWAL(t *testing.T) {
	const last = 40
	wals := Config{WALDir: "first", WALFailoverDir: "second"}
	first := &fills{dir: "first", n: 12}
	fs := errorfs.Wrap(vfs.NewMem(), first)
	if acked, err := untilFull(fs, wals, last); err != nil || acked != last {
		t.Fatalf("%d of %d stored: %v", acked, last, err)
	}
	if first.writes.Load() < first.n {
		t.Fatal("the first directory was never full")
	}
	fs = errorfs.Wrap(errorfs.Wrap(vfs.NewMem(), &fills{dir: "first", n: 12}), &fills{dir: "second", n: 12})
	if acked, err := untilFull(fs, wals, last); !errors.Is(err, syscall.ENOSPC) || acked == last {
		t.Fatalf("both full, %d stored: %v", acked, err)
	}
}

package fsm

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/hashicorp/raft"
)

// fills is a disk that is full from its n-th write on.
type fills struct {
	n      int64
	writes atomic.Int64
}

func (f *fills) MaybeError(op errorfs.Op) error {
	switch op.Kind {
	case errorfs.OpCreate, errorfs.OpReuseForWrite, errorfs.OpRename, errorfs.OpLink, errorfs.OpFileWrite, errorfs.OpFileWriteAt,
		errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo, errorfs.OpFileClose, errorfs.OpFilePreallocate:
		if f.writes.Add(1) >= f.n {
			return syscall.ENOSPC
		}
	}
	return nil
}

func (f *fills) String() string { return fmt.Sprintf("full from write %d on", f.n) }

// The disk is full from one write on, which is each in turn: the owner hears
// it once, nothing panics, and with room again the same entries lead to the
// same state.
func TestFullDiskAtEveryWrite(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	logs := randomLogs(t, rng, 60)
	sound := fresh(t)
	sound.ApplyBatch(logs)
	want := dump(t, sound)
	for n := int64(1); ; n++ {
		mem := vfs.NewCrashableMem()
		full := &fills{n: n}
		err := applyUntilFull(errorfs.Wrap(mem, full), logs)
		if err == nil && full.writes.Load() < n {
			if n < 100 {
				t.Fatalf("only %d writes: no table was written", n)
			}
			break
		}
		if err == nil {
			continue // only what may fail failed
		}
		// Of data/state, or above it while that is made.
		if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "the disk under ") {
			t.Fatalf("full from write %d on: %v", n, err)
		}
		// What was not synced is lost in every second one.
		left := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: int(n%2) * 100, RNG: rng})
		f, err := Open(Config{Dir: "data/state", FS: left, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatalf("full from write %d on, then room: %v", n, err)
		}
		f.ApplyBatch(logs) // those that are there are skipped
		if got := dump(t, &node{FSM: f}); !bytes.Equal(got, want) {
			t.Fatalf("full from write %d on: another state afterwards", n)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// applyUntilFull applies entries, a few at a time, with flushes between, until
// the owner hears that this cannot go on, or all are applied.
func applyUntilFull(fs vfs.FS, logs []*raft.Log) (err error) {
	fatal := make(chan error, 2)
	f, err := Open(Config{Dir: "data/state", FS: fs, Log: slog.New(slog.DiscardHandler), OnFatal: func(err error) { fatal <- err }})
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { // parked for ever when the disk is full
		for i := 0; i < len(logs); i += 5 {
			f.ApplyBatch(logs[i:min(len(logs), i+5)])
			if err := errors.Join(f.Sync(), f.db.Flush()); err != nil {
				ended <- fmt.Errorf("an error came back from a disk that failed: %w", err)
				return
			}
		}
		ended <- nil
	}()
	select {
	case err = <-fatal:
	case err = <-ended:
	case <-time.After(20 * time.Second):
		return errors.New("hangs, and nobody was told")
	}
	closed := make(chan error, 1)
	go func() { closed <- f.Close() }()
	select {
	case cerr := <-closed: // which writes, too
		if err == nil {
			err = cerr
		} else if cerr == nil {
			err = errors.New("closed as if all were well")
		}
	case <-time.After(20 * time.Second):
		return errors.New("Close hangs")
	}
	if len(fatal) > 1 {
		return errors.New("the owner was told twice")
	}
	return err
}

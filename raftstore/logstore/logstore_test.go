package logstore

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/hashicorp/raft"
)

func mustOpen(t *testing.T, fs vfs.FS) *Store {
	t.Helper()
	s, err := Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func entry(index, term uint64, data string) *raft.Log {
	return &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: []byte(data)}
}

func entries(from, to, term uint64) []*raft.Log {
	var ls []*raft.Log
	for i := from; i <= to; i++ {
		ls = append(ls, entry(i, term, fmt.Sprint(i)))
	}
	return ls
}

func wantRange(t *testing.T, s *Store, first, last uint64) {
	t.Helper()
	f, _ := s.FirstIndex()
	l, _ := s.LastIndex()
	if f != first || l != last {
		t.Fatalf("log is %d to %d, want %d to %d", f, l, first, last)
	}
}

func TestLog(t *testing.T) {
	fs := vfs.NewMem()
	s := mustOpen(t, fs)
	wantRange(t, s, 0, 0)
	var l raft.Log
	if err := s.GetLog(0, &l); !errors.Is(err, raft.ErrLogNotFound) {
		t.Fatalf("entry 0: %v", err)
	}
	full := &raft.Log{Index: 5, Term: 3, Type: raft.LogConfiguration, Data: []byte("data"), Extensions: []byte("ext"), AppendedAt: time.Unix(1, 2)}
	for _, want := range []*raft.Log{full, {Index: 6, Term: 3}, {Index: 7, Extensions: []byte("e")}} {
		if err := s.StoreLog(want); err != nil {
			t.Fatal(err)
		}
		l = raft.Log{Data: []byte("left from before"), AppendedAt: time.Now()}
		if err := s.GetLog(want.Index, &l); err != nil || !reflect.DeepEqual(&l, want) {
			t.Fatalf("got %+v, %v; want %+v", l, err, want)
		}
	}
	if err := s.StoreLogs(nil); err != nil {
		t.Fatal(err)
	}
	wantRange(t, s, 5, 7)
	if err := s.StoreLogs(entries(8, 20, 3)); err != nil {
		t.Fatal(err)
	}
	steps := []struct{ lo, hi, first, last uint64 }{
		{19, 20, 5, 18}, // a suffix
		{1, 7, 8, 18},   // a prefix and more
		{18, 99, 8, 17}, // a suffix and more
	}
	for _, c := range steps {
		if err := s.DeleteRange(c.lo, c.hi); err != nil {
			t.Fatal(err)
		}
		wantRange(t, s, c.first, c.last)
		if err := s.GetLog(c.lo, &l); !errors.Is(err, raft.ErrLogNotFound) {
			t.Fatalf("entry %d: %v", c.lo, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, fs)
	wantRange(t, s, 8, 17)
	// One inside is replaced, which moves no end.
	if err := s.StoreLog(entry(10, 9, "new")); err != nil {
		t.Fatal(err)
	}
	wantRange(t, s, 8, 17)
	if err := s.GetLog(10, &l); err != nil || l.Term != 9 {
		t.Fatalf("%+v %v", l, err)
	}
	if err := s.DeleteRange(1, 1<<40); err != nil {
		t.Fatal(err)
	}
	wantRange(t, s, 0, 0)
	// A gap, as after an installed snapshot, and a prefix deleted up to it.
	if err := errors.Join(s.StoreLogs(entries(1, 3, 1)), s.StoreLogs(entries(10, 12, 1)), s.DeleteRange(1, 5)); err != nil {
		t.Fatal(err)
	}
	wantRange(t, s, 10, 12)
	if s.IsMonotonic() {
		t.Fatal("monotonic: see hashicorp/raft #697")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestStable(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s := mustOpen(t, fs)
	if _, err := s.Get([]byte("x")); err == nil || err.Error() != "not found" {
		t.Fatalf("raft compares the text: %v", err)
	}
	if _, err := s.GetUint64([]byte("x")); err == nil || err.Error() != "not found" {
		t.Fatalf("raft compares the text: %v", err)
	}
	if err := errors.Join(s.SetUint64([]byte("CurrentTerm"), 7), s.Set([]byte("b"), []byte("v"))); err != nil {
		t.Fatal(err)
	}
	// The two halves of a vote.
	if err := errors.Join(s.SetUint64([]byte(keyLastVoteTerm), 7), s.Set([]byte(keyLastVoteCand), []byte("n1"))); err != nil {
		t.Fatal(err)
	}
	if err := s.SetUint64([]byte(keyLastVoteTerm), 8); err != nil {
		t.Fatal(err)
	}
	s2 := mustOpen(t, fs.CrashClone(vfs.CrashCloneCfg{}))
	if v, err := s2.GetUint64([]byte("CurrentTerm")); err != nil || v != 7 {
		t.Fatalf("%d %v", v, err)
	}
	term, err := s2.GetUint64([]byte(keyLastVoteTerm))
	cand, err2 := s2.Get([]byte(keyLastVoteCand))
	if err != nil || err2 != nil || term != 7 || string(cand) != "n1" {
		t.Fatalf("after a crash between a vote's halves: %d %q %v %v", term, cand, err, err2)
	}
	if err := s.Set([]byte(keyLastVoteCand), []byte("n2")); err != nil {
		t.Fatal(err)
	}
	s3 := mustOpen(t, fs.CrashClone(vfs.CrashCloneCfg{}))
	term, err = s3.GetUint64([]byte(keyLastVoteTerm))
	if cand, _ = s3.Get([]byte(keyLastVoteCand)); err != nil || term != 8 || string(cand) != "n2" {
		t.Fatalf("after the vote: %d %q %v", term, cand, err)
	}
	for _, s := range []*Store{s, s2, s3} {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCommitIndex(t *testing.T) {
	fs := vfs.NewCrashableMem()
	applied := uint64(0)
	s, err := Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler), Committed: func() uint64 { return applied }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	want := func(w uint64) {
		t.Helper()
		c := mustOpen(t, fs.CrashClone(vfs.CrashCloneCfg{}))
		defer c.Close()
		if got, err := c.GetCommitIndex(); err != nil || got != w {
			t.Fatalf("commit index %d, %v; want %d", got, err, w)
		}
	}
	want(0)
	applied = 2
	want(0) // only with entries
	if err := s.StoreLogs(entries(1, 3, 1)); err != nil {
		t.Fatal(err)
	}
	want(2)
	if err := errors.Join(s.StageCommitIndex(9), s.StoreLogs(entries(4, 4, 1))); err != nil {
		t.Fatal(err)
	}
	want(4) // never beyond the log
}

// A crash at any moment leaves all that was acknowledged, and no gap.
func TestCrash(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(uint64(seed), 1))
	fs := vfs.NewCrashableMem()
	s := mustOpen(t, fs)
	term, last, acked := uint64(1), uint64(0), uint64(0)
	written := map[uint64]uint64{} // term of each acknowledged entry
	check := func(clone *vfs.MemFS) {
		t.Helper()
		c := mustOpen(t, clone)
		defer c.Close()
		f, _ := c.FirstIndex()
		l, _ := c.LastIndex()
		if l < acked {
			t.Fatalf("the log ends at %d, %d was acknowledged", l, acked)
		}
		var e raft.Log
		for i := f; i <= l && l > 0; i++ {
			if err := c.GetLog(i, &e); err != nil {
				t.Fatalf("entry %d of %d to %d: %v", i, f, l, err)
			}
			if i <= acked && e.Term != written[i] {
				t.Fatalf("entry %d has term %d, want %d", i, e.Term, written[i])
			}
			if !bytes.Equal(e.Data, []byte(fmt.Sprint(i))) {
				t.Fatalf("entry %d has %q", i, e.Data)
			}
		}
	}
	for step := range 200 {
		switch rng.IntN(6) {
		case 0: // a new leader cuts the end off and writes its own
			if last > 3 {
				lo := last - rng.Uint64N(3)
				if first, _ := s.FirstIndex(); lo <= first {
					continue
				}
				if err := s.DeleteRange(lo, last); err != nil {
					t.Fatal(err)
				}
				acked, last = lo-1, lo-1 // what is gone was not committed
				term++
			}
		case 1: // a snapshot shortens the front
			if first, _ := s.FirstIndex(); last > first+5 {
				if err := s.DeleteRange(first, first+2); err != nil {
					t.Fatal(err)
				}
			}
		default:
			n := 1 + rng.Uint64N(8)
			if err := s.StoreLogs(entries(last+1, last+n, term)); err != nil {
				t.Fatal(err)
			}
			for i := last + 1; i <= last+n; i++ {
				written[i] = term
			}
			last += n
			acked = last
		}
		if step%10 == 0 {
			check(fs.CrashClone(vfs.CrashCloneCfg{}))
			check(fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: rng}))
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// When the disk fails the owner hears of it and nothing is acknowledged.
func TestDiskFailure(t *testing.T) {
	broken := errorfs.Toggle{Injector: errorfs.ErrInjected}
	fs := errorfs.Wrap(vfs.NewMem(), &broken)
	fatal := make(chan error, 1)
	s, err := Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler), OnFatal: func(err error) { fatal <- err }})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.StoreLogs(entries(1, 3, 1)); err != nil {
		t.Fatal(err)
	}
	broken.On()
	stored := make(chan error, 1)
	go func() { stored <- s.StoreLogs(entries(4, 4, 1)) }() // hangs for ever, as it must
	select {
	case <-fatal:
	case err := <-stored:
		t.Fatalf("came back from a broken disk: %v", err)
	case <-time.After(10 * time.Second):
		t.Fatal("nobody was told")
	}
	select {
	case err := <-stored:
		t.Fatalf("came back with %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if d := s.Busy(); d < 40*time.Millisecond {
		t.Fatalf("busy for %v", d)
	}
	if err := s.Close(); err == nil {
		t.Fatal("a failed database was closed as if all were well")
	}
}

// raft's log cache above our store, as we run it, sees a replaced entry.
func TestUnderCache(t *testing.T) {
	s := mustOpen(t, vfs.NewMem())
	defer s.Close()
	c, err := raft.NewLogCache(8, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.StoreLogs(entries(1, 4, 1)), c.StoreLog(entry(2, 5, "new"))); err != nil {
		t.Fatal(err)
	}
	var l raft.Log
	if err := c.GetLog(2, &l); err != nil || l.Term != 5 || c.IsMonotonic() {
		t.Fatalf("%+v %v", l, err)
	}
}

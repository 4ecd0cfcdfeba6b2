package logstore

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/hashicorp/raft"
)

func seeded(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// model is what the log must still have after a crash.
type model struct {
	mu    sync.Mutex
	terms map[uint64]uint64 // of acknowledged entries that were not cut off
	first uint64            // entries before may be gone
	term  uint64            // acknowledged CurrentTerm
	vote  uint64            // acknowledged vote's term, whose candidate is "n<term>"
}

func (m *model) clone() *model {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &model{terms: maps.Clone(m.terms), first: m.first, term: m.term, vote: m.vote}
}

// check opens what a crash left and compares (I18, I19).
func (m *model) check(fs vfs.FS) error {
	s, err := Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		if len(m.terms) == 0 && m.term == 0 && m.vote == 0 {
			return nil // while it was created: a new node, refused, joins again
		}
		return err
	}
	defer s.Close()
	f, _ := s.FirstIndex()
	l, _ := s.LastIndex()
	var e raft.Log
	for i := f; i <= l && l > 0; i++ {
		if err := s.GetLog(i, &e); err != nil {
			return fmt.Errorf("a gap: entry %d of %d to %d: %w", i, f, l, err)
		}
		if !bytes.Equal(e.Data, payload(i, e.Term)) {
			return fmt.Errorf("entry %d of term %d has other data", i, e.Term)
		}
	}
	for i, term := range m.terms {
		if i < m.first {
			continue
		}
		if err := s.GetLog(i, &e); err != nil || e.Term != term {
			return fmt.Errorf("acknowledged entry %d of term %d: term %d, %v; the log is %d to %d", i, term, e.Term, err, f, l)
		}
	}
	if term, err := s.GetUint64([]byte("CurrentTerm")); m.term > 0 && (err != nil || term < m.term) {
		return fmt.Errorf("the term went from %d back to %d, %v", m.term, term, err)
	}
	vote, err := s.GetUint64([]byte(keyLastVoteTerm))
	cand, err2 := s.Get([]byte(keyLastVoteCand))
	if m.vote > 0 && (err != nil || err2 != nil || vote < m.vote) {
		return fmt.Errorf("the vote of term %d is gone: %d %v %v", m.vote, vote, err, err2)
	}
	if err == nil && string(cand) != fmt.Sprintf("n%d", vote) {
		return fmt.Errorf("the vote of term %d is for %q", vote, cand)
	}
	return nil
}

// payload is what entry index of a term has. It is short because Pebble, at each
// damaged chunk, tries all flips of one bit, which takes the square of its size.
func payload(index, term uint64) []byte {
	return bytes.Repeat([]byte{byte(index), byte(term), byte(index >> 8)}, int(index*7919%150))
}

func made(from, to, term uint64) []*raft.Log {
	var ls []*raft.Log
	for i := from; i <= to; i++ {
		ls = append(ls, &raft.Log{Index: i, Term: term, Data: payload(i, term)})
	}
	return ls
}

// Killed before any operation on any file, with and without what was not
// synced: entries, term and vote that were acknowledged are there.
func TestKillAtEveryWrite(t *testing.T) {
	rng := seeded(t)
	chance := rand.New(rand.NewPCG(rng.Uint64(), 2)) // the hook's: it runs on the database's goroutines too
	mem := vfs.NewCrashableMem()
	m := &model{terms: make(map[uint64]uint64), first: 1}
	var (
		checks  int
		failed  error
		hooking sync.Mutex
	)
	hook := func(op errorfs.Op) error {
		if op.Kind.ReadOrWrite() != errorfs.OpIsWrite {
			return nil
		}
		hooking.Lock()
		defer hooking.Unlock()
		if failed != nil {
			return nil
		}
		was := m.clone()
		for _, percent := range []int{0, 50, 100} {
			if percent == 50 && chance.IntN(8) > 0 { // slow: Pebble looks for flipped bits
				continue
			}
			fs := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: chance})
			if _, err := fs.Stat("log"); err != nil {
				continue // not even begun
			}
			checks++
			now := m.clone() // what was deleted meanwhile may be there or not
			was.first = max(was.first, now.first)
			maps.DeleteFunc(was.terms, func(i, term uint64) bool { return now.terms[i] != term })
			if err := was.check(fs); err != nil {
				failed = fmt.Errorf("before %v of %s, with %d %% of what was not synced: %w", op.Kind, op.Path, percent, err)
			}
		}
		return nil
	}
	s, err := Open(Config{Dir: "log", FS: errorfs.Wrap(mem, errorfs.InjectorFunc(hook)), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	term, last := uint64(1), uint64(0)
	for step := range 60 {
		first, _ := s.FirstIndex()
		switch k := rng.IntN(10); {
		case k == 0 && last > first+3: // a new leader cuts the end off
			lo := last - rng.Uint64N(3)
			m.mu.Lock()
			for i := lo; i <= last; i++ {
				delete(m.terms, i)
			}
			m.mu.Unlock()
			err = s.DeleteRange(lo, last)
			last = lo - 1
			term++
		case k == 1 && last > first+10: // a snapshot shortens the front
			m.mu.Lock()
			m.first = first + 8
			m.mu.Unlock()
			err = s.DeleteRange(first, first+7)
		case k == 2:
			term++
			if err = s.SetUint64([]byte("CurrentTerm"), term); err == nil {
				m.mu.Lock()
				m.term = term
				m.mu.Unlock()
			}
		case k == 3:
			if err = errors.Join(s.SetUint64([]byte(keyLastVoteTerm), term), s.Set([]byte(keyLastVoteCand), fmt.Appendf(nil, "n%d", term))); err == nil {
				m.mu.Lock()
				m.vote = term
				m.mu.Unlock()
			}
		case k == 4:
			err = s.db.Flush() // a new WAL, of a spare one when there is one
		default:
			n := 1 + rng.Uint64N(4)
			if err = s.StoreLogs(made(last+1, last+n, term)); err == nil {
				m.mu.Lock()
				for i := last + 1; i <= last+n; i++ {
					m.terms[i] = term
				}
				m.mu.Unlock()
				last += n
			}
		}
		if err != nil {
			t.Fatalf("step %d: %v", step, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	hooking.Lock()
	defer hooking.Unlock()
	if failed != nil {
		t.Fatal(failed)
	}
	if checks < 100 {
		t.Fatalf("only %d crashes", checks)
	}
	t.Logf("%d crashes", checks)
}

// newestWAL is the name and content of the WAL being written.
func newestWAL(t *testing.T, fs vfs.FS) (string, []byte) {
	t.Helper()
	names, err := fs.List("log")
	if err != nil {
		t.Fatal(err)
	}
	names = slices.DeleteFunc(names, func(n string) bool { return !strings.HasSuffix(n, walSuffix) })
	slices.Sort(names)
	name := path.Join("log", names[len(names)-1])
	return name, mustRead(t, fs, name)
}

func mustRead(t *testing.T, fs vfs.FS, name string) []byte {
	t.Helper()
	f, err := fs.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mustWrite(t *testing.T, fs vfs.FS, name string, b []byte) {
	t.Helper()
	f, err := fs.Create(name, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// A WAL that ends anywhere, with nothing, zeros, garbage or an older WAL's
// bytes behind, gives the entries up to some point, or is refused; never other
// entries and never a gap.
func TestTornTail(t *testing.T) {
	rng := seeded(t)
	for _, reused := range []bool{false, true} {
		t.Run(fmt.Sprintf("reused=%v", reused), func(t *testing.T) {
			mem := vfs.NewCrashableMem()
			s := mustOpen(t, mem)
			last := uint64(0)
			fill := func(n uint64) {
				for range n {
					k := 1 + rng.Uint64N(3)
					if err := s.StoreLogs(made(last+1, last+k, 1)); err != nil {
						t.Fatal(err)
					}
					last += k
				}
			}
			if reused { // until the WAL is written over an older, longer one
				for range 2 {
					for range 4 {
						fill(40)
						if err := s.db.Flush(); err != nil {
							t.Fatal(err)
						}
					}
					if s.Metrics().WAL.ObsoleteFiles == 0 {
						t.Fatal("no WAL to write over")
					}
				}
			}
			flushed := last
			fill(12)
			whole := mem.CrashClone(vfs.CrashCloneCfg{})
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			name, wal := newestWAL(t, whole)
			written := 0 // where the entries end
			for i := last; written == 0; i-- {
				if p := payload(i, 1); len(p) > 16 {
					if at := bytes.LastIndex(wal, p[len(p)-16:]); at > 0 {
						written = at + 16
					}
				}
			}
			if reused && len(wal) < written+100 {
				t.Fatalf("%s has %d bytes and %d were written: not a reused one", name, len(wal), written)
			}
			refused, shorter := 0, 0
			step := 1 + written/8
			if os.Getenv("SALLYPORT_LARGE") != "" {
				step = 1 // every length
			}
			for cut := 0; cut <= written; cut += 1 + rng.IntN(step) {
				tails := map[string][]byte{"nothing": nil, "zeros": make([]byte, 900), "garbage": make([]byte, 900), "what was there": wal[min(len(wal), cut+1+rng.IntN(64)):]}
				for i := range tails["garbage"] {
					tails["garbage"][i] = byte(rng.Uint32())
				}
				for what, tail := range tails {
					if what != "nothing" && rng.IntN(3) > 0 {
						continue
					}
					fs := whole.CrashClone(vfs.CrashCloneCfg{})
					mustWrite(t, fs, name, append(bytes.Clone(wal[:cut]), tail...))
					c, err := Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler)})
					if err != nil {
						refused++
						continue
					}
					l, _ := c.LastIndex()
					if l < last {
						shorter++
					}
					if l < flushed && reused {
						t.Fatalf("cut at %d, then %s: the log ends at %d, %d was in tables", cut, what, l, flushed)
					}
					var e raft.Log
					for i := uint64(1); i <= l; i++ {
						if err := c.GetLog(i, &e); err != nil || !bytes.Equal(e.Data, payload(i, 1)) {
							t.Fatalf("cut at %d, then %s: entry %d of %d: %v", cut, what, i, l, err)
						}
					}
					if err := c.Close(); err != nil {
						t.Fatal(err)
					}
				}
			}
			t.Logf("%d refused, %d shorter, %d bytes", refused, shorter, written)
			if shorter == 0 {
				t.Fatal("nothing was ever cut off")
			}
		})
	}
}

// A bit that flips in a table is found: an error, or the true data.
func TestBitFlip(t *testing.T) {
	rng := seeded(t)
	mem := vfs.NewCrashableMem()
	s := mustOpen(t, mem)
	const last, flips = 60, 12
	if err := errors.Join(s.StoreLogs(made(1, last, 1)), s.SetUint64([]byte("CurrentTerm"), 7), s.db.Flush(), s.Close()); err != nil {
		t.Fatal(err)
	}
	names, err := mem.List("log")
	if err != nil {
		t.Fatal(err)
	}
	names = slices.DeleteFunc(names, func(n string) bool { return !strings.HasSuffix(n, ".sst") })
	if len(names) == 0 {
		t.Fatal("no table")
	}
	found := 0
	for range flips {
		fs := mem.CrashClone(vfs.CrashCloneCfg{})
		name := path.Join("log", names[rng.IntN(len(names))])
		b := mustRead(t, fs, name)
		at := rng.IntN(len(b))
		b[at] ^= 1 << rng.IntN(8)
		mustWrite(t, fs, name, b)
		c, err := Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			found++
			continue
		}
		bad := false
		var e raft.Log
		for i := uint64(1); i <= last; i++ {
			err := c.GetLog(i, &e)
			if err == nil && !bytes.Equal(e.Data, payload(i, 1)) {
				t.Fatalf("a flipped bit at %d of %s: entry %d has other data", at, name, i)
			}
			if errors.Is(err, raft.ErrLogNotFound) {
				t.Fatalf("a flipped bit at %d of %s: entry %d is gone without an error", at, name, i)
			}
			if bad = err != nil; bad {
				break // the next would take Pebble as long
			}
		}
		term, err := c.GetUint64([]byte("CurrentTerm"))
		if err == nil && term != 7 || err != nil && err.Error() == "not found" {
			t.Fatalf("a flipped bit at %d of %s: term %d, %v", at, name, term, err)
		}
		if bad || err != nil {
			found++
		}
		c.Close()
	}
	t.Logf("%d of %d flips were in the way", found, flips)
	if found < flips/3 {
		t.Fatalf("only %d of %d flips were found", found, flips)
	}
}

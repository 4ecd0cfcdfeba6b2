package logstore

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
	raftbench "github.com/hashicorp/raft/bench"
	"pgregory.net/rapid"
)

// What raft expects of its stores: the comments at LogStore, StableStore,
// MonotonicLogStore and CommitTrackingLogStore, what its own code does with
// them, and what its store in memory does.

// An empty log has no ends and no entry, and can be deleted from.
func TestRaftEmptyLog(t *testing.T) {
	s := mustOpen(t, vfs.NewMem())
	defer s.Close()
	for _, r := range [][2]uint64{{0, 0}, {1, 1}, {1, 100}, {7, 9}, {5, 4}, {0, math.MaxUint64}} {
		if err := s.DeleteRange(r[0], r[1]); err != nil {
			t.Fatal(err)
		}
		wantRange(t, s, 0, 0)
	}
	for _, i := range []uint64{0, 1, math.MaxUint64} {
		l := raft.Log{Term: 9}
		if err := s.GetLog(i, &l); err != raft.ErrLogNotFound { // raft compares it so
			t.Fatalf("entry %d of an empty log: %v", i, err)
		}
	}
	if c, err := s.GetCommitIndex(); c != 0 || err != nil {
		t.Fatalf("commit index %d, %v", c, err)
	}
	if s.IsMonotonic() {
		t.Fatal("monotonic: see hashicorp/raft #697")
	}
}

// Every field of an entry comes back, also after a restart, and the store and
// its callers share no memory.
func TestRaftEntryRoundTrip(t *testing.T) {
	fs := vfs.NewMem()
	s := mustOpen(t, fs)
	want := []*raft.Log{
		{Index: 1, Term: 1, Type: raft.LogCommand, Data: []byte("d"), Extensions: []byte("e"), AppendedAt: time.Unix(1_700_000_000, 123_456_789)},
		{Index: 2, Term: 1, Type: raft.LogNoop},
		{Index: 3, Term: 2, Type: raft.LogBarrier, Extensions: bytes.Repeat([]byte{7}, 70_000)},
		{Index: 4, Term: math.MaxUint64, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: "n", Address: "a"}}})},
		{Index: 5, Term: 2, Type: raft.LogAddPeerDeprecated, AppendedAt: time.Unix(-1, 5)},                                   // before 1970
		{Index: 6, Term: 2, Type: raft.LogRemovePeerDeprecated, AppendedAt: time.Now().Add(24 * time.Hour)},                  // a leader's clock
		{Index: 7, Term: 2, Type: raft.LogType(200), Data: bytes.Repeat([]byte("large"), 1<<20)},                             // 5 MiB
		{Index: 8, Term: 2, Data: []byte{0}, Extensions: []byte{0, 0}, AppendedAt: time.Now().In(time.FixedZone("x", 3600))}, // zeros are data
	}
	stored := make([]*raft.Log, len(want))
	for i, l := range want {
		c := *l
		c.Data, c.Extensions = bytes.Clone(l.Data), bytes.Clone(l.Extensions)
		stored[i] = &c
	}
	if err := s.StoreLogs(stored); err != nil {
		t.Fatal(err)
	}
	for _, l := range stored { // raft reuses what it decodes into
		clear(l.Data)
		clear(l.Extensions)
	}
	for range 2 {
		for _, w := range want {
			for range 2 {
				var l raft.Log
				if err := s.GetLog(w.Index, &l); err != nil {
					t.Fatal(err)
				}
				if l.Index != w.Index || l.Term != w.Term || l.Type != w.Type || !bytes.Equal(l.Data, w.Data) || !bytes.Equal(l.Extensions, w.Extensions) || !l.AppendedAt.Equal(w.AppendedAt) || l.AppendedAt.IsZero() != w.AppendedAt.IsZero() {
					t.Fatalf("entry %d is another: term %d, %v, %d and %d bytes, %v", w.Index, l.Term, l.Type, len(l.Data), len(l.Extensions), l.AppendedAt)
				}
				_ = append(l.Extensions, 'x') // does not run into the data
				if !bytes.Equal(l.Data, w.Data) {
					t.Fatal("extensions and data share their ends")
				}
				clear(l.Data) // the caller's own
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = mustOpen(t, fs)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// Deletions of every kind, with and without a gap in the log: the ends are
// entries that are there, and the same after a restart.
func TestRaftDeleteRange(t *testing.T) {
	span := func(from, to uint64) (is []uint64) {
		for i := from; i <= to; i++ {
			is = append(is, i)
		}
		return is
	}
	for _, c := range []struct {
		name   string
		log    []uint64
		lo, hi uint64
	}{
		{"nothing", span(5, 20), 8, 7},
		{"the first", span(5, 20), 5, 5},
		{"a prefix", span(5, 20), 5, 12},
		{"a prefix from before the log", span(5, 20), 1, 12},
		{"a prefix that ends before the log", span(5, 20), 1, 4},
		{"the last", span(5, 20), 20, 20},
		{"a suffix", span(5, 20), 9, 20},
		{"a suffix to after the log", span(5, 20), 9, 99},
		{"a suffix without end", span(5, 20), 9, math.MaxUint64},
		{"what is after the log", span(5, 20), 21, 99},
		{"what is well after the log", span(5, 20), 25, 99},
		{"all", span(5, 20), 5, 20},
		{"all and more", span(5, 20), 0, math.MaxUint64},
		{"all of one", span(7, 7), 7, 7},
		{"a prefix up to a gap", append(span(1, 3), span(10, 12)...), 1, 3},
		{"a prefix into a gap", append(span(1, 3), span(10, 12)...), 1, 6},
		{"a prefix over a gap", append(span(1, 3), span(10, 12)...), 1, 10},
		{"a suffix up to a gap", append(span(1, 3), span(10, 12)...), 10, 12},
		{"a suffix from in a gap", append(span(1, 3), span(10, 12)...), 7, 12},
		{"a suffix over a gap", append(span(1, 3), span(10, 12)...), 3, 12},
	} {
		t.Run(c.name, func(t *testing.T) {
			fs := vfs.NewMem()
			s := mustOpen(t, fs)
			var want []uint64
			for _, i := range c.log {
				if err := s.StoreLog(entry(i, 1, "old")); err != nil {
					t.Fatal(err)
				}
				if i < c.lo || i > c.hi {
					want = append(want, i)
				}
			}
			if err := s.DeleteRange(c.lo, c.hi); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				first, last := uint64(0), uint64(0)
				if len(want) > 0 {
					first, last = want[0], want[len(want)-1]
				}
				wantRange(t, s, first, last)
				for i := uint64(0); i < 25; i++ {
					var l raft.Log
					err := s.GetLog(i, &l)
					if there := slices.Contains(want, i); there && err != nil || !there && err != raft.ErrLogNotFound {
						t.Fatalf("entry %d: %v", i, err)
					}
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				s = mustOpen(t, fs)
			}
			// A follower goes on behind what is left, with another term.
			next := max(1, c.lo)
			if len(want) > 0 {
				next = want[len(want)-1] + 1
			}
			if err := s.StoreLogs(entries(next, next+2, 2)); err != nil {
				t.Fatal(err)
			}
			var l raft.Log
			if err := s.GetLog(next, &l); err != nil || l.Term != 2 {
				t.Fatalf("stored over what was deleted: %+v, %v", l, err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// The stable store: what raft stores of itself, and its words for nothing.
func TestRaftStableStore(t *testing.T) {
	fs := vfs.NewMem()
	s := mustOpen(t, fs)
	key := []byte{0, 255, 'L', 0}
	for range 2 {
		for _, k := range [][]byte{[]byte("never"), {}, {'L'}} {
			v, err := s.Get(k)
			u, err2 := s.GetUint64(k)
			if err == nil || err2 == nil || err.Error() != "not found" || err2.Error() != "not found" || len(v) != 0 || u != 0 {
				t.Fatalf("raft compares the text: %v, %v", err, err2)
			}
		}
		for _, v := range [][]byte{[]byte("v"), bytes.Repeat([]byte("w"), 1<<20), {}} {
			if err := s.Set(key, v); err != nil {
				t.Fatal(err)
			}
			got, err := s.Get(key)
			if err != nil || !bytes.Equal(got, v) {
				t.Fatalf("%d bytes of %d, %v", len(got), len(v), err)
			}
		}
		for _, v := range []uint64{0, 1, math.MaxUint64} {
			if err := s.SetUint64([]byte("n"), v); err != nil {
				t.Fatal(err)
			}
			if got, err := s.GetUint64([]byte("n")); err != nil || got != v {
				t.Fatalf("%d for %d, %v", got, v, err)
			}
		}
		if _, err := s.GetUint64(key); err == nil {
			t.Fatal("a number of no bytes")
		}
		wantRange(t, s, 0, 0) // keys and entries are apart
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = mustOpen(t, fs)
		if got, err := s.GetUint64([]byte("n")); err != nil || got != math.MaxUint64 {
			t.Fatalf("after a restart %d, %v", got, err)
		}
		if got, err := s.Get(key); err != nil || len(got) != 0 {
			t.Fatalf("after a restart %q, %v", got, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// A staged commit index is stored with the next entries and not before, and is
// never more than the log has: also when the log's end is deleted.
func TestRaftCommitTracking(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s := mustOpen(t, fs)
	defer s.Close()
	want := func(now, crashed uint64) {
		t.Helper()
		c := mustOpen(t, fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 1))}))
		defer c.Close()
		got, err := s.GetCommitIndex()
		after, err2 := c.GetCommitIndex()
		if err = errors.Join(err, err2); err != nil || got != now || after != crashed {
			t.Fatalf("commit index %d, after a crash %d, %v; want %d and %d", got, after, err, now, crashed)
		}
	}
	do := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	do(s.StageCommitIndex(3))
	want(0, 0)
	do(s.SetUint64([]byte(keyCurrentTerm), 1)) // another synced write carries nothing
	want(0, 0)
	do(s.StoreLogs(entries(1, 5, 1)))
	want(3, 3)
	do(s.StageCommitIndex(5), s.DeleteRange(5, 5))
	want(3, 3)
	do(s.StoreLogs(entries(5, 6, 2)))
	want(5, 5)
	do(s.DeleteRange(3, 6)) // raft never deletes what is committed; if it did:
	want(2, 5)              // a crash brings the entries back, and with them their index
	do(s.DeleteRange(1, 2))
	want(0, 5)
	do(s.StoreLogs(entries(10, 11, 3))) // after a snapshot
	want(5, 5)
}

// Readers at any time see an entry as it was stored, or none, and ends between
// which nothing is missing for long.
func TestRaftConcurrentReaders(t *testing.T) {
	s := mustOpen(t, vfs.NewMem())
	defer s.Close()
	done := make(chan struct{})
	var wg sync.WaitGroup
	var reads [4]int
	for r := range reads {
		rng := rand.New(rand.NewPCG(uint64(r), 1))
		wg.Go(func() {
			var l raft.Log
			for {
				select {
				case <-done:
					return
				default:
				}
				first, _ := s.FirstIndex()
				last, _ := s.LastIndex()
				if last == 0 {
					continue
				}
				i := max(1, first) + rng.Uint64N(last+2-min(first, last))
				switch err := s.GetLog(i, &l); {
				case err == nil:
					if l.Index != i || !bytes.Equal(l.Data, payload(i, l.Term)) {
						t.Errorf("entry %d of term %d has other data", i, l.Term)
						return
					}
					reads[r]++
				case err != raft.ErrLogNotFound:
					t.Error(err)
					return
				}
				if _, err := s.GetUint64([]byte(keyCurrentTerm)); err != nil && err.Error() != "not found" {
					t.Error(err)
					return
				}
			}
		})
	}
	last, term := uint64(0), uint64(1)
	for step := range 600 {
		var err error
		switch first, _ := s.FirstIndex(); {
		case step%20 == 19 && last > first+6:
			err = s.DeleteRange(first, first+4)
		case step%7 == 6 && last > first+3:
			err = s.DeleteRange(last-1, last)
			last -= 2
			term++
			err = errors.Join(err, s.SetUint64([]byte(keyCurrentTerm), term))
		default:
			err = s.StoreLogs(made(last+1, last+3, term))
			last += 3
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	close(done)
	wg.Wait()
	if n := reads[0] + reads[1] + reads[2] + reads[3]; n < 100 {
		t.Fatalf("only %d reads", n)
	}
}

// Whatever raft may do with its stores, in any order and with restarts between:
// the same answers as of raft's own store in memory.
func TestRaftModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		fs := vfs.NewMem()
		open := func() *Store {
			s, err := Open(Config{Dir: "log", FS: fs, Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		s, m := open(), raft.NewInmemStore()
		defer func() { s.Close() }()
		var staged, committed, term uint64
		keys := map[string]bool{}
		ends := func() (first, last uint64) {
			first, _ = m.FirstIndex()
			last, _ = m.LastIndex()
			return first, last
		}
		store := func(from, n uint64) {
			var ls, copies []*raft.Log
			for i := from; i < from+n; i++ {
				l := &raft.Log{Index: i, Term: term, Type: raft.LogType(rapid.IntRange(0, 5).Draw(t, "type")), AppendedAt: time.Unix(0, int64(i)+1)}
				if d := rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "data"); len(d) > 0 {
					l.Data = d
				}
				if d := rapid.SliceOfN(rapid.Byte(), 0, 5).Draw(t, "extensions"); len(d) > 0 {
					l.Extensions = d
				}
				c := *l
				ls, copies = append(ls, l), append(copies, &c)
			}
			if err := errors.Join(s.StoreLogs(ls), m.StoreLogs(copies)); err != nil {
				t.Fatal(err)
			}
			committed = max(committed, staged)
		}
		remove := func(lo, hi uint64) {
			if err := errors.Join(s.DeleteRange(lo, hi), m.DeleteRange(lo, hi)); err != nil {
				t.Fatal(err)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"append": func(t *rapid.T) {
				_, last := ends()
				store(last+1, rapid.Uint64Range(1, 5).Draw(t, "n"))
			},
			"after a snapshot": func(t *rapid.T) { // a gap, then what was before goes
				first, last := ends()
				next := last + rapid.Uint64Range(2, 9).Draw(t, "gap")
				store(next, 2)
				if first > 0 {
					remove(first, next-1)
				}
			},
			"replace": func(t *rapid.T) {
				if first, last := ends(); first > 0 {
					store(rapid.Uint64Range(first, last).Draw(t, "at"), 1)
				}
			},
			"shorten the front": func(t *rapid.T) {
				if first, last := ends(); first > 0 {
					remove(rapid.Uint64Range(1, first).Draw(t, "lo"), rapid.Uint64Range(first, last).Draw(t, "hi"))
				}
			},
			"cut off the end": func(t *rapid.T) {
				if first, last := ends(); first > 0 {
					remove(rapid.Uint64Range(first, last).Draw(t, "lo"), last+rapid.Uint64Range(0, 3).Draw(t, "beyond"))
					term++
				}
			},
			"stage": func(t *rapid.T) {
				_, last := ends()
				staged = rapid.Uint64Range(staged, max(staged, last)).Draw(t, "commit")
				if err := s.StageCommitIndex(staged); err != nil {
					t.Fatal(err)
				}
			},
			"set": func(t *rapid.T) {
				k, v := rapid.SampledFrom([]string{"a", "b", "L"}).Draw(t, "key"), rapid.SliceOfN(rapid.Byte(), 1, 9).Draw(t, "value")
				keys[k] = true
				if err := errors.Join(s.Set([]byte(k), v), m.Set([]byte(k), v)); err != nil {
					t.Fatal(err)
				}
			},
			"vote": func(t *rapid.T) {
				term++
				v := fmt.Appendf(nil, "n%d", term)
				for _, st := range []raft.StableStore{s, m} {
					if err := errors.Join(st.SetUint64([]byte(keyCurrentTerm), term), st.SetUint64([]byte(keyLastVoteTerm), term), st.Set([]byte(keyLastVoteCand), v)); err != nil {
						t.Fatal(err)
					}
				}
			},
			"restart": func(t *rapid.T) {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				s, staged = open(), committed
			},
			"": func(t *rapid.T) {
				first, last := ends()
				f, _ := s.FirstIndex()
				l, _ := s.LastIndex()
				if f != first || l != last {
					t.Fatalf("the log is %d to %d, raft's %d to %d", f, l, first, last)
				}
				for i := min(first, first-1); i <= last+1; i++ {
					var got, want raft.Log
					err, werr := s.GetLog(i, &got), m.GetLog(i, &want)
					if err != werr || err == nil && !reflect.DeepEqual(got, want) {
						t.Fatalf("entry %d: %+v, %v; raft's: %+v, %v", i, got, err, want, werr)
					}
				}
				if c, err := s.GetCommitIndex(); err != nil || c != min(committed, last) {
					t.Fatalf("commit index %d, %v; want %d in a log to %d", c, err, committed, last)
				}
				for _, k := range append(slices.Collect(maps.Keys(keys)), "none", keyLastVoteCand) {
					got, err := s.Get([]byte(k))
					want, werr := m.Get([]byte(k))
					if fmt.Sprint(err) != fmt.Sprint(werr) || !bytes.Equal(got, want) {
						t.Fatalf("%s: %q, %v; raft's: %q, %v", k, got, err, want, werr)
					}
				}
				for _, k := range []string{keyCurrentTerm, keyLastVoteTerm} {
					got, _ := s.GetUint64([]byte(k))
					if want, _ := m.GetUint64([]byte(k)); got != want {
						t.Fatalf("%s: %d, raft's %d", k, got, want)
					}
				}
			},
		})
	})
}

// raft's own exercises for stores, a few rounds of each: they find no error, and
// leave what they stored.
func TestRaftBench(t *testing.T) {
	was := flag.Lookup("test.benchtime").Value.String()
	if err := flag.Set("test.benchtime", "20x"); err != nil {
		t.Fatal(err)
	}
	defer flag.Set("test.benchtime", was)
	for name, f := range raftBenches {
		t.Run(name, func(t *testing.T) {
			fs := vfs.NewMem()
			s := mustOpen(t, fs)
			r := testing.Benchmark(func(b *testing.B) { f(b, s) })
			if r.N == 0 {
				t.Fatal("it failed")
			}
			if err := s.DeleteRange(0, 0); err != nil { // some begin at 0, which is no index of raft's
				t.Fatal(err)
			}
			first, _ := s.FirstIndex()
			last, _ := s.LastIndex()
			for i := first; i <= last && i > 0; i++ {
				if err := s.GetLog(i, new(raft.Log)); err != nil && err != raft.ErrLogNotFound {
					t.Fatal(err)
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = mustOpen(t, fs)
			wantRange(t, s, first, last)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

var raftBenches = map[string]func(*testing.B, *Store){
	"FirstIndex":  func(b *testing.B, s *Store) { raftbench.FirstIndex(b, s) },
	"LastIndex":   func(b *testing.B, s *Store) { raftbench.LastIndex(b, s) },
	"GetLog":      func(b *testing.B, s *Store) { raftbench.GetLog(b, s) },
	"StoreLog":    func(b *testing.B, s *Store) { raftbench.StoreLog(b, s) },
	"StoreLogs":   func(b *testing.B, s *Store) { raftbench.StoreLogs(b, s) },
	"DeleteRange": func(b *testing.B, s *Store) { raftbench.DeleteRange(b, s) },
	"Set":         func(b *testing.B, s *Store) { raftbench.Set(b, s) },
	"Get":         func(b *testing.B, s *Store) { raftbench.Get(b, s) },
	"SetUint64":   func(b *testing.B, s *Store) { raftbench.SetUint64(b, s) },
	"GetUint64":   func(b *testing.B, s *Store) { raftbench.GetUint64(b, s) },
}

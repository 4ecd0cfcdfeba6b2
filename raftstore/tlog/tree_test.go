package tlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// reference is RFC 6962 §2.1 as it is written.
func reference(leaves []Hash) Hash {
	switch len(leaves) {
	case 0:
		return sha256.Sum256(nil)
	case 1:
		return leaves[0]
	}
	k := 1
	for k*2 < len(leaves) {
		k *= 2
	}
	return tlog.NodeHash(reference(leaves[:k]), reference(leaves[k:]))
}

func leafN(n int) Hash { return LeafHash(binary.BigEndian.AppendUint64(nil, uint64(n))) }

func leaves(n int) []Hash {
	out := make([]Hash, n)
	for i := range out {
		out[i] = leafN(i)
	}
	return out
}

func mustOpen(t testing.TB, dir string) *Tree {
	t.Helper()
	tr, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func TestLeafHash(t *testing.T) {
	want := sha256.Sum256([]byte("\x00an envelope"))
	if LeafHash([]byte("an envelope")) != want {
		t.Error("not SHA-256(0x00 || envelope)")
	}
}

// TestTree holds roots, tiles and proofs at many sizes against the definition.
func TestTree(t *testing.T) {
	const n = 1600 // seven level 0 tiles and one of level 1
	all := leaves(n)
	tr := mustOpen(t, t.TempDir())
	defer tr.Close()
	var b Builder
	for i := 0; i < n; {
		k := min(n-i, 1+i%97)
		if err := tr.Append(uint64(i), all[i:i+k]); err != nil {
			t.Fatal(err)
		}
		i += k
	}
	if err := tr.Append(n-1, all[:1]); !errors.Is(err, ErrMoved) || tr.Size() != n {
		t.Fatal(err, tr.Size())
	}
	roots := []Hash{b.Root()}
	for i := range n {
		b.Append(all[i])
		roots = append(roots, b.Root())
	}
	for _, size := range []int{0, 1, 2, 3, 7, 8, 200, 255, 256, 257, 511, 512, 513, 1000, 1279, 1280, 1599, 1600} {
		want := reference(all[:size])
		got, err := tr.Root(uint64(size))
		if err != nil || got != want || roots[size] != want {
			t.Fatalf("root of %d: %v %v, builder %v, want %v", size, got, err, roots[size], want)
		}
	}
	if _, err := tr.Root(n + 1); err == nil {
		t.Error("a root beyond the end")
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		size := 1 + rng.IntN(n)
		index, old := rng.IntN(size), 1+rng.IntN(size)
		p, err := tr.Inclusion(uint64(index), uint64(size))
		if err != nil {
			t.Fatal(err)
		}
		if err := CheckInclusion(p, uint64(size), roots[size], uint64(index), all[index]); err != nil {
			t.Fatal(err)
		}
		if CheckInclusion(p, uint64(size), roots[size], uint64(index), leafN(n+1)) == nil {
			t.Fatal("another leaf was proved")
		}
		p, err = tr.Consistency(uint64(old), uint64(size))
		if err != nil {
			t.Fatal(err)
		}
		if err := CheckConsistency(p, uint64(size), roots[size], uint64(old), roots[old]); err != nil {
			t.Fatal(err)
		}
		if CheckConsistency(p, uint64(size), roots[size], uint64(old), leafN(n+1)) == nil {
			t.Fatal("another past was proved")
		}
	}
	for _, bad := range []struct{ index, size uint64 }{{n, n}, {5, 5}, {0, n + 1}, {1 << 63, n}} {
		if _, err := tr.Inclusion(bad.index, bad.size); err == nil {
			t.Errorf("proved leaf %d of %d", bad.index, bad.size)
		}
	}
	// Tiles are what the arithmetic of tlog-tiles says.
	for _, span := range NewTiles(0, n) {
		got, err := tr.Tile(span.Level, span.N, span.Width)
		if err != nil {
			t.Fatal(err)
		}
		for i := range span.Width {
			lo := (int(span.N)*TileWidth + i) << (TileHeight * span.Level)
			want := reference(all[lo : lo+1<<(TileHeight*span.Level)])
			if !bytes.Equal(got[i*HashSize:(i+1)*HashSize], want[:]) {
				t.Fatalf("tile %+v, hash %d", span, i)
			}
		}
	}
	if _, err := tr.Tile(0, 6, 65); err == nil {
		t.Error("a tile beyond the end")
	}
	if _, err := tr.Tile(1, 0, 7); err == nil {
		t.Error("a hash of a tile that is not full")
	}
}

func TestNewTiles(t *testing.T) {
	for _, c := range []struct {
		from, to uint64
	}{{0, 1}, {0, 255}, {0, 256}, {255, 257}, {256, 256}, {256, 600}, {65535, 65536}, {0, 70000}, {65536, 70000}} {
		want := tlog.NewTiles(TileHeight, int64(c.from), int64(c.to))
		got := NewTiles(c.from, c.to)
		if len(got) != len(want) {
			t.Errorf("%v: %d tiles, want %d", c, len(got), len(want))
			continue
		}
		for i, w := range want {
			if got[i] != (TileSpan{w.L, uint64(w.N), w.W}) {
				t.Errorf("%v: %+v, want %+v", c, got[i], w)
			}
		}
	}
}

// TestTreeReopened: what is after the mark is forgotten, what does not match
// the mark is too.
func TestTreeReopened(t *testing.T) {
	const n = 3 * TileWidth
	build := func(t *testing.T) (string, Hash) {
		dir := t.TempDir()
		tr := mustOpen(t, dir)
		if err := tr.Append(0, leaves(n), Entry{1, 5}, Entry{2, 6}, Entry{1, 500}); err != nil {
			t.Fatal(err)
		}
		root, _ := tr.Root(n)
		if err := tr.Close(); err != nil {
			t.Fatal(err)
		}
		return dir, root
	}
	edit := func(t *testing.T, dir, file string, f func([]byte) []byte) {
		t.Helper()
		p := filepath.Join(dir, file)
		b, err := os.ReadFile(p)
		if err == nil {
			err = os.WriteFile(p, f(b), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		file string
		f    func([]byte) []byte
		want uint64
	}{
		"as closed":     {leavesFile, func(b []byte) []byte { return b }, n},
		"torn tail":     {leavesFile, func(b []byte) []byte { return append(b, make([]byte, 1000)...) }, n},
		"leaves cut":    {leavesFile, func(b []byte) []byte { return b[:len(b)-1] }, 0},
		"leaves empty":  {leavesFile, func(b []byte) []byte { return nil }, 0},
		"leaf changed":  {leavesFile, func(b []byte) []byte { b[777] ^= 1; return b }, 0},
		"index torn":    {indexFile, func(b []byte) []byte { return append(b, 1, 2, 3) }, n},
		"index cut":     {indexFile, func(b []byte) []byte { return b[:len(b)-1] }, 0},
		"index changed": {indexFile, func(b []byte) []byte { b[3] ^= 1; return b }, 0},
		"mark cut":      {markFile, func(b []byte) []byte { return b[:len(b)-1] }, 0},
		"mark changed":  {markFile, func(b []byte) []byte { b[len(b)-1] ^= 1; return b }, 0},
		"root changed":  {markFile, func(b []byte) []byte { b[20] ^= 1; return b }, 0},
		"mark too big":  {markFile, func(b []byte) []byte { b[8] = 0xff; return b }, 0},
		"mark of fewer": {markFile, func(b []byte) []byte { b[15] = 1; return b }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir, root := build(t)
			edit(t, dir, c.file, c.f)
			tr := mustOpen(t, dir)
			defer tr.Close()
			if tr.Size() != c.want {
				t.Fatalf("size %d, want %d", tr.Size(), c.want)
			}
			if got := tr.Leaves(1); c.want > 0 && !slices.Equal(got, []uint64{5, 500}) || c.want == 0 && len(got) > 0 {
				t.Fatalf("index: %d", got)
			}
			if err := tr.Append(c.want, leaves(n)[c.want:]); err != nil {
				t.Fatal(err)
			}
			if got, err := tr.Root(n); err != nil || got != root {
				t.Error("another root after it was made whole", err)
			}
		})
	}
	t.Run("not closed", func(t *testing.T) {
		dir := t.TempDir()
		tr := mustOpen(t, dir)
		if err := tr.Append(0, leaves(markEvery)); err != nil {
			t.Fatal(err)
		}
		if err := tr.Append(markEvery, []Hash{leafN(markEvery)}, Entry{1, markEvery}); err != nil {
			t.Fatal(err)
		}
		again := mustOpen(t, dir) // as after a kill
		defer again.Close()
		if again.Size() != markEvery || len(again.Leaves(1)) > 0 {
			t.Errorf("size %d, want %d", again.Size(), markEvery)
		}
		tr.mu.file.Close()
	})
	t.Run("reset", func(t *testing.T) {
		dir, root := build(t)
		tr := mustOpen(t, dir)
		defer tr.Close()
		if err := tr.Reset(); err != nil || tr.Size() != 0 {
			t.Fatal(err, tr.Size())
		}
		if err := tr.Append(0, leaves(n), Entry{1, 5}, Entry{2, 6}, Entry{1, 500}); err != nil {
			t.Fatal(err)
		}
		if got, _ := tr.Root(n); got != root {
			t.Error("another root")
		}
	})
	t.Run("failed disk", func(t *testing.T) {
		dir, _ := build(t)
		tr := mustOpen(t, dir)
		tr.mu.file.Close()
		if err := tr.Append(n, []Hash{leafN(n)}); err == nil {
			t.Fatal("appended to a closed file")
		}
		if err := tr.Append(n, []Hash{leafN(n)}); err == nil || tr.Size() != n {
			t.Fatal("went on after a failure", err, tr.Size())
		}
	})
}

var openEvents = flag.Int("open-events", 0, "TestOpenTime builds a tree of so many events and says how long opening takes")

// TestOpenTime measures when asked: -run OpenTime -open-events 1000000 -v.
func TestOpenTime(t *testing.T) {
	n := *openEvents
	if n == 0 {
		n = 20_000
	}
	dir := t.TempDir()
	tr := mustOpen(t, dir)
	began := time.Now()
	for i := 0; i < n; i += 1000 {
		hs := make([]Hash, min(1000, n-i))
		for j := range hs {
			hs[j] = leafN(i + j)
		}
		if err := tr.Append(uint64(i), hs); err != nil {
			t.Fatal(err)
		}
	}
	built := time.Since(began)
	root, _ := tr.Root(uint64(n))
	if err := tr.Close(); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	tr = mustOpen(t, dir)
	defer tr.Close()
	t.Logf("%d events: built in %v, opened in %v", n, built, time.Since(began))
	if got, _ := tr.Root(uint64(n)); got != root || tr.Size() != uint64(n) {
		t.Error("another tree")
	}
}

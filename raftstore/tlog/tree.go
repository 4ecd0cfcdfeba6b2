package tlog

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/mod/sumdb/tlog"
)

// Files of a Tree's directory. Both are derived from the events: they can be
// deleted while the node is stopped.
//
//	leaves  leaf hashes, 32 bytes each, in order
//	index   which leaves are of interest, 8 bytes each, in order: be64 of
//	        leaf << 8 | kind
//	mark    "SPTLOG1\n", be64 size, root over the first size leaves, be64
//	        number of entries of the index, SHA-256 over them; replaced as a
//	        whole after the other two were synced
//
// What is after the mark in the other two is not believed: after a power cut
// any part of it may be missing.
const (
	leavesFile = "leaves"
	indexFile  = "index"
	markFile   = "mark"
	markMagic  = "SPTLOG1\n"
	markSize   = len(markMagic) + 2*(8+HashSize)
)

// An Entry of a Tree's index is a leaf of some kind, so that a checkpoint is
// found by its number, and the members without reading the whole log. What
// kinds there are is the caller's affair.
type Entry struct {
	Kind byte
	Leaf uint64
}

func (e Entry) append(b []byte) []byte {
	return binary.BigEndian.AppendUint64(b, e.Leaf<<8|uint64(e.Kind))
}

// markEvery is after how many leaves Append makes a mark: what is computed anew
// from the events after a crash, some 10 ms of work.
const markEvery = 8192

// Tree keeps the hashes of a tree in a directory: leaves in a file, hashes of
// full tiles in memory (a 32-byte hash for 256 leaves, so 4 MB for 32 million
// events, and 8 bytes for each entry of the index), everything between computed
// when it is asked for.
//
// Opening reads the file once: 32 bytes and one SHA-256 of two blocks for each
// event, about a second for a million. Safe for concurrent use.
type Tree struct {
	dir string
	mu  struct {
		sync.RWMutex
		file   *os.File // leaves
		index  *os.File
		b      Builder
		upper  [][]Hash // upper[l-1]: the hashes of level l, those of full tiles below
		kinds  map[byte][]uint64
		count  int64     // entries of the index
		sum    hash.Hash // over them
		marked uint64
		failed error // of a write: the files' ends are not known any more
	}
}

// OpenTree opens or creates the tree in dir. Its size is what the newest mark
// covers; leaves after it are to be appended again. A tree that does not match
// its mark is emptied.
func OpenTree(dir string) (*Tree, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the log's tree: %w", err)
	}
	t := &Tree{dir: dir}
	var err error
	if t.mu.file, err = os.OpenFile(filepath.Join(dir, leavesFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fmt.Errorf("the log's tree: %w", err)
	}
	if t.mu.index, err = os.OpenFile(filepath.Join(dir, indexFile), os.O_RDWR|os.O_CREATE, 0o600); err == nil {
		t.empty()
		err = t.load()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the log's tree: %w", err), t.mu.file.Close(), t.mu.index.Close())
	}
	return t, nil
}

// full keeps the hash of a full tile. mu is held.
func (t *Tree) full(level int, _ uint64, hashes []Hash) {
	var buf [TileWidth]Hash
	for len(t.mu.upper) <= level {
		t.mu.upper = append(t.mu.upper, nil)
	}
	t.mu.upper[level] = append(t.mu.upper[level], subtree(buf[:copy(buf[:], hashes)]))
}

func (t *Tree) load() error {
	m, err := t.readMark()
	if err != nil || m.size == 0 {
		return errors.Join(err, t.reset())
	}
	cut := func(err error) bool { return err == io.EOF || err == io.ErrUnexpectedEOF }
	r := bufio.NewReaderSize(io.NewSectionReader(t.mu.file, 0, int64(m.size)*HashSize), 256<<10)
	var h Hash
	for range m.size {
		if _, err := io.ReadFull(r, h[:]); cut(err) {
			return t.reset()
		} else if err != nil {
			return err
		}
		t.mu.b.Append(h)
	}
	r.Reset(io.NewSectionReader(t.mu.index, 0, m.count*8))
	var e [8]byte
	for range m.count {
		if _, err := io.ReadFull(r, e[:]); cut(err) {
			return t.reset()
		} else if err != nil {
			return err
		}
		v := binary.BigEndian.Uint64(e[:])
		t.note(Entry{Kind: byte(v), Leaf: v >> 8})
	}
	if t.mu.b.Root() != m.root || Hash(t.mu.sum.Sum(nil)) != m.sum {
		return t.reset()
	}
	t.mu.marked = m.size
	return errors.Join(t.mu.file.Truncate(int64(m.size)*HashSize), t.mu.index.Truncate(m.count*8))
}

// note takes an entry of the index into memory. mu is held.
func (t *Tree) note(e Entry) {
	t.mu.kinds[e.Kind] = append(t.mu.kinds[e.Kind], e.Leaf)
	t.mu.sum.Write(e.append(nil))
	t.mu.count++
}

type mark struct {
	size  uint64
	root  Hash
	count int64
	sum   Hash
}

// readMark returns a size of 0 when there is none or it is not whole.
func (t *Tree) readMark() (m mark, err error) {
	b, err := os.ReadFile(filepath.Join(t.dir, markFile))
	if errors.Is(err, fs.ErrNotExist) || err == nil && (len(b) != markSize || string(b[:len(markMagic)]) != markMagic) {
		return mark{}, nil
	}
	if err != nil {
		return mark{}, err
	}
	b = b[len(markMagic):]
	m.size = binary.BigEndian.Uint64(b)
	copy(m.root[:], b[8:])
	b = b[8+HashSize:]
	m.count = int64(binary.BigEndian.Uint64(b))
	copy(m.sum[:], b[8:])
	if m.size > maxSize || m.count < 0 || m.count > int64(m.size) {
		return mark{}, nil
	}
	return m, nil
}

// empty makes the tree in memory the empty one. mu is held.
func (t *Tree) empty() {
	t.mu.b = Builder{Full: t.full}
	t.mu.upper, t.mu.marked, t.mu.failed = nil, 0, nil
	t.mu.kinds, t.mu.count, t.mu.sum = map[byte][]uint64{}, 0, sha256.New()
}

// reset empties the tree. mu is held, or t not shared yet.
func (t *Tree) reset() error {
	t.empty()
	if err := os.Remove(filepath.Join(t.dir, markFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(t.mu.file.Truncate(0), t.mu.index.Truncate(0))
}

// Reset forgets everything, to be computed anew from the events.
func (t *Tree) Reset() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.reset()
}

// Size is the number of leaves.
func (t *Tree) Size() uint64 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.mu.b.size
}

// ErrMoved: the tree was reset, or somebody else appended to it.
var ErrMoved = errors.New("the log's tree has another size")

// Append adds leaves to a tree of size at, and entries of the index for leaves
// that are there then. After an error other than ErrMoved the tree takes no more
// until it is opened anew.
func (t *Tree) Append(at uint64, leaves []Hash, entries ...Entry) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.failed != nil {
		return t.mu.failed
	}
	if at != t.mu.b.size {
		return ErrMoved
	}
	buf := make([]byte, 0, len(leaves)*HashSize)
	for _, h := range leaves {
		buf = append(buf, h[:]...)
	}
	_, err := t.mu.file.WriteAt(buf, int64(t.mu.b.size)*HashSize)
	if err == nil && len(entries) > 0 {
		buf = buf[:0]
		for _, e := range entries {
			buf = e.append(buf)
		}
		_, err = t.mu.index.WriteAt(buf, t.mu.count*8)
	}
	if err != nil {
		t.mu.failed = fmt.Errorf("the log's tree: %w", err)
		return t.mu.failed
	}
	for _, h := range leaves {
		t.mu.b.Append(h)
	}
	for _, e := range entries {
		t.note(e)
	}
	if t.mu.b.size-t.mu.marked >= markEvery {
		return t.mark()
	}
	return nil
}

// Leaves are the leaves of a kind, in order. The caller must not change them.
func (t *Tree) Leaves(kind byte) []uint64 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.mu.kinds[kind]
}

// mark makes what there is survive a power cut. mu is held.
func (t *Tree) mark() error {
	if t.mu.failed != nil || t.mu.marked == t.mu.b.size {
		return t.mu.failed
	}
	root := t.mu.b.Root()
	b := binary.BigEndian.AppendUint64([]byte(markMagic), t.mu.b.size)
	b = binary.BigEndian.AppendUint64(append(b, root[:]...), uint64(t.mu.count))
	err := errors.Join(t.mu.file.Sync(), t.mu.index.Sync())
	if err == nil {
		err = replaceFile(filepath.Join(t.dir, markFile), t.mu.sum.Sum(b))
	}
	if err != nil {
		t.mu.failed = fmt.Errorf("the log's tree: %w", err)
		return t.mu.failed
	}
	t.mu.marked = t.mu.b.size
	return nil
}

// Close syncs the tree, so that opening it is quick, and closes its files.
func (t *Tree) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := errors.Join(t.mark(), t.mu.file.Close(), t.mu.index.Close())
	t.mu.failed = errors.New("the log's tree was closed")
	return err
}

func replaceFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Root is the hash of the tree's first size leaves.
func (t *Tree) Root(size uint64) (Hash, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if size == t.mu.b.size {
		return t.mu.b.Root(), nil
	}
	if err := t.check(size); err != nil {
		return Hash{}, err
	}
	return tlog.TreeHash(int64(size), tlog.HashReaderFunc(t.read))
}

// check says whether the tree has size leaves. mu is held.
func (t *Tree) check(size uint64) error {
	if size > t.mu.b.size {
		return fmt.Errorf("the log's tree has %d leaves, not %d", t.mu.b.size, size)
	}
	return nil
}

// Inclusion proves that the tree of the first size leaves has its leaf index.
func (t *Tree) Inclusion(index, size uint64) ([]Hash, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if err := t.check(size); err != nil {
		return nil, err
	}
	return tlog.ProveRecord(int64(size), int64(min(index, maxSize)), tlog.HashReaderFunc(t.read))
}

// Consistency proves that the tree of the first size leaves begins with that
// of the first old, which is at least 1.
func (t *Tree) Consistency(old, size uint64) ([]Hash, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if err := t.check(size); err != nil {
		return nil, err
	}
	return tlog.ProveTree(int64(size), int64(min(old, maxSize)), tlog.HashReaderFunc(t.read))
}

// Tile returns the first width hashes of the n-th tile of a level: 32 bytes
// each, the tile of tlog-tiles.
func (t *Tree) Tile(level int, n uint64, width int) ([]byte, error) {
	if level < 0 || level > 7 || width < 1 || width > TileWidth || n > maxSize>>TileHeight {
		return nil, fmt.Errorf("there is no tile %d of level %d with %d hashes", n, level, width)
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	hs, err := t.hashes(level, n*TileWidth, width)
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, width*HashSize)
	for _, h := range hs {
		b = append(b, h[:]...)
	}
	return b, nil
}

// hashes returns count hashes of a tile level from the from-th on, all in one
// tile. mu is held; the result is the caller's.
func (t *Tree) hashes(level int, from uint64, count int) ([]Hash, error) {
	have := t.mu.b.size >> (TileHeight * level)
	if from+uint64(count) > have {
		return nil, fmt.Errorf("the log's tree has %d hashes at level %d, not %d", have, level, from+uint64(count))
	}
	out := make([]Hash, count)
	if level > 0 {
		copy(out, t.mu.upper[level-1][from:])
		return out, nil
	}
	if first := have &^ (TileWidth - 1); from >= first {
		copy(out, t.mu.b.Tail(0)[from-first:])
		return out, nil
	}
	buf := make([]byte, count*HashSize)
	if _, err := t.mu.file.ReadAt(buf, int64(from)*HashSize); err != nil {
		return nil, fmt.Errorf("the log's tree: %w", err)
	}
	for i := range out {
		copy(out[i][:], buf[i*HashSize:])
	}
	return out, nil
}

// read is a tlog.HashReaderFunc. mu is held.
func (t *Tree) read(indexes []int64) ([]Hash, error) {
	out := make([]Hash, len(indexes))
	for i, x := range indexes {
		level, n := tlog.SplitStoredHashIndex(x)
		within := level % TileHeight
		hs, err := t.hashes(level/TileHeight, uint64(n)<<within, 1<<within)
		if err != nil {
			return nil, err
		}
		out[i] = subtree(hs)
	}
	return out, nil
}

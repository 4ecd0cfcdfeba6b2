package tlog

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
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
//	leaves  leaf hashes, 32 bytes each, in order; not synced by itself
//	mark    "SPTLOG1\n", be64 size, root over the first size leaves; replaced
//	        as a whole after the leaves were synced
//
// What is in leaves after the mark is not believed: after a power cut any part
// of it may be missing.
const (
	leavesFile = "leaves"
	markFile   = "mark"
	markMagic  = "SPTLOG1\n"
	markSize   = len(markMagic) + 8 + HashSize
)

// markEvery is after how many leaves Append makes a mark: what is computed anew
// from the events after a crash, some 10 ms of work.
const markEvery = 8192

// Tree keeps the hashes of a tree in a directory: leaves in a file, hashes of
// full tiles in memory (a 32-byte hash for 256 leaves, so 4 MB for 32 million
// events), everything between computed when it is asked for.
//
// Opening reads the file once: 32 bytes and one SHA-256 of two blocks for each
// event, about a second for a million. Safe for concurrent use.
type Tree struct {
	dir string
	mu  struct {
		sync.RWMutex
		file   *os.File
		b      Builder
		upper  [][]Hash // upper[l-1]: the hashes of level l, those of full tiles below
		marked uint64
		failed error // of a write: the file's end is not known any more
	}
}

// OpenTree opens or creates the tree in dir. Its size is what the newest mark
// covers; leaves after it are to be appended again. A tree that does not match
// its mark is emptied.
func OpenTree(dir string) (*Tree, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the log's tree: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, leavesFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the log's tree: %w", err)
	}
	t := &Tree{dir: dir}
	t.mu.file = f
	t.mu.b.Full = t.full
	if err := t.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("the log's tree: %w", err), f.Close())
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
	size, root, err := t.readMark()
	if err != nil || size == 0 {
		return errors.Join(err, t.reset())
	}
	r := bufio.NewReaderSize(io.NewSectionReader(t.mu.file, 0, int64(size)*HashSize), 256<<10)
	var h Hash
	for range size {
		if _, err := io.ReadFull(r, h[:]); err == io.EOF || err == io.ErrUnexpectedEOF {
			return t.reset()
		} else if err != nil {
			return err
		}
		t.mu.b.Append(h)
	}
	if t.mu.b.Root() != root {
		return t.reset()
	}
	t.mu.marked = size
	return t.mu.file.Truncate(int64(size) * HashSize)
}

// readMark returns a size of 0 when there is none or it is not whole.
func (t *Tree) readMark() (size uint64, root Hash, err error) {
	b, err := os.ReadFile(filepath.Join(t.dir, markFile))
	if errors.Is(err, fs.ErrNotExist) || err == nil && (len(b) != markSize || string(b[:len(markMagic)]) != markMagic) {
		return 0, root, nil
	}
	if err != nil {
		return 0, root, err
	}
	size = binary.BigEndian.Uint64(b[len(markMagic):])
	copy(root[:], b[len(markMagic)+8:])
	if size > maxSize {
		return 0, root, nil
	}
	return size, root, nil
}

// reset empties the tree. mu is held, or t not shared yet.
func (t *Tree) reset() error {
	t.mu.b = Builder{Full: t.full}
	t.mu.upper, t.mu.marked, t.mu.failed = nil, 0, nil
	if err := os.Remove(filepath.Join(t.dir, markFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return t.mu.file.Truncate(0)
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

// Append adds leaves. After an error the tree takes no more until it is opened
// anew.
func (t *Tree) Append(leaves ...Hash) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.failed != nil {
		return t.mu.failed
	}
	buf := make([]byte, 0, len(leaves)*HashSize)
	for _, h := range leaves {
		buf = append(buf, h[:]...)
	}
	if _, err := t.mu.file.WriteAt(buf, int64(t.mu.b.size)*HashSize); err != nil {
		t.mu.failed = fmt.Errorf("the log's tree: %w", err)
		return t.mu.failed
	}
	for _, h := range leaves {
		t.mu.b.Append(h)
	}
	if t.mu.b.size-t.mu.marked >= markEvery {
		return t.mark()
	}
	return nil
}

// mark makes what there is survive a power cut. mu is held.
func (t *Tree) mark() error {
	if t.mu.failed != nil || t.mu.marked == t.mu.b.size {
		return t.mu.failed
	}
	root := t.mu.b.Root()
	b := binary.BigEndian.AppendUint64([]byte(markMagic), t.mu.b.size)
	err := t.mu.file.Sync()
	if err == nil {
		err = replaceFile(filepath.Join(t.dir, markFile), append(b, root[:]...))
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
	err := errors.Join(t.mark(), t.mu.file.Close())
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

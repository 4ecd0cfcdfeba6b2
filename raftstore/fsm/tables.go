package fsm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/objstorage/objstorageprovider"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/event"
)

// maxTableBytes bounds each table of a received snapshot, before compression.
const maxTableBytes = 64 << 20

// Tables are a received snapshot as sorted tables in Dir, checked and synced,
// not yet the state.
type Tables struct {
	Dir   string  `json:"-"`
	Head  Head    `json:"head"`
	Files []Table `json:"files"` // in key order
}

// Table is one file of Tables.
type Table struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 []byte `json:"sha256"`
	First  []byte `json:"first"` // its smallest key
}

// Receive reads a snapshot's stream and writes it as tables into dir, which it
// creates. It checks everything that can be checked: order, limits, the chain
// of all events up to the head, that our own newest event is among them, the
// number of pairs, the hash. Memory is bounded; an error leaves files in dir
// for the caller to remove.
func (f *FSM) Receive(r io.Reader, dir string) (*Tables, error) {
	fs := f.cfg.FS
	s := &snapshotReader{r: bufio.NewReaderSize(r, 256<<10), hash: sha256.New()}
	h, err := SnapshotHead(s)
	if err != nil {
		return nil, err
	}
	if err := fs.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	t := &tables{fs: fs, dir: dir, opts: f.opts.MakeWriterOptions(0, f.db.TableFormat())}
	err = s.copyTo(t, f.head.Load(), &h)
	if err = errors.Join(err, t.close()); err != nil {
		return nil, fmt.Errorf("receive a snapshot: %w", err)
	}
	if err := syncDir(fs, dir); err != nil {
		return nil, err
	}
	return &Tables{Dir: dir, Head: h, Files: t.files}, nil
}

func syncDir(fs vfs.FS, dir string) error {
	d, err := fs.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Restore replaces the state by a snapshot's, in one step: readers see the one
// or the other, also after a crash. A snapshot that is not newer than the
// state leaves it alone. A snapshot that contradicts the state, event by
// event's chain, stops the node. rc is a *Received, or a stream.
func (f *FSM) Restore(rc io.ReadCloser) error {
	if err := f.haltedError(); err != nil {
		return err
	}
	if w, ok := rc.(raft.ReadCloserWrapper); ok {
		rc = w.WrappedReadCloser() // raft counts what is read
	}
	var err error
	if r, ok := rc.(*Received); ok {
		err = f.install(r.Tables)
	} else {
		err = f.restoreStream(rc)
	}
	if errors.Is(err, ErrDiverged) {
		f.halt(fmt.Errorf("restore a snapshot: %w", err))
		return f.haltedError()
	}
	if err != nil {
		return fmt.Errorf("restore a snapshot: %w", err)
	}
	return nil
}

// Received hands Tables to Restore through raft. It is no stream to read: a
// node whose state is older than its newest snapshot leads nobody.
type Received struct{ *Tables }

func (*Received) Read([]byte) (int, error) {
	return 0, errors.New("this snapshot is not restored yet and cannot be sent")
}

// Close does nothing.
func (*Received) Close() error { return nil }

// restoreDir is for tables of a stream that goes straight into the state.
func (f *FSM) restoreDir() string {
	return f.cfg.FS.PathJoin(f.cfg.FS.PathDir(f.cfg.Dir), f.cfg.FS.PathBase(f.cfg.Dir)+".restore")
}

func (f *FSM) restoreStream(r io.Reader) error {
	br := bufio.NewReaderSize(r, len(snapshotMagic)+headSize)
	b, err := br.Peek(len(snapshotMagic) + headSize)
	if err != nil {
		return fmt.Errorf("read a snapshot: %w", err)
	}
	h, err := SnapshotHead(bytes.NewReader(b))
	if err != nil {
		return err
	}
	if newer, err := f.compare(&h); err != nil || !newer {
		return err
	}
	fs, dir := f.cfg.FS, f.restoreDir()
	if err := fs.RemoveAll(dir); err != nil {
		return err
	}
	defer fs.RemoveAll(dir)
	t, err := f.Receive(br, dir)
	if err != nil {
		return err
	}
	return f.install(t)
}

// compare tells whether h is newer than the state. ErrDiverged: they cannot
// both be true.
func (f *FSM) compare(h *Head) (newer bool, err error) {
	now := *f.head.Load()
	if h.Applied <= now.Applied && h.Seq <= now.Seq {
		return false, checkChain(f.db, &now, &Command{Seq: h.Seq, Chain: h.Chain})
	}
	if h.Applied < now.Applied || h.Seq < now.Seq {
		return false, fmt.Errorf("%w: entry %d made event %d there, entry %d event %d here", ErrDiverged, h.Applied, h.Seq, now.Applied, now.Seq)
	}
	return true, nil
}

// Covers tells whether the state is at h or later; ErrDiverged if it can never
// have been at h.
func (f *FSM) Covers(h Head) (bool, error) {
	newer, err := f.compare(&h)
	return !newer && err == nil, err
}

// install makes tables the state. It moves their files away.
func (f *FSM) install(t *Tables) error {
	if newer, err := f.compare(&t.Head); err != nil || !newer {
		return err
	}
	if err := f.verify(t); err != nil {
		return err
	}
	f.history.stop()
	defer f.startHistory()
	paths := make([]string, len(t.Files))
	for i, file := range t.Files {
		paths[i] = f.cfg.FS.PathJoin(t.Dir, file.Name)
	}
	// The span ends after every family's prefix, which are all below 0x7f.
	_, err := f.db.IngestAndExcise(context.Background(), paths, nil, nil, pebble.KeyRange{Start: []byte{0}, End: []byte{0xff}})
	if err != nil {
		return err
	}
	h := t.Head
	if err := f.adopt(&h); err != nil {
		f.halt(err)
		return f.haltedError()
	}
	return f.Sync()
}

// verify reads the tables again: they may be from before a crash, and the state
// may have moved since. Their hashes must be right, and our newest event theirs.
func (f *FSM) verify(t *Tables) error {
	now := f.head.Load()
	ours := eventKey(now.Seq)
	holder := -1 // the table that has our newest event
	for i, file := range t.Files {
		if err := f.verifyHash(f.cfg.FS.PathJoin(t.Dir, file.Name), &file); err != nil {
			return err
		}
		if bytes.Compare(file.First, ours) <= 0 {
			holder = i
		}
	}
	if now.Seq == 0 {
		return nil
	}
	if holder < 0 {
		return fmt.Errorf("%w: event %d is missing there", ErrDiverged, now.Seq)
	}
	v, err := f.lookup(f.cfg.FS.PathJoin(t.Dir, t.Files[holder].Name), ours)
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(v, now.Chain[:]) {
		return fmt.Errorf("%w: event %d", ErrDiverged, now.Seq)
	}
	return nil
}

func (f *FSM) verifyHash(path string, want *Table) error {
	file, err := f.cfg.FS.Open(path, vfs.SequentialReadsOption)
	if err != nil {
		return err
	}
	h := sha256.New()
	n, err := io.Copy(h, file)
	if err = errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("read %s: %w", want.Name, err)
	}
	if n != want.Size || !bytes.Equal(h.Sum(nil), want.SHA256) {
		return fmt.Errorf("%s of a received snapshot is damaged", want.Name)
	}
	return nil
}

// lookup finds a key's value in a table; nil when it is not there.
func (f *FSM) lookup(path string, key []byte) (_ []byte, err error) {
	file, err := f.cfg.FS.Open(path)
	if err != nil {
		return nil, err
	}
	readable, err := sstable.NewSimpleReadable(file)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	r, err := sstable.NewReader(context.Background(), readable, f.opts.MakeReaderOptions())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	it, err := r.NewIter(sstable.NoTransforms, nil, nil, sstable.AssertNoBlobHandles)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	kv := it.SeekGE(key, 0)
	if kv == nil || !bytes.Equal(kv.K.UserKey, key) {
		return nil, it.Error()
	}
	v, _, err := kv.Value(nil)
	return bytes.Clone(v), err
}

// snapshotReader reads a snapshot's stream and hashes it on the way.
type snapshotReader struct {
	r    *bufio.Reader
	hash hash.Hash
}

func (s *snapshotReader) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	s.hash.Write(b[:n])
	return n, err
}

func (s *snapshotReader) ReadByte() (byte, error) {
	var b [1]byte
	_, err := io.ReadFull(s, b[:])
	return b[0], err
}

// copyTo writes the pairs to t and checks them, see Receive.
func (s *snapshotReader) copyTo(t *tables, ours, h *Head) error {
	var (
		last, key, value []byte
		pairs            uint64
		seq              uint64
		chain            [32]byte
		headSeen         bool
	)
	for {
		nk, err := binary.ReadUvarint(s)
		if err != nil {
			return err
		}
		if nk == 0 {
			break
		}
		nv, err := binary.ReadUvarint(s)
		if err != nil {
			return err
		}
		if nk > maxKey || nv > maxValue {
			return fmt.Errorf("a pair of %d and %d bytes", nk, nv)
		}
		key, value = grow(key, int(nk)), grow(value, int(nv))
		if _, err := io.ReadFull(s, key); err != nil {
			return err
		}
		if _, err := io.ReadFull(s, value); err != nil {
			return err
		}
		if bytes.Compare(key, last) <= 0 {
			return fmt.Errorf("key %q after %q", key, last)
		}
		last = append(last[:0], key...)
		pairs++

		switch {
		case key[0] == prefixEvent:
			seq++
			e, err := decodeEvent(seq, value)
			if err != nil {
				return err
			}
			if chain = event.Chain(chain, value[len(chain):]); chain != e.Chain {
				return fmt.Errorf("event %d breaks the chain", seq)
			}
			if seq == ours.Seq && chain != ours.Chain {
				return fmt.Errorf("%w: event %d", ErrDiverged, seq)
			}
		case bytes.Equal(key, keyHead):
			if headSeen = bytes.Equal(value, h.marshal()); !headSeen {
				return errors.New("two heads")
			}
		case bytes.Equal(key, keyFormat) && !bytes.Equal(value, []byte{stateFormat}):
			return fmt.Errorf("format %x, this build knows %d", value, stateFormat)
		}
		if err := t.set(key, value); err != nil {
			return err
		}
	}
	if !headSeen || seq != h.Seq || chain != h.Chain {
		return errors.New("the events do not lead to the head")
	}
	var count [8]byte
	if _, err := io.ReadFull(s, count[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(count[:]) != pairs {
		return errors.New("pairs are missing")
	}
	var sum [sha256.Size]byte
	if _, err := io.ReadFull(s.r, sum[:]); err != nil {
		return err
	}
	if !bytes.Equal(sum[:], s.hash.Sum(nil)) {
		return errors.New("the hash is wrong")
	}
	if _, err := s.r.ReadByte(); err != io.EOF {
		return errors.New("bytes after the end")
	}
	return nil
}

func grow(b []byte, n int) []byte {
	if cap(b) < n {
		return make([]byte, n, n+n/4)
	}
	return b[:n]
}

// tables writes ascending pairs into sstables.
type tables struct {
	fs    vfs.FS
	dir   string
	opts  sstable.WriterOptions
	w     *sstable.Writer // nil when none is open
	hash  *hashedFile     // what w writes to
	size  int             // of the pairs in it
	files []Table
}

func (t *tables) set(key, value []byte) error {
	if t.w == nil {
		name := fmt.Sprintf("%06d.sst", len(t.files))
		file, err := t.fs.Create(t.fs.PathJoin(t.dir, name), vfs.WriteCategoryUnspecified)
		if err != nil {
			return err
		}
		t.hash = &hashedFile{File: file, hash: sha256.New()}
		t.w = sstable.NewWriter(objstorageprovider.NewFileWritable(t.hash), t.opts)
		t.files = append(t.files, Table{Name: name, First: bytes.Clone(key)})
		t.size = 0
	}
	if err := t.w.Set(key, value); err != nil {
		return err
	}
	if t.size += len(key) + len(value); t.size > maxTableBytes {
		return t.close()
	}
	return nil
}

// close ends the open table, synced.
func (t *tables) close() error {
	if t.w == nil {
		return nil
	}
	w := t.w
	t.w = nil
	err := w.Close()
	last := &t.files[len(t.files)-1]
	last.Size, last.SHA256 = t.hash.n, t.hash.hash.Sum(nil)
	return err
}

// hashedFile hashes what is written to it; a table's writer only appends.
type hashedFile struct {
	vfs.File
	hash hash.Hash
	n    int64
}

func (h *hashedFile) Write(p []byte) (int, error) {
	h.hash.Write(p) // before the file has it: vfs.File.Write may change p
	h.n += int64(len(p))
	return h.File.Write(p)
}

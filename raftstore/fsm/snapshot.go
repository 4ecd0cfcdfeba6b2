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

// A snapshot is the whole state as one stream:
//
//	"SPSNAP1\n"
//	head, headSize bytes
//	pairs in key order: uvarint len(key), uvarint len(value), key, value
//	uvarint 0
//	be64 number of pairs
//	SHA-256 over everything before
const (
	snapshotMagic = "SPSNAP1\n"

	// maxKey and maxValue bound what a sender can make us hold: an aggregate's
	// name, an event.
	maxKey   = 1 + event.MaxAggregate
	maxValue = 32 + event.MaxPayload + 16<<10

	maxTableBytes = 64 << 20 // of each table a restore writes
)

// Snapshot pins the state as it is. raft calls it between two ApplyBatch; the
// copy is made by Persist, while entries go on being applied. raft may name a
// higher index in the snapshot's metadata than the head has, that of a barrier.
func (f *FSM) Snapshot() (raft.FSMSnapshot, error) {
	if err := f.haltedError(); err != nil {
		return nil, err
	}
	it, err := f.db.NewIter(nil) // an iterator, unlike a pebble.Snapshot, also outlives a restore
	if err != nil {
		return nil, fmt.Errorf("pin the state: %w", err)
	}
	return &snapshot{f: f, it: it, head: *f.head.Load()}, nil
}

type snapshot struct {
	f    *FSM
	it   *pebble.Iterator
	head Head
}

func (s *snapshot) Release() { s.it.Close() }

// Persist writes the snapshot. The state is synced first: raft deletes log
// entries afterwards, and from then on only the state has them.
func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	err := s.f.db.LogData(nil, pebble.Sync)
	if err == nil {
		err = s.write(sink)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write a snapshot: %w", err), sink.Cancel())
	}
	return sink.Close()
}

func (s *snapshot) write(w io.Writer) error {
	h := sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(w, h), 256<<10)
	out.WriteString(snapshotMagic)
	out.Write(s.head.marshal())
	n := uint64(0)
	var lens []byte
	for ok := s.it.First(); ok; ok = s.it.Next() {
		k := s.it.Key()
		v, err := s.it.ValueAndErr()
		if err != nil {
			return err
		}
		lens = binary.AppendUvarint(lens[:0], uint64(len(k)))
		lens = binary.AppendUvarint(lens, uint64(len(v)))
		out.Write(lens)
		out.Write(k)
		if _, err := out.Write(v); err != nil {
			return err
		}
		n++
	}
	if err := s.it.Error(); err != nil {
		return err
	}
	out.WriteByte(0)
	out.Write(binary.BigEndian.AppendUint64(nil, n))
	if err := out.Flush(); err != nil {
		return err
	}
	_, err := w.Write(h.Sum(nil))
	return err
}

// SnapshotHead reads the head of a snapshot, and only that.
func SnapshotHead(r io.Reader) (Head, error) {
	b := make([]byte, len(snapshotMagic)+headSize)
	if _, err := io.ReadFull(r, b); err != nil {
		return Head{}, fmt.Errorf("read a snapshot: %w", err)
	}
	if string(b[:len(snapshotMagic)]) != snapshotMagic {
		return Head{}, errors.New("read a snapshot: not one of ours, or of a newer build")
	}
	return unmarshalHead(b[len(snapshotMagic):])
}

// Restore replaces the state by a snapshot's, in one step: readers see the one
// or the other, also after a crash. A snapshot that is not newer than the
// state leaves it alone. A snapshot that contradicts the state, event by
// event's chain, stops the node.
func (f *FSM) Restore(rc io.ReadCloser) error {
	if err := f.haltedError(); err != nil {
		return err
	}
	h, err := f.restore(rc)
	if errors.Is(err, ErrDiverged) {
		f.halt(fmt.Errorf("restore a snapshot: %w", err))
		return f.haltedError()
	}
	if err != nil {
		return fmt.Errorf("restore a snapshot: %w", err)
	}
	if h != nil {
		f.publish(h)
	}
	return nil
}

func (f *FSM) restoreDir() string {
	return f.cfg.FS.PathJoin(f.cfg.FS.PathDir(f.cfg.Dir), f.cfg.FS.PathBase(f.cfg.Dir)+".restore")
}

func (f *FSM) restore(r io.Reader) (*Head, error) {
	s := &snapshotReader{hash: sha256.New()}
	s.r = bufio.NewReaderSize(r, 256<<10)
	h, err := SnapshotHead(s)
	if err != nil {
		return nil, err
	}
	now := *f.head.Load()
	if h.Applied <= now.Applied && h.Seq <= now.Seq {
		return nil, checkChain(f.db, &now, &Command{Seq: h.Seq, Chain: h.Chain})
	}
	if h.Applied < now.Applied || h.Seq < now.Seq {
		return nil, fmt.Errorf("%w: entry %d made event %d there, entry %d event %d here", ErrDiverged, h.Applied, h.Seq, now.Applied, now.Seq)
	}

	fs, dir := f.cfg.FS, f.restoreDir()
	if err := fs.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := fs.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	defer fs.RemoveAll(dir)
	t := &tables{fs: fs, dir: dir, opts: f.opts.MakeWriterOptions(0, f.db.TableFormat())}
	err = s.copyTo(t, &now, &h)
	if err = errors.Join(err, t.close()); err != nil {
		return nil, err
	}
	// The span ends after every family's prefix, which are all below 0x7f.
	_, err = f.db.IngestAndExcise(context.Background(), t.paths, nil, nil, pebble.KeyRange{Start: []byte{0}, End: []byte{0xff}})
	if err != nil {
		return nil, err
	}
	return &h, f.db.LogData(nil, pebble.Sync)
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

// copyTo writes the pairs to t and checks everything that can be checked:
// order, limits, the events' chain from the first to the head, that our own
// newest event is among them, the number of pairs and the hash.
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
	size  int
	paths []string
}

func (t *tables) set(key, value []byte) error {
	if t.w == nil {
		path := t.fs.PathJoin(t.dir, fmt.Sprintf("%06d.sst", len(t.paths)))
		file, err := t.fs.Create(path, vfs.WriteCategoryUnspecified)
		if err != nil {
			return err
		}
		t.w = sstable.NewWriter(objstorageprovider.NewFileWritable(file), t.opts)
		t.paths = append(t.paths, path)
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

func (t *tables) close() error {
	if t.w == nil {
		return nil
	}
	w := t.w
	t.w = nil
	return w.Close()
}

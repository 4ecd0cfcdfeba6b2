package fsm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/bits"

	"github.com/cockroachdb/pebble/v2"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/event"
)

// A snapshot on its way to another node is the whole state as one stream:
//
//	"SPSNAP1\n"
//	head, headSize bytes
//	pairs in key order: uvarint len(key), uvarint len(value), key, value
//	uvarint 0
//	be64 number of pairs
//	SHA-256 over everything before
//
// At rest it is nothing of the kind: a snapshot this node takes is its head
// alone, since the state itself holds all of it, and a snapshot it receives is
// written as tables while it comes in (tables.go).
const (
	snapshotMagic = "SPSNAP1\n"

	// maxKey and maxValue bound what a sender can make us hold: an aggregate's
	// name in the history, where it is escaped, and an event.
	maxKey   = 2 + 2*event.MaxAggregate + 2 + 12
	maxValue = 32 + event.MaxPayload + 16<<10

	exportBuffer = 256 << 10
)

// StateSink is a raft.SnapshotSink that keeps a head instead of a copy: the
// state, synced up to it, is the snapshot.
type StateSink interface{ KeepState(Head) error }

// Snapshot remembers where the state stands, which takes microseconds. raft
// calls it between two ApplyBatch. raft may name a higher index in the
// snapshot's metadata than the head has, that of a barrier.
func (f *FSM) Snapshot() (raft.FSMSnapshot, error) {
	if err := f.haltedError(); err != nil {
		return nil, err
	}
	return &snapshot{f: f, head: *f.head.Load()}, nil
}

type snapshot struct {
	f    *FSM
	head Head
}

func (s *snapshot) Release() {}

// Persist syncs the state and gives the sink its head; it copies no data. The
// state must be synced first: raft deletes log entries afterwards, and from
// then on only the state has them. The sink must be a StateSink.
func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	k, ok := sink.(StateSink)
	if !ok {
		return errors.Join(fmt.Errorf("write a snapshot: %T keeps no head", sink), sink.Cancel())
	}
	err := s.f.Sync()
	if err == nil {
		err = k.KeepState(s.head)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write a snapshot: %w", err), sink.Cancel())
	}
	return sink.Close()
}

// Sync makes everything applied so far durable.
func (f *FSM) Sync() error { return f.db.LogData(nil, pebble.Sync) }

// Export is the state, as it was when Export was called, as a stream of Size
// bytes. It is read by one goroutine and must be closed: until then the
// database keeps what it has replaced since.
type Export struct {
	Head Head
	Size int64

	it           *pebble.Iterator
	ok           bool // it is at a pair
	pairs        uint64
	hash         hash.Hash
	buf          bytes.Buffer // what comes next, at most exportBuffer and a pair
	begun, ended bool         // the first, the last of the stream was put into buf
}

// Export pins the state and finds the size of its stream, which needs one walk
// over it: the receiver is told the size before the first byte.
func (f *FSM) Export() (*Export, error) {
	if err := f.haltedError(); err != nil {
		return nil, err
	}
	it, err := f.db.NewIter(nil) // an iterator, unlike a pebble.Snapshot, also outlives a restore
	if err != nil {
		return nil, fmt.Errorf("pin the state: %w", err)
	}
	e := &Export{it: it, hash: sha256.New(), Size: int64(len(snapshotMagic) + headSize + 1 + 8 + sha256.Size)}
	if err := e.measure(); err != nil {
		return nil, errors.Join(fmt.Errorf("measure the state: %w", err), it.Close())
	}
	return e, nil
}

func (e *Export) measure() error {
	headSeen := false
	for ok := e.it.First(); ok; ok = e.it.Next() {
		k := e.it.Key()
		v, err := e.it.ValueAndErr()
		if err != nil {
			return err
		}
		e.Size += int64(uvarintLen(len(k)) + uvarintLen(len(v)) + len(k) + len(v))
		if bytes.Equal(k, keyHead) {
			if e.Head, err = unmarshalHead(v); err != nil {
				return err
			}
			headSeen = true
		}
	}
	if err := e.it.Error(); err != nil {
		return err
	}
	if !headSeen {
		return errors.New("the state has no head")
	}
	return nil
}

func uvarintLen(n int) int { return (bits.Len64(uint64(n)|1) + 6) / 7 }

// Read reads the stream.
func (e *Export) Read(p []byte) (int, error) {
	for e.buf.Len() == 0 {
		if e.ended {
			return 0, io.EOF
		}
		if err := e.fill(); err != nil {
			return 0, fmt.Errorf("read the state: %w", err)
		}
	}
	return e.buf.Read(p)
}

// fill puts the next part of the stream into the empty buffer.
func (e *Export) fill() error {
	if !e.begun {
		e.begun = true
		e.buf.WriteString(snapshotMagic)
		e.buf.Write(e.Head.marshal())
		e.ok = e.it.First()
	}
	var lens []byte
	for ; e.ok && e.buf.Len() < exportBuffer; e.ok = e.it.Next() {
		k := e.it.Key()
		v, err := e.it.ValueAndErr()
		if err != nil {
			return err
		}
		lens = binary.AppendUvarint(lens[:0], uint64(len(k)))
		e.buf.Write(binary.AppendUvarint(lens, uint64(len(v))))
		e.buf.Write(k)
		e.buf.Write(v)
		e.pairs++
	}
	if e.ok {
		e.hash.Write(e.buf.Bytes())
		return nil
	}
	if err := e.it.Error(); err != nil {
		return err
	}
	e.buf.WriteByte(0)
	e.buf.Write(binary.BigEndian.AppendUint64(nil, e.pairs))
	e.hash.Write(e.buf.Bytes())
	e.buf.Write(e.hash.Sum(nil))
	e.ended = true
	return nil
}

// Close lets go of the state.
func (e *Export) Close() error { return e.it.Close() }

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

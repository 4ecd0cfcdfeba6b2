package fsm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"github.com/sallyport/sallyport/raftstore/event"
)

// Limits of one read, so that a reader far behind costs bounded memory.
const (
	MaxRead      = 1024    // events
	maxReadBytes = 8 << 20 // of envelopes, but always one event
)

// Head is where the state stands.
func (f *FSM) Head() Head { return *f.head.Load() }

// Level is the cluster's feature level.
func (f *FSM) Level() uint32 { return f.level.Load() }

// Err is why the state machine stopped, nil while it runs.
func (f *FSM) Err() error { return f.haltedError() }

// Changed is closed when the head moves next. Take it before looking at Head.
func (f *FSM) Changed() <-chan struct{} {
	f.changed.Lock()
	defer f.changed.Unlock()
	return f.changed.c
}

// ByID finds the event with an idempotency id.
func (f *FSM) ByID(id event.ID) (event.Event, bool, error) { return byID(f.db, id) }

// Version is an aggregate's, 0 when it does not exist.
func (f *FSM) Version(aggregate string) (uint64, error) { return version(f.db, aggregate) }

// AtIndex returns the events of a log entry, none if it had none.
func (f *FSM) AtIndex(index uint64) ([]event.Event, error) {
	v, err := get(f.db, indexKey(index))
	if err != nil || v == nil {
		return nil, err
	}
	if len(v) != 12 {
		return nil, fmt.Errorf("index %d: %w", index, event.ErrCorrupt)
	}
	first := binary.BigEndian.Uint64(v)
	return f.read(first, first+uint64(binary.BigEndian.Uint32(v[8:])), ^uint64(0))
}

// Events returns up to max events from seq on, in order and without gaps;
// fewer than there are when a limit of one read is met, none when there are
// none yet.
func (f *FSM) Events(from uint64, max int) ([]event.Event, error) {
	if max <= 0 || max > MaxRead {
		max = MaxRead
	}
	if from == 0 {
		from = 1
	}
	// A batch being committed while we read shows up to the iterator at once;
	// the head bounds what was published.
	end := f.head.Load().Seq + 1
	if from >= end {
		return nil, nil
	}
	return f.read(from, min(end, from+uint64(max)), maxReadBytes)
}

// Stored is an event as it is stored.
type Stored struct {
	Seq      uint64
	Chain    [32]byte // over all events up to this one
	Envelope []byte   // what was hashed, verbatim: see event.UnmarshalEnvelope
}

// Envelopes is Events without decoding.
func (f *FSM) Envelopes(from uint64, max int) ([]Stored, error) {
	if max <= 0 || max > MaxRead {
		max = MaxRead
	}
	if from == 0 {
		from = 1
	}
	end := f.head.Load().Seq + 1
	if from >= end {
		return nil, nil
	}
	end = min(end, from+uint64(max))
	it, err := f.db.NewIter(&pebble.IterOptions{LowerBound: eventKey(from), UpperBound: eventKey(end)})
	if err != nil {
		return nil, err
	}
	defer it.Close()
	var (
		out  []Stored
		size int
	)
	for ok := it.First(); ok; ok = it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			return nil, err
		}
		s := Stored{Seq: from + uint64(len(out))}
		if len(v) <= len(s.Chain) || !bytes.Equal(it.Key(), eventKey(s.Seq)) {
			return nil, fmt.Errorf("event %d: %w", s.Seq, event.ErrCorrupt)
		}
		if size += len(v); size > maxReadBytes && len(out) > 0 {
			return out, nil
		}
		s.Envelope = append([]byte(nil), v[copy(s.Chain[:], v):]...)
		out = append(out, s)
	}
	if err := it.Error(); err != nil {
		return nil, err
	}
	if uint64(len(out)) != end-from {
		return nil, fmt.Errorf("event %d is missing: %w", from+uint64(len(out)), event.ErrCorrupt)
	}
	return out, nil
}

// read returns the events from up to, not including, end.
func (f *FSM) read(from, end, maxBytes uint64) ([]event.Event, error) {
	it, err := f.db.NewIter(&pebble.IterOptions{LowerBound: eventKey(from), UpperBound: eventKey(end)})
	if err != nil {
		return nil, err
	}
	defer it.Close()
	var (
		events []event.Event
		size   uint64
	)
	for ok := it.First(); ok; ok = it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			return nil, err
		}
		if size += uint64(len(v)); size > maxBytes && len(events) > 0 {
			return events, nil
		}
		want := from + uint64(len(events))
		e, err := decodeEvent(want, v)
		if err != nil {
			return nil, err
		}
		events = append(events, e)
	}
	if err := it.Error(); err != nil {
		return nil, err
	}
	if uint64(len(events)) != end-from {
		return nil, fmt.Errorf("event %d is missing: %w", from+uint64(len(events)), event.ErrCorrupt)
	}
	return events, nil
}

func decodeEvent(seq uint64, v []byte) (event.Event, error) {
	var e event.Event
	if len(v) < len(e.Chain) {
		return e, fmt.Errorf("event %d: %w", seq, event.ErrCorrupt)
	}
	e, err := event.UnmarshalEnvelope(v[len(e.Chain):])
	if err != nil {
		return e, fmt.Errorf("event %d: %w", seq, err)
	}
	if e.Seq != seq {
		return e, fmt.Errorf("event %d stands in place of %d: %w", e.Seq, seq, event.ErrCorrupt)
	}
	copy(e.Chain[:], v)
	return e, nil
}

func byID(r pebble.Reader, id event.ID) (event.Event, bool, error) {
	v, err := get(r, prefixed(prefixID, id[:]))
	if err != nil || v == nil {
		return event.Event{}, false, err
	}
	seq := binary.BigEndian.Uint64(v)
	if v, err = get(r, eventKey(seq)); err != nil {
		return event.Event{}, false, err
	}
	e, err := decodeEvent(seq, v)
	return e, err == nil, err
}

func version(r pebble.Reader, aggregate string) (uint64, error) {
	v, err := get(r, prefixed(prefixAggregate, []byte(aggregate)))
	if err != nil || v == nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(v), nil
}

func readLevel(r pebble.Reader) (uint32, error) {
	v, err := get(r, keyLevel)
	if err != nil || v == nil {
		return event.BaseLevel, err
	}
	if len(v) != 4 {
		return 0, fmt.Errorf("feature level: %w", event.ErrCorrupt)
	}
	return binary.BigEndian.Uint32(v), nil
}

// get copies a value; nil says that there is none. Our values are never empty.
func get(r pebble.Reader, key []byte) ([]byte, error) {
	v, c, err := r.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", key, err)
	}
	defer c.Close()
	return append([]byte{}, v...), nil
}

package fsm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"

	"github.com/cockroachdb/pebble/v2"

	"github.com/sallyport/sallyport/raftstore/event"
)

// The history is the index behind time travel: for each aggregate its events,
// newest first, so that what an aggregate was at a Raft index is one seek. New
// events enter it in their own batch. Those stored by a build that did not
// keep it, or kept it in another form, are added in the background; until that
// is done readers are told ErrBuilding.
//
// It is a function of the events alone and decides nothing, so building it
// beside the applying does not touch determinism.

// historyVersion is that of the code below. A change of what is stored is
// another version, under another prefix, built anew; the old one is deleted
// when the new one is complete.
const historyVersion = 1

// ErrBuilding says that the past cannot be read yet: the history is being
// built from the events, after an upgrade. It takes about a minute for ten
// million events.
var ErrBuilding = errors.New("the history of the events is being built, try again soon")

// historyKey is H, the version, the aggregate with 0x00 written as 0x00 0xff,
// 0x00 0x01, and the complements of index and position: aggregates stand in
// their order, and the newest event of each first.
func historyKey(aggregate string, index uint64, sub uint32) []byte {
	k := append(historyAggregate(aggregate), 0x00, 0x01)
	k = binary.BigEndian.AppendUint64(k, ^index)
	return binary.BigEndian.AppendUint32(k, ^sub)
}

// historyAggregate is what the keys of all aggregates begin with whose names
// begin with name.
func historyAggregate(name string) []byte {
	k := make([]byte, 0, 2+len(name)+2+12)
	k = append(k, prefixHistory, historyVersion)
	for i := range len(name) {
		if k = append(k, name[i]); name[i] == 0 {
			k = append(k, 0xff)
		}
	}
	return k
}

// parseHistoryKey returns the aggregate and the index.
func parseHistoryKey(k []byte) (aggregate string, index uint64, err error) {
	end := len(k) - 14
	if end < 2 || k[end] != 0x00 || k[end+1] != 0x01 {
		return "", 0, fmt.Errorf("history: %w", event.ErrCorrupt)
	}
	name := bytes.ReplaceAll(k[2:end], []byte{0x00, 0xff}, []byte{0x00})
	return string(name), ^binary.BigEndian.Uint64(k[end+2:]), nil
}

func writeHistory(b *pebble.Batch, upTo uint64) error {
	return b.Set(keyHistory, binary.BigEndian.AppendUint64([]byte{historyVersion}, upTo), nil)
}

// gap is the events that are not in the history yet: from up to, not
// including, to.
type gap struct{ from, to uint64 }

func (g gap) marshal() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, g.from), g.to)
}

func readGap(r pebble.Reader) (gap, error) {
	v, err := get(r, keyHistoryGap)
	if err != nil || v == nil {
		return gap{}, err
	}
	if len(v) != 16 {
		return gap{}, fmt.Errorf("history: %w", event.ErrCorrupt)
	}
	return gap{binary.BigEndian.Uint64(v), binary.BigEndian.Uint64(v[8:])}, nil
}

// adoptHistory finds out which events the history lacks: all when there is
// none or one of another version, and those that an older build stored.
func (f *FSM) adoptHistory(h *Head) error {
	v, err := get(f.db, keyHistory)
	if err != nil {
		return err
	}
	g, err := readGap(f.db)
	if err != nil {
		return err
	}
	switch {
	case len(v) != 9 || v[0] != historyVersion:
		g = gap{1, h.Seq + 1}
	case binary.BigEndian.Uint64(v[1:]) == h.Seq:
		return nil
	case g.from == 0:
		g = gap{binary.BigEndian.Uint64(v[1:]) + 1, h.Seq + 1}
	default:
		g.to = h.Seq + 1
	}
	b := f.db.NewBatch()
	defer b.Close()
	if err := writeHistory(b, h.Seq); err != nil {
		return err
	}
	if g.from < g.to {
		err = b.Set(keyHistoryGap, g.marshal(), nil)
	} else {
		err = b.Delete(keyHistoryGap, nil)
	}
	if err != nil {
		return err
	}
	return b.Commit(pebble.NoSync)
}

// builder is the goroutine that fills the history's gap.
type builder struct {
	quit chan struct{} // nil while none runs
	done chan struct{}
}

// stop ends the builder and waits for it.
func (h *builder) stop() {
	if h.quit != nil {
		close(h.quit)
		<-h.done
		h.quit = nil
	}
}

// startHistory starts the builder if there is a gap. It is called where stop
// may be: at the start, and by the goroutine that restores.
func (f *FSM) startHistory() {
	g, err := readGap(f.db)
	if err != nil {
		f.halt(err)
		return
	}
	if g.from == 0 {
		return
	}
	f.cfg.Log.Info("building the history of events stored by an earlier build", "from", g.from, "to", g.to-1)
	quit, done := make(chan struct{}), make(chan struct{})
	f.history = builder{quit, done}
	go func() {
		defer close(done)
		if err := f.buildHistory(g, quit); err != nil {
			f.halt(fmt.Errorf("build the history: %w", err))
		}
	}()
}

// Limits of one step of the builder, so that it can be stopped and holds
// little.
const (
	buildEvents = 512
	buildBytes  = 4 << 20
)

func (f *FSM) buildHistory(g gap, quit <-chan struct{}) error {
	for g.from < g.to {
		select {
		case <-quit:
			return nil
		default:
		}
		events, err := f.read(g.from, min(g.to, g.from+buildEvents), buildBytes)
		if err != nil {
			return err
		}
		b := f.db.NewBatch()
		for i := range events {
			e := &events[i]
			err = errors.Join(err, b.Set(historyKey(e.Aggregate, e.Index, e.Sub), binary.BigEndian.AppendUint64(nil, e.Seq), nil))
		}
		g.from += uint64(len(events))
		if g.from < g.to {
			err = errors.Join(err, b.Set(keyHistoryGap, g.marshal(), nil))
		} else {
			err = errors.Join(err, b.Delete(keyHistoryGap, nil), deleteOtherHistories(b))
		}
		if err == nil {
			err = b.Commit(pebble.NoSync)
		}
		if err = errors.Join(err, b.Close()); err != nil {
			return err
		}
	}
	f.cfg.Log.Info("the history of events is complete")
	return nil
}

func deleteOtherHistories(b *pebble.Batch) error {
	return errors.Join(
		b.DeleteRange([]byte{prefixHistory}, []byte{prefixHistory, historyVersion}, nil),
		b.DeleteRange([]byte{prefixHistory, historyVersion + 1}, []byte{prefixHistory + 1}, nil),
	)
}

// complete is ErrBuilding while there is a gap.
func (f *FSM) complete() error {
	g, err := readGap(f.db)
	if err == nil && g.from > 0 {
		err = fmt.Errorf("%w (%d events to go)", ErrBuilding, g.to-g.from)
	}
	return err
}

// SeqAt is the newest event at a Raft index or before it, 0 for none.
func (f *FSM) SeqAt(index uint64) (uint64, error) {
	h := f.Head()
	if index >= h.Index {
		return h.Seq, nil
	}
	it, err := f.db.NewIter(&pebble.IterOptions{LowerBound: []byte{prefixIndex}, UpperBound: indexKey(index + 1)})
	if err != nil {
		return 0, err
	}
	defer it.Close()
	if !it.Last() {
		return 0, it.Error()
	}
	v, err := it.ValueAndErr()
	if err != nil {
		return 0, err
	}
	if len(v) != 12 {
		return 0, fmt.Errorf("index %d: %w", index, event.ErrCorrupt)
	}
	return binary.BigEndian.Uint64(v) + uint64(binary.BigEndian.Uint32(v[8:])) - 1, nil
}

// SeqAtTime is the newest event at a time or before it, in ns since 1970, 0
// for none.
func (f *FSM) SeqAtTime(nanos int64) (uint64, error) {
	var failed error
	n := sort.Search(int(f.Head().Seq), func(i int) bool { // the first event after it
		if failed != nil {
			return true
		}
		e, err := f.Event(uint64(i) + 1)
		failed = err
		return err != nil || e.Time.UnixNano() > nanos
	})
	return uint64(n), failed
}

// Event is the event with a number; ErrCorrupt if there is none.
func (f *FSM) Event(seq uint64) (event.Event, error) {
	v, err := get(f.db, eventKey(seq))
	if err != nil {
		return event.Event{}, err
	}
	return decodeEvent(seq, v)
}

// History calls fn with the numbers of an aggregate's events up to event seq,
// newest first, until it returns false.
func (f *FSM) History(aggregate string, seq uint64, fn func(seq uint64) bool) error {
	if err := f.complete(); err != nil {
		return err
	}
	lower := append(historyAggregate(aggregate), 0x00, 0x01)
	upper := append(historyAggregate(aggregate), 0x00, 0x02)
	at := lower
	if seq < f.Head().Seq {
		e, err := f.Event(seq)
		if err != nil {
			return err
		}
		at = historyKey(aggregate, e.Index, e.Sub)
	}
	it, err := f.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return err
	}
	defer it.Close()
	for ok := it.SeekGE(at); ok; ok = it.Next() {
		n, err := historySeq(it)
		if err != nil {
			return err
		}
		if n <= seq && !fn(n) {
			return nil
		}
	}
	return it.Error()
}

// Aggregates calls fn, in the order of their names, with every aggregate whose
// name begins with prefix and that had an event up to event seq, and with the
// number of its newest one, until it returns false. It costs two seeks for
// each.
func (f *FSM) Aggregates(prefix string, seq uint64, fn func(aggregate string, newest uint64) bool) error {
	if err := f.complete(); err != nil || seq == 0 {
		return err
	}
	e, err := f.Event(seq)
	if err != nil {
		return err
	}
	lower := historyAggregate(prefix)
	it, err := f.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: after(lower)})
	if err != nil {
		return err
	}
	defer it.Close()
	for ok := it.First(); ok; {
		name, _, err := parseHistoryKey(it.Key())
		if err != nil {
			return err
		}
		next := append(historyAggregate(name), 0x00, 0x02)
		if it.SeekGE(historyKey(name, e.Index, e.Sub)) && bytes.Compare(it.Key(), next) < 0 {
			n, err := historySeq(it)
			if err != nil {
				return err
			}
			if !fn(name, n) {
				return nil
			}
		}
		ok = it.SeekGE(next)
	}
	return it.Error()
}

func historySeq(it *pebble.Iterator) (uint64, error) {
	v, err := it.ValueAndErr()
	if err == nil && len(v) != 8 {
		err = fmt.Errorf("history: %w", event.ErrCorrupt)
	}
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(v), nil
}

// after is the smallest key above all that begin with prefix.
func after(prefix []byte) []byte {
	k := bytes.Clone(prefix)
	for len(k) > 0 && k[len(k)-1] == 0xff {
		k = k[:len(k)-1]
	}
	k[len(k)-1]++ // the family's letter at least is below 0xff
	return k
}

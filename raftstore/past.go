package raftstore

import (
	"time"

	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fsm"
)

// ErrBuilding says that the past cannot be read yet: after an upgrade from a
// build that kept no history, it is being built in the background.
var ErrBuilding = fsm.ErrBuilding

// past calls f while the databases are open.
func past[T any](s *Store, f func(*fsm.FSM) (T, error)) (T, error) {
	end, err := s.begin()
	if err != nil {
		var none T
		return none, err
	}
	defer end()
	return f(s.state)
}

// Event is the event with a number, which must exist: see Head.
func (s *Store) Event(seq uint64) (event.Event, error) {
	return past(s, func(f *fsm.FSM) (event.Event, error) { return f.Event(seq) })
}

// SeqAt is the newest event at a Raft index or before it, 0 for none. The
// state as of an index is that of all events up to this one.
func (s *Store) SeqAt(index uint64) (uint64, error) {
	return past(s, func(f *fsm.FSM) (uint64, error) { return f.SeqAt(index) })
}

// SeqAtTime is the newest event at a time or before it, 0 for none.
func (s *Store) SeqAtTime(t time.Time) (uint64, error) {
	return past(s, func(f *fsm.FSM) (uint64, error) { return f.SeqAtTime(t.UnixNano()) })
}

// History calls fn with the numbers of an aggregate's events up to event seq,
// newest first, until it returns false: one seek, then a step for each. fn must
// not call Close.
func (s *Store) History(aggregate string, seq uint64, fn func(seq uint64) bool) error {
	_, err := past(s, func(f *fsm.FSM) (struct{}, error) { return struct{}{}, f.History(aggregate, seq, fn) })
	return err
}

// Aggregates calls fn, in the order of their names, with every aggregate whose
// name begins with prefix and that existed as of event seq, and with the number
// of its newest event then, until it returns false. fn must not call Close.
func (s *Store) Aggregates(prefix string, seq uint64, fn func(aggregate string, newest uint64) bool) error {
	_, err := past(s, func(f *fsm.FSM) (struct{}, error) { return struct{}{}, f.Aggregates(prefix, seq, fn) })
	return err
}

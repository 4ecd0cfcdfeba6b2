package raftstore

import (
	"context"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fsm"
)

// begin holds the databases open until end; it fails once the store is closed.
func (s *Store) begin() (end func(), err error) {
	s.use.RLock()
	if s.use.closed {
		s.use.RUnlock()
		return nil, ErrClosed
	}
	return s.use.RUnlock, nil
}

// ByID finds the event with an idempotency id among those applied here.
func (s *Store) ByID(id event.ID) (event.Event, bool, error) {
	end, err := s.begin()
	if err != nil {
		return event.Event{}, false, err
	}
	defer end()
	return s.state.ByID(id)
}

// Events returns up to max events from number from on, in order and without
// gaps; none when there are none yet. One call returns at most fsm.MaxRead
// events or 8 MiB: ask again from the last one on.
func (s *Store) Events(from uint64, max int) ([]event.Event, error) {
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	return s.state.Events(from, max)
}

// StoredEvent is an event's envelope and the chain at it.
type StoredEvent = fsm.Stored

// Envelopes is Events without decoding: the bytes that were hashed.
func (s *Store) Envelopes(from uint64, max int) ([]StoredEvent, error) {
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	return s.state.Envelopes(from, max)
}

// AtIndex returns the events of one Raft log entry.
func (s *Store) AtIndex(index uint64) ([]event.Event, error) {
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	return s.state.AtIndex(index)
}

// Version is an aggregate's here, 0 when it does not exist or cannot be read.
// Proposals that expect it are checked when they are applied, so a wrong
// answer can do no harm.
func (s *Store) Version(aggregate string) uint64 {
	end, err := s.begin()
	if err != nil {
		return 0
	}
	defer end()
	v, err := s.state.Version(aggregate)
	if err != nil {
		s.log.Error("read an aggregate's version", "aggregate", aggregate, "error", err)
	}
	return v
}

// FeatureLevel is the level the cluster has agreed on, as applied here: events
// that need a higher one cannot be appended. See event.Encode.
func (s *Store) FeatureLevel() uint32 { return s.state.Level() }

// Head is the newest event applied here, the Raft index applied up to, and the
// hash chain over all events.
func (s *Store) Head() (seq, index uint64, chain [32]byte) {
	h := s.state.Head()
	return h.Seq, h.Applied, h.Chain
}

// Follow calls fn with all events from number from on, those there and those
// to come, in order and without gaps, until ctx ends or fn returns an error,
// which it returns. It wakes when events are applied, not by a clock. fn may be
// slow: nothing is queued for it.
func (s *Store) Follow(ctx context.Context, from uint64, fn func([]event.Event) error) error {
	if from == 0 {
		from = 1
	}
	for {
		if err := s.wait(ctx, func(h fsm.Head) bool { return h.Seq >= from }); err != nil {
			return err
		}
		events, err := s.Events(from, fsm.MaxRead)
		if err != nil {
			return err
		}
		if err := fn(events); err != nil {
			return err
		}
		from += uint64(len(events))
	}
}

// WaitSeq returns when event seq is applied here.
func (s *Store) WaitSeq(ctx context.Context, seq uint64) error {
	return s.wait(ctx, func(h fsm.Head) bool { return h.Seq >= seq })
}

// WaitIndex returns when a Raft index is applied here: that of an event or of
// a head.
func (s *Store) WaitIndex(ctx context.Context, index uint64) error {
	return s.wait(ctx, func(h fsm.Head) bool { return h.Applied >= index })
}

func (s *Store) wait(ctx context.Context, reached func(fsm.Head) bool) error {
	for {
		changed := s.state.Changed()
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if reached(s.state.Head()) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
		case <-s.fatal.c:
			return s.fatal.err
		case <-s.done:
			return ErrClosed
		}
	}
}

// Leader is the leader as this node knows it, "" when it knows none.
func (s *Store) Leader() (id, addr string) {
	a, i := s.raft.Load().LeaderWithID()
	return string(i), string(a)
}

// IsLeader tells whether this node believes to be the leader. It may be wrong
// for up to HeartbeatTimeout; Append and Barrier are not fooled.
func (s *Store) IsLeader() bool { return s.raft.Load().State() == raft.Leader }

// LeaderChanges has one token after leadership changed, here or elsewhere, any
// number of times. It is for one reader.
func (s *Store) LeaderChanges() <-chan struct{} { return s.leader }

func (s *Store) leaderChanged() {
	select {
	case s.leader <- struct{}{}:
	default:
	}
}

// watchLeadership drains raft's NotifyCh, on which raft would block.
func (s *Store) watchLeadership() {
	for {
		select {
		case <-s.notify:
			s.leaderChanged()
		case <-s.done:
			return
		}
	}
}

// Member is a server of the cluster's configuration.
type Member struct {
	ID, Addr string
	Voter    bool
	Leader   bool // as this node knows it
}

// Members is the newest configuration this node has, committed or not.
func (s *Store) Members() ([]Member, error) {
	f := s.raft.Load().GetConfiguration()
	if err := f.Error(); err != nil {
		return nil, err
	}
	leader, _ := s.Leader()
	var ms []Member
	for _, v := range f.Configuration().Servers {
		ms = append(ms, Member{
			ID: string(v.ID), Addr: string(v.Address),
			Voter: v.Suffrage == raft.Voter, Leader: string(v.ID) == leader,
		})
	}
	return ms, nil
}

// Status is how a node does.
type Status struct {
	State       string // "leader", "follower", "candidate", "shutdown"
	Term        uint64
	LastIndex   uint64        // newest entry in the log
	CommitIndex uint64        // as known here
	Applied     uint64        // newest entry in the state; Raft's own do not count
	AppliedLog  uint64        // newest entry that Raft is done with here, its own included
	Seq         uint64        // newest event
	Chain       [32]byte      // at it
	LastContact time.Duration // since the leader was heard; 0 on the leader, -1 for never
	Members     []Member
}

// Status tells how this node does.
func (s *Store) Status() Status {
	r := s.raft.Load()
	h := s.state.Head()
	st := Status{
		State: strings.ToLower(r.State().String()), Term: r.CurrentTerm(),
		LastIndex: r.LastIndex(), CommitIndex: r.CommitIndex(),
		Applied: h.Applied, AppliedLog: r.AppliedIndex(), Seq: h.Seq, Chain: h.Chain,
	}
	if st.State != "leader" {
		if t := r.LastContact(); t.IsZero() {
			st.LastContact = -1
		} else {
			st.LastContact = time.Since(t)
		}
	}
	st.Members, _ = s.Members() // raft answers it from memory
	return st
}

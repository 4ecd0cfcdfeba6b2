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
	if !s.use.TryRLock() { // Close waits for the lock or has it
		return nil, ErrClosed
	}
	if s.use.closed {
		s.use.RUnlock()
		return nil, ErrClosed
	}
	return s.use.RUnlock, nil
}

// ByID finds the event with an idempotency id among those applied here. Ids of
// events older than a day, and of 4096 events, are forgotten from feature level
// 2 on: then there is none, and an Append with the id is a new one.
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

// Leader is the leader as this node knows it, "" when it knows none. A node
// without a part in Raft knows it from the node that feeds it.
func (s *Store) Leader() (id, addr string) {
	if r := s.raft.Load(); r != nil {
		if a, i := r.LeaderWithID(); i != "" {
			return string(i), string(a)
		}
	}
	return s.feed.leader()
}

// IsLeader tells whether this node believes to be the leader. It may be wrong
// for up to HeartbeatTimeout; Append and Barrier are not fooled.
func (s *Store) IsLeader() bool {
	r := s.raft.Load()
	return r != nil && r.State() == raft.Leader
}

// Leads is IsLeader, with the term it is about.
func (s *Store) Leads() (term uint64, leads bool) {
	r := s.raft.Load()
	if r == nil {
		return 0, false
	}
	term = r.CurrentTerm()
	return term, r.State() == raft.Leader && r.CurrentTerm() == term
}

// LeaderChanges has one token after leadership changed, here or elsewhere, any
// number of times. It is for one reader.
func (s *Store) LeaderChanges() <-chan struct{} { return s.leader }

func (s *Store) leaderChanged() {
	select {
	case s.leader <- struct{}{}:
	default:
	}
}

// Member is a server of Raft's configuration.
type Member struct {
	ID, Addr string
	Voter    bool
	Leader   bool // as this node knows it
}

// Members is the newest configuration of Raft this node has: on one with a part
// in Raft, committed or not.
func (s *Store) Members() ([]Member, error) {
	var servers []raft.Server
	if r := s.raft.Load(); r != nil {
		f := r.GetConfiguration()
		if err := f.Error(); err != nil {
			return nil, err
		}
		servers = f.Configuration().Servers
	} else if c := s.conf.Load(); c != nil {
		servers = c.servers
	}
	leader, _ := s.Leader()
	var ms []Member
	for _, v := range servers {
		ms = append(ms, Member{
			ID: string(v.ID), Addr: string(v.Address),
			Voter: v.Suffrage == raft.Voter, Leader: string(v.ID) == leader,
		})
	}
	return ms, nil
}

// Status is how a node does.
type Status struct {
	State       string // "leader", "follower", "candidate", "subscriber", "shutdown"
	Term        uint64
	LastIndex   uint64        // newest entry in the log; of a subscriber, in the state
	CommitIndex uint64        // as known here
	Applied     uint64        // newest entry in the state; Raft's own do not count
	AppliedLog  uint64        // newest entry that Raft is done with here, its own included
	Seq         uint64        // newest event
	Chain       [32]byte      // at it
	LastContact time.Duration // since the leader was heard, by whoever feeds this node; 0 on the leader, -1 for never
	Source      string        // the node that feeds this one, "" when Raft does
	Relays      int           // nodes between Source and Raft
	Members     []Member
}

// Status tells how this node does.
func (s *Store) Status() Status {
	h := s.state.Head()
	st := Status{Applied: h.Applied, Seq: h.Seq, Chain: h.Chain, LastContact: -1}
	contact := s.feed.status(&st)
	if r := s.raft.Load(); r != nil {
		// Both at one moment: a leader of term 5 that has just learned of term 6
		// must not look like the leader of 6.
		term, state := r.CurrentTerm(), r.State()
		for now := r.CurrentTerm(); now != term; now = r.CurrentTerm() {
			term, state = now, r.State()
		}
		st.State, st.Term = strings.ToLower(state.String()), term
		st.LastIndex, st.CommitIndex, st.AppliedLog = r.LastIndex(), r.CommitIndex(), r.AppliedIndex()
		if t := r.LastContact(); t.After(contact) {
			contact = t
		}
	} else {
		st.State, st.Term = "subscriber", max(st.Term, h.Term)
		st.LastIndex, st.CommitIndex, st.AppliedLog = h.Applied, max(st.CommitIndex, h.Applied), h.Applied
	}
	switch {
	case st.State == "leader":
		st.LastContact = 0
	case !contact.IsZero():
		st.LastContact = time.Since(contact)
	}
	st.Members, _ = s.Members() // answered from memory
	return st
}

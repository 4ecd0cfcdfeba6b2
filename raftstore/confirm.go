package raftstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/fence"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// Linearizable reads without an entry in the log (Raft thesis §6.4). The leader
// notes its commit index and asks all voters for their term; a majority still
// in the leader's term says that no later leader existed when the question was
// sent, so that nothing newer was committed by then. raft's own check of this
// kind counts answers to older questions, and servers without a vote.
//
// The question is 8 bytes, a number used once; the answer is that number and
// the voter's term, read after the question has come. Both are big-endian, on a
// stream of a connection of its own.

const (
	questionBytes = 8
	answerBytes   = 16
	// askIdle is how long a voter keeps a stream on which nobody asks.
	askIdle = 30 * time.Second
	// maxAskers bounds the streams that ask this node.
	maxAskers = 64
	// askPause is the least time between two attempts to reach a voter.
	askPause = 50 * time.Millisecond
)

// errNotConfirmed says that too few voters answered, or in a later term.
var errNotConfirmed = errors.New("a majority of voters did not confirm this leader")

// confirmer holds the rounds, one at a time: each is for all that asked before
// it began.
type confirmer struct {
	s   *Store
	ctx context.Context // ends with the store; nil without an endpoint

	// Of the round that runs.
	nonce     uint64
	barrier   uint64     // the term whose barrier is applied
	onBarrier chan error // the end of one that runs; nil: none

	mu struct {
		sync.Mutex
		next    *confirmation // for the round after the one that runs
		running bool
		tally   *fence.Tally
		decided chan struct{} // closed when the tally is
		voters  map[string]*voter
	}
}

// confirmation is one round's result, good after done.
type confirmation struct {
	done         chan struct{}
	term, commit uint64
	err          error
}

func newConfirmer(s *Store) *confirmer {
	c := &confirmer{s: s}
	c.mu.voters = map[string]*voter{}
	return c
}

// Confirm says in which term this node leads, and up to which index entries
// were committed, at a moment after the call: a majority of voters confirmed it
// since. One round serves all callers that came before it began.
//
// Errors say that this node does not lead, or that it could not be confirmed
// within two heartbeat timeouts.
func (s *Store) Confirm(ctx context.Context) (term, commit uint64, err error) {
	c := s.ask
	c.mu.Lock()
	if c.mu.next == nil {
		c.mu.next = &confirmation{done: make(chan struct{})}
	}
	f := c.mu.next
	if !c.mu.running {
		end, err := s.begin() // Close waits for wg
		if err != nil {
			c.mu.next = nil
			c.mu.Unlock()
			return 0, 0, err
		}
		c.mu.running = true
		s.wg.Go(c.run)
		end()
	}
	c.mu.Unlock()
	select {
	case <-f.done:
		return f.term, f.commit, f.err
	case <-ctx.Done():
		return 0, 0, context.Cause(ctx)
	}
}

// Newest is the number of the newest event at a moment after the call, applied
// here: what this node, the leader, reads next is linearizable. Others ask the
// leader and then wait for that event: WaitSeq.
func (s *Store) Newest(ctx context.Context) (seq, term uint64, err error) {
	term, commit, err := s.Confirm(ctx)
	if err != nil {
		return 0, 0, err
	}
	index, err := s.lastMoving(commit)
	if err != nil {
		return 0, 0, err
	}
	if err := s.WaitIndex(ctx, index); err != nil {
		return 0, 0, err
	}
	return s.state.Head().Seq, term, nil
}

// lastMoving finds the newest entry up to index that the state's head will show
// as applied: raft keeps its own entries to itself.
func (s *Store) lastMoving(index uint64) (uint64, error) {
	end, err := s.begin()
	if err != nil {
		return 0, err
	}
	defer end()
	for ; index > s.state.Head().Applied; index-- {
		var l raft.Log
		switch err := s.logs.GetLog(index, &l); {
		case errors.Is(err, raft.ErrLogNotFound):
			return 0, nil // compacted, so applied before
		case err != nil:
			return 0, err
		case l.Type == raft.LogCommand || l.Type == raft.LogConfiguration:
			return index, nil
		}
	}
	return 0, nil
}

// run holds rounds as long as somebody asks.
func (c *confirmer) run() {
	for {
		c.mu.Lock()
		f := c.mu.next
		c.mu.next = nil
		if f == nil {
			c.mu.running = false
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
		f.term, f.commit, f.err = c.round()
		close(f.done)
	}
}

func (c *confirmer) round() (term, commit uint64, err error) {
	s, r := c.s, c.s.raft.Load()
	ctx, cancel := context.WithTimeout(context.Background(), 2*s.cfg.HeartbeatTimeout)
	defer cancel()
	if r == nil {
		return 0, 0, s.notLeader()
	}
	term = r.CurrentTerm()
	if r.State() != raft.Leader {
		return 0, 0, s.notLeader()
	}
	if c.barrier != term {
		// Until an entry of its own term is committed, a leader does not know
		// what is.
		if err := c.pass(ctx, r); err != nil {
			return 0, 0, err
		}
		if r.State() != raft.Leader || r.CurrentTerm() != term {
			return 0, 0, s.notLeader()
		}
		c.barrier = term
	}
	commit = r.CommitIndex()
	f := r.GetConfiguration()
	if err := f.Error(); err != nil {
		return 0, 0, err
	}
	decided := c.ask(term, f.Configuration())
	select {
	case <-decided:
	case <-ctx.Done():
	case <-s.fatal.c:
		return 0, 0, s.fatal.err
	case <-s.done:
		return 0, 0, ErrClosed
	}
	c.mu.Lock()
	confirmed := c.mu.tally.Confirmed()
	c.mu.tally = nil
	c.mu.Unlock()
	switch {
	case r.State() != raft.Leader || r.CurrentTerm() != term:
		return 0, 0, s.notLeader()
	case !confirmed:
		return 0, 0, fmt.Errorf("%w: %w", ErrNoLeader, errNotConfirmed)
	}
	return term, commit, nil
}

// pass waits for a barrier. One that ctx ended is waited for by the next round.
func (c *confirmer) pass(ctx context.Context, r *raft.Raft) error {
	if c.onBarrier == nil {
		end := make(chan error, 1)
		c.onBarrier = end
		c.s.wg.Go(func() { end <- r.Barrier(enqueueTimeout).Error() })
	}
	select {
	case err := <-c.onBarrier:
		c.onBarrier = nil
		return c.s.outcome(err)
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrNoLeader, errNotConfirmed)
	case <-c.s.done:
		return ErrClosed
	}
}

// ask begins a tally and puts the question to all voters.
func (c *confirmer) ask(term uint64, conf raft.Configuration) (decided chan struct{}) {
	decided = make(chan struct{})
	self := c.s.cfg.NodeID
	var names []string
	addrs := map[string]string{}
	for _, v := range conf.Servers {
		if v.Suffrage == raft.Voter {
			names = append(names, string(v.ID))
			addrs[string(v.ID)] = string(v.Address)
		}
	}
	c.nonce++
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.tally, c.mu.decided = fence.NewTally(term, c.nonce, names, self), decided
	c.decide()
	for name, v := range c.mu.voters {
		if addrs[name] != v.addr {
			v.cancel() // removed, or moved
			delete(c.mu.voters, name)
		}
	}
	if c.s.cfg.Endpoint == nil {
		return decided
	}
	for name, addr := range addrs {
		if name == self {
			continue
		}
		v := c.mu.voters[name]
		if v == nil {
			v = &voter{c: c, name: name, addr: addr, nonces: make(chan uint64, 1)}
			var ctx context.Context
			ctx, v.cancel = context.WithCancel(c.ctx)
			c.mu.voters[name] = v
			c.s.wg.Go(func() { v.run(ctx) }) // the round's caller holds the store open
		}
		select { // the newest question is the only one that counts
		case <-v.nonces:
		default:
		}
		v.nonces <- c.nonce
	}
	return decided
}

// answered takes a voter's answer.
func (c *confirmer) answered(voter string, nonce, term uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.tally != nil {
		c.mu.tally.Answer(voter, nonce, term)
		c.decide()
	}
}

// decide ends the wait for a tally once. The caller holds mu.
func (c *confirmer) decide() {
	if c.mu.decided != nil && (c.mu.tally.Confirmed() || c.mu.tally.Failed()) {
		close(c.mu.decided)
		c.mu.decided = nil
	}
}

// voter asks one of them.
type voter struct {
	c          *confirmer
	name, addr string
	nonces     chan uint64 // the newest question
	cancel     context.CancelFunc
}

// run keeps a stream to the voter while there are questions, until ctx ends.
func (v *voter) run(ctx context.Context) {
	var conn net.Conn
	var reading sync.WaitGroup
	hangUp := func() {
		if conn != nil {
			conn.Close()
			conn = nil
		}
		reading.Wait()
	}
	defer hangUp()
	idle := time.NewTimer(askIdle / 2)
	defer idle.Stop()
	timeout := 2 * v.c.s.cfg.HeartbeatTimeout
	for {
		var nonce uint64
		select {
		case nonce = <-v.nonces:
		case <-idle.C:
			hangUp()
			continue
		case <-ctx.Done():
			return
		}
		idle.Reset(askIdle / 2)
		for try := 0; try < 2; try++ { // a stream kept from earlier may have died
			if conn == nil {
				dctx, cancel := context.WithTimeout(ctx, timeout)
				c, err := v.c.s.cfg.Endpoint.Dial(dctx, transport.ClassConfirm, v.addr, v.name)
				cancel()
				if err != nil {
					v.c.s.log.Debug("ask a voter for its term", "voter", v.name, "error", err)
					break
				}
				conn = c
				reading.Go(func() { v.read(c) })
			}
			conn.SetWriteDeadline(time.Now().Add(timeout))
			if _, err := conn.Write(binary.BigEndian.AppendUint64(nil, nonce)); err == nil {
				break
			}
			hangUp()
		}
		if conn == nil {
			select {
			case <-time.After(askPause):
			case <-ctx.Done():
				return
			}
		}
	}
}

func (v *voter) read(conn net.Conn) {
	var b [answerBytes]byte
	for {
		if _, err := io.ReadFull(conn, b[:]); err != nil {
			conn.Close() // the next question finds out
			return
		}
		v.c.answered(v.name, binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[questionBytes:]))
	}
}

// serve begins to answer other nodes' questions, until the store is closed or fails.
func (c *confirmer) serve() {
	ln := c.s.cfg.Endpoint.Listener(transport.ClassConfirm)
	ctx, cancel := context.WithCancel(context.Background())
	c.ctx = ctx
	c.s.wg.Go(func() {
		select {
		case <-c.s.done:
		case <-c.s.fatal.c:
		}
		cancel()
		ln.Close() // and so ends what runs
	})
	places := make(chan struct{}, maxAskers)
	c.s.wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			select {
			case places <- struct{}{}:
			default:
				conn.Close()
				continue
			}
			c.s.wg.Go(func() {
				defer func() { <-places }()
				defer conn.Close()
				c.answer(conn)
			})
		}
	})
}

// answer tells one asker this node's term, as often as it asks.
func (c *confirmer) answer(conn net.Conn) {
	var b [answerBytes]byte
	for c.s.Err() == nil {
		conn.SetReadDeadline(time.Now().Add(askIdle))
		if _, err := io.ReadFull(conn, b[:questionBytes]); err != nil {
			return
		}
		r := c.s.raft.Load()
		if r == nil {
			return
		}
		binary.BigEndian.PutUint64(b[questionBytes:], r.CurrentTerm()) // now, not before
		conn.SetWriteDeadline(time.Now().Add(2 * c.s.cfg.HeartbeatTimeout))
		if _, err := conn.Write(b[:]); err != nil {
			return
		}
	}
}

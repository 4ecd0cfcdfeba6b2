package raftstore

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fsm"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// Faults stand between a Store and its real transport: calls that are lost on
// their way out and, as a mutation, raft's own heartbeat path on the way in.
type Faults struct {
	// RawHeartbeats hands every heartbeat to raft around its main goroutine, as
	// the library's own transport does (hashicorp/raft #695).
	RawHeartbeats bool

	mu    sync.Mutex
	lost  map[raft.ServerID]Loss
	trans *faultyTransport
}

// Loss is what does not arrive.
type Loss int

const (
	LoseNothing Loss = iota
	LoseAll
	// LoseAllButHeartbeats is a link that has just been mended: votes and
	// entries were lost, heartbeats are the first to come through.
	LoseAllButHeartbeats
)

// Install puts the faults into a Store's configuration.
func (f *Faults) Install(cfg *Config) {
	f.lost = make(map[raft.ServerID]Loss)
	cfg.seams.transport = func(c transport.RaftConfig) raftTransport {
		t := &faultyTransport{Raft: transport.NewRaft(c), f: f, out: make(chan raft.RPC), done: make(chan struct{})}
		if f.RawHeartbeats {
			t.wg.Go(t.sort)
		}
		f.trans = t
		return t
	}
}

// Lose says what of the calls to a peer is lost from now on.
func (f *Faults) Lose(peer string, l Loss) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lost[raft.ServerID(peer)] = l
}

func (f *Faults) passes(peer raft.ServerID, heartbeat bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if l := f.lost[peer]; l == LoseAll || l == LoseAllButHeartbeats && !heartbeat {
		return errors.New("lost")
	}
	return nil
}

// Campaign tells a peer to stand for election, as a leader does that hands over
// to it; this node calls in its own name.
func (f *Faults) Campaign(self, selfAddr, peer, addr string) error {
	q := &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: 3, ID: []byte(self), Addr: []byte(selfAddr)}}
	return f.trans.Raft.TimeoutNow(raft.ServerID(peer), raft.ServerAddress(addr), q, new(raft.TimeoutNowResponse))
}

type faultyTransport struct {
	*transport.Raft
	f         *Faults
	heartbeat func(raft.RPC) // set before any call comes in
	out       chan raft.RPC
	done      chan struct{}
	once      sync.Once
	wg        sync.WaitGroup
}

func isHeartbeat(cmd any) bool {
	q, ok := cmd.(*raft.AppendEntriesRequest)
	return ok && q.PrevLogEntry == 0 && q.PrevLogTerm == 0 && len(q.Entries) == 0 && q.LeaderCommitIndex == 0
}

func (t *faultyTransport) Consumer() <-chan raft.RPC {
	if t.f.RawHeartbeats {
		return t.out
	}
	return t.Raft.Consumer()
}

// SetHeartbeatHandler keeps raft's handler for sort: transport.Raft, which then
// has none, hands all heartbeats to the Consumer.
func (t *faultyTransport) SetHeartbeatHandler(cb func(raft.RPC)) {
	if !t.f.RawHeartbeats {
		t.Raft.SetHeartbeatHandler(cb)
		return
	}
	t.f.mu.Lock()
	defer t.f.mu.Unlock()
	t.heartbeat = cb
}

// sort gives each call a goroutine, as each connection has in the library's
// transport; heartbeats do not wait for raft's main one.
func (t *faultyTransport) sort() {
	for {
		select {
		case rpc := <-t.Raft.Consumer():
			t.wg.Go(func() {
				t.f.mu.Lock()
				fast := t.heartbeat
				t.f.mu.Unlock()
				if fast != nil && isHeartbeat(rpc.Command) {
					fast(rpc)
					return
				}
				select {
				case t.out <- rpc:
				case <-t.done:
					rpc.Respond(nil, raft.ErrTransportShutdown)
				}
			})
		case <-t.done:
			return
		}
	}
}

func (t *faultyTransport) Close() error {
	t.once.Do(func() { close(t.done) })
	err := t.Raft.Close()
	t.wg.Wait()
	return err
}

func (t *faultyTransport) AppendEntries(id raft.ServerID, a raft.ServerAddress, q *raft.AppendEntriesRequest, p *raft.AppendEntriesResponse) error {
	if err := t.f.passes(id, isHeartbeat(q)); err != nil {
		return err
	}
	return t.Raft.AppendEntries(id, a, q, p)
}

func (t *faultyTransport) RequestVote(id raft.ServerID, a raft.ServerAddress, q *raft.RequestVoteRequest, p *raft.RequestVoteResponse) error {
	if err := t.f.passes(id, false); err != nil {
		return err
	}
	return t.Raft.RequestVote(id, a, q, p)
}

func (t *faultyTransport) RequestPreVote(id raft.ServerID, a raft.ServerAddress, q *raft.RequestPreVoteRequest, p *raft.RequestPreVoteResponse) error {
	if err := t.f.passes(id, false); err != nil {
		return err
	}
	return t.Raft.RequestPreVote(id, a, q, p)
}

// AppendLate is an Append whose goroutine is held up between its look at who
// leads and its call of raft; term is raft's.
func (s *Store) AppendLate(held func(term func() uint64), p event.Proposal) (event.Event, error) {
	r := s.raft.Load()
	if r == nil || r.State() != raft.Leader {
		return event.Event{}, ErrNoLeader
	}
	b, err := p.Marshal()
	if err != nil {
		return event.Event{}, err
	}
	h := s.state.Head()
	c := fsm.Command{TimeNanos: time.Now().UnixNano(), Seq: h.Seq, Chain: h.Chain, Proposals: [][]byte{b}}
	if b, err = c.Marshal(); err != nil {
		return event.Event{}, err
	}
	held(r.CurrentTerm)
	f := r.Apply(b, time.Second)
	if err := f.Error(); err != nil {
		return event.Event{}, err
	}
	res, ok := f.Response().(fsm.Result)
	if !ok || res.Err != nil || len(res.Events) != 1 {
		return event.Event{}, fmt.Errorf("an answer of %T: %w", f.Response(), res.Err)
	}
	return res.Events[0], nil
}

package transport

import (
	"sync"

	"github.com/hashicorp/raft"
)

// Push tells followers at once what the leader has committed. Raft itself tells
// them with the next entries, or else after raft.Config.CommitTimeout, since its
// heartbeats do not say (hashicorp/raft #282).
//
// What it sends is an AppendEntries as raft sends them, only earlier: of the
// leader's term, without entries, behind the newest entry that this follower
// has confirmed to have in this term, and with a commit index that is not above
// it. The follower checks term and entry as it checks any other. So it may be
// lost, be late, come twice or overtake: the worst it can say is what was true
// when it was sent, and a commit stays one.
//
// While entries are on their way to a follower nothing is sent to it: they, or
// those behind them, bring the index.
type Push struct {
	send  func(raft.ServerID, raft.ServerAddress, *raft.AppendEntriesRequest, *raft.AppendEntriesResponse) error
	leads func(term uint64) bool

	mu struct {
		sync.Mutex
		committed uint64
		peers     map[raft.ServerID]*pushed
		closed    bool
	}
	wg sync.WaitGroup
}

// pushed is what a follower has been sent.
type pushed struct {
	addr    raft.ServerAddress
	head    raft.AppendEntriesRequest // of the newest answered call: who leads, term; no entries
	index   uint64                    // newest entry that the follower confirmed in that term
	term    uint64                    // of that entry
	told    uint64                    // commit index that the follower has heard
	onWay   int                       // calls of raft's own that are not answered
	pushing bool
}

// NewPush returns a Push that sends with send, which has a deadline, as long as
// this node leads in the term of what it sends.
func NewPush(leads func(term uint64) bool, send func(raft.ServerID, raft.ServerAddress, *raft.AppendEntriesRequest, *raft.AppendEntriesResponse) error) *Push {
	p := &Push{send: send, leads: leads}
	p.mu.peers = map[raft.ServerID]*pushed{}
	return p
}

// isHeartbeat is how raft's own transport tells them.
func isHeartbeat(q *raft.AppendEntriesRequest) bool {
	return q.PrevLogEntry == 0 && q.PrevLogTerm == 0 && len(q.Entries) == 0 && q.LeaderCommitIndex == 0
}

// Call makes a call of raft's own, and remembers what it told the follower.
func (p *Push) Call(id raft.ServerID, addr raft.ServerAddress, q *raft.AppendEntriesRequest, a *raft.AppendEntriesResponse) error {
	if isHeartbeat(q) {
		return p.send(id, addr, q, a)
	}
	p.mu.Lock()
	v := p.mu.peers[id]
	if v == nil {
		if len(p.mu.peers) >= maxRaftPeers {
			clear(p.mu.peers) // only what has left is forgotten for long
		}
		v = &pushed{}
		p.mu.peers[id] = v
	}
	v.onWay++
	p.mu.Unlock()

	err := p.send(id, addr, q, a)

	p.mu.Lock()
	defer p.mu.Unlock()
	v.onWay--
	if err != nil || !a.Success {
		return err
	}
	if v.head.Term != q.Term {
		v.index, v.told = 0, 0
	}
	v.addr, v.head = addr, *q
	v.head.Entries = nil
	index, term := q.PrevLogEntry, q.PrevLogTerm
	if n := len(q.Entries); n > 0 {
		index, term = q.Entries[n-1].Index, q.Entries[n-1].Term
	}
	if index >= v.index {
		v.index, v.term = index, term
	}
	v.told = max(v.told, min(q.LeaderCommitIndex, index))
	p.push(id, v)
	return nil
}

// Committed says that entries up to index are committed. It does not wait.
func (p *Push) Committed(index uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.committed = max(p.mu.committed, index)
	for id, v := range p.mu.peers {
		p.push(id, v)
	}
}

// push tells a follower what it has not heard, unless that is being done. The
// caller holds mu.
func (p *Push) push(id raft.ServerID, v *pushed) {
	commit := min(p.mu.committed, v.index)
	if commit <= v.told || v.onWay > 0 || v.pushing || p.mu.closed || !p.leads(v.head.Term) {
		return
	}
	q := v.head
	q.PrevLogEntry, q.PrevLogTerm, q.LeaderCommitIndex = v.index, v.term, commit
	addr := v.addr
	v.pushing = true
	p.wg.Go(func() {
		var a raft.AppendEntriesResponse
		err := p.send(id, addr, &q, &a)
		p.mu.Lock()
		defer p.mu.Unlock()
		v.pushing = false
		if err != nil || !a.Success {
			return // raft's own next call tells
		}
		if v.head.Term == q.Term {
			v.told = max(v.told, commit)
		}
		p.push(id, v)
	})
}

// Close stops pushing and waits for what is on its way; send must fail by then.
func (p *Push) Close() {
	p.mu.Lock()
	p.mu.closed = true
	p.mu.Unlock()
	p.wg.Wait()
}

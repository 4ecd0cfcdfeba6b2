package raftstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/transport"
)

// simNet carries calls between the nodes of a simulation, and looks at each.
type simNet struct {
	mu      sync.Mutex
	rng     *rand.Rand
	ends    map[string]*simTransport
	cut     map[[2]string]bool   // from, to
	slow    time.Duration        // added to each way
	leaders map[uint64]string    // by term: who sent entries or heartbeats
	votes   map[string]voteGiven // by voter and term
	broken  []string             // invariants that did not hold
	// onlyHeartbeats lets nothing else pass on a link.
	onlyHeartbeats map[[2]string]bool

	rawHeartbeats bool // a mutation: raft's own fast path
}

type voteGiven struct{ to string }

func newSimNet(rng *rand.Rand) *simNet {
	return &simNet{
		rng: rng, ends: make(map[string]*simTransport), cut: make(map[[2]string]bool), onlyHeartbeats: make(map[[2]string]bool),
		leaders: make(map[uint64]string), votes: make(map[string]voteGiven),
	}
}

func (n *simNet) fail(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.broken = append(n.broken, fmt.Sprintf(format, args...))
}

// way is how long a message takes, false when it does not arrive.
func (n *simNet) way(from, to string, heartbeat bool) (time.Duration, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	k := [2]string{from, to}
	d := 200*time.Microsecond + time.Duration(n.rng.ExpFloat64()*float64(500*time.Microsecond)) + n.slow
	return d, !n.cut[k] && (heartbeat || !n.onlyHeartbeats[k])
}

func (n *simNet) end(id string) *simTransport {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ends[id]
}

// sawLeader checks that a term has one leader (I7).
func (n *simNet) sawLeader(term uint64, id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if was, ok := n.leaders[term]; ok && was != id {
		n.broken = append(n.broken, fmt.Sprintf("term %d has the leaders %s and %s", term, was, id))
	}
	n.leaders[term] = id
}

// sawVote checks that a server votes once in a term (I18).
func (n *simNet) sawVote(voter string, term uint64, candidate string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	k := fmt.Sprintf("%s %d", voter, term)
	if was, ok := n.votes[k]; ok && was.to != candidate {
		n.broken = append(n.broken, fmt.Sprintf("%s voted for %s and %s in term %d", voter, was.to, candidate, term))
	}
	n.votes[k] = voteGiven{candidate}
}

// simTransport is one node's end, with the rules of transport.Raft: who calls
// is admitted, heartbeats pass the same filter, a hung disk does not lead.
type simTransport struct {
	cfg     transport.RaftConfig
	net     *simNet
	id      string
	consume chan raft.RPC
	done    chan struct{}
	once    sync.Once

	push      *transport.Push
	raft      atomic.Pointer[raft.Raft]
	heartbeat atomic.Pointer[func(raft.RPC)]
}

func (n *simNet) transport(id string, cfg transport.RaftConfig) *simTransport {
	t := &simTransport{cfg: cfg, net: n, id: id, consume: make(chan raft.RPC), done: make(chan struct{})}
	t.push = transport.NewPush(t.leads, t.appendEntries)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ends[id] = t
	return t
}

const simTimeout = 500 * time.Millisecond

var errSimTimeout = errors.New("timeout")

// call takes a command to another node and the answer back.
func (t *simTransport) call(to string, cmd any, data io.Reader) (any, error) {
	timeout := time.NewTimer(simTimeout)
	defer timeout.Stop()
	lost := func() (any, error) {
		select {
		case <-timeout.C:
			return nil, errSimTimeout
		case <-t.done:
			return nil, raft.ErrTransportShutdown
		}
	}
	q, ok := cmd.(*raft.AppendEntriesRequest)
	heartbeat := ok && q.PrevLogEntry == 0 && q.PrevLogTerm == 0 && len(q.Entries) == 0 && q.LeaderCommitIndex == 0
	d, arrives := t.net.way(t.id, to, heartbeat)
	if !arrives {
		return lost()
	}
	answers := make(chan raft.RPCResponse, 1)
	go func() { // the message may arrive after the caller gave up
		time.Sleep(d)
		if p := t.net.end(to); p != nil {
			p.deliver(t.id, raft.RPC{Command: cmd, Reader: data, RespChan: answers}, heartbeat)
		}
	}()
	select {
	case a := <-answers:
		d, arrives := t.net.way(to, t.id, heartbeat)
		if !arrives {
			return lost()
		}
		select {
		case <-time.After(d):
			return a.Response, a.Error
		case <-t.done:
			return nil, raft.ErrTransportShutdown
		}
	case <-timeout.C:
		return nil, errSimTimeout
	case <-t.done:
		return nil, raft.ErrTransportShutdown
	}
}

func (t *simTransport) deliver(from string, rpc raft.RPC, heartbeat bool) {
	select {
	case <-t.done:
		return
	default:
	}
	if err := t.cfg.Admit(from); err != nil {
		rpc.Respond(nil, err)
		return
	}
	if heartbeat {
		r, fast := t.raft.Load(), t.heartbeat.Load()
		q := rpc.Command.(*raft.AppendEntriesRequest)
		if r != nil && fast != nil && (t.net.rawHeartbeats || transport.Passive(r, from, t.DecodePeer(q.Addr), q)) {
			(*fast)(rpc)
			return
		}
	}
	select {
	case t.consume <- rpc:
	case <-t.done:
	}
}

func (t *simTransport) SetRaft(r *raft.Raft)                 { t.raft.Store(r) }
func (t *simTransport) Consumer() <-chan raft.RPC            { return t.consume }
func (t *simTransport) LocalAddr() raft.ServerAddress        { return raft.ServerAddress(t.id) }
func (t *simTransport) SetHeartbeatHandler(f func(raft.RPC)) { t.heartbeat.Store(&f) }
func (t *simTransport) EncodePeer(_ raft.ServerID, a raft.ServerAddress) []byte {
	return []byte(a)
}
func (t *simTransport) DecodePeer(b []byte) raft.ServerAddress { return raft.ServerAddress(b) }
func (t *simTransport) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported
}

func (t *simTransport) Close() error {
	t.once.Do(func() { close(t.done) })
	t.push.Close()
	return nil
}

func (t *simTransport) AppendEntries(id raft.ServerID, a raft.ServerAddress, q *raft.AppendEntriesRequest, p *raft.AppendEntriesResponse) error {
	return t.push.Call(id, a, q, p)
}

func (t *simTransport) Committed(index uint64) { t.push.Committed(index) }

func (t *simTransport) leads(term uint64) bool {
	r := t.raft.Load()
	return r != nil && r.State() == raft.Leader && r.CurrentTerm() == term
}

func (t *simTransport) appendEntries(id raft.ServerID, _ raft.ServerAddress, q *raft.AppendEntriesRequest, p *raft.AppendEntriesResponse) error {
	if t.cfg.LogBusy() > transport.DiskStall {
		return transport.ErrDiskStalled
	}
	t.net.sawLeader(q.Term, t.id)
	c := *q
	c.Entries = make([]*raft.Log, len(q.Entries))
	for i, l := range q.Entries {
		e := *l
		c.Entries[i] = &e
	}
	a, err := t.call(string(id), &c, nil)
	if err == nil {
		*p = *a.(*raft.AppendEntriesResponse)
	}
	return err
}

func (t *simTransport) RequestVote(id raft.ServerID, _ raft.ServerAddress, q *raft.RequestVoteRequest, p *raft.RequestVoteResponse) error {
	c := *q
	a, err := t.call(string(id), &c, nil)
	if err == nil {
		*p = *a.(*raft.RequestVoteResponse)
		if p.Granted {
			t.net.sawVote(string(id), q.Term, t.id)
		}
	}
	return err
}

func (t *simTransport) RequestPreVote(id raft.ServerID, _ raft.ServerAddress, q *raft.RequestPreVoteRequest, p *raft.RequestPreVoteResponse) error {
	c := *q
	a, err := t.call(string(id), &c, nil)
	if err == nil {
		*p = *a.(*raft.RequestPreVoteResponse)
	}
	return err
}

func (t *simTransport) TimeoutNow(id raft.ServerID, _ raft.ServerAddress, q *raft.TimeoutNowRequest, p *raft.TimeoutNowResponse) error {
	c := *q
	_, err := t.call(string(id), &c, nil)
	return err
}

func (t *simTransport) InstallSnapshot(id raft.ServerID, _ raft.ServerAddress, q *raft.InstallSnapshotRequest, p *raft.InstallSnapshotResponse, data io.Reader) error {
	b, err := io.ReadAll(data)
	if err != nil {
		return err
	}
	if int64(len(b)) != q.Size {
		t.net.fail("a snapshot of %d bytes was announced with %d", len(b), q.Size)
	}
	c := *q
	a, err := t.call(string(id), &c, bytes.NewReader(b))
	if err == nil {
		*p = *a.(*raft.InstallSnapshotResponse)
	}
	return err
}

// simDisk is a disk that can lose what was not synced, and hang. Syncs of the
// log's WAL take virtual time.
type simDisk struct {
	vfs.FS
	mem   *vfs.MemFS
	hang  atomic.Pointer[chan struct{}] // syncs wait until it is closed
	delay func() time.Duration
}

func newSimDisk(mem *vfs.MemFS, delay func() time.Duration) *simDisk {
	return &simDisk{FS: mem, mem: mem, delay: delay}
}

func (d *simDisk) stall() (release func()) {
	c := make(chan struct{})
	d.hang.Store(&c)
	return func() {
		if d.hang.CompareAndSwap(&c, nil) {
			close(c)
		}
	}
}

func (d *simDisk) wait() {
	time.Sleep(d.delay())
	if c := d.hang.Load(); c != nil {
		<-*c
	}
}

func (d *simDisk) wrap(name string, f vfs.File, err error) (vfs.File, error) {
	if err == nil && d.PathBase(d.PathDir(name)) == logDir && len(name) > 4 && name[len(name)-4:] == ".log" {
		f = &simWAL{f, d}
	}
	return f, err
}

func (d *simDisk) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := d.FS.Create(name, c)
	return d.wrap(name, f, err)
}

func (d *simDisk) OpenReadWrite(name string, c vfs.DiskWriteCategory, o ...vfs.OpenOption) (vfs.File, error) {
	f, err := d.FS.OpenReadWrite(name, c, o...)
	return d.wrap(name, f, err)
}

func (d *simDisk) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := d.FS.ReuseForWrite(old, name, c)
	return d.wrap(name, f, err)
}

type simWAL struct {
	vfs.File
	d *simDisk
}

func (w *simWAL) Sync() error {
	w.d.wait()
	return w.File.Sync()
}

func (w *simWAL) SyncData() error {
	w.d.wait()
	return w.File.SyncData()
}

func (w *simWAL) SyncTo(n int64) (bool, error) {
	w.d.wait()
	return w.File.SyncTo(n)
}

// spyStable knows what raft was told to be stored, and must find it again
// after a crash (I18).
type spyStable struct {
	raft.StableStore
	mu  sync.Mutex
	set map[string][]byte
	// forget is a mutation: votes stay in memory.
	forget bool
}

func isVote(k []byte) bool { return string(k) == "LastVoteTerm" || string(k) == "LastVoteCand" }

func (s *spyStable) Set(k, v []byte) error {
	if !s.forget || !isVote(k) {
		if err := s.StableStore.Set(k, v); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.set[string(k)] = bytes.Clone(v)
	return nil
}

func (s *spyStable) SetUint64(k []byte, v uint64) error {
	return s.Set(k, binary.BigEndian.AppendUint64(nil, v))
}

func (s *spyStable) Get(k []byte) ([]byte, error) {
	if s.forget && isVote(k) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if v, ok := s.set[string(k)]; ok {
			return v, nil
		}
	}
	return s.StableStore.Get(k)
}

func (s *spyStable) GetUint64(k []byte) (uint64, error) {
	v, err := s.Get(k)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(v), nil
}

// snapshot is what was stored so far, by name.
func (s *spyStable) snapshot() map[string][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.set)
}

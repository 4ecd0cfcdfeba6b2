package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

const (
	// rpcTimeout is raft's deadline for one call; a dead connection ends
	// earlier, by idleTimeout.
	rpcTimeout = 10 * time.Second
	// maxPool is how many idle streams are kept to each peer: replication,
	// heartbeat, commits told at once, and one for votes.
	maxPool = 4
	// maxRaftPeers bounds how many different nodes may call us in one life of
	// the process; a cluster has at most nine voters at a time.
	maxRaftPeers = 256
	// DiskStall is how long our own log write may hang before we stop acting
	// as leader: below the 3 s in which the others are to have a new one.
	DiskStall = time.Second
)

// ErrDiskStalled refuses to send: a leader whose own disk hangs must lose its
// seat to one whose disk works (hashicorp/raft #503). Without appends and
// heartbeats the others elect one.
var ErrDiskStalled = errors.New("our own log write hangs; not acting as leader")

// RaftConfig is what a Raft transport needs; all fields must be set.
type RaftConfig struct {
	Endpoint *Endpoint
	Addr     string // this node's advertised host:port
	Log      hclog.Logger
	// LogBusy is for how long our running log write has been running.
	LogBusy func() time.Duration
	// Admit says whether a peer may call us now; nil when it may.
	Admit func(peer string) error
}

// Raft is raft's Transport over an Endpoint. It is raft's own NetworkTransport
// but for these:
//
//   - A call is accepted only if the server id in it is the name in the
//     caller's certificate and Admit lets that peer. To know which certificate
//     a call came with, each peer has a NetworkTransport of its own here.
//   - A connection we make must end at the server meant.
//   - A heartbeat takes the fast path around raft's main goroutine only if it
//     can change nothing there but the time of contact. The path as shipped
//     can apply entries nobody committed (hashicorp/raft #695).
//   - No pipeline: an error in it can wedge a follower for good (#612).
//   - The watchdog of ErrDiskStalled.
//   - Followers hear of a commit at once: see Push.
//   - Snapshots go over a connection of their own (ClassBulk): votes and
//     heartbeats do not queue behind them.
type Raft struct {
	cfg     RaftConfig
	out     lane // ClassRaft
	bulk    lane // ClassBulk
	push    *Push
	lns     []*Listener
	consume chan raft.RPC
	done    chan struct{}
	wg      sync.WaitGroup

	raft      atomic.Pointer[raft.Raft]
	heartbeat atomic.Pointer[func(raft.RPC)]

	mu struct {
		sync.Mutex
		in     map[string]*inbound // by peer
		closed bool
	}
}

var (
	_ raft.Transport   = (*Raft)(nil)
	_ raft.WithPreVote = (*Raft)(nil)
	_ raft.WithClose   = (*Raft)(nil)
)

// NewRaft starts the transport: it accepts ClassRaft and ClassBulk at the endpoint.
func NewRaft(cfg RaftConfig) *Raft {
	t := &Raft{cfg: cfg, consume: make(chan raft.RPC), done: make(chan struct{})}
	t.mu.in = make(map[string]*inbound)
	t.out, t.bulk = t.lane(ClassRaft), t.lane(ClassBulk)
	t.push = NewPush(t.leads, t.appendEntries)
	for _, class := range []string{ClassRaft, ClassBulk} {
		ln := cfg.Endpoint.Listener(class)
		t.lns = append(t.lns, ln)
		t.wg.Go(func() { t.acceptLoop(ln) })
	}
	return t
}

// lane is what calls of one class go out through.
type lane struct {
	*raft.NetworkTransport
	dials *dialLayer
}

func (t *Raft) lane(class string) lane {
	d := newDialLayer(t.cfg.Endpoint, class, t.cfg.Addr)
	return lane{t.network(d), d}
}

func (l lane) close() error {
	err := l.NetworkTransport.Close()
	l.dials.closeAll()
	return err
}

// SetRaft names the raft this transport serves, once raft.NewRaft returned.
// Until then no heartbeat takes the fast path.
func (t *Raft) SetRaft(r *raft.Raft) { t.raft.Store(r) }

func (t *Raft) network(l raft.StreamLayer) *raft.NetworkTransport {
	return raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: l, MaxPool: maxPool, Timeout: rpcTimeout, Logger: t.cfg.Log,
		MaxRPCsInFlight: 1, // no pipeline
	})
}

// Close stops the transport, its goroutines and its streams; calls on the way
// fail.
func (t *Raft) Close() error {
	t.mu.Lock()
	if t.mu.closed {
		t.mu.Unlock()
		return nil
	}
	t.mu.closed = true
	close(t.done)
	ins := t.mu.in
	t.mu.Unlock()

	var err error
	for _, ln := range t.lns {
		err = errors.Join(err, ln.Close())
	}
	err = errors.Join(err, t.out.close(), t.bulk.close())
	t.push.Close()
	for _, in := range ins {
		err = errors.Join(err, in.nt.Close())
	}
	t.wg.Wait()
	return err
}

// inbound is what one peer calls us through.
type inbound struct {
	peer  string
	nt    *raft.NetworkTransport
	layer *streamLayer
}

func (t *Raft) acceptLoop(ln *Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return // closed
		}
		conn := c.(*Conn)
		in, err := t.inboundOf(conn.Peer())
		if err != nil {
			t.cfg.Log.Warn("refused a connection", "peer", conn.Peer(), "error", err)
			conn.Close()
			continue
		}
		select {
		case in.layer.conns <- conn:
		case <-t.done:
			conn.Close()
			return
		}
	}
}

func (t *Raft) inboundOf(peer string) (*inbound, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if in := t.mu.in[peer]; in != nil {
		return in, nil
	}
	if err := t.cfg.Admit(peer); err != nil {
		return nil, err
	}
	if t.mu.closed || len(t.mu.in) >= maxRaftPeers {
		return nil, errors.New("closed or too many peers")
	}
	in := &inbound{peer: peer, layer: newStreamLayer(t.cfg.Addr)}
	in.nt = t.network(in.layer)
	in.nt.SetHeartbeatHandler(func(rpc raft.RPC) { t.onHeartbeat(in, rpc) })
	t.mu.in[peer] = in
	t.wg.Go(func() {
		for {
			select {
			case rpc := <-in.nt.Consumer():
				if t.accept(in, rpc) {
					t.forward(rpc)
				}
			case <-t.done:
				return
			}
		}
	})
	return in, nil
}

// accept checks who calls, or answers the refusal.
func (t *Raft) accept(in *inbound, rpc raft.RPC) bool {
	err := errors.New("call without a header")
	if c, ok := rpc.Command.(raft.WithRPCHeader); ok {
		if id := string(c.GetRPCHeader().ID); id != in.peer {
			err = fmt.Errorf("%w: certificate of %q, call of %q", ErrWrongPeer, in.peer, id)
		} else {
			err = t.cfg.Admit(in.peer)
		}
	}
	if err != nil {
		t.cfg.Log.Warn("refused a call", "peer", in.peer, "error", err)
		rpc.Respond(nil, err)
	}
	return err == nil
}

// forward hands a call to raft's main goroutine.
func (t *Raft) forward(rpc raft.RPC) {
	select {
	case t.consume <- rpc:
	case <-t.done:
		rpc.Respond(nil, raft.ErrTransportShutdown)
	}
}

// onHeartbeat runs on the connection's goroutine, which raft's handler may use
// while its main goroutine waits for the disk. It may only if the call says
// what we already know: same term, same leader, and we follow.
func (t *Raft) onHeartbeat(in *inbound, rpc raft.RPC) {
	if !t.accept(in, rpc) {
		return
	}
	r, fast := t.raft.Load(), t.heartbeat.Load()
	q, ok := rpc.Command.(*raft.AppendEntriesRequest)
	if r != nil && fast != nil && ok && Passive(r, in.peer, t.DecodePeer(q.Addr), q) {
		(*fast)(rpc)
		return
	}
	t.forward(rpc)
}

// Passive tells whether a heartbeat from the server named peer, at addr, can
// change nothing at r but the time of contact: same term, same leader, and r
// follows.
func Passive(r *raft.Raft, peer string, addr raft.ServerAddress, q *raft.AppendEntriesRequest) bool {
	if r.State() != raft.Follower || q.Term != r.CurrentTerm() {
		return false
	}
	leader, id := r.LeaderWithID()
	return string(id) == peer && leader == addr
}

// Consumer gives raft the calls.
func (t *Raft) Consumer() <-chan raft.RPC { return t.consume }

// SetHeartbeatHandler takes raft's fast path.
func (t *Raft) SetHeartbeatHandler(cb func(raft.RPC)) {
	if cb == nil {
		t.heartbeat.Store(nil)
		return
	}
	t.heartbeat.Store(&cb)
}

// LocalAddr is the advertised address.
func (t *Raft) LocalAddr() raft.ServerAddress { return raft.ServerAddress(t.cfg.Addr) }

// EncodePeer and DecodePeer: an address is its text.
func (t *Raft) EncodePeer(_ raft.ServerID, a raft.ServerAddress) []byte { return []byte(a) }
func (t *Raft) DecodePeer(b []byte) raft.ServerAddress                  { return raft.ServerAddress(b) }

// AppendEntriesPipeline is off.
func (t *Raft) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported
}

// AppendEntries sends entries or a heartbeat, unless our disk hangs.
func (t *Raft) AppendEntries(id raft.ServerID, a raft.ServerAddress, q *raft.AppendEntriesRequest, p *raft.AppendEntriesResponse) error {
	return t.push.Call(id, a, q, p)
}

// Committed has the followers told that entries up to index are committed.
func (t *Raft) Committed(index uint64) { t.push.Committed(index) }

func (t *Raft) leads(term uint64) bool {
	r := t.raft.Load()
	return r != nil && r.State() == raft.Leader && r.CurrentTerm() == term
}

func (t *Raft) appendEntries(id raft.ServerID, a raft.ServerAddress, q *raft.AppendEntriesRequest, p *raft.AppendEntriesResponse) error {
	if t.cfg.LogBusy() > DiskStall {
		return ErrDiskStalled
	}
	return t.out.AppendEntries(id, target(id, a), q, p)
}

// RequestVote sends a vote request.
func (t *Raft) RequestVote(id raft.ServerID, a raft.ServerAddress, q *raft.RequestVoteRequest, p *raft.RequestVoteResponse) error {
	return t.out.RequestVote(id, target(id, a), q, p)
}

// RequestPreVote sends a pre-vote request.
func (t *Raft) RequestPreVote(id raft.ServerID, a raft.ServerAddress, q *raft.RequestPreVoteRequest, p *raft.RequestPreVoteResponse) error {
	return t.out.RequestPreVote(id, target(id, a), q, p)
}

// InstallSnapshot sends a snapshot.
func (t *Raft) InstallSnapshot(id raft.ServerID, a raft.ServerAddress, q *raft.InstallSnapshotRequest, p *raft.InstallSnapshotResponse, data io.Reader) error {
	return t.bulk.InstallSnapshot(id, target(id, a), q, p, data)
}

// TimeoutNow tells a server to start an election.
func (t *Raft) TimeoutNow(id raft.ServerID, a raft.ServerAddress, q *raft.TimeoutNowRequest, p *raft.TimeoutNowResponse) error {
	return t.out.TimeoutNow(id, target(id, a), q, p)
}

// target carries the server's id to Dial, through the address: an address has
// no "@", so the last one parts them.
func target(id raft.ServerID, a raft.ServerAddress) raft.ServerAddress {
	return raft.ServerAddress(string(id) + "@" + string(a))
}

// streamLayer is a raft.StreamLayer that accepts what it is handed.
type streamLayer struct {
	addr  layerAddr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newStreamLayer(addr string) *streamLayer {
	return &streamLayer{addr: layerAddr(addr), conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *streamLayer) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, ErrClosed
	}
}

func (l *streamLayer) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *streamLayer) Addr() net.Addr { return l.addr }

func (l *streamLayer) Dial(raft.ServerAddress, time.Duration) (net.Conn, error) {
	return nil, errors.New("this side only accepts")
}

// dialLayer is one that dials and accepts nothing. It knows its open streams:
// the NetworkTransport knows only those that are idle, and a call to a dead
// peer would hold up Close.
type dialLayer struct {
	*streamLayer
	e      *Endpoint
	class  string
	ctx    context.Context // ends with closeAll
	cancel context.CancelFunc

	mu   sync.Mutex
	open map[*Conn]struct{} // nil once closed
}

func newDialLayer(e *Endpoint, class, addr string) *dialLayer {
	l := &dialLayer{streamLayer: newStreamLayer(addr), e: e, class: class, open: make(map[*Conn]struct{})}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

func (l *dialLayer) Dial(a raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	i := strings.LastIndexByte(string(a), '@')
	if i < 1 {
		return nil, fmt.Errorf("raft address %q names no server", a)
	}
	ctx, cancel := context.WithTimeout(l.ctx, timeout)
	defer cancel()
	c, err := l.e.Dial(ctx, l.class, string(a[i+1:]), string(a[:i]))
	if err != nil {
		return nil, err
	}
	conn := c.(*Conn)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open == nil {
		conn.Close()
		return nil, ErrClosed
	}
	l.open[conn] = struct{}{}
	return &dialledConn{conn, l}, nil
}

func (l *dialLayer) closeAll() {
	l.cancel()
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.open {
		c.Close()
	}
	l.open = nil
}

// dialledConn leaves its layer's list when it is closed.
type dialledConn struct {
	*Conn
	l *dialLayer
}

func (c *dialledConn) Close() error {
	c.l.mu.Lock()
	delete(c.l.open, c.Conn)
	c.l.mu.Unlock()
	return c.Conn.Close()
}

type layerAddr string

func (layerAddr) Network() string  { return "quic" }
func (a layerAddr) String() string { return string(a) }

package fence

import (
	"bufio"
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"
)

const (
	// helloTimeout bounds how long a new stream may take to say who it is.
	helloTimeout = 5 * time.Second
	// roundPause is the least time between the beginnings of two quorum rounds
	// for leases: each serves all renewals that came meanwhile.
	roundPause = 20 * time.Millisecond
	// leadershipTick is how often leadership is looked at.
	leadershipTick = 25 * time.Millisecond
	// maxStreams bounds streams, those about to end included.
	maxStreams = 16384
)

// GrantorConfig is what a Grantor needs.
type GrantorConfig struct {
	// Length is D, of the leases it grants; at most MaxLength.
	Length time.Duration
	// Leads says, from memory, whether this node believes to lead, and in which
	// term. It may be wrong.
	Leads func() (term uint64, leads bool)
	// Prepare returns when everything committed before this node's term has
	// been given to Revoked and Require. earlier is the longest lease that any
	// leader may have granted.
	Prepare func(ctx context.Context) (term uint64, earlier time.Duration, err error)
	// Confirm asks the voters, beginning after the call, whether this node leads.
	Confirm func(ctx context.Context) (term uint64, err error)
	// Members are the nodes that may hold leases; Former those that were, and may
	// hold one for a while. Both from memory.
	Members, Former func() []string
	// Leader is what nodes are told that ask the wrong one.
	Leader func() (id, addr string)
	Log    *slog.Logger
}

// Grantor is the leader's side: it grants leases, and knows which have
// certainly ended. On other nodes it takes note of revocations and refuses
// streams. Safe for concurrent use.
type Grantor struct {
	cfg GrantorConfig
	log *slog.Logger

	now     func() int64  // CLOCK_MONOTONIC; tests have their own
	renewed chan struct{} // one token while renewals wait for a round

	mu struct {
		sync.Mutex
		l       *ledger
		waiters map[*waiter]struct{}
		streams int
	}
}

// waiter is an Await.
type waiter struct {
	seq  uint64
	wake chan struct{}
}

// NewGrantor returns a Grantor; Run makes it work.
func NewGrantor(cfg GrantorConfig) *Grantor {
	g := &Grantor{cfg: cfg, log: cfg.Log, now: monotonic, renewed: make(chan struct{}, 1)}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	g.mu.l = newLedger(cfg.Length)
	g.mu.waiters = map[*waiter]struct{}{}
	return g
}

// Run takes up leadership and lays it down, and holds the quorum rounds, until
// ctx ends.
func (g *Grantor) Run(ctx context.Context) error {
	tick := time.NewTicker(leadershipTick)
	defer tick.Stop()
	defer g.resign()
	var last time.Time // of a round's beginning
	var pause <-chan time.Time
	for {
		renewed := g.renewed
		if pause != nil {
			renewed = nil
		}
		select {
		case <-tick.C:
			g.lead(ctx)
		case <-renewed:
			if rest := roundPause - time.Since(last); rest > 0 {
				pause = time.After(rest)
				continue
			}
			last = time.Now()
			g.round(ctx)
		case <-pause:
			pause, last = nil, time.Now()
			g.round(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// lead compares what raft says with what the ledger has.
func (g *Grantor) lead(ctx context.Context) {
	term, leads := g.cfg.Leads()
	g.mu.Lock()
	have := g.mu.l.term
	g.mu.Unlock()
	switch {
	case !leads && have != 0:
		g.resign()
	case leads && have != term:
		elected := g.now()
		ctx, cancel := context.WithTimeout(ctx, g.cfg.Length)
		defer cancel()
		ready, earlier, err := g.cfg.Prepare(ctx)
		if err != nil || ready != term {
			g.log.Debug("not ready to grant leases", "term", term, "ready", ready, "err", err)
			return
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		g.mu.l.lead(term, elected, earlier)
		g.wakeAll()
		g.log.Info("granting leases", "term", term, "length", g.cfg.Length)
	}
}

func (g *Grantor) resign() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.mu.l.term != 0 {
		g.mu.l.resign()
		g.wakeAll()
	}
}

// round confirms leadership once for all renewals that have come, and grants.
func (g *Grantor) round(ctx context.Context) {
	g.mu.Lock()
	r := g.mu.l.begin()
	g.mu.Unlock()
	if len(r.renewals) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, g.cfg.Length/2)
	defer cancel()
	term, err := g.cfg.Confirm(ctx)
	if err != nil {
		g.log.Debug("leases were not granted: leadership was not confirmed", "err", err)
		return
	}
	members := g.cfg.Members()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mu.l.grant(r, term, func(name string) bool { return slices.Contains(members, name) })
}

// Revoked takes the next revocation from this node's applied events. All are
// given, in order, from the first event on, whether this node leads or not.
func (g *Grantor) Revoked(r Revocation) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mu.l.revoke(r)
	g.wake(r.Seq, r.Seq)
}

// Require says that event seq has been applied, and that a node must have
// folded it to use a lease granted from now on.
func (g *Grantor) Require(seq uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mu.l.require(seq)
	g.wake(seq, seq)
}

// Freeze tells all nodes to stop what payload names, before the revocation of
// that id is decided. It ends with the revocation, Abort, or after 5 s. A hint:
// nodes that do not hear it go on until the revocation or the end of their lease.
func (g *Grantor) Freeze(id ID, payload []byte) {
	if len(payload) > MaxPayload {
		return
	}
	g.broadcast(&frame{kind: kindFreeze, id: id, data: payload})
}

// Abort ends a Freeze whose revocation certainly was not stored.
func (g *Grantor) Abort(id ID) { g.broadcast(&frame{kind: kindAbort, id: id}) }

func (g *Grantor) broadcast(f *frame) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mu.l.broadcast(f)
}

// Await returns when revocation seq is in force at every node, or with what
// there is when ctx ends. limit is the longest that any node may go on without
// a lease in what was revoked: 0 for D, S for bounded(S), Unbounded for no
// bound. seq may also be an event given to Require: then the report says where
// it is known.
//
// ErrNotLeading comes with an empty report, or one that is not complete: the
// caller asks the next leader.
func (g *Grantor) Await(ctx context.Context, seq uint64, limit time.Duration) (Report, error) {
	if limit == 0 {
		limit = g.cfg.Length
	}
	w := &waiter{seq, make(chan struct{}, 1)}
	g.mu.Lock()
	g.mu.waiters[w] = struct{}{}
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		delete(g.mu.waiters, w)
		g.mu.Unlock()
	}()

	report, term := Report{Seq: seq}, uint64(0)
	// A leader just elected takes a moment until it knows what to say.
	lead := time.NewTimer(g.cfg.Length)
	defer lead.Stop()
	for {
		members, former := g.cfg.Members(), g.cfg.Former()
		g.mu.Lock()
		now := g.now()
		next, judged := int64(-1), false
		if l := g.mu.l; l.term != 0 && (term == 0 || term == l.term) && max(l.revoked, l.required) >= seq {
			judged, term = true, l.term
			next = l.judge(&report, members, former, limit, now)
		}
		lost := term != 0 && !judged
		g.mu.Unlock()
		switch {
		case lost:
			return report, ErrNotLeading
		case judged && report.Complete:
			return report, nil
		}
		var timer <-chan time.Time
		if next >= 0 {
			timer = time.After(time.Duration(next-now) + 1)
		}
		expired := lead.C
		if judged {
			expired = nil
		}
		select {
		case <-w.wake:
		case <-timer:
		case <-expired:
			return report, ErrNotLeading
		case <-ctx.Done():
			if !judged {
				return report, ErrNotLeading
			}
			return report, nil
		}
	}
}

// judge fills in the report and says when, on the own clock, the next lease
// certainly ends; -1 if only words can change it.
func (l *ledger) judge(r *Report, members, former []string, limit time.Duration, now int64) (next int64) {
	next = -1
	wall := time.Now()
	at := func(mono int64) time.Time { return wall.Add(time.Duration(mono - now)) }
	had := map[string]bool{}
	for _, n := range r.Nodes {
		had[n.Node] = true
	}
	seq := r.Seq
	*r = Report{Seq: seq, Complete: true}
	judge := func(name string, always bool) {
		s, when, ends, why := l.verdict(name, seq, limit, now)
		if !always && s != Unconfirmed && !had[name] {
			return // was never waited for
		}
		n := NodeReport{Node: name, State: s, Reason: why}
		if t := l.nodes[name]; t != nil {
			n.Level = int(t.level)
			if s == Confirmed {
				n.Note = t.notes[seq].text
			}
		}
		switch {
		case s != Unconfirmed && when > 0:
			n.At = at(when)
		case s != Unconfirmed:
			n.At = wall
		default:
			r.Complete = false
			if ends >= 0 {
				n.At = at(ends)
				if next < 0 || ends < next {
					next = ends
				}
			}
		}
		r.Nodes = append(r.Nodes, n)
	}
	for _, name := range members {
		judge(name, true)
	}
	for _, name := range former {
		judge(name, false)
	}
	return next
}

// wake has every Await look again that waits for low, or for anything up to high.
func (g *Grantor) wake(low, high uint64) {
	for w := range g.mu.waiters {
		if w.seq == low || w.seq <= high {
			select {
			case w.wake <- struct{}{}:
			default:
			}
		}
	}
}

func (g *Grantor) wakeAll() { g.wake(0, ^uint64(0)) }

var (
	errReplaced = errors.New("the stream was replaced, or its node did not keep up")
	errStreams  = errors.New("too many streams")
)

// Serve speaks with a node, whose name its certificate gave, until the stream
// ends. It closes conn.
func (g *Grantor) Serve(conn net.Conn, peer string) error {
	defer conn.Close()
	g.mu.Lock()
	if g.mu.streams >= maxStreams {
		g.mu.Unlock()
		return errStreams
	}
	g.mu.streams++
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		g.mu.streams--
		g.mu.Unlock()
	}()

	in := bufio.NewReader(conn)
	conn.SetReadDeadline(time.Now().Add(helloTimeout))
	f, err := readFrame(in)
	if err != nil {
		return err
	}
	if f.kind != kindHello {
		return errFrame
	}
	if !slices.Contains(g.cfg.Members(), peer) {
		return g.refuse(conn, "")
	}
	g.mu.Lock()
	if g.mu.l.term == 0 {
		g.mu.Unlock()
		return g.refuse(conn, peer)
	}
	k := g.mu.l.connect(peer, f)
	g.wake(0, f.quiet)
	g.mu.Unlock()

	var sending sync.WaitGroup
	sending.Go(func() { g.send(conn, k) })
	err = g.receive(conn, in, k)
	g.mu.Lock()
	g.mu.l.disconnect(k)
	g.mu.Unlock()
	conn.Close()
	sending.Wait()
	return err
}

// refuse tells a node who leads.
func (g *Grantor) refuse(conn net.Conn, peer string) error {
	var f = frame{kind: kindRefuse}
	if id, addr := g.cfg.Leader(); peer != "" && len(id) < 256 && len(addr) <= 1<<10 {
		f.leader, f.data = id, []byte(addr)
	}
	conn.SetWriteDeadline(time.Now().Add(helloTimeout))
	_, err := conn.Write(f.append(nil))
	return err
}

// send writes what is queued, all there is at once, until the link closes.
func (g *Grantor) send(conn net.Conn, k *link) {
	var b []byte
	for range k.signal {
		g.mu.Lock()
		out, closed := k.take(), k.closed
		g.mu.Unlock()
		if closed {
			break
		}
		b = b[:0]
		for _, f := range out {
			b = append(b, f...)
		}
		conn.SetWriteDeadline(time.Now().Add(g.cfg.Length))
		if _, err := conn.Write(b); err != nil {
			break
		}
	}
	conn.Close() // ends receive
}

func (g *Grantor) receive(conn net.Conn, in *bufio.Reader, k *link) error {
	for {
		conn.SetReadDeadline(time.Now().Add(g.cfg.Length))
		f, err := readFrame(in)
		if err != nil {
			return err
		}
		now := g.now()
		g.mu.Lock()
		if k.closed {
			g.mu.Unlock()
			return errReplaced
		}
		switch f.kind {
		case kindRenew:
			g.mu.l.renew(k, f, now)
			select {
			case g.renewed <- struct{}{}:
			default:
			}
			g.wake(0, f.quiet)
		case kindAck:
			g.mu.l.ack(k, f, now)
			g.wake(f.seq, f.quiet)
		case kindBye:
			g.mu.l.bye(k)
			g.wakeAll()
		default:
			err = errFrame
		}
		g.mu.Unlock()
		if err != nil || f.kind == kindBye {
			return err
		}
	}
}

// Lease is what the leader knows of a node's lease.
type Lease struct {
	Node      string        `json:"node"`
	Connected bool          `json:"connected"`
	Level     int           `json:"level"`
	Left      time.Duration `json:"left"` // until it certainly ends; 0 when it has
	Quiet     uint64        `json:"quiet"`
}

// Leases tells how the members do, nil on a node that does not lead.
func (g *Grantor) Leases() []Lease {
	members := g.cfg.Members()
	g.mu.Lock()
	defer g.mu.Unlock()
	l, now := g.mu.l, g.now()
	if l.term == 0 {
		return nil
	}
	out := make([]Lease, 0, len(members))
	for _, name := range members {
		v := Lease{Node: name}
		from := l.elected
		if t := l.nodes[name]; t != nil {
			v.Connected, v.Level, v.Quiet = t.link != nil, int(t.level), t.quiet
			from = max(from, t.renewed, t.ghost)
		}
		v.Left = max(0, time.Duration(l.end(from, l.length, l.length)-now))
		out = append(out, v)
	}
	return out
}

package fence

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// renewals is how many renewals a lease has.
	renewals = 4
	// retryPause is how long a node waits before it tries a leader again.
	retryPause = 25 * time.Millisecond
	// maxFreezes bounds freezes at one time; more are not heeded: they are hints.
	maxFreezes = 4096
	// maxOwed bounds acknowledgements not sent yet; beyond it the stream is
	// begun anew, and says it in one number.
	maxOwed = 16384
	// byeTimeout bounds a node's goodbye.
	byeTimeout = 200 * time.Millisecond
)

// HolderConfig is what a Holder needs.
type HolderConfig struct {
	// Length is the longest lease this node takes; at most MaxLength.
	Length   time.Duration
	Enforcer Enforcer
	Gate     Gate // nil: level 1
	// Leader is the leader as this node knows it from memory, "" for none.
	Leader func() (id, addr string)
	// Dial opens a stream to the leader's Grantor; it is closed by the Holder.
	Dial func(ctx context.Context, id, addr string) (net.Conn, error)
	Log  *slog.Logger
}

// lease is what Check reads; it is never changed.
type lease struct {
	t0   int64 // on CLOCK_BOOTTIME
	held time.Duration
}

// Holder is a node's side: it keeps a lease, and has revocations enforced
// whichever way they come. Safe for concurrent use.
type Holder struct {
	cfg         HolderConfig
	log         *slog.Logger
	incarnation ID
	now         func() int64 // CLOCK_BOOTTIME; tests have their own

	lease atomic.Pointer[lease] // nil: none

	owe  chan struct{} // one token while there is something to send
	done chan struct{} // closed when Run returns
	wg   sync.WaitGroup

	mu struct {
		sync.Mutex
		core    *tenancy
		freezes map[ID]*time.Timer
		owed    []frame                   // acknowledgements
		rested  []rested                  // quiescent already when enforced
		changed chan struct{}             // closed when held changes
		held    bool                      // as Changed has told
		lapse   *time.Timer               // at the lease's end
		idle    bool                      // nothing forwards any more: goodbye may be said
		left    error                     // why the lease was given up for good
		over    bool                      // Run waits for what it began: nothing more is begun
		next    struct{ id, addr string } // who leads, as the last node asked said
	}
}

type rested struct {
	seq  uint64
	note []byte
}

// NewHolder returns a Holder without a lease; Run gets one.
func NewHolder(cfg HolderConfig) *Holder {
	h := &Holder{cfg: cfg, log: cfg.Log, now: boottime, owe: make(chan struct{}, 1), done: make(chan struct{})}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	rand.Read(h.incarnation[:]) // never fails
	h.mu.core = newTenancy(cfg.Length, h.enforce)
	h.mu.freezes = map[ID]*time.Timer{}
	h.mu.changed = make(chan struct{})
	return h
}

// Check says whether data may pass now: nil, or ErrNoLease. limit is how old
// the lease may be: 0 for D, S for bounded(S), Unbounded for any age, which a
// lease given up fails all the same. It is called before every write, again
// after it, and reads the clock each time: whatever keeps a time for it could
// stand still while its caller runs.
func (h *Holder) Check(limit time.Duration) error {
	l := h.lease.Load()
	if l == nil {
		return ErrNoLease
	}
	if limit == 0 {
		limit = l.held
	}
	if limit != Unbounded && h.now()-l.t0 >= int64(limit) {
		return ErrNoLease
	}
	return nil
}

// Left is how long Check with this limit will go on to pass without a renewal;
// 0 when it fails.
func (h *Holder) Left(limit time.Duration) time.Duration {
	l := h.lease.Load()
	if l == nil {
		return 0
	}
	if limit == 0 {
		limit = l.held
	}
	return max(0, limit-time.Duration(h.now()-l.t0))
}

// Changed is closed when the lease (of length D) is lost or gained next. It is
// for whoever freezes and resumes; nothing is safe because of it.
func (h *Holder) Changed() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mu.changed
}

// Revoked has a revocation of the node's own event log enforced, unless the
// stream brought it. All are given, in order.
func (h *Holder) Revoked(r Revocation) {
	h.do(func(now int64) { h.mu.core.logged(r, now) })
}

// Folded says that this node knows all events up to seq, and has given all
// revocations among them to Revoked.
func (h *Holder) Folded(seq uint64) {
	h.do(func(now int64) { h.mu.core.foldedTo(seq, now) })
}

// GiveUp drops the lease for good, because of why: checks fail from now on. The
// leader waits until the lease would have ended.
func (h *Holder) GiveUp(why error) { h.leave(why, false) }

// Release is GiveUp of a node that forwards nothing any more: it tells the
// leader so, who need not wait for it.
func (h *Holder) Release(why error) { h.leave(why, true) }

func (h *Holder) leave(why error, idle bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mu.left == nil {
		h.mu.left = why
		h.mu.core.drop()
		h.settled()
	}
	h.mu.idle = h.mu.idle || idle
	h.wake()
}

// do runs one step of the protocol and brings what it led to into effect.
func (h *Holder) do(step func(now int64)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	step(h.now())
	h.settled()
}

// settled brings what the core decided into effect. The caller holds mu.
func (h *Holder) settled() {
	core := h.mu.core
	for len(h.mu.rested) > 0 {
		r := h.mu.rested[0]
		h.mu.rested = h.mu.rested[1:]
		core.quiesced(r.seq, h.now())
		h.ack(r)
	}
	switch old := h.lease.Load(); {
	case core.t0 == 0 && old != nil:
		h.lease.Store(nil)
		h.extend(0)
	case core.t0 != 0 && (old == nil || old.t0 != core.t0):
		// The gate before the check: what passes the check then leaves.
		h.extend(core.t0 + int64(core.held))
		h.lease.Store(&lease{core.t0, core.held})
	}
	now := h.now()
	held := core.holds(now)
	if held {
		left := time.Duration(core.t0 + int64(core.held) - now)
		if h.mu.lapse == nil {
			h.mu.lapse = time.AfterFunc(left, func() { h.do(func(int64) {}) })
		} else {
			h.mu.lapse.Reset(left)
		}
	}
	if held != h.mu.held {
		h.mu.held = held
		close(h.mu.changed)
		h.mu.changed = make(chan struct{})
		if held {
			h.log.Info("this node holds a lease")
		} else {
			h.log.Warn("this node has lost its lease: nothing passes that needs one")
		}
	}
}

// extend opens the kernel's gate until a time on CLOCK_BOOTTIME.
func (h *Holder) extend(until int64) {
	if h.cfg.Gate == nil {
		return
	}
	if err := h.cfg.Gate.Extend(func() time.Duration { return time.Duration(until - h.now()) }); err != nil {
		h.log.Error("the kernel gate could not be set; it shuts by itself", "err", err)
		return
	}
	if until > 0 && h.now() >= until { // we were stopped on the way
		if err := h.cfg.Gate.Extend(func() time.Duration { return 0 }); err != nil {
			h.log.Error("the kernel gate could not be shut", "err", err)
		}
	}
}

// enforce is called by the core, under mu.
func (h *Holder) enforce(r Revocation) {
	quiescent := h.cfg.Enforcer.Enforce(r)
	h.thaw(r.ID)
	select {
	case note := <-quiescent:
		h.mu.rested = append(h.mu.rested, rested{r.Seq, note})
		return
	default:
	}
	if h.mu.over { // nobody is left to tell
		return
	}
	h.wg.Go(func() {
		select {
		case note := <-quiescent:
			h.mu.Lock()
			defer h.mu.Unlock()
			h.mu.rested = append(h.mu.rested, rested{r.Seq, note})
			h.settled()
		case <-h.done:
		}
	})
}

// ack owes the leader word of a quiescence. The caller holds mu.
func (h *Holder) ack(r rested) {
	if len(r.note) > MaxNote {
		r.note = nil
	}
	if len(h.mu.owed) < maxOwed {
		h.mu.owed = append(h.mu.owed, frame{kind: kindAck, seq: r.seq, quiet: h.mu.core.quiet(), data: r.note})
	}
	h.wake()
}

func (h *Holder) wake() {
	select {
	case h.owe <- struct{}{}:
	default:
	}
}

// freeze and thaw are called under mu.
func (h *Holder) freeze(id ID, payload []byte) {
	if h.mu.freezes[id] != nil || len(h.mu.freezes) >= maxFreezes {
		return
	}
	h.cfg.Enforcer.Freeze(id, payload)
	h.mu.freezes[id] = time.AfterFunc(freezeTimeout, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.thaw(id)
	})
}

func (h *Holder) thaw(id ID) {
	if t := h.mu.freezes[id]; t != nil {
		t.Stop()
		delete(h.mu.freezes, id)
		h.cfg.Enforcer.Thaw(id)
	}
}

// Run keeps a lease from whoever leads until ctx ends. The lease it has then
// goes on until its end, unless it was given up.
func (h *Holder) Run(ctx context.Context) error {
	defer func() {
		h.mu.Lock()
		h.mu.over = true
		h.mu.Unlock()
		close(h.done)
		h.wg.Wait()
	}()
	failed := ""
	for ctx.Err() == nil {
		if id, addr := h.leader(); id != "" {
			err := h.attend(ctx, id, addr)
			if ctx.Err() != nil {
				break
			}
			if s := fmt.Sprint(id, err); s != failed {
				failed = s
				h.log.Debug("the stream to the leader ended", "leader", id, "err", err)
			}
		}
		select {
		case <-time.After(retryPause):
		case <-ctx.Done():
		}
	}
	return nil
}

// leader is who to ask: whom this node knows, or else whom another one named.
func (h *Holder) leader() (id, addr string) {
	h.mu.Lock()
	next := h.mu.next
	h.mu.next.id = ""
	h.mu.Unlock()
	if next.id != "" {
		return next.id, next.addr
	}
	return h.cfg.Leader()
}

var (
	errLeaderChanged = errors.New("another node leads")
	errRefused       = errors.New("the node does not lead, or does not know this one")
	errBehind        = errors.New("this node does not keep up")
)

// attend keeps up a stream to one leader until it fails or another one leads.
func (h *Holder) attend(ctx context.Context, id, addr string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	known, _ := h.cfg.Leader()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	wg.Go(func() {
		tick := time.NewTicker(retryPause)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if now, _ := h.cfg.Leader(); now != known && now != "" && now != id {
					cancel(errLeaderChanged)
					return
				}
			case <-ctx.Done():
				return
			}
		}
	})
	dctx, stop := context.WithTimeout(ctx, h.cfg.Length)
	conn, err := h.cfg.Dial(dctx, id, addr)
	stop()
	if err != nil {
		return err
	}
	defer conn.Close()
	wg.Go(func() {
		cancel(h.receive(conn))
	})
	sent := make(chan struct{})
	wg.Go(func() {
		<-ctx.Done()
		select {
		case <-sent:
		case <-time.After(byeTimeout):
		}
		conn.Close() // ends receive, and a send that hangs
	})
	err = h.send(ctx, conn)
	close(sent)
	cancel(err)
	return err
}

// send says hello, renews, and acknowledges.
func (h *Holder) send(ctx context.Context, conn net.Conn) error {
	h.mu.Lock()
	b := h.hello()
	h.mu.Unlock()
	tick := time.NewTicker(h.cfg.Length / renewals)
	defer tick.Stop()
	for renew := true; ; {
		h.mu.Lock()
		left, idle := h.mu.left, h.mu.idle
		if left == nil && renew {
			// The clock before anything leaves: the lease counts from here.
			n := h.mu.core.renew(h.now())
			b = (&frame{kind: kindRenew, n: n, quiet: h.mu.core.quiet(), level: h.level()}).append(b)
		}
		for i := range h.mu.owed {
			b = h.mu.owed[i].append(b)
		}
		behind := len(h.mu.owed) == maxOwed
		h.mu.owed = nil
		h.mu.Unlock()
		if idle {
			b = (&frame{kind: kindBye}).append(b)
		}
		if len(b) > 0 {
			conn.SetWriteDeadline(time.Now().Add(h.cfg.Length))
			if _, err := conn.Write(b); err != nil {
				return err
			}
		}
		switch {
		case idle:
			<-ctx.Done()
			return context.Cause(ctx)
		case behind:
			return errBehind
		}
		b, renew = b[:0], false
		select {
		case <-tick.C:
			renew = true
		case <-h.owe:
		case <-ctx.Done():
			return h.stopped(ctx, conn)
		}
	}
}

// stopped sends the goodbye of a node that is idle, if that has not left yet.
func (h *Holder) stopped(ctx context.Context, conn net.Conn) error {
	h.mu.Lock()
	idle := h.mu.idle
	h.mu.Unlock()
	if idle {
		conn.SetWriteDeadline(time.Now().Add(byeTimeout))
		if _, err := conn.Write((&frame{kind: kindBye}).append(nil)); err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

// hello introduces this process, and tells what has come to rest. The caller
// holds mu.
func (h *Holder) hello() []byte {
	core := h.mu.core
	f := frame{kind: kindHello, incarnation: h.incarnation, length: h.cfg.Length, level: h.level(),
		granted: core.granted, enforced: core.enforced, quiet: core.quiet()}
	b := f.append(nil)
	owed := make(map[uint64]bool, len(h.mu.owed))
	for _, a := range h.mu.owed {
		owed[a.seq] = true
	}
	for seq := range core.still {
		if !owed[seq] {
			b = (&frame{kind: kindAck, seq: seq, quiet: f.quiet}).append(b)
		}
	}
	core.sent = nil // nobody answers them any more
	return b
}

func (h *Holder) level() uint8 {
	if h.cfg.Gate != nil {
		return 2
	}
	return 1
}

// receive takes what the leader sends, in its order.
func (h *Holder) receive(conn net.Conn) error {
	in := bufio.NewReader(conn)
	for {
		// A grant comes with each renewal.
		conn.SetReadDeadline(time.Now().Add(h.cfg.Length / 2))
		f, err := readFrame(in)
		if err != nil {
			return err
		}
		switch f.kind {
		case kindFreeze:
			h.do(func(int64) { h.freeze(f.id, f.data) })
		case kindAbort:
			h.do(func(int64) { h.thaw(f.id) })
		case kindRevoke:
			h.do(func(now int64) { h.mu.core.revoke(f.prev, Revocation{f.seq, f.id, f.data}, now) })
		case kindGrant:
			h.do(func(now int64) {
				if h.mu.left == nil {
					h.mu.core.grant(f, now)
				}
			})
		case kindRefuse:
			h.mu.Lock()
			h.mu.next.id, h.mu.next.addr = f.leader, string(f.data)
			h.mu.Unlock()
			return errRefused
		default:
			return errFrame
		}
	}
}

package fence

import "time"

// tenancy is the node's side of the protocol without clock, network or
// goroutines: a Holder drives it, and so does the model. now is on the node's
// own clock.
type tenancy struct {
	length  time.Duration    // the longest lease this node takes
	enforce func(Revocation) // quiesced is called later, for each

	n    uint64    // newest renewal
	sent []renewed // renewals without an answer, oldest first

	t0      int64 // the lease counts from here; 0: none
	held    time.Duration
	granted bool // there has been one
	parked  []parked

	folded   uint64              // the event log is known up to here
	enforced uint64              // every revocation up to here was enforced
	ahead    map[uint64]struct{} // and these after it
	busy     map[uint64]struct{} // enforced, and not quiescent yet
	still    map[uint64]struct{} // quiescent before others they follow
}

type renewed struct {
	n  uint64
	t0 int64
}

// parked is a grant that came before what it stands behind was enforced.
type parked struct {
	t0              int64
	length          time.Duration
	revoked, folded uint64
}

const (
	// maxSent bounds renewals without an answer: a lease has four.
	maxSent = 16
	// maxAhead bounds revocations taken before those they follow. More than
	// that come by the log.
	maxAhead = 4096
)

func newTenancy(length time.Duration, enforce func(Revocation)) *tenancy {
	return &tenancy{length: length, enforce: enforce, ahead: map[uint64]struct{}{}, busy: map[uint64]struct{}{}, still: map[uint64]struct{}{}}
}

// renew begins a renewal; now was read before anything of it is sent.
func (h *tenancy) renew(now int64) uint64 {
	h.n++
	if len(h.sent) == maxSent {
		h.sent = append(h.sent[:0], h.sent[1:]...)
	}
	h.sent = append(h.sent, renewed{h.n, now})
	return h.n
}

// grant takes a lease counted from the renewal's t0, once all that the leader
// put in front of it is in force here.
func (h *tenancy) grant(f *frame, now int64) {
	for i, s := range h.sent {
		if s.n != f.n {
			continue
		}
		h.sent = append(h.sent[:0], h.sent[i+1:]...) // older answers would be no use
		if len(h.parked) == maxSent {
			h.parked = append(h.parked[:0], h.parked[1:]...)
		}
		h.parked = append(h.parked, parked{s.t0, min(f.length, h.length), f.revoked, f.folded})
		h.settle(now)
		return
	}
}

// settle uses the grants that may be used now.
//
// After a pause, or whenever the lease had ended, the leader may have reported
// this node as fenced: then what was revoked meanwhile must have come to rest,
// too, before anything passes again. Else a socket of it, whose bytes the
// kernel gate held back, would send them.
func (h *tenancy) settle(now int64) {
	keep := h.parked[:0]
	for _, p := range h.parked {
		switch {
		case p.t0+int64(p.length) <= now || p.t0 <= h.t0: // too late, or not the newest
		case h.enforced < p.revoked || h.folded < p.folded,
			!h.holds(now) && h.quiet() < p.revoked:
			keep = append(keep, p)
		default:
			h.t0, h.held, h.granted = p.t0, p.length, true
		}
	}
	h.parked = keep
}

// holds says whether data of the strictest rules may pass.
func (h *tenancy) holds(now int64) bool { return h.t0 != 0 && now < h.t0+int64(h.held) }

// drop gives the lease up, and what would become one.
func (h *tenancy) drop() {
	h.t0, h.parked, h.sent = 0, nil, nil
}

// revoke takes a revocation from the stream; none is between prev and it.
func (h *tenancy) revoke(prev uint64, r Revocation, now int64) {
	if h.known(r.Seq) {
		return
	}
	if h.enforced < prev {
		if len(h.ahead) == maxAhead {
			return // by the log, then
		}
		h.ahead[r.Seq] = struct{}{}
	}
	h.begin(r)
	if h.enforced >= prev {
		h.advance(r.Seq)
	}
	h.settle(now)
}

// logged takes a revocation from the node's own event log, in order.
func (h *tenancy) logged(r Revocation, now int64) {
	if !h.known(r.Seq) {
		h.begin(r)
	}
	h.advance(r.Seq)
	h.settle(now)
}

// foldedTo says that the node knows all events up to seq, and has given all
// revocations among them to logged.
func (h *tenancy) foldedTo(seq uint64, now int64) {
	h.folded = max(h.folded, seq)
	h.advance(seq)
	h.settle(now)
}

func (h *tenancy) known(seq uint64) bool {
	_, ahead := h.ahead[seq]
	return ahead || seq <= h.enforced
}

func (h *tenancy) begin(r Revocation) {
	h.busy[r.Seq] = struct{}{}
	h.enforce(r)
}

func (h *tenancy) advance(seq uint64) {
	if seq <= h.enforced {
		return
	}
	h.enforced = seq
	for s := range h.ahead {
		if s <= seq {
			delete(h.ahead, s)
		}
	}
}

// quiesced says that nothing of a revocation moves any more.
func (h *tenancy) quiesced(seq uint64, now int64) {
	delete(h.busy, seq)
	if len(h.still) < maxAhead {
		h.still[seq] = struct{}{}
	}
	quiet := h.quiet()
	for s := range h.still {
		if s <= quiet {
			delete(h.still, s)
		}
	}
	h.settle(now)
}

// quiet is the number up to which all revocations are in force and at rest.
func (h *tenancy) quiet() uint64 {
	q := h.enforced
	for s := range h.busy {
		q = min(q, s-1)
	}
	return q
}

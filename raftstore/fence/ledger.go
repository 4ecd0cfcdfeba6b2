package fence

import (
	"time"
)

// ledger is the leader's side of the protocol without clock, network or
// goroutines: a Grantor drives it, and so does the model. now is on the
// leader's own clock.
type ledger struct {
	length  time.Duration
	certain func(time.Duration) time.Duration

	term    uint64        // 0 while this node does not lead
	elected int64         // a moment after the election
	earlier time.Duration // the longest lease that earlier leaders granted

	nodes    map[string]*tenant
	recent   []Revocation // the newest, oldest first
	bytes    int          // of their payloads
	base     uint64       // no revocation is between base and the first of recent
	revoked  uint64       // newest revocation
	required uint64       // newest event that a node must know to use a grant

	waiting []*link // that have renewed since the last round began
}

// tenant is what the ledger knows of a node.
type tenant struct {
	name        string
	link        *link // nil while not connected
	incarnation ID
	level       uint8
	fresh       bool  // its process had no lease when it connected
	released    bool  // its process has given back what it had
	renewed     int64 // newest renewal of this process that was granted in this term; 0 none
	ghost       int64 // of earlier processes

	quiet uint64              // it has acknowledged all revocations up to here
	ahead map[uint64]struct{} // and these
	notes map[uint64]note     // of the newest acknowledgements
	order []uint64            // keys of notes, oldest first
}

type note struct {
	at   int64
	text []byte
}

// link is a node's stream: frames for it in the one order they are sent in.
type link struct {
	t      *tenant
	out    [][]byte // encoded, not taken yet
	bytes  int
	closed bool          // the stream must end: it was replaced, or fell behind
	signal chan struct{} // one token while there is something to do for who sends

	n       uint64 // newest renewal, when waiting
	at      int64
	renewal bool // is in ledger.waiting
}

const (
	// maxRecent and maxRecentBytes bound what a node gets by the stream when it
	// connects; what is older it has in its log.
	maxRecent      = 4096
	maxRecentBytes = 4 << 20
	// maxQueue and maxQueueBytes bound what waits for one node. One that does
	// not take that much loses the stream, never the order.
	maxQueue      = 16384
	maxQueueBytes = 16 << 20
	// maxAcked bounds acknowledgements out of order; beyond it the node's next
	// renewal tells.
	maxAcked = 16384
	// maxNotes is how many of a node's notes are kept for the reports.
	maxNotes = 4096
)

func newLedger(length time.Duration) *ledger {
	return &ledger{length: length, certain: certain, nodes: map[string]*tenant{}}
}

// lead begins a term: everything committed before it has been given to
// revoke and require. elected is any moment after the election; earlier the
// longest lease any leader may have granted. Nodes connect anew.
func (l *ledger) lead(term uint64, elected int64, earlier time.Duration) {
	l.resign()
	l.term, l.elected, l.earlier = term, elected, max(earlier, l.length)
}

// resign ends the term. Nodes find their next leader.
func (l *ledger) resign() {
	for _, t := range l.nodes {
		if t.link != nil {
			t.link.close()
		}
	}
	l.term, l.nodes, l.waiting = 0, map[string]*tenant{}, nil
}

// connect begins a node's stream; one it had before ends.
func (l *ledger) connect(name string, f *frame) *link {
	t := l.nodes[name]
	if t == nil {
		t = &tenant{name: name, incarnation: f.incarnation, fresh: !f.granted}
		l.nodes[name] = t
	}
	if t.link != nil {
		t.link.close()
	}
	if t.incarnation != f.incarnation {
		// Another process: what the earlier one acknowledged says nothing of
		// this one, and what it holds may go on until it ends.
		t.incarnation, t.fresh, t.released = f.incarnation, true, false
		t.ghost, t.renewed = max(t.ghost, t.renewed), 0
		t.quiet = 0
		t.ahead, t.notes, t.order = nil, nil, nil
	}
	if t.ahead == nil {
		t.ahead, t.notes = map[uint64]struct{}{}, map[uint64]note{}
	}
	t.level = f.level
	t.quietTo(f.quiet)
	t.link = &link{t: t, signal: make(chan struct{}, 1)}
	prev := l.base
	for _, r := range l.recent {
		if r.Seq > f.enforced {
			t.link.revoke(prev, r)
		}
		prev = r.Seq
	}
	return t.link
}

// disconnect ends a stream. The lease goes on until it ends by itself.
func (l *ledger) disconnect(k *link) {
	k.close()
	if k.t.link == k {
		k.t.link = nil
	}
}

// bye takes a lease back from a node that forwards nothing any more.
func (l *ledger) bye(k *link) {
	if k.t.link == k {
		k.t.renewed, k.t.released = 0, true
		l.disconnect(k)
	}
}

// renew takes a node's renewal, to be granted after a round that begins later.
func (l *ledger) renew(k *link, f *frame, now int64) {
	if k.closed || l.term == 0 {
		return
	}
	k.t.level = f.level
	k.t.quietTo(f.quiet)
	k.n, k.at = f.n, now
	if !k.renewal {
		k.renewal = true
		l.waiting = append(l.waiting, k)
	}
}

// round is what one quorum round covers.
type round struct {
	term     uint64
	renewals []renewal
}

type renewal struct {
	link *link
	n    uint64
	at   int64
}

// begin takes the renewals that came before now: the question to the quorum
// must be sent after it.
func (l *ledger) begin() round {
	r := round{term: l.term}
	for _, k := range l.waiting {
		k.renewal = false
		r.renewals = append(r.renewals, renewal{k, k.n, k.at})
	}
	l.waiting = nil
	return r
}

// grant ends a round that a majority of voters, asked after it began,
// confirmed in term. member says who may hold a lease.
func (l *ledger) grant(r round, term uint64, member func(string) bool) {
	if l.term == 0 || l.term != r.term || term != r.term {
		return
	}
	for _, v := range r.renewals {
		t := v.link.t
		if v.link.closed || t.link != v.link || !member(t.name) {
			continue
		}
		// Before it is queued: from here on the node may hold it.
		t.renewed = max(t.renewed, v.at)
		v.link.push(&frame{kind: kindGrant, n: v.n, length: l.length, revoked: l.revoked, folded: l.required})
	}
}

// revoke takes the next revocation from the leader's applied log, leading or not.
func (l *ledger) revoke(r Revocation) {
	if r.Seq <= l.revoked {
		return
	}
	prev := max(l.revoked, l.base)
	l.revoked = r.Seq
	if len(r.Payload) > MaxPayload {
		l.recent, l.bytes, l.base = nil, 0, r.Seq // the next one says what is missing
		return
	}
	for _, t := range l.nodes {
		if t.link != nil {
			t.link.revoke(prev, r)
		}
	}
	l.recent = append(l.recent, r)
	l.bytes += len(r.Payload)
	for len(l.recent) > maxRecent || l.bytes > maxRecentBytes {
		l.base, l.bytes = l.recent[0].Seq, l.bytes-len(l.recent[0].Payload)
		l.recent[0] = Revocation{}
		l.recent = l.recent[1:]
	}
}

// require says that grants from now on are for nodes that know event seq.
func (l *ledger) require(seq uint64) { l.required = max(l.required, seq) }

// broadcast sends a hint to all nodes: a Freeze or its end.
func (l *ledger) broadcast(f *frame) {
	if l.term == 0 {
		return
	}
	b := f.append(nil)
	for _, t := range l.nodes {
		if t.link != nil {
			t.link.queue(b)
		}
	}
}

// ack takes a node's word that a revocation has come to rest.
func (l *ledger) ack(k *link, f *frame, now int64) {
	t := k.t
	if t.link != k {
		return
	}
	if len(t.order) == maxNotes {
		delete(t.notes, t.order[0])
		t.order = t.order[1:]
	}
	if _, dup := t.notes[f.seq]; !dup {
		t.notes[f.seq] = note{now, f.data}
		t.order = append(t.order, f.seq)
	}
	if f.seq > t.quiet && len(t.ahead) < maxAcked {
		t.ahead[f.seq] = struct{}{}
	}
	t.quietTo(f.quiet)
}

// verdict says how revocation seq stands at a node: if not decided, it may be
// at ends, or only the node can say (ends < 0).
func (l *ledger) verdict(name string, seq uint64, limit time.Duration, now int64) (s State, at, ends int64, why string) {
	t := l.nodes[name]
	before := l.end(l.elected, max(limit, l.earlier), limit)
	if t == nil {
		why = "it has not spoken to this leader"
		if limit == Unbounded {
			return Unconfirmed, 0, -1, why
		}
		return expired(before, now, why)
	}
	if t.acked(seq) {
		// Its word is about its own process. What an earlier one may hold must end.
		ends = 0
		if t.ghost > 0 {
			ends = l.end(t.ghost, limit, limit)
		}
		if t.fresh {
			ends = max(ends, before)
		}
		if limit == Unbounded || now > ends {
			return Confirmed, max(t.notes[seq].at, ends), ends, ""
		}
		return Unconfirmed, 0, ends, "it was started anew, and its earlier process may hold a lease"
	}
	why = "it does not answer"
	if t.link != nil {
		why = "it has not come to rest"
	}
	if limit == Unbounded {
		return Unconfirmed, 0, -1, why
	}
	if !t.released || t.fresh {
		ends = before
	}
	if last := max(t.renewed, t.ghost); last > 0 {
		ends = max(ends, l.end(last, limit, limit))
	}
	return expired(ends, now, why)
}

func (l *ledger) end(from int64, d, limit time.Duration) int64 {
	if limit == Unbounded {
		return 0
	}
	return from + int64(l.certain(d))
}

func expired(ends, now int64, why string) (State, int64, int64, string) {
	if now > ends {
		return Expired, ends, ends, why
	}
	return Unconfirmed, 0, ends, why
}

func (t *tenant) acked(seq uint64) bool {
	_, ok := t.ahead[seq]
	return ok || seq <= t.quiet
}

func (t *tenant) quietTo(seq uint64) {
	if seq <= t.quiet {
		return
	}
	t.quiet = seq
	for s := range t.ahead {
		if s <= seq {
			delete(t.ahead, s)
		}
	}
}

func (k *link) revoke(prev uint64, r Revocation) {
	k.push(&frame{kind: kindRevoke, prev: prev, seq: r.Seq, id: r.ID, data: r.Payload})
}

func (k *link) push(f *frame) { k.queue(f.append(nil)) }

// queue adds an encoded frame, which others may share.
func (k *link) queue(b []byte) {
	if k.closed {
		return
	}
	if len(k.out) >= maxQueue || k.bytes+len(b) > maxQueueBytes {
		k.close()
		return
	}
	k.out, k.bytes = append(k.out, b), k.bytes+len(b)
	k.wake()
}

// close has the stream ended by who sends on it; what is queued is thrown away.
func (k *link) close() {
	k.closed, k.out, k.bytes = true, nil, 0
	k.wake()
}

func (k *link) wake() {
	select {
	case k.signal <- struct{}{}:
	default:
	}
}

// take empties the queue.
func (k *link) take() [][]byte {
	out := k.out
	k.out, k.bytes = nil, 0
	return out
}

package fence

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

// The protocol under all that can happen to it: ledger, tenancy, Tally and the
// frames between them are the product's; what surrounds them is a discrete
// event simulation with virtual time. Voters run a simplified Raft (votes,
// up-to-date check, the whole log in each append). Messages have delays with a
// heavy tail; processes are paused, partitioned and have clocks that drift as
// far apart as the bound allows. A node forwards for every subject that it may;
// forwarding after that subject's revocation was reported complete is a
// violation. The same runs with one thing left out or done wrong (fault) must
// find violations: the model is able to see each of them.

const (
	modelVoters = 3
	modelNodes  = 4
	modelD      = time.Second
	// modelDrift is larger than the product's, so that a margin left out shows
	// in fewer runs.
	modelDrift = 0.05
	modelRevs  = 10
	modelEnd   = 22.0 // seconds of real time in the model
)

// fault is what a run does wrong.
type fault int

const (
	sound fault = iota
	deadlineFromReceipt
	noRound
	olderAnswers
	newLeaderDoesNotWait
	grantOvertakes
	clockStopsInPause
	noMargin
	sentIsAcked
	grantBeforeBarrier
	ackBeforeRest
	orderByStreamOnly
	faults
)

func (f fault) String() string {
	return [...]string{
		"the design", "lease counted from the receipt of the grant", "grant without a quorum round",
		"answers to older questions count", "a new leader does not wait", "a grant overtakes revocations",
		"the clock stops while a node is paused", "no margin for drift", "sent counts as acknowledged",
		"a new leader grants before its barrier", "acknowledged before it has come to rest",
		"a grant is used although its node misses a revocation",
	}[f]
}

type happening struct {
	t    float64
	seq  int
	node int // that must be awake; -1: none
	f    func()
}

type agenda []*happening

func (q agenda) Len() int { return len(q) }
func (q agenda) Less(i, j int) bool {
	return q[i].t < q[j].t || q[i].t == q[j].t && q[i].seq < q[j].seq
}
func (q agenda) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *agenda) Push(x any)   { *q = append(*q, x.(*happening)) }
func (q *agenda) Pop() any     { o := *q; x := o[len(o)-1]; *q = o[:len(o)-1]; return x }

type logEntry struct{ term, rev int }

// modelVoter is a Raft server with a ledger.
type modelVoter struct {
	term, voted int
	log         []logEntry
	commit, fed int
	leader      bool
	lastHB      float64
	votes       map[int]bool
	match       [modelVoters]int
	elected     int64
	barrier     int
	nonce       uint64
	rounds      []*modelRound
	l           *ledger
}

type modelRound struct {
	tally *Tally
	r     round
	done  bool
}

// modelNode is a node with a tenancy.
type modelNode struct {
	h       *tenancy
	stream  *stream
	heard   float64 // when a grant came last
	inc     ID
	revoked [modelRevs + 1]bool
	writing [modelRevs + 1]int // pumps between check and write
	rest    map[uint64]int     // revocations that wait for such a pump: seq to rev
	// ended is when this node's word for a revocation counted, -1 before.
	acked [modelRevs + 1]bool
}

// stream carries frames both ways, in order, until a partition breaks it.
type stream struct {
	voter, node int
	k           *link
	broken      bool
}

type world struct {
	rg     *rand.Rand
	fault  fault
	t      float64
	q      agenda
	seq    int
	rate   [modelVoters + modelNodes]float64
	paused [modelVoters + modelNodes]float64 // until
	lost   [modelVoters + modelNodes]float64 // of the clock, with clockStopsInPause
	part   [modelVoters + modelNodes]int     // whom one can reach: those of the same number
	fifo   map[[3]int]float64
	vs     [modelVoters]*modelVoter
	ns     [modelNodes]*modelNode

	returned   [modelRevs + 1]float64 // when the revocation was reported complete; 0 before
	byExpiry   [modelRevs + 1][modelNodes]bool
	violations int
	elections  int
	grants     int
	expired    int
}

func (w *world) at(dt float64, node int, f func()) {
	w.seq++
	heap.Push(&w.q, &happening{t: w.t + dt, seq: w.seq, node: node, f: f})
}

// clock is a process's own, in nanoseconds.
func (w *world) clock(n int) int64 { return int64((w.t-w.lost[n])*w.rate[n]*1e9) + 1 }

func (w *world) delay() float64 {
	x := 0.001 + w.rg.Float64()*0.02
	if w.rg.Float64() < 0.03 {
		x += w.rg.ExpFloat64() * 0.8
	}
	return x
}

func (w *world) cut(a, b int) bool { return w.part[a] != w.part[b] }

// Classes of messages: each has a connection of its own.
const (
	raftClass = iota
	confirmClass
	fenceClass
)

// send brings f to b; messages of a class from a to b keep their order.
func (w *world) send(class, a, b int, f func()) bool {
	if w.cut(a, b) {
		return false
	}
	t := w.t + w.delay()
	key := [3]int{class, a, b}
	t = max(t, w.fifo[key]+1e-9)
	w.fifo[key] = t
	w.at(t-w.t, b, f)
	return true
}

// on sends on a stream, which breaks where a partition stands in its way.
func (s *stream) on(w *world, toNode bool, f func()) {
	a, b := s.voter, modelVoters+s.node
	if !toNode {
		a, b = b, a
	}
	if s.broken || !w.send(fenceClass, a, b, func() {
		if toNode && w.ns[s.node].stream != s {
			return
		}
		f()
	}) {
		s.broken = true
	}
}

// Raft, as simple as the protocol needs it.

func upToDate(a, b []logEntry) bool {
	last := func(l []logEntry) int {
		if len(l) == 0 {
			return 0
		}
		return l[len(l)-1].term
	}
	return last(a) > last(b) || last(a) == last(b) && len(a) >= len(b)
}

func (w *world) stepDown(i, term int) {
	v := w.vs[i]
	if term > v.term {
		v.voted = -1
	}
	v.term, v.leader, v.rounds = term, false, nil
	v.l.resign()
}

func (w *world) elect(i int) {
	v := w.vs[i]
	w.stepDown(i, v.term+1)
	v.voted = i
	v.votes = map[int]bool{i: true}
	term := v.term
	log := append([]logEntry(nil), v.log...)
	for j := range w.vs {
		if j == i {
			continue
		}
		w.send(raftClass, i, j, func() {
			u := w.vs[j]
			if term > u.term {
				w.stepDown(j, term)
			}
			ok := term == u.term && (u.voted == -1 || u.voted == i) && upToDate(log, u.log)
			if ok {
				u.voted, u.lastHB = i, w.t
			}
			now := u.term
			w.send(raftClass, j, i, func() {
				switch {
				case now > v.term:
					w.stepDown(i, now)
				case ok && v.term == term && !v.leader:
					if v.votes[j] = true; len(v.votes) > modelVoters/2 {
						w.lead(i)
					}
				}
			})
		})
	}
}

func (w *world) lead(i int) {
	v := w.vs[i]
	v.leader = true
	w.elections++
	v.match = [modelVoters]int{}
	v.elected = w.clock(i)
	v.log = append(v.log, logEntry{v.term, 0})
	v.barrier = len(v.log)
	if w.fault == grantBeforeBarrier {
		w.ready(i)
	}
	w.replicate(i, v.term)
}

// ready is what Prepare does: everything before the term is known.
func (w *world) ready(i int) {
	v := w.vs[i]
	v.l.lead(uint64(v.term), v.elected, modelD)
	if w.fault == newLeaderDoesNotWait {
		v.l.elected = -1 << 60
	}
}

func (w *world) replicate(i, term int) {
	v := w.vs[i]
	if !v.leader || v.term != term {
		return
	}
	for j := range w.vs {
		if j == i {
			continue
		}
		log, commit := append([]logEntry(nil), v.log...), v.commit
		w.send(raftClass, i, j, func() {
			u := w.vs[j]
			if term < u.term {
				now := u.term
				w.send(raftClass, j, i, func() {
					if now > v.term {
						w.stepDown(i, now)
					}
				})
				return
			}
			if term > u.term || u.leader {
				w.stepDown(j, term)
			}
			u.lastHB = w.t
			// In one term a shorter log is an older message.
			if len(u.log) < len(log) || u.log[len(u.log)-1].term != log[len(log)-1].term {
				u.log = log
			}
			w.committed(j, commit)
			n := len(log)
			w.send(raftClass, j, i, func() {
				if v.leader && v.term == term && n > v.match[j] {
					v.match[j] = n
					w.advance(i)
				}
			})
		})
	}
	w.at(0.05, i, func() { w.replicate(i, term) })
}

func (w *world) advance(i int) {
	v := w.vs[i]
	for n := len(v.log); n > v.commit; n-- {
		c := 1
		for j := range w.vs {
			if j != i && v.match[j] >= n {
				c++
			}
		}
		if c > modelVoters/2 && v.log[n-1].term == v.term {
			w.committed(i, n)
			return
		}
	}
}

// committed applies entries: revocations go to the ledger in order.
func (w *world) committed(i, n int) {
	v := w.vs[i]
	v.commit = max(v.commit, min(n, len(v.log)))
	for ; v.fed < v.commit; v.fed++ {
		if rev := v.log[v.fed].rev; rev != 0 {
			v.l.revoke(Revocation{Seq: uint64(v.fed + 1), ID: ID{byte(rev)}, Payload: []byte{byte(rev)}})
		}
	}
	if v.leader && v.l.term != uint64(v.term) && v.commit >= v.barrier {
		w.ready(i)
	}
	w.flush(i)
}

// The streams.

// flush sends what the ledger has queued for its nodes.
func (w *world) flush(i int) {
	v := w.vs[i]
	for g := range w.ns {
		t := v.l.nodes[fmt.Sprint(g)]
		if t == nil || t.link == nil {
			continue
		}
		k := t.link
		s := w.ns[g].stream
		if s == nil || s.k != k {
			continue // a stream that its node has left; it ends by itself
		}
		for _, b := range k.take() {
			f, err := parse(b[headerBytes:])
			if err != nil {
				panic(err)
			}
			if w.fault == sentIsAcked && f.kind == kindRevoke {
				v.l.ack(k, &frame{seq: f.seq, quiet: f.seq}, w.clock(i))
			}
			if w.fault == grantOvertakes && f.kind == kindRevoke {
				w.at(0.3, i, func() { s.on(w, true, func() { w.deliver(g, s, f) }) })
				continue
			}
			if f.kind == kindGrant {
				w.grants++
				if w.fault == grantOvertakes || w.fault == orderByStreamOnly {
					f.revoked = 0
				}
			}
			if w.fault == orderByStreamOnly && f.kind == kindRevoke && w.rg.IntN(8) == 0 {
				continue // the stream has a gap
			}
			s.on(w, true, func() { w.deliver(g, s, f) })
		}
	}
}

func (w *world) deliver(g int, s *stream, f *frame) {
	n := w.ns[g]
	now := w.clock(modelVoters + g)
	switch f.kind {
	case kindGrant:
		n.heard = w.t
		if w.fault == deadlineFromReceipt {
			for i := range n.h.sent {
				n.h.sent[i].t0 = now
			}
		}
		n.h.grant(f, now)
	case kindRevoke:
		n.h.revoke(f.prev, Revocation{f.seq, f.id, f.data}, now)
	}
}

// enforce is a node's Enforcer.
func (w *world) enforce(g int, r Revocation) {
	n, rev := w.ns[g], int(r.Payload[0])
	n.revoked[rev] = true
	if n.writing[rev] > 0 && w.fault != ackBeforeRest {
		n.rest[r.Seq] = rev
		return
	}
	w.at(0, modelVoters+g, func() { w.rested(g, r.Seq, rev) })
}

func (w *world) rested(g int, seq uint64, rev int) {
	n := w.ns[g]
	n.h.quiesced(seq, w.clock(modelVoters+g))
	n.acked[rev] = true
	if s := n.stream; s != nil {
		f := &frame{kind: kindAck, seq: seq, quiet: n.h.quiet()}
		s.on(w, false, func() {
			if v := w.vs[s.voter]; !s.k.closed {
				v.l.ack(s.k, f, w.clock(s.voter))
			}
		})
	}
}

// tend is a node's renewal, and its search for the leader.
func (w *world) tend(g int) {
	n, me := w.ns[g], modelVoters+g
	if s := n.stream; s == nil || s.broken || w.t-n.heard > modelD.Seconds()/2 {
		n.stream, n.heard, n.h.sent = nil, w.t, nil
		i := w.rg.IntN(modelVoters)
		hello := &frame{kind: kindHello, incarnation: n.inc, granted: n.h.granted, enforced: n.h.enforced, quiet: n.h.quiet(), length: modelD}
		w.send(fenceClass, me, i, func() {
			v := w.vs[i]
			if v.l.term == 0 {
				return
			}
			// The stream stands before its first frame is sent.
			s := &stream{voter: i, node: g}
			s.k = v.l.connect(fmt.Sprint(g), hello)
			if n.stream == nil {
				n.stream = s
				w.flush(i)
			}
		})
	} else {
		f := &frame{kind: kindRenew, n: n.h.renew(w.clock(me)), quiet: n.h.quiet()}
		s.on(w, false, func() {
			v := w.vs[s.voter]
			v.l.renew(s.k, f, w.clock(s.voter))
			if w.fault == noRound {
				v.l.grant(v.l.begin(), uint64(v.term), everybody)
				w.flush(s.voter)
			}
		})
	}
	next := modelD.Seconds() / renewals
	if n.stream == nil {
		next = 0.03
	}
	w.at(next, me, func() { w.tend(g) })
}

func everybody(string) bool { return true }

// read brings a node the event log from any voter, late.
func (w *world) read(g int) {
	n, me, i := w.ns[g], modelVoters+g, w.rg.IntN(modelVoters)
	w.send(fenceClass, me, i, func() {
		v := w.vs[i]
		log := append([]logEntry(nil), v.log[:v.commit]...)
		w.send(fenceClass, i, me, func() {
			now := w.clock(me)
			for k := int(n.h.folded); k < len(log); k++ {
				if rev := log[k].rev; rev != 0 {
					n.h.logged(Revocation{Seq: uint64(k + 1), ID: ID{byte(rev)}, Payload: []byte{byte(rev)}}, now)
				}
			}
			n.h.foldedTo(uint64(len(log)), now)
		})
	})
	w.at(0.2+w.rg.Float64()*0.4, me, func() { w.read(g) })
}

// confirm is the quorum round, for all renewals that came before it.
func (w *world) confirm(i int) {
	v := w.vs[i]
	if v.leader && len(v.l.waiting) > 0 {
		v.nonce++
		nonce, term := v.nonce, v.term
		names := make([]string, modelVoters)
		for j := range names {
			names[j] = fmt.Sprint(j)
		}
		m := &modelRound{tally: NewTally(uint64(term), nonce, names, names[i]), r: v.l.begin()}
		v.rounds = append(v.rounds, m)
		if len(v.rounds) > 16 {
			v.rounds = v.rounds[1:]
		}
		for j := range w.vs {
			if j == i {
				continue
			}
			w.send(confirmClass, i, j, func() {
				now := w.vs[j].term
				w.send(confirmClass, j, i, func() {
					if now > v.term {
						w.stepDown(i, now)
						return
					}
					if !v.leader || v.term != term {
						return
					}
					for _, m := range v.rounds {
						n := nonce
						if w.fault == olderAnswers {
							n = m.tally.nonce // whatever it answers
						}
						m.tally.Answer(names[j], n, uint64(now))
						if m.tally.Confirmed() && !m.done {
							m.done = true
							v.l.grant(m.r, uint64(term), everybody)
						}
					}
					w.flush(i)
				})
			})
		}
	}
	w.at(0.05, i, func() { w.confirm(i) })
}

// revoke asks one voter; it answers when the fence stands.
func (w *world) revoke(i, rev int) {
	v := w.vs[i]
	if !v.leader {
		return
	}
	v.log = append(v.log, logEntry{v.term, rev})
	seq, term := uint64(len(v.log)), v.term
	var poll func()
	poll = func() {
		if !v.leader || v.term != term || w.returned[rev] != 0 {
			return // the caller asks the next leader
		}
		if v.l.term != 0 && v.l.revoked >= seq {
			complete := true
			var byExpiry [modelNodes]bool
			for g := range w.ns {
				s, _, _, _ := v.l.verdict(fmt.Sprint(g), seq, modelD, w.clock(i))
				complete = complete && s != Unconfirmed
				byExpiry[g] = s == Expired
			}
			if complete {
				w.returned[rev], w.byExpiry[rev] = w.t, byExpiry
				for _, e := range byExpiry {
					if e {
						w.expired++
						break
					}
				}
				return
			}
		}
		w.at(0.003, i, poll)
	}
	poll()
}

// forward is a node's pumps: a check, and a little later a write, for every
// subject that is not revoked here.
func (w *world) forward(g int) {
	n, me := w.ns[g], modelVoters+g
	if n.h.holds(w.clock(me)) {
		gap := w.rg.Float64() * 0.02
		for rev := 1; rev <= modelRevs; rev++ {
			if n.revoked[rev] {
				continue
			}
			if w.returned[rev] != 0 {
				w.violations++
			}
			n.writing[rev]++
			w.at(gap, me, func() {
				n.writing[rev]--
				// A process stopped between check and write may write one chunk
				// after its lease (level 1); one that has given its word may not.
				if w.returned[rev] != 0 && n.acked[rev] && !w.byExpiry[rev][g] {
					w.violations++
				}
				if n.writing[rev] == 0 {
					for seq, r := range n.rest {
						if r == rev {
							delete(n.rest, seq)
							w.rested(g, seq, rev)
						}
					}
				}
			})
		}
	}
	w.at(0.008, me, func() { w.forward(g) })
}

// trouble is the faults that the protocol has to bear.
func (w *world) trouble() {
	switch w.rg.IntN(4) {
	case 0:
		n, d := w.rg.IntN(modelVoters+modelNodes), w.rg.ExpFloat64()*1.2
		w.paused[n] = max(w.paused[n], w.t+d)
		if w.fault == clockStopsInPause {
			w.lost[n] += d
		}
	case 1, 2:
		for n := range w.part {
			w.part[n] = 0
			if w.rg.IntN(3) == 0 {
				w.part[n] = 1
			}
		}
	default:
		w.part = [modelVoters + modelNodes]int{}
	}
	w.at(w.rg.ExpFloat64()*0.6, -1, w.trouble)
}

func simulate(seed uint64, f fault) *world {
	w := &world{rg: rand.New(rand.NewPCG(seed, 1)), fault: f, fifo: map[[3]int]float64{}}
	for n := range w.rate { // as far apart as may be
		w.rate[n] = 1 - modelDrift
		if w.rg.IntN(2) == 0 {
			w.rate[n] = 1 + modelDrift
		}
	}
	for i := range w.vs {
		v := &modelVoter{voted: -1, l: newLedger(modelD)}
		v.l.certain = func(d time.Duration) time.Duration {
			if f == noMargin {
				return d
			}
			return time.Duration(float64(d)*(1+modelDrift)/(1-modelDrift)) + slack
		}
		w.vs[i] = v
		timeout := 0.3 + w.rg.Float64()*0.3
		var tick func()
		tick = func() {
			if !v.leader && w.t-v.lastHB > timeout {
				v.lastHB = w.t
				timeout = 0.3 + w.rg.Float64()*0.3
				w.elect(i)
			}
			w.at(0.02, i, tick)
		}
		w.at(w.rg.Float64()*0.1, i, tick)
		w.at(0.05, i, func() { w.confirm(i) })
	}
	for g := range w.ns {
		n := &modelNode{inc: ID{byte(g)}, rest: map[uint64]int{}}
		n.h = newTenancy(modelD, func(r Revocation) { w.enforce(g, r) })
		w.ns[g] = n
		w.at(w.rg.Float64()*0.2, modelVoters+g, func() { w.tend(g) })
		w.at(w.rg.Float64()*0.2, modelVoters+g, func() { w.read(g) })
		w.at(w.rg.Float64()*0.2, modelVoters+g, func() { w.forward(g) })
	}
	w.at(2, -1, w.trouble)
	for rev := 1; rev <= modelRevs; rev++ {
		var try func()
		try = func() {
			if w.returned[rev] != 0 {
				return
			}
			for i := range w.vs {
				w.at(0, i, func() { w.revoke(i, rev) })
			}
			w.at(2.5, -1, try)
		}
		w.at(1.5+float64(rev)*1.5, -1, try)
	}
	for len(w.q) > 0 {
		e := heap.Pop(&w.q).(*happening)
		if e.t > modelEnd {
			break
		}
		w.t = e.t
		if e.node >= 0 && w.paused[e.node] > e.t { // it happens when the node wakes
			w.seq++
			e.t, e.seq = w.paused[e.node]+1e-6, w.seq
			heap.Push(&w.q, e)
			continue
		}
		e.f()
	}
	return w
}

// rare are the first schedules known to show what few do. The search begins
// there and goes on if they do not any more.
var rare = map[fault]uint64{olderAnswers: 31, grantBeforeBarrier: 124}

// TestModel runs the design, which must have no violation, and each fault until
// one is found. SALLYPORT_LARGE=1 runs thousands of schedules.
func TestModel(t *testing.T) {
	seeds, most := uint64(modelRuns), uint64(1500)
	if os.Getenv("SALLYPORT_LARGE") != "" {
		seeds, most = 5000, 5000
	}
	for f := range faults {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			var elections, grants, returned, expired int
			n := seeds
			if f != sound {
				n = most
			}
			for seed := range n {
				w := simulate((seed+rare[f])%most, f)
				elections += w.elections
				grants += w.grants
				expired += w.expired
				for _, at := range w.returned {
					if at != 0 {
						returned++
					}
				}
				switch {
				case f == sound && w.violations > 0:
					t.Fatalf("seed %d: %d times a node passed a check for what was reported as revoked", seed, w.violations)
				case f != sound && w.violations > 0:
					t.Logf("caught after %d runs", seed+1)
					return
				}
			}
			if f != sound {
				t.Errorf("not caught in %d runs", n)
			}
			if f == sound {
				t.Logf("%d runs, %d elections, %d grants, %d revocations returned, %d of them by an expiry", n, elections, grants, returned, expired)
				if returned < int(n)*modelRevs/2 || expired < int(n) || grants < int(n)*50 {
					t.Errorf("the model does not exercise the protocol")
				}
			}
		})
	}
}

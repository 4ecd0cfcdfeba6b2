package fence

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
	"time"
)

const sec = int64(time.Second)

func rev(seq uint64) Revocation { return Revocation{Seq: seq, ID: ID{byte(seq)}, Payload: []byte("p")} }

// A grant is used when everything before it is in force, and counts from its
// own renewal.
func TestTenancy(t *testing.T) {
	h := newTenancy(2*time.Second, func(Revocation) {})
	first := h.renew(10 * sec)
	h.grant(&frame{n: first, length: 2 * time.Second}, 10*sec+sec/2)
	if !h.holds(12*sec-1) || h.holds(12*sec) {
		t.Error("the lease does not count from the moment before the renewal was sent")
	}
	h.grant(&frame{n: first, length: 2 * time.Second}, 11*sec)
	h.grant(&frame{n: 99, length: 2 * time.Second}, 11*sec)
	if h.holds(12 * sec) {
		t.Error("an answer was used twice, or without a question")
	}

	n := h.renew(11 * sec)
	h.grant(&frame{n: n, length: 2 * time.Second, revoked: 7}, 11*sec+1)
	if h.holds(12 * sec) {
		t.Error("a grant was used before revocation 7 was enforced")
	}
	h.revoke(5, rev(7), 11*sec+2) // 5 is missing
	if h.holds(12 * sec) {
		t.Error("a grant was used although a revocation is missing")
	}
	h.logged(rev(5), 11*sec+3)
	h.foldedTo(7, 11*sec+3)
	if !h.holds(12 * sec) {
		t.Error("the grant is not used although all is enforced")
	}
	if h.quiet() != 4 {
		t.Errorf("quiet up to %d with 5 and 7 moving", h.quiet())
	}
	h.quiesced(7, 11*sec+4)
	h.quiesced(5, 11*sec+4)
	if h.quiet() != 7 || len(h.still) != 0 {
		t.Errorf("quiet up to %d, still %v", h.quiet(), h.still)
	}

	n = h.renew(12 * sec)
	h.grant(&frame{n: n, length: 2 * time.Second, revoked: 7, folded: 9}, 12*sec)
	if h.holds(13 * sec) {
		t.Error("a grant was used before event 9 was known")
	}
	h.foldedTo(9, 12*sec)
	if !h.holds(14*sec - 1) {
		t.Error("the grant is not used although event 9 is known")
	}
	n = h.renew(13 * sec)
	h.grant(&frame{n: n, length: time.Hour, revoked: 7}, 13*sec)
	if h.holds(15 * sec) {
		t.Error("a lease is longer than this node takes")
	}
}

// A node whose lease had ended may have been reported as fenced: what was
// revoked must be at rest before anything passes.
func TestTenancyAfterALapse(t *testing.T) {
	h := newTenancy(2*time.Second, func(Revocation) {})
	h.grant(&frame{n: h.renew(sec), length: 2 * time.Second}, sec)
	h.revoke(0, rev(3), 2*sec)
	h.grant(&frame{n: h.renew(2 * sec), length: 2 * time.Second, revoked: 3}, 2*sec)
	if !h.holds(3 * sec) {
		t.Error("a lease that goes on waits for quiescence")
	}
	n := h.renew(10 * sec)
	h.grant(&frame{n: n, length: 2 * time.Second, revoked: 3}, 10*sec)
	if h.holds(10 * sec) {
		t.Error("after a lapse a grant was used while a revoked session may move")
	}
	h.quiesced(3, 10*sec+1)
	if !h.holds(11 * sec) {
		t.Error("the grant is not used after quiescence")
	}
	n = h.renew(20 * sec)
	h.grant(&frame{n: n, length: 2 * time.Second, revoked: 3}, 30*sec)
	if h.holds(30 * sec) {
		t.Error("a grant that came too late was used")
	}
}

func hello(inc byte, granted bool, quiet uint64) *frame {
	return &frame{kind: kindHello, incarnation: ID{inc}, granted: granted, enforced: quiet, quiet: quiet, length: time.Second}
}

func TestVerdict(t *testing.T) {
	D := time.Second
	after := func(at int64) int64 { return at + int64(certain(D)) }
	all := func(string) bool { return true }
	grant := func(l *ledger, k *link, at int64) {
		l.renew(k, &frame{n: 1, quiet: k.t.quiet}, at)
		l.grant(l.begin(), l.term, all)
	}
	check := func(what string, l *ledger, at int64, want State) {
		t.Helper()
		if got, _, _, _ := l.verdict("a", 5, D, at); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	fresh := func() *ledger {
		l := newLedger(D)
		l.revoke(rev(5))
		l.lead(3, 100*sec, D)
		return l
	}

	l := fresh()
	check("a node never heard, before an earlier leader's lease has ended", l, after(100*sec), Unconfirmed)
	check("after it", l, after(100*sec)+1, Expired)

	l = fresh()
	l.lead(3, 100*sec, 3*D) // longer leases were granted once
	check("an earlier leader's longer lease", l, after(100*sec)+1, Unconfirmed)

	l = fresh()
	k := l.connect("a", hello(1, true, 4))
	grant(l, k, 105*sec)
	check("granted, before its end", l, after(105*sec), Unconfirmed)
	check("granted, after its end", l, after(105*sec)+1, Expired)
	l.ack(k, &frame{seq: 5, quiet: 5}, 105*sec)
	check("acknowledged", l, 105*sec, Confirmed)
	// Its process is replaced: the word of the new one is not the old one's.
	k2 := l.connect("a", hello(2, false, 5))
	check("another process acknowledged, the lease of the first runs", l, 105*sec+1, Unconfirmed)
	check("and has ended", l, after(105*sec)+1, Confirmed)
	l.ack(k, &frame{seq: 9, quiet: 9}, 106*sec)
	if k2.t.quiet != 5 {
		t.Error("a replaced stream is listened to")
	}

	l = fresh()
	l.connect("a", hello(1, true, 5))
	check("it holds a lease from before, and has acknowledged", l, 100*sec, Confirmed)
	l = fresh()
	l.connect("a", hello(1, false, 5))
	check("it was started anew, an earlier process may hold a lease", l, after(100*sec), Unconfirmed)

	l = fresh()
	k = l.connect("a", hello(1, true, 4))
	grant(l, k, 105*sec)
	l.bye(k)
	check("it said goodbye", l, 105*sec+1, Expired)
	l = fresh()
	l.bye(l.connect("a", hello(1, true, 4)))
	check("it said goodbye before it had a lease of this leader", l, 100*sec+1, Expired)
	l = fresh()
	l.bye(l.connect("a", hello(1, false, 4)))
	check("another process said goodbye", l, 100*sec+1, Unconfirmed)

	l = fresh()
	k = l.connect("a", hello(1, true, 4))
	grant(l, k, 105*sec)
	for _, c := range []struct {
		limit time.Duration
		at    int64
		want  State
	}{
		{time.Minute, after(105*sec) + 1, Unconfirmed},
		{time.Minute, 105*sec + int64(certain(time.Minute)) + 1, Expired},
		{Unbounded, 105*sec + int64(time.Hour), Unconfirmed},
	} {
		if got, _, ends, _ := l.verdict("a", 5, c.limit, c.at); got != c.want || c.limit == Unbounded && ends != -1 {
			t.Errorf("limit %v: %q until %d, want %q", c.limit, got, ends, c.want)
		}
	}
}

// What must not be granted.
func TestLedgerGrants(t *testing.T) {
	all := func(string) bool { return true }
	for _, c := range []struct {
		name string
		do   func(l *ledger, k *link, r round)
		want bool
	}{
		{"confirmed", func(l *ledger, _ *link, r round) { l.grant(r, 3, all) }, true},
		{"confirmed in another term", func(l *ledger, _ *link, r round) { l.grant(r, 4, all) }, false},
		{"no member", func(l *ledger, _ *link, r round) { l.grant(r, 3, func(string) bool { return false }) }, false},
		{"after its stream was replaced", func(l *ledger, _ *link, r round) {
			l.connect("a", hello(1, true, 0))
			l.grant(r, 3, all)
		}, false},
		{"after the term", func(l *ledger, _ *link, r round) { l.resign(); l.grant(r, 3, all) }, false},
		{"in the next term", func(l *ledger, _ *link, r round) { l.lead(4, 9*sec, 0); l.grant(r, 4, all) }, false},
	} {
		l := newLedger(time.Second)
		l.lead(3, sec, time.Second)
		k := l.connect("a", hello(1, true, 0))
		l.renew(k, &frame{n: 1}, 2*sec)
		c.do(l, k, l.begin())
		if got := k.t.renewed != 0; got != c.want {
			t.Errorf("%s: counted as granted: %v", c.name, got)
		}
		if got := len(k.out) > 0; got != c.want {
			t.Errorf("%s: granted: %v", c.name, got)
		}
	}
}

// Revocations and grants leave in the order in which they happened, with none
// missing; a node that does not take them loses its stream.
func TestLinkOrder(t *testing.T) {
	l := newLedger(time.Second)
	for seq := uint64(1); seq <= 3; seq++ {
		l.revoke(rev(10 * seq))
	}
	l.lead(3, sec, time.Second)
	k := l.connect("a", hello(1, true, 15))
	l.revoke(rev(40))
	l.require(44)
	l.renew(k, &frame{n: 1}, 2*sec)
	l.grant(l.begin(), 3, func(string) bool { return true })
	l.revoke(Revocation{Seq: 50, Payload: make([]byte, MaxPayload+1)}) // by the log alone
	l.revoke(rev(60))
	var got [][3]uint64
	for _, b := range k.take() {
		f, err := parse(b[headerBytes:])
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, [3]uint64{f.prev, f.seq, f.revoked + f.folded})
	}
	want := [][3]uint64{{10, 20, 0}, {20, 30, 0}, {30, 40, 0}, {0, 0, 84}, {50, 60, 0}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}

	for seq := uint64(100); !k.closed; seq++ {
		if seq > 100+maxQueue {
			t.Fatal("the queue has no end")
		}
		l.revoke(rev(seq))
	}
	if len(k.out) != 0 {
		t.Error("what is left of a queue that was cut is sent")
	}
	if len(l.recent) > maxRecent || l.base == 0 {
		t.Errorf("%d revocations are kept, base %d", len(l.recent), l.base)
	}
}

func TestFrames(t *testing.T) {
	id := ID{1, 2, 3}
	for _, f := range []frame{
		{kind: kindHello, incarnation: id, granted: true, level: 2, length: time.Second, enforced: 7, quiet: 5},
		{kind: kindRenew, n: 3, quiet: 9, level: 1},
		{kind: kindAck, seq: 8, quiet: 9, data: []byte("note")},
		{kind: kindBye},
		{kind: kindFreeze, id: id, data: []byte("payload")},
		{kind: kindAbort, id: id},
		{kind: kindRevoke, prev: 3, seq: 4, id: id, data: []byte("payload")},
		{kind: kindGrant, n: 5, length: time.Second, revoked: 4, folded: 6},
		{kind: kindRefuse, leader: "n2", data: []byte("host:1")},
	} {
		b := f.append([]byte("before"))[len("before"):]
		got, err := readFrame(bytes.NewReader(b))
		if err != nil || !reflect.DeepEqual(*got, f) {
			t.Errorf("%+v, %v; want %+v", got, err, f)
		}
		for n := range b {
			if n >= headerBytes { // cut off inside
				if _, err := parse(b[headerBytes:n]); err == nil && f.data == nil {
					t.Errorf("kind %d: %d of %d bytes are a frame", f.kind, n, len(b))
				}
			}
			if _, err := readFrame(bytes.NewReader(b[:n])); err == nil {
				t.Errorf("kind %d: read from %d of %d bytes", f.kind, n, len(b))
			}
		}
		if f.data == nil {
			if _, err := parse(append(b[headerBytes:], 0)); err == nil {
				t.Errorf("kind %d: a byte too many is a frame", f.kind)
			}
		}
	}
	for name, f := range map[string]frame{
		"a revocation before the one before it": {kind: kindRevoke, prev: 4, seq: 4},
		"a lease of no length":                  {kind: kindGrant, n: 1},
		"a lease that is too long":              {kind: kindGrant, n: 1, length: MaxLength + 1},
		"a note that is too long":               {kind: kindAck, data: make([]byte, MaxNote+1)},
		"a payload that is too long":            {kind: kindFreeze, data: make([]byte, MaxPayload+1)},
		"a kind that does not exist":            {kind: 99},
	} {
		if _, err := parse(f.append(nil)[headerBytes:]); err == nil {
			t.Errorf("%s is a frame", name)
		}
	}
	if _, err := readFrame(strings.NewReader("\xff\xff\xff\xff\x01")); err == nil {
		t.Error("a frame of 4 GiB is read")
	}
}

func FuzzFrame(f *testing.F) {
	f.Add([]byte{byte(kindGrant), 0, 0})
	f.Add((&frame{kind: kindRevoke, seq: 4, data: []byte("x")}).append(nil)[headerBytes:])
	f.Add((&frame{kind: kindHello, length: 1}).append(nil)[headerBytes:])
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := parse(b)
		if err != nil {
			return
		}
		if again := v.append(nil)[headerBytes:]; !bytes.Equal(again, b) {
			t.Errorf("%x was read as %+v, which is %x", b, v, again)
		}
	})
}

func TestClock(t *testing.T) {
	a, m := boottime(), monotonic()
	time.Sleep(2 * time.Millisecond)
	if boottime()-a < int64(2*time.Millisecond) || monotonic()-m < int64(2*time.Millisecond) {
		t.Error("a clock stands still")
	}
	for _, d := range []time.Duration{time.Millisecond, time.Second, MaxLength} {
		if want := time.Duration(float64(d) * 1.01 / 0.99); certain(d) < want+slack-1 || certain(d) > want+slack+1 {
			t.Errorf("a lease of %v has certainly ended after %v", d, certain(d))
		}
	}
}

func BenchmarkCheck(b *testing.B) {
	h := NewHolder(HolderConfig{Length: time.Hour, Enforcer: &recorder{}})
	h.lease.Store(&lease{t0: boottime(), held: time.Hour})
	for b.Loop() {
		if h.Check(0) != nil {
			b.Fatal("no lease")
		}
	}
}

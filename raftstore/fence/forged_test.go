package fence

import (
	"bufio"
	"net"
	"testing"
	"time"
)

// forger speaks frames as it likes, under a name that its certificate gave.
type forger struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
	done chan error // what Serve returned
}

func newForger(t *testing.T, c *cluster, name string) *forger {
	t.Helper()
	ours, theirs := net.Pipe()
	f := &forger{t: t, conn: ours, in: bufio.NewReader(ours), done: make(chan error, 1)}
	go func() { f.done <- c.g.Serve(theirs, name) }()
	t.Cleanup(func() { ours.Close() })
	return f
}

func (f *forger) say(frames ...*frame) {
	f.t.Helper()
	f.conn.SetDeadline(time.Now().Add(10 * time.Second))
	for _, fr := range frames {
		if _, err := f.conn.Write(fr.append(nil)); err != nil {
			f.t.Fatal(err)
		}
	}
}

// hears returns the next frame of a kind.
func (f *forger) hears(k kind) *frame {
	f.t.Helper()
	f.conn.SetDeadline(time.Now().Add(10 * time.Second))
	for {
		fr, err := readFrame(f.in)
		if err != nil {
			f.t.Fatal(err)
		}
		if fr.kind == k {
			return fr
		}
	}
}

func state(t *testing.T, c *cluster, seq uint64) map[string]NodeReport {
	t.Helper()
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	r := Report{Seq: seq}
	c.g.mu.l.judge(&r, c.members, c.former, c.g.cfg.Length, c.g.now())
	out := map[string]NodeReport{}
	for _, n := range r.Nodes {
		out[n.Node] = n
	}
	return out
}

// A member that has been taken over says hello with another node's incarnation,
// says that everything up to the end of time has come to rest, and acknowledges
// revocations, those to come too. All of it counts for the name in its own
// certificate: the other node is waited for, and keeps its stream.
func TestForgedAcknowledgement(t *testing.T) {
	ctx := t.Context()
	c := newCluster(t, ctx, "a", "b")
	r := &recorder{manual: true}
	a := c.holder("a", r, nil)
	go a.Run(ctx)
	eventually(t, "a holds a lease", func() bool { return a.Check(0) == nil })

	b := newForger(t, c, "b")
	everything := ^uint64(0) >> 1
	b.say(&frame{kind: kindHello, incarnation: a.incarnation, granted: true, level: 2, length: testLength, enforced: everything, quiet: everything})
	b.say(&frame{kind: kindAck, seq: 7, quiet: everything, data: []byte(`{"node":"a","sessions":1}`)})
	c.g.Revoked(Revocation{Seq: 7, ID: ID{7}, Payload: []byte("x")})
	eventually(t, "enforced at a", func() bool { return len(r.log()) > 0 })
	b.say(&frame{kind: kindAck, seq: 7, quiet: everything}, &frame{kind: kindRenew, n: 1, quiet: everything, level: 2})
	b.hears(kindGrant) // so all before it was taken

	got := state(t, c, 7)
	if got["b"].State != Confirmed { // it may lie about itself
		t.Errorf("b: %+v", got["b"])
	}
	if n := got["a"]; n.State != Unconfirmed || n.Level != 1 || len(n.Note) > 0 {
		t.Errorf("a is reported by another's word: %+v", n)
	}
	if a.Check(0) != nil {
		t.Error("another's hello took a's lease away")
	}
	// And b's goodbye is b's.
	b.say(&frame{kind: kindBye})
	<-b.done
	if n := state(t, c, 7)["a"]; n.State != Unconfirmed {
		t.Errorf("a said goodbye by another's word: %+v", n)
	}
	r.mu.Lock()
	r.rest[7] <- []byte("rested")
	r.mu.Unlock()
	eventually(t, "a's own word counts", func() bool {
		n := state(t, c, 7)["a"]
		return n.State == Confirmed && string(n.Note) == "rested"
	})
}

// What an earlier process of a node acknowledged says nothing of a later one,
// and comes too late by the earlier one's stream.
func TestReplayedAcknowledgement(t *testing.T) {
	ctx := t.Context()
	c := newCluster(t, ctx, "a")
	eventually(t, "a leader", func() bool { return c.g.Leases() != nil })
	c.g.Revoked(Revocation{Seq: 5, ID: ID{5}, Payload: []byte("x")})
	first := newForger(t, c, "a")
	first.say(&frame{kind: kindHello, incarnation: ID{1}, length: testLength, level: 1})
	first.hears(kindRevoke)
	first.say(&frame{kind: kindAck, seq: 5, quiet: 5, data: []byte("first")}, &frame{kind: kindRenew, n: 1, quiet: 5, level: 1})
	first.hears(kindGrant)

	second := newForger(t, c, "a")
	second.say(&frame{kind: kindHello, incarnation: ID{2}, length: testLength, level: 1})
	second.hears(kindRevoke)
	if n := state(t, c, 5)["a"]; n.State != Unconfirmed || len(n.Note) > 0 {
		t.Fatalf("a new process is confirmed by an earlier one's word: %+v", n)
	}
	// The earlier one's stream is over: its acknowledgement does not get in again.
	first.conn.SetDeadline(time.Now().Add(10 * time.Second))
	for {
		if _, err := first.conn.Write((&frame{kind: kindAck, seq: 5, quiet: 5}).append(nil)); err != nil {
			break
		}
	}
	<-first.done
	if n := state(t, c, 5)["a"]; n.State != Unconfirmed {
		t.Fatalf("a replayed acknowledgement counts: %+v", n)
	}
	// The first process's lease was granted and may go on: the word of the second
	// alone does not say that nothing passes.
	second.say(&frame{kind: kindAck, seq: 5, quiet: 5}, &frame{kind: kindRenew, n: 1, quiet: 5, level: 1})
	second.hears(kindGrant)
	if n := state(t, c, 5)["a"]; n.State != Unconfirmed || n.At.IsZero() {
		t.Fatalf("while the first process may pass something: %+v", n)
	}
}

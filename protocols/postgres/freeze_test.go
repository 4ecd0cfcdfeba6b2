package postgres_test

import (
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/protocols/protocoltest"
)

// stands returns when nothing has passed a frozen session for a moment, and
// says how much had passed by then.
func stands(t *testing.T, s *protocoltest.Session) int64 {
	t.Helper()
	passed := s.Passed()
	for deadline := time.Now().Add(20 * time.Second); ; {
		time.Sleep(100 * time.Millisecond)
		now := s.Passed()
		if now == passed {
			return now
		}
		if passed = now; time.Now().After(deadline) {
			t.Fatal("a frozen session goes on")
		}
	}
}

// A frozen session keeps its connections and passes nothing; thawed, it goes on
// where it stood, in the middle of a result or of a write that its client has
// not taken.
func TestFreeze(t *testing.T) {
	for _, c := range []struct {
		name string
		slow bool // the client does not read before the freeze
	}{{"mid result", false}, {"blocked write", true}} {
		t.Run(c.name, func(t *testing.T) {
			g := start(t)
			r := g.login()
			const rows = 20_000
			r.send('Q', "SELECT g, repeat('x', 1000) FROM generate_series(1, 20000) g\x00")
			s := g.Last()
			r.expect('T')
			got := 0
			if c.slow {
				stands(t, s) // until its buffers are full
			} else {
				for ; got < 1000; got++ {
					r.expect('D')
				}
			}
			thaw := s.Freeze()
			before := stands(t, s)
			// More from both sides changes nothing.
			r.send('Q', "SELECT 2\x00")
			time.Sleep(200 * time.Millisecond)
			if now := s.Passed(); now != before {
				t.Fatalf("%d bytes passed while it was frozen", now-before)
			}
			select {
			case end := <-s.Ended:
				t.Fatalf("it ended: %+v", end)
			default:
			}
			thaw()
			for ; got < rows; got++ {
				r.expect('D')
			}
			if tag := line('C', r.expect('C')); tag != "C SELECT 20000" {
				t.Fatal(tag)
			}
			r.expect('Z')
			if all := strings.Join(r.until('Z', 1), " "); !strings.Contains(all, "C SELECT 1") {
				t.Fatalf("%q", all)
			}
		})
	}
}

// Frozen for good: the client is told why, where a message ends.
func TestFrozenAndCut(t *testing.T) {
	g := start(t)
	r := g.login()
	s := g.Last()
	defer s.Freeze()()
	r.send('Q', "SELECT 1\x00")
	stands(t, s)
	s.Revoke("no word for too long")
	if got := line('E', r.expect('E')); got != "E 57P01 terminating connection: no word for too long" {
		t.Error(got)
	}
	select {
	case end := <-s.Ended:
		if end.Reason != "revoked" {
			t.Errorf("%+v", end)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the session did not end")
	}
}

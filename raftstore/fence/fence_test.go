package fence

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// cluster is one leader and nodes in one process, over pipes. Leadership is
// what the test says.
type cluster struct {
	g       *Grantor
	term    atomic.Uint64 // 0: nobody leads
	quorum  atomic.Bool
	members []string
	former  []string
}

const testLength = 2 * time.Second

func newCluster(t *testing.T, ctx context.Context, members ...string) *cluster {
	t.Helper()
	c := &cluster{members: members}
	c.term.Store(1)
	c.quorum.Store(true)
	c.g = NewGrantor(GrantorConfig{
		Length: testLength,
		Leads:  func() (uint64, bool) { return c.term.Load(), c.term.Load() != 0 },
		Prepare: func(context.Context) (uint64, time.Duration, error) {
			if !c.quorum.Load() {
				return 0, 0, errors.New("no quorum")
			}
			return c.term.Load(), testLength, nil
		},
		Confirm: func(context.Context) (uint64, error) {
			if !c.quorum.Load() {
				return 0, errors.New("no quorum")
			}
			return c.term.Load(), nil
		},
		Members: func() []string { return c.members },
		Former:  func() []string { return c.former },
		Leader:  func() (string, string) { return "leader", "here" },
	})
	go c.g.Run(ctx)
	return c
}

func (c *cluster) holder(name string, e Enforcer, gate Gate) *Holder {
	return NewHolder(HolderConfig{
		Length: testLength, Enforcer: e, Gate: gate,
		Leader: func() (string, string) { return "leader", "here" },
		Dial: func(context.Context, string, string) (net.Conn, error) {
			a, b := net.Pipe()
			go c.g.Serve(b, name)
			return a, nil
		},
	})
}

// recorder is an Enforcer that takes notes; its quiescences end when told.
type recorder struct {
	mu     sync.Mutex
	did    []string
	manual bool
	rest   map[uint64]chan []byte
}

func (r *recorder) note(s string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.did = append(r.did, s)
}
func (r *recorder) Freeze(id ID, p []byte) { r.note(fmt.Sprintf("freeze %d %s", id[0], p)) }
func (r *recorder) Thaw(id ID)             { r.note(fmt.Sprintf("thaw %d", id[0])) }
func (r *recorder) Enforce(v Revocation) <-chan []byte {
	r.note(fmt.Sprintf("enforce %d %s", v.Seq, v.Payload))
	c := make(chan []byte, 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.manual {
		c <- []byte("rested")
	} else {
		if r.rest == nil {
			r.rest = map[uint64]chan []byte{}
		}
		r.rest[v.Seq] = c
	}
	return c
}
func (r *recorder) log() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.did)
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for range 2000 {
		if f() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

func TestLeaseAndRevoke(t *testing.T) {
	ctx := t.Context()
	c := newCluster(t, ctx, "a", "b")
	ra, rb := &recorder{}, &recorder{}
	a, b := c.holder("a", ra, nil), c.holder("b", rb, nil)
	if a.Check(0) == nil {
		t.Fatal("a check passes before there is a lease")
	}
	go a.Run(ctx)
	go b.Run(ctx)
	eventually(t, "both hold leases", func() bool { return a.Check(0) == nil && b.Check(0) == nil })

	c.g.Freeze(ID{7}, []byte("x"))
	eventually(t, "frozen", func() bool { return slices.Contains(ra.log(), "freeze 7 x") })
	r := Revocation{Seq: 7, ID: ID{7}, Payload: []byte("x")}
	c.g.Revoked(r)
	rep, err := c.g.Await(ctx, 7, 0)
	if err != nil || !rep.Complete || len(rep.Nodes) != 2 {
		t.Fatalf("%+v, %v", rep, err)
	}
	for _, n := range rep.Nodes {
		if n.State != Confirmed || string(n.Note) != "rested" || n.Level != 1 {
			t.Errorf("%+v", n)
		}
	}
	want := []string{"freeze 7 x", "enforce 7 x", "thaw 7"}
	if got := ra.log(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	a.Revoked(r) // by its own log, later
	a.Folded(9)
	if got := ra.log(); !slices.Equal(got, want) {
		t.Errorf("enforced twice: %v", got)
	}
}

// restless is an Enforcer under which nothing comes to rest.
type restless struct{}

func (restless) Freeze(ID, []byte)                {}
func (restless) Thaw(ID)                          {}
func (restless) Enforce(Revocation) <-chan []byte { return make(chan []byte) }

// TestRevokedWhileStopping has revocations come from the event log while Run
// ends: it waits for what it began, and nothing is begun that it does not wait
// for.
func TestRevokedWhileStopping(t *testing.T) {
	for range 50 {
		h := NewHolder(HolderConfig{Length: testLength, Enforcer: restless{}, Leader: func() (string, string) { return "", "" }})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = h.Run(ctx)
		}()
		seq := uint64(0)
		for ; seq < 20; seq++ {
			h.Revoked(Revocation{Seq: seq + 1})
		}
		cancel()
		for after := 0; after < 20; after++ {
			seq++
			h.Revoked(Revocation{Seq: seq})
			select {
			case <-ended:
			default:
				after = min(after, 10)
			}
		}
		<-ended
		h.wg.Wait() // nothing is left: this returns
	}
}

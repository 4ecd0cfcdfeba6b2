package fence_test

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

	"github.com/sallyport/sallyport/raftstore/fence"
	"github.com/sallyport/sallyport/raftstore/storetest"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// Leases over the real transport and real clocks. Nothing here says how fast
// something is, only that it happens, and never before it may.

const length = 1500 * time.Millisecond

// node is one with a certificate, an endpoint, and both sides of the fence.
type node struct {
	name, addr string
	net        *storetest.Network
	end        *transport.Endpoint
	grantor    *fence.Grantor
	holder     *fence.Holder
	did        *notes
}

// notes is an Enforcer that remembers.
type notes struct {
	sync.Mutex
	list []string
}

func (n *notes) add(s string) {
	n.Lock()
	defer n.Unlock()
	n.list = append(n.list, s)
}
func (n *notes) has(s string) bool {
	n.Lock()
	defer n.Unlock()
	return slices.Contains(n.list, s)
}
func (n *notes) Freeze(_ fence.ID, p []byte) { n.add("freeze " + string(p)) }
func (n *notes) Thaw(fence.ID)               { n.add("thaw") }
func (n *notes) Enforce(r fence.Revocation) <-chan []byte {
	n.add("enforce " + string(r.Payload))
	c := make(chan []byte)
	close(c)
	return c
}

// leadership is who leads in which term, as a test says.
type leadership struct {
	mu   sync.Mutex
	term uint64
	node *node
}

func (l *leadership) set(n *node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.term++
	l.node = n
}

func (l *leadership) get() (uint64, *node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.term, l.node
}

func start(t *testing.T, n int) ([]*node, *leadership) {
	ca := storetest.NewCA(t)
	lead := &leadership{}
	var nodes []*node
	var names []string
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for i := range n {
		v := &node{name: fmt.Sprintf("n%d", i+1), did: &notes{}}
		v.net = storetest.ListenUDP(t, "127.0.0.1:0")
		v.addr = v.net.LocalAddr().String()
		v.end = storetest.Endpoint(t, ca, ca.Issue(t, v.name), v.net, nil)
		nodes, names = append(nodes, v), append(names, v.name)
	}
	t.Cleanup(func() {
		cancel()
		for _, v := range nodes {
			v.end.Close()
		}
		wg.Wait()
	})
	leader := func() (string, string) {
		if _, v := lead.get(); v != nil {
			return v.name, v.addr
		}
		return "", ""
	}
	for _, v := range nodes {
		confirm := func(context.Context) (uint64, error) {
			if term, l := lead.get(); l == v {
				return term, nil
			}
			return 0, errors.New("not the leader")
		}
		v.grantor = fence.NewGrantor(fence.GrantorConfig{
			Length: length,
			Leads:  func() (uint64, bool) { term, l := lead.get(); return term, l == v },
			Prepare: func(ctx context.Context) (uint64, time.Duration, error) {
				term, err := confirm(ctx)
				return term, length, err
			},
			Confirm: confirm, Members: func() []string { return names }, Former: func() []string { return nil }, Leader: leader,
		})
		v.holder = fence.NewHolder(fence.HolderConfig{
			Length: length, Enforcer: v.did, Leader: leader,
			Dial: func(ctx context.Context, id, addr string) (net.Conn, error) {
				if id == v.name {
					a, b := net.Pipe()
					wg.Go(func() { v.grantor.Serve(b, id) })
					return a, nil
				}
				return v.end.Dial(ctx, transport.ClassFence, addr, id)
			},
		})
		ln := v.end.Listener(transport.ClassFence)
		wg.Go(func() { v.grantor.Run(ctx) })
		wg.Go(func() { v.holder.Run(ctx) })
		wg.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				wg.Go(func() { v.grantor.Serve(c, c.(*transport.Conn).Peer()) })
			}
		})
	}
	return nodes, lead
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

func (v *node) holds() bool { return v.holder.Check(0) == nil }

func revocation(seq uint64, who string) fence.Revocation {
	return fence.Revocation{Seq: seq, ID: fence.ID{byte(seq)}, Payload: []byte(who)}
}

func state(t *testing.T, r fence.Report, name string) fence.NodeReport {
	t.Helper()
	for _, n := range r.Nodes {
		if n.Node == name {
			return n
		}
	}
	t.Fatalf("no word of %s in %+v", name, r)
	return fence.NodeReport{}
}

func TestPartitionedNodeIsFencedByExpiry(t *testing.T) {
	nodes, lead := start(t, 3)
	lead.set(nodes[0])
	eventually(t, "all hold leases", func() bool { return nodes[0].holds() && nodes[1].holds() && nodes[2].holds() })

	cut := nodes[2]
	cut.net.Cut.Store(true)
	lapsed := cut.holder.Changed()
	leader := nodes[0].grantor
	leader.Freeze(fence.ID{7}, []byte("x"))
	leader.Revoked(revocation(7, "x"))

	// With little patience: the node is named, with the moment its lease ends.
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	early, err := leader.Await(ctx, 7, 0)
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	if n := state(t, early, cut.name); !early.Complete && (n.State != fence.Unconfirmed || n.At.IsZero() || n.Reason == "") {
		t.Errorf("%+v", n)
	}

	report, err := leader.Await(t.Context(), 7, 0)
	held := cut.holds() // now is after the report
	if err != nil || !report.Complete {
		t.Fatalf("%+v, %v", report, err)
	}
	if held {
		t.Error("the node passes checks after it was reported as fenced by expiry")
	}
	if n := state(t, report, cut.name); n.State != fence.Expired {
		t.Errorf("%+v", n)
	}
	if n := state(t, report, nodes[1].name); n.State != fence.Confirmed {
		t.Errorf("%+v", n)
	}
	select {
	case <-lapsed:
	case <-time.After(10 * time.Second):
		t.Error("the loss of the lease was not told")
	}
	if cut.did.has("enforce x") {
		t.Fatal("the partition leaks")
	}

	cut.net.Cut.Store(false)
	eventually(t, "the node holds a lease again", func() bool {
		if !cut.holds() {
			return false
		}
		if !cut.did.has("enforce x") {
			t.Fatal("it passes checks before it has enforced the revocation")
		}
		return true
	})
}

// Nodes follow the leader; a new one waits for what the old one granted, but
// not for nodes that acknowledge to it.
func TestLeaderChange(t *testing.T) {
	nodes, lead := start(t, 3)
	lead.set(nodes[0])
	eventually(t, "all hold leases", func() bool { return nodes[0].holds() && nodes[1].holds() && nodes[2].holds() })

	silent := nodes[2]
	silent.net.Cut.Store(true)
	var since atomic.Int64
	since.Store(time.Now().UnixNano())
	lead.set(nodes[1])
	for _, n := range nodes[:2] {
		n.grantor.Revoked(revocation(9, "y"))
	}
	report, err := nodes[1].grantor.Await(t.Context(), 9, 0)
	held := silent.holds()
	if err != nil || !report.Complete || held {
		t.Fatalf("%+v, %v; the silent node holds a lease: %v", report, err, held)
	}
	if n := state(t, report, silent.name); n.State != fence.Expired {
		t.Errorf("%+v", n)
	}
	if d := time.Since(time.Unix(0, since.Load())); d < length {
		t.Errorf("the new leader waited %v for leases of %v", d, length)
	}
	if n := state(t, report, nodes[0].name); n.State != fence.Confirmed {
		t.Errorf("%+v", n)
	}
	if _, err := nodes[0].grantor.Await(t.Context(), 9, 0); !errors.Is(err, fence.ErrNotLeading) {
		t.Errorf("the old leader says %v", err)
	}

	// A node that stops says so, and nobody waits for it.
	nodes[0].holder.Release(errors.New("the test is done with it"))
	if nodes[0].holds() {
		t.Error("a lease given back passes checks")
	}
	eventually(t, "the goodbye arrives", func() bool {
		for _, l := range nodes[1].grantor.Leases() {
			if l.Node == nodes[0].name {
				return !l.Connected
			}
		}
		return false
	})
	nodes[0].net.Cut.Store(true) // it says nothing more, of what follows neither
	nodes[1].grantor.Revoked(revocation(11, "z"))
	eventually(t, "the goodbye counts", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		report, err = nodes[1].grantor.Await(ctx, 11, fence.MaxLength)
		return err == nil && state(t, report, nodes[0].name).State == fence.Expired
	})
}

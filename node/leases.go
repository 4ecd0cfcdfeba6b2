package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fence"
	"github.com/sallyport/sallyport/raftstore/fence/gate"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// baseLease is what every leader waits out whatever its own settings are.
// Longer leases are granted only once an event says so, which every later
// leader knows before it judges.
const baseLease = 2500 * time.Millisecond

// leases is this node's part in the fence: it holds a lease, and grants them
// while it leads.
type leases struct {
	n       *Node
	holder  *fence.Holder
	grantor *fence.Grantor
	folded  atomic.Uint64  // events up to here were given to both
	streams sync.WaitGroup // that the grantor serves
}

func (n *Node) newLeases(e fence.Enforcer) *leases {
	l := &leases{n: n}
	l.grantor = fence.NewGrantor(fence.GrantorConfig{
		Length: n.cfg.Lease, Leads: n.store.Leads, Prepare: l.prepare,
		Confirm: func(ctx context.Context) (uint64, error) {
			term, _, err := n.store.Confirm(ctx)
			return term, err
		},
		Members: func() []string { members, _ := n.lessees(); return members },
		Former:  func() []string { _, former := n.lessees(); return former },
		Leader:  n.store.Leader, Log: n.log,
	})
	l.holder = fence.NewHolder(fence.HolderConfig{
		Length: n.cfg.Lease, Enforcer: e, Gate: n.kernelGate(), Leader: n.store.Leader, Dial: l.dial, Log: n.log,
	})
	return l
}

// openGate opens the kernel gate, shut, if the settings want it and it can be
// had.
func (n *Node) openGate() error {
	mode := n.cfg.KernelGate
	if mode == "off" || mode == "" && n.cfg.Dev {
		return nil
	}
	g, err := gate.Open(gate.Mark(n.cfg.Name, n.cfg.Addr))
	switch {
	case err == nil:
		n.gate = g
		n.log.Info("the kernel stops what strict sessions send when this node's lease ends (fence level 2)")
	case mode == "require":
		return fmt.Errorf("kernelGate is require: %w", err)
	default:
		n.log.Warn("no kernel gate: a stopped process may let out what its sockets have buffered (fence level 1); to have one, give the process CAP_NET_ADMIN, or set kernelGate: off", "err", err)
	}
	return nil
}

// kernelGate is the gate as the holder takes it, nil for none.
func (n *Node) kernelGate() fence.Gate {
	if n.gate == nil {
		return nil
	}
	return n.gate
}

// mark is what the sockets of a session carry: those of rules that allow more
// than the lease's length cannot stand behind a gate that shuts with it.
func (n *Node) mark(t policy.Tolerance) uint32 {
	if n.gate == nil || t != policy.Strict {
		return 0
	}
	return n.gate.Mark()
}

// lessees are the nodes that may hold leases, and those that may not any more:
// removed or revoked.
func (n *Node) lessees() (members, former []string) {
	v := n.state.View()
	for name := range v.Nodes {
		if v.NodeRevoked(name) != nil {
			former = append(former, name)
		} else {
			members = append(members, name)
		}
	}
	for name := range v.Removed {
		if _, again := v.Nodes[name]; !again {
			former = append(former, name)
		}
	}
	slices.Sort(members)
	slices.Sort(former)
	return members, former
}

// dial opens a stream to the leader's grantor, which may be here.
func (l *leases) dial(ctx context.Context, id, addr string) (net.Conn, error) {
	if id != l.n.cfg.Name {
		return l.n.endpoint.Dial(ctx, transport.ClassFence, addr, id)
	}
	ours, theirs := net.Pipe()
	l.streams.Go(func() { l.serve(theirs, id) })
	return ours, nil
}

func (l *leases) serve(c net.Conn, peer string) {
	if err := l.grantor.Serve(c, peer); err != nil {
		l.n.log.Debug("a node's lease stream ended", "peer", peer, "err", err)
	}
}

// run holds and grants until ctx ends, and returns when all of it has ended.
func (l *leases) run(ctx context.Context) error {
	ln := l.n.endpoint.Listener(transport.ClassFence)
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer l.streams.Wait()
	defer wg.Wait()
	defer ln.Close()
	wg.Go(func() { _ = l.holder.Run(ctx) })  // ends with ctx alone
	wg.Go(func() { _ = l.grantor.Run(ctx) }) // likewise
	for {
		c, err := ln.Accept()
		if ctx.Err() != nil {
			return nil
		} else if err != nil {
			return err
		}
		l.streams.Go(func() { l.serve(c, c.(*transport.Conn).Peer()) })
	}
}

// prepare makes this node, just elected, know everything that was committed
// before its term, and says how long a lease of an earlier leader may be.
func (l *leases) prepare(ctx context.Context) (term uint64, earlier time.Duration, err error) {
	for {
		seq, term, err := l.n.store.Newest(ctx)
		if err != nil {
			return 0, 0, err
		}
		if err := l.await(ctx, seq); err != nil {
			return 0, 0, err
		}
		longest := max(l.n.state.View().LongestLease, baseLease)
		if l.n.cfg.Lease <= longest {
			return term, longest, nil
		}
		// Those who lead later must know before anybody holds one.
		payload, _ := json.Marshal(event.LeaseLengthened{Nanoseconds: int64(l.n.cfg.Lease)}) // of a number: does not fail
		if _, err := l.n.store.Append(ctx, event.Proposal{
			ID: event.NewID(), Actor: l.n.actor(), Type: event.TypeLeaseLengthened, Version: 1,
			Aggregate: "lease", Expect: event.Any, Payload: payload,
		}); err != nil {
			return 0, 0, fmt.Errorf("record the length of leases: %w", err)
		}
	}
}

// await returns when events up to seq were given to the holder and the grantor.
func (l *leases) await(ctx context.Context, seq uint64) error {
	for {
		changed := l.n.state.Changed()
		if l.folded.Load() >= seq {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// onChange gives what was folded to both. A node may use a lease granted after
// a change of rules or members only when it knows the change.
func (l *leases) onChange(v *state.View, events []event.Event) {
	for _, e := range events {
		switch e.Type {
		case event.TypeRevoked:
			p, err := event.Decode[event.Revoked](e)
			if err != nil {
				continue // folding it has failed before
			}
			if l.n.store.IsLeader() {
				point("revocation committed") // and not told to anybody over the fence
			}
			payload, _ := json.Marshal(p) // decoded from it: does not fail
			r := fence.Revocation{Seq: e.Seq, ID: fence.ID(e.ID), Payload: payload}
			l.grantor.Revoked(r)
			l.holder.Revoked(r)
		case event.TypeConfigApplied, event.TypeNodeRemoved, event.TypeRevocationUndone:
			l.grantor.Require(e.Seq)
		}
	}
	l.holder.Folded(v.Seq)
	l.folded.Store(v.Seq)
}

var errStopping = errors.New("this node is stopping")

// stop ends this node's lease. idle says that nothing forwards any more: then
// nobody has to wait for the lease to run out.
func (l *leases) stop(idle bool) {
	if idle {
		l.holder.Release(errStopping)
	} else {
		l.holder.GiveUp(errStopping)
	}
}

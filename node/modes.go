package node

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/sallyport/sallyport/node/session"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/raftstore/fence"
)

// leaseLimit is how old a lease may be for a session of this tolerance.
func leaseLimit(t policy.Tolerance) time.Duration {
	switch t {
	case policy.Strict:
		return 0
	case policy.BestEffort:
		return fence.Unbounded
	}
	return time.Duration(t)
}

// tolerates says whether the node's lease allows what tolerance asks for. No
// session tolerates more than the rules in force do, whatever they said when it
// began: a revocation waits no longer than for those.
func (n *Node) tolerates(t policy.Tolerance) error {
	return n.leases.holder.Check(leaseLimit(min(t, policy.Tolerance(n.tolerance.Load()))))
}

// sessionLease is the node's lease as a session sees it.
func (n *Node) sessionLease(t policy.Tolerance, judge func() *protocols.Refusal) session.Lease {
	return session.Lease{
		Check:   func() error { return n.tolerates(t) },
		Changed: n.leases.holder.Changed,
		Judge:   judge,
	}
}

var noQuorum = &protocols.Refusal{Rule: "no-quorum", Code: "57P03",
	Reason: "this node has lost the cluster's leader, so it cannot know what was revoked and lets nobody in: connect to another node"}

// admits says whether a new session of subject on target may begin: with a
// lease, which it waits for while a leader is elected, and without one only
// where the rules tolerate it. Bounded lets in whom this node has let in there
// before, while it held a lease.
func (n *Node) admits(ctx context.Context, t policy.Tolerance, subject, target string) *protocols.Refusal {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Lease)
	defer cancel()
	for {
		changed := n.leases.holder.Changed()
		switch {
		case n.leases.holder.Check(0) == nil:
			n.letIn.add(subject, target)
			return nil
		case t == policy.BestEffort && n.tolerates(t) == nil:
			return nil
		case t != policy.Strict && n.tolerates(t) == nil && n.letIn.has(subject, target):
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return noQuorum
		}
	}
}

// maxKnown bounds whom a node remembers.
const maxKnown = 16384

// letIn is who was let in where. It is forgotten as a whole when it is full:
// that refuses somebody, at worst.
type letIn struct {
	mu sync.Mutex
	m  map[[2]string]bool
}

func (k *letIn) add(subject, target string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.m == nil || len(k.m) >= maxKnown {
		k.m = map[[2]string]bool{}
	}
	k.m[[2]string{subject, target}] = true
}

func (k *letIn) has(subject, target string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.m[[2]string{subject, target}]
}

// refused is the revocation that stands against b, whether its event has been
// folded or not; nil if none does.
func (n *Node) refused(b *state.Bearer) *protocols.Refusal {
	if rev := n.state.View().Refuses(b); rev != nil {
		return &protocols.Refusal{Rule: "revocation/" + rev.ID, Reason: rev.Why(), Code: "57P01"}
	}
	return n.fences.refuses(b)
}

// rejudge decides anew whether a session that stood still may go on.
func (n *Node) rejudge(i session.Info, subject *policy.Subject, req *policy.Request) *protocols.Refusal {
	now := time.Now()
	if r := n.refused(bearer(i)); r != nil {
		return r
	}
	if !subject.ExpiresAt.IsZero() && !now.Before(subject.ExpiresAt) {
		return &protocols.Refusal{Rule: "expired", Code: "57P01", Reason: "the token expired while this session stood still: log in again with a new one"}
	}
	again := *req
	again.Context.Now = now
	if d, _ := n.decide(&again); d.Effect != policy.Permit {
		return &protocols.Refusal{Rule: d.Rule, Code: "57P01", Reason: "the rules changed while this session stood still: " + d.Reason}
	}
	return nil
}

// gated has a gate put on every connection, beneath whatever is laid over it:
// a session's fence works there.
type gated struct{ net.Listener }

// Accept implements net.Listener.
func (g gated) Accept() (net.Conn, error) {
	c, err := g.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return protocols.NewGate(c), nil
}

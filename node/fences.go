package node

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/sallyport/sallyport/node/session"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fence"
)

// fences enforces revocations on this node. It is the fence.Enforcer: what it
// is told, it does without waiting.
//
// A revocation may come by the fence's stream before this node has folded its
// event. Until then it stands in early, so that nobody gets in who was revoked.
type fences struct {
	log      *slog.Logger
	state    *state.Projection
	sessions *session.Registry
	early    atomic.Pointer[[]enforced] // never nil; its content never changes
	mu       sync.Mutex                 // held to replace early

	ending sync.WaitGroup // sessions being cut; the node waits for them when it stops
	stop   context.Context
}

// enforced is a revocation in force here.
type enforced struct {
	seq uint64
	p   event.Revoked
	why *protocols.Refusal
}

var _ fence.Enforcer = (*fences)(nil)

// newFences returns the fences of a node that stops with ctx.
func newFences(ctx context.Context, p *state.Projection, r *session.Registry, log *slog.Logger) *fences {
	f := &fences{log: log, state: p, sessions: r, stop: ctx}
	f.early.Store(&[]enforced{})
	return f
}

func endedBy(p event.Revoked) func(session.Info) bool {
	return func(i session.Info) bool { return bearer(i).EndedBy(p) }
}

// Freeze implements fence.Enforcer.
func (f *fences) Freeze(id fence.ID, payload []byte) {
	var p event.Revoked
	if err := json.Unmarshal(payload, &p); err != nil {
		return // a hint that cannot be read; the revocation will not be this one
	}
	f.sessions.Freeze(event.ID(id).String(), endedBy(p))
}

// Thaw implements fence.Enforcer.
func (f *fences) Thaw(id fence.ID) { f.sessions.Thaw(event.ID(id).String()) }

// note is what a node says with its acknowledgement.
type note struct {
	Sessions   int    `json:"sessions"`             // live sessions that it cut
	Violations uint64 `json:"violations,omitempty"` // of theirs
	Bytes      uint64 `json:"bytes,omitempty"`
}

// Enforce implements fence.Enforcer: first nobody gets in, then nobody begins
// another write, then their connections are reset, and when nothing is on its
// way into a socket any more, it is quiet.
func (f *fences) Enforce(r fence.Revocation) <-chan []byte {
	quiet := make(chan []byte, 1)
	var p event.Revoked
	if err := json.Unmarshal(r.Payload, &p); err != nil {
		// Never acknowledged, so never reported as done. The event itself, which
		// comes by the log, stops the node if it cannot be read.
		f.log.Error("a revocation cannot be read", "seq", r.Seq, "err", err)
		return quiet
	}
	why := &protocols.Refusal{Rule: "revocation/" + p.ID, Reason: fmt.Sprintf("access of %s has been revoked: %s", p.Ends(), p.Reason), Code: "57P01"}
	if f.state.View().Seq < r.Seq {
		f.mu.Lock()
		early := append(slices.Clone(*f.early.Load()), enforced{r.Seq, p, why})
		f.early.Store(&early)
		f.mu.Unlock()
	}
	cutting := f.sessions.Trip(endedBy(p), why)
	say := func() {
		n := note{Sessions: cutting.Sessions}
		n.Violations, n.Bytes = cutting.Violations()
		b, _ := json.Marshal(n)
		quiet <- b
	}
	if cutting.Sessions == 0 {
		say()
		return quiet
	}
	f.ending.Go(func() {
		if err := cutting.Cut(f.stop); err == nil {
			say()
		}
	})
	return quiet
}

// folded says that all revocations up to v are in the state.
func (f *fences) folded(v *state.View) {
	f.mu.Lock()
	defer f.mu.Unlock()
	early := *f.early.Load()
	if slices.ContainsFunc(early, func(e enforced) bool { return e.seq <= v.Seq }) {
		early = slices.DeleteFunc(slices.Clone(early), func(e enforced) bool { return e.seq <= v.Seq })
		f.early.Store(&early)
	}
}

// refuses returns why b is refused by a revocation in force here that the state
// may not have yet, or nil.
func (f *fences) refuses(b *state.Bearer) *protocols.Refusal {
	for _, e := range *f.early.Load() {
		if b.EndedBy(e.p) {
			return e.why
		}
	}
	return nil
}

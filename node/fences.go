package node

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/node/session"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/raftstore/event"
)

const (
	// fenceWait bounds how long the sessions of a revoked subject may take to
	// end. They pass nothing meanwhile.
	fenceWait = 15 * time.Second
	// keepFences is how many results are kept for who asks late.
	keepFences = 1000
)

// fences enforces revocations on this node: one run for each, begun when the
// event is folded, whoever asks or does not ask about it.
type fences struct {
	node     string
	sessions *session.Registry
	mu       sync.Mutex
	runs     map[uint64]*fenceRun // by the revocation's event
	order    []uint64
	handled  atomic.Uint64  // every revocation up to this event has been begun
	wg       sync.WaitGroup // runs; the node waits for them when it stops
}

type fenceRun struct {
	done   chan struct{}
	result event.NodeFenced
	err    error
}

func newFences(r *session.Registry, node string) *fences {
	return &fences{node: node, sessions: r, runs: map[uint64]*fenceRun{}}
}

// begin cuts the sessions that the revocation e ends. The state that v is part
// of refuses new ones already. It does not wait.
func (f *fences) begin(_ *state.View, e event.Event) {
	p, err := event.Decode[event.Revoked](e)
	if err != nil {
		return // folding it would have failed before
	}
	run := &fenceRun{done: make(chan struct{})}
	f.mu.Lock()
	f.runs[e.Seq] = run
	f.order = append(f.order, e.Seq)
	if len(f.order) > keepFences {
		delete(f.runs, f.order[0])
		f.order = f.order[1:]
	}
	f.mu.Unlock()
	f.wg.Go(func() {
		defer close(run.done)
		ctx, cancel := context.WithTimeout(context.Background(), fenceWait)
		defer cancel()
		why := &protocols.Refusal{Rule: "revocation/" + p.ID, Reason: fmt.Sprintf("access of %s has been revoked: %s", p.Ends(), p.Reason), Code: "57P01"}
		n, err := f.sessions.CutWhere(ctx, func(i session.Info) bool { return bearer(i).EndedBy(p) }, why)
		if err != nil {
			run.err = fmt.Errorf("%d session(s) pass nothing any more but have not ended: %w", n, err)
			return
		}
		run.result = event.NodeFenced{Node: f.node, State: "confirmed", At: time.Now().UTC(), Sessions: n}
	})
}

// wait returns how the revocation at seq went here. A node that folded it
// before its last start has no session from before.
func (f *fences) wait(ctx context.Context, seq uint64) (event.NodeFenced, error) {
	f.mu.Lock()
	run := f.runs[seq]
	f.mu.Unlock()
	if run == nil {
		return event.NodeFenced{Node: f.node, State: "confirmed", At: time.Now().UTC()}, nil
	}
	select {
	case <-run.done:
		return run.result, run.err
	case <-ctx.Done():
		return event.NodeFenced{}, ctx.Err()
	}
}

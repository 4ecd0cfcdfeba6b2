// Package session is the registry of live sessions on this node. It cuts
// them: a session whose fence has tripped passes no further byte, what its
// target still runs is stopped, both legs are reset, and the cut is reported
// done only when the session's goroutines have ended.
package session

import (
	"context"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/protocols"
)

// Info is what others may know of a live session.
type Info struct {
	ID          string         `json:"id"`
	Node        string         `json:"node"`
	Subject     string         `json:"subject"`
	Target      string         `json:"target"`
	Profile     string         `json:"profile,omitempty"`
	Database    string         `json:"database"`
	Client      string         `json:"client"`
	Application string         `json:"application,omitempty"`
	Started     time.Time      `json:"started"`
	Deadline    time.Time      `json:"deadline"`
	PolicyIndex uint64         `json:"policy_index"`
	Claims      map[string]any `json:"claims,omitempty"`
	Groups      []string       `json:"groups,omitempty"`
	TokenID     string         `json:"token_id,omitempty"`
	Issued      time.Time      `json:"issued,omitzero"` // the token
	State       string         `json:"state"`           // running, held, cutting
	Admitted    uint64         `json:"admitted"`
	Refused     uint64         `json:"refused"`
	Held        uint64         `json:"held"`
	Rows        uint64         `json:"rows"`
	BytesOut    uint64         `json:"bytes_out"`
}

// Fence is the session's gate. It implements protocols.Fence. Leases will add
// a deadline here: Check is asked before every write in either direction.
type Fence struct {
	tripped atomic.Pointer[protocols.Refusal]
}

// Check returns nil, or why the session must stop.
func (f *Fence) Check() error {
	if r := f.tripped.Load(); r != nil {
		return r
	}
	return nil
}

func (f *Fence) trip(r *protocols.Refusal) { f.tripped.CompareAndSwap(nil, r) }

// Entry is one live session.
type Entry struct {
	Fence Fence
	Stats protocols.Stats
	// Waiting counts operations that wait for an approver.
	Waiting atomic.Int32

	info Info
	mu   struct {
		sync.Mutex
		lease  protocols.Lease
		reset  func()
		cut    bool
		closed bool
	}
	done chan struct{}
}

// NewEntry returns an entry for Registry.Add.
func NewEntry(info Info) *Entry {
	return &Entry{info: info, done: make(chan struct{})}
}

// SetLease tells what to stop at the target when the session is cut.
func (e *Entry) SetLease(l protocols.Lease) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.mu.lease = l
}

// OnCut sets what resets both legs. If the session has been cut already, it
// is called at once.
func (e *Entry) OnCut(reset func()) {
	e.mu.Lock()
	cut := e.mu.cut
	e.mu.reset = reset
	e.mu.Unlock()
	if cut {
		reset()
	}
}

// Info returns the session as it is now.
func (e *Entry) Info() Info {
	i := e.info
	i.Admitted, i.Refused, i.Held = e.Stats.Admitted.Load(), e.Stats.Refused.Load(), e.Stats.Held.Load()
	i.Rows, i.BytesOut = e.Stats.Rows.Load(), e.Stats.BytesOut.Load()
	switch {
	case e.Fence.Check() != nil:
		i.State = "cutting"
	case e.Waiting.Load() > 0:
		i.State = "held"
	default:
		i.State = "running"
	}
	return i
}

// killTimeout bounds how long the target may take to stop what runs before
// both legs are reset all the same.
const killTimeout = 3 * time.Second

// Cut stops the session and returns when its goroutines have ended or ctx
// does. From its first line on, no byte passes: the fence has tripped. Then,
// in this order: cancel, terminate what still runs, reset both legs, wait.
func (e *Entry) Cut(ctx context.Context, why *protocols.Refusal) error {
	e.Fence.trip(why)
	e.mu.Lock()
	first := !e.mu.cut
	e.mu.cut = true
	lease, reset := e.mu.lease, e.mu.reset
	e.mu.Unlock()
	if first {
		if lease != nil {
			kctx, cancel := context.WithTimeout(ctx, killTimeout)
			// An error leaves nothing to do here: the legs are reset next, and
			// the account has lost its login and is dropped at release.
			_ = lease.Cancel(kctx)
			_ = lease.Terminate(kctx)
			cancel()
		}
		if reset != nil {
			reset()
		}
	}
	select {
	case <-e.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Registry knows the live sessions of this node.
type Registry struct {
	mu struct {
		sync.Mutex
		entries  map[string]*Entry
		draining bool
	}
	max int
}

// NewRegistry returns a registry of at most max sessions.
func NewRegistry(max int) *Registry {
	r := &Registry{max: max}
	r.mu.entries = map[string]*Entry{}
	return r
}

// Add registers e. From then on a revocation finds it.
func (r *Registry) Add(e *Entry) *protocols.Refusal {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.mu.draining:
		return &protocols.Refusal{Rule: "shutdown", Reason: "this node is shutting down: connect to another node", Code: "57P03"}
	case len(r.mu.entries) >= r.max:
		return &protocols.Refusal{Rule: "limits", Reason: "this node has as many sessions as it may have: connect to another node or retry", Code: "53300"}
	}
	r.mu.entries[e.info.ID] = e
	return nil
}

// Done ends e's registration: its goroutines pass nothing any more.
func (r *Registry) Done(e *Entry) {
	r.mu.Lock()
	delete(r.mu.entries, e.info.ID)
	r.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.mu.closed {
		e.mu.closed = true
		close(e.done)
	}
}

// List returns all live sessions, oldest first.
func (r *Registry) List() []Info {
	r.mu.Lock()
	entries := make([]*Entry, 0, len(r.mu.entries))
	for _, e := range r.mu.entries {
		entries = append(entries, e)
	}
	r.mu.Unlock()
	infos := make([]Info, len(entries))
	for i, e := range entries {
		infos[i] = e.Info()
	}
	sort.Slice(infos, func(i, j int) bool { return infos[i].Started.Before(infos[j].Started) })
	return infos
}

// Get returns the live session of that name, or nil.
func (r *Registry) Get(id string) *Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.entries[id]
}

// Has reports whether the session is live here.
func (r *Registry) Has(id string) bool { return r.Get(id) != nil }

// CutWhere cuts every session that match holds for, all at once, and returns
// how many there were when all of them have ended or ctx has.
func (r *Registry) CutWhere(ctx context.Context, match func(Info) bool, why *protocols.Refusal) (int, error) {
	r.mu.Lock()
	var hit []*Entry
	for _, e := range r.mu.entries {
		if match(e.info) {
			hit = append(hit, e)
		}
	}
	r.mu.Unlock()
	for _, e := range hit {
		e.Fence.trip(why) // all stop passing bytes before the first is torn down
	}
	errs := make(chan error, len(hit))
	for _, e := range hit {
		go func() { errs <- e.Cut(ctx, why) }()
	}
	var first error
	for range hit {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return len(hit), first
}

// Drain refuses new sessions and waits for those there are; when ctx ends
// first, they are cut.
func (r *Registry) Drain(ctx context.Context, why *protocols.Refusal) {
	r.mu.Lock()
	r.mu.draining = true
	r.mu.Unlock()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for len(r.List()) > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			cctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			_, _ = r.CutWhere(cctx, func(Info) bool { return true }, why)
			return
		}
	}
}

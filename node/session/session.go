// Package session is the registry of live sessions on this node. It cuts
// them: a session whose fence has tripped begins no further write, both legs are
// reset, and the cut is reported done only when it is at rest: no goroutine is
// between the fence and a socket. Its end follows.
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
	State       string         `json:"state"`           // running, held, frozen, cutting
	// Revocation is the session's mode: strict, bounded(S) or best_effort.
	Revocation string `json:"revocation,omitempty"`
	// Violations are writes that may have gone out after the node's lease had
	// ended, of ViolationBytes together.
	Violations     uint64 `json:"violations,omitempty"`
	ViolationBytes uint64 `json:"violation_bytes,omitempty"`
	Admitted       uint64 `json:"admitted"`
	Refused        uint64 `json:"refused"`
	Held           uint64 `json:"held"`
	Rows           uint64 `json:"rows"`
	BytesOut       uint64 `json:"bytes_out"`
}

// Entry is one live session.
type Entry struct {
	Fence Fence
	Stats protocols.Stats
	// Waiting counts operations that wait for an approver.
	Waiting atomic.Int32

	info Info
	mu   struct {
		sync.Mutex
		reset  func()
		cut    bool
		closed bool
	}
	reset chan struct{} // closed when both legs have been reset by a cut
	done  chan struct{} // closed when the session's goroutines have ended
}

// NewEntry returns an entry for Registry.Add. lease is the node's, as this
// session's mode has it.
func NewEntry(info Info, lease Lease) *Entry {
	e := &Entry{info: info, reset: make(chan struct{}), done: make(chan struct{})}
	e.Fence.lease = lease
	return e
}

// OnFreeze sets what makes blocked writes return to the fence.
func (e *Entry) OnFreeze(interrupt func()) { e.Fence.onInterrupt(interrupt) }

// OnCut sets what resets both legs, and returns when nothing leaves either of
// them any more. If the session has been cut already, it is called at once. It
// is set once.
func (e *Entry) OnCut(reset func()) {
	e.mu.Lock()
	cut := e.mu.cut
	e.mu.reset = reset
	e.mu.Unlock()
	if cut {
		reset()
		close(e.reset)
	}
}

// Info returns the session as it is now.
func (e *Entry) Info() Info {
	i := e.info
	i.Admitted, i.Refused, i.Held = e.Stats.Admitted.Load(), e.Stats.Refused.Load(), e.Stats.Held.Load()
	i.Rows, i.BytesOut = e.Stats.Rows.Load(), e.Stats.BytesOut.Load()
	i.Violations, i.ViolationBytes = e.Fence.Violations()
	switch {
	case e.Fence.Check() != nil:
		i.State = "cutting"
	case !e.Fence.Frozen().IsZero():
		i.State = "frozen"
	case e.Waiting.Load() > 0:
		i.State = "held"
	default:
		i.State = "running"
	}
	return i
}

// Cut stops the session and returns when it is at rest, or when ctx ends. From
// its first line on, no write begins: the fence has tripped. Then both legs are
// reset, so that the kernel drops what it has not sent. At rest means that this
// is done, and that no goroutine is between the fence and a socket: nothing of
// the session leaves this node any more. The session ends by itself then (Ended):
// the account is dropped, the recording completed.
func (e *Entry) Cut(ctx context.Context, why *protocols.Refusal) error {
	e.Fence.Trip(why)
	e.mu.Lock()
	first := !e.mu.cut
	e.mu.cut = true
	reset := e.mu.reset
	e.mu.Unlock()
	if first && reset != nil {
		reset()
		close(e.reset)
	}
	select {
	case <-e.reset:
	case <-e.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-e.Fence.Rested():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Ended returns when the session's goroutines have ended, or when ctx does.
func (e *Entry) Ended(ctx context.Context) error {
	select {
	case <-e.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (e *Entry) cutting() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.mu.cut
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

// Cutting is what Trip began: sessions that begin no write any more, and are
// not all at rest.
type Cutting struct {
	Sessions int
	entries  []*Entry
	why      *protocols.Refusal
}

// Trip trips the fence of every session that match holds for. When it returns,
// none of them begins another write. Cut does the rest.
func (r *Registry) Trip(match func(Info) bool, why *protocols.Refusal) *Cutting {
	hit := r.where(match)
	for _, e := range hit {
		e.Fence.Trip(why)
	}
	return &Cutting{Sessions: len(hit), entries: hit, why: why}
}

// Cut cuts the sessions, all at once, and returns when all are at rest or ctx
// has ended.
func (c *Cutting) Cut(ctx context.Context) error {
	return c.each(func(e *Entry) error { return e.Cut(ctx, c.why) })
}

// Ended returns when the sessions' goroutines have ended, or ctx has.
func (c *Cutting) Ended(ctx context.Context) error {
	return c.each(func(e *Entry) error { return e.Ended(ctx) })
}

func (c *Cutting) each(do func(*Entry) error) error {
	errs := make(chan error, len(c.entries))
	for _, e := range c.entries {
		go func() { errs <- do(e) }()
	}
	var first error
	for range c.entries {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// Violations of the sessions being cut.
func (c *Cutting) Violations() (writes, bytes uint64) {
	for _, e := range c.entries {
		w, b := e.Fence.Violations()
		writes, bytes = writes+w, bytes+b
	}
	return writes, bytes
}

// CutWhere cuts every session that match holds for, and returns how many there
// were when all of them are at rest or ctx has ended.
func (r *Registry) CutWhere(ctx context.Context, match func(Info) bool, why *protocols.Refusal) (int, error) {
	c := r.Trip(match, why)
	return c.Sessions, c.Cut(ctx)
}

// Freeze stops every session that match holds for, until Thaw of the same id.
func (r *Registry) Freeze(id string, match func(Info) bool) {
	for _, e := range r.where(match) {
		e.Fence.Freeze(id)
	}
}

// Thaw ends a Freeze of that id.
func (r *Registry) Thaw(id string) {
	for _, e := range r.where(func(Info) bool { return true }) {
		e.Fence.Thaw(id)
	}
}

func (r *Registry) where(match func(Info) bool) []*Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	var hit []*Entry
	for _, e := range r.mu.entries {
		if match(e.info) {
			hit = append(hit, e)
		}
	}
	return hit
}

// lookEvery is how often idle sessions are looked at when nothing happens.
const lookEvery = time.Second

// Run freezes sessions when the node's lease ends, lets them go on when it is
// back, and cuts those that stood still for too long, until ctx ends. changed
// is closed when the lease is lost or gained. Sessions that have something to
// write need none of this; idle ones do, and writes that wait for their peer.
func (r *Registry) Run(ctx context.Context, changed func() <-chan struct{}) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		next := changed()
		for _, e := range r.where(func(Info) bool { return true }) {
			if why := e.Fence.Look(); why != nil && !e.cutting() {
				go func() { _ = e.Cut(ctx, why) }() // ends when it is at rest, or with ctx
			}
		}
		select {
		case <-next:
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
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
			c := r.Trip(func(Info) bool { return true }, why)
			_ = c.Cut(cctx)
			_ = c.Ended(cctx)
			return
		}
	}
}

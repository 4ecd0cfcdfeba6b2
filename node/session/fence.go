package session

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/protocols"
)

// freezeMax is how long a session may stand still before it is cut: long enough
// for a leader to be elected or a node to come back, short enough that neither
// side takes the other for dead.
const freezeMax = 60 * time.Second

// Lease is what a Fence asks of the node. The zero value always holds.
type Lease struct {
	// Check returns nil while the session may pass bytes. It is called before
	// and after every write, and must be safe for concurrent use.
	Check func() error
	// Changed is closed when what Check says might change for the better.
	Changed func() <-chan struct{}
	// Judge decides anew about a session that is to go on after it was frozen:
	// nil, or why it may not. It may take as long as a policy decision does.
	Judge func() *protocols.Refusal
}

// Fence is a session's gate. It implements protocols.Fence.
//
//	          Freeze, lease lost                  Trip
//	passing ────────────────────► frozen ─────────────────► revoked
//	   ▲                            │    60 s, judged: no      ▲
//	   └────────────────────────────┘                          │
//	     thawed, lease regained, and judged anew: yes          │
//	passing ───────────────────────────────────────────────────┘
//
// Revoked is for ever. A frozen session keeps its connections and moves no byte.
type Fence struct {
	lease   Lease
	tripped atomic.Pointer[protocols.Refusal]
	// still is set while the session may not go on without being judged.
	still atomic.Bool
	// inside counts writes between Enter and Leave: at most one of each
	// direction, and one that looks whether it may.
	inside atomic.Int32

	judging sync.Mutex // held while deciding anew; taken before mu
	mu      struct {
		sync.Mutex
		freezes   map[string]bool // by the id of the revocation that is proposed
		since     time.Time       // frozen since, zero when it is not
		changed   chan struct{}   // closed when the state changes; nil when nobody waits
		rested    chan struct{}   // closed at rest; nil when nobody has asked
		interrupt func()
	}
	violations, bytes atomic.Uint64
}

// Check implements protocols.Fence.
func (f *Fence) Check() error {
	if r := f.tripped.Load(); r != nil {
		return r
	}
	return nil
}

// Enter implements protocols.Fence: a few atomic loads and the lease's clock.
func (f *Fence) Enter(gone <-chan struct{}) error {
	for {
		// Inside before the look: whoever trips the fence afterwards sees a write
		// that it did not stop, and waits for it.
		f.inside.Add(1)
		if r := f.tripped.Load(); r != nil {
			f.outside()
			return r
		}
		if !f.still.Load() && f.held() {
			// Frozen or revoked between the two lines is as if the write had been
			// a moment earlier; the lease is looked at last, and again by Leave.
			return nil
		}
		f.outside()
		if err := f.wait(gone); err != nil {
			return err
		}
	}
}

// Leave implements protocols.Fence. A write during which the lease ended may
// have gone out after it had: that is a violation, and counted.
func (f *Fence) Leave(n int) {
	f.Wrote(n)
	f.outside()
}

// Wrote implements protocols.Fence.
func (f *Fence) Wrote(n int) {
	if n > 0 && !f.held() {
		f.violations.Add(1)
		f.bytes.Add(uint64(n))
	}
}

func (f *Fence) outside() {
	if f.inside.Add(-1) == 0 && f.tripped.Load() != nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.rest()
	}
}

// Rested is closed when the fence has tripped and every write that it let begin
// has ended: nothing is between it and a socket any more.
func (f *Fence) Rested() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.rested == nil {
		f.mu.rested = make(chan struct{})
	}
	f.rest()
	return f.mu.rested
}

// rest is called under mu.
func (f *Fence) rest() {
	if f.mu.rested == nil || f.inside.Load() != 0 || f.tripped.Load() == nil {
		return
	}
	select {
	case <-f.mu.rested:
	default:
		close(f.mu.rested)
	}
}

// Violations are the writes that may have gone out after the lease had ended,
// and how many bytes they were. At level 1 there is at most one at a time in
// each direction, of 32 KiB.
func (f *Fence) Violations() (writes, bytes uint64) { return f.violations.Load(), f.bytes.Load() }

// Holds implements protocols.Fence.
func (f *Fence) Holds() bool { return f.held() }

func (f *Fence) held() bool { return f.lease.Check == nil || f.lease.Check() == nil }

// Trip ends the session's leave for ever. It does not wait.
func (f *Fence) Trip(why *protocols.Refusal) {
	f.tripped.CompareAndSwap(nil, why)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stop()
}

// Freeze stops the session until Thaw of the same id. It does not wait: a write
// that has begun may end.
func (f *Fence) Freeze(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.freezes == nil {
		f.mu.freezes = map[string]bool{}
	}
	f.mu.freezes[id] = true
	f.stand()
	f.stop()
}

// Thaw ends a Freeze. The session goes on when it has been judged anew.
func (f *Fence) Thaw(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.freezes[id] {
		delete(f.mu.freezes, id)
		f.tell()
	}
}

// Look freezes the session if its lease has ended, and lets it go on if nothing
// stands against that any more. Whoever watches the lease calls it; sessions
// that have something to write look by themselves. It returns why the session
// may not go on, ever; the caller cuts it.
func (f *Fence) Look() *protocols.Refusal {
	if r := f.tripped.Load(); r != nil {
		return r
	}
	held := f.held()
	f.mu.Lock()
	if !held && f.mu.since.IsZero() {
		f.stand()
		f.stop()
	}
	over := !f.mu.since.IsZero() && time.Since(f.mu.since) >= freezeMax
	f.mu.Unlock()
	if over {
		f.Trip(tooLong)
	} else if held && f.still.Load() {
		f.judge()
	}
	return f.tripped.Load()
}

// Frozen says since when the session stands still; zero when it does not.
func (f *Fence) Frozen() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.since
}

func (f *Fence) onInterrupt(interrupt func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.interrupt = interrupt
	if f.still.Load() || f.tripped.Load() != nil {
		interrupt()
	}
}

// stand, stop and tell are called under mu.
func (f *Fence) stand() {
	if f.mu.since.IsZero() {
		f.mu.since = time.Now()
	}
	f.still.Store(true)
}

func (f *Fence) stop() {
	if f.mu.interrupt != nil {
		f.mu.interrupt()
	}
	f.tell()
}

func (f *Fence) tell() {
	if f.mu.changed != nil {
		close(f.mu.changed)
		f.mu.changed = nil
	}
}

// tooLong cuts a session that stood still for freezeMax.
var tooLong = &protocols.Refusal{Rule: "no-quorum", Code: "57P01",
	Reason: "this node could not learn for a minute what was revoked, and passed nothing meanwhile: connect to another node"}

// wait returns when the session might go on, or the error that says that it
// never will.
func (f *Fence) wait(gone <-chan struct{}) error {
	var regained <-chan struct{}
	if f.lease.Changed != nil {
		regained = f.lease.Changed() // before the look: no change is missed
	}
	held := f.held()
	f.mu.Lock()
	if f.tripped.Load() != nil { // Trip tells those who wait after it
		f.mu.Unlock()
		return f.Check()
	}
	f.stand()
	ready := held && len(f.mu.freezes) == 0
	if f.mu.changed == nil {
		f.mu.changed = make(chan struct{})
	}
	changed, left := f.mu.changed, freezeMax-time.Since(f.mu.since)
	f.mu.Unlock()
	if ready {
		f.judge()
		return nil
	}
	if left <= 0 {
		f.Trip(tooLong)
		return f.Check()
	}
	timer := time.NewTimer(left)
	defer timer.Stop()
	select {
	case <-changed:
	case <-regained:
	case <-timer.C:
	case <-gone:
		return net.ErrClosed
	}
	return nil
}

// judge decides anew, once for all who wait, and ends the freeze or the session.
func (f *Fence) judge() {
	f.judging.Lock()
	defer f.judging.Unlock()
	f.mu.Lock()
	ready := f.still.Load() && len(f.mu.freezes) == 0
	f.mu.Unlock()
	if !ready || f.tripped.Load() != nil {
		return
	}
	if f.lease.Judge != nil {
		if r := f.lease.Judge(); r != nil {
			f.Trip(r)
			return
		}
	}
	held := f.held()
	f.mu.Lock()
	defer f.mu.Unlock()
	if held && len(f.mu.freezes) == 0 { // not frozen again meanwhile
		f.mu.since = time.Time{}
		f.still.Store(false)
		f.tell()
	}
}

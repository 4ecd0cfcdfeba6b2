// Package fence makes revocations a fence: when Await says that one is
// complete, no node that could be reached or not passes a check for what was
// revoked. It knows nothing of what is revoked: a revocation is a number, an
// id and bytes for the Enforcer.
//
// A node passes data only while it holds a lease from the cluster's leader.
//
//	node (Holder)                               leader (Grantor)
//	t0 = own clock
//	Renew(n) ─────────────────────────────────► renewed = own clock
//	                                            a quorum round that starts now
//	                                            says that it still leads
//	◄──────────── Revoke … Revoke, Grant(n) ─── expiry = renewed + D(1+ρ)/(1−ρ) + ε
//	enforce each, then deadline = t0 + D
//	Ack(r) after quiescence ──────────────────► acked
//
// A revocation is in force when every node has acknowledged it after
// quiescence (nothing is between a check and its write any more), or its lease
// has certainly ended on the leader's clock. Why that is enough: take a node
// that did not acknowledge r and passes a check after Await returned, by a
// lease counted from t0.
//
//   - Granted by the same leader before r was queued: expiry counts from a
//     moment after t0, and is longer by what two clocks may drift apart.
//   - Granted by it later: revocations and grants are in one queue, and a grant
//     names the newest revocation before it; the node uses it only after that
//     was enforced.
//   - Granted by an earlier leader: its round began after t0 and was answered
//     by a majority still in its term, so t0 lies before the election of this
//     leader, which counts every node as a holder until a whole lease after.
//   - Granted by a later leader: it grants only after it has applied all that
//     was committed before its term, r among it.
//   - Its process was started anew: it has no lease before a grant.
//
// Node identities are exclusive: a data directory is locked by the process
// that uses it, as Raft needs it too.
//
// Clocks: a holder counts on CLOCK_BOOTTIME, which goes on while the machine
// sleeps and so can only end a lease early; the leader waits on
// CLOCK_MONOTONIC, which stands still then and can only end it late. Rates
// differ from real time by at most ρ = 1 %. No step uses the wall clock. What no
// clock of a guest shows, a frozen virtual machine whose hypervisor hides the
// time, only a second party closes.
//
// Freeze is sent before a revocation is committed, so that what it names stops
// at once. It is a hint: nothing counts on it.
package fence

import (
	"errors"
	"time"
)

const (
	// drift is ρ, the most that a clock's rate may differ from real time's.
	// NTP slews by 0.05 %, crystals drift by 0.02 % at most.
	drift = 0.01
	// slack is ε: reading clocks, rounding.
	slack = 2 * time.Millisecond
	// MaxLength bounds leases: how long a new leader may have to wait.
	MaxLength = time.Minute
	// MaxPayload bounds what a Freeze or a Revocation carries on the stream. A
	// larger revocation reaches nodes by their event log only; no grant is used
	// before it has.
	MaxPayload = 16 << 10
	// MaxNote bounds what an Enforcer says about a quiescence.
	MaxNote = 1 << 10
	// freezeTimeout is how long a Freeze holds without a revocation or an Abort.
	freezeTimeout = 5 * time.Second
)

// Unbounded as a limit says that no lease bounds what was granted: only an
// acknowledgement counts.
const Unbounded time.Duration = -1

var (
	// ErrNoLease says that this node has no lease, or not any more.
	ErrNoLease = errors.New("this node holds no lease: it cannot know what was revoked")
	// ErrNotLeading says that this node does not lead, so it has no leases to judge by.
	ErrNotLeading = errors.New("this node does not lead the cluster")
)

// ID names a revocation before it has a number: its event's id.
type ID [16]byte

// Revocation is what the fence carries, in the order of Seq.
type Revocation struct {
	Seq     uint64 // its event's number
	ID      ID     // its event's id, and that of its Freeze
	Payload []byte // for the Enforcer; nobody changes it
}

// Enforcer is the node that a Holder protects. Calls come one at a time, under
// the Holder's lock: they must not wait and not call the Holder, but Check.
type Enforcer interface {
	// Freeze stops what payload names, as long as Thaw has not been called. It
	// comes before the revocation is decided, or without one.
	Freeze(id ID, payload []byte)
	// Thaw ends a Freeze: the revocation was enforced, was given up, or did not
	// come in time. What was frozen is judged anew before it goes on.
	Thaw(id ID)
	// Enforce puts r in force: when it returns, every check for what r names
	// fails and none will pass later. The channel gets one note for the report,
	// at most MaxNote bytes, or is closed, at quiescence: nothing is between a
	// check and its write any more, and no socket holds a byte to send again. It
	// is called once for each revocation, in any order, whether it came by the
	// stream or by the log.
	Enforce(r Revocation) (quiescent <-chan []byte)
}

// Gate is what lets the kernel send what sessions have written: level 2.
type Gate interface {
	// Extend lets data out for as long as left says, from the moment it is
	// asked, and not longer; left() ≤ 0 shuts the gate.
	Extend(left func() time.Duration) error
}

// State says why a node passes nothing of what was revoked, or that it may.
type State string

const (
	// Confirmed: the node acknowledged the revocation after quiescence.
	Confirmed State = "confirmed"
	// Expired: the node did not answer, and its lease has certainly ended.
	Expired State = "fenced by expiry"
	// Unconfirmed: neither yet.
	Unconfirmed State = "unconfirmed"
)

// NodeReport is one node's part in a Report.
type NodeReport struct {
	Node  string
	State State
	// At is when the acknowledgement came or the lease had certainly ended; for
	// an unconfirmed node when it certainly ends, zero if nothing bounds it.
	At     time.Time
	Level  int    // what the node said of itself: 1 process, 2 kernel gate; 0 unknown
	Note   []byte // the Enforcer's, of a confirmed node
	Reason string // of an unconfirmed or expired node
}

// Report says how far a revocation is in force.
type Report struct {
	Seq      uint64
	Complete bool // no node is unconfirmed
	Nodes    []NodeReport
}

// certain is how long the leader waits until a promise of d, counted on
// another clock from a moment before now, has ended.
func certain(d time.Duration) time.Duration {
	return time.Duration(float64(d)*(1+drift)/(1-drift)) + slack
}

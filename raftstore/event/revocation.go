package event

import (
	"fmt"
	"time"
)

// ScopeKind says what of a session a revocation looks at.
type ScopeKind string

const (
	ScopeSubject ScopeKind = "subject" // Value: provider/name
	ScopeGroup   ScopeKind = "group"   // Value: the group's name
	ScopeClaim   ScopeKind = "claim"   // Name and Value of the claim
	ScopeSession ScopeKind = "session" // Value: the session's id
	ScopeTarget  ScopeKind = "target"  // Value: the target's name
	ScopeToken   ScopeKind = "token"   // Value: its jti, or sha256:… of one that has none
	ScopeNode    ScopeKind = "node"    // Value: the node's name
)

// Scope is what a revocation ends. It is comparable; equal scopes end the same.
type Scope struct {
	Kind  ScopeKind `json:"kind"`
	Name  string    `json:"name,omitempty"` // of the claim; empty for every other kind
	Value string    `json:"value"`
}

// String is "kind value", and "claim name=value" for a claim.
func (s Scope) String() string {
	if s.Kind == ScopeClaim {
		return fmt.Sprintf("claim %s=%s", s.Name, s.Value)
	}
	return string(s.Kind) + " " + s.Value
}

// Revoked ends what Ends says. Make one by NewRevoked.
type Revoked struct {
	ID      string `json:"id"`
	Subject string `json:"subject"` // of a revocation of a subject: all that version 1 knew
	Reason  string `json:"reason"`
	Scope   *Scope `json:"scope,omitempty"` // of any other kind; since version 2
	// Until bounds what ends to credentials issued until then, and the sessions
	// they opened: what an identity provider means by the end of a session.
	// Zero ends all, those issued later too. Since version 2.
	Until time.Time `json:"until,omitzero"`
}

// NewRevoked keeps a revocation of a subject as what it always was, so that a
// cluster in the middle of an upgrade can revoke subjects.
func NewRevoked(id string, s Scope, reason string) Revoked {
	if s.Kind == ScopeSubject {
		return Revoked{ID: id, Subject: s.Value, Reason: reason}
	}
	return Revoked{ID: id, Reason: reason, Scope: &s}
}

// Ends is what the revocation ends.
func (r Revoked) Ends() Scope {
	if r.Scope != nil {
		return *r.Scope
	}
	return Scope{Kind: ScopeSubject, Value: r.Subject}
}

// RevocationUndone lifts a revocation for credentials issued after it.
type RevocationUndone struct {
	ID     string `json:"id"`
	Reason string `json:"reason"`
}

// RevocationReport was the evidence of when a revocation took effect before
// there were leases. It is read and not written any more.
type RevocationReport struct {
	ID    string         `json:"id"`
	Index uint64         `json:"index"`
	Nodes []NodeReported `json:"nodes"`
}

// NodeReported is one node's part in a RevocationReport.
type NodeReported struct {
	Node     string    `json:"node"`
	State    string    `json:"state"` // confirmed, unconfirmed
	At       time.Time `json:"at"`
	Sessions int       `json:"sessions"` // live sessions it cut
	Detail   string    `json:"detail,omitempty"`
}

// RevocationFenced says that no node passes a byte of what was revoked any
// more, and how that is known of each.
type RevocationFenced struct {
	ID    string       `json:"id"`
	Index uint64       `json:"index"` // of the revocation
	Nodes []NodeFenced `json:"nodes"`
}

// States of a node in a revocation.
const (
	FenceConfirmed   = "confirmed"        // it has stopped what was revoked, and said so
	FenceExpired     = "fenced by expiry" // its leave to pass bytes ended for certain
	FenceUnconfirmed = "unconfirmed"      // it may still pass bytes; LeaseEnds says until when
)

// NodeFenced says how a node stands to a revocation.
type NodeFenced struct {
	Node     string    `json:"node"`
	State    string    `json:"state"`
	At       time.Time `json:"at,omitzero"` // when it was confirmed or had expired
	Sessions int       `json:"sessions"`    // live sessions that it cut
	// Level says what the node's fence stops: 1 its process, 2 its kernel, 3 the
	// target's side too; 0 is not known.
	Level int `json:"level,omitempty"`
	// Violations are writes during which the node's lease ended: at level 1
	// they may have passed after it. Bytes is their size together.
	Violations uint64 `json:"violations,omitempty"`
	Bytes      uint64 `json:"bytes,omitempty"`
	// LeaseEnds is when an unconfirmed node certainly stops; zero with NoBound.
	LeaseEnds time.Time `json:"lease_ends,omitzero"`
	// NoBound says that sessions of best_effort rules may run on there for as
	// long as the node hears nothing.
	NoBound bool   `json:"no_bound,omitempty"`
	Detail  string `json:"detail,omitempty"`
}

// Package event is what can happen to a cluster, as stored for ever. It
// imports nothing of ours. Stored events never change: a new meaning is a new
// version of a type, read through an upcaster.
package event

import "time"

// ID is an idempotency id: the same ID appended twice is one event.
type ID [16]byte

// ActorKind says who caused an event.
type ActorKind string

const (
	Human   ActorKind = "human"
	Service ActorKind = "service"
	Node    ActorKind = "node"
)

// Actor is who caused an event and how we know.
type Actor struct {
	Principal string    // subject id, or node name
	Kind      ActorKind //
	Authn     string    // "oidc", "certificate", "node"
	CertFP    string    // SHA-256 of the certificate, hex, when Authn is certificate or node
	Source    string    // address the request came from
	Via       string    // node that took the request
}

// Any as Proposal.Expect accepts whatever version the aggregate has.
const Any = ^uint64(0)

// Proposal is an event decided and not yet stored.
type Proposal struct {
	ID        ID
	Actor     Actor
	Type      string // "config.applied"
	Version   uint32 // of the type's payload
	Aggregate string // what it happens to: "config", "approval/ID", "node/NAME"
	Expect    uint64 // the aggregate's version before it: 0 means it must not exist; Any does not check
	Payload   []byte // JSON of the payload type; stored and hashed verbatim
	Cause     ID     // the event that led to this one, zero for none
}

// Event is a stored Proposal.
type Event struct {
	Proposal
	Seq              uint64 // 1, 2, 3 … without gaps
	Index            uint64 // Raft log index; events appended together share it
	Sub              uint32 // position among those
	Term             uint64
	Time             time.Time // assigned by the leader; strictly increasing with Seq
	AggregateVersion uint64    // the aggregate's version after it
	Chain            [32]byte  // hash chain over all events up to this one
}

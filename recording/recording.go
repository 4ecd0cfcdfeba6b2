// Package recording writes what happened in a session so that nobody can
// change it unseen: every command with its decision before it is forwarded,
// every response as it left, the outcome and the timing.
//
// A Writer appends entries to a local spool; when Append returns, the entry is
// in the kernel's hands and survives the death of the process. The spool's
// segments are chained by hash, signed by the node's key and copied, while the
// session runs, to a store (a directory or an S3 bucket) as objects written
// once. Reading and verifying need that store and public keys only.
package recording

import "time"

// LSN is a position in one recording: entries are numbered from 1.
type LSN uint64

// Header says who, to where, decided by which policy. It is the first object
// of a recording and never changes.
type Header struct {
	Session     string            `json:"session"` // also names the recording
	Kind        string            `json:"kind"`    // "session", or "node" for a node's own log of refused logins and API calls
	Node        string            `json:"node"`
	Cluster     string            `json:"cluster"`
	Started     time.Time         `json:"started"`
	Subject     string            `json:"subject,omitempty"` // policy.Subject.ID
	SubjectKind string            `json:"subject_kind,omitempty"`
	Issuer      string            `json:"issuer,omitempty"`
	Groups      []string          `json:"groups,omitempty"`
	Claims      map[string]any    `json:"claims,omitempty"` // repository, ref, commit (sha), pull request, run, actor …
	TokenID     string            `json:"token_id,omitempty"`
	Client      string            `json:"client,omitempty"` // address of the caller
	Protocol    string            `json:"protocol,omitempty"`
	Target      string            `json:"target,omitempty"`
	Profile     string            `json:"profile,omitempty"`
	Database    string            `json:"database,omitempty"`
	PolicyIndex uint64            `json:"policy_index"`
	Protection  string            `json:"protection,omitempty"` // which masking mode protects it: "gateway"
	Labels      map[string]string `json:"labels,omitempty"`

	// The rest is set by the spool at Begin: the node's own chain of
	// recordings, by which a recording that was deleted shows as a gap.
	Chain       string `json:"chain"`                  // names the chain: random, made with the spool
	NodeSeq     uint64 `json:"node_seq"`               // place in the chain, from 1
	Prev        string `json:"prev,omitempty"`         // SHA-256, hex, of the header object before; "" for the first
	PrevSession string `json:"prev_session,omitempty"` // its session
}

// EntryType says what an Entry tells.
type EntryType uint8

const (
	Command  EntryType = iota + 1 // Text: the exact bytes asked; Detail: parameters and the like
	Decided                       // the decision on Op: Effect, Rule, Reason, PolicyIndex
	Approval                      // a step of an approval for Op: Effect is asked, granted, denied, expired, cancelled or used
	Response                      // Data: bytes as they left for the client, masked
	Outcome                       // how Op ended: Effect is ok or error, Rows, Reason
	Cut                           // the session was cut: Rule names the revocation, Reason says why
	Note                          // anything else worth a line: Reason
)

// Entry is one line of a recording. Append copies what it needs; the caller
// may reuse the Entry and its slices.
type Entry struct {
	LSN         LSN       // set by Append
	At          time.Time // set by Append when zero
	Type        EntryType
	Op          uint64 // which operation of the session, from 1; 0 for none
	Verb        string // the protocol's name for what was sent: Query, Parse, Bind, Execute
	Effect      string // permit, refuse, hold; for other types as stated at the type
	Rule        string
	Reason      string
	PolicyIndex uint64
	Actions     []string          // "postgres:select shop.public.users", one per pair
	Approval    string            // id of the approval request
	Actor       string            // who approved or denied
	Detail      map[string]string // small, protocol-specific
	Text        []byte
	Data        []byte
	Rows        uint64
	Duration    time.Duration
}

// Ending closes a recording.
type Ending struct {
	At     time.Time `json:"at"`
	Reason string    `json:"reason"` // closed, revoked, error, shutdown, crash
	Detail string    `json:"detail,omitempty"`
}

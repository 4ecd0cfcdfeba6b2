package check

import (
	"fmt"
	"slices"
	"time"
)

// Fenced is one node's part of a revocation's answer.
type Fenced struct {
	Node  string `json:"node"`
	State string `json:"state"` // Confirmed, ByExpiry or Unconfirmed
	Level int    `json:"level"` // of the node's fence; 0 when not told
	// Ends is when the node's lease certainly ends or ended, where told.
	Ends time.Time `json:"ends,omitzero"`
}

// States of Fenced.
const (
	Confirmed   = "confirmed"
	ByExpiry    = "fenced by expiry"
	Unconfirmed = "unconfirmed"
)

// Late is what left a node for a subject after its revocation had returned.
type Late struct {
	Node  string    `json:"node"`
	Leg   string    `json:"leg"` // "client" or "target"
	Bytes int       `json:"bytes"`
	Last  time.Time `json:"last"`
}

// Revocation is one call of revoke, and what was seen of its subject.
type Revocation struct {
	Subject  string    `json:"subject"`
	Called   time.Time `json:"called"`
	Returned time.Time `json:"returned"` // with an answer
	Nodes    []Fenced  `json:"nodes"`
	Late     []Late    `json:"late,omitempty"`
	// Stopped are the nodes whose processes the nemesis did not let run, at any
	// time between Called and the end of Late.
	Stopped []string `json:"stopped,omitempty"`
	// Silent are those that could hear and say nothing all the time from
	// before Called to after Returned.
	Silent []string `json:"silent,omitempty"`
}

// Complete reports whether the answer said that the revocation is complete.
func (r *Revocation) Complete() bool {
	return len(r.Nodes) > 0 && !slices.ContainsFunc(r.Nodes, func(f Fenced) bool { return f.State == Unconfirmed })
}

// FenceReport counts what level 1 allows.
type FenceReport struct {
	Complete, Incomplete int
	ByExpiry             int // nodes fenced by expiry
	AllowedFlows         int // of stopped nodes at level 1, with bytes after the return
	AllowedBytes         int
	MostBytes            int            // of one such flow
	Levels               map[string]int // what each node said of itself
}

// Fence holds revocations against the promise: after a complete return nothing
// of the subject leaves any node (I1, I2, I3). The one exception is counted: a
// node at level 1 that was stopped, which may let out what had passed its check
// and what its kernel held. A node that could not speak cannot have confirmed
// (I21).
func Fence(revocations []Revocation) (FenceReport, error) {
	rep := FenceReport{Levels: map[string]int{}}
	var wrong []string
	for _, r := range revocations {
		for _, f := range r.Nodes {
			rep.Levels[f.Node] = max(rep.Levels[f.Node], f.Level)
			if f.State == ByExpiry {
				rep.ByExpiry++
			}
			if f.State == Confirmed && slices.Contains(r.Silent, f.Node) {
				wrong = append(wrong, fmt.Sprintf("%s: %s confirmed, and could neither hear nor speak from before the call to after the return", r.Subject, f.Node))
			}
		}
		if !r.Complete() {
			rep.Incomplete++
			continue
		}
		rep.Complete++
		for _, l := range r.Late {
			i := slices.IndexFunc(r.Nodes, func(f Fenced) bool { return f.Node == l.Node })
			if i < 0 {
				wrong = append(wrong, fmt.Sprintf("%s: %s, which the answer does not name, sent %d bytes to the %s until %v after it", r.Subject, l.Node, l.Bytes, l.Leg, l.Last.Sub(r.Returned)))
				continue
			}
			if f := r.Nodes[i]; f.State == ByExpiry && f.Level < 2 && slices.Contains(r.Stopped, l.Node) {
				rep.AllowedFlows++
				rep.AllowedBytes += l.Bytes
				rep.MostBytes = max(rep.MostBytes, l.Bytes)
				continue
			}
			wrong = append(wrong, fmt.Sprintf("%s: %s (%s, level %d) sent %d bytes to the %s after the return, the last %v after it",
				r.Subject, l.Node, r.Nodes[i].State, r.Nodes[i].Level, l.Bytes, l.Leg, l.Last.Sub(r.Returned)))
		}
	}
	return rep, failed("after revoke returned complete nothing of the subject leaves a node (I1, I2, I3, I21)", wrong)
}

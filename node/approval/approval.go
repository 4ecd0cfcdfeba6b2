// Package approval holds operations until people have decided about them. It
// asks through the event log, waits on the projection, and when the votes are
// there checks each approver's own credential again before it releases: what
// another node or the leader says about them is not enough.
package approval

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/raftstore/event"
)

// MaxText bounds what an approval request may hold of a statement. A longer
// one cannot be shown whole to an approver, so it cannot be approved.
const MaxText = 64 << 10

// Env is what the service needs of the node.
type Env struct {
	Node  string
	State *state.Projection
	// Propose brings an approval event of this node to the leader. token is
	// the requester's own credential, "" for an ending.
	Propose func(ctx context.Context, typ string, id event.ID, payload any, token string) (seq uint64, err error)
	// Seal encrypts to the cluster's vault; name binds the secret to its place.
	Seal func(name string, plain []byte) (event.Sealed, error)
	// VerifyVote returns who cast the vote, from the proof sealed in it alone.
	VerifyVote func(ctx context.Context, a *state.Approval, v state.Vote) (*policy.Subject, error)
	Decide     func(req *policy.Request) (policy.Decision, uint64)
	Now        func() time.Time
	Log        *slog.Logger
}

// Service asks for approvals and waits for them.
type Service struct{ env Env }

// New returns a Service.
func New(env Env) *Service { return &Service{env} }

// SealName is the name that the text of request id is sealed under.
func SealName(id string) string { return "approval/" + id + "/text" }

// ProofName is the name that approver's proof for request id is sealed under.
func ProofName(id, approver string) string { return "approval/" + id + "/proof/" + approver }

// Ask commits a request for h, asked with the requester's own token.
func (s *Service) Ask(ctx context.Context, h *protocols.Hold, token string) (protocols.Ticket, error) {
	if len(h.Text) > MaxText {
		return nil, &protocols.Refusal{Rule: "limits", Reason: fmt.Sprintf("the operation needs approval and has %d bytes; at most %d can be shown to an approver: send it in smaller parts", len(h.Text), MaxText), Code: "54000"}
	}
	eid := event.NewID()
	id := hex.EncodeToString(eid[:5])
	text, err := s.env.Seal(SealName(id), h.Text)
	if err != nil {
		return nil, err
	}
	expires := h.Approval.Expires
	ask := event.ApprovalAsked{
		ID: id, Session: h.Access.SessionID, Node: s.env.Node,
		Subject: h.Access.Subject.ID(), Issuer: h.Access.Subject.Issuer, Name: h.Access.Subject.Name, Persons: h.Access.Subject.Persons, Claims: h.Access.Subject.Claims,
		Target: h.Access.Target, Database: h.Access.Database,
		Digest: h.Digest[:], Text: text, Detail: h.Detail,
		Rules: h.Approval.Rules, Groups: h.Approval.Groups, Count: max(1, h.Approval.Count),
		Expires: s.env.Now().Add(expires).UTC(), Index: h.Index,
	}
	seq, err := s.env.Propose(ctx, event.TypeApprovalAsked, eid, ask, token)
	if err != nil {
		return nil, fmt.Errorf("asking for approval: %w", err)
	}
	return &ticket{s: s, id: id, seq: seq, expires: ask.Expires}, nil
}

// Eligible says why approver may not decide about a, or nil.
func (s *Service) Eligible(a *state.Approval, approver *policy.Subject) *protocols.Refusal {
	no := func(rule, format string, args ...any) *protocols.Refusal {
		return &protocols.Refusal{Rule: rule, Reason: fmt.Sprintf(format, args...)}
	}
	if approver.ID() == a.Subject || (a.Issuer != "" && approver.Issuer == a.Issuer && approver.Name == a.Name) {
		return no("four-eyes", "%s asked for this itself: someone else must approve it", a.Subject)
	}
	for _, name := range names(approver) {
		if slices.ContainsFunc(a.Persons, func(p string) bool { return strings.EqualFold(p, name) }) {
			return no("four-eyes", "%q is named in the requester's claims: someone else must approve it", name)
		}
	}
	for _, g := range a.Groups {
		if !slices.Contains(approver.Groups, g) {
			return no("approver-group", "rule %s wants an approver in group %q, which %s is not in", strings.Join(a.Rules, ", "), g, approver.ID())
		}
	}
	if b := state.BearerOf(approver).At(s.env.Node, a.Target); s.env.State.View().Refuses(&b) != nil {
		return no("revoked", "%s", s.env.State.View().Refuses(&b).Why())
	}
	d, _ := s.env.Decide(&policy.Request{
		Subject: approver,
		Pairs:   []policy.Pair{{Action: policy.Approve, Resource: policy.Resource{Type: policy.Target, Path: []string{a.Target}}}},
		Context: policy.Context{Now: s.env.Now(), Protocol: "api", Database: a.Database},
	})
	if d.Effect != policy.Permit {
		return no(d.Rule, "%s", d.Reason)
	}
	return nil
}

// names are all names by which a subject may appear in another's claims.
func names(s *policy.Subject) []string {
	all := append([]string{s.Name, s.ID()}, s.Persons...)
	for _, c := range []string{"email", "preferred_username", "login", "nickname", "name", "upn", "username"} {
		if v, ok := s.Claims[c].(string); ok && v != "" {
			all = append(all, v)
		}
	}
	return all
}

// ticket is a committed request. It implements protocols.Ticket.
type ticket struct {
	s       *Service
	id      string
	seq     uint64
	expires time.Time
}

// ID is what people use to name the request.
func (t *ticket) ID() string { return t.id }

// HowTo tells how to approve.
func (t *ticket) HowTo() string {
	return fmt.Sprintf("an approver decides with: sallyport approvals show %s, then sallyport approvals approve %s (expires %s)",
		t.id, t.id, t.expires.Format(time.RFC3339))
}

// retryVotes is how soon a vote that could not be checked is checked again.
const retryVotes = 2 * time.Second

// Wait returns the approvers once enough of them have been verified.
func (t *ticket) Wait(ctx context.Context) ([]string, error) {
	expiry := time.NewTimer(time.Until(t.expires))
	defer expiry.Stop()
	vs := &votes{verified: map[string]*policy.Subject{}, logged: map[string]bool{}}
	for {
		var retry <-chan time.Time
		changed := t.s.env.State.Changed()
		v := t.s.env.State.View()
		a := v.Approvals.Get(t.id)
		now := t.s.env.Now()
		switch {
		case a == nil && v.Seq >= t.seq:
			return nil, errors.New("the approval request is gone from the state")
		case a == nil: // this node has not folded it yet
		case a.State(now) == "denied":
			return nil, denial(a)
		case a.State(now) == "expired":
			_ = t.end(context.WithoutCancel(ctx), "expired", "nobody decided in time")
			return nil, &protocols.Refusal{Rule: rules(a), Reason: fmt.Sprintf("approval request %s expired undecided; send the operation again to ask again", t.id), Code: "57014"}
		case a.Ended != nil:
			return nil, &protocols.Refusal{Rule: rules(a), Reason: fmt.Sprintf("approval request %s is already %s", t.id, a.Ended.How), Code: "57014"}
		default:
			approvers, again := t.s.count(ctx, a, vs)
			if len(approvers) >= a.Count {
				return approvers, nil
			}
			if again {
				retry = time.After(retryVotes)
			}
		}
		select {
		case <-changed:
		case <-retry:
		case <-expiry.C:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func rules(a *state.Approval) string { return strings.Join(a.Rules, ", ") }

func denial(a *state.Approval) *protocols.Refusal {
	for _, v := range a.Votes {
		if !v.Approve {
			r := fmt.Sprintf("approval request %s was denied by %s", a.ID, v.Approver)
			if v.Comment != "" {
				r += ": " + v.Comment
			}
			return &protocols.Refusal{Rule: rules(a), Reason: r, Code: "42501"}
		}
	}
	return nil
}

// votes are what one wait has found out about the votes of its request.
type votes struct {
	verified map[string]*policy.Subject // who really cast it, by approver
	logged   map[string]bool
}

// count returns the approvers whose votes stand up: the proof is theirs, for
// exactly this, and policy lets them approve now. One person under two names
// is one approver. again says that a vote could not be checked and may be
// later: an issuer may be out of reach.
func (s *Service) count(ctx context.Context, a *state.Approval, vs *votes) (approvers []string, again bool) {
	var counted []*policy.Subject
	for _, v := range a.Votes {
		who := vs.verified[v.Approver]
		var err error
		if who == nil {
			if who, err = s.verifyVote(ctx, a, v); err == nil {
				vs.verified[v.Approver] = who
			} else {
				again = true
			}
		}
		if err == nil {
			if r := s.Eligible(a, who); r != nil { // each time: it may have changed
				err = r
			} else if slices.ContainsFunc(counted, func(o *policy.Subject) bool { return samePerson(o, who) }) {
				err = errors.New("the same person has approved under another name")
			}
		}
		if err != nil {
			if !vs.logged[v.Approver] {
				vs.logged[v.Approver] = true
				s.env.Log.Error("a vote does not stand up and is not counted", "approval", a.ID, "approver", v.Approver, "err", err)
			}
			continue
		}
		counted = append(counted, who)
		approvers = append(approvers, v.Approver)
	}
	return approvers, again
}

func (s *Service) verifyVote(ctx context.Context, a *state.Approval, v state.Vote) (*policy.Subject, error) {
	vctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	who, err := s.env.VerifyVote(vctx, a, v)
	switch {
	case err != nil:
		return nil, err
	case who.ID() != v.Approver:
		return nil, fmt.Errorf("the proof is of %s", who.ID())
	case !slices.Equal(v.Digest, a.Digest):
		return nil, errors.New("the vote is for something else")
	}
	return who, nil
}

// samePerson says whether two subjects may be one person under two providers:
// the same subject of one issuer, or a name in common.
func samePerson(a, b *policy.Subject) bool {
	if a.ID() == b.ID() || (a.Issuer != "" && a.Issuer == b.Issuer && a.Name == b.Name) {
		return true
	}
	others := names(b)
	return slices.ContainsFunc(names(a), func(n string) bool {
		return slices.ContainsFunc(others, func(o string) bool { return strings.EqualFold(n, o) })
	})
}

// Use consumes the approval: the event log accepts it once.
func (t *ticket) Use(ctx context.Context) error { return t.end(ctx, "used", "") }

// Cancel withdraws the request.
func (t *ticket) Cancel(ctx context.Context, reason string) error {
	return t.end(ctx, "cancelled", reason)
}

func (t *ticket) end(ctx context.Context, how, reason string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, err := t.s.env.Propose(ctx, event.TypeApprovalEnded, event.NewID(), event.ApprovalEnded{ID: t.id, How: how, Reason: reason}, "")
	return err
}

// CheckAsked is the leader's look at a request before it is proposed: whatever
// the asking node says, it must be about a subject whose token it holds.
func CheckAsked(p *event.ApprovalAsked, node string, subject *policy.Subject, now time.Time) error {
	switch {
	case p.Node != node:
		return fmt.Errorf("node %s asks in the name of node %s", node, p.Node)
	case p.Subject != subject.ID():
		return fmt.Errorf("the token is of %s, the request of %s", subject.ID(), p.Subject)
	case !sameSet(p.Persons, subject.Persons):
		return errors.New("the persons named differ from those in the token")
	case len(p.Digest) != 32 || p.ID == "" || len(p.ID) > 64 || p.Count < 1 || p.Count > 16 || len(p.Rules) == 0:
		return errors.New("the request is not well formed")
	case p.Expires.After(now.Add(MaxWait + time.Minute)):
		return fmt.Errorf("the request would wait longer than %v", MaxWait)
	case len(p.Text) > 2*MaxText:
		return errors.New("the text is too long")
	}
	return nil
}

// MaxWait is the longest that a request may wait.
const MaxWait = 24 * time.Hour

func sameSet(a, b []string) bool {
	a, b = slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))
	return slices.Equal(a, b)
}

// CheckEnded is the leader's look at an ending before it is proposed.
func CheckEnded(p *event.ApprovalEnded, a *state.Approval, node string, now time.Time) error {
	if a == nil {
		return errors.New("there is no such approval request")
	}
	if a.Node != node {
		return fmt.Errorf("the request is of node %s", a.Node)
	}
	st := a.State(now)
	switch p.How {
	case "used":
		if st != "approved" {
			return fmt.Errorf("the request is %s", st)
		}
	case "expired", "cancelled":
		if a.Ended != nil {
			return fmt.Errorf("the request is already %s", a.Ended.How)
		}
	default:
		return fmt.Errorf("%q is no way to end a request", p.How)
	}
	return nil
}

// Decode reads an event's payload.
func Decode[T any](payload []byte) (*T, error) {
	p := new(T)
	return p, json.Unmarshal(payload, p)
}

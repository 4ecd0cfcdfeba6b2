package approval

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/raftstore/event"
)

// log is an event log of one projection, as the cluster would keep it.
type eventLog struct {
	t   *testing.T
	mu  sync.Mutex
	st  *state.Projection
	seq uint64
	ver map[string]uint64
}

func (l *eventLog) append(typ, aggregate string, payload any) uint64 {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	data, err := json.Marshal(payload)
	if err != nil {
		l.t.Fatal(err)
	}
	l.seq++
	l.ver[aggregate]++
	err = l.st.Fold([]event.Event{{
		Proposal: event.Proposal{Type: typ, Version: 1, Aggregate: aggregate, Payload: data},
		Seq:      l.seq, Index: l.seq, Time: time.Now(), AggregateVersion: l.ver[aggregate],
	}})
	if err != nil {
		l.t.Error(err)
	}
	return l.seq
}

type rig struct {
	*Service
	log      *eventLog
	proposed chan event.ApprovalAsked
	voters   map[string]*policy.Subject // whom a proof is really of
	permit   func(*policy.Subject) bool
}

func newRig(t *testing.T) *rig {
	st := state.New(slog.New(slog.DiscardHandler))
	r := &rig{log: &eventLog{t: t, st: st, ver: map[string]uint64{}}, proposed: make(chan event.ApprovalAsked, 1),
		voters: map[string]*policy.Subject{}, permit: func(*policy.Subject) bool { return true }}
	r.Service = New(Env{
		Node: "n1", State: st, Now: time.Now, Log: slog.New(slog.DiscardHandler),
		Propose: func(_ context.Context, typ string, _ event.ID, payload any, _ string) (uint64, error) {
			switch p := payload.(type) {
			case event.ApprovalAsked:
				seq := r.log.append(typ, "approval/"+p.ID, p)
				r.proposed <- p
				return seq, nil
			case event.ApprovalEnded:
				if err := CheckEnded(&p, st.View().Approvals.Get(p.ID), "n1", time.Now()); err != nil {
					return 0, err
				}
				return r.log.append(typ, "approval/"+p.ID, p), nil
			}
			return 0, errors.New("unexpected proposal")
		},
		Seal: func(_ string, plain []byte) (event.Sealed, error) { return plain, nil },
		VerifyVote: func(_ context.Context, _ *state.Approval, v state.Vote) (*policy.Subject, error) {
			if s := r.voters[v.Approver]; s != nil {
				return s, nil
			}
			return nil, errors.New("the proof does not verify")
		},
		Decide: func(req *policy.Request) (policy.Decision, uint64) {
			if r.permit(req.Subject) {
				return policy.Decision{Effect: policy.Permit}, 0
			}
			return policy.Decision{Rule: "default-deny", Reason: "no rule permits approve"}, 0
		},
	})
	return r
}

func job() *policy.Subject {
	return &policy.Subject{Kind: policy.Workload, Provider: "ci", Name: "repo:acme/shop", Persons: []string{"dana@acme.example"}}
}

func person(name string, groups ...string) *policy.Subject {
	return &policy.Subject{Kind: policy.User, Provider: "sso", Name: name, Groups: groups, Claims: map[string]any{"email": name + "@acme.example"}}
}

func (r *rig) ask(t *testing.T, a policy.Approval) (protocols.Ticket, event.ApprovalAsked) {
	t.Helper()
	h := &protocols.Hold{Access: &protocols.Access{SessionID: "s", Subject: job(), Target: "prod-db", Database: "shop"}, Approval: &a, Digest: [32]byte{7}, Text: []byte("DROP TABLE x")}
	tk, err := r.Ask(t.Context(), h, "token")
	if err != nil {
		t.Fatal(err)
	}
	return tk, <-r.proposed
}

func (r *rig) vote(a event.ApprovalAsked, who *policy.Subject, approve bool, digest []byte) {
	r.log.append(event.TypeApprovalVoted, "approval/"+a.ID, event.ApprovalVoted{ID: a.ID, Approver: who.ID(), Approve: approve, Digest: digest, Comment: "because"})
}

func TestEligible(t *testing.T) {
	r := newRig(t)
	a := &state.Approval{ApprovalAsked: event.ApprovalAsked{Subject: "ci/repo:acme/shop", Issuer: "https://ci", Name: "repo:acme/shop", Persons: []string{"Dana@acme.example", "kim"}, Groups: []string{"dba"}, Target: "prod-db"}}
	self := job()
	self.Groups = []string{"dba"}
	for _, c := range []struct {
		name string
		who  *policy.Subject
		rule string // "" for eligible
	}{
		{"another person", person("robin", "dba"), ""},
		{"the requester", self, "four-eyes"},
		{"a person in its claims, by e-mail, in other letters", person("dana", "dba"), "four-eyes"},
		{"a person in its claims, by name", person("kim", "dba"), "four-eyes"},
		{"the requester's own token under another provider", &policy.Subject{Provider: "ci-admin", Issuer: "https://ci", Name: "repo:acme/shop", Groups: []string{"dba"}}, "four-eyes"},
		{"not in the group", person("robin", "ops"), "approver-group"},
	} {
		got := ""
		if refusal := r.Eligible(a, c.who); refusal != nil {
			got = refusal.Rule
		}
		if got != c.rule {
			t.Errorf("%s: %q, want %q", c.name, got, c.rule)
		}
	}
	r.permit = func(*policy.Subject) bool { return false }
	if refusal := r.Eligible(a, person("robin", "dba")); refusal == nil || refusal.Rule != "default-deny" {
		t.Errorf("without `approve` on the target: %v", refusal)
	}
	r.permit = func(*policy.Subject) bool { return true }
	r.log.append(event.TypeRevoked, "revocation/a", event.Revoked{ID: "a", Subject: "sso/robin"})
	if refusal := r.Eligible(a, person("robin", "dba")); refusal == nil || refusal.Rule != "revoked" {
		t.Errorf("a revoked approver: %v", refusal)
	}
}

func TestApprovedOnce(t *testing.T) {
	r := newRig(t)
	tk, a := r.ask(t, policy.Approval{Rules: []string{"r"}, Groups: []string{"dba"}, Count: 2, Expires: time.Minute})
	robin, kim := person("robin", "dba"), person("kim", "dba")
	r.voters["sso/robin"], r.voters["sso/kim"] = robin, kim
	go func() {
		r.vote(a, robin, true, a.Digest)
		r.vote(a, kim, true, a.Digest)
	}()
	approvers, err := tk.Wait(t.Context())
	if err != nil || len(approvers) != 2 {
		t.Fatalf("approvers %v, %v", approvers, err)
	}
	if err := tk.Use(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := tk.Use(t.Context()); err == nil {
		t.Fatal("one approval was used twice")
	}
}

// What the log says of a vote is not enough: each of these counts for nothing.
func TestVotesThatDoNotStandUp(t *testing.T) {
	for name, cast := range map[string]func(r *rig, a event.ApprovalAsked){
		"no valid proof": func(r *rig, a event.ApprovalAsked) { r.vote(a, person("robin", "dba"), true, a.Digest) },
		"the proof is of another": func(r *rig, a event.ApprovalAsked) {
			r.voters["sso/robin"] = person("mallory", "dba")
			r.vote(a, person("robin", "dba"), true, a.Digest)
		},
		"for something else": func(r *rig, a event.ApprovalAsked) {
			r.voters["sso/robin"] = person("robin", "dba")
			r.vote(a, person("robin", "dba"), true, make([]byte, 32))
		},
		"a person in the claims": func(r *rig, a event.ApprovalAsked) {
			r.voters["sso/dana"] = person("dana", "dba")
			r.vote(a, person("dana", "dba"), true, a.Digest)
		},
		"not in the group any more": func(r *rig, a event.ApprovalAsked) {
			r.voters["sso/robin"] = person("robin")
			r.vote(a, person("robin"), true, a.Digest)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			tk, a := r.ask(t, policy.Approval{Rules: []string{"r"}, Groups: []string{"dba"}, Count: 1, Expires: time.Minute})
			cast(r, a)
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if approvers, err := tk.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("released by %v, %v", approvers, err)
			}
		})
	}
}

// One person with two logins is one approver, and an approver who was revoked
// between the votes is none.
func TestTwoVotesOfOnePerson(t *testing.T) {
	r := newRig(t)
	tk, a := r.ask(t, policy.Approval{Rules: []string{"r"}, Groups: []string{"dba"}, Count: 2, Expires: time.Minute})
	robin, again, kim := person("robin", "dba"), person("robin", "dba"), person("kim", "dba")
	again.Provider = "corp"
	for _, s := range []*policy.Subject{robin, again, kim} {
		r.voters[s.ID()] = s
	}
	waits := func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if approvers, err := tk.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("released by %v, %v", approvers, err)
		}
	}
	r.vote(a, robin, true, a.Digest)
	r.vote(a, again, true, a.Digest)
	waits()
	r.log.append(event.TypeRevoked, "revocation/a", event.Revoked{ID: "a", Subject: robin.ID()})
	r.log.append(event.TypeRevoked, "revocation/b", event.Revoked{ID: "b", Subject: again.ID()})
	r.vote(a, kim, true, a.Digest)
	waits()
}

// An issuer out of reach for a moment does not lose a vote.
func TestVoteIsCheckedAgain(t *testing.T) {
	r := newRig(t)
	tk, a := r.ask(t, policy.Approval{Rules: []string{"r"}, Groups: []string{"dba"}, Count: 1, Expires: time.Minute})
	var tries atomic.Int32
	verify := r.env.VerifyVote
	r.env.VerifyVote = func(ctx context.Context, a *state.Approval, v state.Vote) (*policy.Subject, error) {
		if tries.Add(1) == 1 {
			return nil, errors.New("the issuer does not answer")
		}
		return verify(ctx, a, v)
	}
	r.voters["sso/robin"] = person("robin", "dba")
	r.vote(a, person("robin", "dba"), true, a.Digest)
	if approvers, err := tk.Wait(t.Context()); err != nil || len(approvers) != 1 {
		t.Fatalf("%v, %v", approvers, err)
	}
}

func TestDeniedExpiredCancelled(t *testing.T) {
	r := newRig(t)
	tk, a := r.ask(t, policy.Approval{Rules: []string{"r"}, Expires: time.Minute})
	r.vote(a, person("robin"), false, a.Digest)
	var refusal *protocols.Refusal
	if _, err := tk.Wait(t.Context()); !errors.As(err, &refusal) || !strings.Contains(refusal.Reason, "because") || refusal.Rule != "r" {
		t.Fatalf("denied: %v", err)
	}

	tk, _ = r.ask(t, policy.Approval{Rules: []string{"r"}, Expires: 30 * time.Millisecond})
	if _, err := tk.Wait(t.Context()); !errors.As(err, &refusal) || !strings.Contains(refusal.Reason, "expired") {
		t.Fatalf("expired: %v", err)
	}
	if err := tk.Use(t.Context()); err == nil {
		t.Fatal("an expired request was used")
	}

	tk, a = r.ask(t, policy.Approval{Rules: []string{"r"}, Expires: time.Minute})
	if err := tk.Cancel(t.Context(), "client left"); err != nil {
		t.Fatal(err)
	}
	if got := r.log.st.View().Approvals.Get(a.ID).State(time.Now()); got != "cancelled" {
		t.Fatal(got)
	}
}

func TestTooLongToShow(t *testing.T) {
	r := newRig(t)
	h := &protocols.Hold{Access: &protocols.Access{Subject: job()}, Approval: &policy.Approval{}, Text: make([]byte, MaxText+1)}
	var refusal *protocols.Refusal
	if _, err := r.Ask(t.Context(), h, "token"); !errors.As(err, &refusal) || refusal.Rule != "limits" {
		t.Fatalf("a text that cannot be shown: %v", err)
	}
}

func TestCheckAsked(t *testing.T) {
	now := time.Now()
	good := func() *event.ApprovalAsked {
		return &event.ApprovalAsked{ID: "x", Node: "n1", Subject: job().ID(), Persons: job().Persons, Digest: make([]byte, 32), Count: 1, Rules: []string{"r"}, Expires: now.Add(time.Minute)}
	}
	if err := CheckAsked(good(), "n1", job(), now); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*event.ApprovalAsked){
		"another node":      func(p *event.ApprovalAsked) { p.Node = "n2" },
		"another subject":   func(p *event.ApprovalAsked) { p.Subject = "ci/other" },
		"persons left out":  func(p *event.ApprovalAsked) { p.Persons = nil },
		"no digest":         func(p *event.ApprovalAsked) { p.Digest = nil },
		"no approver":       func(p *event.ApprovalAsked) { p.Count = 0 },
		"waits for a month": func(p *event.ApprovalAsked) { p.Expires = now.Add(30 * 24 * time.Hour) },
	} {
		p := good()
		spoil(p)
		if CheckAsked(p, "n1", job(), now) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

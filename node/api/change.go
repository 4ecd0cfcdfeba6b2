package api

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport/sallyport/node/approval"
	"github.com/sallyport/sallyport/node/bundle"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/node/tunnel"
	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
)

// SecretName is the name that a configuration's secret is sealed under.
func SecretName(name string) string { return "config/" + name }

func (s *Server) config(_ http.ResponseWriter, _ *request) (any, error) {
	v := s.State.View()
	d := ConfigDownload{Index: v.ConfigIndex, SecretNames: slices.Sorted(maps.Keys(v.Secrets))}
	if v.Config != nil {
		d.Digest, d.Files = v.Config.Digest, v.Config.Files
	}
	return d, nil
}

// apply replaces the configuration by one event, or shows what it would change.
func (s *Server) apply(w http.ResponseWriter, r *request) (any, error) {
	var in ConfigUpload
	if err := r.decode(&in); err != nil {
		return nil, err
	}
	if ev, done := s.done(r, event.TypeConfigApplied); done && !in.DryRun {
		return ConfigResult{Index: ev.Index, Applied: true}, nil
	}
	v := s.State.View()
	names := map[string]bool{}
	for n := range v.Secrets {
		names[n] = true
	}
	for n := range in.Secrets {
		names[n] = true
	}
	b, problems := bundle.Parse(in.Files, slices.Sorted(maps.Keys(names)), bundle.ParseOptions{Dev: s.Dev})
	if len(problems) > 0 {
		p := &Problem{Code: "invalid", Error: fmt.Sprintf("nothing was changed: the configuration has %d problem(s)", len(problems)), Status: http.StatusUnprocessableEntity}
		for _, pr := range problems {
			p.Lines = append(p.Lines, pr.String())
		}
		return nil, &Failure{p}
	}
	if err := s.checkRevocations(v, b); err != nil {
		return nil, err
	}
	if _, taken := b.Providers[policy.BootstrapProvider]; taken {
		return nil, invalid("no identity provider may be named %q", policy.BootstrapProvider)
	}
	secrets, to, kept, err := s.sealSecrets(b, in.Secrets, v)
	if err != nil {
		return nil, err
	}
	res := ConfigResult{Index: v.ConfigIndex}
	for _, c := range bundle.Plan(v.Config, b) {
		res.Changes = append(res.Changes, c.String())
	}
	for _, n := range slices.Sorted(maps.Keys(secrets)) {
		switch _, had := v.Secrets[n]; {
		case !had:
			res.Changes = append(res.Changes, "+ secret "+n)
		case !kept[n]:
			res.Changes = append(res.Changes, "~ secret "+n+" (set again)")
		}
	}
	for _, n := range slices.Sorted(maps.Keys(v.Secrets)) {
		if _, has := secrets[n]; !has {
			res.Changes = append(res.Changes, "- secret "+n)
		}
	}
	if in.DryRun || len(res.Changes) == 0 {
		return res, nil
	}
	if in.Expect != v.ConfigIndex {
		return nil, &Failure{&Problem{Code: "conflict", Error: "the configuration was changed by someone else after the plan was made: plan again", Status: http.StatusConflict}}
	}
	var ev event.Event
	for try := 0; ; try++ {
		// The version is that of the view which is compared: the store itself may
		// be a change ahead of it, which must not be replaced unseen.
		now := s.State.View()
		if now.ConfigIndex != in.Expect {
			return nil, &Failure{&Problem{Code: "conflict", Error: "the configuration is being changed by someone else: plan again", Status: http.StatusConflict}}
		}
		ev, err = s.propose(w, r, event.TypeConfigApplied, "config", now.ConfigVersion,
			event.ConfigApplied{Files: b.Files, Secrets: secrets, SealedTo: to, Digest: b.Digest})
		var conflict *raftstore.ConflictError
		if err == nil {
			break
		}
		if !errors.As(err, &conflict) || try == 3 {
			return nil, err
		}
		s.awaitSeq(r.Context(), strconv.FormatUint(s.State.View().Seq+1, 10)) // its secrets were sealed anew meanwhile
	}
	res.Applied, res.Index = true, ev.Index
	return res, nil
}

// sealSecrets keeps, of the secrets given and stored, those the bundle wants.
func (s *Server) sealSecrets(b *bundle.Bundle, given map[string][]byte, v *state.View) (map[string]event.Sealed, map[string]event.Recipients, map[string]bool, error) {
	out, kept := map[string]event.Sealed{}, map[string]bool{}
	to := map[string]event.Recipients{}
	nodes := map[string][]string{}
	for _, t := range b.Targets {
		nodes[t.SecretName()] = t.Nodes
	}
	for _, n := range b.SecretNames() {
		if plain, ok := given[n]; ok {
			sealed, recipients, err := s.SealSecret(SecretName(n), plain, nodes[n])
			if err != nil {
				return nil, nil, nil, invalid("%v", err)
			}
			out[n] = sealed
			if recipients != nil {
				to[n] = recipients
			}
		} else if sealed, ok := v.Secrets[n]; ok {
			// If others may open it now, a node that can seals it anew.
			out[n], kept[n] = sealed, true
			if recipients, ok := v.SealedTo[n]; ok {
				to[n] = recipients
			}
		} else {
			return nil, nil, nil, invalid("the configuration needs the secret %s, which was neither given nor stored before", n)
		}
	}
	return out, to, kept, nil
}

func (s *Server) approvalInfo(a *state.Approval) ApprovalInfo {
	i := ApprovalInfo{
		ID: a.ID, State: a.State(s.Now()), Session: a.Session, Node: a.Node, Subject: a.Subject, Claims: a.Claims,
		Target: a.Target, Database: a.Database, Digest: hex.EncodeToString(a.Digest), Detail: a.Detail,
		Rules: a.Rules, Groups: a.Groups, Count: a.Count, Asked: a.Asked, Expires: a.Expires,
	}
	for _, v := range a.Votes {
		i.Votes = append(i.Votes, VoteInfo{v.Approver, v.Approve, v.Comment, v.At})
	}
	if a.Ended != nil {
		i.Ended = strings.TrimSuffix(a.Ended.How+": "+a.Ended.Reason, ": ")
	}
	return i
}

func (s *Server) listApprovals(_ http.ResponseWriter, r *request) (any, error) {
	want := r.URL.Query().Get("state")
	infos := []ApprovalInfo{}
	for a := range s.State.View().Approvals.Values() {
		if i := s.approvalInfo(a); want == "" || i.State == want {
			infos = append(infos, i)
		}
	}
	sort.Slice(infos, func(i, j int) bool { return infos[i].Asked.Before(infos[j].Asked) })
	return infos, nil
}

func (s *Server) approvalOf(r *request) (*state.Approval, error) {
	id := r.PathValue("id")
	a := s.State.View().Approvals.Get(id)
	if a == nil {
		return nil, notFound("there is no approval request %q; `sallyport approvals list` shows them", id)
	}
	return a, nil
}

func (s *Server) showApproval(w http.ResponseWriter, r *request) (any, error) {
	a, err := s.approvalOf(r)
	if err != nil {
		return nil, err
	}
	i := s.approvalInfo(a)
	text, err := s.Open(approval.SealName(a.ID), a.Text)
	if errors.Is(err, vault.ErrNotSealedToUs) && tunnel.Peer(r.Context()) == "" {
		s.toLeader(w, r.Request, r.body) // it is for voters and the node that asked
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the text of the request cannot be unsealed: %w", err)
	}
	i.Text = string(text)
	return i, nil
}

// vote takes an approver's decision. The digest in the query says what the
// approver has seen; it is part of what a certificate's signature covers.
func (s *Server) vote(approve bool) handler {
	return func(w http.ResponseWriter, r *request) (any, error) {
		var in VoteRequest
		if err := r.decode(&in); err != nil {
			return nil, err
		}
		if len(in.Comment) > 1000 {
			return nil, invalid("the comment is longer than 1000 bytes")
		}
		if ev, done := s.done(r, event.TypeApprovalVoted); done {
			return Committed{ev.Seq, ev.Index, ev.Time}, nil
		}
		a, err := s.approvalOf(r)
		if err != nil {
			return nil, err
		}
		digest, err := hex.DecodeString(r.URL.Query().Get("digest"))
		if err != nil || !slices.Equal(digest, a.Digest) {
			return nil, invalid("digest: this request is for something else than what was shown: look at it again with `sallyport approvals show %s`", a.ID)
		}
		if st := a.State(s.Now()); st != "pending" {
			return nil, &Failure{&Problem{Code: "conflict", Error: fmt.Sprintf("approval request %s is already %s", a.ID, st), Status: http.StatusConflict}}
		}
		if refusal := s.Approvals.Eligible(a, r.subject); refusal != nil {
			_ = s.audit(r.Request, policy.Approve, r.subject, "refuse", refusal.Rule, refusal.Reason)
			return nil, refusal
		}
		for _, v := range a.Votes {
			if v.Approver == r.subject.ID() {
				return nil, &Failure{&Problem{Code: "conflict", Error: "you have decided about this request already", Status: http.StatusConflict}}
			}
		}
		proof, err := s.Seal(approval.ProofName(a.ID, r.subject.ID()), r.proof, a.Node)
		if err != nil {
			return nil, err
		}
		ev, err := s.propose(w, r, event.TypeApprovalVoted, "approval/"+a.ID, a.Version,
			event.ApprovalVoted{ID: a.ID, Approver: r.subject.ID(), Approve: approve, Comment: in.Comment, Digest: digest, Proof: proof})
		if err != nil {
			return nil, err
		}
		return Committed{ev.Seq, ev.Index, ev.Time}, nil
	}
}

// meshPropose proposes an approval event for another node. The node's word is
// not enough for a request: the caller's own token is verified here again.
func (s *Server) meshPropose(w http.ResponseWriter, r *http.Request) {
	var in Proposal
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		fail(w, problem(invalid("%v", err)))
		return
	}
	c, err := s.ProposeFor(r.Context(), tunnel.Peer(r.Context()), &in)
	if err != nil {
		fail(w, problem(err))
		return
	}
	reply(w, c)
}

// ProposeFor is what the leader does with a node's proposal.
func (s *Server) ProposeFor(ctx context.Context, node string, in *Proposal) (*Committed, error) {
	var err error
	prop := event.Proposal{ID: in.ID, Type: in.Type, Version: 1, Payload: in.Payload}
	switch in.Type {
	case event.TypeApprovalAsked:
		p, err := approval.Decode[event.ApprovalAsked](in.Payload)
		if err != nil {
			return nil, invalid("%v", err)
		}
		subject, err := s.VerifyToken(ctx, in.Token)
		if err != nil {
			return nil, &Failure{&Problem{Code: "unauthenticated", Error: "the leader does not accept the requester's token: " + err.Error(), Status: http.StatusUnauthorized}}
		}
		b := state.BearerOf(subject).At(node, p.Target)
		b.Session = p.Session
		if rev := s.State.View().Refuses(&b); rev != nil {
			return nil, &Failure{&Problem{Code: "forbidden", Error: rev.Why(), Status: http.StatusForbidden}}
		}
		if err := approval.CheckAsked(p, node, subject, s.Now()); err != nil {
			return nil, invalid("%v", err)
		}
		if err := s.roomToAsk(p.Subject); err != nil {
			return nil, err
		}
		p.Issuer, p.Name = subject.Issuer, subject.Name
		p.Claims, p.Persons = subject.Claims, subject.Persons // the leader's own reading of the token
		if prop.Payload, err = json.Marshal(p); err != nil {
			return nil, err
		}
		prop.Aggregate, prop.Expect = "approval/"+p.ID, 0
		prop.Actor = event.Actor{Principal: p.Subject, Kind: event.Service, Authn: "oidc", Via: node}
	case event.TypeApprovalEnded:
		p, err := approval.Decode[event.ApprovalEnded](in.Payload)
		if err != nil {
			return nil, invalid("%v", err)
		}
		a := s.State.View().Approvals.Get(p.ID)
		if err := approval.CheckEnded(p, a, node, s.Now()); err != nil {
			return nil, &Failure{&Problem{Code: "conflict", Error: err.Error(), Status: http.StatusConflict}}
		}
		prop.Aggregate, prop.Expect = "approval/"+p.ID, a.Version
		prop.Actor = event.Actor{Principal: node, Kind: event.Node, Authn: "node", Via: node}
	case event.TypeSecretsSealed:
		var p SealedProposal
		if err := json.Unmarshal(in.Payload, &p); err != nil {
			return nil, invalid("%v", err)
		}
		v := s.State.View()
		if p.Expect != v.ConfigVersion {
			return nil, &Failure{&Problem{Code: "conflict", Error: "the configuration has changed meanwhile", Status: http.StatusConflict}}
		}
		if err := s.CheckSealed(v, node, &p.SecretsSealed); err != nil {
			return nil, &Failure{&Problem{Code: "forbidden", Error: err.Error(), Status: http.StatusForbidden}}
		}
		if prop.Payload, err = json.Marshal(p.SecretsSealed); err != nil {
			return nil, err
		}
		prop.Aggregate, prop.Expect = "config", p.Expect
		prop.Actor = event.Actor{Principal: node, Kind: event.Node, Authn: "node", Via: node}
	default:
		return nil, invalid("a node may not propose %q", in.Type)
	}
	ev, err := s.append(ctx, nil, prop)
	if err != nil {
		return nil, err
	}
	return &Committed{ev.Seq, ev.Index, ev.Time}, nil
}

// CheckSealed is the leader's look at secrets that a node has sealed anew. What
// is in them it may not be able to see; so only a node that could open a secret
// before may replace it, and only for those that may open it.
func (s *Server) CheckSealed(v *state.View, node string, p *event.SecretsSealed) error {
	if len(p.Keys) > 0 && node != s.Node {
		return errors.New("only the leader seals the cluster's own keys")
	}
	want := s.WantSealed(v)
	own := v.Nodes[node].Recipient
	for name, blob := range p.Secrets {
		switch before := v.SealedTo[name]; {
		case len(blob) == 0 || !slices.Equal(p.SealedTo[name], want[name]):
			return fmt.Errorf("secret %s is not sealed to exactly those that may open it", name)
		case node != s.Node && !slices.Contains(before, own):
			return fmt.Errorf("node %s could not open the secret %s, so it cannot seal it anew", node, name)
		}
	}
	return nil
}

// Limits on approval requests: each is an event of up to 128 KiB that every
// node keeps for ever, and a line in a list that a person must be able to read.
const (
	maxPending        = 1000
	maxPendingSubject = 20
	askWindow         = 10 * time.Minute
	maxAskedSubject   = 60 // in askWindow, whatever became of them
)

func (s *Server) roomToAsk(subject string) error {
	all, own, recent, now := 0, 0, 0, s.Now()
	for a := range s.State.View().Approvals.Values() {
		pending := a.State(now) == "pending"
		if pending {
			all++
		}
		if a.Subject == subject {
			if pending {
				own++
			}
			if now.Sub(a.Asked) < askWindow {
				recent++
			}
		}
	}
	full := func(format string, args ...any) error {
		return &Failure{&Problem{Code: "conflict", Status: http.StatusTooManyRequests, Error: fmt.Sprintf(format, args...)}}
	}
	switch {
	case own >= maxPendingSubject || all >= maxPending:
		return full("%d requests of %s and %d in all wait for approval already: wait until some are decided", own, subject, all)
	case recent >= maxAskedSubject:
		return full("%s has asked for approval %d times within %v: wait", subject, recent, askWindow)
	}
	return nil
}

// Propose brings a proposal of this node to the leader, wherever that is.
func (s *Server) Propose(ctx context.Context, in *Proposal) (*Committed, error) {
	for try := 0; ; try++ {
		var c *Committed
		var err error
		switch leader, _ := s.Store.Leader(); leader {
		case "":
			err = &Failure{&Problem{Code: "unavailable", Error: "the cluster has no leader: a majority of its voters must be running", Status: http.StatusServiceUnavailable}}
		case s.Node:
			c, err = s.ProposeFor(ctx, s.Node, in)
		default:
			c = &Committed{}
			lctx, done := s.whileLeads(ctx, leader)
			err = s.exchange(lctx, http.MethodPost, leader, "/mesh/v1/propose", in, c)
			done()
		}
		if err == nil {
			return c, nil
		}
		// A definite no ends it; anything else is tried again with the same
		// id, which makes it happen once.
		if p := problem(err); (p.Status >= 400 && p.Status < 500 && p.Status != http.StatusMisdirectedRequest) || try >= leaderTries {
			return nil, err
		}
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

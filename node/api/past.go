package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
)

// pastTimeout bounds one question about the past.
const pastTimeout = 30 * time.Second

// maxPast bounds the questions about the past that a node works on at a time:
// each may hold a whole state.
const maxPast = 4

// moment is a place in the cluster's past: after event seq.
type moment struct {
	seq uint64
	// now is the time that what depends on the time is judged at: of the event,
	// or what was asked for.
	now time.Time
}

// momentOf reads at: "" for now, a Raft index, or a time. The state at an index
// is that after the last event at or before it.
func (s *Server) momentOf(ctx context.Context, at string) (moment, error) {
	head, applied, _ := s.Store.Head()
	var m moment
	var err error
	switch index, bad := strconv.ParseUint(at, 10, 64); {
	case at == "":
		return moment{head, s.Now()}, nil
	case bad == nil:
		if index > applied {
			wait, cancel := context.WithTimeout(ctx, peerTimeout)
			defer cancel()
			if s.Store.WaitIndex(wait, index) != nil {
				_, applied, _ = s.Store.Head()
				return m, invalid("at: this node has applied the log up to index %d, not %d", applied, index)
			}
		}
		m.seq, err = s.Store.SeqAt(index)
	default:
		if m.now, bad = time.Parse(time.RFC3339, at); bad != nil {
			return m, invalid("at: %q is neither a Raft index, as `sallyport events list` shows it, nor a time such as 2026-01-31T10:03:00Z", at)
		}
		if m.now.After(s.Now()) {
			return m, invalid("at: %s has not come yet", at)
		}
		m.seq, err = s.Store.SeqAtTime(m.now)
	}
	if err == nil && m.seq > 0 && m.now.IsZero() {
		var e event.Event
		e, err = s.Store.Event(m.seq)
		m.now = e.Time
	}
	return m, err
}

// viewAt is the state as of a moment.
func (s *Server) viewAt(ctx context.Context, at string) (*state.View, moment, error) {
	m, err := s.momentOf(ctx, at)
	if err != nil {
		return nil, m, err
	}
	if v := s.State.View(); v.Seq == m.seq {
		return v, m, nil
	}
	select {
	case s.past <- struct{}{}:
		defer func() { <-s.past }()
	default:
		return nil, m, &Failure{&Problem{Code: "unavailable", Error: "this node is answering other questions about the past: try again", Status: http.StatusServiceUnavailable}}
	}
	ctx, cancel := context.WithTimeout(ctx, pastTimeout)
	defer cancel()
	v, err := state.At(ctx, s.Store, m.seq)
	if errors.Is(err, raftstore.ErrBuilding) {
		err = &Failure{&Problem{Code: "unavailable", Error: err.Error() + "; another node may have it", Status: http.StatusServiceUnavailable}}
	}
	return v, m, err
}

func (s *Server) showEvent(_ http.ResponseWriter, r *request) (any, error) {
	seq, err := strconv.ParseUint(r.PathValue("seq"), 10, 64)
	if err != nil || seq == 0 {
		return nil, invalid("%q is no number of an event", r.PathValue("seq"))
	}
	if head, _, _ := s.Store.Head(); seq > head {
		return nil, notFound("there is no event %d here; the newest is %d", seq, head)
	}
	e, err := s.Store.Event(seq)
	if err != nil {
		return nil, err
	}
	return eventInfo(e), nil
}

// stateAt answers what the cluster had agreed on.
func (s *Server) stateAt(_ http.ResponseWriter, r *request) (any, error) {
	v, m, err := s.viewAt(r.Context(), r.URL.Query().Get("at"))
	if err != nil {
		return nil, err
	}
	a := StateAt{
		Seq: v.Seq, Index: v.Index, Time: m.now, Cluster: v.ClusterID, FeatureLevel: v.FeatureLevel,
		ConfigIndex: v.ConfigIndex, Revocations: []RevocationInfo{}, Approvals: []ApprovalInfo{},
		Removed: slices.Sorted(maps.Keys(v.Removed)),
	}
	if v.Config != nil {
		a.ConfigDigest = v.Config.Digest
		a.Targets = slices.Sorted(maps.Keys(v.Config.Targets))
		a.Providers = slices.Sorted(maps.Keys(v.Config.Providers))
		for _, f := range v.Config.Files {
			a.Files = append(a.Files, f.Path)
		}
	} else if v.ConfigErr != nil {
		a.ConfigError = v.ConfigErr.Error()
	}
	for _, name := range slices.Sorted(maps.Keys(v.Nodes)) {
		n := v.Nodes[name]
		a.Nodes = append(a.Nodes, MemberInfo{Name: n.Name, Addr: n.Addr, Role: n.Role})
	}
	for rev := range v.Revocations.Values() {
		if rev.Undone.IsZero() {
			a.Revocations = append(a.Revocations, revocationInfo(rev))
		}
	}
	slices.SortFunc(a.Revocations, func(x, y RevocationInfo) int { return cmp.Compare(x.Index, y.Index) })
	for ap := range v.Approvals.Values() {
		if st := ap.State(m.now); st == "pending" || st == "approved" {
			i := s.approvalInfo(ap)
			i.State = st
			a.Approvals = append(a.Approvals, i)
		}
	}
	slices.SortFunc(a.Approvals, func(x, y ApprovalInfo) int { return x.Asked.Compare(y.Asked) })
	return a, nil
}

// explain says what was decided, or would have been, and why.
func (s *Server) explain(_ http.ResponseWriter, r *request) (any, error) {
	var in ExplainRequest
	if err := r.decode(&in); err != nil {
		return nil, err
	}
	v, m, err := s.viewAt(r.Context(), in.At)
	if err != nil {
		return nil, err
	}
	subject, err := in.subject(v, m.now)
	if err != nil {
		return nil, err
	}
	node := cmp.Or(in.Node, s.Node)
	out := Explanation{
		Seq: v.Seq, Index: v.Index, Time: m.now, ConfigIndex: v.ConfigIndex,
		Subject: subject.ID(), Kind: string(subject.Kind), Groups: subject.Groups, Claims: subject.Claims, Node: node,
		Revocations: []RevocationInfo{},
	}
	rules := map[string]policy.RuleInfo{}
	if v.Config != nil {
		out.ConfigDigest = v.Config.Digest
		for _, rule := range v.Config.Policies.Rules() {
			rules[rule.ID] = rule
		}
	}
	b := state.BearerOf(subject).At(node, in.Target)
	for rev := range v.Revocations.Values() {
		if rev.Undone.IsZero() && b.Ends(rev.Scope) {
			out.Revocations = append(out.Revocations, revocationInfo(rev))
		}
	}
	slices.SortFunc(out.Revocations, func(x, y RevocationInfo) int { return cmp.Compare(x.Index, y.Index) })

	pairs, err := s.explainPairs(r.Context(), v, subject, &in, &out)
	if err != nil {
		return nil, err
	}
	ask := func(pairs ...policy.Pair) policy.Decision {
		return s.DecideAt(v, node, &policy.Request{Subject: subject, Pairs: pairs, Context: policy.Context{
			Now: m.now, Profile: in.Profile, Database: in.Database, ClientAddr: in.Client, Protocol: protocolOf(pairs), Approved: in.Approved, InTransaction: in.InTransaction,
		}})
	}
	word := func(d policy.Decision) Verdict {
		o := Verdict{Effect: effectName(d.Effect), Rule: d.Rule, Reason: d.Reason}
		if rule, ok := rules[d.Rule]; ok {
			o.Where, o.Text = fmt.Sprintf("%s:%d", rule.Path, rule.Line), rule.Text
		}
		if a := d.Obligations.Approval; a != nil {
			o.Approval = &ApprovalOwed{Rules: a.Rules, Groups: a.Groups, Count: a.Count, Expires: a.Expires.String()}
		}
		o.Durable = d.Obligations.Durability == policy.Durable
		return o
	}
	if in.Target != "" {
		d := word(ask(policy.Pair{Action: policy.Connect, Resource: policy.Resource{Type: policy.Database, Path: []string{in.Target, in.Database}}}))
		out.Connect = &d
	}
	if out.Problem != "" { // refused before policy is asked
		out.Verdict = Verdict{Effect: "refuse", Rule: out.Problem, Reason: out.Verdict.Reason}
		return out, nil
	}
	if len(pairs) == 0 {
		return nil, invalid("statement: it does nothing by itself; of a prepared statement, ask about its text")
	}
	out.Verdict = word(ask(pairs...))
	for _, p := range pairs {
		out.Pairs = append(out.Pairs, ExplainedPair{Action: string(p.Action), Resource: strings.Join(append([]string{string(p.Resource.Type)}, p.Resource.Path...), " "), Verdict: word(ask(p))})
	}
	return out, nil
}

func protocolOf(pairs []policy.Pair) string {
	if len(pairs) > 0 && pairs[0].Resource.Type == policy.Cluster {
		return "api"
	}
	return "postgres"
}

func effectName(e policy.Effect) string {
	switch e {
	case policy.Permit:
		return "permit"
	case policy.Hold:
		return "hold"
	}
	return "refuse"
}

// explainPairs are what the statement or the action comes to.
func (s *Server) explainPairs(ctx context.Context, v *state.View, subject *policy.Subject, in *ExplainRequest, out *Explanation) ([]policy.Pair, error) {
	switch {
	case in.Statement != "" && in.Action != "":
		return nil, invalid("give a statement or an action, not both")
	case in.Statement == "" && in.Action == "":
		return nil, invalid("give a statement, or an action with its resource")
	case in.Target != "" && (v.Config == nil || v.Config.Targets[in.Target] == nil):
		return nil, notFound("at index %d there was no target %q", v.Index, in.Target)
	case in.Target != "" && in.Database == "":
		return nil, invalid("database: which one of target %s", in.Target)
	case in.Statement != "":
		if in.Target == "" {
			return nil, invalid("a statement needs a target and a database")
		}
		return s.statementPairs(ctx, v, subject, in, out)
	}
	p := policy.Pair{Action: policy.Action(in.Action)}
	actions := policy.Catalogue()
	i := slices.IndexFunc(actions, func(a policy.ActionInfo) bool { return a.Name == p.Action })
	if i < 0 {
		return nil, invalid("action: there is no %q; docs/policy.md lists them", in.Action)
	}
	var ok bool
	if p.Resource, ok = resourceOf(&actions[i], in); !ok {
		return nil, invalid("resource: %s is about %v; name schema, table or function, and column, as far as it needs", in.Action, actions[i].Resources)
	}
	return []policy.Pair{p}, nil
}

// statementPairs reads the statement with the target's catalogue as it is now:
// catalogues of the past are not kept.
func (s *Server) statementPairs(ctx context.Context, v *state.View, subject *policy.Subject, in *ExplainRequest, out *Explanation) ([]policy.Pair, error) {
	if len(in.Statement) > smallBody/2 {
		return nil, invalid("statement: longer than %d bytes", smallBody/2)
	}
	ctx, cancel := context.WithTimeout(ctx, pastTimeout)
	defer cancel()
	pairs, problem, err := s.Analyze(ctx, v, subject, in)
	if err != nil {
		return nil, &Failure{&Problem{Code: "unavailable", Status: http.StatusServiceUnavailable,
			Error: fmt.Sprintf("the statement needs the catalogue of %s/%s, which this node cannot read now (%v): name the action and its resource instead", in.Target, in.Database, err)}}
	}
	out.Catalogue = s.Now()
	if problem != nil {
		out.Problem, out.Verdict.Reason = problem.Rule, problem.Reason
	}
	return pairs, nil
}

// resourceOf picks the kind of resource that the action is about and that has
// as many names as were given.
func resourceOf(a *policy.ActionInfo, in *ExplainRequest) (policy.Resource, bool) {
	path := []string{}
	if in.Target != "" {
		path = append([]string{in.Target, in.Database}, in.Resource...)
	}
	for _, t := range a.Resources {
		want, take := 0, path
		switch t {
		case policy.Cluster:
		case policy.Target:
			if want = 1; len(path) == 2 {
				take = path[:1]
			}
		case policy.Database:
			want = 2
		case policy.Schema:
			want = 3
		case policy.Table, policy.Function:
			want = 4
		case policy.Column:
			want = 5
		}
		if len(take) == want {
			return policy.Resource{Type: t, Path: slices.Clone(take)}, true
		}
	}
	return policy.Resource{}, false
}

// subject is who is asked about: as a token of that time would have made it, or
// as it was recorded.
func (in *ExplainRequest) subject(v *state.View, now time.Time) (*policy.Subject, error) {
	if len(in.Token) > 0 {
		if in.Subject != "" || len(in.Groups) > 0 {
			return nil, invalid("a token's claims say who the subject is and its groups: give either them or the subject")
		}
		return subjectOfToken(v, in.Token)
	}
	provider, name, ok := strings.Cut(in.Subject, "/")
	if !ok || provider == "" || name == "" {
		return nil, invalid("subject: want provider/name as a recording shows it, or a token's claims")
	}
	claims := map[string]any{}
	if len(in.Claims) > 0 {
		var err error
		if claims, err = identity.Attributes(in.Claims); err != nil {
			return nil, invalid("claims: %v", err)
		}
	}
	s := &policy.Subject{
		Kind: policy.Workload, Provider: provider, Name: name, Groups: slices.Clone(in.Groups), Claims: claims,
		IssuedAt: now, ExpiresAt: now.Add(time.Hour),
	}
	if v.Config != nil && v.Config.Providers[provider] != nil {
		s.Kind, s.Issuer = v.Config.Providers[provider].Kind, v.Config.Providers[provider].Issuer
	}
	if provider == policy.BootstrapProvider {
		s.Kind = policy.User
	}
	if in.Kind != "" {
		s.Kind = policy.SubjectKind(in.Kind)
	}
	if s.Kind != policy.User && s.Kind != policy.Workload {
		return nil, invalid("kind: want %s or %s", policy.User, policy.Workload)
	}
	if !in.IssuedAt.IsZero() {
		s.IssuedAt = in.IssuedAt
	}
	s.TokenID = in.TokenID
	slices.Sort(s.Groups)
	return s, nil
}

// subjectOfToken maps claims as the provider of that time did.
func subjectOfToken(v *state.View, claims []byte) (*policy.Subject, error) {
	if v.Config == nil {
		return nil, invalid("at index %d there was no configuration, so no identity provider", v.Index)
	}
	for _, name := range slices.Sorted(maps.Keys(v.Config.Providers)) {
		p := v.Config.Providers[name]
		s, err := p.Claimed(claims)
		switch {
		case err == nil:
			return s, nil
		case errors.Is(err, identity.ErrNotOurs):
		default:
			return nil, invalid("token: %v", err)
		}
	}
	return nil, invalid("token: at index %d no identity provider had this token's issuer (iss) and audience (aud)", v.Index)
}

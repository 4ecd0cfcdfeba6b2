package api

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/sallyport/sallyport/node/bundle"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fence"
)

func revocationInfo(r *state.Revocation) RevocationInfo {
	i := RevocationInfo{ID: r.ID, Scope: r.Scope, Reason: r.Reason, At: r.At, Index: r.Index, Until: r.Until, Undone: r.Undone, UndoReason: r.UndoReason}
	switch {
	case r.Fenced != nil:
		i.Fenced, i.Complete, i.Nodes = r.FencedAt, true, r.Fenced.Nodes
	case r.Report != nil:
		for _, n := range r.Report.Nodes {
			i.Nodes = append(i.Nodes, event.NodeFenced{Node: n.Node, State: n.State, At: n.At, Sessions: n.Sessions, Detail: n.Detail})
		}
	}
	return i
}

func (s *Server) listRevocations(http.ResponseWriter, *request) (any, error) {
	infos := []RevocationInfo{}
	for r := range s.State.View().Revocations.Values() {
		infos = append(infos, revocationInfo(r))
	}
	sort.Slice(infos, func(i, j int) bool { return infos[i].Index < infos[j].Index })
	return infos, nil
}

// checkScope says what is wrong with a scope, or nil. A scope that nothing can
// match is refused: its author believes something to be stopped that is not.
func (s *Server) checkScope(r *request, sc event.Scope) error {
	v := s.State.View()
	switch {
	case sc.Value == "":
		return invalid("scope: a revocation is of a subject, group, claim, session, target, token or node: name which one")
	case len(sc.Value) > 1024 || len(sc.Name) > 256:
		return invalid("scope: longer than 1024 bytes")
	case (sc.Name != "") != (sc.Kind == event.ScopeClaim):
		return invalid("scope: a claim has a name and a value, every other kind a value alone")
	}
	switch sc.Kind {
	case event.ScopeSubject:
		if !strings.Contains(sc.Value, "/") {
			return invalid("subject: want provider/name as `sallyport sessions list` shows it, such as ci/repo:acme/shop:ref:refs/heads/main")
		}
	case event.ScopeClaim:
		known := false
		if v.Config != nil {
			for _, p := range v.Config.Providers {
				known = known || slices.Contains(p.Claims, sc.Name)
			}
		}
		if !known {
			return invalid("claim %s: no identity provider of the configuration passes it on (its `claims`), so nobody would be found by it; revoke the subject or a group, or add the claim to the provider first", sc.Name)
		}
	case event.ScopeTarget:
		if v.Config == nil || v.Config.Targets[sc.Value] == nil {
			return invalid("target: there is none named %q; `sallyport status` lists them", sc.Value)
		}
	case event.ScopeNode:
		if _, member := v.Nodes[sc.Value]; !member {
			return invalid("node: none is named %q; `sallyport status` lists them", sc.Value)
		}
		if sc.Value == s.Node {
			return invalid("node %s leads the cluster now: stop it, so that another leads, and repeat", sc.Value)
		}
	case event.ScopeToken:
		if len(sc.Value) > 128 {
			return invalid("token: want its id (jti, or sha256:…), as `sallyport sessions list --json` and recordings show it; what was given is longer than any, and must not be stored if it is a token")
		}
	case event.ScopeGroup, event.ScopeSession:
	default:
		return invalid("scope: kind %q is none of subject, group, claim, session, target, token, node", sc.Kind)
	}
	b := state.BearerOf(r.subject)
	if (sc.Kind == event.ScopeGroup || sc.Kind == event.ScopeClaim) && b.Ends(sc) {
		return invalid("this would end your own access too, and nobody undoes a revocation that they are under: let somebody outside of %s do it", sc)
	}
	return nil
}

// Grantor is the part of fence.Grantor that revocations need.
type Grantor interface {
	Freeze(id fence.ID, payload []byte)
	Abort(id fence.ID)
	Await(ctx context.Context, seq uint64, limit time.Duration) (fence.Report, error)
}

const (
	// revokeWait is how long an answer waits for every node by default, and
	// maxRevokeWait at most: connections to the API end after three minutes.
	revokeWait    = 20 * time.Second
	maxRevokeWait = time.Minute
	// maxReady bounds the revocations that are in force and not stored so yet;
	// what does not fit is found by the next look at all of them.
	maxReady = 1024
	// completeEvery is how often the leader looks at what is not in force yet.
	completeEvery = 500 * time.Millisecond
	// maxLooked bounds how many it looks at each time, and maxBatch how many it
	// stores at once.
	maxLooked, maxBatch = 1000, 64
)

// fenced is a revocation that is in force everywhere.
type fenced struct {
	rev   *state.Revocation
	nodes []event.NodeFenced
}

// revoke ends what the scope says. What it names is frozen on every node while
// it is decided. Once committed it waits until every node has stopped, or has
// certainly lost its lease, as long as the caller has time; the leader goes on
// without the caller.
func (s *Server) revoke(w http.ResponseWriter, r *request) (any, error) {
	var in RevokeRequest
	if err := r.decode(&in); err != nil {
		return nil, err
	}
	if in.Subject != "" && in.Scope == (event.Scope{}) {
		in.Scope = event.Scope{Kind: event.ScopeSubject, Value: in.Subject}
	}
	if strings.TrimSpace(in.Reason) == "" || len(in.Reason) > 1000 {
		return nil, invalid("reason: want a sentence, at most 1000 bytes; it is shown to those concerned and kept for ever")
	}
	id := hex.EncodeToString(r.id[:5])
	payload := event.NewRevoked(id, in.Scope, in.Reason)
	if _, done := s.done(r, event.TypeRevoked); !done {
		if err := s.checkScope(r, in.Scope); err != nil {
			return nil, err
		}
		hint, err := json.Marshal(payload)
		if err != nil {
			return nil, err
		}
		s.Grantor.Freeze(fence.ID(r.id), hint)
	}
	ev, err := s.propose(w, r, event.TypeRevoked, "revocation/"+id, 0, payload)
	if err != nil {
		if problem(err).Status < http.StatusInternalServerError { // else it may be stored all the same
			s.Grantor.Abort(fence.ID(r.id))
		}
		return nil, err
	}
	if p, err := event.Decode[event.Revoked](ev); err != nil || p.Ends() != in.Scope {
		return nil, invalid("this Idempotency-Key was used for something else")
	}
	rev := s.State.View().Revocations.Get(id)
	if rev == nil {
		return nil, fmt.Errorf("the revocation is stored, and this node has not folded it yet: %w", context.DeadlineExceeded)
	}
	return s.standing(r.Context(), rev, cmp.Or(max(0, in.Timeout), revokeWait)), nil
}

// standing says how far a revocation is in force. At the leader it waits until
// it is everywhere, at most for wait.
func (s *Server) standing(ctx context.Context, rev *state.Revocation, wait time.Duration) RevocationInfo {
	ctx, cancel := context.WithTimeout(ctx, min(wait, maxRevokeWait))
	defer cancel()
	info := revocationInfo(rev)
	if rev.Fenced != nil {
		return info
	}
	limit := s.limit()
	info.Limit = limitText(limit)
	if limit == fence.Unbounded {
		// Nothing to wait for but words, which come within a lease or not soon.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.Lease+s.Lease/10)
		defer cancel()
	}
	report, err := s.Grantor.Await(ctx, rev.Seq, limit)
	info.Nodes = nodesFenced(report)
	if err != nil && len(info.Nodes) == 0 {
		info.Nodes = s.unknown("the leader has changed; the next one takes it up")
	}
	if info.Complete = err == nil && report.Complete; info.Complete {
		select {
		case s.ready <- fenced{rev, info.Nodes}:
		default: // found again
		}
	}
	return info
}

// unknown is what can be said of every node without a leader.
func (s *Server) unknown(why string) []event.NodeFenced {
	var out []event.NodeFenced
	for _, n := range slices.Sorted(maps.Keys(s.State.View().Nodes)) {
		out = append(out, event.NodeFenced{Node: n, State: event.FenceUnconfirmed, Detail: why})
	}
	return out
}

// nodesFenced is a report as it is shown and stored.
func nodesFenced(r fence.Report) []event.NodeFenced {
	out := make([]event.NodeFenced, 0, len(r.Nodes))
	for _, n := range r.Nodes {
		f := event.NodeFenced{Node: n.Node, State: string(n.State), Level: n.Level, Detail: n.Reason}
		switch n.State {
		case fence.Unconfirmed:
			f.LeaseEnds, f.NoBound = n.At.UTC(), n.At.IsZero()
		default:
			f.At = n.At.UTC()
		}
		if len(n.Note) > 0 {
			var note struct {
				Sessions   int    `json:"sessions"`
				Violations uint64 `json:"violations"`
				Bytes      uint64 `json:"bytes"`
			}
			if json.Unmarshal(n.Note, &note) == nil {
				f.Sessions, f.Violations, f.Bytes = note.Sessions, note.Violations, note.Bytes
			}
		}
		out = append(out, f)
	}
	return out
}

// limit is the longest that any node may pass on what was revoked without
// hearing of it: a lease, or what the rules tolerate, those too that some node
// may still act on.
func (s *Server) limit() time.Duration {
	switch t := s.State.View().LargestTolerance(s.known.Load()); t {
	case policy.BestEffort:
		return fence.Unbounded
	default:
		return max(time.Duration(t), s.Lease)
	}
}

func limitText(d time.Duration) string {
	if d == fence.Unbounded {
		return "no bound"
	}
	return d.String()
}

// learn finds out, at the leader, whether every node acts on the configuration
// in force: then what earlier ones tolerated no longer counts. A node that was
// removed may act on an old one until its lease has ended.
func (s *Server) learn(ctx context.Context) {
	v := s.State.View()
	if v.ConfigIndex == 0 || s.known.Load() >= v.ConfigIndex || v.LargestTolerance(0) == v.LargestTolerance(v.ConfigIndex) {
		return
	}
	limit := max(time.Duration(v.LargestTolerance(0)), s.Lease)
	if v.LargestTolerance(0) == policy.BestEffort {
		limit = fence.Unbounded
	}
	now, cancel := context.WithCancel(ctx)
	cancel()
	report, err := s.Grantor.Await(now, v.Seq, limit)
	if err != nil {
		return
	}
	for _, n := range report.Nodes {
		if _, member := v.Nodes[n.Node]; !member && n.State == fence.Unconfirmed {
			return
		}
	}
	for name := range v.Nodes {
		seq := s.Folded()
		if name != s.Node {
			actx, cancel := context.WithTimeout(ctx, time.Second)
			var h head
			err := s.get(actx, name, "/mesh/v1/folded", &h)
			cancel()
			if err != nil {
				return
			}
			seq = h.Seq
		}
		if seq < v.Seq {
			return
		}
	}
	s.known.Store(v.ConfigIndex)
}

func (s *Server) meshFolded(w http.ResponseWriter, _ *http.Request) { reply(w, head{s.Folded()}) }

// CompleteRevocations brings every revocation to the event that says that it is
// in force everywhere, whoever asked for it and whoever led then. It works
// while this node leads, until ctx ends.
func (s *Server) CompleteRevocations(ctx context.Context) error {
	tick := time.NewTicker(completeEvery)
	defer tick.Stop()
	from := uint64(0) // the next look begins here: none starves
	for {
		var done []fenced
		select {
		case f := <-s.ready:
			done = append(done, f)
		case <-tick.C:
			if !s.Store.IsLeader() {
				s.known.Store(0)
				continue
			}
			s.learn(ctx)
			done, from = s.look(ctx, from)
		case <-ctx.Done():
			return nil
		}
	more:
		for len(done) < maxBatch {
			select {
			case f := <-s.ready:
				done = append(done, f)
			default:
				break more
			}
		}
		for batch := range slices.Chunk(done, maxBatch) {
			s.storeFenced(ctx, batch)
		}
	}
}

// look finds revocations that have come into force, from number from on.
func (s *Server) look(ctx context.Context, from uint64) (done []fenced, next uint64) {
	now, cancel := context.WithCancel(ctx)
	cancel()
	limit := s.limit()
	n := 0
	for r := range s.State.View().Unfenced(from) {
		if n++; n > maxLooked {
			return done, r.Seq
		}
		report, err := s.Grantor.Await(now, r.Seq, limit)
		if err != nil {
			return done, 0 // not leading, or not yet
		}
		if report.Complete {
			done = append(done, fenced{r, nodesFenced(report)})
		}
	}
	return done, 0
}

// storeFenced stores evidence. Its ids follow from the revocations', so that
// two leaders store it once.
func (s *Server) storeFenced(ctx context.Context, batch []fenced) {
	var proposals []event.Proposal
	seen := map[string]bool{}
	for _, f := range batch {
		if rev := s.State.View().Revocations.Get(f.rev.ID); seen[f.rev.ID] || rev == nil || rev.Fenced != nil {
			continue
		}
		seen[f.rev.ID] = true
		version, data, err := event.Encode(s.Store.FeatureLevel(), event.TypeRevocationFenced,
			event.RevocationFenced{ID: f.rev.ID, Index: f.rev.Index, Nodes: f.nodes})
		if err != nil {
			return // a member cannot read it yet; the revocation stands without
		}
		sum := sha256.Sum256(append([]byte("revocation fenced"), f.rev.EventID[:]...))
		proposals = append(proposals, event.Proposal{
			ID: event.ID(sum[:16]), Actor: event.Actor{Principal: s.Node, Kind: event.Node, Authn: "node", Via: s.Node},
			Type: event.TypeRevocationFenced, Version: version, Aggregate: "revocation/" + f.rev.ID, Expect: event.Any, Payload: data, Cause: f.rev.EventID,
		})
	}
	if len(proposals) == 0 {
		return
	}
	if _, err := s.append(ctx, nil, proposals...); err != nil {
		// It is found and tried again, here or by the next leader.
		s.Log.Debug("the evidence of revocations could not be stored", "revocations", len(proposals), "err", err)
	}
}

// showRevocation shows one, waiting for it to be in force if asked to.
func (s *Server) showRevocation(_ http.ResponseWriter, r *request) (any, error) {
	cluster := policy.Resource{Type: policy.Cluster}
	if d := s.decide(r.Request, r.subject, policy.StatusRead, cluster); d.Effect != policy.Permit && s.decide(r.Request, r.subject, policy.Revoke, cluster).Effect != policy.Permit {
		_ = s.audit(r.Request, policy.StatusRead, r.subject, "refuse", d.Rule, d.Reason)
		return nil, &Failure{&Problem{Code: "forbidden", Error: d.Reason + " (rule " + d.Rule + ")", Status: http.StatusForbidden}}
	}
	var wait time.Duration
	if q := r.URL.Query().Get("wait"); q != "" {
		var err error
		if wait, err = time.ParseDuration(q); err != nil || wait < 0 || wait > maxRevokeWait {
			return nil, invalid("wait: want a duration up to %v, such as 20s", maxRevokeWait)
		}
	}
	id := r.PathValue("id")
	rev := s.State.View().Revocations.Get(id)
	if rev == nil {
		return nil, notFound("there is no revocation %q; `sallyport revocations list` shows them", id)
	}
	if rev.Fenced != nil || s.Store.IsLeader() {
		return s.standing(r.Context(), rev, wait), nil
	}
	info := revocationInfo(rev)
	leader, _ := s.Store.Leader()
	if leader == "" || leader == s.Node {
		info.Nodes = s.unknown("no quorum: the cluster has no leader that could say")
		return info, nil
	}
	ctx, done := s.whileLeads(r.Context(), leader)
	defer done()
	var theirs RevocationInfo
	if err := s.get(ctx, leader, "/mesh/v1/revocations/"+url.PathEscape(id)+"?wait="+wait.String(), &theirs); err != nil {
		info.Nodes = s.unknown("the leader " + leader + " did not say: " + err.Error())
		return info, nil
	}
	return theirs, nil
}

func (s *Server) meshRevocation(w http.ResponseWriter, r *http.Request) {
	wait, err := time.ParseDuration(r.URL.Query().Get("wait"))
	rev := s.State.View().Revocations.Get(r.PathValue("id"))
	switch {
	case err != nil:
		fail(w, problem(invalid("wait: %v", err)))
	case rev == nil:
		fail(w, problem(notFound("there is no such revocation here yet")))
	default:
		reply(w, s.standing(r.Context(), rev, wait))
	}
}

// freezeHeader marks a revocation that no leader can decide now, handed on so
// that nodes stop for a moment what it names. Each node authenticates and
// judges the caller itself.
const freezeHeader = "Sallyport-Freeze"

// freezeOnly stops here what a revocation names.
func (s *Server) freezeOnly(r *http.Request, body []byte) {
	var in RevokeRequest
	if json.Unmarshal(body, &in) != nil {
		return
	}
	if in.Subject != "" && in.Scope == (event.Scope{}) {
		in.Scope = event.Scope{Kind: event.ScopeSubject, Value: in.Subject}
	}
	if in.Scope.Value != "" {
		s.FreezeHere(idempotencyID(r), in.Scope)
	}
}

// freezeAll stops what a revocation names here, and asks every other node to.
// It does not wait: it is a hint, for as long as no leader can decide.
func (s *Server) freezeAll(r *http.Request, body []byte) {
	s.freezeOnly(r, body)
	client := clientIP(r)
	for name := range s.State.View().Nodes {
		if name == s.Node {
			continue
		}
		out := r.Clone(context.WithoutCancel(r.Context()))
		go func() { // ends with its timeout
			ctx, cancel := context.WithTimeout(out.Context(), 2*time.Second)
			defer cancel()
			out = out.WithContext(ctx)
			out.RequestURI, out.URL.Scheme, out.URL.Host, out.Host = "", "http", name, name
			out.Body, out.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
			out.Header.Set(freezeHeader, "1")
			out.Header.Set("Sallyport-Client", client)
			if resp, err := s.Mesh.Transport().RoundTrip(out); err == nil {
				resp.Body.Close()
			}
		}()
	}
}

func (s *Server) undo(w http.ResponseWriter, r *request) (any, error) {
	var in UndoRequest
	if err := r.decode(&in); err != nil {
		return nil, err
	}
	if strings.TrimSpace(in.Reason) == "" || len(in.Reason) > 1000 {
		return nil, invalid("reason: want a sentence, at most 1000 bytes")
	}
	id := r.PathValue("id")
	rev := s.State.View().Revocations.Get(id)
	if _, done := s.done(r, event.TypeRevocationUndone); done && rev != nil {
		return revocationInfo(rev), nil
	}
	if rev == nil {
		return nil, notFound("there is no revocation %q; `sallyport revocations list` shows them", id)
	}
	b := state.BearerOf(r.subject)
	switch why := rev.Final(); {
	case !rev.Undone.IsZero():
		return nil, &Failure{&Problem{Code: "conflict", Error: "this revocation was undone already", Status: http.StatusConflict}}
	case why != "":
		return nil, invalid("the revocation of %s cannot be undone: %s", rev.Scope, why)
	case b.Ends(rev.Scope):
		return nil, invalid("nobody undoes a revocation of themselves")
	}
	if _, err := s.propose(w, r, event.TypeRevocationUndone, "revocation/"+id, event.Any, event.RevocationUndone{ID: id, Reason: in.Reason}); err != nil {
		return nil, err
	}
	return revocationInfo(s.State.View().Revocations.Get(id)), nil
}

// checkRevocations refuses a configuration that would lift a revocation in
// force without saying so, or that bounds less than a lease does.
func (s *Server) checkRevocations(v *state.View, b *bundle.Bundle) error {
	if least := b.Policies.LeastBounded(); least > 0 && least < s.Lease {
		return invalid("a rule says @revocation(%q), which is less than the lease of this cluster's nodes (%v): raise it, or write strict", policy.Tolerance(least), s.Lease)
	}
	if v.Config == nil {
		return nil
	}
	for r := range v.Revocations.Values() {
		if r.Scope.Kind != event.ScopeClaim || !r.Undone.IsZero() {
			continue
		}
		for name, was := range v.Config.Providers {
			is, kept := b.Providers[name]
			if kept && slices.Contains(was.Claims, r.Scope.Name) && !slices.Contains(is.Claims, r.Scope.Name) {
				return invalid("provider %s no longer passes on the claim %s, by which revocation %s (%s) finds whom it ends: undo that first, or keep the claim", name, r.Scope.Name, r.ID, r.Scope)
			}
		}
	}
	return nil
}

package api

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/raftstore/event"
)

func revocationInfo(r *state.Revocation) RevocationInfo {
	i := RevocationInfo{ID: r.ID, Scope: r.Scope, Reason: r.Reason, At: r.At, Index: r.Index, Until: r.Until, Undone: r.Undone, UndoReason: r.UndoReason}
	switch {
	case r.Fenced != nil:
		i.Fenced, i.Nodes = r.FencedAt, r.Fenced.Nodes
	case r.Report != nil:
		for _, n := range r.Report.Nodes {
			i.Nodes = append(i.Nodes, event.NodeFenced{Node: n.Node, State: n.State, At: n.At, Sessions: n.Sessions, Detail: n.Detail})
		}
	}
	return i
}

func (s *Server) listRevocations(http.ResponseWriter, *request) (any, error) {
	infos := []RevocationInfo{}
	for _, r := range s.State.View().Revocations {
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

// fenceTimeout bounds how long a revocation waits for one node.
const fenceTimeout = 15 * time.Second

// revoke ends what the scope says. It commits first: from then on every node
// that learns of it refuses and cuts. Then it collects from every member when
// that was done there, and stores that when all of them have.
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
	if _, done := s.done(r, event.TypeRevoked); !done {
		if err := s.checkScope(r, in.Scope); err != nil {
			return nil, err
		}
	}
	ev, err := s.propose(w, r, event.TypeRevoked, "revocation/"+id, 0, event.NewRevoked(id, in.Scope, in.Reason))
	if err != nil {
		return nil, err
	}
	if p, err := event.Decode[event.Revoked](ev); err != nil || p.Ends() != in.Scope {
		return nil, invalid("this Idempotency-Key was used for something else")
	}
	// What follows is evidence; the caller's leaving must not lose it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), fenceTimeout+5*time.Second)
	defer cancel()
	fenced := event.RevocationFenced{ID: id, Index: ev.Index, Nodes: s.fenceAll(ctx, ev.Seq)}
	if !slices.ContainsFunc(fenced.Nodes, func(n event.NodeFenced) bool { return n.State == event.FenceUnconfirmed }) {
		data, err := json.Marshal(fenced)
		if err != nil {
			return nil, err
		}
		if _, err := s.append(ctx, w, event.Proposal{
			ID: event.NewID(), Actor: event.Actor{Principal: s.Node, Kind: event.Node, Authn: "node", Via: s.Node},
			Type: event.TypeRevocationFenced, Version: 1, Aggregate: "revocation/" + id, Expect: event.Any, Payload: data, Cause: ev.ID,
		}); err != nil {
			s.Log.Error("the evidence of a revocation could not be stored; the revocation stands", "revocation", id, "err", err)
		}
	}
	return RevocationInfo{ID: id, Scope: in.Scope, Reason: in.Reason, At: ev.Time, Index: ev.Index, Nodes: fenced.Nodes}, nil
}

func (s *Server) fenceAll(ctx context.Context, seq uint64) []event.NodeFenced {
	ctx, cancel := context.WithTimeout(ctx, fenceTimeout)
	defer cancel()
	nodes := slices.Sorted(maps.Keys(s.State.View().Nodes))
	out := make([]event.NodeFenced, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			var f event.NodeFenced
			var err error
			if n == s.Node {
				f, err = s.Fence(ctx, seq)
			} else {
				err = s.exchange(ctx, http.MethodPost, n, fmt.Sprintf("/mesh/v1/fence?seq=%d", seq), struct{}{}, &f)
			}
			f.Node = n
			if err != nil {
				f.State, f.At, f.Detail = event.FenceUnconfirmed, time.Time{}, err.Error()
			}
			out[i] = f
		})
	}
	wg.Wait()
	return out
}

func (s *Server) meshFence(w http.ResponseWriter, r *http.Request) {
	var seq uint64
	if _, err := fmt.Sscan(r.URL.Query().Get("seq"), &seq); err != nil {
		fail(w, problem(invalid("seq: %v", err)))
		return
	}
	f, err := s.Fence(r.Context(), seq)
	if err != nil {
		fail(w, problem(err))
		return
	}
	reply(w, f)
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
	rev := s.State.View().Revocations[id]
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
	return revocationInfo(s.State.View().Revocations[id]), nil
}

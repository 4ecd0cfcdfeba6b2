package api

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/sallyport/sallyport/node/config"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/tunnel"
	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/recording"
)

func (s *Server) whoami(_ http.ResponseWriter, r *request) (any, error) {
	return Whoami{
		Subject: r.subject.ID(), Kind: string(r.subject.Kind), Groups: r.subject.Groups,
		Claims: r.subject.Claims, Expires: r.subject.ExpiresAt, Node: s.Node,
	}, nil
}

// peerTimeout bounds how long a cluster-wide question waits for one node.
const peerTimeout = 3 * time.Second

// everyNode asks all members at once, this one included, and calls got for
// each in the order of their names.
func everyNode[T any](ctx context.Context, s *Server, path string, local func() T, got func(node string, v T, err error)) {
	type answer struct {
		v   T
		err error
	}
	nodes := slices.Sorted(maps.Keys(s.State.View().Nodes))
	answers := make([]answer, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			if n == s.Node {
				answers[i].v = local()
				return
			}
			ctx, cancel := context.WithTimeout(ctx, peerTimeout)
			defer cancel()
			answers[i].err = s.get(ctx, n, path, &answers[i].v)
		})
	}
	wg.Wait()
	for i, n := range nodes {
		got(n, answers[i].v, answers[i].err)
	}
}

func (s *Server) status(_ http.ResponseWriter, r *request) (any, error) {
	v := s.State.View()
	st := Status{Cluster: v.ClusterID, FeatureLevel: s.Store.FeatureLevel()}
	offers := map[string]Offer{}
	local := func() NodeStatus { return s.LocalStatus(r.Context()) }
	everyNode(r.Context(), s, "/mesh/v1/status", local, func(node string, ns NodeStatus, err error) {
		ns.Reachable = err == nil
		if err != nil {
			ns = NodeStatus{Error: err.Error()}
		}
		ns.Node, ns.Addr = node, v.Nodes[node].Addr
		st.Nodes = append(st.Nodes, ns)
		offers[node] = Offer{ns.FeatureLevel, err}
	})
	_, st.HeldBack = Agree(st.FeatureLevel, s.offer(), offers)
	return st, nil
}

func (s *Server) sessions(_ http.ResponseWriter, r *request) (any, error) {
	var all Sessions
	everyNode(r.Context(), s, "/mesh/v1/sessions", s.localSessions, func(node string, v Sessions, err error) {
		if err != nil {
			if all.Unreachable == nil {
				all.Unreachable = map[string]string{}
			}
			all.Unreachable[node] = err.Error()
		}
		all.Sessions = append(all.Sessions, v.Sessions...)
	})
	return all, nil
}

func (s *Server) localSessions() Sessions { return Sessions{Sessions: s.Sessions.List()} }

// maxEvents bounds one answer of GET /v1/events; the caller asks again.
const maxEvents = 500

// events answers with those from seq `from` on; with `wait` it holds the
// answer until there is one.
func (s *Server) events(_ http.ResponseWriter, r *request) (any, error) {
	q := r.URL.Query()
	from, err := strconv.ParseUint(q.Get("from"), 10, 64)
	if err != nil || from == 0 {
		return nil, invalid("from: the number of the first event wanted, from 1")
	}
	if wait, _ := time.ParseDuration(q.Get("wait")); wait > 0 {
		ctx, cancel := context.WithTimeout(r.Context(), min(wait, time.Minute))
		defer cancel()
		_ = s.Store.WaitSeq(ctx, from) // an empty answer says that none came
	}
	events, err := s.Store.Events(from, maxEvents)
	if err != nil {
		return nil, err
	}
	infos := make([]EventInfo, 0, len(events))
	for _, e := range events {
		infos = append(infos, eventInfo(e))
	}
	return infos, nil
}

func eventInfo(e event.Event) EventInfo {
	i := EventInfo{
		Seq: e.Seq, Index: e.Index, Term: e.Term, Time: e.Time, Type: e.Type, Version: e.Version,
		Aggregate: e.Aggregate, Actor: e.Actor, Chain: hex.EncodeToString(e.Chain[:]),
	}
	if json.Unmarshal(e.Payload, &i.Payload) != nil {
		i.Payload = map[string]any{"undecodable": true}
	}
	return i
}

// makeToken stores a one-time token for a new node: its role and the public half
// of its secret.
func (s *Server) makeToken(w http.ResponseWriter, r *request) (any, error) {
	var in JoinTokenRequest
	if err := r.decode(&in); err != nil {
		return nil, err
	}
	if in.TTL == 0 {
		in.TTL = time.Hour
	}
	if in.Role == "" {
		in.Role = pki.Voter
	}
	switch {
	case in.TTL < time.Minute || in.TTL > 24*time.Hour:
		return nil, invalid("a join token lives between 1m and 24h")
	case in.Role != pki.Voter && in.Role != pki.Gateway:
		return nil, invalid("role %q: a node joins as %s or %s", in.Role, pki.Voter, pki.Gateway)
	case len(in.Key) != ed25519.PublicKeySize:
		return nil, invalid("key: want the token's Ed25519 public key, 32 bytes")
	}
	id := hex.EncodeToString(r.id[:6])
	made := event.JoinTokenMade{ID: id, Key: in.Key, Expires: s.Now().Add(in.TTL).UTC(), Role: in.Role, Nodes: []string{s.Node}}
	if peer := tunnel.Peer(r.Context()); peer != "" && peer != s.Node {
		made.Nodes = append(made.Nodes, peer)
	}
	ev, err := s.propose(w, r, event.TypeJoinTokenMade, "jointoken/"+id, 0, made)
	if err != nil {
		return nil, err
	}
	if p, err := event.Decode[event.JoinTokenMade](ev); err != nil || !bytes.Equal(p.Key, made.Key) {
		return nil, &Failure{&Problem{Code: "conflict", Status: http.StatusConflict, Error: "this call made a token before, for another key: make another one"}}
	}
	return JoinTokenReply{ID: id, Role: in.Role, Expires: made.Expires}, nil
}

// join makes a node a member. The token is the only credential; two events,
// appended together or not at all, consume it and add the node.
func (s *Server) join(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, smallBody))
	if err != nil {
		fail(w, problem(invalid("reading the request: %v", err)))
		return
	}
	if !s.Store.IsLeader() {
		if tunnel.Peer(r.Context()) != "" {
			fail(w, &Problem{Code: "unavailable", Error: "this node is not the leader", Status: http.StatusMisdirectedRequest})
			return
		}
		s.toLeader(w, r, body)
		return
	}
	var in JoinRequest
	var v any
	err = json.Unmarshal(body, &in)
	if err == nil {
		v, err = s.joinLeader(w, r, &in)
	} else {
		err = invalid("the body is not a join request: %v", err)
	}
	if err != nil {
		_ = s.auditJoin(r, &in, "refuse", err.Error())
		fail(w, problem(err))
		return
	}
	reply(w, v)
}

func (s *Server) auditJoin(r *http.Request, in *JoinRequest, effect, reason string) error {
	return s.Audit(&recording.Entry{
		Type: recording.Decided, Verb: "POST /v1/cluster/join", Effect: effect, Rule: "jointoken/" + in.TokenID, Reason: reason,
		Detail: map[string]string{"client": clientIP(r), "node": in.Name, "addr": in.Addr},
	})
}

func (s *Server) joinLeader(w http.ResponseWriter, r *http.Request, in *JoinRequest) (any, error) {
	denied := &Failure{&Problem{Code: "unauthenticated", Status: http.StatusUnauthorized,
		Error: "the join token is not known, was used already or has expired: make a new one with `sallyport cluster token create`"}}
	v := s.State.View()
	tok, ok := v.JoinTokens.Find(in.TokenID)
	if !ok || !in.presents(&tok.JoinTokenMade) || s.Now().After(tok.Expires) {
		return nil, denied
	}
	for _, n := range tok.Nodes {
		if _, member := v.Nodes[n]; (!member || v.NodeRevoked(n) != nil) && tok.UsedBy == "" {
			return nil, &Failure{&Problem{Code: "unauthenticated", Status: http.StatusUnauthorized,
				Error: fmt.Sprintf("the join token was made through node %s, which was removed or revoked since, and its unused tokens with it: make a new one", n)}}
		}
	}
	if tok.UsedBy != "" {
		// The answer to the node that used it may have been lost.
		if info, member := v.Nodes[tok.UsedBy]; member && tok.UsedBy == in.Name && sameKey(info.Cert, in.CSR) && info.Recipient == in.Recipient {
			return s.joined(in.Name), nil
		}
		return nil, denied
	}
	if !config.ValidName(in.Name) {
		return nil, invalid("%q is not a node name (lower-case letters, digits and dashes, at most 63)", in.Name)
	}
	if level := s.Store.FeatureLevel(); max(in.FeatureLevel, event.BaseLevel) < level {
		return nil, invalid("the cluster is at feature level %d and the joining node's build supports %d: install a newer build there", level, max(in.FeatureLevel, event.BaseLevel))
	}
	if _, member := v.Nodes[in.Name]; member || v.Removed[in.Name] {
		return nil, invalid("the cluster has, or had, a node named %q: choose another name", in.Name)
	}
	for name, n := range v.Nodes {
		if n.Addr == in.Addr {
			return nil, invalid("node %s has the address %s: give the new node its own", name, in.Addr)
		}
	}
	if err := s.auditJoin(r, in, "permit", ""); err != nil {
		return nil, fmt.Errorf("this node cannot record now, and nothing happens unrecorded: %w", err)
	}
	info, err := s.SignNode(in, cmp.Or(tok.Role, pki.Voter))
	if err != nil {
		return nil, invalid("%v", err)
	}
	used, _ := json.Marshal(event.JoinTokenUsed{ID: in.TokenID, Node: in.Name})
	joinedVersion, joined, err := event.Encode(s.Store.FeatureLevel(), event.TypeNodeJoined, event.NodeJoined{Node: info, Token: in.TokenID})
	if err != nil {
		return nil, err
	}
	actor := event.Actor{Principal: "jointoken/" + in.TokenID, Kind: event.Node, Authn: "join-token", Source: clientIP(r), Via: s.Node}
	_, err = s.append(r.Context(), w,
		event.Proposal{ID: event.NewID(), Actor: actor, Type: event.TypeJoinTokenUsed, Version: 1, Aggregate: "jointoken/" + in.TokenID, Expect: 1, Payload: used},
		event.Proposal{ID: event.NewID(), Actor: actor, Type: event.TypeNodeJoined, Version: joinedVersion, Aggregate: "node/" + in.Name, Expect: 0, Payload: joined})
	if err != nil {
		return nil, err
	}
	return s.joined(in.Name), nil
}

// sameKey says whether a certificate and a certificate request are of one key.
func sameKey(cert, csr []byte) bool {
	c, err := x509.ParseCertificate(cert)
	if err != nil {
		return false
	}
	q, err := x509.ParseCertificateRequest(csr)
	if err != nil || q.CheckSignature() != nil {
		return false
	}
	return bytes.Equal(c.RawSubjectPublicKeyInfo, q.RawSubjectPublicKeyInfo)
}

// joined is what a member needs to start.
func (s *Server) joined(name string) JoinReply {
	v := s.State.View()
	rep := JoinReply{Cluster: v.ClusterID, CA: v.CA, Cert: v.Nodes[name].Cert}
	for _, name := range slices.Sorted(maps.Keys(v.Nodes)) {
		rep.Peers = append(rep.Peers, v.Nodes[name])
	}
	return rep
}

func (s *Server) meshStatus(w http.ResponseWriter, r *http.Request) {
	reply(w, s.LocalStatus(r.Context()))
}

func (s *Server) meshSessions(w http.ResponseWriter, _ *http.Request) { reply(w, s.localSessions()) }

// head is the newest event of a leader.
type head struct {
	Seq uint64 `json:"seq"`
}

// ClusterHead is the number of the newest event that the cluster had agreed on
// when this was called: the leader says it after a majority has confirmed that
// it leads.
func (s *Server) ClusterHead(ctx context.Context) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	switch leader, _ := s.Store.Leader(); leader {
	case "":
		return 0, raftstore.ErrNoLeader
	case s.Node:
		return s.confirmedHead(ctx)
	default:
		var h head
		err := s.get(ctx, leader, "/mesh/v1/head", &h)
		return h.Seq, err
	}
}

func (s *Server) confirmedHead(ctx context.Context) (uint64, error) {
	seq, _, err := s.Store.Newest(ctx)
	return seq, err
}

func (s *Server) meshHead(w http.ResponseWriter, r *http.Request) {
	seq, err := s.confirmedHead(r.Context())
	if err != nil {
		fail(w, problem(err))
		return
	}
	reply(w, head{seq})
}

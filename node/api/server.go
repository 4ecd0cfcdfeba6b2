// Package api is the cluster's HTTP/JSON interface, its types and its Go
// client. The CLI uses nothing else.
//
// Every call is authenticated and is an action that policy decides. A call
// that changes state may be sent to any node: it is judged there, then handed
// on, with the caller's own credential, to the leader, which judges it again.
package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/node/approval"
	"github.com/sallyport/sallyport/node/eventlog"
	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/node/session"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/node/tunnel"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/recording"
)

const (
	// maxBody bounds a configuration: 1 MiB of files in base64, and secrets.
	maxBody = 4 << 20
	// smallBody bounds every other body.
	smallBody = 64 << 10
	// maxLarge bounds how many configurations are read at once: what callers
	// not yet known can make a node hold is this and their small bodies.
	maxLarge = 4
)

// Deps is what the API needs of its node.
type Deps struct {
	Node string
	Dev  bool
	// FeatureLevel is the newest feature level this node offers; 0 means event.Level.
	FeatureLevel uint32
	Store        *raftstore.Store
	State        *state.Projection
	Sessions     *session.Registry
	Approvals    *approval.Service
	Mesh         *tunnel.Mesh
	// Recordings is where recordings end up, lent to readers.
	Recordings recording.Store
	// Live is this node's recorder.
	Live Live
	// EventLog is this node's part in making the event log verifiable.
	EventLog *eventlog.Service
	// Authenticate says who sends a request with this body, and returns the
	// proof that another node can check again. relayed says that a node of the
	// cluster handed the request on.
	Authenticate func(ctx context.Context, r *http.Request, body []byte, relayed bool) (*policy.Subject, []byte, error)
	// Known says, before a large body is read, whether the request's credential
	// is one that Authenticate could accept.
	Known  func(ctx context.Context, r *http.Request) error
	Decide func(req *policy.Request) (policy.Decision, uint64)
	// LogoutToken and SecurityEvent verify an identity provider's signals.
	LogoutToken, SecurityEvent func(ctx context.Context, token string) ([]identity.Signal, error)
	// DecideAt is what a node would decide by a view of the past.
	DecideAt func(v *state.View, node string, req *policy.Request) policy.Decision
	// Analyze says what a statement does, by the target's catalogue as it is
	// now; problem is why it is refused whatever policy says.
	Analyze func(ctx context.Context, v *state.View, subject *policy.Subject, in *ExplainRequest) (pairs []policy.Pair, problem *protocols.Refusal, err error)
	// VerifyToken checks a caller's token that another node passes on.
	VerifyToken func(ctx context.Context, token string) (*policy.Subject, error)
	// Seal encrypts to the voters and the nodes named; name binds the secret to its
	// place.
	Seal func(name string, plain []byte, nodes ...string) (event.Sealed, error)
	// SealSecret encrypts a configuration's secret to the nodes named, all when
	// there are none, and says to whom; nobody while the cluster has a vault.
	SealSecret func(name string, plain []byte, nodes []string) (event.Sealed, event.Recipients, error)
	// WantSealed says to whom each secret of the configuration should be sealed.
	WantSealed func(v *state.View) map[string]event.Recipients
	Open       func(name string, sealed event.Sealed) ([]byte, error)
	// SignNode issues a member's certificate for a role, wrapping the vault for it.
	SignNode func(req *JoinRequest, role string) (event.NodeInfo, error)
	// Grantor knows, at the leader, how far a revocation is in force. Lease is
	// the length of the leases that it grants.
	Grantor Grantor
	Lease   time.Duration
	// FreezeHere stops for a moment what a revocation of the scope would end here.
	FreezeHere func(id event.ID, sc event.Scope)
	// Folded is the number up to which this node acts on what it has folded.
	Folded func() uint64
	// SignRenewal issues a member's next certificate; MinRenewal is how old the
	// one before must be.
	SignRenewal func(node string, csr []byte) ([]byte, error)
	MinRenewal  time.Duration
	// Backup writes a backup of the cluster, encrypted to an age recipient.
	Backup func(ctx context.Context, recipient string, w io.Writer) error
	// Rotate renews this node's certificate now.
	Rotate func(ctx context.Context) (RotateReply, error)
	// Leave lets this node's sessions go on for drain, ends them and stops the
	// node; it returns when none is left.
	Leave func(ctx context.Context, drain time.Duration)
	// Release has a node replaced and taken out of Raft; leader only.
	Release func(ctx context.Context, name string) error
	// Health is how this node does.
	Health func() Health
	// LocalStatus is this node's own part of the status.
	LocalStatus func(ctx context.Context) NodeStatus
	// Audit records a call and what was decided about it. An error says that a
	// permitted call is not recorded: it must not happen then.
	Audit func(e *recording.Entry) error
	Now   func() time.Time
	Log   *slog.Logger
}

// Server answers API calls.
type Server struct {
	Deps
	large chan struct{} // places for large bodies
	past  chan struct{} // places for questions about the past
	// watchers are places for calls that wait for entries of live sessions.
	watchers chan struct{}
	ready    chan fenced    // revocations in force, to be stored so
	known    atomic.Uint64  // index of a configuration that every node acts on; at the leader
	public   *http.ServeMux // for clients, and for other nodes that hand a call on
	mesh     *http.ServeMux // for other nodes only
}

// NewServer returns a Server.
func NewServer(d Deps) *Server {
	s := &Server{Deps: d, large: make(chan struct{}, maxLarge), past: make(chan struct{}, maxPast), watchers: make(chan struct{}, maxWatchers), ready: make(chan fenced, maxReady), public: http.NewServeMux(), mesh: http.NewServeMux()}
	s.routes()
	return s
}

func (s *Server) routes() {
	read := func(pattern string, action policy.Action, h handler) {
		s.public.HandleFunc(pattern, s.call(action, false, h))
	}
	change := func(pattern string, action policy.Action, h handler) {
		s.public.HandleFunc(pattern, s.call(action, true, h))
	}
	s.public.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	read("GET /v1/whoami", "", s.whoami)
	read("GET /v1/status", policy.StatusRead, s.status)
	read("GET /v1/sessions", policy.SessionsRead, s.sessions)
	read("GET /v1/events", policy.EventsRead, s.events)
	read("GET /v1/events/{seq}", policy.EventsRead, s.showEvent)
	read("GET /v1/state", policy.StateRead, s.stateAt)
	read("POST /v1/policy/explain", policy.PolicyExplain, s.explain)
	read("GET /v1/config", policy.StatusRead, s.config)
	change("POST /v1/config", policy.AdminApply, s.apply)
	change("POST /v1/cluster/tokens", policy.AdminCluster, s.makeToken)
	change("POST /v1/cluster/nodes/{name}/remove", policy.AdminCluster, s.removeNode)
	change("POST /v1/cluster/voters", policy.AdminCluster, s.setVoters)
	read("GET /v1/cluster/members", policy.StatusRead, s.members)
	change("POST /v1/cluster/backup", policy.AdminCluster, s.backup)
	change("POST /v1/cluster/nodes/{name}/rotate", policy.AdminCluster, s.rotate)
	read("GET /v1/approvals", policy.ApprovalsRead, s.listApprovals)
	read("GET /v1/approvals/{id}", policy.ApprovalsRead, s.showApproval)
	change("POST /v1/approvals/{id}/approve", "", s.vote(true))
	change("POST /v1/approvals/{id}/deny", "", s.vote(false))
	read("GET /v1/revocations", policy.StatusRead, s.listRevocations)
	read("GET /v1/revocations/{id}", "", s.showRevocation) // who may revoke may see how it goes
	change("POST /v1/revocations", policy.Revoke, s.revoke)
	change("POST /v1/revocations/{id}/undo", policy.Revoke, s.undo)
	read("GET /v1/recordings", policy.RecordingsRead, s.listObjects)
	read("GET /v1/recordings/object", policy.RecordingsRead, s.getObject)
	read("GET /v1/sessions/{id}/watch", policy.SessionsWatch, s.watch)
	read("GET /v1/log", policy.EventsRead, s.listLog)
	read("GET /v1/log/object", policy.EventsRead, s.getLog)
	s.public.HandleFunc("POST /v1/cluster/join", s.join)
	s.public.HandleFunc("POST /v1/signals/logout", s.logout)
	s.public.HandleFunc("POST /v1/signals/events", s.securityEvent)

	s.mesh.Handle("/v1/", s.public)
	s.mesh.HandleFunc("GET /mesh/v1/status", s.meshStatus)
	s.mesh.HandleFunc("GET /mesh/v1/head", s.meshHead)
	s.mesh.HandleFunc("GET /mesh/v1/features", s.meshFeatures)
	s.mesh.HandleFunc("GET /mesh/v1/sessions", s.meshSessions)
	s.mesh.HandleFunc("GET /mesh/v1/health", s.meshHealth)
	s.mesh.HandleFunc("POST /mesh/v1/propose", s.meshPropose)
	s.mesh.HandleFunc("GET /mesh/v1/folded", s.meshFolded)
	s.mesh.HandleFunc("GET /mesh/v1/revocations/{id}", s.meshRevocation)
	s.mesh.HandleFunc("POST /mesh/v1/leave", s.meshLeave)
	s.mesh.HandleFunc("POST /mesh/v1/cosign", s.meshCosign)
	s.mesh.HandleFunc("POST /mesh/v1/rotate", s.meshRotate)
	s.mesh.HandleFunc("POST /mesh/v1/renew", s.meshRenew)
	s.mesh.HandleFunc("POST /mesh/v1/renewed", s.meshRenewed)
}

// Handler serves clients.
func (s *Server) Handler() http.Handler { return s.guard(s.public) }

// MeshHandler serves other nodes, known by their certificates.
func (s *Server) MeshHandler() http.Handler {
	return s.guard(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v := s.State.View()
		if _, member := v.Nodes[tunnel.Peer(r.Context())]; !member {
			if head, _, _ := s.Store.Head(); v.Seq < head { // it has just started
				fail(w, &Problem{Code: "unavailable", Error: "this node has not read its events yet, and knows no members", Status: http.StatusMisdirectedRequest})
				return
			}
			fail(w, &Problem{Code: "forbidden", Error: "not a member of this cluster", Status: http.StatusForbidden})
			return
		}
		s.mesh.ServeHTTP(w, r)
	}))
}

// guard bounds bodies and turns a panic into an error for its own caller.
func (s *Server) guard(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler {
					panic(p)
				}
				s.Log.Error("panic in an API call", "path", r.URL.Path, "panic", p)
				fail(w, &Problem{Code: "internal", Error: "internal error; the node's log has more", Status: http.StatusInternalServerError})
			}
		}()
		h.ServeHTTP(w, r)
	})
}

// A request is an authenticated and permitted call.
type request struct {
	*http.Request
	body    []byte
	subject *policy.Subject
	proof   []byte
	id      event.ID // idempotency id, from the Idempotency-Key header or made here
	actor   event.Actor
}

func (r *request) decode(v any) error {
	dec := json.NewDecoder(bytes.NewReader(r.body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return &Failure{&Problem{Code: "invalid", Error: "the body is not what this call takes: " + err.Error(), Status: http.StatusBadRequest}}
	}
	return nil
}

// handler answers a permitted call with a value to be sent as JSON, or a nil
// value when it has written the answer itself.
type handler func(w http.ResponseWriter, r *request) (any, error)

func (s *Server) call(action policy.Action, change bool, h handler) http.HandlerFunc {
	return func(w http.ResponseWriter, hr *http.Request) {
		limit := int64(smallBody)
		if action == policy.AdminApply {
			limit = maxBody
			if err := s.Known(hr.Context(), hr); err != nil {
				_ = s.audit(hr, action, nil, "refuse", "unauthenticated", err.Error())
				fail(w, &Problem{Code: "unauthenticated", Error: err.Error(), Status: http.StatusUnauthorized})
				return
			}
			select {
			case s.large <- struct{}{}:
				defer func() { <-s.large }()
			default:
				fail(w, &Problem{Code: "unavailable", Error: "this node is reading other configurations: try again", Status: http.StatusServiceUnavailable})
				return
			}
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, hr.Body, limit))
		if err != nil {
			fail(w, &Problem{Code: "invalid", Error: fmt.Sprintf("reading the request: %v", err), Status: http.StatusRequestEntityTooLarge})
			return
		}
		peer := tunnel.Peer(hr.Context())
		freeze := action == policy.Revoke && peer != "" && hr.Header.Get(freezeHeader) != ""
		if change && peer != "" && !freeze && !s.Store.IsLeader() {
			// Before the credential is looked at: a signed request is good once.
			fail(w, &Problem{Code: "unavailable", Error: "this node is not the leader", Status: http.StatusMisdirectedRequest})
			return
		}
		if auth := hr.Header.Get("Authorization"); change && auth != "" && !strings.HasPrefix(auth, "Bearer ") && !hasKey(hr) {
			// What makes a signed change happen once is the key that its
			// signature covers: without one it could be handed on again.
			fail(w, problem(invalid("Idempotency-Key: a signed change needs one, 32 hexadecimal digits, chosen anew for each change")))
			return
		}
		subject, proof, err := s.Authenticate(hr.Context(), hr, body, peer != "")
		if err != nil {
			_ = s.audit(hr, action, nil, "refuse", "unauthenticated", err.Error())
			fail(w, &Problem{Code: "unauthenticated", Error: err.Error(), Status: http.StatusUnauthorized})
			return
		}
		if !change { // before it is judged: a caller's own change may be about that
			if p := s.reach(hr.Context(), hr); p != nil {
				fail(w, p)
				return
			}
		}
		b := state.BearerOf(subject).At(s.Node, "")
		if rev := s.State.View().Refuses(&b); rev != nil {
			_ = s.audit(hr, action, subject, "refuse", "revoked", rev.Why())
			fail(w, &Problem{Code: "forbidden", Error: rev.Why(), Status: http.StatusForbidden})
			return
		}
		if action != "" {
			if d := s.decide(hr, subject, action, policy.Resource{Type: policy.Cluster}); d.Effect != policy.Permit {
				_ = s.audit(hr, action, subject, "refuse", d.Rule, d.Reason)
				fail(w, &Problem{Code: "forbidden", Error: d.Reason + " (rule " + d.Rule + ")", Status: http.StatusForbidden})
				return
			}
		}
		if change && !freeze && !s.Store.IsLeader() {
			if leader, _ := s.Store.Leader(); leader == "" && action == policy.Revoke {
				s.freezeAll(hr, body)
			}
			s.toLeader(w, hr, body)
			return
		}
		req := &request{Request: hr, body: body, subject: subject, proof: proof, id: idempotencyID(hr)}
		req.actor = actorOf(hr, subject, s.Node, peer)
		if err := s.audit(hr, action, subject, "permit", "", ""); err != nil {
			s.Log.Error("an API call is refused since it cannot be recorded", "err", err)
			fail(w, &Problem{Code: "unavailable", Error: "this node cannot record now, and nothing happens unrecorded: try another node", Status: http.StatusServiceUnavailable})
			return
		}
		if freeze {
			s.freezeOnly(hr, body)
			reply(w, struct{}{})
			return
		}
		v, err := h(w, req)
		if err != nil {
			fail(w, problem(err))
			return
		}
		if v != nil {
			reply(w, v)
		}
	}
}

func (s *Server) decide(r *http.Request, subject *policy.Subject, action policy.Action, res policy.Resource) policy.Decision {
	d, _ := s.Decide(&policy.Request{
		Subject: subject, Pairs: []policy.Pair{{Action: action, Resource: res}},
		Context: policy.Context{Now: s.Now(), Protocol: "api", ClientAddr: clientIP(r)},
	})
	if d.Effect == policy.Hold {
		d.Effect, d.Reason = policy.Refuse, "approval rules do not apply to API calls: "+d.Reason
	}
	return d
}

func (s *Server) audit(r *http.Request, action policy.Action, subject *policy.Subject, effect, rule, reason string) error {
	e := &recording.Entry{
		Type: recording.Decided, Verb: r.Method + " " + r.URL.Path, Effect: effect, Rule: rule, Reason: reason,
		PolicyIndex: s.State.View().ConfigIndex,
		Detail:      map[string]string{"client": clientIP(r)},
	}
	if action != "" {
		e.Actions = []string{string(action)}
	}
	if subject != nil {
		e.Actor = subject.ID()
	}
	if peer := tunnel.Peer(r.Context()); peer != "" {
		e.Detail["via"] = peer
	}
	return s.Audit(e)
}

func clientIP(r *http.Request) string {
	if tunnel.Peer(r.Context()) != "" {
		return r.Header.Get("Sallyport-Client")
	}
	host := r.RemoteAddr
	if i := strings.LastIndexByte(host, ':'); i >= 0 {
		host = host[:i]
	}
	return strings.Trim(host, "[]")
}

func actorOf(r *http.Request, subject *policy.Subject, node, peer string) event.Actor {
	a := event.Actor{Principal: subject.ID(), Kind: event.Service, Authn: "oidc", Source: clientIP(r), Via: node}
	if subject.Kind == policy.User {
		a.Kind = event.Human
	}
	if subject.Provider == policy.BootstrapProvider {
		a.Authn, a.CertFP = "certificate", subject.TokenID
	}
	if peer != "" {
		a.Via = peer
	}
	return a
}

// idempotencyID derives the event's id from the caller's Idempotency-Key, so
// that a call sent twice, also to two nodes, happens once.
func idempotencyID(r *http.Request) event.ID {
	if k := r.Header.Get("Idempotency-Key"); len(k) == 32 {
		if id, err := event.ParseID(k); err == nil {
			return id
		}
	}
	return event.NewID()
}

func hasKey(r *http.Request) bool {
	_, err := event.ParseID(r.Header.Get("Idempotency-Key"))
	return err == nil
}

// leaderTries bounds how often a call is tried while a leader is elected.
const leaderTries = 20

var (
	errNotLeader = errors.New("not the leader any more") // or it knows too little yet: it has done nothing
	errUnsure    = errors.New("an earlier try may have been made, whatever the answer to this one says")
)

// taken says whether the leader's answer to a call is the caller's. After a try
// that nobody answered, a refusal is not: it says nothing of that try, whose
// change may be stored already, or be in the log and stored later. unsure says
// that there was one.
func taken(status int, unsure bool) error {
	switch {
	case status == http.StatusMisdirectedRequest:
		return errNotLeader
	case unsure && status >= 400 && status < 500:
		return errUnsure
	}
	return nil
}

// toLeader hands a call on. The leader authenticates the caller itself.
func (s *Server) toLeader(w http.ResponseWriter, r *http.Request, body []byte) {
	if id := event.NewID(); r.Header.Get("Idempotency-Key") == "" && strings.HasPrefix(r.Header.Get("Authorization"), "Bearer ") {
		r.Header.Set("Idempotency-Key", id.String()) // a signature would cover it
	}
	client := clientIP(r)
	if r.URL.Path == "/v1/cluster/backup" { // as long as bytes come; the leader gives up when none are taken
		_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
	}
	unsure := false // a try was not answered
	for try := 0; ; try++ {
		leader, _ := s.Store.Leader()
		if leader != "" && leader != s.Node {
			retry := false
			rp := &httputil.ReverseProxy{
				Rewrite: func(p *httputil.ProxyRequest) {
					p.Out.URL.Scheme, p.Out.URL.Host = "http", leader
					p.Out.Host = leader
					p.Out.Body, p.Out.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
					p.Out.Header.Set("Sallyport-Client", client)
				},
				Transport: s.Mesh.Transport(),
				ModifyResponse: func(resp *http.Response) error {
					if err := taken(resp.StatusCode, unsure); err != nil {
						return err
					}
					s.awaitSeq(r.Context(), resp.Header.Get(PositionHeader))
					return nil
				},
				ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
					if errors.Is(err, errUnsure) {
						fail(w, problem(raftstore.ErrUnknownOutcome))
						return
					}
					unsure = unsure || !errors.Is(err, errNotLeader)
					if retry = try < leaderTries && r.Context().Err() == nil; !retry {
						fail(w, &Problem{Code: "unavailable", Error: fmt.Sprintf("the leader %s cannot be reached: %v; try again", leader, err), Status: http.StatusServiceUnavailable})
					}
				},
				ErrorLog: slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
			}
			ctx, done := s.whileLeads(r.Context(), leader)
			rp.ServeHTTP(w, r.WithContext(ctx))
			done()
			if !retry {
				return
			}
		} else if leader == s.Node {
			fail(w, &Problem{Code: "unavailable", Error: "the cluster has just elected this node its leader; try again", Status: http.StatusServiceUnavailable})
			return
		} else if try >= leaderTries {
			fail(w, &Problem{Code: "unavailable", Error: "no quorum: the cluster has no leader, a majority of its voters must be running; see `sallyport status`", Status: http.StatusServiceUnavailable})
			return
		}
		select {
		case <-time.After(250 * time.Millisecond):
		case <-r.Context().Done():
			return
		}
	}
}

// whileLeads ends the context it returns when somebody else leads, so that
// nobody waits for the answer of a leader that has died. What it may have done
// all the same is found by the idempotency id when the call is tried again.
func (s *Server) whileLeads(ctx context.Context, leader string) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() { // ends with ctx
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if now, _ := s.Store.Leader(); now != "" && now != leader {
					cancel()
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return ctx, cancel
}

// awaitSeq waits, a little, until this node has folded the event that a call
// made, so that the caller's next call here sees it.
func (s *Server) awaitSeq(ctx context.Context, seq string) {
	n, err := strconv.ParseUint(seq, 10, 64)
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	for s.State.View().Seq < n {
		changed := s.State.Changed()
		if s.State.View().Seq >= n {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// done finds what an earlier try of the same call did.
func (s *Server) done(r *request, typ string) (event.Event, bool) {
	ev, ok, err := s.Store.ByID(r.id)
	return ev, err == nil && ok && ev.Type == typ && ev.Actor.Principal == r.subject.ID()
}

// propose appends on the leader and waits until this node has folded it.
func (s *Server) propose(w http.ResponseWriter, r *request, typ, aggregate string, expect uint64, payload any) (event.Event, error) {
	version, data, err := event.Encode(s.Store.FeatureLevel(), typ, payload)
	if err != nil {
		return event.Event{}, err
	}
	return s.append(r.Context(), w, event.Proposal{
		ID: r.id, Actor: r.actor, Type: typ, Version: version, Aggregate: aggregate, Expect: expect, Payload: data,
	})
}

func (s *Server) append(ctx context.Context, w http.ResponseWriter, batch ...event.Proposal) (event.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	events, err := s.Store.Append(ctx, batch...)
	if err != nil {
		return event.Event{}, err
	}
	last := events[len(events)-1]
	seq := strconv.FormatUint(last.Seq, 10)
	if w != nil {
		w.Header().Set(PositionHeader, seq)
	}
	s.awaitSeq(ctx, seq)
	return events[0], nil
}

// problem words an error for a caller.
func problem(err error) *Problem {
	var failure *Failure
	var notLeader *raftstore.NotLeaderError
	var conflict *raftstore.ConflictError
	var refusal *protocols.Refusal
	var level *event.LevelError
	switch {
	case errors.As(err, &level):
		return &Problem{Code: "unavailable", Error: "not every member of the cluster can read this yet: " + level.Error(), Status: http.StatusConflict}
	case errors.As(err, &failure):
		return failure.Problem
	case errors.As(err, &refusal):
		return &Problem{Code: "forbidden", Error: refusal.Reason + " (rule " + refusal.Rule + ")", Status: http.StatusForbidden}
	case errors.As(err, &conflict):
		return &Problem{Code: "conflict", Error: fmt.Sprintf("%s has changed meanwhile: look again and repeat", conflict.Aggregate), Status: http.StatusConflict}
	case errors.As(err, &notLeader):
		return &Problem{Code: "unavailable", Error: "this node is not the leader", Status: http.StatusMisdirectedRequest}
	case errors.Is(err, raftstore.ErrUnknownOutcome), errors.Is(err, context.DeadlineExceeded):
		return &Problem{Code: "unavailable", Error: "the cluster did not confirm in time, so the outcome is not known: look whether it happened before you repeat it (an API caller may repeat it with the same Idempotency-Key)", Status: http.StatusGatewayTimeout}
	}
	return &Problem{Code: "internal", Error: err.Error(), Status: http.StatusInternalServerError}
}

func invalid(format string, args ...any) error {
	return &Failure{&Problem{Code: "invalid", Error: fmt.Sprintf(format, args...), Status: http.StatusBadRequest}}
}

func notFound(format string, args ...any) error {
	return &Failure{&Problem{Code: "not-found", Error: fmt.Sprintf(format, args...), Status: http.StatusNotFound}}
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // the caller went away: nobody is left to tell
}

func fail(w http.ResponseWriter, p *Problem) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p)
}

// get fetches from another node over the mesh.
func (s *Server) get(ctx context.Context, node, path string, v any) error {
	return s.exchange(ctx, http.MethodGet, node, path, nil, v)
}

func (s *Server) exchange(ctx context.Context, method, node, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	u := url.URL{Scheme: "http", Host: node, Path: path}
	if p, q, ok := strings.Cut(path, "?"); ok {
		u.Path, u.RawQuery = p, q
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return err
	}
	resp, err := s.Mesh.Transport().RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return readReply(resp, out)
}

// readReply decodes an answer, or the Problem it holds.
func readReply(resp *http.Response, out any) error {
	if s, ok := out.(stream); ok && resp.StatusCode/100 == 2 {
		_, err := io.Copy(s, resp.Body)
		return err
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, 80<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		p := &Problem{Status: resp.StatusCode}
		if json.Unmarshal(data, p) != nil || p.Error == "" {
			p.Code, p.Error = "internal", fmt.Sprintf("the node answered %s", resp.Status)
		}
		return &Failure{p}
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(data, out)
}

// Failure is an answer that is not a success.
type Failure struct{ *Problem }

func (f *Failure) Error() string { return f.Problem.Error }

package api

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/approval"
	"github.com/sallyport/sallyport/node/session"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/node/tunnel"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/storetest"
	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/upload"
)

// rig is a server on a real store of one node, with a caller and a policy
// that the test sets.
type rig struct {
	*Server
	subject *policy.Subject
	permit  map[policy.Action]bool
	deaf    bool // nothing can be recorded
	grantor grantor
	live    live
	frozen  []event.Scope
	mu      sync.Mutex
	audited []recording.Entry
	asked   []policy.Action
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigAt(t, storetest.New(t, 1, nil).Leader())
}

func newRigAt(t *testing.T, n *storetest.Node) *rig {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	store, err := upload.Open(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	st := state.New(log)
	r := &rig{
		subject: &policy.Subject{Kind: policy.User, Provider: "sso", Name: "sam", IssuedAt: time.Now()},
		permit:  map[policy.Action]bool{},
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := n.Store.Follow(ctx, 1, st.Fold); err != nil && ctx.Err() == nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	r.Server = NewServer(Deps{
		Node: n.Name, Store: n.Store, State: st, Sessions: session.NewRegistry(1),
		Approvals:  approval.New(approval.Env{State: st, Now: time.Now, Log: log, Decide: r.decide}),
		Mesh:       tunnel.New(nil, func(string) (string, bool) { return "", false }, log),
		Recordings: store, Live: &r.live,
		Authenticate: func(_ context.Context, req *http.Request, _ []byte, _ bool) (*policy.Subject, []byte, error) {
			if req.Header.Get("Authorization") == "" {
				return nil, nil, errors.New("no credential")
			}
			return r.subject, []byte("proof"), nil
		},
		Decide: r.decide, DecideAt: judge,
		Known: func(_ context.Context, req *http.Request) error {
			if req.Header.Get("Authorization") == "" {
				return errors.New("no credential")
			}
			return nil
		},
		Grantor: &r.grantor, Lease: 100 * time.Millisecond, FreezeHere: func(_ event.ID, sc event.Scope) { r.frozen = append(r.frozen, sc) },
		Folded:      func() uint64 { return st.View().Seq },
		LocalStatus: func(context.Context) NodeStatus { return NodeStatus{} },
		Audit: func(e *recording.Entry) error {
			if r.deaf {
				return errors.New("disk full")
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.audited = append(r.audited, *e)
			return nil
		},
		Now: time.Now, Log: log,
	})
	return r
}

func (r *rig) decide(req *policy.Request) (policy.Decision, uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range req.Pairs {
		r.asked = append(r.asked, p.Action)
		if !r.permit[p.Action] {
			return policy.Decision{Rule: "default-deny", Reason: "no rule permits " + string(p.Action)}, 0
		}
	}
	return policy.Decision{Effect: policy.Permit, Rule: "test"}, 0
}

func (r *rig) call(method, path, body string, auth bool) (int, string) {
	req := httptest.NewRequest(method, path, strings.NewReader(body))
	if auth {
		req.Header.Set("Authorization", "Bearer x")
	}
	w := httptest.NewRecorder()
	r.Handler().ServeHTTP(w, req)
	data, _ := io.ReadAll(w.Result().Body)
	return w.Code, string(data)
}

// routes are all calls of the API and the action that each one is; a call
// without an action of its own is judged by its handler.
var routes = []struct {
	method, path, body string
	action             policy.Action
}{
	{"GET", "/v1/whoami", "", ""},
	{"GET", "/v1/status", "", policy.StatusRead},
	{"GET", "/v1/sessions", "", policy.SessionsRead},
	{"GET", "/v1/events?from=1", "", policy.EventsRead},
	{"GET", "/v1/events/1", "", policy.EventsRead},
	{"GET", "/v1/state", "", policy.StateRead},
	{"POST", "/v1/policy/explain", `{"subject":"ci/x","action":"status:read"}`, policy.PolicyExplain},
	{"GET", "/v1/config", "", policy.StatusRead},
	{"POST", "/v1/config", `{"files":[],"expect":0}`, policy.AdminApply},
	{"POST", "/v1/cluster/tokens", `{}`, policy.AdminCluster},
	{"POST", "/v1/cluster/nodes/n9/remove", `{"reason":"x"}`, policy.AdminCluster},
	{"GET", "/v1/approvals", "", policy.ApprovalsRead},
	{"GET", "/v1/approvals/x", "", policy.ApprovalsRead},
	{"POST", "/v1/approvals/x/approve?digest=00", `{}`, ""},
	{"POST", "/v1/approvals/x/deny?digest=00", `{}`, ""},
	{"GET", "/v1/revocations", "", policy.StatusRead},
	{"POST", "/v1/revocations", `{"subject":"ci/x","reason":"y"}`, policy.Revoke},
	{"GET", "/v1/revocations/x?wait=1s", "", ""},
	{"POST", "/v1/revocations/x/undo", `{"reason":"y"}`, policy.Revoke},
	{"GET", "/v1/recordings?prefix=sessions/", "", policy.RecordingsRead},
	{"GET", "/v1/recordings/object?key=sessions/x", "", policy.RecordingsRead},
	{"GET", "/v1/sessions/x/watch", "", policy.SessionsWatch},
}

func TestEveryCallIsAnAction(t *testing.T) {
	r := newRig(t)
	for _, rt := range routes {
		if code, body := r.call(rt.method, rt.path, rt.body, false); code != http.StatusUnauthorized {
			t.Errorf("%s %s without a credential: %d %s", rt.method, rt.path, code, body)
		}
		clear(r.permit)
		r.asked = nil
		code, body := r.call(rt.method, rt.path, rt.body, true)
		if rt.action == "" {
			continue
		}
		if code != http.StatusForbidden || !strings.Contains(body, string(rt.action)) {
			t.Errorf("%s %s without permission: %d %s", rt.method, rt.path, code, body)
		}
		// Everything else permitted is not enough.
		for _, a := range policy.Catalogue() {
			r.permit[a.Name] = a.Name != rt.action
		}
		if code, _ := r.call(rt.method, rt.path, rt.body, true); code != http.StatusForbidden {
			t.Errorf("%s %s passes without %s: %d", rt.method, rt.path, rt.action, code)
		}
		r.permit[rt.action] = true
		if code, body := r.call(rt.method, rt.path, rt.body, true); code == http.StatusForbidden || code == http.StatusUnauthorized {
			t.Errorf("%s %s with %s: %d %s", rt.method, rt.path, rt.action, code, body)
		}
	}
	if r.State.View().Refuses(&state.Bearer{Subject: "ci/x", IssuedAt: time.Now()}) == nil {
		t.Error("the permitted revocation is not in the state")
	}
}

func TestNothingHappensUnrecorded(t *testing.T) {
	r := newRig(t)
	r.permit[policy.Revoke] = true
	r.deaf = true
	if code, body := r.call("POST", "/v1/revocations", `{"subject":"ci/x","reason":"y"}`, true); code != http.StatusServiceUnavailable {
		t.Fatalf("a call that cannot be recorded: %d %s", code, body)
	}
	if r.State.View().Refuses(&state.Bearer{Subject: "ci/x", IssuedAt: time.Now()}) != nil {
		t.Fatal("it happened all the same")
	}
}

func TestRevokedCallerIsRefused(t *testing.T) {
	r := newRig(t)
	r.permit[policy.Revoke], r.permit[policy.StatusRead] = true, true
	if code, body := r.call("POST", "/v1/revocations", `{"subject":"sso/sam","reason":"left"}`, true); code != http.StatusOK {
		t.Fatalf("revoke: %d %s", code, body)
	}
	if code, body := r.call("GET", "/v1/revocations", "", true); code != http.StatusForbidden || !strings.Contains(body, "left") {
		t.Fatalf("a revoked caller: %d %s", code, body)
	}
}

func TestBadInput(t *testing.T) {
	r := newRig(t)
	for _, a := range policy.Catalogue() {
		r.permit[a.Name] = true
	}
	for _, c := range []struct{ method, path, body, want string }{
		{"POST", "/v1/revocations", `{"subject":"ci/x","reason":""}`, "reason"},
		{"POST", "/v1/revocations", `{"subject":"nobody","reason":"y"}`, "provider/name"},
		{"POST", "/v1/revocations", `{"subject":"ci/x","reason":"y","force":true}`, "force"},
		{"POST", "/v1/config", `{"files":[{"path":"a.cedar","data":"cGVybWl0KA=="}],"expect":0}`, "nothing was changed"},
		{"POST", "/v1/cluster/tokens", `{"ttl_ns":1}`, "between"},
		{"GET", "/v1/events?from=0", "", "from"},
		{"GET", "/v1/recordings?prefix=", "", "prefix"},
		{"GET", "/v1/recordings/object?key=../etc/passwd", "", "key"},
		{"POST", "/v1/approvals/none/approve?digest=00", `{}`, "no approval request"},
		{"POST", "/v1/cluster/join", `{"token_id":"x","secret":"y","name":"n7"}`, "join token"},
	} {
		code, body := r.call(c.method, c.path, c.body, true)
		if code < 400 || code >= 500 || !strings.Contains(body, c.want) {
			t.Errorf("%s %s %s: %d %s; want %q", c.method, c.path, c.body, code, body, c.want)
		}
	}
	if code, _ := r.call("POST", "/v1/revocations", strings.Repeat("x", maxBody+1), true); code != http.StatusRequestEntityTooLarge {
		t.Errorf("a body above the limit: %d", code)
	}
}

// The same Idempotency-Key is the same revocation, not two.
func TestIdempotency(t *testing.T) {
	r := newRig(t)
	r.permit[policy.Revoke] = true
	send := func(subject string) (int, string) {
		req := httptest.NewRequest("POST", "/v1/revocations", strings.NewReader(`{"subject":"`+subject+`","reason":"y"}`))
		req.Header.Set("Authorization", "Bearer x")
		req.Header.Set("Idempotency-Key", "000102030405060708090a0b0c0d0e0f")
		w := httptest.NewRecorder()
		r.Handler().ServeHTTP(w, req)
		return w.Code, w.Body.String()
	}
	for range 2 {
		if code, body := send("ci/x"); code != http.StatusOK {
			t.Fatalf("%d %s", code, body)
		}
	}
	if n := r.State.View().Revocations.Len(); n != 1 {
		t.Fatalf("%d revocations from one key", n)
	}
	if code, body := send("ci/other"); code < 400 || !strings.Contains(body, "Idempotency-Key") {
		t.Fatalf("another call under the same key: %d %s", code, body)
	}
}

// Over the mesh only members speak, and no certificate means no peer.
func TestMeshRefusesStrangers(t *testing.T) {
	r := newRig(t)
	w := httptest.NewRecorder()
	r.MeshHandler().ServeHTTP(w, httptest.NewRequest("POST", "/mesh/v1/propose", strings.NewReader("{}")))
	if w.Code != http.StatusForbidden {
		t.Fatalf("a stranger on the mesh: %d %s", w.Code, w.Body)
	}
}

// A signed change without the key that its signature would cover is refused
// before anything is done: it could be repeated by whoever has seen it.
func TestSignedChangeNeedsAKey(t *testing.T) {
	r := newRig(t)
	r.permit[policy.Revoke] = true
	req := httptest.NewRequest("POST", "/v1/revocations", strings.NewReader(`{"subject":"ci/x","reason":"y"}`))
	req.Header.Set("Authorization", "Sallyport-Certificate x")
	w := httptest.NewRecorder()
	r.Handler().ServeHTTP(w, req)
	if w.Code != http.StatusBadRequest || r.State.View().Revocations.Len() != 0 {
		t.Fatalf("%d %s, %d revocations", w.Code, w.Body, r.State.View().Revocations.Len())
	}
}

package api

import (
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/node/tunnel"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore/storetest"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// A refusal is the caller's answer unless an earlier try was not answered: what
// that one proposed may be stored all the same.
func TestRefusalAfterAnUnansweredTry(t *testing.T) {
	for _, c := range []struct {
		status int
		unsure bool
		want   error
	}{
		{http.StatusOK, false, nil},
		{http.StatusOK, true, nil},
		{http.StatusConflict, false, nil},
		{http.StatusConflict, true, errUnsure},
		{http.StatusForbidden, false, nil},
		{http.StatusForbidden, true, errUnsure},
		{http.StatusMisdirectedRequest, false, errNotLeader},
		{http.StatusMisdirectedRequest, true, errNotLeader},
		{http.StatusGatewayTimeout, true, nil},
	} {
		if err := taken(c.status, c.unsure); !errors.Is(err, c.want) {
			t.Errorf("%d, unsure %v: %v, want %v", c.status, c.unsure, err, c.want)
		}
	}
}

// A node that has just started knows no members before it has read its events,
// and may lead already. To its peers that is no refusal.
func TestStrangerBeforeTheEventsAreRead(t *testing.T) {
	r := newRig(t)
	r.permit[policy.Revoke] = true
	if status, body := r.call("POST", "/v1/revocations", `{"subject": "sso/mallory", "reason": "a test", "timeout_ns": 1}`, true); status != http.StatusOK {
		t.Fatalf("%d %s", status, body)
	}
	ask := func(s *Server) int {
		w := httptest.NewRecorder()
		s.MeshHandler().ServeHTTP(w, httptest.NewRequest("GET", "/mesh/v1/health", nil))
		return w.Code
	}
	if got := ask(r.Server); got != http.StatusForbidden {
		t.Errorf("a stranger at a node that knows its members: %d", got)
	}
	d := r.Server.Deps
	d.State = state.New(slog.New(slog.DiscardHandler)) // nothing is folded into it
	if got := ask(NewServer(d)); got != http.StatusMisdirectedRequest {
		t.Errorf("a peer at a node that has not read its events: %d", got)
	}
}

// A leader that dies with a call may have proposed it, and it may become stored.
// What the next one says of the second try is then not the answer.
func TestLeaderDiesWithACall(t *testing.T) {
	c := storetest.New(t, 3, nil)
	leader, follower := c.Leader(), c.Followers()[0]
	var calls atomic.Int32
	answers := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if calls.Add(1) == 1 {
			panic(http.ErrAbortHandler) // the connection ends
		}
		fail(w, &Problem{Code: "conflict", Status: http.StatusConflict})
	})}
	go func() { _ = answers.Serve(leader.Endpoint.Listener(transport.ClassMesh)) }() // ends with Close
	t.Cleanup(func() { answers.Close() })

	r := newRigAt(t, follower)
	r.permit[policy.Revoke] = true
	r.Mesh = tunnel.New(follower.Endpoint, func(string) (string, bool) { return leader.Addr, true }, r.Log)
	const call = `{"subject": "sso/mallory", "reason": "a test"}`
	if status, body := r.call("POST", "/v1/revocations", call, true); status != http.StatusGatewayTimeout {
		t.Errorf("after a try that was not answered: %d %s", status, body)
	}
	if status, body := r.call("POST", "/v1/revocations", call, true); status != http.StatusConflict {
		t.Errorf("when each try was answered: %d %s", status, body)
	}
	if n := calls.Load(); n != 3 {
		t.Errorf("the leader was called %d times, want 3", n)
	}
}

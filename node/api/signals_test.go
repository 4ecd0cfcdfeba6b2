package api

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/raftstore/event"
)

// newest raises the rig's cluster to the newest feature level.
func (r *rig) newest(t *testing.T) {
	t.Helper()
	if _, err := r.Store.Append(t.Context(), event.RaiseTo(event.Level, r.Store.Version(event.FeatureLevelAggregate), event.NewID(), event.Actor{Principal: "n1", Kind: event.Node})); err != nil {
		t.Fatal(err)
	}
}

func TestSignals(t *testing.T) {
	r := newRig(t)
	r.newest(t)
	at := time.Now().Truncate(time.Second)
	logout := identity.Signal{Provider: "sso", Issuer: "https://sso.example", ID: "j1", Event: identity.EventLogout, Subject: "alice", At: at}
	r.LogoutToken = func(_ context.Context, token string) ([]identity.Signal, error) {
		switch token {
		case "good":
			return []identity.Signal{logout}, nil
		case "down":
			return nil, &protocols.AuthError{Code: "issuer-unavailable", Reason: "no keys"}
		}
		return nil, &protocols.AuthError{Code: "bad-signature", Reason: "not theirs"}
	}
	r.SecurityEvent = func(_ context.Context, token string) ([]identity.Signal, error) {
		switch token {
		case "session":
			return []identity.Signal{{Provider: "sso", Issuer: "https://sso.example", ID: "j2", Event: identity.EventSessionRevoked, Claim: "sid", Value: "s-1", At: at, Reason: "stolen"}}, nil
		case "verification":
			return []identity.Signal{{Provider: "sso", Issuer: "https://sso.example", ID: "j3", Event: identity.EventVerification, At: at}}, nil
		}
		return nil, &protocols.AuthError{Code: "wrong-audience", Reason: "not for us"}
	}
	for _, c := range []struct {
		path, body string
		status     int
		has        string
	}{
		{"/v1/signals/logout", "logout_token=good", 200, ""},
		{"/v1/signals/logout", "logout_token=good", 200, ""}, // delivered again
		{"/v1/signals/logout", "logout_token=good&logout_token=good", 400, "invalid_request"},
		{"/v1/signals/logout", "logout_token=bad", 400, "not theirs"},
		{"/v1/signals/logout", "logout_token=down", 503, "no keys"},
		{"/v1/signals/events", "session", 202, ""},
		{"/v1/signals/events", "verification", 202, ""},
		{"/v1/signals/events", "other", 400, "invalid_audience"},
		{"/v1/signals/events", strings.Repeat("x", smallBody+1), 400, "too large"},
	} {
		if status, body := r.call(http.MethodPost, c.path, c.body, false); status != c.status || !strings.Contains(body, c.has) {
			t.Errorf("%s %.40s: %d %s, want %d with %q", c.path, c.body, status, body, c.status, c.has)
		}
	}
	v := r.State.View()
	if v.Revocations.Len() != 2 {
		t.Fatalf("%d revocations, want 2", v.Revocations.Len())
	}
	alice := state.Bearer{Subject: "sso/alice", IssuedAt: at}
	rev := v.Refuses(&alice)
	if rev == nil || !strings.Contains(rev.Why(), "logged out") || rev.Final() == "" {
		t.Fatalf("a token from before the logout passes, or says %v", rev)
	}
	if alice.IssuedAt = at.Add(time.Second); v.Refuses(&alice) != nil {
		t.Error("a token from after the logout is refused")
	}
	sid := state.Bearer{Subject: "sso/bob", Claims: map[string]any{"sid": "s-1"}, IssuedAt: at.Add(-time.Hour)}
	if rev := v.Refuses(&sid); rev == nil || !strings.Contains(rev.Reason, "stolen") {
		t.Errorf("a token of the session passes: %v", rev)
	}
	if e := r.audited[0]; e.Verb != "POST /v1/signals/logout" || e.Effect != "permit" || e.Detail["provider"] != "sso" {
		t.Errorf("audited %+v", e)
	}

	r.deaf = true
	logout.ID = "j9"
	if status, _ := r.call(http.MethodPost, "/v1/signals/logout", "logout_token=good", false); status < 500 || r.State.View().Revocations.Len() != 2 {
		t.Errorf("an unrecorded signal was taken: %d", status)
	}
}

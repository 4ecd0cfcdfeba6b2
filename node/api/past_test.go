package api

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore/event"
)

// judge decides as a node does.
func judge(v *state.View, node string, req *policy.Request) policy.Decision {
	b := state.BearerOf(req.Subject).At(node, "")
	if rev := v.Refuses(&b); rev != nil {
		return policy.Decision{Rule: "revocation/" + rev.ID, Reason: rev.Why()}
	}
	if v.Config == nil {
		return policy.Decision{Rule: "default-deny", Reason: "no configuration"}
	}
	return v.Config.Policies.Decide(req)
}

// pastRig is a rig with a past: the index after each step.
func pastRig(t *testing.T) (*rig, map[string]uint64) {
	r := newRig(t)
	r.DecideAt = judge
	for _, a := range policy.Catalogue() {
		r.permit[a.Name] = true
	}
	at := map[string]uint64{}
	put := func(step, typ, aggregate string, payload any) {
		t.Helper()
		data, err := json.Marshal(payload)
		if err != nil {
			t.Fatal(err)
		}
		ev, err := r.append(t.Context(), nil, event.Proposal{ID: event.NewID(), Type: typ, Version: 1, Aggregate: aggregate, Expect: event.Any, Payload: data})
		if err != nil {
			t.Fatal(err)
		}
		at[step] = ev.Index
	}
	config := func(rules string) event.ConfigApplied {
		return event.ConfigApplied{Files: []event.ConfigFile{{Path: "a.cedar", Data: []byte(`@id("admins") permit(principal in Group::"admins", action, resource);` + "\n" + rules)},
			{Path: "p.yaml", Data: []byte(`kind: IdentityProvider
name: ci
issuer: https://ci.example.com
audience: https://sallyport.example
subjects: workload
require: {tenant: [acme]}
claims: [repo, tenant]
groups: [jobs]
`)}}}
	}
	put("created", event.TypeClusterCreated, "cluster", event.ClusterCreated{ID: "c", Node: event.NodeInfo{Name: "n1", Addr: "a:1", Role: "voter"}})
	put("first", event.TypeConfigApplied, "config", config(""))
	put("open", event.TypeConfigApplied, "config", config(`@id("readers") permit(principal in Group::"jobs", action == Action::"status:read", resource);`))
	put("asked", event.TypeApprovalAsked, "approval/a1", event.ApprovalAsked{ID: "a1", Subject: "ci/x", Count: 1, Expires: time.Now().Add(time.Hour)})
	put("revoked", event.TypeRevoked, "revocation/r1", event.Revoked{ID: "r1", Subject: "ci/job", Reason: "leak"})
	put("ended", event.TypeApprovalEnded, "approval/a1", event.ApprovalEnded{ID: "a1", How: "used"})
	put("undone", event.TypeRevocationUndone, "revocation/r1", event.RevocationUndone{ID: "r1", Reason: "false alarm"})
	put("joined", event.TypeNodeJoined, "node/n2", event.NodeJoined{Node: event.NodeInfo{Name: "n2", Addr: "a:2", Role: "voter"}})
	put("closed", event.TypeConfigApplied, "config", config(`@id("nobody") forbid(principal in Group::"jobs", action, resource);`))
	return r, at
}

func (r *rig) json(t *testing.T, method, path, body string, out any) {
	t.Helper()
	code, answer := r.call(method, path, body, true)
	if code != http.StatusOK {
		t.Fatalf("%s %s: %d %s", method, path, code, answer)
	}
	if err := json.Unmarshal([]byte(answer), out); err != nil {
		t.Fatal(err)
	}
}

func TestStateAt(t *testing.T) {
	r, at := pastRig(t)
	for _, c := range []struct {
		step                          string
		config                        string
		nodes, revocations, approvals int
	}{
		{"created", "", 1, 0, 0},
		{"first", "first", 1, 0, 0},
		{"open", "open", 1, 0, 0},
		{"asked", "open", 1, 0, 1},
		{"revoked", "open", 1, 1, 1},
		{"ended", "open", 1, 1, 0},
		{"undone", "open", 1, 0, 0},
		{"joined", "open", 2, 0, 0},
		{"closed", "closed", 2, 0, 0},
	} {
		var byIndex, byTime StateAt
		r.json(t, "GET", fmt.Sprintf("/v1/state?at=%d", at[c.step]), "", &byIndex)
		if byIndex.Index != at[c.step] || byIndex.ConfigIndex != at[c.config] || len(byIndex.Nodes) != c.nodes || len(byIndex.Revocations) != c.revocations || len(byIndex.Approvals) != c.approvals {
			t.Errorf("%s: %+v", c.step, byIndex)
		}
		r.json(t, "GET", "/v1/state?at="+byIndex.Time.Format(time.RFC3339Nano), "", &byTime)
		if byTime.Seq != byIndex.Seq {
			t.Errorf("%s: by time event %d, by index %d", c.step, byTime.Seq, byIndex.Seq)
		}
	}
	var now StateAt
	r.json(t, "GET", "/v1/state", "", &now)
	if now.Index != at["closed"] || now.ConfigDigest == "" || len(now.Providers) != 1 {
		t.Errorf("now: %+v", now)
	}
	var none StateAt
	r.json(t, "GET", "/v1/state?at=0", "", &none)
	if none.Seq != 0 || len(none.Nodes) != 0 {
		t.Errorf("before the first event: %+v", none)
	}
	for _, bad := range []string{"yesterday", "-1", "99999999", time.Now().Add(time.Hour).UTC().Format(time.RFC3339)} {
		if code, body := r.call("GET", "/v1/state?at="+bad, "", true); code != http.StatusBadRequest {
			t.Errorf("at=%s: %d %s", bad, code, body)
		}
	}
}

func TestShowEvent(t *testing.T) {
	r, _ := pastRig(t)
	var e EventInfo
	r.json(t, "GET", "/v1/events/1", "", &e)
	if e.Seq != 1 || e.Type != event.TypeClusterCreated {
		t.Fatalf("%+v", e)
	}
	for path, want := range map[string]int{"/v1/events/0": 400, "/v1/events/x": 400, "/v1/events/999": 404} {
		if code, body := r.call("GET", path, "", true); code != want {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
}

func TestExplain(t *testing.T) {
	r, at := pastRig(t)
	const job = `"subject":"ci/job","groups":["jobs"],"action":"status:read"`
	for _, c := range []struct {
		step, body   string
		effect, rule string
		revocations  int
	}{
		{"created", job, "refuse", "default-deny", 0},
		{"first", job, "refuse", "default-deny", 0},
		{"open", job, "permit", "readers", 0},
		{"revoked", job, "refuse", "revocation/r1", 1},
		{"revoked", `"subject":"ci/other","groups":["jobs"],"action":"status:read"`, "permit", "readers", 0},
		{"undone", job + `,"issued_at":"2020-01-01T00:00:00Z"`, "refuse", "revocation/r1", 0}, // issued before the undoing
		{"closed", `"subject":"ci/other","groups":["jobs"],"action":"status:read"`, "refuse", "nobody", 0},
		{"closed", `"subject":"sso/sam","groups":["admins"],"action":"admin:apply"`, "permit", "admins", 0},
		{"open", `"token":{"iss":"https://ci.example.com","aud":"https://sallyport.example","sub":"t","iat":1700000000,"tenant":"acme"},"action":"status:read"`, "permit", "readers", 0},
	} {
		var e Explanation
		r.json(t, "POST", "/v1/policy/explain", fmt.Sprintf(`{"at":"%d",%s}`, at[c.step], c.body), &e)
		if e.Effect != c.effect || e.Rule != c.rule || len(e.Revocations) != c.revocations || e.Index != at[c.step] {
			t.Errorf("%s %s: %+v", c.step, c.body, e)
		}
		if c.rule == "readers" && (e.Where != "a.cedar:2" || !strings.Contains(e.Text, "status:read")) {
			t.Errorf("%s: the rule is not shown: %+v", c.step, e.Verdict)
		}
	}
	for name, c := range map[string]struct{ body, want string }{
		"nothing asked":      {`"subject":"ci/x"`, "statement, or an action"},
		"both":               {`"subject":"ci/x","action":"connect","statement":"SELECT 1"`, "not both"},
		"no subject":         {`"action":"status:read"`, "provider/name"},
		"no such action":     {`"subject":"ci/x","action":"fly"`, "no \\\"fly\\\""},
		"no target":          {`"subject":"ci/x","action":"connect","target":"t","database":"d"`, "no target"},
		"wrong resource":     {`"subject":"ci/x","action":"postgres:select"`, "resource"},
		"another tenant":     {`"token":{"iss":"https://ci.example.com","aud":"https://sallyport.example","sub":"t","iat":1,"tenant":"evil"},"action":"status:read"`, "tenant"},
		"nobody's token":     {`"token":{"iss":"https://elsewhere","aud":"https://sallyport.example"},"action":"status:read"`, "no identity provider"},
		"token and subject":  {`"token":{"iss":"x"},"subject":"ci/x","action":"status:read"`, "either"},
		"claims of no kind":  {`"subject":"ci/x","claims":{"a":{"b":1}},"action":"status:read"`, "claim"},
		"statement, nowhere": {`"subject":"ci/x","statement":"SELECT 1"`, "target"},
	} {
		code, body := r.call("POST", "/v1/policy/explain", fmt.Sprintf(`{"at":"%d",%s}`, at["open"], c.body), true)
		if code != http.StatusBadRequest && code != http.StatusNotFound || !strings.Contains(body, c.want) {
			t.Errorf("%s: %d %s; want %q", name, code, body, c.want)
		}
	}
	// Work is bounded.
	for range maxPast {
		r.past <- struct{}{}
	}
	if code, body := r.call("GET", fmt.Sprintf("/v1/state?at=%d", at["open"]), "", true); code != http.StatusServiceUnavailable {
		t.Errorf("more questions than a node answers at a time: %d %s", code, body)
	}
}

func TestResourceOf(t *testing.T) {
	actions := map[policy.Action]policy.ActionInfo{}
	for _, a := range policy.Catalogue() {
		actions[a.Name] = a
	}
	for _, c := range []struct {
		action policy.Action
		target string
		names  []string
		want   policy.ResourceType
	}{
		{policy.StatusRead, "", nil, policy.Cluster},
		{policy.Connect, "t", nil, policy.Target},
		{policy.PostgresSelect, "t", []string{"public", "users"}, policy.Table},
		{policy.PostgresSelect, "t", []string{"public", "users", "email"}, policy.Column},
		{policy.PostgresCreateTable, "t", []string{"public"}, policy.Schema},
		{policy.PostgresSet, "t", nil, policy.Database},
		{policy.PostgresCall, "t", []string{"public", "f"}, policy.Function},
		{policy.PostgresSelect, "t", nil, ""},
		{policy.PostgresSelect, "", nil, ""},
	} {
		a := actions[c.action]
		r, ok := resourceOf(&a, &ExplainRequest{Target: c.target, Database: "d", Resource: c.names})
		if ok != (c.want != "") || r.Type != c.want {
			t.Errorf("%s on %v: %+v %v, want %q", c.action, c.names, r, ok, c.want)
		}
	}
}

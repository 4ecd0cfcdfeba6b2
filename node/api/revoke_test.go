package api

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fence"
)

// grantor answers like a leader whose nodes are as the test says.
type grantor struct {
	mu      sync.Mutex
	nodes   []fence.NodeReport // of every revocation; none: all confirmed
	err     error
	frozen  []fence.ID
	aborted []fence.ID
	limits  []time.Duration
}

func (g *grantor) set(err error, nodes ...fence.NodeReport) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.nodes, g.err = nodes, err
}

func (g *grantor) Freeze(id fence.ID, _ []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.frozen = append(g.frozen, id)
}

func (g *grantor) Abort(id fence.ID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.aborted = append(g.aborted, id)
}

func (g *grantor) Await(ctx context.Context, seq uint64, limit time.Duration) (fence.Report, error) {
	for {
		g.mu.Lock()
		r := fence.Report{Seq: seq, Complete: true, Nodes: g.nodes}
		err := g.err
		if n := len(g.limits); n == 0 || g.limits[n-1] != limit {
			g.limits = append(g.limits, limit)
		}
		g.mu.Unlock()
		for _, n := range r.Nodes {
			r.Complete = r.Complete && n.State != fence.Unconfirmed
		}
		if err != nil {
			return fence.Report{Seq: seq}, err
		}
		if r.Complete {
			return r, nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return r, nil
		}
	}
}

// A revocation that some node has not acknowledged returns in time, says until
// when that node may go on, and is brought to its end without the caller.
func TestRevocationGoesOn(t *testing.T) {
	r := newRig(t)
	r.permit[policy.Revoke], r.permit[policy.StatusRead] = true, true
	ends := time.Now().Add(time.Minute)
	r.grantor.set(nil,
		fence.NodeReport{Node: "n1", State: fence.Confirmed, At: time.Now(), Level: 1, Note: []byte(`{"sessions":2,"violations":1,"bytes":7}`)},
		fence.NodeReport{Node: "n2", State: fence.Unconfirmed, At: ends, Reason: "it does not answer"},
		fence.NodeReport{Node: "n3", State: fence.Unconfirmed, Reason: "it does not answer"})
	code, body := r.call("POST", "/v1/revocations", `{"subject":"ci/x","reason":"y","timeout_ns":50000000}`, true)
	var info RevocationInfo
	if err := json.Unmarshal([]byte(body), &info); code != http.StatusOK || err != nil {
		t.Fatalf("%d %s", code, body)
	}
	if info.Complete || len(info.Nodes) != 3 || info.Limit == "" {
		t.Fatalf("%+v", info)
	}
	if n := info.Nodes[0]; n.State != event.FenceConfirmed || n.Sessions != 2 || n.Violations != 1 || n.Bytes != 7 || n.Level != 1 {
		t.Errorf("%+v", n)
	}
	if n := info.Nodes[1]; n.State != event.FenceUnconfirmed || !n.LeaseEnds.Equal(ends) || n.NoBound {
		t.Errorf("%+v", n)
	}
	if n := info.Nodes[2]; !n.NoBound {
		t.Errorf("%+v", n)
	}
	if len(r.grantor.frozen) == 0 || len(r.grantor.aborted) != 0 {
		t.Errorf("frozen %v, aborted %v", r.grantor.frozen, r.grantor.aborted)
	}

	// The caller has left. The nodes stop; whoever leads finds it.
	if done, _ := r.look(t.Context(), 0); len(done) != 0 {
		t.Fatalf("in force already: %v", done)
	}
	r.grantor.set(nil, fence.NodeReport{Node: "n1", State: fence.Confirmed, At: time.Now()}, fence.NodeReport{Node: "n2", State: fence.Expired, At: time.Now()})
	done, _ := r.look(t.Context(), 0)
	if len(done) != 1 || done[0].rev.ID != info.ID || done[0].nodes[1].State != event.FenceExpired {
		t.Fatalf("%+v", done)
	}
	if code, body := r.call("GET", "/v1/revocations/"+info.ID+"?wait=1s", "", true); code != http.StatusOK || !strings.Contains(body, `"complete":true`) {
		t.Fatalf("%d %s", code, body)
	}
	for permitted, want := range map[policy.Action]int{policy.Revoke: http.StatusOK, policy.StatusRead: http.StatusOK, policy.EventsRead: http.StatusForbidden} {
		clear(r.permit)
		r.permit[permitted] = true
		if code, body := r.call("GET", "/v1/revocations/"+info.ID, "", true); code != want {
			t.Errorf("who may %s: %d %s", permitted, code, body)
		}
	}
	r.permit[policy.StatusRead] = true
	r.grantor.set(fence.ErrNotLeading)
	if done, _ := r.look(t.Context(), 0); len(done) != 0 {
		t.Fatal("a node that does not lead judges")
	}
	if code, body := r.call("GET", "/v1/revocations/"+info.ID, "", true); code != http.StatusOK || strings.Contains(body, `"complete":true`) {
		t.Fatalf("%d %s", code, body)
	}
}

func TestScopesRefused(t *testing.T) {
	r := newRig(t)
	r.permit[policy.Revoke] = true
	r.subject.Groups = []string{"security"}
	for scope, want := range map[string]string{
		`{}`:                                  "name which one",
		`{"kind":"subject","value":"nobody"}`: "provider/name",
		`{"kind":"claim","name":"x","value":"y"}`:                     "passes it on",
		`{"kind":"claim","value":"y"}`:                                "a name and a value",
		`{"kind":"group","name":"x","value":"y"}`:                     "a name and a value",
		`{"kind":"group","value":"security"}`:                         "your own access",
		`{"kind":"target","value":"none"}`:                            "there is none",
		`{"kind":"node","value":"none"}`:                              "none is named",
		`{"kind":"everything","value":"x"}`:                           "none of subject",
		`{"kind":"token","value":"` + strings.Repeat("x", 129) + `"}`: "must not be stored",
	} {
		code, body := r.call("POST", "/v1/revocations", `{"scope":`+scope+`,"reason":"y"}`, true)
		if code != http.StatusBadRequest || !strings.Contains(body, want) {
			t.Errorf("%s: %d %s; want %q", scope, code, body, want)
		}
	}
	if len(r.grantor.frozen) != 0 || r.State.View().Revocations.Len() != 0 {
		t.Error("something happened all the same")
	}
}

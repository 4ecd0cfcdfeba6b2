package chaos

import (
	"encoding/json"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/node/api"
)

// lease is the nodes' default.
const lease = 2500 * time.Millisecond

// TestRevokeWithAStoppedNode stops a node's process while a session passes data
// there, and revokes. The revocation returns when that node's lease has
// certainly ended; when the process goes on, nothing of the session passes but
// what level 1 allows: one chunk for each direction.
func TestRevokeWithAStoppedNode(t *testing.T) {
	s := start(t, cluster.Options{Nodes: 3})
	ctx := t.Context()
	leader, err := s.Leader(ctx)
	s.must(t, err)
	stopped := s.Nodes[0]
	if stopped == leader {
		stopped = s.Nodes[1]
	}
	conn := s.login(t, stopped, "bench", s.job(t, "busy", "main", nil))
	var answers atomic.Int64
	ended := make(chan error, 1)
	go func() {
		for {
			if err := conn.simple(ctx, "SELECT repeat('x', 1000)"); err != nil {
				ended <- err
				return
			}
			answers.Add(1)
		}
	}()
	for end := time.Now().Add(30 * time.Second); answers.Load() < 10; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the session passes nothing")
		}
	}

	s.must(t, stopped.Pause())
	defer func() { _ = stopped.Continue() }()
	began := time.Now()
	out := s.cli(t, on(leader, s.AdminEnv()), "revoke", "--subject", subject("busy"), "--reason", "test", "--json")
	took := time.Since(began)
	var r api.RevocationInfo
	s.must(t, json.Unmarshal([]byte(out), &r))
	for _, n := range r.Nodes {
		want := "confirmed"
		if n.Node == stopped.Name {
			want = "fenced by expiry"
		}
		if n.State != want {
			t.Errorf("%s: %s %s, want %s", n.Node, n.State, n.Detail, want)
		}
	}
	if len(r.Nodes) != 3 {
		t.Errorf("%d nodes in the report", len(r.Nodes))
	}
	// The protocol's bound is 1.03 leases from the commit; the rest is for a
	// machine that does much else.
	if took > lease*103/100+15*time.Second {
		t.Errorf("revoke took %v with leases of %v", took, lease)
	}
	t.Logf("revoke took %v, %.3f leases", took, float64(took)/float64(lease))

	before := answers.Load()
	s.must(t, stopped.Continue())
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Error("the session goes on after its node has heard of the revocation")
	}
	// What the kernel had of an answer counts as one, too.
	if got := answers.Load() - before; got > 1 {
		t.Errorf("%d answers passed after the revocation had returned", got)
	}
	_, err = s.tryLogin(t, stopped, "bench", s.job(t, "busy", "main", nil), nil)
	refused(t, err, "28000", "revoked")
}

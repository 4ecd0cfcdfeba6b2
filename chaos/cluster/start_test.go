package cluster

import (
	"strings"
	"testing"
)

// TestStart starts everything, logs in through each node, and takes the leader
// away and brings it back.
func TestStart(t *testing.T) {
	c := StartTest(t, Options{})
	ctx := t.Context()
	token, err := c.CIToken("main", "alice")
	if err != nil {
		t.Fatal(err)
	}
	query := func(n *Node) {
		t.Helper()
		out, err := n.PSQL(ctx, "shop", token, "SELECT name, email FROM users ORDER BY id LIMIT 1")
		if err != nil || !strings.HasPrefix(out, "Ada|") || strings.Contains(out, "ada@") {
			t.Fatalf("through %s: %v: %s", n.Name, err, out)
		}
	}
	for _, n := range c.Nodes {
		query(n)
	}
	leader, err := c.Leader(ctx)
	if err != nil {
		t.Fatal(err)
	}
	leader.Kill()
	if leader.Running() || leader.PID() != 0 {
		t.Fatal("killed and still running")
	}
	if err := c.WaitReady(ctx); err != nil {
		t.Fatalf("two of three: %v", err)
	}
	for _, n := range c.Nodes {
		if n != leader {
			query(n)
		}
	}
	if err := leader.Restart(ctx); err != nil {
		t.Fatalf("restart: %v", err)
	}
	query(leader)
	if err := leader.Terminate(ctx); err != nil {
		t.Fatalf("terminate: %v", err)
	}
}

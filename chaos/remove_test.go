package chaos

import (
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
)

// TestRemove takes a running node out of the cluster: it must end its sessions
// and serve nobody from then on, also when it never hears of its removal, and
// the others must go on.
func TestRemove(t *testing.T) {
	s := start(t, cluster.Options{Nodes: 4})
	ctx := t.Context()
	leader, err := s.Leader(ctx)
	s.must(t, err)
	var told, deaf, stays *cluster.Node
	for _, n := range s.Nodes {
		switch {
		case n == leader:
		case told == nil:
			told = n
		case deaf == nil:
			deaf = n
		default:
			stays = n
		}
	}
	token := s.job(t, "leaver", "main", nil)
	alive := func(n *cluster.Node) error {
		out, err := n.PSQL(ctx, "bench", token, "SELECT 'there'")
		if err == nil && !strings.Contains(out, "there") {
			t.Fatalf("%s answered %q", n.Name, out)
		}
		return err
	}

	conn := s.login(t, told, "bench", token)
	s.cli(t, on(stays, s.AdminEnv()), "cluster", "remove", told.Name, "--reason", "test")
	if _, err := conn.Exec(ctx, "SELECT 1"); err == nil {
		t.Error("a session outlived the removal of its node")
	}
	if alive(told) == nil {
		t.Error("a removed node let somebody in")
	}

	// One that is paused during its removal never hears of it.
	s.must(t, deaf.Pause())
	s.cli(t, on(stays, s.AdminEnv()), "cluster", "remove", deaf.Name, "--reason", "test")
	s.must(t, deaf.Continue())
	s.cli(t, on(stays, s.AdminEnv()), "revoke", "--subject", subject("leaver"), "--reason", "test")
	time.Sleep(12 * time.Second) // beyond the 10 s that a node lets people in without its leader
	if alive(deaf) == nil {
		t.Error("a node that missed its removal let a revoked subject in")
	}

	if n := strings.Count(s.cli(t, on(stays, s.AdminEnv()), "status"), "unreachable"); n != 0 {
		t.Errorf("%d unreachable nodes in the status of those that stay", n)
	}
	token = s.job(t, "stayer", "main", nil)
	for _, n := range []*cluster.Node{leader, stays} {
		s.must(t, alive(n))
	}
}

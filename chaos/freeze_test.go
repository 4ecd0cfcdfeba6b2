package chaos

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
)

// TestFreezeWithoutQuorum revokes at a node of a cluster that has lost its
// majority. It is refused, and stops for a moment what it names all the same:
// on the node that was asked and on the one that it reaches, and nothing else.
// All sessions are best_effort: nothing but the revocation can stop them.
func TestFreezeWithoutQuorum(t *testing.T) {
	s := start(t, cluster.Options{Nodes: 4, Gateways: 1})
	ctx := t.Context()
	s.edit(t, "rules.cedar", func(rules string) string {
		return strings.Replace(rules, `@id("ci-connect")
`, `@id("ci-connect")
@revocation("best_effort")
`, 1)
	})
	asked, reached := s.Nodes[0], s.Nodes[3]
	type busy struct {
		name    string
		answers atomic.Int64
		failed  chan error
	}
	work := func(name string, n *cluster.Node, job string) *busy {
		c := s.login(t, n, "bench", s.job(t, job, "feature", nil))
		b := &busy{name: name, failed: make(chan error, 1)}
		ended := make(chan struct{})
		t.Cleanup(func() { <-ended }) // ctx has ended by then; the session is closed after it
		go func() {
			defer close(ended)
			for ctx.Err() == nil {
				if err := c.simple(ctx, "SELECT 1"); err != nil {
					b.failed <- err
					return
				}
				b.answers.Add(1)
			}
		}()
		return b
	}
	// goesOn says that a session answers, once more than it has begun to.
	goesOn := func(b *busy, limit time.Duration) bool {
		t.Helper()
		before := b.answers.Load()
		for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			select {
			case err := <-b.failed:
				t.Fatalf("%s ended: %v", b.name, err)
			default:
			}
			if b.answers.Load() > before+1 {
				return true
			}
		}
		return false
	}
	named := []*busy{work("the named one where it was asked", asked, "named"), work("the named one elsewhere", reached, "named")}
	others := []*busy{work("a bystander where it was asked", asked, "bystander"), work("a bystander elsewhere", reached, "bystander")}
	for _, n := range s.Nodes[1:3] {
		n.Kill()
	}
	eventually(t, 30*time.Second, func() string {
		for _, n := range s.status(t, asked).Nodes {
			if n.Node == asked.Name && n.Leader != "" {
				return "it still knows a leader: " + n.Leader
			}
		}
		return ""
	})
	for _, b := range append(named, others...) {
		if !goesOn(b, 30*time.Second) {
			t.Fatalf("%s stands still without a quorum", b.name)
		}
	}

	answered := make(chan struct{})
	go func() { // as long as a node looks for a leader
		defer close(answered)
		s.cliRefused(t, on(asked, s.AdminEnv()), []string{"revoke", "--subject", subject("named"), "--reason", "test"}, "no quorum")
	}()
	defer func() { <-answered }()
	for _, b := range named {
		eventually(t, 20*time.Second, func() string {
			if goesOn(b, time.Second) {
				return b.name + " does not stand still"
			}
			return ""
		})
	}
	for _, b := range others {
		if !goesOn(b, 10*time.Second) {
			t.Errorf("%s stands still", b.name)
		}
	}
	for _, b := range named { // it is for five seconds
		if !goesOn(b, 30*time.Second) {
			t.Errorf("%s does not go on", b.name)
		}
	}
}

package chaos

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/node/api"
)

// modeRules give each branch's jobs a mode of their own; others are strict.
const modeRules = `@id("ci-connect")
permit (principal in Group::"ci", action == Action::"connect", resource) unless { principal in Group::"ci-main" || principal in Group::"ci-migrate" };

@id("main-connect")
@revocation("bounded(10m)")
permit (principal in Group::"ci-main", action == Action::"connect", resource);

@id("migrate-connect")
@revocation("best_effort")
permit (principal in Group::"ci-migrate", action == Action::"connect", resource);
`

// TestModes takes the quorum away for longer than a lease: strict sessions
// stand still and go on afterwards, the others run on. Then it revokes by every
// kind of scope that sessions have.
func TestModes(t *testing.T) {
	s := start(t, cluster.Options{})
	ctx := t.Context()
	s.edit(t, "rules.cedar", func(rules string) string {
		return strings.Replace(rules, `@id("ci-connect")
permit (principal in Group::"ci", action == Action::"connect", resource);
`, modeRules, 1)
	})
	n := s.Nodes[0]
	strict := s.login(t, n, "bench", s.job(t, "strict", "feature", nil))
	mainToken := s.job(t, "bounded", "main", nil)
	bounded := s.login(t, n, "bench", mainToken)
	best := s.login(t, n, "bench", s.job(t, "best", "migrate", nil))
	for _, c := range []*session{strict, bounded, best} {
		s.must(t, c.simple(ctx, "SELECT 1"))
	}
	for _, other := range s.Nodes[1:] {
		s.must(t, other.Pause())
	}
	time.Sleep(4 * time.Second) // more than a lease
	frozen := make(chan error, 1)
	go func() { frozen <- strict.simple(ctx, "SELECT 1") }()
	s.must(t, bounded.simple(ctx, "SELECT 1"))
	s.must(t, best.simple(ctx, "SELECT 1"))
	_, err := s.tryLogin(t, n, "bench", s.job(t, "strict-2", "feature", nil), nil)
	refused(t, err, "57P03", "leader")
	_, err = s.tryLogin(t, n, "bench", s.job(t, "bounded-2", "main", nil), nil) // never let in before
	refused(t, err, "57P03", "leader")
	s.must(t, s.login(t, n, "bench", mainToken).simple(ctx, "SELECT 1"))
	s.must(t, s.login(t, n, "bench", s.job(t, "best-2", "migrate", nil)).simple(ctx, "SELECT 1"))
	s.cliRefused(t, on(n, s.AdminEnv()), []string{"revoke", "--subject", subject("nobody"), "--reason", "test"}, "quorum")
	select {
	case err := <-frozen:
		t.Errorf("a strict session went on without a lease: %v", err)
	default:
	}
	for _, other := range s.Nodes[1:] {
		s.must(t, other.Continue())
	}
	select {
	case err := <-frozen:
		s.must(t, err)
	case <-time.After(50 * time.Second):
		t.Fatal("a strict session did not go on when the quorum was back")
	}
	s.must(t, s.WaitReady(ctx))

	for _, x := range []struct {
		name, ref, run string
		flag           func(subject string) []string
	}{
		{"by-group", "migrate", "77", func(string) []string { return []string{"--group", "ci-migrate"} }},
		{"by-run", "feature", "4711", func(string) []string { return []string{"--run", "4711"} }},
		{"by-session", "feature", "77", func(subject string) []string {
			var list api.Sessions
			s.must(t, json.Unmarshal([]byte(s.cli(t, s.AdminEnv(), "sessions", "list", "--json")), &list))
			for _, i := range list.Sessions {
				if i.Subject == subject {
					return []string{"--session", i.ID}
				}
			}
			t.Fatalf("%s has no session", subject)
			return nil
		}},
	} {
		token := s.job(t, x.name, x.ref, map[string]any{"run_id": x.run})
		c := s.login(t, s.Nodes[1], "bench", token)
		s.must(t, c.simple(ctx, "SELECT 1"))
		out := s.cli(t, s.AdminEnv(), append(append([]string{"revoke"}, x.flag(subject(x.name))...), "--reason", "test", "--json")...)
		var r api.RevocationInfo
		s.must(t, json.Unmarshal([]byte(out), &r))
		if !r.Complete {
			t.Errorf("%s: %s", x.name, out)
		}
		if err := c.simple(ctx, "SELECT 1"); err == nil {
			t.Errorf("%s: the session goes on", x.name)
		}
		_, err := s.tryLogin(t, s.Nodes[2], "bench", token, nil)
		if x.name == "by-session" { // its token may open another
			s.must(t, err)
		} else {
			refused(t, err, "28000", "revoked")
		}
		eventually(t, 20*time.Second, func() string {
			out := s.cli(t, s.AdminEnv(), "revocations", "show", r.ID, "--json")
			if !strings.Contains(out, `"fenced"`) {
				return x.name + ": no event says that it is in force: " + out
			}
			return ""
		})
	}
	s.must(t, strict.simple(ctx, "SELECT 1")) // a bystander of all of them
}

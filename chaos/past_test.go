package chaos

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/node/api"
)

// TestTimeTravel asks a node what was agreed on, and what was decided and why,
// before and after a revocation.
func TestTimeTravel(t *testing.T) {
	s := start(t, cluster.Options{Nodes: 1})
	admin := s.AdminEnv()
	now := func() (st api.StateAt) {
		t.Helper()
		s.must(t, json.Unmarshal([]byte(s.cli(t, admin, "state", "--json")), &st))
		return st
	}
	before := now()
	s.cli(t, admin, "revoke", "--subject", subject("leaker"), "--reason", "leaked")
	after := now()
	if len(before.Revocations) != 0 || len(after.Revocations) != 1 || after.Index <= before.Index || after.FeatureLevel < 2 {
		t.Fatalf("before %+v\nafter %+v", before, after)
	}
	claims, err := json.Marshal(map[string]any{
		"iss": "https://" + s.IssuerAddr(), "aud": cluster.AudienceCI, "sub": "repo:acme/shop:job:leaker", "iat": time.Now().Unix(),
		"repository": "acme/shop", "repository_owner": "acme", "ref": "refs/heads/main", "run_id": "77", "actor": "dana@example.com",
	})
	s.must(t, err)
	file := filepath.Join(t.TempDir(), "claims.json")
	s.must(t, os.WriteFile(file, claims, 0o600))
	explain := func(index uint64, statement string) (e api.Explanation) {
		t.Helper()
		out, _ := s.CLI(t.Context(), admin, "policy", "explain", "--json", "--at", fmt.Sprint(index), "--token-claims", file,
			"--target", "prod-db", "--database", "bench", "--statement", statement)
		if err := json.NewDecoder(strings.NewReader(out)).Decode(&e); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return e
	}
	const read = "SELECT n FROM numbers"
	if e := explain(before.Index, read); e.Effect != "permit" || e.Where == "" || e.Subject != subject("leaker") || e.Connect == nil || e.Connect.Effect != "permit" {
		t.Errorf("before the revocation: %+v", e)
	}
	if e := explain(after.Index, read); e.Effect != "refuse" || !strings.HasPrefix(e.Rule, "revocation/") || len(e.Revocations) != 1 {
		t.Errorf("after it: %+v", e)
	}
	if e := explain(before.Index, "SELECT n FROM"); e.Effect != "refuse" || e.Problem != "unparsable" {
		t.Errorf("an unparsable statement: %+v", e)
	}
	out := s.cli(t, admin, "events", "list", "--type", "revocation.made")
	if !strings.Contains(out, subject("leaker")) {
		t.Errorf("events list: %s", out)
	}
	if out := s.cli(t, admin, "events", "show", strings.Fields(out)[0]); !strings.Contains(out, "leaked") {
		t.Errorf("events show: %s", out)
	}
	if out := s.cli(t, admin, "state", "--at", after.Time.Format(time.RFC3339Nano)); !strings.Contains(out, "leaked") {
		t.Errorf("state by time: %s", out)
	}
}

// TestFeatureLevel begins a cluster on a node that is kept from offering more
// than the first release's level: the level rises when the setting is gone.
func TestFeatureLevel(t *testing.T) {
	var settings string
	capped := true
	place := func(i int) (*cluster.Place, error) {
		return &cluster.Place{Start: func(cmd *exec.Cmd) error {
			data, err := os.ReadFile(settings)
			if err != nil {
				return err
			}
			text := strings.ReplaceAll(string(data), "maxFeatureLevel: 1\n", "")
			if capped {
				text += "maxFeatureLevel: 1\n"
			}
			if err := os.WriteFile(settings, []byte(text), 0o600); err != nil {
				return err
			}
			return cmd.Start()
		}}, nil
	}
	s := start(t, cluster.Options{Nodes: 1, Place: place, TargetHost: "127.0.0.1", Started: func(c *cluster.Cluster) {
		settings = filepath.Join(c.Dir, "n1", "node.yaml")
	}})
	admin := s.AdminEnv()
	if out := s.cli(t, admin, "status"); !strings.Contains(out, "feature level 1") {
		t.Fatal(out)
	}
	s.cliRefused(t, admin, []string{"revoke", "--group", "x-group", "--reason", "test"}, "feature level 2")
	capped = false
	s.must(t, s.Nodes[0].Terminate(t.Context()))
	s.must(t, s.Nodes[0].Restart(t.Context()))
	eventually(t, time.Minute, func() string {
		if out := s.cli(t, admin, "status"); strings.Contains(out, "feature level 1") {
			return out
		}
		return ""
	})
}

// TestDivergedNodeStops damages, on a stopped node, what the others' next
// events depend on: it must find out, cut its sessions and stop.
func TestDivergedNodeStops(t *testing.T) {
	s := start(t, cluster.Options{Nodes: 3})
	ctx := t.Context()
	leader, err := s.Leader(ctx)
	s.must(t, err)
	victim := s.Nodes[slices.IndexFunc(s.Nodes, func(n *cluster.Node) bool { return n != leader })]
	s.must(t, victim.Terminate(ctx))
	db, err := pebble.Open(filepath.Join(victim.DataDir, "raft", "state"), &pebble.Options{FormatMajorVersion: pebble.FormatNewest, Logger: quiet{}})
	s.must(t, err)
	s.must(t, errors.Join(db.Set([]byte("Vconfig"), []byte{0, 0, 0, 0, 0, 0, 0, 99}, pebble.Sync), db.Close()))
	s.must(t, victim.Start())
	s.must(t, s.WaitReady(ctx))
	conn := s.login(t, victim, "bench", s.job(t, "divided", "main", nil))
	// The others agree on a configuration that follows on the one before; here it
	// does not. The next event tells.
	s.must(t, os.WriteFile(filepath.Join(s.ConfigDir, "extra.cedar"), []byte(extraRules+"\n// changed\n"), 0o600))
	admin := on(leader, s.AdminEnv())
	s.must(t, s.Apply(ctx))
	_, _ = s.CLI(ctx, admin, "revoke", "--subject", subject("nobody"), "--reason", "another event") // not every node confirms
	eventually(t, time.Minute, func() string {
		if victim.Running() {
			return "a node whose state differs goes on"
		}
		return ""
	})
	if _, err := conn.Exec(ctx, "SELECT 1"); err == nil {
		t.Error("a session outlived the alarm")
	}
	if log, err := os.ReadFile(victim.LogFile); err != nil || !strings.Contains(string(log), "differ from the leader's") {
		t.Errorf("the node does not say why it stopped (%v)", err)
	}
}

// quiet is a database's log that nobody reads.
type quiet struct{}

func (quiet) Infof(string, ...any)  {}
func (quiet) Errorf(string, ...any) {}
func (quiet) Fatalf(format string, args ...any) {
	panic(fmt.Sprintf(format, args...))
}

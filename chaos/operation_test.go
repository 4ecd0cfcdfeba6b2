package chaos

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/raftstore/event"
)

// testConfiguration applies what must be refused, whole.
func testConfiguration(t *testing.T, s *suite) {
	before := s.status(t, s.Nodes[0]).Nodes[0].ConfigIndex
	last := len(s.events(t))
	apply := func(t *testing.T, change map[string]string, has ...string) {
		dir := t.TempDir()
		files := map[string]string{}
		list, err := os.ReadDir(s.ConfigDir)
		s.must(t, err)
		for _, f := range list {
			data, err := os.ReadFile(filepath.Join(s.ConfigDir, f.Name()))
			s.must(t, err)
			files[f.Name()] = string(data)
		}
		maps.Copy(files, change)
		for name, content := range files {
			s.must(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
		}
		s.cliRefused(t, append(s.AdminEnv(), "TARGET_PASSWORD=x"), []string{"apply", "-f", dir, "--dev", "--yes"}, has...)
		if got := len(s.events(t)); got != last {
			t.Errorf("%d events were written", got-last)
		}
		for _, n := range s.status(t, s.Nodes[0]).Nodes {
			if n.ConfigIndex != before {
				t.Errorf("%s acts on configuration %d, was %d", n.Node, n.ConfigIndex, before)
			}
		}
	}
	// Good and bad together: neither is taken.
	good := "@id(\"harmless\")\npermit (principal in Group::\"ci\", action == Action::\"postgres:listen\", resource);\n"
	for name, x := range map[string]struct {
		file, content string
		has           []string
	}{
		"syntax":          {"bad.cedar", "@id(\"x\")\npermit (principal,\n  action resource);\n", []string{"bad.cedar:3"}},
		"unknown action":  {"bad.cedar", "\n@id(\"x\")\npermit (principal, action == Action::\"postgres:selekt\", resource);\n", []string{"bad.cedar:", "selekt"}},
		"double id":       {"bad.cedar", "@id(\"no-drop-table\")\npermit (principal, action == Action::\"postgres:select\", resource);\n", []string{"bad.cedar:", "no-drop-table"}},
		"unknown field":   {"bad.yaml", "kind: Target\nname: other\naddres: 127.0.0.1:1\n", []string{"bad.yaml:3", "addres"}},
		"unknown kind":    {"bad.yaml", "kind: Tarjet\nname: other\n", []string{"bad.yaml:1", "Tarjet"}},
		"shared issuer":   {"bad.yaml", "kind: IdentityProvider\nname: github\nissuer: https://token.actions.githubusercontent.com\naudience: https://sallyport.test\nsubjects: workload\n", []string{"bad.yaml:", "repository_owner"}},
		"shared, no pin":  {"bad.yaml", "kind: IdentityProvider\nname: own\nissuer: https://ci.example.com\nshared: true\naudience: https://sallyport.test\nsubjects: workload\n", []string{"bad.yaml:", "require"}},
		"missing secret":  {"bad.yaml", "kind: Target\nname: other\naddress: db.example.com:5432\nadmin:\n  user: sallyport\n  passwordEnv: NOT_SET\ndatabases: [x]\nroles:\n  - {groups: [ci], role: r}\n", []string{"bad.yaml:", "NOT_SET"}},
		"missing CA file": {"bad.yaml", "kind: IdentityProvider\nname: own\nissuer: https://ci.example.com\naudience: https://sallyport.test\nsubjects: workload\ncaFile: nowhere.pem\n", []string{"bad.yaml:", "nowhere.pem"}},
	} {
		t.Run(name, func(t *testing.T) { apply(t, map[string]string{x.file: x.content, "good.cedar": good}, x.has...) })
	}
	t.Run("who may", func(t *testing.T) {
		s.cliRefused(t, append(s.TokenEnv(s.person(t, "robin", "dba")), "TARGET_PASSWORD=x"), []string{"apply", "-f", s.ConfigDir, "--dev", "--yes"}, "admin:apply")
	})
	t.Run("plan", func(t *testing.T) {
		out, err := s.CLI(t.Context(), append(s.AdminEnv(), "TARGET_PASSWORD=x"), "apply", "-f", s.ConfigDir, "--dev") // no --yes, no terminal
		if err == nil {
			t.Errorf("applied without being asked: %s", out)
		}
		if got := len(s.events(t)); got != last {
			t.Errorf("%d events were written", got-last)
		}
	})
	t.Run("good", func(t *testing.T) {
		undo := s.edit(t, "extra.cedar", func(rules string) string { return rules + good })
		for _, n := range s.status(t, s.Nodes[1]).Nodes {
			if n.ConfigIndex <= before {
				t.Errorf("%s still acts on configuration %d", n.Node, n.ConfigIndex)
			}
		}
		undo()
	})
}

// testSight compares what status, sessions list, events tail and doctor tell
// with what is so.
func testSight(t *testing.T, s *suite) {
	s.must(t, s.WaitReady(t.Context()))
	token := s.job(t, "sight", "main", nil)
	var open []*session
	for _, n := range s.Nodes {
		open = append(open, s.login(t, n, "bench", token))
	}
	s.must(t, open[1].simple(t.Context(), "SELECT 1"))
	s.must(t, open[1].simple(t.Context(), "SELECT 2"))
	refused(t, open[1].simple(t.Context(), "DROP TABLE numbers"), "42501")
	s.cli(t, s.TokenEnv(s.person(t, "sam", "security")), "revoke", "--subject", subject("out-of-sight"), "--reason", "test")
	h := s.holdOn(t, open[2], "DELETE FROM numbers WHERE client = 'sight'")
	for _, from := range s.Nodes {
		t.Run("from "+from.Name, func(t *testing.T) {
			want := []string{"n1 running 0/0/0 prod-db/bench", "n2 running 2/1/0 prod-db/bench", "n3 held 0/0/1 prod-db/bench"}
			eventually(t, 3*time.Second, func() string {
				var list api.Sessions
				s.must(t, json.Unmarshal([]byte(s.cli(t, on(from, s.AdminEnv()), "sessions", "list", "--json")), &list))
				var seen []string
				for _, i := range list.Sessions {
					if i.Subject == subject("sight") {
						seen = append(seen, fmt.Sprintf("%s %s %d/%d/%d %s/%s", i.Node, i.State, i.Admitted, i.Refused, i.Held, i.Target, i.Database))
					}
				}
				if slices.Sort(seen); !slices.Equal(seen, want) {
					return fmt.Sprintf("sessions:\n%s\nwant\n%s", strings.Join(seen, "\n"), strings.Join(want, "\n"))
				}
				return ""
			})
			st := s.status(t, from)
			leaders, chains := 0, map[string]bool{}
			for _, n := range st.Nodes {
				if n.RaftState == "leader" {
					leaders++
				}
				chains[n.Chain] = true
				if !n.Reachable || n.Sessions < 1 || n.Version == "" {
					t.Errorf("status: %+v", n)
				}
			}
			if len(st.Nodes) != len(s.Nodes) || leaders != 1 || len(chains) != 1 {
				t.Errorf("%d nodes, %d leaders, %d different logs", len(st.Nodes), leaders, len(chains))
			}
			out := s.cli(t, on(from, s.AdminEnv()), "status")
			for _, n := range s.Nodes {
				if !strings.Contains(out, n.Addr) {
					t.Errorf("status does not show %s:\n%s", n.Name, out)
				}
			}
			events := s.cli(t, on(from, s.AdminEnv()), "events", "tail")
			if n := strings.Count(events, "\n"); n != len(s.events(t)) {
				t.Errorf("events tail prints %d lines of %d events", n, len(s.events(t)))
			}
			for _, want := range []string{"approval.asked       approval/" + h.id, "config.applied", "revocation.made", "node.joined", "people/sam (oidc)", "bootstrap/bootstrap (certificate)"} {
				if !strings.Contains(events, want) {
					t.Errorf("events tail has no %q", want)
				}
			}
		})
	}
	s.must(t, h.c.PgConn().CancelRequest(t.Context()))
	refused(t, h.err(t), "57014")
	for _, c := range open {
		s.must(t, c.Close(t.Context()))
	}
	eventually(t, 10*time.Second, func() string {
		if out := s.cli(t, s.AdminEnv(), "sessions", "list"); strings.Contains(out, "sight") {
			return "sessions that ended are listed: " + out
		}
		return ""
	})

	t.Run("doctor", func(t *testing.T) {
		out := s.cli(t, s.AdminEnv(), "doctor")
		for _, want := range []string{"target prod-db from n1", "target prod-db from n3", "leader", "you are bootstrap/bootstrap"} {
			if !strings.Contains(out, want) {
				t.Errorf("doctor does not look at %q:\n%s", want, out)
			}
		}
		if strings.Contains(out, "bad ") {
			t.Errorf("doctor finds something bad in a good cluster:\n%s", out)
		}
		// What is wrong is found: a dead node, an unusable account.
		s.Nodes[1].Kill()
		s.must(t, s.PG.Exec(t.Context(), "postgres", "ALTER ROLE sallyport NOLOGIN; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'sallyport'"))
		defer func() {
			s.must(t, s.PG.Exec(t.Context(), "postgres", "ALTER ROLE sallyport LOGIN"))
			s.must(t, s.Nodes[1].Restart(t.Context()))
			s.must(t, s.WaitReady(t.Context()))
		}()
		out = s.cliRefused(t, s.AdminEnv(), []string{"doctor"}, "need attention")
		if !regexp.MustCompile(`bad +node n2 `).MatchString(out) {
			t.Errorf("doctor does not find the dead node:\n%s", out)
		}
		out = s.cliRefused(t, append(s.AdminEnv(), "SALLYPORT_CA="+s.PG.CAFile), []string{"doctor"})
		if !strings.Contains(out, "bad   credential") || !strings.Contains(out, "CA file must be") {
			t.Errorf("doctor does not find the wrong CA:\n%s", out)
		}
		st := s.status(t, s.Nodes[0])
		for _, n := range st.Nodes {
			if n.Reachable == (n.Node == "n2") {
				t.Errorf("status: %s is reachable: %v", n.Node, n.Reachable)
			}
		}
		eventually(t, 60*time.Second, func() string {
			out, _ := s.CLI(t.Context(), s.AdminEnv(), "doctor")
			if !regexp.MustCompile(`bad +target prod-db from n1`).MatchString(out) {
				return "doctor does not find that the administrative account is locked:\n" + out
			}
			return ""
		})
	})
}

// testJoining uses tokens for new nodes in ways that are not meant.
func testJoining(t *testing.T, s *suite) {
	create := func() string {
		t.Helper()
		return strings.TrimSpace(s.cli(t, s.AdminEnv(), "cluster", "token", "create"))
	}
	join := func(name, token string, server *cluster.Node) (string, error) {
		return s.CLI(t.Context(), nil, "cluster", "join", "--name", name, "--data-dir", filepath.Join(t.TempDir(), name), "--addr", freeAddr(t),
			"--recordings", s.Recordings, "--dev", "--server", server.Addr, "--token", token)
	}
	wants := func(err error, has string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), has) {
			t.Errorf("join: %v, want an error with %q", err, has)
		}
	}
	token := create()
	parts := strings.Split(token, ".")
	s.mu.Lock()
	s.tokens = append(s.tokens, parts[0]+"."+parts[2]) // its secret must not be found later
	s.mu.Unlock()
	pin, err := base64.RawURLEncoding.DecodeString(parts[3])
	s.must(t, err)
	pin[0] ^= 1
	_, err = join("n4", strings.Join([]string{parts[0], parts[1], parts[2], base64.RawURLEncoding.EncodeToString(pin)}, "."), s.Nodes[1])
	wants(err, "not the one that the join token pins")
	_, err = join("n4", strings.Join([]string{parts[0], parts[1], parts[1], parts[3]}, "."), s.Nodes[1])
	wants(err, "token")
	_, err = join("n1", token, s.Nodes[1]) // a name that is taken
	wants(err, "n1")
	if got := len(s.status(t, s.Nodes[0]).Nodes); got != len(s.Nodes) {
		t.Fatalf("%d nodes after joins that failed", got)
	}
	// None of these used it up. A follower takes it: it brings it to the leader.
	follower := s.Nodes[0]
	if leader, err := s.Leader(t.Context()); err == nil && leader == follower {
		follower = s.Nodes[1]
	}
	_, err = join("n4", token, follower)
	s.must(t, err)
	for _, n := range s.Nodes {
		_, err = join("n5", token, n)
		wants(err, "used")
	}
	s.cliRefused(t, s.TokenEnv(s.person(t, "robin", "dba")), []string{"cluster", "token", "create"}, "admin:cluster")
	if !strings.Contains(s.cli(t, s.AdminEnv(), "status"), "n4") {
		t.Error("the member that has not started yet is not shown")
	}
	s.cli(t, s.AdminEnv(), "cluster", "remove", "n4", "--reason", "test")
	s.must(t, s.WaitReady(t.Context()))
	if strings.Contains(s.cli(t, s.AdminEnv(), "status"), "n4") {
		t.Error("the member that was removed is shown")
	}
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// testLeader kills the leader. What was committed is kept, and the others go on.
func testLeader(t *testing.T, s *suite) {
	ctx := t.Context()
	s.must(t, s.WaitReady(ctx))
	leader, err := s.Leader(ctx)
	s.must(t, err)
	var others []*cluster.Node
	for _, n := range s.Nodes {
		if n != leader {
			others = append(others, n)
		}
	}
	// Every node takes changes, whoever leads.
	for _, n := range s.Nodes {
		s.cli(t, on(n, s.AdminEnv()), "revoke", "--subject", subject("before-"+n.Name), "--reason", "test")
	}
	before := s.events(t)
	token := s.job(t, "leader", "main", nil)
	open := []*session{s.login(t, others[0], "bench", token), s.login(t, others[1], "bench", token)}
	dead := s.login(t, leader, "bench", token)
	killed := time.Now()
	leader.Kill()

	for i, c := range open { // sessions elsewhere do not notice
		if err := c.simple(ctx, "SELECT 1"); err != nil {
			t.Errorf("a session on %s: %v", others[i].Name, err)
		}
	}
	if err := dead.simple(ctx, "SELECT 1"); err == nil {
		t.Error("a session on the dead node goes on")
	}
	if out, err := others[0].PSQL(ctx, "bench", token, "SELECT 'reconnected'"); err != nil || !strings.Contains(out, "reconnected") {
		t.Errorf("a new login on %s: %v: %s", others[0].Name, err, out)
	}
	for _, n := range others {
		_, err := s.tryLogin(t, n, "bench", s.job(t, "before-"+leader.Name, "feature", nil), nil)
		refused(t, err, "28000", "revoked")
	}
	var after api.RevocationInfo
	eventually(t, 20*time.Second, func() string {
		out, err := s.CLI(ctx, on(others[1], s.AdminEnv()), "revoke", "--subject", subject("after"), "--reason", "test", "--json")
		if err := json.Unmarshal([]byte(out), &after); err != nil {
			return fmt.Sprintf("no revocation since the leader died: %v", err)
		}
		// The dead node cannot confirm: it is waited for until its lease is over.
		for _, n := range after.Nodes {
			want := event.FenceConfirmed
			if !slices.ContainsFunc(others, func(o *cluster.Node) bool { return o.Name == n.Node }) {
				want = event.FenceExpired // dead, or a member that was never started
			}
			if n.State != want || !after.Complete || err != nil {
				t.Errorf("revoke with a dead node: %s is %s (%s), complete %v, %v", n.Node, n.State, n.Detail, after.Complete, err)
			}
		}
		return ""
	})
	// It returned later: it waits for the dead node's lease to end.
	took := after.At.Sub(killed)
	if t.Logf("a change was committed %v after the leader's death", took.Round(time.Millisecond)); took > 10*time.Second {
		t.Error("that is too long")
	}
	_, err = s.tryLogin(t, others[0], "bench", s.job(t, "after", "feature", nil), nil)
	refused(t, err, "28000", "revoked")
	now := s.events(t)
	for i, e := range before {
		if i >= len(now) || now[i].Chain != e.Chain {
			t.Fatalf("event %d of before is lost", e.Seq)
		}
	}
	s.must(t, leader.Restart(ctx))
	s.must(t, s.WaitReady(ctx))
	chains := map[string]bool{}
	for _, n := range s.status(t, leader).Nodes {
		chains[n.Chain] = true
	}
	if len(chains) != 1 {
		t.Errorf("the nodes hold %d different logs", len(chains))
	}
	_, err = s.tryLogin(t, leader, "bench", s.job(t, "after", "feature", nil), nil)
	refused(t, err, "28000", "revoked")
	for _, c := range open {
		s.must(t, c.Close(ctx))
	}
}

// testRecordings stops the nodes and verifies everything they wrote.
func testRecordings(t *testing.T, s *suite) {
	for _, n := range s.Nodes {
		s.must(t, n.Terminate(t.Context()))
	}
	s.verify(t, s.Recordings)
}

var summary = regexp.MustCompile(`(\d+) recordings: (\d+) verified, (\d+) unfinished .*, (\d+) broken`)

// verify verifies a store in which all recordings are complete.
func (s *suite) verify(t *testing.T, store string) {
	t.Helper()
	out := s.cli(t, s.AdminEnv(), "recordings", "verify", "--store", store)
	m := summary.FindStringSubmatch(out)
	if m == nil || m[1] == "0" || m[1] != m[2] || m[3] != "0" || m[4] != "0" {
		t.Errorf("not every recording is complete and verified:\n%s", out)
	}
	t.Log(m[0])
}

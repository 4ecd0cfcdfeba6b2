package chaos

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/identity"
)

// testApproval holds statements and decides about them. Deleting needs one of
// the group dba; the statements' number says which row it is about.
func testApproval(t *testing.T, s *suite) {
	n1, n2, n3 := s.Nodes[0], s.Nodes[1], s.Nodes[2]
	robin := s.TokenEnv(s.person(t, "robin", "dba"))
	job := s.job(t, "approval", "main", nil)
	s.must(t, s.PG.Exec(t.Context(), "bench", "INSERT INTO numbers SELECT 'approval', n, 'keep' FROM generate_series(1, 100) AS n"))
	present := func(t *testing.T, n int, want bool) {
		t.Helper()
		if got := s.int(t, "bench", "SELECT count(*) FROM numbers WHERE client = 'approval' AND n = $1", n) == 1; got != want {
			t.Errorf("row %d is there: %v, want %v", n, got, want)
		}
	}
	sql := func(n int) string {
		return fmt.Sprintf("DELETE FROM numbers WHERE client = 'approval' AND n = %d", n)
	}

	t.Run("approved", func(t *testing.T) {
		h := s.hold(t, n1, job, sql(1))
		present(t, 1, true)
		if out := s.cli(t, on(n3, robin), "approvals", "show", h.id); !strings.Contains(out, sql(1)) || !strings.Contains(out, subject("approval")) || !strings.Contains(out, "delete-needs-dba") {
			t.Errorf("an approver is not shown what it is about:\n%s", out)
		}
		// From another node, and by another sort of approver each.
		s.cliRefused(t, on(n2, s.TokenEnv(job)), []string{"approvals", "approve", h.id})
		s.cliRefused(t, on(n2, s.TokenEnv(s.person(t, "sam", "security"))), []string{"approvals", "approve", h.id})
		s.cliRefused(t, on(n2, s.TokenEnv(s.person(t, "dana", "dba"))), []string{"approvals", "approve", h.id}, "dana@example.com", "named in the requester's claims")
		s.cliRefused(t, on(n2, s.TokenEnv(s.person(t, "Dana@Example.com", "dba"))), []string{"approvals", "approve", h.id}, "named in the requester's claims")
		s.cliRefused(t, on(n2, robin), []string{"approvals", "approve", h.id, "--digest", strings.Repeat("0", 64)}, "something else")
		cl, err := s.TokenClient(s.person(t, "robin", "dba"), n2.Addr)
		s.must(t, err)
		if _, err := cl.Vote(t.Context(), h.id, strings.Repeat("0", 64), true, ""); err == nil {
			t.Error("a vote for another digest counts")
		}
		h.waits(t)
		present(t, 1, true)
		out := s.cli(t, on(n2, robin), "approvals", "approve", h.id, "--comment", "looks right")
		if !strings.Contains(out, "Approved "+h.id) {
			t.Errorf("approve says %s", out)
		}
		s.must(t, h.err(t))
		present(t, 1, false)
		// One use: neither the request nor the statement opens anything again.
		s.cliRefused(t, on(n2, robin), []string{"approvals", "approve", h.id})
		if a := s.approval(t, h.id); a.State != "used" || len(a.Votes) != 1 || a.Votes[0].Approver != "people/robin" {
			t.Errorf("the request is %+v", a)
		}
		again := s.holdOn(t, h.c, sql(1))
		if again.id == h.id {
			t.Error("the same request came back")
		}
		s.cli(t, on(n3, robin), "approvals", "deny", again.id)
		refused(t, again.err(t), "42501", "denied")
		s.must(t, h.c.Close(t.Context()))
		var steps []string
		for _, e := range s.sessionOf(t, subject("approval")) {
			if e.Approval == h.id {
				steps = append(steps, e.Effect)
			}
		}
		if got := strings.Join(steps, " "); got != "asked granted used" {
			t.Errorf("the recording tells of the approval: %s", got)
		}
	})
	t.Run("approved by the administrator's certificate", func(t *testing.T) {
		// The default rules permit administrators the API; approving is not in it.
		h := s.hold(t, n2, job, sql(2))
		s.cliRefused(t, on(n1, s.AdminEnv()), []string{"approvals", "approve", h.id})
		h.waits(t)
		s.cli(t, on(n1, robin), "approvals", "deny", h.id, "--comment", "not on a Friday")
		refused(t, h.err(t), "42501", "denied by people/robin", "not on a Friday")
		present(t, 2, true)
		s.cliRefused(t, on(n1, robin), []string{"approvals", "approve", h.id})
		present(t, 2, true)
	})
	t.Run("parameters", func(t *testing.T) {
		c := s.login(t, n3, "bench", job)
		h := s.holdOn(t, c, "DELETE FROM numbers WHERE client = $1 AND n = $2", pgx.QueryExecModeCacheStatement, "approval", 3)
		if out := s.cli(t, on(n1, robin), "approvals", "show", h.id); !strings.Contains(out, "$2") || !strings.Contains(out, "3") || !strings.Contains(out, "approval") {
			t.Errorf("the parameters are not shown:\n%s", out)
		}
		s.cli(t, on(n1, robin), "approvals", "approve", h.id)
		s.must(t, h.err(t))
		present(t, 3, false)
		// The same prepared statement with another parameter is another request.
		other := s.holdOn(t, c, "DELETE FROM numbers WHERE client = $1 AND n = $2", pgx.QueryExecModeCacheStatement, "approval", 4)
		s.cli(t, on(n1, robin), "approvals", "deny", other.id)
		refused(t, other.err(t), "42501", "denied")
		present(t, 4, true)
	})
	t.Run("prepared in SQL", func(t *testing.T) {
		c := s.login(t, n2, "bench", job)
		s.must(t, c.simple(t.Context(), "PREPARE gone (bigint) AS DELETE FROM numbers WHERE client = 'approval' AND n = $1"))
		h := s.holdOn(t, c, "EXECUTE gone (13)")
		if out := s.cli(t, on(n1, robin), "approvals", "show", h.id); !strings.Contains(out, "EXECUTE gone (13)") || !strings.Contains(out, "DELETE FROM numbers WHERE client = 'approval' AND n = $1") {
			t.Errorf("the approver is not shown what EXECUTE runs:\n%s", out)
		}
		present(t, 13, true)
		s.cli(t, on(n1, robin), "approvals", "approve", h.id)
		s.must(t, h.err(t))
		present(t, 13, false)
	})
	t.Run("client cancels", func(t *testing.T) {
		h := s.hold(t, n1, job, sql(5))
		s.must(t, h.c.PgConn().CancelRequest(t.Context()))
		refused(t, h.err(t), "57014", "cancelled")
		s.ended(t, h.id, "cancelled")
		s.cliRefused(t, on(n2, robin), []string{"approvals", "approve", h.id})
		s.must(t, h.c.Ping(t.Context()))
		present(t, 5, true)
	})
	t.Run("psql Ctrl-C", func(t *testing.T) {
		cmd, err := n2.Command(t.Context(), "psql", "bench", job, "-X", "-c", sql(6))
		s.must(t, err)
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		before := s.pending(t)
		s.must(t, cmd.Start())
		id := s.newRequest(t, before)
		s.must(t, cmd.Process.Signal(syscall.SIGINT))
		if err := cmd.Wait(); err == nil {
			t.Errorf("psql succeeds: %s", out.String())
		}
		if !strings.Contains(out.String(), "sallyport approvals show "+id) || !strings.Contains(out.String(), "cancel") {
			t.Errorf("psql shows %s", out.String())
		}
		s.ended(t, id, "cancelled")
		present(t, 6, true)
	})
	t.Run("client leaves", func(t *testing.T) {
		h := s.hold(t, n2, job, sql(7))
		h.c.PgConn().Conn().Close()
		s.ended(t, h.id, "cancelled")
		s.cliRefused(t, on(n1, robin), []string{"approvals", "approve", h.id})
		present(t, 7, true)
	})
	t.Run("requester", func(t *testing.T) {
		// A person who may do both, delete and approve.
		groups := []string{"dba", "ci", "ci-main"}
		h := s.hold(t, n1, s.person(t, "erin", groups...), sql(8))
		for _, n := range s.Nodes {
			s.cliRefused(t, on(n, s.TokenEnv(s.person(t, "erin", groups...))), []string{"approvals", "approve", h.id}, "someone else must approve")
		}
		h.waits(t)
		s.cli(t, on(n3, robin), "approvals", "approve", h.id)
		s.must(t, h.err(t))
		present(t, 8, false)
	})
	t.Run("expired", func(t *testing.T) {
		h := s.hold(t, n1, job, "TRUNCATE scratch")
		refused(t, h.err(t), "57014")
		if took := time.Since(h.asked); took < 2*time.Second || took > 15*time.Second {
			t.Errorf("a request of 3s expired after %v", took)
		}
		s.cliRefused(t, on(n2, robin), []string{"approvals", "approve", h.id}, "expired")
		s.ended(t, h.id, "expired")
	})
	t.Run("open transaction", func(t *testing.T) {
		c := s.login(t, n1, "bench", job)
		before := s.pending(t)
		s.must(t, c.simple(t.Context(), "BEGIN"))
		refused(t, c.simple(t.Context(), sql(9)), "42501", "delete-needs-dba", "transaction")
		if after := s.pending(t); len(after) != len(before) {
			t.Errorf("there is a request for it: %v", after)
		}
		s.must(t, c.simple(t.Context(), "ROLLBACK"))
		// Where the rule allows it, within the transaction and for its short time.
		s.must(t, c.simple(t.Context(), "BEGIN"))
		h := s.holdOn(t, c, "TRUNCATE scratch")
		s.cli(t, on(n3, robin), "approvals", "approve", h.id)
		s.must(t, h.err(t))
		s.must(t, c.simple(t.Context(), "ROLLBACK"))
		// One string is held before any of it is sent, and whole.
		h = s.holdOn(t, c, "BEGIN; "+sql(9)+"; COMMIT")
		if out := s.cli(t, on(n3, robin), "approvals", "show", h.id); !strings.Contains(out, "BEGIN; "+sql(9)+"; COMMIT") {
			t.Errorf("the approver is not shown the whole string:\n%s", out)
		}
		if got := s.int(t, "postgres", "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"); got != 0 {
			t.Error("a transaction is open meanwhile")
		}
		s.cli(t, on(n3, robin), "approvals", "deny", h.id)
		refused(t, h.err(t), "42501", "denied")
		present(t, 9, true)
	})
	t.Run("policy changes meanwhile", func(t *testing.T) {
		h := s.hold(t, n1, job, sql(10))
		undo := s.edit(t, "extra.cedar", func(rules string) string {
			return rules + "\n@id(\"freeze\")\n@reason(\"nothing is deleted this week\")\nforbid (principal, action == Action::\"postgres:delete\", resource);\n"
		})
		defer undo()
		s.cli(t, on(n2, robin), "approvals", "approve", h.id)
		refused(t, h.err(t), "42501", "freeze", "nothing is deleted this week")
		present(t, 10, true)
	})
	t.Run("approver revoked meanwhile", func(t *testing.T) {
		h := s.hold(t, n1, job, sql(11))
		kim := s.TokenEnv(s.person(t, "kim", "dba"))
		s.cli(t, s.AdminEnv(), "revoke", "--subject", "people/kim", "--reason", "test")
		s.cliRefused(t, on(n3, kim), []string{"approvals", "approve", h.id}, "revoked")
		h.waits(t)
		s.cli(t, on(n3, robin), "approvals", "deny", h.id)
		refused(t, h.err(t), "42501")
		present(t, 11, true)
	})
	t.Run("requester revoked meanwhile", func(t *testing.T) {
		h := s.hold(t, n1, s.job(t, "held-and-revoked", "main", nil), sql(12))
		s.cli(t, s.AdminEnv(), "revoke", "--subject", subject("held-and-revoked"), "--reason", "test")
		if err := h.err(t); err == nil {
			t.Error("a revoked subject's statement ran")
		}
		s.cliRefused(t, on(n2, robin), []string{"approvals", "approve", h.id})
		present(t, 12, true)
	})
}

// held is a statement that waits for approval.
type held struct {
	c     *session
	id    string
	asked time.Time
	done  chan error
}

func (s *suite) hold(t *testing.T, n *cluster.Node, token, sql string) *held {
	t.Helper()
	return s.holdOn(t, s.login(t, n, "bench", token), sql)
}

// holdOn sends a statement that is to be held and waits until it is, and until
// the client has been told which request to name.
func (s *suite) holdOn(t *testing.T, c *session, sql string, args ...any) *held {
	t.Helper()
	before := s.pending(t)
	h := &held{c: c, asked: time.Now(), done: make(chan error, 1)}
	go func() {
		if len(args) == 0 {
			h.done <- c.simple(t.Context(), sql)
			return
		}
		_, err := c.Exec(t.Context(), sql, args...)
		h.done <- err
	}()
	h.id = s.newRequest(t, before)
	for {
		select {
		case notice := <-c.notices:
			if strings.Contains(notice, "sallyport approvals approve "+h.id) {
				return h
			}
		case err := <-h.done:
			t.Fatalf("held as %s, and already over: %v", h.id, err)
		case <-time.After(10 * time.Second):
			t.Fatalf("the client was not told of %s", h.id)
		}
	}
}

// waits checks that the statement still waits.
func (h *held) waits(t *testing.T) {
	t.Helper()
	select {
	case err := <-h.done:
		t.Fatalf("the statement did not wait: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
}

// err is how the statement ended.
func (h *held) err(t *testing.T) error {
	t.Helper()
	select {
	case err := <-h.done:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("the statement still waits")
		return nil
	}
}

func (s *suite) pending(t *testing.T) map[string]bool {
	t.Helper()
	var list []api.ApprovalInfo
	s.must(t, json.Unmarshal([]byte(s.cli(t, s.AdminEnv(), "approvals", "list", "--json")), &list))
	ids := map[string]bool{}
	for _, a := range list {
		ids[a.ID] = true
	}
	return ids
}

// newRequest waits for a pending request that is not in before.
func (s *suite) newRequest(t *testing.T, before map[string]bool) (id string) {
	t.Helper()
	eventually(t, 15*time.Second, func() string {
		for p := range s.pending(t) {
			if !before[p] {
				id = p
				return ""
			}
		}
		return "there is no new request for approval"
	})
	return id
}

func (s *suite) approval(t *testing.T, id string) *api.ApprovalInfo {
	t.Helper()
	c, err := s.AdminClient()
	s.must(t, err)
	a, err := c.Approval(t.Context(), id)
	s.must(t, err)
	return a
}

// ended waits until a request is in a final state.
func (s *suite) ended(t *testing.T, id, state string) {
	t.Helper()
	eventually(t, 10*time.Second, func() string {
		if a := s.approval(t, id); a.State != state {
			return fmt.Sprintf("request %s is %s, want %s", id, a.State, state)
		}
		return ""
	})
}

// testRevocation ends a subject's sessions from any node.
func testRevocation(t *testing.T, s *suite) {
	ctx := t.Context()
	for i, from := range s.Nodes {
		t.Run("from "+from.Name, func(t *testing.T) {
			name := fmt.Sprint("victim-", i)
			old := s.job(t, name, "feature", nil)
			bystander := s.job(t, "bystander", "feature", nil)
			var mine, others []*session
			for _, n := range s.Nodes {
				mine = append(mine, s.login(t, n, "bench", old), s.login(t, n, "bench", old))
				others = append(others, s.login(t, n, "bench", bystander))
			}
			// On each node one of them runs a query that takes minutes.
			mark := "/* " + name + " */"
			long := make(chan error, len(s.Nodes))
			for i := range s.Nodes {
				go func() { long <- mine[2*i].simple(ctx, "SELECT count(*) FROM generate_series(1, 2000000000) "+mark) }()
			}
			s.awaitQueries(t, mark, len(s.Nodes))

			began := time.Now()
			out := s.cli(t, on(from, s.TokenEnv(s.person(t, "sam", "security"))), "revoke", "--subject", subject(name), "--reason", "seen in a log", "--json")
			took := time.Since(began)
			var r api.RevocationInfo
			s.must(t, json.Unmarshal([]byte(out), &r))
			cut := 0
			for _, n := range r.Nodes {
				if n.State != "confirmed" {
					t.Errorf("%s: %s %s", n.Node, n.State, n.Detail)
				}
				cut += n.Sessions
			}
			if len(r.Nodes) != len(s.Nodes) || cut != len(mine) {
				t.Errorf("%d nodes cut %d sessions, want %d and %d", len(r.Nodes), cut, len(s.Nodes), len(mine))
			}
			t.Logf("revoke took %v", took)
			// It is complete when it returns: no waiting here.
			if got := s.int(t, "postgres", "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND strpos(query, $1) > 0 AND pid <> pg_backend_pid()", mark); got != 0 {
				t.Errorf("%d of its queries still run after revoke returned", got)
			}
			for range s.Nodes {
				select {
				case err := <-long:
					refused(t, err, "57P01", "seen in a log")
				case <-time.After(5 * time.Second):
					t.Fatal("a client still waits for its query")
				}
			}
			for i, c := range mine {
				if err := c.Ping(ctx); err == nil {
					t.Errorf("session %d goes on", i)
				}
			}
			for i, c := range others {
				if err := c.simple(ctx, "SELECT 1"); err != nil {
					t.Errorf("a bystander on %s is cut too: %v", s.Nodes[i].Name, err)
				}
				s.must(t, c.Close(ctx))
			}
			for _, n := range s.Nodes {
				_, err := s.tryLogin(t, n, "bench", old, nil)
				refused(t, err, "28000", "revoked", "seen in a log")
				s.cliRefused(t, on(n, s.TokenEnv(old)), []string{"whoami"}, "revoked")
			}
			_, err := s.tryLogin(t, from, "bench", s.job(t, name, "feature", nil), nil)
			refused(t, err, "28000", "revoked") // a new token does not help

			// Undone, the old token stays dead.
			s.cliRefused(t, on(from, s.TokenEnv(old)), []string{"revocations", "undo", r.ID, "--reason", "mine"}, "revoked")
			s.cli(t, on(from, s.AdminEnv()), "revocations", "undo", r.ID, "--reason", "false alarm")
			// One that was issued after, by any clock that nodes tolerate, works.
			issued := time.Now().Add(identity.Leeway + 2*time.Second)
			fresh := s.job(t, name, "feature", map[string]any{"iat": issued.Unix(), "nbf": issued.Unix()})
			time.Sleep(3 * time.Second) // until it is not from the future
			for _, n := range s.Nodes {
				_, err := s.tryLogin(t, n, "bench", old, nil)
				refused(t, err, "28000", "revoked")
				if c, err := s.tryLogin(t, n, "bench", fresh, nil); err != nil {
					t.Errorf("%s: a token issued after the undoing: %v", n.Name, err)
				} else {
					s.must(t, c.Close(ctx))
				}
			}
		})
	}
	t.Run("people", func(t *testing.T) {
		lee := s.person(t, "lee", "dba")
		for _, n := range s.Nodes {
			s.cli(t, on(n, s.TokenEnv(lee)), "status")
		}
		s.cli(t, s.AdminEnv(), "revoke", "--subject", "people/lee", "--reason", "left the company")
		for _, n := range s.Nodes {
			s.cliRefused(t, on(n, s.TokenEnv(lee)), []string{"status"}, "revoked", "left the company")
		}
	})
	t.Run("who may", func(t *testing.T) {
		s.cliRefused(t, s.TokenEnv(s.person(t, "robin", "dba")), []string{"revoke", "--subject", subject("nobody"), "--reason", "x"}, "revoke")
		s.cliRefused(t, s.AdminEnv(), []string{"revoke", "--subject", subject("nobody"), "--reason", ""}, "reason")
	})
}

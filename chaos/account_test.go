package chaos

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/sallyport/sallyport/chaos/cluster"
)

const stolen = "a-password-of-the-callers-own"

// testAccount tries to turn the account made for a session into a way in.
func testAccount(t *testing.T, s *suite) {
	ctx := t.Context()
	c := s.login(t, s.Nodes[0], "bench", s.job(t, "account", "migrate", nil))
	var role string
	s.must(t, c.QueryRow(ctx, "SELECT current_user::text").Scan(&role))
	if role == "app_migrator" || role == "sallyport" || s.roles(t, role) != 1 {
		t.Fatalf("the session's role is %q", role)
	}

	// PostgreSQL lets every role change its own password: these succeed.
	s.must(t, c.simple(ctx, "ALTER ROLE current_user PASSWORD '"+stolen+"'"))
	s.must(t, c.simple(ctx, "DO $$ BEGIN EXECUTE format('ALTER ROLE %I PASSWORD %L', current_user, '"+stolen+"'); END $$"))
	s.must(t, c.simple(ctx, `DO $$ BEGIN EXECUTE format('CREATE FUNCTION renew() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS %L',
		format('BEGIN EXECUTE %L; END', format('ALTER ROLE %I PASSWORD %L', current_user, 'a-password-of-the-callers-own'))); END $$`))
	if s.int(t, "postgres", "SELECT count(*) FROM pg_authid WHERE rolname = $1 AND rolpassword IS NOT NULL", role) != 1 {
		t.Error("the session has no password: this test does not test what it says")
	}
	// What would make it a way in does not.
	for _, sql := range []string{
		"ALTER ROLE current_user LOGIN",
		"ALTER ROLE current_user VALID UNTIL 'infinity'",
		"ALTER ROLE current_user CREATEROLE",
		"ALTER ROLE app_migrator LOGIN PASSWORD '" + stolen + "'",
		"ALTER ROLE sallyport PASSWORD '" + stolen + "'",
		"DO $$ BEGIN EXECUTE format('ALTER ROLE %I LOGIN', current_user); END $$",
		"DO $$ BEGIN CREATE ROLE intruder LOGIN PASSWORD '" + stolen + "'; END $$",
		"DO $$ BEGIN EXECUTE format('GRANT sallyport TO %I', current_user); END $$",
		"DO $$ BEGIN SET ROLE sallyport; END $$",
	} {
		refused(t, c.simple(ctx, sql), "")
	}
	if n := s.int(t, "postgres", "SELECT count(*) FROM pg_authid WHERE (rolname = $1 AND (rolcanlogin OR rolcreaterole OR rolsuper)) OR rolname = 'intruder'", role); n != 0 {
		t.Error("the session's role may log in, or made one that may")
	}
	s.noWayIn(t, role, "during the session")

	s.must(t, c.simple(ctx, "CREATE TABLE made_by_session (n bigint); INSERT INTO made_by_session VALUES (7)"))
	s.must(t, c.Close(ctx))
	eventually(t, 15*time.Second, func() string {
		if s.roles(t, role) != 0 {
			return "the role of the session that ended is still there"
		}
		return ""
	})
	s.noWayIn(t, role, "after the session")
	for what, sql := range map[string]string{
		"table":    "SELECT count(*) FROM pg_tables WHERE tablename = 'made_by_session' AND tableowner = 'app_migrator'",
		"rows":     "SELECT count(*) FROM made_by_session WHERE n = 7",
		"function": "SELECT count(*) FROM pg_proc WHERE proname = 'renew' AND proowner = 'app_migrator'::regrole",
	} {
		if s.int(t, "bench", sql) != 1 {
			t.Errorf("what the session made does not belong to the mapped role: %s", what)
		}
	}
	s.must(t, s.PG.Exec(ctx, "bench", "DROP TABLE made_by_session; DROP FUNCTION renew()"))

	t.Run("crash", func(t *testing.T) { testAccountAfterCrash(t, s) })
}

// testAccountAfterCrash kills the node in the middle of a session.
func testAccountAfterCrash(t *testing.T, s *suite) {
	ctx := t.Context()
	n := s.Nodes[2]
	c := s.login(t, n, "bench", s.job(t, "crash", "migrate", nil))
	var role string
	s.must(t, c.QueryRow(ctx, "SELECT current_user::text").Scan(&role))
	s.must(t, c.simple(ctx, "ALTER ROLE current_user PASSWORD '"+stolen+"'; CREATE TABLE made_before_crash (n bigint)"))
	n.Kill()
	if s.roles(t, role) != 1 {
		t.Error("the role is gone: this test does not test what it says")
	}
	s.noWayIn(t, role, "after the crash")
	// Nobody can tell here that node is not just slow: only it sweeps its own.
	s.must(t, n.Restart(ctx))
	eventually(t, 80*time.Second, func() string {
		if s.roles(t, role) != 0 {
			return "the role that the crash left is still there"
		}
		return ""
	})
	if s.int(t, "bench", "SELECT count(*) FROM pg_tables WHERE tablename = 'made_before_crash' AND tableowner = 'app_migrator'") != 1 {
		t.Error("what the session made does not belong to the mapped role")
	}
	s.must(t, s.PG.Exec(ctx, "bench", "DROP TABLE made_before_crash"))
	s.must(t, s.WaitReady(ctx))
}

func (s *suite) roles(t testing.TB, role string) int {
	t.Helper()
	return s.int(t, "postgres", "SELECT count(*) FROM pg_roles WHERE rolname = $1", role)
}

// noWayIn logs in to PostgreSQL directly, which must fail.
func (s *suite) noWayIn(t testing.TB, role, when string) {
	t.Helper()
	for _, password := range []string{stolen, ""} {
		conn, err := pgx.Connect(t.Context(), s.PG.DSNFor(role, password, "bench"))
		if err == nil {
			conn.Close(t.Context())
			t.Errorf("%s: a direct login with the session's role succeeds", when)
			continue
		}
		refused(t, err, "28")
	}
}

// testPolicy has statements refused.
func testPolicy(t *testing.T, s *suite) {
	ctx := t.Context()
	for i, n := range s.Nodes {
		t.Run("drop table/"+n.Name, func(t *testing.T) {
			c := s.login(t, n, "shop", s.job(t, fmt.Sprint("drop-", i), "migrate", nil))
			refused(t, c.simple(ctx, "DROP TABLE orders"), "42501", "no-drop-table", "tables are dropped by the database team only")
			_, err := c.Exec(ctx, "DROP TABLE orders", pgx.QueryExecModeCacheStatement)
			refused(t, err, "42501", "no-drop-table")
			if s.int(t, "shop", "SELECT count(*) FROM orders") != 100 {
				t.Error("the table is not what it was")
			}
		})
	}
	c := s.login(t, s.Nodes[0], "bench", s.job(t, "policy", "main", nil))

	t.Run("several in one string", func(t *testing.T) {
		refused(t, c.simple(ctx, "INSERT INTO scratch VALUES (1); DROP TABLE scratch; INSERT INTO scratch VALUES (2)"), "42501", "no-drop-table")
		refused(t, c.simple(ctx, "INSERT INTO scratch VALUES (1); COMMIT; CREATE TABLE other (n int)"), "42501")
		if got := s.int(t, "bench", "SELECT count(*) FROM scratch"); got != 0 {
			t.Errorf("%d rows of refused strings are there", got)
		}
		s.must(t, c.simple(ctx, "INSERT INTO scratch VALUES (3); SELECT count(*) FROM scratch; INSERT INTO scratch VALUES (4)"))
		if got := s.int(t, "bench", "SELECT count(*) FROM scratch"); got != 2 {
			t.Errorf("%d rows of permitted strings are there, want 2", got)
		}
	})
	for name, x := range map[string]struct{ sql, code, says string }{
		"unparsable":        {"SELEC 1", "", "pars"},
		"unparsable tail":   {"SELECT 1; DROP TABL scratch", "", "pars"},
		"unpermitted":       {"CREATE TABLE mine (n int)", "42501", "default-deny"},
		"function":          {"SELECT pg_sleep(0)", "42501", "postgres:call"},
		"file":              {"SELECT pg_read_file('/etc/passwd')", "42501", "postgres:call"},
		"dblink-like":       {"SELECT lo_import('/etc/passwd')", "42501", ""},
		"setting functions": {"SELECT set_config('search_path', 'evil', false)", "42501", ""},
		"program":           {"COPY scratch TO PROGRAM 'cat'", "42501", "postgres:copy_program"},
		"server file":       {"COPY scratch FROM '/etc/passwd'", "42501", "postgres:copy_file"},
		"do":                {"DO $$ BEGIN END $$", "42501", "postgres:do"},
		"set role":          {"SET ROLE app_migrator", "42501", ""},
		"authorization":     {"SET SESSION AUTHORIZATION app_migrator", "42501", ""},
		"grant":             {"GRANT app_migrator TO current_user", "42501", "postgres:grant"},
		"pinned setting":    {"SET standard_conforming_strings = off", "42501", "standard_conforming_strings"},
		"pinned encoding":   {"SET client_encoding = 'LATIN1'", "42501", "client_encoding"},
		"hidden in prepare": {"PREPARE p AS SELECT pg_sleep(0)", "42501", "postgres:call"},
		"hidden in CTE":     {"WITH d AS (DELETE FROM scratch RETURNING *) SELECT pg_sleep(n) FROM d", "42501", "postgres:call"},
		"hidden in explain": {"EXPLAIN ANALYZE CREATE TABLE mine AS SELECT 1", "42501", "postgres:create_table"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, c.simple(ctx, x.sql), x.code, x.says, "sallyport")
			_, err := c.PgConn().Prepare(ctx, "", x.sql, nil)
			if err == nil {
				_, err = c.Exec(ctx, x.sql, pgx.QueryExecModeExec)
			}
			refused(t, err, x.code, x.says)
			var one int
			if err := c.QueryRow(ctx, "SELECT 1").Scan(&one); err != nil {
				t.Fatalf("the session does not go on after a refusal: %v", err)
			}
		})
	}
	t.Run("refusals are in the recording", func(t *testing.T) {
		s.must(t, c.Close(ctx))
		var seen int
		for _, e := range s.sessionOf(t, subject("policy")) {
			if e.Effect == "refuse" && e.Rule == "no-drop-table" {
				seen++
			}
		}
		if seen == 0 {
			t.Error("the recording has no refusal by no-drop-table")
		}
	})
	t.Run("FunctionCall", func(t *testing.T) {
		c := s.login(t, s.Nodes[0], "bench", s.job(t, "functioncall", "main", nil))
		h, err := c.PgConn().Hijack()
		s.must(t, err)
		defer h.Conn.Close()
		h.Conn.SetDeadline(time.Now().Add(10 * time.Second))
		h.Frontend.Send(&pgproto3.FunctionCall{Function: 2626, ArgFormatCodes: []uint16{1}, Arguments: [][]byte{make([]byte, 8)}, ResultFormatCode: 1}) // pg_sleep
		s.must(t, h.Frontend.Flush())
		m, err := h.Frontend.Receive()
		s.must(t, err)
		e, ok := m.(*pgproto3.ErrorResponse)
		if !ok || !strings.Contains(e.Message, "sallyport") {
			t.Errorf("FunctionCall is answered with %#v", m)
		}
	})
}

// testStartup sends what must not begin a session.
func testStartup(t *testing.T, s *suite) {
	n := s.Nodes[1]
	token := s.job(t, "start-up", "main", nil)
	for name, x := range map[string]struct {
		param, value, code string
		says               []string
	}{
		"replication":          {"replication", "database", "0A000", []string{"replication"}},
		"physical replication": {"replication", "true", "0A000", []string{"replication"}},
		"options":              {"options", "-c session_replication_role=replica", "", []string{"sallyport"}},
		"role":                 {"role", "app_migrator", "42501", []string{"role"}},
		"search_path":          {"session_preload_libraries", "evil", "42501", []string{"session_preload_libraries"}},
		"pinned":               {"standard_conforming_strings", "off", "42501", []string{"standard_conforming_strings"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.tryLogin(t, n, "bench", token, func(c *pgx.ConnConfig) { c.RuntimeParams[x.param] = x.value })
			refused(t, err, x.code, x.says...)
		})
	}
	t.Run("harmless parameters", func(t *testing.T) {
		c, err := s.tryLogin(t, n, "bench", token, func(c *pgx.ConnConfig) {
			c.RuntimeParams["application_name"] = "acceptance"
			c.RuntimeParams["DateStyle"] = "ISO"
		})
		s.must(t, err)
		s.must(t, c.Ping(t.Context()))
	})
	t.Run("unknown target", func(t *testing.T) {
		_, err := s.tryLogin(t, n, "bench", token, func(c *pgx.ConnConfig) { c.User = "nowhere" })
		refused(t, err, "28000", "nowhere")
	})
	t.Run("unknown database", func(t *testing.T) {
		_, err := s.tryLogin(t, n, "postgres", token, nil)
		refused(t, err, "3D000", "postgres")
	})
	psql := func(t *testing.T, env ...string) (string, error) {
		cmd, err := n.Command(t.Context(), "psql", "bench", token, "-X", "-A", "-t", "-c", `SELECT 'let in'`, "-c", `\conninfo`)
		s.must(t, err)
		cmd.Env = append(cmd.Env, env...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	t.Run("plaintext", func(t *testing.T) {
		out, err := psql(t, "PGSSLMODE=disable")
		if err == nil || !strings.Contains(out, "plaintext logins are refused") {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("sslmode=prefer", func(t *testing.T) {
		out, err := psql(t, "PGSSLMODE=prefer", "PGGSSENCMODE=prefer")
		if err != nil || !strings.Contains(out, "let in") || !strings.Contains(out, "SSL connection") {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("other certificate", func(t *testing.T) {
		out, err := psql(t, "PGSSLROOTCERT="+s.PG.CAFile)
		if err == nil || !strings.Contains(out, "certificate verify failed") {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("GSSAPI probe", func(t *testing.T) { testGSSProbe(t, n, token) })
}

// testGSSProbe asks for GSSAPI encryption first, as clients with a ticket do.
func testGSSProbe(t *testing.T, n *cluster.Node, token string) {
	cfg, err := pgconn.ParseConfig(n.DSN("bench", token))
	if err != nil {
		t.Fatal(err)
	}
	dial := cfg.DialFunc
	probed := false
	cfg.DialFunc = func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		if c, err = dial(ctx, network, addr); err != nil {
			return nil, err
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		defer c.SetDeadline(time.Time{})
		if _, err := c.Write([]byte{0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30}); err != nil { // GSSENCRequest
			return nil, err
		}
		answer := make([]byte, 1)
		if _, err := c.Read(answer); err != nil {
			return nil, err
		}
		if answer[0] != 'N' {
			return nil, fmt.Errorf("the probe is answered with %q", answer)
		}
		probed = true
		return c, nil
	}
	conn, err := pgconn.ConnectConfig(t.Context(), cfg)
	if err != nil || !probed {
		t.Fatalf("after the probe: %v", err)
	}
	conn.Close(t.Context())
}

package credential

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	osexec "os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/protocoltest/pgserver"
)

const adminPassword = "an admin's pass'word"

// env is a target set up the way SetupSQL says, by psql.
type env struct {
	s      *pgserver.Server
	iss    *Issuer
	target TargetConfig
	db     string
	suffix string
	app    string // the mapped role
}

var (
	serverOnce sync.Once
	server     *pgserver.Server
	serverErr  error
)

func TestMain(m *testing.M) {
	code := m.Run()
	if server != nil {
		server.Stop()
	}
	os.Exit(code)
}

// sharedServer logs all statements, as a server of somebody careful does.
func sharedServer(t *testing.T) *pgserver.Server {
	t.Helper()
	serverOnce.Do(func() {
		server, serverErr = pgserver.Run(context.Background(), pgserver.Options{
			LogStatements: true, Settings: map[string]string{"max_prepared_transactions": "5"},
		})
	})
	if serverErr != nil {
		t.Fatal(serverErr)
	}
	return server
}

var envs int

func newEnv(t *testing.T) *env {
	t.Helper()
	s := sharedServer(t)
	envs++
	e := &env{s: s, suffix: fmt.Sprint(envs)}
	e.app = "app rw " + e.suffix // a name that needs quoting
	admin := "sallyport" + e.suffix
	e.db = s.CreateDatabase(t)
	s.MustExec(t, e.db, fmt.Sprintf(`CREATE ROLE %[1]q NOLOGIN; GRANT CREATE, USAGE ON SCHEMA public TO %[1]q;
		CREATE TABLE t(id int); INSERT INTO t VALUES (1); ALTER TABLE t OWNER TO %[1]q`, e.app))
	verifier, err := SCRAMVerifier(adminPassword)
	if err != nil {
		t.Fatal(err)
	}
	script := SetupSQL(SetupOptions{Target: "prod\n-db", Admin: admin, Verifier: verifier, Roles: []string{e.app}, Databases: []string{e.db}})
	for range 2 { // it can be run again
		cmd := osexec.Command(pgserver.PSQL(t), "-X", "-q", s.DSN("postgres"))
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("setup: %v\n%s\n%s", err, out, script)
		}
	}
	e.target = TargetConfig{
		Name: "prod-db", Address: s.Addr, CA: s.CAPEM, AdminUser: admin, AdminPassword: vault.NewSecret(adminPassword),
		Roles: []RoleRule{{Groups: []string{"other"}, Role: "nobody"}, {Groups: []string{"x", "jobs"}, Role: e.app}, {Groups: []string{"jobs"}, Profile: "ro", Role: "missing role"}},
	}
	e.iss = e.issuer(t, "n1")
	return e
}

func (e *env) issuer(t *testing.T, node string) *Issuer {
	t.Helper()
	i := NewIssuer(Options{Cluster: "acme" + e.suffix, Node: node})
	t.Cleanup(i.Close)
	if err := i.Update([]TargetConfig{e.target}); err != nil {
		t.Fatal(err)
	}
	return i
}

var subject = &policy.Subject{Kind: policy.Workload, Provider: "ci", Name: "job", Groups: []string{"jobs"}}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func (e *env) issue(t *testing.T, session string) *Lease {
	t.Helper()
	l, err := e.iss.Issue(testContext(t), "prod-db", subject, session, e.db, "")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// login connects as the lease says, the way a protocol does.
func (e *env) login(t *testing.T, l *Lease, password string) (*pgx.Conn, error) {
	t.Helper()
	cfg, err := pgx.ParseConfig("host=localhost port=5432 sslmode=disable dbname=x user=x")
	if err != nil {
		t.Fatal(err)
	}
	cfg.User, cfg.Password, cfg.Database, cfg.TLSConfig, cfg.RequireAuth = l.User(), password, e.db, l.TLS(), "scram-sha-256"
	cfg.LookupFunc = func(context.Context, string) ([]string, error) { return []string{"x"}, nil }
	cfg.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) { return l.Dial(ctx) }
	cfg.DefaultQueryExecMode = pgx.QueryExecModeExec
	c, err := pgx.ConnectConfig(testContext(t), cfg)
	if err == nil {
		t.Cleanup(func() { c.Close(context.Background()) })
	}
	return c, err
}

// begin issues, logs in and takes LOGIN away.
func (e *env) begin(t *testing.T, session string) (*Lease, *pgx.Conn) {
	t.Helper()
	l := e.issue(t, session)
	c, err := e.login(t, l, l.Password())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.LoggedIn(testContext(t), c.PgConn().PID()); err != nil {
		t.Fatal(err)
	}
	return l, c
}

func (e *env) one(t *testing.T, db, sql string, args ...any) string {
	t.Helper()
	c := e.s.Conn(t, db)
	var out *string
	if err := c.QueryRow(testContext(t), sql, args...).Scan(&out); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	if out == nil {
		return "NULL"
	}
	return *out
}

func (e *env) roleExists(t *testing.T, name string) bool {
	t.Helper()
	return e.one(t, "postgres", "SELECT count(*)::text FROM pg_roles WHERE rolname = $1", name) == "1"
}

func TestLifeOfARole(t *testing.T) {
	e := newEnv(t)
	if err := e.iss.Check(testContext(t), "prod-db"); err == nil || !strings.Contains(err.Error(), "missing role") || strings.Contains(err.Error(), e.app) {
		t.Errorf("check: %v", err)
	}
	l := e.issue(t, "s1")
	if !jitName.MatchString(l.User()) || l.Role() != e.app {
		t.Errorf("user %q role %q", l.User(), l.Role())
	}
	if got := e.one(t, "postgres", `SELECT rolcanlogin::text||rolinherit||rolconnlimit||rolsuper||rolcreaterole||rolcreatedb||rolreplication||rolbypassrls||
		(rolvaliduntil BETWEEN now() + '100 seconds' AND now() + '121 seconds') FROM pg_roles WHERE rolname=$1`, l.User()); got != "truetrue1falsefalsefalsefalsefalsetrue" {
		t.Errorf("role: %s", got)
	}
	c, err := e.login(t, l, l.Password())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.login(t, l, l.Password()); err == nil {
		t.Error("a second login succeeded before LoggedIn")
	}
	if err := l.LoggedIn(testContext(t), c.PgConn().PID()); err != nil {
		t.Fatal(err)
	}
	if got := e.one(t, "postgres", `SELECT rolcanlogin::text||rolconnlimit||(rolvaliduntil < now())||(rolpassword IS NULL) FROM pg_authid WHERE rolname=$1`, l.User()); got != "false0truetrue" {
		t.Errorf("role after login: %s", got)
	}
	if _, err := e.login(t, l, l.Password()); err == nil {
		t.Error("a login succeeded after LoggedIn")
	}
	var n int
	if err := c.QueryRow(testContext(t), "SELECT count(*) FROM t").Scan(&n); err != nil || n != 1 {
		t.Errorf("session: %d %v", n, err)
	}
	c.Close(context.Background())
	for range 2 {
		if err := l.Release(testContext(t)); err != nil {
			t.Fatal(err)
		}
	}
	if e.roleExists(t, l.User()) {
		t.Error("role is still there")
	}
	// Neither password is in the server's log, which holds every statement.
	log, err := os.ReadFile(e.s.LogFile)
	if err != nil || !strings.Contains(string(log), l.User()) {
		t.Fatalf("log: %v", err)
	}
	for _, p := range []string{l.Password(), adminPassword} {
		if strings.Contains(string(log), p) {
			t.Error("the server's log shows a password")
		}
	}
	for _, text := range []string{fmt.Sprint(l), fmt.Sprintf("%v", l), fmt.Sprintf("%+v", e.target)} {
		if strings.Contains(text, l.Password()) || strings.Contains(text, adminPassword) {
			t.Errorf("printing shows a password: %s", text)
		}
	}
}

// Whatever a session does to its own account, nobody gets in with it.
func TestNoWayIn(t *testing.T) {
	e := newEnv(t)
	e.s.MustExec(t, "postgres", fmt.Sprintf(`CREATE ROLE outsider%[1]s LOGIN PASSWORD 'o'; CREATE ROLE bystander%[1]s NOLOGIN`, e.suffix))
	other, _ := e.begin(t, "other")
	l, c := e.begin(t, "s")
	admin := e.target.AdminUser
	for _, sql := range []string{
		"ALTER ROLE CURRENT_USER PASSWORD 'x'",
		"DO $$ BEGIN EXECUTE format('ALTER ROLE %I PASSWORD ''x''', current_user); END $$",
		"DO $$ BEGIN EXECUTE format('ALTER USER %I WITH LOGIN PASSWORD ''x''', session_user); END $$",
		"ALTER ROLE CURRENT_USER LOGIN",
		"ALTER ROLE CURRENT_USER CONNECTION LIMIT -1",
		"ALTER ROLE CURRENT_USER VALID UNTIL 'infinity'",
		"ALTER ROLE " + ident(e.app) + " LOGIN PASSWORD 'x'",
		"SET ROLE " + ident(e.app) + "; ALTER ROLE CURRENT_USER LOGIN PASSWORD 'x'; RESET ROLE",
		"SET ROLE " + ident(e.app) + "; ALTER ROLE CURRENT_USER PASSWORD 'x'",
		"RESET ROLE",
		"SET ROLE " + ident(other.User()),
		"SET ROLE " + ident(admin),
		"SET SESSION AUTHORIZATION " + ident(other.User()),
		"GRANT " + ident(l.User()) + " TO outsider" + e.suffix,
		"GRANT " + ident(e.app) + " TO outsider" + e.suffix,
		"GRANT " + ident(e.app) + " TO bystander" + e.suffix,
		"REVOKE " + ident(l.User()) + " FROM " + ident(admin),
		"CREATE ROLE backdoor" + e.suffix + " LOGIN PASSWORD 'x'",
		"COMMENT ON ROLE " + ident(l.User()) + " IS 'x'",
		"ALTER ROLE " + ident(l.User()) + " RENAME TO harmless" + e.suffix,
		"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = " + literal(admin),
	} {
		_, err := c.Exec(testContext(t), sql, pgx.QueryExecModeSimpleProtocol)
		t.Logf("%-90s %v", sql, err)
	}
	for _, role := range []string{l.User(), e.app, "backdoor" + e.suffix, "harmless" + e.suffix} {
		if e.one(t, "postgres", "SELECT count(*)::text FROM pg_roles WHERE rolname = $1 AND rolcanlogin", role) != "0" {
			t.Errorf("%s may log in", role)
		}
	}
	if n := e.one(t, "postgres", "SELECT count(*)::text FROM pg_auth_members m JOIN pg_roles r ON r.oid=m.member WHERE r.rolname IN ($1,$2)", "outsider"+e.suffix, "bystander"+e.suffix); n != "0" {
		t.Errorf("the session let %s others in", n)
	}
	for _, password := range []string{"x", l.Password(), ""} {
		if _, err := e.login(t, l, password); err == nil {
			t.Errorf("logged in with %q while the session was there", password)
		}
	}
	c.Close(context.Background())
	if err := l.Release(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := e.login(t, l, "x"); err == nil {
		t.Error("logged in after the session")
	}
	if !e.roleExists(t, other.User()) {
		t.Error("another session's role is gone")
	}
	if err := other.Release(testContext(t)); err != nil { // its connection is still open: it is ended
		t.Fatal(err)
	}
}

func TestReleaseHandsOver(t *testing.T) {
	e := newEnv(t)
	l, c := e.begin(t, "s")
	for _, sql := range []string{
		"CREATE TABLE mine(id serial PRIMARY KEY)", "CREATE SCHEMA AUTHORIZATION CURRENT_USER", // fails: no CREATE on the database
		"CREATE VIEW v AS SELECT * FROM mine", "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", "CREATE TYPE ty AS (a int)",
		"GRANT SELECT ON t TO CURRENT_USER", "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC",
		"ALTER TABLE t ENABLE ROW LEVEL SECURITY", "CREATE POLICY p ON t TO CURRENT_USER USING (true)",
		"CREATE TEMP TABLE tmp(i int)",
		"BEGIN", "CREATE TABLE prepared(i int)", "PREPARE TRANSACTION 'it''s'",
	} {
		if _, err := c.Exec(testContext(t), sql, pgx.QueryExecModeSimpleProtocol); err != nil && !strings.Contains(sql, "SCHEMA AUTH") && !strings.Contains(sql, "PREPARE") && !strings.Contains(sql, "prepared") {
			t.Fatalf("%s: %v", sql, err)
		} else if err != nil {
			t.Logf("%s: %v", sql, err)
			c.Exec(testContext(t), "ROLLBACK")
		}
	}
	// A temporary table forbids PREPARE in its session; a second transaction does not touch it.
	if _, err := c.Exec(testContext(t), "BEGIN; CREATE TABLE prepared2(i int); PREPARE TRANSACTION 'it''s'", pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Logf("prepare: %v", err)
	}
	t.Logf("prepared transactions: %s", e.one(t, e.db, "SELECT count(*)::text FROM pg_prepared_xacts"))
	c.Close(context.Background())
	if err := l.Release(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if e.roleExists(t, l.User()) {
		t.Fatal("role is still there")
	}
	for _, sql := range []string{
		"SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relname='mine'", "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relname='mine_id_seq'",
		"SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relname='v'", "SELECT pg_get_userbyid(proowner) FROM pg_proc WHERE proname='f'",
		"SELECT pg_get_userbyid(typowner) FROM pg_type WHERE typname='ty'",
	} {
		if got := e.one(t, e.db, sql); got != e.app {
			t.Errorf("%s: %s", sql, got)
		}
	}
	if n := e.one(t, e.db, "SELECT count(*)::text FROM pg_prepared_xacts"); n != "0" {
		t.Errorf("%s prepared transactions left", n)
	}
}

func TestCancelTerminate(t *testing.T) {
	e := newEnv(t)
	l, c := e.begin(t, "s")
	run := func() chan error {
		done := make(chan error, 1)
		go func() {
			_, err := c.Exec(context.Background(), "SELECT pg_sleep(60)")
			done <- err
		}()
		for range 200 {
			if e.one(t, "postgres", "SELECT count(*)::text FROM pg_stat_activity WHERE usename=$1 AND state='active'", l.User()) == "1" {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		return done
	}
	code := func(err error) string {
		var pe *pgconn.PgError
		errors.As(err, &pe)
		if pe == nil {
			return fmt.Sprint(err)
		}
		return pe.Code
	}
	done := run()
	if err := l.Cancel(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if got := code(<-done); got != "57014" {
		t.Errorf("cancel: %s", got)
	}
	done = run()
	start := time.Now()
	if err := l.Terminate(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("terminate took %v", d)
	}
	if got := code(<-done); got != "57P01" {
		t.Errorf("terminate: %s", got)
	}
	if n := e.one(t, "postgres", "SELECT count(*)::text FROM pg_stat_activity WHERE usename=$1", l.User()); n != "0" {
		t.Errorf("%s backends left", n)
	}
	if err := l.Terminate(testContext(t)); err != nil {
		t.Error(err)
	}
	if err := l.Release(testContext(t)); err != nil {
		t.Error(err)
	}
	// After the role is gone all of it is harmless.
	for _, f := range []func(context.Context) error{l.Cancel, l.Terminate, l.Release} {
		if err := f(testContext(t)); err != nil {
			t.Error(err)
		}
	}
}

// Should the administrative account lose its membership in the role, it takes it back.
func TestMembershipLost(t *testing.T) {
	e := newEnv(t)
	l, _ := e.begin(t, "s")
	e.s.MustExec(t, "postgres", "REVOKE "+ident(l.User())+" FROM "+ident(e.target.AdminUser))
	if err := l.Terminate(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if err := l.Release(testContext(t)); err != nil {
		t.Fatal(err)
	}
}

func TestLoggedInWrongBackend(t *testing.T) {
	e := newEnv(t)
	l := e.issue(t, "s")
	c, err := e.login(t, l, l.Password())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.LoggedIn(testContext(t), c.PgConn().PID()+1); err == nil || !strings.Contains(err.Error(), "pooler") {
		t.Errorf("got %v", err)
	}
	if _, err := c.Exec(testContext(t), "SELECT 1"); err == nil {
		t.Error("the connection still works")
	}
	if _, err := e.login(t, l, l.Password()); err == nil {
		t.Error("logged in again")
	}
	if err := l.Release(testContext(t)); err != nil {
		t.Error(err)
	}
}

func TestIssueRefuses(t *testing.T) {
	e := newEnv(t)
	s := e.s
	x := e.suffix
	s.MustExec(t, "postgres", fmt.Sprintf(`CREATE ROLE can_login%[1]s LOGIN; CREATE ROLE can_create%[1]s CREATEROLE; CREATE ROLE su%[1]s SUPERUSER;
		CREATE ROLE member_of_login%[1]s; GRANT can_login%[1]s TO member_of_login%[1]s; CREATE ROLE deep%[1]s; GRANT member_of_login%[1]s TO deep%[1]s;
		CREATE ROLE prog%[1]s; GRANT pg_execute_server_program TO prog%[1]s; CREATE ROLE adm%[1]s; CREATE ROLE x%[1]s; GRANT x%[1]s TO adm%[1]s WITH ADMIN OPTION;
		CREATE ROLE noconn%[1]s; CREATE ROLE "quo""te%[1]s"`, x))
	s.MustExec(t, "postgres", "CREATE DATABASE closed"+x)
	s.MustExec(t, "postgres", "REVOKE CONNECT ON DATABASE closed"+x+" FROM PUBLIC")
	issue := func(role, db, profile string, groups ...string) error {
		target := e.target
		target.Roles = []RoleRule{{Groups: []string{"jobs"}, Role: role}}
		if err := e.iss.Update([]TargetConfig{target}); err != nil {
			t.Fatal(err)
		}
		l, err := e.iss.Issue(testContext(t), "prod-db", &policy.Subject{Groups: groups}, "s", db, profile)
		if err == nil {
			l.Release(testContext(t))
		}
		return err
	}
	for _, tc := range []struct{ role, db, profile, group, rule, says string }{
		{"can_login" + x, e.db, "", "jobs", "target-role", "may log in"},
		{"can_create" + x, e.db, "", "jobs", "target-role", "may create roles"},
		{"su" + x, e.db, "", "jobs", "target-role", "superuser"},
		{"deep" + x, e.db, "", "jobs", "target-role", "member of can_login"},
		{"prog" + x, e.db, "", "jobs", "target-role", "beyond the database"},
		{"adm" + x, e.db, "", "jobs", "target-role", "ADMIN OPTION"},
		{e.target.AdminUser, e.db, "", "jobs", "target-role", ""},
		{"nobody", e.db, "", "jobs", "target-role", "no role nobody"},
		{"noconn" + x, "closed" + x, "", "jobs", "target-role", "may not connect"},
		{e.app, "nosuch", "", "jobs", "unknown-database", "nosuch"},
		{e.app, "template1", "", "jobs", "unknown-database", ""},
		{e.app, e.db, "", "strangers", "no-role", "none of your groups"},
		{e.app, e.db, "ro", "jobs", "no-role", "no profile"},
	} {
		err := issue(tc.role, tc.db, tc.profile, tc.group)
		var r *protocols.Refusal
		if !errors.As(err, &r) || r.Rule != tc.rule || !strings.Contains(r.Reason, tc.says) {
			t.Errorf("%+v: got %v", tc, err)
		}
	}
	// A name that tries to leave its quotes: on 15 CREATEROLE may grant it.
	if err := issue(`quo"te`+x, e.db, "", "jobs"); err != nil && sharedServer(t).Version < 16 {
		t.Error(err)
	}
	if n := e.one(t, "postgres", `SELECT count(*)::text FROM pg_roles r JOIN pg_shdescription d ON d.objoid=r.oid WHERE rolname ~ '^sp_' AND d.description LIKE $1`, "%acme"+x+"\"%"); n != "0" {
		t.Errorf("%s roles left", n)
	}
	if _, err := e.iss.Issue(testContext(t), "nosuch", subject, "s", e.db, ""); err == nil {
		t.Error("unknown target accepted")
	}
}

func TestSweep(t *testing.T) {
	e := newEnv(t)
	ctx := testContext(t)
	state := map[string]Liveness{}
	ask := func(node, session string) Liveness { return state[node+"/"+session] }
	sweep := func(i *Issuer, want int) {
		t.Helper()
		if n, err := i.Sweep(ctx, "prod-db", ask); err != nil || n != want {
			t.Errorf("swept %d, want %d: %v", n, want, err)
		}
	}
	// Our own, held by a lease: stays, whatever is said about it.
	held, _ := e.begin(t, "held")
	state["n1/held"] = Dead
	sweep(e.iss, 0)

	// What a crash leaves: the process that held the lease is another now.
	crashed, conn := e.begin(t, "crashed")
	if _, err := conn.Exec(ctx, "CREATE TABLE left_behind(i int)"); err != nil {
		t.Fatal(err)
	}
	restarted := e.issuer(t, "n1")
	sweep(restarted, 0) // nothing known
	state["n1/crashed"] = Live
	sweep(restarted, 0)
	state["n1/crashed"] = Dead
	state["n1/held"] = Live
	sweep(restarted, 0) // its backend is still there
	conn.Close(ctx)
	waitGone(t, e, crashed.User())
	sweep(restarted, 1)
	if e.roleExists(t, crashed.User()) {
		t.Error("swept role is still there")
	}
	if got := e.one(t, e.db, "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relname='left_behind'"); got != e.app {
		t.Errorf("table is %s's", got)
	}

	// Crashed between creation and login: waits for the end of its LOGIN.
	fresh := e.issue(t, "fresh")
	state["n1/fresh"] = Dead
	sweep(restarted, 0)
	e.s.MustExec(t, "postgres", "ALTER ROLE "+ident(fresh.User())+" VALID UNTIL '2001-01-01'")
	sweep(restarted, 1)

	// Another node's: stays until its latest end, then goes with its backends.
	n2 := e.issuer(t, "n2")
	live, _ := e.begin(t, "live") // of n1
	state["n1/live"] = Live
	sweep(n2, 0)
	state["n1/live"] = Unknown
	sweep(n2, 0)
	expire := func(l *Lease, ago time.Duration) {
		e.s.MustExec(t, "postgres", fmt.Sprintf(`DO $$ BEGIN EXECUTE format('COMMENT ON ROLE %%I IS %%L', '%[1]s',
			jsonb_set(shobj_description((SELECT oid FROM pg_roles WHERE rolname='%[1]s'),'pg_authid')::jsonb, '{expires}', to_jsonb(extract(epoch from now())::int8 - %[2]d))::text); END $$`,
			l.User(), int(ago.Seconds())))
	}
	expire(live, sweepMargin-time.Minute)
	sweep(n2, 0)
	expire(live, sweepMargin+time.Minute)
	sweep(n2, 1)
	if e.roleExists(t, live.User()) || !e.roleExists(t, held.User()) {
		t.Error("the wrong role went")
	}

	// Another cluster's, and a role that only looks like ours.
	foreign := NewIssuer(Options{Cluster: "umbrella", Node: "n1"})
	defer foreign.Close()
	if err := foreign.Update([]TargetConfig{e.target}); err != nil {
		t.Fatal(err)
	}
	state["n1/held"] = Dead
	expire(held, 24*time.Hour)
	sweep(foreign, 0)
	lookalike := "sp_0123456789abcdef_202601010000"
	e.s.MustExec(t, "postgres", "CREATE ROLE "+lookalike)
	defer e.s.MustExec(t, "postgres", "DROP ROLE "+lookalike)
	sweep(e.iss, 0)
	if !e.roleExists(t, lookalike) || !e.roleExists(t, held.User()) {
		t.Error("a role that was not ours to drop is gone")
	}
	if err := held.Release(ctx); err != nil {
		t.Error(err)
	}
}

func waitGone(t *testing.T, e *env, user string) {
	t.Helper()
	for range 300 {
		if e.one(t, "postgres", "SELECT count(*)::text FROM pg_stat_activity WHERE usename=$1", user) == "0" {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s still has a backend", user)
}

// A lock that somebody holds delays a release; the role is harmless meanwhile
// and the sweeper ends it.
func TestReleaseBlocked(t *testing.T) {
	e := newEnv(t)
	l, c := e.begin(t, "s")
	if _, err := c.Exec(testContext(t), "CREATE TABLE busy(i int)"); err != nil {
		t.Fatal(err)
	}
	c.Close(context.Background())
	locker := e.s.Conn(t, e.db)
	if _, err := locker.Exec(testContext(t), "BEGIN; LOCK TABLE busy", pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := l.Release(ctx); err == nil {
		t.Fatal("released while the table was locked")
	}
	if e.one(t, "postgres", "SELECT rolcanlogin::text FROM pg_roles WHERE rolname=$1", l.User()) != "false" {
		t.Error("the role may log in")
	}
	if _, err := locker.Exec(testContext(t), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if n, err := e.iss.Sweep(testContext(t), "prod-db", func(string, string) Liveness { return Dead }); n != 1 || err != nil {
		t.Errorf("swept %d: %v", n, err)
	}
}

func TestTLS(t *testing.T) {
	e := newEnv(t)
	_, port, _ := net.SplitHostPort(e.s.Addr)
	other := newEnvCA(t)
	for name, f := range map[string]func(*TargetConfig){
		"other CA":         func(c *TargetConfig) { c.CA = other },
		"system CAs":       func(c *TargetConfig) { c.CA = nil },
		"other name":       func(c *TargetConfig) { c.ServerName = "db.example.com" },
		"verify-ca, other": func(c *TargetConfig) { c.TLSMode, c.CA = TLSVerifyCA, other },
		"wrong password":   func(c *TargetConfig) { c.AdminPassword = vault.NewSecret("x") },
		"address is name":  func(c *TargetConfig) { c.Address, c.ServerName = net.JoinHostPort("127.0.0.1", port), "evil.localhost" },
	} {
		c := e.target
		f(&c)
		i := NewIssuer(Options{Cluster: "a", Node: "n"})
		if err := i.Update([]TargetConfig{c}); err != nil {
			t.Fatal(err)
		}
		_, err := i.Issue(testContext(t), "prod-db", subject, "s", e.db, "")
		if err == nil {
			t.Errorf("%s: accepted", name)
		} else if strings.Contains(err.Error(), adminPassword) {
			t.Errorf("%s: error shows the password: %v", name, err)
		}
		i.Close()
	}
	byCA := e.target
	byCA.TLSMode, byCA.ServerName = TLSVerifyCA, "db.example.com"
	if err := e.iss.Update([]TargetConfig{byCA}); err != nil {
		t.Fatal(err)
	}
	if l, c := e.begin(t, "verify-ca"); true {
		c.Close(context.Background())
		if err := l.Release(testContext(t)); err != nil {
			t.Error(err)
		}
	}
	if err := e.iss.Update([]TargetConfig{e.target}); err != nil {
		t.Fatal(err)
	}
	// The session's own connection checks the server just as well.
	l := e.issue(t, "s")
	tc := l.TLS()
	if tc.InsecureSkipVerify || tc.ServerName != "127.0.0.1" || tc.RootCAs == nil || tc.MinVersion < tls.VersionTLS12 {
		t.Errorf("TLS of the lease: %+v", tc)
	}
	if err := l.Release(testContext(t)); err != nil {
		t.Error(err)
	}
	plain := e.target
	plain.TLSMode = TLSDisable
	if err := e.iss.Update([]TargetConfig{plain}); err == nil || !strings.Contains(err.Error(), "--dev") {
		t.Errorf("tls disable without --dev: %v", err)
	}
}

// newEnvCA is the certificate of an authority the server's is not from.
func newEnvCA(t *testing.T) []byte {
	t.Helper()
	out, err := osexec.Command("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "/dev/null", "-subj", "/CN=other", "-days", "1").Output()
	if err != nil {
		t.Skipf("openssl: %v", err)
	}
	return out
}

// A server, or whoever stands in its place, that wants the password in a way
// other than SCRAM, or that wants none, gets nothing.
func TestAuthenticationPinned(t *testing.T) {
	for name, ask := range map[string]pgproto3.BackendMessage{
		"cleartext": &pgproto3.AuthenticationCleartextPassword{},
		"md5":       &pgproto3.AuthenticationMD5Password{Salt: [4]byte{1, 2, 3, 4}},
		"trust":     &pgproto3.AuthenticationOk{},
		"gss":       &pgproto3.AuthenticationGSS{},
		"oauth":     &pgproto3.AuthenticationSASL{AuthMechanisms: []string{"OAUTHBEARER"}},
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan pgproto3.FrontendMessage, 1)
		go func() {
			defer close(got)
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(5 * time.Second))
			b := pgproto3.NewBackend(c, c)
			if _, err := b.ReceiveStartupMessage(); err != nil {
				return
			}
			b.Send(ask)
			if name == "trust" {
				b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
			}
			b.Flush()
			if ask, ok := ask.(*pgproto3.AuthenticationMD5Password); ok {
				_ = ask
				b.SetAuthType(pgproto3.AuthTypeMD5Password)
			} else {
				b.SetAuthType(pgproto3.AuthTypeCleartextPassword)
			}
			if m, err := b.Receive(); err == nil {
				got <- m
			}
		}()
		i := NewIssuer(Options{Cluster: "a", Node: "n", Dev: true})
		if err := i.Update([]TargetConfig{{Name: "x", Address: l.Addr().String(), TLSMode: TLSDisable, AdminUser: "a",
			AdminPassword: vault.NewSecret(adminPassword), Roles: []RoleRule{{Groups: []string{"jobs"}, Role: "r"}}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := i.Issue(testContext(t), "x", subject, "s", "db", ""); err == nil {
			t.Errorf("%s: accepted", name)
		}
		i.Close()
		l.Close()
		for m := range got {
			if p, ok := m.(*pgproto3.PasswordMessage); ok {
				t.Errorf("%s: was sent %q", name, p.Password)
			}
		}
	}
	// Over TLS, a server that will not speak TLS is not spoken to in the clear.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	rest := make(chan []byte, 4)
	go func() {
		defer close(rest)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 1024)
		c.Read(buf)
		c.Write([]byte("N"))
		if n, _ := c.Read(buf); n > 0 {
			rest <- slices.Clone(buf[:n])
		}
	}()
	i := NewIssuer(Options{Cluster: "a", Node: "n"})
	defer i.Close()
	if err := i.Update([]TargetConfig{{Name: "x", Address: l.Addr().String(), AdminUser: "a", AdminPassword: vault.NewSecret("p"), Roles: []RoleRule{{Groups: []string{"jobs"}, Role: "r"}}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := i.Issue(testContext(t), "x", subject, "s", "db", ""); err == nil {
		t.Error("went on without TLS")
	}
	for b := range rest {
		t.Errorf("sent in the clear: %q", b)
	}
}

func TestWithConnLeavesNothing(t *testing.T) {
	e := newEnv(t)
	ctx := testContext(t)
	var pid uint32
	for n := range 2 {
		err := e.iss.WithConn(ctx, "prod-db", e.db, func(ctx context.Context, c *pgx.Conn) error {
			var path, tag string
			if err := c.QueryRow(ctx, "SELECT current_setting('search_path'), current_setting('x.tag', true) IS NOT NULL AND current_setting('x.tag', true) <> ''").Scan(&path, &tag); err == nil && path != "pg_catalog, pg_temp" {
				t.Errorf("search_path %q", path)
			}
			if n == 1 && c.PgConn().PID() != pid {
				t.Error("the connection was not kept")
			}
			pid = c.PgConn().PID()
			_, err := c.Exec(ctx, "SET search_path = public")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// One that is left inside a transaction is not used again.
	e.iss.WithConn(ctx, "prod-db", e.db, func(ctx context.Context, c *pgx.Conn) error {
		_, err := c.Exec(ctx, "BEGIN")
		return err
	})
	e.iss.WithConn(ctx, "prod-db", e.db, func(ctx context.Context, c *pgx.Conn) error {
		if c.PgConn().PID() == pid {
			t.Error("a connection inside a transaction was used again")
		}
		return nil
	})
}

// The administrative connections of a server that restarted are replaced.
func TestReconnect(t *testing.T) {
	e := newEnv(t)
	l, c := e.begin(t, "s")
	c.Close(context.Background())
	e.s.MustExec(t, "postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = "+literal(e.target.AdminUser))
	time.Sleep(pingAfter)
	if err := l.Release(testContext(t)); err != nil {
		t.Fatal(err)
	}
}

// Many sessions end at once, as a revocation makes them.
func TestManyAtOnce(t *testing.T) {
	e := newEnv(t)
	const n = 12
	leases := make([]*Lease, n)
	var wg sync.WaitGroup
	for k := range leases {
		wg.Go(func() {
			l, err := e.iss.Issue(testContext(t), "prod-db", subject, fmt.Sprint("m", k), e.db, "")
			if err != nil {
				t.Error(err)
				return
			}
			leases[k] = l
			c, err := e.login(t, l, l.Password())
			if err != nil {
				t.Error(err)
				return
			}
			if err := l.LoggedIn(testContext(t), c.PgConn().PID()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	start := time.Now()
	for _, l := range leases {
		wg.Go(func() {
			if err := l.Terminate(testContext(t)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	t.Logf("%d backends ended in %v", n, time.Since(start))
	for _, l := range leases {
		wg.Go(func() {
			if err := l.Release(testContext(t)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestSCRAMVerifier(t *testing.T) {
	// RFC 7677 §3: user "user", password "pencil".
	salt, _ := base64.StdEncoding.DecodeString("W22ZaJ0SNY7soEsUEjb6gQ==")
	got, err := scramVerifier("pencil", salt, 4096)
	want := "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
	if err != nil || got != want {
		t.Errorf("got  %s\nwant %s (%v)", got, want, err)
	}
	for _, p := range []string{"", "ümlaut", "a\nb"} {
		if _, err := SCRAMVerifier(p); err == nil {
			t.Errorf("%q accepted", p)
		}
	}
}

func TestValidate(t *testing.T) {
	good := TargetConfig{Name: "x", Address: "db:5432", AdminUser: "a"}
	if err := good.Validate(false); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(*TargetConfig){
		"no name": func(c *TargetConfig) { c.Name = "" }, "no port": func(c *TargetConfig) { c.Address = "db" },
		"mode": func(c *TargetConfig) { c.TLSMode = "require" }, "verify-ca": func(c *TargetConfig) { c.TLSMode = TLSVerifyCA }, "no admin": func(c *TargetConfig) { c.AdminUser = "" },
		"ca": func(c *TargetConfig) { c.CA = []byte("x") }, "negative": func(c *TargetConfig) { c.MaxSession = -1 },
		"rule": func(c *TargetConfig) { c.Roles = []RoleRule{{Role: "r"}} },
		"jit as role": func(c *TargetConfig) {
			c.Roles = []RoleRule{{Groups: []string{"g"}, Role: "sp_0123456789abcdef_202601010000"}}
		},
	} {
		c := good
		f(&c)
		if c.Validate(false) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestSetupSQLQuotes(t *testing.T) {
	out := SetupSQL(SetupOptions{Target: "x\nDROP TABLE a;", Admin: `a"; DROP`, Roles: []string{"r\n;x"}, Databases: []string{`d"d`}})
	for _, want := range []string{`GRANT "r` + "\n" + `;x" TO "a""; DROP" WITH ADMIN OPTION;`, `"d""d"`, "-- Sallyport on target x?DROP TABLE a;", `\password "a""; DROP"`} {
		if !strings.Contains(out, want) {
			t.Errorf("lacks %q:\n%s", want, out)
		}
	}
}

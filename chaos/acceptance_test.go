// Package chaos tests the product from outside, as its users meet it: real
// processes of the binary, a real PostgreSQL, unmodified clients.
//
// TestAcceptance walks through what a cluster promises, on one cluster;
// TestKill kills its nodes under load. Set SALLYPORT_BIN to a built binary, and
// SALLYPORT_CHAOS_TIME to let the load of TestKill run longer.
package chaos

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/replay"
	"github.com/sallyport/sallyport/recording/upload"
)

// extraRules add to the cluster's default ones what single tests need.
const extraRules = `@id("connect-bench-admin")
permit (principal in Group::"ci-migrate", action in [Action::"postgres:alter_role", Action::"postgres:do", Action::"postgres:call"], resource in Database::"prod-db/bench");

@id("quick-truncate")
@approval("dba")
@expires("3s")
@hold_in_transaction("30s")
forbid (principal, action == Action::"postgres:truncate", resource);
`

// suite is one cluster and what was presented to it.
type suite struct {
	*cluster.Cluster
	mu     sync.Mutex
	tokens []string // every token that was presented
}

// start runs a cluster with tables to work on in the database bench, which has
// no sensitive columns.
func start(t *testing.T, o cluster.Options) *suite {
	t.Helper()
	if o.Files == nil {
		o.Files = map[string]string{}
	}
	o.Files["extra.cedar"] = extraRules
	s := &suite{Cluster: cluster.StartTest(t, o)}
	s.must(t, s.PG.Exec(t.Context(), "bench", `
CREATE TABLE numbers (client text NOT NULL, n bigint NOT NULL, note text, PRIMARY KEY (client, n));
CREATE TABLE scratch (n bigint);
ALTER TABLE numbers OWNER TO app_migrator;
ALTER TABLE scratch OWNER TO app_migrator;
GRANT USAGE, CREATE ON SCHEMA public TO app_migrator;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO app_ro;
GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA public TO app_rw;`))
	return s
}

func TestAcceptance(t *testing.T) {
	s := start(t, cluster.Options{})
	for _, part := range []struct {
		name string
		run  func(*testing.T, *suite)
	}{
		{"clients", testClients},
		{"tokens", testTokens},
		{"account", testAccount},
		{"policy", testPolicy},
		{"start-up", testStartup},
		{"masking", testMasking},
		{"approval", testApproval},
		{"revocation", testRevocation},
		{"configuration", testConfiguration},
		{"sight", testSight},
		{"joining", testJoining},
		{"leader", testLeader},
		// What all the others left behind.
		{"leaks", testLeaks},
		{"recordings", testRecordings},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.run(t, s) }) && t.Context().Err() != nil {
			return
		}
	}
}

// remember keeps a token for testLeaks.
func (s *suite) remember(token string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens = append(s.tokens, token)
	return token
}

// job is a token of the job name on ref, which gives it its groups: "main" may
// write, "migrate" may change the schema, others read. change replaces claims.
func (s *suite) job(t *testing.T, name, ref string, change map[string]any) string {
	t.Helper()
	claims := map[string]any{
		"sub": "repo:acme/shop:job:" + name, "aud": cluster.AudienceCI, "exp": time.Now().Add(time.Hour).Unix(),
		"repository": "acme/shop", "repository_owner": "acme", "ref": "refs/heads/" + ref, "run_id": "77", "actor": "dana@example.com",
	}
	maps.Copy(claims, change)
	token, err := s.Token(claims)
	s.must(t, err)
	return s.remember(token)
}

// subject is the name that Sallyport gives to a job.
func subject(job string) string { return "ci/repo:acme/shop:job:" + job }

func (s *suite) person(t *testing.T, name string, groups ...string) string {
	t.Helper()
	token, err := s.PersonToken(name, groups...)
	s.must(t, err)
	return s.remember(token)
}

func (s *suite) must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// session is a client's connection and the notices it got.
type session struct {
	*pgx.Conn
	notices chan string
}

// login logs in through n with pgx.
func (s *suite) login(t testing.TB, n *cluster.Node, db, token string) *session {
	t.Helper()
	c, err := s.tryLogin(t, n, db, token, nil)
	s.must(t, err)
	return c
}

func (s *suite) tryLogin(t testing.TB, n *cluster.Node, db, token string, change func(*pgx.ConnConfig)) (*session, error) {
	t.Helper()
	cfg, err := pgx.ParseConfig(n.DSN(db, token))
	s.must(t, err)
	c := &session{notices: make(chan string, 100)}
	cfg.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
		select {
		case c.notices <- n.Message:
		default:
		}
	}
	if change != nil {
		change(cfg)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if c.Conn, err = pgx.ConnectConfig(ctx, cfg); err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		c.Close(ctx)
	})
	return c, nil
}

// simple runs a string as one simple query, and returns the first error.
func (c *session) simple(ctx context.Context, sql string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	_, err := c.PgConn().Exec(ctx, sql).ReadAll()
	return err
}

// int asks PostgreSQL itself, as its owner.
func (s *suite) int(t testing.TB, db, sql string, args ...any) int {
	t.Helper()
	conn, err := s.PG.Connect(t.Context(), db)
	s.must(t, err)
	defer conn.Close(t.Context())
	var n int
	s.must(t, conn.QueryRow(t.Context(), sql, args...).Scan(&n))
	return n
}

// refused checks that err is PostgreSQL's error with all of these in it.
func refused(t testing.TB, err error, code string, has ...string) {
	t.Helper()
	var pe *pgconn.PgError
	if !errors.As(err, &pe) {
		t.Errorf("want an error of PostgreSQL's protocol, got %v", err)
		return
	}
	if !strings.HasPrefix(pe.Code, code) {
		t.Errorf("SQLSTATE %s, want %s: %s", pe.Code, code, pe.Message)
	}
	all := pe.Message + "\n" + pe.Detail + "\n" + pe.Hint
	for _, h := range has {
		if !strings.Contains(all, h) {
			t.Errorf("the error does not say %q:\n%s", h, all)
		}
	}
}

// eventually tries until check returns "", or fails with what it returned.
func eventually(t testing.TB, limit time.Duration, check func() string) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
		why := check()
		if why == "" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %v: %s", limit, why)
		}
	}
}

// on makes the environment of a CLI call go to one node only.
func on(n *cluster.Node, env []string) []string {
	return append(slices.Clone(env), "SALLYPORT_SERVER="+n.Addr)
}

// cli runs the CLI and fails the test when that fails.
func (s *suite) cli(t testing.TB, env []string, args ...string) string {
	t.Helper()
	out, err := s.CLI(t.Context(), env, args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// cliRefused runs the CLI, which must fail and say all of these.
func (s *suite) cliRefused(t testing.TB, env []string, args []string, has ...string) string {
	t.Helper()
	out, err := s.CLI(t.Context(), env, args...)
	if err == nil {
		t.Errorf("sallyport %s succeeded:\n%s", strings.Join(args, " "), out)
		return out
	}
	for _, h := range has {
		if !strings.Contains(err.Error(), h) {
			t.Errorf("sallyport %s does not say %q: %v", strings.Join(args, " "), h, err)
		}
	}
	return out + err.Error()
}

// status is the cluster as node n sees it.
func (s *suite) status(t testing.TB, n *cluster.Node) *api.Status {
	t.Helper()
	c, err := s.AdminClient(n.Addr)
	s.must(t, err)
	st, err := c.Status(t.Context())
	s.must(t, err)
	return st
}

// events are all committed events.
func (s *suite) events(t testing.TB) []api.EventInfo {
	t.Helper()
	c, err := s.AdminClient()
	s.must(t, err)
	var all []api.EventInfo
	for {
		next := uint64(1)
		if len(all) > 0 {
			next = all[len(all)-1].Seq + 1
		}
		page, err := c.Events(t.Context(), next, 0)
		s.must(t, err)
		if len(page) == 0 {
			return all
		}
		all = append(all, page...)
	}
}

// listing is one line of `recordings list --json`.
type listing struct {
	recording.Header
	Name   string            `json:"name"`
	Ending *recording.Ending `json:"ending"`
	Error  string            `json:"error"`
}

func (s *suite) listRecordings(t testing.TB, args ...string) []listing {
	t.Helper()
	out := s.cli(t, s.AdminEnv(), append([]string{"recordings", "list", "--json", "--store", s.Recordings}, args...)...)
	var list []listing
	s.must(t, json.Unmarshal([]byte(out), &list))
	return list
}

// entries reads one recording from the store.
func (s *suite) entries(t testing.TB, name string) []recording.Entry {
	t.Helper()
	out := s.cli(t, s.AdminEnv(), "recordings", "show", name, "--json", "--store", s.Recordings)
	dec := json.NewDecoder(strings.NewReader(out))
	var all []recording.Entry
	var parts []json.RawMessage
	for dec.More() {
		var raw json.RawMessage
		s.must(t, dec.Decode(&raw))
		parts = append(parts, raw)
	}
	for _, raw := range parts[1 : len(parts)-1] { // between header and ending
		var e recording.Entry
		s.must(t, json.Unmarshal(raw, &e))
		all = append(all, e)
	}
	return all
}

// read is entries without a process for each recording.
func (s *suite) read(t testing.TB, name string) (all []recording.Entry) {
	t.Helper()
	ctx := t.Context()
	store, err := upload.Open(ctx, s.Recordings)
	s.must(t, err)
	ca, err := os.ReadFile(s.CAFile)
	s.must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	r, err := replay.Open(ctx, store, name, replay.Trust{Roots: roots, CheckNode: func(cert *x509.Certificate, node string) error {
		if id, err := pki.ParseIdentity(cert); err != nil || id.Name != node {
			return fmt.Errorf("signed by %v: %v", id, err)
		}
		return nil
	}})
	s.must(t, err)
	for e, err := range r.Entries(ctx) {
		s.must(t, err)
		one := *e
		one.Text, one.Data = bytes.Clone(e.Text), bytes.Clone(e.Data)
		all = append(all, one)
	}
	return all
}

// ownEntries are the entries of the nodes' own recordings that are in the store by now.
func (s *suite) ownEntries(t testing.TB) []recording.Entry {
	t.Helper()
	var all []recording.Entry
	for _, r := range s.listRecordings(t, "--kind", "node") {
		all = append(all, s.entries(t, r.Name)...)
	}
	return all
}

// sessionOf waits for the only recording of a subject and returns its entries
// once it is complete.
func (s *suite) sessionOf(t testing.TB, subject string) []recording.Entry {
	t.Helper()
	var name string
	eventually(t, 20*time.Second, func() string {
		list := s.listRecordings(t, "--subject", subject)
		if len(list) != 1 || list[0].Ending == nil {
			return fmt.Sprintf("recordings of %s: %+v", subject, list)
		}
		name = list[0].Name
		return ""
	})
	return s.entries(t, name)
}

// edit changes a file of the configuration and applies it. What it returns puts
// the file back, and applies that.
func (s *suite) edit(t testing.TB, file string, change func(string) string) (undo func()) {
	t.Helper()
	path := filepath.Join(s.ConfigDir, file)
	before, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	write := func(content string) {
		t.Helper()
		s.must(t, os.WriteFile(path, []byte(content), 0o600))
		s.must(t, s.Apply(t.Context()))
		s.must(t, s.WaitReady(t.Context()))
	}
	write(change(string(before)))
	return func() { t.Helper(); write(string(before)) }
}

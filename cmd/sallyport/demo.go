package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"text/template"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/protocols/protocoltest/pgserver"
)

//go:embed demo
var demoFiles embed.FS

// demo plays the whole story on real components: a private PostgreSQL, an
// issuer, three nodes. What it shows as typed is what a shell then runs.
type demo struct {
	ctx    context.Context
	out    io.Writer
	dir    string
	env    map[string]string
	nodes  map[string]*exec.Cmd
	logs   []*os.File
	issuer *exec.Cmd
	pg     *pgserver.Server
	failed []string
	plain  bool // no colours
}

func demoCommand() *cobra.Command {
	var once bool
	var dir string
	c := &cobra.Command{
		Use: "demo", Short: "Play the whole story on this machine, for real", Args: noArgs,
		Long: `Starts a private PostgreSQL, a trial issuer and a cluster of three nodes, all on
loopback, and plays what Sallyport does: a CI job's session, a refused command,
a masked column, a migration held for approval, a revocation with the time it
took, a killed leader, the recordings and their verification.

It then leaves everything running, with an environment file to source in a
second terminal, until Ctrl-C. --once, or no terminal, ends after the story; the
exit code is 1 if any step was not as it should be.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			tty := isTerminal(os.Stdout)
			d := &demo{ctx: cmd.Context(), out: cmd.OutOrStdout(), dir: dir, env: map[string]string{}, nodes: map[string]*exec.Cmd{}, plain: !tty}
			return d.play(once || !tty)
		},
	}
	c.Flags().BoolVar(&once, "once", false, "end after the story")
	c.Flags().StringVar(&dir, "dir", "", "directory for the demo's data (default: a temporary one, removed at the end)")
	return c
}

// isTerminal tells a terminal from other character devices, such as /dev/null.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func (d *demo) play(once bool) (err error) {
	start := time.Now()
	if d.dir == "" {
		if d.dir, err = os.MkdirTemp("", "sallyport-demo-"); err != nil {
			return err
		}
		defer os.RemoveAll(d.dir)
	} else if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return err
	}
	defer d.stopAll()
	if err := d.setUp(); err != nil {
		return fmt.Errorf("setting up: %w%s", err, d.tails())
	}
	if err := d.story(); err != nil {
		return fmt.Errorf("%w%s", err, d.tails())
	}
	if len(d.failed) > 0 {
		return fmt.Errorf("%d step(s) were not as they should be:\n  %s%s", len(d.failed), strings.Join(d.failed, "\n  "), d.tails())
	}
	d.say("\nEvery step was as it should be (%v in all).", time.Since(start).Round(time.Second))
	if once {
		return nil
	}
	if err := d.leaveRunning(); err != nil {
		return err
	}
	<-d.ctx.Done()
	d.say("\nCleaning up.")
	return nil
}

// setUp starts everything, showing what an operator would type.
func (d *demo) setUp() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, name := range []string{"N1", "N2", "N3", "ISSUER"} {
		port, err := freePort()
		if err != nil {
			return err
		}
		d.env[name] = fmt.Sprint(port)
	}
	// A directory with this very program under its usual name leads PATH.
	bin := filepath.Join(d.dir, "bin")
	if err := os.MkdirAll(bin, 0o700); err != nil {
		return err
	}
	if err := os.Symlink(self, filepath.Join(bin, "sallyport")); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	d.chapter("Setting up", "A private PostgreSQL with TLS, holding the shop's data.")
	pg, err := pgserver.Run(d.ctx, pgserver.Options{})
	if err != nil {
		return err
	}
	d.pg = pg
	path := bin + ":" + pg.BinDir + ":" + os.Getenv("PATH")
	var secret [12]byte
	_, _ = rand.Read(secret[:]) // never fails
	for k, v := range map[string]string{
		"PATH": path, "HOME": d.dir, "DEMO_ADMIN_PASSWORD": hex.EncodeToString(secret[:]),
		"OWNER_DSN":        fmt.Sprintf("host=127.0.0.1 port=%d user=%s dbname=postgres sslmode=verify-full sslrootcert=%s", pg.Port, pg.SuperUser, pg.CAFile),
		"OWNER_PASSWORD":   pg.SuperPassword,
		"SALLYPORT_SERVER": fmt.Sprintf("127.0.0.1:%s,127.0.0.1:%s,127.0.0.1:%s", d.env["N1"], d.env["N2"], d.env["N3"]),
		"SALLYPORT_CA":     filepath.Join(d.dir, "admin", "ca.crt"), "PGSSLROOTCERT": filepath.Join(d.dir, "admin", "ca.crt"),
		"PGSSLMODE": "verify-full", "PGCONNECT_TIMEOUT": "10", "PGHOST": "127.0.0.1", "LC_ALL": "C.UTF-8", "TERM": "dumb", "PAGER": "cat",
		"STORE": filepath.Join(d.dir, "recordings"),
	} {
		d.env[k] = v
	}
	if err := d.writeFiles(pg); err != nil {
		return err
	}
	d.must(`PGPASSWORD=$OWNER_PASSWORD psql -q "$OWNER_DSN" -v ON_ERROR_STOP=1 -f schema.sql`)
	d.note("What the database's owner runs once, so that Sallyport can make an account for each session:")
	d.must(`sallyport targets setup-sql --admin sallyport --password-env DEMO_ADMIN_PASSWORD --roles shop_read,shop_app,shop_owner --databases shop | tee setup.sql | grep -v '^--'`)
	d.must(`PGPASSWORD=$OWNER_PASSWORD psql -q "$OWNER_DSN" -v ON_ERROR_STOP=1 -f setup.sql`)

	d.chapter("A cluster of three", "Raft over QUIC with mutual TLS; each further node joins with a one-time token.")
	d.must(`sallyport cluster init --name n1 --data-dir n1 --addr 127.0.0.1:$N1 --recordings $STORE --admin-out admin --dev | head -2`)
	if err := d.start("n1"); err != nil {
		return err
	}
	d.env["SALLYPORT_ADMIN_CERT"], d.env["SALLYPORT_ADMIN_KEY"] = filepath.Join(d.dir, "admin", "admin.crt"), filepath.Join(d.dir, "admin", "admin.key")
	for _, n := range []string{"n2", "n3"} {
		d.must(fmt.Sprintf(`SALLYPORT_JOIN_TOKEN=$(sallyport cluster token create 2>/dev/null) sallyport cluster join --name %[1]s --data-dir %[1]s --addr 127.0.0.1:$%[2]s --server 127.0.0.1:$N1 --recordings $STORE --dev`, n, strings.ToUpper(n)))
		if err := d.start(n); err != nil {
			return err
		}
	}
	if err := d.until(20*time.Second, `sallyport status`, func(out string) bool {
		return strings.Count(out, " follower ") == 2 && strings.Count(out, " leader ") == 1
	}); err != nil {
		return err
	}
	d.must(`sallyport status`)

	d.chapter("Its rules", "Targets, identity providers and Cedar policies are files; all of them become one event.")
	if err := d.spawn("issuer", &d.issuer, "dev-issuer", "serve", "--dir", "issuer", "--addr", "127.0.0.1:"+d.env["ISSUER"]); err != nil {
		return err
	}
	if err := d.until(10*time.Second, `test -f issuer/ca.pem && cp issuer/ca.pem rules/issuer-ca.pem && echo ok`, func(o string) bool { return strings.Contains(o, "ok") }); err != nil {
		return err
	}
	d.must(`cat rules/policies/access.cedar | tail -16`)
	d.must(`sallyport apply -f rules --dev --yes | tail -4`)
	return d.tokens()
}

// tokens mints what a CI platform and a company's identity provider would.
func (d *demo) tokens() error {
	mint := func(name, alg, claims string) error {
		out, code := d.shell(fmt.Sprintf(`sallyport dev-issuer token --dir issuer --alg %s --ttl 1h --claims '%s'`, alg, claims))
		if code != 0 {
			return fmt.Errorf("minting %s: %s", name, out)
		}
		d.env[name] = strings.TrimSpace(out)
		return nil
	}
	job := `{"aud":"sallyport-jobs","sub":"repo:acme/shop:ref:refs/heads/main","repository":"acme/shop","repository_owner":"acme","ref":"refs/heads/main","sha":"8c1f0a7","run_id":"4711","actor":"dana@acme.example"}`
	return errors.Join(
		mint("CI_TOKEN", "RS256", job),
		mint("STRANGER_TOKEN", "RS256", strings.ReplaceAll(job, `"repository_owner":"acme"`, `"repository_owner":"mallory"`)),
		mint("WRONG_AUDIENCE_TOKEN", "RS256", strings.ReplaceAll(job, "sallyport-jobs", "another-service")),
		mint("DANA_TOKEN", "ES256", `{"aud":"sallyport-people","sub":"dana","email":"dana@acme.example","groups":["dba"]}`),
		mint("ROBIN_TOKEN", "ES256", `{"aud":"sallyport-people","sub":"robin","email":"robin@acme.example","groups":["dba"]}`),
		mint("SECURITY_TOKEN", "ES256", `{"aud":"sallyport-people","sub":"sam","email":"sam@acme.example","groups":["security"]}`),
	)
}

func (d *demo) writeFiles(pg *pgserver.Server) error {
	data := map[string]string{"PostgresAddr": pg.Addr, "Issuer": "https://127.0.0.1:" + d.env["ISSUER"]}
	for _, name := range []string{"schema.sql", "rules/targets.yaml", "rules/identity.yaml", "rules/policies/access.cedar", "rules/policies/people.cedar"} {
		raw, err := demoFiles.ReadFile("demo/" + strings.TrimPrefix(name, "rules/"))
		if err != nil {
			return err
		}
		t, err := template.New(name).Parse(string(raw))
		if err != nil {
			return err
		}
		var buf bytes.Buffer
		if err := t.Execute(&buf, data); err != nil {
			return err
		}
		path := filepath.Join(d.dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(path, buf.Bytes(), 0o600); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(d.dir, "rules", "postgres-ca.pem"), pg.CAPEM, 0o600)
}

// story is what the demo is for. Each step says what must and must not be seen.
func (d *demo) story() error {
	d.chapter("A job reads", "An unmodified psql; the job's OIDC token is the password; the user names the target.")
	d.step(`PGPASSWORD=$CI_TOKEN psql "port=$N1 user=prod-db dbname=shop" -c "SELECT id, name, email FROM users ORDER BY id"`,
		ok, has("Ada"), hasNot("ada@example.com"))
	d.note("The e-mail addresses are masked: no rule lets this job see them, and no rewording does either:")
	d.step(`PGPASSWORD=$CI_TOKEN psql "port=$N2 user=prod-db dbname=shop" -c "SELECT count(*) FROM users WHERE email LIKE 'a%'"`,
		fails, has("masking"), has("email"))
	d.step(`PGPASSWORD=$CI_TOKEN psql "port=$N3 user=prod-db dbname=shop" -c "SELECT reverse(email) FROM users"`, fails, has("masking"))

	d.chapter("A job is refused", "By which rule, and why, in PostgreSQL's own error.")
	d.step(`PGPASSWORD=$CI_TOKEN psql "port=$N1 user=prod-db.migrate dbname=shop" -c "DROP TABLE orders"`, fails, has("no-drop"), has("database team"))
	d.step(`PGPASSWORD=$CI_TOKEN psql "port=$N1 user=prod-db dbname=shop" -c "ALTER ROLE current_user PASSWORD 'mine now'"`, fails, has("refused"))
	d.step(`PGPASSWORD=$STRANGER_TOKEN psql "port=$N1 user=prod-db dbname=shop" -c "SELECT 1"`, fails, has("repository_owner"))
	d.step(`PGPASSWORD=$WRONG_AUDIENCE_TOKEN psql "port=$N1 user=prod-db dbname=shop" -c "SELECT 1"`, fails, has("audience"))

	if err := d.migration(); err != nil {
		return err
	}
	if err := d.revocation(); err != nil {
		return err
	}
	if err := d.killLeader(); err != nil {
		return err
	}
	return d.evidence()
}

// migration holds CREATE TABLE until somebody else approves it on another node.
func (d *demo) migration() error {
	d.chapter("A migration waits for a person", "It is held at node 1; a reviewer decides at node 2. Bound to exactly these bytes, once.")
	held := d.background(`PGPASSWORD=$CI_TOKEN psql "port=$N1 user=prod-db.migrate dbname=shop" -c "CREATE TABLE invoices (id bigint PRIMARY KEY, order_id bigint, total numeric)"`)
	var id string
	if err := d.until(15*time.Second, `SALLYPORT_TOKEN=$ROBIN_TOKEN sallyport approvals list --server 127.0.0.1:$N2`, func(out string) bool {
		for _, f := range strings.Fields(out) {
			if len(f) == 10 && strings.Trim(f, "0123456789abcdef") == "" {
				id = f
			}
		}
		return id != "" && strings.Contains(out, "pending")
	}); err != nil {
		held.stop()
		return err
	}
	d.env["ID"] = id
	d.step(`SALLYPORT_TOKEN=$DANA_TOKEN sallyport approvals approve $ID --server 127.0.0.1:$N3`, fails, has("named in the requester's claims"))
	d.note("Dana started the run, so Dana cannot approve it. Robin can:")
	d.step(`SALLYPORT_TOKEN=$ROBIN_TOKEN sallyport approvals approve $ID --server 127.0.0.1:$N2 --comment "looks right"`, ok, has("CREATE TABLE invoices"), has("Approved"))
	out, code := held.wait(15 * time.Second)
	d.show("The job, meanwhile:", out)
	d.check("the migration runs once approved", code == 0 && strings.Contains(out, "CREATE TABLE") && strings.Contains(out, id))
	d.step(`PGPASSWORD=$CI_TOKEN psql "port=$N3 user=prod-db.migrate dbname=shop" -c "INSERT INTO invoices VALUES (1, 1, 9.90) RETURNING *"`, ok, has("9.90"))
	return nil
}

// revocation cuts a running session and measures how long that takes.
func (d *demo) revocation() error {
	d.chapter("Access is revoked", "The job runs a query that takes minutes; the revocation ends it on every node.")
	live := d.background(`PGPASSWORD=$CI_TOKEN psql "port=$N1 user=prod-db dbname=shop" -c "SELECT count(*) FROM generate_series(1, 2000000000)"`)
	if err := d.until(15*time.Second, `SALLYPORT_TOKEN=$SECURITY_TOKEN sallyport sessions list --json`, func(out string) bool { return strings.Contains(out, `"admitted": 1`) }); err != nil {
		live.stop()
		return err
	}
	d.step(`SALLYPORT_TOKEN=$SECURITY_TOKEN sallyport sessions list`, ok, has("ci/repo:acme/shop"))
	began := time.Now()
	ended := make(chan time.Duration, 1)
	go func() {
		<-live.done
		ended <- time.Since(began)
	}()
	d.step(`SALLYPORT_TOKEN=$SECURITY_TOKEN sallyport revoke --subject 'ci/repo:acme/shop:ref:refs/heads/main' --reason 'token seen in a log' --server 127.0.0.1:$N2`, ok, has("confirmed"))
	out, code := live.wait(15 * time.Second)
	took := <-ended
	d.show("The job, meanwhile:", out)
	d.check("the running session was cut", code != 0 && strings.Contains(out, "token seen in a log"))
	d.say("  From typing `revoke` to the end of the job's psql: %v.", took.Round(time.Millisecond))
	d.step(`PGPASSWORD=$CI_TOKEN psql "port=$N3 user=prod-db dbname=shop" -c "SELECT 1"`, fails, has("revoked"))
	return nil
}

// killLeader shows that the other two go on.
func (d *demo) killLeader() error {
	d.chapter("A node dies", "kill -9 of the leader; the others elect another and serve on.")
	out, _ := d.shell(`sallyport status --json`)
	leader := ""
	for _, n := range []string{"n1", "n2", "n3"} {
		if strings.Contains(out, `"leader": "`+n+`"`) {
			leader = n
		}
	}
	if leader == "" {
		return fmt.Errorf("no leader in the status:\n%s", out)
	}
	p := d.nodes[leader]
	d.say("  $ kill -9 %d   # %s, the leader", p.Process.Pid, leader)
	_ = p.Process.Signal(syscall.SIGKILL)
	_ = p.Wait()
	delete(d.nodes, leader)
	other := map[string]string{"n1": "N2", "n2": "N3", "n3": "N1"}[leader]
	tok, code := d.shell(`sallyport dev-issuer token --dir issuer --ttl 1h --claims '{"aud":"sallyport-jobs","sub":"repo:acme/shop:ref:refs/heads/release","repository":"acme/shop","repository_owner":"acme","ref":"refs/heads/release","sha":"51a9d2e","run_id":"4712","actor":"dana@acme.example"}'`)
	if code != 0 {
		return errors.New(tok)
	}
	d.env["CI_TOKEN2"] = strings.TrimSpace(tok)
	d.env["OTHER"] = d.env[other]
	d.step(`PGPASSWORD=$CI_TOKEN2 psql "port=$OTHER user=prod-db.migrate dbname=shop" -c "SELECT count(*) FROM invoices"`, ok, has("1"))
	if err := d.until(15*time.Second, `sallyport status`, func(o string) bool { return strings.Contains(o, " leader ") }); err != nil {
		return err
	}
	d.step(`sallyport status`, ok, has("unreachable"), has("leader"))
	d.step(`SALLYPORT_TOKEN=$SECURITY_TOKEN sallyport events tail | tail -6`, ok, has("revocation.made"), has("approval.ended"))
	d.note("It comes back, and completes the recordings that it was cut off in:")
	if err := d.start(leader); err != nil {
		return err
	}
	d.say("  $ sallyport serve --data-dir %s &", leader)
	return d.until(20*time.Second, `sallyport status`, func(o string) bool { return !strings.Contains(o, "unreachable") && strings.Count(o, " follower ") == 2 })
}

// evidence reads the recordings from the store alone.
func (d *demo) evidence() error {
	d.chapter("The evidence", "Recordings are read and verified from the store alone, with the CA's public certificate.")
	if err := d.until(30*time.Second, `sallyport recordings list --store $STORE`, func(o string) bool { return strings.Count(o, "prod-db") >= 6 }); err != nil {
		return err
	}
	d.step(`sallyport recordings list --store $STORE`, ok, has("ci/repo:acme/shop"))
	out, _ := d.shell(`sallyport recordings list --store $STORE --json`)
	id := sessionWith(out, `"prod-db"`, `"migrate"`)
	if id == "" {
		return fmt.Errorf("no session of the migration in the list:\n%s", out)
	}
	d.env["SESSION"] = id
	d.step(`sallyport recordings replay $SESSION --store $STORE`, ok)
	d.step(`sallyport recordings verify --store $STORE`, ok, has("verified"))
	d.note("And what happens when somebody with access to the store changes one byte:")
	d.step(`cp -r $STORE forged && f=$(find forged -name 000001.seg | sort | head -1) && chmod u+w $f && printf X | dd of=$f bs=1 seek=400 conv=notrunc status=none && sallyport recordings verify --store forged`, fails)
	return nil
}

// sessionWith finds the id of the first listed session whose JSON has all of wants.
func sessionWith(out string, wants ...string) string {
	for _, obj := range strings.Split(out, "\n  {") {
		all := true
		for _, w := range wants {
			all = all && strings.Contains(obj, w)
		}
		if _, rest, found := strings.Cut(obj, `"session": "`); all && found {
			id, _, _ := strings.Cut(rest, `"`)
			return id
		}
	}
	return ""
}

func (d *demo) leaveRunning() error {
	var b strings.Builder
	for _, k := range []string{"SALLYPORT_SERVER", "SALLYPORT_CA", "SALLYPORT_ADMIN_CERT", "SALLYPORT_ADMIN_KEY", "PGSSLROOTCERT", "PGSSLMODE", "PGHOST", "N1", "N2", "N3", "CI_TOKEN2", "ROBIN_TOKEN", "SECURITY_TOKEN", "STORE"} {
		fmt.Fprintf(&b, "export %s='%s'\n", k, d.env[k])
	}
	fmt.Fprintf(&b, "export PATH='%s':$PATH\ncd '%s'\n", filepath.Join(d.dir, "bin"), d.dir)
	path := filepath.Join(d.dir, "env")
	if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
		return err
	}
	d.say(`
The cluster goes on until Ctrl-C. In a second terminal:

  source %s

Five things to try:
  1. PGPASSWORD=$CI_TOKEN2 psql "port=$N1 user=prod-db dbname=shop"         then: \d users, TABLE users, any trick you know
  2. PGPASSWORD=$CI_TOKEN2 psql "port=$N2 user=prod-db.migrate dbname=shop" -c "ALTER TABLE orders ADD COLUMN note text"
     and in a third: SALLYPORT_TOKEN=$ROBIN_TOKEN sallyport approvals list
  3. edit rules/policies/access.cedar, then: sallyport apply -f rules --dev
  4. sallyport events tail -f     while you do the others
  5. sallyport recordings list --store $STORE      and replay one
`, path)
	return nil
}

// A want looks at what a step printed and how it ended.
type want func(out string, code int) string

func ok(_ string, code int) string {
	if code != 0 {
		return fmt.Sprintf("should succeed, ended with %d", code)
	}
	return ""
}

func fails(_ string, code int) string {
	if code == 0 {
		return "should fail, succeeded"
	}
	return ""
}

func has(s string) want {
	return func(out string, _ int) string {
		if !strings.Contains(out, s) {
			return fmt.Sprintf("should show %q", s)
		}
		return ""
	}
}

func hasNot(s string) want {
	return func(out string, _ int) string {
		if strings.Contains(out, s) {
			return fmt.Sprintf("must not show %q", s)
		}
		return ""
	}
}

// step types a command, shows what comes back, and checks it.
func (d *demo) step(cmd string, wants ...want) {
	out, code := d.typed(cmd)
	for _, w := range wants {
		if miss := w(out, code); miss != "" {
			d.fail(cmd + ": " + miss)
		}
	}
}

func (d *demo) must(cmd string) { d.step(cmd, ok) }

func (d *demo) check(what string, good bool) {
	if !good {
		d.fail(what)
	}
}

func (d *demo) fail(what string) {
	d.failed = append(d.failed, what)
	d.say("  !! %s", what)
}

func (d *demo) typed(cmd string) (string, int) {
	d.say("  %s", d.bold("$ "+cmd))
	out, code := d.shell(cmd)
	d.show("", out)
	return out, code
}

func (d *demo) show(title, out string) {
	if title != "" {
		d.say("  %s", title)
	}
	for line := range strings.Lines(out) {
		d.say("    %s", strings.TrimRight(line, "\n"))
	}
}

// stepTimeout bounds any one command of the story.
const stepTimeout = 60 * time.Second

func (d *demo) command(ctx context.Context, cmd string) *exec.Cmd {
	c := exec.CommandContext(ctx, "bash", "-o", "pipefail", "-c", cmd)
	c.Dir = d.dir
	for k, v := range d.env {
		c.Env = append(c.Env, k+"="+v)
	}
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us; we end it
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	c.WaitDelay = time.Second
	return c
}

func (d *demo) shell(cmd string) (string, int) {
	ctx, cancel := context.WithTimeout(d.ctx, stepTimeout)
	defer cancel()
	c := d.command(ctx, cmd)
	out, _ := c.CombinedOutput()
	return string(out), c.ProcessState.ExitCode()
}

// until repeats a command, quietly, until done holds for what it prints.
func (d *demo) until(limit time.Duration, cmd string, done func(string) bool) error {
	deadline := time.Now().Add(limit)
	for {
		out, _ := d.shell(cmd)
		if done(out) {
			return nil
		}
		if time.Now().After(deadline) || d.ctx.Err() != nil {
			return fmt.Errorf("waited %v in vain on `%s`; the last answer:\n%s", limit, cmd, out)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// running is a command in the background.
type running struct {
	cancel context.CancelFunc
	done   chan struct{}
	out    bytes.Buffer
	code   int
}

func (d *demo) background(cmd string) *running {
	d.say("  %s", d.bold("$ "+cmd+" &"))
	ctx, cancel := context.WithCancel(d.ctx)
	c := d.command(ctx, cmd)
	r := &running{cancel: cancel, done: make(chan struct{})}
	c.Stdout, c.Stderr = &r.out, &r.out
	go func() {
		defer close(r.done)
		_ = c.Run()
		r.code = -1
		if c.ProcessState != nil {
			r.code = c.ProcessState.ExitCode()
		}
	}()
	return r
}

func (r *running) wait(limit time.Duration) (string, int) {
	select {
	case <-r.done:
	case <-time.After(limit):
		r.stop()
		return r.out.String() + "\n(did not end)", -1
	}
	return r.out.String(), r.code
}

func (r *running) stop() {
	r.cancel()
	<-r.done
}

// start runs a node and waits until it answers.
func (d *demo) start(name string) error {
	var cmd *exec.Cmd
	if err := d.spawn(name, &cmd, "serve", "--data-dir", name); err != nil {
		return err
	}
	d.nodes[name] = cmd
	return d.until(20*time.Second, fmt.Sprintf(`sallyport whoami --server 127.0.0.1:$%s --admin-cert admin/admin.crt --admin-key admin/admin.key`, strings.ToUpper(name)),
		func(out string) bool { return strings.Contains(out, "bootstrap/") })
}

func (d *demo) spawn(name string, cmd **exec.Cmd, args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(d.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	d.logs = append(d.logs, f)
	c := exec.Command(self, args...)
	c.Dir, c.Stdout, c.Stderr = d.dir, f, f
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	*cmd = c
	return c.Start()
}

// stopAll ends what was started, gently first.
func (d *demo) stopAll() {
	var wg sync.WaitGroup
	all := []*exec.Cmd{d.issuer}
	for _, c := range d.nodes {
		all = append(all, c)
	}
	for _, c := range all {
		if c == nil || c.Process == nil {
			continue
		}
		wg.Go(func() {
			_ = c.Process.Signal(syscall.SIGTERM)
			t := time.AfterFunc(30*time.Second, func() { _ = c.Process.Kill() })
			_ = c.Wait()
			t.Stop()
		})
	}
	wg.Wait()
	for _, f := range d.logs {
		f.Close()
	}
}

// tails are the last lines of every log, for when something went wrong.
func (d *demo) tails() string {
	var b strings.Builder
	for _, f := range d.logs {
		data, _ := os.ReadFile(f.Name())
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		fmt.Fprintf(&b, "\n--- %s\n%s", filepath.Base(f.Name()), strings.Join(lines[max(0, len(lines)-12):], "\n"))
	}
	return b.String()
}

func (d *demo) chapter(title, text string) {
	d.say("\n%s\n%s\n", d.bold("== "+title), text)
}

func (d *demo) note(text string) { d.say("\n  %s", text) }

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

func (d *demo) bold(s string) string {
	if d.plain {
		return s
	}
	return "\x1b[1m" + s + "\x1b[0m"
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

package postgres_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols/mask"
	"github.com/sallyport/sallyport/protocols/postgres"
	"github.com/sallyport/sallyport/protocols/postgres/sql"
	"github.com/sallyport/sallyport/protocols/protocoltest"
	"github.com/sallyport/sallyport/protocols/protocoltest/pgserver"
)

func TestMain(m *testing.M) {
	code := m.Run()
	pgserver.Stop()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// gateway is a node in front of a real server with a database of its own.
type gateway struct {
	*protocoltest.Node
	t      *testing.T
	server *pgserver.Server
	db     string
	path   []string
}

const schema = `
CREATE TABLE users (id int PRIMARY KEY, name text, email text, pin int, note varchar(40) CHECK (length(note) < 30));
INSERT INTO users VALUES (1, 'Ann', 'ann@secret.example', 4711, 'vip'), (2, 'Bob', 'bob@secret.example', 4712, NULL), (3, NULL, NULL, NULL, 'x');
CREATE TABLE items (id int PRIMARY KEY, label text);
INSERT INTO items SELECT g, 'item ' || g FROM generate_series(1, 100) g;
CREATE TABLE parents (id int PRIMARY KEY);
CREATE TABLE children (id int, parent int REFERENCES parents DEFERRABLE INITIALLY DEFERRED);
`

// start makes a gateway. The session's role may do everything in its database.
func start(t *testing.T, options ...func(*postgres.Config)) *gateway {
	t.Helper()
	return startOn(t, pgserver.Shared(t), options...)
}

func startOn(t *testing.T, server *pgserver.Server, options ...func(*postgres.Config)) *gateway {
	t.Helper()
	db := server.CreateDatabase(t)
	role := "app_" + db
	admin := server.Conn(t, db)
	ctx := t.Context()
	for _, q := range []string{schema, fmt.Sprintf(`CREATE ROLE %q LOGIN PASSWORD 'pw'`, role),
		fmt.Sprintf(`GRANT ALL ON ALL TABLES IN SCHEMA public TO %q; GRANT ALL ON SCHEMA public TO %q; ALTER TABLE users OWNER TO %q; ALTER TABLE items OWNER TO %q`, role, role, role, role)} {
		if _, err := admin.Exec(ctx, q); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		c := context.Background()
		server.Exec(c, db, fmt.Sprintf(`DROP OWNED BY %q CASCADE`, role))
		server.Exec(c, db, fmt.Sprintf(`DROP ROLE %q`, role))
	})
	g := &gateway{t: t, server: server, db: db, path: []string{"public"}}
	signal := func(f string) func(context.Context, uint32) error {
		return func(ctx context.Context, backend uint32) error {
			return server.Exec(ctx, "postgres", fmt.Sprintf("SELECT %s(%d)", f, backend))
		}
	}
	security := server.TLS()
	if server != pgserver.Shared(t) {
		security = nil // a server of the test's own speaks in the clear
	}
	g.Node = protocoltest.New(t, protocoltest.Target{
		Addr: server.Addr, User: role, Password: "pw", TLS: security, Role: role,
		Cancel: signal("pg_cancel_backend"), Terminate: signal("pg_terminate_backend"),
	})
	var mu sync.Mutex
	var cached *sql.Catalog
	cfg := postgres.Config{
		TLS: g.TLS,
		Catalog: func(ctx context.Context, _, database string, refresh bool) (*sql.Catalog, error) {
			mu.Lock()
			defer mu.Unlock()
			if cached != nil && !refresh {
				return cached, nil
			}
			conn, err := server.Connect(ctx, database)
			if err != nil {
				return nil, err
			}
			defer conn.Close(ctx)
			cached, err = sql.Load(ctx, conn, g.Declared())
			return cached, err
		},
		MaskKind: func(c policy.Resource) mask.Kind {
			if c.Path[len(c.Path)-1] == "note" {
				return mask.Hash
			}
			return mask.Redact
		},
		SearchPath: func(string) []string { return g.path },
		HashKey:    func() []byte { return []byte("key") },
	}
	for _, o := range options {
		o(&cfg)
	}
	g.Serve(postgres.New(cfg))
	return g
}

// masked makes email, pin and note sensitive, revealed to nobody.
func (g *gateway) masked() *gateway {
	g.Sensitive(g.secrets()...)
	g.Decide(rules(nil))
	return g
}

func (g *gateway) secrets() []policy.Resource {
	var out []policy.Resource
	for _, c := range []string{"email", "pin", "note"} {
		out = append(out, policy.Resource{Type: policy.Column, Path: []string{"prod-db", g.db, "public", "users", c}})
	}
	return out
}

// rules is a policy: reveal is refused, an action in effects has that effect,
// all else is permitted.
func rules(effects map[policy.Action]policy.Effect) func(*policy.Request) policy.Decision {
	return func(req *policy.Request) policy.Decision {
		d := policy.Decision{Effect: policy.Permit, Rule: "permit-all"}
		for i, p := range req.Pairs {
			if p.Action == policy.Reveal {
				return policy.Decision{Rule: "no-reveal", Reason: "nobody sees it"}
			}
			switch effects[p.Action] {
			case policy.Refuse:
				if _, ok := effects[p.Action]; ok {
					return policy.Decision{Rule: "no-" + string(p.Action), Reason: string(p.Action) + " is not allowed", Pair: i}
				}
			case policy.Hold:
				if len(req.Context.Approved) == 0 {
					d = policy.Decision{Effect: policy.Hold, Rule: "ask", Reason: "needs approval",
						Obligations: policy.Obligations{Approval: &policy.Approval{Rules: []string{"ask"}, Groups: []string{"dba"}, Count: 1, Expires: time.Minute}}}
				}
			}
		}
		return d
	}
}

func (g *gateway) dsn(extra ...string) string {
	host, port, _ := net.SplitHostPort(g.Addr)
	return fmt.Sprintf("host=%s port=%s user=prod-db password=good dbname=%s sslmode=verify-full sslrootcert=%s %s", host, port, g.db, g.CAFile, strings.Join(extra, " "))
}

// connect connects with pgx.
func (g *gateway) connect(extra ...string) *pgx.Conn {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 20*time.Second)
	defer cancel()
	c, err := pgx.Connect(ctx, g.dsn(extra...))
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close(context.Background()) })
	return c
}

// psql runs psql with a script on its standard input.
func (g *gateway) psql(script string, args ...string) (out string, err error) {
	g.t.Helper()
	cmd := exec.CommandContext(g.t.Context(), pgserver.PSQL(g.t), append([]string{"-X", "-A", "-t", g.dsn()}, args...)...)
	cmd.Env = append(os.Environ(), "PGPASSWORD=good", "PGCONNECT_TIMEOUT=20")
	cmd.Stdin = strings.NewReader(script)
	b, err := cmd.CombinedOutput()
	return string(b), err
}

// raw is a client that speaks the protocol by hand.
type raw struct {
	t *testing.T
	net.Conn
}

// login brings a raw client to its first ReadyForQuery.
func (g *gateway) login(params ...string) *raw {
	g.t.Helper()
	r := g.dial()
	r.startTLS(g)
	r.startup(append([]string{"user", "prod-db", "database", g.db}, params...)...)
	r.expect('R')
	r.send('p', "good\x00")
	for {
		kind, _ := r.next()
		if kind == 'Z' {
			return r
		}
		if kind == 'E' {
			g.t.Fatal("login failed")
		}
	}
}

func (g *gateway) dial() *raw {
	g.t.Helper()
	c, err := net.Dial("tcp", g.Addr)
	if err != nil {
		g.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(30 * time.Second))
	g.t.Cleanup(func() { c.Close() })
	return &raw{g.t, c}
}

func (r *raw) startTLS(g *gateway) {
	r.t.Helper()
	r.Write([]byte{0, 0, 0, 8, 4, 210, 22, 47})
	var b [1]byte
	if _, err := io.ReadFull(r.Conn, b[:]); err != nil || b[0] != 'S' {
		r.t.Fatalf("SSLRequest: %q %v", b, err)
	}
	r.Conn = tls.Client(r.Conn, &tls.Config{RootCAs: g.Roots, ServerName: "localhost"})
}

func (r *raw) startup(params ...string) { r.startupVersion(3<<16, params...) }

func (r *raw) startupVersion(version uint32, params ...string) {
	b := binary.BigEndian.AppendUint32(nil, version)
	for _, p := range params {
		b = append(append(b, p...), 0)
	}
	b = append(b, 0)
	r.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b)+4)), b...))
}

func frame(kind byte, parts ...string) []byte {
	b := strings.Join(parts, "")
	return append(binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(b)+4)), b...)
}

func (r *raw) send(kind byte, parts ...string) { r.Write(frame(kind, parts...)) }

// next reads a message.
func (r *raw) next() (byte, []byte) {
	r.t.Helper()
	kind, body, err := readMessage(r.Conn)
	if err != nil {
		r.t.Fatalf("read: %v", err)
	}
	return kind, body
}

func readMessage(c io.Reader) (byte, []byte, error) {
	var h [5]byte
	if _, err := io.ReadFull(c, h[:]); err != nil {
		return 0, nil, err
	}
	body := make([]byte, binary.BigEndian.Uint32(h[1:])-4)
	_, err := io.ReadFull(c, body)
	return h[0], body, err
}

func (r *raw) expect(kind byte) []byte {
	r.t.Helper()
	got, body := r.next()
	if got != kind {
		r.t.Fatalf("got %q %q, want %q", got, body, kind)
	}
	return body
}

// until reads to the message of the given kind and returns a line for each,
// errors with their SQLSTATE and text.
func (r *raw) until(kind byte, times int) []string {
	r.t.Helper()
	var lines []string
	for {
		k, body := r.next()
		lines = append(lines, line(k, body))
		if k == kind {
			if times--; times == 0 {
				return lines
			}
		}
	}
}

func line(kind byte, body []byte) string {
	switch kind {
	case 'E', 'N':
		var code, text string
		for _, f := range bytes.Split(body, []byte{0}) {
			if len(f) > 0 {
				switch f[0] {
				case 'C':
					code = string(f[1:])
				case 'M':
					text = string(f[1:])
				}
			}
		}
		return fmt.Sprintf("%c %s %s", kind, code, text)
	case 'C', 'Z':
		return fmt.Sprintf("%c %s", kind, bytes.TrimRight(body, "\x00"))
	}
	return string(kind)
}

func sqlstate(err error) string {
	if e, ok := err.(*pgconn.PgError); ok {
		return e.Code
	}
	return fmt.Sprint(err)
}

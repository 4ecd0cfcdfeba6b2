package sql

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols/protocoltest/pgserver"
)

var (
	seed       = flag.Uint64("seed", 0, "seed of random statements; 0 takes one from the clock")
	statements = flag.Int("statements", 4000, "how many random statements to compare")
)

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	pgserver.Stop()
	os.Exit(code)
}

// liveSchema is a database with sensitive columns and all that could leak them.
const liveSchema = `
CREATE SCHEMA app;
CREATE TYPE status AS ENUM ('new', 'old');
CREATE TABLE users (id int PRIMARY KEY, name text NOT NULL, email text UNIQUE, ssn varchar(20), team_id int, status status DEFAULT 'new', born date, tags text[]);
CREATE TABLE vip (level int) INHERITS (users);
CREATE TABLE parts (id int, email text, region int) PARTITION BY LIST (region);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
CREATE TABLE parts_2 PARTITION OF parts FOR VALUES IN (2);
CREATE TABLE orders (id int PRIMARY KEY, user_id int, total numeric, note text DEFAULT lower('X'), email text);
CREATE TABLE teams (id int PRIMARY KEY, name text);
CREATE TABLE audit (id int, what text);
CREATE TABLE guess (email text REFERENCES users (email));
CREATE TABLE secured (id int, owner text);
CREATE TABLE evil_default (id int, x text);
CREATE TABLE ruled (id int);
CREATE VIEW user_view AS SELECT id, email AS contact FROM users;
CREATE VIEW deep_view AS SELECT contact AS c FROM user_view WHERE id > 0;
CREATE VIEW order_view AS SELECT o.id, t.name FROM orders o JOIN teams t ON t.id = o.user_id;
CREATE MATERIALIZED VIEW user_mat AS SELECT id, reverse(email) AS r FROM users WITH NO DATA;
CREATE FUNCTION steal(int) RETURNS text LANGUAGE sql SECURITY DEFINER AS 'SELECT email FROM public.users WHERE id = $1';
CREATE FUNCTION steal_row(orders) RETURNS text LANGUAGE sql SECURITY DEFINER AS 'SELECT email FROM public.users LIMIT 1';
CREATE FUNCTION lower(int) RETURNS text LANGUAGE sql SECURITY DEFINER AS 'SELECT email FROM public.users WHERE id = $1';
CREATE FUNCTION steal_trigger() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN RAISE EXCEPTION 'mail is %%', (SELECT email FROM public.users LIMIT 1); END $$;
CREATE FUNCTION eq(text, int) RETURNS bool LANGUAGE sql SECURITY DEFINER AS 'SELECT (SELECT email FROM public.users WHERE id = $2) = $1';
CREATE OPERATOR === (LEFTARG = text, RIGHTARG = int, FUNCTION = eq);
CREATE VIEW steal_view AS SELECT steal(id) AS s FROM teams;
CREATE VIEW xml_view AS SELECT query_to_xml('select email from public.users', true, false, '') AS x;
CREATE VIEW stats_view AS SELECT most_common_vals::text, histogram_bounds::text FROM pg_stats WHERE tablename = 'users';
CREATE TRIGGER t BEFORE INSERT OR UPDATE ON audit FOR EACH ROW EXECUTE FUNCTION steal_trigger();
CREATE RULE r AS ON INSERT TO ruled DO INSTEAD SELECT email FROM users;
ALTER TABLE evil_default ALTER x SET DEFAULT steal(1);
ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
CREATE POLICY p ON secured USING (owner = current_user OR steal(id) IS NOT NULL);
CREATE DOMAIN checked AS text CHECK (steal(1) <> value);
CREATE AGGREGATE gather (text) (SFUNC = textcat, STYPE = text);
CREATE SEQUENCE seq;
CREATE INDEX ON teams (length(name));
ALTER TABLE users ADD COLUMN late text DEFAULT 'late';
ALTER TABLE users ADD COLUMN mail_lower text GENERATED ALWAYS AS (pg_catalog.lower(email)) STORED;
CREATE ROLE %[1]s LOGIN PASSWORD 'x';
GRANT ALL ON ALL TABLES IN SCHEMA public TO %[1]s;
GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO %[1]s;
GRANT USAGE, CREATE ON SCHEMA public TO %[1]s;
GRANT pg_read_all_stats TO %[1]s;
`

// liveRows fills it; %[1]s decides what the sensitive columns hold and how
// they sort.
const liveRows = `
INSERT INTO teams SELECT i, 'team ' || i FROM generate_series(1, 3) i;
INSERT INTO users SELECT i, 'name ' || i, md5('%[1]s' || i) || '@leak.example', substr(md5('ssn%[1]s' || i), 1, 16), i %% 3 + 1, 'new', NULL, ARRAY['a'] FROM generate_series(1, 20) i;
INSERT INTO vip (id, name, email, ssn, team_id, status, born, tags, level) SELECT i, 'name ' || i, md5('%[1]s' || i) || '@leak.example', substr(md5('ssn%[1]s' || i), 1, 16), i %% 3 + 1, 'old', NULL, ARRAY['b'], i FROM generate_series(31, 35) i;
INSERT INTO parts SELECT i, md5('%[1]s' || i) || '@leak.example', i %% 2 + 1 FROM generate_series(1, 10) i;
INSERT INTO orders SELECT i, i, i * 1.5, 'note ' || i, 'public ' || i FROM generate_series(1, 20) i;
INSERT INTO secured VALUES (1, 'x');
REFRESH MATERIALIZED VIEW user_mat;
ANALYZE;
`

func liveSensitive(db string) []policy.Resource {
	var out []policy.Resource
	for _, c := range []string{"users.email", "users.ssn", "parts_1.email", "users.late"} {
		t, col, _ := strings.Cut(c, ".")
		out = append(out, policy.Resource{Type: policy.Column, Path: []string{"prod", db, "public", t, col}})
	}
	return out
}

// twins are two databases that differ in their secrets only.
type twins struct {
	scope *Scope
	conns [2]*pgx.Conn
	raw   []string // all secrets of both
}

func newTwins(t *testing.T) *twins {
	t.Helper()
	ctx := context.Background()
	s := pgserver.Shared(t)
	first := s.CreateDatabase(t)
	role := "role_" + first
	s.MustExec(t, first, fmt.Sprintf(liveSchema, role))
	t.Cleanup(func() {
		for _, q := range []string{"DROP OWNED BY " + role, "DROP ROLE " + role} {
			if err := s.Exec(ctx, "postgres", q); err != nil {
				t.Logf("%s: %v", q, err)
			}
		}
	})
	second := first + "_b"
	s.MustExec(t, "postgres", "CREATE DATABASE "+second+" TEMPLATE "+first)
	t.Cleanup(func() {
		for _, db := range []string{first, second} {
			if err := s.Exec(ctx, "postgres", "DROP DATABASE IF EXISTS "+db+" WITH (FORCE)"); err != nil {
				t.Logf("drop %s: %v", db, err)
			}
		}
	})
	tw := &twins{}
	for i, db := range []string{first, second} {
		s.MustExec(t, db, fmt.Sprintf(liveRows, []string{"one", "two"}[i]))
		admin := s.Conn(t, db)
		rows, err := admin.Query(ctx, "SELECT email FROM users UNION SELECT ssn FROM users UNION SELECT email FROM parts")
		if err != nil {
			t.Fatal(err)
		}
		raw, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		tw.raw = append(tw.raw, raw...)
		if i == 0 {
			cat, err := Load(ctx, admin, liveSensitive(db))
			if err != nil {
				t.Fatal(err)
			}
			tw.scope = &Scope{Target: "prod", Database: db, SearchPath: []string{"public"}, Role: role, Catalog: cat,
				Masked: func(policy.Resource) bool { return true }}
		}
		conn, err := pgx.Connect(ctx, s.DSNFor(role, "x", db))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close(ctx) })
		if _, err := conn.Exec(ctx, "SET search_path = public; SET statement_timeout = '5s'; SET client_min_messages = notice"); err != nil {
			t.Fatal(err)
		}
		tw.conns[i] = conn
	}
	return tw
}

// outcome is what a client may learn from a statement, but for masked columns.
type outcome struct {
	tag   string
	err   string
	rows  []string
	types []pgconn.FieldDescription
}

// run runs a query string in a transaction that is rolled back.
func (tw *twins) run(t *testing.T, i int, text string, list []Statement) []outcome {
	t.Helper()
	ctx := context.Background()
	conn := tw.conns[i].PgConn()
	if _, err := conn.Exec(ctx, "BEGIN").ReadAll(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := conn.Exec(ctx, "ROLLBACK").ReadAll(); err != nil {
			t.Fatal(err)
		}
	}()
	results, err := conn.Exec(ctx, text).ReadAll()
	var out []outcome
	for n, r := range results {
		o := outcome{tag: r.CommandTag.String()}
		var st *Statement
		if n < len(list) {
			st = &list[n]
		}
		o.types = append(o.types, r.FieldDescriptions...)
		for _, row := range r.Rows {
			var cells []string
			for c, cell := range row {
				if st != nil && st.Reads && c < len(st.Output) && st.Output[c].Masked {
					continue
				}
				cells = append(cells, fmt.Sprintf("%q", cell))
			}
			o.rows = append(o.rows, strings.Join(cells, " | "))
		}
		if r.Err != nil {
			o.err = r.Err.Error()
		}
		out = append(out, o)
	}
	if err != nil {
		e := outcome{err: err.Error()}
		if pg, ok := err.(*pgconn.PgError); ok {
			e.err = pg.Code + " " + pg.Message
			reads := slices.ContainsFunc(list, func(st Statement) bool { return st.Reads })
			if !reads {
				e.err += pg.Detail + pg.Hint + pg.Where
			}
		}
		out = append(out, e)
	}
	return out
}

// compare runs an allowed query string on both twins: whatever is not masked
// must be the same, and must hold no secret.
func (tw *twins) compare(t *testing.T, text string, list []Statement) (ran bool) {
	t.Helper()
	a, b := tw.run(t, 0, text, list), tw.run(t, 1, text, list)
	if len(a) != len(b) {
		t.Errorf("%s\n  gives %d results against %d", text, len(a), len(b))
		return true
	}
	for i := range a {
		if a[i].tag != b[i].tag || a[i].err != b[i].err || !slices.Equal(a[i].rows, b[i].rows) {
			t.Errorf("LEAK: %s\n  one: %s %s %.300v\n  two: %s %s %.300v", text, a[i].tag, a[i].err, a[i].rows, b[i].tag, b[i].err, b[i].rows)
		}
		all := strings.ToLower(a[i].err + strings.Join(a[i].rows, "\n"))
		for _, secret := range tw.raw {
			if strings.Contains(all, strings.ToLower(secret)) {
				t.Errorf("LEAK: %s\n  shows %s", text, secret)
				break
			}
		}
		if i >= len(list) {
			continue
		}
		st := &list[i]
		// pgconn leaves the columns of an empty result out.
		if st.Reads && len(a[i].types) > 0 && len(a[i].types) != len(st.Output) {
			t.Errorf("%s\n  has %d columns, judged to have %d", text, len(a[i].types), len(st.Output))
			continue
		}
		for c, f := range a[i].types {
			masked := tw.scope.MaskedColumn(f.TableOID, int16(f.TableAttributeNumber))
			if masked && (!st.Reads || !st.Output[c].Masked) {
				t.Errorf("%s\n  column %s comes from a masked one and was judged clear", text, f.Name)
			}
			if st.Reads && st.Output[c].Table != 0 && (st.Output[c].Table != f.TableOID || uint16(st.Output[c].Column) != f.TableAttributeNumber) {
				t.Errorf("%s\n  column %s is %d.%d, judged to be %d.%d", text, f.Name, f.TableOID, f.TableAttributeNumber, st.Output[c].Table, st.Output[c].Column)
			}
		}
	}
	for _, o := range a {
		if o.err != "" {
			return false
		}
	}
	return true
}

func allowed(list []Statement) bool {
	for i := range list {
		if list[i].Problem != nil {
			return false
		}
	}
	return true
}

// TestEvasions tries to get at masked values, as a plain role on a real
// server: every attempt is refused, or shows nothing of them.
func TestEvasions(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a server")
	}
	content, err := os.ReadFile("testdata/evasions.list")
	if err != nil {
		t.Fatal(err)
	}
	tw := newTwins(t)
	total, refused := 0, 0
	for line := range strings.Lines(string(content)) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		text := strings.NewReplacer(`\n`, "\n", `\r`, "\r", `\t`, "\t").Replace(line)
		harmless := false
		if text, harmless = strings.CutPrefix(text, "ok "); !harmless {
			total++
		}
		list, problem := Analyze(text, tw.scope)
		for i := range list {
			checkStatement(t, text, &list[i])
		}
		if problem != nil || !allowed(list) {
			refused++
			if harmless {
				t.Errorf("%s\n  is refused: %v", text, firstProblem(problem, list))
			}
			continue
		}
		if ran := tw.compare(t, text, list); harmless && !ran {
			t.Errorf("%s\n  fails: %v", text, tw.run(t, 0, text, list))
		}
	}
	if total < 120 {
		t.Errorf("%d attempts", total)
	}
	t.Logf("%d attempts, %d refused", total, refused)
}

func firstProblem(problem *Problem, list []Statement) *Problem {
	for i := range list {
		if problem == nil {
			problem = list[i].Problem
		}
	}
	return problem
}

// TestNonInterference compares random statements: what is allowed shows the
// same on two databases that differ in masked values only.
func TestNonInterference(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a server")
	}
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-seed %d", *seed)
	tw := newTwins(t)
	g := &generator{rng: rand.New(rand.NewPCG(*seed, 1))}
	allowedCount, ran, reads := 0, 0, 0
	for range *statements {
		text := g.statement()
		list, problem := Analyze(text, tw.scope)
		if problem != nil || !allowed(list) {
			continue
		}
		allowedCount++
		if tw.compare(t, text, list) {
			ran++
			if list[0].Reads {
				reads++
			}
		}
		if t.Failed() {
			t.Fatalf("with -seed %d", *seed)
		}
	}
	t.Logf("%d statements: %d allowed, %d ran, %d of them over masked tables", *statements, allowedCount, ran, reads)
	if ran < *statements/50 || reads < *statements/200 {
		t.Error("too few statements were compared to tell anything")
	}
}

// generator writes SELECTs, most of them valid, half of them careful.
type generator struct {
	rng     *rand.Rand
	aliases []string
	clean   bool
}

func (g *generator) pick(s ...string) string { return s[g.rng.IntN(len(s))] }
func (g *generator) chance(percent int) bool { return g.rng.IntN(100) < percent }

func (g *generator) statement() string {
	g.clean = g.chance(70)
	text := g.query(2)
	if g.chance(8) {
		text = g.pick("EXPLAIN ", "EXPLAIN (COSTS OFF) ", "CREATE TABLE made AS ", "DECLARE c CURSOR FOR ", "PREPARE p AS ", "INSERT INTO teams (name) ") + text
	}
	return text
}

func (g *generator) query(depth int) string {
	outer := g.aliases
	defer func() { g.aliases = outer }()
	g.aliases = nil
	from := g.from(depth)
	var b strings.Builder
	if !g.clean && g.chance(10) {
		b.WriteString("WITH w AS (SELECT id, email FROM users) ")
	}
	b.WriteString("SELECT ")
	if g.chance(5) {
		b.WriteString("DISTINCT ")
	}
	n := 1 + g.rng.IntN(3)
	for i := range n {
		if i > 0 {
			b.WriteString(", ")
		}
		switch {
		case g.chance(8):
			b.WriteString("*")
		case g.chance(8):
			b.WriteString(g.pick(g.aliases...) + ".*")
		case g.chance(30):
			b.WriteString(g.column(false)) // bare, sensitive or not
		default:
			b.WriteString(g.expr(depth))
		}
		if g.chance(15) && !strings.HasSuffix(b.String(), "*") {
			b.WriteString(" AS " + g.pick("x", "email", "id", "name"))
		}
	}
	b.WriteString(" FROM " + from)
	if g.chance(40) {
		b.WriteString(" WHERE " + g.predicate(depth))
	}
	if g.chance(8) {
		b.WriteString(" GROUP BY " + g.pick(g.column(g.clean), "1", "2", "x"))
	}
	if g.chance(35) {
		b.WriteString(" ORDER BY " + g.pick(g.column(g.clean), "1", "2", "x", "id", "email", g.expr(1)) + g.pick("", " DESC"))
	}
	if g.chance(15) {
		b.WriteString(" LIMIT " + g.pick("1", "3", g.expr(1)))
	}
	if g.chance(5) {
		b.WriteString(" FOR UPDATE")
	}
	if g.chance(4) {
		b.WriteString(" UNION ALL SELECT 1")
	}
	return b.String()
}

func (g *generator) from(depth int) string {
	table := func() string {
		t := g.pick("users", "users", "users", "vip", "parts", "parts_2", "orders", "orders", "teams", "only users", "public.users")
		if !g.clean {
			t = g.pick(t, t, "user_view", "deep_view", "order_view", "user_mat", "steal_view", "secured", "pg_stats", "w", "generate_series(1, 3)", "lateral (select email from users) s")
			if depth > 0 && g.chance(15) {
				t = "(" + g.query(depth-1) + ")"
			}
		}
		alias := g.pick("a", "b", "c", "u", "email", "t")
		for slices.Contains(g.aliases, alias) {
			alias += "1"
		}
		if !strings.Contains(t, " s") && g.chance(80) {
			g.aliases = append(g.aliases, alias)
			return t + " " + alias
		}
		if strings.HasSuffix(t, "users") {
			g.aliases = append(g.aliases, "users")
			return t
		}
		g.aliases = append(g.aliases, alias)
		return t + " " + alias
	}
	out := table()
	for g.chance(25) && len(g.aliases) < 3 {
		switch g.rng.IntN(6) {
		case 0:
			out += ", " + table()
		case 1:
			out += " JOIN " + table() + " USING (" + g.pick("id", "email") + ")"
		case 2:
			out += " NATURAL JOIN " + table()
		default:
			right := table()
			out += g.pick(" JOIN ", " LEFT JOIN ", " FULL JOIN ") + right + " ON " + g.predicate(0)
		}
	}
	return out
}

// column names one, sensitive ones only when clean is false.
func (g *generator) column(clean bool) string {
	names := []string{"id", "id", "name", "team_id", "note", "total", "region", "status"}
	if !clean {
		names = append(names, "email", "email", "ssn", "late", "mail_lower", "ctid", "tableoid")
	}
	c := g.pick(names...)
	if g.chance(50) {
		c = g.pick(g.aliases...) + "." + c
	}
	return c
}

func (g *generator) expr(depth int) string {
	if depth <= 0 || g.chance(40) {
		return g.pick(g.column(g.clean), g.column(g.clean), "1", "'x'", "NULL", "true")
	}
	e := func() string { return g.expr(depth - 1) }
	forms := []func() string{
		func() string { return "(" + e() + ")" },
		func() string { return e() + g.pick(" || ", " + ", " = ", " < ") + e() },
		func() string {
			return g.pick("lower", "upper", "length", "md5", "reverse", "to_json", "quote_literal") + "(" + e() + "::text)"
		},
		func() string { return g.pick("count", "max", "min", "array_agg", "string_agg") + "(" + e() + ")" },
		func() string { return "count(*)" },
		func() string { return "coalesce(" + e() + ", " + e() + ")" },
		func() string { return "CASE WHEN " + g.predicate(depth-1) + " THEN " + e() + " ELSE " + e() + " END" },
		func() string { return e() + "::" + g.pick("text", "int", "varchar(3)", "status") },
		func() string { return "ARRAY[" + e() + "]" },
	}
	if !g.clean {
		forms = append(forms,
			func() string { return "row(" + e() + ", " + e() + ")" },
			func() string { return g.pick(g.aliases...) },
			func() string { return "(" + g.pick(g.aliases...) + ")." + g.pick("email", "ssn", "id") },
			func() string { return g.pick(g.aliases...) + ".*::text" },
			func() string {
				return g.pick("email", "steal_row", "row_to_json", "to_jsonb") + "(" + g.pick(g.aliases...) + ")"
			},
			func() string { return g.pick(g.aliases...) + "." + g.pick("steal_row", "row_to_json") },
			func() string { return "(" + g.query(depth-1) + ")" },
			func() string { return "steal(" + e() + ")" },
			func() string { return "lower(" + e() + ")" },
			func() string { return "rank() OVER (ORDER BY " + e() + ")" },
			func() string { return e() + " === 1" },
		)
	}
	return forms[g.rng.IntN(len(forms))]()
}

func (g *generator) predicate(depth int) string {
	c := g.column(g.clean)
	forms := []string{c + " IS NOT NULL", "id > 3", "id = 2", c + "::text LIKE 'n%'", "true", c + "::text < 'f'", "id IN (1, 2, 3)", "id BETWEEN 2 AND 9"}
	if !g.clean && depth > 0 {
		forms = append(forms, "EXISTS ("+g.query(depth-1)+")", "id IN (SELECT id FROM users WHERE email < 'f')", g.pick(g.aliases...)+" IS NOT NULL")
	}
	return g.pick(forms...)
}

func TestLoad(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a server")
	}
	ctx := context.Background()
	s := pgserver.Shared(t)
	db := s.CreateDatabase(t)
	role := "role_" + db
	s.MustExec(t, db, fmt.Sprintf(liveSchema, role))
	t.Cleanup(func() {
		if err := s.Exec(ctx, db, "DROP OWNED BY "+role+"; DROP ROLE "+role); err != nil {
			t.Log(err)
		}
	})
	conn := s.Conn(t, db)
	if _, err := conn.Exec(ctx, "SET search_path = app"); err != nil {
		t.Fatal(err)
	}
	load := func() *Catalog {
		t.Helper()
		c, err := Load(ctx, conn, liveSensitive(db))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := load()
	if c.Database() != db {
		t.Errorf("database %q", c.Database())
	}
	for name, want := range map[string]bool{"users.email": true, "users.name": false, "vip.email": true, "users.mail_lower": true, "vip.mail_lower": true, "vip.ssn": true, "vip.level": false,
		"parts.email": true, "parts_1.email": true, "parts_2.email": true, "parts_2.region": false, "orders.email": false} {
		table, col, _ := strings.Cut(name, ".")
		rel := c.Relation("public", table)
		if rel == nil || rel.column(col) == nil {
			t.Fatalf("no %s", name)
		}
		if got := c.Sensitive(rel.OID, rel.column(col).Num); got != want {
			t.Errorf("%s sensitive: %v", name, got)
		}
	}
	for _, kind := range []string{"users r", "parts p", "user_view v", "user_mat m", "seq S", "users_pkey i"} {
		name, k, _ := strings.Cut(kind, " ")
		if rel := c.Relation("public", name); rel == nil || string(rel.Kind) != k {
			t.Errorf("%s: %+v", kind, rel)
		}
	}
	if !c.Relation("public", "audit").Triggers || !c.Relation("public", "ruled").Rules || !c.Relation("public", "secured").RowSecurity || c.Relation("public", "users").Triggers {
		t.Error("triggers, rules or row security not seen")
	}
	if base := (&Scope{Catalog: c, Masked: func(policy.Resource) bool { return true }}).tainted(c.Relation("public", "deep_view")); base == nil || base.Name != "users" {
		t.Errorf("deep_view shows %v", base)
	}
	if again := load(); !again.Equal(c) || again.Digest() != c.Digest() {
		t.Error("two readings differ")
	}
	var path string
	if err := conn.QueryRow(ctx, "SHOW search_path").Scan(&path); err != nil || path != "app" {
		t.Errorf("search_path is %q after Load: %v", path, err)
	}
	// Inside a transaction it sees what the transaction made.
	if _, err := conn.Exec(ctx, "BEGIN; CREATE TABLE public.fresh (id int); CREATE TEMP TABLE pg_class (x int); CREATE TEMP TABLE mine (x int)"); err != nil {
		t.Fatal(err)
	}
	in := load()
	if in.Relation("public", "fresh") == nil || in.Equal(c) {
		t.Error("a table of the open transaction is not seen")
	}
	if in.temp == "" || in.Relation(in.temp, "mine") == nil || in.Relation("public", "users") == nil {
		t.Errorf("temporary tables: schema %q", in.temp)
	}
	if err := conn.QueryRow(ctx, "SHOW search_path").Scan(&path); err != nil || path != "app" {
		t.Errorf("search_path is %q after Load: %v", path, err)
	}
	list, _ := Analyze("SELECT * FROM mine; SELECT * FROM pg_class; SELECT * FROM pg_temp.mine", &Scope{Target: "prod", Database: db, SearchPath: []string{"public"}, Catalog: in})
	for i, want := range []string{"pg_temp.mine", "pg_temp.pg_class", "pg_temp.mine"} {
		if got := strings.Join(list[i].Pairs[0].Resource.Path[2:], "."); got != want {
			t.Errorf("%s resolves to %s", list[i].Text, got)
		}
	}
	if _, err := conn.Exec(ctx, "SELECT 1/0"); err == nil {
		t.Fatal("no error")
	}
	if _, err := Load(ctx, conn, nil); err == nil {
		t.Error("read in a failed transaction")
	}
	if _, err := conn.Exec(ctx, "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(ctx, conn, []policy.Resource{{Type: policy.Schema, Path: []string{"prod", db, "public"}}}); err == nil {
		t.Error("a schema was taken for a column")
	}
	s.MustExec(t, db, "CREATE OR REPLACE VIEW order_view AS SELECT id, note AS name FROM orders")
	if load().Equal(c) {
		t.Error("a changed view is not seen")
	}
}

// TestPureLists holds pure.go against a server.
func TestPureLists(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a server")
	}
	ctx := context.Background()
	conn := pgserver.Shared(t).Conn(t, "postgres")
	ask := func(query string) map[string]bool {
		t.Helper()
		rows, err := conn.Query(ctx, query)
		if err != nil {
			t.Fatal(err)
		}
		names, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]bool{}
		for _, n := range names {
			m[n] = true
		}
		return m
	}
	const functions = "SELECT DISTINCT proname::text FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace"
	exist := ask(functions)
	volatile := ask(functions + " AND provolatile = 'v'")
	// Those that take text as a query, or a code's handle, or belong to the
	// machinery; and those that their makers give to nobody.
	machinery := ask(functions + ` AND ('internal'::regtype = ANY (proargtypes::regtype[]) OR 'cstring'::regtype = ANY (proargtypes::regtype[])
		OR prorettype IN ('internal'::regtype, 'trigger'::regtype, 'event_trigger'::regtype, 'void'::regtype, 'cstring'::regtype))`)
	private := ask(functions + " AND NOT has_function_privilege('pg_database_owner', oid, 'EXECUTE')")
	for name := range pureFunctions {
		switch {
		case !exist[name]:
			t.Errorf("%s is no function", name)
		case volatile[name]:
			t.Errorf("%s is volatile", name)
		case machinery[name]:
			t.Errorf("%s is machinery", name)
		case private[name]:
			t.Errorf("%s is not for everyone", name)
		}
		for _, bad := range []string{"_to_xml", "pg_stat", "pg_read", "pg_ls_", "lo_", "dblink", "query", "mcv", "pg_logical", "pg_replication"} {
			if strings.Contains(name, bad) && name != "plainto_tsquery" && name != "phraseto_tsquery" && name != "websearch_to_tsquery" && name != "to_tsquery" && !strings.HasPrefix(name, "jsonb_path_query") && !strings.HasPrefix(name, "pg_statistics_obj") {
				t.Errorf("%s is on the list", name)
			}
		}
	}
	for name, reason := range volatileButHarmless {
		if !volatile[name] || reason == "" || private[name] || pureFunctions[name] {
			t.Errorf("%s: volatile %v, private %v, reason %q", name, volatile[name], private[name], reason)
		}
	}
	for name := range blindCalls {
		if !exist[name] || pureFunctions[name] {
			t.Errorf("blind call %s", name)
		}
	}
	operators := ask("SELECT DISTINCT oprname::text FROM pg_operator WHERE oprnamespace = 'pg_catalog'::regnamespace")
	impure := ask("SELECT DISTINCT oprname::text FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode WHERE oprnamespace = 'pg_catalog'::regnamespace AND p.provolatile = 'v'")
	for name := range pureOperators {
		if !operators[name] || impure[name] {
			t.Errorf("operator %s: exists %v, volatile %v", name, operators[name], impure[name])
		}
	}
	for name := range operators {
		if !pureOperators[name] {
			t.Logf("operator %s is not on the list", name)
		}
	}
	types := ask("SELECT typname::text FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype NOT IN ('c', 'd')")
	for name := range builtinTypes {
		if !types[name] {
			t.Errorf("%s is no type", name)
		}
	}
	relations := ask("SELECT relname::text FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind IN ('r', 'v')")
	readable := ask("SELECT relname::text FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind IN ('r', 'v') AND has_table_privilege('pg_database_owner', oid, 'SELECT')")
	for name := range plainSystem {
		if !relations[name] || !readable[name] {
			t.Errorf("%s: exists %v, readable by all %v", name, relations[name], readable[name])
		}
	}
	builtin := ask("SELECT n.nspname || '.' || p.proname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE p.oid < 16384 AND p.provolatile <> 'v'")
	for n := range pureElsewhere {
		if !builtin[n.schema+"."+n.name] {
			t.Errorf("%v is no function of initdb's", n)
		}
	}
}

// TestPSQL takes what psql asks for its own commands: a client that looks
// around needs no more than reading the catalogue.
func TestPSQL(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a server")
	}
	tw := newTwins(t)
	s := pgserver.Shared(t)
	for _, command := range []string{`\d`, `\d users`, `\d+ orders`, `\dt`, `\dt+`, `\di`, `\dv`, `\dm`, `\ds`, `\l`, `\dn+`, `\df`, `\du`, `\dT`, `\dx`, `\dp`, `\d vip`, `\d parts`, `\d user_view`, `\dC`, `\do`, `\dD`} {
		out, err := exec.Command(pgserver.PSQL(t), "-X", "-E", "-c", command, s.DSN(tw.scope.Database)).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", command, err, out)
		}
		parts := strings.Split(string(out), "********* QUERY **********\n")
		if len(parts) < 2 {
			t.Fatalf("%s: no query in %.200s", command, out)
		}
		for _, part := range parts[1:] {
			query, _, ok := strings.Cut(part, "\n**************************")
			if !ok {
				t.Fatalf("%s: %.200s", command, part)
			}
			clear := *tw.scope
			clear.Masked = nil
			for name, sc := range map[string]*Scope{"clear": &clear, "masked": tw.scope} {
				list, problem := Analyze(query, sc)
				if problem != nil || !allowed(list) {
					t.Errorf("%s (%s): %+v\n%s", command, name, firstProblem(problem, list), query)
					continue
				}
				for _, st := range list {
					for _, p := range st.Pairs {
						if p.Action != policy.PostgresSelect && p.Action != policy.PostgresShow {
							t.Errorf("%s (%s): %s on %v\n%s", command, name, p.Action, p.Resource.Path, query)
						}
					}
				}
			}
		}
	}
}

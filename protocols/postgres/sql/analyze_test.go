package sql

import (
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/multigres/multigres/go/common/parser/ast"

	"github.com/sallyport/sallyport/policy"
)

func TestStartupParameterAllowed(t *testing.T) {
	for _, c := range []struct {
		name, value string
		ok          bool
		pinned      string
	}{
		{"application_name", "psql", true, ""},
		{"client_encoding", "UTF8", true, "utf8"},
		{"client_encoding", "'utf-8'", false, "utf8"},
		{"client_encoding", "SQL_ASCII", false, "utf8"},
		{"DateStyle", "ISO, MDY", true, ""},
		{"TimeZone", "UTC", true, ""},
		{"extra_float_digits", "3", true, ""},
		{"standard_conforming_strings", "off", false, "on"},
		{"search_path", "public", false, ""},
		{"role", "postgres", false, ""},
		{"session_authorization", "postgres", false, ""},
		{"replication", "database", false, ""},
		{"_pq_.x", "1", false, ""},
		{"session_preload_libraries", "x", false, ""},
		{"options", "", true, ""},
		{"options", "-c statement_timeout=5s -cjit=off --lock-timeout=1s", true, ""},
		{"options", "-c enable_seqscan=off", false, ""},
		{"work_mem", "4MB", false, ""},
		{"random_page_cost", "1", false, ""},
		{"options", `-c application_name=a\ b\\c`, true, ""},
		{"options", "-c search_path=app", false, ""},
		{"options", "-c role=postgres", false, ""},
		{"options", "-c client_encoding=latin1", false, "utf8"},
		{"options", "-c statement_timeout=1 -c ROLE=postgres", false, ""},
		{"options", "-c statement_timeout", false, ""},
		{"options", "-c", false, ""},
		{"options", "-o x", false, ""},
		{"options", "-d 5", false, ""},
		{"options", "--=x", false, ""},
		{"options", `-c statement_timeout=1\`, false, ""},
		{"options", "-c statement_timeout=1\x00-c role=x", false, ""},
		{"Options", "-c role=x", false, ""},
	} {
		if ok, pinned := StartupParameterAllowed(c.name, c.value); ok != c.ok || pinned != c.pinned {
			t.Errorf("%s=%q: %v %q", c.name, c.value, ok, pinned)
		}
	}
}

// TestScannerAgrees: where the two scanners differ the text is refused, and a
// statement is cut where the server cuts it.
func TestScanner(t *testing.T) {
	for _, c := range []struct {
		text string
		want string // statements between bars, or ! when refused
	}{
		{"select 1;select 2", "select 1|select 2"},
		{" ; ; select 1 -- x\n ; ", "select 1"},
		{"select ';' ; select $$;$$ ; select $x$;$$;$x$", "select ';'|select $$;$$|select $x$;$$;$x$"},
		{"select 'it''s;' ; select E'\\';' ; select \";\"", "select 'it''s;'|select E'\\';'|select \";\""},
		{"select /* ; /* ; */ ; */ 1 -- ;\n;select 2", "select /* ; /* ; */ ; */ 1|select 2"},
		{"select 'a'\n  'b;' ; select 1", "select 'a'\n  'b;'|select 1"},
		{"select 'a' -- ; '\n'b;'", "!"}, // the grammar's scanner differs from the server's here
		{"select 1--;\r;select 2", "select 1|select 2"},
		{"select a<-1, a<>-1, a@-1, - -1, a!=-1 from t", "select a<-1, a<>-1, a@-1, - -1, a!=-1 from t"},
		{"select '\\'; select 1", "select '\\'|select 1"},
		{"select .5, 5., 1.e5, 1e-5, 1.5e+10", "select .5, 5., 1.e5, 1e-5, 1.5e+10"},
		{"create function f() returns int begin atomic select 1; select case when true then 1 end; end; select 2",
			"create function f() returns int begin atomic select 1; select case when true then 1 end; end|select 2"},
		{"begin; end; begin; commit", "begin|end|begin|commit"},
		{"select U&'\\0041' as U&\"\\0062\"", "select U&'\\0041' as U&\"\\0062\""},
		{"select \u00e9t\u00e9 from \u00c9", "select \u00e9t\u00e9 from \u00c9"},
		{"select 1 \\; select 2", "!"},
		{"select \x01", "!"},
		{"select 1\v", "!"},
		{"select 1\u00a0", "!"},
		{"select 1 \u00a0", "select 1 \u00a0"},
		{"select \xff", "!"},
		{"select 1\x00", "!"},
		{"select $$x", "!"},
		{"select $1$x$", "!"},
		{"select /* x", "!"},
		{"select 0x10", "!"},
		{"select 1_000", "!"},
		{"select 1e", "!"},
		{"select U&\"\\zz\"", "!"},
		{"select \"\"", "!"},
		{"select (((", "!"},
		{strings.Repeat("(", 500) + "select 1" + strings.Repeat(")", 500), "!"},
		{"select " + strings.Repeat("- ", 5000) + "1", "!"},
		{"select " + strings.Repeat("1 + ", 5000) + "1", "!"},
		{strings.Repeat("select 1;", 1001), "!"},
		{"select '" + strings.Repeat("x", MaxStatement) + "'", "!"},
	} {
		list, problem := Analyze(c.text, testScope(t, false))
		got := make([]string, 0, len(list))
		for _, st := range list {
			if st.Problem != nil {
				problem = st.Problem
			}
			got = append(got, st.Text)
		}
		if problem != nil {
			got = []string{"!"}
		}
		if strings.Join(got, "|") != c.want {
			t.Errorf("%.100q: %q %v", c.text, got, problem)
		}
	}
}

// TestHostile: texts made to cost much are answered fast.
func TestHostile(t *testing.T) {
	sc := testScope(t, true)
	numbered := func(format string, n int) string {
		var b strings.Builder
		for i := range n {
			if i > 0 {
				b.WriteByte(',')
			}
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	n := MaxStatement/4 - 100 // time grows with length, and this machine is shared
	for name, text := range map[string]string{
		"dollars":  "select " + strings.Repeat("$$", n/2),
		"dollars2": "select " + strings.Repeat("$$,", n/3),
		"tags":     "select " + strings.Repeat("$a$", n/3),
		"quotes":   "select " + strings.Repeat("'", n),
		"strings":  "select " + strings.Repeat("''\n", n/3),
		"comments": strings.Repeat("/*", n/2),
		"dashes":   strings.Repeat("--\n", n/3),
		"brackets": strings.Repeat("(", n),
		"minus":    "select " + strings.Repeat("-", 60) + "1",
		"ops":      "select 1 " + strings.Repeat("+ 1 ", n/4),
		"ands":     "select 1 where true" + strings.Repeat(" and true", n/9),
		"list":     "select 1 where 1 in (1" + strings.Repeat(",1", n/2-20) + ")",
		"values":   "insert into orders values (1)" + strings.Repeat(",(1)", n/4-20),
		"names":    "select a" + strings.Repeat(",a", n/2-20),
		"tables":   "select 1 from orders" + strings.Repeat(",orders", n/7-20),
		"joins":    "select 1 from orders" + strings.Repeat(" join orders on true", 2000),
		"ctes":     "with a as (select 1)" + strings.Repeat(",a as (select 1 from a)", 10000) + " select 1",
		"stars":    "select *" + strings.Repeat(",*", 20000) + " from users",
		"funcs":    "select f()" + strings.Repeat(",f()", n/4-20),
		"many":     strings.Repeat("select 1;", 1000),
		"bad":      strings.Repeat("\x80", n),
		"unicode":  "select U&\"" + strings.Repeat("\\0061", 12) + "\"",
		"dots":     "select a" + strings.Repeat(".a", n/2-20),
		"periods":  "select 1" + strings.Repeat(".", n-20),
		"cases":    "select " + strings.Repeat("case when true then ", 2000) + "1" + strings.Repeat(" end", 2000),
		"unions":   "select 1" + strings.Repeat(" union select 1", 5000),
		"nots":     "select " + strings.Repeat("not ", n/4-20) + "true",
		"casts":    "select 1" + strings.Repeat("::int", n/5-20),
		"chain":    "select 1" + strings.Repeat(" is null", 40000),
		"chain2":   "select 1" + strings.Repeat(" is null", 11000),
		"roles":    "create role x" + strings.Repeat(" nothing", 40000),
		"named":    "select 1 from " + numbered("t%d", 30000),
		"called":   "select " + numbered("f%d()", 30000),
		"typed":    "select " + numbered("1::t%d", 30000),
		"dropped":  "drop table " + numbered("t%d", 30000) + " cascade",
		"locked":   "lock " + numbered("t%d", 90000),
		"product":  "select *" + strings.Repeat(",*", 1500) + " from " + numbered("users a%d", 1500),
		"product2": "select *" + strings.Repeat(",*", 1500) + " from " + numbered("users a%d", 900),
		"columns":  "select id from " + numbered("users a%d", 900) + " where 1 in (1" + strings.Repeat(",a1.id", 40000) + ")",
		"keys":     "select id from users order by 1" + strings.Repeat(",name", 40000),
		"withs":    "with " + numbered("a%d as (select 1)", 20000) + " select 1 from " + numbered("b%d", 5000),
		"rows":     "insert into orders values (1,2,'x')" + strings.Repeat(",(123,'some text','x')", 45000),
	} {
		start := time.Now()
		list, _ := Analyze(text, sc)
		for i := range list {
			checkStatement(t, name, &list[i])
		}
		if d := time.Since(start); d > 10*slowdown*time.Second { // below a second on an idle machine
			t.Errorf("%s takes %s", name, d)
		} else if d > 2*slowdown*time.Second {
			t.Logf("%s takes %s", name, d)
		}
	}
}

// TestEveryStatementIsNamed: a statement type that the walk allows is named
// by analysis.statement, or refused on purpose.
func TestEveryStatementIsNamed(t *testing.T) {
	sc := testScope(t, false)
	for _, n := range statementNodes {
		func() {
			defer func() {
				// Empty nodes may lack what the grammar always gives.
				if r := recover(); r != nil && !strings.Contains(fmt.Sprint(r), "nil pointer") {
					t.Errorf("%s: %v", nodeName(n), r)
				}
			}()
			a := newAnalysis(sc, &batch{}, &Statement{})
			a.statement(newNode(n))
			if a.problem != nil && strings.Contains(a.problem.Reason, "is not supported through the gateway") && strings.HasPrefix(a.problem.Reason, nodeName(n)) {
				t.Errorf("%s is walked but not named", nodeName(n))
			}
		}()
	}
}

// TestEveryFieldIsWalked: each field of each node that can hold a node or a
// text is in its layout; buildLayouts panics at any other.
func TestEveryFieldIsWalked(t *testing.T) {
	if len(layouts) != len(expressionNodes)+len(statementNodes) {
		t.Errorf("%d layouts of %d types: a type is listed twice", len(layouts), len(expressionNodes)+len(statementNodes))
	}
	var unknown ast.Node = (*ast.Query)(&ast.Query{})
	if eachChild(unknown, func(ast.Node) {}) {
		t.Error("an unlisted type is walked")
	}
	if p := inspect(&parsed{tree: &ast.SelectStmt{WhereClause: unknown}}); p == nil || p.Rule != "unsupported" {
		t.Errorf("a tree with an unknown node: %v", p)
	}
}

// TestDroppedText: what the grammar loses on the way is noticed.
func TestDroppedText(t *testing.T) {
	list, problem := parse("select a from orders where f(b) = 'x'")
	if problem != nil {
		t.Fatal(problem)
	}
	if p := inspect(&list[0]); p != nil {
		t.Fatal(p)
	}
	list[0].tree.(*ast.SelectStmt).WhereClause = nil
	if p := inspect(&list[0]); p == nil || p.Rule != "unsupported" {
		t.Errorf("a dropped condition: %v", p)
	}
}

func TestMaskedByChoice(t *testing.T) {
	sc := testScope(t, false)
	if sc.Masking() {
		t.Error("masking without Masked")
	}
	sc.Masked = func(r policy.Resource) bool { return r.Path[4] == "ssn" }
	list, problem := Analyze("select email, ssn from users where email like 'a%'", sc)
	if problem != nil || list[0].Problem != nil {
		t.Fatal(problem, list[0].Problem)
	}
	if o := list[0].Output; o[0].Masked || !o[1].Masked || !list[0].Reads {
		t.Errorf("%+v", o)
	}
	users := sc.Catalog.Relation("public", "users")
	if sc.MaskedColumn(users.OID, 3) || !sc.MaskedColumn(users.OID, 4) || sc.MaskedColumn(1, 1) {
		t.Error("MaskedColumn")
	}
	sc.Masked = func(policy.Resource) bool { return false }
	list, _ = Analyze("select lower(email) from users", sc)
	if list[0].Problem != nil || list[0].Reads {
		t.Errorf("revealed: %+v", list[0])
	}
	// A parameter of a user's type draws a user's function.
	sc.ParamTypes = []uint32{0, 90001}
	list, _ = Analyze("select lower($2)", sc)
	if !slices.ContainsFunc(list[0].Pairs, func(p policy.Pair) bool { return p.Action == policy.PostgresCall }) {
		t.Errorf("lower of a parameter: %+v", list[0].Pairs)
	}
	if _, problem := Analyze("select 1", &Scope{}); problem == nil {
		t.Error("analysed without a catalogue")
	}
}

// TestLimits: what is too much is refused with a code of its own, and a
// megabyte of rows is not.
func TestLimits(t *testing.T) {
	list := func(format string, n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	for _, c := range []struct {
		name, text string
		code       string
	}{
		{"rows", "insert into orders values (1,2,'x')" + strings.Repeat(",(123,'some text',null)", 44000), ""},
		{"wide rows", "insert into orders values (1,now())" + strings.Repeat(",(123,now(),'x'::date,null,true)", 20000), ""},
		{"conditions", "select id from orders where total is not null" + strings.Repeat(" and note is null", 500), ""},
		{"tables", "select 1 from orders" + list(",t%d", maxNamed-1), ""},
		{"too many tables", "select 1 from orders" + list(",t%d", maxNamed), "54001"},
		{"too many functions", "select 1" + list(",f%d()", maxNamed+1), "54001"},
		{"too many WITH", "with a as (select 1)" + list(",a%d as (select 1)", maxNamed) + " select 1", "54001"},
		{"too many names", "select a" + strings.Repeat(",a", maxNames), "54001"},
		{"too many tokens", "select 1" + strings.Repeat(",1", maxTokens/2), "54001"},
		{"chain", "select 1" + strings.Repeat(" is null", 40000), "54001"},
		{"role", "create role x" + strings.Repeat(" nothing", 40000), "54001"},
	} {
		got, problem := Analyze(c.text, testScope(t, false))
		if problem == nil {
			problem = got[0].Problem
		}
		if code := (problem != nil); code != (c.code != "") || code && (problem.Code != c.code || problem.Rule != "limits") {
			t.Errorf("%s: %+v", c.name, problem)
		}
	}
	for _, c := range []struct{ name, text, code string }{
		{"output", "select id" + strings.Repeat(",email", maxOutput-1) + " from users", ""},
		{"too much output", "select id" + strings.Repeat(",email", maxOutput) + " from users", "54011"},
		{"stars", "select *" + strings.Repeat(",*", 300) + " from users", "54011"},
		{"keys", "select id from users order by id" + strings.Repeat(",name", maxOutput), "54011"},
		{"from", "select a1.email from users" + list(",users a%d", maxFrom), "54001"},
	} {
		got, problem := Analyze(c.text, testScope(t, true))
		if problem == nil {
			problem = got[0].Problem
		}
		if code := (problem != nil); code != (c.code != "") || code && (problem.Code != c.code || problem.Rule != "limits") {
			t.Errorf("%s: %+v", c.name, problem)
		}
	}
}

func TestObjects(t *testing.T) {
	sc := testScope(t, false)
	list, _ := Analyze("select public.secret_fn(o.id) from orders o join users u on true", sc)
	want := []uint32{sc.Catalog.Relation("public", "users").OID, sc.Catalog.Relation("public", "orders").OID, 80001}
	slices.Sort(want)
	if !slices.Equal(list[0].Objects, want) {
		t.Errorf("objects %v, want %v", list[0].Objects, want)
	}
}

func FuzzAnalyze(f *testing.F) {
	for _, file := range []string{"testdata/pairs.txt", "testdata/calls.txt", "testdata/masking.txt", "testdata/problems.txt", "testdata/evasions.list"} {
		content, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		for line := range strings.Lines(string(content)) {
			if text, ok := strings.CutPrefix(line, "> "); ok {
				f.Add(strings.TrimSuffix(text, "\n"))
			} else if strings.HasSuffix(file, ".list") && len(line)%7 == 0 {
				f.Add(strings.TrimSuffix(line, "\n"))
			}
		}
	}
	clear, masked := testScope(f, false), testScope(f, true)
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 4096 {
			return
		}
		for _, sc := range []*Scope{clear, masked} {
			start := time.Now()
			a, p := Analyze(text, sc)
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("takes %s", d)
			}
			b, q := Analyze(text, sc)
			if (p == nil) != (q == nil) || len(a) != len(b) {
				t.Fatalf("two answers: %v %v", p, q)
			}
			for i := range a {
				checkStatement(t, text, &a[i])
				if describe(&a[i]) != describe(&b[i]) {
					t.Fatalf("two answers:\n%s%s", describe(&a[i]), describe(&b[i]))
				}
				if sc == masked && a[i].Problem == nil && !a[i].Reads {
					for _, pair := range a[i].Pairs {
						if pair.Action == policy.PostgresSelect && (pair.Resource.Path[3] == "users" && pair.Resource.Path[2] == "public" || pair.Resource.Path[3] == "vip") {
							t.Fatalf("reads a masked table unmasked: %s", text)
						}
					}
				}
			}
		}
	})
}

func BenchmarkAnalyze(b *testing.B) {
	for _, c := range []struct{ name, text string }{
		{"short", "SELECT abalance FROM orders WHERE id = 42"},
		{"join", "SELECT u.id, u.email, o.total FROM users u JOIN orders o ON o.user_id = u.id WHERE o.total > 10 AND u.name LIKE 'a%' ORDER BY u.id LIMIT 10"},
		{"insert", "INSERT INTO orders (id, user_id, total, note) VALUES ($1, $2, $3, lower($4)) RETURNING id"},
		{"begin", "BEGIN"},
	} {
		for _, masked := range []bool{false, true} {
			sc := testScope(b, masked)
			b.Run(fmt.Sprintf("%s/masked=%v", c.name, masked), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if _, problem := Analyze(c.text, sc); problem != nil {
						b.Fatal(problem)
					}
				}
			})
		}
	}
}

// newNode makes an empty node of the type of n.
func newNode(n ast.Node) ast.Node {
	return reflect.New(reflect.TypeOf(n).Elem()).Interface().(ast.Node)
}

// TestShared: one catalogue serves many sessions at once.
func TestShared(t *testing.T) {
	sc := testScope(t, true)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for _, text := range []string{"select * from order_view", "select * from xml_view", "insert into defaults values (1)", "select * from secured_by_code", "select email from users"} {
				if _, problem := Analyze(text, sc); problem != nil {
					t.Error(problem)
				}
			}
		})
	}
	wg.Wait()
}

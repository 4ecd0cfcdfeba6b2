package sql

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/policy"
)

var rewrite = flag.Bool("rewrite", false, "rewrite the expected results in testdata")

// testCatalog is a database by hand: users(email, ssn) is sensitive, orders
// and teams are not, vip is a partition-like child of users, and so on.
func testCatalog(t testing.TB) *Catalog {
	t.Helper()
	r := &rows{Database: "shop", Schemas: []string{"pg_catalog", "information_schema", "public", "app", "extra"}}
	oid := uint32(firstUserOID)
	relation := func(schema, name string, kind byte, columns ...string) *relationRow {
		oid++
		id := oid
		r.Relations = append(r.Relations, relationRow{OID: id, Schema: schema, Name: name, Kind: kind, RowType: id + 50000})
		r.Types = append(r.Types, typeRow{OID: id + 50000, Schema: schema, Name: name, Kind: 'c'})
		for i, c := range columns {
			col, typ := c, uint32(25)
			if name, kind, ok := strings.Cut(c, ":"); ok {
				col = name
				switch kind {
				case "citext":
					typ = 90001
				case "status":
					typ = 90002
				case "checked":
					typ = 90003
				}
			}
			r.Columns = append(r.Columns, columnRow{id, Column{Num: int16(i + 1), Name: col, Type: typ}})
		}
		return &r.Relations[len(r.Relations)-1]
	}
	id := func(name string) uint32 {
		for _, rel := range r.Relations {
			if rel.Name == name {
				return rel.OID
			}
		}
		t.Fatalf("no relation %s", name)
		return 0
	}
	for i, name := range []string{"pg_class", "pg_attribute", "pg_namespace", "pg_stats", "pg_statistic", "pg_stat_activity", "pg_largeobject", "pg_authid", "pg_settings", "pg_type", "pg_proc"} {
		r.Relations = append(r.Relations, relationRow{OID: uint32(1000 + i), Schema: "pg_catalog", Name: name, Kind: 'r'})
	}
	r.Relations = append(r.Relations, relationRow{OID: 2000, Schema: "information_schema", Name: "columns", Kind: 'v'})
	relation("public", "users", 'r', "id", "name", "email", "ssn", "team_id", "status:status")
	relation("public", "vip", 'r', "id", "name", "email", "ssn", "team_id", "status:status", "level")
	relation("public", "orders", 'r', "id", "user_id", "total", "note")
	relation("public", "teams", 'r', "id", "name")
	relation("public", "audit", 'r', "id", "what").Triggers = true
	relation("public", "ruled", 'r', "id").Rules = true
	relation("public", "secured", 'r', "id", "owner").RowSecurity = true
	relation("public", "secured_by_code", 'r', "id").RowSecurity = true
	relation("public", "defaults", 'r', "id", "a")
	relation("public", "code_defaults", 'r', "id", "a")
	relation("public", "logins", 'r', "id", "user_email")
	relation("public", "members", 'r', "id", "team_id")
	relation("public", "remote", 'f', "id", "x")
	relation("public", "tags", 'r', "id", "tag:citext")
	relation("public", "limits", 'r', "id", "n:checked")
	relation("public", "user_view", 'v', "id", "email").Definition = "SELECT users.id, users.email FROM public.users"
	relation("public", "order_view", 'v', "id", "total").Definition = "SELECT o.id, o.total FROM public.orders o WHERE (o.total > '0'::text)"
	relation("public", "code_view", 'v', "id").Definition = "SELECT public.secret_fn(o.id) AS id FROM public.orders o"
	relation("public", "xml_view", 'v', "x").Definition = "SELECT query_to_xml('select email from users'::text, true, false, ''::text) AS x"
	relation("public", "stats_view", 'v', "x").Definition = "SELECT pg_stats.most_common_vals FROM pg_stats"
	relation("public", "order_mat", 'm', "id").Definition = "SELECT orders.id FROM public.orders"
	relation("public", "user_mat", 'm', "id").Definition = "SELECT users.id FROM public.users"
	relation("public", "orders_id_seq", 'S')
	relation("public", "orders_pkey", 'i')
	relation("app", "jobs", 'r', "id", "state")
	relation("app", "users", 'r', "id", "nick")
	relation("extra", "hidden", 'r', "id")
	relation("public", "accounts", 'r', "id", "password")
	r.Inherits = [][2]uint32{{id("vip"), id("users")}}
	r.Depends = [][2]uint32{{id("user_view"), id("users")}, {id("order_view"), id("orders")}, {id("code_view"), id("orders")},
		{id("order_mat"), id("orders")}, {id("user_mat"), id("users")}}
	r.Exprs = []exprRow{
		{Table: id("secured"), Policy: true, Text: "(owner = CURRENT_USER)"},
		{Table: id("secured_by_code"), Policy: true, Text: "public.secret_fn(id)"},
		{Table: id("defaults"), Text: "nextval('public.orders_id_seq'::regclass)"},
		{Table: id("defaults"), Text: "now()"},
		{Table: id("code_defaults"), Text: "public.secret_fn(1)"},
	}
	r.Keys = []keyRow{
		{From: id("logins"), To: id("users"), FromCols: []int16{2}, Cols: []int16{3}},
		{From: id("members"), To: id("teams"), FromCols: []int16{2}, Cols: []int16{1}, Cascades: true},
	}
	r.Functions = []routine{
		{OID: 80001, Schema: "public", Name: "secret_fn", Row: true},
		{OID: 80002, Schema: "public", Name: "lower", Types: []uint32{90001}},
		{OID: 80003, Schema: "public", Name: "upper"},
		{OID: 80004, Schema: "extra", Name: "length"},
	}
	r.Operators = []routine{
		{OID: 81001, Schema: "public", Name: "=", Types: []uint32{90001, 90001}},
		{OID: 81002, Schema: "public", Name: "===", Types: nil},
		{OID: 81003, Schema: "extra", Name: "<>", Types: nil},
	}
	r.Builtin = []string{"lower", "upper", "length", "pg_sleep", "nextval", "pg_read_file", "query_to_xml", "now", "count", "set_config", "lo_get", "pg_advisory_lock"}
	r.Types = append(r.Types, typeRow{OID: 90001, Schema: "public", Name: "citext", Kind: 'b'}, typeRow{OID: 90002, Schema: "public", Name: "status", Kind: 'e'},
		typeRow{OID: 90003, Schema: "public", Name: "checked", Kind: 'd', Base: 23, Checked: true}, typeRow{OID: 90004, Schema: "public", Name: "plain", Kind: 'd', Base: 25})
	c, err := build(r, []policy.Resource{column("users", "email"), column("users", "ssn"), column("absent", "secret"), column("accounts", "password"),
		{Type: policy.Column, Path: []string{"prod", "otherdb", "public", "orders", "note"}}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func column(table, name string) policy.Resource {
	return policy.Resource{Type: policy.Column, Path: []string{"prod", "shop", "public", table, name}}
}

func testScope(t testing.TB, masked bool) *Scope {
	sc := &Scope{Target: "prod", Database: "shop", SearchPath: []string{"public"}, Role: "app_writer", Catalog: testCatalog(t)}
	if masked {
		sc.Masked = func(policy.Resource) bool { return true }
	}
	return sc
}

// describe writes a statement as the testdata do.
func describe(st *Statement) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s", st.Verb)
	for _, f := range []struct {
		on   bool
		name string
	}{{st.Reads, "reads"}, {st.ChangesCatalog, "changes"}, {st.CopyIn, "copy-in"}, {st.CopyOut, "copy-out"},
		{st.Transaction != "", st.Transaction}, {st.Prepare != "", fmt.Sprintf("prepare=%s(%s)", st.Prepare, st.Inner)},
		{st.Execute != "", "execute=" + st.Execute}, {st.Deallocate != "", "deallocate=" + st.Deallocate},
		{st.Cursor != "", "cursor=" + st.Cursor}, {st.Shifts, "shifts"},
		{st.Set != "", "set " + st.Set + "=" + st.Value}} {
		if f.on {
			fmt.Fprintf(&b, " [%s]", f.name)
		}
	}
	b.WriteByte('\n')
	if st.Problem != nil {
		fmt.Fprintf(&b, "  ! %s %s: %s\n", st.Problem.Rule, st.Problem.Code, st.Problem.Reason)
		return b.String()
	}
	for _, p := range st.Pairs {
		fmt.Fprintf(&b, "  %s %s %s\n", p.Action, p.Resource.Type, strings.Join(p.Resource.Path[1:], "."))
	}
	for _, o := range st.Output {
		mark := "clear"
		if o.Masked {
			mark = "MASKED"
		}
		fmt.Fprintf(&b, "  -> %d.%d %s\n", o.Table, o.Column, mark)
	}
	return b.String()
}

// TestData runs testdata/*.txt: a query string after "> ", further lines of it
// after ". ", then what Analyze makes of it.
func TestData(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no testdata: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			sc := testScope(t, strings.Contains(file, "mask"))
			var out strings.Builder
			lines := strings.Split(string(content), "\n")
			for i := 0; i < len(lines); i++ {
				line := lines[i]
				if strings.HasPrefix(line, "#") {
					out.WriteString(line + "\n")
					if path, ok := strings.CutPrefix(line, "# search_path "); ok {
						sc.SearchPath = strings.Split(path, ", ")
					}
					continue
				}
				query, ok := strings.CutPrefix(line, "> ")
				if !ok {
					continue
				}
				if len(out.String()) > 0 {
					out.WriteByte('\n')
				}
				out.WriteString(line + "\n")
				for i+1 < len(lines) && strings.HasPrefix(lines[i+1], ". ") {
					i++
					query += "\n" + lines[i][2:]
					out.WriteString(lines[i] + "\n")
				}
				statements, problem := Analyze(query, sc)
				if problem != nil {
					fmt.Fprintf(&out, "! %s %s: %s\n", problem.Rule, problem.Code, problem.Reason)
				}
				for j := range statements {
					checkStatement(t, query, &statements[j])
					out.WriteString(describe(&statements[j]))
				}
				if problem == nil && len(statements) == 0 {
					out.WriteString("nothing\n")
				}
			}
			if *rewrite {
				if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got := out.String(); got != string(content) {
				t.Errorf("%s differs (run with -rewrite and read the difference):\n%s", file, firstDifference(string(content), got))
			}
		})
	}
}

func firstDifference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range min(len(w), len(g)) {
		if w[i] != g[i] {
			return fmt.Sprintf("line %d\n  want %s\n  got  %s", i+1, w[i], g[i])
		}
	}
	return fmt.Sprintf("%d lines against %d", len(w), len(g))
}

// checkStatement holds what is true of every analysis.
func checkStatement(t testing.TB, query string, st *Statement) {
	t.Helper()
	if st.Problem != nil {
		if st.Problem.Rule == "" || st.Problem.Reason == "" || len(st.Problem.Code) != 5 {
			t.Errorf("%s: problem without rule, reason or code: %+v", query, st.Problem)
		}
		if st.Reads || st.Output != nil {
			t.Errorf("%s: a refused statement has output", query)
		}
		return
	}
	if len(st.Pairs) == 0 || st.Verb == "" {
		t.Errorf("%s: verb %q, %d pairs", query, st.Verb, len(st.Pairs))
	}
	for _, p := range st.Pairs {
		if !p.Action.Accepts(p.Resource.Type) {
			t.Errorf("%s: %s is not an action on a %s", query, p.Action, p.Resource.Type)
		}
	}
	if !slices.IsSorted(st.Objects) {
		t.Errorf("%s: objects not sorted", query)
	}
	if len(st.Output) > 0 && !st.Reads {
		t.Errorf("%s: output of a statement that reads nothing masked", query)
	}
}

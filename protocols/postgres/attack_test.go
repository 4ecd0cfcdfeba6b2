package postgres_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/recording"
)

func parse(name, text string) []byte { return frame('P', name, "\x00", text, "\x00\x00\x00") }
func bind(portal, statement string) []byte {
	return frame('B', portal, "\x00", statement, "\x00\x00\x00\x00\x00\x00\x00")
}
func execute(portal string) []byte { return frame('E', portal, "\x00\x00\x00\x00\x00") }
func run(text string) []byte       { return frame('Q', text, "\x00") }

func join(parts ...[]byte) (all []byte) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// told says whether one of the lines is an error with the code and the text.
func told(lines []string, code, text string) bool {
	for _, l := range lines {
		if strings.HasPrefix(l, "E "+code) && strings.Contains(l, text) {
			return true
		}
	}
	return false
}

// FETCH can name a portal that a Bind message made over a masked table, and its
// result's shape is decided when it runs.
func TestFetchFromPortal(t *testing.T) {
	g := start(t).masked()
	sync := frame('S')
	for name, script := range map[string]struct {
		b     []byte
		syncs int
	}{
		"described before the portal is there": {join(run("BEGIN"), parse("f", "FETCH ALL FROM p1"), parse("s1", "SELECT id, email FROM users"), bind("p1", "s1"), sync,
			bind("", "f"), execute(""), sync), 3},
		"one pipeline": {join(run("BEGIN"), parse("h", "SELECT id, label FROM items"), parse("s1", "SELECT id, email FROM users"), bind("p1", "h"), parse("f", "FETCH ALL FROM p1"),
			frame('C', "Pp1\x00"), bind("p1", "s1"), bind("", "f"), execute(""), sync), 2},
		"bound while harmless": {join(run("BEGIN"), run("DECLARE p1 CURSOR FOR SELECT id, label FROM items"), parse("f", "FETCH ALL FROM p1"), bind("x", "f"), sync,
			run("CLOSE p1"), parse("s1", "SELECT id, email FROM users"), bind("p1", "s1"), execute("x"), sync), 5},
		"simple": {join(run("BEGIN"), parse("s1", "SELECT id, email FROM users"), bind("p1", "s1"), sync, run("FETCH ALL FROM p1")), 3},
		"in a string": {join(run("BEGIN"), parse("s1", "SELECT id, email FROM users"), bind("p1", "s1"), sync,
			run("CLOSE p1; DECLARE p1 CURSOR FOR SELECT 1, 2; FETCH ALL FROM p1")), 3},
	} {
		t.Run(name, func(t *testing.T) {
			r := g.login()
			tap := &tap{}
			r.Conn = tapped{r.Conn, tap}
			r.Write(script.b)
			got := r.until('Z', script.syncs)
			if l := tap.leaked(); l != "" {
				t.Fatalf("leaked %q", l)
			}
			if !told(got, "34000", "sallyport: refused by ") {
				t.Errorf("%q", got)
			}
		})
	}
}

// Ordinary use of cursors and portals goes on, with masking and without.
func TestCursorsGoOn(t *testing.T) {
	for _, masked := range []bool{false, true} {
		g := start(t)
		if masked {
			g.masked()
		}
		out, err := g.psql("SELECT id FROM items ORDER BY id;\n", "-v", "FETCH_COUNT=7")
		if err != nil || strings.Count(out, "\n") != 100 {
			t.Errorf("masked %t: psql: %v %q", masked, err, out)
		}
		out, err = g.psql("BEGIN;\nDECLARE c CURSOR WITH HOLD FOR SELECT label FROM items WHERE id < 5;\nCOMMIT;\nFETCH 2 FROM c;\nMOVE 1 FROM c;\nFETCH ALL FROM c;\nCLOSE c;\n" +
			"BEGIN;\nDECLARE c CURSOR FOR SELECT 'again';\nFETCH c;\nCOMMIT;\nBEGIN; DECLARE c CURSOR FOR SELECT 'third'; FETCH c; CLOSE ALL; COMMIT;\n")
		if err != nil || !strings.Contains(out, "item 1\nitem 2\nMOVE 1\nitem 4\nCLOSE CURSOR\n") || !strings.Contains(out, "again\n") || !strings.Contains(out, "third\n") {
			t.Errorf("masked %t: psql: %v %q", masked, err, out)
		}
		for _, mode := range []string{"simple_protocol", "exec", "cache_statement", "cache_describe", "describe_exec"} {
			c := g.connect("default_query_exec_mode=" + mode)
			for range 2 {
				tx, err := c.Begin(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if _, err := tx.Exec(t.Context(), "DECLARE c CURSOR FOR SELECT id, label FROM items ORDER BY id"); err != nil {
					t.Fatalf("masked %t: %s: %v", masked, mode, err)
				}
				for range 2 {
					rows, err := tx.Query(t.Context(), "FETCH 40 FROM c")
					if err != nil {
						t.Fatalf("masked %t: %s: %v", masked, mode, err)
					}
					ids, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (id int, err error) {
						var label string
						return id, row.Scan(&id, &label)
					})
					if err != nil || len(ids) != 40 {
						t.Fatalf("masked %t: %s: %v %v", masked, mode, ids, err)
					}
				}
				if err := tx.Commit(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			var path string
			if err := c.QueryRow(t.Context(), "SHOW search_path").Scan(&path); err != nil || path == "" {
				t.Errorf("masked %t: %s: %v", masked, mode, err)
			}
			var plan string
			if err := c.QueryRow(t.Context(), "EXPLAIN SELECT 1").Scan(&plan); err != nil || plan == "" {
				t.Errorf("masked %t: %s: %v", masked, mode, err)
			}
			if _, err := c.Exec(t.Context(), "PREPARE mine AS SELECT label FROM items WHERE id = 3"); err != nil {
				t.Fatal(err)
			}
			var label string
			if err := c.QueryRow(t.Context(), "EXECUTE mine").Scan(&label); err != nil || label != "item 3" {
				t.Errorf("masked %t: %s: %v %q", masked, mode, err, label)
			}
		}
		// As a driver with a fetch size does: named portals, run in parts.
		r := g.login()
		r.Write(join(run("BEGIN"), parse("S_1", "SELECT id, email FROM users ORDER BY id"), bind("C_1", "S_1"), frame('D', "PC_1\x00"),
			frame('E', "C_1\x00\x00\x00\x00\x02"), frame('S'), frame('E', "C_1\x00\x00\x00\x00\x02"), frame('S'), frame('C', "PC_1\x00"), frame('S'), run("COMMIT")))
		if got := strings.Join(r.until('Z', 5), " "); got != "C BEGIN Z T 1 2 T D D s Z T D C SELECT 1 Z T 3 Z T C COMMIT Z I" {
			t.Errorf("masked %t: %s", masked, got)
		}
		r.Close()
	}
}

// SQL may not touch a portal of the protocol, nor Bind a cursor: the record
// would have another text for what runs.
func TestPortalsAndCursorsKeepApart(t *testing.T) {
	g := start(t)
	sync := frame('S')
	begin := join(run("BEGIN"), parse("s", "SELECT 'bound'"), bind("p", "s"), sync)
	for name, script := range map[string]struct {
		b     []byte
		syncs int
		code  string
		text  string
	}{
		"close":          {join(begin, run("CLOSE p; DECLARE p CURSOR FOR SELECT 'other'"), execute("p"), sync), 4, "34000", "made by a Bind message"},
		"close extended": {join(begin, extended("CLOSE p"), extended("DECLARE p CURSOR FOR SELECT 'other'"), execute("p"), sync), 3, "34000", "made by a Bind message"},
		"close all":      {join(begin, run("CLOSE ALL"), run("DECLARE p CURSOR FOR SELECT 'other'"), execute("p"), sync), 5, "34000", "made by a Bind message"},
		"rollback":       {join(begin, extended("ROLLBACK"), extended("BEGIN"), extended("DECLARE p CURSOR FOR SELECT 'other'"), execute("p"), sync), 3, "34000", "made by a Bind message"},
		"move":           {join(begin, run("MOVE p")), 3, "34000", "made by a Bind message"},
		"bind":           {join(run("BEGIN"), run("DECLARE p CURSOR FOR SELECT 'other'"), parse("s", "SELECT 'bound'"), bind("p", "s"), sync), 3, "42P03", "the name of a cursor"},
		"long":           {join(run("BEGIN"), parse("s", "SELECT 'bound'"), bind(strings.Repeat("p", 64), "s"), sync), 2, "42622", "cut it off"},
		"long statement": {join(run("BEGIN"), parse(strings.Repeat("s", 64), "SELECT 'bound'"), sync), 2, "42622", "cut it off"},
	} {
		t.Run(name, func(t *testing.T) {
			r := g.login()
			r.Write(script.b)
			if got := r.until('Z', script.syncs); !told(got, script.code, script.text) {
				t.Fatalf("%q", got)
			}
			for _, e := range g.Last().Record.Entries(recording.Outcome) {
				if e.Reason == "SELECT 1" {
					t.Errorf("%+v", e)
				}
			}
			r.Close()
		})
	}
	// After its transaction, or a Close message, the name is free.
	r := g.login()
	r.Write(join(begin, run("COMMIT"), run("BEGIN"), run("DECLARE p CURSOR FOR SELECT 1"), run("COMMIT"), run("BEGIN"), bind("p", "s"), frame('C', "Pp\x00"), sync,
		run("DECLARE p CURSOR FOR SELECT 1"), run("CLOSE ALL"), bind("p", "s"), execute("p"), sync))
	if got := r.until('Z', 11); told(got, "", "") {
		t.Errorf("%q", got)
	}
}

// An approval at Bind is for the Execute that follows it, of what was approved.
func TestApprovalIsForOneRun(t *testing.T) {
	g := start(t)
	base := rules(map[policy.Action]policy.Effect{policy.PostgresCreateTable: policy.Hold, policy.PostgresDropTable: policy.Hold})
	expires := time.Minute
	g.Decide(func(r *policy.Request) policy.Decision {
		d := base(r)
		if d.Obligations.Approval != nil {
			d.Obligations.Approval.InTransaction = expires
			d.Obligations.Approval.Expires = expires
		}
		return d
	})
	sync := frame('S')
	const refused = "none that was given at Bind covers it any more"
	n := 0
	bound := func(t *testing.T, first ...[]byte) *raw {
		n++
		r := g.login()
		r.Write(join(run("BEGIN"), run("PREPARE foo AS SELECT 1 AS a"), parse("s1", fmt.Sprintf("CREATE TABLE made%d AS EXECUTE foo", n)), sync))
		r.until('Z', 3)
		r.Write(join(join(first...), bind("p1", "s1"), sync))
		g.asked().Approve()
		if got := r.until('Z', 1); !strings.Contains(strings.Join(got, " "), " 2 Z T") {
			t.Fatalf("%q", got)
		}
		return r
	}
	for name, between := range map[string]struct {
		b     []byte
		syncs int
	}{
		"prepared anew":    {join(run("DEALLOCATE foo"), run("PREPARE foo AS SELECT 2 AS b")), 2},
		"something else":   {run("SELECT 1"), 1},
		"set":              {run("SET datestyle TO German"), 1},
		"renamed":          {join(extended("ALTER TABLE items RENAME TO other"), sync), 1},
		"a parse":          {join(parse("t", "SELECT 1"), sync), 1},
		"another bound":    {join(parse("t", "SELECT 1"), bind("", "t"), sync), 1},
		"a later approval": {nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "a later approval" {
				expires = 1500 * time.Millisecond
				defer func() { expires = time.Minute }()
			}
			r := bound(t)
			if name == "a later approval" {
				time.Sleep(1600 * time.Millisecond)
			}
			r.Write(join(between.b, execute("p1"), sync))
			got := r.until('Z', between.syncs+1)
			if !told(got, "42501", refused) {
				t.Errorf("%q", got)
			}
			r.Close()
		})
	}
	t.Run("changed by others", func(t *testing.T) {
		r := g.login()
		r.Write(join(run("BEGIN"), parse("s1", "DROP TABLE items") /* takes no lock yet */, bind("p1", "s1"), sync))
		g.asked().Approve()
		r.until('Z', 2)
		if err := g.server.Exec(t.Context(), g.db, "ALTER TABLE items RENAME TO items_old; CREATE TABLE items (label text); GRANT ALL ON items TO PUBLIC"); err != nil {
			t.Fatal(err)
		}
		r.Write(join(execute("p1"), sync))
		if got := r.until('Z', 1); !told(got, "42501", refused) {
			t.Errorf("%q", got)
		}
		r.Close()
		if err := g.server.Exec(t.Context(), g.db, "DROP TABLE items; ALTER TABLE items_old RENAME TO items"); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("as it should be", func(t *testing.T) {
		r := bound(t)
		r.Write(join(frame('D', "Pp1\x00"), frame('H'), execute("p1"), sync))
		if got := r.until('Z', 1); !strings.Contains(strings.Join(got, " "), "C SELECT 1 Z T") {
			t.Errorf("%q", got)
		}
		r.Close()
	})
	t.Run("in parts", func(t *testing.T) {
		g.Decide(func(r *policy.Request) policy.Decision {
			d := rules(map[policy.Action]policy.Effect{policy.PostgresSelect: policy.Hold})(r)
			if d.Obligations.Approval != nil {
				d.Obligations.Approval.InTransaction = time.Minute
			}
			return d
		})
		r := g.login()
		r.Write(join(run("BEGIN"), parse("s", "SELECT label FROM items"), bind("p", "s"), frame('E', "p\x00\x00\x00\x00\x32"), sync, frame('E', "p\x00\x00\x00\x00\x64"), sync))
		g.asked().Approve()
		if got := r.until('Z', 3); strings.Count(strings.Join(got, ""), "D") != 100 || len(g.Asked) != 0 {
			t.Errorf("%q", got)
		}
		r.Close()
	})
}

// DISCARD PLANS and its like leave prepared statements alone.
func TestDiscardKeepsStatements(t *testing.T) {
	g := start(t)
	g.Decide(rules(refuseDrop()))
	c := g.connect("default_query_exec_mode=simple_protocol")
	for _, q := range []string{"PREPARE one AS SELECT 'first'", "DISCARD PLANS", "DISCARD SEQUENCES", "DISCARD TEMP"} {
		if _, err := c.Exec(t.Context(), q); err != nil {
			t.Fatalf("%s: %v", q, err)
		}
	}
	var got string
	if err := c.QueryRow(t.Context(), "EXECUTE one").Scan(&got); err != nil || got != "first" {
		t.Fatal(got, err)
	}
}

// What SET asked for is kept for approvers, within bounds.
func TestSetIsBounded(t *testing.T) {
	g := start(t)
	c := g.connect("default_query_exec_mode=simple_protocol")
	if _, err := c.Exec(t.Context(), "SET application_name = '"+strings.Repeat("x", 900)+"'"); err != nil {
		t.Fatal(err)
	}
	_, err := c.Exec(t.Context(), "SET application_name = '"+strings.Repeat("x", 1100)+"'")
	if sqlstate(err) != "54000" {
		t.Fatal(err)
	}
}

// A rename makes names mean other things, whatever the command is called: in
// its transaction nothing is read while columns are masked.
func TestRenameIsNotAdditive(t *testing.T) {
	g := start(t).masked()
	for _, q := range []string{"ALTER TABLE items RENAME TO elsewhere", "ALTER INDEX items RENAME TO elsewhere", "ALTER SEQUENCE items RENAME TO elsewhere"} {
		c := g.connect("default_query_exec_mode=simple_protocol")
		tx, err := c.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), q); err != nil {
			t.Logf("%s: %v", q, err)
			continue
		}
		var one string
		if err := tx.QueryRow(t.Context(), "SELECT name FROM users WHERE id = 1").Scan(&one); sqlstate(err) != "42501" || !strings.Contains(err.Error(), "commit first") {
			t.Errorf("%s: %q %v", q, one, err)
		}
		tx.Rollback(context.Background())
	}
}

package postgres_test

import (
	"strings"
	"testing"

	"github.com/sallyport/sallyport/policy"
)

// A migration in one transaction: what it made is used before it commits.
func TestMigrationInTransaction(t *testing.T) {
	g := start(t)
	c := g.connect()
	for _, q := range []string{"BEGIN", "CREATE TABLE fresh (a int primary key)", "INSERT INTO fresh VALUES (1)", "CREATE INDEX ON fresh (a)", "ALTER TABLE fresh ADD b text", "SELECT label FROM items WHERE id = 1", "COMMIT", "SELECT a, b FROM fresh"} {
		if _, err := c.Exec(t.Context(), q); err != nil {
			t.Errorf("%s: %v", q, err)
		}
	}
	g = start(t).masked()
	c = g.connect()
	for _, q := range []string{"BEGIN", "CREATE TABLE fresh (a int primary key, b text)", "SELECT label FROM items WHERE id = 1", "UPDATE items SET label = 'x' WHERE id = 1", "COMMIT", "INSERT INTO fresh VALUES (1)", "SELECT a, b FROM fresh"} {
		if _, err := c.Exec(t.Context(), q); err != nil {
			t.Errorf("masked: %s: %v", q, err)
		}
	}
}

// A clean table that is dropped uncovers a sensitive one of the same name
// further down the path, in the same transaction, before the catalogue shows it.
func TestUncoveredName(t *testing.T) {
	g := start(t)
	role := "app_" + g.db
	if err := g.server.Exec(t.Context(), g.db, `CREATE TABLE public.people (id int, ssn text); INSERT INTO people VALUES (1, 'ann@secret.example');
		GRANT ALL ON people TO "`+role+`"; CREATE SCHEMA first; CREATE TABLE first.people (id int, ssn text); ALTER SCHEMA first OWNER TO "`+role+`"; ALTER TABLE first.people OWNER TO "`+role+`"`); err != nil {
		t.Fatal(err)
	}
	g.Sensitive(policy.Resource{Type: policy.Column, Path: []string{"prod-db", g.db, "public", "people", "ssn"}})
	g.Decide(rules(nil))
	g.path = []string{"first", "public"}
	r := g.login()
	tap := &tap{}
	r.Conn = tapped{r.Conn, tap}
	for _, q := range []string{"SELECT upper(ssn), lower(ssn) FROM people", "BEGIN", "DROP TABLE first.people", "SELECT lower(ssn) FROM people", "ROLLBACK"} {
		r.send('Q', q+"\x00")
		if got := r.until('Z', 1); q == "SELECT lower(ssn) FROM people" && !strings.HasPrefix(got[0], "E 42501") {
			t.Errorf("%s: %q", q, got)
		}
	}
	b := extended("BEGIN")
	b = append(append(b, extended("DROP TABLE first.people")...), extended("SELECT lower(ssn) FROM people")...)
	r.Write(append(b, frame('S')...))
	r.until('Z', 1)
	if l := tap.leaked(); l != "" {
		t.Fatalf("leaked %q", l)
	}
}

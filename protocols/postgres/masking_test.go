package postgres_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/recording"
)

var secrets = []string{"ann@secret", "bob@secret", "4711", "4712", "vip"}

func leak(b []byte) string {
	for _, s := range secrets {
		if bytes.Contains(b, []byte(s)) {
			return s
		}
	}
	return ""
}

func TestMaskedResults(t *testing.T) {
	g := start(t).masked()
	ctx := t.Context()
	for _, mode := range []string{"simple_protocol", "exec", "cache_statement", "cache_describe"} {
		c := g.connect("default_query_exec_mode=" + mode)
		for range 2 {
			var id int
			var name, email, note *string
			var pin *int
			if err := c.QueryRow(ctx, "SELECT id, name, email, pin, note FROM users WHERE id = 1").Scan(&id, &name, &email, &pin, &note); err != nil {
				t.Fatalf("%s: %v", mode, err)
			}
			if id != 1 || *name != "Ann" || *email != "[masked]" || pin != nil || len(*note) != 64 {
				t.Errorf("%s: %d %s %s %v %s", mode, id, *name, *email, pin, *note)
			}
			if err := c.QueryRow(ctx, "SELECT email, note FROM users WHERE id = 3").Scan(&email, &note); err != nil || email != nil {
				t.Errorf("%s: NULL became %v (%v)", mode, email, err)
			}
		}
	}
	out, err := g.psql("SELECT id, email FROM users ORDER BY id;\n")
	if err != nil || out != "1|[masked]\n2|[masked]\n3|\n" {
		t.Errorf("%v %q", err, out)
	}
	for _, s := range g.Sessions() {
		for _, e := range s.Record.Entries(recording.Response, recording.Outcome) {
			if l := leak(append(e.Data, e.Reason...)); l != "" {
				t.Fatalf("%q is in the record", l)
			}
		}
	}
}

// Whatever a client does, the values are in nothing that it reads.
func TestNoMaskedByteLeaks(t *testing.T) {
	g := start(t).masked()
	tap := &tap{}
	r := g.login()
	r.Conn = tapped{r.Conn, tap}
	statements := []string{
		"SELECT * FROM users", "SELECT users FROM users", "SELECT email || 'x' FROM users", "SELECT upper(email) FROM users",
		"SELECT row_to_json(users) FROM users", "SELECT u.* FROM users u JOIN items i ON i.id = u.id", "TABLE users",
		"SELECT email::int FROM users", "SELECT 1 FROM users WHERE email::int = 1", "SELECT (SELECT email FROM users LIMIT 1)",
		"WITH x AS (SELECT email FROM users) SELECT * FROM x", "SELECT email FROM users UNION SELECT name FROM users",
		"INSERT INTO items SELECT 9000 + id, email FROM users", "UPDATE users SET name = email", "DELETE FROM users RETURNING *",
		"COPY users TO STDOUT", "COPY (SELECT email FROM users) TO STDOUT", "EXPLAIN ANALYZE SELECT * FROM users WHERE email = 'x'",
		"DECLARE c CURSOR FOR SELECT email FROM users", "FETCH ALL FROM c", "UPDATE users SET note = repeat('y', 35) WHERE id = 1",
		"UPDATE users SET id = 2 WHERE id = 1", "INSERT INTO users (id, name) VALUES (1, 'x')", "UPDATE users SET id = 1 WHERE id = 2 RETURNING email",
		"PREPARE p AS SELECT email FROM users", "EXECUTE p", "SELECT most_common_vals FROM pg_stats WHERE tablename = 'users'",
		"CREATE VIEW v AS SELECT email FROM users", "SELECT * FROM v", "CREATE TABLE copy_of AS SELECT * FROM users", "SELECT * FROM copy_of",
		"DO $$ BEGIN RAISE NOTICE '%', (SELECT email FROM users LIMIT 1); END $$",
		"BEGIN; ALTER TABLE users RENAME COLUMN email TO mail; SELECT upper(mail) FROM users", "ROLLBACK",
		"BEGIN; ALTER TABLE users RENAME TO people; CREATE TABLE users (id int, email text)", "SELECT lower(email) FROM people", "SELECT upper(email) FROM users", "ROLLBACK",
		"SELECT query_to_xml('select * from users', true, true, '')", "SELECT xmlforest(email) FROM users", "NOTIFY ch, 'hello'",
	}
	for _, q := range statements {
		tap.reset()
		r.send('Q', q+"\x00")
		r.drain()
		if l := tap.leaked(); l != "" {
			t.Errorf("%s: leaked %q", q, l)
		}
		for _, formats := range []string{"\x00\x00", "\x00\x01\x00\x01"} { // text, binary
			tap.reset()
			r.send('P', "\x00", q, "\x00\x00\x00")
			r.send('B', "\x00\x00\x00\x00\x00\x00", formats)
			r.send('D', "P\x00")
			r.send('E', "\x00\x00\x00\x00\x02") // a part, then the rest
			r.send('E', "\x00\x00\x00\x00\x00")
			r.send('S')
			r.drain()
			if l := tap.leaked(); l != "" {
				t.Errorf("%s: leaked %q, extended", q, l)
			}
		}
	}
	for _, e := range g.Last().Record.Entries(recording.Response, recording.Outcome, recording.Note) {
		if l := leak(append(e.Data, e.Reason...)); l != "" {
			t.Fatalf("%q is in the record", l)
		}
	}
}

// drain reads to the ReadyForQuery.
func (r *raw) drain() {
	r.t.Helper()
	for {
		kind, body := r.next()
		if kind == 'Z' {
			return
		}
		if kind == 'G' {
			r.send('c')
		}
		if kind == 'E' && strings.Contains(string(body), "SFATAL") {
			r.t.Fatalf("the session ended: %q", body)
		}
	}
}

type tap struct {
	mu sync.Mutex
	b  []byte
}

func (t *tap) reset() { t.mu.Lock(); t.b = nil; t.mu.Unlock() }
func (t *tap) leaked() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return leak(t.b)
}

type tapped struct {
	net.Conn
	tap *tap
}

func (c tapped) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.tap.mu.Lock()
	c.tap.b = append(c.tap.b, p[:n]...)
	c.tap.mu.Unlock()
	return n, err
}

func TestErrorsAreScrubbed(t *testing.T) {
	g := start(t).masked()
	c := g.connect("default_query_exec_mode=simple_protocol")
	ctx := t.Context()
	for _, q := range []string{
		"INSERT INTO items VALUES (1, 'dup')",
		"INSERT INTO children VALUES (1, 99)", // deferred: fails at the end
		"BEGIN; INSERT INTO children VALUES (1, 99); COMMIT",
	} {
		_, err := c.Exec(ctx, q)
		if err == nil {
			t.Errorf("%s: no error", q)
			continue
		}
		if s := fmt.Sprintf("%+v", err); strings.Contains(s, "Failing row") || strings.Contains(s, "Key (") {
			t.Errorf("%s: %s", q, s)
		}
		if sqlstate(err) == "42501" {
			t.Errorf("%s: refused: %v", q, err)
		}
	}
	// Errors about names keep their help.
	_, err := c.Exec(ctx, "SELECT labl FROM items")
	if err == nil {
		t.Fatal("no error")
	}
	t.Log(err)
}

// A result that the target describes as masked and the analysis judged clean
// ends the session before a row leaves.
func TestCrossCheckAlarm(t *testing.T) {
	g := start(t).masked()
	r := g.login()
	// The table is made anew behind the gateway's back, under the name of a
	// clean one, with the sensitive one's OID: the catalogue it knows is stale.
	r.send('Q', "SELECT label FROM items WHERE id = 1\x00")
	r.until('Z', 1)
	if err := g.server.Exec(t.Context(), g.db, "BEGIN; ALTER TABLE items RENAME TO items_old; ALTER TABLE users RENAME TO items; ALTER TABLE items RENAME email TO label; COMMIT"); err != nil {
		t.Fatal(err)
	}
	tap := &tap{}
	r.Conn = tapped{r.Conn, tap}
	r.send('Q', "SELECT label FROM items WHERE id = 1\x00")
	if got := line('E', r.expect('E')); !strings.HasPrefix(got, "E 42501 terminating connection: the target's description") {
		t.Fatal(got)
	}
	<-g.Last().Ended
	if l := tap.leaked(); l != "" {
		t.Fatalf("leaked %q", l)
	}
	notes := g.Last().Record.Entries(recording.Note)
	if len(notes) != 1 || notes[0].Rule != "masking-alarm" {
		t.Errorf("%+v", notes)
	}
}

func TestCrossCheckAlarmExtended(t *testing.T) {
	g := start(t).masked()
	r := g.login()
	r.send('Q', "SELECT label FROM items WHERE id = 1\x00")
	r.until('Z', 1)
	if err := g.server.Exec(t.Context(), g.db, "BEGIN; ALTER TABLE items RENAME TO items_old; ALTER TABLE users RENAME TO items; ALTER TABLE items RENAME email TO label; COMMIT"); err != nil {
		t.Fatal(err)
	}
	tap := &tap{}
	r.Conn = tapped{r.Conn, tap}
	r.Write(append(extended("SELECT label FROM items WHERE id = 1"), frame('S')...))
	r.expect('1')
	r.expect('2')
	if got := line('E', r.expect('E')); !strings.HasPrefix(got, "E 42501 terminating connection: the target's description") {
		t.Fatal(got)
	}
	if l := tap.leaked(); l != "" {
		t.Fatalf("leaked %q", l)
	}
}

// What is revealed at Parse and no longer at Bind is masked.
func TestRevealWithdrawn(t *testing.T) {
	g := start(t)
	g.Sensitive(g.secrets()...)
	g.Decide(func(*policy.Request) policy.Decision {
		return policy.Decision{Effect: policy.Permit, Rule: "reveal"}
	})
	r := g.login()
	tap := &tap{}
	r.Conn = tapped{r.Conn, tap}
	r.send('P', "s\x00SELECT email FROM users\x00\x00\x00")
	r.send('B', "\x00s\x00\x00\x00\x00\x00\x00\x00")
	r.send('E', "\x00\x00\x00\x00\x00")
	r.send('S')
	r.until('Z', 1)
	if tap.leaked() == "" {
		t.Fatal("a revealed column was masked")
	}
	g.Decide(rules(nil))
	tap.reset()
	r.send('B', "\x00s\x00\x00\x00\x00\x00\x00\x00")
	r.send('E', "\x00\x00\x00\x00\x00")
	r.send('S')
	if got := r.until('Z', 1); len(got) != 6 || got[0] != "2" || got[1] != "D" {
		t.Fatalf("%q", got)
	}
	if l := tap.leaked(); l != "" {
		t.Fatalf("leaked %q", l)
	}
}

func TestNotificationsAreDropped(t *testing.T) {
	g := start(t).masked()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	c := g.connect()
	if _, err := c.Exec(ctx, "LISTEN ch"); err != nil {
		t.Skip(err)
	}
	if err := g.server.Exec(ctx, g.db, "NOTIFY ch, 'ann@secret.example'"); err != nil {
		t.Fatal(err)
	}
	if n, err := c.WaitForNotification(ctx); err == nil {
		t.Fatalf("%+v", n)
	}
}

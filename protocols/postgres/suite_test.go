package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/recording"
)

func TestPgx(t *testing.T) {
	g := start(t)
	ctx := t.Context()
	for _, mode := range []string{"simple_protocol", "exec", "cache_statement", "cache_describe", "describe_exec"} {
		t.Run(mode, func(t *testing.T) {
			c := g.connect("default_query_exec_mode=" + mode)
			for i := range 5 {
				var label string
				if err := c.QueryRow(ctx, "SELECT label FROM items WHERE id = $1", i+1).Scan(&label); err != nil || label != fmt.Sprintf("item %d", i+1) {
					t.Fatalf("%q %v", label, err)
				}
			}
			rows, err := c.Query(ctx, "SELECT id, label FROM items ORDER BY id")
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for rows.Next() {
				n++
			}
			if rows.Err() != nil || n != 100 {
				t.Fatalf("%d rows: %v", n, rows.Err())
			}
			if _, err := c.Exec(ctx, "SELECT 1/0"); sqlstate(err) != "22012" {
				t.Fatalf("%v", err)
			}
			if _, err := c.Exec(ctx, "SELECT nope FROM items"); sqlstate(err) != "42703" {
				t.Fatalf("%v", err)
			}
			if err := c.Ping(ctx); err != nil {
				t.Fatal(err)
			}
			tx, err := c.Begin(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tx.Exec(ctx, "INSERT INTO items VALUES (1000, 'x')"); err != nil {
				t.Fatal(err)
			}
			if err := tx.Rollback(ctx); err != nil {
				t.Fatal(err)
			}
			batch := &pgx.Batch{}
			for i := range 50 {
				batch.Queue("SELECT label FROM items WHERE id = $1", i+1)
			}
			if err := c.SendBatch(ctx, batch).Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestCopy(t *testing.T) {
	g := start(t)
	ctx := t.Context()
	c := g.connect()
	n, err := c.CopyFrom(ctx, pgx.Identifier{"items"}, []string{"id", "label"}, pgx.CopyFromSlice(5000, func(i int) ([]any, error) {
		return []any{int32(i + 1000), strings.Repeat("x", 50)}, nil
	}))
	if err != nil || n != 5000 {
		t.Fatalf("%d %v", n, err)
	}
	var out strings.Builder
	if _, err := c.PgConn().CopyTo(ctx, &out, "COPY items TO STDOUT"); err != nil || strings.Count(out.String(), "\n") != 5100 {
		t.Fatalf("%d lines: %v", strings.Count(out.String(), "\n"), err)
	}
	// A COPY that fails half-way, and one that never begins, leave the session usable.
	if _, err := c.PgConn().CopyFrom(ctx, strings.NewReader("1\tdup\n"), "COPY items FROM STDIN"); sqlstate(err) != "23505" {
		t.Fatal(err)
	}
	if _, err := c.PgConn().CopyFrom(ctx, strings.NewReader(strings.Repeat("x\ty\n", 100_000)), "COPY items FROM STDIN"); sqlstate(err) != "22P02" {
		t.Fatal(err)
	}
	if _, err := c.PgConn().CopyFrom(ctx, strings.NewReader("1\n"), "COPY nowhere FROM STDIN"); sqlstate(err) != "42P01" {
		t.Fatal(err)
	}
	if err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	g.Decide(rules(map[policy.Action]policy.Effect{policy.PostgresCopyFrom: policy.Refuse}))
	if _, err := c.PgConn().CopyFrom(ctx, strings.NewReader("9\tz\n"), "COPY items FROM STDIN"); sqlstate(err) != "42501" {
		t.Fatal(err)
	}
	if err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
}

// COPY in the extended protocol: the target ignores Sync while it takes data.
func TestCopyExtended(t *testing.T) {
	g := start(t)
	r := g.login()
	copyIn := func() {
		r.send('P', "\x00COPY items FROM STDIN\x00\x00\x00")
		r.send('B', "\x00\x00\x00\x00\x00\x00\x00\x00")
		r.send('E', "\x00\x00\x00\x00\x00")
		r.send('S')
	}
	copyIn()
	got := r.until('G', 1)
	r.send('d', "2000\tx\n")
	r.send('c')
	r.send('S')
	got = append(got, r.until('Z', 1)...)
	want := []string{"1", "2", "G", "C COPY 1", "Z I"}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%q, want %q", got, want)
	}
	copyIn()
	r.until('G', 1)
	r.send('f', "changed my mind\x00")
	r.send('S')
	r.send('Q', "SELECT 1\x00")
	got = r.until('Z', 2)
	want = []string{`E 57014 COPY from stdin failed: changed my mind`, "Z I", "T", "D", "C SELECT 1", "Z I"}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%q, want %q", got, want)
	}
}

func refuseDrop() map[policy.Action]policy.Effect {
	return map[policy.Action]policy.Effect{policy.PostgresDropTable: policy.Refuse}
}

const refused = "E 42501 sallyport: refused by no-postgres:drop_table: postgres:drop_table is not allowed"

func extended(text string) []byte {
	b := frame('P', "\x00", text, "\x00\x00\x00")
	b = append(b, frame('B', "\x00\x00\x00\x00\x00\x00\x00\x00")...)
	return append(b, frame('E', "\x00\x00\x00\x00\x00")...)
}

// Refusals come in their turn, and the transaction is what the target's own
// error would have made of it.
func TestRefusalsInOrder(t *testing.T) {
	g := start(t)
	g.Decide(rules(refuseDrop()))
	sync := frame('S')
	cat := func(parts ...[]byte) (all []byte) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	for _, c := range []struct {
		name string
		send []byte
		z    int
		want []string
	}{
		{"simple pipeline", cat(frame('Q', "SELECT 1\x00"), frame('Q', "DROP TABLE items\x00"), frame('Q', "SELECT 2\x00")), 3,
			[]string{"T", "D", "C SELECT 1", "Z I", refused, "Z I", "T", "D", "C SELECT 1", "Z I"}},
		{"extended pipeline", cat(extended("SELECT 1"), extended("DROP TABLE items"), extended("SELECT 2"), sync, extended("SELECT 3"), sync), 2,
			[]string{"1", "2", "D", "C SELECT 1", refused, "Z I", "1", "2", "D", "C SELECT 1", "Z I"}},
		{"refusal after an error", cat(extended("SELECT 1/0"), extended("DROP TABLE items"), sync, extended("SELECT 3"), sync), 2,
			[]string{"1", "E 22012 division by zero", "Z I", "1", "2", "D", "C SELECT 1", "Z I"}},
		{"in a transaction", cat(frame('Q', "BEGIN\x00"), frame('Q', "DROP TABLE items\x00"), frame('Q', "SELECT 1\x00"), frame('Q', "COMMIT\x00")), 4,
			[]string{"C BEGIN", "Z T", refused, "Z E", "E 25P02 current transaction is aborted, commands ignored until end of transaction block", "Z E", "C ROLLBACK", "Z I"}},
		{"extended in a transaction", cat(extended("BEGIN"), sync, extended("DROP TABLE items"), sync, extended("ROLLBACK"), sync), 3,
			[]string{"1", "2", "C BEGIN", "Z T", refused, "Z E", "1", "2", "C ROLLBACK", "Z I"}},
		{"query inside an extended batch", cat(extended("DROP TABLE items"), frame('Q', "SELECT 1\x00"), sync, frame('Q', "SELECT 2\x00")), 2,
			[]string{refused, "Z I", "T", "D", "C SELECT 1", "Z I"}},
		{"function call", cat(frame('F', "\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00"), frame('Q', "SELECT 2\x00")), 2,
			[]string{"E 0A000 sallyport: refused by unsupported: FunctionCall messages bypass SQL: call the function with SELECT", "Z I", "T", "D", "C SELECT 1", "Z I"}},
		{"several statements", cat(frame('Q', "SELECT 1; DROP TABLE items\x00"), frame('Q', "\x00"), frame('Q', ";;\x00")), 3,
			[]string{refused, "Z I", "I", "Z I", "I", "Z I"}},
		{"unparsable", cat(frame('Q', "SELEC 1\x00"), extended("SELEC 2"), sync), 2, nil},
		{"unknown names", cat(frame('B', "\x00nope\x00\x00\x00\x00\x00\x00\x00"), sync, frame('E', "nope\x00\x00\x00\x00\x00"), sync), 2,
			[]string{`E 26000 sallyport: refused by unknown: prepared statement "nope" does not exist`, "Z I", `E 34000 sallyport: refused by unknown: portal "nope" does not exist`, "Z I"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := g.login()
			r.Write(c.send)
			got := r.until('Z', c.z)
			if c.want != nil && !reflect.DeepEqual(got, c.want) {
				t.Fatalf("\n got %q\nwant %q", got, c.want)
			}
			r.send('X')
			if _, _, err := readMessage(r); err != io.EOF {
				t.Errorf("after Terminate: %v", err)
			}
		})
	}
}

// A message the target skipped leaves names as they were: what a name means is
// never guessed.
func TestSkippedMessagesChangeNoNames(t *testing.T) {
	g := start(t)
	r := g.login()
	r.send('P', "s\x00SELECT 'one'\x00\x00\x00")
	r.send('S')
	r.until('Z', 1)
	// An error, then a Close and a Parse that are skipped, then a use of the old s, all in one write.
	b := extended("SELECT 1/0")
	b = append(b, frame('C', "Ss\x00")...)
	b = append(b, frame('P', "s\x00SELECT 'two'\x00\x00\x00")...)
	b = append(b, frame('S')...)
	b = append(b, frame('B', "\x00s\x00\x00\x00\x00\x00\x00\x00")...)
	b = append(b, frame('E', "\x00\x00\x00\x00\x00")...)
	b = append(b, frame('S')...)
	r.Write(b)
	r.until('Z', 2)
	s := g.Last()
	var last string
	for _, e := range s.Record.Entries(recording.Command) {
		if e.Verb == "Execute" {
			last = string(e.Text)
		}
	}
	if last != "SELECT 'one'" {
		t.Fatalf("the record says that %q ran", last)
	}
}

func TestSQLPrepare(t *testing.T) {
	g := start(t)
	g.Decide(rules(map[policy.Action]policy.Effect{policy.PostgresDelete: policy.Refuse}))
	c := g.connect("default_query_exec_mode=simple_protocol")
	ctx := t.Context()
	for _, step := range []struct{ sql, code string }{
		{"PREPARE a AS SELECT label FROM items WHERE id = $1", ""},
		{"EXECUTE a(3)", ""},
		{"PREPARE b AS DELETE FROM items", "42501"},
		{"EXECUTE b", "26000"},
		{"DEALLOCATE a", ""},
		{"EXECUTE a(3)", "26000"},
		{"PREPARE a AS SELECT 1; EXECUTE a", ""},
		{"DEALLOCATE ALL", ""},
		{"EXECUTE a", "26000"},
		{"PREPARE a AS SELECT 1; SELECT 1/0", "22012"},
		{"EXECUTE a", ""}, // prepared statements outlive the error
		{"SELECT 1/0; PREPARE z AS SELECT 1", "22012"},
		{"EXECUTE z", "26000"},
		{"DISCARD ALL", "42501"},
		{"EXECUTE a", ""},
		{"DEALLOCATE ALL", ""},
	} {
		_, err := c.Exec(ctx, step.sql)
		if (step.code == "") != (err == nil) || (err != nil && sqlstate(err) != step.code) {
			t.Errorf("%s: %v, want %q", step.sql, err, step.code)
		}
	}
	// What was permitted at PREPARE is judged again at EXECUTE.
	if _, err := c.Exec(ctx, "PREPARE u AS UPDATE items SET label = 'x'"); err != nil {
		t.Fatal(err)
	}
	g.Decide(rules(map[policy.Action]policy.Effect{policy.PostgresUpdate: policy.Refuse}))
	if _, err := c.Exec(ctx, "EXECUTE u"); sqlstate(err) != "42501" {
		t.Fatal(err)
	}
}

// A policy that changes after Parse is applied at Bind, and after Bind at Execute.
func TestPolicyChangesBetweenParseAndExecute(t *testing.T) {
	g := start(t)
	r := g.login()
	r.send('P', "s\x00DELETE FROM items\x00\x00\x00")
	r.send('S')
	r.until('Z', 1)
	r.send('Q', "BEGIN\x00")
	r.until('Z', 1)
	r.send('B', "p\x00s\x00\x00\x00\x00\x00\x00\x00")
	r.send('S')
	r.until('Z', 1)
	g.Decide(rules(map[policy.Action]policy.Effect{policy.PostgresDelete: policy.Refuse}))
	r.send('E', "p\x00\x00\x00\x00\x00")
	r.send('S')
	if got := r.until('Z', 1); !strings.HasPrefix(got[0], "E 42501") {
		t.Fatalf("%q", got)
	}
	r.send('Q', "ROLLBACK\x00")
	r.until('Z', 1)
	r.send('B', "\x00s\x00\x00\x00\x00\x00\x00\x00")
	r.send('S')
	if got := r.until('Z', 1); !strings.HasPrefix(got[0], "E 42501") {
		t.Fatalf("%q", got)
	}
}

func TestCatalogChanges(t *testing.T) {
	g := start(t)
	c := g.connect()
	ctx := t.Context()
	for _, q := range []string{"CREATE TABLE fresh (a int)", "INSERT INTO fresh VALUES (1)", "SELECT a FROM fresh", "ALTER TABLE fresh ADD COLUMN b int", "SELECT b FROM fresh", "DROP TABLE fresh"} {
		if _, err := c.Exec(ctx, q); err != nil {
			t.Fatalf("%s: %v", q, err)
		}
	}
	// In one pipeline, too.
	r := g.login()
	r.Write(append(append(append(frame('Q', "CREATE TABLE fresh2 (a int)\x00"), extended("INSERT INTO fresh2 VALUES (1)")...), frame('S')...), frame('Q', "SELECT a FROM fresh2\x00")...))
	if got := r.until('Z', 3); !strings.HasSuffix(strings.Join(got, ","), "T,D,C SELECT 1,Z I") {
		t.Fatalf("%q", got)
	}
	// Somebody else's table is found without a new login.
	if err := g.server.Exec(ctx, g.db, "CREATE TABLE theirs (a int); GRANT SELECT ON theirs TO PUBLIC"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	if _, err := c.Exec(ctx, "SELECT a FROM theirs"); err != nil {
		t.Fatal(err)
	}
}

func TestNoRecordNoForwarding(t *testing.T) {
	g := start(t)
	c := g.connect()
	ctx := t.Context()
	if _, err := c.Exec(ctx, "SELECT 1"); err != nil {
		t.Fatal(err)
	}
	g.Last().Record.Fail()
	if _, err := c.Exec(ctx, "INSERT INTO items VALUES (7777, 'unrecorded')"); err == nil {
		t.Fatal("a command went through without a record")
	}
	var n int
	if err := g.server.Conn(t, g.db).QueryRow(ctx, "SELECT count(*) FROM items WHERE id = 7777").Scan(&n); err != nil || n != 0 {
		t.Fatalf("%d %v", n, err)
	}
}

func TestDurable(t *testing.T) {
	g := start(t)
	g.Decide(func(*policy.Request) policy.Decision {
		return policy.Decision{Effect: policy.Permit, Rule: "durable", Obligations: policy.Obligations{Durability: policy.Durable}}
	})
	c := g.connect()
	if _, err := c.Exec(t.Context(), "SELECT 1"); err != nil {
		t.Fatal(err)
	}
	if g.Last().Record.Synced() == 0 {
		t.Fatal("the record was not synced")
	}
}

func TestCancelRunning(t *testing.T) {
	g := start(t)
	c := g.connect()
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(300*time.Millisecond, cancel)
	began := time.Now()
	if _, err := c.Exec(ctx, "SELECT pg_sleep(300)"); err == nil || time.Since(began) > 10*time.Second {
		t.Fatalf("%v after %v", err, time.Since(began))
	}
	// By hand, with a right and a wrong key.
	c = g.connect()
	done := make(chan error, 1)
	began = time.Now()
	go func() { _, err := c.Exec(context.Background(), "SELECT pg_sleep(300)"); done <- err }()
	time.Sleep(300 * time.Millisecond)
	s := g.Last()
	wrong := g.dial()
	wrong.Write([]byte{0, 0, 0, 16, 4, 210, 22, 46, 0, 0, 0, 1, 0, 0, 0, 1})
	if _, err := io.ReadAll(wrong); err != nil {
		t.Fatal(err)
	}
	if _, cancels, _, _ := s.Lease.Counts(); cancels != 0 {
		t.Fatal("a wrong key cancelled")
	}
	if err := c.PgConn().CancelRequest(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; sqlstate(err) != "57014" {
		for _, e := range s.Record.Entries() {
			t.Logf("%+v", e)
		}
		t.Fatalf("%v after %v", err, time.Since(began))
	}
	if err := c.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestRevokedMidResult(t *testing.T) {
	g := start(t)
	r := g.login()
	r.send('Q', "SELECT g, repeat('x', 1000) FROM generate_series(1, 10000000) g\x00")
	for range 1000 {
		r.next()
	}
	s := g.Last()
	began := time.Now()
	s.Revoke("left the company")
	select {
	case end := <-s.Ended:
		if end.Reason != "revoked" {
			t.Errorf("%+v", end)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the session did not end")
	}
	t.Logf("cut off in %v", time.Since(began))
	if cut := s.Record.Entries(recording.Cut); len(cut) != 1 || cut[0].Reason != "left the company" {
		t.Errorf("%+v", cut)
	}
	// A session that is idle reads why.
	r = g.login()
	g.Last().Revoke("left the company")
	if got := line('E', r.expect('E')); got != "E 57P01 terminating connection: left the company" {
		t.Error(got)
	}
	// Without a cut, a fence that fails stops the next command.
	r = g.login()
	g.Last().Fence("lease lost")
	r.send('Q', "SELECT 1\x00")
	if got := line('E', r.expect('E')); got != "E 57P01 terminating connection: lease lost" {
		t.Error(got)
	}
}

func TestDeadline(t *testing.T) {
	g := start(t)
	g.Deadline(time.Now().Add(1500 * time.Millisecond))
	c := g.connect()
	if _, err := c.Exec(t.Context(), "SELECT pg_sleep(20)"); sqlstate(err) != "57P01" {
		t.Fatal(err)
	}
}

func TestTargetEndsSession(t *testing.T) {
	g := start(t)
	c := g.connect()
	if _, err := c.Exec(t.Context(), "SELECT pg_terminate_backend(pg_backend_pid())"); sqlstate(err) != "57P01" {
		t.Fatal(err)
	}
	if end := <-g.Last().Ended; end.Reason != "error" {
		t.Errorf("%+v", end)
	}
}

func TestPinnedSettings(t *testing.T) {
	g := start(t)
	c := g.connect()
	for _, q := range []string{"SET client_encoding = 'LATIN1'", "SET standard_conforming_strings = off", "SET search_path = pg_temp", "SET SESSION AUTHORIZATION postgres"} {
		if _, err := c.Exec(t.Context(), q); err == nil {
			t.Errorf("%s: let through", q)
		}
	}
	// What gets past the analysis ends the session when the target reports it.
	_, err := c.Exec(t.Context(), "DO $$ BEGIN EXECUTE 'SET client_encoding = LATIN1'; END $$")
	var pg *pgconn.PgError
	if err == nil || (errors.As(err, &pg) && pg.Severity != "FATAL" && pg.Code != "42501") {
		t.Errorf("%v", err)
	}
}

func TestStatementLimits(t *testing.T) {
	g := start(t)
	r := g.login()
	r.send('Q', "SELECT '"+strings.Repeat("x", 2<<20)+"'\x00")
	r.send('P', "\x00SELECT '"+strings.Repeat("x", 2<<20)+"'\x00\x00\x00")
	r.send('S')
	r.send('Q', "SELECT 1\x00")
	got := r.until('Z', 3)
	if len(got) != 8 || !strings.HasPrefix(got[0], "E 54000") || !strings.HasPrefix(got[2], "E 54000") || got[6] != "C SELECT 1" {
		t.Fatalf("%q", got)
	}
	// A parameter of many megabytes is fine; one message of an unknown type is the end.
	c := g.connect()
	var n int
	if err := c.QueryRow(t.Context(), "SELECT length($1::text)", strings.Repeat("y", 10<<20)).Scan(&n); err != nil || n != 10<<20 {
		t.Fatalf("%d %v", n, err)
	}
	r.send('?', "what")
	if got := line('E', r.expect('E')); !strings.HasPrefix(got, "E 08P01") {
		t.Error(got)
	}
}

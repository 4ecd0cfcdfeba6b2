package postgres_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols/protocoltest"
	"github.com/sallyport/sallyport/recording"
)

func holding(t *testing.T, inTransaction time.Duration) *gateway {
	g := start(t)
	base := rules(map[policy.Action]policy.Effect{policy.PostgresDelete: policy.Hold})
	g.Decide(func(r *policy.Request) policy.Decision {
		d := base(r)
		if d.Obligations.Approval != nil {
			d.Obligations.Approval.InTransaction = inTransaction
		}
		return d
	})
	return g
}

func (g *gateway) asked() *protocoltest.Ticket {
	g.t.Helper()
	select {
	case ticket := <-g.Asked:
		return ticket
	case <-time.After(10 * time.Second):
		g.t.Fatal("no approval was asked for")
		return nil
	}
}

func (g *gateway) items() (n int) {
	g.t.Helper()
	if err := g.server.Conn(g.t, g.db).QueryRow(g.t.Context(), "SELECT count(*) FROM items").Scan(&n); err != nil {
		g.t.Fatal(err)
	}
	return n
}

func TestHoldApproved(t *testing.T) {
	g := holding(t, 0)
	notices := make(chan string, 4)
	cfg, err := pgconn.ParseConfig(g.dsn())
	if err != nil {
		t.Fatal(err)
	}
	cfg.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { notices <- n.Message }
	c, err := pgconn.ConnectConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(context.Background())
	for name, run := range map[string]func() error{
		"simple": func() error { return c.Exec(t.Context(), "DELETE FROM items WHERE id = 1").Close() },
		"extended": func() error {
			return c.ExecParams(t.Context(), "DELETE FROM items WHERE id = $1", [][]byte{[]byte("2")}, nil, nil, nil).Read().Err
		},
	} {
		before := g.items()
		done := make(chan error, 1)
		go func() { done <- run() }()
		ticket := g.asked()
		if n := <-notices; !strings.Contains(n, "sallyport approvals approve "+ticket.ID()) {
			t.Errorf("%s: %q", name, n)
		}
		if name == "extended" && !strings.Contains(ticket.Hold.Detail["parameters"], "$1 = 2") {
			t.Errorf("the approver sees %q", ticket.Hold.Detail)
		}
		if !strings.HasPrefix(string(ticket.Hold.Text), "DELETE FROM items") || g.items() != before {
			t.Errorf("%s: %q", name, ticket.Hold.Text)
		}
		ticket.Approve()
		if err := <-done; err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if g.items() != before-1 || !ticket.Used() {
			t.Errorf("%s: not run, or not used", name)
		}
	}
	var steps []string
	for _, e := range g.Last().Record.Entries(recording.Approval) {
		steps = append(steps, e.Effect)
	}
	if got := strings.Join(steps, " "); got != "asked granted used asked granted used" {
		t.Error(got)
	}
}

func TestHoldDigest(t *testing.T) {
	g := holding(t, 0)
	c := g.connect()
	digest := func(args ...any) [32]byte {
		done := make(chan error, 1)
		go func() { _, err := c.Exec(context.Background(), args[0].(string), args[1:]...); done <- err }()
		ticket := g.asked()
		ticket.Deny("no")
		if err := <-done; err == nil || !strings.Contains(err.Error(), "denied: no") {
			t.Fatal(err)
		}
		if ticket.Used() {
			t.Fatal("used")
		}
		return ticket.Hold.Digest
	}
	one := digest("DELETE FROM items WHERE id = $1", 1)
	if digest("DELETE FROM items WHERE id = $1", 1) != one {
		t.Error("the same operation has two digests")
	}
	if digest("DELETE FROM items WHERE id = $1", 2) == one {
		t.Error("the parameter is not in the digest")
	}
	if digest("DELETE FROM items WHERE  id = $1", 1) == one {
		t.Error("the exact text is not in the digest")
	}
	if _, err := c.Exec(t.Context(), "SET TimeZone = 'Asia/Tokyo'"); err != nil {
		t.Fatal(err)
	}
	if digest("DELETE FROM items WHERE id = $1", 1) == one {
		t.Error("settings are not in the digest")
	}
	if g.items() != 100 {
		t.Error("something ran")
	}
}

// On release everything is judged again.
func TestHoldIsDecidedAgain(t *testing.T) {
	g := holding(t, 0)
	c := g.connect()
	done := make(chan error, 1)
	go func() { _, err := c.Exec(context.Background(), "DELETE FROM items"); done <- err }()
	ticket := g.asked()
	g.Decide(rules(map[policy.Action]policy.Effect{policy.PostgresDelete: policy.Refuse}))
	ticket.Approve()
	if err := <-done; sqlstate(err) != "42501" || ticket.Used() || g.items() != 100 {
		t.Fatal(err)
	}
	// A table that is another one by then.
	g = holding(t, 0)
	c = g.connect()
	go func() { _, err := c.Exec(context.Background(), "DELETE FROM items"); done <- err }()
	ticket = g.asked()
	if err := g.server.Exec(t.Context(), g.db, "ALTER TABLE items RENAME TO items_old; CREATE TABLE items (id int)"); err != nil {
		t.Fatal(err)
	}
	ticket.Approve()
	if err := <-done; err == nil || !strings.Contains(err.Error(), "changed while it waited") || ticket.Used() {
		t.Fatal(err)
	}
}

func TestHoldEnds(t *testing.T) {
	t.Run("cancel", func(t *testing.T) {
		g := holding(t, 0)
		c := g.connect()
		done := make(chan error, 1)
		go func() { _, err := c.Exec(context.Background(), "DELETE FROM items"); done <- err }()
		ticket := g.asked()
		time.Sleep(50 * time.Millisecond)
		if err := c.PgConn().CancelRequest(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := <-done; sqlstate(err) != "57014" || ticket.Withdrawn() == "" {
			t.Fatalf("%v %q", err, ticket.Withdrawn())
		}
		if err := c.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("disconnect", func(t *testing.T) {
		g := holding(t, 0)
		r := g.login()
		r.send('Q', "DELETE FROM items\x00")
		ticket := g.asked()
		r.Close()
		<-g.Last().Ended
		if ticket.Withdrawn() == "" || g.items() != 100 {
			t.Fatal("not withdrawn")
		}
	})
	t.Run("revoked", func(t *testing.T) {
		g := holding(t, 0)
		r := g.login()
		r.send('Q', "DELETE FROM items\x00")
		ticket := g.asked()
		g.Last().Revoke("gone")
		if end := <-g.Last().Ended; end.Reason != "revoked" {
			t.Errorf("%+v", end)
		}
		ticket.Approve()
		if g.items() != 100 || ticket.Used() {
			t.Fatal("ran")
		}
	})
	t.Run("transaction", func(t *testing.T) {
		g := holding(t, 0)
		c := g.connect()
		tx, err := c.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), "DELETE FROM items"); sqlstate(err) != "42501" || !strings.Contains(err.Error(), "inside an open transaction") {
			t.Fatal(err)
		}
		if len(g.Asked) != 0 {
			t.Fatal("asked")
		}
	})
	t.Run("transaction, allowed for a while", func(t *testing.T) {
		g := holding(t, 700*time.Millisecond)
		c := g.connect()
		tx, err := c.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), "DELETE FROM items"); sqlstate(err) != "57014" {
			t.Fatal(err)
		}
		if g.asked().Withdrawn() == "" {
			t.Fatal("not withdrawn")
		}
	})
	t.Run("implicit transaction of a pipeline", func(t *testing.T) {
		g := holding(t, 0)
		r := g.login()
		r.Write(append(append(extended("INSERT INTO items VALUES (5000, 'x')"), extended("DELETE FROM items")...), frame('S')...))
		got := r.until('Z', 1)
		if len(got) != 6 || !strings.Contains(got[4], "inside an open transaction") || g.items() != 100 {
			t.Fatalf("%q", got)
		}
	})
	t.Run("skipped", func(t *testing.T) {
		g := holding(t, 0)
		r := g.login()
		r.Write(append(append(extended("SELECT 1/0"), extended("DELETE FROM items")...), frame('S')...))
		if got := r.until('Z', 1); len(got) != 3 || len(g.Asked) != 0 {
			t.Fatalf("%q", got)
		}
	})
}

// What was admitted before a held operation goes first, and what the client
// sends meanwhile is not lost.
func TestHoldFlushesAndKeeps(t *testing.T) {
	g := holding(t, 0)
	r := g.login()
	var b []byte
	b = append(b, frame('Q', "INSERT INTO items VALUES (3000, 'first')\x00")...)
	b = append(b, frame('Q', "DELETE FROM items WHERE id = 1\x00")...)
	r.Write(b)
	if got := r.until('Z', 1); got[0] != "C INSERT 0 1" {
		t.Fatalf("%q", got)
	}
	ticket := g.asked()
	if got := line('N', r.expect('N')); !strings.Contains(got, "approve") {
		t.Fatal(got)
	}
	for range 3000 { // more than is read ahead
		r.send('Q', fmt.Sprintf("SELECT '%s'\x00", strings.Repeat("z", 20)))
	}
	time.Sleep(100 * time.Millisecond)
	ticket.Approve()
	if got := r.until('Z', 1); got[0] != "C DELETE 1" {
		t.Fatalf("%q", got)
	}
	if got := r.until('Z', 3000); len(got) != 4*3000 {
		t.Fatalf("%d messages", len(got))
	}
}

func TestHoldTooLarge(t *testing.T) {
	g := holding(t, 0)
	c := g.connect("default_query_exec_mode=simple_protocol")
	_, err := c.Exec(t.Context(), "DELETE FROM items WHERE label = '"+strings.Repeat("x", 70<<10)+"'")
	if err == nil || !strings.Contains(err.Error(), "split it") || len(g.Asked) != 0 {
		t.Fatal(err)
	}
}

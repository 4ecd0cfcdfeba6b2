package postgres_test

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/protocoltest/pgserver"
)

func TestStartupRefusals(t *testing.T) {
	g := start(t)
	for _, c := range []struct {
		name   string
		params []string
		want   string
	}{
		{"no user", []string{"database", "x"}, "no user name"},
		{"no database", []string{"user", "prod-db"}, "dbname="},
		{"replication", []string{"user", "prod-db", "database", "x", "replication", "database"}, "replication connections are refused"},
		{"search_path", []string{"user", "prod-db", "database", "x", "search_path", "evil"}, "search_path"},
		{"options", []string{"user", "prod-db", "database", "x", "options", "-c search_path=evil"}, "options"},
		{"session_preload_libraries", []string{"user", "prod-db", "database", "x", "session_preload_libraries", "x"}, "session_preload_libraries"},
		{"client_encoding", []string{"user", "prod-db", "database", "x", "client_encoding", "BIG5"}, "client_encoding"},
	} {
		r := g.dial()
		r.startTLS(g)
		r.startup(c.params...)
		if got := line('E', r.expect('E')); !strings.Contains(got, c.want) {
			t.Errorf("%s: %s", c.name, got)
		}
		if _, err := r.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%s: not closed: %v", c.name, err)
		}
	}
}

func TestPlaintextRefused(t *testing.T) {
	g := start(t)
	r := g.dial()
	r.startup("user", "prod-db", "database", g.db)
	if got := line('E', r.expect('E')); !strings.Contains(got, "plaintext logins are refused: use sslmode=verify-full") {
		t.Fatal(got)
	}
	// psql says it, too; and its defaults (sslmode=prefer) get a TLS session.
	host, port, _ := strings.Cut(g.Addr, ":")
	run := func(mode string) string {
		cmd := exec.Command(pgserver.PSQL(t), "-X", "-A", "-t", "-c", "SELECT 42", "host="+host+" port="+port+" user=prod-db dbname="+g.db+" "+mode)
		cmd.Env = append(os.Environ(), "PGPASSWORD=good")
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	if out := run("sslmode=disable"); !strings.Contains(out, "plaintext logins are refused") {
		t.Error(out)
	}
	if out := run(""); strings.TrimSpace(out) != "42" {
		t.Error(out)
	}
}

func TestGSSProbe(t *testing.T) {
	g := start(t)
	r := g.dial()
	r.Write([]byte{0, 0, 0, 8, 4, 210, 22, 48})
	var b [1]byte
	if _, err := io.ReadFull(r, b[:]); err != nil || b[0] != 'N' {
		t.Fatalf("%q %v", b, err)
	}
	r.startTLS(g)
	r.startup("user", "prod-db", "database", g.db)
	r.expect('R')
}

// Bytes sent in the clear behind SSLRequest never become part of the session.
func TestBytesBeforeHandshake(t *testing.T) {
	g := start(t)
	r := g.dial()
	r.Write(append([]byte{0, 0, 0, 8, 4, 210, 22, 47}, frame('Q', "SELECT 1\x00")...))
	var b [1]byte
	io.ReadFull(r, b[:])
	if err := tls.Client(r.Conn, &tls.Config{RootCAs: g.Roots, ServerName: "localhost"}).Handshake(); err == nil {
		t.Fatal("the handshake succeeded")
	}
	if len(g.Sessions()) != 0 {
		t.Fatal("a session began")
	}
}

func TestNegotiateProtocolVersion(t *testing.T) {
	g := start(t)
	for _, version := range []uint32{3<<16 | 2, 3<<16 | 9999, 3 << 16} {
		r := g.dial()
		r.startTLS(g)
		r.startupVersion(version, "user", "prod-db", "database", g.db, "_pq_.test_protocol_negotiation", "")
		body := r.expect('v')
		if binary.BigEndian.Uint32(body) != 3<<16 || !strings.Contains(string(body), "_pq_.test_protocol_negotiation") {
			t.Errorf("%q", body)
		}
		r.expect('R')
		r.send('p', "good\x00")
		r.until('Z', 1)
	}
	r := g.dial()
	r.startTLS(g)
	r.startupVersion(2<<16, "user", "prod-db")
	if got := line('E', r.expect('E')); !strings.Contains(got, "protocol 2.0") {
		t.Error(got)
	}
}

func TestLoginRefused(t *testing.T) {
	g := start(t)
	login := func(password string) string {
		r := g.dial()
		r.startTLS(g)
		r.startup("user", "prod-db.reader", "database", g.db)
		r.expect('R')
		r.send('p', password, "\x00")
		kind, body := r.next()
		return line(kind, body)
	}
	if got := login("bad"); got != "E 28000 sallyport: login refused (bad-signature): the token's signature is wrong" {
		t.Error(got)
	}
	if got := login(strings.Repeat("x", 65<<10)); !strings.Contains(got, "64 KiB") {
		t.Error(got)
	}
	g.OnOpen(func(w protocols.Want) error {
		if w.Target != "prod-db" || w.Profile != "reader" || w.Database != g.db {
			t.Errorf("%+v", w)
		}
		return &protocols.Refusal{Rule: "no-connect", Reason: "you may not connect to prod-db"}
	})
	if got := login("good"); got != "E 28000 sallyport: you may not connect to prod-db" {
		t.Error(got)
	}
	g.OnOpen(func(protocols.Want) error { return errors.New("internal: secret detail") })
	r := g.dial()
	r.startTLS(g)
	r.startup("user", "prod-db", "database", g.db)
	r.expect('R')
	r.send('p', "good\x00")
	if b, err := io.ReadAll(r); err != nil || len(b) != 0 {
		t.Errorf("%q %v", b, err)
	}
}

func TestUnreachableTarget(t *testing.T) {
	g := start(t)
	r := g.dial()
	r.startTLS(g)
	r.startup("user", "prod-db", "database", "no_such_database")
	r.expect('R')
	r.send('p', "good\x00")
	if got := line('E', r.expect('E')); !strings.HasPrefix(got, "E 08001") || strings.Contains(got, "app_") {
		t.Error(got)
	}
	s := g.Last()
	<-s.Ended
	if _, _, _, released := s.Lease.Counts(); released != 1 {
		t.Error("the credential was not released")
	}
}

// A connection that says nothing is ended, and costs nobody else anything.
func TestIdleBeforeLogin(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the deadline")
	}
	g := start(t)
	idle := g.dial()
	half := g.dial()
	half.Write([]byte{0, 0, 0, 80})
	g.connect()
	began := time.Now()
	for _, r := range []*raw{idle, half} {
		if _, err := r.Read(make([]byte, 1)); err == nil || time.Since(began) > 15*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	}
}

func TestMalformedStartup(t *testing.T) {
	g := start(t)
	for _, b := range [][]byte{
		{0, 0, 0, 4, 0, 0, 0, 0},
		{0xFF, 0xFF, 0xFF, 0xFF, 0, 3, 0, 0},
		[]byte("GET / HTTP/1.1\r\n\r\n"),
		{0, 0, 0, 12, 4, 210, 22, 46, 0, 0, 0, 1}, // CancelRequest without key
	} {
		r := g.dial()
		r.Write(b)
		io.ReadAll(r)
	}
	r := g.dial()
	r.startTLS(g)
	r.startup("user", "x", "database")
	if got := line('E', r.expect('E')); !strings.HasPrefix(got, "E 08P01") {
		t.Error(got)
	}
}

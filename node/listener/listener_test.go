package listener

import (
	"context"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"crypto/tls"

	"github.com/sallyport/sallyport/node/pki"
)

// start runs a listener whose PostgreSQL side echoes what it is sent.
func start(t *testing.T, o Options) (addr string) {
	t.Helper()
	ca, err := pki.NewCA("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	sans, err := pki.ParseSANs(nil, true)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.SignNode(csr, "test", pki.Voter, "n1", sans, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}}
	o.HTTP = NewConnListener(ln.Addr())
	o.Log = slog.New(slog.DiscardHandler)
	o.Postgres = func(_ context.Context, c net.Conn, _ bool, _ func()) {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.Copy(c, c)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = New(o).Run(ctx, ln)
	}()
	t.Cleanup(func() { cancel(); <-done }) // after the test's own connections are closed
	return ln.Addr().String()
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	return c
}

func TestSniff(t *testing.T) {
	addr := start(t, Options{MaxConnections: 10, MaxUnauthenticated: 10, MaxUnauthenticatedPerIP: 10})
	idle := dial(t, addr) // an idle socket must block nobody

	c := dial(t, addr)
	hello := "\x00\x00\x00\x08\x04\xd2\x16\x2f"
	if _, err := io.WriteString(c, hello); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(hello))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != hello {
		t.Fatalf("the peeked byte was lost: %q, %v", got, err)
	}

	h := dial(t, addr)
	_, _ = io.WriteString(h, "GET / HTTP/1.1\r\n\r\n")
	answer, _ := io.ReadAll(h)
	if !strings.HasPrefix(string(answer), "HTTP/1.1 400") || !strings.Contains(string(answer), "https") {
		t.Fatalf("plain HTTP got %q", answer)
	}

	d := tls.Client(dial(t, addr), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"postgresql"}})
	if _, err := io.WriteString(d, "direct"); err != nil {
		t.Fatal(err)
	}
	got = make([]byte, 6)
	if _, err := io.ReadFull(d, got); err != nil || string(got) != "direct" {
		t.Fatalf("direct TLS: %q, %v", got, err)
	}
	_ = idle
}

func TestLimits(t *testing.T) {
	addr := start(t, Options{MaxConnections: 10, MaxUnauthenticated: 10, MaxUnauthenticatedPerIP: 2})
	dial(t, addr)
	second := dial(t, addr)
	deadline := time.Now().Add(5 * time.Second)
	for { // the two above may not have been accepted yet
		c := dial(t, addr)
		if _, err := c.Read(make([]byte, 1)); err == io.EOF {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a third unauthenticated connection of one client was accepted")
		}
	}
	second.Close()
	for {
		c := dial(t, addr)
		_, _ = io.WriteString(c, "\x00\x00\x00\x08")
		if _, err := io.ReadFull(c, make([]byte, 4)); err == nil {
			return // its place was given to the next
		}
		if time.Now().After(deadline) {
			t.Fatal("a closed connection kept its place")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

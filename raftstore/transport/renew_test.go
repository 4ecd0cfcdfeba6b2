package transport_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore/storetest"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// renewable is an endpoint whose certificate can be changed, and that can be
// told which certificates it takes.
type renewable struct {
	*transport.Endpoint
	cert  atomic.Pointer[tls.Certificate]
	takes atomic.Pointer[x509.Certificate] // nil: every one
}

func newRenewable(t *testing.T, ca *storetest.CA, cert *tls.Certificate) *renewable {
	t.Helper()
	r := &renewable{}
	r.cert.Store(cert)
	e, err := transport.Listen(transport.EndpointConfig{
		UDPConn:     storetest.ListenUDP(t, "127.0.0.1:0"),
		Certificate: func() (*tls.Certificate, error) { return r.cert.Load(), nil },
		Roots:       ca.Pool,
		Authorize: func(_ string, leaf *x509.Certificate) (string, error) {
			if only := r.takes.Load(); only != nil && !leaf.Equal(only) {
				return "", errors.New("another certificate")
			}
			return leaf.Subject.CommonName, nil
		},
		Classes: transport.Classes,
	})
	if err != nil {
		t.Fatal(err)
	}
	r.Endpoint = e
	t.Cleanup(func() { e.Close() })
	return r
}

// echo answers streams of a class and says which certificate each came with.
func (r *renewable) echo(class string) <-chan *x509.Certificate {
	seen := make(chan *x509.Certificate, 1024)
	l := r.Listener(class)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			seen <- c.(*transport.Conn).PeerCertificate()
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	return seen
}

func ping(c net.Conn) error {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// A renewed certificate is used by the next stream; streams that are open go on
// for a moment, and no longer.
func TestRenewedCertificate(t *testing.T) {
	ca := storetest.NewCA(t)
	a, b := newRenewable(t, ca, ca.Issue(t, "a")), newRenewable(t, ca, ca.Issue(t, "b"))
	seen := b.echo(transport.ClassFence)
	old, err := dial(t, a.Endpoint, b.Endpoint, transport.ClassFence, "b")
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if err := ping(old); err != nil {
		t.Fatal(err)
	}
	<-seen

	next := ca.Issue(t, "a")
	a.cert.Store(next)
	a.Recheck()
	fresh, err := dial(t, a.Endpoint, b.Endpoint, transport.ClassFence, "b")
	if err != nil {
		t.Fatal(err)
	}
	defer fresh.Close()
	if err := ping(fresh); err != nil {
		t.Fatal(err)
	}
	if got := <-seen; !got.Equal(next.Leaf) {
		t.Fatal("a new stream came with the earlier certificate")
	}
	old.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := old.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a stream of the earlier certificate lives on: %v", err)
	}
	if err := ping(fresh); err != nil {
		t.Fatalf("the new connection: %v", err)
	}

	// When the peer no longer takes the certificate, its connection ends too.
	b.takes.Store(ca.Issue(t, "a").Leaf)
	b.Recheck()
	fresh.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := fresh.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a connection whose certificate is no longer taken lives on: %v", err)
	}
	if c, err := dial(t, a.Endpoint, b.Endpoint, transport.ClassFence, "b"); err == nil {
		if ping(c) == nil {
			t.Fatal("a certificate that is no longer taken opened a connection")
		}
		c.Close()
	}
}

// S31: a connection does not outlive the certificates that it rests on, and who
// dials again in time notices nothing.
func TestExpiryOnALiveConnection(t *testing.T) {
	ca := storetest.NewCA(t)
	end := time.Now().Add(9 * time.Second).Truncate(time.Second)
	a, b := newRenewable(t, ca, ca.IssueUntil(t, "a", end)), newRenewable(t, ca, ca.Issue(t, "b"))
	seen := b.echo(transport.ClassFence)
	old, err := dial(t, a.Endpoint, b.Endpoint, transport.ClassFence, "b")
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if err := ping(old); err != nil {
		t.Fatal(err)
	}
	if got := <-seen; !got.NotAfter.Equal(end) {
		t.Fatal("not the short certificate")
	}
	a.cert.Store(ca.Issue(t, "a")) // as its owner renews it, without a word to the endpoint
	old.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := old.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the connection outlives its certificate: %v", err)
	}
	if late := time.Since(end); late > 20*time.Second {
		t.Fatalf("closed %v after the certificate's end", late)
	}
	c, err := dial(t, a.Endpoint, b.Endpoint, transport.ClassFence, "b")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := ping(c); err != nil {
		t.Fatal(err)
	}

	// And without a renewal nothing more is opened.
	a.cert.Store(ca.IssueUntil(t, "a", time.Now().Add(-time.Minute)))
	a.Recheck()
	if c, err := dial(t, a.Endpoint, b.Endpoint, transport.ClassFence, "b"); err == nil {
		if ping(c) == nil {
			t.Fatal("an expired certificate opened a connection")
		}
		c.Close()
	}
}

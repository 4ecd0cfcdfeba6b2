package transport_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/raftstore/storetest"
	"github.com/sallyport/sallyport/raftstore/transport"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func endpoint(t *testing.T, ca *storetest.CA, name string) (*transport.Endpoint, *storetest.Network) {
	t.Helper()
	n := storetest.ListenUDP(t, "127.0.0.1:0")
	e := storetest.Endpoint(t, ca, ca.Issue(t, name), n, nil)
	t.Cleanup(func() { e.Close() })
	return e, n
}

func dial(t *testing.T, from, to *transport.Endpoint, class, peer string) (net.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	return from.Dial(ctx, class, to.Addr().String(), peer)
}

func TestStreams(t *testing.T) {
	ca := storetest.NewCA(t)
	a, _ := endpoint(t, ca, "a")
	b, _ := endpoint(t, ca, "b")
	for _, class := range []string{transport.ClassRaft, transport.ClassMesh} {
		l := b.Listener(class)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					io.WriteString(c, c.(*transport.Conn).Peer()+" "+class+": ")
					io.Copy(c, c)
				}()
			}
		}()
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			class := []string{transport.ClassRaft, transport.ClassMesh}[i%2]
			c, err := dial(t, a, b, class, "b")
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			want := bytes.Repeat([]byte("0123456789"), 10_000)
			go func() {
				c.Write(want)
				c.(*transport.Conn).CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err != nil || string(got) != "a "+class+": "+string(want) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if p := c.(*transport.Conn); p.Peer() != "b" || p.PeerCertificate().Subject.CommonName != "b" {
				t.Errorf("peer %q", p.Peer())
			}
		})
	}
	wg.Wait()
}

func TestConnIsANetConn(t *testing.T) {
	ca := storetest.NewCA(t)
	a, _ := endpoint(t, ca, "a")
	b, _ := endpoint(t, ca, "b")
	l := b.Listener(transport.ClassMesh)
	open := func() (c, s net.Conn) {
		t.Helper()
		c, err := dial(t, a, b, transport.ClassMesh, "b")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if s, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		return c, s
	}
	t.Run("deadlines", func(t *testing.T) {
		c, s := open()
		defer c.Close()
		defer s.Close()
		c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("read: %v", err)
		}
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := c.Write(make([]byte, 64<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("write to one who does not read: %v", err)
		}
	})
	t.Run("close unblocks", func(t *testing.T) {
		c, s := open()
		defer s.Close()
		errs := make(chan error, 2)
		go func() { _, err := c.Read(make([]byte, 1)); errs <- err }()
		go func() { _, err := c.Write(make([]byte, 64<<20)); errs <- err }()
		time.Sleep(50 * time.Millisecond)
		c.Close()
		c.Close()
		for range 2 {
			select {
			case err := <-errs:
				if err == nil {
					t.Fatal("no error after Close")
				}
			case <-time.After(5 * time.Second):
				t.Fatal("blocked after Close")
			}
		}
	})
	t.Run("half close", func(t *testing.T) {
		c, s := open()
		defer c.Close()
		c.Write([]byte("last"))
		c.(*transport.Conn).CloseWrite()
		if got, err := io.ReadAll(s); string(got) != "last" || err != nil {
			t.Fatalf("%q %v", got, err)
		}
		s.Write([]byte("answer"))
		s.Close()
		if got, err := io.ReadAll(c); string(got) != "answer" || err != nil {
			t.Fatalf("%q %v", got, err)
		}
	})
	t.Run("the other side closes", func(t *testing.T) {
		c, s := open()
		defer c.Close()
		s.Close()
		var err error
		for end := time.Now().Add(5 * time.Second); err == nil && time.Now().Before(end); {
			_, err = c.Write(make([]byte, 1000))
		}
		if err == nil {
			t.Fatal("writing to a closed stream goes on")
		}
	})
}

func TestRefused(t *testing.T) {
	ca, other := storetest.NewCA(t), storetest.NewCA(t)
	server, _ := endpoint(t, ca, "server")
	l := server.Listener(transport.ClassMesh)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c)
			c.Close()
		}
	}()
	good, _ := endpoint(t, ca, "good")
	stranger, _ := endpoint(t, other, "server")

	try := func(e *transport.Endpoint, class, peer string) error {
		c, err := dial(t, e, server, class, peer)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err = io.ReadFull(c, make([]byte, 1))
		return err
	}
	if err := try(good, transport.ClassMesh, "server"); err != nil {
		t.Fatal(err)
	}
	if err := try(good, transport.ClassMesh, "another"); !errors.Is(err, transport.ErrWrongPeer) {
		t.Errorf("another node: %v", err)
	}
	if err := try(stranger, transport.ClassMesh, "server"); !errors.Is(err, transport.ErrUnauthorized) {
		t.Errorf("a server of another authority: %v", err)
	}
	if err := try(good, transport.ClassRaft, "server"); err == nil {
		t.Errorf("a class nobody serves: %v", err)
	}
	if err := try(good, "h3", ""); err == nil || !strings.Contains(err.Error(), "class") {
		t.Errorf("a class that does not exist: %v", err)
	}
	// The server's side: a client that does not check it comes no further.
	trusting := func(name string, cert *tls.Certificate, refuse error) {
		e, err := transport.Listen(transport.EndpointConfig{
			UDPConn:     storetest.ListenUDP(t, "127.0.0.1:0"),
			Certificate: func() (*tls.Certificate, error) { return cert, nil },
			Roots:       ca.Pool,
			Authorize:   func(string, *x509.Certificate) (string, error) { return "server", refuse },
			Classes:     []string{transport.ClassMesh},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		if err := try(e, transport.ClassMesh, "server"); err == nil {
			t.Errorf("%s was served", name)
		}
	}
	trusting("a client of another authority", other.Issue(t, "x"), nil)
	trusting("a client without a name", ca.Issue(t, ""), nil)
	trusting("a client that refuses the server", ca.Issue(t, "x"), errors.New("no"))
}

func TestReconnectAndClose(t *testing.T) {
	ca := storetest.NewCA(t)
	a, _ := endpoint(t, ca, "a")
	cert := ca.Issue(t, "b")
	key := [32]byte{1}
	n := storetest.ListenUDP(t, "127.0.0.1:0")
	addr := n.LocalAddr().String()
	start := func(n *storetest.Network) *transport.Endpoint {
		e := storetest.Endpoint(t, ca, cert, n, &key)
		l := e.Listener(transport.ClassMesh)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { io.Copy(c, c); c.Close() }()
			}
		}()
		return e
	}
	echo := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		c, err := a.Dial(ctx, transport.ClassMesh, addr, "b")
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err = io.ReadFull(c, make([]byte, 1))
		return err
	}
	again := func(what string, limit time.Duration) {
		t.Helper()
		from := time.Now()
		for echo() != nil {
			if time.Since(from) > limit {
				t.Fatalf("%s: no connection after %v", what, limit)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	b := start(n)
	again("first", 5*time.Second)
	b.Close()
	b = start(storetest.ListenUDP(t, addr))
	again("after a close", 5*time.Second)
	a.Disconnect("b")
	again("after Disconnect", 5*time.Second)
	b.Close()
	if err := echo(); err == nil {
		t.Fatal("a closed endpoint answers")
	}
	a.Close()
	if err := echo(); err == nil {
		t.Fatal("a closed endpoint dials")
	}
}

func TestListenerClose(t *testing.T) {
	ca := storetest.NewCA(t)
	a, _ := endpoint(t, ca, "a")
	b, _ := endpoint(t, ca, "b")
	l := b.Listener(transport.ClassRaft)
	c, err := dial(t, a, b, transport.ClassRaft, "b")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("x"))
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("Accept after Close: %v", err)
	}
	io.ReadFull(s, make([]byte, 1))
	if _, err := s.Read(make([]byte, 1)); err == nil {
		t.Fatal("a stream outlives its listener")
	}
	// The class may be served again.
	l = b.Listener(transport.ClassRaft)
	accepted := make(chan error, 1)
	go func() { _, err := l.Accept(); accepted <- err }()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		// On the old connection until a hears of its end.
		if c, err := dial(t, a, b, transport.ClassRaft, "b"); err == nil {
			c.Write([]byte("y"))
			defer c.Close()
		}
		select {
		case err := <-accepted:
			if err != nil {
				t.Fatal(err)
			}
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Fatal("the class is not served again")
}

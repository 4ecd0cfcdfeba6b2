// Package listener accepts client connections on one TCP port and hands each
// to the protocol it speaks, told by its first byte and, after a TLS
// handshake, by ALPN. It bounds connections, unauthenticated ones by client
// address too, and gives every step before authentication a deadline, each on
// its own goroutine: an idle socket blocks nobody.
package listener

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

// SniffTimeout bounds how long a client may take to send its first byte, and
// again to finish a TLS handshake.
const SniffTimeout = 10 * time.Second

// Options says what to do with connections.
type Options struct {
	TLS *tls.Config // for direct TLS; NextProtos are set here
	// Postgres serves one connection. direct says that TLS is already on
	// (ALPN postgresql). authenticated is to be called when the client has
	// logged in: it then no longer counts as unauthenticated.
	Postgres func(ctx context.Context, c net.Conn, direct bool, authenticated func())
	// HTTP takes connections with TLS on, for an http.Server.
	HTTP *ConnListener

	MaxConnections, MaxUnauthenticated, MaxUnauthenticatedPerIP int
	Log                                                         *slog.Logger
}

// Server accepts from one listener.
type Server struct {
	o   Options
	tls *tls.Config
	mu  struct {
		sync.Mutex
		all, unauthenticated int
		perIP                map[string]int
	}
	wg sync.WaitGroup
}

// New returns a Server; Run starts it.
func New(o Options) *Server {
	s := &Server{o: o}
	s.tls = o.TLS.Clone()
	s.tls.NextProtos = []string{"http/1.1", "postgresql"}
	s.mu.perIP = map[string]int{}
	return s
}

// Run accepts until ctx ends, closes ln, and returns when every connection's
// goroutine has ended.
func (s *Server) Run(ctx context.Context, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	defer s.wg.Wait()
	backoff := 5 * time.Millisecond
	for {
		c, err := ln.Accept()
		if ctx.Err() != nil {
			if c != nil {
				c.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Out of descriptors, most often: others' connections end in time.
			s.o.Log.Warn("accept failed", "err", err)
			time.Sleep(backoff)
			backoff = min(2*backoff, time.Second)
			continue
		}
		backoff = 5 * time.Millisecond
		release, ok := s.admit(c)
		if !ok {
			c.Close()
			continue
		}
		s.wg.Go(func() { s.serve(ctx, c, release) })
	}
}

// slot is one connection's place in the limits.
type slot struct {
	s    *Server
	ip   string
	once sync.Once
}

func (s *Server) admit(c net.Conn) (*slot, bool) {
	ip, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.all >= s.o.MaxConnections || s.mu.unauthenticated >= s.o.MaxUnauthenticated || s.mu.perIP[ip] >= s.o.MaxUnauthenticatedPerIP {
		s.o.Log.Warn("connection refused by a limit", "client", ip, "all", s.mu.all, "unauthenticated", s.mu.unauthenticated, "from_client", s.mu.perIP[ip])
		return nil, false
	}
	s.mu.all++
	s.mu.unauthenticated++
	s.mu.perIP[ip]++
	return &slot{s: s, ip: ip}, true
}

func (p *slot) authenticated() {
	p.once.Do(func() {
		p.s.mu.Lock()
		defer p.s.mu.Unlock()
		p.s.mu.unauthenticated--
		if p.s.mu.perIP[p.ip]--; p.s.mu.perIP[p.ip] == 0 {
			delete(p.s.mu.perIP, p.ip)
		}
	})
}

func (p *slot) release() {
	p.authenticated()
	p.s.mu.Lock()
	p.s.mu.all--
	p.s.mu.Unlock()
}

func (s *Server) serve(ctx context.Context, c net.Conn, p *slot) {
	handedOver := false
	defer func() {
		if !handedOver {
			c.Close()
			p.release()
		}
	}()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })
	_ = c.SetDeadline(time.Now().Add(SniffTimeout))
	pc := &peekedConn{Conn: c, r: bufio.NewReaderSize(c, 512)}
	first, err := pc.r.Peek(1)
	if err != nil {
		stop()
		return // said nothing: a health probe or an idle socket
	}
	switch {
	case first[0] == 0x16: // TLS record, handshake (RFC 8446 §5.1)
		tc := tls.Server(pc, s.tls)
		if err := tc.HandshakeContext(ctx); err != nil {
			stop()
			s.o.Log.Debug("TLS handshake failed", "client", c.RemoteAddr(), "err", err)
			return
		}
		stop()
		_ = c.SetDeadline(time.Time{})
		if tc.ConnectionState().NegotiatedProtocol == "postgresql" {
			s.o.Postgres(ctx, tc, true, p.authenticated)
			return
		}
		handedOver = s.o.HTTP.give(ctx, &slotConn{Conn: tc, release: p.release})
	case first[0] == 0: // length of a PostgreSQL start-up packet, at most 10 KiB
		stop()
		_ = c.SetDeadline(time.Time{})
		s.o.Postgres(ctx, pc, false, p.authenticated)
	default:
		stop()
		// An HTTP client without TLS would wait for an answer it can read.
		_ = c.SetDeadline(time.Now().Add(time.Second))
		_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nThis port speaks TLS (the API) and PostgreSQL. Use https.\n")
	}
}

// peekedConn reads what was peeked first. It keeps CloseWrite and SetLinger
// reachable through NetConn.
type peekedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *peekedConn) Read(b []byte) (int, error) {
	if c.r != nil {
		if n := c.r.Buffered(); n > 0 {
			return c.r.Read(b[:min(len(b), n)])
		}
		c.r = nil // drained; from here on the buffer would only copy
	}
	return c.Conn.Read(b)
}

// NetConn returns the connection beneath, for resets.
func (c *peekedConn) NetConn() net.Conn { return c.Conn }

// slotConn frees its place in the limits when closed.
type slotConn struct {
	net.Conn
	once    sync.Once
	release func()
}

func (c *slotConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.release)
	return err
}

// ConnListener is a net.Listener of connections accepted elsewhere.
type ConnListener struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

// NewConnListener returns one that claims to listen at addr.
func NewConnListener(addr net.Addr) *ConnListener {
	return &ConnListener{addr: addr, conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *ConnListener) give(ctx context.Context, c net.Conn) bool {
	select {
	case l.conns <- c:
		return true
	case <-l.closed:
	case <-ctx.Done():
	}
	return false
}

// Accept waits for the next connection.
func (l *ConnListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close ends Accept; connections already accepted are not touched.
func (l *ConnListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr is the address given to NewConnListener.
func (l *ConnListener) Addr() net.Addr { return l.addr }

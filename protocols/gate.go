package protocols

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// gateChunk is the most that one system call of a session writes, so the most
// that goes out after a check that was true when it was made: what a process
// that is stopped between the two lets through.
const gateChunk = 32 << 10

// Gate is a connection that a session's fence stops. It lies directly over the
// socket, under TLS: so that what passes the fence is bytes on their way into
// the kernel, and a write that waits for its peer can be stopped and taken up
// again without the layers above noticing.
//
// Until a session is begun on it, it is the connection that it wraps.
type Gate struct {
	net.Conn
	fence atomic.Pointer[gateFence]

	mu       sync.Mutex
	deadline time.Time // for writes, as last set by the user
}

type gateFence struct {
	Fence
	gone <-chan struct{}
}

// NewGate wraps a connection as it was accepted or dialled.
func NewGate(c net.Conn) *Gate { return &Gate{Conn: c} }

// NetConn returns the connection beneath, for resets.
func (g *Gate) NetConn() net.Conn { return g.Conn }

// gateOf finds the gate beneath c, or nil.
func gateOf(c net.Conn) *Gate {
	for {
		switch inner := c.(type) {
		case *Gate:
			return inner
		case interface{ NetConn() net.Conn }:
			c = inner.NetConn()
		default:
			return nil
		}
	}
}

// guard has f asked before and after each write from now on.
func (g *Gate) guard(f Fence, gone <-chan struct{}) { g.fence.Store(&gateFence{f, gone}) }

// lift lets what is written from now on pass: a session's last words.
func (g *Gate) lift() { g.fence.Store(nil) }

// Write writes b in pieces, each after the fence was asked.
func (g *Gate) Write(b []byte) (n int, err error) {
	for {
		f := g.fence.Load()
		if f == nil {
			m, err := g.Conn.Write(b[n:])
			return n + m, err
		}
		if err := f.Enter(f.gone); err != nil {
			return n, err
		}
		m, err := g.Conn.Write(b[n:min(len(b), n+gateChunk)])
		f.Leave(m)
		n += m
		switch {
		case err == nil && n == len(b):
			return n, nil
		case err == nil:
		case !errors.Is(err, os.ErrDeadlineExceeded) || !g.resume():
			return n, err
		}
	}
}

// interrupt makes a write that waits for its peer return to the fence.
func (g *Gate) interrupt() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.Conn.SetWriteDeadline(time.Unix(1, 0))
}

// resume takes an interruption back. It reports false when the write has
// missed its user's own deadline.
func (g *Gate) resume() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.deadline.IsZero() && !time.Now().Before(g.deadline) {
		return false
	}
	return g.Conn.SetWriteDeadline(g.deadline) == nil
}

// SetWriteDeadline implements net.Conn.
func (g *Gate) SetWriteDeadline(t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.deadline = t
	return g.Conn.SetWriteDeadline(t)
}

// SetDeadline implements net.Conn.
func (g *Gate) SetDeadline(t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.deadline = t
	return g.Conn.SetDeadline(t)
}

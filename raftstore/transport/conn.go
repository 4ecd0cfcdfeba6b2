package transport

import (
	"crypto/x509"
	"net"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
)

// Conn is a QUIC stream as a net.Conn, with the peer's identity. Read, Write
// and Close may be called from different goroutines, several Writes not at once.
type Conn struct {
	quic *quic.Conn
	st   *quic.Stream
	peer string
	leaf *x509.Certificate

	writing sync.Mutex // held by Write and by what must not run beside it
	closed  sync.Once
	line    line // of chaos runs; nothing in the product
}

func newConn(c *quic.Conn, st *quic.Stream, peer string, leaf *x509.Certificate) *Conn {
	return &Conn{quic: c, st: st, peer: peer, leaf: leaf, line: newLine(c.ConnectionState().TLS.NegotiatedProtocol)}
}

// Peer is the other node's name, from its certificate.
func (c *Conn) Peer() string { return c.peer }

// PeerCertificate is the other node's certificate; it must not be changed.
func (c *Conn) PeerCertificate() *x509.Certificate { return c.leaf }

// Read reads what the peer wrote; io.EOF after its CloseWrite or Close.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.st.Read(b)
	if held := c.line.wait(reading); held != nil {
		return 0, held
	}
	return n, err
}

// Write blocks while the peer reads too slowly.
func (c *Conn) Write(b []byte) (int, error) {
	if held := c.line.wait(writing); held != nil {
		return 0, held
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.st.Write(b)
}

// CloseWrite tells the peer that nothing more comes; reading goes on.
func (c *Conn) CloseWrite() error {
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.st.Close()
}

// Close ends both directions: the peer gets what was written and then io.EOF,
// unless a Write still waits, which fails and resets the stream. What the peer
// sends from now on is thrown away. It never blocks.
func (c *Conn) Close() error {
	c.closed.Do(func() {
		c.line.close()
		c.st.CancelRead(0)
		if c.writing.TryLock() {
			defer c.writing.Unlock()
			c.st.Close()
		} else {
			c.st.CancelWrite(0)
		}
	})
	return nil
}

// LocalAddr is this node's UDP address.
func (c *Conn) LocalAddr() net.Addr { return c.quic.LocalAddr() }

// RemoteAddr is the peer's UDP address.
func (c *Conn) RemoteAddr() net.Addr { return c.quic.RemoteAddr() }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	c.line.until(reading, t)
	c.line.until(writing, t)
	return c.st.SetDeadline(t)
}

// SetReadDeadline makes Reads fail after t; the zero time means never.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.line.until(reading, t)
	return c.st.SetReadDeadline(t)
}

// SetWriteDeadline makes Writes fail after t; the zero time means never.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.line.until(writing, t)
	return c.st.SetWriteDeadline(t)
}

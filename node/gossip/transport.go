package gossip

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	// maxPacket is above what memberlist sends as one packet (1400 bytes and
	// encryption), maxQueued bounds what waits for a peer that does not take it:
	// packets may be lost, so those after are dropped.
	maxPacket = 8 << 10
	maxQueued = 64
	// idlePeer ends the stream to a peer that nothing is sent to.
	idlePeer    = time.Minute
	dialTimeout = 3 * time.Second
	writeLimit  = 3 * time.Second
	// firstByte is how long an accepted stream may take to say what it is.
	firstByte = 5 * time.Second
	// maxStreams bounds accepted streams: each member has one for packets, and
	// now and then one for a whole exchange.
	maxStreams = 4096
)

// The first byte of a stream says what it carries: packets, each after its
// length, 16 bits big-endian; or one of memberlist's own streams.
const (
	carriesPackets = 'P'
	carriesStream  = 'S'
)

// anywhere is the address of everybody: addresses mean nothing here, nodes are
// dialled by their names.
var anywhere = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}

// transport carries memberlist over streams of the node's endpoint.
type transport struct {
	o       Options
	ctx     context.Context
	cancel  context.CancelFunc
	packets chan *memberlist.Packet
	streams chan net.Conn
	wg      sync.WaitGroup
	slots   chan struct{}
	mu      struct {
		sync.Mutex
		closed bool
		peers  map[string]chan []byte
	}
}

var _ memberlist.NodeAwareTransport = (*transport)(nil)

func newTransport(ctx context.Context, o Options) *transport {
	t := &transport{o: o, packets: make(chan *memberlist.Packet, maxQueued), streams: make(chan net.Conn), slots: make(chan struct{}, maxStreams)}
	t.ctx, t.cancel = context.WithCancel(context.WithoutCancel(ctx)) // until close: leaving is said at the end
	t.mu.peers = map[string]chan []byte{}
	t.wg.Go(t.accept)
	return t
}

// close ends all goroutines and waits for them. The listener is the owner's.
func (t *transport) close() {
	t.mu.Lock()
	t.mu.closed = true
	t.mu.Unlock()
	t.cancel()
	t.wg.Wait()
}

// Shutdown is memberlist's; close follows.
func (t *transport) Shutdown() error { t.cancel(); return nil }

// FinalAdvertiseAddr gives all nodes the same address.
func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return anywhere.IP, anywhere.Port, nil
}

func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }
func (t *transport) StreamCh() <-chan net.Conn           { return t.streams }

var errNameless = errors.New("gossip: nodes are reached by their names")

func (t *transport) WriteTo([]byte, string) (time.Time, error) { return time.Time{}, errNameless }
func (t *transport) DialTimeout(string, time.Duration) (net.Conn, error) {
	return nil, errNameless
}

// WriteToAddress hands a packet to the peer's goroutine. It never waits.
func (t *transport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	now := time.Now()
	if a.Name == "" {
		return now, errNameless
	}
	if len(b) > maxPacket {
		return now, errors.New("gossip: the packet is too long")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.closed {
		return now, net.ErrClosed
	}
	q := t.mu.peers[a.Name]
	if q == nil {
		q = make(chan []byte, maxQueued)
		t.mu.peers[a.Name] = q
		t.wg.Go(func() { t.send(a.Name, q) })
	}
	select {
	case q <- append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...):
	default: // lost, as a packet may be
	}
	return now, nil
}

// send writes packets for one peer to a stream, dialled when there is one to
// send. It ends when there has been none for a while.
func (t *transport) send(peer string, q chan []byte) {
	var c net.Conn
	defer func() {
		if c != nil {
			c.Close()
		}
	}()
	idle := time.NewTimer(idlePeer)
	defer idle.Stop()
	for {
		select {
		case b := <-q:
			idle.Reset(idlePeer)
			if c == nil {
				var err error
				if c, err = t.dial(peer, dialTimeout, carriesPackets); err != nil {
					continue
				}
			}
			_ = c.SetWriteDeadline(time.Now().Add(writeLimit))
			if _, err := c.Write(b); err != nil {
				c.Close()
				c = nil
			}
		case <-idle.C:
			t.mu.Lock()
			if len(q) > 0 {
				t.mu.Unlock()
				idle.Reset(idlePeer)
				continue
			}
			delete(t.mu.peers, peer)
			t.mu.Unlock()
			return
		case <-t.ctx.Done():
			return
		}
	}
}

func (t *transport) dial(peer string, timeout time.Duration, kind byte) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(t.ctx, timeout)
	defer cancel()
	c, err := t.o.Dial(ctx, peer)
	if err != nil {
		return nil, err
	}
	_ = c.SetWriteDeadline(time.Now().Add(timeout))
	if _, err := c.Write([]byte{kind}); err != nil {
		c.Close()
		return nil, err
	}
	_ = c.SetWriteDeadline(time.Time{})
	return c, nil
}

// DialAddressTimeout opens a stream for a whole exchange.
func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	if a.Name == "" {
		return nil, errNameless
	}
	c, err := t.dial(a.Name, min(timeout, dialTimeout), carriesStream)
	if err != nil {
		return nil, err
	}
	return somewhere{c}, nil
}

// somewhere is a connection with an address that memberlist can take apart.
type somewhere struct{ net.Conn }

func (somewhere) RemoteAddr() net.Addr { return anywhere }

// accept takes streams until close; the listener belongs to the endpoint.
func (t *transport) accept() {
	conns := make(chan net.Conn)
	done := make(chan struct{})
	go func() { // ends with the listener, whose owner closes it after us
		defer close(done)
		for {
			c, err := t.o.Listener.Accept()
			if err != nil {
				return
			}
			select {
			case conns <- c:
			case <-t.ctx.Done():
				c.Close()
			}
		}
	}()
	for {
		select {
		case c := <-conns:
			select {
			case t.slots <- struct{}{}:
				t.wg.Go(func() { defer func() { <-t.slots }(); t.take(c) })
			default:
				c.Close()
			}
		case <-done:
			return
		case <-t.ctx.Done():
			return
		}
	}
}

// take reads what a stream is, and its packets.
func (t *transport) take(c net.Conn) {
	stop := context.AfterFunc(t.ctx, func() { c.Close() })
	defer stop()
	var kind [1]byte
	_ = c.SetReadDeadline(time.Now().Add(firstByte))
	if _, err := io.ReadFull(c, kind[:]); err != nil {
		c.Close()
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	switch kind[0] {
	case carriesStream:
		select {
		case t.streams <- somewhere{c}: // memberlist closes it, and bounds its time
		case <-time.After(firstByte):
			c.Close()
		case <-t.ctx.Done():
			c.Close()
		}
		return
	case carriesPackets:
	default:
		c.Close()
		return
	}
	defer c.Close()
	var size [2]byte
	for {
		_ = c.SetReadDeadline(time.Now().Add(2 * idlePeer))
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		n := binary.BigEndian.Uint16(size[:])
		if n == 0 || n > maxPacket {
			return
		}
		b := make([]byte, n)
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
		select {
		case t.packets <- &memberlist.Packet{Buf: b, From: anywhere, Timestamp: time.Now()}:
		default: // lost, as a packet may be
		}
	}
}

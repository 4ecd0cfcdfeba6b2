// Package transport carries a cluster's traffic between nodes: QUIC with
// mutual TLS, one UDP socket for all, one connection for each class of traffic
// and peer so that a large transfer of one class holds up no other. Raft's
// transport on top of it is in raft.go.
//
// Who a peer is, its certificate says; whether it may speak a class, the
// Authorize function of the Endpoint's owner says.
package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
)

// Classes of traffic: the ALPN names. Each has a connection of its own to each
// peer, so that a snapshot queues before no lease. Which roles may speak a class
// is the owner's Authorize to say.
const (
	ClassRaft    = "sallyport-raft/1"    // votes, entries, heartbeats: voters only
	ClassBulk    = "sallyport-bulk/1"    // snapshots: voters only
	ClassConfirm = "sallyport-confirm/1" // a voter's term, for linearizable reads: voters only
	ClassFence   = "sallyport-fence/1"   // leases and revocations
	ClassEvents  = "sallyport-events/1"  // the event stream to those outside Raft
	ClassMesh    = "sallyport-mesh/1"    // calls between nodes, and sessions tunnelled
	ClassGossip  = "sallyport-gossip/1"  // hints on how nodes are
)

// Classes are all of them.
var Classes = []string{ClassRaft, ClassBulk, ClassConfirm, ClassFence, ClassEvents, ClassMesh, ClassGossip}

const (
	handshakeTimeout = 5 * time.Second
	idleTimeout      = 5 * time.Second
	keepAlive        = time.Second

	// maxStreams bounds the streams one peer may have open on one connection:
	// a mesh peer carries one for each session tunnelled through it.
	maxStreams = 1024
	// maxConnsPerPeer bounds one peer's connections of one class. One is in
	// use; a restarted peer leaves another behind until idleTimeout.
	maxConnsPerPeer = 4
	// retryHandshakes is how many unfinished handshakes there may be before
	// peers must prove their address (RFC 9000 §8.1.2), maxHandshakes when new
	// ones are refused.
	retryHandshakes = 32
	maxHandshakes   = 512
	// retireGrace is how long a connection whose certificate is replaced may go
	// on: what is under way ends there, what begins takes a new connection.
	retireGrace = 3 * time.Second
	// lifeCheck is how often certificates of live connections are looked at, and
	// retireBefore how long before its end a connection is replaced.
	lifeCheck    = time.Second
	retireBefore = retireGrace + 2*lifeCheck

	// acceptBacklog is how many streams may wait for Accept.
	acceptBacklog = 64
)

// Application error codes in CONNECTION_CLOSE.
const (
	codeClosed       quic.ApplicationErrorCode = 0
	codeUnauthorized quic.ApplicationErrorCode = 1
	codeNotServed    quic.ApplicationErrorCode = 2
	codeTooMany      quic.ApplicationErrorCode = 3
)

var (
	// ErrClosed says that the endpoint or listener was closed.
	ErrClosed = fmt.Errorf("endpoint closed: %w", net.ErrClosed)
	// ErrUnauthorized says that the peer's certificate is not acceptable.
	ErrUnauthorized = errors.New("peer is not authorized")
	// ErrWrongPeer says that another node answered than was meant.
	ErrWrongPeer = errors.New("another node answered")
)

// EndpointConfig is what an Endpoint needs. All but Log and ResetKey must be set.
type EndpointConfig struct {
	// UDPConn is the socket; the Endpoint owns and closes it.
	UDPConn net.PacketConn
	// Certificate returns this node's certificate with its key; asked at each
	// handshake, so it can be renewed.
	Certificate func() (*tls.Certificate, error)
	// Roots returns the cluster's authorities; asked at each handshake.
	Roots func() *x509.CertPool
	// Authorize names the peer with this certificate, which chains to Roots,
	// or refuses it. Called at accept and at dial; it must not block.
	Authorize func(class string, leaf *x509.Certificate) (peer string, err error)
	// Classes that may be dialled and accepted.
	Classes []string
	// ResetKey lets a restarted node tell its peers at once that their
	// connections are dead (RFC 9000 §10.3); without it they find out after
	// idleTimeout. Random, secret, and kept over restarts.
	ResetKey *[32]byte
	Log      *slog.Logger
}

// Endpoint is a node's place in the cluster's network. Safe for concurrent use.
type Endpoint struct {
	cfg    EndpointConfig
	log    *slog.Logger
	quic   *quic.Transport
	ln     *quic.Listener
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	handshakes atomic.Int64

	mu struct {
		sync.Mutex
		listeners map[string]*Listener           // by class
		accepted  map[peerClass][]*quic.Conn     // oldest first
		dialled   map[dialKey]*dialled           // kept while in use or alive
		peers     map[*quic.Conn]peerCertificate // of accepted and dialled
		closed    bool
	}
}

type peerClass struct{ peer, class string }

type dialKey struct{ class, addr, peer string }

type peerCertificate struct {
	name  string
	leaf  *x509.Certificate
	class string
	own   *x509.Certificate // that we dialled with; nil for accepted connections
	// retired: nobody gets a new stream here; it is closed after retireGrace.
	retired bool
}

// expires is when the connection must be gone.
func (p peerCertificate) expires() time.Time {
	if p.own != nil && p.own.NotAfter.Before(p.leaf.NotAfter) {
		return p.own.NotAfter
	}
	return p.leaf.NotAfter
}

// dialled is the one connection to a class, address and peer.
type dialled struct {
	sync.Mutex            // held while dialling: one at a time
	conn       *quic.Conn // guarded by Endpoint.mu
}

// Listen starts an Endpoint on its socket.
func Listen(cfg EndpointConfig) (*Endpoint, error) {
	if cfg.UDPConn == nil || cfg.Certificate == nil || cfg.Roots == nil || cfg.Authorize == nil || len(cfg.Classes) == 0 {
		return nil, errors.New("transport.Listen: incomplete configuration")
	}
	e := &Endpoint{cfg: cfg, log: cfg.Log}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	e.mu.listeners = make(map[string]*Listener)
	e.mu.accepted = make(map[peerClass][]*quic.Conn)
	e.mu.dialled = make(map[dialKey]*dialled)
	e.mu.peers = make(map[*quic.Conn]peerCertificate)
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.quic = &quic.Transport{
		Conn:                cfg.UDPConn,
		VerifySourceAddress: func(net.Addr) bool { return e.handshakes.Load() >= retryHandshakes },
		ConnContext:         e.admit,
	}
	if cfg.ResetKey != nil {
		k := quic.StatelessResetKey(*cfg.ResetKey)
		e.quic.StatelessResetKey = &k
	}
	ln, err := e.quic.Listen(e.tlsConfig("", ""), quicConfig())
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", cfg.UDPConn.LocalAddr(), err)
	}
	e.ln = ln
	e.wg.Go(e.acceptLoop)
	e.wg.Go(e.watchLives)
	return e, nil
}

func quicConfig() *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout:  handshakeTimeout,
		MaxIdleTimeout:        idleTimeout,
		KeepAlivePeriod:       keepAlive,
		MaxIncomingStreams:    maxStreams,
		MaxIncomingUniStreams: -1,
		Allow0RTT:             false,
	}
}

// admit counts unfinished handshakes and refuses too many.
func (e *Endpoint) admit(ctx context.Context, _ *quic.ClientInfo) (context.Context, error) {
	if e.handshakes.Add(1) > maxHandshakes {
		e.handshakes.Add(-1)
		return nil, errors.New("too many handshakes")
	}
	var once sync.Once
	done := func() { once.Do(func() { e.handshakes.Add(-1) }) }
	context.AfterFunc(ctx, done)
	return context.WithValue(ctx, handshakeDone{}, done), nil
}

type handshakeDone struct{}

// tlsConfig is the same for both sides. crypto/tls's own check wants a host
// name; ours wants the authorities, the owner's consent and, when dialling,
// the peer meant. It is made in VerifyConnection, which crypto/tls calls on
// every handshake; there is no resumption and so no 0-RTT.
func (e *Endpoint) tlsConfig(dialClass, wantPeer string) *tls.Config {
	c := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             e.cfg.Classes,
		ClientAuth:             tls.RequireAnyClientCert,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return e.cfg.Certificate() },
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return e.cfg.Certificate() },
		InsecureSkipVerify:     true, // see above
	}
	usage := x509.ExtKeyUsageClientAuth
	if dialClass != "" {
		c.NextProtos = []string{dialClass}
		usage = x509.ExtKeyUsageServerAuth
	}
	c.VerifyConnection = func(s tls.ConnectionState) error {
		peer, _, err := e.identify(s, usage)
		if err == nil && wantPeer != "" && peer != wantPeer {
			err = fmt.Errorf("%w: %q, not %q", ErrWrongPeer, peer, wantPeer)
		}
		return err
	}
	return c
}

func (e *Endpoint) identify(s tls.ConnectionState, usage x509.ExtKeyUsage) (peer string, leaf *x509.Certificate, err error) {
	if len(s.PeerCertificates) == 0 {
		return "", nil, fmt.Errorf("%w: no certificate", ErrUnauthorized)
	}
	if !slices.Contains(e.cfg.Classes, s.NegotiatedProtocol) {
		return "", nil, fmt.Errorf("%w: class %q", ErrUnauthorized, s.NegotiatedProtocol)
	}
	leaf = s.PeerCertificates[0]
	o := x509.VerifyOptions{Roots: e.cfg.Roots(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{usage}}
	for _, c := range s.PeerCertificates[1:] {
		o.Intermediates.AddCert(c)
	}
	if o.Roots == nil { // x509 would take the system's
		return "", nil, fmt.Errorf("%w: no authorities yet", ErrUnauthorized)
	}
	if _, err := leaf.Verify(o); err != nil {
		return "", nil, fmt.Errorf("%w: %w", ErrUnauthorized, err)
	}
	peer, err = e.cfg.Authorize(s.NegotiatedProtocol, leaf)
	if err == nil && peer == "" {
		err = errors.New("no name")
	}
	if err != nil {
		return "", nil, fmt.Errorf("%w: %w", ErrUnauthorized, err)
	}
	return peer, leaf, nil
}

// Addr is the socket's address.
func (e *Endpoint) Addr() net.Addr { return e.cfg.UDPConn.LocalAddr() }

// Close ends all connections and waits for what the Endpoint started.
func (e *Endpoint) Close() error {
	e.mu.Lock()
	if e.mu.closed {
		e.mu.Unlock()
		return nil
	}
	e.mu.closed = true
	for c := range e.mu.peers {
		c.CloseWithError(codeClosed, "")
	}
	for _, l := range e.mu.listeners {
		l.stop()
	}
	e.mu.Unlock()
	e.cancel()
	err := e.ln.Close()
	err = errors.Join(err, e.quic.Close(), e.cfg.UDPConn.Close())
	e.wg.Wait()
	return err
}

// Disconnect ends all connections from and to a peer, of any class: after its
// removal.
func (e *Endpoint) Disconnect(peer string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for c, p := range e.mu.peers {
		if p.name == peer {
			c.CloseWithError(codeUnauthorized, "removed")
		}
	}
}

// Recheck looks at all connections again, after certificates have changed: one
// that was dialled with another certificate than ours of now, or whose peer
// Authorize refuses now, is replaced. What is under way on it has a few seconds.
func (e *Endpoint) Recheck() {
	var own *x509.Certificate
	if cert, err := e.cfg.Certificate(); err == nil {
		own = cert.Leaf
	}
	e.retire(func(p peerCertificate) bool {
		if p.own != nil && own != nil && !p.own.Equal(own) {
			return true
		}
		_, err := e.cfg.Authorize(p.class, p.leaf)
		return err != nil
	})
}

// watchLives replaces connections before a certificate they rest on ends, and
// closes those that are left then: nobody else looks at a live connection's.
func (e *Endpoint) watchLives() {
	tick := time.NewTicker(lifeCheck)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-e.ctx.Done():
			return
		}
		now := time.Now()
		e.retire(func(p peerCertificate) bool {
			// The side that dials makes room for a new connection in good time.
			if p.own == nil {
				return now.After(p.expires().Add(-retireGrace))
			}
			return now.After(p.expires().Add(-retireBefore))
		})
	}
}

// retire takes connections out of use and closes them after retireGrace.
func (e *Endpoint) retire(which func(peerCertificate) bool) {
	e.mu.Lock()
	all := make(map[*quic.Conn]peerCertificate, len(e.mu.peers))
	for c, p := range e.mu.peers {
		if !p.retired {
			all[c] = p
		}
	}
	e.mu.Unlock()
	for c, p := range all {
		if !which(p) { // asks the owner: not under our lock
			continue
		}
		e.mu.Lock()
		if p, there := e.mu.peers[c]; there {
			p.retired = true
			e.mu.peers[c] = p
			for k, d := range e.mu.dialled {
				if d.conn == c {
					d.conn = nil
					delete(e.mu.dialled, k)
				}
			}
		}
		e.mu.Unlock()
		time.AfterFunc(retireGrace, func() { c.CloseWithError(codeClosed, "certificate replaced") })
	}
}

func (e *Endpoint) acceptLoop() {
	for {
		c, err := e.ln.Accept(e.ctx)
		if err != nil {
			return // closed
		}
		if done, ok := c.Context().Value(handshakeDone{}).(func()); ok {
			done()
		}
		e.wg.Go(func() { e.serve(c) })
	}
}

// serve hands a connection's streams to its class's listener until it ends.
func (e *Endpoint) serve(c *quic.Conn) {
	s := c.ConnectionState().TLS
	peer, leaf, err := e.identify(s, x509.ExtKeyUsageClientAuth)
	if err != nil {
		c.CloseWithError(codeUnauthorized, "")
		return
	}
	class := s.NegotiatedProtocol
	if !e.track(c, peerClass{peer, class}, peerCertificate{name: peer, leaf: leaf, class: class}) {
		return
	}
	defer e.untrack(c, peerClass{peer, class})
	for {
		st, err := c.AcceptStream(e.ctx)
		if err != nil {
			c.CloseWithError(codeClosed, "")
			return
		}
		conn := newConn(c, st, peer, leaf)
		e.mu.Lock()
		l := e.mu.listeners[class]
		e.mu.Unlock()
		if l == nil || !l.deliver(c, conn) {
			conn.Close()
			c.CloseWithError(codeNotServed, "class is not served")
			return
		}
	}
}

func (e *Endpoint) track(c *quic.Conn, k peerClass, p peerCertificate) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.mu.closed || e.mu.listeners[k.class] == nil {
		c.CloseWithError(codeNotServed, "class is not served")
		return false
	}
	if cs := e.mu.accepted[k]; len(cs) >= maxConnsPerPeer {
		cs[0].CloseWithError(codeTooMany, "too many connections") // the oldest: most likely left behind
		e.mu.accepted[k] = cs[1:]
	}
	e.mu.accepted[k] = append(e.mu.accepted[k], c)
	e.mu.peers[c] = p
	return true
}

func (e *Endpoint) untrack(c *quic.Conn, k peerClass) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.mu.peers, c)
	cs := slices.DeleteFunc(e.mu.accepted[k], func(o *quic.Conn) bool { return o == c })
	if e.mu.accepted[k] = cs; len(cs) == 0 {
		delete(e.mu.accepted, k)
	}
}

// Dial opens a stream of a class to the node at addr (host:port), over the
// connection there is or a new one. With peer not empty, it must be that
// node's name. The other side's Accept returns when the first bytes arrive:
// the dialling side speaks first.
func (e *Endpoint) Dial(ctx context.Context, class, addr, peer string) (net.Conn, error) {
	if !slices.Contains(e.cfg.Classes, class) {
		return nil, fmt.Errorf("dial %s: unknown class %q", addr, class)
	}
	if err := reachable(ctx, class); err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	for attempt := 0; ; attempt++ {
		c, fresh, err := e.connection(ctx, dialKey{class, addr, peer})
		if err != nil {
			return nil, fmt.Errorf("dial %s: %w", addr, err)
		}
		st, err := c.OpenStreamSync(ctx)
		if err == nil {
			e.mu.Lock()
			p := e.mu.peers[c]
			e.mu.Unlock()
			if p.leaf == nil { // ended meanwhile
				st.CancelWrite(0)
				st.CancelRead(0)
				err = net.ErrClosed
			} else {
				return newConn(c, st, p.name, p.leaf), nil
			}
		}
		// A connection kept from earlier may have died: once more with a new one.
		if fresh || attempt > 0 || ctx.Err() != nil {
			return nil, fmt.Errorf("dial %s: open a stream: %w", addr, err)
		}
	}
}

// connection returns the live connection for k, dialling it if need be.
func (e *Endpoint) connection(ctx context.Context, k dialKey) (c *quic.Conn, fresh bool, err error) {
	e.mu.Lock()
	if e.mu.closed {
		e.mu.Unlock()
		return nil, false, ErrClosed
	}
	d := e.mu.dialled[k]
	if d == nil {
		d = new(dialled)
		e.mu.dialled[k] = d
	}
	e.mu.Unlock()

	d.Lock()
	defer d.Unlock()
	e.mu.Lock()
	c = d.conn
	e.mu.Unlock()
	if c != nil && c.Context().Err() == nil {
		return c, false, nil
	}
	c, err = e.dial(ctx, k, d)
	if err != nil {
		e.forget(k, d, nil)
		return nil, false, err
	}
	context.AfterFunc(c.Context(), func() { e.forget(k, d, c) })
	return c, true, nil
}

func (e *Endpoint) dial(ctx context.Context, k dialKey, d *dialled) (*quic.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	udp, err := resolve(ctx, k.addr)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	var own *x509.Certificate
	conf := e.tlsConfig(k.class, k.peer)
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert, err := e.cfg.Certificate()
		if err == nil {
			own = cert.Leaf
		}
		return cert, err
	}
	c, err := e.quic.Dial(ctx, udp, conf, quicConfig())
	if err != nil {
		return nil, err
	}
	name, leaf, err := e.identify(c.ConnectionState().TLS, x509.ExtKeyUsageServerAuth)
	if err != nil {
		c.CloseWithError(codeUnauthorized, "")
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.mu.closed {
		c.CloseWithError(codeClosed, "")
		return nil, ErrClosed
	}
	e.mu.peers[c] = peerCertificate{name: name, leaf: leaf, class: k.class, own: own}
	d.conn = c
	return c, nil
}

// forget drops a dead connection and its place in the map unless someone has
// dialled anew.
func (e *Endpoint) forget(k dialKey, d *dialled, c *quic.Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.mu.peers, c)
	if d.conn == c {
		d.conn = nil
	}
	if e.mu.dialled[k] == d && d.conn == nil {
		delete(e.mu.dialled, k)
	}
}

// resolve looks up the first address of host:port.
func resolve(ctx context.Context, addr string) (*net.UDPAddr, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("port %q: %w", port, err)
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			return nil, err
		}
		ip = ips[0].Unmap()
	}
	return net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, uint16(n))), nil
}

// Listener accepts the streams of one class. It is a net.Listener.
type Listener struct {
	e     *Endpoint
	class string
	conns chan *Conn
	done  chan struct{}
	once  sync.Once
}

// Listener starts to accept a class; before it, and after the listener's
// Close, its connections are refused. A class has one listener at a time: a
// second one takes the place of the first.
func (e *Endpoint) Listener(class string) *Listener {
	l := &Listener{e: e, class: class, conns: make(chan *Conn, acceptBacklog), done: make(chan struct{})}
	e.mu.Lock()
	defer e.mu.Unlock()
	if old := e.mu.listeners[class]; old != nil {
		old.stop()
	}
	if e.mu.closed {
		l.stop()
		return l
	}
	e.mu.listeners[class] = l
	return l
}

// deliver waits for room in the backlog; it is false when the listener or the
// connection ended.
func (l *Listener) deliver(c *quic.Conn, conn *Conn) bool {
	select {
	case l.conns <- conn:
		return true
	case <-l.done:
	case <-c.Context().Done():
	}
	return false
}

// Accept returns the next stream, a *Conn.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, ErrClosed
	default:
	}
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, ErrClosed
	}
}

func (l *Listener) stop() { l.once.Do(func() { close(l.done) }) }

// Close stops accepting and ends the class's accepted connections with all
// their streams. Dialled ones stay.
func (l *Listener) Close() error {
	l.stop()
	l.e.mu.Lock()
	defer l.e.mu.Unlock()
	if l.e.mu.listeners[l.class] != l {
		return nil
	}
	delete(l.e.mu.listeners, l.class)
	for k, cs := range l.e.mu.accepted {
		if k.class == l.class {
			for _, c := range cs {
				c.CloseWithError(codeNotServed, "class is not served any more")
			}
		}
	}
	return nil
}

// Addr is the endpoint's.
func (l *Listener) Addr() net.Addr { return l.e.Addr() }

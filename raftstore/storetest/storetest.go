// Package storetest has what tests of replicated things need: a certificate
// authority, endpoints on loopback, and clusters of stores in one process
// whose nodes can be stopped, started and cut off.
package storetest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// CA is a certificate authority for tests.
type CA struct {
	Cert *x509.Certificate
	Key  *ecdsa.PrivateKey
}

// NewCA makes an authority.
func NewCA(t testing.TB) *CA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return &CA{c, key}
}

// Pool has the authority alone.
func (ca *CA) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(ca.Cert)
	return p
}

// Issue makes a node certificate with the name as common name and DNS name,
// for client and server, valid for loopback.
func (ca *CA) Issue(t testing.TB, name string) *tls.Certificate {
	t.Helper()
	return ca.IssueUntil(t, name, time.Now().Add(24*time.Hour))
}

// IssueUntil is Issue for a certificate that ends at a time.
func (ca *CA) IssueUntil(t testing.TB, name string, end time.Time) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name, "localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: end,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, ca.Cert, key.Public(), ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// Network is a UDP socket on loopback that can be cut off: silently, as a cut
// cable is.
type Network struct {
	net.PacketConn
	Cut atomic.Bool
}

// ListenUDP opens a socket at addr, 127.0.0.1:0 for any port.
func ListenUDP(t testing.TB, addr string) *Network {
	t.Helper()
	var err error
	for range 50 { // the port of a node just stopped may take a moment
		var c net.PacketConn
		if c, err = net.ListenPacket("udp", addr); err == nil {
			return &Network{PacketConn: c}
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal(err)
	return nil
}

// WriteTo drops while cut.
func (n *Network) WriteTo(b []byte, a net.Addr) (int, error) {
	if n.Cut.Load() {
		return len(b), nil
	}
	return n.PacketConn.WriteTo(b, a)
}

// ReadFrom drops while cut.
func (n *Network) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		k, a, err := n.PacketConn.ReadFrom(b)
		if err != nil || !n.Cut.Load() {
			return k, a, err
		}
	}
}

// Endpoint starts an endpoint for the node named in cert, on n. It accepts
// every certificate of ca and takes the common name as the peer's.
func Endpoint(t testing.TB, ca *CA, cert *tls.Certificate, n net.PacketConn, resetKey *[32]byte) *transport.Endpoint {
	t.Helper()
	e, err := transport.Listen(transport.EndpointConfig{
		UDPConn:     n,
		Certificate: func() (*tls.Certificate, error) { return cert, nil },
		Roots:       ca.Pool,
		Authorize:   func(_ string, leaf *x509.Certificate) (string, error) { return leaf.Subject.CommonName, nil },
		Classes:     transport.Classes,
		ResetKey:    resetKey,
		Log:         Logger(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// Logger writes to standard error when the environment has STORETEST_LOG, and
// nowhere otherwise.
func Logger(testing.TB) *slog.Logger {
	if os.Getenv("STORETEST_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Node is a node of a Cluster.
type Node struct {
	Name, Addr, Dir string
	Cert            *tls.Certificate
	Network         *Network
	Endpoint        *transport.Endpoint
	Store           *raftstore.Store // nil while stopped

	resetKey [32]byte
	crashing sync.WaitGroup
}

// Cluster is stores in one process. Its methods fail the test when they cannot
// do what they say.
type Cluster struct {
	CA    *CA
	Nodes []*Node

	t    testing.TB
	conf func(*raftstore.Config)
	bare bool
}

// New starts n nodes named n1, n2 … as one cluster and waits for a leader. conf
// may change each node's configuration before it is opened; it may be nil.
func New(t testing.TB, n int, conf func(*raftstore.Config)) *Cluster {
	t.Helper()
	return start(&Cluster{CA: NewCA(t), t: t, conf: conf}, n)
}

// NewBare is New with sockets as nodes of the product have them, which cost
// less: none of these nodes can be cut off.
func NewBare(t testing.TB, n int, conf func(*raftstore.Config)) *Cluster {
	t.Helper()
	return start(&Cluster{CA: NewCA(t), t: t, conf: conf, bare: true}, n)
}

func start(c *Cluster, n int) *Cluster {
	t := c.t
	t.Helper()
	t.TempDir() // the first call says when all are removed: after close
	t.Cleanup(c.close)
	for range n {
		c.Add()
	}
	if err := c.Nodes[0].Store.Bootstrap(); err != nil {
		t.Fatal(err)
	}
	for _, m := range c.Nodes[1:] {
		c.Join(m)
	}
	c.Leader()
	return c
}

// Add starts another node that is not a member yet.
func (c *Cluster) Add() *Node {
	c.t.Helper()
	name := fmt.Sprintf("n%d", len(c.Nodes)+1)
	n := &Node{Name: name, Addr: "127.0.0.1:0", Dir: c.t.TempDir(), Cert: c.CA.Issue(c.t, name)}
	rand.Read(n.resetKey[:])
	c.Nodes = append(c.Nodes, n)
	c.Start(n)
	return n
}

// Join makes a started node a member.
func (c *Cluster) Join(n *Node) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for {
		err := c.Leader().Store.AddVoter(ctx, n.Name, n.Addr)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			c.t.Fatalf("add %s: %v", n.Name, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Start opens a stopped node where it was.
func (c *Cluster) Start(n *Node) {
	c.t.Helper()
	n.crashing.Wait()
	n.Network = ListenUDP(c.t, n.Addr)
	n.Addr = n.Network.LocalAddr().String()
	socket := net.PacketConn(n.Network)
	if c.bare {
		socket = n.Network.PacketConn
	}
	n.Endpoint = Endpoint(c.t, c.CA, n.Cert, socket, &n.resetKey)
	cfg := raftstore.Config{Dir: n.Dir, NodeID: n.Name, Addr: n.Addr, Endpoint: n.Endpoint, Log: Logger(c.t).With("node", n.Name)}
	if c.conf != nil {
		c.conf(&cfg)
	}
	s, err := raftstore.Open(cfg)
	if err != nil {
		n.Endpoint.Close()
		c.t.Fatalf("open %s: %v", n.Name, err)
	}
	n.Store = s
}

// Stop closes a node as an operator does.
func (c *Cluster) Stop(n *Node) {
	c.t.Helper()
	if err := errors.Join(n.Store.Close(), n.Endpoint.Close()); err != nil {
		c.t.Fatalf("stop %s: %v", n.Name, err)
	}
	n.Store = nil
}

// Crash takes a node away without a word to the others. Its goroutines end in
// the background; Start waits for them.
func (c *Cluster) Crash(n *Node) {
	n.Network.Cut.Store(true)
	s, e := n.Store, n.Endpoint
	n.Store = nil
	n.crashing.Go(func() {
		e.Close()
		s.Close()
	})
}

// Leader waits for a running node that is the leader and can commit.
func (c *Cluster) Leader() *Node {
	c.t.Helper()
	end := time.Now().Add(20 * time.Second)
	for time.Now().Before(end) {
		for _, n := range c.Nodes {
			if n.Store == nil || !n.Store.IsLeader() || n.Network.Cut.Load() {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			err := n.Store.Barrier(ctx)
			cancel()
			if err == nil {
				return n
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Fatal("no leader within 20 s")
	return nil
}

// Followers are the running nodes but the leader.
func (c *Cluster) Followers() []*Node {
	c.t.Helper()
	l := c.Leader()
	var ns []*Node
	for _, n := range c.Nodes {
		if n.Store != nil && n != l {
			ns = append(ns, n)
		}
	}
	return ns
}

// Append appends at whoever is the leader, again after an unknown outcome or a
// change of leader.
func (c *Cluster) Append(batch ...event.Proposal) []event.Event {
	c.t.Helper()
	end := time.Now().Add(20 * time.Second)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		events, err := c.Leader().Store.Append(ctx, batch...)
		cancel()
		var not *raftstore.NotLeaderError
		again := errors.Is(err, raftstore.ErrUnknownOutcome) || errors.Is(err, raftstore.ErrNoLeader) ||
			errors.Is(err, raftstore.ErrBusy) || errors.As(err, &not)
		if err == nil {
			return events
		}
		if !again || time.Now().After(end) {
			c.t.Fatalf("append: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Converge waits until all running nodes have the leader's events, and checks
// that they are the same.
func (c *Cluster) Converge() {
	c.t.Helper()
	seq, _, chain := c.Leader().Store.Head()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, n := range c.Nodes {
		if n.Store == nil {
			continue
		}
		if err := n.Store.WaitSeq(ctx, seq); err != nil {
			c.t.Fatalf("%s did not reach event %d: %v; %+v", n.Name, seq, err, n.Store.Status())
		}
		es, err := n.Store.Events(seq, 1)
		if err != nil {
			c.t.Fatal(err)
		}
		if seq > 0 && es[0].Chain != chain {
			c.t.Fatalf("%s has another chain at event %d", n.Name, seq)
		}
	}
}

func (c *Cluster) close() {
	for _, n := range c.Nodes {
		if n.Store != nil {
			c.Crash(n) // no elections on the way out
		}
	}
	for _, n := range c.Nodes {
		n.crashing.Wait()
	}
}

// Proposal is a valid one on an aggregate of approvals, with a random id.
func Proposal(aggregate string, expect uint64, payload string) event.Proposal {
	return event.Proposal{
		ID: event.NewID(), Type: event.TypeApprovalAsked, Version: 1,
		Actor:     event.Actor{Principal: "test", Kind: event.Service, Authn: "oidc"},
		Aggregate: aggregate, Expect: expect, Payload: []byte(payload),
	}
}

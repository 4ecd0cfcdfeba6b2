// Package recordingtest has what tests of recordings share: a certificate
// authority with nodes, and a store whose every step can be made to fail.
package recordingtest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/recording"
)

// CA is a certificate authority.
type CA struct {
	Cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// Node is a node's key and certificate.
type Node struct {
	Name string
	Key  *ecdsa.PrivateKey
	Cert []byte // DER
}

// NewCA makes an authority.
func NewCA(t testing.TB) *CA {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &CA{Cert: cert, key: key}
}

// Pool returns the authority as roots to verify with.
func (ca *CA) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(ca.Cert)
	return p
}

// Node issues a node's certificate: its name is the common name and a DNS name.
func (ca *CA) Node(t testing.TB, name string) *Node {
	t.Helper()
	key := newKey(t)
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	return &Node{Name: name, Key: key, Cert: der}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Step is one thing a Store is about to do, or has done.
type Step struct {
	Op   string // "put" or "get"
	Key  string
	Done bool // after the inner store did it
}

// FaultStore passes everything on to a Store, asking a function before and
// after each Put and Get whether that step fails.
type FaultStore struct {
	recording.Store
	mu    sync.Mutex
	fault func(Step) error
}

// Fault sets the function; nil lets everything pass.
func (s *FaultStore) Fault(f func(Step) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

func (s *FaultStore) step(st Step) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fault == nil {
		return nil
	}
	return s.fault(st)
}

func (s *FaultStore) Put(ctx context.Context, key string, data []byte) error {
	if err := s.step(Step{"put", key, false}); err != nil {
		return err
	}
	if err := s.Store.Put(ctx, key, data); err != nil {
		return err
	}
	return s.step(Step{"put", key, true})
}

func (s *FaultStore) Get(ctx context.Context, key string) ([]byte, error) {
	if err := s.step(Step{"get", key, false}); err != nil {
		return nil, err
	}
	b, err := s.Store.Get(ctx, key)
	if err != nil {
		return nil, err
	}
	return b, s.step(Step{"get", key, true})
}

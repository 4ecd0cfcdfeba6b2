package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func mustCA(t *testing.T, now time.Time) *CA {
	t.Helper()
	ca, err := NewCA("acme", now)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func mustParse(t *testing.T, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func mustNode(t *testing.T, ca *CA, cluster, role, name string, now time.Time) *x509.Certificate {
	t.Helper()
	key, err := NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	sans, err := ParseSANs([]string{"db.example.com:6432"}, true)
	if err != nil {
		t.Fatal(err)
	}
	der, err := ca.SignNode(csr, cluster, role, name, sans, now)
	if err != nil {
		t.Fatal(err)
	}
	return mustParse(t, der)
}

func TestSignNode(t *testing.T) {
	now := time.Now()
	ca := mustCA(t, now)
	c := mustNode(t, ca, "acme", Voter, "n1", now)
	id, err := VerifyPeer(c, ca.Pool(), "acme", Gateway, Voter)
	if err != nil || id != (Identity{"acme", Voter, "n1"}) {
		t.Fatalf("got %v, %v", id, err)
	}
	if got := c.URIs[0].String(); got != "sallyport://acme/voter/n1" {
		t.Errorf("URI %s", got)
	}
	for _, host := range []string{"db.example.com", "localhost", "127.0.0.1", "::1"} {
		if _, err := c.Verify(x509.VerifyOptions{Roots: ca.Pool(), DNSName: host}); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
	if c.IsCA || c.NotAfter.Sub(now) > NodeValidity+time.Second {
		t.Errorf("CA %v, valid for %v", c.IsCA, c.NotAfter.Sub(now))
	}
}

// A request that asks for names, roles or CA rights gets none of them.
func TestSignNodeIgnoresRequest(t *testing.T) {
	ca := mustCA(t, time.Now())
	key, _ := NewNodeKey()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "root"},
		DNSNames: []string{"evil.example.com"},
		URIs:     []*url.URL{{Scheme: "sallyport", Host: "acme", Path: "/admin/root"}},
		ExtraExtensions: []pkix.Extension{{ // basicConstraints CA:TRUE
			Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := ca.SignNode(csr, "acme", Voter, "n2", SANs{}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c := mustParse(t, der)
	id, err := ParseIdentity(c)
	if err != nil || id.Name != "n2" || id.Role != Voter || c.IsCA || len(c.DNSNames) != 0 || c.Subject.CommonName != "n2" {
		t.Errorf("got %v %v CA=%v DNS=%v", id, err, c.IsCA, c.DNSNames)
	}
}

func TestSignNodeRefuses(t *testing.T) {
	now := time.Now()
	ca := mustCA(t, now)
	key, _ := NewNodeKey()
	good, _ := CSR(key)
	bad := append([]byte(nil), good...)
	bad[len(bad)-1] ^= 1
	rk, _ := rsa.GenerateKey(rand.Reader, 2048)
	rsaCSR, _ := CSR(rk)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	p384CSR, _ := CSR(p384)
	for name, f := range map[string]func() error{
		"bad signature": func() error { _, e := ca.SignNode(bad, "acme", Voter, "n", SANs{}, now); return e },
		"rsa":           func() error { _, e := ca.SignNode(rsaCSR, "acme", Voter, "n", SANs{}, now); return e },
		"p384":          func() error { _, e := ca.SignNode(p384CSR, "acme", Voter, "n", SANs{}, now); return e },
		"admin role":    func() error { _, e := ca.SignNode(good, "acme", Admin, "n", SANs{}, now); return e },
		"no role":       func() error { _, e := ca.SignNode(good, "acme", "", "n", SANs{}, now); return e },
		"slash in name": func() error { _, e := ca.SignNode(good, "acme", Voter, "a/b", SANs{}, now); return e },
		"dots":          func() error { _, e := ca.SignNode(good, "acme", Voter, "a..b", SANs{}, now); return e },
		"wildcard": func() error {
			_, e := ca.SignNode(good, "acme", Voter, "n", SANs{DNS: []string{"*.example.com"}}, now)
			return e
		},
		"too many names": func() error {
			_, e := ca.SignNode(good, "acme", Voter, "n", SANs{IPs: make([]net.IP, maxSANs+1)}, now)
			return e
		},
		"garbage": func() error { _, e := ca.SignNode([]byte("x"), "acme", Voter, "n", SANs{}, now); return e },
		"huge": func() error {
			_, e := ca.SignNode(make([]byte, maxCSRBytes+1), "acme", Voter, "n", SANs{}, now)
			return e
		},
	} {
		if f() == nil {
			t.Errorf("%s: signed", name)
		}
	}
}

func TestVerifyPeerRefuses(t *testing.T) {
	now := time.Now()
	ca, other := mustCA(t, now), mustCA(t, now)
	n := mustNode(t, ca, "acme", Voter, "n1", now)
	adminDER, _, err := ca.IssueAdmin("acme", "root", now)
	if err != nil {
		t.Fatal(err)
	}
	admin := mustParse(t, adminDER)
	if id, err := VerifyPeer(admin, ca.Pool(), "acme", Admin); err != nil || id.Name != "root" {
		t.Errorf("admin: %v %v", id, err)
	}
	check := func(name string, c *x509.Certificate, roots *x509.CertPool, cluster string, at time.Time, roles ...string) {
		t.Helper()
		if id, err := VerifyPeerAt(c, roots, cluster, at, roles...); err == nil {
			t.Errorf("%s: accepted as %v", name, id)
		}
	}
	check("nil", nil, ca.Pool(), "acme", now, Voter)
	check("no roots", n, nil, "acme", now, Voter)
	check("empty roots", n, x509.NewCertPool(), "acme", now, Voter)
	check("other CA", n, other.Pool(), "acme", now, Voter)
	check("other cluster", n, ca.Pool(), "umbrella", now, Voter)
	check("role", n, ca.Pool(), "acme", now, Admin, Gateway)
	check("admin as voter", admin, ca.Pool(), "acme", now, Voter)
	check("no roles", n, ca.Pool(), "acme", now)
	check("expired", n, ca.Pool(), "acme", now.Add(NodeValidity+time.Hour), Voter)
	check("early", n, ca.Pool(), "acme", now.Add(-time.Hour), Voter)
	check("the CA", ca.Cert, ca.Pool(), "acme", now, Voter)
}

func TestParseIdentityCanonical(t *testing.T) {
	for _, s := range []string{
		"https://acme/voter/n1", "sallyport://acme/voter", "sallyport://acme/voter/n1/x", "sallyport://acme/root/n1",
		"sallyport://u@acme/voter/n1", "sallyport://acme:1/voter/n1", "sallyport://acme/voter/n1?x", "sallyport://acme/voter/n1#x",
		"sallyport://acme/voter/%6e1", "sallyport://ACME/voter/n1", "sallyport:///voter/n1", "sallyport:acme/voter/n1", "sallyport://acme//voter/n1",
	} {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		if id, err := ParseIdentity(&x509.Certificate{URIs: []*url.URL{u}}); err == nil {
			t.Errorf("%s: read as %v", s, id)
		}
	}
	u, _ := url.Parse("sallyport://acme/voter/n1")
	if _, err := ParseIdentity(&x509.Certificate{URIs: []*url.URL{u, u}}); err == nil {
		t.Error("two URIs accepted")
	}
	if _, err := ParseIdentity(&x509.Certificate{}); err == nil {
		t.Error("no URI accepted")
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	ca := mustCA(t, time.Now())
	keyDER, err := ca.KeyDER()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LoadCA(ca.Cert.Raw, keyDER); err != nil {
		t.Error(err)
	}
	if _, err := LoadCA(mustCA(t, time.Now()).Cert.Raw, keyDER); err == nil {
		t.Error("a CA with another's key was loaded")
	}
	cert, key := filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")
	k, _ := NewNodeKey()
	for range 2 { // the second replaces the first
		if err := SaveCert(cert, ca.Cert.Raw); err != nil {
			t.Fatal(err)
		}
		if err := SaveKey(key, k); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{cert, key} {
		if fi, _ := os.Stat(p); fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v", p, fi.Mode())
		}
	}
	if c, err := LoadCert(cert); err != nil || !c.Equal(ca.Cert) {
		t.Error(err)
	}
	if k2, err := LoadKey(key); err != nil || !k2.Equal(k) {
		t.Error(err)
	}
	os.Chmod(key, 0o644)
	if _, err := LoadKey(key); err == nil || !strings.Contains(err.Error(), "chmod") {
		t.Errorf("open key file: %v", err)
	}
	if _, err := LoadCert(key); err == nil {
		t.Error("a key was loaded as certificate")
	}
	left, _ := filepath.Glob(filepath.Join(dir, ".*"))
	if len(left) != 0 {
		t.Errorf("temporary files left: %v", left)
	}
	if err := WriteFile(filepath.Join(dir, "no", "dir"), nil); err == nil {
		t.Error("wrote into a missing directory")
	}
}

func TestParseSANs(t *testing.T) {
	s, err := ParseSANs([]string{"A.example.com.", "[2001:db8::1]:6432", "10.0.0.1:1", "10.0.0.1"}, false)
	if err != nil || len(s.DNS) != 1 || s.DNS[0] != "a.example.com" || len(s.IPs) != 2 {
		t.Errorf("%v %v", s, err)
	}
	for _, h := range []string{"0.0.0.0:6432", "::", "*.example.com", "a b", "", "a/b", "-x"} {
		if _, err := ParseSANs([]string{h}, false); err == nil {
			t.Errorf("%q accepted", h)
		}
	}
}

func TestSerials(t *testing.T) {
	seen := map[string]bool{}
	for range 100 {
		n, err := newSerial()
		if err != nil || n.Cmp(big.NewInt(0)) <= 0 || n.BitLen() > 127 || seen[n.String()] {
			t.Fatalf("%v %v", n, err)
		}
		seen[n.String()] = true
	}
}

// Package pki makes and checks the certificates of a cluster: one ECDSA P-256
// certificate authority, a certificate per node, and client certificates for
// administrators. Who a certificate is for stands in its one URI:
//
//	sallyport://CLUSTER/ROLE/NAME
//
// where ROLE is voter, gateway, connector or admin. DNS names and addresses in
// it serve clients that check a host name; nothing inside the cluster trusts
// them. The package keeps no state and logs nothing; where the CA key rests is
// the caller's affair (sealed, see node/vault).
package pki

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// Roles a certificate can carry.
const (
	Voter     = "voter"
	Gateway   = "gateway"
	Connector = "connector"
	Admin     = "admin"
)

// NodeRoles are those that a node can have. A certificate says which; the
// builds before roles made all nodes voters.
var NodeRoles = []string{Voter, Gateway, Connector}

const (
	// CAValidity is how long a certificate authority lives.
	CAValidity = 10 * 365 * 24 * time.Hour
	// NodeValidity and AdminValidity are the lifetimes of what it signs; never
	// past the authority's own end. Nodes renew theirs: see CA.NodeValidity.
	NodeValidity  = 30 * 24 * time.Hour
	AdminValidity = 365 * 24 * time.Hour

	// backdate lets peers whose clocks are a little behind accept a fresh certificate.
	backdate = 5 * time.Minute

	// maxSANs bounds what a joining node can have put into its certificate.
	maxSANs = 64
	// maxCSRBytes is far above a P-256 request (about 300 bytes).
	maxCSRBytes = 8 << 10
)

const scheme = "sallyport"

// validName is what clusters, nodes and administrators may be called: it fits
// a URI segment, a DNS label, a file name and a terminal without escaping.
var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)

// ValidName reports whether s may name a cluster, a node or an administrator.
func ValidName(s string) bool { return validName.MatchString(s) && !strings.Contains(s, "..") }

func validRole(role string) bool {
	switch role {
	case Voter, Gateway, Connector, Admin:
		return true
	}
	return false
}

// CA is a certificate authority with its private key.
type CA struct {
	Cert *x509.Certificate
	// NodeValidity is how long nodes' certificates live; zero means the constant.
	NodeValidity time.Duration
	key          *ecdsa.PrivateKey
}

// NewCA makes a self-signed authority for the cluster, valid from now for CAValidity.
func NewCA(cluster string, now time.Time) (*CA, error) {
	if !ValidName(cluster) {
		return nil, fmt.Errorf("pki: %q cannot name a cluster: use a-z, 0-9, dot, dash and underscore, at most 63", cluster)
	}
	key, err := NewNodeKey()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"Sallyport"}, CommonName: "Sallyport CA " + cluster},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(CAValidity),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("pki: make CA: %w", err)
	}
	return parseCA(der, key)
}

// LoadCA puts an authority together from its certificate and PKCS#8 key, both DER.
func LoadCA(certDER, keyDER []byte) (*CA, error) {
	key, err := ParseKey(keyDER)
	if err != nil {
		return nil, err
	}
	return parseCA(certDER, key)
}

func parseCA(der []byte, key *ecdsa.PrivateKey) (*CA, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("pki: parse CA certificate: %w", err)
	}
	if !cert.IsCA || !cert.BasicConstraintsValid {
		return nil, errors.New("pki: certificate is not a certificate authority's")
	}
	if pub, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key.Public()) {
		return nil, errors.New("pki: CA certificate and key do not belong together")
	}
	return &CA{Cert: cert, key: key}, nil
}

// KeyDER is the authority's private key as PKCS#8 DER, to be sealed.
func (ca *CA) KeyDER() ([]byte, error) { return x509.MarshalPKCS8PrivateKey(ca.key) }

// Pool holds the authority's certificate as the only root.
func (ca *CA) Pool() *x509.CertPool { return Pool(ca.Cert.Raw) }

// SANs are the names under which clients reach a node.
type SANs struct {
	DNS []string
	IPs []net.IP
}

// ParseSANs sorts hosts (names, addresses, or either with a port) into SANs.
// With loopback it adds localhost, 127.0.0.1 and ::1.
func ParseSANs(hosts []string, loopback bool) (SANs, error) {
	var s SANs
	seen := map[string]bool{}
	if loopback {
		hosts = append(append([]string(nil), hosts...), "localhost", "127.0.0.1", "::1")
	}
	for _, h := range hosts {
		if host, _, err := net.SplitHostPort(h); err == nil {
			h = host
		}
		h = strings.TrimSuffix(strings.ToLower(strings.Trim(h, "[]")), ".")
		if seen[h] {
			continue
		}
		seen[h] = true
		if ip := net.ParseIP(h); ip != nil {
			if ip.IsUnspecified() {
				return SANs{}, fmt.Errorf("pki: %s is not an address that clients can dial; advertise a real one", h)
			}
			s.IPs = append(s.IPs, ip)
			continue
		}
		if !validDNS(h) {
			return SANs{}, fmt.Errorf("pki: %q is neither a DNS name nor an IP address", h)
		}
		s.DNS = append(s.DNS, h)
	}
	return s, s.check()
}

func (s SANs) check() error {
	if n := len(s.DNS) + len(s.IPs); n > maxSANs {
		return fmt.Errorf("pki: %d names for one node; at most %d", n, maxSANs)
	}
	for _, d := range s.DNS {
		if !validDNS(d) {
			return fmt.Errorf("pki: %q is not a DNS name a node may have", d)
		}
	}
	return nil
}

var dnsLabel = regexp.MustCompile(`^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?$`)

// validDNS takes plain host names; wildcards are for nobody.
func validDNS(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !dnsLabel.MatchString(label) {
			return false
		}
	}
	return true
}

// NewNodeKey makes a P-256 private key.
func NewNodeKey() (*ecdsa.PrivateKey, error) {
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

// CSR is a certificate request for key, DER. It carries the public key and
// proves possession of the private one; it asks for no names, since the signer
// would not listen.
func CSR(key crypto.Signer) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
}

// SignNode issues the certificate of a node, connector or gateway: server and
// client authentication, ca.NodeValidity from now. From the request it takes the
// public key alone; role, name and sans are what the caller decided.
func (ca *CA) SignNode(csrDER []byte, cluster, role, name string, sans SANs, now time.Time) ([]byte, error) {
	if role == Admin {
		return nil, errors.New("pki: a node cannot have the role admin")
	}
	if len(csrDER) > maxCSRBytes {
		return nil, errors.New("pki: certificate request is too large")
	}
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		return nil, fmt.Errorf("pki: parse certificate request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("pki: certificate request is not signed by its own key: %w", err)
	}
	pub, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, errors.New("pki: certificate request does not carry an ECDSA P-256 key")
	}
	if err := sans.check(); err != nil {
		return nil, err
	}
	return ca.sign(pub, cluster, role, name, sans, now, cmp.Or(ca.NodeValidity, NodeValidity),
		x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth)
}

// IssueAdmin makes a client certificate (DER) and its key for an administrator.
func (ca *CA) IssueAdmin(cluster, name string, now time.Time) ([]byte, *ecdsa.PrivateKey, error) {
	key, err := NewNodeKey()
	if err != nil {
		return nil, nil, err
	}
	der, err := ca.sign(&key.PublicKey, cluster, Admin, name, SANs{}, now, AdminValidity, x509.ExtKeyUsageClientAuth)
	return der, key, err
}

func (ca *CA) sign(pub *ecdsa.PublicKey, cluster, role, name string, sans SANs, now time.Time, validity time.Duration, usage ...x509.ExtKeyUsage) ([]byte, error) {
	id := Identity{Cluster: cluster, Role: role, Name: name}
	if err := id.check(); err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	end := now.Add(validity)
	if end.After(ca.Cert.NotAfter) {
		end = ca.Cert.NotAfter
	}
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"Sallyport"}, CommonName: name},
		NotBefore:             now.Add(-backdate),
		NotAfter:              end,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           usage,
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{id.uri()},
		DNSNames:              sans.DNS,
		IPAddresses:           sans.IPs,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, pub, ca.key)
	if err != nil {
		return nil, fmt.Errorf("pki: sign %s: %w", id, err)
	}
	return der, nil
}

// Issued is when a certificate of this package was made.
func Issued(c *x509.Certificate) time.Time { return c.NotBefore.Add(backdate) }

// RenewAt is when a node renews its certificate: at two thirds of its life.
func RenewAt(c *x509.Certificate) time.Time {
	issued := Issued(c)
	return issued.Add(c.NotAfter.Sub(issued) * 2 / 3)
}

// Identity is who a certificate is for.
type Identity struct{ Cluster, Role, Name string }

func (id Identity) String() string { return id.uri().String() }

func (id Identity) uri() *url.URL {
	return &url.URL{Scheme: scheme, Host: id.Cluster, Path: "/" + id.Role + "/" + id.Name}
}

func (id Identity) check() error {
	switch {
	case !ValidName(id.Cluster):
		return fmt.Errorf("pki: %q cannot name a cluster", id.Cluster)
	case !validRole(id.Role):
		return fmt.Errorf("pki: there is no role %q", id.Role)
	case !ValidName(id.Name):
		return fmt.Errorf("pki: %q is not a name: use a-z, 0-9, dot, dash and underscore, at most 63", id.Name)
	}
	return nil
}

// ParseIdentity reads the identity a certificate carries. It does not say that
// anyone vouches for it: see VerifyPeer.
func ParseIdentity(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 {
		return Identity{}, fmt.Errorf("pki: certificate has %d URIs, not the one that names a member of a cluster", len(cert.URIs))
	}
	u := cert.URIs[0]
	parts := strings.Split(u.Path, "/")
	if u.Scheme != scheme || len(parts) != 3 || parts[0] != "" {
		return Identity{}, errors.New("pki: certificate's URI does not name a member of a cluster")
	}
	id := Identity{Cluster: u.Host, Role: parts[1], Name: parts[2]}
	if err := id.check(); err != nil {
		return Identity{}, err
	}
	// One spelling only: no user, query, fragment, port or escapes.
	if u.String() != id.String() {
		return Identity{}, errors.New("pki: certificate's URI is not in its canonical form")
	}
	return id, nil
}

// CheckNode says whether a certificate is the named node's, for whoever
// verifies what nodes sign. Whose authority signed it is checked elsewhere.
func CheckNode(cert *x509.Certificate, name string) error {
	id, err := ParseIdentity(cert)
	if err != nil {
		return err
	}
	if id.Name != name || id.Role == Admin {
		return fmt.Errorf("the certificate is of %s, not of node %s", id, name)
	}
	return nil
}

// VerifyPeer checks that cert is signed by roots, valid now, of this cluster
// and of one of roles (at least one must be given), and says who it is.
func VerifyPeer(cert *x509.Certificate, roots *x509.CertPool, cluster string, roles ...string) (Identity, error) {
	return VerifyPeerAt(cert, roots, cluster, time.Now(), roles...)
}

// VerifyPeerAt is VerifyPeer as of the time at.
func VerifyPeerAt(cert *x509.Certificate, roots *x509.CertPool, cluster string, at time.Time, roles ...string) (Identity, error) {
	if cert == nil || roots == nil {
		return Identity{}, errors.New("pki: no certificate, or no authority to check it against")
	}
	// Every certificate the authority signs may authenticate a client; nodes'
	// may also serve. A CA certificate itself may do neither.
	if cert.IsCA {
		return Identity{}, errors.New("pki: a certificate authority is not a peer")
	}
	if _, err := cert.Verify(x509.VerifyOptions{
		Roots: roots, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}); err != nil {
		return Identity{}, fmt.Errorf("pki: peer's certificate: %w", err)
	}
	id, err := ParseIdentity(cert)
	if err != nil {
		return Identity{}, err
	}
	if id.Cluster != cluster {
		return Identity{}, fmt.Errorf("pki: peer %s is not of cluster %s", id, cluster)
	}
	for _, r := range roles {
		if id.Role == r {
			return id, nil
		}
	}
	return Identity{}, fmt.Errorf("pki: peer %s has not the role %s", id, strings.Join(roles, " or "))
}

// CAHash is the SHA-256 of the authority's certificate, by which a join token
// pins it.
func CAHash(caDER []byte) [32]byte { return sha256.Sum256(caDER) }

// Fingerprint is the SHA-256 of a certificate's DER in hex, as events name it.
func Fingerprint(certDER []byte) string {
	h := sha256.Sum256(certDER)
	return hex.EncodeToString(h[:])
}

// Pool holds the given CA certificates (DER); what does not parse is left out,
// so that a damaged certificate trusts nobody.
func Pool(caDER ...[]byte) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, der := range caDER {
		if c, err := x509.ParseCertificate(der); err == nil {
			pool.AddCert(c)
		}
	}
	return pool
}

func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return nil, err
	}
	b[0] &= 0x7f // positive, at most 16 octets (RFC 5280 §4.1.2.2)
	b[0] |= 0x40
	return new(big.Int).SetBytes(b), nil
}

package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/config"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/raftstore/event"
)

// Files of a data directory, besides node.yaml.
const (
	raftDirName   = "raft"           // the event store
	nodeKeyFile   = "node.key"       // the node's private key, TLS and signatures of recordings
	nodeCertFile  = "node.crt"       //
	caFile        = "ca.crt"         // what clients and auditors trust
	identityFile  = "node.age"       // unwraps the cluster's vault
	bootstrapFile = "bootstrap.json" // the first event, until it is in the log
	peersFile     = "peers.json"     // members known when the node joined
)

// firstEvent is what `cluster init` leaves for the first start of the node.
type firstEvent struct {
	ID      event.ID             `json:"id"`
	Created event.ClusterCreated `json:"created"`
	// Restored, when not nil, is appended to the events of a backup instead.
	Restored *event.ClusterRestored `json:"restored,omitempty"`
}

// InitOptions say how to make a cluster.
type InitOptions struct {
	Config   *config.Config
	Cluster  string   // name; made up when empty
	Hosts    []string // further names and addresses that clients use for the node
	AdminOut string   // directory for the bootstrap administrator's certificate
}

// Init makes a certificate authority, the first node's keys and the bootstrap
// administrator's certificate. The cluster comes to be when the node is first
// started. The CA's key is written nowhere but, sealed, in the first event.
func Init(o InitOptions) error {
	c := o.Config
	if err := prepare(c); err != nil {
		return err
	}
	if o.Cluster == "" {
		var b [5]byte
		_, _ = rand.Read(b[:]) // never fails
		o.Cluster = "sp-" + hex.EncodeToString(b[:])
	}
	if !pki.ValidName(o.Cluster) {
		return fmt.Errorf("%q cannot name a cluster", o.Cluster)
	}
	for _, name := range []string{"admin.crt", "admin.key"} {
		if _, err := os.Lstat(filepath.Join(o.AdminOut, name)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s exists already, perhaps the only key to another cluster: choose another --admin-out", filepath.Join(o.AdminOut, name))
		}
	}
	now := time.Now()
	ca, err := pki.NewCA(o.Cluster, now)
	if err != nil {
		return err
	}
	ca.NodeValidity = c.CertLifetime
	caKey, err := ca.KeyDER()
	if err != nil {
		return err
	}
	v, err := vault.New()
	if err != nil {
		return err
	}
	sealedKey, err := vault.Seal(caKeyName, caKey, v.Recipient())
	if err != nil {
		return err
	}
	key, ident, csr, err := nodeKeys()
	if err != nil {
		return err
	}
	info, err := signNode(ca, v, &api.JoinRequest{Name: c.Name, Addr: c.Addr, CSR: csr, Hosts: o.Hosts, Recipient: ident.Recipient()}, o.Cluster, pki.Voter, now)
	if err != nil {
		return err
	}
	adminCert, adminKey, err := ca.IssueAdmin(o.Cluster, "bootstrap", now)
	if err != nil {
		return err
	}
	first := firstEvent{ID: event.NewID(), Created: event.ClusterCreated{
		ID: o.Cluster, CA: ca.Cert.Raw, CAKey: sealedKey, VaultRecipient: v.Recipient(), Node: info, AdminCertFP: pki.Fingerprint(adminCert),
	}}
	data, err := json.Marshal(first)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.AdminOut, 0o700); err != nil {
		return err
	}
	if err := errors.Join(
		pki.SaveCert(filepath.Join(o.AdminOut, "admin.crt"), adminCert),
		pki.SaveKey(filepath.Join(o.AdminOut, "admin.key"), adminKey),
		pki.SaveCert(filepath.Join(o.AdminOut, "ca.crt"), ca.Cert.Raw),
		pki.WriteFile(filepath.Join(c.DataDir, bootstrapFile), data),
	); err != nil {
		return err
	}
	return saveNode(c, key, ident, ca.Cert.Raw, info.Cert)
}

// prepare makes an empty data directory.
func prepare(c *config.Config) error {
	c.SetDefaults()
	if err := c.Validate(); err != nil {
		return err
	}
	if err := os.MkdirAll(c.DataDir, 0o700); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(c.DataDir, config.FileName)); err == nil {
		return fmt.Errorf("%s already holds a node: start it with `sallyport serve --data-dir %s`, or choose another directory", c.DataDir, c.DataDir)
	}
	return nil
}

func nodeKeys() (*ecdsa.PrivateKey, *vault.NodeIdentity, []byte, error) {
	key, err := pki.NewNodeKey()
	if err != nil {
		return nil, nil, nil, err
	}
	ident, err := vault.NewNodeIdentity()
	if err != nil {
		return nil, nil, nil, err
	}
	csr, err := pki.CSR(key)
	return key, ident, csr, err
}

// saveNode writes what makes the directory a node; node.yaml last, since its
// presence says that the rest is there.
func saveNode(c *config.Config, key *ecdsa.PrivateKey, ident *vault.NodeIdentity, ca, cert []byte) error {
	if err := errors.Join(
		pki.SaveKey(filepath.Join(c.DataDir, nodeKeyFile), key),
		ident.Save(filepath.Join(c.DataDir, identityFile)),
		pki.SaveCert(filepath.Join(c.DataDir, caFile), ca),
		pki.SaveCert(filepath.Join(c.DataDir, nodeCertFile), cert)); err != nil {
		return err
	}
	return c.Save()
}

// keptKeys are the keys that an interrupted join left, or new ones, kept before
// the cluster hears of them: a join whose answer was lost can be repeated with
// the same token.
func keptKeys(dir string) (*ecdsa.PrivateKey, *vault.NodeIdentity, []byte, error) {
	keyPath, idPath := filepath.Join(dir, nodeKeyFile), filepath.Join(dir, identityFile)
	key, keyErr := pki.LoadKey(keyPath)
	ident, idErr := vault.LoadNodeIdentity(idPath)
	if keyErr == nil && idErr == nil {
		csr, err := pki.CSR(key)
		return key, ident, csr, err
	}
	key, ident, csr, err := nodeKeys()
	if err != nil {
		return nil, nil, nil, err
	}
	return key, ident, csr, errors.Join(pki.SaveKey(keyPath, key), ident.Save(idPath))
}

// signNode makes a member's certificate and, when the cluster has a vault that
// is still in use, wraps it for the member.
func signNode(ca *pki.CA, v *vault.Vault, req *api.JoinRequest, cluster, role string, now time.Time) (event.NodeInfo, error) {
	host, _, err := net.SplitHostPort(req.Addr)
	if err != nil {
		return event.NodeInfo{}, fmt.Errorf("addr: %w", err)
	}
	ip := net.ParseIP(host)
	sans, err := pki.ParseSANs(append([]string{host}, req.Hosts...), ip != nil && ip.IsLoopback())
	if err != nil {
		return event.NodeInfo{}, err
	}
	if err := vault.CheckRecipient(req.Recipient); err != nil {
		return event.NodeInfo{}, err
	}
	cert, err := ca.SignNode(req.CSR, cluster, role, req.Name, sans, now)
	if err != nil {
		return event.NodeInfo{}, err
	}
	var wrap []byte
	if v != nil {
		if wrap, err = v.Wrap(req.Recipient); err != nil {
			return event.NodeInfo{}, err
		}
	}
	return event.NodeInfo{Name: req.Name, Addr: req.Addr, Role: role, Cert: cert, Recipient: req.Recipient, VaultWrap: wrap, Zone: req.Zone}, nil
}

// JoinOptions say how to join a cluster.
type JoinOptions struct {
	Config *config.Config
	Token  string
	Server string // any member, host:port
	Hosts  []string
}

// Join makes the data directory of a new member. The token's last part pins
// the cluster's CA: a server that does not chain to it is not told the secret.
func Join(ctx context.Context, o JoinOptions) error {
	tok, err := api.ParseJoinToken(o.Token)
	if err != nil {
		return err
	}
	pin := tok.Pin[:]
	if err := prepare(o.Config); err != nil {
		return err
	}
	key, ident, csr, err := keptKeys(o.Config.DataDir)
	if err != nil {
		return err
	}
	cl, err := api.NewClient(api.ClientConfig{
		Servers: []string{o.Server},
		Verify:  func(chain []*x509.Certificate) error { return verifyPinned(chain, pin) },
	})
	if err != nil {
		return err
	}
	req := &api.JoinRequest{Name: o.Config.Name, Addr: o.Config.Addr, CSR: csr, Hosts: o.Hosts, Recipient: ident.Recipient(), FeatureLevel: event.Level, Zone: o.Config.Zone}
	if err := req.Sign(tok); err != nil {
		return err
	}
	rep, err := cl.Join(ctx, req)
	if err != nil {
		return err
	}
	if hash := pki.CAHash(rep.CA); subtle.ConstantTimeCompare(hash[:], pin) != 1 {
		return errors.New("the answer names another CA than the token does: do not trust this server")
	}
	cert, err := x509.ParseCertificate(rep.Cert)
	if err != nil {
		return err
	}
	if _, err := pki.VerifyPeer(cert, pki.Pool(rep.CA), rep.Cluster, pki.NodeRoles...); err != nil {
		return fmt.Errorf("the certificate received is not good: %w", err)
	}
	peers, err := json.Marshal(rep.Peers)
	if err != nil {
		return err
	}
	if err := pki.WriteFile(filepath.Join(o.Config.DataDir, peersFile), peers); err != nil {
		return err
	}
	return saveNode(o.Config, key, ident, rep.CA, rep.Cert)
}

// verifyPinned checks that the server's certificate chains to a CA with the
// pinned hash. Nodes send the CA's certificate in their chain for this.
func verifyPinned(chain []*x509.Certificate, pin []byte) error {
	if len(chain) < 2 {
		return errors.New("the server did not send its CA: it is not a Sallyport node")
	}
	ca := chain[len(chain)-1]
	if hash := pki.CAHash(ca.Raw); subtle.ConstantTimeCompare(hash[:], pin) != 1 {
		return errors.New("the server's CA is not the one that the join token pins: wrong server, or someone in between")
	}
	pool := pki.Pool(ca.Raw)
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		return err
	}
	id, err := pki.ParseIdentity(chain[0])
	if err != nil {
		return err
	}
	_, err = pki.VerifyPeer(chain[0], pool, id.Cluster, pki.NodeRoles...)
	return err
}

// loadJSON reads an optional file; ok is false when there is none.
func loadJSON(path string, v any) (ok bool, err error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, json.Unmarshal(data, v)
}

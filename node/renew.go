package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/pki"
)

// A node renews its certificate, with a new key, while it runs:
//
//  1. It makes a key, keeps it in node.key.next, and asks the leader over a
//     connection that its present key has opened.
//  2. The leader signs and appends node.renewed. From here both certificates
//     count, so that no node refuses it, whether it has heard of the event or not.
//  3. The node sees the event, takes the new key up for what begins from now on
//     (connections to and from it, recordings) and reports that.
//  4. The leader appends node.renewed with retired: the earlier certificate is
//     dead, and connections that rest on it are replaced.
//
// A crash anywhere leaves a node that goes on from where it was.

// nextKeyFile holds the key of a renewal until it is taken up.
const nextKeyFile = "node.key.next"

// credentials are this node's key and certificate; they change together.
type credentials struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	tls  *tls.Certificate
	// before is the key before, nil when there was none since the node started:
	// what was cosigned with it may have to be again.
	before *ecdsa.PrivateKey
}

func newCredentials(key *ecdsa.PrivateKey, cert, ca *x509.Certificate) *credentials {
	return &credentials{key: key, cert: cert, tls: &tls.Certificate{Certificate: [][]byte{cert.Raw, ca.Raw}, PrivateKey: key, Leaf: cert}}
}

// loadCredentials reads a node's key and certificate, and ends a change of both
// that a crash interrupted.
func loadCredentials(dir string, ca *x509.Certificate) (*credentials, error) {
	cert, err := pki.LoadCert(filepath.Join(dir, nodeCertFile))
	if err != nil {
		return nil, err
	}
	keyPath, nextPath := filepath.Join(dir, nodeKeyFile), filepath.Join(dir, nextKeyFile)
	key, err := pki.LoadKey(keyPath)
	if err != nil {
		return nil, err
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		if key, err = pki.LoadKey(nextPath); err != nil || !key.PublicKey.Equal(cert.PublicKey) {
			return nil, errors.Join(fmt.Errorf("%s and %s do not belong together", nodeCertFile, nodeKeyFile), err)
		}
		if err := os.Rename(nextPath, keyPath); err != nil {
			return nil, err
		}
	}
	return newCredentials(key, cert, ca), nil
}

// serverTLS is what clients are served with: the certificate of the moment.
func (n *Node) serverTLS() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return n.self.Load().tls, nil },
	}
}

const (
	// renewCheck is how often a node looks whether its certificate is due, and
	// renewRetry how soon it asks again after a failure.
	renewCheck = time.Second
	renewRetry = 5 * time.Second
	// renewTimeout bounds one renewal.
	renewTimeout = 20 * time.Second
)

// keepCertificate renews this node's certificate at two thirds of its life, and
// brings renewals to their end that were begun.
func (n *Node) keepCertificate(ctx context.Context) error {
	var notBefore time.Time // of the next try
	for {
		changed := n.state.Changed()
		if err := n.adopt(); err != nil {
			return err // the node cannot write what it needs to start again
		}
		now := time.Now()
		due := now.After(pki.RenewAt(n.self.Load().cert))
		if (due || n.unreported()) && now.After(notBefore) {
			var err error
			if due {
				err = n.renew(ctx)
			} else {
				err = n.reportRenewed(ctx)
			}
			if err != nil && ctx.Err() == nil {
				n.log.Warn("this node's certificate could not be renewed; it will be tried again", "expires", n.self.Load().cert.NotAfter, "err", err)
				notBefore = now.Add(renewRetry)
			}
		}
		select {
		case <-changed:
		case <-time.After(renewCheck):
		case <-ctx.Done():
			return nil
		}
	}
}

// renew asks for a certificate and takes it up.
func (n *Node) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	n.renewing.Lock() // one at a time: there is one next key
	defer n.renewing.Unlock()
	path := filepath.Join(n.cfg.DataDir, nextKeyFile)
	key, err := pki.LoadKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		if key, err = pki.NewNodeKey(); err == nil {
			err = pki.SaveKey(path, key)
		}
	}
	if err != nil {
		return err
	}
	csr, err := pki.CSR(key)
	if err != nil {
		return err
	}
	before := n.self.Load()
	if err := n.api.Renew(ctx, csr); err != nil {
		return err
	}
	for { // until the event is folded here
		changed := n.state.Changed()
		if err := n.adopt(); err != nil {
			return err
		}
		if n.self.Load() != before {
			return n.reportRenewed(ctx)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("the new certificate was issued and did not arrive: %w", context.Cause(ctx))
		}
	}
}

// adopt takes up the certificate that the cluster has for this node, if it is a
// newer one than in use and of the key that waits for it.
func (n *Node) adopt() error {
	n.adopting.Lock()
	defer n.adopting.Unlock()
	self := n.self.Load()
	info, ok := n.state.View().Nodes[n.cfg.Name]
	if !ok {
		return nil
	}
	cert := mustCert(info.Cert)
	if cert.Equal(self.cert) {
		return nil
	}
	path := filepath.Join(n.cfg.DataDir, nextKeyFile)
	key, err := pki.LoadKey(path)
	if err != nil || !key.PublicKey.Equal(cert.PublicKey) {
		return nil // not ours to take up; authorizePeer of the others decides
	}
	if err := pki.SaveCert(filepath.Join(n.cfg.DataDir, nodeCertFile), cert.Raw); err != nil {
		return err
	}
	if err := os.Rename(path, filepath.Join(n.cfg.DataDir, nodeKeyFile)); err != nil {
		return err
	}
	next := newCredentials(key, cert, n.ca)
	next.before = self.key
	n.self.Store(next)
	if err := n.spool.SetSigner(key, cert.Raw); err != nil {
		return err
	}
	n.endpoint.Recheck()
	n.log.Info("this node has a new certificate", "expires", cert.NotAfter, "renewed_at", pki.RenewAt(cert))
	return nil
}

// unreported says whether the cluster still counts the earlier certificate of
// this node beside the one it uses.
func (n *Node) unreported() bool {
	v := n.state.View()
	return v.Superseded[n.cfg.Name] != nil && mustCert(v.Nodes[n.cfg.Name].Cert).Equal(n.self.Load().cert)
}

func (n *Node) reportRenewed(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	for try := 0; ; try++ {
		if !n.unreported() {
			return nil
		}
		n.mesh.CloseIdle() // what counts is the certificate that the report comes with
		err := n.api.Renewed(ctx)
		if err == nil || try == 4 {
			return err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// rotate is renew on command.
func (n *Node) rotate(ctx context.Context) (api.RotateReply, error) {
	err := n.renew(ctx)
	c := n.self.Load().cert
	return api.RotateReply{Node: n.cfg.Name, Fingerprint: pki.Fingerprint(c.Raw), Expires: c.NotAfter}, err
}

// signRenewal issues a member's next certificate: same name, role and names for
// clients, another key.
func (n *Node) signRenewal(name string, csr []byte) ([]byte, error) {
	v := n.state.View()
	info := v.Nodes[name]
	before := mustCert(info.Cert)
	id, err := pki.ParseIdentity(before)
	if err != nil {
		return nil, err
	}
	ca, err := n.authority(v)
	if err != nil {
		return nil, err
	}
	return ca.SignNode(csr, n.cluster, id.Role, name, pki.SANs{DNS: before.DNSNames, IPs: append([]net.IP(nil), before.IPAddresses...)}, time.Now())
}

// minRenewal is how long after one a member's next renewal may come: each is two
// events that are kept for ever.
func (n *Node) minRenewal() time.Duration {
	return min(time.Minute, n.cfg.CertLifetime/6)
}

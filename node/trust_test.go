package node

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/raftstore/transport"
)

func mustCA(t *testing.T) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA("acme", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// mustSign makes a certificate of a new key.
func mustSign(t *testing.T, ca *pki.CA, role, name string, at time.Time) []byte {
	t.Helper()
	key, err := pki.NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := ca.SignNode(csr, "acme", role, name, pki.SANs{}, at)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// Each role speaks its classes and no others.
func TestRolesPerClass(t *testing.T) {
	ca := mustCA(t)
	n := &Node{ca: ca.Cert, cluster: "acme", state: state.New(slog.New(slog.DiscardHandler))}
	speaks := map[string][]string{
		pki.Voter:     {transport.ClassRaft, transport.ClassBulk, transport.ClassConfirm, transport.ClassFence, transport.ClassEvents, transport.ClassMesh, transport.ClassGossip},
		pki.Gateway:   {transport.ClassFence, transport.ClassEvents, transport.ClassMesh, transport.ClassGossip},
		pki.Connector: {},
	}
	for role, classes := range speaks {
		cert := mustCert(mustSign(t, ca, role, "n1", time.Now()))
		for _, class := range transport.Classes {
			_, err := n.authorizePeer(class, cert)
			if want := slices.Contains(classes, class); want != (err == nil) {
				t.Errorf("%s on %s: %v", role, class, err)
			}
		}
	}
	admin, _, err := ca.IssueAdmin("acme", "root", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, class := range transport.Classes {
		if _, err := n.authorizePeer(class, mustCert(admin)); err == nil {
			t.Errorf("an administrator speaks %s", class)
		}
	}
	if len(classRoles) != len(transport.Classes) {
		t.Error("a class without roles")
	}
}

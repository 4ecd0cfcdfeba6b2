package node

import (
	"crypto/x509"
	"fmt"
	"slices"

	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// classRoles says which role may speak which class of connection, at either
// end. Raft is among voters: a gateway can neither vote nor append nor send a
// snapshot, whatever it says its name is.
var classRoles = map[string][]string{
	transport.ClassRaft:    {pki.Voter},
	transport.ClassBulk:    {pki.Voter},
	transport.ClassConfirm: {pki.Voter},
	transport.ClassFence:   {pki.Voter, pki.Gateway, pki.Connector},
	transport.ClassEvents:  {pki.Voter, pki.Gateway, pki.Connector},
	transport.ClassMesh:    {pki.Voter, pki.Gateway, pki.Connector},
	transport.ClassGossip:  {pki.Voter, pki.Gateway, pki.Connector},
}

// authorizePeer says which node a certificate is of, and refuses those that
// were removed, whose role may not speak the class, and whose certificate is not
// the member's. Before the node has any state, the CA's word is enough: it has
// just joined and must hear from the others.
func (n *Node) authorizePeer(class string, leaf *x509.Certificate) (string, error) {
	id, err := pki.VerifyPeer(leaf, pki.Pool(n.ca.Raw), n.cluster, pki.NodeRoles...)
	if err != nil {
		return "", err
	}
	if !slices.Contains(classRoles[class], id.Role) {
		return "", fmt.Errorf("node %s is a %s: that role may not speak %s", id.Name, id.Role, class)
	}
	v := n.state.View()
	if v.Removed[id.Name] {
		return "", fmt.Errorf("node %s was removed from the cluster", id.Name)
	}
	if v.NodeRevoked(id.Name) != nil {
		return "", fmt.Errorf("node %s was revoked", id.Name)
	}
	if info, known := v.Nodes[id.Name]; known && !leaf.Equal(mustCert(info.Cert)) {
		return "", fmt.Errorf("node %s has another certificate", id.Name)
	}
	return id.Name, nil
}

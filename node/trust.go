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
// snapshot, whatever it says its name is. The role connector has a name and no
// class yet: what it will speak, it will speak by classes of its own, and the
// event log is not for it.
var classRoles = map[string][]string{
	transport.ClassRaft:    {pki.Voter},
	transport.ClassBulk:    {pki.Voter},
	transport.ClassConfirm: {pki.Voter},
	transport.ClassFence:   {pki.Voter, pki.Gateway},
	transport.ClassEvents:  {pki.Voter, pki.Gateway},
	transport.ClassMesh:    {pki.Voter, pki.Gateway},
	transport.ClassGossip:  {pki.Voter, pki.Gateway},
}

// historyClass says whether a class brings the event log to nodes that lack it.
func historyClass(class string) bool {
	return class == transport.ClassRaft || class == transport.ClassBulk || class == transport.ClassEvents
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
	info, known := v.Nodes[id.Name]
	if !known || leaf.Equal(mustCert(info.Cert)) {
		return id.Name, nil
	}
	if old := v.Superseded[id.Name]; old != nil && leaf.Equal(mustCert(old)) {
		return id.Name, nil // the node is about to take up its new one
	}
	// A node that was away knows the certificates of then. It must hear from the
	// others to learn of those that they have now: on what brings the events, a
	// newer certificate of the same node and role is taken on the CA's word.
	if newer := mustCert(info.Cert); historyClass(class) && info.Role == id.Role && leaf.NotBefore.After(newer.NotBefore) {
		return id.Name, nil
	}
	return "", fmt.Errorf("node %s has another certificate", id.Name)
}

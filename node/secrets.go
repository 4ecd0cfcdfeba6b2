package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/raftstore/event"
)

// Who can open what, once the cluster seals to its nodes' own keys (state.View.Keys
// is not empty):
//
//	a target's password      the nodes that may serve the target
//	the authority's key      voters
//	the key of hashed masks  voters and gateways
//	an approval's text       voters, and the node that asked
//	a vote's proof           voters, and the node that asked
//
// Passwords and keys are sealed anew, by an event, when those change that may
// open them. What was sealed before stays in the log: a node that left can still
// open what it could open then, so change the passwords after a node has gone bad.

const (
	// caKeyName is the name that the CA's key is sealed under.
	caKeyName = "ca-key"
	// maskKeyName names the key of hashed masks, equal on all nodes.
	maskKeyName = "mask/hash"

	// sealPause is how soon after a change a node looks again at who may open
	// what; a join makes several changes.
	sealPause = 100 * time.Millisecond
	// sealRetry is how soon it tries again what failed.
	sealRetry = 2 * time.Second
	// maxSealedSecrets bounds one event: with 1,024 recipients each it has some
	// 2 MiB, and a call between nodes takes 4.
	maxSealedSecrets = 16
)

var errNoVault = errors.New("this node cannot open the cluster's secrets yet")

// recipients are the keys of the members that may, sorted and each once.
func recipients(v *state.View, may func(event.NodeInfo) bool) event.Recipients {
	var to event.Recipients
	for _, info := range v.Nodes {
		if may(info) && v.NodeRevoked(info.Name) == nil {
			to = append(to, info.Recipient)
		}
	}
	slices.Sort(to)
	return slices.Compact(to)
}

func isVoter(i event.NodeInfo) bool { return i.Role == pki.Voter || i.Role == "" }

func servesSessions(i event.NodeInfo) bool { return isVoter(i) || i.Role == pki.Gateway }

// wantKeys says who may open the cluster's own keys.
func wantKeys(v *state.View) map[string]event.Recipients {
	return map[string]event.Recipients{caKeyName: recipients(v, isVoter), maskKeyName: recipients(v, servesSessions)}
}

// wantSealed says who may open each secret of the configuration. A secret that
// nobody may open now is not in it and stays as it is.
func (n *Node) wantSealed(v *state.View) map[string]event.Recipients {
	want := map[string]event.Recipients{}
	if v.Config == nil {
		return want
	}
	for _, t := range v.Config.Targets {
		to := recipients(v, func(i event.NodeInfo) bool { return servesSessions(i) && t.ServedBy(i.Name) })
		if len(to) > 0 {
			want[t.SecretName()] = to
		}
	}
	return want
}

// seal seals to the voters and the nodes named.
func (n *Node) seal(name string, plain []byte, nodes ...string) (event.Sealed, error) {
	v := n.state.View()
	if len(v.Keys) == 0 {
		if v.VaultRecipient == "" {
			return nil, errNoVault
		}
		return vault.Seal(name, plain, v.VaultRecipient)
	}
	return vault.Seal(name, plain, recipients(v, func(i event.NodeInfo) bool { return isVoter(i) || slices.Contains(nodes, i.Name) })...)
}

// sealHere seals to the voters and this node.
func (n *Node) sealHere(name string, plain []byte) (event.Sealed, error) {
	return n.seal(name, plain, n.cfg.Name)
}

// sealSecret seals a secret of a configuration to nodes by name, all when there
// are none; to is nil while the cluster has a vault instead.
func (n *Node) sealSecret(name string, plain []byte, nodes []string) (s event.Sealed, to event.Recipients, err error) {
	v := n.state.View()
	if len(v.Keys) == 0 {
		if len(nodes) > 0 {
			return nil, nil, errors.New("a target can name its nodes when every node of the cluster runs a build that knows of it, and the cluster's feature level was raised: see `sallyport status`")
		}
		s, err = n.seal(name, plain)
		return s, nil, err
	}
	to = recipients(v, func(i event.NodeInfo) bool {
		return servesSessions(i) && (len(nodes) == 0 || slices.Contains(nodes, i.Name))
	})
	if len(to) == 0 {
		return nil, nil, fmt.Errorf("none of the nodes %v is a member of the cluster: nobody could use the secret %s", nodes, name)
	}
	s, err = vault.Seal(name, plain, to...)
	return s, to, err
}

// unseal opens what is sealed to this node, or to the vault of a cluster of the
// first release.
func (n *Node) unseal(name string, sealed event.Sealed) ([]byte, error) {
	plain, err := n.ident.Open(name, sealed)
	if v := n.vault.Load(); v != nil && errors.Is(err, vault.ErrNotSealedToUs) {
		return v.Open(name, sealed)
	}
	return plain, err
}

// caKey opens the authority's key. Only voters can.
func (n *Node) caKey(v *state.View) ([]byte, error) {
	if k, ok := v.Keys[caKeyName]; ok {
		return n.ident.Open(caKeyName, k.Sealed)
	}
	return n.unseal(caKeyName, v.CAKey)
}

// maskKey is the key of hashed masks. On an error it is a key that nobody else
// has: hashes then differ from those elsewhere, but cannot be guessed.
func (n *Node) maskKey(v *state.View) ([]byte, error) {
	var key []byte
	var err error
	if k, ok := v.Keys[maskKeyName]; ok {
		key, err = n.ident.Open(maskKeyName, k.Sealed)
	} else if vlt := n.vault.Load(); vlt != nil {
		key = vlt.Derive(maskKeyName)
	} else {
		err = errNoVault
	}
	if err != nil {
		key = make([]byte, 32)
		_, _ = rand.Read(key) // never fails
	}
	return key, err
}

// signMember issues a member's certificate with the CA's key, unsealed for just
// this.
func (n *Node) signMember(req *api.JoinRequest, role string) (event.NodeInfo, error) {
	v := n.state.View()
	ca, err := n.authority(v)
	if err != nil {
		return event.NodeInfo{}, err
	}
	var vlt *vault.Vault
	if len(v.Keys) == 0 {
		if vlt = n.vault.Load(); vlt == nil {
			return event.NodeInfo{}, errNoVault
		}
	}
	return signNode(ca, vlt, req, n.cluster, role, time.Now())
}

func (n *Node) authority(v *state.View) (*pki.CA, error) {
	keyDER, err := n.caKey(v)
	if err != nil {
		return nil, err
	}
	ca, err := pki.LoadCA(v.CA, keyDER)
	if err == nil {
		ca.NodeValidity = n.cfg.CertLifetime
	}
	return ca, err
}

// keepSealed seals secrets anew when those that may open them have changed. The
// leader does what it can open; a secret that it cannot is sealed by a node that
// can, whose proposal the leader checks.
func (n *Node) keepSealed(ctx context.Context) error {
	var done struct { // for which there was nothing to do
		config      uint64
		nodes       uintptr
		revocations state.Map[*state.Revocation]
		leader      string
	}
	for {
		v := n.state.View()
		now := done
		now.leader, _ = n.store.Leader()
		// A View's maps never change.
		now.config, now.nodes, now.revocations = v.ConfigVersion, reflect.ValueOf(v.Nodes).Pointer(), v.Revocations
		pause := sealPause
		if now != done {
			did, err := n.sealAnew(ctx, v, now.leader)
			if err != nil {
				n.log.Warn("secrets could not be sealed anew", "err", err)
				pause = sealRetry
			} else if !did {
				done = now
			}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

// sealAnew seals what is for this node to seal, a bounded number of secrets at a
// time; did is false when there was nothing.
func (n *Node) sealAnew(ctx context.Context, v *state.View, leader string) (did bool, err error) {
	if leader == "" {
		return true, nil
	}
	if v.FeatureLevel < event.Needs(event.TypeSecretsSealed, 1) {
		return true, nil // look again: it rises without a change of nodes
	}
	p, err := n.resealing(v, leader)
	if err != nil || p == nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	n.log.Info("sealing secrets to those that may open them now", "secrets", slices.Sorted(maps.Keys(p.Secrets)), "keys", slices.Sorted(maps.Keys(p.Keys)))
	if _, err = n.propose(ctx, event.TypeSecretsSealed, event.NewID(), api.SealedProposal{SecretsSealed: *p, Expect: v.ConfigVersion}, ""); err != nil {
		return false, err
	}
	for n.state.View().ConfigVersion == v.ConfigVersion && ctx.Err() == nil { // folded here in a moment
		select {
		case <-n.state.Changed():
		case <-time.After(sealPause):
		}
	}
	return true, nil
}

// resealing is what this node has to seal anew, nil for nothing.
func (n *Node) resealing(v *state.View, leader string) (p *event.SecretsSealed, err error) {
	p = &event.SecretsSealed{}
	if leader == n.cfg.Name {
		if p.Keys, err = n.resealKeys(v); err != nil {
			return nil, err
		}
	}
	for name, to := range n.wantSealed(v) {
		sealed, stored := v.Secrets[name]
		if !stored || slices.Equal(v.SealedTo[name], to) || !n.dutyToSeal(v, leader, v.SealedTo[name]) {
			continue
		}
		if len(p.Secrets) == maxSealedSecrets {
			break // the rest in the next step
		}
		plain, err := n.unseal(api.SecretName(name), sealed)
		if errors.Is(err, vault.ErrNotSealedToUs) {
			continue
		} else if err != nil {
			return nil, err
		}
		blob, err := vault.Seal(api.SecretName(name), plain, to...)
		if err != nil {
			return nil, err
		}
		if p.Secrets == nil {
			p.Secrets, p.SealedTo = map[string]event.Sealed{}, map[string]event.Recipients{}
		}
		p.Secrets[name], p.SealedTo[name] = blob, to
	}
	if p.Keys == nil && p.Secrets == nil {
		return nil, nil
	}
	return p, nil
}

// dutyToSeal says whether it is for this node to seal something anew that is
// sealed to some: for the leader if it can open it, for those others that can if
// not. One of their proposals is taken.
func (n *Node) dutyToSeal(v *state.View, leader string, to event.Recipients) bool {
	can := func(node string) bool { return to == nil || slices.Contains(to, v.Nodes[node].Recipient) }
	if leader == n.cfg.Name {
		return true // it may hold what is not written here
	}
	return to != nil && !can(leader) && can(n.cfg.Name)
}

func (n *Node) resealKeys(v *state.View) (map[string]event.SealedKey, error) {
	var out map[string]event.SealedKey
	for name, to := range wantKeys(v) {
		k, ok := v.Keys[name]
		if ok && slices.Equal(k.SealedTo, to) {
			continue
		}
		var plain []byte
		var err error
		if name == caKeyName {
			plain, err = n.caKey(v)
		} else {
			plain, err = n.maskKey(v)
		}
		if err != nil {
			return nil, err
		}
		sealed, err := vault.Seal(name, plain, to...)
		if err != nil {
			return nil, err
		}
		if out == nil {
			out = map[string]event.SealedKey{}
		}
		out[name] = event.SealedKey{Sealed: sealed, SealedTo: to}
	}
	return out, nil
}

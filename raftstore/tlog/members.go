package tlog

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/sallyport/sallyport/raftstore/event"
)

// ErrCosigners says that too few of those who must have cosigned a checkpoint.
var ErrCosigners = errors.New("a majority of the voters has not cosigned this checkpoint")

// Voters are those who may cosign, by name, with their certificates. A Voters
// is never changed once it is shared.
type Voters map[string]*x509.Certificate

// Names are the voters' names, in order.
func (v Voters) Names() []string { return slices.Sorted(maps.Keys(v)) }

// sameKey says whether name is in both with one key.
func (v Voters) sameKey(o Voters, name string) bool {
	a, b := v[name], o[name]
	return a != nil && b != nil && bytes.Equal(a.RawSubjectPublicKeyInfo, b.RawSubjectPublicKeyInfo)
}

// changes counts the keys that are in one of v and o only: one for a voter that
// came or went, two for one whose key was replaced.
func (v Voters) changes(o Voters) int {
	n := 0
	for name := range v {
		if !v.sameKey(o, name) {
			n++
		}
	}
	for name := range o {
		if !o.sameKey(v, name) {
			n++
		}
	}
	return n
}

// Members is who may cosign, as the events themselves tell it: the voters of
// the cluster after some event. The zero Members is before the first one; a
// copy can be folded on without changing the original.
//
// A voter here is a member whose certificate has the role voter, whether Raft
// counts it among its voters at that moment or not: that is what an auditor can
// know from the events.
type Members struct {
	Cluster string
	CA      []byte // DER, from the first event
	Voters  Voters
	Genesis Voters // the first node alone: who must cosign the first checkpoint
}

// roleVoter is the role in event.NodeInfo of those who cosign.
const roleVoter = "voter"

// Fold takes an event into account. check says whether a node's certificate is
// what it should be: signed by the CA der, of that cluster, role and name.
// An error means that the event cannot be believed.
func (m *Members) Fold(e *event.Event, check func(ca []byte, cert *x509.Certificate, cluster, name string) error) error {
	add := func(n event.NodeInfo) error {
		if n.Role != roleVoter {
			return nil
		}
		cert, err := x509.ParseCertificate(n.Cert)
		if err == nil {
			err = check(m.CA, cert, m.Cluster, n.Name)
		}
		if err != nil {
			return fmt.Errorf("the certificate of node %s: %w", n.Name, err)
		}
		m.Voters = maps.Clone(m.Voters)
		if m.Voters == nil {
			m.Voters = Voters{}
		}
		m.Voters[n.Name] = cert
		return nil
	}
	switch e.Type {
	case event.TypeClusterCreated:
		var p event.ClusterCreated
		if err := json.Unmarshal(e.Payload, &p); err != nil {
			return err
		}
		if m.Cluster != "" || e.Seq != 1 {
			return errors.New("the cluster is created a second time")
		}
		m.Cluster, m.CA = p.ID, p.CA
		err := add(p.Node)
		m.Genesis = m.Voters
		return err
	case event.TypeNodeJoined:
		var p event.NodeJoined
		if err := json.Unmarshal(e.Payload, &p); err != nil {
			return err
		}
		return add(p.Node)
	case event.TypeNodeRemoved:
		var p event.NodeRemoved
		if err := json.Unmarshal(e.Payload, &p); err != nil {
			return err
		}
		m.Voters = maps.Clone(m.Voters)
		delete(m.Voters, p.Name)
	}
	return nil
}

// Majority is how many of n are more than half.
func Majority(n int) int { return n/2 + 1 }

// CheckNote checks a checkpoint with its cosignatures against the voters after
// c.Size events (m) and those of the trusted checkpoint before it (prev; before
// the first: Genesis), and returns who cosigned. It must have
//
//   - a majority of m's voters, and
//   - when more than one key came or went since prev, a majority of prev too,
//     with the keys they had then.
//
// Two sets that differ by one have no two disjoint majorities; so from one
// checkpoint to the next at least one voter has vouched for both, and a minority
// of the voters cannot vote the majority out. Cosignatures of others are
// ignored. A wrong one of a voter spoils the checkpoint: nobody but an adversary
// makes one.
func (m *Members) CheckNote(b []byte, prev Voters) (Checkpoint, []string, error) {
	c, sigs, err := ParseNote(b)
	if err != nil {
		return c, nil, err
	}
	if c.Origin != m.Cluster {
		return c, nil, fmt.Errorf("%w: it is of the log %q, not of %q", ErrNote, c.Origin, m.Cluster)
	}
	var now, then []string
	for _, s := range sigs {
		inNow, err := m.Voters.signed(c, s)
		if err != nil && !m.Voters.sameKey(prev, s.Node) && prev[s.Node] != nil {
			inNow, err = false, nil // with the key it had before, perhaps
		}
		if err != nil {
			return c, nil, err
		}
		inThen := inNow && m.Voters.sameKey(prev, s.Node)
		if !inNow {
			if inThen, err = prev.signed(c, s); err != nil {
				return c, nil, err
			}
		}
		if inNow {
			now = append(now, s.Node)
		}
		if inThen {
			then = append(then, s.Node)
		}
	}
	if need := Majority(len(m.Voters)); len(now) < need {
		return c, now, fmt.Errorf("%w: %d of %d (%s), and %d must", ErrCosigners, len(now), len(m.Voters), strings.Join(m.Voters.Names(), ", "), need)
	}
	if need := Majority(len(prev)); m.Voters.changes(prev) > 1 && len(then) < need {
		return c, now, fmt.Errorf("%w: of those as of the checkpoint before (%s), since which more than one came or went, %d have, and %d must", ErrCosigners, strings.Join(prev.Names(), ", "), len(then), need)
	}
	return c, now, nil
}

// signed says whether a cosignature is of one of v; an error, that it claims to
// be and is wrong.
func (v Voters) signed(c Checkpoint, s Cosignature) (bool, error) {
	cert := v[s.Node]
	if cert == nil {
		return false, nil
	}
	who, err := NewCosigner(s.Node, cert)
	if err == nil {
		_, err = who.Check(c, s.Sig)
	}
	return err == nil, err
}

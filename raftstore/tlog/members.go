package tlog

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/sallyport/sallyport/raftstore/event"
)

// ErrCosigners says that too few of those who must have cosigned a checkpoint.
var ErrCosigners = errors.New("a majority of the voters has not cosigned this checkpoint")

// Voters are those who may cosign, by name, with their certificates: one, or
// while a certificate is being replaced two, the older first. A Voters is never
// changed once it is shared.
type Voters map[string][]*x509.Certificate

// Names are the voters' names, in order.
func (v Voters) Names() []string { return slices.Sorted(maps.Keys(v)) }

// with says whether a voter may cosign with that key.
func (v Voters) with(name string, spki []byte) bool {
	return slices.ContainsFunc(v[name], func(c *x509.Certificate) bool { return bytes.Equal(c.RawSubjectPublicKeyInfo, spki) })
}

// changes counts the voters that are in one of v and o only.
func (v Voters) changes(o Voters) int {
	n := 0
	for name := range v {
		if o[name] == nil {
			n++
		}
	}
	for name := range o {
		if v[name] == nil {
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

// Concerns tells whether events of that type change Members.
func Concerns(typ string) bool {
	switch typ {
	case event.TypeClusterCreated, event.TypeNodeJoined, event.TypeNodeRenewed, event.TypeNodeRemoved, event.TypeClusterRestored:
		return true
	}
	return false
}

// Fold takes an event into account. check says whether a voter's certificate
// is what it should be: signed by the CA (DER), of that cluster, role and name.
// An error means that the event cannot be believed.
func (m *Members) Fold(e *event.Event, check func(ca []byte, cert *x509.Certificate, cluster, name string) error) error {
	set := func(name string, der []byte, before ...*x509.Certificate) error {
		cert, err := x509.ParseCertificate(der)
		if err == nil {
			err = check(m.CA, cert, m.Cluster, name)
		}
		if err == nil {
			_, err = NewCosigner(name, cert)
		}
		if err != nil {
			return fmt.Errorf("the certificate of node %s: %w", name, err)
		}
		m.Voters = maps.Clone(m.Voters)
		if m.Voters == nil {
			m.Voters = Voters{}
		}
		m.Voters[name] = append(slices.Clip(before), cert)
		return nil
	}
	switch e.Type {
	case event.TypeClusterCreated:
		p, err := event.Decode[event.ClusterCreated](*e)
		if err != nil {
			return err
		}
		if m.Cluster != "" || e.Seq != 1 {
			return errors.New("the cluster is created a second time")
		}
		m.Cluster, m.CA = p.ID, p.CA
		err = set(p.Node.Name, p.Node.Cert)
		m.Genesis = m.Voters
		return err
	case event.TypeNodeJoined:
		p, err := event.Decode[event.NodeJoined](*e)
		if err != nil || p.Node.Role != roleVoter {
			return err
		}
		return set(p.Node.Name, p.Node.Cert)
	case event.TypeNodeRenewed:
		p, err := event.Decode[event.NodeRenewed](*e)
		if err != nil || m.Voters[p.Name] == nil {
			return err
		}
		if p.Retired {
			return set(p.Name, p.Cert)
		}
		return set(p.Name, p.Cert, m.Voters[p.Name][:1]...)
	case event.TypeClusterRestored:
		// Who cosigned before is gone; what a majority of them has to vouch for,
		// nobody can any more: see CheckNote.
		p, err := event.Decode[event.ClusterRestored](*e)
		if err != nil {
			return err
		}
		m.Voters = Voters{}
		return set(p.Node.Name, p.Node.Cert)
	case event.TypeNodeRemoved:
		p, err := event.Decode[event.NodeRemoved](*e)
		if err != nil {
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
//   - a majority of m's voters; those that prev has too, with a key they had
//     then: a new key counts from the next checkpoint on; and
//   - when more than one voter came or went since prev, a majority of prev too.
//
// Two sets that differ by one have no two disjoint majorities; so from one
// checkpoint to the next at least one voter has vouched for both, and a minority
// of the voters cannot vote the majority out, nor put keys of its own in its
// place. Cosignatures of others are ignored. One that claims to be of a voter
// and is not spoils the checkpoint: nobody but an adversary makes one.
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
		inNow, inThen, err := counts(c, s, m.Voters, prev)
		if err != nil {
			return c, nil, err
		}
		if inNow {
			now = append(now, s.Node)
		}
		if inThen {
			then = append(then, s.Node)
		}
	}
	if need := Majority(len(m.Voters)); len(now) < need {
		return c, now, fmt.Errorf("%w: %d of %d (%s) have, and %d must", ErrCosigners, len(now), len(m.Voters), strings.Join(m.Voters.Names(), ", "), need)
	}
	if need := Majority(len(prev)); m.Voters.changes(prev) > 1 && len(then) < need {
		return c, now, fmt.Errorf("%w: of those as of the checkpoint before (%s), since which more than one came or went, %d have, and %d must", ErrCosigners, strings.Join(prev.Names(), ", "), len(then), need)
	}
	return c, now, nil
}

// counts says whether a cosignature counts among the voters now, and among
// those then.
func counts(c Checkpoint, s Cosignature, now, then Voters) (inNow, inThen bool, err error) {
	certs := slices.Concat(now[s.Node], then[s.Node])
	if len(certs) == 0 {
		return false, false, nil
	}
	for _, cert := range certs {
		who, err := NewCosigner(s.Node, cert)
		if err != nil {
			return false, false, err
		}
		if _, err := who.Check(c, s.Sig); err != nil {
			continue // another of its keys, perhaps
		}
		key := cert.RawSubjectPublicKeyInfo
		inThen = then.with(s.Node, key)
		inNow = now.with(s.Node, key) && (inThen || then[s.Node] == nil)
		return inNow, inThen, nil
	}
	return false, false, fmt.Errorf("%w: that of %s", ErrCosignature, s.Node)
}

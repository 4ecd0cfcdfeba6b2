package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/config"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/raftstore/event"
)

// members are nodes without network or log over one projection, as events would
// make them.
type members struct {
	t     *testing.T
	state *state.Projection
	ca    *pki.CA
	caKey []byte
	vault *vault.Vault
	nodes map[string]*Node
	seq   uint64
	conf  uint64
}

// newMembers makes a cluster of the first release with voter n1.
func newMembers(t *testing.T) *members {
	t.Helper()
	m := &members{t: t, state: state.New(slog.New(slog.DiscardHandler)), ca: mustCA(t), nodes: map[string]*Node{}}
	var err error
	if m.vault, err = vault.New(); err != nil {
		t.Fatal(err)
	}
	if m.caKey, err = m.ca.KeyDER(); err != nil {
		t.Fatal(err)
	}
	sealed, err := vault.Seal(caKeyName, m.caKey, m.vault.Recipient())
	if err != nil {
		t.Fatal(err)
	}
	m.fold(event.TypeClusterCreated, event.ClusterCreated{
		ID: "acme", CA: m.ca.Cert.Raw, CAKey: sealed, VaultRecipient: m.vault.Recipient(), Node: m.member("n1", pki.Voter, true),
	})
	return m
}

func (m *members) fold(typ string, payload any) {
	m.t.Helper()
	data, err := json.Marshal(payload)
	if err != nil {
		m.t.Fatal(err)
	}
	m.seq++
	e := event.Event{Proposal: event.Proposal{ID: event.NewID(), Type: typ, Version: event.Newest(typ), Payload: data}, Seq: m.seq, Index: m.seq, Time: time.Unix(int64(m.seq), 0)}
	if typ == event.TypeConfigApplied || typ == event.TypeSecretsSealed {
		m.conf++
		e.AggregateVersion = m.conf
	}
	if err := m.state.Fold([]event.Event{e}); err != nil {
		m.t.Fatal(err)
	}
}

// member makes a node's keys; with the vault when the cluster still has one.
func (m *members) member(name, role string, vaulted bool) event.NodeInfo {
	m.t.Helper()
	ident, err := vault.NewNodeIdentity()
	if err != nil {
		m.t.Fatal(err)
	}
	n := &Node{cfg: &config.Config{Name: name}, ca: m.ca.Cert, cluster: "acme", role: role, state: m.state, ident: ident, log: slog.New(slog.DiscardHandler)}
	info := event.NodeInfo{Name: name, Role: role, Addr: name + ":1", Recipient: ident.Recipient(), Cert: mustSign(m.t, m.ca, role, name, time.Now())}
	if vaulted {
		if info.VaultWrap, err = m.vault.Wrap(info.Recipient); err != nil {
			m.t.Fatal(err)
		}
		n.vault.Store(m.vault)
	}
	m.nodes[name] = n
	return info
}

func (m *members) join(name, role string) {
	m.t.Helper()
	m.fold(event.TypeNodeJoined, event.NodeJoined{Node: m.member(name, role, len(m.state.View().Keys) == 0)})
}

// settle does what keepSealed does, with n1 as the leader, and returns who has
// sealed what.
func (m *members) settle() []string {
	m.t.Helper()
	var did []string
	for range 20 {
		v := m.state.View()
		var p *event.SecretsSealed
		for _, name := range []string{"n1", "n2", "g1", "g2"} {
			n := m.nodes[name]
			if _, member := v.Nodes[name]; n == nil || !member {
				continue
			}
			var err error
			if p, err = n.resealing(v, "n1"); err != nil {
				m.t.Fatal(err)
			}
			if p != nil {
				if err := (&api.Server{Deps: api.Deps{Node: "n1", WantSealed: n.wantSealed}}).CheckSealed(v, name, p); err != nil {
					m.t.Fatalf("%s: %v", name, err)
				}
				for s := range p.Secrets {
					did = append(did, name+" "+s)
				}
				m.fold(event.TypeSecretsSealed, p)
				break
			}
		}
		if p == nil {
			slices.Sort(did)
			return did
		}
	}
	m.t.Fatal("never settles")
	return nil
}

const secretsTarget = `kind: Target
name: %s
address: db.internal:5432
admin: {user: admin, password: keep}
databases: [shop]
roles:
  - {groups: [all], role: app}
%s
---
`

func secretsConfig(targets map[string]string) []event.ConfigFile {
	var b strings.Builder
	for name, nodes := range targets {
		fmt.Fprintf(&b, secretsTarget, name, nodes)
	}
	return []event.ConfigFile{
		{Path: "rules.cedar", Data: []byte("@id(\"all\") permit (principal, action, resource);")},
		{Path: "targets.yaml", Data: []byte(strings.TrimSuffix(b.String(), "---\n"))},
	}
}

func secretOf(target string) string { return "target/" + target + "/admin-password" }

// opens lists the nodes that can open a target's password.
func (m *members) opens(target string) string {
	var who []string
	for name, n := range m.nodes {
		plain, err := n.unseal(api.SecretName(secretOf(target)), m.state.View().Secrets[secretOf(target)])
		switch {
		case err == nil && string(plain) == "pw-"+target:
			who = append(who, name)
		case !errors.Is(err, vault.ErrNotSealedToUs):
			m.t.Errorf("%s opens %s: %q, %v", name, target, plain, err)
		}
	}
	slices.Sort(who)
	return strings.Join(who, " ")
}

func (m *members) opensCA() string {
	var who []string
	for name, n := range m.nodes {
		if key, err := n.caKey(m.state.View()); err == nil && string(key) == string(m.caKey) {
			who = append(who, name)
		}
	}
	slices.Sort(who)
	return strings.Join(who, " ")
}

// Each target's password can be opened by the nodes that may serve it, the
// authority's key by voters, through migration, joins, a changed configuration
// and a removal.
func TestSecretsPerTarget(t *testing.T) {
	m := newMembers(t)
	vaultSealed := func(target string) event.Sealed {
		s, err := vault.Seal(api.SecretName(secretOf(target)), []byte("pw-"+target), m.vault.Recipient())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	m.fold(event.TypeConfigApplied, event.ConfigApplied{Files: secretsConfig(map[string]string{"a": "", "b": ""}),
		Secrets: map[string]event.Sealed{secretOf("a"): vaultSealed("a"), secretOf("b"): vaultSealed("b")}})
	if v := m.state.View(); v.ConfigErr != nil {
		t.Fatal(v.ConfigErr)
	}
	m.join("n2", pki.Voter)
	check := func(when, a, b, ca string) {
		t.Helper()
		if x, y, z := m.opens("a"), m.opens("b"), m.opensCA(); x != a || y != b || z != ca {
			t.Fatalf("%s: a is opened by %q, b by %q, the CA's key by %q; want %q, %q, %q", when, x, y, z, a, b, ca)
		}
	}
	check("first release", "n1 n2", "n1 n2", "n1 n2")
	mask, err := m.nodes["n1"].maskKey(m.state.View())
	if err != nil {
		t.Fatal(err)
	}

	m.settle()
	if len(m.state.View().Keys) != 2 {
		t.Fatal("not migrated")
	}
	m.nodes["n2"].vault.Store(nil) // its own key alone is enough now
	check("migrated", "n1 n2", "n1 n2", "n1 n2")

	// A gateway comes without a vault.
	m.join("g1", pki.Gateway)
	check("g1 has just joined", "n1 n2", "n1 n2", "n1 n2")
	m.settle()
	check("g1 joined", "g1 n1 n2", "g1 n1 n2", "n1 n2")
	for _, n := range []string{"n1", "n2", "g1"} {
		if k, err := m.nodes[n].maskKey(m.state.View()); err != nil || !slices.Equal(k, mask) {
			t.Fatalf("%s hashes with another key: %v", n, err)
		}
	}

	// Target b is for g1 alone: not even the leader opens it any more.
	reapply := func(nodes string) {
		v := m.state.View()
		m.fold(event.TypeConfigApplied, event.ConfigApplied{Files: secretsConfig(map[string]string{"a": "", "b": nodes}), Secrets: v.Secrets, SealedTo: v.SealedTo})
	}
	reapply("nodes: [g1]")
	m.nodes["n1"].vault.Store(nil)
	if did := m.settle(); !slices.Equal(did, []string{"n1 " + secretOf("b")}) {
		t.Fatal(did)
	}
	check("b for g1", "g1 n1 n2", "g1", "n1 n2")

	// A node that may serve b too gets it from g1, since the leader cannot help.
	m.join("g2", pki.Gateway)
	m.settle()
	check("g2 joined", "g1 g2 n1 n2", "g1", "n1 n2")
	reapply("nodes: [g1, g2]")
	if did := m.settle(); !slices.Equal(did, []string{"g1 " + secretOf("b")}) {
		t.Fatal(did)
	}
	check("b for g1 and g2", "g1 g2 n1 n2", "g1 g2", "n1 n2")

	// Without g1, what is sealed anew is not for it.
	m.fold(event.TypeNodeRemoved, event.NodeRemoved{Name: "g1"})
	m.settle()
	check("g1 removed", "g2 n1 n2", "g2", "n1 n2")
}

// The leader takes secrets sealed anew only from nodes that could open them, for
// exactly those that may, and the cluster's own keys from nobody.
func TestSealedProposalsAreChecked(t *testing.T) {
	m := newMembers(t)
	m.settle()
	m.join("g1", pki.Gateway)
	m.join("g2", pki.Gateway)
	m.settle()
	seal := func(to ...string) (event.Sealed, event.Recipients) {
		var r event.Recipients
		for _, n := range to {
			r = append(r, m.nodes[n].ident.Recipient())
		}
		slices.Sort(r)
		s, err := vault.Seal(api.SecretName(secretOf("b")), []byte("pw-b"), r...)
		if err != nil {
			t.Fatal(err)
		}
		return s, r
	}
	blob, to := seal("g1")
	m.fold(event.TypeConfigApplied, event.ConfigApplied{Files: secretsConfig(map[string]string{"b": "nodes: [g1]"}),
		Secrets: map[string]event.Sealed{secretOf("b"): blob}, SealedTo: map[string]event.Recipients{secretOf("b"): to}})
	v := m.state.View()
	leader := &api.Server{Deps: api.Deps{Node: "n1", WantSealed: m.nodes["n1"].wantSealed}}
	one := func(nodes ...string) *event.SecretsSealed {
		s, r := seal(nodes...)
		return &event.SecretsSealed{Secrets: map[string]event.Sealed{secretOf("b"): s}, SealedTo: map[string]event.Recipients{secretOf("b"): r}}
	}
	if err := leader.CheckSealed(v, "g1", one("g1")); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		node string
		p    *event.SecretsSealed
	}{
		"a node that cannot open it":      {"g2", one("g1")},
		"for itself":                      {"g2", one("g2")},
		"for one more":                    {"g1", one("g1", "g2")},
		"for others":                      {"g1", one("g2")},
		"a secret that is not there":      {"g1", &event.SecretsSealed{Secrets: map[string]event.Sealed{"x": blob}, SealedTo: map[string]event.Recipients{"x": to}}},
		"the authority's key":             {"g1", &event.SecretsSealed{Keys: map[string]event.SealedKey{caKeyName: {Sealed: blob, SealedTo: to}}}},
		"the key of hashed masks":         {"g1", &event.SecretsSealed{Keys: map[string]event.SealedKey{maskKeyName: {Sealed: blob, SealedTo: to}}}},
		"an empty one":                    {"g1", &event.SecretsSealed{Secrets: map[string]event.Sealed{secretOf("b"): nil}, SealedTo: map[string]event.Recipients{secretOf("b"): to}}},
		"a node that is no member at all": {"x", one("g1")},
	} {
		if err := leader.CheckSealed(v, c.node, c.p); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

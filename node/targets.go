package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/bundle"
	"github.com/sallyport/sallyport/node/credential"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/mask"
	"github.com/sallyport/sallyport/protocols/postgres"
	"github.com/sallyport/sallyport/protocols/postgres/sql"
)

// targets turns the configuration's targets into what sessions use: accounts
// on them, and what their catalogues say.
type targets struct {
	n      *Node
	issuer *credential.Issuer

	mu       sync.Mutex
	catalogs map[catalogKey]*catalogEntry
	probed   map[string]probeResult
}

type catalogKey struct{ target, database string }

// catalogEntry is one database's catalogue, loaded by one caller at a time.
type catalogEntry struct {
	mu     sync.Mutex
	config uint64
	loaded time.Time
	c      *sql.Catalog
}

type probeResult struct {
	at    time.Time
	state string
}

const (
	// catalogAge is how old a catalogue may be when a statement is judged by
	// it: what someone changes at the target directly is seen within it.
	catalogAge = 2 * time.Second
	// probeAge is how long a target's check is good for `status`.
	probeAge = 15 * time.Second
	// sweepEvery is how often leftovers of crashed nodes are looked for.
	sweepEvery = time.Minute
)

func newTargets(n *Node) *targets {
	return &targets{
		n: n, catalogs: map[catalogKey]*catalogEntry{}, probed: map[string]probeResult{},
		issuer: credential.NewIssuer(credential.Options{Cluster: n.cluster, Node: n.cfg.Name, Dev: n.cfg.Dev, Log: n.log}),
	}
}

func (t *targets) close() { t.issuer.Close() }

// update takes up the targets of v. A target whose secret cannot be unsealed
// is left out: its sessions are refused.
func (t *targets) update(v *state.View) {
	var configs []credential.TargetConfig
	if v.Config != nil {
		for _, tg := range v.Config.Targets {
			if !tg.ServedBy(t.n.cfg.Name) {
				continue
			}
			if c, err := t.config(v, tg); errors.Is(err, vault.ErrNotSealedToUs) {
				// This node has just come, or may serve the target since just now:
				// another node seals the password to it in a moment.
				t.n.log.Info("a target's password is not sealed to this node yet", "target", tg.Name)
			} else if err != nil {
				t.n.log.Error("a target cannot be used", "target", tg.Name, "err", err)
			} else {
				configs = append(configs, c)
			}
		}
	}
	slices.SortFunc(configs, func(a, b credential.TargetConfig) int { return strings.Compare(a.Name, b.Name) })
	if err := t.issuer.Update(configs); err != nil {
		t.n.log.Error("targets could not be taken up; the earlier ones stand", "err", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.probed)
	for k := range t.catalogs {
		if v.Config == nil || v.Config.Targets[k.target] == nil {
			delete(t.catalogs, k)
		}
	}
}

func (t *targets) config(v *state.View, tg *bundle.Target) (credential.TargetConfig, error) {
	if tg.Dev && !t.n.cfg.Dev {
		return credential.TargetConfig{}, errors.New("it is for trials; this node was not started with --dev")
	}
	password, err := t.n.unseal(api.SecretName(tg.SecretName()), v.Secrets[tg.SecretName()])
	if err != nil {
		return credential.TargetConfig{}, err
	}
	c := credential.TargetConfig{
		Name: tg.Name, Address: tg.Address, TLSMode: string(tg.TLS.Mode), CA: tg.TLS.CA, ServerName: tg.TLS.ServerName,
		AdminUser: tg.Admin.User, AdminDatabase: tg.Admin.Database, AdminPassword: vault.NewSecret(string(password)), MaxSession: tg.MaxSession,
	}
	for _, r := range tg.Roles {
		c.Roles = append(c.Roles, credential.RoleRule{Groups: r.Groups, Profile: r.Profile, Role: r.Role})
	}
	return c, c.Validate(t.n.cfg.Dev)
}

func (t *targets) issue(ctx context.Context, target string, subject *policy.Subject, session, database, profile string, _ time.Time) (protocols.Lease, error) {
	l, err := t.issuer.Issue(ctx, target, subject, session, database, profile)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// catalog returns what the names in a database mean. refresh asks for one not
// older than the call.
func (t *targets) catalog(ctx context.Context, target, database string, refresh bool) (*sql.Catalog, error) {
	v := t.n.state.View()
	if v.Config == nil || v.Config.Targets[target] == nil {
		return nil, fmt.Errorf("target %q is not configured any more", target)
	}
	tg := v.Config.Targets[target]
	if !tg.Allows(database) {
		return nil, fmt.Errorf("database %q is not open on target %q any more", database, target)
	}
	k := catalogKey{target, database}
	t.mu.Lock()
	e := t.catalogs[k]
	if e == nil {
		e = &catalogEntry{}
		t.catalogs[k] = e
	}
	t.mu.Unlock()
	asked := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	age := time.Since(e.loaded)
	fresh := e.c != nil && e.config == v.ConfigIndex
	switch {
	case fresh && !refresh && age < catalogAge:
		return e.c, nil
	case fresh && e.loaded.After(asked): // while this call waited for its turn
		return e.c, nil
	}
	began := time.Now()
	var c *sql.Catalog
	err := t.issuer.WithConn(ctx, target, database, func(ctx context.Context, conn *pgx.Conn) error {
		var err error
		c, err = sql.Load(ctx, conn, sensitive(tg, database))
		return err
	})
	if err != nil {
		return nil, err
	}
	if e.c != nil && e.c.Equal(c) {
		c = e.c // the same meaning: analyses made with it stay good
	}
	e.c, e.loaded, e.config = c, began, v.ConfigIndex
	return c, nil
}

// probe says for each target whether the administrative account works.
func (t *targets) probe(ctx context.Context) map[string]string {
	v := t.n.state.View()
	if v.Config == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second) // a status waits no longer
	defer cancel()
	out := map[string]string{}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for name, tg := range v.Config.Targets {
		if !tg.ServedBy(t.n.cfg.Name) {
			continue
		}
		t.mu.Lock()
		p, ok := t.probed[name]
		t.mu.Unlock()
		if ok && time.Since(p.at) < probeAge {
			mu.Lock()
			out[name] = p.state
			mu.Unlock()
			continue
		}
		wg.Go(func() {
			p := probeResult{time.Now(), "ok"}
			if err := t.issuer.Check(ctx, name); err != nil {
				p.state = err.Error()
			}
			t.mu.Lock()
			t.probed[name] = p
			t.mu.Unlock()
			mu.Lock()
			out[name] = p.state
			mu.Unlock()
		})
	}
	wg.Wait()
	return out
}

// sweep drops accounts that crashed nodes left on the targets.
func (t *targets) sweep(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		if v := t.n.state.View(); v.Config != nil {
			for name, tg := range v.Config.Targets {
				if !tg.ServedBy(t.n.cfg.Name) {
					continue
				}
				sctx, cancel := context.WithTimeout(ctx, 30*time.Second)
				dropped, err := t.issuer.Sweep(sctx, name, t.liveness)
				cancel()
				if err != nil && ctx.Err() == nil {
					t.n.log.Warn("looking for leftover accounts", "target", name, "err", err)
				}
				if dropped > 0 {
					t.n.log.Info("dropped accounts that a crash left", "target", name, "accounts", dropped)
				}
			}
		}
		changed := t.n.state.Changed()
		if t.n.state.View().Config == nil {
			select { // until there is something to sweep
			case <-changed:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// liveness is what this node knows of a session: everything of its own, that
// removed nodes have none, and nothing of the others.
func (t *targets) liveness(node, session string) credential.Liveness {
	switch {
	case node == t.n.cfg.Name && t.n.sessions.Has(session):
		return credential.Live
	case node == t.n.cfg.Name, t.n.state.View().Removed[node]:
		return credential.Dead
	}
	return credential.Unknown
}

// newPostgres is the PostgreSQL protocol on this node's targets.
func (n *Node) newPostgres() *postgres.Protocol {
	target := func(name string) *bundle.Target {
		if v := n.state.View(); v.Config != nil {
			return v.Config.Targets[name]
		}
		return nil
	}
	return postgres.New(postgres.Config{
		TLS:     n.serverTLS(),
		Catalog: n.targets.catalog,
		SearchPath: func(name string) []string {
			if t := target(name); t != nil {
				return t.SearchPath
			}
			return nil
		},
		HashKey: func() []byte {
			// A node without the key has no target's password either.
			key, err := n.maskKey(n.state.View())
			if err != nil {
				n.log.Error("values cannot be hashed", "err", err)
			}
			return key
		},
		MaskKind: func(col policy.Resource) mask.Kind {
			if t := target(col.Path[0]); t != nil {
				for _, s := range t.Sensitive {
					if s.Database == col.Path[1] && s.Schema == col.Path[2] && s.Table == col.Path[3] && s.Column == col.Path[4] {
						return maskKind(s.Mask)
					}
				}
			}
			return mask.Redact
		},
	})
}

func maskKind(m bundle.Mask) mask.Kind {
	switch m {
	case bundle.MaskNull:
		return mask.Null
	case bundle.MaskHash:
		return mask.Hash
	case bundle.MaskLast4:
		return mask.Last4
	}
	return mask.Redact
}

// Package state is the projection of the event log that a node acts on. It
// folds events into immutable Views behind one atomic pointer: readers never
// wait, and a View never changes under them.
package state

import (
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/node/bundle"
	"github.com/sallyport/sallyport/raftstore/event"
)

// keepEnded bounds the approvals and join tokens that are over and still
// shown; the event log keeps all of them.
const keepEnded = 1000

// View is what the cluster has agreed on up to one event. It is immutable;
// its maps must not be written to. What grows with the number of events is in
// a Map or a list that later Views share: folding one event costs about the
// same after ten thousand of them.
type View struct {
	Seq, Index uint64 // of the last event folded

	FeatureLevel uint32        // what may be stored: see event.FeatureLevel
	LongestLease time.Duration // that any leader may have granted; 0: none was announced

	ClusterID      string
	CA             []byte // DER
	CAKey          event.Sealed
	VaultRecipient string
	AdminCertFP    string

	Voters int // how many are wanted, 0 while nobody has said: see WantVoters

	Nodes       map[string]event.NodeInfo
	Superseded  map[string][]byte // by node: the certificate before Nodes' one, while both count; DER
	Removed     map[string]bool   // names of nodes that were members once
	JoinTokens  Map[JoinToken]
	Approvals   Map[*Approval]
	Revocations Map[*Revocation]

	// Config is nil until the first apply, and when ConfigErr says why the
	// applied one cannot be read: then nobody may connect.
	Config      *bundle.Bundle
	ConfigErr   error
	ConfigIndex uint64
	Secrets     map[string]event.Sealed
	// SealedTo says whom each of Secrets is sealed to; one that is missing is
	// sealed to the vault key.
	SealedTo map[string]event.Recipients
	// Keys are the cluster's own keys, by name. Empty while they are sealed to
	// the vault key: before the first event.SecretsSealed.
	Keys          map[string]event.SealedKey
	ConfigVersion uint64 // of the aggregate "config": what an append that changes Secrets or Keys expects

	// pruneTokens and pruneApprovals are how many there must be before those
	// that are over are looked through again.
	pruneTokens, pruneApprovals int

	unfenced   unfenced
	scopes     scopes
	tolerances []toleranceFrom
}

// WantVoters is how many voters the cluster is to have.
func (v *View) WantVoters() int {
	if v.Voters == 0 {
		return 3
	}
	return v.Voters
}

// JoinToken is a one-time token for `cluster join`.
type JoinToken struct {
	event.JoinTokenMade
	UsedBy string
}

// Vote is one approver's decision.
type Vote struct {
	event.ApprovalVoted
	At  time.Time
	Seq uint64
}

// Approval is an approval request and what became of it.
type Approval struct {
	event.ApprovalAsked
	Asked   time.Time
	Version uint64
	Votes   []Vote
	Ended   *event.ApprovalEnded
	EndedAt time.Time
}

// State says where the request stands at now: pending, approved, denied,
// used, expired or cancelled.
func (a *Approval) State(now time.Time) string {
	if a.Ended != nil {
		return a.Ended.How
	}
	approvers := map[string]bool{}
	for _, v := range a.Votes {
		if !v.Approve {
			return "denied"
		}
		approvers[v.Approver] = true
	}
	switch {
	case now.After(a.Expires):
		return "expired"
	case len(approvers) >= a.Count:
		return "approved"
	}
	return "pending"
}

// A Projection folds events.
type Projection struct {
	view atomic.Pointer[View]
	log  *slog.Logger
	mu   struct {
		sync.Mutex
		listeners []func(old, new *View, events []event.Event)
		changed   chan struct{}
	}
}

// New returns a Projection of no events.
func New(log *slog.Logger) *Projection {
	p := &Projection{log: log}
	p.mu.changed = make(chan struct{})
	p.view.Store(empty())
	return p
}

// empty is the View before the first event.
func empty() *View {
	return &View{
		FeatureLevel: event.BaseLevel,
		Nodes:        map[string]event.NodeInfo{}, Removed: map[string]bool{},
		Secrets:     map[string]event.Sealed{},
		pruneTokens: 2 * keepEnded, pruneApprovals: 2 * keepEnded,
	}
}

// View returns the newest view. It never blocks.
func (p *Projection) View() *View { return p.view.Load() }

// OnChange adds a listener, called after each change in the order of events,
// on the goroutine that folds: it must not block. Add listeners before the
// first Fold.
func (p *Projection) OnChange(f func(old, new *View, events []event.Event)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.listeners = append(p.mu.listeners, f)
}

// Changed returns a channel that is closed at the next change after the call.
func (p *Projection) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.changed
}

// Fold applies events, which must follow on those folded before. Only one
// goroutine may call it. An error means that an event could not be understood:
// the node must stop, since it would act on a state the others do not have.
func (p *Projection) Fold(events []event.Event) error {
	old := p.View()
	v := *old
	f := fold{v: &v}
	for _, e := range events {
		if e.Seq != v.Seq+1 {
			return fmt.Errorf("state: event %d follows event %d", e.Seq, v.Seq)
		}
		if err := f.apply(e); err != nil {
			return fmt.Errorf("state: event %d (%s): %w", e.Seq, e.Type, err)
		}
		v.Seq, v.Index = e.Seq, e.Index
	}
	if v.ConfigErr != nil && old.ConfigErr == nil {
		p.log.Error("the applied configuration cannot be used; all sessions are refused", "err", v.ConfigErr)
	}
	p.view.Store(&v)
	p.mu.Lock()
	listeners := p.mu.listeners
	p.mu.Unlock()
	for _, l := range listeners {
		l(old, &v, events)
	}
	// Whoever waits is woken when the listeners have acted, so that it can wait
	// for what they do as well as for the view.
	p.mu.Lock()
	changed := p.mu.changed
	p.mu.changed = make(chan struct{})
	p.mu.Unlock()
	close(changed)
	return nil
}

// fold makes the next view. It copies each plain map once, when it is first
// written to.
type fold struct {
	v              *View
	nodes, removed bool
}

func own[K comparable, V any](m *map[K]V, owned *bool) map[K]V {
	if !*owned {
		*m, *owned = maps.Clone(*m), true
	}
	return *m
}

func (f *fold) apply(e event.Event) error {
	switch e.Type {
	case event.TypeClusterCreated:
		p, err := event.Decode[event.ClusterCreated](e)
		if err != nil {
			return err
		}
		f.v.ClusterID, f.v.CA, f.v.CAKey = p.ID, p.CA, p.CAKey
		f.v.VaultRecipient, f.v.AdminCertFP = p.VaultRecipient, p.AdminCertFP
		own(&f.v.Nodes, &f.nodes)[p.Node.Name] = p.Node
	case event.TypeFeatureLevel:
		p, err := event.Decode[event.FeatureLevel](e)
		if err != nil {
			return err
		}
		f.v.FeatureLevel = p.Level
	case event.TypeVotersSet:
		p, err := event.Decode[event.VotersSet](e)
		if err != nil {
			return err
		}
		f.v.Voters = p.Voters
	case event.TypeNodeJoined:
		p, err := event.Decode[event.NodeJoined](e)
		if err != nil {
			return err
		}
		own(&f.v.Nodes, &f.nodes)[p.Node.Name] = p.Node
		delete(own(&f.v.Removed, &f.removed), p.Node.Name)
	case event.TypeNodeRemoved:
		p, err := event.Decode[event.NodeRemoved](e)
		if err != nil {
			return err
		}
		delete(own(&f.v.Nodes, &f.nodes), p.Name)
		f.supersede(p.Name, nil)
		own(&f.v.Removed, &f.removed)[p.Name] = true
	case event.TypeJoinTokenMade:
		p, err := event.Decode[event.JoinTokenMade](e)
		if err != nil {
			return err
		}
		m := f.v.JoinTokens.With(p.ID, JoinToken{JoinTokenMade: p})
		f.v.JoinTokens, f.v.pruneTokens = prune(m, f.v.pruneTokens, func(t JoinToken) (time.Time, bool) {
			return t.Expires, t.UsedBy != "" || e.Time.After(t.Expires)
		})
	case event.TypeJoinTokenUsed:
		p, err := event.Decode[event.JoinTokenUsed](e)
		if err != nil {
			return err
		}
		t := f.v.JoinTokens.Get(p.ID)
		t.UsedBy = p.Node
		f.v.JoinTokens = f.v.JoinTokens.With(p.ID, t)
	case event.TypeConfigApplied:
		p, err := event.Decode[event.ConfigApplied](e)
		if err != nil {
			return err
		}
		f.config(p)
		f.v.ConfigIndex, f.v.ConfigVersion = e.Index, e.AggregateVersion
		f.tolerance(e.Index)
	case event.TypeLeaseLengthened:
		p, err := event.Decode[event.LeaseLengthened](e)
		if err != nil {
			return err
		}
		f.v.LongestLease = max(f.v.LongestLease, time.Duration(p.Nanoseconds))
	case event.TypeSecretsSealed:
		p, err := event.Decode[event.SecretsSealed](e)
		if err != nil {
			return err
		}
		f.v.ConfigVersion = e.AggregateVersion
		f.sealed(p)
	case event.TypeClusterRestored:
		p, err := event.Decode[event.ClusterRestored](e)
		if err != nil {
			return err
		}
		f.restored(p)
	case event.TypeNodeRenewed:
		p, err := event.Decode[event.NodeRenewed](e)
		if err != nil {
			return err
		}
		f.renewed(p)
	case event.TypeApprovalAsked, event.TypeApprovalVoted, event.TypeApprovalEnded:
		return f.approval(e)
	case event.TypeRevoked, event.TypeRevocationUndone, event.TypeRevocationReport, event.TypeRevocationFenced:
		return f.revocation(e)
	case event.TypeCheckpoint: // node/eventlog checks it; nothing is decided from it
	default:
		if !event.TestOnly(e.Type) {
			return fmt.Errorf("unknown type of event")
		}
	}
	return nil
}

func (f *fold) config(p event.ConfigApplied) {
	names := slices.Sorted(maps.Keys(p.Secrets))
	// Whether this node takes part in what is for trials only is its own
	// setting, so it must not change what the configuration means: providers
	// and targets marked dev are refused where they are used.
	b, problems := bundle.Parse(p.Files, names, bundle.ParseOptions{Dev: true})
	f.v.Secrets, f.v.SealedTo = p.Secrets, p.SealedTo
	f.v.Config, f.v.ConfigErr = b, nil
	if len(problems) > 0 {
		f.v.Config, f.v.ConfigErr = nil, fmt.Errorf("%s (and %d more)", problems[0], len(problems)-1)
	}
}

func (f *fold) sealed(p event.SecretsSealed) {
	secrets, to, keys := maps.Clone(f.v.Secrets), maps.Clone(f.v.SealedTo), maps.Clone(f.v.Keys)
	if to == nil {
		to = map[string]event.Recipients{}
	}
	if keys == nil {
		keys = map[string]event.SealedKey{}
	}
	for name, s := range p.Secrets {
		if _, ok := secrets[name]; ok {
			secrets[name], to[name] = s, p.SealedTo[name]
		}
	}
	maps.Copy(keys, p.Keys)
	f.v.Secrets, f.v.SealedTo, f.v.Keys = secrets, to, keys
}

func (f *fold) restored(p event.ClusterRestored) {
	removed := own(&f.v.Removed, &f.removed)
	for name := range f.v.Nodes {
		removed[name] = true
	}
	f.v.Nodes, f.nodes = map[string]event.NodeInfo{p.Node.Name: p.Node}, true
	f.v.Superseded = nil
	f.v.JoinTokens = Map[JoinToken]{}
	f.v.Keys = nil
	f.sealed(p.Secrets)
}

func (f *fold) renewed(p event.NodeRenewed) {
	info, ok := f.v.Nodes[p.Name]
	switch {
	case !ok: // removed meanwhile
	case p.Retired:
		f.supersede(p.Name, nil)
	default:
		f.supersede(p.Name, info.Cert)
		info.Cert = p.Cert
		own(&f.v.Nodes, &f.nodes)[p.Name] = info
	}
}

// supersede notes the certificate that counts beside the newest of a node, or
// that none does.
func (f *fold) supersede(node string, cert []byte) {
	m := maps.Clone(f.v.Superseded)
	if m == nil {
		m = map[string][]byte{}
	}
	if m[node] = cert; cert == nil {
		delete(m, node)
	}
	f.v.Superseded = m
}

func (f *fold) approval(e event.Event) error {
	switch e.Type {
	case event.TypeApprovalAsked:
		p, err := event.Decode[event.ApprovalAsked](e)
		if err != nil {
			return err
		}
		m := f.v.Approvals.With(p.ID, &Approval{ApprovalAsked: p, Asked: e.Time, Version: e.AggregateVersion})
		f.v.Approvals, f.v.pruneApprovals = prune(m, f.v.pruneApprovals, func(a *Approval) (time.Time, bool) {
			s := a.State(e.Time)
			return a.Asked, s != "pending" && s != "approved"
		})
	case event.TypeApprovalVoted:
		p, err := event.Decode[event.ApprovalVoted](e)
		if err != nil {
			return err
		}
		if a := f.v.Approvals.Get(p.ID); a != nil {
			c := *a
			c.Votes = append(slices.Clip(c.Votes), Vote{p, e.Time, e.Seq})
			c.Version = e.AggregateVersion
			f.v.Approvals = f.v.Approvals.With(p.ID, &c)
		}
	case event.TypeApprovalEnded:
		p, err := event.Decode[event.ApprovalEnded](e)
		if err != nil {
			return err
		}
		if a := f.v.Approvals.Get(p.ID); a != nil {
			c := *a
			c.Ended, c.EndedAt, c.Version = &p, e.Time, e.AggregateVersion
			f.v.Approvals = f.v.Approvals.With(p.ID, &c)
		}
	}
	return nil
}

// prune drops the oldest of what is over, all but keepEnded, once there are
// more than at, and says how many there must be the next time: so many more
// that looking through all costs little for each.
func prune[T any](m Map[T], at int, over func(T) (when time.Time, is bool)) (Map[T], int) {
	if m.Len() <= at {
		return m, at
	}
	type ended struct {
		id   string
		when time.Time
	}
	var all []ended
	for id, v := range m.All() {
		if when, is := over(v); is {
			all = append(all, ended{id, when})
		}
	}
	slices.SortFunc(all, func(a, b ended) int { return cmp.Or(a.when.Compare(b.when), strings.Compare(a.id, b.id)) })
	for _, e := range all[:max(0, len(all)-keepEnded)] {
		m = m.Without(e.id)
	}
	return m, max(2*keepEnded, m.Len()+keepEnded)
}

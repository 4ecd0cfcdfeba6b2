package node

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/autopilot"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/raftstore"
)

const (
	// memberTick is how often the leader asks how the voters, and those that
	// could be, do; memberHurry, while there are too few voters.
	memberTick  = time.Second
	memberHurry = 200 * time.Millisecond
	memberAsk   = 2 * time.Second
	// maxAsked bounds whom the leader asks: all voters and some spares. Thirty
	// spares are as good as a thousand.
	maxAsked = 32
	// contactGood is how long ago a node that does well has heard of the leader.
	contactGood = 5 * time.Second
	// logGood is how many entries a voter's log may be behind: 16 rounds of
	// replication. logCaught is how many a log may be behind to vote.
	logGood   = 4096
	logCaught = 256
	// stepTimeout bounds one change of Raft's configuration.
	stepTimeout = 15 * time.Second
)

// membership keeps, at the leader, as many voters as wanted. What it knows of the
// others it has asked itself.
type membership struct {
	n    *Node
	kick chan struct{} // one token: look now

	mu      sync.Mutex
	leaving map[string]bool     // to lose their vote, and be replaced first
	known   map[string]*contact // since this node leads; nil while it does not
}

// contact is what the leader has heard of a node.
type contact struct {
	alive       bool
	since, last time.Time // alive from; last answer
	caught      bool
	zone        string
	level       uint32
}

func newMembership(n *Node) *membership {
	return &membership{n: n, kick: make(chan struct{}, 1), leaving: map[string]bool{}}
}

// look makes run look at once.
func (m *membership) look() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// run takes autopilot's steps while this node leads, until ctx ends.
func (m *membership) run(ctx context.Context) error {
	tick := time.NewTimer(memberTick)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-m.kick:
		case <-ctx.Done():
			return nil
		}
		next := memberTick
		if !m.n.store.IsLeader() || m.n.state.View().Seq == 0 {
			m.mu.Lock()
			m.known = nil
			m.mu.Unlock()
		} else if m.round(ctx) {
			next = memberHurry
		}
		tick.Reset(next)
	}
}

// round asks, plans and takes one step; hurry says that the next is due soon.
func (m *membership) round(ctx context.Context) (hurry bool) {
	servers, err := m.n.store.Members()
	if err != nil || len(servers) == 0 {
		return false
	}
	v, level := m.n.state.View(), m.n.store.FeatureLevel()
	m.ask(ctx, v, servers)
	m.mu.Lock()
	nodes := m.nodes(v, level, servers)
	m.mu.Unlock()
	want := v.WantVoters()
	s := autopilot.Plan(want, m.n.cfg.Name, nodes, time.Now())
	if s.Action == autopilot.None {
		voters, waiting := 0, false
		for _, n := range nodes {
			if n.Voter {
				voters++
			}
			waiting = waiting || n.Eligible && !n.Voter
		}
		return waiting && voters < min(want, autopilot.MinVoters)
	}
	log := m.n.log.With("step", string(s.Action), "member", s.Node, "why", s.Why)
	sctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	if err := m.step(sctx, v, s); err != nil {
		log.Warn("a change of voters was not made; it will be tried again", "err", err)
		return false
	}
	log.Info("voters changed")
	return true
}

func (m *membership) step(ctx context.Context, v *state.View, s autopilot.Step) error {
	store := m.n.store
	switch s.Action {
	case autopilot.Stage:
		return store.AddNonvoter(ctx, s.Node, v.Nodes[s.Node].Addr)
	case autopilot.Promote:
		return store.AddVoter(ctx, s.Node, v.Nodes[s.Node].Addr)
	case autopilot.Transfer:
		return store.TransferLeadership(ctx)
	case autopilot.Withdraw:
		// In two steps, so that a running node hears that it has no vote.
		if err := store.Demote(ctx, s.Node); err != nil {
			return err
		}
		return store.Remove(ctx, s.Node)
	}
	return fmt.Errorf("no such step: %q", s.Action)
}

// ask asks all in Raft, and spares, how they do.
func (m *membership) ask(ctx context.Context, v *state.View, servers []raftstore.Member) {
	whom := map[string]bool{}
	for _, s := range servers {
		whom[s.ID] = true
	}
	for _, name := range slices.Sorted(maps.Keys(v.Nodes)) {
		if len(whom) < maxAsked && v.Nodes[name].Role == pki.Voter {
			whom[name] = true
		}
	}
	commit := m.n.store.Status().CommitIndex
	answers := make(chan struct {
		name string
		h    api.Health
		err  error
	})
	for name := range whom {
		go func() {
			a := struct {
				name string
				h    api.Health
				err  error
			}{name: name}
			if name == m.n.cfg.Name {
				a.h = m.n.health()
			} else {
				actx, cancel := context.WithTimeout(ctx, memberAsk)
				defer cancel()
				a.h, a.err = m.n.api.HealthOf(actx, name)
			}
			answers <- a
		}()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	known := map[string]*contact{}
	for name := range whom {
		c := m.known[name]
		if c == nil {
			c = &contact{last: now}
		}
		known[name] = c
	}
	m.known = known
	for range whom {
		m.mu.Unlock()
		a := <-answers
		m.mu.Lock()
		c, now := known[a.name], time.Now()
		well := a.err == nil && a.h.Contact >= 0 && a.h.Contact < contactGood
		if a.h.State != "subscriber" {
			well = well && a.h.LastIndex+logGood >= commit
		}
		if well {
			c.last, c.zone, c.level = now, a.h.Zone, a.h.FeatureLevel
			c.caught = a.h.State != "subscriber" && a.h.LastIndex+logCaught >= commit
		}
		if well && !c.alive {
			c.since = now
		}
		c.alive = well
	}
}

// nodes is what autopilot sees. m.mu is held.
func (m *membership) nodes(v *state.View, level uint32, servers []raftstore.Member) (out []autopilot.Node) {
	now := time.Now()
	for name, c := range m.known {
		info, member := v.Nodes[name]
		n := autopilot.Node{
			Name: name, Zone: c.zone, Alive: c.alive, Since: c.since, Silent: now.Sub(c.last), Caught: c.caught,
			// Whoever has never answered has said no level, and is not alive either.
			Eligible: member && info.Role == pki.Voter && !m.leaving[name] && (c.level >= level || c.level == 0),
		}
		if n.Zone == "" {
			n.Zone = info.Zone
		}
		for _, s := range servers {
			if s.ID == name {
				n.InRaft, n.Voter = true, s.Voter
			}
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b autopilot.Node) int { return compare(a.Name, b.Name) })
	return out
}

func compare(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

var errNotLeading = errors.New("this node does not lead any more")

// release has a node replaced, if there is anybody to replace it, and taken out
// of Raft; it returns when it is out. Leader only.
func (m *membership) release(ctx context.Context, name string) error {
	m.mu.Lock()
	m.leaving[name] = true
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.leaving, name)
	}()
	m.look()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		servers, err := m.n.store.Members()
		if err != nil {
			return err
		}
		if !m.n.store.IsLeader() {
			return errNotLeading
		}
		if !slices.ContainsFunc(servers, func(s raftstore.Member) bool { return s.ID == name }) {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s was not taken out of Raft in time, for the lack of a majority or of a healthy replacement: %w", name, ctx.Err())
		}
	}
}

// health is this node's answer to the leader.
func (n *Node) health() api.Health {
	st := n.store.Status()
	return api.Health{
		State: st.State, Term: st.Term, LastIndex: st.LastIndex, Events: st.Seq, Contact: st.LastContact, Source: st.Source, Relays: st.Relays,
		Serving: n.serving.Load(), Version: n.version, FeatureLevel: n.featureLevel(), Zone: n.cfg.Zone,
	}
}

// sources are the nodes that may feed this one, best first: voters of its own
// zone; if there are none, others there that may be voters, so that one stream
// for the zone crosses the distance; the other voters; all others that may be
// voters. Their certificates say that their word is good enough for Raft; a
// gateway's is not. Who is first among equals depends on the name, so that not
// all take the same.
func (n *Node) sources() []raftstore.Source {
	v := n.state.View()
	infos := map[string]bool{}
	var out []raftstore.Source
	add := func(name, addr string) {
		if name != n.cfg.Name && !infos[name] {
			infos[name] = true
			out = append(out, raftstore.Source{ID: name, Addr: addr})
		}
	}
	if v.Seq == 0 {
		for _, s := range n.seeds {
			if s.Role == pki.Voter {
				add(s.Name, s.Addr)
			}
		}
		return out
	}
	votes := map[string]bool{}
	servers, _ := n.store.Members()
	for _, s := range servers {
		votes[s.ID] = s.Voter
	}
	leader, _ := n.store.Leader()
	rank := func(name string) int {
		near := n.cfg.Zone != "" && v.Nodes[name].Zone == n.cfg.Zone
		switch {
		case near && votes[name]:
			return 0
		case near && n.role != pki.Voter:
			return 1
		case votes[name] && name != leader:
			return 2
		case votes[name]:
			return 3 // it has enough to do
		}
		return 4
	}
	spread := func(name string) uint32 {
		h := fnv.New32a()
		h.Write([]byte(n.cfg.Name + "\x00" + name))
		return h.Sum32()
	}
	var names []string
	for name, info := range v.Nodes {
		if info.Role == pki.Voter {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		if d := rank(a) - rank(b); d != 0 {
			return d
		}
		if x, y := spread(a), spread(b); x != y {
			if x < y {
				return -1
			}
			return 1
		}
		return compare(a, b)
	})
	for _, name := range names {
		add(name, v.Nodes[name].Addr)
	}
	return out
}

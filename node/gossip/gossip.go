// Package gossip lets nodes tell each other how they are: health, zone, version
// and feature level, by SWIM (hashicorp/memberlist) over the node's own
// endpoint. Every node hears of every other within seconds, also of those it
// exchanges nothing with.
//
// It is a hint for people who look at `sallyport status`. Nothing is decided
// from it: any member can say anything of any other. Who votes, who leads, who
// holds a lease and whose sessions go on is decided by Raft, the event log and
// the fence; a test keeps this package's users to the status.
//
// What is said is encrypted and authenticated twice: by TLS with the nodes'
// certificates, so that a node that was removed is heard no more, and under a
// key that only members hold.
package gossip

import (
	"context"
	"encoding/json"
	"errors"
	"log"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	// rejoinEvery is how often members that are not heard are tried again, and
	// what we say of ourselves is looked at.
	rejoinEvery = 5 * time.Second
	// maxText bounds each text that others see of us, and we of them: SWIM
	// carries 512 bytes in all.
	maxText = 64
	// leaveTimeout bounds how long the others are told that we stop.
	leaveTimeout = time.Second
)

// Info is what a node says of itself.
type Info struct {
	Zone         string `json:"zone,omitempty"`
	Version      string `json:"version,omitempty"`
	FeatureLevel uint32 `json:"level,omitempty"`
	Serving      bool   `json:"serving"`
	Problem      string `json:"problem,omitempty"` // the worst there is, in a few words
}

// States of a Member.
const (
	Alive   = "alive"
	Dead    = "dead"    // it did not answer several others, or said that it leaves
	Unknown = "unknown" // never heard
)

// Member is what is said of a node. It may be wrong.
type Member struct {
	Name  string    `json:"name"`
	State string    `json:"state"`
	Since time.Time `json:"since,omitzero"` // of the state, as this node heard it
	Info
}

// Options are what Gossip needs of its node. All must be set.
type Options struct {
	Node string
	// Dial opens a stream to another member's gossip, Listener takes theirs.
	Dial     func(ctx context.Context, node string) (net.Conn, error)
	Listener net.Listener
	// Members are the names of all members, this node included. What is said of
	// others is not listened to.
	Members func() []string
	// Key is 32 bytes that all members hold; an error says that this node has it
	// not yet.
	Key func() ([]byte, error)
	// Info is what this node says of itself.
	Info func() Info
	Log  *slog.Logger
}

// Gossip is one node's part.
type Gossip struct {
	o  Options
	mu struct {
		sync.Mutex
		heard map[string]Member // of members, those ever heard
	}
	probe, gossip time.Duration // tests are in a hurry
}

// New returns a Gossip; Run makes it live.
func New(o Options) *Gossip {
	g := &Gossip{o: o, probe: time.Second, gossip: 200 * time.Millisecond}
	g.mu.heard = map[string]Member{}
	return g
}

// Run gossips until ctx ends. It fails only when this node's own part cannot
// be set up.
func (g *Gossip) Run(ctx context.Context) error {
	key, err := g.awaitKey(ctx)
	if err != nil {
		return nil // told to stop
	}
	ring, err := memberlist.NewKeyring(nil, key)
	if err != nil {
		return err
	}
	t := newTransport(ctx, g.o)
	defer t.close()
	list, err := memberlist.Create(g.config(t, ring))
	if err != nil {
		return err
	}
	tick := time.NewTicker(rejoinEvery)
	defer tick.Stop()
	said := g.meta()
	for {
		g.rejoin(list)
		select {
		case <-tick.C:
		case <-ctx.Done():
			_ = list.Leave(leaveTimeout) // who does not hear it in time finds out
			return list.Shutdown()
		}
		if now := g.meta(); string(now) != string(said) {
			said = now
			_ = list.UpdateNode(leaveTimeout) // it goes round all the same
		}
		if now, err := g.o.Key(); err == nil && string(now) != string(ring.GetPrimaryKey()) {
			if err := errors.Join(ring.AddKey(now), ring.UseKey(now)); err != nil {
				g.o.Log.Warn("gossip: the new key cannot be used", "err", err)
			}
		}
	}
}

func (g *Gossip) awaitKey(ctx context.Context) ([]byte, error) {
	tick := time.NewTicker(rejoinEvery / 10)
	defer tick.Stop()
	for {
		if key, err := g.o.Key(); err == nil {
			return key, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (g *Gossip) config(t *transport, ring *memberlist.Keyring) *memberlist.Config {
	c := memberlist.DefaultLANConfig()
	c.Name = g.o.Node
	c.Transport = t
	c.RequireNodeNames = true // the transport dials by name
	c.Keyring = ring
	c.DisableTcpPings = true // packets and streams go the same way
	c.EnableCompression = false
	c.ProbeInterval, c.ProbeTimeout, c.GossipInterval = g.probe, g.probe/2, g.gossip
	c.Delegate = delegate{g}
	c.Alive = delegate{g}
	c.Events = delegate{g}
	c.DNSConfigPath = ""
	c.LogOutput = nil
	c.Logger = log.New(logWriter{g.o.Log}, "", 0)
	return c
}

// rejoin calls those members that are not heard.
func (g *Gossip) rejoin(list *memberlist.Memberlist) {
	var missing []string
	for _, m := range g.Members() {
		if m.State != Alive && m.Name != g.o.Node {
			missing = append(missing, m.Name+"/"+anywhere.String())
		}
	}
	if len(missing) > 0 {
		_, _ = list.Join(missing) // those that are down stay missing
	}
}

// Members is what is said of all members, by name.
func (g *Gossip) Members() []Member {
	names := slices.Clone(g.o.Members())
	slices.Sort(names)
	out := make([]Member, 0, len(names))
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, name := range names {
		m, known := g.mu.heard[name]
		if !known {
			m = Member{Name: name, State: Unknown}
		}
		out = append(out, m)
	}
	for name := range g.mu.heard { // who is no member any more is forgotten
		if _, ok := slices.BinarySearch(names, name); !ok {
			delete(g.mu.heard, name)
		}
	}
	return out
}

// hear takes note of what memberlist tells. It holds locks of its own then, and
// the node is not to be kept.
func (g *Gossip) hear(n *memberlist.Node, state string) {
	m := Member{Name: n.Name, State: state, Since: time.Now().UTC()}
	_ = json.Unmarshal(n.Meta, &m.Info) // a hint that cannot be read is none
	m.clip()
	g.mu.Lock()
	defer g.mu.Unlock()
	if before := g.mu.heard[n.Name]; before.State == state {
		m.Since = before.Since
	}
	g.mu.heard[n.Name] = m
}

// clip bounds what comes from others or goes to them.
func (i *Info) clip() {
	for _, s := range []*string{&i.Zone, &i.Version, &i.Problem} {
		*s = strings.ToValidUTF8((*s)[:min(len(*s), maxText)], "")
	}
}

func (g *Gossip) meta() []byte {
	i := g.o.Info()
	i.clip()
	b, err := json.Marshal(i)
	if err != nil || len(b) > memberlist.MetaMaxSize {
		return nil
	}
	return b
}

// delegate is what memberlist asks us.
type delegate struct{ g *Gossip }

func (d delegate) NodeMeta(int) []byte             { return d.g.meta() }
func (delegate) NotifyMsg([]byte)                  {}
func (delegate) GetBroadcasts(int, int) [][]byte   { return nil }
func (delegate) LocalState(bool) []byte            { return nil }
func (delegate) MergeRemoteState(_ []byte, _ bool) {}

func (d delegate) NotifyJoin(n *memberlist.Node)   { d.g.hear(n, Alive) }
func (d delegate) NotifyUpdate(n *memberlist.Node) { d.g.hear(n, Alive) }
func (d delegate) NotifyLeave(n *memberlist.Node)  { d.g.hear(n, Dead) }

var errNoMember = errors.New("not a member of the cluster")

// NotifyAlive keeps names that are none of the members' out, so that nobody can
// make the list grow.
func (d delegate) NotifyAlive(n *memberlist.Node) error {
	if !slices.Contains(d.g.o.Members(), n.Name) {
		return errNoMember
	}
	return nil
}

// logWriter turns memberlist's lines into ours, at debug level: that a node
// does not answer shows in the status.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(b []byte) (int, error) {
	w.log.Debug("gossip: " + strings.TrimSpace(string(b)))
	return len(b), nil
}

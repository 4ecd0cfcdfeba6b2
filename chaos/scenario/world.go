// Package scenario plays faults to a real installation under load and judges
// what was seen. Every node is a process in a network namespace of its own;
// clients, PostgreSQL and the object store are outside of them. A scenario
// says which faults; what is checked is the same for all.
package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/chaos/sandbox"
	"github.com/sallyport/sallyport/node/api"
)

// World is one run: a cluster, its network, its load, and what was written down.
type World struct {
	*cluster.Cluster
	Box  *sandbox.Sandbox
	rng  *rand.Rand // the scenario's goroutine only
	seed uint64
	time time.Duration // asked for; 0 for what the scenario says
	out  string        // where journals go
	log  *log.Logger

	hosts []*sandbox.Host // by node
	flood atomic.Bool     // sessions are revoked as soon as they are there: nobody waits for some
	nodes []*node         // those that are or were members; AddNode adds
	load  *load
	s3    *s3Server // where the scenario wants one

	mu      sync.Mutex
	skipped map[string]string // faults that this machine cannot have -> why
	clients map[*node]*api.Client
	journal *json.Encoder
	file    *os.File
}

// node is a node with its host and what the nemesis did to it.
type node struct {
	*cluster.Node
	host    *sandbox.Host
	capture *sandbox.Capture
	disk    string // file that controls its disk, where the binary has the hooks
	// env and under are for its next start: further variables, and a program
	// that starts it.
	env, under []string

	mu      sync.Mutex
	stopped []interval // its process was not let run
	silent  []interval // nobody could hear it
	gone    bool       // removed from the cluster
}

type interval struct{ from, to time.Time } // to is zero while it lasts

// options of a world.
type options struct {
	nodes      int
	seed       uint64
	time       time.Duration
	out        string
	binary     string
	gate       string // kernelGate of the nodes
	recordings string
	files      map[string]string // of the configuration
	env        []string          // of all nodes
	prepare    func(dataDir string) error
	log        *log.Logger
}

// newWorld starts everything; nothing disturbs it yet.
func newWorld(ctx context.Context, o options) (_ *World, err error) {
	w := &World{seed: o.seed, time: o.time, rng: rand.New(rand.NewPCG(o.seed, 1)), out: o.out, log: o.log, skipped: map[string]string{}, clients: map[*node]*api.Client{}}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return nil, err
	}
	if w.file, err = os.Create(filepath.Join(o.out, "journal.jsonl")); err != nil {
		return nil, err
	}
	w.journal = json.NewEncoder(w.file)
	if w.Box, err = sandbox.New(); err != nil {
		return nil, err
	}
	place := func(i int) (*cluster.Place, error) {
		h, err := w.Box.AddHost(fmt.Sprintf("n%d", i+1))
		if err != nil {
			return nil, err
		}
		w.hosts = append(w.hosts, h)
		// The trial issuer serves loopback only: each host's loopback leads to it.
		if err := forward(h, w.IssuerAddr()); err != nil {
			return nil, err
		}
		p := &cluster.Place{Host: h.IP.String(), Start: func(cmd *exec.Cmd) error {
			if i < len(w.nodes) && len(w.nodes[i].under) > 0 {
				wrap(cmd, w.nodes[i].under)
			}
			return h.Do(cmd.Start)
		}}
		p.Env = func() []string {
			env := []string{diskVar + "=" + w.diskFile(i), pointVar + "=" + w.diskFile(i) + pointEnd, netVar + "=" + w.diskFile(i) + netEnd}
			if i < len(w.nodes) { // not at the first start
				env = append(env, w.nodes[i].env...)
			}
			return env
		}
		return p, nil
	}
	files := map[string]string{"chaos.cedar": rules("start")}
	for name, content := range o.files {
		files[name] = content
	}
	w.Cluster, err = cluster.Start(ctx, cluster.Options{
		Nodes: o.nodes, Binary: o.binary, Files: files, Env: o.env, Recordings: o.recordings, Prepare: o.prepare,
		Place: place, TargetHost: sandbox.Gateway, Log: o.log.Printf,
		// Each node has a network of its own, and the right to filter in it.
		ServeArgs: []string{"--kernel-gate=" + o.gate},
		Started:   func(c *cluster.Cluster) { w.Cluster = c },
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	for i, n := range w.Nodes {
		if err := w.adopt(n, w.hosts[i]); err != nil {
			return nil, err
		}
	}
	if err := w.PG.Exec(ctx, "bench", tables); err != nil {
		return nil, err
	}
	w.load, err = newLoad(w)
	return w, err
}

// length is how long something is to take: what was asked for, or usual.
func (w *World) length(usual time.Duration) time.Duration {
	if w.time > 0 {
		return w.time
	}
	return usual
}

func (w *World) diskFile(i int) string {
	return filepath.Join(w.out, fmt.Sprintf("disk-n%d", i+1))
}

// adopt takes a cluster's node into the nemesis' hands.
func (w *World) adopt(n *cluster.Node, h *sandbox.Host) error {
	c, err := h.NewCapture()
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nodes = append(w.nodes, &node{Node: n, host: h, capture: c, disk: w.diskFile(len(w.nodes))})
	return nil
}

// close ends everything.
func (w *World) close() {
	if w.load != nil {
		w.load.stop()
	}
	for _, n := range w.nodes {
		n.capture.Stop()
	}
	if w.Cluster != nil {
		for _, n := range w.Nodes { // what is stopped cannot be killed gently, but it can be killed
			n.Kill()
			if data, err := os.ReadFile(n.LogFile); err == nil {
				_ = os.WriteFile(filepath.Join(w.out, n.Name+".log"), data, 0o644)
			}
		}
		w.Stop()
	}
	w.file.Close()
}

// note writes a line of the journal.
func (w *World) note(kind string, v any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = w.journal.Encode(map[string]any{"at": time.Now(), "kind": kind, "what": v})
}

// fault tells what the nemesis does.
func (w *World) fault(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	w.log.Printf("nemesis: %s", s)
	w.note("fault", s)
}

// skip writes down that a fault is not possible here.
func (w *World) skip(what string, why error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.skipped[what] = why.Error()
}

// members are the nodes that were not removed.
func (w *World) members() []*node {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []*node
	for _, n := range w.nodes {
		if !n.gone {
			out = append(out, n)
		}
	}
	return out
}

// up are the members whose process runs and is not stopped.
func (w *World) up() []*node {
	return slices.DeleteFunc(w.members(), func(n *node) bool { return !n.Running() || n.isStopped() })
}

func (w *World) leader(ctx context.Context) (*node, error) {
	var err error
	for range 60 {
		for _, n := range w.up() {
			var st *api.Status
			// A node that is down is waited for, for 3 s.
			lctx, cancel := context.WithTimeout(ctx, 8*time.Second)
			st, err = w.admin(n).Status(lctx)
			cancel()
			if err != nil {
				continue
			}
			for _, s := range st.Nodes {
				if s.Reachable && strings.EqualFold(s.RaftState, "leader") {
					for _, m := range w.members() {
						if m.Name == s.Node {
							return m, nil
						}
					}
				}
			}
		}
		if err := sleep(ctx, 250*time.Millisecond); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("no leader is known: %w", err)
}

// follower is a running member that does not lead, by the seed's choice.
func (w *World) follower(ctx context.Context) (*node, error) {
	l, err := w.leader(ctx)
	if err != nil {
		return nil, err
	}
	others := slices.DeleteFunc(w.up(), func(n *node) bool { return n == l })
	if len(others) == 0 {
		return nil, errors.New("no follower is running")
	}
	return others[w.rng.IntN(len(others))], nil
}

func (w *World) any() *node {
	up := w.up()
	return up[w.rng.IntN(len(up))]
}

// admin calls the API at one node as the administrator. There is one client
// for each node: each keeps connections open, of which a node takes a limited
// number from one address.
func (w *World) admin(n *node) *api.Client {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.clients[n] == nil {
		c, err := w.AdminClient(n.Addr)
		if err != nil {
			panic(err) // files of our own
		}
		w.clients[n] = c
	}
	return w.clients[n]
}

// The nemesis.

func (w *World) kill(n *node) {
	w.fault("kill -9 %s", n.Name)
	n.Kill()
	n.closeIntervals()
}

func (w *World) start(n *node) error {
	w.fault("start %s", n.Name)
	n.closeIntervals()
	return n.Start()
}

func (w *World) pause(n *node) error {
	w.fault("stop %s (SIGSTOP)", n.Name)
	n.began(&n.stopped)
	err := n.Pause()
	n.began(&n.silent) // not before: until it stands it may still answer
	return err
}

func (w *World) cont(n *node) error {
	w.fault("continue %s", n.Name)
	// It speaks from now on, perhaps; it is taken as stopped a little longer,
	// as what it does first is what it was about to do.
	n.ended(&n.silent, time.Now())
	err := n.Continue()
	n.ended(&n.stopped, time.Now().Add(settle))
	return err
}

// settle is how long a continued process may take to see that it was away.
const settle = 250 * time.Millisecond

// isolate cuts n off from all others, both ways; its clients reach it.
func (w *World) isolate(n *node) error {
	w.fault("cut %s off", n.Name)
	err := sandbox.Part([]*sandbox.Host{n.host}, w.hostsBut(n))
	n.began(&n.silent) // not before: the filters of all hosts take a moment
	return err
}

func (w *World) rejoin(n *node) error {
	w.fault("mend %s", n.Name)
	n.ended(&n.silent, time.Now())
	return sandbox.Join([]*sandbox.Host{n.host}, w.hostsBut(n))
}

func (w *World) hostsBut(n *node) (out []*sandbox.Host) {
	for _, m := range w.members() {
		if m != n {
			out = append(out, m.host)
		}
	}
	return out
}

// heal ends all faults and returns when the cluster is whole again.
func (w *World) heal(ctx context.Context) error {
	w.fault("heal everything")
	if err := w.Box.MendAll(); err != nil {
		return err
	}
	for _, n := range w.members() {
		for _, end := range []string{"", pointEnd, pointEnd + reachedEnd, netEnd} {
			_ = os.Remove(n.disk + end)
		}
		if n.isStopped() {
			if err := w.cont(n); err != nil && n.Running() {
				return err
			}
		}
		n.ended(&n.silent, time.Now())
		if !n.Running() {
			if err := w.start(n); err != nil {
				return err
			}
		}
	}
	return w.whole(ctx)
}

// whole returns when all members agree and serve. A node that ended because a
// fault made it is started again.
func (w *World) whole(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		for _, n := range w.members() {
			if !n.Running() {
				if err := w.start(n); err != nil {
					return err
				}
			}
		}
		tctx, stop := context.WithTimeout(ctx, 20*time.Second)
		err := w.WaitReady(tctx)
		stop()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("the cluster has not come together: %w", err)
		}
	}
}

func (n *node) began(list *[]interval) {
	n.mu.Lock()
	defer n.mu.Unlock()
	*list = append(*list, interval{from: time.Now()})
}

func (n *node) ended(list *[]interval, at time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := range *list {
		if (*list)[i].to.IsZero() {
			(*list)[i].to = at
		}
	}
}

func (n *node) closeIntervals() {
	n.ended(&n.silent, time.Now())
	n.ended(&n.stopped, time.Now())
}

func (n *node) isStopped() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.ContainsFunc(n.stopped, func(i interval) bool { return i.to.IsZero() })
}

// wasStopped reports whether it was stopped at any time between from and to.
func (n *node) wasStopped(from, to time.Time) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.ContainsFunc(n.stopped, func(i interval) bool { return i.from.Before(to) && (i.to.IsZero() || i.to.After(from)) })
}

// wasSilent reports whether it was silent all the time from from to to.
func (n *node) wasSilent(from, to time.Time) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.ContainsFunc(n.silent, func(i interval) bool { return i.from.Before(from) && (i.to.IsZero() || i.to.After(to)) })
}

// wrap makes cmd be started by another program, which becomes it.
func wrap(cmd *exec.Cmd, under []string) {
	if path, err := exec.LookPath(under[0]); err == nil {
		cmd.Args = append(append(slices.Clone(under), cmd.Path), cmd.Args[1:]...)
		cmd.Path = path
	}
}

// forward makes addr on the host's loopback lead to addr on ours.
func forward(h *sandbox.Host, addr string) error {
	var l net.Listener
	if err := h.Do(func() (err error) { l, err = net.Listen("tcp", addr); return err }); err != nil {
		return err
	}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer in.Close()
				out, err := net.Dial("tcp", addr)
				if err != nil {
					return
				}
				defer out.Close()
				go func() { _, _ = io.Copy(out, in); out.Close() }()
				_, _ = io.Copy(in, out)
			}()
		}
	}()
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// logs are the events of each member. The cluster stores some by itself, at any
// time: they are read on until all members have given as many.
func (w *World) logs(ctx context.Context) (map[string][]api.EventInfo, error) {
	all := map[string][]api.EventInfo{}
	for range 20 {
		if err := w.readLogs(ctx, all); err != nil {
			return nil, err
		}
		lengths := map[int]bool{}
		for _, log := range all {
			lengths[len(log)] = true
		}
		if len(lengths) == 1 {
			break
		}
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// readLogs adds to all what each member has and all has not.
func (w *World) readLogs(ctx context.Context, all map[string][]api.EventInfo) error {
	for _, n := range w.members() {
		c := w.admin(n)
		for {
			next := uint64(1)
			if got := all[n.Name]; len(got) > 0 {
				next = got[len(got)-1].Seq + 1
			}
			page, err := c.Events(ctx, next, 0)
			if err != nil {
				return fmt.Errorf("events of %s: %w", n.Name, err)
			}
			if len(page) == 0 {
				break
			}
			all[n.Name] = append(all[n.Name], page...)
		}
	}
	return nil
}

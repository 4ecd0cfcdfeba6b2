package raftstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fsm"
	"github.com/sallyport/sallyport/raftstore/logstore"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// The simulation runs whole stores, disks and all, on a clock that jumps from
// one thing that happens to the next: hours of elections in seconds. The seed
// chooses the faults and the delays; the order in which goroutines of one
// moment run is Go's, so a seed repeats a schedule nearly, not exactly.
var simSeed = flag.Uint64("sim.seed", 0, "seed of the simulations, 0 for a new one")

const (
	simHeartbeat = 500 * time.Millisecond
	simNodes     = 3
)

type simNode struct {
	id     string
	disk   *simDisk
	store  *Store                // nil while it is down; for the nemesis
	serves atomic.Pointer[Store] // the same for clients
	stable *spyStable
	trans  *simTransport
	closed sync.WaitGroup // of stores before
	sleepy int            // how many times longer it takes to notice silence
	fatal  atomic.Pointer[error]
}

type sim struct {
	t     *testing.T
	rng   *rand.Rand
	net   *simNet
	nodes []*simNode

	// Mutations; none in the product.
	forgetVotes bool

	kinds []int // of faults; nil for all

	mu struct {
		sync.Mutex
		chains map[uint64][32]byte // of each event, as first seen anywhere (I5, I6)
		acked  map[event.ID]uint64 // event number of what was acknowledged (I4, I8)
	}
	quiet atomic.Bool // clients rest
	stop  chan struct{}
	wg    sync.WaitGroup
	n     struct{ appends, unknown, restarts int }
}

func newSim(t *testing.T, seed uint64) *sim {
	s := &sim{t: t, rng: rand.New(rand.NewPCG(seed, 1)), stop: make(chan struct{})}
	s.net = newSimNet(rand.New(rand.NewPCG(seed, 2)))
	s.mu.chains = make(map[uint64][32]byte)
	s.mu.acked = make(map[event.ID]uint64)
	for i := range simNodes {
		n := &simNode{id: fmt.Sprintf("n%d", i+1), sleepy: 1}
		n.disk = s.newDisk(vfs.NewCrashableMem())
		s.nodes = append(s.nodes, n)
	}
	return s
}

func (s *sim) newDisk(mem *vfs.MemFS) *simDisk {
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(s.rng.Uint64(), 3))
	return newSimDisk(mem, func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return 300*time.Microsecond + time.Duration(rng.ExpFloat64()*float64(400*time.Microsecond))
	})
}

// start opens all nodes as one cluster.
func (s *sim) start() {
	for _, n := range s.nodes {
		s.open(n)
	}
	if err := s.nodes[0].store.Bootstrap(); err != nil {
		s.net.fail("bootstrap: %v", err)
		return
	}
	for _, n := range s.nodes[1:] {
		for {
			l := s.leader(time.Minute)
			if l == nil {
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			err := l.store.AddVoter(ctx, n.id, n.id)
			cancel()
			if err == nil {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
}

func (s *sim) open(n *simNode) {
	n.fatal.Store(nil)
	st, err := Open(Config{
		Dir: "/data", NodeID: n.id, Addr: n.id, HeartbeatTimeout: simHeartbeat,
		Log:     slog.New(slog.DiscardHandler),
		OnFatal: func(err error) { n.fatal.Store(&err) },
		// Snapshots only when the simulation asks, and few entries behind them.
		SnapshotInterval: 1000 * time.Hour, TrailingLogs: 20,
		seams: seams{
			fs: n.disk,
			transport: func(cfg transport.RaftConfig) raftTransport {
				n.trans = s.net.transport(n.id, cfg)
				return n.trans
			},
			stable: func(st raft.StableStore) raft.StableStore {
				n.stable = &spyStable{StableStore: st, set: make(map[string][]byte), forget: s.forgetVotes}
				return n.stable
			},
			tune: func(c *raft.Config) {
				c.CommitTimeout = 50 * time.Millisecond
				k := time.Duration(n.sleepy)
				c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = k*c.HeartbeatTimeout, k*c.ElectionTimeout, k*c.LeaderLeaseTimeout
			},
		},
	})
	if err != nil {
		s.net.fail("%s does not start: %v", n.id, err)
		return
	}
	n.store = st
	n.serves.Store(st)
}

// crash takes a node away with what its disk had synced, and of the rest as
// many percent as unsynced says.
func (s *sim) crash(n *simNode, unsynced int) {
	if n.store == nil {
		return
	}
	n.trans.Close()
	before, _ := n.store.logs.LastIndex()
	known := n.stable.snapshot()
	clone := n.disk.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: unsynced, RNG: s.rng})
	after, _ := n.store.logs.LastIndex()
	if c := n.disk.hang.Swap(nil); c != nil {
		close(*c)
	}
	old := n.store
	n.store = nil
	n.serves.Store(nil)
	n.closed.Go(func() { old.Close() })
	n.disk = s.newDisk(clone)
	s.n.restarts++
	s.checkDisk(n, known, min(before, after))
}

// checkDisk reads what a crash left: term and vote as raft was told that they
// are stored (I18), a log without a gap that has what was stored (I19).
func (s *sim) checkDisk(n *simNode, known map[string][]byte, last uint64) {
	mem := n.disk.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: s.rng})
	l, err := logstore.Open(logstore.Config{Dir: mem.PathJoin("/data", logDir), FS: mem, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		s.net.fail("%s's log after a crash: %v", n.id, err)
		return
	}
	defer l.Close()
	for k, want := range known {
		got, err := l.Get([]byte(k))
		if k == "LastVoteTerm" && !bytes.Equal(got, want) {
			continue // the second half of the vote had not come: the next check tells
		}
		newer := len(want) == 8 && len(got) == 8 && binary.BigEndian.Uint64(got) >= binary.BigEndian.Uint64(want)
		if err != nil || !newer && !bytes.Equal(got, want) && k != "LastVoteCand" {
			s.net.fail("%s lost %s %x in a crash: %x %v", n.id, k, want, got, err)
		}
		if k == "LastVoteCand" && !bytes.Equal(got, want) {
			s.net.fail("%s lost its vote for %s in a crash: %s", n.id, want, got)
		}
	}
	first, _ := l.FirstIndex()
	end, _ := l.LastIndex()
	if end < last {
		s.net.fail("%s had log entries up to %d and after a crash up to %d", n.id, last, end)
	}
	var e raft.Log
	for i := first; i <= end && i > 0; i++ {
		if err := l.GetLog(i, &e); err != nil {
			s.net.fail("%s after a crash: log entry %d of %d to %d: %v", n.id, i, first, end, err)
			return
		}
	}
}

// restart opens a crashed node.
func (s *sim) restart(n *simNode) {
	if n.store == nil {
		s.open(n)
	}
}

// heal ends all faults and starts all nodes.
func (s *sim) heal() {
	s.net.mu.Lock()
	clear(s.net.cut)
	clear(s.net.onlyHeartbeats)
	s.net.slow = 0
	s.net.mu.Unlock()
	for _, n := range s.nodes {
		if c := n.disk.hang.Swap(nil); c != nil {
			close(*c)
		}
		if p := n.fatal.Load(); p != nil && n.store != nil {
			if strings.Contains((*p).Error(), "start this node again") {
				s.crash(n, 100) // it asked to be started again
			} else {
				s.net.fail("%s stopped: %v", n.id, *p)
			}
		}
		s.restart(n)
	}
}

// leader waits for a node that leads and can commit, nil when there is none in
// time.
func (s *sim) leader(patience time.Duration, not ...*simNode) *simNode {
	for end := time.Now().Add(patience); time.Now().Before(end); {
		for _, n := range s.nodes {
			if n.store == nil || slices.Contains(not, n) || !n.store.IsLeader() {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			err := n.store.Barrier(ctx)
			cancel()
			if err == nil {
				return n
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

// client appends at whoever leads, the same again after an unknown outcome,
// until the simulation stops.
func (s *sim) client(seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 4))
	for i := 0; ; i++ {
		p := event.Proposal{Type: event.TypeRevoked, Version: 1, Aggregate: fmt.Sprintf("a%d", rng.IntN(5)), Expect: event.Any, Payload: make([]byte, rng.IntN(2000))}
		for j := range p.ID {
			p.ID[j] = byte(rng.Uint32())
		}
		for tries := 0; tries < 50; tries++ {
			select {
			case <-s.stop:
				return
			case <-time.After(time.Duration(50+rng.IntN(400)) * time.Millisecond):
			}
			n := s.nodes[rng.IntN(len(s.nodes))]
			st := n.serves.Load()
			if s.quiet.Load() || st == nil || !st.IsLeader() {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			es, err := st.Append(ctx, p)
			cancel()
			if err == nil {
				s.ack(p.ID, es[0])
				break
			}
		}
	}
}

func (s *sim) ack(id event.ID, e event.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n.appends++
	if seq, ok := s.mu.acked[id]; ok && seq != e.Seq {
		s.net.fail("one append was acknowledged as events %d and %d", seq, e.Seq)
	}
	s.mu.acked[id] = e.Seq
}

// compare checks each node's events against the first node's that had them.
func (s *sim) compare(n *simNode, from uint64) (next uint64) {
	st := n.store
	if st == nil {
		return 1
	}
	for {
		es, err := st.Events(from, 1000)
		if err != nil || len(es) == 0 {
			return from
		}
		s.mu.Lock()
		for i, e := range es {
			if e.Seq != from+uint64(i) {
				s.net.fail("%s has event %d after %d", n.id, e.Seq, from+uint64(i)-1)
			}
			if was, ok := s.mu.chains[e.Seq]; ok && was != e.Chain {
				s.net.fail("%s differs from others at event %d", n.id, e.Seq)
			}
			s.mu.chains[e.Seq] = e.Chain
		}
		s.mu.Unlock()
		from += uint64(len(es))
	}
}

// fault does one thing to the cluster and says what.
func (s *sim) fault() string {
	l := s.leader(time.Minute)
	if l == nil {
		s.net.fail("no leader within a minute of health")
		return "none"
	}
	var others []*simNode
	for _, n := range s.nodes {
		if n != l {
			others = append(others, n)
		}
	}
	f := others[s.rng.IntN(len(others))]
	pause := func(least, most time.Duration) { time.Sleep(least + time.Duration(s.rng.Int64N(int64(most-least)))) }
	unsynced := 0
	switch s.rng.IntN(16) {
	case 0: // rarely: Pebble looks long for flipped bits at each torn end
		unsynced = 50
	case 1, 2, 3, 4, 5, 6, 7:
		unsynced = 100
	}
	kind := s.rng.IntN(12)
	if s.kinds != nil {
		kind = s.kinds[s.rng.IntN(len(s.kinds))]
	}
	switch kind {
	case 0, 1, 2:
		s.crash(l, unsynced)
		pause(time.Millisecond, 3*time.Second)
		return "leader crashed"
	case 3:
		s.crash(f, unsynced)
		pause(time.Millisecond, 2*time.Second)
		s.restart(f)
		s.crash(l, unsynced)
		pause(time.Millisecond, 2*time.Second)
		return "follower crashed, then the leader"
	case 4:
		for _, n := range s.nodes {
			s.crash(n, unsynced)
		}
		pause(time.Millisecond, time.Second)
		return "power lost"
	case 5, 6:
		for _, n := range others {
			s.block(l, n)
			s.block(n, l)
		}
		pause(time.Second, 4*time.Second)
		return "leader cut off"
	case 7:
		for _, n := range others {
			if s.rng.IntN(2) == 0 {
				s.block(l, n)
			} else {
				s.block(n, l)
			}
		}
		pause(time.Second, 4*time.Second)
		return "one-way cuts"
	case 8:
		l.disk.stall()
		pause(time.Second, 5*time.Second)
		return "leader's disk hung"
	case 9:
		// Only the new leader's heartbeats reach the old one, which does not
		// notice that it is cut off (#695).
		if l = s.sleepyLeader(l); l == nil {
			return "no sleepy leader"
		}
		others = slices.DeleteFunc(slices.Clone(s.nodes), func(n *simNode) bool { return n == l })
		s.quiet.Store(true) // entries nobody else has would be found to differ, and hide it
		defer s.quiet.Store(false)
		time.Sleep(3 * time.Second)
		for _, n := range others {
			s.block(l, n)
			s.block(n, l)
		}
		b := s.leader(10*time.Second, l)
		if b == nil {
			return "no other leader"
		}
		s.net.mu.Lock()
		delete(s.net.cut, [2]string{b.id, l.id})
		delete(s.net.cut, [2]string{l.id, b.id})
		s.net.onlyHeartbeats[[2]string{b.id, l.id}] = true
		s.net.mu.Unlock()
		old, next := l.store.raft.Load(), b.store.raft.Load()
		for end := time.Now().Add(time.Second); old.CurrentTerm() < next.CurrentTerm() && time.Now().Before(end); {
			time.Sleep(100 * time.Microsecond)
		}
		s.late(l)
		time.Sleep(50 * time.Millisecond)
		return "heartbeats only"
	case 10:
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		s.crash(f, unsynced)
		pause(500*time.Millisecond, 3*time.Second)
		l.store.Snapshot(ctx) // what the follower lacks is gone then, often
		cancel()
		s.restart(f)
		pause(time.Millisecond, time.Second)
		if s.rng.IntN(2) == 0 {
			s.crash(f, unsynced) // in the middle of it, perhaps
		}
		return "snapshot while a follower was down"
	default:
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		l.store.TransferLeadership(ctx)
		cancel()
		return "leadership transferred"
	}
}

// sleepyLeader makes a node that does not notice silence the leader, if there
// is one.
func (s *sim) sleepyLeader(l *simNode) *simNode {
	i := slices.IndexFunc(s.nodes, func(n *simNode) bool { return n.sleepy > 1 })
	if i < 0 {
		return nil
	}
	want := s.nodes[i]
	for range 10 {
		if l == want || l == nil {
			return l
		}
		if l.store.raft.Load().LeadershipTransferToServer(raft.ServerID(want.id), raft.ServerAddress(want.id)).Error() != nil {
			time.Sleep(transferPause) // see TransferLeadership
		}
		l = s.leader(20 * time.Second)
	}
	return nil
}

// late is an Append that saw that n leads a moment before it ceased to.
func (s *sim) late(n *simNode) {
	h := n.store.state.Head()
	p := event.Proposal{Type: event.TypeRevoked, Version: 1, Aggregate: "deposed", Expect: event.Any}
	for j := range p.ID {
		p.ID[j] = byte(s.rng.Uint32())
	}
	b, err := p.Marshal()
	if err == nil {
		c := fsm.Command{TimeNanos: 1, Seq: h.Seq, Chain: h.Chain, Proposals: [][]byte{b}}
		b, err = c.Marshal()
	}
	if err != nil {
		s.net.fail("a command: %v", err)
	}
	n.store.raft.Load().Apply(b, time.Second)
}

func (s *sim) block(from, to *simNode) {
	s.net.mu.Lock()
	defer s.net.mu.Unlock()
	s.net.cut[[2]string{from.id, to.id}] = true
}

// run goes through rounds of one fault each, and ends early when an invariant
// is broken.
func (s *sim) run(rounds int) {
	s.start()
	for range 3 {
		seed := s.rng.Uint64()
		s.wg.Go(func() { s.client(seed) })
	}
	next := make([]uint64, len(s.nodes))
	for range rounds {
		if len(s.broke()) > 0 {
			break
		}
		s.fault()
		s.heal()
		time.Sleep(time.Duration(s.rng.Int64N(int64(2 * time.Second))))
		for i, n := range s.nodes {
			next[i] = s.compare(n, 1+s.rng.Uint64N(next[i]+1)) // a crash may have set it back
		}
	}
	s.heal()
	s.finish()
}

// finish waits until all nodes agree and checks what was acknowledged.
func (s *sim) finish() {
	close(s.stop)
	s.wg.Wait()
	if len(s.broke()) == 0 {
		s.agree()
	}
	for _, n := range s.nodes {
		if n.store != nil {
			n.trans.Close()
			old := n.store
			n.closed.Go(func() { old.Close() })
		}
	}
	for _, n := range s.nodes {
		n.closed.Wait()
	}
	time.Sleep(time.Minute) // raft's goroutines end with their timeouts
}

func (s *sim) agree() {
	l := s.leader(time.Minute)
	if l == nil {
		s.net.fail("no leader at the end")
		return
	}
	seq, _, _ := l.store.Head()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, n := range s.nodes {
		if err := n.store.WaitSeq(ctx, seq); err != nil {
			s.net.fail("%s does not reach event %d: %v; %+v", n.id, seq, err, n.store.Status())
			return
		}
		s.compare(n, 1)
	}
	for id, seq := range s.mu.acked {
		e, ok, err := l.store.ByID(id)
		if err != nil || !ok || e.Seq != seq {
			s.net.fail("acknowledged event %d is lost: %v %v", seq, ok, err)
		}
	}
	ids := make(map[event.ID]bool)
	for from := uint64(1); from <= seq; {
		es, err := l.store.Events(from, 1000)
		if err != nil || len(es) == 0 {
			s.net.fail("read event %d: %v", from, err)
			return
		}
		for _, e := range es {
			if ids[e.ID] {
				s.net.fail("event %d is stored twice", e.Seq)
			}
			ids[e.ID] = true
		}
		from += uint64(len(es))
	}
}

func (s *sim) broke() []string {
	s.net.mu.Lock()
	defer s.net.mu.Unlock()
	return slices.Clone(s.net.broken)
}

// simulate runs one simulation on a clock of its own.
func simulate(t *testing.T, seed uint64, rounds int, prepare func(*sim)) (s *sim) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s = newSim(t, seed)
		if prepare != nil {
			prepare(s)
		}
		s.run(rounds)
	})
	return s
}

func seedOf(t *testing.T) uint64 {
	seed := *simSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d: repeat with -sim.seed=%d", seed, seed)
	return seed
}

// Thousands of changes of leader, by crashes, cuts, hung disks and transfers:
// nothing that was acknowledged is lost or doubled, all nodes have the same
// events, a term has one leader, votes and terms survive.
func TestSimulation(t *testing.T) {
	budget := 20 * time.Second
	if raceEnabled || testing.Short() {
		budget = 6 * time.Second
	}
	if os.Getenv("SALLYPORT_LARGE") != "" {
		budget = 10 * time.Minute
	}
	seed := seedOf(t)
	began := time.Now()
	var terms, appends, restarts, sims int
	for ; time.Since(began) < budget; sims++ {
		s := simulate(t, seed+uint64(sims), 60, func(s *sim) {
			if s.rng.IntN(2) == 0 {
				s.nodes[s.rng.IntN(simNodes)].sleepy = 10
			}
			if sims%4 != 1 { // without crashes, which cost most of the time
				s.kinds = []int{5, 5, 6, 7, 8, 9, 11, 11}
			}
		})
		if b := s.broke(); len(b) > 0 {
			t.Fatalf("simulation %d, -sim.seed=%d:\n%s", sims, seed+uint64(sims), strings.Join(b, "\n"))
		}
		terms += len(s.net.leaders)
		appends += s.n.appends
		restarts += s.n.restarts
	}
	t.Logf("%d simulations, %d leaders, %d restarts, %d appends acknowledged, in %v", sims, terms, restarts, appends, time.Since(began).Round(time.Millisecond))
	if appends == 0 || terms < sims*10 {
		t.Fatal("nothing happened")
	}
}

// The simulation can fail: it finds what is known to be wrong.
func TestSimulationFinds(t *testing.T) {
	for name, prepare := range map[string]func(*sim){
		"raft's own heartbeat path (#695)": func(s *sim) {
			s.net.rawHeartbeats = true
			s.nodes[1].sleepy = 10
			s.kinds = []int{9}
		},
		"votes kept in memory": func(s *sim) { s.forgetVotes = true },
	} {
		t.Run(name, func(t *testing.T) {
			seed := seedOf(t)
			for i := range uint64(40) {
				s := simulate(t, seed+i, 60, prepare)
				if b := s.broke(); len(b) > 0 {
					t.Logf("found in simulation %d: %s", i, b[0])
					return
				}
			}
			t.Fatal("not found")
		})
	}
}

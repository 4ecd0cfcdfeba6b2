package raftstore_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/storetest"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// Three real processes, each a Store on a directory and a socket of its own,
// driven by the test over their standard input. One of them, the leader, is
// stopped by SIGSTOP while another is elected and commits, and goes on with a
// heartbeat of that one in its socket: hashicorp/raft #695.

func init() { storeProcessMain = runStoreProcess }

// setup is the first line a process reads.
type setup struct {
	Dir, Name     string
	CA, Cert, Key []byte // DER
	Heartbeat     time.Duration
	RawHeartbeats bool
}

// order is what a process is told, answer what it says: a line of JSON each.
type order struct {
	Do         string // see storeNode.obey
	Peer, Addr string
	N          uint64
	Loss       raftstore.Loss
}

type answer struct {
	Err      string `json:",omitempty"`
	Addr     string `json:",omitempty"`
	Leads    bool   `json:",omitempty"`
	Term     uint64 `json:",omitempty"`
	Seq      uint64 `json:",omitempty"`
	Last     uint64 `json:",omitempty"` // in the log
	Sum      []byte `json:",omitempty"`
	Fatal    string `json:",omitempty"`
	Diverged bool   `json:",omitempty"` // Fatal is ErrDiverged
	Acked    uint64 `json:",omitempty"`
}

// runStoreProcess is the process's main.
func runStoreProcess() int {
	in := json.NewDecoder(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	var cfg setup
	if err := in.Decode(&cfg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	n, err := openStoreNode(cfg)
	if err != nil {
		out.Encode(answer{Err: err.Error()})
		return 1
	}
	defer n.endpoint.Close()
	defer n.store.Close()
	if err := out.Encode(answer{Addr: n.addr}); err != nil {
		return 1
	}
	for {
		var o order
		if err := in.Decode(&o); err != nil {
			return 0 // the test is over
		}
		a, err := n.obey(o)
		if err != nil {
			a.Err = err.Error()
		}
		if err := out.Encode(a); err != nil {
			return 1
		}
	}
}

// storeNode is what such a process is.
type storeNode struct {
	name, addr string
	endpoint   *transport.Endpoint
	store      *raftstore.Store
	faults     raftstore.Faults
	fatal      atomic.Pointer[error]

	load  atomic.Bool
	loads sync.WaitGroup
	acked sync.Map // event.ID to Seq, of this leader's appends
}

func openStoreNode(cfg setup) (*storeNode, error) {
	ca, err := x509.ParseCertificate(cfg.CA)
	if err != nil {
		return nil, err
	}
	key, err := x509.ParseECPrivateKey(cfg.Key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(cfg.Cert)
	if err != nil {
		return nil, err
	}
	cert := &tls.Certificate{Certificate: [][]byte{cfg.Cert}, PrivateKey: key, Leaf: leaf}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	n := &storeNode{name: cfg.Name, addr: udp.LocalAddr().String(), faults: raftstore.Faults{RawHeartbeats: cfg.RawHeartbeats}}
	n.endpoint, err = transport.Listen(transport.EndpointConfig{
		UDPConn:     udp,
		Certificate: func() (*tls.Certificate, error) { return cert, nil },
		Roots:       func() *x509.CertPool { return roots },
		Authorize:   func(_ string, leaf *x509.Certificate) (string, error) { return leaf.Subject.CommonName, nil },
		Classes:     transport.Classes,
		Log:         storetest.Logger(nil),
	})
	if err != nil {
		return nil, err
	}
	c := raftstore.Config{
		Dir: cfg.Dir, NodeID: cfg.Name, Addr: n.addr, Endpoint: n.endpoint, HeartbeatTimeout: cfg.Heartbeat,
		Log:     storetest.Logger(nil).With("node", cfg.Name),
		OnFatal: func(err error) { n.fatal.Store(&err) },
	}
	n.faults.Install(&c)
	n.store, err = raftstore.Open(c)
	return n, err
}

const patience = 30 * time.Second

func (n *storeNode) obey(o order) (a answer, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	switch o.Do {
	case "bootstrap":
		return a, n.store.Bootstrap()
	case "add":
		return a, n.store.AddVoter(ctx, o.Peer, o.Addr)
	case "status":
		a.Term, a.Leads = n.store.Leads()
		st := n.store.Status()
		a.Seq, a.Last = st.Seq, st.LastIndex
		if p := n.fatal.Load(); p != nil {
			a.Fatal, a.Diverged = (*p).Error(), errors.Is(*p, raftstore.ErrDiverged)
		}
		n.acked.Range(func(any, any) bool { a.Acked++; return true })
		return a, nil
	case "barrier":
		return a, n.store.Barrier(ctx)
	case "append":
		_, err := n.store.Append(ctx, storetest.Proposal("approval/asked", event.Any, ""))
		return a, err
	case "load": // N appenders, while this node leads; 0 ends them and waits for their answers
		n.load.Store(false)
		n.loads.Wait()
		n.load.Store(o.N > 0)
		for i := range o.N {
			n.loads.Go(func() { n.appends(int(i)) })
		}
		return a, nil
	case "late": // N appends that come just when the term changes
		for range o.N {
			go n.append(storetest.Proposal("approval/late", event.Any, ""), nextTerm)
		}
		return a, nil
	case "lose":
		n.faults.Lose(o.Peer, o.Loss)
		return a, nil
	case "campaign":
		return a, n.faults.Campaign(n.name, n.addr, o.Peer, o.Addr)
	case "wait":
		return a, n.store.WaitSeq(ctx, o.N)
	case "sum":
		a.Sum, err = n.sum(o.N)
		return a, err
	case "acked":
		return a, n.checkAcked()
	}
	return a, fmt.Errorf("unknown order %q", o.Do)
}

func (n *storeNode) append(p event.Proposal, held func(func() uint64)) {
	if e, err := n.store.AppendLate(held, p); err == nil {
		n.acked.Store(p.ID, e.Seq)
	}
}

// nextTerm holds an append up until this node is in another term.
func nextTerm(term func() uint64) {
	was := term()
	for end := time.Now().Add(5 * time.Second); term() == was && time.Now().Before(end); {
		time.Sleep(20 * time.Microsecond)
	}
}

// appends calls every 8 ms on average, held up for 3 ms on average.
func (n *storeNode) appends(i int) {
	inFlight := make(chan struct{}, 256) // one that waits for a majority holds one
	for n.load.Load() {
		if !n.store.IsLeader() {
			time.Sleep(time.Millisecond) // another leads: look again soon
			continue
		}
		select {
		case inFlight <- struct{}{}:
		default:
			time.Sleep(time.Millisecond) // all wait for a majority
			continue
		}
		p := storetest.Proposal(fmt.Sprintf("approval/%s-%d", n.name, i), event.Any, "")
		n.loads.Go(func() {
			defer func() { <-inFlight }()
			n.append(p, func(func() uint64) { time.Sleep(time.Duration(mathrand.IntN(6000)) * time.Microsecond) })
		})
		time.Sleep(time.Duration(mathrand.IntN(16000)) * time.Microsecond) // the rate
	}
}

// sum is over all events to number seq: their numbers, places in Raft's log,
// ids and chain.
func (n *storeNode) sum(seq uint64) ([]byte, error) {
	h := sha256.New()
	for from := uint64(1); from <= seq; {
		es, err := n.store.Events(from, int(min(1000, seq-from+1)))
		if err != nil {
			return nil, err
		}
		if len(es) == 0 || es[0].Seq != from {
			return nil, fmt.Errorf("event %d is missing", from)
		}
		for _, e := range es {
			var b [24]byte
			binary.BigEndian.PutUint64(b[:], e.Seq)
			binary.BigEndian.PutUint64(b[8:], e.Index)
			binary.BigEndian.PutUint64(b[16:], e.Term)
			h.Write(b[:])
			h.Write(e.ID[:])
			h.Write(e.Chain[:])
		}
		from += uint64(len(es))
	}
	return h.Sum(nil), nil
}

// checkAcked: what this node's callers were told is so.
func (n *storeNode) checkAcked() (err error) {
	n.acked.Range(func(id, seq any) bool {
		e, ok, e2 := n.store.ByID(id.(event.ID))
		if e2 != nil || !ok || e.Seq != seq.(uint64) {
			err = fmt.Errorf("acknowledged event %d: there %v, as %d, %v", seq, ok, e.Seq, e2)
		}
		n.acked.Delete(id)
		return err == nil
	})
	return err
}

// process is a storeNode as the test sees it.
type process struct {
	t          *testing.T
	name, addr string
	cmd        *exec.Cmd
	in         io.WriteCloser
	out        *bufio.Reader
	stopped    bool
}

// startProcesses makes a cluster of three.
func startProcesses(t *testing.T, heartbeat time.Duration, raw bool) []*process {
	t.Helper()
	ca := storetest.NewCA(t)
	var ps []*process
	for i := range 3 {
		name := fmt.Sprintf("n%d", i+1)
		cert := ca.Issue(t, name)
		key, err := x509.MarshalECPrivateKey(cert.PrivateKey.(*ecdsa.PrivateKey))
		if err != nil {
			t.Fatal(err)
		}
		p := &process{t: t, name: name, cmd: exec.Command(os.Args[0])}
		p.cmd.Env = append(os.Environ(), storeProcess+"=1")
		p.cmd.Stderr = os.Stderr
		// A stopped process would not see that its input has ended.
		p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if p.in, err = p.cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		out, err := p.cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		p.out = bufio.NewReader(out)
		dir := t.TempDir() // removed after the process has ended: cleanups run last first
		if err := p.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			p.cmd.Process.Kill()
			p.in.Close()
			p.cmd.Wait()
		})
		p.addr = p.talk(setup{Dir: dir, Name: name, CA: ca.Cert.Raw, Cert: cert.Certificate[0], Key: key, Heartbeat: heartbeat, RawHeartbeats: raw}).Addr
		ps = append(ps, p)
	}
	ps[0].do(order{Do: "bootstrap"})
	for _, p := range ps[1:] {
		leader(t, ps).do(order{Do: "add", Peer: p.name, Addr: p.addr})
	}
	return ps
}

// talk sends a line and reads one.
func (p *process) talk(line any) answer {
	p.t.Helper()
	b, err := json.Marshal(line)
	if err == nil {
		_, err = p.in.Write(append(b, '\n'))
	}
	if err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
	lines := make(chan []byte, 1)
	go func() {
		b, _ := p.out.ReadBytes('\n')
		lines <- b
	}()
	select {
	case b = <-lines:
	case <-time.After(2 * patience):
		p.t.Fatalf("%s does not answer %s", p.name, b)
	}
	var a answer
	if err := json.Unmarshal(b, &a); err != nil {
		p.t.Fatalf("%s said %q: %v", p.name, b, err)
	}
	return a
}

// do is talk that must succeed.
func (p *process) do(o order) answer {
	p.t.Helper()
	a := p.talk(o)
	if a.Err != "" {
		p.t.Fatalf("%s: %s: %s; %+v", p.name, o.Do, a.Err, p.talk(order{Do: "status"}))
	}
	return a
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
	p.stopped = s == syscall.SIGSTOP
}

// leader waits for one that leads and can commit.
func leader(t *testing.T, ps []*process) *process {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		for _, p := range ps {
			if p.stopped {
				continue
			}
			if st := p.talk(order{Do: "status"}); st.Leads && st.Fatal == "" && p.talk(order{Do: "barrier"}).Err == "" {
				return p
			}
		}
	}
	t.Fatal("no leader")
	return nil
}

// pauses is one test of this kind.
type pauses struct {
	ps  []*process
	rng *mathrand.Rand
}

// widened makes the moment likely in which raft's own path goes wrong, with
// nothing that could not happen: a leader that tried to hand over to b in vain
// has long gone on when its word reaches b; b is elected while the leader is
// stopped; the link from b to it heals, and the first that gets through is a
// heartbeat; its own calls do not get out yet. Three appends are held up from
// before they know until just after.
//
// Busy, the leader has others in its queue all the while. That hides what goes
// wrong: it begins while raft's main goroutine is idle, and entries of the old
// term that nobody else has are found to differ and take what follows them along.
// It returns who led.
func (x *pauses) widened(t *testing.T, busy bool) *process {
	a := leader(t, x.ps)
	a.do(order{Do: "load", N: 4})
	var others []*process
	for _, p := range x.ps {
		if p != a {
			others = append(others, p)
		}
	}
	b, c := others[0], others[1]
	if x.rng.IntN(2) == 0 {
		b, c = c, b
	}
	time.Sleep(time.Duration(x.rng.IntN(40)) * time.Millisecond) // any phase of its work
	if !busy {
		a.do(order{Do: "load"})
		a.do(order{Do: "barrier"})
		last := a.do(order{Do: "status"}).Last
		for end := time.Now().Add(patience); others[0].do(order{Do: "status"}).Last < last || others[1].do(order{Do: "status"}).Last < last; {
			if time.Now().After(end) {
				t.Fatal("the followers do not get the leader's entries")
			}
			time.Sleep(time.Millisecond)
		}
	}
	for _, p := range others {
		a.do(order{Do: "lose", Peer: p.name, Loss: raftstore.LoseAll})
		p.do(order{Do: "lose", Peer: a.name, Loss: raftstore.LoseAllButHeartbeats})
	}
	a.do(order{Do: "late", N: 3})
	a.signal(syscall.SIGSTOP)
	for tries := 0; ; tries++ { // a connection of before may be found dead
		out := c.talk(order{Do: "campaign", Peer: b.name, Addr: b.addr}).Err
		if out == "" {
			break
		}
		if tries == 5 {
			t.Fatalf("%s cannot call %s: %s", c.name, b.name, out)
		}
		b, c = c, b
	}
	b = leader(t, others) // c, if b's log is the shorter one
	b.do(order{Do: "load", N: 32})
	b.commits(t, 300)
	b.do(order{Do: "load"})
	a.signal(syscall.SIGCONT)
	for range x.rng.IntN(3) { // and again, around its first steps
		time.Sleep(time.Duration(x.rng.IntN(3000)) * time.Microsecond)
		a.signal(syscall.SIGSTOP)
		time.Sleep(time.Duration(x.rng.IntN(20000)) * time.Microsecond)
		a.signal(syscall.SIGCONT)
	}
	term := b.do(order{Do: "status"}).Term
	for end := time.Now().Add(time.Second); a.do(order{Do: "status"}).Term < term && time.Now().Before(end); {
		time.Sleep(time.Millisecond) // until the heartbeat is taken
	}
	time.Sleep(25 * time.Millisecond) // and the appends behind it
	for _, p := range others {
		a.do(order{Do: "lose", Peer: p.name, Loss: raftstore.LoseNothing})
		p.do(order{Do: "lose", Peer: a.name, Loss: raftstore.LoseNothing})
	}
	a.do(order{Do: "load"})
	return a
}

// plain stops the leader until another is elected and has committed, and lets
// it go on; no message is lost.
func (x *pauses) plain(t *testing.T) *process {
	a := leader(t, x.ps)
	a.do(order{Do: "load", N: 8})
	time.Sleep(time.Duration(x.rng.IntN(40)) * time.Millisecond) // any phase of its work
	a.signal(syscall.SIGSTOP)
	b := leader(t, x.ps)
	b.do(order{Do: "load", N: 32})
	b.commits(t, 100)
	b.do(order{Do: "load"})
	a.signal(syscall.SIGCONT)
	for range x.rng.IntN(3) {
		time.Sleep(time.Duration(x.rng.IntN(3000)) * time.Microsecond)
		a.signal(syscall.SIGSTOP)
		time.Sleep(time.Duration(x.rng.IntN(20000)) * time.Microsecond)
		a.signal(syscall.SIGCONT)
	}
	a.do(order{Do: "load"})
	return a
}

// commits waits until a process has n events more.
func (p *process) commits(t *testing.T, n uint64) {
	t.Helper()
	from := p.do(order{Do: "status"}).Seq
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if p.do(order{Do: "status"}).Seq >= from+n {
			return
		}
	}
	t.Fatalf("%s commits nothing", p.name)
}

// agree waits until all three have the leader's events, and compares them.
func (x *pauses) agree(t *testing.T) error {
	t.Helper()
	l := leader(t, x.ps)
	l.do(order{Do: "append"}) // the chain goes with it
	seq := l.do(order{Do: "status"}).Seq
	var want []byte
	for _, p := range append([]*process{l}, x.ps...) {
		if a := p.talk(order{Do: "wait", N: seq}); a.Err != "" {
			return fmt.Errorf("%s: %s", p.name, a.Err)
		}
		sum := p.do(order{Do: "sum", N: seq}).Sum
		if want == nil {
			want = sum
		}
		if string(sum) != string(want) {
			return fmt.Errorf("%s and %s differ in the events to %d", p.name, l.name, seq)
		}
		if a := p.talk(order{Do: "acked"}); a.Err != "" {
			return fmt.Errorf("%s: %s", p.name, a.Err)
		}
	}
	return nil
}

func pauseSeed(t *testing.T) *mathrand.Rand {
	var b [8]byte
	rand.Read(b[:])
	seed := binary.LittleEndian.Uint64(b[:])
	t.Logf("seed %d", seed)
	return mathrand.New(mathrand.NewPCG(seed, 1))
}

// tries is 30, 1,000 with SALLYPORT_LARGE, or what RAFTSTORE_PAUSES says.
func tries(t *testing.T) int {
	if s := os.Getenv("RAFTSTORE_PAUSES"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if os.Getenv("SALLYPORT_LARGE") != "" {
		return 1000
	}
	return 30
}

// A leader that was stopped goes on with what nobody committed, is told by a
// heartbeat that it leads no more, and has the events of all others afterwards.
func TestPausedLeader(t *testing.T) {
	for _, c := range []struct {
		name      string
		heartbeat time.Duration
		pause     func(*pauses, *testing.T) *process
	}{
		{"a pause", 300 * time.Millisecond, (*pauses).plain},
		{"a pause and a link that heals", 2 * time.Second, func(x *pauses, t *testing.T) *process { return x.widened(t, x.rng.IntN(3) == 0) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := &pauses{startProcesses(t, c.heartbeat, false), pauseSeed(t)}
			for i := range tries(t) {
				c.pause(x, t)
				if err := x.agree(t); err != nil {
					t.Fatalf("pause %d: %v", i+1, err)
				}
			}
		})
	}
}

// The same with the library's own heartbeat path: the nodes part, the alarm
// tells, and the two others go on.
//
// Measured with that path: a pause alone parted them in 0 of 30, since it is
// longer than the leader's lease, whose timer is the first thing it sees when it
// goes on; with other appends on the way and the link that heals, in 0 of 66; with
// that link and nothing else on the way, in 4 of 5.
func TestPausedLeaderFinds(t *testing.T) {
	x := &pauses{startProcesses(t, 2*time.Second, true), pauseSeed(t)}
	for i := range tries(t) {
		a := x.widened(t, false)
		err := x.agree(t)
		if err == nil {
			continue
		}
		st := a.talk(order{Do: "status"})
		t.Logf("pause %d: %v; %+v", i+1, err, st)
		if !st.Diverged {
			t.Fatal("no alarm")
		}
		if l := leader(t, x.ps); l != a {
			l.do(order{Do: "append"})
		} else {
			t.Fatal("it leads")
		}
		return
	}
	t.Fatal("the nodes never part: this test cannot see what it is there for")
}

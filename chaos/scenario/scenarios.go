package scenario

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sallyport/sallyport/chaos/sandbox"
)

// Scenario is a named sequence of faults.
type Scenario struct {
	Name  string
	Title string
	Nodes int               // default 3
	S3    bool              // recordings go to an S3 server
	Hooks bool              // needs a binary built with the tag chaos
	files map[string]string // of the configuration
	env   []string          // further variables of all nodes
	// prepare, if not nil, changes a node's directory before its first start.
	prepare func(dataDir string) error
	play    func(context.Context, *World) error
}

// Scenarios are all of them, by the names of docs/reliability.md.
var Scenarios = []Scenario{
	{Name: "S1", Title: "SIGKILL of the leader during revocations", play: playKillLeader},
	{Name: "S2", Title: "SIGKILL of the leader between commit and broadcast", Hooks: true, play: playBeforeBroadcast},
	{Name: "S3", Title: "SIGSTOP of a gateway before, while and after it is told of a revocation", play: playStop},
	{Name: "S4", Title: "SIGSTOP of the leader for 5 s with requests queued", play: playStopLeader},
	{Name: "S5", Title: "SIGSTOP of a majority", play: playStopMajority},
	{Name: "S6", Title: "the leader cut off from all others, its clients not", play: playIsolateLeader},
	{Name: "S7", Title: "one-way cuts between leader and followers", play: playOneWay},
	{Name: "S8", Title: "a cut that heals only from the new leader to the old one", play: playHealOneWay},
	{Name: "S9", Title: "a link that flaps", play: playFlap},
	{Name: "S10", Title: "clients that read nothing, full buffers, revocation, then they read", play: playDeaf},
	{Name: "S11", Title: "the leader's disk hangs for 10 s", Hooks: true, play: playHungLeader},
	{Name: "S12", Title: "a follower's disk hangs while another node is down", Hooks: true, play: playHungFollower},
	{Name: "S13", Title: "syncs take 200 ms longer, on one node and on all", Hooks: true, play: playSlowDisk},
	{Name: "S14", Title: "disk full: of the databases, and of the spool", play: playFullDisk},
	{Name: "S15", Title: "torn ends of a log, flipped bits in tables", play: playDamage},
	{Name: "S16", Title: "kill -9 while a snapshot arrives, is restored, is taken", Hooks: true, env: oftenSnapshots, files: largeFiles, play: playKillSnapshots},
	{Name: "S17", Title: "a leader's uncommitted entries behind the start of the others' logs", Hooks: true, env: closerSnapshots, play: playDivergent},
	{Name: "S18", Title: "wall clocks off by an hour, a clock of another boot", Hooks: true, play: playClock},
	{Name: "S19", Title: "a node that gets 5 % of a processor", play: playStarve},
	{Name: "S20", Title: "the cgroup freezer", play: playFreezer},
	{Name: "S21", Title: "two revocations of one subject at two nodes", play: playTwice},
	{Name: "S22", Title: "a thousand revocations at once", play: playMany},
	{Name: "S23", Title: "a join and a restart during revocations", play: playJoin},
	{Name: "S24", Title: "all three nodes replaced, one by one", play: playReplace},
	{Name: "S25", Title: "a rolling restart, leader first, under load", play: playRolling},
	{Name: "S26", Title: "rolling upgrade and back, versions mixed", Hooks: true, play: playUpgrade},
	{Name: "S27", Title: "S3 down, slow, and lying about what it holds", S3: true, play: playS3},
	{Name: "S28", Title: "quorum lost for 30 s, in each mode of revocation", files: modeRules, play: playNoQuorum},
	{Name: "S29", Title: "200 ms round trips and 2 % loss", play: playSlow},
	{Name: "S30", Title: "gossip says dead and the fence's stream lives, and the reverse", Hooks: true, play: playGossip},
	{Name: "S31", Title: "certificates run out and are renewed; one that cannot be", prepare: shortCertificates, play: playCertificates},
}

// Find returns the scenario of a name.
func Find(name string) (Scenario, error) {
	for _, s := range Scenarios {
		if s.Name == name {
			return s, nil
		}
	}
	return Scenario{}, fmt.Errorf("there is no scenario %q: docs/reliability.md lists them", name)
}

// revokeSome revokes n subjects at nodes by chance, all at the same time, and
// returns when all calls have. A call that fails is made again elsewhere, as a
// client would.
func (w *World) revokeSome(ctx context.Context, n int) {
	var wg sync.WaitGroup
	for _, b := range w.load.take(n) {
		wg.Go(func() { w.revokeSurely(ctx, b) })
	}
	wg.Wait()
}

func (w *World) revokeSurely(ctx context.Context, b *beacon) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		cctx, stop := context.WithTimeout(ctx, 30*time.Second)
		_, err := w.load.revoke(cctx, b, w.load.somewhere())
		stop()
		if err == nil {
			return
		}
		_ = sleep(ctx, 200*time.Millisecond)
	}
}

// during calls f while revocations of n subjects are under way, each begun a
// little later than the one before.
func (w *World) during(ctx context.Context, n int, f func() error) error {
	var wg sync.WaitGroup
	for _, b := range w.load.take(n) {
		delay := time.Duration(w.rng.Int64N(int64(60 * time.Millisecond)))
		wg.Go(func() {
			if sleep(ctx, delay) == nil {
				w.revokeSurely(ctx, b)
			}
		})
	}
	err := sleep(ctx, time.Duration(w.rng.Int64N(int64(60*time.Millisecond))))
	err = errors.Join(err, f())
	wg.Wait()
	return err
}

func playKillLeader(ctx context.Context, w *World) error {
	for range 4 {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		l, err := w.leader(ctx)
		if err != nil {
			return err
		}
		if err := w.during(ctx, 4, func() error { w.kill(l); return nil }); err != nil {
			return err
		}
		if err := w.start(l); err != nil {
			return err
		}
		if err := w.whole(ctx); err != nil {
			return err
		}
	}
	return nil
}

func playStop(ctx context.Context, w *World) error {
	for range 8 {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		n, err := w.follower(ctx)
		if err != nil {
			return err
		}
		// Half of the time it is stopped before, else while they are under way.
		if w.rng.IntN(2) == 0 {
			if err := w.pause(n); err != nil {
				return err
			}
			w.revokeSome(ctx, 2)
		} else if err := w.during(ctx, 3, func() error { return w.pause(n) }); err != nil {
			return err
		}
		if err := w.cont(n); err != nil {
			return err
		}
		if err := sleep(ctx, settle); err != nil {
			return err
		}
	}
	return nil
}

func playStopLeader(ctx context.Context, w *World) error {
	for range 3 {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		l, err := w.leader(ctx)
		if err != nil {
			return err
		}
		if err := w.during(ctx, 4, func() error {
			if err := w.pause(l); err != nil {
				return err
			}
			if err := sleep(ctx, 5*time.Second); err != nil {
				return err
			}
			return w.cont(l)
		}); err != nil {
			return err
		}
		if err := w.whole(ctx); err != nil {
			return err
		}
	}
	return nil
}

func playStopMajority(ctx context.Context, w *World) error {
	for range 2 {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		stopped := w.members()[:len(w.members())/2+1]
		if err := w.during(ctx, 3, func() error {
			for _, n := range stopped {
				if err := w.pause(n); err != nil {
					return err
				}
			}
			err := sleep(ctx, 8*time.Second)
			for _, n := range stopped {
				err = errors.Join(err, w.cont(n))
			}
			return err
		}); err != nil {
			return err
		}
		if err := w.whole(ctx); err != nil {
			return err
		}
	}
	return nil
}

func playIsolateLeader(ctx context.Context, w *World) error {
	for range 3 {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		l, err := w.leader(ctx)
		if err != nil {
			return err
		}
		if err := w.isolate(l); err != nil {
			return err
		}
		w.revokeSome(ctx, 3)
		if err := sleep(ctx, 3*time.Second); err != nil {
			return err
		}
		if err := w.rejoin(l); err != nil {
			return err
		}
		if err := w.whole(ctx); err != nil {
			return err
		}
	}
	return nil
}

func playOneWay(ctx context.Context, w *World) error {
	for round := range 4 {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		l, err := w.leader(ctx)
		if err != nil {
			return err
		}
		for _, n := range w.members() {
			if n == l {
				continue
			}
			from, to := n, l
			if round%2 == 1 {
				from, to = l, n
			}
			w.fault("%s hears nothing of %s", to.Name, from.Name)
			if err := sandbox.Cut(from.host, to.host); err != nil {
				return err
			}
			if round < 2 { // one link only; then all of the leader's
				break
			}
		}
		w.revokeSome(ctx, 3)
		if err := sleep(ctx, 2*time.Second); err != nil {
			return err
		}
		if err := w.heal(ctx); err != nil {
			return err
		}
	}
	return nil
}

func playHealOneWay(ctx context.Context, w *World) error {
	for range 3 {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		old, err := w.leader(ctx)
		if err != nil {
			return err
		}
		if err := w.isolate(old); err != nil {
			return err
		}
		// Requests wait at the old leader, another is elected, and its word alone
		// comes through.
		var wg sync.WaitGroup
		for _, b := range w.load.take(2) {
			wg.Go(func() {
				cctx, cancel := context.WithTimeout(ctx, 10*time.Second)
				defer cancel()
				if _, err := w.load.revoke(cctx, b, old); err != nil {
					w.revokeSurely(ctx, b)
				}
			})
		}
		if err := sleep(ctx, 2500*time.Millisecond); err != nil {
			return err
		}
		w.fault("%s hears the others, they do not hear it", old.Name)
		old.ended(&old.silent, time.Now())
		for _, n := range w.members() {
			if n != old {
				if err := sandbox.Mend(n.host, old.host); err != nil {
					return err
				}
			}
		}
		wg.Wait()
		if err := w.heal(ctx); err != nil {
			return err
		}
	}
	return nil
}

func playFlap(ctx context.Context, w *World) error {
	if err := w.load.await(ctx, 6); err != nil {
		return err
	}
	n, err := w.follower(ctx)
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 3 {
			w.revokeSome(ctx, 2)
		}
	}()
	for range 10 {
		if err := w.isolate(n); err != nil {
			return err
		}
		if err := sleep(ctx, flapPeriod); err != nil {
			return err
		}
		if err := w.rejoin(n); err != nil {
			return err
		}
		if err := sleep(ctx, flapPeriod); err != nil {
			return err
		}
	}
	<-done
	return nil
}

// flapPeriod is half of a lease's length.
const flapPeriod = 1250 * time.Millisecond

func playDeaf(ctx context.Context, w *World) error {
	for round := range 4 {
		n := w.any()
		var deaf []*beacon
		for range 2 {
			b, err := w.load.beacon(ctx, n, w.load.name("deaf"), true)
			if err != nil {
				return err
			}
			deaf = append(deaf, b)
		}
		if err := sleep(ctx, 2*time.Second); err != nil { // the buffers fill
			return err
		}
		if round%2 == 1 {
			if err := w.pause(n); err != nil {
				return err
			}
		}
		var wg sync.WaitGroup
		for _, b := range deaf {
			wg.Go(func() { w.revokeSurely(ctx, b) })
		}
		wg.Wait()
		for _, b := range deaf {
			b.release()
		}
		if err := sleep(ctx, time.Second); err != nil { // what the kernel held flows now
			return err
		}
		if n.isStopped() {
			if err := w.cont(n); err != nil {
				return err
			}
		}
	}
	return nil
}

func playStarve(ctx context.Context, w *World) error {
	for _, pick := range []func(context.Context) (*node, error){w.follower, w.leader} {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		n, err := pick(ctx)
		if err != nil {
			return err
		}
		w.fault("%s gets 5 ms of every 100", n.Name)
		n.began(&n.stopped)
		end := time.Now().Add(8 * time.Second)
		done := make(chan struct{})
		go func() {
			defer close(done)
			w.revokeSome(ctx, 3)
		}()
		for time.Now().Before(end) && ctx.Err() == nil {
			if err := n.Pause(); err != nil {
				return err
			}
			time.Sleep(95 * time.Millisecond)
			if err := n.Continue(); err != nil {
				return err
			}
			time.Sleep(5 * time.Millisecond)
		}
		n.ended(&n.stopped, time.Now().Add(settle))
		<-done
		if err := w.whole(ctx); err != nil {
			return err
		}
	}
	return nil
}

func playTwice(ctx context.Context, w *World) error {
	for range 5 {
		if err := w.load.await(ctx, 2); err != nil {
			return err
		}
		for _, b := range w.load.take(2) {
			var wg sync.WaitGroup
			for _, n := range w.members()[:2] {
				wg.Go(func() { _, _ = w.load.revoke(ctx, b, n) })
			}
			wg.Wait()
		}
	}
	return nil
}

func playMany(ctx context.Context, w *World) error {
	if err := w.load.await(ctx, 6); err != nil {
		return err
	}
	// Subjects without sessions, beside the few that have one.
	began := time.Now()
	took, err := w.revokeNobodies(ctx, 1000, 64)
	if err != nil {
		return err
	}
	w.log.Printf("1000 revocations, 64 at a time: %v, each p50 %v, p99 %v", time.Since(began).Round(time.Millisecond), at(took, 50), at(took, 99))
	w.revokeSome(ctx, 6)
	return nil
}

// revokeNobodies revokes n subjects that never logged in, some at a time.
func (w *World) revokeNobodies(ctx context.Context, n, atATime int) ([]time.Duration, error) {
	var mu sync.Mutex
	var took []time.Duration
	var errs []error
	var wg sync.WaitGroup
	slots := make(chan struct{}, atATime)
	for range n {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			began := time.Now()
			info, err := revoke(ctx, w.admin(w.load.somewhere()), subject(w.load.name("nobody")))
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
				return
			}
			took = append(took, time.Since(began))
			w.load.mu.Lock()
			w.load.changes = append(w.load.changes, "revocation/"+info.ID)
			w.load.mu.Unlock()
		})
	}
	wg.Wait()
	slices.Sort(took)
	return took, errors.Join(errs...)
}

// at is the p-th percentile of sorted durations.
func at(sorted []time.Duration, p int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)*p/100, len(sorted)-1)]
}

func playJoin(ctx context.Context, w *World) error {
	if err := w.load.await(ctx, 6); err != nil {
		return err
	}
	if err := w.during(ctx, 3, func() error { _, err := w.add(ctx); return err }); err != nil {
		return err
	}
	n, err := w.follower(ctx)
	if err != nil {
		return err
	}
	if err := w.load.await(ctx, 3); err != nil {
		return err
	}
	if err := w.during(ctx, 3, func() error { w.kill(n); return w.start(n) }); err != nil {
		return err
	}
	return w.whole(ctx)
}

func playReplace(ctx context.Context, w *World) error {
	for _, old := range w.members() {
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		if err := w.during(ctx, 2, func() error {
			if _, err := w.add(ctx); err != nil {
				return err
			}
			return w.remove(ctx, old)
		}); err != nil {
			return err
		}
		if err := w.whole(ctx); err != nil {
			return err
		}
	}
	return nil
}

func playRolling(ctx context.Context, w *World) error {
	l, err := w.leader(ctx)
	if err != nil {
		return err
	}
	order := append([]*node{l}, slices.DeleteFunc(w.members(), func(n *node) bool { return n == l })...)
	for _, n := range order {
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		if err := w.during(ctx, 2, func() error { return w.restart(ctx, n) }); err != nil {
			return err
		}
	}
	return nil
}

func playSlow(ctx context.Context, w *World) error {
	line := sandbox.Line{Delay: 100 * time.Millisecond, Jitter: 10 * time.Millisecond, Loss: 0.02}
	far := w.members()[len(w.members())-1]
	w.fault("%s is 200 ms away, and loses 2 %%", far.Name)
	for _, n := range w.members() {
		if n == far {
			continue
		}
		if err := errors.Join(sandbox.Slow(n.host, far.host, line), sandbox.Slow(far.host, n.host, line)); err != nil {
			w.skip("slow links", err)
			return nil
		}
	}
	for range 5 {
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		w.revokeSome(ctx, 3)
	}
	return nil
}

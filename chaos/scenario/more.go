package scenario

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/gossip"
	"github.com/sallyport/sallyport/raftstore/event"
)

// order writes one of a node's control files; "" removes it.
func (w *World) order(n *node, end, text string) error {
	if text == "" {
		return os.Remove(n.disk + end)
	}
	return os.WriteFile(n.disk+end, []byte(text), 0o644)
}

// until calls try until it succeeds, or for as long as d.
func until(ctx context.Context, d time.Duration, try func() error) error {
	for end := time.Now().Add(d); ; {
		err := try()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("after %v: %w", d, err)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// ended says how a node that must end by itself has not.
func (w *World) ended(ctx context.Context, n *node, d time.Duration) error {
	return until(ctx, d, func() error {
		if n.Running() {
			return fmt.Errorf("%s runs on", n.Name)
		}
		return nil
	})
}

// saidSince returns what a node has written to its log from an offset on.
func saidSince(n *node, offset int) string {
	b, _ := os.ReadFile(n.LogFile)
	return string(b[min(offset, len(b)):])
}

func logSize(n *node) int {
	i, err := os.Stat(n.LogFile)
	if err != nil {
		return 0
	}
	return int(i.Size())
}

// orderly says that a node has not ended by a panic.
func orderly(n *node, offset int) error {
	said := saidSince(n, offset)
	for _, bad := range []string{"panic:", "fatal error:"} {
		if i := strings.Index(said, bad); i >= 0 {
			return fmt.Errorf("%s ended in a panic: %s", n.Name, said[i:min(len(said), i+2000)])
		}
	}
	return nil
}

// S2.

// playBeforeBroadcast kills the leader when a revocation is committed, and it
// has told nobody over the fence: it stands still there and is killed after a
// while, in which it goes on to lead and to renew leases, or it dies there at
// once. The caller has got no answer; the same call, with the same
// Idempotency-Key, goes to the other nodes.
func playBeforeBroadcast(ctx context.Context, w *World) error {
	if err := w.hooked(); err != nil {
		w.skip("a leader that stops between commit and broadcast", err)
		return nil
	}
	var wrong []error
	for round := range 6 {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		l, err := w.leader(ctx)
		if err != nil {
			return err
		}
		servers := []string{l.Addr}
		for range 6 { // an election takes its time
			for _, n := range w.members() {
				if n != l {
					servers = append(servers, n.Addr)
				}
			}
		}
		client, err := w.AdminClient(servers...)
		if err != nil {
			return err
		}
		verb := []string{"stop", "die"}[round%2]
		w.fault("%s is to %s when a revocation is committed and not told", l.Name, verb)
		if err := w.order(l, pointEnd, verb+" revocation committed"); err != nil {
			return err
		}
		revoked := w.load.take(2)
		results := make(chan error, len(revoked))
		var wg sync.WaitGroup
		for _, b := range revoked {
			wg.Go(func() {
				cctx, cancel := context.WithTimeout(ctx, time.Minute)
				defer cancel()
				complete, err := w.load.revokeBy(cctx, b, client, l.Name+", then others")
				if err == nil && !complete {
					err = errors.New("the answer is not complete")
				}
				if err != nil {
					err = fmt.Errorf("round %d: revoke of %s was not completed by the next leader: %w", round, b.subject, err)
				}
				results <- err
			})
		}
		err = until(ctx, 20*time.Second, func() error {
			if _, err := os.Stat(l.disk + pointEnd + reachedEnd); err != nil && l.Running() {
				return fmt.Errorf("%s has not come to commit a revocation", l.Name)
			}
			return nil
		})
		if err == nil && verb == "stop" {
			err = sleep(ctx, w.upTo(500*time.Millisecond))
		}
		w.kill(l)
		wg.Wait()
		close(results)
		for r := range results {
			wrong = append(wrong, r)
		}
		if err != nil {
			return err
		}
		for _, end := range []string{pointEnd, pointEnd + reachedEnd} {
			_ = os.Remove(l.disk + end)
		}
		if err := errors.Join(w.start(l), w.whole(ctx)); err != nil {
			return err
		}
		for _, b := range revoked {
			wrong = append(wrong, w.revokedOnce(ctx, b.subject))
		}
	}
	return errors.Join(wrong...)
}

// revokedOnce looks for the one revocation of a subject: a call that is repeated
// with its key makes no second one.
func (w *World) revokedOnce(ctx context.Context, subject string) error {
	list, err := w.admin(w.any()).Revocations(ctx)
	if err != nil {
		return err
	}
	n := 0
	for _, r := range list {
		if r.Scope.Value == subject {
			n++
		}
	}
	if n != 1 {
		return fmt.Errorf("%s was revoked by one call, and there are %d revocations of it", subject, n)
	}
	return nil
}

// S15.

// playDamage does to a node's files what disks do that lie or rot. A node whose
// log has lost its end comes back and gets it from the others. One whose tables
// are damaged ends with an error that names them and serves nothing else; it
// comes back by the documented road: removed, and another joins.
func playDamage(ctx context.Context, w *World) error {
	for _, d := range []struct {
		what string
		do   func(path string, at, size int64) error
	}{
		{"cut off", func(path string, at, _ int64) error { return os.Truncate(path, at) }},
		{"zeros", func(path string, at, size int64) error { return overwrite(path, at, make([]byte, size-at)) }},
		{"garbage", func(path string, at, size int64) error { return overwrite(path, at, w.garbage(size-at)) }},
	} {
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		n, err := w.follower(ctx)
		if err != nil {
			return err
		}
		w.kill(n)
		path, size, err := newestLog(n)
		if err != nil {
			return err
		}
		// The last records, of which some were synced and acknowledged.
		at := size - 1 - w.rng.Int64N(min(size-1, 8<<10))
		w.fault("the end of %s of %s, from %d of %d: %s", filepath.Base(path), n.Name, at, size, d.what)
		if err := d.do(path, at, size); err != nil {
			return err
		}
		offset := logSize(n)
		if err := w.start(n); err != nil {
			return err
		}
		if err := w.wholeWithout(ctx, nil); err != nil {
			return fmt.Errorf("a log whose end is %s: %w: %s", d.what, err, saidSince(n, offset))
		}
		if err := orderly(n, offset); err != nil {
			return err
		}
		w.revokeSome(ctx, 2)
	}
	for _, dir := range []string{"log", "state"} {
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		n, err := w.follower(ctx)
		if err != nil {
			return err
		}
		// Twice: what is in the log of the database is in tables after a start.
		for range 2 {
			if err := w.restart(ctx, n); err != nil {
				return err
			}
		}
		tctx, cancel := context.WithTimeout(ctx, time.Minute)
		err = n.Terminate(tctx) // its recordings are in the store from here on
		cancel()
		if err != nil {
			return err
		}
		flipped, err := flipBits(filepath.Join(n.DataDir, "raft", dir))
		if err != nil {
			return err
		}
		w.fault("%d bits are flipped in the tables of the %s of %s", flipped, dir, n.Name)
		offset := logSize(n)
		if err := w.start(n); err != nil {
			return err
		}
		w.revokeSome(ctx, 1)
		if err := w.ended(ctx, n, time.Minute); err != nil {
			return fmt.Errorf("with damaged tables of the %s: %w", dir, err)
		}
		said := saidSince(n, offset)
		w.log.Printf("%s said: %s", n.Name, reason(said))
		if err := orderly(n, offset); err != nil {
			return err
		}
		if !strings.Contains(said, "checksum") && !strings.Contains(said, "corrupt") {
			return fmt.Errorf("%s ended and does not say that its %s is damaged: %s", n.Name, dir, said)
		}
		if err := w.remove(ctx, n); err != nil {
			return err
		}
		if _, err := w.add(ctx); err != nil {
			return err
		}
		if err := w.whole(ctx); err != nil {
			return err
		}
	}
	return nil
}

// wholeWithout is whole, but starts nobody who has ended by itself, and lets
// those be missing that are named.
func (w *World) wholeWithout(ctx context.Context, missing *node) error {
	return until(ctx, time.Minute, func() error {
		for _, n := range w.members() {
			if n != missing && !n.Running() {
				return fmt.Errorf("%s does not run", n.Name)
			}
		}
		tctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		return w.WaitReady(tctx)
	})
}

// newestLog is the file that a node's log of Raft was written to last, and where
// what was written to it ends.
func newestLog(n *node) (path string, size int64, err error) {
	paths, err := filepath.Glob(filepath.Join(n.DataDir, "raft", "log", "*.log"))
	if err != nil {
		return "", 0, err
	}
	var newest time.Time
	for _, p := range paths {
		i, err := os.Stat(p)
		if err != nil {
			return "", 0, err
		}
		if i.ModTime().After(newest) {
			path, newest = p, i.ModTime()
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", 0, err
	}
	for size = int64(len(b)); size > 0 && b[size-1] == 0; size-- {
	}
	if size < 2 {
		return "", 0, fmt.Errorf("%s has nothing written in it", path)
	}
	return path, size, nil
}

func overwrite(path string, at int64, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, at)
	return errors.Join(err, f.Close())
}

func (w *World) garbage(n int64) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(w.rng.Uint32())
	}
	return b
}

// flipBits flips one bit of every 256 bytes of all tables in dir: wherever
// something is read, it is damaged.
func flipBits(dir string) (flipped int, err error) {
	tables, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	if err != nil || len(tables) == 0 {
		return 0, fmt.Errorf("no tables in %s: %w", dir, err)
	}
	for _, t := range tables {
		b, err := os.ReadFile(t)
		if err != nil {
			return 0, err
		}
		for i := 17; i < len(b); i += 256 {
			b[i] ^= 1 << (flipped % 8)
			flipped++
		}
		if err := os.WriteFile(t, b, 0o600); err != nil {
			return 0, err
		}
	}
	return flipped, nil
}

// reason is the line in which a node says why it ends, or the last one.
func reason(s string) (last string) {
	for line := range strings.Lines(s) {
		if last = strings.TrimSpace(line); strings.HasPrefix(last, "sallyport:") {
			break
		}
	}
	return last
}

// S26.

// playUpgrade rolls all nodes to a build that stores what this one cannot read,
// and back while that is possible.
func playUpgrade(ctx context.Context, w *World) error {
	next := w.Binary + "-next"
	if _, err := os.Stat(next); err != nil {
		w.skip("an upgrade", fmt.Errorf("%w: `make chaos` builds it", err))
		return nil
	}
	l, err := w.leader(ctx)
	if err != nil {
		return err
	}
	before, err := w.level(ctx)
	if err != nil {
		return err
	}
	order := append(slices.DeleteFunc(w.members(), func(n *node) bool { return n == l }), l)
	roll := func(n *node, binary string) error {
		w.fault("%s gets the build %s", n.Name, filepath.Base(binary))
		n.Binary = binary
		if err := w.during(ctx, 2, func() error { return w.restart(ctx, n) }); err != nil {
			return err
		}
		if err := sleep(ctx, 2*time.Second); err != nil {
			return err
		}
		w.revokeSome(ctx, 1)
		return w.load.await(ctx, 3)
	}
	same := func(when string) error {
		if now, err := w.level(ctx); err != nil || now != before {
			return fmt.Errorf("%s: the feature level is %d, it was %d: %w", when, now, before, err)
		}
		if n, err := w.marks(ctx); err != nil || n > 0 {
			return fmt.Errorf("%s: %d events are stored that a member cannot read: %w", when, n, err)
		}
		return nil
	}
	for i, step := range []struct {
		n      *node
		binary string
	}{
		{order[0], next}, {order[1], next}, {order[0], w.Binary}, // one goes back: nothing was stored
		{order[0], next},
	} {
		if err := roll(step.n, step.binary); err != nil {
			return err
		}
		if err := same(fmt.Sprintf("step %d, versions mixed", i)); err != nil {
			return err
		}
	}
	// The new build leads now and then, while the old one is a voter.
	if err := w.during(ctx, 2, func() error { return w.restart(ctx, l) }); err != nil {
		return err
	}
	if err := sleep(ctx, 3*time.Second); err != nil {
		return err
	}
	if err := same("the new build leads, one node has the old one"); err != nil {
		return err
	}
	if err := roll(order[2], next); err != nil {
		return err
	}
	if err := until(ctx, 30*time.Second, func() error {
		now, err := w.level(ctx)
		if err == nil && now != before+1 {
			err = fmt.Errorf("all nodes have the new build, and the feature level is %d", now)
		}
		if n, merr := w.marks(ctx); err == nil && n == 0 {
			err = errors.Join(fmt.Errorf("what the new build stores is not in the log"), merr)
		}
		return err
	}); err != nil {
		return err
	}
	if err := w.load.await(ctx, 3); err != nil {
		return err
	}
	w.revokeSome(ctx, 2)

	// Too late to go back.
	n, err := w.follower(ctx)
	if err != nil {
		return err
	}
	tctx, cancel := context.WithTimeout(ctx, time.Minute)
	err = n.Terminate(tctx)
	cancel()
	if err != nil {
		return err
	}
	w.fault("%s gets the old build back", n.Name)
	offset := logSize(n)
	n.Binary = ""
	if err := w.start(n); err != nil {
		return err
	}
	if err := w.ended(ctx, n, 30*time.Second); err != nil {
		return fmt.Errorf("the old build reads what it does not know: %w", err)
	}
	said := saidSince(n, offset)
	w.log.Printf("%s said: %s", n.Name, reason(said))
	if !strings.Contains(said, "run a newer build") {
		return fmt.Errorf("the old build does not say why it does not start: %s", said)
	}
	w.revokeSome(ctx, 1) // without it
	n.Binary = next
	return errors.Join(w.start(n), w.whole(ctx))
}

// level is the cluster's feature level.
func (w *World) level(ctx context.Context) (uint32, error) {
	st, err := w.admin(w.any()).Status(ctx)
	if err != nil {
		return 0, err
	}
	return st.FeatureLevel, nil
}

// marks counts the events that only the next build knows.
func (w *World) marks(ctx context.Context) (n int, err error) {
	logs := map[string][]api.EventInfo{}
	err = w.readLogs(ctx, logs)
	for _, e := range logs[w.any().Name] {
		if e.Type == "chaos.marked" || e.Type == event.TypeRevoked && e.Version > event.Newest(event.TypeRevoked) {
			n++
		}
	}
	return n, err
}

// S30.

// playGossip has gossip and the fence contradict each other.
func playGossip(ctx context.Context, w *World) error {
	if err := w.hooked(); err != nil {
		w.skip("gossip alone, or all but gossip, cut off", err)
		return nil
	}
	for _, c := range []struct {
		classes string
		heard   string // what the others' gossip says of the node
		state   string // of the node in a revocation
		silent  bool   // it hears and says nothing but gossip
	}{
		{"gossip", gossip.Dead, "confirmed", false},
		{"fence", gossip.Alive, "fenced by expiry", false},
		{"raft bulk confirm fence events mesh", gossip.Alive, "fenced by expiry", true},
	} {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		n, err := w.follower(ctx)
		if err != nil {
			return err
		}
		if err := until(ctx, time.Minute, func() error { return w.gossipSays(ctx, n, gossip.Alive) }); err != nil {
			return err
		}
		w.fault("nothing of these arrives at %s or leaves it: %s", n.Name, c.classes)
		if err := w.order(n, netEnd, c.classes); err != nil {
			return err
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil { // it looks every few milliseconds
			return err
		}
		if c.silent {
			n.began(&n.silent)
		}
		if c.heard == gossip.Dead {
			if err := until(ctx, time.Minute, func() error { return w.gossipSays(ctx, n, c.heard) }); err != nil {
				return err
			}
			if err := w.serves(ctx, n); err != nil {
				return fmt.Errorf("gossip alone says that %s is dead: %w", n.Name, err)
			}
		} // else at once, while it holds a lease
		if err := w.revokeSeen(ctx, n, c.state); err != nil {
			return fmt.Errorf("%s cut off, gossip says %s: %w", c.classes, c.heard, err)
		}
		if c.heard == gossip.Alive {
			if err := w.serves(ctx, n); err == nil {
				return fmt.Errorf("%s holds no lease and lets somebody in: gossip says that it lives", n.Name)
			}
		}
		if err := w.gossipSays(ctx, n, c.heard); err != nil {
			return fmt.Errorf("the measurement is void: %w", err)
		}
		w.fault("everything arrives at %s again", n.Name)
		n.ended(&n.silent, time.Now())
		if err := errors.Join(w.order(n, netEnd, ""), w.whole(ctx)); err != nil {
			return err
		}
		if err := until(ctx, time.Minute, func() error { return w.serves(ctx, n) }); err != nil {
			return err
		}
	}
	return nil
}

// gossipSays says how the others' gossip of n is not as it should be.
func (w *World) gossipSays(ctx context.Context, n *node, want string) error {
	for _, m := range w.up() {
		if m == n {
			continue
		}
		st, err := w.admin(m).Status(ctx)
		if err != nil {
			return err
		}
		for _, s := range st.Nodes {
			for _, g := range s.Gossip {
				if s.Node == m.Name && g.Name == n.Name && g.State != want {
					return fmt.Errorf("gossip at %s says that %s is %s, not %s", m.Name, n.Name, g.State, want)
				}
			}
		}
	}
	return nil
}

// serves lets somebody in at n and asks the target something.
func (w *World) serves(ctx context.Context, n *node) error {
	token, err := w.load.token(w.load.name("visitor"), "feature")
	if err != nil {
		return err
	}
	c, err := w.load.login(ctx, n, token)
	if err != nil {
		return err
	}
	defer hangUp(c)
	qctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, err = c.Exec(qctx, "SELECT 1")
	return err
}

// revokeSeen revokes subjects that have a session, at another node than n, and
// looks at what the answers say of n.
func (w *World) revokeSeen(ctx context.Context, n *node, want string) error {
	var via *node
	for _, m := range w.up() {
		if m != n {
			via = m
		}
	}
	taken := w.load.take(2)
	if len(taken) == 0 {
		return errors.New("nobody has a session")
	}
	for _, b := range taken {
		complete, err := w.load.revoke(ctx, b, via)
		if err != nil || !complete {
			return fmt.Errorf("revoke of %s: complete %v: %w", b.subject, complete, err)
		}
		list, err := w.admin(via).Revocations(ctx)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(list, func(r api.RevocationInfo) bool { return r.Scope.Value == b.subject })
		if i < 0 {
			return fmt.Errorf("the revocation of %s is not listed", b.subject)
		}
		info, err := w.admin(via).Revocation(ctx, list[i].ID, 10*time.Second)
		if err != nil {
			return err
		}
		state, detail := "not named", ""
		for _, f := range info.Nodes {
			if f.Node == n.Name {
				state, detail = f.State, f.Detail
			}
		}
		if state != want {
			return fmt.Errorf("revoke of %s: %s is %s (%s), not %s", b.subject, n.Name, state, detail, want)
		}
	}
	return nil
}

// S31.

// shortLived is how long certificates live here. A third of it is left for a
// renewal, on a busy machine too.
const shortLived = 30 * time.Second

func shortCertificates(dir string) error {
	path := filepath.Join(dir, "node.yaml")
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	const usual = "certLifetime: 720h0m0s"
	if !strings.Contains(string(b), usual) {
		return fmt.Errorf("%s does not say %q", path, usual)
	}
	return os.WriteFile(path, []byte(strings.Replace(string(b), usual, "certLifetime: "+shortLived.String(), 1)), 0o600)
}

// playCertificates revokes over several lifetimes of all certificates, and then
// keeps a node away until its own has run out.
func playCertificates(ctx context.Context, w *World) error {
	// The cluster's first node has made its first certificate before its
	// settings were changed; others are as old as a node must be to renew.
	if err := sleep(ctx, shortLived/6); err != nil {
		return err
	}
	if _, err := w.CLI(ctx, w.AdminEnv(), "cluster", "rotate", "--all"); err != nil {
		return err
	}
	seen := map[string]map[[32]byte]bool{}
	var steady []*beacon // one on each node
	for _, n := range w.members() {
		seen[n.Name] = map[[32]byte]bool{}
		b, err := w.load.beacon(ctx, n, w.load.name("steady"), false)
		if err != nil {
			return err
		}
		steady = append(steady, b)
	}
	const lifetimes = 3
	for end := time.Now().Add(lifetimes * shortLived); time.Now().Before(end); {
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		w.revokeSome(ctx, 2)
		for _, n := range w.members() {
			leaf, err := leafOf(ctx, n)
			if err != nil {
				return err
			}
			seen[n.Name][leaf] = true
		}
		if err := sleep(ctx, time.Second); err != nil {
			return err
		}
	}
	var wrong []error
	for name, leaves := range seen {
		w.log.Printf("%s has had %d certificates in %d lifetimes", name, len(leaves), lifetimes)
		if len(leaves) <= lifetimes {
			wrong = append(wrong, fmt.Errorf("%s has had %d certificates in %d lifetimes", name, len(leaves), lifetimes))
		}
	}
	for _, b := range steady {
		if !b.alive() {
			wrong = append(wrong, fmt.Errorf("the session of %s on %s ended: %v", b.subject, b.node.Name, b.err))
		}
	}
	if err := errors.Join(wrong...); err != nil {
		return err
	}

	n, err := w.follower(ctx)
	if err != nil {
		return err
	}
	offset := logSize(n)
	if err := w.isolate(n); err != nil {
		return err
	}
	w.revokeSome(ctx, 2)
	if err := sleep(ctx, shortLived+2*time.Second); err != nil {
		return err
	}
	if err := w.rejoin(n); err != nil {
		return err
	}
	// Nobody talks to it any more; it must not take anything up again.
	if err := w.serves(ctx, n); err == nil {
		return fmt.Errorf("%s, whose certificate has run out, lets somebody in", n.Name)
	}
	if err := sleep(ctx, 5*time.Second); err != nil {
		return err
	}
	if err := w.serves(ctx, n); err == nil {
		return fmt.Errorf("%s, whose certificate has run out, lets somebody in", n.Name)
	}
	if err := w.revokeSeen(ctx, n, "fenced by expiry"); err != nil {
		return err
	}
	if n.Running() {
		w.fault("%s is asked to stop", n.Name)
		tctx, cancel := context.WithTimeout(ctx, time.Minute)
		err := n.Terminate(tctx)
		cancel()
		if err != nil {
			return fmt.Errorf("%s did not stop as asked: %w: %s", n.Name, errors.Join(err, orderly(n, offset)), reason(saidSince(n, offset)))
		}
	}
	if err := orderly(n, offset); err != nil {
		return err
	}
	// It does not start, and says what to do; that is done.
	offset = logSize(n)
	if err := w.start(n); err != nil {
		return err
	}
	if err := w.ended(ctx, n, 20*time.Second); err != nil {
		return fmt.Errorf("with a certificate that has run out: %w", err)
	}
	said := saidSince(n, offset)
	w.log.Printf("%s said: %s", n.Name, reason(said))
	if !strings.Contains(said, "remove the node and join anew") {
		return fmt.Errorf("%s does not say why it does not start: %s", n.Name, said)
	}
	if err := w.remove(ctx, n); err != nil {
		return err
	}
	if _, err := w.add(ctx); err != nil {
		return err
	}
	return w.whole(ctx)
}

// leafOf is the certificate that clients of a node see now.
func leafOf(ctx context.Context, n *node) ([32]byte, error) {
	d := &tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}}} // only looked at
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	c, err := d.DialContext(ctx, "tcp", n.Addr)
	if err != nil {
		return [32]byte{}, err
	}
	defer c.Close()
	return sha256.Sum256(c.(*tls.Conn).ConnectionState().PeerCertificates[0].Raw), nil
}

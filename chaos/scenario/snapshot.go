package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sallyport/sallyport/node/api"
)

// snapshotsVar has nodes take snapshots more often: how often to look, after how
// many entries, and how many entries stay in the log behind one.
const snapshotsVar = "SALLYPORT_CHAOS_SNAPSHOTS"

var (
	oftenSnapshots  = []string{snapshotsVar + "=200ms 40 20"} // S16
	closerSnapshots = []string{snapshotsVar + "=100ms 16 16"} // S17
)

// What nodes write to their logs about snapshots.
var (
	saidArrives   = regexp.MustCompile(`msg="a snapshot arrives"`)
	saidReceived  = regexp.MustCompile(`msg="raft: (copied to local snapshot|failed to (copy|receive whole|finalize) snapshot)"`)
	saidRestored  = regexp.MustCompile(`msg="raft: (Installed remote snapshot|failed to restore snapshot)"`)
	saidInstalled = regexp.MustCompile(`msg="raft: Installed remote snapshot"`)
	saidTaking    = regexp.MustCompile(`msg="raft: starting snapshot up to"`)
	saidTaken     = regexp.MustCompile(`msg="raft: (snapshot complete up to|failed to take snapshot)"`)
	saidIndex     = regexp.MustCompile(`msg="raft: snapshot complete up to".* index=(\d+)`)
	saidShortened = regexp.MustCompile(`msg="raft: compacting logs".* to=(\d+)`)
	saidDiffers   = regexp.MustCompile(`msg="the log differs from the leader's at the snapshot's end[^"]*".* index=(\d+) had_term=(\d+) term=(\d+)`)
)

// saidSendingTo is what a leader says that sends peer a snapshot.
func saidSendingTo(peer string) *regexp.Regexp {
	return regexp.MustCompile(`msg="raft: installing snapshot on".* peer=` + regexp.QuoteMeta(peer) + ` `)
}

// largeFiles make each change of the configuration store 48 KiB, so that a
// snapshot is some megabytes and takes its time.
var largeFiles = map[string]string{"large.cedar": strings.Repeat("// "+strings.Repeat("x", 93)+"\n", 512)}

// S16.

const (
	killsOnReceipt = 5
	killsOnRestore = 4
	killsOnTaking  = 3
	// triesPerKill bounds how often a moment is missed: the node was done.
	triesPerKill = 5
	// slowSyncs stretches what is killed into.
	slowSyncs = "slow 40ms"
)

// playKillSnapshots kills followers while they get a snapshot from the leader
// and make it their state, and leaders while they take one of their own.
func playKillSnapshots(ctx context.Context, w *World) error {
	if err := w.hooked(); err != nil {
		w.skip("kill during snapshots", err)
		return nil
	}
	receipt := &span{what: "the receipt of a snapshot", begin: saidArrives, end: saidReceived}
	restore := &span{what: "the restore of a snapshot", begin: saidReceived, end: saidRestored}
	taking := &span{what: "a leader's own snapshot", begin: saidTaking, end: saidTaken, length: 500 * time.Millisecond}

	for i := 0; receipt.hits < killsOnReceipt || restore.hits < killsOnRestore; i++ {
		if i > triesPerKill*(killsOnReceipt+killsOnRestore) {
			return errors.Join(receipt.untested(), restore.untested())
		}
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		n, err := w.follower(ctx)
		if err != nil {
			return err
		}
		back, err := w.fallBehind(ctx, n)
		if err != nil {
			return err
		}
		if receipt.length == 0 { // once to its end, to know how long it takes
			if err := w.measure(ctx, n, back, receipt, restore); err != nil {
				return err
			}
			continue
		}
		for again := true; again; {
			s := receipt
			if receipt.hits >= killsOnReceipt || restore.hits < killsOnRestore && w.rng.IntN(2) == 0 {
				s = restore
			}
			hit, err := w.strike(ctx, n, s, back)
			if err != nil {
				return err
			}
			back = func() error { return w.start(n) }
			again = hit && w.rng.IntN(3) > 0 && (receipt.hits < killsOnReceipt || restore.hits < killsOnRestore)
		}
		if !n.Running() {
			if err := w.start(n); err != nil {
				return err
			}
		}
		w.revokeSome(ctx, 1)
		if err := w.whole(ctx); err != nil {
			return err
		}
	}

	for taking.hits < killsOnTaking {
		if taking.tries >= killsOnTaking*triesPerKill {
			return taking.untested()
		}
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		l, err := w.leader(ctx)
		if err != nil {
			return err
		}
		if err := w.disk(l, slowSyncs); err != nil { // it is done too soon otherwise
			return err
		}
		stop := w.press(ctx, 32, w.members()...)
		_, err = w.strike(ctx, l, taking, nil)
		stop()
		if err != nil {
			return err
		}
		if !l.Running() {
			if err := w.start(l); err != nil {
				return err
			}
		}
		w.revokeSome(ctx, 1)
		if err := w.whole(ctx); err != nil {
			return err
		}
	}

	sent, installed := 0, 0
	for _, n := range w.members() {
		said := saidSince(n, 0)
		installed += len(saidInstalled.FindAllString(said, -1))
		for _, peer := range w.members() {
			sent += len(saidSendingTo(peer.Name).FindAllString(said, -1))
		}
		if err := orderly(n, 0); err != nil {
			return err
		}
	}
	w.log.Printf("%d snapshots were sent and %d installed", sent, installed)
	for _, s := range []*span{receipt, restore, taking} {
		w.log.Printf("kill -9 in the middle of %s: %d of %d", s.what, s.hits, s.tries)
	}
	if sent == 0 || installed == 0 {
		return errors.New("nothing was tested: no snapshot was sent and installed")
	}
	return nil
}

// span is what a node does between two lines of its log, and what came of the
// attempts to kill it there.
type span struct {
	what        string
	begin, end  *regexp.Regexp
	length      time.Duration // how long it takes, as far as is known
	hits, tries int
}

func (s *span) untested() error {
	return fmt.Errorf("nothing was tested: %d of %d kills came in %s", s.hits, s.tries, s.what)
}

// strike has n begin with s, by calling back if it is not nil, and kills it at
// a moment by chance. It reports whether that was in the middle. A node that does
// not come to the beginning lives on.
func (w *World) strike(ctx context.Context, n *node, s *span, back func() error) (hit bool, err error) {
	s.tries++
	offset := logSize(n)
	if back != nil {
		if err := back(); err != nil {
			return false, err
		}
	}
	moment := w.upTo(s.length)
	at, err := awaitSaid(ctx, n, offset, s.begin, 15*time.Second)
	if err != nil {
		w.fault("%s does not come to %s: %v", n.Name, s.what, err)
		return false, ctx.Err()
	}
	err = errors.Join(w.order(n, "", slowSyncs), sleep(ctx, moment))
	w.kill(n)
	if err = errors.Join(err, w.order(n, "", "")); err != nil {
		return false, err
	}
	if hit = !s.end.MatchString(saidSince(n, at)); hit {
		s.hits++
	} else {
		s.length = s.length * 3 / 4
	}
	w.fault("%s was killed %v after the beginning of %s: in the middle: %v", n.Name, moment.Round(time.Millisecond), s.what, hit)
	return hit, nil
}

// measure lets n, which back brings back, come through all of the spans.
func (w *World) measure(ctx context.Context, n *node, back func() error, spans ...*span) error {
	at := logSize(n)
	if err := back(); err != nil {
		return err
	}
	for _, s := range spans {
		var err error
		if at, err = awaitSaid(ctx, n, at, s.begin, 30*time.Second); err != nil {
			return fmt.Errorf("nothing was tested: %s did not come to %s: %w", n.Name, s.what, err)
		}
		began := time.Now()
		if err := w.order(n, "", slowSyncs); err != nil {
			return err
		}
		if _, err := awaitSaid(ctx, n, at, s.end, 30*time.Second); err != nil {
			return err
		}
		s.length = time.Since(began)
		w.log.Printf("%s took %v", s.what, s.length.Round(time.Millisecond))
	}
	return errors.Join(w.order(n, "", ""), w.whole(ctx))
}

// awaitSaid returns where n's log has a match of what, from an offset on.
func awaitSaid(ctx context.Context, n *node, offset int, what *regexp.Regexp, d time.Duration) (int, error) {
	f, err := os.Open(n.LogFile)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var said bytes.Buffer
	for end := time.Now().Add(d); ; {
		if _, err := io.Copy(&said, io.NewSectionReader(f, int64(offset+said.Len()), 1<<30)); err != nil {
			return 0, err
		}
		if i := what.FindIndex(said.Bytes()); i != nil {
			return offset + i[0], nil
		}
		switch {
		case !n.Running():
			return 0, fmt.Errorf("%s has ended", n.Name)
		case time.Now().After(end):
			return 0, fmt.Errorf("%s has not said %s for %v", n.Name, what, d)
		}
		if err := sleep(ctx, 2*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

// fallBehind takes n out of the cluster, by kill -9 or by a cut, until the
// leader's log begins after n's ends, so that n needs a snapshot. back brings n
// back.
func (w *World) fallBehind(ctx context.Context, n *node) (back func() error, err error) {
	st, err := w.statusOf(ctx, n)
	if err != nil {
		return nil, err
	}
	if w.rng.IntN(2) == 0 {
		w.kill(n)
		back = func() error { return w.start(n) }
	} else {
		if err := w.isolate(n); err != nil {
			return nil, err
		}
		back = func() error { return w.rejoin(n) }
	}
	_, err = w.shorten(ctx, st.LastIndex, 32, n)
	return back, err
}

// shorten has events stored until the log of the leader, which it returns,
// begins after index. out takes no part.
func (w *World) shorten(ctx context.Context, index uint64, callers int, out *node) (leader *node, err error) {
	others := slices.DeleteFunc(w.members(), func(n *node) bool { return n == out })
	// It takes seconds, as a status waits for who is out.
	if err := until(ctx, time.Minute, func() (err error) { leader, err = w.leaderOf(ctx, others); return err }); err != nil {
		return nil, err
	}
	defer w.press(ctx, callers, others...)()
	return leader, until(ctx, 30*time.Second, func() error {
		if begins := number(saidShortened, saidSince(leader, 0)); begins <= index+1 {
			return fmt.Errorf("nothing was tested: the log of %s begins at %d, that of %s ends at %d", leader.Name, begins, out.Name, index)
		}
		return nil
	})
}

// number is what the last match of re captured; 0 when there is none.
func number(re *regexp.Regexp, s string) uint64 {
	all := re.FindAllStringSubmatch(s, -1)
	if len(all) == 0 {
		return 0
	}
	n, _ := strconv.ParseUint(all[len(all)-1][1], 10, 64) // digits
	return n
}

// press stores events as fast as the nodes take them: revocations of nobody, by
// so many callers. stop ends it, and returns when nothing of it is under way.
func (w *World) press(ctx context.Context, callers int, at ...*node) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for ; ctx.Err() == nil; i++ {
				// At the end, what is under way is given up: nobody knows whether
				// it was made, and nobody was told that it was.
				cctx, done := context.WithTimeout(ctx, 10*time.Second)
				var info revoked
				err := w.admin(at[i%len(at)]).Call(cctx, http.MethodPost, "/v1/revocations",
					api.RevokeRequest{Subject: subject(w.load.name("nobody")), Reason: "chaos", Timeout: time.Millisecond}, &info) // stored is enough
				done()
				if err != nil {
					_ = sleep(ctx, 50*time.Millisecond)
					continue
				}
				w.load.mu.Lock()
				w.load.changes = append(w.load.changes, "revocation/"+info.ID)
				w.load.mu.Unlock()
				w.load.count("revocations of nobody")
			}
		})
	}
	return func() {
		cancel()
		wg.Wait()
	}
}

// statusOf is what n says of itself.
func (w *World) statusOf(ctx context.Context, n *node) (api.NodeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	st, err := w.admin(n).Status(ctx)
	if err != nil {
		return api.NodeStatus{}, err
	}
	for _, s := range st.Nodes {
		if s.Node == n.Name {
			return s, nil
		}
	}
	return api.NodeStatus{}, fmt.Errorf("%s does not know itself", n.Name)
}

// leaderOf is the one of these nodes that leads, as they say.
func (w *World) leaderOf(ctx context.Context, nodes []*node) (*node, error) {
	for _, n := range nodes {
		if !n.Running() {
			continue
		}
		s, err := w.statusOf(ctx, n)
		if err != nil {
			return nil, err
		}
		if strings.EqualFold(s.RaftState, "leader") {
			return n, nil
		}
	}
	return nil, errors.New("none of the nodes leads")
}

// S17.

const (
	divergentRounds = 2
	divergentTries  = 8
	// divergentCallers is how many entries nobody else has: each caller waits for
	// one. The others' snapshot must end among them.
	divergentCallers = 128
	// divergentTime is after how long a leader that hears nobody must not lead:
	// three times its lease.
	divergentTime = 1500 * time.Millisecond
	// mostSnapshots may come until a node has caught up: another one when the
	// leader's log was shortened meanwhile. A loop makes dozens.
	mostSnapshots = 5
	// quiet is how long no snapshot may be sent after all are whole: a loop sends
	// the next one at once.
	quiet = 3 * time.Second
)

// playDivergent cuts a leader off while it stores what nobody else has; the
// others elect another, store other things in these places and shorten their
// logs. So the old one is sent a snapshot that ends in the middle of what it has
// (hashicorp/raft #697).
func playDivergent(ctx context.Context, w *World) error {
	if err := w.hooked(); err != nil {
		w.skip("a snapshot onto a divergent log", err)
		return nil
	}
	done := 0
	for try := 1; done < divergentRounds; try++ {
		if try > divergentTries {
			return fmt.Errorf("nothing was tested: in %d tries, %d snapshots came onto a divergent log", divergentTries, done)
		}
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		old, err := w.leader(ctx)
		if err != nil {
			return err
		}
		others := slices.DeleteFunc(w.members(), func(n *node) bool { return n == old })

		stop := w.press(ctx, divergentCallers, old)
		err = errors.Join(sleep(ctx, time.Second), w.isolate(old), sleep(ctx, divergentTime)) // all callers have a connection by then
		stop()
		if err != nil {
			return err
		}
		before, err := w.statusOf(ctx, old)
		if err != nil {
			return err
		}
		if strings.EqualFold(before.RaftState, "leader") {
			return fmt.Errorf("%s leads on, cut off from all others", old.Name)
		}
		leader, err := w.shorten(ctx, before.CommitIndex, 4, old)
		if err != nil {
			return err
		}
		// What was on its way since before would still fit, and take away what is
		// wrong before the snapshot comes.
		if _, err := awaitSaid(ctx, leader, logSize(leader), saidSendingTo(old.Name), 15*time.Second); err != nil {
			w.fault("%v", err)
		}
		newest := uint64(0)
		for _, n := range others {
			newest = max(newest, number(saidIndex, saidSince(n, 0)))
		}
		w.fault("%s has committed up to %d and stored up to %d; the others' newest snapshot ends at %d", old.Name, before.CommitIndex, before.LastIndex, newest)

		offset := logSize(old)
		sent := func() (total int) {
			for _, n := range others {
				total += len(saidSendingTo(old.Name).FindAllString(saidSince(n, 0), -1))
			}
			return total
		}
		if err := errors.Join(w.rejoin(old), w.caughtUp(ctx, old, others), w.whole(ctx)); err != nil {
			return err
		}
		sentFirst := sent()
		if err := sleep(ctx, quiet); err != nil {
			return err
		}
		if n := sent() - sentFirst; n > 0 {
			return fmt.Errorf("%s was sent %d snapshots in the %v after all nodes were whole: its log does not fit the one it has", old.Name, n, quiet)
		}
		said := saidSince(old, offset)
		for _, n := range w.members() {
			if err := orderly(n, 0); err != nil {
				return err
			}
		}
		differs, installed := saidDiffers.FindStringSubmatch(said), len(saidInstalled.FindAllString(said, -1))
		w.log.Printf("%s installed %d snapshots; one ends where its log differs: %v", old.Name, installed, differs != nil)
		if installed > mostSnapshots {
			return fmt.Errorf("%s was sent a snapshot again and again, %d in all: its log did not fit them", old.Name, installed)
		}
		if differs != nil && installed > 0 {
			done++
			w.fault("the snapshot that %s was sent ends at %s, in term %s; its log had term %s there", old.Name, differs[1], differs[3], differs[2])
		}

		// It takes new sessions, and revocations end them.
		b, err := w.load.beacon(ctx, old, w.load.name("b"), false)
		if err != nil {
			return fmt.Errorf("a session at %s after it caught up: %w", old.Name, err)
		}
		w.revokeSurely(ctx, b)
		w.revokeSome(ctx, 2)
	}
	return nil
}

// caughtUp returns when n has committed, in Raft, what the others' leader has
// now. That all have the same events says less: who hears no leader is fed by a
// stream. So does the length of the log: it may be of other entries.
func (w *World) caughtUp(ctx context.Context, n *node, others []*node) error {
	return until(ctx, time.Minute, func() error {
		l, err := w.leaderOf(ctx, others)
		if err != nil {
			return err
		}
		want, err := w.statusOf(ctx, l)
		if err != nil {
			return err
		}
		return until(ctx, 5*time.Second, func() error {
			if !n.Running() { // mended at its end, it asks to be started again
				return w.start(n)
			}
			have, err := w.statusOf(ctx, n)
			if err == nil && (have.Leader != l.Name || have.Term != want.Term || have.CommitIndex < want.CommitIndex) {
				err = fmt.Errorf("%s follows %q in term %d and has committed %d; %s leads in term %d and has committed %d", n.Name, have.Leader, have.Term, have.CommitIndex, l.Name, want.Term, want.CommitIndex)
			}
			return err
		})
	})
}

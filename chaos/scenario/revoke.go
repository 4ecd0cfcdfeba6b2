package scenario

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Targets of revoke, as ratios of what the same run's probes take: a commit is
// two syncs and a round trip, the word to all nodes another round trip.
const (
	maxLiveRatio    = 2.0  // all nodes live: p50 to two syncs and two round trips
	maxStoppedRatio = 1.03 // one node stopped: the slowest to the lease's length
	revokeLimit     = 30 * time.Minute
	leaseLength     = 2500 * time.Millisecond // D, the nodes' default
)

// playRevoke is `make chaos-revoke`: first the time that revoke takes, without
// other load and with probes beside it; then one node stopped each time; then
// total revocations in concurrent batches while the nemesis plays its mix.
func playRevoke(ctx context.Context, w *World, total int) error {
	began := time.Now()
	missed, err := w.timeRevoke(ctx)
	if err != nil {
		return err
	}
	w.log.Printf("now %d revocations under the mix", total)
	w.load.run(0)
	w.flood.Store(true)
	fctx, stop := context.WithCancelCause(ctx)
	done := errors.New("all revocations are made")
	var wg sync.WaitGroup
	var serial atomic.Int64
	for range 4 {
		w.load.loop("beacons", 20*time.Millisecond, func(ctx context.Context) { w.load.keepBeacons(ctx, 24) })
	}
	// Each batch is whoever has a session at the moment, and some who have none:
	// logging ten thousand subjects in takes longer than revoking them.
	var flood sync.WaitGroup
	var made, withSession atomic.Int64
	for range 4 {
		flood.Go(func() {
			for fctx.Err() == nil && made.Load() < int64(total) {
				var batch sync.WaitGroup
				for _, b := range w.load.take(4) {
					made.Add(1)
					withSession.Add(1)
					batch.Go(func() { w.revokeSurely(fctx, b) })
				}
				for range 16 {
					made.Add(1)
					batch.Go(func() { w.revokeNobody(fctx, fmt.Sprintf("nobody-%d", serial.Add(1))) })
				}
				batch.Wait()
			}
		})
	}
	wg.Go(func() {
		flood.Wait()
		stop(done)
	})
	err = mix(fctx, w, revokeLimit-time.Since(began))
	if errors.Is(context.Cause(fctx), done) {
		err = nil // the mix was interrupted, not defeated
	}
	stop(nil)
	wg.Wait()
	w.log.Printf("%d revocations, %d of them of subjects with a session, in %v", made.Load(), withSession.Load(), time.Since(began).Round(time.Second))
	if made.Load() < int64(total) && ctx.Err() == nil {
		missed = append(missed, fmt.Sprintf("%d of %d revocations within %v", made.Load(), total, revokeLimit))
	}
	if len(missed) > 0 {
		err = errors.Join(err, fmt.Errorf("targets missed: %v", missed))
	}
	return err
}

// revokeNobody revokes a subject that never logged in, and does not give up.
func (w *World) revokeNobody(ctx context.Context, job string) {
	for ctx.Err() == nil {
		cctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		info, err := revoke(cctx, w.admin(w.load.somewhere()), subject(job))
		cancel()
		if err == nil {
			w.load.mu.Lock()
			w.load.changes = append(w.load.changes, "revocation/"+info.ID)
			w.load.counts["revocations of nobody"]++
			w.load.mu.Unlock()
			return
		}
		_ = sleep(ctx, 200*time.Millisecond)
	}
}

// timeRevoke measures revoke without other load, and says which targets it missed.
func (w *World) timeRevoke(ctx context.Context) (missed []string, err error) {
	p, err := w.newProbes()
	if err != nil {
		return nil, err
	}
	defer p.close()
	leader, err := w.leader(ctx)
	if err != nil {
		return nil, err
	}
	var live, stopped []time.Duration
	// Sessions are made between the measurements: a login costs syncs and work on
	// the same disk and processors.
	sessions := func() error {
		w.load.keepBeacons(ctx, 6)
		return errors.Join(w.load.await(ctx, 6), sleep(ctx, settle))
	}
	one := func() (time.Duration, error) {
		b := w.load.take(1)
		if len(b) == 0 {
			return 0, errors.New("the session ended by itself")
		}
		began := time.Now()
		_, err := w.load.revoke(ctx, b[0], leader)
		return time.Since(began), err
	}
	for range 60 {
		if err := errors.Join(sessions(), p.measure(5)); err != nil {
			return nil, err
		}
		took, err := one()
		if err != nil {
			return nil, err
		}
		live = append(live, took)
	}
	for range 12 {
		n, err := w.follower(ctx)
		if err != nil {
			return nil, err
		}
		if leader, err = w.leader(ctx); err != nil {
			return nil, err
		}
		if err := sessions(); err != nil {
			return nil, err
		}
		if err := w.pause(n); err != nil {
			return nil, err
		}
		took, err := one()
		if err = errors.Join(err, w.cont(n)); err != nil {
			return nil, err
		}
		stopped = append(stopped, took)
		if err := sleep(ctx, time.Second); err != nil {
			return nil, err
		}
	}
	slices.Sort(live)
	slices.Sort(stopped)
	f, r := p.median()
	floor := 2*f + 2*r
	ratio := float64(at(live, 50)) / float64(floor)
	w.log.Printf("revoke, all live: p50 %v, p99 %v; probes: sync p50 %v, round trip p50 %v; p50 / (2 sync + 2 RTT) = %.2f (target %.0f)",
		at(live, 50), at(live, 99), f, r, ratio, maxLiveRatio)
	if ratio > maxLiveRatio {
		missed = append(missed, fmt.Sprintf("all live %.2f, want at most %.0f", ratio, maxLiveRatio))
	}
	d := leaseLength
	slowest := stopped[len(stopped)-1]
	w.log.Printf("revoke, one node stopped: p50 %v, max %v; max / D = %.3f (target %.2f, D %v)", at(stopped, 50), slowest, float64(slowest)/float64(d), maxStoppedRatio, d)
	if float64(slowest) > maxStoppedRatio*float64(d) {
		missed = append(missed, fmt.Sprintf("one stopped %.3f D, want at most %.2f", float64(slowest)/float64(d), maxStoppedRatio))
	}
	return missed, nil
}

// probes measure, beside revoke, what it cannot be faster than: a sync of an
// overwritten page on the nodes' disk, and an echo from node to node.
type probes struct {
	file    *os.File
	conn    net.Conn
	l       net.Listener
	syncs   []time.Duration
	echoes  []time.Duration
	scratch [4096]byte
}

func (w *World) newProbes() (_ *probes, err error) {
	p := &probes{}
	if p.file, err = os.Create(filepath.Join(w.Dir, "probe")); err != nil {
		return nil, err
	}
	for i := range int64(256) {
		if _, err := p.file.WriteAt(p.scratch[:], i*4096); err != nil {
			return nil, err
		}
	}
	if err := p.file.Sync(); err != nil {
		return nil, err
	}
	a, b := w.members()[0], w.members()[1]
	if err := a.host.Do(func() (err error) { p.l, err = net.Listen("tcp", a.host.IP.String()+":7999"); return err }); err != nil {
		return nil, err
	}
	go func() {
		if c, err := p.l.Accept(); err == nil {
			_, _ = io.Copy(c, c)
		}
	}()
	return p, b.host.Do(func() (err error) { p.conn, err = net.Dial("tcp", p.l.Addr().String()); return err })
}

func (p *probes) measure(n int) error {
	var b [64]byte
	for range n {
		began := time.Now()
		if _, err := p.file.WriteAt(p.scratch[:], int64(len(p.syncs)%256)*4096); err != nil {
			return err
		}
		if err := unix.Fdatasync(int(p.file.Fd())); err != nil {
			return err
		}
		p.syncs = append(p.syncs, time.Since(began))
		began = time.Now()
		if _, err := p.conn.Write(b[:]); err != nil {
			return err
		}
		if _, err := io.ReadFull(p.conn, b[:]); err != nil {
			return err
		}
		p.echoes = append(p.echoes, time.Since(began))
	}
	return nil
}

func (p *probes) median() (sync, echo time.Duration) {
	slices.Sort(p.syncs)
	slices.Sort(p.echoes)
	return at(p.syncs, 50), at(p.echoes, 50)
}

func (p *probes) close() {
	p.file.Close()
	p.l.Close()
	p.conn.Close()
}

package scenario

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport/sallyport/chaos/sandbox"
)

// add makes one more node and waits until it serves.
func (w *World) add(ctx context.Context) (*node, error) {
	w.fault("a node joins")
	n, err := w.AddNode(ctx)
	if err != nil {
		return nil, err
	}
	if err := w.adopt(n, w.hosts[len(w.hosts)-1]); err != nil {
		return nil, err
	}
	all := w.members()
	return all[len(all)-1], nil
}

// remove takes a node out of the cluster, through another.
func (w *World) remove(ctx context.Context, n *node) error {
	if l, err := w.leader(ctx); err != nil {
		return err
	} else if l == n { // a leader is asked to hand over first
		if err := w.restart(ctx, n); err != nil {
			return err
		}
	}
	w.fault("%s is removed", n.Name)
	var via *node
	for _, m := range w.up() {
		if m != n {
			via = m
		}
	}
	rctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := w.admin(via).RemoveNode(rctx, n.Name, "chaos", 0); err != nil {
		return err
	}
	// It ends by itself, and completes its recordings before it does.
	for end := time.Now().Add(40 * time.Second); n.Running() && time.Now().Before(end); {
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	n.Kill()
	n.closeIntervals()
	w.mu.Lock()
	n.gone = true
	w.mu.Unlock()
	return nil
}

// restart stops a node as an operator does, and starts it again.
func (w *World) restart(ctx context.Context, n *node) error {
	w.fault("restart %s", n.Name)
	tctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := n.Terminate(tctx); err != nil {
		return fmt.Errorf("%s did not stop as asked: %w", n.Name, err)
	}
	if err := w.start(n); err != nil {
		return err
	}
	return w.whole(ctx)
}

// playFreezer stops a node by the kernel's freezer, which the node cannot
// handle, delay or notice.
func playFreezer(ctx context.Context, w *World) error {
	f, err := newFreezer()
	if err != nil {
		w.skip("cgroup freezer", err)
		return nil
	}
	defer f.remove()
	for range 3 {
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		n, err := w.follower(ctx)
		if err != nil {
			return err
		}
		if err := f.take(n.PID()); err != nil {
			w.skip("cgroup freezer", err)
			return nil
		}
		w.fault("freeze %s", n.Name)
		n.began(&n.stopped)
		err = f.set(true)
		n.began(&n.silent)
		if err == nil {
			w.revokeSome(ctx, 2)
		}
		w.fault("thaw %s", n.Name)
		n.ended(&n.silent, time.Now())
		err = errors.Join(err, f.set(false), f.release())
		n.ended(&n.stopped, time.Now().Add(settle))
		if err != nil {
			return err
		}
		if err := w.whole(ctx); err != nil {
			return err
		}
	}
	return nil
}

// freezer is a control group whose processes stand still on demand, of either
// version of cgroups.
type freezer struct {
	dir, home     string // home is where its processes came from
	file          string
	frozen, moves string
}

func newFreezer() (*freezer, error) {
	name := "sallyport-chaos-" + strconv.Itoa(os.Getpid())
	var errs []error
	for _, f := range []freezer{
		{home: "/sys/fs/cgroup", file: "cgroup.freeze", frozen: "1", moves: "0"},
		{home: "/sys/fs/cgroup/unified", file: "cgroup.freeze", frozen: "1", moves: "0"},
		{home: "/sys/fs/cgroup/freezer", file: "freezer.state", frozen: "FROZEN", moves: "THAWED"},
	} {
		f.dir = filepath.Join(f.home, name)
		if err := os.Mkdir(f.dir, 0o755); err != nil {
			errs = append(errs, err)
			continue
		}
		if _, err := os.Stat(filepath.Join(f.dir, f.file)); err != nil {
			errs = append(errs, err)
			os.Remove(f.dir)
			continue
		}
		return &f, nil
	}
	return nil, errors.Join(errs...)
}

func (f *freezer) take(pid int) error {
	return os.WriteFile(filepath.Join(f.dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}

func (f *freezer) set(frozen bool) error {
	v := f.moves
	if frozen {
		v = f.frozen
	}
	return os.WriteFile(filepath.Join(f.dir, f.file), []byte(v), 0)
}

// release gives the processes back: the next freeze is of another node alone.
func (f *freezer) release() error {
	pids, err := os.ReadFile(filepath.Join(f.dir, "cgroup.procs"))
	for _, pid := range strings.Fields(string(pids)) {
		err = errors.Join(err, os.WriteFile(filepath.Join(f.home, "cgroup.procs"), []byte(pid), 0))
	}
	return err
}

func (f *freezer) remove() {
	_ = f.set(false)
	_ = f.release()
	_ = os.Remove(f.dir)
}

// mix plays faults by chance until the time is up; each is mended before the
// next, but for now and then, when two overlap.
func mix(ctx context.Context, w *World, d time.Duration) error {
	faults := []struct {
		name string
		play func(context.Context, *World) error
	}{
		{"stop a node", func(ctx context.Context, w *World) error {
			n := w.any()
			if err := w.pause(n); err != nil {
				return err
			}
			w.revokeSome(ctx, 2)
			return errors.Join(sleep(ctx, w.upTo(3*time.Second)), w.cont(n))
		}},
		{"kill a node", func(ctx context.Context, w *World) error {
			n := w.any()
			return w.during(ctx, 2, func() error { w.kill(n); return w.start(n) })
		}},
		{"cut a node off", func(ctx context.Context, w *World) error {
			n := w.any()
			if err := w.isolate(n); err != nil {
				return err
			}
			w.revokeSome(ctx, 2)
			return errors.Join(sleep(ctx, w.upTo(4*time.Second)), w.rejoin(n))
		}},
		{"one-way cut", func(ctx context.Context, w *World) error {
			all := w.members()
			i := w.rng.IntN(len(all))
			from, to := all[i], all[(i+1+w.rng.IntN(len(all)-1))%len(all)]
			w.fault("%s hears nothing of %s", to.Name, from.Name)
			if err := sandbox.Cut(from.host, to.host); err != nil {
				return err
			}
			w.revokeSome(ctx, 2)
			err := sleep(ctx, w.upTo(4*time.Second))
			w.fault("%s hears %s again", to.Name, from.Name)
			return errors.Join(err, sandbox.Mend(from.host, to.host))
		}},
		{"slow links", func(ctx context.Context, w *World) error {
			n := w.any()
			line := sandbox.Line{Delay: w.upTo(80 * time.Millisecond), Jitter: 10 * time.Millisecond, Loss: 0.02}
			w.fault("%s is %v further away", n.Name, line.Delay)
			for _, h := range w.hostsBut(n) {
				if err := errors.Join(sandbox.Slow(n.host, h, line), sandbox.Slow(h, n.host, line)); err != nil {
					w.skip("slow links", err)
					return nil
				}
			}
			w.revokeSome(ctx, 2)
			return errors.Join(sleep(ctx, w.upTo(4*time.Second)), w.Box.MendAll())
		}},
		{"restart a node", func(ctx context.Context, w *World) error { return w.restart(ctx, w.any()) }},
		{"nothing", func(ctx context.Context, w *World) error {
			w.revokeSome(ctx, 3)
			return sleep(ctx, w.upTo(2*time.Second))
		}},
	}
	for end := time.Now().Add(d); time.Now().Before(end); {
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		f := faults[w.rng.IntN(len(faults))]
		if err := f.play(ctx, w); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		if err := w.whole(ctx); err != nil {
			return fmt.Errorf("after %q: %w", f.name, err)
		}
	}
	return nil
}

func (w *World) upTo(d time.Duration) time.Duration { return time.Duration(w.rng.Int64N(int64(d))) }

package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// hooked says whether the nodes' binary has the faults of disks in it.
func (w *World) hooked() error {
	b, err := os.ReadFile(w.Binary)
	if err == nil && !bytes.Contains(b, []byte(diskVar)) {
		err = errors.New("the binary was built without the tag chaos")
	}
	return err
}

const (
	diskVar  = "SALLYPORT_CHAOS_DISK"
	clockVar = "SALLYPORT_CHAOS_CLOCK"
)

// disk gives a node's disk an order; "" ends it.
func (w *World) disk(n *node, order string) error {
	w.fault("the disk of %s: %s", n.Name, order)
	if order == "" {
		return os.Remove(n.disk)
	}
	return os.WriteFile(n.disk, []byte(order), 0o644)
}

func playHungLeader(ctx context.Context, w *World) error {
	if err := w.hooked(); err != nil {
		w.skip("disks that hang", err)
		return nil
	}
	for range 2 {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		l, err := w.leader(ctx)
		if err != nil {
			return err
		}
		if err := w.during(ctx, 3, func() error {
			if err := w.disk(l, "hang"); err != nil {
				return err
			}
			err := sleep(ctx, 10*time.Second)
			return errors.Join(err, w.disk(l, ""))
		}); err != nil {
			return err
		}
		if err := w.whole(ctx); err != nil {
			return err
		}
	}
	return nil
}

func playHungFollower(ctx context.Context, w *World) error {
	if err := w.hooked(); err != nil {
		w.skip("disks that hang", err)
		return nil
	}
	if err := w.load.await(ctx, 4); err != nil {
		return err
	}
	down, err := w.follower(ctx)
	if err != nil {
		return err
	}
	w.kill(down)
	hung, err := w.follower(ctx)
	if err != nil {
		return err
	}
	// Nothing can be committed before one of the two is back.
	if err := w.during(ctx, 2, func() error {
		if err := w.disk(hung, "hang"); err != nil {
			return err
		}
		err := sleep(ctx, 10*time.Second)
		return errors.Join(err, w.disk(hung, ""))
	}); err != nil {
		return err
	}
	w.revokeSome(ctx, 2)
	return w.start(down)
}

func playSlowDisk(ctx context.Context, w *World) error {
	if err := w.hooked(); err != nil {
		w.skip("slow disks", err)
		return nil
	}
	for _, n := range w.members() {
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		if err := w.disk(n, "slow 200ms"); err != nil {
			return err
		}
		w.revokeSome(ctx, 3)
		if err := sleep(ctx, 3*time.Second); err != nil {
			return err
		}
	}
	for _, n := range w.members() {
		if err := w.disk(n, ""); err != nil {
			return err
		}
	}
	return nil
}

// playFullDisk gives a follower's directory a small file system of its own and
// fills it. What it cannot store it must not acknowledge; it may stop, and is
// started again when there is room.
func playFullDisk(ctx context.Context, w *World) error {
	for _, dir := range []string{"raft", "spool"} {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		n, err := w.follower(ctx)
		if err != nil {
			return err
		}
		w.kill(n)
		path := filepath.Join(n.DataDir, dir)
		if err := onSmallDisk(path, 256<<20); err != nil {
			w.skip("full disks", err)
			return errors.Join(w.start(n), w.whole(ctx))
		}
		if err := errors.Join(w.start(n), w.whole(ctx)); err != nil {
			return err
		}
		w.fault("the disk of %s under %s is full", n.Name, dir)
		ballast := filepath.Join(path, "ballast")
		if err := fill(ballast); err != nil {
			return err
		}
		w.revokeSome(ctx, 3)
		if err := sleep(ctx, 4*time.Second); err != nil {
			return err
		}
		w.fault("there is room again")
		if err := os.Remove(ballast); err != nil {
			return err
		}
		if err := w.whole(ctx); err != nil {
			return err
		}
	}
	return nil
}

// onSmallDisk moves a directory to a memory file system of its own, which only
// this run sees.
func onSmallDisk(path string, size int64) error {
	moved := path + ".moved"
	if err := os.Rename(path, moved); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("chaos", path, "tmpfs", 0, "mode=700,size="+strconv.FormatInt(size, 10)); err != nil {
		_ = os.Remove(path)
		return errors.Join(fmt.Errorf("mount a small file system: %w", err), os.Rename(moved, path))
	}
	return errors.Join(os.CopyFS(path, os.DirFS(moved)), os.RemoveAll(moved))
}

// fill writes until there is no room.
func fill(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	block := make([]byte, 1<<20)
	for size := len(block); size >= 512; {
		if _, err := f.Write(block[:size]); errors.Is(err, unix.ENOSPC) {
			size /= 2
		} else if err != nil {
			return err
		}
	}
	return nil
}

// playClock restarts nodes whose wall clock is an hour ahead, then behind, and
// whose monotonic clocks are of another boot. They may refuse callers whose
// proofs they find too old or too new; they may not let anybody pass.
func playClock(ctx context.Context, w *World) error {
	b, err := os.ReadFile(w.Binary)
	if err == nil && !bytes.Contains(b, []byte(clockVar)) {
		err = errors.New("the binary was built without the clock's overlay")
	}
	if err != nil {
		w.skip("wrong wall clocks", err)
		return nil
	}
	for _, c := range []struct {
		what       string
		env, under []string
	}{
		{"an hour ahead", []string{clockVar + "=3600"}, nil},
		{"an hour behind", []string{clockVar + "=-3600"}, nil},
		{"of a machine that has run ten days longer", nil, []string{"unshare", "--time", "--boottime", "864000", "--monotonic", "864000"}},
	} {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		n, err := w.follower(ctx)
		if err != nil {
			return err
		}
		w.kill(n)
		w.fault("the clock of %s is %s", n.Name, c.what)
		n.env, n.under = c.env, c.under
		if err := w.start(n); err != nil {
			return err
		}
		if err := sleep(ctx, 3*time.Second); err != nil {
			return err
		}
		w.revokeSome(ctx, 3)
		if err := sleep(ctx, 3*time.Second); err != nil {
			return err
		}
		w.kill(n)
		n.env, n.under = nil, nil
		if err := errors.Join(w.start(n), w.whole(ctx)); err != nil {
			return err
		}
	}
	return nil
}

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
	pointVar = "SALLYPORT_CHAOS_POINT"
	netVar   = "SALLYPORT_CHAOS_NET"
	// A node's control files are named after that of its disk.
	pointEnd, reachedEnd, netEnd = ".point", ".reached", ".net"
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
// fills it: first under the databases, then under the spool.
func playFullDisk(ctx context.Context, w *World) error {
	for i, dir := range []string{"raft", "spool"} {
		if err := w.load.await(ctx, 4); err != nil {
			return err
		}
		n, err := w.follower(ctx)
		if err != nil {
			return err
		}
		w.kill(n)
		path := filepath.Join(n.DataDir, dir)
		kind, err := w.onSmallDisk(path, i)
		if err != nil {
			w.skip("full disks", err)
			return errors.Join(w.start(n), w.whole(ctx))
		}
		w.fault("%s of %s is on %s, of %d MiB", dir, n.Name, kind, smallDisk>>20)
		if err := errors.Join(w.start(n), w.whole(ctx)); err != nil {
			return err
		}
		w.fault("the disk of %s under %s is full", n.Name, dir)
		ballast := filepath.Join(path, "ballast")
		if err := fill(ballast); err != nil {
			return err
		}
		w.revokeSome(ctx, 3)
		if dir == "raft" {
			err = w.endsFull(ctx, n)
		} else { // no session without its recording: it stays, and takes none
			err = sleep(ctx, 4*time.Second)
			if !n.Running() {
				err = errors.Join(err, fmt.Errorf("%s ended of a full spool", n.Name))
			}
		}
		if err != nil {
			return err
		}
		w.fault("there is room again")
		if err := os.Remove(ballast); err != nil {
			return err
		}
		if err := errors.Join(w.whole(ctx), w.recordsAgain(ctx, n)); err != nil {
			return err
		}
	}
	return nil
}

// recordsAgain waits until a node takes calls, which it records, after its
// disk was full.
func (w *World) recordsAgain(ctx context.Context, n *node) error {
	for end := time.Now().Add(10 * time.Second); ; {
		_, err := w.admin(n).Config(ctx)
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s takes no calls 10 s after there was room: %w", n.Name, err)
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

// endsFull sees to it that a node whose disk is full under its databases ends,
// in good order, and that it says the same when it is started once more.
//
// What it has room for, in files laid out before, it still stores: events are
// made until it needs another.
func (w *World) endsFull(ctx context.Context, n *node) error {
	end := time.Now().Add(90 * time.Second)
	for n.Running() {
		if time.Now().After(end) {
			return fmt.Errorf("%s goes on with a full disk", n.Name)
		}
		rctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		_, err := w.revokeNobodies(rctx, 100, 8) // some at the node that ends
		cancel()
		if err := ctx.Err(); err != nil {
			return err
		}
		w.note("revocations", fmt.Sprint(err))
	}
	if err := w.endedFull(n, 0); err != nil {
		return err
	}
	seen, err := os.ReadFile(n.LogFile)
	if err != nil {
		return err
	}
	if err := w.start(n); err != nil {
		return err
	}
	// It may begin to serve and end later, when the rest of its room is used.
	for end := time.Now().Add(20 * time.Second); n.Running() && time.Now().Before(end); {
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	if n.Running() {
		return fmt.Errorf("%s runs although its disk is full", n.Name)
	}
	return w.endedFull(n, len(seen))
}

// endedFull looks at how a node ended, by its status and by its log from
// offset on.
func (w *World) endedFull(n *node, offset int) error {
	log, err := os.ReadFile(n.LogFile)
	if err != nil {
		return err
	}
	log = log[offset:]
	w.fault("%s has ended, status %d", n.Name, n.ExitCode())
	switch {
	case n.ExitCode() != 1:
		return fmt.Errorf("%s ended with status %d of a full disk", n.Name, n.ExitCode())
	case bytes.Contains(log, []byte("panic:")) || bytes.Contains(log, []byte("\ngoroutine ")):
		return fmt.Errorf("%s ended in a panic of a full disk", n.Name)
	case !bytes.Contains(log, []byte("the disk under "+n.DataDir)) || !bytes.Contains(log, []byte("make room")):
		return fmt.Errorf("%s does not say that its disk is full", n.Name)
	}
	return nil
}

// smallDisk is the size of a file system that is to be full, in bytes; there
// are smallDisks of them.
const smallDisk, smallDisks = 256 << 20, 2

// disksDir is where they are, under the directory of a run, if it could have
// ext4 on loop devices.
const disksDir = "disks"

// onSmallDisk moves a directory to the i-th small file system, which only this
// run sees: ext4 on a loop device if it could be made, else memory. It returns
// which.
func (w *World) onSmallDisk(path string, i int) (kind string, err error) {
	moved := path + ".moved"
	if err := os.Rename(path, moved); err != nil {
		return "", err
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return "", err
	}
	ext4 := filepath.Join(filepath.Dir(w.out), disksDir, strconv.Itoa(i))
	if kind = "ext4 on a loop device"; unix.Mount(ext4, path, "", unix.MS_BIND, "") != nil {
		kind = "tmpfs"
		err = unix.Mount("chaos", path, "tmpfs", 0, "mode=700,size="+strconv.Itoa(smallDisk))
	}
	if err == nil { // what is filled must be what was made small
		var fs unix.Statfs_t
		if err = unix.Statfs(path, &fs); err == nil && fs.Blocks*uint64(fs.Bsize) > smallDisk {
			err = errors.Join(fmt.Errorf("it has %d MiB", fs.Blocks*uint64(fs.Bsize)>>20), unix.Unmount(path, 0))
		}
	}
	if err != nil {
		_ = os.Remove(path)
		return "", errors.Join(fmt.Errorf("mount a small file system: %w", err), os.Rename(moved, path))
	}
	return kind, errors.Join(os.Chmod(path, 0o700), os.CopyFS(path, os.DirFS(moved)), os.RemoveAll(moved))
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

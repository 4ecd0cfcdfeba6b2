package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Loops makes n ext4 file systems of size bytes on loop devices and mounts
// them at dir/0, dir/1 … for this thread alone and the sandboxes that Command
// starts from it: a user namespace may use such a mount, but not make one. So
// it wants root and is called before Command, with the goroutine locked to its
// thread. The thread stays as it is changed here: it ends with the goroutine,
// and with its last sandbox the mounts and devices do.
func Loops(dir string, n int, size int64) error {
	if os.Getuid() != 0 {
		return errors.New("loop devices are for root")
	}
	runtime.LockOSThread() // once more than is unlocked
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("a mount namespace of our own: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts to ourselves: %w", err)
	}
	for i := range n {
		at := filepath.Join(dir, strconv.Itoa(i))
		if err := loop(at+".img", at, size); err != nil {
			return err
		}
	}
	return nil
}

func loop(image, at string, size int64) error {
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	defer os.Remove(image) // the device keeps it
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	// No blocks for root alone: full is full for everybody.
	for _, c := range [][]string{{"mkfs.ext4", "-q", "-m", "0", image}, {"mount", "-o", "loop", image, at}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			os.Remove(at) // nobody shall take it for a mount
			return fmt.Errorf("%s: %w: %s", c[0], err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

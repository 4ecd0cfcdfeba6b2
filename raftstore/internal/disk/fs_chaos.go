//go:build chaos

package disk

import (
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// FS is the operating system's file system, whose writes and syncs do what the
// file named by SALLYPORT_CHAOS_DISK says, while it is there:
//
//	hang         stand still until it says otherwise
//	slow 200ms   syncs take so much longer
//	fail         end with an I/O error
//
// Only builds with the tag chaos have it. A test holds that others do not.
func FS() vfs.FS {
	control := os.Getenv("SALLYPORT_CHAOS_DISK")
	if control == "" {
		return vfs.Default
	}
	return &faultyFS{vfs.Default, control}
}

type faultyFS struct {
	vfs.FS
	control string
}

// order reads what the control file says now.
func (f *faultyFS) order() (verb string, d time.Duration) {
	b, err := os.ReadFile(f.control)
	if err != nil {
		return "", 0
	}
	verb, arg, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	d, _ = time.ParseDuration(arg)
	return verb, d
}

// meet lets a write or a sync meet its fate.
func (f *faultyFS) meet(sync bool) error {
	for {
		switch verb, d := f.order(); {
		case verb == "hang":
			time.Sleep(10 * time.Millisecond)
			continue
		case verb == "fail":
			return syscall.EIO
		case verb == "slow" && sync:
			time.Sleep(d)
		}
		return nil
	}
}

func (f *faultyFS) wrap(file vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &faultyFile{file, f}, nil
}

func (f *faultyFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := f.meet(false); err != nil {
		return nil, err
	}
	return f.wrap(f.FS.Create(name, c))
}

func (f *faultyFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, o ...vfs.OpenOption) (vfs.File, error) {
	return f.wrap(f.FS.OpenReadWrite(name, c, o...))
}

func (f *faultyFS) OpenDir(name string) (vfs.File, error) { return f.wrap(f.FS.OpenDir(name)) }

func (f *faultyFS) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := f.meet(false); err != nil {
		return nil, err
	}
	return f.wrap(f.FS.ReuseForWrite(oldname, newname, c))
}

func (f *faultyFS) Unwrap() vfs.FS { return f.FS }

type faultyFile struct {
	vfs.File
	fs *faultyFS
}

func (f *faultyFile) Write(p []byte) (int, error) {
	if err := f.fs.meet(false); err != nil {
		return 0, err
	}
	return f.File.Write(p)
}

func (f *faultyFile) WriteAt(p []byte, at int64) (int, error) {
	if err := f.fs.meet(false); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, at)
}

func (f *faultyFile) Sync() error {
	if err := f.fs.meet(true); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f *faultyFile) SyncData() error {
	if err := f.fs.meet(true); err != nil {
		return err
	}
	return f.File.SyncData()
}

func (f *faultyFile) SyncTo(length int64) (bool, error) {
	if err := f.fs.meet(true); err != nil {
		return false, err
	}
	return f.File.SyncTo(length)
}

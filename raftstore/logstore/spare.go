package logstore

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// spareFS has WALs overwrite bytes that are there already: an fdatasync of a
// file that grows also writes the file system's journal and takes half as long
// again. Files are kept across restarts to be written over. Pebble does the
// same, but only with files it has made since it was opened, the first of them
// a 256th of the full size. And where a file is new or too short, it gets zeros
// ahead of what is written: aheadBytes at a time, so one sync in some hundred
// pays for all.
//
// It is sound for the reason that theirs is: each chunk of a WAL carries the
// WAL's number, numbers only rise, also over restarts (a WAL is removed only
// after the manifest that goes past it was synced), and a reader ends at a
// chunk of a lower number, or of zeros.
type spareFS struct {
	vfs.FS
	dir string // of the WALs

	mu     sync.Mutex
	spares []string // paths of files not in use
	next   int      // number of the next one's name
}

const (
	walSuffix   = ".log"
	sparePrefix = "spare-"
	// maxSpares: one becomes the next WAL while the one before is flushed.
	maxSpares = 2
	// aheadBytes is more than a hundred entries of the usual size, and no more
	// than a disk writes in a millisecond or two.
	aheadBytes = 256 << 10
)

var zeros [aheadBytes]byte

func newSpareFS(fs vfs.FS, dir string) (*spareFS, error) {
	s := &spareFS{FS: fs, dir: dir}
	names, err := fs.List(dir)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, sparePrefix) {
			continue
		}
		path := fs.PathJoin(dir, name)
		if len(s.spares) == maxSpares { // an earlier one came back in a crash
			if err := fs.Remove(path); err != nil {
				return nil, err
			}
			continue
		}
		var n int
		if _, err := fmt.Sscanf(name, sparePrefix+"%d", &n); err == nil {
			s.next = max(s.next, n+1)
		}
		s.spares = append(s.spares, path)
	}
	return s, nil
}

func (s *spareFS) isWAL(name string) bool {
	return strings.HasSuffix(name, walSuffix) && s.FS.PathDir(name) == s.dir
}

// Create makes a WAL, of a spare one if there is one, and any other file as ever.
func (s *spareFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	if !s.isWAL(name) {
		return s.FS.Create(name, category)
	}
	var err error
	if spare, ok := s.take(); ok {
		err = s.FS.Rename(spare, name)
	} else {
		var f vfs.File
		if f, err = s.FS.Create(name, category); err == nil {
			err = f.Close()
		}
	}
	if err != nil {
		return nil, err
	}
	return s.openWAL(name, category)
}

// ReuseForWrite makes a WAL of one that Pebble kept itself.
func (s *spareFS) ReuseForWrite(old, name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	if !s.isWAL(name) {
		return s.FS.ReuseForWrite(old, name, category)
	}
	if err := s.FS.Rename(old, name); err != nil {
		return nil, err
	}
	return s.openWAL(name, category)
}

// openWAL opens a WAL to be written from its beginning. Only a file opened like
// this can be written out of order.
func (s *spareFS) openWAL(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := s.FS.OpenReadWrite(name, category)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &walFile{File: f, there: info.Size()}, nil
}

// walFile is a WAL, written by one goroutine from its beginning on.
type walFile struct {
	vfs.File
	next  int64 // where the next Write goes
	there int64 // bytes that the file has, zeros or an older WAL's
}

// Write writes over what is there, and sees to it first that there is enough.
func (f *walFile) Write(p []byte) (int, error) {
	end := f.next + int64(len(p))
	for f.there < end {
		// On a full disk p may still find room; whether it does is what counts.
		n, err := f.File.WriteAt(zeros[:], f.there)
		f.there += int64(n)
		if err != nil {
			break
		}
	}
	n, err := f.File.Write(p)
	f.next += int64(n)
	return n, err
}

// Preallocate does nothing: blocks that are reserved and not written make a sync
// as slow as those that are missing.
func (f *walFile) Preallocate(offset, length int64) error { return nil }

func (s *spareFS) take() (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.spares) == 0 {
		return "", false
	}
	spare := s.spares[len(s.spares)-1]
	s.spares = s.spares[:len(s.spares)-1]
	return spare, true
}

// Remove keeps a WAL as a spare one, and removes any other file. A rename lost
// in a crash is a removal lost: Pebble removes the file again.
func (s *spareFS) Remove(name string) error {
	if !s.isWAL(name) {
		return s.FS.Remove(name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.spares) == maxSpares {
		return s.FS.Remove(name)
	}
	spare := s.FS.PathJoin(s.dir, fmt.Sprintf("%s%d", sparePrefix, s.next))
	if err := s.FS.Rename(name, spare); err != nil {
		return err
	}
	s.next++
	s.spares = append(s.spares, spare)
	return nil
}

// Unwrap is for vfs.Root.
func (s *spareFS) Unwrap() vfs.FS { return s.FS }

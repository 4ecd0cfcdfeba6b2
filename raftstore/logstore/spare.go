package logstore

import (
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// spareFS keeps WAL files across restarts to overwrite them: an fdatasync of a
// file that grows also writes the file system's journal and takes half as long
// again. Pebble does the same, but only with files it has made since it was
// opened, the first of them a sixtieth of the full size.
//
// It is sound for the reason that theirs is: each chunk of a WAL carries the
// WAL's number, numbers only rise, also over restarts (a WAL is removed only
// after the manifest that goes past it was synced), and a reader ends at a
// chunk of a lower number.
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
)

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

// Create makes a WAL of a spare one, and any other file as ever.
func (s *spareFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	if s.isWAL(name) {
		if spare, ok := s.take(); ok {
			return s.FS.ReuseForWrite(spare, name, category)
		}
	}
	return s.FS.Create(name, category)
}

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

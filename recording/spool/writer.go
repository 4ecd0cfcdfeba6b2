package spool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
)

const (
	// bufferBytes bounds what Buffer keeps in memory, per session.
	bufferBytes = 64 << 10
	// keepBytes is the largest buffer that is kept for the next entry.
	keepBytes = 2 * bufferBytes
	// logMagic begins every log file; its last byte is the version.
	logMagic = "SLYLOG\x00\x01"
)

// Writer appends to one recording. Its methods are safe for concurrent use.
// After a write has failed every later call fails with that error.
//
// Cost of an Append of a 200-byte statement: one encoding into a kept buffer, no
// allocation, one write(2); see BenchmarkAppend.
type Writer struct {
	s *Spool
	r *rec

	born atomic.Int64 // UnixNano of the first write to file, 0 when there is none; written under mu

	mu      sync.Mutex
	err     error         // why nothing can be written any more
	closed  bool          //
	lsn     recording.LSN // of the newest entry, written or buffered
	written recording.LSN // of the newest entry in the kernel's hands
	buf     []byte        // frames not written yet
	file    *os.File      // nil when the next write begins a new one
	number  uint64        // of file, or of the newest one
	size    int64         // of file, without torn bytes

	syncs struct {
		sync.Mutex
		synced  recording.LSN
		running chan struct{} // closed when the sync under way has ended; nil: none
		linked  uint64        // newest log file whose directory entry is on disk
	}
}

// ID returns the session it records.
func (w *Writer) ID() string { return w.r.session }

// Append writes e, after everything buffered, and returns when the kernel has
// it: it then survives the death of this process. It sets e.LSN, and e.At when
// zero. An error means that e was not recorded.
func (w *Writer) Append(e *recording.Entry) (recording.LSN, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.encode(e); err != nil {
		return 0, err
	}
	if err := w.write(); err != nil {
		return 0, err
	}
	return e.LSN, nil
}

// Buffer takes e, which is written before or by the next Append or Flush, or
// when the buffer is full. It sets e.LSN, and e.At when zero.
func (w *Writer) Buffer(e *recording.Entry) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.encode(e); err != nil {
		return err
	}
	if len(w.buf) < bufferBytes {
		return nil
	}
	return w.write()
}

// Flush writes what is buffered.
func (w *Writer) Flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return err
	}
	return w.write()
}

func (w *Writer) usable() error {
	if w.err != nil {
		return w.err
	}
	if w.closed {
		return ErrClosed
	}
	return nil
}

// encode appends e's frame to the buffer. Called with mu held.
func (w *Writer) encode(e *recording.Entry) error {
	if err := w.usable(); err != nil {
		return err
	}
	if w.s.used.Load()+int64(len(w.buf)) >= w.s.o.MaxSpoolBytes {
		return ErrFull
	}
	if e.Type == 0 || e.Type > recording.Note {
		return fmt.Errorf("recording: an entry of type %d", e.Type)
	}
	e.LSN = w.lsn + 1
	if e.At.IsZero() {
		e.At = time.Now()
	}
	buf, err := format.AppendEntry(w.buf, e)
	if err != nil {
		return err
	}
	w.buf = buf
	w.lsn++
	return nil
}

// write hands the buffer to the kernel with one write(2). Called with mu held.
func (w *Writer) write() error {
	if len(w.buf) == 0 {
		return nil
	}
	if w.file == nil {
		if err := w.create(); err != nil {
			return w.fail(err)
		}
	}
	n, err := w.file.Write(w.buf)
	if err != nil {
		// What was written of it is cut off, so that it does not take the room
		// of what can still be sealed; readers would stop there anyway.
		if terr := w.file.Truncate(w.size); terr != nil {
			w.s.used.Add(int64(n))
		}
		return w.fail(err)
	}
	w.size += int64(n)
	w.s.used.Add(int64(n))
	w.written = w.lsn
	if cap(w.buf) > keepBytes {
		w.buf = nil
	} else {
		w.buf = w.buf[:0]
	}
	if w.size >= int64(w.s.o.SegmentBytes) {
		return w.rotate()
	}
	return nil
}

// create opens the next log file.
func (w *Writer) create() error {
	path := w.s.log(w.r.seq, w.number+1)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(logMagic); err != nil {
		f.Close()
		os.Remove(path)
		return err
	}
	w.file, w.size = f, int64(len(logMagic))
	w.number++
	w.s.used.Add(w.size)
	w.born.Store(time.Now().UnixNano())
	return nil
}

// rotate closes the log file and hands it to the sealer. Called with mu held.
func (w *Writer) rotate() error {
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	l := logFile{number: w.number, size: w.size, last: w.written, born: time.Unix(0, w.born.Load())}
	w.file, w.size = nil, 0
	s := w.s
	s.mu.Lock()
	w.r.logs = append(w.r.logs, l)
	s.mu.sealing[w.r] = struct{}{}
	s.mu.Unlock()
	w.born.Store(0)
	wake(s.toSeal)
	if err != nil {
		return w.fail(err)
	}
	return nil
}

// rotateOld closes a log file that was begun before t, with what is buffered.
func (w *Writer) rotateOld(t time.Time) {
	if born := w.born.Load(); born == 0 || born > t.UnixNano() {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil && !w.closed && w.write() == nil {
		_ = w.rotate() // an error stays with the Writer
		w.buf = nil    // an idle session keeps no memory
	}
}

// fail makes err what every later call returns. Called with mu held.
func (w *Writer) fail(err error) error {
	if w.err == nil {
		w.err = fmt.Errorf("recording: session %s can no longer be recorded: %w", w.r.session, err)
		w.buf = nil
		w.s.note(w.r, "writing", err)
	}
	return w.err
}

// poison is fail for other goroutines.
func (w *Writer) poison(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = w.fail(err)
}

// Sync returns when every entry up to lsn is on disk. Concurrent callers share
// one fdatasync.
func (w *Writer) Sync(ctx context.Context, lsn recording.LSN) error {
	g := &w.syncs
	for {
		g.Lock()
		if g.synced >= lsn {
			g.Unlock()
			return nil
		}
		if running := g.running; running != nil {
			g.Unlock()
			select {
			case <-running:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		running := make(chan struct{})
		g.running = running
		from, linked := g.synced, g.linked
		g.Unlock()

		to, number, err := w.sync(from, linked)

		g.Lock()
		if err == nil {
			g.synced, g.linked = to, number
		}
		g.running = nil
		g.Unlock()
		close(running)
		if err != nil {
			return err
		}
		if to < lsn {
			return fmt.Errorf("recording: entry %d to sync does not exist", lsn)
		}
	}
}

// sync brings to disk what was written after from, and returns how far.
func (w *Writer) sync(from recording.LSN, linked uint64) (to recording.LSN, number uint64, err error) {
	w.mu.Lock()
	err = w.err
	if err == nil && !w.closed {
		err = w.write()
	}
	f := w.file
	to, number = w.written, w.number
	s := w.s
	s.mu.Lock()
	var paths []string // of closed files that are not sealed yet
	for _, l := range w.r.logs {
		if l.last > from {
			paths = append(paths, s.log(w.r.seq, l.number))
		}
	}
	s.mu.Unlock()
	w.mu.Unlock()
	if err != nil {
		return 0, 0, err
	}
	if f != nil {
		err = fdatasync(f)
		if errors.Is(err, fs.ErrClosed) { // became a closed one meanwhile
			paths = append(paths, f.Name())
			err = nil
		}
	}
	for _, p := range paths {
		if err != nil {
			break
		}
		var c *os.File
		if c, err = os.OpenFile(p, os.O_WRONLY, 0); err == nil {
			err = errors.Join(fdatasync(c), c.Close())
		} else if errors.Is(err, fs.ErrNotExist) {
			err = nil // sealed: its segment was synced before it was deleted
		}
	}
	if err == nil && number > linked {
		err = s.dirF.Sync()
	}
	if err != nil {
		// After a failed sync the kernel may have dropped the pages.
		w.poison(err)
		return 0, 0, fmt.Errorf("recording: sync: %w", err)
	}
	return to, number, nil
}

func fdatasync(f *os.File) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := c.Control(func(fd uintptr) { serr = unix.Fdatasync(int(fd)) }); err != nil {
		// It fails for a closed file alone, with an error that the standard
		// library keeps to itself and does not make an fs.ErrClosed.
		return fmt.Errorf("%w: %w", fs.ErrClosed, err)
	}
	return serr
}

// Close ends the recording. Its segments and its trailer reach the store in the
// background, and after a crash too, as end is in the kernel's hands when Close
// returns nil. Closing again does nothing. An error means that entries were
// lost before, which the trailer tells.
func (w *Writer) Close(end recording.Ending) error {
	if end.At.IsZero() {
		end.At = time.Now()
	}
	end.At = end.At.UTC()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	if w.err == nil {
		buf, err := format.AppendEnding(w.buf, end)
		if err == nil {
			w.buf = buf
			_ = w.write()
		} else {
			_ = w.fail(err)
		}
	}
	_ = w.rotate()
	w.closed = true
	w.buf = nil
	s := w.s
	s.mu.Lock()
	w.r.ending = &end
	if w.err != nil {
		w.r.failure = w.err.Error()
	}
	delete(s.mu.open, w)
	s.mu.sealing[w.r] = struct{}{}
	s.mu.Unlock()
	wake(s.toSeal)
	return w.err
}

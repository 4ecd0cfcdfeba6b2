package spool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
)

// ErrNotLive: the spool has no such recording. It may be in the store.
var ErrNotLive = errors.New("recording: not being recorded here")

// A Cursor is a place in a recording that goes on. The zero Cursor is its
// beginning.
type Cursor struct {
	Segment uint64        // entries of segments before this one were returned
	LSN     recording.LSN // the newest entry that was returned
}

// Part is what Tail found.
type Part struct {
	Entries []recording.Entry
	Next    Cursor
	// Ending is set when the recording was closed and Entries are the last.
	Ending *recording.Ending
	// More says that there are more entries already.
	More bool
	Name string // YYYY/MM/DD/session, the recording's in the store
}

// errMoved: a file was sealed or deleted while it was to be read.
var errMoved = errors.New("recording: the spool moved on")

// Tail returns what a recording of this spool has after c: at most max entries
// and about maxBytes of them, one at least when there is one. What the writer
// has buffered is written first. Segments that only the store has are verified
// with the key that signed them.
func (s *Spool) Tail(ctx context.Context, session string, c Cursor, max, maxBytes int) (*Part, error) {
	for range 10 { // each time something was sealed meanwhile
		p, err := s.tail(ctx, session, c, max, maxBytes)
		if !errors.Is(err, errMoved) {
			return p, err
		}
	}
	return nil, errMoved
}

func (s *Spool) tail(ctx context.Context, session string, c Cursor, max, maxBytes int) (*Part, error) {
	s.mu.Lock()
	r := s.mu.sessions[session]
	s.mu.Unlock()
	if r == nil || r.w == nil {
		return nil, ErrNotLive
	}
	if r.w.quiet(c.LSN) {
		return &Part{Next: c, Name: r.name()}, nil
	}
	if err := r.w.Flush(); err != nil && !errors.Is(err, ErrClosed) {
		return nil, err
	}
	// One look at the writer's files and the sealed ones together: what is in
	// neither was sealed before.
	w := r.w
	w.mu.Lock()
	s.mu.Lock()
	var logs []logFile
	logs = append(logs, r.logs...)
	if w.file != nil {
		logs = append(logs, logFile{number: w.number, size: w.size})
	}
	segments, ending, seq := r.segments, r.ending, r.seq
	s.mu.Unlock()
	w.mu.Unlock()

	t := &tailing{part: &Part{Next: c, Name: r.name()}, max: max, bytes: maxBytes}
	if t.part.Next.Segment == 0 {
		t.part.Next.Segment = 1
	}
	for n := t.part.Next.Segment; n <= segments && !t.part.More; n++ {
		if err := s.tailSegment(ctx, r, seq, n, t); err != nil {
			return nil, err
		}
		if !t.part.More {
			t.part.Next.Segment = n + 1
		}
		if t.segments++; t.segments == tailSegments {
			t.part.More = true
		}
	}
	for _, l := range logs {
		if t.part.More {
			break
		}
		if err := t.log(s.log(seq, l.number), l.size); err != nil {
			return nil, err
		}
	}
	if !t.part.More && ending != nil {
		t.part.Ending = ending
	}
	return t.part, nil
}

// tailSegment reads a sealed segment: the spool's file, or the store's object.
func (s *Spool) tailSegment(ctx context.Context, r *rec, seq, n uint64, t *tailing) error {
	b, err := os.ReadFile(s.seg(seq, n))
	if errors.Is(err, fs.ErrNotExist) {
		ctx, cancel := context.WithTimeout(ctx, sendTimeout)
		defer cancel()
		b, err = s.o.Store.Get(ctx, r.prefix+recording.SegmentName(n))
		if errors.Is(err, recording.ErrNotFound) {
			return errMoved
		}
	}
	if err != nil {
		return err
	}
	seg, err := format.ParseSegment(b)
	if err != nil {
		return err
	}
	if seg.Session != r.session || seg.Number != n || !seg.SignedBy(r.signer.cert.PublicKey) {
		return fmt.Errorf("recording: segment %d of session %s in the store is not the one that was written", n, r.session)
	}
	return seg.Entries(nil, func(e *recording.Entry) error { t.add(e); return nil })
}

// tailing gathers entries up to its limits.
type tailing struct {
	part       *Part
	max, bytes int
	segments   int // read
}

// tailSegments bounds the segments that one call reads, whatever it asks for.
const tailSegments = 8

// quiet says that there is nothing after lsn, and that the recording goes on.
func (w *Writer) quiet(lsn recording.LSN) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.closed && w.err == nil && w.lsn <= lsn
}

func (t *tailing) add(e *recording.Entry) {
	if e.LSN <= t.part.Next.LSN || t.part.More {
		return
	}
	if e.LSN != t.part.Next.LSN+1 && t.part.Next.LSN != 0 {
		// Cannot be; a watcher must not be shown a recording with a hole.
		t.part.More = true
		return
	}
	n := len(e.Text) + len(e.Data) + 256
	if len(t.part.Entries) > 0 && (len(t.part.Entries) == t.max || n > t.bytes) {
		t.part.More = true
		return
	}
	t.bytes -= n
	t.part.Entries = append(t.part.Entries, *e)
	t.part.Next.LSN = e.LSN
}

// log reads size bytes of a log file.
func (t *tailing) log(path string, size int64) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return errMoved // into a segment
	}
	if err != nil {
		return err
	}
	b = b[:min(int64(len(b)), size)]
	if len(b) < len(logMagic) || string(b[:len(logMagic)]) != logMagic {
		return fmt.Errorf("recording: %s is damaged", path)
	}
	for rest := b[len(logMagic):]; len(rest) > 0 && !t.part.More; {
		var payload []byte
		if payload, rest, err = format.NextFrame(rest); err != nil {
			return err
		}
		if _, is, err := format.DecodeEnding(payload); is || err != nil {
			return err
		}
		e, err := format.DecodeEntry(payload)
		if err != nil {
			return err
		}
		t.add(&e)
	}
	return nil
}

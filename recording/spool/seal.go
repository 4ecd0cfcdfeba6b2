package spool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
)

// sealLoop turns closed log files into segments, and closes those that are old
// enough. It alone seals, so that each recording's chain grows in one place.
func (s *Spool) sealLoop(ctx context.Context) {
	t := time.NewTicker(min(max(s.o.SegmentAge/5, 10*time.Millisecond), time.Second))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.toSeal:
		case <-t.C:
		}
		s.mu.Lock()
		open := slices.Collect(maps.Keys(s.mu.open))
		s.mu.Unlock()
		old := time.Now().Add(-s.o.SegmentAge)
		for _, w := range open {
			w.rotateOld(old)
		}
		s.sealAll(ctx)
	}
}

// sealBatch bounds what one sync of the directory is shared by.
const sealBatch = 256

// sealAll seals one log file of each recording that has one. A recording whose
// files fail (a full or failing disk) stays as it is and is tried again later,
// without holding up others.
func (s *Spool) sealAll(ctx context.Context) {
	now := time.Now()
	s.mu.Lock()
	var recs []*rec
	for r := range s.mu.sealing {
		if len(recs) == sealBatch {
			break
		}
		if !now.Before(r.sealAfter) {
			recs = append(recs, r)
		}
	}
	s.mu.Unlock()
	failed := func(r *rec, err error) {
		r.sealFailures++
		r.sealAfter = time.Now().Add(backoff(r.sealFailures))
		s.note(r, "sealing", err)
	}
	var batch []*sealing
	made := 0
	for _, r := range recs {
		if ctx.Err() != nil {
			break
		}
		p, err := s.seal(r)
		if err != nil {
			failed(r, err)
			continue
		}
		batch = append(batch, p)
		made += len(p.made)
	}
	if made > 0 {
		if err := s.dirF.Sync(); err != nil {
			for _, p := range batch {
				s.discard(p.made)
				failed(p.r, err)
			}
			return
		}
	}
	for _, p := range batch {
		p.r.sealFailures = 0
		s.sealed(p)
	}
	if len(batch) > 0 {
		wake(s.toSeal) // there may be more
	}
}

// sealing is a step of a recording that is done when the directory is synced.
type sealing struct {
	r        *rec
	made     []*object
	logs     []logFile // that are no longer needed
	damaged  bool      // and cannot be read
	complete bool      // the trailer is among made
	failure  string
	tree     format.Tree
	prev     format.Hash
	segments uint64
	cut      int64
}

// seal makes the next log file of r a segment and, when it was the last one,
// closes the recording with a trailer. Nothing counts until sealed is called; an
// error leaves everything as it was.
func (s *Spool) seal(r *rec) (*sealing, error) {
	s.mu.Lock()
	logs := slices.Clone(r.logs)
	ending, seq := r.ending, r.seq
	p := &sealing{r: r, failure: r.failure, tree: r.tree.Clone(), prev: r.prev, segments: r.segments, cut: r.cut}
	s.mu.Unlock()

	if len(logs) > 0 {
		l := logs[0]
		c, err := readLog(s.log(seq, l.number), l.size, recording.LSN(p.tree.Size()))
		if err != nil {
			return nil, err
		}
		p.cut += c.cut
		// Only a crash may leave bytes behind the last frame, and only in the
		// last file.
		p.damaged = c.cut > 0 && (r.w != nil || len(logs) > 1)
		if !p.damaged {
			logs = logs[:1]
		}
		p.logs = logs
		if c.ending != nil {
			ending = c.ending
		}
		if len(c.leaves) > 0 {
			m := format.SegmentMeta{
				Session:     r.session,
				Number:      p.segments + 1,
				First:       recording.LSN(p.tree.Size() + 1),
				Prev:        p.prev,
				Sealed:      time.Now().UTC(),
				Certificate: r.continued,
			}
			for _, leaf := range c.leaves {
				p.tree.Add(leaf)
			}
			m.Last = recording.LSN(p.tree.Size())
			obj, err := format.SealSegment(m, &p.tree, c.frames, r.signer)
			if err != nil {
				return nil, err
			}
			p.segments++
			p.prev = format.Sum(obj)
			if err := s.make(p, recording.SegmentName(p.segments), s.seg(seq, p.segments), obj, l.born); err != nil {
				return nil, err
			}
		}
	}
	if p.damaged && p.failure == "" {
		p.failure = "a log file in the spool is damaged"
	}
	s.mu.Lock()
	last := len(r.logs) == len(p.logs) && r.ending != nil
	s.mu.Unlock()
	if !last {
		return p, nil
	}
	obj, err := format.SealTrailer(format.TrailerMeta{
		Session:     r.session,
		Ending:      *ending,
		Segments:    p.segments,
		Entries:     p.tree.Size(),
		Prev:        p.prev,
		Root:        p.tree.Root(),
		CutBytes:    p.cut,
		Failed:      p.failure,
		Certificate: r.continued,
	}, r.signer)
	if err == nil {
		err = s.make(p, recording.TrailerName, s.trailer(seq), obj, time.Now())
	}
	if err != nil {
		s.discard(p.made)
		return nil, err
	}
	p.complete = true
	return p, nil
}

// make writes an object's file, with everything but the directory synced.
func (s *Spool) make(p *sealing, name, path string, obj []byte, born time.Time) error {
	if err := s.writeFile(path, obj, true); err != nil {
		return err
	}
	p.made = append(p.made, &object{name: name, file: path, size: int64(len(obj)), born: born})
	return nil
}

// sealed makes p count: its objects are on disk, so the log files may go.
func (s *Spool) sealed(p *sealing) {
	r := p.r
	s.mu.Lock()
	r.tree, r.prev, r.segments, r.cut = p.tree, p.prev, p.segments, p.cut
	r.failure = p.failure
	r.logs = slices.Delete(r.logs, 0, len(p.logs))
	r.objects = append(r.objects, p.made...)
	r.complete = p.complete
	if len(r.logs) == 0 && (r.ending == nil || r.complete) {
		delete(s.mu.sealing, r)
	}
	if len(p.made) > 0 {
		s.mu.sending[r] = struct{}{}
	}
	s.mu.Unlock()
	wake(s.toSend)
	for _, l := range p.logs {
		path := s.log(r.seq, l.number)
		var err error
		if p.damaged {
			err = os.Rename(path, path+".damaged")
		} else {
			err = s.remove(path, l.size)
		}
		if err != nil {
			s.note(r, "cleaning up", err)
		}
	}
	if p.damaged {
		s.setAlarm(r, fmt.Errorf("a log file is damaged behind entry %d; it is kept as *.damaged", p.tree.Size()))
		if r.w != nil {
			r.w.poison(errors.New("its log file is damaged"))
		}
	}
}

// discard removes objects of a seal that did not come to its end.
func (s *Spool) discard(made []*object) {
	for _, o := range made {
		s.remove(o.file, o.size)
	}
}

// logContent is what a log file holds.
type logContent struct {
	frames []byte        // of the entries, whole
	leaves []format.Hash // one for each entry
	ending *recording.Ending
	cut    int64 // bytes behind the last good frame
}

// readLog reads a log file whose first entry comes after LSN after. It stops,
// without error, at the first frame that is torn, damaged or not the next one.
func readLog(path string, size int64, after recording.LSN) (logContent, error) {
	var c logContent
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		c.cut = size
		return c, nil
	}
	if err != nil {
		return c, err
	}
	b = b[:min(int64(len(b)), size)]
	if len(b) < len(logMagic) || string(b[:len(logMagic)]) != logMagic {
		c.cut = size
		return c, nil
	}
	b = b[len(logMagic):]
	rest := b
	good := 0
	for len(rest) > 0 && c.ending == nil {
		payload, next, err := format.NextFrame(rest)
		if err != nil {
			break
		}
		end, is, err := format.DecodeEnding(payload)
		if err != nil {
			break
		}
		if is {
			c.ending, rest = &end, next
			break
		}
		lsn, err := format.EntryLSN(payload)
		if err != nil || lsn != after+1 || good+len(rest)-len(next) > format.MaxFramesBytes {
			break
		}
		// An entry is sealed only when it can be read back.
		if _, err := format.DecodeEntry(payload); err != nil {
			break
		}
		after = lsn
		c.leaves = append(c.leaves, format.LeafHash(payload))
		good = len(b) - len(next)
		rest = next
	}
	c.frames = b[:good]
	c.cut = size - int64(len(logMagic)) - int64(len(b)-len(rest))
	return c, nil
}

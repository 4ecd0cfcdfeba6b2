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
	failures := 0
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
		s.mu.Lock()
		recs := slices.Collect(maps.Keys(s.mu.sealing))
		s.mu.Unlock()
		failed := false
		for _, r := range recs {
			for ctx.Err() == nil {
				more, err := s.seal(r)
				if err != nil {
					failed = true
					s.note(r, "sealing", err)
				}
				if err != nil || !more {
					break
				}
			}
		}
		if !failed {
			failures = 0
			continue
		}
		// A full or failing disk: everything stays as it is until it helps.
		failures++
		select {
		case <-ctx.Done():
			return
		case <-time.After(backoff(failures)):
			wake(s.toSeal)
		}
	}
}

// seal makes the next log file of r a segment and, when it was the last one,
// closes the recording with a trailer. It reports whether there is more to do.
// An error leaves everything as it was.
func (s *Spool) seal(r *rec) (more bool, err error) {
	s.mu.Lock()
	var l logFile
	have := len(r.logs) > 0
	if have {
		l = r.logs[0]
	}
	ending, failure, seq := r.ending, r.failure, r.seq
	only := len(r.logs) <= 1
	s.mu.Unlock()

	tree, prev, segments, cut := r.tree.Clone(), r.prev, r.segments, r.cut
	var made []*object
	var end *recording.Ending
	damaged := false
	if have {
		c, err := readLog(s.log(seq, l.number), l.size, recording.LSN(tree.Size()))
		if err != nil {
			return true, err
		}
		if end = c.ending; c.cut > 0 {
			cut += c.cut
			// Only a crash may leave bytes behind the last frame, and only in
			// the last file.
			damaged = r.w != nil || !only
		}
		if len(c.leaves) > 0 {
			m := format.SegmentMeta{
				Session:     r.session,
				Number:      segments + 1,
				First:       recording.LSN(tree.Size() + 1),
				Prev:        prev,
				Sealed:      time.Now().UTC(),
				Certificate: r.continued,
			}
			for _, leaf := range c.leaves {
				tree.Add(leaf)
			}
			m.Last = recording.LSN(tree.Size())
			obj, err := format.SealSegment(m, &tree, c.frames, s.o.Signer)
			if err != nil {
				return true, err
			}
			segments++
			prev = format.Sum(obj)
			path := s.seg(seq, segments)
			if err := s.writeFile(path, obj, true); err != nil {
				return true, err
			}
			made = append(made, &object{name: recording.SegmentName(segments), file: path, size: int64(len(obj)), born: l.born})
		}
	}
	if damaged {
		if failure == "" {
			failure = "a log file in the spool is damaged"
		}
		s.setAlarm(r, fmt.Errorf("log file %d is damaged behind entry %d; it is kept as *.damaged", l.number, tree.Size()))
		if r.w != nil {
			r.w.poison(errors.New("its log file is damaged"))
		}
	}
	last := only || damaged
	if last && ending != nil {
		if end == nil {
			end = ending
		}
		obj, err := format.SealTrailer(format.TrailerMeta{
			Session:     r.session,
			Ending:      *end,
			Segments:    segments,
			Entries:     tree.Size(),
			Prev:        prev,
			Root:        tree.Root(),
			CutBytes:    cut,
			Failed:      failure,
			Certificate: r.continued,
		}, s.o.Signer)
		if err == nil {
			err = s.writeFile(s.trailer(seq), obj, true)
		}
		if err != nil {
			s.discard(made)
			return true, err
		}
		made = append(made, &object{name: recording.TrailerName, file: s.trailer(seq), size: int64(len(obj)), born: time.Now()})
	}
	if len(made) > 0 {
		if err := s.dirF.Sync(); err != nil {
			s.discard(made)
			return true, err
		}
	}
	// From here on the objects are what counts, whatever happens.
	r.tree, r.prev, r.segments, r.cut = tree, prev, segments, cut
	s.mu.Lock()
	r.failure = failure
	drop := r.logs
	if have && !damaged {
		drop = drop[:1]
	}
	drop = slices.Clone(drop)
	r.logs = slices.Delete(r.logs, 0, len(drop))
	r.objects = append(r.objects, made...)
	r.complete = last && ending != nil
	more = len(r.logs) > 0 || r.ending != nil && !r.complete
	if !more {
		delete(s.mu.sealing, r)
	}
	if len(made) > 0 {
		s.mu.sending[r] = struct{}{}
	}
	s.mu.Unlock()
	wake(s.toSend)
	for _, l := range drop {
		path := s.log(seq, l.number)
		if damaged {
			err = errors.Join(err, os.Rename(path, path+".damaged"))
		} else {
			err = errors.Join(err, s.remove(path, l.size))
		}
	}
	if err != nil {
		s.note(r, "cleaning up", err)
	}
	return more, nil
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

package spool

import (
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
)

// found is what the directory holds of one recording.
type found struct {
	header, trailer, done *foundFile
	logs, segs            map[uint64]foundFile
}

type foundFile struct {
	path string
	size int64
	time time.Time
}

// recover takes up what an earlier process left. Nothing is sealed here: it
// makes the state that Run goes on from.
func (s *Spool) recover(cert *x509.Certificate) error {
	saved, err := readChain(s.o.Dir)
	if err != nil {
		return err
	}
	all, err := s.scan()
	if err != nil {
		return err
	}
	head := saved
	lost := false // behind a header that never reached the disk
	for _, seq := range slices.Sorted(maps.Keys(all)) {
		f := all[seq]
		if f.done != nil {
			if err := s.removeFound(f); err != nil {
				return err
			}
			continue
		}
		h, obj, err := readHeader(f)
		switch {
		case err == nil && h.NodeSeq != seq:
			err = fmt.Errorf("its header says number %d", h.NodeSeq)
		case err == nil && head.Chain != "" && h.Chain != head.Chain:
			err = errors.New("it belongs to another chain of recordings than chain.json")
		case err == nil && head.Chain == "" && seq != 1 && head.Seq == 0:
			// chain.json is made before any header is deleted, so the first
			// header is there or was never written.
			err = errors.New("the recordings before it and chain.json are missing")
		}
		if seq > saved.Seq && (lost || err != nil || seq != head.Seq+1) {
			// Begins complete in order, so neither this one nor a later one
			// returned, unless there are entries.
			if len(f.logs)+len(f.segs) > 0 {
				return fmt.Errorf("recording %d in %s has entries but it cannot follow recording %d (%v): set the files aside to go on", seq, s.dir, head.Seq, err)
			}
			lost = true
			if err := s.removeFound(f); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("recording %d in %s: %w", seq, s.dir, err)
		}
		if seq > saved.Seq {
			head = chainHead{Chain: h.Chain, Seq: seq, Hash: format.Sum(obj).String(), Session: h.Session}
		}
		r, err := s.takeUp(f, h, obj, cert)
		if err != nil {
			return fmt.Errorf("recording %d in %s: %w", seq, s.dir, err)
		}
		s.mu.recs[seq], s.mu.sessions[r.session] = r, r
		s.mu.sending[r] = struct{}{}
		if !r.complete {
			s.mu.sealing[r] = struct{}{}
			s.o.Log.Warn("recording: completing what a crash left", "session", r.session, "logs", len(r.logs))
		}
	}
	if head.Chain == "" {
		head.Chain = newChain()
	}
	if err := s.dirF.Sync(); err != nil {
		return err
	}
	if head != saved {
		if err := writeChain(s.o.Dir, head); err != nil {
			return err
		}
	}
	s.begin.head, s.mu.durable, s.mu.saved = head, head, head
	wake(s.toSeal)
	wake(s.toSend)
	return nil
}

// scan lists the directory and removes temporary files.
func (s *Spool) scan() (map[uint64]*found, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	all := make(map[uint64]*found)
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		part := strings.Split(e.Name(), ".")
		if part[len(part)-1] == "tmp" {
			if err := os.Remove(path); err != nil {
				return nil, err
			}
			continue
		}
		s.used.Add(info.Size())
		seq, err := strconv.ParseUint(part[0], 10, 64)
		if err != nil || len(part) < 2 || part[len(part)-1] == "damaged" {
			continue // not ours to touch, but it takes room
		}
		f := all[seq]
		if f == nil {
			f = &found{logs: make(map[uint64]foundFile), segs: make(map[uint64]foundFile)}
			all[seq] = f
		}
		ff := foundFile{path: path, size: info.Size(), time: info.ModTime()}
		switch ext := strings.Join(part[1:], "."); {
		case ext == "header":
			f.header = &ff
		case ext == "trailer":
			f.trailer = &ff
		case ext == "done":
			f.done = &ff
		case len(part) == 3:
			n, err := strconv.ParseUint(part[1], 10, 64)
			if err != nil {
				continue
			}
			switch part[2] {
			case "log":
				f.logs[n] = ff
			case "seg":
				f.segs[n] = ff
			}
		}
	}
	return all, nil
}

func (s *Spool) removeFound(f *found) error {
	var files []foundFile
	if f.header != nil {
		files = append(files, *f.header)
	}
	files = slices.AppendSeq(files, maps.Values(f.logs))
	files = slices.AppendSeq(files, maps.Values(f.segs))
	for _, last := range []*foundFile{f.trailer, f.done} {
		if last != nil {
			files = append(files, *last)
		}
	}
	for _, ff := range files {
		if err := s.remove(ff.path, ff.size); err != nil {
			return err
		}
	}
	return nil
}

func readHeader(f *found) (*format.Header, []byte, error) {
	if f.header == nil {
		return nil, nil, errors.New("its header is missing")
	}
	b, err := os.ReadFile(f.header.path)
	if err != nil {
		return nil, nil, err
	}
	h, err := format.ParseHeader(b)
	if err != nil {
		return nil, nil, err
	}
	if !h.SignedBy(h.Certificate.PublicKey) {
		return nil, nil, errors.New("its header's signature is wrong")
	}
	return h, b, nil
}

// takeUp makes the state of one recording from its files.
func (s *Spool) takeUp(f *found, h *format.Header, header []byte, cert *x509.Certificate) (*rec, error) {
	r := &rec{
		seq:       h.NodeSeq,
		session:   h.Session,
		prefix:    recording.Prefix(h.Started, h.Session),
		signer:    s.signer.Load(),
		continued: continuedBy(h, cert),
		prev:      format.Sum(header),
	}
	r.objects = []*object{{name: recording.HeaderName, file: f.header.path, size: f.header.size, born: h.Started}}
	ended := h.Started
	var ending *recording.Ending
	var first recording.LSN // of the newest segment
	for _, n := range slices.Sorted(maps.Keys(f.segs)) {
		ff := f.segs[n]
		r.objects = append(r.objects, &object{name: recording.SegmentName(n), file: ff.path, size: ff.size, born: ff.time})
		r.segments = n
		ended = ff.time
	}
	if f.trailer != nil {
		r.complete = true
		r.objects = append(r.objects, &object{name: recording.TrailerName, file: f.trailer.path, size: f.trailer.size, born: f.trailer.time})
	} else if r.segments > 0 {
		b, err := os.ReadFile(f.segs[r.segments].path)
		if err != nil {
			return nil, err
		}
		seg, err := format.ParseSegment(b)
		if err != nil {
			return nil, fmt.Errorf("segment %d: %w", r.segments, err)
		}
		if seg.Session != h.Session || seg.Number != r.segments {
			return nil, fmt.Errorf("segment %d belongs elsewhere", r.segments)
		}
		r.tree, r.prev, first = seg.Tree, format.Sum(b), seg.First
	}
	for _, n := range slices.Sorted(maps.Keys(f.logs)) {
		ff := f.logs[n]
		if r.complete || n <= r.segments {
			// Sealed already; the crash came before its deletion. The last one
			// may hold the ending that the trailer is still to be made of.
			if n == r.segments && !r.complete {
				c, err := readLog(ff.path, ff.size, first-1)
				if err != nil {
					return nil, err
				}
				ending = c.ending
			}
			if err := s.remove(ff.path, ff.size); err != nil {
				return nil, err
			}
			continue
		}
		r.logs = append(r.logs, logFile{number: n, size: ff.size, born: ff.time})
		ended = ff.time
	}
	if r.ending = ending; !r.complete && ending == nil {
		// An ending that is found in a log comes before this one.
		r.ending = &recording.Ending{At: ended.UTC(), Reason: "crash", Detail: "the node stopped while it was recording; completed by the node after its restart"}
	}
	return r, nil
}

package spool_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
	"github.com/sallyport/sallyport/recording/recordingtest"
	"github.com/sallyport/sallyport/recording/spool"
)

// TestTail: who follows a recording gets each entry once and in order, whether
// it is buffered, in a log file, sealed, or in the store alone.
func TestTail(t *testing.T) {
	ca := recordingtest.NewCA(t)
	n := ca.Node(t, "n1")
	dir := t.TempDir()
	s, err := spool.Open(spool.Options{Dir: t.TempDir(), Node: "n1", Cluster: "c", Signer: n.Key, Certificate: n.Cert, Store: mustOpen(t, dir), SegmentBytes: 2000, SegmentAge: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var running sync.WaitGroup
	defer running.Wait()
	defer s.Close()
	running.Go(func() { _ = s.Run(ctx) })
	started := time.Now()
	w, err := s.Begin(recording.Header{Session: "s", Kind: "session", Started: started})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Tail(ctx, "other", spool.Cursor{}, 10, 1000); !errors.Is(err, spool.ErrNotLive) {
		t.Fatal(err)
	}
	const entries = 3000
	running.Go(func() {
		for i := range entries {
			e := recording.Entry{Type: recording.Command, Op: uint64(i + 1), Text: fmt.Appendf(nil, "SELECT %d", i)}
			var err error
			if i%3 == 0 {
				_, err = w.Append(&e)
			} else {
				err = w.Buffer(&e)
			}
			if err != nil {
				t.Error(err)
				return
			}
			if i%100 == 0 {
				time.Sleep(10 * time.Millisecond) // so that segments close by age too
			}
		}
		if err := w.Close(recording.Ending{Reason: "closed"}); err != nil {
			t.Error(err)
		}
	})
	var c spool.Cursor
	last := recording.LSN(0)
	for last < entries {
		p, err := s.Tail(ctx, "s", c, 40, 1<<20)
		if errors.Is(err, spool.ErrNotLive) {
			break // it is in the store
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Entries) > 40 {
			t.Fatal(len(p.Entries), "entries where 40 were asked for")
		}
		for _, e := range p.Entries {
			if e.LSN != last+1 || string(e.Text) != fmt.Sprintf("SELECT %d", last) {
				t.Fatalf("entry %d %q after %d", e.LSN, e.Text, last)
			}
			last = e.LSN
		}
		if p.Ending != nil && last != entries {
			t.Fatalf("it ended after entry %d", last)
		}
		c = p.Next
		if len(p.Entries) == 0 {
			time.Sleep(time.Millisecond) // the writer sleeps too
		}
	}
	if last < entries/2 {
		t.Errorf("only %d entries were seen", last)
	}
}

// TestTailDoesNotTrustTheStore: a segment that only the store has is shown when
// it is the one that was written.
func TestTailDoesNotTrustTheStore(t *testing.T) {
	ca := recordingtest.NewCA(t)
	n := ca.Node(t, "n1")
	dir := t.TempDir()
	s, err := spool.Open(spool.Options{Dir: t.TempDir(), Node: "n1", Cluster: "c", Signer: n.Key, Certificate: n.Cert, Store: mustOpen(t, dir), SegmentBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var running sync.WaitGroup
	defer running.Wait()
	defer s.Close()
	running.Go(func() { _ = s.Run(ctx) })
	started := time.Now()
	w, err := s.Begin(recording.Header{Session: "s", Kind: "session", Started: started})
	if err != nil {
		t.Fatal(err)
	}
	for range 4 { // a segment each
		mustAppend(t, w)
	}
	first := filepath.Join(dir, filepath.FromSlash(recording.Prefix(started, "s")), recording.SegmentName(1))
	local := func() bool {
		left, _ := filepath.Glob(filepath.Join(filepath.Dir(first), "*.seg"))
		return len(left) == 4
	}
	for ctx.Err() == nil && (!local() || s.Status().BytesWaiting > 2000) {
		time.Sleep(5 * time.Millisecond) // sealing and sending take what they take
	}
	if p, err := s.Tail(ctx, "s", spool.Cursor{}, 10, 1<<20); err != nil || len(p.Entries) != 4 {
		t.Fatal(p, err)
	}
	// Well formed in every way, but for who signed it.
	frames, err := format.AppendEntry(nil, &recording.Entry{LSN: 1, Type: recording.Note, Reason: "nothing happened"})
	if err != nil {
		t.Fatal(err)
	}
	var tree format.Tree
	tree.Add(format.LeafHash(frames[8:]))
	b, err := format.SealSegment(format.SegmentMeta{Session: "s", Number: 1, First: 1, Last: 1}, &tree, frames, ca.Node(t, "n1").Key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(first, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := s.Tail(ctx, "s", spool.Cursor{}, 10, 1<<20); err == nil {
		t.Fatalf("an altered segment was shown: %+v", p)
	}
}

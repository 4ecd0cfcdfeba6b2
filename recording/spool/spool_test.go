package spool_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
	"github.com/sallyport/sallyport/recording/recordingtest"
	"github.com/sallyport/sallyport/recording/spool"
	"github.com/sallyport/sallyport/recording/upload"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("SALLYPORT_TEST_APPENDER"); dir != "" {
		appender(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

// env is a spool's surroundings, which outlive it.
type env struct {
	ca    *recordingtest.CA
	node  *recordingtest.Node
	dir   string
	store *recordingtest.FaultStore
}

func newEnv(t testing.TB) *env {
	ca := recordingtest.NewCA(t)
	return &env{ca: ca, node: ca.Node(t, "n1"), dir: t.TempDir(), store: &recordingtest.FaultStore{Store: mustOpen(t, t.TempDir())}}
}

func (e *env) options() spool.Options {
	return spool.Options{
		Dir: e.dir, Node: "n1", Cluster: "c", Signer: e.node.Key, Certificate: e.node.Cert,
		Store: e.store, SegmentAge: 50 * time.Millisecond,
	}
}

// open opens the spool; stop closes it.
func (e *env) open(t testing.TB, change func(*spool.Options)) (s *spool.Spool, stop func()) {
	t.Helper()
	o := e.options()
	if change != nil {
		change(&o)
	}
	s, err := spool.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	stop = func() {
		once.Do(func() {
			if err := s.Close(); err != nil {
				t.Error("close:", err)
			}
		})
	}
	t.Cleanup(stop)
	return s, stop
}

// run runs the spool until the test ends or it is closed.
func run(t testing.TB, s *spool.Spool) {
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, spool.ErrClosed) {
			t.Error("run:", err)
		}
	})
}

func drain(t testing.TB, s *spool.Spool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := s.Drain(ctx); err != nil {
		t.Fatal(err)
	}
}

// stored is one recording read back from the store, checked only for order;
// verifying is recording/replay's and tested there.
type stored struct {
	header  *format.Header
	entries []recording.Entry
	trailer *format.Trailer
}

func (e *env) stored(t testing.TB, session string) stored {
	t.Helper()
	var out stored
	ctx := context.Background()
	var tree format.Tree
	var prefix string
	err := e.store.List(ctx, recording.Root, "", func(o recording.Object) error {
		if !strings.Contains(o.Key, "/"+session+"/") {
			return nil
		}
		b, err := e.store.Store.Get(ctx, o.Key)
		if err != nil {
			return err
		}
		switch name := o.Key[strings.LastIndex(o.Key, "/")+1:]; name {
		case recording.HeaderName:
			out.header, err = format.ParseHeader(b)
			prefix = strings.TrimSuffix(o.Key, name)
		case recording.TrailerName:
			out.trailer, err = format.ParseTrailer(b)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for n := uint64(1); out.header != nil; n++ {
		b, err := e.store.Store.Get(ctx, prefix+recording.SegmentName(n))
		if errors.Is(err, recording.ErrNotFound) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		seg, err := format.ParseSegment(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := seg.Entries(&tree, func(e *recording.Entry) error {
			out.entries = append(out.entries, *e)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestRecord(t *testing.T) {
	e := newEnv(t)
	s, stop := e.open(t, func(o *spool.Options) { o.SegmentBytes = 4 << 10 })
	run(t, s)
	w, err := s.Begin(recording.Header{Session: "s1", Kind: "session", Subject: "repo:acme/shop", PolicyIndex: 7})
	if err != nil {
		t.Fatal(err)
	}
	if w.ID() != "s1" {
		t.Fatal(w.ID())
	}
	const n = 200
	for i := range n {
		entry := recording.Entry{Type: recording.Command, Op: uint64(i + 1), Verb: "Query", Text: fmt.Appendf(nil, "SELECT %d", i), Detail: map[string]string{"b": "2", "a": "1"}}
		lsn, err := w.Append(&entry)
		if err != nil || lsn != recording.LSN(2*i+1) {
			t.Fatal(lsn, err)
		}
		if err := w.Buffer(&recording.Entry{Type: recording.Response, Op: uint64(i + 1), Data: bytes.Repeat([]byte("x"), 100)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Sync(context.Background(), 2*n); err != nil {
		t.Fatal(err)
	}
	if err := w.Sync(context.Background(), 2*n+1); err == nil {
		t.Fatal("synced an entry that does not exist")
	}
	if err := w.Close(recording.Ending{Reason: "closed"}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Append(&recording.Entry{Type: recording.Note}); !errors.Is(err, spool.ErrClosed) {
		t.Fatal(err)
	}
	drain(t, s)
	got := e.stored(t, "s1")
	if len(got.entries) != 2*n || got.trailer == nil || got.trailer.Ending.Reason != "closed" || got.trailer.Entries != 2*n || got.trailer.Segments < 5 {
		t.Fatalf("%d entries, trailer %+v", len(got.entries), got.trailer)
	}
	if got.header.NodeSeq != 1 || got.header.Prev != "" || got.header.Node != "n1" {
		t.Fatalf("%+v", got.header.Header)
	}
	if string(got.entries[2*n-2].Text) != "SELECT 199" || got.entries[0].Detail["a"] != "1" {
		t.Fatalf("%+v", got.entries[2*n-2])
	}
	stop()
	files, _ := filepath.Glob(filepath.Join(e.dir, "rec", "*"))
	if len(files) != 0 {
		t.Fatal("left in the spool:", files)
	}
}

func mustOpen(t testing.TB, dir string) recording.Store {
	t.Helper()
	s, err := upload.Open(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

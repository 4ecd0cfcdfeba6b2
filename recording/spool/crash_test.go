package spool_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/recordingtest"
	"github.com/sallyport/sallyport/recording/recordingtest/s3server"
	"github.com/sallyport/sallyport/recording/replay"
	"github.com/sallyport/sallyport/recording/spool"
	"github.com/sallyport/sallyport/recording/upload"
)

// verify verifies the whole store.
func (e *env) verify(t testing.TB) *replay.Report {
	t.Helper()
	rep, err := replay.Verify(context.Background(), e.store.Store, replay.VerifyOptions{Trust: replay.Trust{Roots: e.ca.Pool()}})
	if err != nil {
		t.Fatal(err)
	}
	if !rep.OK() {
		t.Fatal(rep.Problems)
	}
	return rep
}

// appender is the process that TestKill kills. It records in three sessions at a
// time, begins new ones, and tells what Append returned for, a line each.
func appender(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	key, err := os.ReadFile(filepath.Join(dir, "key"))
	fail(err)
	signer, err := x509.ParseECPrivateKey(key)
	fail(err)
	cert, err := os.ReadFile(filepath.Join(dir, "cert"))
	fail(err)
	store, err := upload.Open(context.Background(), filepath.Join(dir, "store"))
	fail(err)
	s, err := spool.Open(spool.Options{
		Dir: filepath.Join(dir, "spool"), Node: "n1", Cluster: "c", Signer: signer, Certificate: cert, Store: store,
		SegmentAge: 20 * time.Millisecond, SegmentBytes: 4 << 10,
	})
	fail(err)
	go s.Run(context.Background())
	var mu sync.Mutex
	say := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(os.Stdout, format+"\n", args...)
	}
	for i := range 3 {
		go func() {
			for n := 0; ; n++ {
				id := fmt.Sprintf("%s-%d-%d", os.Getenv("SALLYPORT_TEST_ROUND"), i, n)
				w, err := s.Begin(recording.Header{Session: id})
				fail(err)
				for op := range rand.N(60) {
					e := recording.Entry{Type: recording.Command, Op: uint64(op + 1), Text: []byte(id)}
					lsn, err := w.Append(&e)
					fail(err)
					say("%s %d", id, lsn)
					fail(w.Buffer(&recording.Entry{Type: recording.Response, Data: make([]byte, rand.N(2000))}))
				}
				fail(w.Close(recording.Ending{Reason: "closed"}))
				say("%s closed", id)
			}
		}()
	}
	select {}
}

// TestKill: whatever Append returned for before kill -9 is in the store after
// the next start, in recordings that verify, without a gap in the node's chain.
func TestKill(t *testing.T) {
	e := newEnv(t)
	dir := t.TempDir()
	key, err := x509.MarshalECPrivateKey(e.node.Key)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"key": key, "cert": e.node.Cert} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	e.dir = filepath.Join(dir, "spool")
	e.store.Store = mustOpen(t, filepath.Join(dir, "store"))
	acked := make(map[string]int) // newest LSN by session
	closed := make(map[string]bool)
	for round := range 6 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "SALLYPORT_TEST_APPENDER="+dir, fmt.Sprintf("SALLYPORT_TEST_ROUND=r%d", round))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var killed atomic.Bool
		sc := bufio.NewScanner(out)
		for sc.Scan() {
			if !killed.Swap(true) { // begun
				pause := time.Duration(rand.N(250)) * time.Millisecond
				time.AfterFunc(pause, func() { cmd.Process.Kill() })
			}
			var id, what string
			if n, _ := fmt.Sscan(sc.Text(), &id, &what); n != 2 {
				continue // the last line may be cut
			}
			if what == "closed" {
				closed[id] = true
				continue
			}
			var lsn int
			if _, err := fmt.Sscan(what, &lsn); err != nil {
				t.Fatal(sc.Text())
			}
			acked[id] = lsn
		}
		cmd.Wait()
		if !killed.Load() {
			t.Fatal("the appender did not begin")
		}
		// The last but one round is taken up by the next process, not by us.
		if round == 4 {
			continue
		}
		s, stop := e.open(t, nil)
		run(t, s)
		drain(t, s)
		stop()
	}
	if len(acked) < 6 {
		t.Fatal("only", len(acked), "sessions")
	}
	rep := e.verify(t)
	if rep.Unfinished != 0 || len(rep.Chains) != 1 || rep.Chains[0].Recordings != rep.Recordings || rep.Recordings < len(acked) {
		t.Fatalf("%+v", rep)
	}
	for id, lsn := range acked {
		got := e.stored(t, id)
		if len(got.entries) < lsn {
			t.Errorf("%s: %d entries, Append had returned for %d", id, len(got.entries), lsn)
		}
		if want := map[bool]string{true: "closed", false: "crash"}[closed[id]]; got.trailer.Ending.Reason != want && (closed[id] || got.trailer.Ending.Reason != "closed") {
			t.Errorf("%s: ended with %q, want %q", id, got.trailer.Ending.Reason, want)
		}
	}
	t.Logf("%d sessions, %d entries verified", rep.Recordings, rep.Entries)
}

// TestCrashAtEveryStep stops the uploads before and after each step, restarts on
// what is left, and expects everything once and verifiable. It also restarts on
// a copy of the spool from before any step, as if no progress had reached the disk.
func TestCrashAtEveryStep(t *testing.T) {
	for step := 0; ; step++ {
		e := newEnv(t)
		var n atomic.Int64
		down := errors.New("crashed")
		e.store.Fault(func(recordingtest.Step) error { return down })
		s, stop := e.open(t, func(o *spool.Options) { o.SegmentBytes = 1 })
		run(t, s)
		for i := range 2 {
			w, err := s.Begin(recording.Header{Session: fmt.Sprint("s", i)})
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				mustAppend(t, w)
			}
			if i == 0 {
				w.Close(recording.Ending{Reason: "closed"})
			}
		}
		eventually(t, func() bool {
			trailers, _ := filepath.Glob(filepath.Join(e.dir, "rec", "*.trailer"))
			logs, _ := filepath.Glob(filepath.Join(e.dir, "rec", "*.log"))
			return len(trailers) == 1 && len(logs) == 0
		})
		early := t.TempDir()
		if err := os.CopyFS(early, os.DirFS(e.dir)); err != nil {
			t.Fatal(err)
		}
		e.store.Fault(func(recordingtest.Step) error {
			if n.Add(1) > int64(step) {
				return down
			}
			return nil
		})
		reached := false
		eventually(t, func() bool {
			if n.Load() > int64(step) {
				reached = true
				return true
			}
			st := s.Status()
			return st.Waiting == 0 && st.OldestUnsent == 0
		})
		stop()

		e.store.Fault(nil)
		s, stop = e.open(t, nil)
		run(t, s)
		drain(t, s)
		if st := s.Status(); len(st.Alarms) != 0 {
			t.Fatal(st.Alarms)
		}
		stop()
		if left, _ := os.ReadDir(filepath.Join(e.dir, "rec")); len(left) != 0 {
			t.Fatal(left)
		}
		if rep := e.verify(t); rep.Recordings != 2 || rep.Verified != 2 || rep.Entries != 4 {
			t.Fatalf("step %d: %+v", step, rep)
		}

		// The copy: s0 was complete in it and is the same; s1 was live, so its
		// trailer cannot be the one that is stored: an alarm, and nothing changes.
		e.dir = early
		s, stop = e.open(t, nil)
		run(t, s)
		eventually(t, func() bool { st := s.Status(); return st.Waiting == 1 && len(st.Alarms) == 1 })
		stop()
		e.verify(t)
		if !reached {
			if step < 14 { // 7 objects, 2 recordings: at least put and get each
				t.Fatal("only", step, "steps")
			}
			return
		}
	}
}

// TestDeletionCrash: a crash while a finished recording is being deleted.
func TestDeletionCrash(t *testing.T) {
	e := newEnv(t)
	e.store.Fault(func(recordingtest.Step) error { return errors.New("down") })
	s, stop := e.open(t, nil)
	run(t, s)
	w, err := s.Begin(recording.Header{Session: "s"})
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, w)
	w.Close(recording.Ending{Reason: "closed"})
	trailer := filepath.Join(e.dir, "rec", "0000000000000001.trailer")
	eventually(t, func() bool { _, err := os.Stat(trailer); return err == nil })
	stop()
	full := t.TempDir()
	if err := os.CopyFS(full, os.DirFS(e.dir)); err != nil {
		t.Fatal(err)
	}
	e.store.Fault(nil)
	s, stop = e.open(t, nil)
	run(t, s)
	drain(t, s)
	stop()
	chain, err := os.ReadFile(filepath.Join(e.dir, "chain.json"))
	if err != nil || !strings.Contains(string(chain), `"seq":1`) {
		t.Fatal(string(chain), err)
	}
	for _, gone := range [][]string{{}, {"header"}, {"header", "000001.seg"}} {
		e.dir = t.TempDir()
		if err := os.CopyFS(e.dir, os.DirFS(full)); err != nil {
			t.Fatal(err)
		}
		rec := filepath.Join(e.dir, "rec", "0000000000000001.")
		if err := errors.Join(os.Rename(rec+"trailer", rec+"done"), os.WriteFile(filepath.Join(e.dir, "chain.json"), chain, 0o600)); err != nil {
			t.Fatal(err)
		}
		for _, g := range gone {
			if err := os.Remove(rec + g); err != nil {
				t.Fatal(err)
			}
		}
		s, stop := e.open(t, nil)
		if st := s.Status(); st.Waiting != 0 || st.BytesWaiting != 0 {
			t.Fatalf("%v: %+v", gone, st)
		}
		w, err := s.Begin(recording.Header{Session: "next"})
		if err != nil {
			t.Fatal(err)
		}
		w.Close(recording.Ending{})
		if b, err := os.ReadFile(filepath.Join(e.dir, "rec", "0000000000000002.header")); err != nil || !bytes.Contains(b, []byte(`"prev_session":"s"`)) {
			t.Fatal(err)
		}
		stop()
	}
}

// TestLostHeaders: after a power cut headers may be missing or torn. What never
// began is dropped and the chain goes on without a gap; entries never are.
func TestLostHeaders(t *testing.T) {
	begin := func(t *testing.T, e *env) {
		s, stop := e.open(t, nil)
		for i := range 3 {
			w, err := s.Begin(recording.Header{Session: fmt.Sprint("s", i)})
			if err != nil {
				t.Fatal(err)
			}
			_ = w
		}
		stop()
		logs, _ := filepath.Glob(filepath.Join(e.dir, "rec", "*.log"))
		for _, l := range logs { // only the endings of Close are in them
			os.Remove(l)
		}
	}
	rec := func(e *env, name string) string { return filepath.Join(e.dir, "rec", name) }
	t.Run("torn", func(t *testing.T) {
		e := newEnv(t)
		begin(t, e)
		if err := os.Truncate(rec(e, "0000000000000002.header"), 10); err != nil {
			t.Fatal(err)
		}
		s, _ := e.open(t, nil)
		run(t, s)
		w, err := s.Begin(recording.Header{Session: "again"})
		if err != nil {
			t.Fatal(err)
		}
		w.Close(recording.Ending{Reason: "closed"})
		drain(t, s)
		if rep := e.verify(t); rep.Recordings != 2 || rep.Chains[0].Last != 2 {
			t.Fatalf("%+v", rep)
		}
	})
	t.Run("with entries", func(t *testing.T) {
		e := newEnv(t)
		begin(t, e)
		if err := errors.Join(os.Remove(rec(e, "0000000000000002.header")), os.WriteFile(rec(e, "0000000000000003.000001.log"), []byte("x"), 0o600)); err != nil {
			t.Fatal(err)
		}
		if _, err := spool.Open(e.options()); err == nil || !strings.Contains(err.Error(), "entries") {
			t.Fatal(err)
		}
	})
	t.Run("chain damaged", func(t *testing.T) {
		e := newEnv(t)
		begin(t, e)
		if err := os.WriteFile(filepath.Join(e.dir, "chain.json"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := spool.Open(e.options()); err == nil || !strings.Contains(err.Error(), "chain.json") {
			t.Fatal(err)
		}
	})
}

// TestTornTail: a log file that ends in a torn or damaged frame loses only that,
// and the trailer says so.
func TestTornTail(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"cut":    func(b []byte) []byte { return b[:len(b)-1] },
		"zeros":  func(b []byte) []byte { return append(b[:len(b)-5], 0, 0, 0, 0, 0) },
		"more":   func(b []byte) []byte { return append(b, 0, 0, 0, 9, 1) },
		"header": func(b []byte) []byte { return b[:3] },
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			s, stop := e.open(t, func(o *spool.Options) { o.SegmentAge = time.Hour })
			w, err := s.Begin(recording.Header{Session: "s"})
			if err != nil {
				t.Fatal(err)
			}
			for range 3 {
				mustAppend(t, w)
			}
			image := t.TempDir() // a crash: nothing was closed
			if err := os.CopyFS(image, os.DirFS(e.dir)); err != nil {
				t.Fatal(err)
			}
			stop()
			e.dir = image
			log := filepath.Join(image, "rec", "0000000000000001.000001.log")
			b, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(log, damage(b), 0o600); err != nil {
				t.Fatal(err)
			}
			s, _ = e.open(t, nil)
			run(t, s)
			drain(t, s)
			got := e.stored(t, "s")
			want := map[string]int{"cut": 2, "zeros": 2, "more": 3, "header": 0}[name]
			if len(got.entries) != want || got.trailer.Ending.Reason != "crash" || got.trailer.CutBytes == 0 {
				t.Fatalf("%d entries, %+v", len(got.entries), got.trailer.TrailerMeta)
			}
			e.verify(t)
		})
	}
}

// TestNewCertificate: a recording begun under one certificate is completed under
// the node's next one, and verifies; another node's does not.
func TestNewCertificate(t *testing.T) {
	for _, name := range []string{"n1", "n2"} {
		e := newEnv(t)
		e.store.Fault(func(recordingtest.Step) error { return errors.New("down") })
		s, stop := e.open(t, func(o *spool.Options) { o.SegmentBytes = 1 })
		run(t, s)
		w, err := s.Begin(recording.Header{Session: "s"})
		if err != nil {
			t.Fatal(err)
		}
		mustAppend(t, w)
		eventually(t, func() bool {
			segs, _ := filepath.Glob(filepath.Join(e.dir, "rec", "*.seg"))
			return len(segs) == 1
		})
		image := t.TempDir()
		if err := os.CopyFS(image, os.DirFS(e.dir)); err != nil {
			t.Fatal(err)
		}
		stop()
		e.store.Fault(nil)
		e.dir, e.node = image, e.ca.Node(t, name)
		s, _ = e.open(t, nil)
		run(t, s)
		drain(t, s)
		rep, err := replay.Verify(context.Background(), e.store, replay.VerifyOptions{Trust: replay.Trust{Roots: e.ca.Pool()}})
		if err != nil {
			t.Fatal(err)
		}
		if ok := name == "n1"; rep.OK() != ok || !ok && rep.Problems[0].Kind != replay.UnknownSigner {
			t.Fatalf("completed as %s: %+v", name, rep.Problems)
		}
	}
}

// TestS3Down: sessions go on while the server is down; nothing is lost.
func TestS3Down(t *testing.T) {
	srv := s3server.Start(t)
	e := newEnv(t)
	var err error
	if e.store.Store, err = upload.Open(context.Background(), srv.URL("prod")); err != nil {
		t.Fatal(err)
	}
	s, stop := e.open(t, func(o *spool.Options) { o.SegmentBytes = 512 })
	run(t, s)
	w, err := s.Begin(recording.Header{Session: "s"})
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, w)
	// A live session is in the store soon.
	eventually(t, func() bool { return s.Status().Sent >= 2 })
	if rep := e.verify(t); rep.Unfinished != 1 || rep.Entries != 1 {
		t.Fatalf("%+v", rep)
	}
	srv.Down()
	for range 50 {
		mustAppend(t, w)
	}
	eventually(t, func() bool {
		st := s.Status()
		return st.LastError != "" && st.OldestUnsent > 0 && st.BytesWaiting > 0
	})
	w.Close(recording.Ending{Reason: "closed"})
	srv.Up()
	drain(t, s)
	if rep := e.verify(t); rep.Verified != 1 || rep.Entries != 51 {
		t.Fatalf("%+v", rep)
	}
	stop()
}

// TestConflict: another object under our name is an alarm; it is not
// overwritten, our own is kept, and other recordings go on.
func TestConflict(t *testing.T) {
	e := newEnv(t)
	s, _ := e.open(t, nil)
	run(t, s)
	ctx := context.Background()
	started := time.Now()
	key := recording.Prefix(started, "bad") + recording.SegmentName(1)
	if err := e.store.Store.Put(ctx, key, []byte("planted")); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"bad", "good"} {
		w, err := s.Begin(recording.Header{Session: id, Started: started})
		if err != nil {
			t.Fatal(err)
		}
		mustAppend(t, w)
		w.Close(recording.Ending{Reason: "closed"})
	}
	eventually(t, func() bool {
		st := s.Status()
		return len(st.Alarms) == 1 && strings.Contains(st.Alarms[0], "bad") && st.Waiting == 1
	})
	if b, err := e.store.Store.Get(ctx, key); err != nil || string(b) != "planted" {
		t.Fatal(string(b), err)
	}
	if _, err := os.Stat(filepath.Join(e.dir, "rec", "0000000000000001.000001.seg")); err != nil {
		t.Fatal(err)
	}
	if got := e.stored(t, "good"); len(got.entries) != 1 || got.trailer == nil {
		t.Fatal("good was held up")
	}
}

// lyingStore says that it stored, and did not, or stored something else.
type lyingStore struct{ recording.Store }

func (s lyingStore) Put(ctx context.Context, key string, data []byte) error {
	if strings.HasSuffix(key, recording.HeaderName) {
		return s.Store.Put(ctx, key, data[:len(data)-1])
	}
	return nil
}

func TestLyingStore(t *testing.T) {
	e := newEnv(t)
	s, _ := e.open(t, func(o *spool.Options) { o.Store = lyingStore{e.store} })
	run(t, s)
	w, err := s.Begin(recording.Header{Session: "s"})
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, w)
	w.Close(recording.Ending{Reason: "closed"})
	eventually(t, func() bool { return len(s.Status().Alarms) == 1 })
	if s.Status().Sent != 0 {
		t.Fatal("believed it")
	}
}

func mustAppend(t testing.TB, w *spool.Writer) {
	t.Helper()
	if _, err := w.Append(&recording.Entry{Type: recording.Command, Op: 1, Verb: "Query", Text: []byte("SELECT 1")}); err != nil {
		t.Fatal(err)
	}
}

func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("did not come to pass within 30 s")
		}
	}
}

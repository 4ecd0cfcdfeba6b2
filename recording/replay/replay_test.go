package replay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
	"github.com/sallyport/sallyport/recording/recordingtest"
	"github.com/sallyport/sallyport/recording/replay"
	"github.com/sallyport/sallyport/recording/spool"
	"github.com/sallyport/sallyport/recording/upload"
)

// started is when all recordings of these tests start: today, so that the
// certificates are valid.
var started = time.Now().UTC()

// world is a store that nodes n1 and n2 have recorded sessions in.
type world struct {
	ca    *recordingtest.CA
	nodes map[string]*recordingtest.Node
	dir   string
	store recording.Store
}

// newWorld records a1 to a3 on n1 and b1, b2 on n2; each has 3 segments.
func newWorld(t testing.TB) *world {
	w := &world{ca: recordingtest.NewCA(t), nodes: map[string]*recordingtest.Node{}, dir: t.TempDir()}
	var err error
	if w.store, err = upload.Open(context.Background(), w.dir); err != nil {
		t.Fatal(err)
	}
	w.record(t, "n1", "a1", "a2", "a3")
	w.record(t, "n2", "b1", "b2")
	return w
}

func (w *world) record(t testing.TB, node string, sessions ...string) {
	t.Helper()
	n := w.ca.Node(t, node)
	w.nodes[node] = n
	s, err := spool.Open(spool.Options{Dir: t.TempDir(), Node: node, Cluster: "c", Signer: n.Key, Certificate: n.Cert, Store: w.store, SegmentBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for _, session := range sessions {
		wr, err := s.Begin(recording.Header{Session: session, Kind: "session", Started: started, Subject: "repo:acme/" + session, Target: "prod", Protocol: "postgres", Claims: map[string]any{"ref": "main\x1b[2J"}})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 { // one segment each
			e := recording.Entry{Type: recording.Command, Op: uint64(i + 1), Verb: "Query", Text: fmt.Appendf(nil, "SELECT %d -- \u202e\x1b[31m\n  FROM %s", i, session)}
			if _, err := wr.Append(&e); err != nil {
				t.Fatal(err)
			}
		}
		if err := wr.Close(recording.Ending{Reason: "closed"}); err != nil {
			t.Fatal(err)
		}
	}
	dctx, stop := context.WithTimeout(ctx, 30*time.Second)
	defer stop()
	if err := s.Drain(dctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// path is the file of an object.
func (w *world) path(session, name string) string {
	return filepath.Join(w.dir, filepath.FromSlash(recording.Prefix(started, session)), name)
}

func (w *world) read(t testing.TB, session, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(w.path(session, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (w *world) write(t testing.TB, session, name string, b []byte) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(w.path(session, name)), 0o700), os.WriteFile(w.path(session, name), b, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func (w *world) remove(t testing.TB, session, name string) {
	t.Helper()
	if err := os.RemoveAll(w.path(session, name)); err != nil {
		t.Fatal(err)
	}
}

func (w *world) verify(t testing.TB) *replay.Report {
	t.Helper()
	rep, err := replay.Verify(context.Background(), w.store, replay.VerifyOptions{Trust: replay.Trust{Roots: w.ca.Pool()}})
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func TestVerify(t *testing.T) {
	w := newWorld(t)
	rep := w.verify(t)
	if !rep.OK() || rep.Recordings != 5 || rep.Verified != 5 || rep.Entries != 15 || len(rep.Problems) != 0 {
		t.Fatalf("%+v", rep)
	}
	if len(rep.Chains) != 2 || rep.Chains[0].Node != "n1" || rep.Chains[0].Last != 3 || rep.Chains[1].Recordings != 2 {
		t.Fatalf("%+v", rep.Chains)
	}
	for _, name := range []string{"a2", recording.Prefix(started, "a2")[len(recording.Root) : len(recording.Prefix(started, "a2"))-1]} {
		rep, err := replay.Verify(context.Background(), w.store, replay.VerifyOptions{Trust: replay.Trust{Roots: w.ca.Pool()}, Recording: name})
		if err != nil || !rep.OK() || rep.Verified != 1 {
			t.Fatal(name, rep, err)
		}
	}
	if _, err := replay.Verify(context.Background(), w.store, replay.VerifyOptions{Trust: replay.Trust{Roots: w.ca.Pool()}, Recording: "a9"}); !errors.Is(err, recording.ErrNotFound) {
		t.Fatal(err)
	}
	if _, err := replay.Verify(context.Background(), w.store, replay.VerifyOptions{}); err == nil {
		t.Fatal("verified without roots")
	}
}

// forge rebuilds session with another key: entries that never were, a chain and
// tree that fit. With cert nil the header's own certificate is kept.
func (w *world) forge(t *testing.T, session string, key *recordingtest.Node, cert []byte) {
	t.Helper()
	h, err := format.ParseHeader(w.read(t, session, "header"))
	if err != nil {
		t.Fatal(err)
	}
	if cert == nil {
		cert = h.Certificate.Raw
	}
	h.Header.Subject = "somebody else"
	hb, err := format.SealHeader(&h.Header, cert, key.Key)
	if err != nil {
		t.Fatal(err)
	}
	w.write(t, session, "header", hb)
	w.forgeFrom(t, session, 1, 3, format.Sum(hb), key)
}

// forgeFrom rewrites segments from..to and the trailer.
func (w *world) forgeFrom(t *testing.T, session string, from, to uint64, prev format.Hash, key *recordingtest.Node) {
	t.Helper()
	var tree format.Tree
	for n := uint64(1); n <= to; n++ {
		if n < from {
			s, err := format.ParseSegment(w.read(t, session, recording.SegmentName(n)))
			if err != nil {
				t.Fatal(err)
			}
			tree = s.Tree
			continue
		}
		f, _ := format.AppendEntry(nil, &recording.Entry{LSN: recording.LSN(n), Type: recording.Note, Reason: "nothing happened"})
		tree.Add(format.LeafHash(f[8:]))
		b, err := format.SealSegment(format.SegmentMeta{Session: session, Number: n, First: recording.LSN(n), Last: recording.LSN(n), Prev: prev}, &tree, f, key.Key)
		if err != nil {
			t.Fatal(err)
		}
		w.write(t, session, recording.SegmentName(n), b)
		prev = format.Sum(b)
	}
	b, err := format.SealTrailer(format.TrailerMeta{Session: session, Ending: recording.Ending{Reason: "closed"}, Segments: to, Entries: tree.Size(), Prev: prev, Root: tree.Root()}, key.Key)
	if err != nil {
		t.Fatal(err)
	}
	w.write(t, session, "trailer", b)
}

func (w *world) copyAll(t *testing.T, from, to string) {
	for _, n := range []string{"header", "000001.seg", "000002.seg", "000003.seg", "trailer"} {
		w.write(t, to, n, w.read(t, from, n))
	}
}

// TestTamper: each tampering is found and called by its name; nothing else is
// called broken.
func TestTamper(t *testing.T) {
	base := newWorld(t)
	const seg1, seg2, seg3 = "000001.seg", "000002.seg", "000003.seg"
	swap := func(s1, n1, s2, n2 string) func(*testing.T, *world) {
		return func(t *testing.T, w *world) {
			a, b := w.read(t, s1, n1), w.read(t, s2, n2)
			w.write(t, s1, n1, b)
			w.write(t, s2, n2, a)
		}
	}
	remove := func(session string, names ...string) func(*testing.T, *world) {
		return func(t *testing.T, w *world) {
			for _, n := range names {
				w.remove(t, session, n)
			}
		}
	}
	cut := func(session, name string, by int) func(*testing.T, *world) {
		return func(t *testing.T, w *world) {
			b := w.read(t, session, name)
			w.write(t, session, name, b[:max(0, len(b)-by)])
		}
	}
	type tamper struct {
		name string
		do   func(*testing.T, *world)
		want []string // "kind recording object"; recording as session, "" for none
	}
	tampers := []tamper{
		{"delete a header", remove("a2", "header"), []string{"missing-header a2 header", "missing-recording  "}},
		{"delete the first segment", remove("a2", seg1), []string{"missing-segment a2 " + seg1}},
		{"delete a segment", remove("a2", seg2), []string{"missing-segment a2 " + seg2}},
		{"delete the last segment", remove("a2", seg3), []string{"missing-segment a2 " + seg3}},
		{"delete all segments", remove("a2", seg1, seg2, seg3), []string{"missing-segment a2 " + seg1}},
		{"delete the trailer", remove("a2", "trailer"), []string{"unfinished a2 "}},
		{"delete the end", remove("a2", seg3, "trailer"), []string{"unfinished a2 "}},
		{"delete a recording", remove("a2", ""), []string{"missing-recording  "}},
		{"delete the first recording", remove("b1", ""), []string{"missing-recording  "}},
		{"swap two segments", swap("a2", seg1, "a2", seg2), []string{"reordered a2 " + seg1, "reordered a2 " + seg2}},
		{"swap segments of two sessions", swap("a1", seg2, "a2", seg2), []string{"swapped a1 " + seg2, "swapped a2 " + seg2}},
		{"swap segments of two nodes", swap("a1", seg2, "b1", seg2), []string{"swapped a1 " + seg2, "swapped b1 " + seg2}},
		{"swap headers", swap("a1", "header", "a2", "header"), []string{"swapped a1 header", "swapped a2 header"}},
		{"swap trailers", swap("a1", "trailer", "a2", "trailer"), []string{"swapped a1 trailer", "swapped a2 trailer"}},
		{"segment as trailer", func(t *testing.T, w *world) { w.write(t, "a2", "trailer", w.read(t, "a2", seg3)) }, []string{"altered a2 trailer"}},
		{"cut a header", cut("a2", "header", 1), []string{"truncated a2 header", "missing-recording  "}},
		{"cut a segment", cut("a2", seg2, 40), []string{"truncated a2 " + seg2}},
		{"empty a segment", cut("a2", seg2, 1<<20), []string{"truncated a2 " + seg2}},
		{"cut a trailer", cut("a2", "trailer", 100), []string{"truncated a2 trailer"}},
		{"append to a segment", func(t *testing.T, w *world) { w.write(t, "a2", seg2, append(w.read(t, "a2", seg2), 0)) }, []string{"altered a2 " + seg2}},
		{"a segment too many", func(t *testing.T, w *world) { w.write(t, "a2", "000004.seg", w.read(t, "a2", seg3)) }, []string{"foreign-object a2 000004.seg"}},
		{"a stranger's object", func(t *testing.T, w *world) { w.write(t, "a2", "notes.txt", []byte("x")) }, []string{"foreign-object a2 " + recording.Prefix(started, "a2") + "notes.txt"}},
		{"an object outside", func(t *testing.T, w *world) {
			if err := os.WriteFile(filepath.Join(w.dir, "sessions", "x"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"foreign-object  sessions/x"}},
		{"a copy under another name", func(t *testing.T, w *world) { w.copyAll(t, "a2", "a9") }, []string{"swapped a9 header", "swapped a9 " + seg1, "swapped a9 " + seg2, "swapped a9 " + seg3, "swapped a9 trailer"}},
		{"one recording in place of another", func(t *testing.T, w *world) { w.copyAll(t, "a1", "a2") },
			[]string{"swapped a2 header", "swapped a2 " + seg1, "swapped a2 " + seg2, "swapped a2 " + seg3, "swapped a2 trailer", "missing-recording  "}},
		{"forged by a stranger with a certificate", func(t *testing.T, w *world) {
			x := recordingtest.NewCA(t).Node(t, "n1")
			w.forge(t, "a2", x, x.Cert)
		}, []string{"unknown-certificate a2 header"}},
		{"forged by another node", func(t *testing.T, w *world) { w.forge(t, "a2", w.nodes["n2"], w.nodes["n2"].Cert) }, []string{"unknown-certificate a2 header"}},
		{"forged under the node's certificate", func(t *testing.T, w *world) { w.forge(t, "a2", w.nodes["n2"], nil) },
			[]string{"forged a2 " + seg1, "forged a2 " + seg2, "forged a2 " + seg3, "forged a2 header", "forged a2 trailer"}},
		{"forged from the second segment on", func(t *testing.T, w *world) {
			w.forgeFrom(t, "a2", 2, 3, format.Sum(w.read(t, "a2", seg1)), w.nodes["n2"])
		}, []string{"forged a2 " + seg2, "forged a2 " + seg3, "forged a2 trailer"}},
		{"shortened by the forger", func(t *testing.T, w *world) {
			w.remove(t, "a2", seg3)
			w.forgeFrom(t, "a2", 3, 2, format.Sum(w.read(t, "a2", seg2)), w.nodes["n2"])
		}, []string{"altered a2 trailer"}},
		{"rewritten by the node itself, one segment", func(t *testing.T, w *world) {
			tr := w.read(t, "a2", "trailer")
			s3 := w.read(t, "a2", seg3)
			w.forgeFrom(t, "a2", 2, 2, format.Sum(w.read(t, "a2", seg1)), w.nodes["n1"])
			w.write(t, "a2", "trailer", tr)
			w.write(t, "a2", seg3, s3)
		}, []string{"broken-chain a2 " + seg3}},
		{"header signed twice by the node", func(t *testing.T, w *world) { w.forge(t, "a2", w.nodes["n1"], nil) }, []string{"broken-chain a3 header"}},
		{"two recordings in one place", func(t *testing.T, w *world) {
			h, err := format.ParseHeader(w.read(t, "a2", "header"))
			if err != nil {
				t.Fatal(err)
			}
			h.Header.Session = "a9"
			hb, err := format.SealHeader(&h.Header, w.nodes["n1"].Cert, w.nodes["n1"].Key)
			if err != nil {
				t.Fatal(err)
			}
			w.write(t, "a9", "header", hb)
		}, []string{"forked-chain a9 ", "unfinished a9 "}},
	}
	for _, name := range []string{"header", seg2, "trailer"} {
		tampers = append(tampers, tamper{"flip the last byte of " + name, func(t *testing.T, w *world) {
			b := w.read(t, "a2", name)
			b[len(b)-1] ^= 1
			w.write(t, "a2", name, b)
		}, []string{"altered a2 " + name}})
	}
	for _, c := range tampers {
		t.Run(c.name, func(t *testing.T) {
			w := *base
			w.dir = t.TempDir()
			if err := os.CopyFS(w.dir, os.DirFS(base.dir)); err != nil {
				t.Fatal(err)
			}
			w.store, _ = upload.Open(context.Background(), w.dir)
			c.do(t, &w)
			rep := w.verify(t)
			var got []string
			for _, p := range rep.Problems {
				got = append(got, fmt.Sprintf("%s %s %s", p.Kind, p.Recording[strings.LastIndexByte(p.Recording, '/')+1:], p.Object))
			}
			slices.Sort(got)
			// What is asked for must be there; the rest may only be about the same recordings.
			for _, want := range c.want {
				if !slices.Contains(got, want) {
					t.Errorf("%q was not found", want)
				}
			}
			if len(got) != len(c.want) {
				t.Errorf("found\n%s", strings.Join(got, "\n"))
			}
			for _, p := range rep.Problems {
				t.Log(p)
			}
			if rep.OK() != !slices.ContainsFunc(c.want, func(s string) bool { return !strings.HasPrefix(s, "unfinished") }) {
				t.Error("OK:", rep.OK())
			}
		})
	}
}

// TestFlipEveryByte: no byte of any object can be changed unseen, and neither
// Verify nor reading shows an entry that was not recorded.
func TestFlipEveryByte(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"header", "000002.seg", "trailer"} {
		good := w.read(t, "a2", name)
		step := 3
		if testing.Short() {
			step = 11
		}
		for i := 0; i < len(good); i += step {
			b := bytes.Clone(good)
			b[i] ^= 1 << (i % 8)
			w.write(t, "a2", name, b)
			rep, err := replay.Verify(context.Background(), w.store, replay.VerifyOptions{Trust: replay.Trust{Roots: w.ca.Pool()}, Recording: "a2"})
			if err != nil {
				t.Fatal(err)
			}
			if rep.OK() || rep.Problems[0].Object != name {
				t.Fatalf("%s: byte %d of %d: %v", name, i, len(good), rep.Problems)
			}
		}
		w.write(t, "a2", name, good)
	}
	if rep := w.verify(t); !rep.OK() {
		t.Fatal(rep.Problems)
	}
}

func TestList(t *testing.T) {
	w := newWorld(t)
	list := func(f replay.Filter) string {
		var got []string
		if err := replay.List(context.Background(), w.store, f, func(s replay.Summary) error {
			if s.Err == nil && (s.Ending == nil || s.Entries != 3 || s.Segments != 3) {
				t.Errorf("%+v", s)
			}
			if s.Err != nil {
				s.Header.Session += "!"
			}
			got = append(got, s.Header.Session)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return strings.Join(got, " ")
	}
	day := 24 * time.Hour
	for _, c := range []struct {
		f    replay.Filter
		want string
	}{
		{replay.Filter{}, "a1 a2 a3 b1 b2"},
		{replay.Filter{Node: "n2"}, "b1 b2"},
		{replay.Filter{Subject: "repo:acme/a3"}, "a3"},
		{replay.Filter{Target: "other"}, ""},
		{replay.Filter{From: started, To: started.Add(1)}, "a1 a2 a3 b1 b2"},
		{replay.Filter{From: started.Add(1)}, ""},
		{replay.Filter{To: started}, ""},
		{replay.Filter{From: started.Add(-3 * day), To: started.Add(-2 * day)}, ""},
		{replay.Filter{Match: func(h *recording.Header) bool { return h.NodeSeq == 1 }}, "a1 b1"},
	} {
		if got := list(c.f); got != c.want {
			t.Errorf("%+v: %s", c.f, got)
		}
	}
	w.write(t, "a2", "header", []byte("x"))
	if got := list(replay.Filter{Node: "n2"}); got != "a2! b1 b2" {
		t.Error(got)
	}
	n := 0
	if err := replay.List(context.Background(), w.store, replay.Filter{}, func(replay.Summary) error { n++; return recording.ErrStop }); err != nil || n != 1 {
		t.Error(n, err)
	}
}

func TestPrint(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	trust := replay.Trust{Roots: w.ca.Pool()}
	r, err := replay.Open(ctx, w.store, "a1", trust)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := replay.Print(ctx, &out, r, replay.PrintOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"repo:acme/a1", `main\u{1b}[2J`, "#3 Query", `| SELECT 2 -- \u{202e}\u{1b}[31m`, "|   FROM a1", "ended: closed"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
	if strings.ContainsAny(out.String(), "\x1b\u202e") {
		t.Error("unescaped output")
	}
	if t.Failed() {
		t.Log(out.String())
	}

	// What was before a problem is shown; what is behind it is not.
	b := w.read(t, "a1", "000003.seg")
	b[len(b)-1] ^= 1
	w.write(t, "a1", "000003.seg", b)
	out.Reset()
	var p replay.Problem
	if err := replay.Print(ctx, &out, r, replay.PrintOptions{}); !errors.As(err, &p) || p.Kind != replay.Altered {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, "SELECT 1") || strings.Contains(s, "SELECT 2") || strings.Contains(s, "ended") {
		t.Error(s)
	}
	if _, err := replay.Open(ctx, w.store, "a2", replay.Trust{Roots: recordingtest.NewCA(t).Pool()}); !errors.As(err, &p) || p.Kind != replay.UnknownSigner {
		t.Error(err)
	}
	r, err = replay.Open(ctx, w.store, "a2", trust)
	if err != nil {
		t.Fatal(err)
	}
	for e, err := range r.Entries(ctx) { // leaving early is no problem
		if err != nil || e.LSN != 1 {
			t.Fatal(e, err)
		}
		break
	}
}

// TestFormat: what a formatter writes is escaped and kept behind the bar.
func TestFormat(t *testing.T) {
	w := newWorld(t)
	n := w.ca.Node(t, "n3")
	s, err := spool.Open(spool.Options{Dir: t.TempDir(), Node: "n3", Cluster: "c", Signer: n.Key, Certificate: n.Cert, Store: w.store})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go s.Run(ctx)
	wr, err := s.Begin(recording.Header{Session: "c1", Started: started, Protocol: "postgres"})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []recording.Entry{
		{Type: recording.Decided, Op: 1, Effect: "permit", Rule: "r\n1", PolicyIndex: 5, Actions: []string{"postgres:select a"}},
		{Type: recording.Approval, Op: 1, Effect: "granted", Actor: "alice"},
		{Type: recording.Response, Op: 1, Data: []byte("D")},
		{Type: recording.Outcome, Op: 1, Effect: "ok", Rows: 2, Duration: time.Millisecond},
		{Type: recording.Cut, Rule: "revocation 1", Reason: "left"},
		{Type: recording.Note, Reason: "note"},
	} {
		if err := wr.Buffer(&e); err != nil {
			t.Fatal(err)
		}
	}
	wr.Close(recording.Ending{Reason: "revoked"})
	if err := s.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	s.Close()
	r, err := replay.Open(ctx, w.store, "c1", replay.Trust{Roots: w.ca.Pool()})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	err = replay.Print(ctx, &out, r, replay.PrintOptions{Speed: 1e6, Format: func(w io.Writer, protocol string, e *recording.Entry) error {
		_, err := fmt.Fprintf(w, "%s row\n+0.000s  #9 fake\x1b", protocol)
		return err
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`permit, rule r\u{0a}1 (policy index 5)`, "approval granted, by alice", "| postgres row\n", `| +0.000s  #9 fake\u{1b}` + "\n", "ok, 2 rows, 1ms", "CUT, rule revocation 1, left", "ended: revoked"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
}

// TestRememberedCertificates: a certificate that was found good once is good at
// the times it is valid at, and no other becomes good.
func TestRememberedCertificates(t *testing.T) {
	w := newWorld(t)
	trust := replay.Trust{Roots: w.ca.Pool()}
	trust.Remember()
	item := func(session string) replay.Item {
		it, err := replay.Find(t.Context(), w.store, session)
		if err != nil {
			t.Fatal(err)
		}
		return it
	}
	read := func(session string) *replay.Result {
		res, err := item(session).Read(t.Context(), w.store, trust, replay.Reading{})
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	for range 2 {
		if res := read("a1"); !res.Verified() || !res.Believed {
			t.Fatalf("%+v", res)
		}
	}
	// The same certificate, for a session long before it was valid.
	n := w.nodes["n1"]
	old := started.Add(-24 * time.Hour)
	hb, err := format.SealHeader(&recording.Header{Session: "old", Node: "n1", Started: old, Chain: "c0ffee", NodeSeq: 1}, n.Cert, n.Key)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.store.Put(t.Context(), recording.Prefix(old, "old")+"header", hb); err != nil {
		t.Fatal(err)
	}
	if res := read("old"); res.Believed || res.Problems[0].Kind != replay.UnknownSigner {
		t.Errorf("a certificate that was not valid yet: %+v", res)
	}
	stranger := recordingtest.NewCA(t).Node(t, "n1")
	w.forge(t, "a2", stranger, stranger.Cert)
	if res := read("a2"); res.Believed || res.Verified() {
		t.Errorf("a stranger's certificate: %+v", res)
	}
	// A good one, but another node's.
	w.forge(t, "a3", w.nodes["n2"], w.nodes["n2"].Cert)
	read("b1")
	if res := read("a3"); res.Believed || res.Verified() {
		t.Errorf("another node's certificate: %+v", res)
	}
}

// TestItems: what a listing tells of a recording, and a reading that is ended.
func TestItems(t *testing.T) {
	w := newWorld(t)
	w.remove(t, "b2", "trailer")
	trust := replay.Trust{Roots: w.ca.Pool()}
	var names []string
	err := replay.Items(t.Context(), w.store, time.Time{}, time.Time{}, func(i replay.Item) error {
		session := i.Name()[len(i.Day())+1:]
		names = append(names, session)
		var size int64
		files, _ := os.ReadDir(w.path(session, ""))
		for _, f := range files {
			info, err := f.Info()
			if err != nil {
				t.Fatal(err)
			}
			size += info.Size()
		}
		if i.Objects() != len(files) || i.Bytes() != size || i.Finished() != (session != "b2") {
			t.Errorf("%s: %d objects, %d bytes, finished: %v", i.Name(), i.Objects(), i.Bytes(), i.Finished())
		}
		n := 0
		stop := errors.New("stop")
		if _, err := i.Read(t.Context(), w.store, trust, replay.Reading{Each: func(*recording.Entry) error { n++; return stop }}); !errors.Is(err, stop) || n != 1 {
			t.Errorf("%s: %d entries, %v", session, n, err)
		}
		if _, err := i.Read(t.Context(), w.store, trust, replay.Reading{Want: func(h *recording.Header) bool { return h.Session != session }}); !errors.Is(err, recording.ErrStop) {
			t.Errorf("%s: %v", session, err)
		}
		return nil
	})
	if err != nil || strings.Join(names, " ") != "a1 a2 a3 b1 b2" {
		t.Error(names, err)
	}
}

// TestSteps: a recording is cut at its commands, and what is broken ends it.
func TestSteps(t *testing.T) {
	w := newWorld(t)
	steps := func(session string) (texts []string, last error) {
		r, err := replay.Open(t.Context(), w.store, session, replay.Trust{Roots: w.ca.Pool()})
		if err != nil {
			t.Fatal(err)
		}
		for s, err := range replay.Steps(t.Context(), r, nil) {
			if err != nil {
				return texts, err
			}
			if s.N != len(texts) {
				t.Errorf("step %d comes after %d", s.N, len(texts))
			}
			texts = append(texts, s.Text)
		}
		return texts, nil
	}
	got, err := steps("a1")
	if err != nil || len(got) != 4 || !strings.Contains(got[0], "repo:acme/a1") || !strings.Contains(got[2], "SELECT 1") || !strings.Contains(got[3], "ended: closed") {
		t.Errorf("%q %v", got, err)
	}
	b := w.read(t, "a2", "000003.seg")
	b[len(b)/2] ^= 1
	w.write(t, "a2", "000003.seg", b)
	var p replay.Problem
	if got, err := steps("a2"); len(got) != 3 || !errors.As(err, &p) {
		t.Errorf("%q %v", got, err)
	}
}

// TestDayItems: a day that is listed in parts has each recording once and in
// order, whatever its name begins with.
func TestDayItems(t *testing.T) {
	const names = "-0123456789ABCXYZ_abcdefghijklmnopqrstuvwxyz."
	day := started.Format("2006/01/02")
	for _, count := range []int{0, 1, 1999, 2000, 2001, 3500} {
		dir := t.TempDir()
		store, err := upload.Open(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		put := func(key string) {
			path := filepath.Join(dir, "sessions", filepath.FromSlash(key))
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("x"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		for i := range count {
			session := fmt.Sprintf("%c%c%d", names[i%(len(names)-1)], names[i/7%len(names)], i)
			put(day + "/" + session + "/header")
			if i%3 == 0 {
				put(day + "/" + session + "/trailer")
			}
		}
		put(started.AddDate(0, 0, -1).Format("2006/01/02") + "/before/header")
		put(started.AddDate(0, 0, 1).Format("2006/01/02") + "/after/header")
		put(day + "/e") // belongs to none, where the listing is cut
		var want []string
		err = replay.Items(t.Context(), store, started, started, func(i replay.Item) error {
			want = append(want, fmt.Sprint(i.Name(), i.Objects(), i.Bytes(), i.Finished()))
			return nil
		})
		if err != nil || len(want) != count {
			t.Fatal(len(want), err)
		}
		items, err := replay.DayItems(t.Context(), store, day, 10_000)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, i := range items {
			got = append(got, fmt.Sprint(i.Name(), i.Objects(), i.Bytes(), i.Finished()))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%d recordings: %d were listed, or in another order", count, len(got))
		}
		if count > 0 {
			if _, err := replay.DayItems(t.Context(), store, day, count-1); err == nil {
				t.Errorf("%d recordings where %d are the most", count, count-1)
			}
			if items, err := replay.DayItems(t.Context(), store, day, count); err != nil || len(items) != count {
				t.Error(len(items), err)
			}
		}
	}
	if _, err := replay.DayItems(t.Context(), nil, "2026/13/01", 1); err == nil {
		t.Error("2026/13/01 is a day")
	}
}

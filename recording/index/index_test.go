package index_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
	"github.com/sallyport/sallyport/recording/index"
	"github.com/sallyport/sallyport/recording/recordingtest"
	"github.com/sallyport/sallyport/recording/recordingtest/recorder"
	"github.com/sallyport/sallyport/recording/recordingtest/s3server"
	"github.com/sallyport/sallyport/recording/replay"
	"github.com/sallyport/sallyport/recording/upload"
)

// started is when all sessions of these tests begin: now, so that the
// certificates are valid.
var started = time.Now().UTC().Truncate(time.Millisecond)

// world is a store that two nodes have recorded sessions in, one of which goes on.
type world struct {
	t     *testing.T
	store recording.Store
	dir   string // of a directory store
	trust replay.Trust
	node  *recordingtest.Node
}

func newWorld(t *testing.T, location string) *world {
	t.Helper()
	w := &world{t: t, dir: location}
	var err error
	if w.store, err = upload.Open(t.Context(), location); err != nil {
		t.Fatal(err)
	}
	ca := recordingtest.NewCA(t)
	w.trust = replay.Trust{Roots: ca.Pool()}
	r := recorder.Start(t, ca, "n1", w.store, "")
	w.node = r.Node
	claims := func(repo, sha, ref string) map[string]any {
		return map[string]any{"repository": repo, "sha": sha, "ref": ref, "run_id": "4711", "actor": "dana"}
	}
	head := func(session, subject, database string, claims map[string]any) recording.Header {
		return recording.Header{Session: session, Started: started, Subject: subject, SubjectKind: "Workload", Target: "prod", Database: database, Protocol: "postgres", Claims: claims}
	}
	cat := func(parts ...[]recording.Entry) []recording.Entry { return slices.Concat(parts...) }
	r.Session(head("a1", "ci/acme-shop", "shop", claims("acme/shop", "4f2c1e9aa", "refs/heads/main")), cat(
		recorder.Statement(1, "SELECT *\n   FROM users", "permit", "ci-work", "postgres:select prod.shop.public.users", "postgres:select prod.shop.public.users.email"),
		recorder.Statement(2, "DROP TABLE orders", "refuse", "no-drop", "postgres:drop_table prod.shop.public.orders"))...)
	r.Session(head("a2", "ci/acme-shop", "shop", claims("acme/shop", "77aa00bb11", "refs/pull/42/merge")), cat(
		recorder.Statement(1, "delete from Orders where id = 1", "permit", "ci-work", "postgres:delete prod.shop.public.orders"))...)
	r.Session(head("a3", "ci/acme-web", "web", map[string]any{"project_path": "acme/web", "pipeline_id": "9"}), cat(
		recorder.Statement(1, "TRUNCATE pages", "hold", "schema", "postgres:truncate prod.web.public.pages"),
		[]recording.Entry{{Type: recording.Approval, Op: 1, Effect: "granted", Actor: "sso/robin", Approval: "x"}})...)
	n := recorder.Start(t, ca, "n2", w.store, "")
	n.Session(recording.Header{Session: "node-n2-x", Kind: "node", Started: started},
		recording.Entry{Type: recording.Decided, Verb: "login", Effect: "refuse", Rule: "expired", Actor: "ci/acme-web"})
	live := n.Begin(head("b1", "sso/robin", "shop", nil))
	for _, e := range recorder.Statement(1, "SELECT now()", "permit", "people", "postgres:select prod.shop") {
		if _, err := live.Append(&e); err != nil {
			t.Fatal(err)
		}
	}
	r.Close()
	n.Drain()
	w.await("b1")
	return w
}

// await waits until the first segment of a live session is in the store.
func (w *world) await(session string) {
	w.t.Helper()
	key := recording.Prefix(started, session) + recording.SegmentName(1)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) { // the spool seals when it is old enough
		if _, err := w.store.Get(w.t.Context(), key); err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatal(key, "did not come")
		}
	}
}

func (w *world) search(q index.Query, stores ...recording.Store) ([]*index.Hit, *index.Stats) {
	w.t.Helper()
	var hits []*index.Hit
	st, err := index.Search(w.t.Context(), w.store, q, index.Options{Trust: w.trust, Index: stores}, func(h *index.Hit) error {
		hits = append(hits, h)
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return hits, st
}

func (w *world) build(o index.BuildOptions) *index.BuildReport {
	w.t.Helper()
	o.Trust = w.trust
	if o.Index == nil {
		o.Index, o.Write = []recording.Store{w.store}, w.store
	}
	rep, err := index.Build(w.t.Context(), w.store, o)
	if err != nil {
		w.t.Fatal(err)
	}
	return rep
}

func sessions(hits []*index.Hit) string {
	var out []string
	for _, h := range hits {
		out = append(out, h.Header.Session)
	}
	return strings.Join(out, " ")
}

var queries = []struct {
	q    index.Query
	want string
	// falsely is how many recordings that do not match the index cannot rule out,
	// b1 aside, which it does not cover.
	falsely int
}{
	{index.Query{}, "a1 a2 a3 b1 node-n2-x", 0},
	{index.Query{Subject: "ci/acme-shop"}, "a1 a2", 0},
	{index.Query{Subject: "ci/*"}, "a1 a2 a3", 0},
	{index.Query{Subject: "*shop"}, "a1 a2", 0},
	{index.Query{Subject: "ci"}, "", 0},
	{index.Query{Repository: "acme/web"}, "a3", 0},
	{index.Query{Commit: "4F2C1"}, "a1", 0},
	{index.Query{PullRequest: "42"}, "a2", 0},
	{index.Query{Run: "4711"}, "a1 a2", 0},
	{index.Query{Run: "9"}, "a3", 0},
	{index.Query{Claims: []string{"actor=dana", "run_id=4711"}}, "a1 a2", 0},
	{index.Query{Claims: []string{"actor=dan"}}, "", 0},
	{index.Query{Database: "web"}, "a3", 0},
	{index.Query{Kind: "node"}, "node-n2-x", 0},
	{index.Query{Node: "n2"}, "b1 node-n2-x", 0},
	{index.Query{Action: "postgres:drop_*"}, "a1", 0},
	{index.Query{Table: "orders"}, "a1 a2", 0},
	{index.Query{Table: "public.orders"}, "a1 a2", 0},
	{index.Query{Table: "rders"}, "", 0},
	{index.Query{Table: "users.email"}, "a1", 0},
	{index.Query{Table: "orders", Action: "postgres:delete"}, "a2", 0},
	{index.Query{Decision: "refuse"}, "a1 node-n2-x", 0},
	{index.Query{Rule: "schema"}, "a3", 0},
	{index.Query{Actor: "sso/robin"}, "a3", 0},
	{index.Query{Actor: "ci/acme-web"}, "node-n2-x", 0},
	{index.Query{Text: "select * from USERS"}, "a1", 0},
	{index.Query{Text: "no"}, "b1", 4},
	{index.Query{Text: "orders"}, "a1 a2", 0},
	{index.Query{Text: "nothing like it"}, "", 0},
	// All of one operation: a1 selects from users and is refused a DROP.
	{index.Query{Text: "select", Decision: "refuse"}, "", 1},
	{index.Query{Table: "users", Decision: "refuse"}, "", 1},
	{index.Query{Table: "orders", Decision: "refuse"}, "a1", 0},
	{index.Query{From: started.Add(-time.Hour), To: started.Add(time.Hour)}, "a1 a2 a3 b1 node-n2-x", 0},
	{index.Query{To: started}, "", 0},
	{index.Query{From: started.Add(time.Hour)}, "b1", 0},
	{index.Query{From: started.Add(time.Minute), Kind: "session", Subject: "ci/*"}, "", 0},
	{index.Query{From: started.Add(1500 * time.Millisecond), Text: "SELECT *"}, "", 1}, // it was sent before
}

func testQueries(t *testing.T, w *world, stores ...recording.Store) {
	t.Helper()
	for _, c := range queries {
		hits, st := w.search(c.q, stores...)
		if got := sessions(hits); got != c.want {
			t.Errorf("%+v finds %q, want %q", c.q, got, c.want)
		}
		for _, h := range hits {
			want := "verified"
			if h.Header.Session == "b1" {
				want = "unfinished"
			}
			if h.State != want || h.Contradicted {
				t.Errorf("%s is %s: %s; contradicted: %v", h.Name, h.State, h.Problem, h.Contradicted)
			}
		}
		if len(st.Broken)+len(st.BadFiles)+len(st.Contradicted) > 0 {
			t.Errorf("%+v: %+v", c.q, st)
		}
		switch {
		case len(stores) == 0 && (st.LookedUp != 0 || st.Scanned != st.Listed):
			t.Errorf("without an index: %+v", st)
		case len(stores) > 0 && st.Listed > 0 && (st.LookedUp != 4 || st.Scanned != 1):
			t.Errorf("with an index: %+v", st)
		case len(stores) > 0 && st.Read > len(hits)+1+c.falsely:
			t.Errorf("%+v: %d hits, and %d recordings were read", c.q, len(hits), st.Read)
		}
	}
}

func TestSearch(t *testing.T) {
	w := newWorld(t, t.TempDir())
	t.Run("scanned", func(t *testing.T) { testQueries(t, w) })
	if rep := w.build(index.BuildOptions{}); rep.Rows != 4 || rep.Unfinished != 1 || rep.Written != 1 {
		t.Fatalf("%+v", rep)
	}
	t.Run("indexed", func(t *testing.T) { testQueries(t, w, w.store) })
	hits, _ := w.search(index.Query{Table: "orders"}, w.store)
	want := index.Operation{LSN: 5, Op: 2, At: started.Add(5 * time.Second), Verb: "Query", Decision: "refuse", Rule: "no-drop", Text: "DROP TABLE orders", Actions: []string{"postgres:drop_table prod.shop.public.orders"}}
	if got := hits[0].Operations; len(got) != 1 || !reflect.DeepEqual(got[0], want) || hits[0].Matches != 1 {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	for _, q := range []index.Query{{From: started, To: started}, {Claims: []string{"x"}}, {Commit: "4f"}, {Table: "."}} {
		if _, err := index.Search(t.Context(), w.store, q, index.Options{Trust: w.trust}, nil); err == nil {
			t.Errorf("%+v was taken", q)
		}
	}
	_, err := index.Search(t.Context(), w.store, index.Query{}, index.Options{}, nil)
	if err == nil {
		t.Error("searched without knowing whose signatures count")
	}
	n := 0
	st, err := index.Search(t.Context(), w.store, index.Query{}, index.Options{Trust: w.trust, Limit: 2}, func(*index.Hit) error { n++; return nil })
	if err != nil || n != 2 || !st.More {
		t.Error(n, st, err)
	}
}

func TestSearchS3(t *testing.T) {
	srv := s3server.Start(t)
	w := newWorld(t, srv.URL("x"))
	testQueries(t, w)
	w.build(index.BuildOptions{})
	testQueries(t, w, w.store)
}

// TestLocalIndex: who may only read keeps an index of his own.
func TestLocalIndex(t *testing.T) {
	w := newWorld(t, t.TempDir())
	local, err := upload.Open(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	w.build(index.BuildOptions{Index: []recording.Store{w.store, local}, Write: local})
	if _, err := os.Stat(filepath.Join(w.dir, "index")); err == nil {
		t.Error("the store was written to")
	}
	testQueries(t, w, w.store, local)
}

func TestBuild(t *testing.T) {
	w := newWorld(t, t.TempDir())
	a := index.NewAppender(w.store, w.trust, slog.New(slog.DiscardHandler))
	day := started.Format("2006/01/02/")
	for _, s := range []string{"a1", "a2", "node-n2-x"} {
		a.Stored(day + s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- a.Run(ctx) }()
	// A stopped Appender writes what it has; it has all when nothing waits.
	for deadline := time.Now().Add(20 * time.Second); a.Waiting() > 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond) // its reading ends by itself
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, st := w.search(index.Query{}, w.store); st.LookedUp < 2 || st.IndexFiles != 1 {
		t.Fatalf("what a node added: %+v", st)
	}
	if rep := w.build(index.BuildOptions{}); rep.Rows != 4 || rep.Written != 1 || rep.Read > 2 {
		t.Fatalf("put together: %+v", rep)
	}
	if rep := w.build(index.BuildOptions{}); rep.Written != 0 || rep.Read != 0 {
		t.Fatalf("again: %+v", rep)
	}
	if rep := w.build(index.BuildOptions{Check: true}); rep.Read != 4 || len(rep.Contradicted) != 0 || rep.Written != 0 {
		t.Fatalf("checked: %+v", rep)
	}
	if rep := w.build(index.BuildOptions{Rebuild: true}); rep.Read != 4 || rep.Written != 1 {
		t.Fatalf("rebuilt: %+v", rep)
	}
	if _, st := w.search(index.Query{}, w.store); st.LookedUp != 4 || st.IndexFiles != 1 {
		t.Fatalf("after all: %+v", st)
	}
}

// TestHostileIndex: what is done to the index costs time, never a hit that the
// listing can lead to; a row that is false is found by reading, and named.
func TestHostileIndex(t *testing.T) {
	day := started.Format("2006/01/02")
	q := index.Query{Table: "orders"}
	const want = "a1 a2"
	key := func(name string) string { return "index/" + day + "/" + name }
	lie := func(change func(*index.Row)) func(*testing.T, *world) {
		return func(t *testing.T, w *world) {
			rows := w.rows(day)
			for i := range rows {
				change(&rows[i])
			}
			w.replace(day, index.Encode(t, day, 1, nil, rows))
		}
	}
	for _, c := range []struct {
		name   string
		do     func(*testing.T, *world)
		check  func(*index.Stats, []*index.Hit) bool
		misses bool
	}{
		{name: "garbage", do: func(t *testing.T, w *world) { w.put(key("node.n1.1.1.parquet"), []byte("garbage")) },
			check: func(s *index.Stats, _ []*index.Hit) bool { return len(s.BadFiles) == 1 && s.LookedUp == 4 }},
		{name: "a later generation without rows", do: func(t *testing.T, w *world) {
			w.put(key("day.000009.0001.parquet"), index.Encode(t, day, 1, []string{"day.000001.0001.parquet"}, nil))
		}, check: func(s *index.Stats, _ []*index.Hit) bool { return s.Scanned == 5 && s.LookedUp == 0 }},
		{name: "a later generation of which a part is missing", do: func(t *testing.T, w *world) {
			w.put(key("day.000009.0001.parquet"), index.Encode(t, day, 2, nil, nil))
		}, check: func(s *index.Stats, _ []*index.Hit) bool { return len(s.BadFiles) == 1 && s.LookedUp == 4 }},
		{name: "rows of other days and of nothing", do: lie(func(r *index.Row) { r.Name = strings.Replace(r.Name, "a", "z", 1) }),
			check: func(s *index.Stats, _ []*index.Hit) bool { return s.Scanned == 4 }},
		{name: "rows of what was there before", do: lie(func(r *index.Row) { r.Bytes-- }),
			check: func(s *index.Stats, _ []*index.Hit) bool { return s.Scanned == 5 }},
		{name: "rows that say too much", do: lie(func(r *index.Row) { r.Resources = append(r.Resources, "prod.shop.public.orders") }),
			check: func(s *index.Stats, h []*index.Hit) bool {
				return len(s.Contradicted) == 2 && h[0].Contradicted && h[1].Contradicted
			}},
		{name: "a live session's row", do: func(t *testing.T, w *world) {
			rows := w.rows(day)
			it, err := replay.Find(t.Context(), w.store, "b1")
			if err != nil {
				t.Fatal(err)
			}
			rows = append(rows, index.Row{Name: it.Name(), Objects: int32(it.Objects()), Bytes: it.Bytes()})
			w.replace(day, index.Encode(t, day, 1, nil, rows))
		}, check: func(s *index.Stats, _ []*index.Hit) bool { return s.Scanned == 1 }},
		{name: "the file of another day", do: func(t *testing.T, w *world) {
			w.replace(day, index.Encode(t, "2020/01/01", 1, nil, w.rows(day)))
		}, check: func(s *index.Stats, _ []*index.Hit) bool { return len(s.BadFiles) == 1 && s.Scanned == 5 }},
		{name: "rows that say too little", misses: true, do: lie(func(r *index.Row) { r.Resources = nil }),
			check: func(s *index.Stats, _ []*index.Hit) bool { return true }},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, t.TempDir())
			w.build(index.BuildOptions{})
			c.do(t, w)
			hits, st := w.search(q, w.store)
			if got := sessions(hits); got != want && !c.misses || !c.check(st, hits) {
				t.Errorf("finds %q, %+v", got, st)
			}
			if hits, _ := w.search(q); sessions(hits) != want {
				t.Error("without the index:", sessions(hits))
			}
			rep := w.build(index.BuildOptions{Check: true})
			if c.misses && len(rep.Contradicted) == 0 {
				t.Error("the false rows are not named")
			}
			w.build(index.BuildOptions{Rebuild: true})
			if hits, st := w.search(q, w.store); sessions(hits) != want || st.LookedUp != 4 || len(st.Contradicted) != 0 {
				t.Errorf("after rebuilding: %q %+v", sessions(hits), st)
			}
		})
	}
}

// TestBroken: a recording that was tampered with is not in the index, and a
// search says that it cannot tell what it held.
func TestBroken(t *testing.T) {
	w := newWorld(t, t.TempDir())
	path := filepath.Join(w.dir, filepath.FromSlash(recording.Prefix(started, "a2")), recording.SegmentName(1))
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	rep := w.build(index.BuildOptions{})
	if rep.Rows != 3 || len(rep.Broken) != 1 {
		t.Fatalf("%+v", rep)
	}
	for _, stores := range [][]recording.Store{nil, {w.store}} {
		hits, st := w.search(index.Query{Text: "delete from orders"}, stores...)
		if len(hits) != 0 || len(st.Broken) != 1 || !strings.HasSuffix(st.Broken[0], "/a2") {
			t.Errorf("%v: %+v", sessions(hits), st)
		}
		hits, _ = w.search(index.Query{Repository: "acme/shop"}, stores...)
		if sessions(hits) != "a1 a2" || hits[1].State != "broken" || hits[1].Problem == "" {
			t.Errorf("%v", sessions(hits))
		}
	}
	// A header that somebody else signed is not believed to be no match.
	h, err := format.SealHeader(&recording.Header{Session: "a1", Kind: "session", Node: "n1", Started: started, Subject: "nobody", NodeSeq: 1}, w.node.Cert, recordingtest.NewCA(t).Node(t, "n1").Key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, filepath.FromSlash(recording.Prefix(started, "a1")), "header"), h, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, st := w.search(index.Query{Subject: "ci/acme-shop"}, w.store); !slices.ContainsFunc(st.Broken, func(s string) bool { return strings.HasSuffix(s, "/a1") }) {
		t.Errorf("a forged header: %+v", st)
	}
}

// TestManyStatements: a recording with more different texts than its row has
// room for is found all the same.
func TestManyStatements(t *testing.T) {
	w := newWorld(t, t.TempDir())
	ca := recordingtest.NewCA(t)
	w.trust = replay.Trust{Roots: ca.Pool()}
	dir := t.TempDir()
	var err error
	if w.store, err = upload.Open(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	r := recorder.Start(t, ca, "n1", w.store, "")
	var entries []recording.Entry
	x := uint64(1)
	for op := range uint64(3000) {
		var text []byte
		for range 40 {
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
			text = append(text, ' '+byte(x%90))
		}
		entries = append(entries, recording.Entry{Type: recording.Command, Op: op + 1, Text: text, Actions: []string{fmt.Sprintf("postgres:select t%d", op)}})
	}
	entries = append(entries, recording.Entry{Type: recording.Command, Op: 4000, Text: []byte("the needle"), Actions: []string{"postgres:select haystack"}})
	r.Session(recording.Header{Session: "big", Started: started}, entries...)
	r.Close()
	w.build(index.BuildOptions{})
	for _, q := range []index.Query{{Text: "The  Needle"}, {Table: "haystack"}} {
		if hits, st := w.search(q, w.store); sessions(hits) != "big" || st.LookedUp != 1 {
			t.Errorf("%+v: %q %+v", q, sessions(hits), st)
		}
	}
}

func (w *world) put(key string, b []byte) {
	w.t.Helper()
	if err := w.store.Put(w.t.Context(), key, b); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) indexPath(day string) string {
	return filepath.Join(w.dir, "index", filepath.FromSlash(day), "day.000001.0001.parquet")
}

// rows are those of the day's first generation.
func (w *world) rows(day string) []index.Row {
	w.t.Helper()
	b, err := os.ReadFile(w.indexPath(day))
	if err != nil {
		w.t.Fatal(err)
	}
	return index.Decode(w.t, b)
}

func (w *world) replace(day string, b []byte) {
	w.t.Helper()
	if err := os.WriteFile(w.indexPath(day), b, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// TestSeveralDays: all days of a store are listed, each once and in order, and
// those alone that are asked for.
func TestSeveralDays(t *testing.T) {
	w := newWorld(t, t.TempDir())
	day := func(back int) string { return started.AddDate(0, 0, -back).Format("2006/01/02") }
	for back := 1; back <= 9; back++ {
		w.put("sessions/"+day(back)+"/old/header", []byte("not one"))
	}
	w.put("sessions/notes", []byte("of no day"))
	for _, c := range []struct {
		q    index.Query
		want int // days before today
	}{
		{index.Query{}, 9},
		{index.Query{From: started.AddDate(0, 0, -4)}, 6}, // and two in which it can have begun
		{index.Query{To: started.AddDate(0, 0, -4)}, 6},
	} {
		_, st := w.search(c.q, w.store)
		var broken []string
		for _, n := range st.Broken {
			broken = append(broken, n[:len("2006/01/02")])
		}
		if len(broken) != c.want || !slices.IsSorted(broken) || len(slices.Compact(broken)) != c.want {
			t.Errorf("%+v looks at %q", c.q, st.Broken)
		}
	}
	days, err := replay.Days(t.Context(), w.store, started.AddDate(0, 0, -3), started.AddDate(0, 0, -2))
	if err != nil || !slices.Equal(days, []string{day(3), day(2)}) {
		t.Error(days, err)
	}
}

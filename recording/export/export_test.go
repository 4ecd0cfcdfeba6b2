package export_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/html"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/columnar"
	"github.com/sallyport/sallyport/recording/export"
	"github.com/sallyport/sallyport/recording/recordingtest"
	"github.com/sallyport/sallyport/recording/recordingtest/recorder"
	"github.com/sallyport/sallyport/recording/replay"
	"github.com/sallyport/sallyport/recording/terminal"
	"github.com/sallyport/sallyport/recording/upload"
)

var started = time.Now().UTC().Truncate(time.Millisecond)

// evil is what somebody would have a reader's terminal or browser do.
const evil = "\x1b]0;owned\a\x1b[2J\u202e</pre><script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u200b\u2066é"

type world struct {
	store recording.Store
	dir   string
	ca    *recordingtest.CA
	node  *recordingtest.Node
}

// newWorld records a session that is evil wherever a caller or a target can be.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{dir: t.TempDir(), ca: recordingtest.NewCA(t)}
	var err error
	if w.store, err = upload.Open(t.Context(), w.dir); err != nil {
		t.Fatal(err)
	}
	r := recorder.Start(t, w.ca, "n1", w.store, "")
	w.node = r.Node
	entries := recorder.Statement(1, "SELECT '"+evil+"'\n  FROM users", "permit", "ci-work", "postgres:select prod.shop.public.users", "postgres:select prod.shop.public.users.email")
	entries[2].Data = recorder.Result("col"+evil, "val"+evil)
	entries = slices.Concat(entries,
		recorder.Statement(2, "DROP TABLE orders", "refuse", "no-drop", "postgres:drop_table prod.shop.public.orders"),
		[]recording.Entry{
			{Type: recording.Command, Op: 3, Verb: "Query", Text: []byte("INSERT \xff")},
			{Type: recording.Decided, Op: 3, Effect: "hold", Rule: "r" + evil, Reason: evil, Actions: []string{"postgres:truncate prod.shop.public.b", "postgres:insert prod.shop.public.a"}},
			{Type: recording.Approval, Op: 3, Effect: "granted", Actor: "sso/" + evil, Approval: "abc"},
			{Type: recording.Decided, Op: 3, Effect: "permit", Rule: "ci-work", Actions: []string{"postgres:truncate prod.shop.public.b", "postgres:insert prod.shop.public.a"}},
			{Type: recording.Outcome, Op: 3, Effect: "error", Reason: evil, Duration: time.Second},
			{Type: recording.Note, Reason: evil, Detail: map[string]string{evil: evil}},
		})
	r.Session(recording.Header{
		Session: "s1", Started: started, Subject: "ci/" + evil, SubjectKind: "Workload", Issuer: "https://issuer", Groups: []string{"ci", evil},
		Claims: map[string]any{"repository": "acme/shop", "sha": "4f2c", "x" + evil: evil}, Client: "10.0.0.9", Protocol: "postgres",
		Target: "prod", Database: "shop", Labels: map[string]string{"application_name": evil, "rule": "ci-connect"},
	}, entries...)
	r.Session(recording.Header{Session: "node-n1", Kind: "node", Started: started}, recording.Entry{Type: recording.Decided, Verb: "login", Effect: "refuse"})
	r.Close()
	return w
}

func (w *world) export(t *testing.T, session string, o export.Options) ([]byte, *replay.Result) {
	t.Helper()
	item, err := replay.Find(t.Context(), w.store, session)
	if err != nil {
		t.Fatal(err)
	}
	o.Trust = replay.Trust{Roots: w.ca.Pool()}
	o.Authorities = []*x509.Certificate{w.ca.Cert}
	o.Version = "1"
	var b bytes.Buffer
	res, err := export.Write(t.Context(), &b, w.store, item, o)
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), res
}

func (w *world) path(name string) string {
	return filepath.Join(w.dir, filepath.FromSlash(recording.Prefix(started, "s1")), name)
}

// texts are formats that a terminal may be shown.
var texts = []export.Format{export.JSONL, export.OCSF, export.AsciicastV2, export.AsciicastV3, export.HTML}

// TestNothingEscapes: no text that is exported does anything to a terminal.
func TestNothingEscapes(t *testing.T) {
	w := newWorld(t)
	for _, f := range texts {
		b, _ := w.export(t, "s1", export.Options{Format: f})
		if s := string(b); terminal.EscapeString(s) != s {
			t.Errorf("%s holds what a terminal would act on", f)
		}
	}
}

func lines(t *testing.T, b []byte) []map[string]any {
	t.Helper()
	var out []map[string]any
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		var m map[string]any
		if err := json.Unmarshal(sc.Bytes(), &m); err != nil {
			t.Fatalf("%v: %s", err, sc.Bytes())
		}
		out = append(out, m)
	}
	return out
}

func TestJSONL(t *testing.T) {
	w := newWorld(t)
	b, res := w.export(t, "s1", export.Options{Format: export.JSONL})
	l := lines(t, b)
	if len(l) != int(res.Entries)+2 || !res.Verified() {
		t.Fatalf("%d lines of %d entries", len(l), res.Entries)
	}
	if got := l[0]["header"].(map[string]any)["subject"]; got != "ci/"+evil {
		t.Errorf("the subject became %q", got)
	}
	v := l[0]["verification"].(map[string]any)
	sum := sha256.Sum256(w.node.Cert)
	if v["state"] != "verified" || v["certificates"].([]any)[0].(map[string]any)["sha256"] != hex.EncodeToString(sum[:]) {
		t.Errorf("%v", v)
	}
	if l[1]["type"] != "command" || l[1]["text"] != "SELECT '"+evil+"'\n  FROM users" {
		t.Errorf("%v", l[1])
	}
	data, err := base64.StdEncoding.DecodeString(l[3]["data_base64"].(string))
	if err != nil || !bytes.Equal(data, recorder.Result("col"+evil, "val"+evil)) {
		t.Errorf("%v %v", l[3], err)
	}
	if got, _ := base64.StdEncoding.DecodeString(l[7]["text_base64"].(string)); string(got) != "INSERT \xff" {
		t.Errorf("%v", l[7])
	}
	if last := l[len(l)-1]; last["type"] != "end" || last["ending"].(map[string]any)["reason"] != "closed" {
		t.Errorf("%v", last)
	}
}

func TestOCSF(t *testing.T) {
	w := newWorld(t)
	b, _ := w.export(t, "s1", export.Options{Format: export.OCSF})
	l := lines(t, b)
	if len(l) != 4 {
		t.Fatalf("%d events, want the session's begin and 3 operations", len(l))
	}
	for i, want := range []struct {
		activity, action, status float64
		table                    string
		bytes                    bool
	}{
		{3, 1, 1, "", false}, {4, 1, 1, "users", true}, {7, 1, 2, "", false}, {7, 2, 2, "orders", false},
	} {
		e := l[i]
		// What the schema requires of the class.
		for _, k := range []string{"activity_id", "category_uid", "class_uid", "type_uid", "severity_id", "time", "metadata", "actor", "src_endpoint", "database"} {
			if e[k] == nil {
				t.Errorf("event %d has no %s", i, k)
			}
		}
		if e["class_uid"] != 6005.0 || e["category_uid"] != 6.0 || e["activity_id"] != want.activity || e["type_uid"] != 600500+want.activity || e["action_id"] != want.action || e["status_id"] != want.status {
			t.Errorf("event %d: %v", i, e)
		}
		m := e["metadata"].(map[string]any)
		if m["version"] != "1.8.0" || m["product"].(map[string]any)["name"] != "Sallyport" {
			t.Errorf("event %d: %v", i, m)
		}
		table, _ := e["table"].(map[string]any)
		if name, _ := table["name"].(string); name != want.table {
			t.Errorf("event %d is on table %q", i, name)
		}
		q, _ := e["query_info"].(map[string]any)
		if i > 0 && (q["query_string"] == "" || (q["bytes"] != nil) != want.bytes) {
			t.Errorf("event %d: %v", i, q)
		}
	}
	if l[2]["disposition"] != "Approved" || l[3]["disposition"] != "Blocked" || l[3]["is_alert"] != true || l[3]["policy"].(map[string]any)["uid"] != "no-drop" {
		t.Errorf("%v\n%v", l[2], l[3])
	}
	item, err := replay.Find(t.Context(), w.store, "node-n1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := export.Write(t.Context(), io.Discard, w.store, item, export.Options{Format: export.OCSF, Trust: replay.Trust{Roots: w.ca.Pool()}}); err == nil {
		t.Error("a node's own recording became datastore activity")
	}
}

func TestAsciicast(t *testing.T) {
	w := newWorld(t)
	for _, f := range []export.Format{export.AsciicastV2, export.AsciicastV3} {
		b, _ := w.export(t, "s1", export.Options{Format: f})
		head, rest, _ := strings.Cut(string(b), "\n")
		var h struct {
			Version, Width, Height int
			Timestamp              int64
			Term                   struct{ Cols, Rows int }
		}
		if err := json.Unmarshal([]byte(head), &h); err != nil || h.Timestamp != started.Unix() || h.Width+h.Term.Cols != 120 || h.Height+h.Term.Rows != 40 {
			t.Fatalf("%s: %+v %v", f, h, err)
		}
		now, shown := 0.0, ""
		at := map[string]float64{}
		for line := range strings.Lines(rest) {
			var ev [3]any
			if err := json.Unmarshal([]byte(line), &ev); err != nil || ev[1] != "o" {
				t.Fatalf("%s: %v %s", f, err, line)
			}
			when := ev[0].(float64)
			if h.Version == 3 {
				when += now
			}
			if when < now {
				t.Errorf("%s: time runs back at %s", f, line)
			}
			now = when
			text := ev[2].(string)
			plain := strings.ReplaceAll(text, "\r\n", "\n")
			if strings.Count(text, "\n") != strings.Count(text, "\r\n") {
				t.Errorf("%s: a line does not begin at its beginning: %q", f, text)
			}
			if terminal.EscapeString(plain) != plain {
				t.Errorf("%s: a player's terminal would act on %q", f, text)
			}
			for _, part := range []string{"SELECT", "DROP", "ended"} {
				if strings.Contains(text, part) && at[part] == 0 {
					at[part] = when
				}
			}
			shown += text
		}
		// The recorder writes an entry a second.
		for part, want := range map[string]float64{"SELECT": 1, "DROP": 5, "ended": 13} {
			if got := at[part]; got < want-0.001 || got > want+0.001 {
				t.Errorf("%s: %s at %v, want %v", f, part, got, want)
			}
		}
		if !strings.Contains(shown, "shop=> DROP TABLE orders\r\n") || !strings.Contains(shown, "-- refuse, rule no-drop") {
			t.Errorf("%s: %q", f, shown)
		}
	}
}

// TestHTML: the page is one that a browser lays out as it was meant, without a
// way to run or fetch anything.
func TestHTML(t *testing.T) {
	w := newWorld(t)
	b, _ := w.export(t, "s1", export.Options{Format: export.HTML})
	doc, err := html.Parse(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	allowed := strings.Fields("html head meta title style body h1 h2 div span strong table tbody tr th td br code pre p")
	attributes := strings.Fields("lang charset http-equiv content name class")
	text, css, csp := "", "", ""
	for n := range doc.Descendants() {
		switch n.Type {
		case html.ElementNode:
			if !slices.Contains(allowed, n.Data) {
				t.Errorf("the page has an element %s", n.Data)
			}
			for _, a := range n.Attr {
				if !slices.Contains(attributes, a.Key) {
					t.Errorf("<%s> has %s=%q", n.Data, a.Key, a.Val)
				}
				if n.Data == "meta" && a.Key == "content" && strings.Contains(a.Val, "default-src") {
					csp = a.Val
				}
			}
			if n.Data == "style" {
				css = n.FirstChild.Data
			}
		case html.TextNode:
			text += n.Data
		}
	}
	sum := sha256.Sum256([]byte(css))
	if want := "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'; base-uri 'none'; form-action 'none'"; csp != want {
		t.Errorf("the policy is %q, want %q", csp, want)
	}
	node, root := sha256.Sum256(w.node.Cert), sha256.Sum256(w.ca.Cert.Raw)
	for _, want := range []string{"Verified: complete", hex.EncodeToString(node[:]), hex.EncodeToString(root[:]), "DROP TABLE orders", "no-drop", `<script>alert(1)</script>`, `\u{202e}`, "acme/shop", "The end of the recording."} {
		if !strings.Contains(text, want) {
			t.Errorf("the page does not show %q", want)
		}
	}
	cut, _ := w.export(t, "s1", export.Options{Format: export.HTML, MaxBytes: 1500})
	shown := regexp.MustCompile(`it shows the first (\d+) of 12 entries`).FindSubmatch(cut)
	if shown == nil || string(shown[1]) == "0" || !bytes.Contains(cut, fmt.Appendf(nil, "Cut here: %s of 12 entries are shown", shown[1])) || bytes.Contains(cut, []byte("The end of the recording")) {
		t.Errorf("a cut page does not say so: %s", shown)
	}
	if len(cut) > 1500+8<<10 {
		t.Errorf("a page of %d bytes", len(cut))
	}
}

func TestParquet(t *testing.T) {
	w := newWorld(t)
	b, res := w.export(t, "s1", export.Options{Format: export.Parquet})
	limits := columnar.Limits{Rows: 100, Values: 10_000, Bytes: 1 << 20}
	var rows []export.EntryRow
	if err := columnar.Read(b, limits, func(r *export.EntryRow) error { rows = append(rows, *r); return nil }); err != nil || len(rows) != int(res.Entries) {
		t.Fatal(len(rows), err)
	}
	if r := rows[6]; r.Session != "s1" || r.Entry != 7 || r.Type != "command" || string(r.Text) != "INSERT \xff" || r.Commit != "4f2c" || r.At != started.Add(7*time.Second).UnixMicro() {
		t.Errorf("%+v", r)
	}
	if len(rows[1].Actions) != 2 {
		t.Errorf("%+v", rows[1])
	}
	meta, err := columnar.Meta[export.EntryRow](b, limits)
	if err != nil || !strings.Contains(meta["sallyport.verification"], `"verified"`) {
		t.Error(meta, err)
	}
}

// TestBroken: every format says that a recording was tampered with, and holds
// nothing of what was.
func TestBroken(t *testing.T) {
	w := newWorld(t)
	b, err := os.ReadFile(w.path(recording.SegmentName(1)))
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(w.path(recording.SegmentName(1)), b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range export.Formats {
		out, res := w.export(t, "s1", export.Options{Format: f})
		if res.State() != "broken" || !bytes.Contains(out, []byte("altered")) {
			t.Errorf("%s does not say that the recording is broken", f)
		}
		if bytes.Contains(out, []byte("DROP TABLE")) {
			t.Errorf("%s holds entries that cannot be believed", f)
		}
	}
}

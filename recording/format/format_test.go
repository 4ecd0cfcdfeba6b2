package format_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
	"github.com/sallyport/sallyport/recording/recordingtest"
)

func full(lsn recording.LSN) recording.Entry {
	return recording.Entry{
		LSN: lsn, At: time.Unix(1_800_000_000, 123456789).UTC(), Type: recording.Decided, Op: 3, Verb: "Query",
		Effect: "refuse", Rule: "no-drop", Reason: "DROP is not for jobs", PolicyIndex: 42,
		Actions: []string{"postgres:drop shop.public.users", "", "postgres:select x"}, Approval: "a1", Actor: "alice",
		Detail: map[string]string{"z": "1", "a": "", "": "empty key"}, Text: []byte("DROP TABLE users"), Data: []byte{0, 1, 2}, Rows: 9, Duration: -time.Second,
	}
}

// segment seals entries 1 to n.
func segment(t testing.TB, node *recordingtest.Node, n int) ([]byte, []recording.Entry) {
	t.Helper()
	var frames []byte
	var tree format.Tree
	var entries []recording.Entry
	for i := 1; i <= n; i++ {
		e := full(recording.LSN(i))
		start := len(frames)
		var err error
		if frames, err = format.AppendEntry(frames, &e); err != nil {
			t.Fatal(err)
		}
		payload, _, err := format.NextFrame(frames[start:])
		if err != nil {
			t.Fatal(err)
		}
		tree.Add(format.LeafHash(payload))
		entries = append(entries, e)
	}
	b, err := format.SealSegment(format.SegmentMeta{Session: "s", Number: 1, First: 1, Last: recording.LSN(n), Sealed: time.Now()}, &tree, frames, node.Key)
	if err != nil {
		t.Fatal(err)
	}
	return b, entries
}

func TestSegment(t *testing.T) {
	node := recordingtest.NewCA(t).Node(t, "n")
	b, want := segment(t, node, 7)
	s, err := format.ParseSegment(b)
	if err != nil {
		t.Fatal(err)
	}
	if !s.SignedBy(node.Key.Public()) {
		t.Fatal("not signed")
	}
	var tree format.Tree
	var got []recording.Entry
	if err := s.Entries(&tree, func(e *recording.Entry) error { got = append(got, *e); return nil }); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v", got[0])
	}
	// Every byte counts: with any one changed, the object does not parse or is
	// not signed by the node.
	for i := range b {
		c := bytes.Clone(b)
		c[i] ^= 1
		if s, err := format.ParseSegment(c); err == nil && s.SignedBy(node.Key.Public()) {
			t.Fatalf("byte %d can be changed", i)
		}
	}
	for i := range b {
		if _, err := format.ParseSegment(b[:i]); !errors.Is(err, format.ErrMalformed) {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
	if _, err := format.ParseSegment(append(bytes.Clone(b), 0)); err == nil {
		t.Fatal("a byte too many was taken")
	}
	if _, err := format.ParseTrailer(b); err == nil {
		t.Fatal("a segment was taken for a trailer")
	}
}

// TestEntryLimits: what could not be read back is not written, and leaves the
// buffer as it was.
func TestEntryLimits(t *testing.T) {
	for name, e := range map[string]recording.Entry{
		"data":    {LSN: 1, Type: recording.Response, Data: make([]byte, format.MaxEntryBytes+1)},
		"sum":     {LSN: 1, Type: recording.Response, Data: make([]byte, format.MaxEntryBytes/2), Text: make([]byte, format.MaxEntryBytes/2)},
		"reason":  {LSN: 1, Type: recording.Note, Reason: strings.Repeat("x", format.MaxEntryBytes)},
		"actions": {LSN: 1, Type: recording.Command, Actions: make([]string, 1<<14+1)},
	} {
		b := []byte("before")
		out, err := format.AppendEntry(b, &e)
		if err == nil || string(out) != "before" {
			t.Errorf("%s: %v, %d bytes", name, err, len(out))
		}
	}
}

func TestDecodeEntryStrict(t *testing.T) {
	e := recording.Entry{LSN: 1, Type: recording.Note, Reason: "x"}
	b, _ := format.AppendEntry(nil, &e)
	good := b[8:]
	for name, p := range map[string][]byte{
		"empty":         {},
		"no type":       good[:2],
		"unknown field": append(bytes.Clone(good), 0x90, 0x03, 1),
		"again":         append(bytes.Clone(good), good...),
		"zero":          append(bytes.Clone(good), 0x80, 0x01, 0), // rows: 0
		"wire type":     append(bytes.Clone(good), 0x85, 0x01, 0, 0, 0, 0),
		"cut":           good[:len(good)-1],
		"type":          {0x08, 1, 0x18, 99},
	} {
		if _, err := format.DecodeEntry(p); !errors.Is(err, format.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestBomb: a small object cannot be made to fill memory.
func TestBomb(t *testing.T) {
	node := recordingtest.NewCA(t).Node(t, "n")
	enc, _ := zstd.NewWriter(nil)
	var tree format.Tree
	tree.Add(format.Hash{})
	b, err := format.SealSegment(format.SegmentMeta{Session: "s", Number: 1, First: 1, Last: 1}, &tree, []byte("x"), node.Key)
	if err != nil {
		t.Fatal(err)
	}
	// Splice another body in; parsing does not check the signature.
	meta := int(binary.BigEndian.Uint32(b[8:]))
	bomb := enc.EncodeAll(make([]byte, 1<<30), nil)
	c := append([]byte(nil), b[:16+meta]...)
	binary.BigEndian.PutUint32(c[12:], uint32(len(bomb)))
	c = append(append(c, bomb...), 0, 1, 0)
	s, err := format.ParseSegment(c)
	if err != nil {
		t.Fatal(err)
	}
	if r := testing.AllocsPerRun(1, func() { _, err = s.Frames() }); err == nil || r > 1000 {
		t.Fatal(err, r)
	}
}

// TestTree compares with the recursive definition of RFC 6962 §2.1.
func TestTree(t *testing.T) {
	var mth func(d [][]byte) format.Hash
	mth = func(d [][]byte) format.Hash {
		switch len(d) {
		case 0:
			return sha256.Sum256(nil)
		case 1:
			return sha256.Sum256(append([]byte{0}, d[0]...))
		}
		k := 1
		for k*2 < len(d) {
			k *= 2
		}
		l, r := mth(d[:k]), mth(d[k:])
		return sha256.Sum256(append(append([]byte{1}, l[:]...), r[:]...))
	}
	var tree format.Tree
	var leaves [][]byte
	for i := range 70 {
		if got, want := tree.Root(), mth(leaves); got != want {
			t.Fatalf("%d leaves: %s, want %s", i, got, want)
		}
		again, ok := format.TreeAt(tree.Size(), tree.Frontier())
		if !ok || again.Root() != tree.Root() {
			t.Fatalf("%d leaves: does not continue", i)
		}
		leaf := fmt.Appendf(nil, "leaf %d", i)
		leaves = append(leaves, leaf)
		tree.Add(format.LeafHash(leaf))
	}
}

func TestHeader(t *testing.T) {
	node := recordingtest.NewCA(t).Node(t, "n")
	h := recording.Header{Session: "s", Node: "n", NodeSeq: 1, Started: time.Now().UTC(), Claims: map[string]any{"run": 12345678901234567, "x": []any{"a"}}}
	b, err := format.SealHeader(&h, node.Cert, node.Key)
	if err != nil {
		t.Fatal(err)
	}
	got, err := format.ParseHeader(b)
	if err != nil || !got.SignedBy(node.Key.Public()) || fmt.Sprint(got.Claims["run"]) != "12345678901234567" {
		t.Fatal(err, got)
	}
	h.Claims["big"] = strings.Repeat("x", format.MaxMetaBytes)
	if _, err := format.SealHeader(&h, node.Cert, node.Key); err == nil {
		t.Fatal("a header that is too large was sealed")
	}
}

// FuzzSegment: no bytes make the parsers panic or allocate beyond their limits,
// and what an object holds is read back alike when it is written again.
func FuzzSegment(f *testing.F) {
	node := recordingtest.NewCA(f).Node(f, "n")
	seg, _ := segment(f, node, 3)
	f.Add(seg)
	h := recording.Header{Session: "s", NodeSeq: 1, Started: time.Unix(0, 0).UTC()}
	hb, _ := format.SealHeader(&h, node.Cert, node.Key)
	f.Add(hb)
	tb, _ := format.SealTrailer(format.TrailerMeta{Session: "s"}, node.Key)
	f.Add(tb)
	e := full(1)
	eb, _ := format.AppendEntry(nil, &e)
	f.Add(eb)
	f.Add(eb[8:])
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := format.ParseHeader(b); err == nil {
			h.SignedBy(h.Certificate.PublicKey)
		}
		format.ParseTrailer(b)
		if s, err := format.ParseSegment(b); err == nil {
			if err := s.Entries(nil, nil); err == nil && s.Bytes > format.MaxFramesBytes {
				t.Fatal("a segment beyond the limit was read")
			}
		}
		for rest := b; ; {
			payload, next, err := format.NextFrame(rest)
			if err != nil {
				break
			}
			rest = next
			format.DecodeEnding(payload)
			decode(t, payload)
		}
		decode(t, b) // past the checksum
	})
}

func decode(t *testing.T, payload []byte) {
	e, err := format.DecodeEntry(payload)
	if err != nil {
		return
	}
	b, err := format.AppendEntry(nil, &e)
	if err != nil {
		t.Fatal(err)
	}
	p, _, err := format.NextFrame(b)
	if err != nil {
		t.Fatal(err)
	}
	again, err := format.DecodeEntry(p)
	if err != nil || !reflect.DeepEqual(e, again) {
		t.Fatalf("%+v became %+v (%v)", e, again, err)
	}
}

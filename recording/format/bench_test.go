package format_test

import (
	"math/rand/v2"
	"testing"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
	"github.com/sallyport/sallyport/recording/recordingtest"
)

// BenchmarkEntries reads a segment of a mebibyte as verifying does.
func BenchmarkEntries(b *testing.B) {
	n := recordingtest.NewCA(b).Node(b, "n1")
	rnd := rand.New(rand.NewPCG(1, 1))
	var frames []byte
	var tree format.Tree
	m := format.SegmentMeta{Session: "s", Number: 1, First: 1}
	for len(frames) < 1<<20 {
		data := make([]byte, 16<<10)
		for i := range data {
			data[i] = "0123456789|\n"[rnd.IntN(12)]
		}
		m.Last++
		from := len(frames)
		var err error
		if frames, err = format.AppendEntry(frames, &recording.Entry{LSN: m.Last, Type: recording.Response, Op: 1, Data: data}); err != nil {
			b.Fatal(err)
		}
		tree.Add(format.LeafHash(frames[from+8:]))
	}
	obj, err := format.SealSegment(m, &tree, frames, n.Key)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(frames)))
	b.ReportAllocs()
	for b.Loop() {
		s, err := format.ParseSegment(obj)
		if err != nil {
			b.Fatal(err)
		}
		var t format.Tree
		if err := s.Entries(&t, nil); err != nil {
			b.Fatal(err)
		}
	}
}

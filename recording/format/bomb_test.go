package format_test

import (
	"bytes"
	"errors"
	"runtime"
	"testing"

	"github.com/sallyport/sallyport/recording/format"
	"github.com/sallyport/sallyport/recording/recordingtest"
)

// TestDecompressionBomb: a segment whose frames become longer than it says is
// refused without room being made for them.
func TestDecompressionBomb(t *testing.T) {
	n := recordingtest.NewCA(t).Node(t, "n1")
	var tree format.Tree
	tree.Add(format.LeafHash(nil))
	const size = "31457280"
	obj, err := format.SealSegment(format.SegmentMeta{Session: "s", Number: 1, First: 1, Last: 1}, &tree, make([]byte, 30<<20), n.Key)
	if err != nil {
		t.Fatal(err)
	}
	for _, says := range []string{"1000    ", "3000000 ", "31457281"} { // below and above what is decompressed in one go
		b := bytes.Replace(obj, []byte(`"bytes":`+size), []byte(`"bytes":`+says), 1)
		if bytes.Equal(b, obj) {
			t.Fatal("the segment does not say its size where it did")
		}
		s, err := format.ParseSegment(b)
		if err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err = s.Frames()
		runtime.ReadMemStats(&after)
		if !errors.Is(err, format.ErrMalformed) {
			t.Errorf("says %s: %v", says, err)
		}
		if got := after.TotalAlloc - before.TotalAlloc; says[0] != '3' && got > 8<<20 || got > 200<<20 {
			t.Errorf("says %s: %d bytes were allocated", says, got)
		}
	}
}

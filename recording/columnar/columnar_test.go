package columnar_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/parquet-go/parquet-go"

	"github.com/sallyport/sallyport/recording/columnar"
)

type row struct {
	Name  string   `parquet:"name"`
	At    int64    `parquet:"at,timestamp(microsecond)"`
	Tags  []string `parquet:"tags,list"`
	Bits  []byte   `parquet:"bits"`
	Whole bool     `parquet:"whole"`
}

var limits = columnar.Limits{Rows: 20_000, Values: 1 << 20, Bytes: 16 << 20}

func rows(n int) []row {
	out := make([]row, n)
	for i := range out {
		out[i] = row{Name: fmt.Sprintf("session-%06d", i), At: int64(i), Bits: bytes.Repeat([]byte{byte(i)}, i%50), Whole: i%2 == 0}
		for j := range i % 4 {
			out[i].Tags = append(out[i].Tags, fmt.Sprint("tag", j))
		}
	}
	return out
}

func mustWrite(t testing.TB, in []row) []byte {
	t.Helper()
	var b bytes.Buffer
	w := columnar.NewWriter[row](&b, map[string]string{"k": "v"})
	if err := errors.Join(w.Write(in...), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRoundTrip(t *testing.T) {
	for _, n := range []int{0, 1, 64, 12_345} {
		in := rows(n)
		b := mustWrite(t, in)
		var out []row
		if err := columnar.Read(b, limits, func(r *row) error { out = append(out, *r); return nil }); err != nil {
			t.Fatal(n, err)
		}
		if len(out) != n {
			t.Fatalf("%d rows of %d", len(out), n)
		}
		for i := range out {
			if len(out[i].Bits) == 0 {
				out[i].Bits = in[i].Bits
			}
			if len(out[i].Tags) == 0 {
				out[i].Tags = in[i].Tags
			}
			if !reflect.DeepEqual(out[i], in[i]) {
				t.Fatalf("row %d: %+v, want %+v", i, out[i], in[i])
			}
		}
		if m, err := columnar.Meta[row](b, limits); err != nil || m["k"] != "v" {
			t.Fatal(m, err)
		}
	}
	stop := errors.New("stop")
	if err := columnar.Read(mustWrite(t, rows(9)), limits, func(*row) error { return stop }); err != stop {
		t.Fatal(err)
	}
}

// TestLongValues: what is written can be read, however long its values are, and
// the file does not hold them several times.
func TestLongValues(t *testing.T) {
	for _, n := range []int{1 << 10, 16 << 10, 1 << 20, 4 << 20} {
		long := make([]byte, n)
		x := uint32(1)
		for i := range long { // does not compress
			x = x*1664525 + 1013904223
			long[i] = byte(x >> 24)
		}
		b := mustWrite(t, []row{{Name: "a", Bits: long}, {Name: strings.Repeat("b", n), Tags: []string{string(long)}}})
		if len(b) > 3*n+8192 {
			t.Errorf("a file of %d bytes for values of %d", len(b), n)
		}
		i := 0
		err := columnar.Read(b, limits, func(r *row) error {
			if i == 0 && !bytes.Equal(r.Bits, long) || i == 1 && (len(r.Name) != n || r.Tags[0] != string(long)) {
				t.Errorf("row %d came back otherwise", i)
			}
			i++
			return nil
		})
		if err != nil || i != 2 {
			t.Errorf("%d bytes: %d rows, %v", n, i, err)
		}
	}
}

// TestRefuses: files that the library would read, or try to, at any cost.
func TestRefuses(t *testing.T) {
	write := func(o ...parquet.WriterOption) []byte {
		var b bytes.Buffer
		w := parquet.NewGenericWriter[row](&b, o...)
		_, err := w.Write(rows(100))
		if err := errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	type other struct {
		Name string `parquet:"name"`
	}
	var strange bytes.Buffer
	ow := parquet.NewGenericWriter[other](&strange)
	if err := ow.Close(); err != nil {
		t.Fatal(err)
	}
	type dict struct {
		Name  string   `parquet:"name,dict"`
		At    int64    `parquet:"at,timestamp(microsecond)"`
		Tags  []string `parquet:"tags,list"`
		Bits  []byte   `parquet:"bits"`
		Whole bool     `parquet:"whole"`
	}
	var dictionary bytes.Buffer
	dw := parquet.NewGenericWriter[dict](&dictionary, parquet.DataPageVersion(1))
	if _, err := dw.Write([]dict{{Name: strings.Repeat("x", 1000)}}); err != nil {
		t.Fatal(err)
	}
	dw.Close()
	good := mustWrite(t, rows(100))
	footer := func(f []byte) []byte {
		b := append([]byte("PAR1"), f...)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(f)))
		return append(b, "PAR1"...)
	}
	bomb := mustWrite(t, []row{{Name: "x", Bits: bytes.Repeat([]byte("a"), 20<<20)}})
	for name, b := range map[string][]byte{
		"nothing":       nil,
		"text":          []byte("sessions/2026/11/28 is not a file like that"),
		"zstd":          write(parquet.Compression(&parquet.Zstd), parquet.DefaultEncoding(&parquet.Plain), parquet.DataPageVersion(1)),
		"version 2":     write(parquet.Compression(&parquet.Snappy), parquet.DefaultEncoding(&parquet.Plain), parquet.DataPageVersion(2)),
		"delta":         write(parquet.DataPageVersion(1), parquet.DefaultEncodingFor(parquet.ByteArray, &parquet.DeltaLengthByteArray)),
		"other columns": strange.Bytes(),
		"dictionary":    dictionary.Bytes(),
		"a bomb":        bomb,
		"cut":           good[:len(good)-20],
		// A list of 2^31-1 schema elements, in six bytes.
		"a list without elements": footer([]byte{0x15, 0x02, 0x19, 0xfc, 0xff, 0xff, 0xff, 0xff, 0x07}),
		"nested":                  footer(bytes.Repeat([]byte{0x1c}, 1000)),
	} {
		n := 0
		err := columnar.Read(b, limits, func(*row) error { n++; return nil })
		if !errors.Is(err, columnar.ErrRefused) || n != 0 {
			t.Errorf("%s: %v after %d rows", name, err, n)
		}
	}
	small := limits
	small.Rows = 99
	if err := columnar.Read(good, small, func(*row) error { return nil }); !errors.Is(err, columnar.ErrRefused) {
		t.Error("more rows than allowed:", err)
	}
}

// TestFlippedBytes: no change of a byte makes reading panic, or cost much.
func TestFlippedBytes(t *testing.T) {
	good := mustWrite(t, rows(8))
	var before, after runtime.MemStats
	for i := range good {
		for _, x := range []byte{0x01, 0x80} {
			b := bytes.Clone(good)
			b[i] ^= x
			runtime.ReadMemStats(&before)
			_ = columnar.Read(b, limits, func(*row) error { return nil })
			runtime.ReadMemStats(&after)
			if got := after.TotalAlloc - before.TotalAlloc; got > 64<<20 {
				t.Fatalf("byte %d ^ %#x: %d bytes were allocated", i, x, got)
			}
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(mustWrite(f, rows(3)))
	f.Add(mustWrite(f, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = columnar.Read(b, limits, func(*row) error { return nil })
	})
}

// TestReadsAsTheLibrary: what is read of a file is what the library reads.
func TestReadsAsTheLibrary(t *testing.T) {
	in := rows(11_000)
	for i := range in { // lists that are longer than a page
		if i%1000 == 7 {
			for j := range 9000 {
				in[i].Tags = append(in[i].Tags, fmt.Sprint(strings.Repeat("long", 20), j))
			}
		}
	}
	b := mustWrite(t, in)
	want, err := parquet.Read[row](bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	i := 0
	err = columnar.Read(b, limits, func(r *row) error {
		got, lib := fmt.Sprintf("%+v", *r), fmt.Sprintf("%+v", want[i])
		if got != lib {
			t.Fatalf("row %d: %.200s, want %.200s", i, got, lib)
		}
		i++
		return nil
	})
	if err != nil || i != len(in) {
		t.Fatal(i, err)
	}
}

package mask

import (
	"bytes"
	"strings"
	"testing"
)

func TestAppend(t *testing.T) {
	m := NewMasker([]byte("k"))
	for _, c := range []struct {
		kind    Kind
		textual bool
		in      string
		want    string
		null    bool
	}{
		{Redact, true, "alice@example.com", Redacted, false},
		{Redact, true, "", Redacted, false},
		{Redact, false, "17", "", true},
		{Hash, false, "17", "", true},
		{Last4, false, "17", "", true},
		{Null, true, "x", "", true},
		{Last4, true, "4111111111111234", "****1234", false},
		{Last4, true, "1234567", "****", false},
		{Last4, true, "12345678", "****5678", false},
		{Last4, true, "żółwżółw", "****żółw", false},
		{Last4, true, "żółwżół", "****", false},
		{Last4, true, "\xff\xff\xff\xff\xff\xff\xff\xff", "****\xff\xff\xff\xff", false},
		{Kind(9), true, "x", Redacted, false},
	} {
		got, null := m.Append([]byte("<"), c.kind, c.textual, []byte(c.in))
		if string(got) != "<"+c.want || null != c.null {
			t.Errorf("%v textual=%v %q: %q null=%v", c.kind, c.textual, c.in, got, null)
		}
	}
}

func TestHashIsKeyedAndStable(t *testing.T) {
	one, two := NewMasker([]byte("a")), NewMasker([]byte("b"))
	h := func(m *Masker, v string) string { b, _ := m.Append(nil, Hash, true, []byte(v)); return string(b) }
	if again := NewMasker([]byte("a")); h(one, "x") != h(again, "x") || h(one, "x") == h(one, "y") || h(one, "x") == h(two, "x") || len(h(one, "x")) != 64 {
		t.Fatal("hash is not a keyed function of the value")
	}
}

func TestParseKind(t *testing.T) {
	for _, k := range []Kind{Redact, Null, Hash, Last4} {
		if got, ok := ParseKind(k.String()); !ok || got != k {
			t.Errorf("%v is read as %v", k, got)
		}
	}
	if _, ok := ParseKind("reverse"); ok {
		t.Error("an unknown kind was accepted")
	}
}

func TestAllocs(t *testing.T) {
	m, dst := NewMasker([]byte("k")), make([]byte, 0, 256)
	v := []byte("4111111111111234")
	for _, k := range []Kind{Redact, Hash, Last4} {
		if n := testing.AllocsPerRun(100, func() { m.Append(dst[:0], k, true, v) }); n != 0 {
			t.Errorf("%v allocates %v times", k, n)
		}
	}
}

// FuzzMask: whatever the value, no mask contains more of it than its kind promises.
func FuzzMask(f *testing.F) {
	f.Add([]byte("secret-value-0001"))
	f.Fuzz(func(t *testing.T, v []byte) {
		m := NewMasker([]byte("k"))
		for _, k := range []Kind{Redact, Null, Hash, Last4} {
			got, _ := m.Append(nil, k, true, v)
			if k == Last4 {
				tail := strings.TrimPrefix(string(got), stars)
				if !bytes.HasSuffix(v, []byte(tail)) || len([]rune(tail)) > 4 {
					t.Fatalf("%q shows %q", v, got)
				}
			} else if k == Redact && string(got) != Redacted {
				t.Fatalf("%q", got)
			}
		}
	})
}

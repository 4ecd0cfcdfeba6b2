package postgres

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/mask"
)

// TestNames plays random pipelines against a target that skips, and checks
// that a certain answer is always the target's own.
func TestNames(t *testing.T) {
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 1))
		n := newNames[int]()
		type change struct {
			v       *version[int]
			segment uint64
			fails   bool
		}
		var queue []change
		target := map[string]int{} // what the target holds
		segment, skipped := uint64(0), uint64(1<<63)
		answer := func() {
			c := queue[0]
			queue = queue[1:]
			if c.segment == skipped || c.fails {
				skipped = c.segment
				n.undo(c.v)
				return
			}
			n.confirm(c.v)
			if c.v.value == nil {
				delete(target, c.v.name)
			} else {
				target[c.v.name] = *c.v.value
			}
		}
		for i := range 60 {
			name := string(rune('a' + r.IntN(3)))
			switch r.IntN(5) {
			case 0, 1:
				var value *int
				if r.IntN(3) > 0 {
					value = &i
				}
				queue = append(queue, change{n.put(name, value, segment), segment, value != nil && r.IntN(4) == 0})
			case 2:
				segment++
			case 3:
				if len(queue) > 0 {
					answer()
				}
			case 4:
				got, certain := n.get(name, segment)
				if !certain {
					break
				}
				// The message arrives when all before it was dealt with; if its
				// segment fails, it is skipped and relies on nothing.
				then, failed := map[string]int{}, skipped
				for k, v := range target {
					then[k] = v
				}
				for _, c := range queue {
					if c.segment == failed || c.fails {
						failed = c.segment
					} else if c.v.value == nil {
						delete(then, c.v.name)
					} else {
						then[c.v.name] = *c.v.value
					}
				}
				if failed == segment {
					break
				}
				want, ok := then[name]
				if (got != nil) != ok || (ok && *got != want) {
					t.Fatalf("seed %d: %s means %v here and %d (%t) there", seed, name, got, want, ok)
				}
			}
		}
	}
}

func dataRow(values ...string) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(len(values)))
	for _, v := range values {
		if v == "NULL" {
			b = append(b, 0xFF, 0xFF, 0xFF, 0xFF)
			continue
		}
		b = binary.BigEndian.AppendUint32(b, uint32(len(v)))
		b = append(b, v...)
	}
	return message(nil, 'D', string(b))
}

func TestMaskRow(t *testing.T) {
	m := mask.NewMasker([]byte("k"))
	cols := []column{{}, {masked: true, textual: true}, {masked: true}, {masked: true, textual: true, mask: mask.Last4}, {}}
	got, err := maskRow([]byte("before"), dataRow("1", "secret", "4711", "4111111111111234", "z"), cols, m)
	if want := "before" + string(dataRow("1", "[masked]", "NULL", "****1234", "z")); err != nil || string(got) != want {
		t.Fatalf("%q %v", got, err)
	}
	got, err = maskRow(nil, dataRow("NULL", "NULL", "NULL", "NULL", "NULL"), cols, m)
	if err != nil || !bytes.Equal(got, dataRow("NULL", "NULL", "NULL", "NULL", "NULL")) {
		t.Fatalf("%q %v", got, err)
	}
	whole := dataRow("1", "secret", "4711", "x", "z")
	for _, bad := range [][]byte{whole[:len(whole)-1], append(bytes.Clone(whole), 0), dataRow("1"), whole[:6]} {
		if _, err := maskRow(nil, bad, cols, m); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestAllocsPerRow(t *testing.T) {
	m := mask.NewMasker([]byte("k"))
	cols := []column{{}, {masked: true, textual: true, mask: mask.Hash}, {masked: true}}
	row, dst := dataRow("1", "secret", "4711"), make([]byte, 0, 1024)
	if n := testing.AllocsPerRun(100, func() { maskRow(dst, row, cols, m) }); n != 0 {
		t.Errorf("maskRow allocates %v times", n)
	}
	c := newConversation(&protocols.Access{})
	r := &responses{conversation: c}
	c.push(awaited{step: stepExecute, portal: &portal{an: &analysis{world: &world{}}, stmt: &statement{}}})
	if n := testing.AllocsPerRun(100, func() {
		if f, err := r.Frame(row); err != nil || f.Kind != protocols.Pass {
			t.Fatal(f, err)
		}
	}); n != 0 {
		t.Errorf("measuring a row allocates %v times", n)
	}
}

func BenchmarkMaskRow(b *testing.B) {
	m := mask.NewMasker([]byte("k"))
	cols := []column{{}, {masked: true, textual: true}}
	row, dst := dataRow(strings.Repeat("v", 70), strings.Repeat("s", 70)), make([]byte, 0, 1024)
	b.SetBytes(int64(len(row)))
	b.ReportAllocs()
	for b.Loop() {
		maskRow(dst, row, cols, m)
	}
}

func TestScrub(t *testing.T) {
	raw := func(code, routine, context string) []byte {
		b := report(nil, 'E', sevError, code, "value ann@secret is bad", "Failing row contains (ann@secret)", "try ann@secret")
		b = b[:len(b)-1]
		for _, f := range []string{"Wctx ann@secret", "qSELECT 'ann@secret'", "p7", "susers", "temail", "R" + routine} {
			if f[0] == 'W' && context == "" {
				continue
			}
			b = append(append(b, f...), 0)
		}
		b = append(b, 0)
		binary.BigEndian.PutUint32(b[1:], uint32(len(b)-1))
		return b
	}
	for _, c := range []struct {
		how   discretion
		frame []byte
		leaks string // what may show
	}{
		{open, raw("23514", "x", "c"), "MDHWq"},
		{guarded, raw("23514", "x", ""), "M"},
		{guarded, raw("42703", "x", ""), "MDHq"},
		{guarded, raw("42703", "exec_stmt_raise", ""), "M"},
		{sealed, raw("23514", "x", ""), ""},
		{sealed, raw("22P02", "x", ""), ""},
		{sealed, raw("42501", "x", ""), "M"},
		{sealed, raw("42501", "x", "c"), ""},
		{sealed, raw("42501", "exec_stmt_raise", ""), ""},
		{sealed, raw("P0001", "x", ""), ""},
	} {
		got := scrub(nil, c.frame, c.how)
		if n, err := measure(got); err != nil || n != len(got) {
			t.Fatalf("not a message: %q", got)
		}
		r := body(got)
		var shows strings.Builder
		for len(r.b) > 0 && r.b[0] != 0 {
			key, v := r.byte(), r.cstring()
			if bytes.Contains(v, []byte("ann@secret")) {
				shows.WriteByte(key)
			}
		}
		if shows.String() != c.leaks {
			t.Errorf("%v %q: shows %q, may show %q", c.how, c.frame, shows.String(), c.leaks)
		}
		if f := readReport(got); f.code == "" || f.severity != sevError {
			t.Errorf("lost code or severity: %q", got)
		}
	}
}

func TestCancels(t *testing.T) {
	var c cancels
	hit := 0
	pid, key, err := c.add(func(context.Context) { hit++ })
	if err != nil {
		t.Fatal(err)
	}
	packet := append(appendUint32(nil, pid), key[:]...)
	for _, bad := range [][]byte{nil, packet[:7], append(bytes.Clone(packet), 0), appendUint32(appendUint32(nil, pid), 1<<31), make([]byte, 300)} {
		if c.request(t.Context(), bad); hit != 0 && !bytes.Equal(bad, packet) {
			t.Fatalf("%x cancelled", bad)
		}
	}
	if c.request(t.Context(), packet); hit != 1 {
		t.Fatal("not cancelled")
	}
	c.remove(pid)
	if c.request(t.Context(), packet); hit != 1 {
		t.Fatal("cancelled after its end")
	}
}

// A recording's entries end anywhere in a message: what is shown is the same.
func TestFormatterInPieces(t *testing.T) {
	var all []byte
	for i := range 200 {
		all = message(all, 'D', fmt.Sprintf("\x00\x01\x00\x00\x00\x03%03d", i))
	}
	all = message(all, 'D', "\x00\x01\x00\x50\x00\x00"+strings.Repeat("x", 5<<20)) // longer than is shown
	all = message(all, 'C', "SELECT 201\x00")
	want := FormatFrames(all)
	if !strings.HasPrefix(want, "000\n001\n") || !strings.HasSuffix(want, "SELECT 201\n") {
		t.Fatalf("%.100q … %q", want, want[len(want)-100:])
	}
	for _, size := range []int{7, 13, 100, 4096, 1 << 20} {
		var f Formatter
		var got strings.Builder
		for rest := all; len(rest) > 0; rest = rest[min(size, len(rest)):] {
			got.WriteString(f.Format(rest[:min(size, len(rest))]))
		}
		if !strings.HasPrefix(got.String(), want[:4*200]) || !strings.HasSuffix(got.String(), "SELECT 201\n") || strings.Contains(got.String(), "cut off") {
			t.Errorf("in pieces of %d: %.100q", size, got.String())
		}
		if got.Len() > 10<<10 {
			t.Errorf("in pieces of %d: %d bytes are shown", size, got.Len())
		}
	}
}

func TestFormatFrames(t *testing.T) {
	var b []byte
	b = message(b, 'T', "\x00\x02id\x00", strings.Repeat("\x00", 18), "label\x00", strings.Repeat("\x00", 18))
	b = append(b, dataRow("1", "x")...)
	b = append(b, dataRow("NULL", "\x00\x01")...)
	b = message(b, 'C', "SELECT 2\x00")
	b = report(b, 'E', sevError, "42601", "oops", "", "")
	b = append(b, 'D', 0, 0)
	want := "id | label\n1 | x\nNULL | \\x0001\nSELECT 2\nERROR: oops (SQLSTATE 42601)\n(message of type 'D' cut off: 3 bytes)\n"
	if got := FormatFrames(b); got != want {
		t.Fatalf("%q", got)
	}
	if got := FormatBind([]byte("p\x00s\x00\x00\x01\x00\x01\x00\x02\x00\x00\x00\x02\x01\x02\xff\xff\xff\xff\x00\x00")); got != "$1 = \\x0102\n$2 = NULL\n" {
		t.Fatalf("%q", got)
	}
}

// FuzzFrame feeds both readers anything: no panic, no frame beyond its bytes,
// nothing unknown that passes.
func FuzzFrame(f *testing.F) {
	for _, b := range [][]byte{poisonQuery, poisonParse, flushFrame, dataRow("1", "NULL"), message(nil, 'Z', "I"), message(nil, 'C', "SELECT 1\x00"),
		report(nil, 'E', sevError, "42601", "x", "y", "z"), message(nil, 'B', "\x00\x00\x00\x00\x00\x01\x00\x00\x00\x01x\x00\x00"), []byte("d\xff\xff\xff\xff"), message(nil, 'W', "")} {
		f.Add(b, false)
		f.Add(b, true)
	}
	f.Fuzz(func(t *testing.T, b []byte, guard bool) {
		FormatFrames(b)
		FormatBind(b)
		readReport(append(make([]byte, headerBytes), b...))
		scrub(nil, append([]byte("E\x00\x00\x00\x00"), b...), sealed)
		readHello(b)
		shape(nil, append(make([]byte, headerBytes), b...))
		maskRow(nil, append(make([]byte, headerBytes), b...), make([]column, 2), mask.NewMasker(nil))

		c := newConversation(&protocols.Access{Record: discard{}, Stats: &protocols.Stats{}})
		c.guard, c.masker, c.ch = guard, mask.NewMasker(nil), (&protocols.Session{}).Channel()
		w := &world{}
		c.push(awaited{step: stepParse, op: 1, stmt: &statement{}})
		c.push(awaited{step: stepDescribe, stmt: &statement{}, hidden: true})
		c.push(awaited{step: stepBind, op: 2, portal: &portal{an: &analysis{world: w}, stmt: &statement{}}})
		c.push(awaited{step: stepExecute, op: 3, portal: &portal{an: &analysis{world: w}, stmt: &statement{}}})
		c.push(awaited{step: stepSync})
		c.push(awaited{step: stepQuery, op: 4, query: &analysis{world: w}})
		r := &responses{conversation: c, p: New(Config{})}
		q := &requests{conversation: c}
		for rest := b; len(rest) > 0; {
			f, err := q.Frame(rest)
			if err == nil && f.Kind == protocols.Pass && c.copy != copyIn {
				t.Fatalf("%q passes unjudged", rest[0])
			}
			f, err = r.Frame(rest)
			if err != nil || f.Len == 0 || f.Len > len(rest) || f.Kind == protocols.Unknown {
				return
			}
			if f.Kind == protocols.Answer {
				if _, err := r.Answer(nil, rest[:f.Len]); err != nil {
					return
				}
			}
			rest = rest[f.Len:]
		}
	})
}

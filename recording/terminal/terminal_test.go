package terminal_test

import (
	"bytes"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/sallyport/sallyport/recording/terminal"
)

func TestEscape(t *testing.T) {
	for _, c := range []struct{ in, text, line string }{
		{"plain, Ünïcode, 日本, 🙂", "plain, Ünïcode, 日本, 🙂", "plain, Ünïcode, 日本, 🙂"},
		{"a\nb\tc", "a\nb\tc", `a\u{0a}b\u{09}c`},
		{"\x1b[2J\r\x00\x7f", `\u{1b}[2J\u{0d}\u{00}\u{7f}`, `\u{1b}[2J\u{0d}\u{00}\u{7f}`},
		{"\u009b31m", `\u{9b}31m`, `\u{9b}31m`},
		{"\u200b\u200f\u202a\u202e\u2066\u2069\ufeff\u00ad", `\u{200b}\u{200f}\u{202a}\u{202e}\u{2066}\u{2069}\u{feff}\u{ad}`, `\u{200b}\u{200f}\u{202a}\u{202e}\u{2066}\u{2069}\u{feff}\u{ad}`},
		{"\U000e0041\u2028\u00a0\ufe0f\u3164\u034f\u2800", `\u{e0041}\u{2028}\u{a0}\u{fe0f}\u{3164}\u{34f}\u{2800}`, `\u{e0041}\u{2028}\u{a0}\u{fe0f}\u{3164}\u{34f}\u{2800}`},
		{"\xff\xc3", `\x{ff}\x{c3}`, `\x{ff}\x{c3}`},
		{"\ufffd", "\ufffd", "\ufffd"},
		{"\xed\xa0\x80", `\x{ed}\x{a0}\x{80}`, `\x{ed}\x{a0}\x{80}`}, // a surrogate
	} {
		if got := terminal.EscapeString(c.in); got != c.text {
			t.Errorf("EscapeString(%q) = %q, want %q", c.in, got, c.text)
		}
		if got := terminal.EscapeLine(c.in); got != c.line {
			t.Errorf("EscapeLine(%q) = %q, want %q", c.in, got, c.line)
		}
	}
}

// FuzzEscape: nothing dangerous comes through, and the pieces text is written
// in change nothing.
func FuzzEscape(f *testing.F) {
	f.Add("a\x1b[31m\u202e日\xe6\x97", uint8(1))
	f.Fuzz(func(t *testing.T, s string, piece uint8) {
		want := terminal.EscapeString(s)
		if !utf8.ValidString(want) || strings.ContainsAny(want, "\x00\x1b\r\u0085\u009b\u202e\u200b\ufeff") {
			t.Fatalf("%q became %q", s, want)
		}
		if terminal.EscapeString(want) != want {
			t.Fatalf("not stable: %q", want)
		}
		var b bytes.Buffer
		w := terminal.Escape(&b)
		for rest := s; len(rest) > 0; {
			n := min(int(piece)%5+1, len(rest))
			if _, err := w.Write([]byte(rest[:n])); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		w.Close()
		if b.String() != want {
			t.Fatalf("%q in pieces became %q, whole %q", s, b.String(), want)
		}
	})
}

// Package terminal makes text safe to show on a terminal. What a session sent,
// what a target answered and what a token claimed is chosen by others: shown as
// it is, it could move the cursor, hide or reorder what is read, or talk to the
// terminal.
//
// Characters that do not show as themselves become \u{202e}, bytes that are not
// UTF-8 become \x{ff}: control characters, those of category Cf (bidirectional
// controls, zero-width characters, tags), line and paragraph separators, spaces
// other than U+0020, variation selectors, fillers that show as nothing, private
// and unassigned code points.
package terminal

import (
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// EscapeString returns s safe to show. Newlines and tabs stay.
func EscapeString(s string) string { return escape(s, true) }

// EscapeLine returns s safe to show as part of one line: newlines and tabs are
// escaped too.
func EscapeLine(s string) string { return escape(s, false) }

func escape(s string, lines bool) string {
	i := safePrefix(s, lines)
	if i == len(s) {
		return s
	}
	var b strings.Builder
	b.Grow(len(s) + 16)
	b.WriteString(s[:i])
	for s = s[i:]; len(s) > 0; {
		if i := safePrefix(s, lines); i > 0 {
			b.WriteString(s[:i])
			s = s[i:]
			continue
		}
		r, n := utf8.DecodeRuneInString(s)
		if r == utf8.RuneError && n == 1 {
			fmt.Fprintf(&b, `\x{%02x}`, s[0])
		} else {
			fmt.Fprintf(&b, `\u{%02x}`, r)
		}
		s = s[n:]
	}
	return b.String()
}

// safePrefix returns how many bytes of s can be shown as they are.
func safePrefix(s string, lines bool) int {
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c >= 0x20 && c != 0x7f || lines && (c == '\n' || c == '\t') {
				i++
				continue
			}
			return i
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n == 1 || hidden(r) {
			return i
		}
		i += n
	}
	return len(s)
}

// hidden says whether a character beyond ASCII does not show as itself.
// unicode.IsPrint leaves letters, marks, numbers, punctuation and symbols; some
// of those are invisible all the same.
func hidden(r rune) bool {
	return !unicode.IsPrint(r) ||
		unicode.In(r, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector) ||
		r == 0x2800 // a braille cell without dots
}

// A Writer escapes what is written to it, as EscapeString does, whatever pieces
// it comes in.
type Writer struct {
	w    io.Writer
	tail []byte // the beginning of a character, at most 3 bytes
}

// Escape returns a Writer on w. Close it at the end.
func Escape(w io.Writer) *Writer { return &Writer{w: w} }

func (w *Writer) Write(p []byte) (int, error) {
	text := append(w.tail, p...)
	w.tail = nil
	keep := 0
	for n := 1; n < utf8.UTFMax && n <= len(text); n++ {
		if c := text[len(text)-n:]; utf8.RuneStart(c[0]) {
			if !utf8.FullRune(c) {
				keep = n
			}
			break
		}
	}
	w.tail = append([]byte(nil), text[len(text)-keep:]...)
	if _, err := io.WriteString(w.w, EscapeString(string(text[:len(text)-keep]))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close writes what is left of an incomplete character. It does not close the
// underlying writer.
func (w *Writer) Close() error {
	tail := w.tail
	w.tail = nil
	_, err := io.WriteString(w.w, EscapeString(string(tail)))
	return err
}

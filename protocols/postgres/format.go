package postgres

import (
	"encoding/hex"
	"fmt"
	"strings"
	"unicode/utf8"
)

// FormatFrames renders recorded bytes of a target's responses as lines of
// text: column names, rows, command tags, errors. A message cut off at the end
// is named. The result is not safe for a terminal: escape it.
func FormatFrames(data []byte) string {
	var f Formatter
	text := f.Format(data)
	if len(f.rest) > 0 {
		text += fmt.Sprintf("(message of type %q cut off: %d bytes)\n", f.rest[0], len(f.rest))
	}
	return text
}

// Formatter is FormatFrames for the entries of one recording, in order: they
// end where a read ended, in the middle of messages too.
type Formatter struct {
	rest []byte // the beginning of a message
	skip int    // bytes to come of a message that is not shown
	lost bool   // what comes cannot be told apart any more
}

// maxFormatted is the longest message that is shown.
const maxFormatted = 4 << 20

// Format renders the messages that data completes.
func (f *Formatter) Format(data []byte) string {
	if f.lost {
		return fmt.Sprintf("(not a message: %d bytes)\n", len(data))
	}
	skipped := min(f.skip, len(data))
	f.skip -= skipped
	data = append(f.rest, data[skipped:]...)
	f.rest = nil
	var b strings.Builder
	for len(data) > 0 {
		n, err := measure(data)
		switch {
		case err != nil:
			f.lost = true
			fmt.Fprintf(&b, "(not a message: %d bytes)\n", len(data))
			return b.String()
		case n > len(data) && n > maxFormatted:
			fmt.Fprintf(&b, "(message of type %q: %d bytes)\n", data[0], n)
			f.skip = n - len(data)
			return b.String()
		case n == 0 || n > len(data):
			f.rest = append([]byte(nil), data...)
			return b.String()
		}
		formatFrame(&b, data[:n])
		data = data[n:]
	}
	return b.String()
}

func formatFrame(b *strings.Builder, frame []byte) {
	r := body(frame)
	switch frame[0] {
	case 'T':
		n := r.count(19)
		for i := range n {
			if i > 0 {
				b.WriteString(" | ")
			}
			b.Write(r.cstring())
			r.take(18)
		}
		b.WriteString("\n")
	case 'D':
		n := r.count(4)
		for i := range n {
			if i > 0 {
				b.WriteString(" | ")
			}
			b.WriteString(formatValue(r))
		}
		b.WriteString("\n")
	case 'C':
		fmt.Fprintf(b, "%s\n", r.cstring())
	case 'E', 'N':
		f := readReport(frame)
		fmt.Fprintf(b, "%s: %s (SQLSTATE %s)\n", orElse(f.severity, "REPORT"), f.text, f.code)
	case 'S':
		fmt.Fprintf(b, "(%s = %s)\n", r.cstring(), r.cstring())
	case 'd':
		text := r.b
		if !utf8.Valid(text) {
			fmt.Fprintf(b, "\\x%s\n", hex.EncodeToString(text))
			return
		}
		b.Write(text)
		if len(text) > 0 && text[len(text)-1] != '\n' {
			b.WriteString("\n")
		}
	case 'A':
		r.int32()
		fmt.Fprintf(b, "(notification on %s: %s)\n", r.cstring(), r.cstring())
	case 'G':
		b.WriteString("(COPY: the target takes data)\n")
	case 'I':
		b.WriteString("(empty query)\n")
	case 's':
		b.WriteString("(suspended: more rows to come)\n")
	}
}

func formatValue(r *reader) string {
	n := int(r.int32())
	if n < 0 {
		return "NULL"
	}
	v := r.take(n)
	if !printable(v) {
		return "\\x" + hex.EncodeToString(v)
	}
	return string(v)
}

// printable says that v is text rather than a value in binary format.
func printable(v []byte) bool {
	if !utf8.Valid(v) {
		return false
	}
	for _, c := range v {
		if c < 0x20 && c != '\n' && c != '\t' && c != '\r' {
			return false
		}
	}
	return true
}

// FormatBind renders the recorded parameters of a Bind, as $1 = value, a line
// each; values in binary format as hexadecimal.
func FormatBind(data []byte) string {
	r := &reader{b: data}
	r.cstring()
	r.cstring()
	formats := make([]int, r.count(2))
	for i := range formats {
		formats[i] = r.int16()
	}
	var b strings.Builder
	for i := range r.count(4) {
		binary := len(formats) == 1 && formats[0] == 1 || i < len(formats) && formats[i] == 1
		n := int(r.int32())
		fmt.Fprintf(&b, "$%d = ", i+1)
		switch v := r.take(max(n, 0)); {
		case n < 0:
			b.WriteString("NULL")
		case binary:
			b.WriteString("\\x" + hex.EncodeToString(v))
		default:
			b.Write(v)
		}
		b.WriteString("\n")
	}
	if r.bad {
		return b.String() + "(cut off)\n"
	}
	return b.String()
}

package postgres

import (
	"bytes"
	"encoding/binary"

	"github.com/sallyport/sallyport/protocols"
)

// headerBytes is a message's type and length.
const headerBytes = 5

// maxMessage is PostgreSQL's own limit: a length is a positive int32, and no
// value is larger than 1 GB.
const maxMessage = 1 << 30

func malformed(what string) error {
	return &protocols.Refusal{Rule: "protocol", Reason: "malformed " + what + " message", Code: "08P01"}
}

// measure returns the length of the message at the head of b, 0 when b is too
// short to tell.
func measure(b []byte) (int, error) {
	if len(b) < headerBytes {
		return 0, nil
	}
	n := binary.BigEndian.Uint32(b[1:])
	if n < 4 || n > maxMessage {
		return 0, &protocols.Refusal{Rule: "protocol", Reason: "a message with an impossible length", Code: "08P01"}
	}
	return int(n) + 1, nil
}

// A reader takes a message body apart. After a read beyond the end, bad is
// set and everything reads as zero.
type reader struct {
	b   []byte
	bad bool
}

func body(frame []byte) *reader { return &reader{b: frame[headerBytes:]} }

func (r *reader) take(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.bad, r.b = true, nil
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) byte() byte {
	if v := r.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (r *reader) int16() int {
	if v := r.take(2); v != nil {
		return int(int16(binary.BigEndian.Uint16(v)))
	}
	return 0
}

// count reads a number of elements, each of which takes at least size bytes.
func (r *reader) count(size int) int {
	v := r.take(2)
	if v == nil {
		return 0
	}
	n := int(binary.BigEndian.Uint16(v))
	if n*size > len(r.b) {
		r.bad, r.b = true, nil
		return 0
	}
	return n
}

func (r *reader) int32() int32 {
	if v := r.take(4); v != nil {
		return int32(binary.BigEndian.Uint32(v))
	}
	return 0
}

// cstring reads up to a zero byte.
func (r *reader) cstring() []byte {
	i := bytes.IndexByte(r.b, 0)
	if i < 0 {
		r.bad, r.b = true, nil
		return nil
	}
	v := r.b[:i:i]
	r.b = r.b[i+1:]
	return v
}

// done reports whether all was read, and nothing beyond.
func (r *reader) done() bool { return !r.bad && len(r.b) == 0 }

// message appends a message with the given body parts.
func message(dst []byte, kind byte, parts ...string) []byte {
	n := 4
	for _, p := range parts {
		n += len(p)
	}
	dst = append(dst, kind)
	dst = binary.BigEndian.AppendUint32(dst, uint32(n))
	for _, p := range parts {
		dst = append(dst, p...)
	}
	return dst
}

// report appends an ErrorResponse ('E') or a NoticeResponse ('N').
func report(dst []byte, kind byte, severity, code, text, detail, hint string) []byte {
	at := len(dst)
	dst = append(dst, kind, 0, 0, 0, 0)
	for _, f := range [...]struct {
		key   byte
		value string
	}{{'S', severity}, {'V', severity}, {'C', code}, {'M', text}, {'D', detail}, {'H', hint}} {
		if f.value != "" {
			dst = append(dst, f.key)
			dst = append(dst, clean(f.value)...)
			dst = append(dst, 0)
		}
	}
	dst = append(dst, 0)
	binary.BigEndian.PutUint32(dst[at+1:], uint32(len(dst)-at-1))
	return dst
}

// clean takes zero bytes out, which would end a field early.
func clean(s string) string {
	if i := bytes.IndexByte([]byte(s), 0); i >= 0 {
		return string(bytes.ReplaceAll([]byte(s), []byte{0}, nil))
	}
	return s
}

// severities of reports.
const (
	sevError  = "ERROR"
	sevFatal  = "FATAL"
	sevNotice = "NOTICE"
)

// refusal appends the error that tells a client of a refusal.
func refusal(dst []byte, severity string, why *protocols.Refusal) []byte {
	code := why.Code
	if code == "" {
		code = "42501" // insufficient_privilege
	}
	hint := ""
	if why.Rule != "" {
		hint = "rule: " + why.Rule
	}
	return report(dst, 'E', severity, code, "sallyport: refused by "+orElse(why.Rule, "policy")+": "+why.Reason, "", hint)
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

var (
	flushFrame  = message(nil, 'H')
	goodbye     = message(nil, 'X')
	poisonQuery = message(nil, 'Q', poisonText, "\x00")
	// poisonParse names a statement, so that the unnamed one survives as it
	// does when a client's own Bind or Execute fails.
	poisonParse = message(nil, 'P', "sallyport_refused\x00", poisonText, "\x00\x00\x00")
)

// poisonText is a syntax error to every version of PostgreSQL: the target
// itself fails where a command was refused. The target's log shows it.
const poisonText = "refused by sallyport"

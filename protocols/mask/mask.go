// Package mask replaces values. It knows kinds of masks and types of columns;
// which columns are masked for whom is decided elsewhere.
//
// Text columns get a text. A column of any other type gets NULL: there is no
// value of its type that could not be taken for a real one.
package mask

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"unicode/utf8"
)

// Kind is how a value is masked.
type Kind uint8

const (
	Redact Kind = iota // a constant; the zero value, and the strictest that shows there was a value
	Null               // NULL
	Hash               // keyed digest: equal values stay equal, nothing else shows
	Last4              // the last four characters of a value of at least eight
)

// ParseKind reads a kind as configuration spells it.
func ParseKind(s string) (Kind, bool) {
	switch s {
	case "redact", "":
		return Redact, true
	case "null":
		return Null, true
	case "hash":
		return Hash, true
	case "last4":
		return Last4, true
	}
	return 0, false
}

func (k Kind) String() string {
	return [...]string{"redact", "null", "hash", "last4"}[k&3]
}

// Redacted is what Redact shows.
const Redacted = "[masked]"

// stars hides how long the rest of a value is.
const stars = "****"

// Masker masks values for one session. It belongs to one goroutine.
type Masker struct {
	mac hash.Hash
	sum []byte
}

// NewMasker returns a Masker whose hashes are keyed by key, so that nobody
// without it can try values against them.
func NewMasker(key []byte) *Masker { return &Masker{mac: hmac.New(sha256.New, key)} }

// Append appends what the client sees instead of value. It reports null when
// that is NULL, with dst unchanged. It does not allocate when dst has room.
func (m *Masker) Append(dst []byte, kind Kind, textual bool, value []byte) (_ []byte, null bool) {
	if !textual {
		return dst, true
	}
	switch kind {
	case Null:
		return dst, true
	case Hash:
		m.mac.Reset()
		m.mac.Write(value)
		m.sum = m.mac.Sum(m.sum[:0])
		return hex.AppendEncode(dst, m.sum), false
	case Last4:
		return append(append(dst, stars...), last4(value)...), false
	}
	return append(dst, Redacted...), false
}

// last4 is empty for short values, of which four characters would be too much.
func last4(v []byte) []byte {
	at := len(v)
	for range 4 {
		_, n := utf8.DecodeLastRune(v[:at])
		at -= n
	}
	if utf8.RuneCount(v[:at]) < 4 {
		return nil
	}
	return v[at:]
}

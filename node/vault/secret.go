package vault

import (
	"fmt"
	"io"
	"log/slog"
)

// hidden is all that a Secret ever shows of itself.
const hidden = "[secret]"

// Secret is a string that no print, log or encoder shows. Its bytes sit behind
// a pointer, so that even printing a struct that hides a Secret in an
// unexported field (where fmt calls no method) shows an address only.
type Secret struct{ p *string }

// NewSecret wraps s.
func NewSecret(s string) Secret { return Secret{&s} }

// Reveal returns the secret itself, at the one place where it is used.
func (s Secret) Reveal() string {
	if s.p == nil {
		return ""
	}
	return *s.p
}

// IsZero reports whether there is no secret, or an empty one.
func (s Secret) IsZero() bool { return s.p == nil || *s.p == "" }

func (Secret) String() string                 { return hidden }
func (Secret) GoString() string               { return hidden }
func (Secret) Format(f fmt.State, _ rune)     { io.WriteString(f, hidden) }
func (Secret) LogValue() slog.Value           { return slog.StringValue(hidden) }
func (Secret) MarshalText() ([]byte, error)   { return []byte(hidden), nil }
func (Secret) MarshalJSON() ([]byte, error)   { return []byte(`"` + hidden + `"`), nil }
func (Secret) MarshalYAML() (any, error)      { return hidden, nil }
func (Secret) MarshalBinary() ([]byte, error) { return []byte(hidden), nil }

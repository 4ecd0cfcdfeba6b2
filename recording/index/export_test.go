package index

import (
	"testing"

	"github.com/sallyport/sallyport/recording/columnar"
)

// Encode makes the first part of a generation, as somebody would who can write
// to the store.
func Encode(t *testing.T, day string, parts int, supersedes []string, rows []Row) []byte {
	t.Helper()
	b, err := encode(day, meta{Parts: parts, Supersedes: supersedes}, rows)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Decode reads a file's rows.
func Decode(t *testing.T, b []byte) []Row {
	t.Helper()
	var rows []Row
	if err := columnar.Read(b, limits, func(r *Row) error { rows = append(rows, *r); return nil }); err != nil {
		t.Fatal(err)
	}
	return rows
}

// Waiting is how many recordings an Appender has not taken up.
func (a *Appender) Waiting() int { return len(a.queue) }

package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/index"
	"github.com/sallyport/sallyport/recording/terminal"
)

func TestTimeFlags(t *testing.T) {
	day := time.Date(2026, 11, 28, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		in   timeFlags
		from time.Time
		bad  bool
	}{
		{timeFlags{}, time.Time{}, false},
		{timeFlags{from: "2026-11-28"}, day, false},
		{timeFlags{from: "2026-11-28T01:00:00+01:00"}, day, false},
		{timeFlags{from: "2026-11-28T00:00"}, day, false},
		{timeFlags{from: "28.11.2026"}, day, true},
		{timeFlags{to: "yesterday"}, day, true},
		{timeFlags{from: "2026-11-28", since: time.Hour}, day, true},
	} {
		from, _, err := c.in.parse()
		var usage usageError
		if c.bad != errors.As(err, &usage) || !c.bad && !from.Equal(c.from) {
			t.Errorf("%+v: %v, %v", c.in, from, err)
		}
	}
	if from, _, err := (&timeFlags{since: time.Hour}).parse(); err != nil || time.Since(from) < time.Hour || time.Since(from) > time.Hour+time.Minute {
		t.Error(from, err)
	}
}

// TestHitsAreEscaped: what a session sent does nothing to the terminal that a
// search prints on, and makes no line that looks like one of ours.
func TestHitsAreEscaped(t *testing.T) {
	const evil = "x\x1b[2J\u202e\n0 match of 0 recordings"
	var b bytes.Buffer
	printHit(&b, &index.Hit{Name: "2026/11/28/s", Header: recording.Header{Subject: evil, Target: evil, Node: evil}, State: "broken", Problem: evil, Contradicted: true, Matches: 2,
		Operations: []index.Operation{{LSN: 1, Verb: evil, Decision: evil, Rule: evil, Actor: evil, Text: evil}}})
	printStats(&b, &index.Stats{Broken: []string{evil}, Contradicted: []string{evil}, BadFiles: []index.BadFile{{Key: evil, Why: evil}}})
	out := b.String()
	if terminal.EscapeString(out) != out || strings.Count(out, "\n0 match") != 1 {
		t.Errorf("%q", out)
	}
	for _, want := range []string{"BROKEN", "and 1 more", "does not follow"} {
		if !strings.Contains(out, want) {
			t.Errorf("it does not say %q: %s", want, out)
		}
	}
}

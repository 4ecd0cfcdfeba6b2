package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/recording/replay"
)

// TestStepThrough: what each key shows.
func TestStepThrough(t *testing.T) {
	broken := errors.New("altered")
	steps := func(yield func(replay.Step, error) bool) {
		for i := range 6 {
			text := fmt.Sprintf("<step %d>\n", i)
			if i == 4 {
				text = "<step 4> DROP table\n"
			}
			if !yield(replay.Step{N: i, Text: text}, nil) {
				return
			}
		}
		yield(replay.Step{}, broken)
	}
	for _, c := range []struct {
		keys, want string
		err        error
	}{
		{"q", "0", nil},
		{"", "0", nil},
		{"n \nq", "0 1 2 3", nil},
		{"nnpnq", "0 1 2 1 2", nil},
		{"pnq", "0 1", nil},
		{"nnngnq", "0 1 2 3 0 1", nil},
		{"/drop\nq", "0 4", nil},
		{"/dxx\x7f\x7frop\npq", "0 4 3", nil},
		{"n/step\nNq", "0 1 2 3", nil},
		{"nnnnnn", "0 1 2 3 4 5", broken},
		{"/nowhere\n", "0", broken},
		{"xyzq", "0", nil},
	} {
		var out bytes.Buffer
		err := stepThrough(strings.NewReader(c.keys), &out, steps)
		var got []string
		for part := range strings.SplitSeq(out.String(), "<step ") {
			if n, _, ok := strings.Cut(part, ">"); ok {
				got = append(got, n)
			}
		}
		if s := strings.Join(got, " "); s != c.want || !errors.Is(err, c.err) {
			t.Errorf("%q shows %q and %v, want %q and %v", c.keys, s, err, c.want, c.err)
		}
	}
	var out bytes.Buffer
	if err := stepThrough(strings.NewReader("nnp"), &out, func(yield func(replay.Step, error) bool) { yield(replay.Step{Text: "x"}, nil) }); err != nil || !strings.Contains(out.String(), "beginning") {
		t.Error(out.String(), err)
	}
}

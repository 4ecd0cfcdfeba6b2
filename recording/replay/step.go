package replay

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"time"

	"github.com/sallyport/sallyport/recording"
)

// Step is a part of a recording that a person reads at a time: a command with
// its decision and what came back before the next command.
type Step struct {
	N     int // from 1; 0 is the header
	First recording.LSN
	At    time.Time
	// Text is what Print would show of it, escaped. Of a step that is longer
	// than MaxStepBytes it is the beginning, and says so.
	Text string
}

// MaxStepBytes bounds the text of one step.
const MaxStepBytes = 1 << 20

// Steps yields the recording in steps: first who and where, then a step for
// each command, at last how it ended. Like Print it stops at the first problem,
// after what was verified before it. One step and one segment are in memory.
func Steps(ctx context.Context, r *Recording, format Formatter) iter.Seq2[Step, error] {
	return func(yield func(Step, error) bool) {
		var buf bytes.Buffer
		limited := &cutWriter{w: &buf}
		p := &printer{w: limited, start: r.Header.Started, o: PrintOptions{Format: format}, protocol: r.Header.Protocol}
		cur := Step{At: r.Header.Started}
		emit := func() bool {
			if limited.cut > 0 {
				fmt.Fprintf(&buf, "\n(cut here: %d bytes more; `sallyport recordings replay` shows them)\n", limited.cut)
			}
			cur.Text = buf.String()
			buf.Reset()
			limited.cut = 0
			return yield(cur, nil)
		}
		p.header(&r.Header)
		for e, err := range r.Entries(ctx) {
			if err != nil {
				if emit() {
					yield(Step{}, err)
				}
				return
			}
			if e.Type == recording.Command {
				if !emit() {
					return
				}
				cur = Step{N: cur.N + 1, First: e.LSN, At: e.At}
			}
			if p.entry(e); p.err != nil {
				yield(Step{}, p.err)
				return
			}
		}
		p.end(r)
		emit()
	}
}

// cutWriter passes on MaxStepBytes between resets of what it writes to, and
// counts the rest.
type cutWriter struct {
	w   *bytes.Buffer
	cut int
}

func (c *cutWriter) Write(p []byte) (int, error) {
	n := min(len(p), max(0, MaxStepBytes-c.w.Len()))
	c.w.Write(p[:n])
	c.cut += len(p) - n
	return len(p), nil
}

// Package recorder records made-up sessions through a real spool into a store,
// for tests of what reads recordings.
package recorder

import (
	"context"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/recordingtest"
	"github.com/sallyport/sallyport/recording/spool"
)

// Recorder is one node's spool.
type Recorder struct {
	*spool.Spool
	Node *recordingtest.Node
	t    testing.TB
	stop context.CancelFunc
	done chan error
}

// Start opens a spool of a new node in dir; "" is a directory of its own. It is
// closed when the test ends, if not before.
func Start(t testing.TB, ca *recordingtest.CA, node string, store recording.Store, dir string) *Recorder {
	t.Helper()
	n := ca.Node(t, node)
	if dir == "" {
		dir = t.TempDir()
	}
	s, err := spool.Open(spool.Options{Dir: dir, Node: node, Cluster: "c", Signer: n.Key, Certificate: n.Cert, Store: store, SegmentAge: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &Recorder{Spool: s, Node: n, t: t, stop: stop, done: make(chan error, 1)}
	go func() { r.done <- s.Run(ctx) }()
	t.Cleanup(r.Close)
	return r
}

// Close brings what is closed to the store and ends the spool.
func (r *Recorder) Close() {
	if r.stop == nil {
		return
	}
	r.Drain()
	if err := r.Spool.Close(); err != nil {
		r.t.Error("closing the spool:", err)
	}
	r.stop()
	r.stop = nil
	if err := <-r.done; err != nil {
		r.t.Error("the spool:", err)
	}
}

// Drain returns when every session that was closed is in the store.
func (r *Recorder) Drain() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if err := r.Spool.Drain(ctx); err != nil {
		r.t.Fatal(err)
	}
}

// Begin begins a session, filling in what a header must have.
func (r *Recorder) Begin(h recording.Header) *spool.Writer {
	r.t.Helper()
	if h.Kind == "" {
		h.Kind = "session"
	}
	if h.Started.IsZero() {
		h.Started = time.Now()
	}
	w, err := r.Spool.Begin(h)
	if err != nil {
		r.t.Fatal(err)
	}
	return w
}

// Session records a whole one, a second for each entry.
func (r *Recorder) Session(h recording.Header, entries ...recording.Entry) {
	r.t.Helper()
	if h.Started.IsZero() {
		h.Started = time.Now()
	}
	w := r.Begin(h)
	for i := range entries {
		e := entries[i]
		if e.At.IsZero() {
			e.At = h.Started.Add(time.Duration(i+1) * time.Second)
		}
		if err := w.Buffer(&e); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := w.Close(recording.Ending{At: h.Started.Add(time.Duration(len(entries)+1) * time.Second), Reason: "closed"}); err != nil {
		r.t.Fatal(err)
	}
}

// Statement is a command of PostgreSQL, its decision and, when it was
// permitted, one row of one column that came back.
func Statement(op uint64, text, effect, rule string, actions ...string) []recording.Entry {
	out := []recording.Entry{
		{Type: recording.Command, Op: op, Verb: "Query", Text: []byte(text)},
		{Type: recording.Decided, Op: op, Effect: effect, Rule: rule, Reason: effect + "ted by rule " + rule, PolicyIndex: 7, Actions: actions},
	}
	if effect == "permit" {
		out = append(out,
			recording.Entry{Type: recording.Response, Op: op, Data: Result("id", fmt.Sprint("row of ", op))},
			recording.Entry{Type: recording.Outcome, Op: op, Effect: "ok", Reason: "SELECT 1", Rows: 1, Duration: 1500 * time.Microsecond})
	}
	return out
}

// Result is what a PostgreSQL server answers to a query of one column and one
// row.
func Result(column, value string) []byte {
	frame := func(typ byte, body []byte) []byte {
		return append(binary.BigEndian.AppendUint32([]byte{typ}, uint32(4+len(body))), body...)
	}
	desc := append([]byte{0, 1}, column+"\x00"...)
	desc = append(desc, make([]byte, 18)...)
	row := binary.BigEndian.AppendUint32([]byte{0, 1}, uint32(len(value)))
	out := frame('T', desc)
	out = append(out, frame('D', append(row, value...))...)
	return append(out, frame('C', []byte("SELECT 1\x00"))...)
}

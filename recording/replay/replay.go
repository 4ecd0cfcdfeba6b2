package replay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/terminal"
)

// Recording is one recording opened for reading.
type Recording struct {
	Name   string // YYYY/MM/DD/session
	Header recording.Header
	// Ending is nil when the recording is unfinished, and until Entries has
	// come to its end.
	Ending *recording.Ending
	// Failed tells, after Entries, why the node could record no further.
	Failed string

	store recording.Store
	trust Trust
	g     *group
}

// Open finds a recording (a session or YYYY/MM/DD/session) and verifies its
// header.
func Open(ctx context.Context, store recording.Store, name string, trust Trust) (*Recording, error) {
	if trust.Roots == nil {
		return nil, errors.New("recording: reading needs the cluster's CA certificate")
	}
	g, err := find(ctx, store, name)
	if err != nil {
		return nil, err
	}
	c := newCheck(store, trust, g)
	c.strict = true
	if err := c.checkHeader(ctx); err != nil {
		return nil, err
	}
	return &Recording{Name: g.name(), Header: c.header.Header, store: store, trust: trust, g: g}, nil
}

// Entries yields the entries in order, each verified with its segment before
// it is yielded. At the first problem it yields that, a Problem, and ends. Of an
// unfinished recording it yields what was in the store when it was opened. One
// segment at a time is in memory.
func (r *Recording) Entries(ctx context.Context) iter.Seq2[*recording.Entry, error] {
	return func(yield func(*recording.Entry, error) bool) {
		c := newCheck(r.store, r.trust, r.g)
		c.strict = true
		c.each = func(e *recording.Entry) error {
			if !yield(e, nil) {
				return recording.ErrStop
			}
			return nil
		}
		err := c.run(ctx)
		if errors.Is(err, recording.ErrStop) {
			return
		}
		if err != nil {
			yield(nil, err)
			return
		}
		r.Ending, r.Failed = c.res.Ending, c.res.Failed
	}
}

// A Formatter shows what an entry's Data holds, which is in the target's
// protocol (Header.Protocol). What it writes is escaped.
type Formatter func(w io.Writer, protocol string, e *recording.Entry) error

// PrintOptions say how Print shows a recording.
type PrintOptions struct {
	Format Formatter // nil: the bytes, escaped
	// Speed plays with the pauses of the session divided by it; 0 prints at
	// once. No pause is longer than MaxPause (zero: 3 s).
	Speed    float64
	MaxPause time.Duration
}

// Print shows a recording as a person reads it: who, then each statement with
// its decision, its responses and its outcome, with the time since the start.
// Everything that came from outside is escaped. A problem ends it with an error,
// after what was verified before it.
func Print(ctx context.Context, out io.Writer, r *Recording, o PrintOptions) error {
	if o.MaxPause == 0 {
		o.MaxPause = 3 * time.Second
	}
	p := &printer{w: out, start: r.Header.Started, o: o, protocol: r.Header.Protocol}
	p.header(&r.Header)
	last := r.Header.Started
	for e, err := range r.Entries(ctx) {
		if err != nil {
			return err
		}
		if o.Speed > 0 {
			pause := min(time.Duration(float64(e.At.Sub(last))/o.Speed), o.MaxPause)
			if err := sleep(ctx, pause); err != nil {
				return err
			}
			last = e.At
		}
		if p.entry(e); p.err != nil {
			return p.err
		}
	}
	p.end(r)
	return p.err
}

// An EntryPrinter shows entries as Print does, one by one, as they come.
type EntryPrinter struct{ p *printer }

// NewEntryPrinter returns one that writes to w about a session that began at
// start.
func NewEntryPrinter(w io.Writer, start time.Time, protocol string, format Formatter) *EntryPrinter {
	return &EntryPrinter{&printer{w: w, start: start, protocol: protocol, o: PrintOptions{Format: format}}}
}

// Print shows an entry, escaped. It returns the first error of writing.
func (e *EntryPrinter) Print(entry *recording.Entry) error {
	e.p.entry(entry)
	return e.p.err
}

// end shows how it ended, after Entries has come to its end.
func (p *printer) end(r *Recording) {
	switch {
	case r.Ending != nil:
		p.line(r.Ending.At, "ended: %s", join(r.Ending.Reason, r.Ending.Detail))
	default:
		p.printf("the recording is unfinished: the session is going on, or its node could not close it yet\n")
	}
	if r.Failed != "" {
		p.printf("the node could record no further: %s\n", terminal.EscapeLine(r.Failed))
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

type printer struct {
	w        io.Writer
	start    time.Time
	protocol string
	o        PrintOptions
	err      error // the first of writing; nothing is written after it
}

// printf writes; its string arguments must have been escaped.
func (p *printer) printf(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}

// line writes one line with its time; string arguments are escaped here.
func (p *printer) line(at time.Time, format string, args ...any) {
	p.printf("%+10.3fs  %s\n", at.Sub(p.start).Seconds(), terminal.EscapeLine(fmt.Sprintf(format, args...)))
}

func (p *printer) header(h *recording.Header) {
	field := func(name, value string) {
		if value != "" {
			p.printf("%-11s %s\n", name, terminal.EscapeLine(value))
		}
	}
	field("session", h.Session)
	field("started", h.Started.UTC().Format(time.RFC3339Nano))
	field("node", h.Node+" of "+h.Cluster)
	field("subject", strings.TrimSpace(h.SubjectKind+" "+h.Subject))
	field("issuer", h.Issuer)
	field("groups", strings.Join(h.Groups, ", "))
	for _, k := range slices.Sorted(maps.Keys(h.Claims)) {
		p.printf("  %-20s %s\n", terminal.EscapeLine(k), terminal.EscapeLine(fmt.Sprint(h.Claims[k])))
	}
	field("client", h.Client)
	field("target", strings.Join(nonEmpty(h.Protocol, h.Target, h.Profile, h.Database), " "))
	field("policy", fmt.Sprintf("index %d", h.PolicyIndex))
	for _, k := range slices.Sorted(maps.Keys(h.Labels)) {
		field(k, h.Labels[k])
	}
	p.printf("\n")
}

func (p *printer) entry(e *recording.Entry) {
	op := ""
	if e.Op != 0 {
		op = fmt.Sprintf("#%d ", e.Op)
	}
	what := ""
	switch e.Type {
	case recording.Command:
		what = e.Verb
	case recording.Decided:
		what = join(e.Effect, nonEmpty(rule(e.Rule), e.Reason)...)
		what += fmt.Sprintf(" (policy index %d)", e.PolicyIndex)
	case recording.Approval:
		what = join("approval "+e.Effect, nonEmpty(e.Approval, by(e.Actor), e.Reason)...)
	case recording.Response:
		what = strings.TrimSpace("response " + e.Verb)
		if e.Data != nil {
			what += fmt.Sprintf(", %d bytes", len(e.Data))
		}
	case recording.Outcome:
		what = join(e.Effect, nonEmpty(e.Reason)...)
		what += fmt.Sprintf(", %d rows", e.Rows)
		if e.Duration > 0 {
			what += fmt.Sprintf(", %v", e.Duration.Round(time.Microsecond))
		}
	case recording.Cut:
		what = join("CUT", nonEmpty(rule(e.Rule), e.Reason)...)
	case recording.Note:
		what = join("note", nonEmpty(e.Verb, e.Effect, rule(e.Rule), by(e.Actor), e.Reason)...)
	default: // of a later version
		what = join(fmt.Sprintf("entry of type %d", e.Type), nonEmpty(e.Verb, e.Effect, rule(e.Rule), by(e.Actor), e.Reason)...)
	}
	p.line(e.At, "%s%s", op, what)
	if len(e.Actions) > 0 {
		p.line2(strings.Join(e.Actions, ", "))
	}
	for _, k := range slices.Sorted(maps.Keys(e.Detail)) {
		p.line2(k + ": " + e.Detail[k])
	}
	if len(e.Text) > 0 {
		p.block(func(w io.Writer) error {
			_, err := w.Write(e.Text)
			return err
		})
	}
	if len(e.Data) > 0 {
		p.block(func(w io.Writer) error {
			if p.o.Format != nil {
				return p.o.Format(w, p.protocol, e)
			}
			_, err := w.Write(e.Data)
			return err
		})
	}
}

const indent = "             "

func (p *printer) line2(s string) { p.printf("%s%s\n", indent, terminal.EscapeLine(s)) }

// block writes several lines, escaped, each behind a bar, so that none of them
// can pass for a line of ours.
func (p *printer) block(fn func(io.Writer) error) {
	if p.err != nil {
		return
	}
	b := &barred{w: p.w}
	w := terminal.Escape(b)
	p.err = errors.Join(fn(w), w.Close(), b.end())
}

// barred begins every line with indentation and a bar.
type barred struct {
	w    io.Writer
	open bool // within a line
}

func (b *barred) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		line := rest
		if i := bytes.IndexByte(rest, '\n'); i >= 0 {
			line = rest[:i+1]
		}
		rest = rest[len(line):]
		if !b.open {
			if _, err := io.WriteString(b.w, indent+"| "); err != nil {
				return 0, err
			}
		}
		if _, err := b.w.Write(line); err != nil {
			return 0, err
		}
		b.open = line[len(line)-1] != '\n'
	}
	return len(p), nil
}

func (b *barred) end() error {
	if !b.open {
		return nil
	}
	_, err := io.WriteString(b.w, "\n")
	return err
}

func nonEmpty(parts ...string) []string {
	return slices.DeleteFunc(parts, func(s string) bool { return s == "" })
}

func join(what string, parts ...string) string {
	return strings.Join(nonEmpty(append([]string{what}, parts...)...), ", ")
}

func rule(id string) string {
	if id == "" {
		return ""
	}
	return "rule " + id
}

func by(actor string) string {
	if actor == "" {
		return ""
	}
	return "by " + actor
}

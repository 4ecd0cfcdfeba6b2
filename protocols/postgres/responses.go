package postgres

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"

	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/recording"
)

const (
	// maxAnswer bounds the messages of a target that are looked at whole; the
	// largest honest one is a RowDescription of 1,600 columns.
	maxAnswer = 1 << 20
	// maxMaskedRow bounds a row of a result with masked columns.
	maxMaskedRow = 16 << 20
)

// responses is the target's half of the codec.
type responses struct {
	*conversation
	p *Protocol

	cols      []column // of the result that is being answered, with what is masked
	planned   *analysis
	plannedAt int
	copyOut   bool
	fatal     bool // the target said goodbye with an error
}

var _ protocols.Responses = (*responses)(nil)

func (r *responses) Op() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.first(); w != nil {
		return w.op
	}
	return 0
}

func (r *responses) Idle() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.n == 0
}

func (r *responses) Delivered() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.leaving {
		r.leaving = false
		r.cond.Broadcast()
	}
}

func (r *responses) Frame(b []byte) (protocols.Frame, error) {
	n, err := measure(b)
	f := protocols.Frame{Len: n}
	if n == 0 || err != nil {
		return f, err
	}
	switch b[0] {
	case 'D':
		r.mu.Lock()
		defer r.mu.Unlock()
		w := r.first()
		switch {
		case w == nil || w.refused != nil || (w.step != stepQuery && w.step != stepExecute):
			return f, nil
		case n < headerBytes+2:
			return f, malformed("DataRow")
		case len(b) < headerBytes+2:
			return protocols.Frame{}, nil
		}
		if r.guard && (w.step == stepQuery || w.portal.planned) {
			if err := r.fits(b, w); err != nil {
				return f, err
			}
		}
		switch {
		case r.masks(w) || (r.guard && w.step == stepExecute && !w.portal.planned):
			if n > maxMaskedRow {
				return f, &protocols.Refusal{Rule: "limits", Reason: "a row of more than 16 MiB in a result with masked columns", Code: "54000"}
			}
			f.Kind, f.Row = protocols.Answer, true
		default:
			f.Kind, f.Row = protocols.Pass, true
		}
		return f, nil
	case 'd':
		if r.copyOut {
			f.Kind = protocols.Pass
		}
		return f, nil
	case 'E', 'N':
		f.Kind = protocols.Answer
		if n > maxAnswer {
			return f, r.oversize(b)
		}
		return f, nil
	case 'Z':
		f.Trailer = true
	case 'T', 'C', 'I', 's', '1', '2', '3', 't', 'n', 'S', 'A', 'G', 'H', 'c':
	default:
		return f, nil // Unknown
	}
	if n > maxAnswer {
		return f, &protocols.Refusal{Rule: "limits", Reason: fmt.Sprintf("the target sent a message %q of %d bytes", b[0], n), Code: "54000"}
	}
	f.Kind = protocols.Answer
	return f, nil
}

// oversize is a report with a text of megabytes: a value, put into a message.
func (r *responses) oversize(b []byte) error {
	f := readReport(b)
	return &protocols.Refusal{Rule: "limits", Reason: "the target reported SQLSTATE " + f.code + " with a message of more than 1 MiB", Code: "54000"}
}

// masks says that the rows of w must be looked at. r.mu is held.
func (r *responses) masks(w *awaited) bool {
	if w.step == stepQuery {
		return w.at < len(w.query.parts) && w.query.parts[w.at].Reads
	}
	return w.portal.an.reads
}

// fits checks that a row has as many fields as were planned for it. r.mu is held.
func (r *responses) fits(frame []byte, w *awaited) error {
	want := r.cols
	if w.step == stepExecute {
		want = w.portal.cols
	} else if r.planned != w.query || r.plannedAt != w.at {
		return outOfPlace('D')
	}
	if n := int(binary.BigEndian.Uint16(frame[headerBytes:])); n != len(want) {
		return r.alarm(fmt.Sprintf("a row of %d fields in a result that was described with %d", n, len(want)))
	}
	return nil
}

func outOfPlace(b byte) error {
	return &protocols.Refusal{Rule: "protocol", Reason: fmt.Sprintf("the target sent a message of type %q out of place", b), Code: "08P01"}
}

// Answer deals with one message of the target. It takes note of what was
// completed, and appends what the client is to see.
func (r *responses) Answer(dst, frame []byte) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.first()
	kind := frame[0]

	switch kind { // what may come at any time
	case 'S':
		return r.setting(dst, frame)
	case 'N':
		switch how := r.discretion(w); how {
		case sealed:
			return dst, nil
		default:
			return scrub(dst, frame, how), nil
		}
	case 'A':
		if r.guard {
			return dst, nil // a payload can hold anything
		}
		return append(dst, frame...), nil
	case 'E':
		return r.failure(dst, frame, w)
	}
	if w == nil || (w.refused != nil && kind != 'Z') {
		return dst, outOfPlace(kind)
	}

	switch kind {
	case '1', '2', '3':
		if want := map[byte]step{'1': stepParse, '2': stepBind, '3': stepClose}[kind]; w.step != want {
			return dst, outOfPlace(kind)
		}
		if kind == '1' {
			r.done(w, "ok", "PARSE", 0)
		} else if kind == '2' {
			r.done(w, "ok", "BIND", 0)
		}
		r.confirm(w)
		r.pop()
	case 't':
		if w.step != stepDescribe || w.stmt == nil {
			return dst, outOfPlace(kind)
		}
		if err := w.stmt.parameters(frame); err != nil {
			return dst, err
		}
		if w.hidden {
			return dst, nil
		}
	case 'T', 'n':
		switch w.step {
		case stepDescribe:
			if err := r.described(w, frame); err != nil {
				return dst, err
			}
			hidden := w.hidden
			r.pop()
			if hidden {
				return dst, nil
			}
		case stepQuery:
			if kind == 'n' || w.at >= len(w.query.parts) {
				return dst, outOfPlace(kind)
			}
			var err error
			if r.cols, err = shape(r.cols, frame); err != nil {
				return dst, err
			}
			if err := r.plan(r.cols, &w.query.parts[w.at], w.query.world); err != nil {
				return dst, err
			}
			r.planned, r.plannedAt = w.query, w.at
		default:
			return dst, outOfPlace(kind)
		}
	case 'D':
		cols := r.cols
		if w.step == stepExecute {
			if !w.portal.planned {
				if err := r.planPortal(w.portal); err != nil {
					return dst, err
				}
			}
			if err := r.fits(frame, w); err != nil {
				return dst, err
			}
			if !w.portal.an.reads {
				return append(dst, frame...), nil
			}
			cols = w.portal.cols
		} else if r.planned != w.query || r.plannedAt != w.at {
			return dst, outOfPlace(kind)
		}
		return maskRow(dst, frame, cols, r.masker)
	case 'C', 'I', 's':
		r.copyOut = false
		tag := ""
		if kind == 'C' {
			b := body(frame)
			tag = string(b.cstring())
			if !b.done() {
				return dst, malformed("CommandComplete")
			}
		}
		switch w.step {
		case stepQuery:
			if kind == 's' || (kind == 'C' && w.at >= len(w.query.parts)) {
				return dst, outOfPlace(kind)
			}
			if len(w.tags) < 256 {
				if len(w.tags) > 0 {
					w.tags = append(w.tags, "; "...)
				}
				w.tags = append(w.tags, tag...)
			}
			w.rows += tagRows(tag)
			r.confirmSQL(w, w.at)
			w.at++
			r.planned = nil
		case stepExecute:
			if kind == 's' {
				tag = "suspended"
			}
			r.done(w, "ok", tag, tagRows(tag))
			r.confirm(w)
			r.copy = copyNone
			r.pop()
		default:
			return dst, outOfPlace(kind)
		}
	case 'G', 'H':
		an, at := w.query, w.at
		if w.step == stepExecute {
			an, at = w.portal.an, 0
		} else if w.step != stepQuery {
			return dst, outOfPlace(kind)
		}
		if at >= len(an.parts) || (kind == 'G' && !an.parts[at].CopyIn) || (kind == 'H' && !an.parts[at].CopyOut) {
			return dst, &protocols.Refusal{Rule: "protocol", Reason: "the target began a COPY that the statement was not understood to be", Code: "08P01"}
		}
		if kind == 'G' {
			r.copy = copyIn
			r.cond.Broadcast()
		} else {
			r.copyOut = true
		}
	case 'c':
		if !r.copyOut {
			return dst, outOfPlace(kind)
		}
		r.copyOut = false
	case 'Z':
		if len(frame) != headerBytes+1 || (w.step != stepQuery && w.step != stepSync) {
			return dst, outOfPlace(kind)
		}
		if w.step == stepSync {
			r.settle()
		}
		if w.step == stepQuery {
			switch {
			case w.refused != nil && w.failed == nil:
				return dst, outOfPlace(kind)
			case w.refused != nil:
				r.done(w, "refused", w.refused.Reason, 0)
			case w.failed != nil:
				r.done(w, "error", w.failed.code+" "+w.failed.text, w.rows)
			default:
				r.done(w, "ok", string(w.tags), w.rows)
			}
			r.copy = copyNone
			r.skip(w) // names of statements that did not come to run
		}
		r.status = frame[headerBytes]
		if r.status == 'I' {
			r.portals.forget(nil) // portals end with their transaction
			r.cursors.forget(func(c *cursor) bool { return c.holds })
		}
		r.pop()
	default:
		return dst, outOfPlace(kind)
	}
	return append(dst, frame...), nil
}

// failure deals with an ErrorResponse.
func (r *responses) failure(dst, frame []byte, w *awaited) ([]byte, error) {
	f := readReport(frame)
	r.copyOut = false
	fatal := f.severity == sevFatal || f.severity == "PANIC"
	if w != nil && w.refused != nil && !fatal {
		if f.code != "42601" && f.code != "57014" { // the poison's syntax error, or a cancel that came before it
			r.a.Record.Buffer(&recording.Entry{Type: recording.Note, Op: w.op, Reason: "the target failed with SQLSTATE " + f.code + " at a refused command"})
		}
		dst = refusal(dst, sevError, w.refused)
	} else {
		at := len(dst)
		dst = scrub(dst, frame, r.discretion(w))
		f = readReport(dst[at:]) // the record holds what the client saw
	}
	r.fatal = r.fatal || fatal
	if w == nil || fatal {
		return dst, nil
	}
	switch w.step {
	case stepQuery:
		if w.failed == nil {
			w.failed = &f
		}
		r.copy = copyNone
		r.cond.Broadcast()
	case stepSync: // a deferred constraint, say; ReadyForQuery follows
	default:
		if w.refused != nil {
			r.done(w, "refused", w.refused.Reason, 0)
		} else {
			r.done(w, "error", f.code+" "+f.text, 0)
		}
		w.op = 0
		r.skipToSync()
	}
	return dst, nil
}

func (r *responses) done(w *awaited, effect, reason string, rows uint64) {
	if w.op != 0 {
		r.ch.Done(protocols.Done{Op: w.op, Effect: effect, Reason: reason, Rows: rows, Began: w.began})
	}
}

// pinned are the settings that the gateway's reading of statements depends on.
var pinned = map[string]string{"client_encoding": "UTF8", "standard_conforming_strings": "on"}

func (r *responses) setting(dst, frame []byte) ([]byte, error) {
	b := body(frame)
	name, value := string(b.cstring()), string(b.cstring())
	if !b.done() {
		return dst, malformed("ParameterStatus")
	}
	if want, ok := pinned[name]; ok && value != want {
		return dst, &protocols.Refusal{Rule: "pinned-setting", Reason: name + " became " + strconv.Quote(value) + "; the gateway needs " + want, Code: "42501"}
	}
	if _, known := r.settings[name]; known || len(r.settings) < 256 {
		r.settings[name] = value
	}
	return append(dst, frame...), nil
}

// tagRows reads the row count off a command tag.
func tagRows(tag string) uint64 {
	i := bytes.LastIndexByte([]byte(tag), ' ')
	if i < 0 {
		return 0
	}
	n, _ := strconv.ParseUint(tag[i+1:], 10, 64)
	return n
}

// alarm ends the session: what the target describes is not what the statement
// was understood to be.
func (r *responses) alarm(reason string) error {
	r.a.Record.Append(&recording.Entry{Type: recording.Note, Rule: "masking-alarm", Reason: reason})
	r.p.alarmed(r.a, reason)
	return &protocols.Refusal{Rule: "masking-alarm", Reason: "the target's description of the result does not match the gateway's analysis, so nothing of it can leave", Code: "42501"}
}

// Package export writes a recording in formats that other tools read: JSON
// Lines, Parquet, OCSF events, asciicasts, and one HTML page to hand to
// somebody.
//
// Every export verifies the recording first and says what was found; what is
// exported is what can be believed. No export can do something to who looks at
// it: control characters and those that hide or reorder text are escaped in
// each, in the way of its format.
package export

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/replay"
)

// Format is one of the formats.
type Format string

// The formats.
const (
	JSONL       Format = "jsonl"        // a line for the header, each entry and the ending
	Parquet     Format = "parquet"      // a row for each entry
	OCSF        Format = "ocsf"         // Datastore Activity (6005) events, one a line
	AsciicastV2 Format = "asciicast-v2" //
	AsciicastV3 Format = "asciicast-v3" //
	HTML        Format = "html"         // a page that needs nothing else
)

// Formats are all of them.
var Formats = []Format{JSONL, Parquet, OCSF, AsciicastV2, AsciicastV3, HTML}

// Options say what to export.
type Options struct {
	Format Format
	Trust  replay.Trust
	// Authorities are the certificates in Trust.Roots, for a page to name.
	Authorities []*x509.Certificate
	// Results returns a Formatter for one recording; nil: bytes as they are.
	Results func() replay.Formatter
	// MaxBytes bounds an HTML page: 16 MiB when zero.
	MaxBytes int
	Version  string // of this program
}

// Write exports the recording to w. The Result tells what verifying found; when
// it is broken, w has what could be believed. After an error w is not complete.
func Write(ctx context.Context, w io.Writer, store recording.Store, item replay.Item, o Options) (*replay.Result, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = 16 << 20
	}
	res, err := item.Read(ctx, store, o.Trust, replay.Reading{})
	if err != nil {
		return nil, err
	}
	if res.Header == nil {
		return res, fmt.Errorf("recording: %s cannot be read: %s", item.Name(), res.Why())
	}
	e := exporter{o: o, res: res, item: item, w: w, results: raw}
	if o.Results != nil {
		e.results = o.Results()
	}
	var f interface {
		begin() error
		entry(e *recording.Entry) error
		end() error
	}
	switch o.Format {
	case JSONL:
		f = &jsonl{exporter: e}
	case Parquet:
		f = &parquetFile{exporter: e}
	case OCSF:
		f = &ocsf{exporter: e}
	case AsciicastV2, AsciicastV3:
		f = &cast{exporter: e}
	case HTML:
		f = &page{exporter: e}
	default:
		return nil, fmt.Errorf("recording: no format %q; there are %v", o.Format, Formats)
	}
	if err := f.begin(); err != nil {
		return nil, err
	}
	again, err := item.Read(ctx, store, o.Trust, replay.Reading{Each: f.entry})
	if err != nil {
		return nil, err
	}
	if again.Entries != res.Entries || again.State() != res.State() {
		return nil, errors.New("recording: the store changed while it was read")
	}
	return res, f.end()
}

func raw(w io.Writer, _ string, e *recording.Entry) error {
	_, err := w.Write(e.Data)
	return err
}

// exporter is what all formats have.
type exporter struct {
	o       Options
	res     *replay.Result
	item    replay.Item
	w       io.Writer
	results replay.Formatter
	buf     bytes.Buffer
}

// result is what an entry's data says, not escaped. Entries must come in order,
// each once.
func (x *exporter) result(e *recording.Entry) (string, error) {
	if len(e.Data) == 0 {
		return "", nil
	}
	x.buf.Reset()
	if err := x.results(&x.buf, x.res.Header.Protocol, e); err != nil {
		return "", err
	}
	return x.buf.String(), nil
}

// TypeName is an entry type's name in exports.
func TypeName(t recording.EntryType) string {
	switch t {
	case recording.Command:
		return "command"
	case recording.Decided:
		return "decision"
	case recording.Approval:
		return "approval"
	case recording.Response:
		return "response"
	case recording.Outcome:
		return "outcome"
	case recording.Cut:
		return "cut"
	case recording.Note:
		return "note"
	}
	return fmt.Sprintf("type-%d", t)
}

// Verification is the outcome of verifying, as exports tell it.
type Verification struct {
	State        string        `json:"state"`
	Problems     []string      `json:"problems,omitempty"`
	Entries      uint64        `json:"entries"`
	Certificates []Certificate `json:"certificates"`
}

// Certificate names one that signed.
type Certificate struct {
	Subject   string    `json:"subject"`
	SHA256    string    `json:"sha256"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
}

const maxProblems = 100 // that an export names

func (x *exporter) verification() Verification {
	v := Verification{State: x.res.State(), Entries: x.res.Entries}
	for _, p := range x.res.Problems[:min(len(x.res.Problems), maxProblems)] {
		v.Problems = append(v.Problems, strings.TrimSpace(string(p.Kind)+" "+p.Object)+": "+p.Text)
	}
	for _, c := range x.res.Certificates {
		v.Certificates = append(v.Certificates, certificate(c))
	}
	return v
}

func certificate(c *x509.Certificate) Certificate {
	sum := sha256.Sum256(c.Raw)
	return Certificate{c.Subject.String(), hex.EncodeToString(sum[:]), c.NotBefore.UTC(), c.NotAfter.UTC()}
}

// line writes v as one line of JSON in ASCII: what would not show as itself is
// escaped with everything else that is not ASCII, and nothing is lost.
func (x *exporter) line(v any) error {
	b, err := marshal(v)
	if err != nil {
		return err
	}
	_, err = x.w.Write(append(b, '\n'))
	return err
}

func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	in := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	out := make([]byte, 0, len(in)+len(in)/8)
	for len(in) > 0 {
		if in[0] < 0x7f {
			out = append(out, in[0])
			in = in[1:]
			continue
		}
		r, n := utf8.DecodeRune(in)
		if hi, lo := utf16.EncodeRune(r); hi != utf8.RuneError {
			out = fmt.Appendf(out, `\u%04x\u%04x`, hi, lo)
		} else {
			out = fmt.Appendf(out, `\u%04x`, r)
		}
		in = in[n:]
	}
	return out, nil
}

// jsonl is JSON Lines.
type jsonl struct{ exporter }

func (j *jsonl) begin() error {
	return j.line(struct {
		Type         string           `json:"type"`
		Name         string           `json:"name"`
		Header       recording.Header `json:"header"`
		Verification Verification     `json:"verification"`
	}{"recording", j.item.Name(), *j.res.Header, j.verification()})
}

// jsonEntry is an entry as JSON. Bytes that are not UTF-8 are in base64, under
// the name that says so.
type jsonEntry struct {
	Type        string            `json:"type"`
	LSN         uint64            `json:"entry"`
	At          time.Time         `json:"at"`
	Op          uint64            `json:"op,omitempty"`
	Verb        string            `json:"verb,omitempty"`
	Effect      string            `json:"effect,omitempty"`
	Rule        string            `json:"rule,omitempty"`
	Reason      string            `json:"reason,omitempty"`
	PolicyIndex uint64            `json:"policy_index,omitempty"`
	Actions     []string          `json:"actions,omitempty"`
	Approval    string            `json:"approval,omitempty"`
	Actor       string            `json:"actor,omitempty"`
	Detail      map[string]string `json:"detail,omitempty"`
	Text        string            `json:"text,omitempty"`
	TextBase64  string            `json:"text_base64,omitempty"`
	DataBase64  string            `json:"data_base64,omitempty"`
	Result      string            `json:"result,omitempty"` // what the data says, for a reader
	Rows        uint64            `json:"rows,omitempty"`
	Duration    int64             `json:"duration_ns,omitempty"`
}

func (j *jsonl) entry(e *recording.Entry) error {
	result, err := j.result(e)
	if err != nil {
		return err
	}
	out := jsonEntry{
		Type: TypeName(e.Type), LSN: uint64(e.LSN), At: e.At.UTC(), Op: e.Op, Verb: e.Verb, Effect: e.Effect, Rule: e.Rule, Reason: e.Reason,
		PolicyIndex: e.PolicyIndex, Actions: e.Actions, Approval: e.Approval, Actor: e.Actor, Detail: e.Detail,
		DataBase64: base64.StdEncoding.EncodeToString(e.Data), Result: result, Rows: e.Rows, Duration: int64(e.Duration),
	}
	if utf8.Valid(e.Text) {
		out.Text = string(e.Text)
	} else {
		out.TextBase64 = base64.StdEncoding.EncodeToString(e.Text)
	}
	return j.line(out)
}

func (j *jsonl) end() error {
	return j.line(struct {
		Type   string            `json:"type"`
		Ending *recording.Ending `json:"ending"` // null: unfinished
		Failed string            `json:"failed,omitempty"`
	}{"end", j.res.Ending, j.res.Failed})
}

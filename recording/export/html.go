package export

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"html"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/terminal"
)

// page is one HTML page without scripts, pictures or anything that is fetched:
// its Content-Security-Policy allows its own style sheet and nothing else. What
// came from outside is escaped for a reader as on a terminal, then for HTML.
type page struct {
	exporter
	body  bytes.Buffer
	shown uint64
	cut   bool
}

// maxBlock bounds one statement or result on a page.
const maxBlock = 256 << 10

const style = `body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}
h1{font-size:1.3rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse}th{text-align:left;vertical-align:top;padding:.1rem 1rem .1rem 0;font-weight:600}td{padding:.1rem 0;overflow-wrap:anywhere}
pre{background:#f4f4f4;padding:.5rem .7rem;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0 .2rem 7rem}
.state{padding:.6rem .9rem;border-left:.4rem solid}.verified{background:#e8f5e9;border-color:#2e7d32}.unfinished{background:#fff8e1;border-color:#f9a825}.broken{background:#ffebee;border-color:#c62828}
.entry{margin:.5rem 0}.time{display:inline-block;width:6.5rem;color:#666}.refuse{color:#c62828}.hold{color:#e65100}.what{font-weight:600}.more{margin-left:7rem;color:#555;overflow-wrap:anywhere}
code{overflow-wrap:anywhere}`

func esc(s string) string      { return html.EscapeString(terminal.EscapeLine(s)) }
func escBlock(s string) string { return html.EscapeString(terminal.EscapeString(s)) }

func (p *page) begin() error { return nil }

func (p *page) entry(e *recording.Entry) error {
	result, err := p.result(e) // also when it is not shown: results are told apart in order
	if err != nil || p.cut {
		return err
	}
	before := p.body.Len()
	p.write(e, result)
	if p.body.Len() > p.o.MaxBytes {
		p.body.Truncate(before)
		p.cut = true
		return nil
	}
	p.shown++
	return nil
}

func (p *page) write(e *recording.Entry, result string) {
	w := &p.body
	what := []string{TypeName(e.Type)}
	switch e.Type {
	case recording.Command:
		what = []string{e.Verb}
	case recording.Decided, recording.Outcome:
		what = []string{e.Effect}
	default:
		what = append(what, e.Verb, e.Effect)
	}
	op := ""
	if e.Op != 0 {
		op = "#" + str(e.Op) + " "
	}
	class := "what"
	if e.Type == recording.Decided && (e.Effect == "refuse" || e.Effect == "hold") {
		class += " " + e.Effect
	}
	fmt.Fprintf(w, `<div class="entry"><span class="time">%+.3fs</span><span class="%s">%s%s</span>`, e.At.Sub(p.res.Header.Started).Seconds(), class, op, esc(strings.Join(nonEmpty(what...), " ")))
	var more []string
	add := func(name, value string) {
		if value != "" {
			more = append(more, strings.TrimSpace(name+" "+value))
		}
	}
	add("rule", e.Rule)
	add("", e.Reason)
	add("approval", e.Approval)
	add("by", e.Actor)
	if e.Type == recording.Decided {
		add("policy index", str(e.PolicyIndex))
	}
	if e.Type == recording.Outcome {
		add("", str(e.Rows)+" rows")
		add("", e.Duration.Round(time.Microsecond).String())
	}
	if len(more) > 0 {
		fmt.Fprintf(w, " %s", esc(strings.Join(more, ", ")))
	}
	if len(e.Actions) > 0 {
		fmt.Fprintf(w, `<div class="more">%s</div>`, esc(strings.Join(e.Actions, ", ")))
	}
	for _, k := range slices.Sorted(maps.Keys(e.Detail)) {
		fmt.Fprintf(w, `<div class="more">%s: %s</div>`, esc(k), esc(e.Detail[k]))
	}
	p.block(string(e.Text))
	p.block(result)
	io.WriteString(w, "</div>\n")
}

func (p *page) block(text string) {
	if text == "" {
		return
	}
	cut := ""
	if len(text) > maxBlock {
		cut = fmt.Sprintf(`<div class="more">(cut here: %d of %d bytes are shown)</div>`, maxBlock, len(text))
		text = text[:maxBlock]
	}
	fmt.Fprintf(&p.body, "<pre>%s</pre>%s", escBlock(strings.TrimSuffix(text, "\n")), cut)
}

func (p *page) end() error {
	h, v := p.res.Header, p.verification()
	sum := sha256.Sum256([]byte(style))
	var b bytes.Buffer
	title := "Recording " + h.Session
	fmt.Fprintf(&b, `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-%s'; base-uri 'none'; form-action 'none'">
<meta name="referrer" content="no-referrer"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>%s</title>
<style>%s</style></head><body>
<h1>%s</h1>
`, base64.StdEncoding.EncodeToString(sum[:]), esc(title), style, esc(title))
	words := map[string]string{
		"verified":   "Verified: complete, and as the node wrote it.",
		"unfinished": "Unfinished: as the node wrote it as far as it goes; the session was going on, its node could not close it yet, or its end was deleted.",
		"broken":     "NOT verified: this recording is not as its node wrote it. What follows is what of it can be believed.",
	}
	fmt.Fprintf(&b, "<div class=\"state %s\"><strong>%s</strong>\n", v.State, words[v.State])
	fmt.Fprintf(&b, "<div>%d entries were verified on %s.</div>\n", v.Entries, time.Now().UTC().Format(time.RFC3339))
	for _, problem := range v.Problems {
		fmt.Fprintf(&b, "<div>%s</div>\n", esc(problem))
	}
	if p.cut {
		fmt.Fprintf(&b, "<div><strong>This page is cut: it shows the first %d of %d entries.</strong></div>\n", p.shown, v.Entries)
	}
	b.WriteString("</div>\n<h2>Who and where</h2>\n<table>\n")
	row := func(name, value string) {
		if strings.TrimSpace(value) != "" {
			fmt.Fprintf(&b, "<tr><th>%s</th><td>%s</td></tr>\n", esc(name), esc(value))
		}
	}
	row("session", h.Session)
	row("recording", p.item.Name())
	row("started", h.Started.UTC().Format(time.RFC3339Nano))
	if end := p.res.Ending; end != nil {
		row("ended", end.At.UTC().Format(time.RFC3339Nano)+", "+strings.Join(nonEmpty(end.Reason, end.Detail), ", "))
	}
	row("node", h.Node+" of cluster "+h.Cluster)
	row("subject", h.SubjectKind+" "+h.Subject)
	row("issuer", h.Issuer)
	row("groups", strings.Join(h.Groups, ", "))
	for _, k := range slices.Sorted(maps.Keys(h.Claims)) {
		row("claim "+k, fmt.Sprint(h.Claims[k]))
	}
	row("token", h.TokenID)
	row("client", h.Client)
	row("target", strings.Join(nonEmpty(h.Protocol, h.Target, h.Profile, h.Database), " "))
	row("policy", "index "+str(h.PolicyIndex))
	for _, k := range slices.Sorted(maps.Keys(h.Labels)) {
		row(k, h.Labels[k])
	}
	if p.res.Failed != "" {
		row("recording failed", p.res.Failed)
	}
	b.WriteString("</table>\n<h2>Certificates</h2>\n<p>Compare the authority's fingerprint with one that you know from elsewhere: this page can be changed by whoever passes it on. The recording itself is verified with <code>sallyport recordings verify</code>.</p>\n<table>\n")
	for _, c := range p.o.Authorities {
		a := certificate(c)
		fmt.Fprintf(&b, "<tr><th>authority</th><td>%s<br>SHA-256 <code>%s</code></td></tr>\n", esc(a.Subject), a.SHA256)
	}
	for _, c := range v.Certificates {
		fmt.Fprintf(&b, "<tr><th>signed by</th><td>%s, valid %s to %s<br>SHA-256 <code>%s</code></td></tr>\n", esc(c.Subject), c.NotBefore.Format(time.RFC3339), c.NotAfter.Format(time.RFC3339), c.SHA256)
	}
	b.WriteString("</table>\n<h2>What happened</h2>\n")
	if _, err := p.w.Write(b.Bytes()); err != nil {
		return err
	}
	if _, err := p.w.Write(p.body.Bytes()); err != nil {
		return err
	}
	last := "<p>The end of the recording.</p>"
	if p.cut {
		last = fmt.Sprintf("<p><strong>Cut here: %d of %d entries are shown, as the page would be larger than %d bytes. The recording has the rest.</strong></p>", p.shown, v.Entries, p.o.MaxBytes)
	}
	_, err := io.WriteString(p.w, last+"\n</body></html>\n")
	return err
}

func str(n uint64) string { return strconv.FormatUint(n, 10) }

package export

import (
	"strings"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/terminal"
)

// cast is an asciicast, version 2 or 3. A database session has no terminal: it
// is shown as a client at a prompt would have it, each statement when it was
// sent and each result when it came, both with the session's own timing.
type cast struct {
	exporter
	last  time.Duration // of the newest event, since the start
	fresh bool          // the cursor is at the beginning of a line
}

const (
	castWidth  = 120
	castHeight = 40
)

func (c *cast) begin() error {
	h := c.res.Header
	title := terminal.EscapeLine(strings.TrimSpace(h.Subject + " at " + h.Target + "/" + h.Database))
	c.fresh = true
	var err error
	if c.o.Format == AsciicastV2 {
		err = c.line(struct {
			Version   int    `json:"version"`
			Width     int    `json:"width"`
			Height    int    `json:"height"`
			Timestamp int64  `json:"timestamp"`
			Title     string `json:"title"`
		}{2, castWidth, castHeight, h.Started.Unix(), title})
	} else {
		type term struct {
			Cols int `json:"cols"`
			Rows int `json:"rows"`
		}
		err = c.line(struct {
			Version   int    `json:"version"`
			Term      term   `json:"term"`
			Timestamp int64  `json:"timestamp"`
			Title     string `json:"title"`
		}{3, term{castWidth, castHeight}, h.Started.Unix(), title})
	}
	if err != nil {
		return err
	}
	v := c.verification()
	text := "-- recording " + c.item.Name() + ": " + v.State + "\n"
	for _, p := range v.Problems {
		text += "-- " + p + "\n"
	}
	return c.say(h.Started, text)
}

func (c *cast) entry(e *recording.Entry) error {
	switch e.Type {
	case recording.Command:
		text := string(e.Text)
		if text == "" {
			text = "-- " + e.Verb
		}
		prompt := c.res.Header.Database + "=> "
		if !c.fresh {
			prompt = "\n" + prompt
		}
		if err := c.say(e.At, prompt+strings.TrimRight(text, "\n")+"\n"); err != nil {
			return err
		}
		if e.Verb != "Bind" || len(e.Data) == 0 {
			return nil
		}
	case recording.Response:
	case recording.Decided:
		if e.Effect == "permit" {
			return nil
		}
		return c.say(e.At, "-- "+e.Effect+", rule "+e.Rule+": "+strings.ReplaceAll(e.Reason, "\n", " ")+"\n")
	case recording.Approval:
		return c.say(e.At, "-- approval "+strings.Join(nonEmpty(e.Effect, e.Approval, e.Actor), " ")+"\n")
	case recording.Cut, recording.Note:
		return c.say(e.At, "-- "+TypeName(e.Type)+": "+strings.ReplaceAll(strings.Join(nonEmpty(e.Verb, e.Rule, e.Reason), ", "), "\n", " ")+"\n")
	default:
		return nil
	}
	text, err := c.result(e)
	if err != nil || text == "" {
		return err
	}
	return c.say(e.At, text)
}

func (c *cast) end() error {
	text, at := "\n-- unfinished\n", c.res.Header.Started.Add(c.last)
	if end := c.res.Ending; end != nil {
		text, at = "\n-- ended: "+strings.Join(nonEmpty(end.Reason, end.Detail), ", ")+"\n", end.At
	}
	return c.say(at, text)
}

// say shows text, escaped, at a time of the session.
func (c *cast) say(at time.Time, text string) error {
	since := max(at.Sub(c.res.Header.Started), c.last)
	text = terminal.EscapeString(text)
	c.fresh = strings.HasSuffix(text, "\n")
	when := since
	if c.o.Format == AsciicastV3 { // times are since the event before
		when = since.Truncate(time.Microsecond) - c.last.Truncate(time.Microsecond)
	}
	c.last = since
	return c.line([]any{when.Truncate(time.Microsecond).Seconds(), "o", strings.ReplaceAll(text, "\n", "\r\n")})
}

func nonEmpty(parts ...string) []string {
	var out []string
	for _, p := range parts {
		if p != "" {
			out = append(out, p)
		}
	}
	return out
}

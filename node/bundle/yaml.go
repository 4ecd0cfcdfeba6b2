package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"
)

// Limits on one YAML document. Lists of a configuration that people read stay
// far below them.
const (
	maxList  = 1000
	maxText  = 4096
	maxDepth = 20
)

// object is a YAML mapping being read: each getter takes a field, done
// complains about those that nothing took. Mistakes go to report; getters then
// return the zero value, so that reading goes on and finds the others.
type object struct {
	node   *yaml.Node
	what   string // "target prod-db", for messages
	report func(line int, format string, args ...any)
	keys   map[string]*yaml.Node
	values map[string]*yaml.Node
	taken  map[string]bool
}

// documents reads the YAML documents of a file, all of which must be mappings.
// What is wrong goes to report, now and later when the documents are read.
func documents(f file, report func(line int, format string, args ...any)) (docs []*object) {
	dec := yaml.NewDecoder(bytes.NewReader(f.Data))
	for {
		var doc yaml.Node
		err := decode(dec, &doc)
		if errors.Is(err, io.EOF) {
			return docs
		}
		if err != nil {
			line, msg := yamlError(err)
			report(line, "%s", msg)
			return docs
		}
		if len(doc.Content) != 1 {
			continue
		}
		root := doc.Content[0]
		if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
			continue // an empty document, such as one with comments only
		}
		if why, at := unplain(root, 0); why != "" {
			report(at.Line, "%s", why)
			continue
		}
		if o := newObject(root, "document", report); o != nil {
			docs = append(docs, o)
		}
	}
}

// decode keeps a panic of the YAML library from ending the process: every node
// reads every applied file, again at each start.
func decode(dec *yaml.Decoder, doc *yaml.Node) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the text cannot be read as YAML (%v)", p)
		}
	}()
	return dec.Decode(doc)
}

var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:line (\d+): )?`)

func yamlError(err error) (line int, msg string) {
	msg = err.Error()
	m := yamlLine.FindStringSubmatch(msg)
	line, _ = strconv.Atoi(m[1])
	return line, "not valid YAML: " + strings.TrimPrefix(msg, m[0])
}

// unplain finds what makes YAML mean something other than it seems to:
// anchors, aliases, merges and explicit tags; and nesting without end.
func unplain(n *yaml.Node, depth int) (why string, at *yaml.Node) {
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		return "anchors and aliases (& and *) are not allowed: write it out", n
	case n.Style&yaml.TaggedStyle != 0:
		return "tags (!) are not allowed", n
	case n.Tag == "!!merge":
		return "merge keys (<<) are not allowed: write it out", n
	case depth > maxDepth:
		return "nested too deeply", n
	case len(n.Content) > 2*maxList:
		return fmt.Sprintf("more than %d entries", maxList), n
	case len(n.Value) > maxText:
		return fmt.Sprintf("a text of more than %d bytes", maxText), n
	}
	for _, c := range n.Content {
		if why, at := unplain(c, depth+1); why != "" {
			return why, at
		}
	}
	return "", nil
}

func newObject(n *yaml.Node, what string, report func(int, string, ...any)) *object {
	if n.Kind != yaml.MappingNode {
		report(n.Line, "%s: want fields (name: value), not %s", what, shape(n))
		return nil
	}
	o := &object{node: n, what: what, report: report,
		keys: map[string]*yaml.Node{}, values: map[string]*yaml.Node{}, taken: map[string]bool{}}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Kind != yaml.ScalarNode {
			report(k.Line, "%s: a field's name must be a word", what)
			continue
		}
		if first := o.keys[k.Value]; first != nil {
			report(k.Line, "%s: field %q is given twice, first on line %d", what, k.Value, first.Line)
			continue
		}
		o.keys[k.Value], o.values[k.Value] = k, v
	}
	return o
}

func shape(n *yaml.Node) string {
	switch n.Kind {
	case yaml.SequenceNode:
		return "a list"
	case yaml.MappingNode:
		return "fields"
	}
	if n.Tag == "!!null" {
		return "nothing"
	}
	return strconv.Quote(n.Value)
}

// done complains about fields that were not taken.
func (o *object) done() {
	for i := 0; i+1 < len(o.node.Content); i += 2 {
		k := o.node.Content[i]
		if k.Kind != yaml.ScalarNode || o.taken[k.Value] || o.keys[k.Value] != k {
			continue
		}
		known := make([]string, 0, len(o.taken))
		for name := range o.taken {
			known = append(known, name)
		}
		slices.Sort(known)
		o.report(k.Line, "%s: unknown field %q; known are %s", o.what, k.Value, strings.Join(known, ", "))
	}
}

// line is where field stands, or where o begins.
func (o *object) line(field string) int {
	if k := o.keys[field]; k != nil {
		return k.Line
	}
	return o.node.Line
}

// bad reports a mistake in field.
func (o *object) bad(field, format string, args ...any) {
	o.report(o.line(field), "%s: %s: %s", o.what, field, fmt.Sprintf(format, args...))
}

// take is the value of field, nil when it is missing.
func (o *object) take(field string) *yaml.Node {
	o.taken[field] = true
	return o.values[field]
}

func (o *object) has(field string) bool { return o.values[field] != nil }

func (o *object) text(field string) string {
	n := o.take(field)
	if n == nil {
		return ""
	}
	v, ok := scalar(n)
	if !ok || v == "" {
		o.bad(field, "want a text, not %s", shape(n))
	}
	return v
}

func (o *object) required(field string) string {
	if o.take(field) == nil {
		o.report(o.node.Line, "%s: %s is missing", o.what, field)
		return ""
	}
	return o.text(field)
}

// scalar is a node's text: words and numbers as they are written.
func scalar(n *yaml.Node) (string, bool) {
	return n.Value, n.Kind == yaml.ScalarNode && n.Tag != "!!null" && n.Tag != "!!binary"
}

func (o *object) bool(field string) bool {
	n := o.take(field)
	if n == nil {
		return false
	}
	if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" {
		o.bad(field, "want true or false, not %s", shape(n))
	}
	return n.Kind == yaml.ScalarNode && strings.EqualFold(n.Value, "true")
}

// duration reads a time between least and most; otherwise when it is missing.
func (o *object) duration(field string, otherwise, least, most time.Duration) time.Duration {
	n := o.take(field)
	if n == nil {
		return otherwise
	}
	v, _ := scalar(n)
	d, err := time.ParseDuration(v)
	if err != nil || d < least || d > most {
		o.bad(field, `want a time from %s to %s, such as "30s", "10m" or "1h", not %s`, least, most, shape(n))
		return otherwise
	}
	return d
}

// texts reads a list of different texts; nil when it is missing.
func (o *object) texts(field string) []string {
	n := o.take(field)
	if n == nil {
		return nil
	}
	return o.list(field, n)
}

func (o *object) list(field string, n *yaml.Node) []string {
	if n.Kind != yaml.SequenceNode {
		o.bad(field, "want a list, as in [a, b], not %s", shape(n))
		return nil
	}
	out := make([]string, 0, len(n.Content))
	for _, c := range n.Content {
		v, ok := scalar(c)
		switch {
		case !ok || v == "":
			o.report(c.Line, "%s: %s: want texts in the list, not %s", o.what, field, shape(c))
		case slices.Contains(out, v):
			o.report(c.Line, "%s: %s: %q is listed twice", o.what, field, v)
		default:
			out = append(out, v)
		}
	}
	return out
}

// object reads fields inside a field; nil when it is missing.
func (o *object) object(field string) *object {
	n := o.take(field)
	if n == nil {
		return nil
	}
	return newObject(n, o.what+": "+field, o.report)
}

// objects reads a list of fields.
func (o *object) objects(field string) []*object {
	n := o.take(field)
	if n == nil {
		return nil
	}
	if n.Kind != yaml.SequenceNode {
		o.bad(field, "want a list of entries that begin with -, not %s", shape(n))
		return nil
	}
	var out []*object
	for i, c := range n.Content {
		if entry := newObject(c, fmt.Sprintf("%s: %s %d", o.what, field, i+1), o.report); entry != nil {
			out = append(out, entry)
		}
	}
	return out
}

// textMap reads names with a text each.
func (o *object) textMap(field string) map[string]string {
	in := o.object(field)
	if in == nil {
		return nil
	}
	out := make(map[string]string, len(in.values))
	for _, name := range sortedKeys(in.values) {
		out[name] = in.text(name)
	}
	return out
}

// listMap reads names with a list of texts each; one text is a list of one.
func (o *object) listMap(field string) map[string][]string {
	in := o.object(field)
	if in == nil {
		return nil
	}
	out := make(map[string][]string, len(in.values))
	for _, name := range sortedKeys(in.values) {
		n := in.take(name)
		if v, ok := scalar(n); ok && v != "" {
			out[name] = []string{v}
			continue
		}
		out[name] = in.list(name, n)
		if len(out[name]) == 0 && n.Kind == yaml.SequenceNode {
			in.bad(name, "the list is empty")
		}
	}
	return out
}

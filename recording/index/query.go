package index

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sallyport/sallyport/recording"
)

// Query says which recordings, and which operations in them, are looked for.
// Zero fields ask for nothing. A * in a text stands for any characters, but in
// Text it stands for itself.
type Query struct {
	// From and To: the session, and the operation if one is asked for, was going
	// on then. From is included, To is not.
	From, To time.Time

	// Of the session.
	Kind, Node, Subject, Target, Profile, Database, Client string
	Repository, Ref, PullRequest, Run                      string
	Commit                                                 string   // or its beginning, of at least 4
	Claims                                                 []string // NAME=VALUE

	// Of one operation of it; all that are given must be true of the same one.
	Action   string // postgres:drop_table
	Table    string // a part of the resource's name: users, public.users, shop.public.users.email
	Decision string // permit, refuse, hold
	Rule     string
	Actor    string // who approved or denied; in a node's own recording who called or was refused
	Text     string // in what was sent; see normalize

	text []byte
}

// longest is how long a session or a node's own recording may go on, so how
// much earlier than From it may have begun; the longest session is a day.
const longest = 48 * time.Hour

// prepare checks the query.
func (q *Query) prepare() error {
	if !q.From.IsZero() && !q.To.IsZero() && !q.From.Before(q.To) {
		return errors.New("recording: nothing begins before it ends: from is not before to")
	}
	for _, c := range q.Claims {
		if name, value, ok := strings.Cut(c, "="); !ok || name == "" || value == "" {
			return fmt.Errorf("recording: a claim is given as NAME=VALUE, not as %q", c)
		}
	}
	if q.Commit != "" && len(q.Commit) < 4 {
		return errors.New("recording: a commit is named by at least 4 digits")
	}
	if q.Table != "" && strings.Trim(q.Table, ".") == "" {
		return fmt.Errorf("recording: %q names no table", q.Table)
	}
	q.text = normalize(nil, []byte(q.Text))
	return nil
}

// days are the first and the last day a recording that matches can be of.
func (q *Query) days() (from, to time.Time) {
	if !q.From.IsZero() {
		from = q.From.Add(-longest)
	}
	return from, q.To
}

// wantsOperation says that something is asked about an operation.
func (q *Query) wantsOperation() bool {
	return q.Action != "" || q.Table != "" || q.Decision != "" || q.Rule != "" || q.Actor != "" || q.Text != ""
}

// session says whether what the header tells, and the ending if there is one,
// matches.
func (q *Query) session(r *Row) bool {
	return (q.From.IsZero() || r.Ended == 0 || r.Ended >= q.From.UnixMicro()) &&
		(q.To.IsZero() || r.Started < q.To.UnixMicro()) &&
		match(q.Kind, r.Kind) && match(q.Node, r.Node) && match(q.Subject, r.Subject) &&
		match(q.Target, r.Target) && match(q.Profile, r.Profile) && match(q.Database, r.Database) && match(q.Client, r.Client) &&
		match(q.Repository, r.Repository) && match(q.Ref, r.Ref) && match(q.PullRequest, r.PullRequest) && match(q.Run, r.Run) &&
		(q.Commit == "" || strings.HasPrefix(strings.ToLower(r.Commit), strings.ToLower(q.Commit))) &&
		q.claims(r.Claims)
}

func (q *Query) claims(set []string) bool {
	for _, c := range q.Claims {
		if !has(set, c) {
			return false
		}
	}
	return true
}

// row says whether a recording of which the index has this row may match.
func (q *Query) row(r *Row) bool {
	if !q.session(r) || !mayHold(r.Trigrams, q.text) {
		return false
	}
	return r.Partial ||
		(q.Action == "" || has(r.Actions, q.Action)) &&
			(q.Table == "" || hasTable(r.Resources, q.Table)) &&
			(q.Decision == "" || has(r.Decisions, q.Decision)) &&
			(q.Rule == "" || has(r.Rules, q.Rule)) &&
			(q.Actor == "" || has(r.Actors, q.Actor))
}

func hasTable(resources []string, table string) bool {
	for _, r := range resources {
		if partOf(r, table) {
			return true
		}
	}
	return false
}

// partOf says whether name is a part of a resource's name, at its dots.
func partOf(resource, name string) bool {
	if strings.Contains(name, "*") {
		return match("*."+name+".*", "."+resource+".")
	}
	return strings.Contains("."+resource+".", "."+strings.Trim(name, ".")+".")
}

// match says whether s is what pattern says; an empty one says nothing.
func match(pattern, s string) bool {
	if pattern == "" || pattern == s {
		return true
	}
	head, rest, ok := strings.Cut(pattern, "*")
	if !ok || !strings.HasPrefix(s, head) {
		return false
	}
	s = s[len(head):]
	for {
		part, more, ok := strings.Cut(rest, "*")
		if !ok {
			return strings.HasSuffix(s, rest)
		}
		i := strings.Index(s, part)
		if i < 0 {
			return false
		}
		s, rest = s[i+len(part):], more
	}
}

// Operation is one that matched.
type Operation struct {
	LSN      recording.LSN `json:"entry"` // of its first entry
	Op       uint64        `json:"op,omitempty"`
	At       time.Time     `json:"at"`
	Verb     string        `json:"verb,omitempty"`
	Decision string        `json:"decision,omitempty"`
	Rule     string        `json:"rule,omitempty"`
	Actor    string        `json:"actor,omitempty"`
	Text     string        `json:"text,omitempty"` // the beginning
	Actions  []string      `json:"actions,omitempty"`
}

const (
	maxShown      = 20   // operations of one recording that a hit tells
	maxShownText  = 2000 // bytes of their text
	maxShownPairs = 16
	maxPendingOps = 1 << 14 // operations that more entries may come of; a client can send some thousand ahead
)

// matcher finds the operations of one recording that match.
type matcher struct {
	q     *Query
	ops   map[uint64]*pending
	order []uint64
	found []*pending // the first maxShown
	n     int
	buf   []byte
}

// pending is an operation of which something is known already.
type pending struct {
	Operation
	pair, decision, rule, actor, text bool
	told                              bool
}

func (m *matcher) add(e *recording.Entry) {
	p := m.of(e)
	q := m.q
	for _, a := range e.Actions {
		action, resource, _ := strings.Cut(a, " ")
		if match(q.Action, action) && (q.Table == "" || partOf(resource, q.Table)) {
			p.pair = true
		}
		if len(p.Actions) < maxShownPairs {
			p.Actions = append(p.Actions, a)
		}
	}
	if e.Type == recording.Decided {
		p.Decision = e.Effect
		p.decision = p.decision || match(q.Decision, e.Effect)
	}
	if e.Rule != "" {
		p.Rule = e.Rule
		p.rule = p.rule || match(q.Rule, e.Rule)
	}
	if e.Actor != "" {
		p.Actor = e.Actor
		p.actor = p.actor || match(q.Actor, e.Actor)
	}
	if len(e.Text) > 0 {
		if p.Text == "" {
			p.Text = strings.ToValidUTF8(string(e.Text[:min(len(e.Text), maxShownText)]), "\ufffd")
		}
		if !p.text && len(q.text) > 0 {
			m.buf = normalize(m.buf[:0], e.Text)
			p.text = bytes.Contains(m.buf, q.text)
		}
	}
	if p.Verb == "" {
		p.Verb = e.Verb
	}
	if p.told || !m.complete(p) {
		return
	}
	p.told = true
	m.n++
	if len(m.found) < maxShown {
		m.found = append(m.found, p)
	}
}

func (m *matcher) complete(p *pending) bool {
	q := m.q
	return (p.pair || q.Action == "" && q.Table == "") && (p.decision || q.Decision == "") && (p.rule || q.Rule == "") &&
		(p.actor || q.Actor == "") && (p.text || q.Text == "") &&
		(q.From.IsZero() || !p.At.Before(q.From)) && (q.To.IsZero() || p.At.Before(q.To))
}

// operations are those that matched, with all that became known of them.
func (m *matcher) operations() []Operation {
	out := make([]Operation, len(m.found))
	for i, p := range m.found {
		out[i] = p.Operation
	}
	return out
}

// of returns what is known of the entry's operation. An entry of none is one of
// its own.
func (m *matcher) of(e *recording.Entry) *pending {
	p := m.ops[e.Op]
	if p != nil && e.Op != 0 {
		return p
	}
	p = &pending{Operation: Operation{LSN: e.LSN, Op: e.Op, At: e.At}}
	if e.Op == 0 {
		return p
	}
	if m.ops == nil {
		m.ops = map[uint64]*pending{}
	}
	if len(m.order) == maxPendingOps {
		delete(m.ops, m.order[0])
		m.order = m.order[1:]
	}
	m.ops[e.Op] = p
	m.order = append(m.order, e.Op)
	return p
}

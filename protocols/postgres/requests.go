package postgres

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/postgres/sql"
)

const (
	// maxSmall bounds messages that name things only.
	maxSmall = 16 << 10
	// maxQuery bounds Query and Parse: the statement, a name and parameter types.
	maxQuery = sql.MaxStatement + 64<<10
	// maxBind bounds the parameters of one Bind, which is held whole.
	maxBind = 16 << 20
	// maxSet bounds what SET can put into one setting, and maxSets the names
	// and values of all: an approver is shown them.
	maxSet  = 1 << 10
	maxSets = 16 << 10
)

// requests is the client's half of the codec.
type requests struct {
	*conversation
	p          *Protocol
	s          *protocols.Session
	role       string
	searchPath []string

	world         *world
	analyses      map[string]*analysis
	analysisBytes int
	lastRefresh   time.Time

	segment   uint64            // grows with every Sync and Query
	ran       bool              // something ran since the last Sync: an implicit transaction may be open
	inBlock   bool              // a transaction block is open, as far as was sent
	unsettled bool              // the catalogue, or all names, may change by what was sent
	shifted   bool              // a name may mean another thing than the catalogue known here says
	set       map[string]string // what SET asked for, by name
	granted   *portal           // approved, and nothing but its Execute was sent since
}

var _ protocols.Requests = (*requests)(nil)

// task is what the codec keeps with an Operation.
type task struct {
	frame  byte
	name   string // of the statement (Parse) or portal (Bind, Execute)
	an     *analysis
	stmt   *statement
	portal *portal
	bind   []byte // the Bind frame
	names  []sqlName
	inner  []*analysis       // what EXECUTE in it stands for
	values []byte            // digest of the parameters
	digest [sha256.Size]byte // what Digest said last
}

func (q *requests) Poisons() [][]byte { return [][]byte{poisonQuery, poisonParse} }
func (q *requests) Flush() []byte     { return flushFrame }

func (q *requests) Notice(dst []byte, text string) []byte {
	return report(dst, 'N', sevNotice, "00000", "sallyport: "+text, "", "")
}

func (q *requests) Frame(b []byte) (protocols.Frame, error) {
	n, err := measure(b)
	f := protocols.Frame{Len: n}
	if n == 0 || err != nil {
		return f, err
	}
	q.mu.Lock()
	state := q.copy
	q.mu.Unlock()
	limit := maxSmall
	kind := b[0]
	if kind == 'X' {
		f.Kind = protocols.Last
	} else if state == copyAsked {
		f.Kind = protocols.Wait
		return f, nil
	} else if state == copyIn {
		switch kind {
		case 'd':
			f.Kind = protocols.Pass
			return f, nil
		case 'c', 'f':
			f.Kind = protocols.Control
		case 'H', 'S':
			f.Kind = protocols.Drop // as the target would
			return f, nil
		default:
			return f, &protocols.Refusal{Rule: "protocol", Reason: fmt.Sprintf("a message of type %q inside COPY", kind), Code: "08P01"}
		}
	} else {
		switch kind {
		case 'Q', 'P':
			f.Kind, limit = protocols.Command, maxQuery
		case 'B':
			f.Kind, limit = protocols.Command, maxBind
		case 'E', 'F':
			f.Kind = protocols.Command
		case 'D', 'C', 'H', 'S':
			f.Kind = protocols.Control
		case 'd', 'c', 'f':
			f.Kind = protocols.Drop // left over from a COPY that failed; the target would ignore it
			return f, nil
		default: // 'p' and what nobody knows
			return f, nil
		}
	}
	if n > limit {
		if f.Kind == protocols.Command {
			f.Kind = protocols.Oversize
			return f, nil
		}
		return f, &protocols.Refusal{Rule: "limits", Reason: fmt.Sprintf("a message %q of %d bytes; the limit is %d", kind, n, limit), Code: "54000"}
	}
	return f, nil
}

// Harmless knows the messages that the gateway adds of its own.
func (q *requests) Harmless(b []byte) int {
	switch n, err := measure(b); {
	case err != nil:
		return 0
	case n > 0 && (b[0] == 'H' || b[0] == 'D' || b[0] == 'X'): // Flush, Describe, Terminate
		return n
	}
	return 0
}

// Wait waits for the target to say whether it takes COPY data.
func (q *requests) Wait(ctx context.Context) error {
	return q.await(ctx, func() bool { return q.copy != copyAsked })
}

func (q *requests) Control(ctx context.Context, frame []byte) (bool, error) {
	r := body(frame)
	if err := q.room(ctx); err != nil {
		return false, err
	}
	switch frame[0] {
	case 'c', 'f':
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.copy != copyIn {
			return false, nil // it failed meanwhile
		}
		q.copy = copyAsked
		return true, nil
	case 'H', 'X':
		if !r.done() {
			return false, malformed("Flush or Terminate")
		}
		return true, nil
	case 'S':
		if !r.done() {
			return false, malformed("Sync")
		}
		q.mu.Lock()
		q.push(awaited{step: stepSync})
		q.mu.Unlock()
		q.segment++
		q.ran = false
		return true, nil
	case 'D', 'C':
		kind, name := r.byte(), string(r.cstring())
		if !r.done() || (kind != 'S' && kind != 'P') || len(name) > maxName {
			return false, malformed("Describe or Close")
		}
		if frame[0] == 'C' {
			q.mu.Lock()
			w := awaited{step: stepClose}
			if kind == 'S' {
				w.stmtVersion = q.stmts.put(name, nil, q.segment)
			} else {
				w.portalVersion = q.portals.put(name, nil, q.segment)
			}
			q.push(w)
			q.mu.Unlock()
			return true, nil
		}
		w := awaited{step: stepDescribe}
		var err error
		if kind == 'S' {
			if w.stmt, err = find(ctx, q, q.stmts, name); w.stmt == nil {
				w.stmt = &statement{} // the target says that there is none
			}
		} else if w.portal, err = find(ctx, q, q.portals, name); w.portal == nil {
			w.portal = &portal{stmt: &statement{}, an: &analysis{world: q.world}}
		}
		if err != nil {
			return false, err
		}
		q.mu.Lock()
		q.push(w)
		q.mu.Unlock()
		return true, nil
	}
	return false, malformed("control")
}

// room waits until fewer messages await their answers.
func (q *requests) room(ctx context.Context) error {
	q.mu.Lock()
	full := q.n >= maxPending
	q.mu.Unlock()
	if !full {
		return nil
	}
	if err := q.ch.Barrier(ctx); err != nil {
		return err
	}
	return q.await(ctx, func() bool { return q.n < maxPending/2 })
}

// find says what name means to the message being decoded, waiting for the
// target where that depends on its answers.
func find[T any](ctx context.Context, q *requests, names *names[T], name string) (*T, error) {
	q.mu.Lock()
	v, certain := names.get(name, q.segment)
	q.mu.Unlock()
	if certain {
		return v, nil
	}
	if err := q.ch.Barrier(ctx); err != nil {
		return nil, err
	}
	err := q.await(ctx, func() bool { v, certain = names.get(name, q.segment); return certain })
	return v, err
}

// Decode reads a command and finds out what it does.
func (q *requests) Decode(ctx context.Context, frame []byte, op *protocols.Operation) error {
	if err := q.room(ctx); err != nil {
		return err
	}
	if frame[0] != 'E' {
		q.granted = nil
	}
	if n, _ := measure(frame); n > len(frame) {
		return q.oversize(frame, op)
	}
	if err := q.settleCatalog(ctx); err != nil {
		return err
	}
	op.InTransaction = q.block()
	var err error
	switch frame[0] {
	case 'Q':
		err = q.query(ctx, frame, op)
	case 'P':
		err = q.parse(ctx, frame, op)
	case 'B':
		err = q.bind(ctx, frame, op)
	case 'E':
		err = q.execute(ctx, frame, op)
	case 'F':
		op.Verb, op.State = "FunctionCall", &task{frame: 'F'}
		op.Data = frame[headerBytes:]
		op.Problem = &protocols.Refusal{Rule: "unsupported", Reason: "FunctionCall messages bypass SQL: call the function with SELECT", Code: "0A000"}
	}
	return err
}

// oversize refuses a command above the limit; frame is its head.
func (q *requests) oversize(frame []byte, op *protocols.Operation) error {
	n, _ := measure(frame)
	verb, limit := "Query", maxQuery
	switch frame[0] {
	case 'P':
		verb = "Parse"
	case 'B':
		verb, limit = "Bind", maxBind
	case 'E', 'F':
		verb, limit = "Execute", maxSmall
	}
	op.Verb, op.State = verb, &task{frame: frame[0]}
	op.Text = frame[headerBytes:min(len(frame), headerBytes+4<<10)]
	op.Detail = map[string]string{"bytes": fmt.Sprint(n), "truncated": "true"}
	op.Problem = &protocols.Refusal{Rule: "limits", Reason: fmt.Sprintf("a %s of %d bytes; the limit is %d", verb, n, limit), Code: "54000"}
	return nil
}

// settleCatalog makes sure that analyses that follow a change of the
// catalogue see it, as soon as the change is there for others to see.
func (q *requests) settleCatalog(ctx context.Context) error {
	if !q.unsettled {
		return q.look(ctx, false)
	}
	q.mu.Lock()
	wait := !q.idle()
	q.mu.Unlock()
	if wait {
		if err := q.ch.Barrier(ctx); err != nil {
			return err
		}
		if err := q.await(ctx, q.idle); err != nil {
			return err
		}
	}
	q.mu.Lock()
	committed := q.status == 'I' && !q.skipping && !q.ran
	q.mu.Unlock()
	if !committed {
		return q.look(ctx, false) // what an open transaction made shows to nobody else
	}
	if err := q.look(ctx, true); err != nil {
		return err
	}
	q.unsettled, q.shifted = false, false
	return nil
}

// block says whether a transaction block is open as far as is known without
// waiting.
func (q *requests) block() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.n == 0 && !q.skipping {
		q.inBlock = q.status != 'I'
	}
	return q.inBlock
}

// judge fills op from what an does. names of prepared statements are resolved
// where it executes them.
func (q *requests) judge(ctx context.Context, t *task, op *protocols.Operation) error {
	an := t.an
	op.Pairs, op.Problem, op.Memo = an.pairs, an.problem, &an.memo
	op.Empty = len(an.parts) == 0
	op.Prepares = op.Prepares || an.prepares
	t.names, t.inner = nil, nil
	if q.shifted && an.world.masking && op.Problem == nil {
		for i := range an.parts {
			if !blind(&an.parts[i]) && an.parts[i].Execute == "" {
				op.Problem = unsettledCatalog()
			}
		}
	}
	if an.sets && op.Problem == nil {
		op.Problem = q.settable(an)
	}
	if an.cursors && t.frame != 'P' {
		if err := q.judgeCursors(ctx, t, op); err != nil {
			return err
		}
	}
	if !an.renames && !an.resolves {
		return nil
	}
	op.Memo = nil // depends on names
	op.Pairs = slices.Clone(an.pairs)
	local := map[string]*statement{}
	for i := range an.parts {
		p := &an.parts[i]
		switch {
		case closesAll(p):
			clear(local)
			t.names = append(t.names, sqlName{at: i, all: true})
		case p.Prepare != "":
			inner, err := q.analyse(ctx, []byte(p.Inner))
			if err != nil {
				return err
			}
			s := &statement{text: p.Inner, raw: []byte(p.Inner), an: inner, sqlly: true, sealed: inner.reads}
			why, err := q.statementRoom(ctx, p.Prepare, s)
			if err != nil {
				return err
			}
			if why != nil && op.Problem == nil {
				op.Problem = why
			}
			local[p.Prepare] = s
			t.names = append(t.names, sqlName{at: i, v: &version[statement]{name: p.Prepare, value: s}})
		case p.Deallocate != "":
			local[p.Deallocate] = nil
			t.names = append(t.names, sqlName{at: i, v: &version[statement]{name: p.Deallocate}})
		case p.Execute != "":
			s, ok := local[p.Execute]
			if !ok {
				var err error
				if s, err = find(ctx, q, q.stmts, p.Execute); err != nil {
					return err
				}
			}
			if s == nil {
				op.Problem = &protocols.Refusal{Rule: "unknown", Reason: fmt.Sprintf("prepared statement %q does not exist", p.Execute), Code: "26000"}
				return nil
			}
			inner, err := q.analyse(ctx, []byte(s.text), s.oids...)
			if err != nil {
				return err
			}
			t.inner = append(t.inner, inner)
			op.Pairs = append(op.Pairs, inner.pairs...)
			switch {
			case op.Problem != nil:
			case inner.problem != nil:
				op.Problem = inner.problem
			case inner.reads || (q.shifted && an.world.masking):
				op.Problem = &protocols.Refusal{Rule: "masking", Reason: "EXECUTE of a statement that reads masked columns: use the statement itself, or the protocol's own prepared statements", Code: "42501"}
			}
			if inner.changes {
				t.changes()
			}
		}
	}
	return nil
}

// changes marks the task's analysis as one that changes the catalogue.
func (t *task) changes() {
	an := *t.an
	an.changes, an.shifts, an.memo = true, true, protocols.Memo{}
	t.an = &an
}

func (q *requests) query(ctx context.Context, frame []byte, op *protocols.Operation) error {
	r := body(frame)
	text := r.cstring()
	if !r.done() {
		return malformed("Query")
	}
	q.segment++ // an error in it does not make the target skip
	an, err := q.analyse(ctx, text)
	if err != nil {
		return err
	}
	t := &task{frame: 'Q', an: an}
	op.Verb, op.Text, op.State = "Query", text, t
	op.InTransaction = op.InTransaction || len(an.parts) > 1
	return q.judge(ctx, t, op)
}

func (q *requests) parse(ctx context.Context, frame []byte, op *protocols.Operation) error {
	r := body(frame)
	name, text := string(r.cstring()), r.cstring()
	oids := make([]uint32, r.count(4))
	for i := range oids {
		oids[i] = uint32(r.int32())
	}
	if !r.done() {
		return malformed("Parse")
	}
	an, err := q.analyse(ctx, text, oids...)
	if err != nil {
		return err
	}
	s := &statement{text: an.text, raw: []byte(an.text), oids: oids, an: an, sealed: an.reads}
	t := &task{frame: 'P', name: name, an: an, stmt: s}
	op.Verb, op.Text, op.State, op.Prepares = "Parse", text, t, true
	if name != "" {
		op.Detail = map[string]string{"statement": name}
	}
	if err := q.judge(ctx, t, op); err != nil {
		return err
	}
	t.names = nil // nothing is prepared or closed before Execute
	switch {
	case op.Problem != nil:
	case len(an.parts) > 1:
		op.Problem = &protocols.Refusal{Rule: "unsupported", Reason: "cannot insert multiple commands into a prepared statement", Code: "42601"}
	default:
		op.Problem, err = q.statementRoom(ctx, name, s)
	}
	return err
}

func longName() *protocols.Refusal {
	return &protocols.Refusal{Rule: "limits", Reason: fmt.Sprintf("a name of more than %d bytes: the target would cut it off", maxName), Code: "42622"}
}

// statementRoom says why the session cannot have one more prepared statement.
func (q *requests) statementRoom(ctx context.Context, name string, s *statement) (*protocols.Refusal, error) {
	if len(name) > maxName {
		return longName(), nil
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	full := func() bool { return q.stmts.len() >= maxStatements || q.held+s.weight() > maxStatementBytes }
	if !full() {
		return nil, nil
	}
	q.weigh()
	if full() && !q.idle() { // much of it may be a pipeline's, and go with the answers
		q.mu.Unlock()
		err := q.ch.Barrier(ctx)
		if err == nil {
			err = q.await(ctx, q.idle)
		}
		q.mu.Lock()
		if err != nil {
			return nil, err
		}
		q.weigh()
	}
	if full() {
		return &protocols.Refusal{Rule: "limits", Reason: "too many prepared statements in one session: close some", Code: "54000"}, nil
	}
	return nil, nil
}

// settable bounds what is kept of SET: all of it is in the digest of an
// approval, and shown to the approver.
func (q *requests) settable(an *analysis) *protocols.Refusal {
	q.mu.Lock()
	defer q.mu.Unlock()
	var sum int
	added := map[string]int{}
	for k, v := range q.set {
		added[k] = len(k) + len(v)
	}
	for i := range an.parts {
		p := &an.parts[i]
		if len(p.Set)+len(p.Value) > maxSet {
			return &protocols.Refusal{Rule: "limits", Reason: fmt.Sprintf("SET of %s to a value of %d bytes; the limit for name and value is %d", p.Set[:min(len(p.Set), maxName)], len(p.Value), maxSet), Code: "54000"}
		}
		if p.Set != "" {
			added[p.Set] = len(p.Set) + len(p.Value)
		}
	}
	for _, n := range added {
		sum += n
	}
	if sum > maxSets {
		return &protocols.Refusal{Rule: "limits", Reason: "too many settings were changed in this session: RESET some", Code: "54000"}
	}
	return nil
}

// judgeCursors looks at what DECLARE, FETCH, MOVE and CLOSE in t name. For the
// target, cursors and the protocol's portals are one thing; here, SQL may not
// touch a portal, whose statement the record would then get wrong, and a
// session with masked columns may fetch from nothing but what it declared
// itself: DECLARE is where it was seen to be clean.
func (q *requests) judgeCursors(ctx context.Context, t *task, op *protocols.Operation) error {
	local := map[string]*cursor{}
	all := false // CLOSE ALL came before
	refuse := func(rule, code, reason string, args ...any) {
		if op.Problem == nil {
			op.Problem = &protocols.Refusal{Rule: rule, Reason: fmt.Sprintf(reason, args...), Code: code}
		}
	}
	for i := range t.an.parts {
		p := &t.an.parts[i]
		name := p.Cursor
		if name == "" || p.Verb == "EXPLAIN" { // EXPLAIN DECLARE declares nothing
			continue
		}
		if len(name) > maxName {
			refuse("limits", "42622", "%s", longName().Reason)
			continue
		}
		portal, err := inUse(ctx, q, q.portals, func(n string) bool { return n == name || (name == "*" && p.Verb == "CLOSE CURSOR" && n != "") })
		if err != nil {
			return err
		}
		if portal {
			refuse("unsupported", "34000", "%s names a portal that was made by a Bind message (%s): use messages of the protocol on portals, or another name for the cursor", p.Verb, name)
			continue
		}
		switch p.Verb {
		case "DECLARE CURSOR":
			q.mu.Lock()
			n := q.cursors.len()
			q.mu.Unlock()
			if n+len(local) >= maxPortals {
				refuse("limits", "54000", "too many cursors in one session: close some")
				continue
			}
			c := &cursor{world: t.an.world, holds: strings.Contains(strings.ToUpper(p.Text), "HOLD")}
			local[name] = c
			t.names = append(t.names, sqlName{at: i, cursor: &version[cursor]{name: name, value: c}})
		case "CLOSE CURSOR":
			if name == "*" {
				clear(local)
				all = true
				t.names = append(t.names, sqlName{at: i, cursors: true})
				continue
			}
			local[name] = nil
			t.names = append(t.names, sqlName{at: i, cursor: &version[cursor]{name: name}})
		default: // FETCH, MOVE
			if !t.an.world.masking {
				continue
			}
			c, known := local[name]
			if !known && !all {
				if c, err = find(ctx, q, q.cursors, name); err != nil {
					return err
				}
			}
			switch {
			case c == nil:
				refuse("masking", "34000", "%s from %q, which this session has not declared: some columns are masked for it, so it can fetch from cursors that its own DECLARE made only", p.Verb, name)
			case c.world != t.an.world:
				refuse("masking", "42501", "the catalogue or what is masked changed since cursor %q was declared: close it and declare it again", name)
			}
		}
	}
	return nil
}

// inUse says whether a name that match takes is in use, waiting for the target
// where that may depend on its answers.
func inUse[T any](ctx context.Context, q *requests, names *names[T], match func(string) bool) (bool, error) {
	q.mu.Lock()
	found, idle := names.any(match), q.idle()
	q.mu.Unlock()
	if !found || idle {
		return found, nil
	}
	if err := q.ch.Barrier(ctx); err != nil {
		return false, err
	}
	err := q.await(ctx, func() bool {
		found = names.any(match)
		return !found || q.idle()
	})
	return found, err
}

// current returns what stmt does in the world as it is now.
func (q *requests) current(ctx context.Context, stmt *statement) (*analysis, error) {
	if err := q.look(ctx, false); err != nil {
		return nil, err
	}
	if stmt.an.world == q.world {
		return stmt.an, nil
	}
	return q.analyse(ctx, []byte(stmt.text), stmt.oids...)
}

func (q *requests) bind(ctx context.Context, frame []byte, op *protocols.Operation) error {
	r := body(frame)
	name, stmtName := string(r.cstring()), string(r.cstring())
	r.take(2 * r.count(2))
	for range r.count(4) {
		if n := int(r.int32()); n >= 0 {
			r.take(n)
		} else if n != -1 {
			return malformed("Bind")
		}
	}
	r.take(2 * r.count(2))
	if !r.done() {
		return malformed("Bind")
	}
	op.Verb, op.Data = "Bind", frame[headerBytes:]
	t := &task{frame: 'B', name: name, bind: frame}
	op.State = t
	stmt, err := find(ctx, q, q.stmts, stmtName)
	if err != nil {
		return err
	}
	if stmt == nil {
		op.Problem = &protocols.Refusal{Rule: "unknown", Reason: fmt.Sprintf("prepared statement %q does not exist", stmtName), Code: "26000"}
		return nil
	}
	if len(name) > maxName {
		op.Problem = longName()
		return nil
	}
	if t.an, err = q.current(ctx, stmt); err != nil {
		return err
	}
	t.stmt = stmt
	if err := q.judge(ctx, t, op); err != nil {
		return err
	}
	t.names = nil
	if name != "" && op.Problem == nil {
		taken, err := inUse(ctx, q, q.cursors, func(n string) bool { return n == name })
		if err != nil {
			return err
		}
		if taken {
			op.Problem = &protocols.Refusal{Rule: "unsupported", Reason: fmt.Sprintf("a portal named %q, which is the name of a cursor that DECLARE made: close the cursor, or use another name", name), Code: "42P03"}
		}
	}
	q.mu.Lock()
	if op.Problem == nil && q.portals.len() >= maxPortals {
		op.Problem = &protocols.Refusal{Rule: "limits", Reason: "too many portals in one session: close some", Code: "54000"}
	}
	q.mu.Unlock()
	t.portal = &portal{stmt: stmt, an: t.an}
	return nil
}

func (q *requests) execute(ctx context.Context, frame []byte, op *protocols.Operation) error {
	r := body(frame)
	name := string(r.cstring())
	limit := r.int32()
	if !r.done() {
		return malformed("Execute")
	}
	t := &task{frame: 'E', name: name}
	op.Verb, op.State = "Execute", t
	if name != "" || limit != 0 {
		op.Detail = map[string]string{"portal": name, "limit": fmt.Sprint(limit)}
	}
	p, err := find(ctx, q, q.portals, name)
	if err != nil {
		return err
	}
	if p != q.granted {
		q.granted = nil
	}
	if p == nil {
		op.Problem = &protocols.Refusal{Rule: "unknown", Reason: fmt.Sprintf("portal %q does not exist", name), Code: "34000"}
		return nil
	}
	if q.granted != nil {
		if err := q.look(ctx, true); err != nil { // what it would do may have changed since it was approved
			return err
		}
	}
	op.Text = p.stmt.raw
	if t.an, err = q.current(ctx, p.stmt); err != nil {
		return err
	}
	t.portal, t.stmt = p, p.stmt
	if err := q.judge(ctx, t, op); err != nil {
		return err
	}
	op.Late = true
	if q.granted != nil {
		if t.values = p.values; q.Digest(op) == p.digest {
			op.Granted, op.Memo = p.admitted, nil
		} else {
			q.granted = nil
		}
	}
	if p.an.world != t.an.world && op.Problem == nil && (t.an.world.masking || p.an.world.masking) {
		op.Problem = &protocols.Refusal{Rule: "masking", Reason: "the catalogue or what is masked changed since this portal was bound: bind it again", Code: "42501"}
	}
	return nil
}

// Admitted takes note that op goes upstream. Nothing of the target's answer can
// come before it returns.
func (q *requests) Admitted(op *protocols.Operation, adm *protocols.Admission) (before, after []byte) {
	t := op.State.(*task)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.granted = nil
	w := awaited{op: adm.Op, began: adm.At}
	switch t.frame {
	case 'Q':
		w.step, w.query = stepQuery, t.an
		q.effects(t, &w)
		q.push(w)
	case 'P':
		w.step, w.stmt = stepParse, t.stmt
		w.stmtVersion = q.stmts.put(t.name, t.stmt, q.segment)
		q.held += t.stmt.weight()
		q.push(w)
		if t.an.world.masking || adm.Holds {
			q.push(awaited{step: stepDescribe, stmt: t.stmt, hidden: true})
			after = message(nil, 'D', "S", t.name, "\x00")
		}
	case 'B':
		if t.an.world.masking && !t.stmt.described() && (t.stmt.sqlly || t.stmt.an != t.an) {
			// Made when nothing was masked, or by PREPARE: its shape is needed now.
			r := body(t.bind)
			r.cstring()
			q.push(awaited{step: stepDescribe, stmt: t.stmt, hidden: true})
			before = message(nil, 'D', "S", string(r.cstring()), "\x00")
		}
		t.stmt.sealed = t.stmt.sealed || t.an.reads
		if adm.Approved() {
			grant := *adm
			t.portal.admitted, t.portal.digest, t.portal.values = &grant, t.digest, t.values
			q.granted = t.portal
		}
		w.step, w.portal = stepBind, t.portal
		w.portalVersion = q.portals.put(t.name, t.portal, q.segment)
		q.push(w)
		if t.an.world.masking && !t.an.plain && len(t.an.parts) == 1 {
			q.push(awaited{step: stepDescribe, portal: t.portal, hidden: true})
			after = message(nil, 'D', "P", t.name, "\x00")
		}
	case 'E':
		w.step, w.portal = stepExecute, t.portal
		q.effects(t, &w)
		q.push(w)
		q.ran = true
		if op.Granted.Approved() {
			q.granted = t.portal // the rest of it, when this has a row limit
		}
	}
	return before, after
}

// weigh counts anew what statements and portals take. Between two counts it is
// only added to. q.mu is held.
func (q *requests) weigh() {
	q.held = 0
	seen := map[*statement]bool{}
	add := func(s *statement) {
		if s != nil && !seen[s] {
			seen[s] = true
			q.held += s.weight()
		}
	}
	for _, vs := range q.stmts.m {
		for _, v := range vs {
			add(v.value)
		}
	}
	for _, vs := range q.portals.m {
		for _, v := range vs {
			if v.value != nil {
				add(v.value.stmt)
				if v.value.an != v.value.stmt.an {
					q.held += v.value.an.weight
				}
			}
		}
	}
}

// effects takes note of what running t does to names, catalogue, transaction
// and COPY.
func (q *requests) effects(t *task, w *awaited) {
	for _, n := range t.names {
		if n.v != nil {
			if n.v.value != nil {
				q.held += n.v.value.weight()
			}
			n.v = q.stmts.put(n.v.name, n.v.value, q.segment)
		}
		if n.cursor != nil {
			n.cursor = q.cursors.put(n.cursor.name, n.cursor.value, q.segment)
		}
		if n.all {
			q.unsettled = true // names are certain again when it was answered
		}
		w.sqlNames = append(w.sqlNames, n)
	}
	if t.an.changes {
		q.unsettled = true
		q.shifted = q.shifted || t.an.shifts
	}
	if t.an.copyIn && !q.skipping {
		q.copy = copyAsked
	}
	for i := range t.an.parts {
		p := &t.an.parts[i]
		switch p.Transaction {
		case "begin":
			q.inBlock = true
		case "commit", "rollback":
			q.inBlock = false
		}
		if p.Set != "" { // bounded by settable
			q.set[strings.Clone(p.Set)] = strings.Clone(p.Value)
		}
	}
	if w.step == stepQuery {
		q.segment++
	}
}

func (q *requests) Refused(op *protocols.Operation, id uint64, why *protocols.Refusal) []byte {
	t := op.State.(*task)
	q.mu.Lock()
	defer q.mu.Unlock()
	w := awaited{op: id, began: q.s.Env.Now(), refused: why}
	if t.frame == 'Q' || t.frame == 'F' {
		w.step, w.query = stepQuery, &analysis{}
		q.push(w)
		q.segment++
		return poisonQuery
	}
	w.step = stepParse
	q.push(w)
	return poisonParse
}

func (q *requests) Settle(ctx context.Context, op *protocols.Operation) (protocols.Settled, error) {
	if err := q.await(ctx, q.idle); err != nil {
		return protocols.Settled{}, err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return protocols.Settled{Skipping: q.skipping, InTransaction: q.status != 'I' || q.ran}, nil
}

func (q *requests) Again(ctx context.Context, op *protocols.Operation) error {
	t := op.State.(*task)
	if err := q.look(ctx, true); err != nil {
		return err
	}
	old := t.an
	var params []uint32
	if t.stmt != nil {
		params = t.stmt.oids
	}
	an, err := q.analyse(ctx, []byte(old.text), params...)
	if err != nil {
		return err
	}
	t.an = an
	if t.portal != nil && t.frame == 'B' {
		t.portal.an = an
	}
	return q.judge(ctx, t, op)
}

// Digest is over everything that decides what op will do, each part with its
// length before it.
func (q *requests) Digest(op *protocols.Operation) (sum [32]byte) {
	t := op.State.(*task)
	h := sha256.New()
	part := func(b []byte) {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(b)))
		h.Write(n[:])
		h.Write(b)
	}
	list := func(label string, values []string) {
		part([]byte(label))
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(values)))
		h.Write(n[:])
		for _, v := range values {
			part([]byte(v))
		}
	}
	part([]byte("sallyport/postgres/1"))
	part([]byte(q.a.Subject.ID()))
	part([]byte(q.a.Target))
	part([]byte(q.a.Database))
	part([]byte(q.role))
	part([]byte(t.an.text))
	var inner []string
	for _, an := range t.inner {
		inner = append(inner, an.text)
	}
	list("prepared", inner)
	if t.bind != nil {
		values := sha256.Sum256(bindValues(t.bind))
		t.values = values[:]
	}
	part(t.values)
	q.mu.Lock()
	defer q.mu.Unlock()
	if t.stmt != nil {
		part(oidBytes(t.stmt.oids))
		part(oidBytes(t.stmt.params))
	} else {
		part(nil)
		part(nil)
	}
	list("settings", sortedPairs(q.settings))
	list("set", sortedPairs(q.set))
	list("search_path", q.searchPath)
	var objects []uint32
	for i := range t.an.parts {
		objects = append(objects, t.an.parts[i].Objects...)
	}
	for _, an := range t.inner {
		for i := range an.parts {
			objects = append(objects, an.parts[i].Objects...)
		}
	}
	slices.Sort(objects)
	part(oidBytes(slices.Compact(objects)))
	h.Sum(sum[:0])
	t.digest = sum
	return sum
}

// bindValues is the part of a Bind frame after the names: formats and values.
func bindValues(frame []byte) []byte {
	if frame == nil {
		return nil
	}
	r := body(frame)
	r.cstring()
	r.cstring()
	return r.b
}

func oidBytes(oids []uint32) []byte {
	b := make([]byte, 0, 4*len(oids))
	for _, o := range oids {
		b = appendUint32(b, o)
	}
	return b
}

func sortedPairs(m map[string]string) []string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, k+"\x00"+m[k])
	}
	return out
}

// Explain is what op will do, for an approver to read.
func (q *requests) Explain(op *protocols.Operation) ([]byte, map[string]string) {
	t := op.State.(*task)
	text := []byte(t.an.text)
	for _, an := range t.inner {
		text = append(text, "\n-- prepared as:\n"...)
		text = append(text, an.text...)
	}
	detail := map[string]string{
		"database": q.a.Database, "role": q.role, "search_path": strings.Join(q.searchPath, ", "),
		"actions": actionList(op.Pairs),
	}
	if t.bind != nil {
		params := FormatBind(t.bind[headerBytes:])
		if len(params)+len(text) > protocols.MaxHeldText {
			text = append(text, params...) // too much to show: makes the hold too large, which is refused
		} else {
			detail["parameters"] = params
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for k, v := range q.set {
		detail["set "+k] = v
	}
	return text, detail
}

func actionList(pairs []policy.Pair) string {
	var b strings.Builder
	for i, p := range pairs {
		if i == 64 {
			fmt.Fprintf(&b, ", and %d more", len(pairs)-i)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(string(p.Action) + " " + strings.Join(p.Resource.Path, "."))
	}
	return b.String()
}

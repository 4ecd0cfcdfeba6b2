package postgres

import (
	"context"
	"encoding/binary"
	"sync"
	"time"

	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/mask"
)

const (
	// maxPending bounds the messages whose answers are awaited. It is what a
	// pipelining driver has in flight, many times over.
	maxPending = 4096
	// maxStatements and maxPortals bound the names a session keeps, and
	// maxStatementBytes the memory behind them: a driver's cache holds hundreds.
	maxStatements     = 10_000
	maxPortals        = 1_000
	maxStatementBytes = 32 << 20
)

// step is what an awaited answer belongs to.
type step uint8

const (
	stepQuery    step = iota + 1
	stepParse         // 1
	stepBind          // 2
	stepDescribe      // t T n
	stepExecute       // rows, then C, I or s
	stepClose         // 3
	stepSync          // Z
)

// awaited is one message whose answer the target still owes.
type awaited struct {
	step    step
	op      uint64 // 0 for messages that carry no command
	began   time.Time
	refused *protocols.Refusal // the message is the poison; its error becomes this
	hidden  bool               // the gateway's own: its answer does not leave

	query  *analysis  // stepQuery
	at     int        // stepQuery: the statement being answered
	rows   uint64     // rows of the results before this one
	tags   []byte     // stepQuery: command tags so far
	failed *fields    // stepQuery: the error
	stmt   *statement // stepParse, stepDescribe
	portal *portal    // stepBind, stepDescribe, stepExecute

	stmtVersion   *version[statement]
	portalVersion *version[portal]
	sqlNames      []sqlName // stepQuery, stepExecute: what PREPARE, DEALLOCATE, DECLARE and CLOSE change
}

// sqlName is a change of a name by the statement at of a string.
type sqlName struct {
	at      int
	v       *version[statement]
	all     bool // DEALLOCATE ALL, DISCARD ALL
	cursor  *version[cursor]
	cursors bool // CLOSE ALL
}

// cursor is what DECLARE made. For the target it is a portal like those of the
// protocol, with a name from the same space.
type cursor struct {
	world *world // in which DECLARE was judged
	holds bool   // it may outlive its transaction
}

// copying is where a COPY FROM STDIN stands.
type copying uint8

const (
	copyNone  copying = iota
	copyAsked         // sent; the target has not said whether it takes data
	copyIn            // it takes data
)

// conversation is what both halves of one session's codec share.
type conversation struct {
	a      *protocols.Access
	masker *mask.Masker
	ch     *protocols.Channel

	mu   sync.Mutex
	cond sync.Cond // signalled when something is answered, and at the end

	// The rest is guarded by mu.
	queue    []awaited // ring
	head, n  int
	skipping bool // the target ignores messages until Sync, which is not sent yet
	status   byte // of the last ReadyForQuery: I, T or E
	copy     copying
	stmts    *names[statement]
	portals  *names[portal]    // made by Bind
	cursors  *names[cursor]    // made by DECLARE
	settings map[string]string // as the target reports them
	passedBy []awaited         // commands that came after the error and before Sync
	guard    bool              // some column is masked for this session
	held     int               // bytes that statements and portals take, at the most
	leaving  bool              // something was answered, and the client was not sent it yet
}

func newConversation(a *protocols.Access) *conversation {
	c := &conversation{a: a, status: 'I', stmts: newNames[statement](), portals: newNames[portal](), cursors: newNames[cursor](), settings: map[string]string{}}
	c.cond.L = &c.mu
	return c
}

func (c *conversation) first() *awaited {
	if c.n == 0 {
		return nil
	}
	return &c.queue[c.head]
}

func (c *conversation) nth(i int) *awaited { return &c.queue[(c.head+i)%len(c.queue)] }

// pop removes the first; it must have been dealt with.
func (c *conversation) pop() {
	*c.first() = awaited{}
	c.head = (c.head + 1) % len(c.queue)
	c.n--
	c.leaving = true
	c.cond.Broadcast()
}

// push adds a message that is about to be sent. While the target skips, what
// is not Sync gets no answer, so it is not awaited and its changes are undone.
func (c *conversation) push(w awaited) {
	if c.skipping {
		if w.step != stepSync {
			c.skip(&w)
			// Who reads the target's answers says what became of a command. A
			// client that never sends Sync has that said of as many as it could
			// have on their way.
			if w.op != 0 && len(c.passedBy) < maxPending {
				c.passedBy = append(c.passedBy, w)
			}
			return
		}
		c.skipping = false
	}
	if c.n == len(c.queue) {
		grown := make([]awaited, max(16, 2*len(c.queue)))
		for i := range c.n {
			grown[i] = *c.nth(i)
		}
		c.queue, c.head = grown, 0
	}
	c.queue[(c.head+c.n)%len(c.queue)] = w
	c.n++
}

// skip undoes what w would have changed.
func (c *conversation) skip(w *awaited) {
	if w.stmtVersion != nil {
		c.stmts.undo(w.stmtVersion)
	}
	if w.portalVersion != nil {
		c.portals.undo(w.portalVersion)
	}
	for i := len(w.sqlNames) - 1; i >= 0; i-- {
		if v := w.sqlNames[i].v; v != nil && !v.confirmed {
			c.stmts.undo(v)
		}
		if v := w.sqlNames[i].cursor; v != nil && !v.confirmed {
			c.cursors.undo(v)
		}
	}
	w.stmtVersion, w.portalVersion, w.sqlNames = nil, nil, nil
}

// confirm says that the target has done what w asked.
func (c *conversation) confirm(w *awaited) {
	if w.stmtVersion != nil {
		c.stmts.confirm(w.stmtVersion)
	}
	if w.portalVersion != nil {
		c.portals.confirm(w.portalVersion)
	}
	c.confirmSQL(w, w.at)
}

// confirmSQL says that the statement at of w succeeded.
func (c *conversation) confirmSQL(w *awaited, at int) {
	for i := range w.sqlNames {
		switch s := &w.sqlNames[i]; {
		case s.at != at:
		case s.all:
			c.stmts.forget(nil)
		case s.cursors:
			c.cursors.forget(nil)
		case s.cursor != nil && !s.cursor.confirmed:
			c.cursors.confirm(s.cursor)
		case s.v != nil && !s.v.confirmed:
			c.stmts.confirm(s.v)
		}
	}
}

// skipToSync drops what the target will skip after an error. c.mu is held.
func (c *conversation) skipToSync() {
	n := 0
	for n < c.n && c.nth(n).step != stepSync {
		n++
	}
	for i := n - 1; i >= 0; i-- { // the youngest change is undone first
		c.skip(c.nth(i))
	}
	for range n {
		c.skipped(c.first())
		c.pop()
	}
	c.copy = copyNone
	c.skipping = c.n == 0
}

// settle records the outcome of what was skipped before the Sync that is being
// answered. c.mu is held.
func (c *conversation) settle() {
	for i := range c.passedBy {
		c.skipped(&c.passedBy[i])
	}
	c.passedBy = nil
}

// skipped records the outcome of a command that the target skips.
func (c *conversation) skipped(w *awaited) {
	if w.op != 0 {
		c.ch.Done(protocols.Done{Op: w.op, Effect: "skipped", Reason: "an earlier command of the pipeline failed", Began: w.began})
	}
}

// await waits until ready says so. It returns when the conversation or ctx ends.
func (c *conversation) await(ctx context.Context, ready func() bool) error {
	stop := context.AfterFunc(ctx, func() {
		c.mu.Lock()
		c.cond.Broadcast()
		c.mu.Unlock()
	})
	defer stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for !ready() {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		c.cond.Wait()
	}
	return nil
}

// idle says that nothing is awaited, and that the client was sent all answers.
// c.mu is held.
func (c *conversation) idle() bool { return c.n == 0 && !c.leaving }

// discretion is how much of a report may leave that comes while w is being
// answered. c.mu is held.
func (c *conversation) discretion(w *awaited) discretion {
	if !c.guard {
		return open
	}
	if w != nil {
		switch {
		case w.query != nil && w.query.reads, w.stmt != nil && w.stmt.reads(), w.portal != nil && w.portal.an.reads:
			return sealed
		}
	}
	return guarded
}

func appendUint32(b []byte, v uint32) []byte { return binary.BigEndian.AppendUint32(b, v) }

package protocols

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols/wire"
	"github.com/sallyport/sallyport/recording"
)

// Operation is one thing a client asks its target to do. The relay reuses it;
// Text and Data are valid until the next operation is decoded.
type Operation struct {
	Verb string // the protocol's name for what was sent: Query, Parse, Bind, Execute
	Text []byte // what is asked, for the record: the exact bytes
	Data []byte // what comes with it, for the record: parameters, as sent
	// Detail goes into the record: names and the like.
	Detail map[string]string
	// Pairs are all that must be permitted.
	Pairs []policy.Pair
	// Empty says that there is nothing in it to decide, such as a statement
	// of only comments. Without it, no Pairs is a refusal.
	Empty bool
	// Problem refuses the operation before policy is asked.
	Problem *Refusal
	// Prepares says that nothing runs yet: what policy would hold is let
	// through, and held when it is to run.
	Prepares bool
	// Late says that it is too late to hold it: what would be held is refused.
	Late bool
	// InTransaction says that a transaction block is open as far as is known
	// without waiting for the target.
	InTransaction bool
	// Memo, when not nil, keeps the decision for the next operation with the
	// same Pairs. The codec drops it when Pairs might differ.
	Memo *Memo
	// Granted, when not nil, is the admission of the operation that this one
	// carries on (Bind, for Execute): what was approved for it stays approved
	// until the approval or the token expires. The codec gives it only where
	// nothing that the approval was about can have changed since.
	Granted *Admission
	// State is the codec's own.
	State any
}

// Memo remembers a decision. Its content is for Admit alone: a codec carries
// it beside the analysis that it belongs to and never sees a decision.
type Memo struct {
	valid    bool
	index    uint64
	inTx     bool
	until    time.Time
	decision policy.Decision
	actions  []string
}

// memoLife is how long a decision may be repeated without asking again. A
// decision by a rule that reads the clock is not repeated at all.
const memoLife = time.Second

// Admission is leave to forward one operation. Only Admit makes one.
type Admission struct {
	Op uint64 // the operation's number in the recording
	At time.Time
	// Holds says that the operation only prepares what will be held when it is
	// to run.
	Holds bool

	ok       bool
	approved []string  // approval rules that were lifted for it
	until    time.Time // and until when an operation that carries it on may rely on that; zero for no limit
}

// Approved says that the operation was held and approved.
func (a *Admission) Approved() bool { return a != nil && len(a.approved) > 0 }

// lifted are the rules that an operation which carries a on need not heed.
func (a *Admission) lifted(now time.Time) []string {
	if a == nil || (!a.until.IsZero() && !now.Before(a.until)) {
		return nil
	}
	return a.approved
}

// Settled is what the target was doing when everything before an operation had
// been answered.
type Settled struct {
	// Skipping says that the target ignores what comes until the client
	// resynchronises: the operation would have no effect.
	Skipping bool
	// InTransaction says that a transaction is open, implicit ones included.
	InTransaction bool
}

// Requests is the client's half of a framed protocol, for one session. The
// relay's request goroutine alone calls it.
type Requests interface {
	// Frame measures the frame at the head of buf. It has no effect: the relay
	// may ask again about the same frame when more of it has arrived.
	Frame(buf []byte) (Frame, error)
	// Harmless returns the length of the frame at the head of b when it is one
	// that carries no command whatever came before it, or else 0.
	Harmless(b []byte) int
	// Control takes note of a whole Control frame before it goes upstream. It
	// reports false when the frame must not go. It may wait, after Barrier.
	Control(ctx context.Context, frame []byte) (pass bool, err error)
	// Decode fills op from a whole Command frame, or from the head of an
	// Oversize one, for which it must set op.Problem. It may wait, after
	// Barrier.
	Decode(ctx context.Context, frame []byte, op *Operation) error
	// Admitted takes note that op goes upstream. What it returns goes before
	// and after it: Control frames only.
	Admitted(op *Operation, adm *Admission) (before, after []byte)
	// Refused takes note that op does not, and returns one of Poisons to go in
	// its place, so that the target itself fails at this point and all that
	// depends on it is the target's own doing.
	Refused(op *Operation, id uint64, why *Refusal) (poison []byte)
	// Poisons are all that Refused may return: constants.
	Poisons() [][]byte
	// Flush is a Control frame that makes the target answer what it can.
	Flush() []byte

	// Wait waits for what a Wait frame is to wait for. Called after a Barrier.
	Wait(ctx context.Context) error
	// Settle waits until everything before op was answered. Called after a
	// Barrier, for an operation about to be held.
	Settle(ctx context.Context, op *Operation) (Settled, error)
	// Again analyses op anew, from what it was decoded from.
	Again(ctx context.Context, op *Operation) error
	// Digest is over everything that decides what op will do.
	Digest(op *Operation) [32]byte
	// Explain is what op will do, for an approver.
	Explain(op *Operation) (text []byte, detail map[string]string)
	// Notice appends a notice to the client.
	Notice(dst []byte, text string) []byte
}

// MaxHeldText is the most of a held operation that the cluster stores.
const MaxHeldText = 64 << 10

const (
	// noticeEvery keeps connections of held operations alive through
	// middleboxes, and shows a human that something is happening.
	noticeEvery = 15 * time.Second
	// withdrawWait bounds withdrawing an approval request.
	withdrawWait = 5 * time.Second
)

var (
	// errSkipped says that the target ignores the operation, so nobody need be asked.
	errSkipped = errors.New("protocols: the target skips this operation")
	// errClientGone ends a hold, and the session.
	errClientGone = errors.New("protocols: the client went away")
	// ErrCancelled is the cause of a hold that its client cancelled.
	ErrCancelled = errors.New("cancelled by the client")
)

// Channel is one ordered conversation within a Session: the whole connection
// for PostgreSQL. Its unexported fields belong to the relay's request
// goroutine unless said otherwise.
type Channel struct {
	s   *Session
	req Requests

	seq       uint64
	request   policy.Request
	entry     recording.Entry
	unwritten bool          // record entries that forward must write first
	durable   recording.LSN // forward must sync up to here; 0 for none

	in      *wire.Buffer
	client  aheadReader
	run     []byte // admitted bytes inside in, not sent yet; they come after out
	out     []byte // admitted bytes, not sent yet
	poisons [][]byte

	renewClient, renewUpstream deadline
	holding                    atomic.Pointer[context.CancelCauseFunc]

	resp responder // belongs to the response goroutine
}

// Channel begins a conversation. The session must be connected.
func (s *Session) Channel() *Channel {
	s.init()
	return &Channel{s: s}
}

// Admit decides op, records what was asked and the decision, waits for an
// approval where one is owed, and returns leave to forward it. It is all of
// enforcement: no byte of a command goes upstream without the Admission that
// it returns, and forward writes the record before the command.
//
// An error that is a *Refusal is to be told to the client; any other ends the
// session.
func (c *Channel) Admit(ctx context.Context, op *Operation) (Admission, error) {
	c.seq++
	adm := Admission{Op: c.seq, At: c.s.Env.Now()}
	adm.approved = op.Granted.lifted(adm.At)
	d, index, actions := c.decide(op, adm.At, adm.approved)

	rec := c.s.access.Record
	c.entry = recording.Entry{Type: recording.Command, Op: adm.Op, Verb: op.Verb, Text: op.Text, Data: op.Data, Detail: op.Detail}
	if err := rec.Buffer(&c.entry); err != nil {
		return Admission{}, noRecord(err)
	}
	c.unwritten = true
	if err := c.recordDecision(adm.Op, &d, index, actions); err != nil {
		return Admission{}, err
	}

	stats := c.s.access.Stats
	switch {
	case d.Effect == policy.Permit:
	case d.Effect == policy.Hold && op.Prepares && d.Obligations.Approval != nil:
		adm.Holds = true
	case d.Effect == policy.Hold && op.Late:
		stats.Refused.Add(1)
		return Admission{Op: adm.Op}, &Refusal{Rule: d.Rule, Reason: "this needs approval, and none that was given at Bind covers it any more " +
			"(something else was sent in between, what it would do or the policy changed, or it came too late): bind it again"}
	case d.Effect == policy.Hold && d.Obligations.Approval != nil:
		stats.Held.Add(1)
		if err := c.hold(ctx, op, &adm, d.Obligations.Approval, index); err != nil {
			var r *Refusal
			if errors.As(err, &r) {
				stats.Refused.Add(1)
			}
			return Admission{}, err
		}
	default:
		stats.Refused.Add(1)
		if op.Problem != nil {
			return Admission{Op: adm.Op}, op.Problem
		}
		return Admission{Op: adm.Op}, &Refusal{Rule: d.Rule, Reason: d.Reason}
	}
	if err := c.s.access.Fence.Check(); err != nil {
		return Admission{}, err
	}
	stats.Admitted.Add(1)
	adm.ok = true
	return adm, nil
}

func noRecord(err error) error {
	return fmt.Errorf("no record, no forwarding: %w", err)
}

// decide asks policy, or repeats what it said of the same pairs a moment ago.
func (c *Channel) decide(op *Operation, now time.Time, approved []string) (policy.Decision, uint64, []string) {
	env := c.s.Env
	if op.Problem != nil {
		return policy.Decision{Rule: op.Problem.Rule, Reason: op.Problem.Reason}, env.PolicyIndex(), actionsOf(op.Pairs)
	}
	if op.Empty && len(op.Pairs) == 0 {
		return policy.Decision{Effect: policy.Permit, Rule: "empty", Reason: "nothing to decide"}, env.PolicyIndex(), nil
	}
	if len(op.Pairs) == 0 {
		return policy.Decision{Rule: "unknown", Reason: "the gateway cannot tell what this does, so it is refused"}, env.PolicyIndex(), nil
	}
	m := op.Memo
	if m != nil && len(approved) == 0 && m.valid && m.inTx == op.InTransaction && now.Before(m.until) && m.index == env.PolicyIndex() {
		return m.decision, m.index, m.actions
	}
	a := c.s.access
	c.request = policy.Request{Subject: a.Subject, Pairs: op.Pairs, Context: policy.Context{
		Now: now, Profile: a.Profile, Database: a.Database, ClientAddr: a.Client, Protocol: c.s.Protocol,
		InTransaction: op.InTransaction, Approved: approved,
	}}
	d, index := env.Decide(&c.request)
	actions := actionsOf(op.Pairs)
	if m != nil && len(approved) == 0 && !d.Volatile {
		*m = Memo{valid: true, index: index, inTx: op.InTransaction, until: now.Add(memoLife), decision: d, actions: actions}
	}
	return d, index, actions
}

func actionsOf(pairs []policy.Pair) []string {
	// The record lists what was asked, not a statement of ten thousand columns.
	const most = 256
	list := make([]string, 0, min(len(pairs), most))
	for i, p := range pairs {
		if i == most {
			return append(list, fmt.Sprintf("and %d more", len(pairs)-most))
		}
		list = append(list, string(p.Action)+" "+strings.Join(p.Resource.Path, "."))
	}
	return list
}

func (c *Channel) recordDecision(op uint64, d *policy.Decision, index uint64, actions []string) error {
	c.entry = recording.Entry{Type: recording.Decided, Op: op, Rule: d.Rule, Reason: d.Reason, PolicyIndex: index, Actions: actions}
	switch d.Effect {
	case policy.Permit:
		c.entry.Effect = "permit"
	case policy.Hold:
		c.entry.Effect = "hold"
	default:
		c.entry.Effect = "refuse"
	}
	rec := c.s.access.Record
	c.unwritten = true
	if d.Obligations.Durability == policy.Durable {
		lsn, err := rec.Append(&c.entry)
		if err != nil {
			return noRecord(err)
		}
		c.durable = lsn
		return nil
	}
	if err := rec.Buffer(&c.entry); err != nil {
		return noRecord(err)
	}
	return nil
}

// hold asks for approval of op and waits for it. What was admitted before goes
// upstream first.
func (c *Channel) hold(ctx context.Context, op *Operation, adm *Admission, ap *policy.Approval, index uint64) error {
	if err := c.Barrier(ctx); err != nil {
		return err
	}
	settled, err := c.req.Settle(ctx, op)
	if err != nil {
		return err
	}
	if settled.Skipping {
		return errSkipped
	}
	limit := ap.Expires
	if settled.InTransaction {
		if ap.InTransaction <= 0 {
			return &Refusal{Rule: strings.Join(ap.Rules, ","), Reason: "this needs approval, and waiting inside an open transaction is not allowed by the rule: " +
				"run it outside a transaction block"}
		}
		limit = min(limit, ap.InTransaction)
	}
	text, detail := c.req.Explain(op)
	if len(text) > MaxHeldText {
		return &Refusal{Rule: "limits", Reason: fmt.Sprintf("this needs approval and is longer than %d KiB, more than an approver can be shown: split it", MaxHeldText>>10)}
	}
	a := c.s.access
	digest := c.req.Digest(op)
	asked := *ap
	asked.Expires = limit
	until := a.Subject.ExpiresAt
	if end := c.s.Env.Now().Add(limit); limit > 0 && (until.IsZero() || end.Before(until)) {
		until = end
	}
	ticket, err := c.s.Env.Ask(ctx, &Hold{Access: a, Approval: &asked, Digest: digest, Text: bytes.Clone(text), Detail: detail, Index: index})
	if err != nil {
		var r *Refusal
		if errors.As(err, &r) {
			return r
		}
		return &Refusal{Rule: strings.Join(ap.Rules, ","), Reason: "this needs approval, and the request could not be stored: try again (" + err.Error() + ")"}
	}
	if err := c.recordApproval(adm.Op, ticket, "asked", "", ""); err != nil {
		return err
	}
	approvers, err := c.wait(ctx, ticket, limit)
	if err != nil {
		return c.unapproved(adm.Op, ticket, err)
	}
	if err := c.recordApproval(adm.Op, ticket, "granted", strings.Join(approvers, ","), ""); err != nil {
		return err
	}

	// The world has moved on: analyse and decide again, for exactly what was approved.
	if err := c.req.Again(ctx, op); err != nil {
		return err
	}
	now := c.s.Env.Now()
	switch {
	case op.Problem != nil:
		err = op.Problem
	case c.req.Digest(op) != digest:
		err = &Refusal{Rule: "approval", Reason: "what this would do changed while it waited for approval: run it again"}
	case !a.Subject.ExpiresAt.IsZero() && !now.Before(a.Subject.ExpiresAt):
		err = &Refusal{Rule: "expired", Reason: "the token expired while this waited for approval: log in again", Code: "28000"}
	}
	if err != nil {
		ticket.Cancel(ctx, err.Error())
		return err
	}
	if d, _, _ := c.decide(op, now, nil); d.Effect == policy.Hold && stricter(d.Obligations.Approval, ap) {
		r := &Refusal{Rule: d.Rule, Reason: "the approval rule asks for more since the policy changed: run it again"}
		ticket.Cancel(ctx, r.Reason)
		return r
	}
	d, index, actions := c.decide(op, now, ap.Rules)
	if err := c.recordDecision(adm.Op, &d, index, actions); err != nil {
		return err
	}
	if d.Effect != policy.Permit {
		r := &Refusal{Rule: d.Rule, Reason: d.Reason}
		if d.Effect == policy.Hold {
			r.Reason = "another approval is needed since the policy changed: run it again"
		}
		ticket.Cancel(ctx, r.Reason)
		return r
	}
	if err := c.s.enter(); err != nil { // frozen, it waits: what follows spends the approval
		return err
	}
	if err := ticket.Use(ctx); err != nil {
		return &Refusal{Rule: "approval", Reason: "the approval could not be used: " + err.Error()}
	}
	if err := c.recordApproval(adm.Op, ticket, "used", "", ""); err != nil {
		return err
	}
	adm.approved, adm.until = ap.Rules, until
	adm.At = c.s.Env.Now()
	return nil
}

// stricter says that what is owed now is not covered by what was asked for.
func stricter(now, asked *policy.Approval) bool {
	if now == nil {
		return true
	}
	for _, g := range now.Groups {
		if !slices.Contains(asked.Groups, g) {
			return true
		}
	}
	return now.Count > asked.Count
}

// wait tells the client and waits for the decision. The client's socket is
// watched meanwhile, so that a client that leaves ends the wait.
func (c *Channel) wait(ctx context.Context, ticket Ticket, limit time.Duration) ([]string, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if limit > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, limit, &Refusal{Rule: "approval", Reason: "nobody approved this in time: ask again", Code: "57014"})
		defer stop()
	}
	c.holding.Store(&cancel)
	defer c.holding.Store(nil)
	go func() { // ends with ctx
		select {
		case <-c.s.gone:
			cancel(c.goneErr())
		case <-ctx.Done():
		}
	}()
	stopWatch := c.client.watch(func() { cancel(errClientGone) })
	defer stopWatch()

	told := make(chan struct{})
	defer func() { <-told }()
	done, finish := context.WithCancel(ctx)
	defer finish()
	go func() {
		defer close(told)
		began := time.Now()
		text := ticket.HowTo()
		tick := time.NewTicker(noticeEvery)
		defer tick.Stop()
		for {
			if err := c.notice(text); err != nil {
				cancel(errClientGone)
				return
			}
			select {
			case <-done.Done():
				return
			case <-tick.C:
				text = fmt.Sprintf("still waiting for approval %s (%s)", ticket.ID(), time.Since(began).Round(time.Second))
			}
		}
	}()
	approvers, err := ticket.Wait(ctx)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
		if cut := c.s.Err(); cut != nil { // whichever leg's end was noticed first
			err = cut
		}
	}
	return approvers, err
}

func (c *Channel) goneErr() error {
	if err := c.s.Err(); err != nil {
		return err
	}
	return errClientGone
}

// unapproved ends a hold that was not granted.
func (c *Channel) unapproved(op uint64, ticket Ticket, why error) error {
	ctx, cancel := context.WithTimeout(context.Background(), withdrawWait)
	defer cancel()
	effect := "denied"
	var r *Refusal
	switch {
	case errors.Is(why, errClientGone), errors.Is(why, context.Canceled):
		effect = "cancelled"
		ticket.Cancel(ctx, "the requester's connection ended")
	case errors.Is(why, ErrCancelled):
		effect = "cancelled"
		ticket.Cancel(ctx, "cancelled by the requester")
		r = &Refusal{Rule: "approval", Reason: "cancelled while waiting for approval", Code: "57014"}
	case errors.As(why, &r):
		if r.Code == "57014" {
			effect = "expired"
		}
		ticket.Cancel(ctx, r.Reason)
	default:
		r = &Refusal{Rule: "approval", Reason: "not approved: " + why.Error()}
	}
	if err := c.recordApproval(op, ticket, effect, "", why.Error()); err != nil {
		return err
	}
	if r == nil {
		return why
	}
	return r
}

func (c *Channel) recordApproval(op uint64, ticket Ticket, effect, actor, reason string) error {
	c.entry = recording.Entry{Type: recording.Approval, Op: op, Effect: effect, Approval: ticket.ID(), Actor: actor, Reason: reason}
	if _, err := c.s.access.Record.Append(&c.entry); err != nil {
		return noRecord(err)
	}
	return nil
}

// CancelHold ends the wait of a held operation. It reports false when none
// waits. Safe for any goroutine.
func (c *Channel) CancelHold() bool {
	cancel := c.holding.Load()
	if cancel == nil {
		return false
	}
	(*cancel)(ErrCancelled)
	return true
}

// notice sends a notice between two frames.
func (c *Channel) notice(text string) error {
	if err := c.s.lockClient(); err != nil {
		return err
	}
	defer c.s.unlockClient()
	if err := c.s.enter(); err != nil {
		return err
	}
	c.s.Client.SetWriteDeadline(time.Now().Add(noticeEvery))
	defer c.s.Client.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := c.s.Client.Write(c.req.Notice(nil, text))
	return err
}

package protocols

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/sallyport/sallyport/protocols/wire"
	"github.com/sallyport/sallyport/recording"
)

const (
	// bufferBytes is what one direction of a session costs. Frames that pass
	// are streamed through it; frames that must be whole make it grow for
	// their own duration.
	bufferBytes = 32 << 10
	// MaxWhole is the largest frame that is ever held whole. Codecs have
	// smaller limits for most kinds.
	MaxWhole = 16<<20 + 64<<10
	// writeTimeout is how long one write may take before its peer counts as
	// dead. It is long because a slow reader is not dead (a pager that a person
	// reads in), and it holds nothing up but the session itself.
	writeTimeout = 15 * time.Minute
	// drainWait is how long the target's last words are waited for after a
	// write to it failed.
	drainWait = 2 * time.Second
	// aheadBytes bounds what is read of a client that sends on while its
	// operation waits for approval.
	aheadBytes = 32 << 10
)

// Kind is what a frame asks of the relay.
type Kind uint8

const (
	Unknown  Kind = iota // ends the session
	Pass                 // goes as it is, in pieces if it is large: carries no command, and no value to mask
	Drop                 // is swallowed, in pieces if it is large
	Control              // request, whole: carries no command; the codec takes note before it goes
	Command              // request, whole: decoded and judged
	Oversize             // request: a command above the codec's limit; judged by its head, and refused
	Answer               // response, whole: the codec says what leaves
	Last                 // request, whole: the client's goodbye; goes, and nothing after it is read
	Wait                 // request: what it is depends on what the target is about to answer; wait, and measure again
)

// Frame is the extent and kind of one message. Len == 0 means that more bytes
// are needed even to tell.
type Frame struct {
	Len     int
	Kind    Kind
	Row     bool // response: counts as a row
	Trailer bool // response: belongs to the outcome before it
}

// Responses is the target's half of a framed protocol, for one session. The
// relay's response goroutine alone calls it.
type Responses interface {
	// Frame measures the frame at the head of buf. It has no effect.
	Frame(buf []byte) (Frame, error)
	// Answer appends to dst what leaves for a whole Answer frame; that may be
	// nothing. A *Refusal as error cuts the session for that reason.
	Answer(dst, frame []byte) ([]byte, error)
	// Op is the operation being answered, 0 for none.
	Op() uint64
	// Delivered takes note that everything Answer has dealt with has left.
	Delivered()
	// Idle says that nothing the client sent is waiting for an answer.
	Idle() bool
}

// Done is how an operation ended.
type Done struct {
	Op     uint64
	Effect string // ok, error, refused, skipped
	Reason string // command tag, or SQLSTATE and message as the client saw it
	Rows   uint64
	Began  time.Time
}

// ErrTargetClosed says that the target ended the connection by itself.
var ErrTargetClosed = errors.New("the target closed the connection")

// Relay pumps frames both ways until either side is done. It owns two
// goroutines, both gone when it returns, and sends farewell (a Control frame)
// to a target whose client went without one. A nil error is an ordinary end by
// the client.
func (c *Channel) Relay(ctx context.Context, req Requests, resp Responses, farewell []byte) error {
	c.req, c.poisons = req, req.Poisons()
	c.in = wire.NewBuffer(bufferBytes)
	c.client.conn = c.s.Client
	c.resp.codec = resp
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	var requests, responses error
	var wg sync.WaitGroup
	wg.Go(func() {
		requests = c.contained(func() error { return c.relayRequests(ctx) })
		if requests == nil { // said goodbye: the target closes when it is done
			return
		}
		var r *Refusal
		if errors.As(requests, &r) {
			c.s.Cut(r)
		}
		c.s.Client.SetWriteDeadline(time.Now().Add(drainWait))
		switch {
		case errors.Is(requests, io.EOF):
			if resp.Idle() {
				c.s.upstream.SetWriteDeadline(time.Now().Add(drainWait))
				c.sendControl(farewell)
			}
			c.s.upstream.SetReadDeadline(time.Unix(1, 0))
		case errors.As(requests, new(upstreamError)):
			c.s.upstream.SetReadDeadline(time.Now().Add(drainWait))
		default:
			c.s.upstream.SetReadDeadline(time.Unix(1, 0))
		}
		cancel(requests)
	})
	wg.Go(func() {
		responses = c.contained(c.relayResponses)
		if c.resp.locked {
			close(c.s.torn)
		}
		var r *Refusal
		if errors.As(responses, &r) {
			c.s.Cut(r)
		}
		cancel(responses)
		c.s.Client.SetReadDeadline(time.Unix(1, 0))
	})
	stop := context.AfterFunc(ctx, func() {
		if err := context.Cause(ctx); errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			c.s.reset() // from outside: nothing may keep a goroutine
		}
	})
	wg.Wait()
	stop()

	var refused *Refusal
	if errors.As(c.s.access.Fence.Check(), &refused) {
		c.s.Cut(refused) // the target was told to stop, and its answer came before the cut
	}
	if err := c.s.Err(); err != nil {
		return err
	}
	switch {
	case errors.As(requests, &refused):
		return refused
	case requests == nil || errors.Is(requests, io.EOF):
		return nil
	case errors.Is(responses, io.EOF):
		return ErrTargetClosed
	case errors.Is(requests, os.ErrDeadlineExceeded) || errors.Is(requests, context.Canceled):
		return responses
	}
	return requests
}

// contained turns a panic into the end of this session alone.
func (c *Channel) contained(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			c.s.Env.Log.Error("panic in a session", "session", c.s.access.SessionID, "panic", p, "stack", string(debug.Stack()))
			err = &Refusal{Rule: "internal", Reason: "internal error in the gateway: the session was ended", Code: "XX000"}
		}
	}()
	return f()
}

// A upstreamError is a failure of the target's connection.
type upstreamError struct{ err error }

func (e upstreamError) Error() string { return "target: " + e.err.Error() }
func (e upstreamError) Unwrap() error {
	if e.err == io.EOF {
		return io.ErrUnexpectedEOF // io.EOF by itself means the client's end
	}
	return e.err
}

// relayRequests moves client frames upstream. Frames that may go are written
// in runs: one write for as many as a read brought.
func (c *Channel) relayRequests(ctx context.Context) error {
	var op Operation
	pass, drop := 0, 0 // bytes of a large frame still to come
	for {
		buf, i, need := c.in.Unread(), 0, 0
		for i < len(buf) && need == 0 {
			rest := buf[i:]
			if pass > 0 {
				n := min(pass, len(rest))
				if err := c.passing(rest[:n]); err != nil {
					return err
				}
				i, pass = i+n, pass-n
				continue
			}
			if drop > 0 {
				n := min(drop, len(rest))
				i, drop = i+n, drop-n
				continue
			}
			f, err := c.req.Frame(rest)
			if err != nil {
				return err
			}
			n := min(f.Len, len(rest))
			if f.Len == 0 {
				need = len(rest) + 1
				break
			}
			switch f.Kind {
			case Pass:
				if err := c.passing(rest[:n]); err != nil {
					return err
				}
				i, pass = i+n, f.Len-n
			case Drop:
				i, drop = i+n, f.Len-n
			case Wait:
				if err := c.Barrier(ctx); err != nil {
					return err
				}
				if err := c.req.Wait(ctx); err != nil {
					return err
				}
			case Oversize:
				op = Operation{}
				if err := c.operate(ctx, rest[:n], &op); err != nil {
					return err
				}
				i, drop = i+n, f.Len-n
			case Control, Command, Last:
				if n < f.Len {
					need = f.Len
					break
				}
				i += n
				if f.Kind == Command {
					op = Operation{}
					if err := c.operate(ctx, rest[:n], &op); err != nil {
						return err
					}
					break
				}
				ok, err := c.req.Control(ctx, rest[:n])
				if err != nil {
					return err
				}
				if ok {
					c.take(rest[:n])
				}
				if f.Kind == Last {
					return c.forward(ctx)
				}
			default:
				return &Refusal{Rule: "protocol", Reason: fmt.Sprintf("a message of type %q is not known here", rest[0]), Code: "08P01"}
			}
		}
		if err := c.forward(ctx); err != nil {
			return err
		}
		c.in.Discard(i)
		if need > MaxWhole {
			return &Refusal{Rule: "limits", Reason: "a message is too large", Code: "54000"}
		}
		c.in.Grow(need)
		if ctx.Err() != nil { // a hold may have taken the deadline back that was to wake us
			return context.Cause(ctx)
		}
		if err := c.in.Fill(&c.client); err != nil {
			if errors.Is(err, io.EOF) && len(c.in.Unread()) > 0 {
				return fmt.Errorf("client: %w", io.ErrUnexpectedEOF)
			}
			return err
		}
	}
}

// operate has one command judged and puts it, or what makes the target fail in
// its place, in line to go upstream.
func (c *Channel) operate(ctx context.Context, frame []byte, op *Operation) error {
	if err := c.req.Decode(ctx, frame, op); err != nil {
		return err
	}
	adm, err := c.Admit(ctx, op)
	var refused *Refusal
	switch {
	case err == nil:
		return c.send(frame, op, &adm)
	case errors.Is(err, errSkipped):
		return nil
	case errors.As(err, &refused) && c.s.access.Fence.Check() == nil:
		poison := c.req.Refused(op, c.seq, refused)
		for _, p := range c.poisons {
			if bytes.Equal(p, poison) {
				c.take(p)
				return nil
			}
		}
		return errors.New("protocols: the codec's poison is not one of its constants")
	}
	return err
}

// send puts an admitted command in line.
func (c *Channel) send(frame []byte, op *Operation, adm *Admission) error {
	if !adm.ok {
		return errors.New("protocols: a command without an admission")
	}
	before, after := c.req.Admitted(op, adm)
	if err := c.takeControl(before); err != nil {
		return err
	}
	c.take(frame)
	return c.takeControl(after)
}

// takeControl puts frames of the codec's own in line. They carry no command.
func (c *Channel) takeControl(frames []byte) error {
	for rest := frames; len(rest) > 0; {
		n := c.req.Harmless(rest)
		if n <= 0 || n > len(rest) {
			return fmt.Errorf("protocols: the codec may add control frames only, not %q", rest[0])
		}
		rest = rest[n:]
	}
	if len(frames) > 0 {
		c.take(frames)
	}
	return nil
}

// passing puts bytes that carry no command, the data of the last one, in line,
// and in the record.
func (c *Channel) passing(b []byte) error {
	c.entry = recording.Entry{Type: recording.Command, Op: c.seq, Verb: DataVerb, Data: b}
	if err := c.s.access.Record.Buffer(&c.entry); err != nil {
		return noRecord(err)
	}
	c.unwritten = true
	c.extend(b)
	return nil
}

// DataVerb is the verb, in the record, of data that a client sends after a
// command, such as the rows of COPY FROM STDIN: framed as sent, and cut where
// reads happened to end.
const DataVerb = "Data"

// extend adds b, which lies in the read buffer, to what goes upstream next,
// without copying it where it can.
func (c *Channel) extend(b []byte) {
	if len(c.run) > 0 && cap(c.run)-len(c.run) >= len(b) && &c.run[:len(c.run)+1][len(c.run)] == &b[0] {
		c.run = c.run[:len(c.run)+len(b)]
		return
	}
	c.out = append(c.out, c.run...)
	c.run = b
}

// take adds a copy of b to what goes upstream next.
func (c *Channel) take(b []byte) {
	c.out = append(append(c.out, c.run...), b...)
	c.run = nil
}

// Barrier sends what was admitted so far, and the codec's Flush frame after
// it, so that the target answers all of it.
func (c *Channel) Barrier(ctx context.Context) error {
	if err := c.takeControl(c.req.Flush()); err != nil {
		return err
	}
	return c.forward(ctx)
}

// forward is the only code that writes to the target. The record comes first,
// then the fence.
func (c *Channel) forward(ctx context.Context) error {
	if len(c.out)+len(c.run) == 0 {
		return nil
	}
	if c.unwritten {
		if err := c.s.access.Record.Flush(); err != nil {
			return noRecord(err)
		}
		c.unwritten = false
	}
	if c.durable != 0 {
		if err := c.s.access.Record.Sync(ctx, c.durable); err != nil {
			return noRecord(err)
		}
		c.durable = 0
	}
	if err := c.s.enter(); err != nil {
		return err
	}
	b := c.run
	if len(c.out) > 0 {
		c.out = append(c.out, c.run...)
		b = c.out
	}
	c.renewUpstream.renew(c.s.upstream)
	n, err := c.s.upstream.Write(b)
	c.s.access.Stats.BytesIn.Add(uint64(n))
	c.run = nil
	if cap(c.out) > 2*bufferBytes {
		c.out = nil // one large command must not cost memory for the rest of the session
	}
	c.out = c.out[:0]
	if err != nil {
		return upstreamError{err}
	}
	return nil
}

func (c *Channel) sendControl(frame []byte) {
	if c.s.access.Fence.Check() == nil && c.takeControl(frame) == nil {
		c.forward(context.Background())
	}
}

// responder is what the response goroutine knows.
type responder struct {
	codec    Responses
	out      []byte // leaves next, before the run
	recorded int    // out[:recorded] is in the record
	done     []Done // ended, and to be recorded after what leaves with them
	locked   bool   // the client is locked: what was written ends inside a frame
	entry    recording.Entry
}

// Done takes note that an operation ended. Only Responses.Answer may call it.
func (c *Channel) Done(d Done) { c.resp.done = append(c.resp.done, d) }

// relayResponses moves target frames to the client, in runs, recording what
// leaves. No allocation per row.
func (c *Channel) relayResponses() error {
	in := wire.NewBuffer(bufferBytes)
	r := &c.resp
	pass, drop := 0, 0
	for {
		buf, i, run, need := in.Unread(), 0, 0, 0 // buf[run:i] passes, and comes after r.out
		rows := uint64(0)
		for i < len(buf) && need == 0 {
			rest := buf[i:]
			if pass > 0 {
				n := min(pass, len(rest))
				i, pass = i+n, pass-n
				continue
			}
			if drop > 0 {
				r.out = append(r.out, buf[run:i]...)
				n := min(drop, len(rest))
				i, drop = i+n, drop-n
				run = i
				continue
			}
			f, err := r.codec.Frame(rest)
			if err != nil {
				return c.failed(err, buf[run:i])
			}
			if f.Len == 0 {
				need = len(rest) + 1
				break
			}
			if len(r.done) > 0 && !f.Trailer {
				r.out = append(r.out, buf[run:i]...)
				run = i
				if err := c.recordDone(); err != nil {
					return err
				}
			}
			n := min(f.Len, len(rest))
			if f.Row {
				rows++
			}
			switch f.Kind {
			case Pass:
				i, pass = i+n, f.Len-n
			case Drop:
				r.out = append(r.out, buf[run:i]...)
				i, drop = i+n, f.Len-n
				run = i
			case Answer:
				if n < f.Len {
					need = f.Len
					if f.Row {
						rows--
					}
					break
				}
				r.out = append(r.out, buf[run:i]...)
				if r.out, err = r.codec.Answer(r.out, rest[:n]); err != nil {
					return c.failed(err, nil)
				}
				i += n
				run = i
			default:
				return c.failed(&Refusal{Rule: "protocol", Reason: fmt.Sprintf("the target sent a message of type %q out of place", rest[0]), Code: "08P01"}, buf[run:i])
			}
		}
		c.s.access.Stats.Rows.Add(rows)
		if err := c.deliver(buf[run:i], pass > 0); err != nil {
			return err
		}
		r.codec.Delivered()
		in.Discard(i)
		if need > MaxWhole {
			return &Refusal{Rule: "limits", Reason: "the target sent a message of more than 16 MiB that the gateway must see whole", Code: "54000"}
		}
		in.Grow(need)
		if err := in.Fill(c.s.upstream); err != nil {
			return err
		}
	}
}

// failed delivers what came before a frame that ends the session.
func (c *Channel) failed(why error, run []byte) error {
	if err := c.deliver(run, false); err != nil {
		return err
	}
	return why
}

// deliver records what leaves, checks the fence and writes it to the client.
// partial says that it ends inside a frame: the client stays locked then.
func (c *Channel) deliver(run []byte, partial bool) error {
	r := &c.resp
	if len(r.done) > 0 {
		r.out = append(r.out, run...)
		run = nil
		if err := c.recordDone(); err != nil {
			return err
		}
	}
	b := run
	if len(r.out) > 0 {
		r.out = append(r.out, run...)
		b = r.out
	}
	if err := c.recordResponse(b[r.recorded:], r.codec.Op()); err != nil {
		return err
	}
	r.recorded = 0
	if cap(r.out) > 4*bufferBytes {
		defer func() { r.out = nil }()
	} else {
		defer func() { r.out = r.out[:0] }()
	}
	if len(b) == 0 {
		return nil
	}
	inside := r.locked // a frame that was begun before
	if !inside {
		if err := c.s.lockClient(); err != nil {
			return err
		}
	}
	if err := c.s.enter(); err != nil {
		if !inside { // nothing of it was written: the client can be told why
			c.s.unlockClient()
		}
		return err
	}
	r.locked = partial
	if !partial {
		defer c.s.unlockClient()
	}
	c.renewClient.renew(c.s.Client)
	n, err := c.s.Client.Write(b)
	c.s.access.Stats.BytesOut.Add(uint64(n))
	if err != nil {
		return fmt.Errorf("client: %w", err)
	}
	return nil
}

// recordDone records the operations that ended, after what left for them.
func (c *Channel) recordDone() error {
	r := &c.resp
	if err := c.recordResponse(r.out[r.recorded:], r.done[0].Op); err != nil {
		return err
	}
	r.recorded = len(r.out)
	for i := range r.done {
		d := &r.done[i]
		r.entry = recording.Entry{Type: recording.Outcome, Op: d.Op, Effect: d.Effect, Reason: d.Reason, Rows: d.Rows, Duration: c.s.Env.Now().Sub(d.Began)}
		if err := c.s.access.Record.Buffer(&r.entry); err != nil {
			return noRecord(err)
		}
	}
	r.done = r.done[:0]
	return nil
}

// recordBytes is the most of a response that one entry holds.
const recordBytes = 64 << 10

func (c *Channel) recordResponse(b []byte, op uint64) error {
	for len(b) > 0 {
		n := min(len(b), recordBytes)
		c.resp.entry = recording.Entry{Type: recording.Response, Op: op, Data: b[:n]}
		if err := c.s.access.Record.Buffer(&c.resp.entry); err != nil {
			return noRecord(err)
		}
		b = b[n:]
	}
	return nil
}

// deadline renews a write deadline seldom: setting one costs more than many writes.
type deadline struct{ next time.Time }

func (d *deadline) renew(c net.Conn) {
	now := time.Now()
	if now.Before(d.next) {
		return
	}
	d.next = now.Add(writeTimeout / 3)
	c.SetWriteDeadline(now.Add(writeTimeout))
}

// aheadReader reads the client. While an operation waits for approval it is
// read ahead, up to a limit, to notice that the client has gone.
type aheadReader struct {
	conn  net.Conn
	ahead []byte
	err   error
}

func (a *aheadReader) Read(p []byte) (int, error) {
	if len(a.ahead) > 0 {
		n := copy(p, a.ahead)
		if a.ahead = a.ahead[n:]; len(a.ahead) == 0 {
			a.ahead = nil
		}
		return n, nil
	}
	if a.err != nil {
		return 0, a.err
	}
	return a.conn.Read(p)
}

// watch reads ahead until stop is called, and calls gone when the client ends
// the connection. Read must not be called meanwhile.
func (a *aheadReader) watch(gone func()) (stop func()) {
	var wg sync.WaitGroup
	var stopped sync.Mutex
	stopping := false
	wg.Go(func() {
		buf := make([]byte, 4<<10)
		for len(a.ahead) < aheadBytes {
			n, err := a.conn.Read(buf[:min(len(buf), aheadBytes-len(a.ahead))])
			a.ahead = append(a.ahead, buf[:n]...)
			if err != nil {
				stopped.Lock()
				quiet := stopping && errors.Is(err, os.ErrDeadlineExceeded)
				stopped.Unlock()
				if !quiet {
					a.err = err
					gone()
				}
				return
			}
		}
	})
	return func() {
		stopped.Lock()
		stopping = true
		stopped.Unlock()
		a.conn.SetReadDeadline(time.Unix(1, 0))
		wg.Wait()
		a.conn.SetReadDeadline(time.Time{})
	}
}

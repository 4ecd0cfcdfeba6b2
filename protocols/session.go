package protocols

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/recording"
)

// Session is one client's connection to one target: who, to where, recorded as
// what. The listener makes it; Protocol.Serve runs it.
type Session struct {
	// Client is the client's connection. Its Read may replay bytes that the
	// listener peeked at.
	Client net.Conn
	// Secured says that the listener has ended TLS already (direct TLS with
	// the protocol's ALPN): Client is the inside of it.
	Secured  bool
	Protocol string // name of the protocol, for policy and record
	Env      *Env

	access *Access
	lease  Lease
	// upstream is the target's connection. It never leaves the Session:
	// Channel.forward is the only code that writes to it (sole_road_test.go).
	upstream net.Conn

	// sending is held by whoever writes to the client; it is a channel so that
	// a cut can stop waiting for it. A holder keeps it until the bytes it wrote
	// end at a frame boundary.
	sending chan struct{}
	// torn is closed when the client was left inside a frame, and nobody will
	// complete it: there is no place for last words.
	torn chan struct{}
	// halted is closed when what a cut session ran at its target has ended, or
	// was given up.
	halted chan struct{}
	// gone is closed when the session is cut or ended.
	gone   chan struct{}
	goOnce sync.Once
	cut    atomic.Pointer[Refusal] // why it was cut; nil when it was not

	// LastWords is the codec's wording of a cut, written to the client as the
	// last thing it reads; nil writes nothing. Set before Open.
	LastWords func(why *Refusal) []byte

	lateMu sync.Mutex // guards legs and lease against a cut while they are being set
	legs   []net.Conn
}

// lastWordsWait is how long a cut waits for a frame boundary and for the client
// to take the reason. It is part of the time from revoke to cut-off. Tests wait
// longer.
var lastWordsWait = 200 * time.Millisecond

const (
	// endWait bounds ending a session: telling the target to stop, dropping the
	// account.
	endWait = 10 * time.Second
	// killWait bounds ending what a cut session runs at its target: a revocation
	// waits for it.
	killWait = 3 * time.Second
)

// Login is what a codec needs to log in upstream with the just-in-time account.
type Login struct {
	Conn           net.Conn // not yet secured; lent: the codec returns it, or TLS over it, as Upstream.Conn
	TLS            *tls.Config
	User, Password string
	Role           string // the mapped group role
}

// Upstream is a connection that is logged in and idle.
type Upstream struct {
	Conn    net.Conn
	Backend uint32 // the target's id of the connection
}

// Begin takes leave to connect. From here on the node can cut the session.
func (s *Session) Begin(a *Access) {
	s.access = a
	s.init()
	s.guard(s.Client)
	if a.OnFreeze != nil {
		a.OnFreeze(s.interrupt)
	}
	a.OnCut(func() { s.Cut(s.cutReason()) })
}

// guard has the fence asked whenever bytes enter the socket beneath c, and
// keeps little in the kernel that a stop would not stop.
func (s *Session) guard(c net.Conn) {
	if g := gateOf(c); g != nil {
		g.guard(s.access.Fence, s.gone)
	}
	if err := tune(c, s.access.Mark); err != nil {
		s.Env.Log.Warn("a session's socket could not be set up as its fence would have it", "session", s.access.SessionID, "err", err)
		if s.access.Mark != 0 { // the kernel could not stop it
			s.Cut(&Refusal{Rule: "kernel-gate", Code: "57P03", Reason: "this node cannot put the session behind its kernel gate: connect to another node and tell its operator"})
		}
	}
}

// interrupt makes writes that wait for their peer return to the fence.
func (s *Session) interrupt() {
	s.lateMu.Lock()
	defer s.lateMu.Unlock()
	for _, c := range s.legs {
		if g := gateOf(c); g != nil {
			g.interrupt()
		}
	}
}

// enter waits until the session may pass bytes. It is asked where a message
// begins, so that a session that ends frozen can still be told why; the gates
// ask again for every piece that they write.
func (s *Session) enter() error {
	err := s.access.Fence.Enter(s.gone)
	if err == nil {
		s.access.Fence.Leave(0)
	}
	return err
}

func (s *Session) init() {
	if s.gone == nil {
		s.gone = make(chan struct{})
		s.torn, s.halted = make(chan struct{}), make(chan struct{})
		s.sending = make(chan struct{}, 1)
		s.legs = append(s.legs, s.Client)
	}
}

func (s *Session) cutReason() *Refusal {
	err := s.access.Fence.Check()
	var r *Refusal
	if errors.As(err, &r) {
		return r
	}
	return &Refusal{Rule: "revoked", Reason: "this session was ended by the gateway"}
}

// Connect obtains the just-in-time credential, dials the target and lends the
// connection to login. It keeps what login returns: nothing but Channel writes
// to it from here on, and nothing at all before the account has lost its LOGIN
// and password.
func (s *Session) Connect(ctx context.Context, login func(context.Context, Login) (Upstream, error)) error {
	lease, err := s.access.Credential(ctx)
	if err != nil {
		return fmt.Errorf("credential: %w", err)
	}
	s.lateMu.Lock()
	s.lease = lease
	s.lateMu.Unlock()
	conn, err := lease.Dial(ctx)
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	conn = NewGate(conn)
	s.guard(conn)
	if !s.addLeg(conn) {
		return s.Err()
	}
	up, err := login(ctx, Login{Conn: conn, TLS: lease.TLS(), User: lease.User(), Password: lease.Password(), Role: lease.Role()})
	if err != nil {
		conn.Close()
		return fmt.Errorf("login: %w", err)
	}
	s.upstream = up.Conn
	if err := lease.LoggedIn(ctx, up.Backend); err != nil {
		return fmt.Errorf("close the account: %w", err)
	}
	if err := s.access.Fence.Check(); err != nil {
		return err
	}
	return nil
}

// CancelTarget stops what the target is running for this session.
func (s *Session) CancelTarget(ctx context.Context) error {
	if s.lease == nil {
		return nil
	}
	return s.lease.Cancel(ctx)
}

// addLeg remembers a connection to reset at a cut. It reports false, with the
// connection closed, when the session was cut already.
func (s *Session) addLeg(c net.Conn) bool {
	s.lateMu.Lock()
	defer s.lateMu.Unlock()
	select {
	case <-s.gone:
		c.Close()
		return false
	default:
	}
	s.legs = append(s.legs, c)
	return true
}

// Err is why the session was cut, or nil.
func (s *Session) Err() error {
	if r := s.cut.Load(); r != nil {
		return r
	}
	return nil
}

// Cut ends the session now: the target's connection is reset, the client reads
// why, if it is at a frame boundary and takes it within 200 ms, then its
// connection is reset too, so that blocked reads and writes return. Meanwhile
// the target ends what it still runs. It returns when that is done; a target
// that hangs is not waited for longer than killWait. Safe to call from any goroutine, more than once.
func (s *Session) Cut(why *Refusal) {
	if !s.cut.CompareAndSwap(nil, why) {
		<-s.gone // whoever was first resets, or has
		s.reset()
		<-s.halted
		return
	}
	s.interrupt()
	s.lateMu.Lock()
	for _, c := range s.legs[1:] {
		abort(c)
	}
	lease := s.lease
	s.lateMu.Unlock()
	defer func() { <-s.halted }()
	if lease == nil {
		close(s.halted)
	} else {
		go func() { // beside what follows
			defer close(s.halted)
			ctx, cancel := context.WithTimeout(context.Background(), killWait)
			defer cancel()
			if err := lease.Terminate(ctx); err != nil {
				s.Env.Log.Warn("what a session that was cut runs at its target may go on", "err", err)
			}
		}()
	}
	if s.access != nil && s.access.Record != nil {
		// Before anything waits: a client that does not read must not delay the record.
		s.access.Record.Append(&recording.Entry{Type: recording.Cut, Rule: why.Rule, Reason: why.Reason})
	}
	// A node without a lease may have been reported as passing nothing more,
	// and its own words are bytes too.
	if s.LastWords != nil && (s.access == nil || s.access.Fence.Holds()) {
		timer := time.NewTimer(lastWordsWait)
		select {
		case s.sending <- struct{}{}: // kept: nobody writes after the last words
			if g := gateOf(s.Client); g != nil {
				g.lift()
			}
			s.Client.SetWriteDeadline(time.Now().Add(lastWordsWait))
			n, _ := s.Client.Write(s.LastWords(why)) // who does not take it does not hear it
			if s.access != nil {
				s.access.Fence.Wrote(n)
			}
		case <-s.torn:
		case <-timer.C:
		}
		timer.Stop()
	}
	s.reset()
}

// reset resets both legs.
func (s *Session) reset() {
	s.goOnce.Do(func() { close(s.gone) })
	s.lateMu.Lock()
	defer s.lateMu.Unlock()
	for _, c := range s.legs {
		abort(c)
	}
}

// abort closes c so that what was not sent yet is not sent, and without the
// wait of a TLS close.
func abort(c net.Conn) {
	for {
		switch inner := c.(type) {
		case interface{ NetConn() net.Conn }: // *tls.Conn and wrappers of ours
			c = inner.NetConn()
			continue
		case interface{ SetLinger(int) error }:
			inner.SetLinger(0)
		}
		c.Close()
		return
	}
}

// lockClient waits for the right to write to the client. It fails when the
// session is gone.
func (s *Session) lockClient() error {
	select {
	case s.sending <- struct{}{}:
		return nil
	default:
	}
	select {
	case s.sending <- struct{}{}:
		return nil
	case <-s.gone:
		if err := s.Err(); err != nil {
			return err
		}
		return net.ErrClosed
	}
}

func (s *Session) unlockClient() { <-s.sending }

// End closes both legs, gives the credential back and completes the
// registration and the recording. It is the last thing Serve does with a
// session that Begin was called for. stop says that the target may still be
// running something that nobody will see the answer of: it is told to stop.
func (s *Session) End(end recording.Ending, stop bool) {
	if s.cut.Load() != nil {
		<-s.gone // the client may be reading why
	}
	ctx, cancel := context.WithTimeout(context.Background(), endWait)
	defer cancel()
	if s.lease != nil && stop {
		kctx, cancel := context.WithTimeout(ctx, killWait)
		s.lease.Terminate(kctx)
		cancel()
	}
	s.goOnce.Do(func() { close(s.gone) })
	s.lateMu.Lock()
	legs := s.legs
	s.lateMu.Unlock()
	for _, c := range legs {
		c.Close()
	}
	if s.upstream != nil {
		s.upstream.Close()
	}
	if s.lease != nil {
		if err := s.lease.Release(ctx); err != nil {
			s.Env.Log.Warn("the just-in-time account was not dropped; the sweeper will", "err", err)
		}
	}
	if s.access != nil {
		s.access.Close(end)
	}
}

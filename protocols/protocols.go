// Package protocols is the policy enforcement point: every operation of every
// client passes Channel.Admit on its way upstream, whatever protocol carried
// it. Protocol packages measure, decode, mask what a plan names and word
// refusals; they never see a Decision.
package protocols

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/recording"
)

// A Protocol serves client connections of one kind. It holds no connection state.
type Protocol interface {
	Name() string
	// Serve runs one client connection until the client leaves, the session is
	// cut or ctx ends. Everything it started has ended when it returns; it
	// closes both legs.
	Serve(ctx context.Context, s *Session) error
}

// Env is what sessions need of the node they run in. Its functions are safe
// for concurrent use.
type Env struct {
	// Authenticate says who presents cred. An error is an *AuthError, already
	// recorded by the node.
	Authenticate func(ctx context.Context, cred *Credential) (*policy.Subject, error)
	// Open judges whether subject may connect to what it wants, begins the
	// recording and registers the session (from then on it can be revoked). An
	// error is a *Refusal, already recorded. The caller must call Access.Close.
	Open func(ctx context.Context, s *Session, subject *policy.Subject, want Want) (*Access, error)
	// Decide judges a request at the newest policy. The returned index is the
	// Raft index of that policy.
	Decide func(req *policy.Request) (policy.Decision, uint64)
	// PolicyIndex is the index Decide would use now. Decisions cached by a
	// caller are good only while it stays the same.
	PolicyIndex func() uint64
	// Ask proposes an approval request through the cluster and returns when it
	// is committed.
	Ask func(ctx context.Context, h *Hold) (Ticket, error)
	Now func() time.Time
	Log *slog.Logger
}

// Credential is what a client presented. Token is secret: it must reach no log
// and no record.
type Credential struct {
	Protocol string
	Login    string // the login name, which names the target: "prod-db" or "prod-db.profile"
	Token    string
	Client   net.Addr
}

// AuthError is a refused login. Code distinguishes the causes.
type AuthError struct {
	Code   string // no-token, malformed-token, unsigned-token, unknown-issuer, bad-signature, wrong-audience, expired, not-yet-valid, missing-tenant, wrong-tenant, issuer-unavailable, revoked
	Reason string // for the client: what is wrong and what to do; never the token
}

func (e *AuthError) Error() string { return e.Reason }

// Want is what a session asks to be connected to.
type Want struct {
	Protocol, Target, Profile, Database string
	ApplicationName                     string
}

// Refusal is a "no" that the client is told.
type Refusal struct {
	Rule   string // id of the rule, or the gateway's own: "unparsable", "masking", "limits", "revoked", "no-record" …
	Reason string // a sentence that says why and what to do
	Code   string // optional hint for the codec, such as a SQLSTATE; "" lets the codec choose
}

func (e *Refusal) Error() string { return "refused by " + e.Rule + ": " + e.Reason }

// Access is leave to connect, with all that the session needs for it.
type Access struct {
	SessionID string
	Subject   *policy.Subject
	Target    string
	Profile   string
	Database  string
	Client    string // IP address
	Index     uint64 // policy index it was granted at
	Record    Recorder
	Fence     Fence
	// Sensitive are the columns of this database declared sensitive.
	Sensitive []policy.Resource
	// Deadline is when the session must end at the latest.
	Deadline time.Time
	// Credential issues the just-in-time credential and dials the target. It
	// may be called once.
	Credential func(ctx context.Context) (Lease, error)
	// OnCut registers what the node calls when it cuts the session: reset both
	// legs so that blocked reads and writes return at once. Called at most
	// once per cut, after Fence.Check has begun to fail. It returns when both are,
	// and what ran at the target has ended, or some seconds later.
	OnCut func(reset func())
	// OnFreeze, if not nil, registers what the node calls when the session is
	// to stop: writes that wait for their peer return to Fence.Enter.
	OnFreeze func(interrupt func())
	// Mark, if not 0, is set on both sockets of the session, so that the
	// kernel stops what they send when the node may not.
	Mark uint32
	// Close ends the registration and completes the recording; Serve's last act.
	Close func(end recording.Ending)
	// Forwarded counts for `sessions list`.
	Stats *Stats
}

// Lease is a just-in-time credential with a connection to use it on. The
// caller of the gateway never sees any of it.
type Lease interface {
	// Dial opens a connection to the target, not yet logged in.
	Dial(ctx context.Context) (net.Conn, error)
	// User and Password of the just-in-time account; Database to log in to.
	User() string
	Password() string
	// Role is the mapped group role that will own what the session creates.
	Role() string
	// TLS is how to secure the target's connection; nil only where the
	// target's configuration says tls.mode: disable (allowed with --dev only).
	TLS() *tls.Config
	// LoggedIn takes the account's LOGIN and password away. It must succeed
	// before anything else is sent on the connection. backend is the target's
	// id of the connection (PostgreSQL: the process id), used to stop it.
	LoggedIn(ctx context.Context, backend uint32) error
	// Cancel stops what the connection is running now, leaving it open.
	Cancel(ctx context.Context) error
	// Terminate ends the connection from the target's side, and what runs on it,
	// and waits until it is gone. It may be called at any time, from any goroutine.
	Terminate(ctx context.Context) error
	// Release hands over what the account owns and drops it. The connection
	// must be closed before. Safe to call more than once.
	Release(ctx context.Context) error
}

// Recorder is the part of a recording that enforcement uses.
type Recorder interface {
	// Append returns when the entry is in the kernel's hands.
	Append(e *recording.Entry) (recording.LSN, error)
	// Buffer takes an entry that need not be in the kernel's hands yet
	// (responses); the next Append or Flush writes it first. Bounded: it
	// flushes by itself when its buffer is full.
	Buffer(e *recording.Entry) error
	Flush() error
	// Sync returns when everything up to lsn is on disk.
	Sync(ctx context.Context, lsn recording.LSN) error
}

// Fence says whether a session may pass bytes: yes, not now (it is frozen), or
// never again.
type Fence interface {
	// Check returns nil, or the *Refusal that says why the session must stop. It
	// does not wait, and says nothing of a freeze.
	Check() error
	// Enter is called right before every write in either direction. It returns
	// nil when the write may begin, which Leave must follow; it waits while the
	// session is frozen, and returns the *Refusal when it must stop, net.ErrClosed
	// when gone is closed.
	Enter(gone <-chan struct{}) error
	// Holds says whether the node may pass bytes of this session at all, were it
	// not revoked: last words are said only then.
	Holds() bool
	// Leave is called right after a write that Enter let begin, with the bytes
	// that it wrote: the fence looks again, and takes note of a write that may
	// have gone out after it was to stop.
	Leave(bytes int)
	// Wrote is Leave for bytes that were written without Enter: last words.
	Wrote(bytes int)
}

// Hold is an operation that waits for approval.
type Hold struct {
	Access   *Access
	Approval *policy.Approval
	Digest   [32]byte          // over everything that decides what will run
	Text     []byte            // what will run, for the approver; at most 64 KiB
	Detail   map[string]string // role, database, settings, actions, parameters
	Index    uint64
}

// Ticket is a committed approval request.
type Ticket interface {
	ID() string
	// HowTo is the line that tells how to approve.
	HowTo() string
	// Wait returns when the request was decided or has expired. A nil error
	// means approved by approvers this node has verified itself.
	Wait(ctx context.Context) (approvers []string, err error)
	// Use consumes the approval; it succeeds once in the whole cluster.
	Use(ctx context.Context) error
	// Cancel withdraws the request.
	Cancel(ctx context.Context, reason string) error
}

// Stats are counters of a live session, for display only.
type Stats struct {
	Admitted, Refused, Held, Rows, BytesOut, BytesIn atomic.Uint64
}

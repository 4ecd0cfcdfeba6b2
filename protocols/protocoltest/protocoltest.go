// Package protocoltest is a node for tests of protocols: an Env with a policy
// that is a function, a recorder in memory, approvals that the test decides
// and a lease with a plain role. It watches, at every write to the target,
// that what is written was recorded first.
package protocoltest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/recording"
)

// Target is where a Node's sessions go.
type Target struct {
	Addr           string
	User, Password string
	TLS            *tls.Config
	Role           string
	// Cancel and Terminate act on a backend from the target's side.
	Cancel, Terminate func(ctx context.Context, backend uint32) error
	// Wrap, when set, wraps the connection to the target.
	Wrap func(net.Conn) net.Conn
}

// Node is one node of a cluster, as far as protocols see it.
type Node struct {
	t      testing.TB
	target Target
	index  atomic.Uint64

	// Addr is where it listens; CAFile holds its certificate's authority.
	Addr   string
	CAFile string
	TLS    *tls.Config // server side
	Roots  *x509.CertPool

	// Asked receives every approval request.
	Asked chan *Ticket

	mu        sync.Mutex
	policy    func(*policy.Request) policy.Decision
	sensitive []policy.Resource
	deadline  time.Time
	expires   time.Time
	open      func(protocols.Want) error
	wrap      func(net.Conn) net.Conn
	secured   bool
	sessions  []*Session
	serving   sync.WaitGroup
	errs      []error
}

// Session is a session as the node sees it.
type Session struct {
	Want   protocols.Want
	Access *protocols.Access
	Record *Record
	Lease  *Lease
	Ended  chan recording.Ending

	fence     atomic.Pointer[protocols.Refusal]
	frozen    atomic.Pointer[chan struct{}]
	cut       atomic.Pointer[func()]
	interrupt atomic.Pointer[func()]
	passed    atomic.Int64
}

// New returns a node in front of target, with everything permitted.
func New(t testing.TB, target Target) *Node {
	n := &Node{t: t, target: target, Asked: make(chan *Ticket, 16), expires: time.Now().Add(time.Hour)}
	n.index.Store(1)
	n.policy = func(*policy.Request) policy.Decision {
		return policy.Decision{Effect: policy.Permit, Rule: "permit-all"}
	}
	n.certificate()
	return n
}

// Decide sets the policy, as a new one: its index grows.
func (n *Node) Decide(f func(*policy.Request) policy.Decision) {
	n.mu.Lock()
	n.policy = f
	n.mu.Unlock()
	n.index.Add(1)
}

// Sensitive declares columns sensitive.
func (n *Node) Sensitive(columns ...policy.Resource) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sensitive = columns
}

// Declared are the columns declared sensitive.
func (n *Node) Declared() []policy.Resource {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sensitive
}

// Deadline limits sessions opened from now on.
func (n *Node) Deadline(at time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.deadline = at
}

// WrapClient wraps the client's connections from now on.
func (n *Node) WrapClient(wrap func(net.Conn) net.Conn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.wrap = wrap
}

// Secured makes clients' connections count as secured by the listener, so that
// tests can see and cut the protocol's own bytes.
func (n *Node) Secured() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.secured = true
}

// WrapTarget wraps the connections to the target from now on.
func (n *Node) WrapTarget(wrap func(net.Conn) net.Conn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.target.Wrap = wrap
}

// OnOpen is asked before a session is opened.
func (n *Node) OnOpen(f func(protocols.Want) error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.open = f
}

// Env is what the node gives to sessions. The token "good" is a valid one.
func (n *Node) Env() *protocols.Env {
	return &protocols.Env{
		Authenticate: func(_ context.Context, cred *protocols.Credential) (*policy.Subject, error) {
			if cred.Token != "good" {
				return nil, &protocols.AuthError{Code: "bad-signature", Reason: "the token's signature is wrong"}
			}
			return &policy.Subject{Kind: policy.Workload, Provider: "ci", Name: "job", ExpiresAt: n.expires}, nil
		},
		Open: n.openSession,
		Decide: func(req *policy.Request) (policy.Decision, uint64) {
			n.mu.Lock()
			f := n.policy
			n.mu.Unlock()
			return f(req), n.index.Load()
		},
		PolicyIndex: n.index.Load,
		Ask:         n.ask,
		Now:         time.Now,
		Log:         slog.New(slog.DiscardHandler),
	}
}

func (n *Node) openSession(_ context.Context, _ *protocols.Session, subject *policy.Subject, want protocols.Want) (*protocols.Access, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.open != nil {
		if err := n.open(want); err != nil {
			return nil, err
		}
	}
	s := &Session{Want: want, Record: &Record{}, Ended: make(chan recording.Ending, 1)}
	s.Lease = &Lease{target: n.target, record: s.Record, fail: n.t.Errorf}
	s.Access = &protocols.Access{
		SessionID: fmt.Sprintf("session-%d", len(n.sessions)+1), Subject: subject, Target: want.Target, Profile: want.Profile,
		Database: want.Database, Client: "127.0.0.1", Index: n.index.Load(), Record: s.Record, Fence: s,
		Sensitive: n.sensitive, Deadline: n.deadline, Stats: &protocols.Stats{},
		Credential: func(context.Context) (protocols.Lease, error) { return s.Lease, nil },
		OnCut:      func(reset func()) { s.cut.Store(&reset) },
		OnFreeze:   func(interrupt func()) { s.interrupt.Store(&interrupt) },
		Close:      func(e recording.Ending) { s.Ended <- e },
	}
	n.sessions = append(n.sessions, s)
	return s.Access, nil
}

// Check implements protocols.Fence.
func (s *Session) Check() error {
	if r := s.fence.Load(); r != nil {
		return r
	}
	return nil
}

// Enter implements protocols.Fence.
func (s *Session) Enter(gone <-chan struct{}) error {
	for {
		if err := s.Check(); err != nil {
			return err
		}
		frozen := s.frozen.Load()
		if frozen == nil {
			return nil
		}
		select {
		case <-*frozen:
		case <-gone:
			return net.ErrClosed
		}
	}
}

// Holds implements protocols.Fence.
func (s *Session) Holds() bool { return true }

// Leave implements protocols.Fence.
func (s *Session) Leave(bytes int) { s.passed.Add(int64(bytes)) }

// Wrote implements protocols.Fence.
func (s *Session) Wrote(bytes int) { s.passed.Add(int64(bytes)) }

// Passed is how many bytes have gone through the fence, both ways together.
func (s *Session) Passed() int64 { return s.passed.Load() }

// Freeze stops the session until thaw is called.
func (s *Session) Freeze() (thaw func()) {
	ch := make(chan struct{})
	s.frozen.Store(&ch)
	if i := s.interrupt.Load(); i != nil {
		(*i)()
	}
	return func() {
		s.frozen.Store(nil)
		close(ch)
	}
}

// Revoke cuts the session as a node does.
func (s *Session) Revoke(reason string) {
	s.fence.Store(&protocols.Refusal{Rule: "revoked", Reason: reason})
	if cut := s.cut.Load(); cut != nil {
		(*cut)()
	}
}

// Fence makes Check fail without cutting.
func (s *Session) Fence(reason string) {
	s.fence.Store(&protocols.Refusal{Rule: "revoked", Reason: reason})
}

// Sessions are those opened so far.
func (n *Node) Sessions() []*Session {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]*Session(nil), n.sessions...)
}

// Last is the youngest session.
func (n *Node) Last() *Session {
	n.t.Helper()
	s := n.Sessions()
	if len(s) == 0 {
		n.t.Fatal("no session was opened")
	}
	return s[len(s)-1]
}

// Serve listens on loopback and serves clients by p until the test ends. All
// sessions have ended when the test's cleanup is through.
func (n *Node) Serve(p protocols.Protocol) {
	n.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	n.Addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	n.serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.mu.Lock()
			if n.wrap != nil {
				c = n.wrap(c)
			}
			c = protocols.NewGate(c)
			secured := n.secured
			n.mu.Unlock()
			n.serving.Go(func() {
				err := p.Serve(ctx, &protocols.Session{Client: c, Secured: secured, Env: n.Env()})
				n.mu.Lock()
				n.errs = append(n.errs, err)
				if err != nil {
					n.t.Logf("Serve: %v", err)
				}
				n.mu.Unlock()
			})
		}
	})
	n.t.Cleanup(func() {
		l.Close()
		cancel()
		n.serving.Wait()
	})
}

// Errors are what Serve returned for the connections that ended.
func (n *Node) Errors() []error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]error(nil), n.errs...)
}

func (n *Node) certificate() {
	n.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		n.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test node"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		n.t.Fatal(err)
	}
	n.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13}
	cert, _ := x509.ParseCertificate(der)
	n.Roots = x509.NewCertPool()
	n.Roots.AddCert(cert)
	n.CAFile = filepath.Join(n.t.TempDir(), "ca.pem")
	if err := os.WriteFile(n.CAFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// Record is a recorder in memory. What is buffered is not in the kernel's
// hands until Append or Flush.
type Record struct {
	mu            sync.Mutex
	entries       []recording.Entry
	flushed       int
	synced        recording.LSN
	failing       error
	quiet         bool // keep no responses
	ResponseBytes atomic.Int64
}

var _ protocols.Recorder = (*Record)(nil)

// Append implements protocols.Recorder.
func (r *Record) Append(e *recording.Entry) (recording.LSN, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.add(e); err != nil {
		return 0, err
	}
	r.flushed = len(r.entries)
	return recording.LSN(len(r.entries)), nil
}

// Buffer implements protocols.Recorder.
func (r *Record) Buffer(e *recording.Entry) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.add(e)
}

func (r *Record) add(e *recording.Entry) error {
	if r.failing != nil {
		return r.failing
	}
	if e.Type == recording.Response {
		r.ResponseBytes.Add(int64(len(e.Data)))
		if r.quiet {
			return nil
		}
	}
	c := *e
	c.Text = append([]byte(nil), e.Text...)
	c.Data = append([]byte(nil), e.Data...)
	c.At = time.Now()
	c.LSN = recording.LSN(len(r.entries) + 1)
	r.entries = append(r.entries, c)
	return nil
}

// Flush implements protocols.Recorder.
func (r *Record) Flush() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flushed = len(r.entries)
	return r.failing
}

// Sync implements protocols.Recorder.
func (r *Record) Sync(_ context.Context, lsn recording.LSN) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.synced = max(r.synced, lsn)
	return r.failing
}

// Synced is up to where Sync was called for.
func (r *Record) Synced() recording.LSN {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.synced
}

// Fail makes the recorder fail from now on.
func (r *Record) Fail() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failing = errors.New("disk full")
}

// Quiet makes the recorder drop responses, for results of gigabytes.
func (r *Record) Quiet() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.quiet = true
}

// Entries are all entries so far, those of the given types only if any are given.
func (r *Record) Entries(types ...recording.EntryType) []recording.Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []recording.Entry
	for _, e := range r.entries {
		keep := len(types) == 0
		for _, t := range types {
			keep = keep || e.Type == t
		}
		if keep {
			out = append(out, e)
		}
	}
	return out
}

// unrecorded says that a command or decision is not in the kernel's hands.
func (r *Record) unrecorded() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.entries[r.flushed:] {
		if e.Type == recording.Command || e.Type == recording.Decided || e.Type == recording.Approval {
			return true
		}
	}
	return false
}

// Lease is a plain role of the target.
type Lease struct {
	target  Target
	record  *Record
	fail    func(string, ...any)
	backend atomic.Uint32

	mu                                       sync.Mutex
	LoggedIns, Cancels, Terminates, Releases int
}

var _ protocols.Lease = (*Lease)(nil)

func (l *Lease) Dial(ctx context.Context) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", l.target.Addr)
	if err != nil {
		return nil, err
	}
	c = &watched{Conn: c, lease: l}
	if l.target.Wrap != nil {
		c = l.target.Wrap(c)
	}
	return c, nil
}

// watched checks the first guarantee at every write.
type watched struct {
	net.Conn
	lease *Lease
}

func (w *watched) NetConn() net.Conn { return w.Conn }

func (w *watched) Write(b []byte) (int, error) {
	if w.lease.record.unrecorded() {
		w.lease.fail("bytes went to the target before their record was in the kernel's hands")
	}
	return w.Conn.Write(b)
}

func (l *Lease) User() string     { return l.target.User }
func (l *Lease) Password() string { return l.target.Password }
func (l *Lease) Role() string     { return l.target.Role }
func (l *Lease) TLS() *tls.Config { return l.target.TLS }

func (l *Lease) count(n *int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	*n++
}

// Counts says how often each was called.
func (l *Lease) Counts() (loggedIn, cancel, terminate, release int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.LoggedIns, l.Cancels, l.Terminates, l.Releases
}

func (l *Lease) LoggedIn(_ context.Context, backend uint32) error {
	l.backend.Store(backend)
	l.count(&l.LoggedIns)
	return nil
}

func (l *Lease) Cancel(ctx context.Context) error {
	l.count(&l.Cancels)
	if l.target.Cancel == nil {
		return nil
	}
	return l.target.Cancel(ctx, l.backend.Load())
}

func (l *Lease) Terminate(ctx context.Context) error {
	l.count(&l.Terminates)
	if l.target.Terminate == nil {
		return nil
	}
	return l.target.Terminate(ctx, l.backend.Load())
}

func (l *Lease) Release(context.Context) error {
	l.count(&l.Releases)
	return nil
}

// Ticket is an approval request that the test decides.
type Ticket struct {
	Hold *protocols.Hold

	id       string
	decided  chan error
	mu       sync.Mutex
	used     bool
	withdrew string
}

func (n *Node) ask(_ context.Context, h *protocols.Hold) (protocols.Ticket, error) {
	t := &Ticket{Hold: h, id: fmt.Sprintf("request-%d", time.Now().UnixNano()), decided: make(chan error, 1)}
	n.Asked <- t
	return t, nil
}

// Approve grants the request.
func (t *Ticket) Approve() { t.decided <- nil }

// Deny refuses it.
func (t *Ticket) Deny(reason string) {
	t.decided <- &protocols.Refusal{Rule: "approval", Reason: "denied: " + reason}
}

// Withdrawn is the reason it was withdrawn for, "" if it was not.
func (t *Ticket) Withdrawn() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.withdrew
}

// Used says whether the approval was used.
func (t *Ticket) Used() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.used
}

func (t *Ticket) ID() string    { return t.id }
func (t *Ticket) HowTo() string { return "waiting for approval: sallyport approvals approve " + t.id }

func (t *Ticket) Wait(ctx context.Context) ([]string, error) {
	select {
	case err := <-t.decided:
		if err != nil {
			return nil, err
		}
		return []string{"people/alice"}, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (t *Ticket) Use(context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.used {
		return errors.New("used already")
	}
	t.used = true
	return nil
}

func (t *Ticket) Cancel(_ context.Context, reason string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.withdrew = reason
	return nil
}

// Package postgres speaks PostgreSQL's frontend/backend protocol, version 3.0,
// to clients and to targets: it logs clients in by their token, logs in to the
// target with the just-in-time account, and is the codec of protocols.Relay:
// it measures messages, finds out by package sql what statements do, masks what
// the analysis names, and words refusals. It decides nothing.
//
// DESIGN.md of package protocols says how the two halves keep in step with the
// target.
package postgres

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/mask"
	"github.com/sallyport/sallyport/protocols/postgres/sql"
	"github.com/sallyport/sallyport/recording"
)

// Name is the protocol's name in policy, records and configuration.
const Name = "postgres"

// Config is what the protocol needs of its node. All functions are safe for
// concurrent use.
type Config struct {
	// TLS is the server side for clients that begin with SSLRequest. Required.
	TLS *tls.Config
	// Catalog returns the catalogue of a target's database; refresh asks for
	// one loaded now. It is called often, so without refresh it should be
	// answered from memory. Required.
	Catalog func(ctx context.Context, target, database string, refresh bool) (*sql.Catalog, error)
	// SearchPath is the search_path that sessions on a target are held at.
	// Default: "public".
	SearchPath func(target string) []string
	// MaskKind is how a column is masked. Default: mask.Redact.
	MaskKind func(column policy.Resource) mask.Kind
	// HashKey returns the key of mask.Hash; asked by each session once.
	// Default: random, so that hashes mean nothing
	// beyond this process.
	HashKey func() []byte
	// ConnectTimeout bounds obtaining a credential and logging in to a target.
	// Default: 30 s.
	ConnectTimeout time.Duration
	// Alarm is told when the target's description of a result contradicts the
	// analysis. Default: nothing; the log and the record are told anyway.
	Alarm func(a *protocols.Access, reason string)
}

// Protocol serves PostgreSQL clients.
type Protocol struct {
	cfg     Config
	cancels cancels
}

var _ protocols.Protocol = (*Protocol)(nil)

// New returns a Protocol. It starts nothing.
func New(cfg Config) *Protocol {
	if cfg.SearchPath == nil {
		cfg.SearchPath = func(string) []string { return []string{"public"} }
	}
	if cfg.MaskKind == nil {
		cfg.MaskKind = func(policy.Resource) mask.Kind { return mask.Redact }
	}
	if cfg.HashKey == nil {
		key := make([]byte, 32)
		rand.Read(key)
		cfg.HashKey = func() []byte { return key }
	}
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 30 * time.Second
	}
	return &Protocol{cfg: cfg}
}

// Name implements protocols.Protocol.
func (p *Protocol) Name() string { return Name }

// Serve implements protocols.Protocol. Its error is for the log; the client was
// told what it may know.
func (p *Protocol) Serve(ctx context.Context, s *protocols.Session) error {
	s.Protocol = Name
	s.LastWords = func(why *protocols.Refusal) []byte {
		code := why.Code
		if code == "" {
			code = "57P01" // admin_shutdown
		}
		return report(nil, 'E', sevFatal, code, "terminating connection: "+why.Reason, "", "rule: "+why.Rule)
	}
	conn := s.Client // greet puts TLS over it
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	h, token, err := p.greet(ctx, s)
	stop()
	if err != nil {
		defer s.Client.Close()
		switch {
		case errors.Is(err, errHandled), errors.Is(err, io.EOF):
			return nil
		}
		return p.reject(s, err)
	}
	subject, err := s.Env.Authenticate(ctx, &protocols.Credential{Protocol: Name, Login: h.user, Token: token, Client: s.Client.RemoteAddr()})
	if err != nil {
		defer s.Client.Close()
		return p.reject(s, err)
	}
	a, err := s.Env.Open(ctx, s, subject, protocols.Want{Protocol: Name, Target: h.target, Profile: h.profile, Database: h.database, ApplicationName: h.application})
	if err != nil {
		defer s.Client.Close()
		return p.reject(s, err)
	}
	return p.run(ctx, s, a, h)
}

// run serves a session from the moment that it is registered.
func (p *Protocol) run(ctx context.Context, s *protocols.Session, a *protocols.Access, h *hello) (err error) {
	c := newConversation(a)
	end := recording.Ending{Reason: "closed"}
	s.Begin(a)
	defer func() {
		c.mu.Lock()
		busy := c.n > 0
		c.mu.Unlock()
		if err != nil {
			end.Reason, end.Detail = "error", err.Error()
			var r *protocols.Refusal
			if errors.As(err, &r) {
				end.Detail = r.Reason
				switch {
				case r.Rule == "revoked" || strings.HasPrefix(r.Rule, "revocation/"):
					end.Reason = "revoked"
				case r.Rule == "shutdown" || r.Rule == "session-limit":
					end.Reason = r.Rule
				}
			}
		}
		end.At = s.Env.Now()
		s.End(end, busy || err != nil)
	}()
	defer context.AfterFunc(ctx, func() {
		s.Cut(&protocols.Refusal{Rule: "shutdown", Reason: "this node is stopping: connect again", Code: "57P01"})
	})()
	if !a.Deadline.IsZero() {
		timer := time.AfterFunc(a.Deadline.Sub(s.Env.Now()), func() {
			s.Cut(&protocols.Refusal{Rule: "session-limit", Reason: "the session has reached its time limit: log in again"})
		})
		defer timer.Stop()
	}

	searchPath := p.cfg.SearchPath(a.Target)
	role := ""
	connectCtx, cancel := context.WithTimeout(ctx, p.cfg.ConnectTimeout)
	err = s.Connect(connectCtx, func(ctx context.Context, l protocols.Login) (up protocols.Upstream, err error) {
		role = l.Role
		up, c.settings, err = p.login(ctx, l, h, searchPath)
		return up, err
	})
	cancel()
	if err != nil {
		return p.unreachable(s, a, err)
	}
	ch := s.Channel()
	c.ch, c.masker = ch, mask.NewMasker(p.cfg.HashKey())
	q := &requests{conversation: c, p: p, s: s, role: role, searchPath: searchPath, analyses: map[string]*analysis{}, set: map[string]string{}}
	if err := q.look(ctx, false); err != nil {
		return p.reject(s, err)
	}
	pid, key, err := p.cancels.add(func(ctx context.Context) {
		if ch.CancelHold() {
			return
		}
		if err := s.CancelTarget(ctx); err != nil {
			s.Env.Log.Warn("cancel did not reach the target", "session", a.SessionID, "err", err)
		}
	})
	if err != nil {
		return p.reject(s, &protocols.Refusal{Rule: "limits", Reason: err.Error(), Code: "53300"})
	}
	defer p.cancels.remove(pid)
	if _, err := s.Client.Write(welcome(c.settings, pid, key)); err != nil {
		return err
	}
	resp := &responses{conversation: c, p: p}
	err = ch.Relay(ctx, q, resp, goodbye)
	if errors.Is(err, protocols.ErrTargetClosed) && !resp.fatal {
		return p.reject(s, &protocols.Refusal{Rule: "target", Reason: "the target closed the connection", Code: "08006"})
	}
	if err == nil && resp.fatal {
		err = protocols.ErrTargetClosed // the client read why, and left
	}
	return err
}

// welcome is what a client waits for after its password.
func welcome(settings map[string]string, pid uint32, key [4]byte) []byte {
	b := message(nil, 'R', "\x00\x00\x00\x00")
	for _, s := range sortedPairs(settings) {
		b = message(b, 'S', s, "\x00")
	}
	b = message(b, 'K', string(appendUint32(nil, pid)), string(key[:]))
	return message(b, 'Z', "I")
}

// reject tells a client that has no session why, and returns err. What is not
// worded for clients stays in the log.
func (p *Protocol) reject(s *protocols.Session, err error) error {
	why := &protocols.Refusal{}
	var auth *protocols.AuthError
	switch {
	case errors.As(err, &auth):
		why = &protocols.Refusal{Rule: auth.Code, Reason: "login refused (" + auth.Code + "): " + auth.Reason, Code: "28000"}
	case errors.As(err, &why):
	default:
		return err
	}
	s.Client.SetWriteDeadline(time.Now().Add(time.Second))
	code := why.Code
	if code == "" {
		code = "28000"
	}
	s.Client.Write(report(nil, 'E', sevFatal, code, "sallyport: "+why.Reason, "", "rule: "+why.Rule))
	return err
}

// unreachable tells a client that its target is not to be had. Which account
// was tried, and what the target said to it, is not the client's business.
func (p *Protocol) unreachable(s *protocols.Session, a *protocols.Access, err error) error {
	if cut := s.Err(); cut != nil {
		return cut
	}
	var r *protocols.Refusal
	if errors.As(err, &r) {
		return p.reject(s, err)
	}
	s.Env.Log.Error("no connection to the target", "session", a.SessionID, "target", a.Target, "err", err)
	p.reject(s, &protocols.Refusal{Rule: "target", Reason: fmt.Sprintf("no connection to target %q could be made; the node's log says why (session %s)", a.Target, a.SessionID), Code: "08001"})
	return err
}

func (p *Protocol) alarmed(a *protocols.Access, reason string) {
	if p.cfg.Alarm != nil {
		p.cfg.Alarm(a, reason)
	}
}

package node

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/approval"
	"github.com/sallyport/sallyport/node/bundle"
	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/session"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/recording"
)

// newEnv is what protocols see of the node.
func (n *Node) newEnv() *protocols.Env {
	return &protocols.Env{
		Authenticate: n.authenticate,
		Open:         n.open,
		Decide:       n.decide,
		PolicyIndex:  func() uint64 { return n.state.View().ConfigIndex },
		Ask:          n.ask,
		Now:          time.Now,
		Log:          n.log,
	}
}

// decide judges at the newest configuration. Whoever holds the bootstrap
// certificate may call the API even when no rule says so, or no configuration
// has been applied yet; a forbid stands against them like against anybody.
//
// Revocations come first: whoever is refused by one is refused from the moment
// that this node has folded it, before its sessions are cut.
func (n *Node) decide(req *policy.Request) (policy.Decision, uint64) {
	v := n.state.View()
	b := state.BearerOf(req.Subject).At(n.cfg.Name, targetOf(req.Pairs))
	if r := n.fences.refuses(&b); r != nil { // in force, and not in the view yet
		return policy.Decision{Rule: r.Rule, Reason: r.Reason}, v.ConfigIndex
	}
	return decideAt(v, n.cfg.Name, req), v.ConfigIndex
}

// decideAt is what a node decides by a view.
func decideAt(v *state.View, node string, req *policy.Request) policy.Decision {
	var d policy.Decision
	b := state.BearerOf(req.Subject).At(node, targetOf(req.Pairs))
	if rev := v.Refuses(&b); rev != nil {
		return policy.Decision{Rule: "revocation/" + rev.ID, Reason: rev.Why()}
	}
	if v.Config != nil {
		d = v.Config.Policies.Decide(req)
	} else {
		d = policy.Decision{Rule: "default-deny", Reason: "no configuration has been applied: an administrator runs `sallyport apply`"}
		if v.ConfigErr != nil {
			d.Reason = "this node cannot read the applied configuration, so it refuses everything"
		}
	}
	if d.Effect == policy.Refuse && d.Rule == "default-deny" && req.Subject.Provider == policy.BootstrapProvider && allAPI(req.Pairs) {
		return policy.Decision{Effect: policy.Permit, Rule: "bootstrap-administrator"}
	}
	return d
}

// targetOf is the target that pairs are about; of one statement's there is one.
func targetOf(pairs []policy.Pair) string {
	for _, p := range pairs {
		if p.Resource.Type != policy.Cluster && len(p.Resource.Path) > 0 {
			return p.Resource.Path[0]
		}
	}
	return ""
}

// bearer is whom a session stands for.
func bearer(i session.Info) *state.Bearer {
	return &state.Bearer{
		Subject: i.Subject, TokenID: i.TokenID, Groups: i.Groups, Claims: i.Claims, IssuedAt: i.Issued,
		Session: i.ID, Target: i.Target, Node: i.Node,
	}
}

func allAPI(pairs []policy.Pair) bool {
	for _, p := range pairs {
		switch p.Action {
		case policy.AdminApply, policy.AdminCluster, policy.Revoke, policy.RecordingsRead, policy.SessionsRead, policy.SessionsWatch, policy.EventsRead, policy.ApprovalsRead, policy.StatusRead, policy.StateRead, policy.PolicyExplain:
		default:
			return false
		}
	}
	return len(pairs) > 0
}

// tokenKeep holds the token of a caller between login and the end of its
// session: an approval request is made with the caller's own token. Tokens are
// in memory only. Its size is bounded by the node's connections.
type tokenKeep struct {
	mu sync.Mutex
	m  map[*policy.Subject]vault.Secret
}

func (k *tokenKeep) put(s *policy.Subject, token string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.m == nil {
		k.m = map[*policy.Subject]vault.Secret{}
	}
	k.m[s] = vault.NewSecret(token)
}

func (k *tokenKeep) get(s *policy.Subject) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.m[s].Reveal()
}

func (k *tokenKeep) drop(s *policy.Subject) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.m, s)
}

// authenticate says who presents a token at a login, and records a refusal.
func (n *Node) authenticate(ctx context.Context, cred *protocols.Credential) (*policy.Subject, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	subject, err := n.verifier.Verify(ctx, cred.Token)
	if err == nil {
		b := state.BearerOf(subject).At(n.cfg.Name, "")
		if r := n.refused(&b); r != nil {
			err = &protocols.AuthError{Code: "revoked", Reason: r.Reason}
		}
	}
	if err != nil {
		var ae *protocols.AuthError
		if !errors.As(err, &ae) {
			ae = &protocols.AuthError{Code: "internal", Reason: "the token could not be checked"}
			n.log.Error("verifying a token", "err", err)
		}
		e := &recording.Entry{Type: recording.Decided, Verb: "login", Effect: "refuse", Rule: ae.Code, Reason: ae.Reason,
			Detail: map[string]string{"protocol": cred.Protocol, "login": cred.Login, "client": hostOf(cred.Client)}}
		if subject != nil {
			e.Actor = subject.ID()
		}
		n.audit.refusal(e)
		return nil, ae
	}
	n.tokens.put(subject, cred.Token)
	return subject, nil
}

func hostOf(a net.Addr) string {
	if a == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	return host
}

// newSessionID is 80 random bits: ids name recordings and must not be guessed
// or met twice.
func newSessionID() string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b[:]))
}

// open judges whether subject may connect, begins the recording and registers
// the session.
func (n *Node) open(ctx context.Context, s *protocols.Session, subject *policy.Subject, want protocols.Want) (*protocols.Access, error) {
	client := hostOf(s.Client.RemoteAddr())
	v := n.state.View()
	refuse := func(r *protocols.Refusal) (*protocols.Access, error) {
		n.tokens.drop(subject)
		n.audit.refusal(&recording.Entry{Type: recording.Decided, Verb: "connect", Effect: "refuse", Rule: r.Rule, Reason: r.Reason,
			Actor: subject.ID(), PolicyIndex: v.ConfigIndex, Actions: []string{string(policy.Connect) + " " + want.Target + "/" + want.Database},
			Detail: map[string]string{"protocol": want.Protocol, "client": client, "profile": want.Profile, "token_id": subject.TokenID}})
		return nil, r
	}
	target, refusal := n.targetFor(v, want)
	if refusal != nil {
		return refuse(refusal)
	}
	req := &policy.Request{
		Subject: subject,
		Pairs:   []policy.Pair{{Action: policy.Connect, Resource: policy.Resource{Type: policy.Database, Path: []string{want.Target, want.Database}}}},
		Context: policy.Context{Now: time.Now(), Profile: want.Profile, Database: want.Database, ClientAddr: client, Protocol: want.Protocol},
	}
	d, index := n.decide(req)
	if d.Effect != policy.Permit {
		reason := d.Reason
		if d.Effect == policy.Hold {
			reason = "connecting cannot be held for approval; hold the commands instead"
		}
		return refuse(&protocols.Refusal{Rule: d.Rule, Reason: reason, Code: "28000"})
	}
	if _, ok := target.RoleFor(subject.Groups, want.Profile); !ok {
		return refuse(&protocols.Refusal{Rule: "no-role", Code: "28000",
			Reason: fmt.Sprintf("target %s maps none of the groups %v to a role%s", want.Target, subject.Groups, profileNote(want.Profile))})
	}
	if refusal := n.admits(ctx, d.Obligations.Tolerance, subject.ID(), want.Target); refusal != nil {
		return refuse(refusal)
	}
	now := time.Now()
	id := newSessionID()
	deadline := now.Add(target.MaxSession)
	w, err := n.spool.Begin(recording.Header{
		Session: id, Kind: "session", Started: now,
		Subject: subject.ID(), SubjectKind: string(subject.Kind), Issuer: subject.Issuer, Groups: subject.Groups, Claims: subject.Claims, TokenID: subject.TokenID,
		Client: client, Protocol: want.Protocol, Target: want.Target, Profile: want.Profile, Database: want.Database,
		PolicyIndex: index, Protection: "gateway", Labels: map[string]string{"application_name": want.ApplicationName, "rule": d.Rule},
	})
	if err != nil {
		n.log.Error("a recording could not be begun; the session is refused", "err", err)
		return refuse(&protocols.Refusal{Rule: "no-record", Reason: "this node cannot record now, and nothing is forwarded unrecorded: connect to another node or tell its operator", Code: "57P03"})
	}
	info := session.Info{
		ID: id, Node: n.cfg.Name, Subject: subject.ID(), Target: want.Target, Profile: want.Profile, Database: want.Database, Client: client,
		Application: want.ApplicationName, Started: now, Deadline: deadline, PolicyIndex: index,
		Claims: subject.Claims, Groups: subject.Groups, TokenID: subject.TokenID, Issued: subject.IssuedAt,
		Revocation: d.Obligations.Tolerance.String(),
	}
	e := session.NewEntry(info, n.sessionLease(d.Obligations.Tolerance, func() *protocols.Refusal { return n.rejudge(info, subject, req) }))
	closeRecord := func(end recording.Ending) {
		if err := w.Close(end); err != nil {
			n.log.Error("completing a recording", "session", id, "err", err)
		}
	}
	if r := n.sessions.Add(e); r != nil {
		closeRecord(recording.Ending{At: now, Reason: "refused", Detail: r.Reason})
		return refuse(r)
	}
	// Registered: a revocation from now on finds the session. One before it is
	// in the state by now.
	if r := n.refused(bearer(info)); r != nil {
		n.sessions.Done(e)
		closeRecord(recording.Ending{At: now, Reason: "revoked", Detail: r.Reason})
		return refuse(&protocols.Refusal{Rule: "revoked", Reason: r.Reason, Code: "28000"})
	}
	var once sync.Once
	return &protocols.Access{
		SessionID: id, Subject: subject, Target: want.Target, Profile: want.Profile, Database: want.Database, Client: client,
		Index: index, Record: w, Fence: &e.Fence, Deadline: deadline, Stats: &e.Stats,
		Sensitive: sensitive(target, want.Database),
		Credential: func(ctx context.Context) (protocols.Lease, error) {
			l, err := n.targets.issue(ctx, want.Target, subject, id, want.Database, want.Profile, deadline)
			if err != nil {
				return nil, err
			}
			return &backgroundRelease{Lease: l, n: n, id: id}, nil
		},
		OnCut: e.OnCut, OnFreeze: e.OnFreeze, Mark: n.mark(d.Obligations.Tolerance),
		Close: func(end recording.Ending) {
			once.Do(func() {
				if writes, bytes := e.Fence.Violations(); writes > 0 {
					n.log.Warn("writes of a session may have gone out after this node's lease had ended", "session", id, "writes", writes, "bytes", bytes)
					end.Detail = strings.TrimPrefix(fmt.Sprintf("%s; %d write(s) of %d bytes may have gone out after the node's lease had ended", end.Detail, writes, bytes), "; ")
				}
				n.sessions.Done(e)
				n.tokens.drop(subject)
				closeRecord(end)
			})
		},
	}, nil
}

func profileNote(profile string) string {
	if profile == "" {
		return ""
	}
	return fmt.Sprintf(" with profile %q", profile)
}

// targetFor finds what the session wants, or says why it cannot have it. The
// same words for what does not exist and what is not to be seen would tell a
// caller less; whoever gets here has been authenticated, and needs the help.
func (n *Node) targetFor(v *state.View, want protocols.Want) (*bundle.Target, *protocols.Refusal) {
	if v.Config == nil {
		return nil, &protocols.Refusal{Rule: "no-configuration", Reason: "this cluster has no usable configuration: an administrator runs `sallyport apply`", Code: "57P03"}
	}
	t := v.Config.Targets[want.Target]
	switch {
	case t == nil || t.Protocol != want.Protocol:
		return nil, &protocols.Refusal{Rule: "no-target", Reason: fmt.Sprintf("there is no %s target %q: the user name names the target, optionally as target.profile", want.Protocol, want.Target), Code: "28000"}
	case t.Dev && !n.cfg.Dev:
		return nil, &protocols.Refusal{Rule: "no-target", Reason: fmt.Sprintf("target %q is for trials; this node was not started with --dev", want.Target), Code: "28000"}
	case !t.ServedBy(n.cfg.Name):
		return nil, &protocols.Refusal{Rule: "not-served-here", Reason: fmt.Sprintf("target %q is not served by node %s: connect to one of %s", want.Target, n.cfg.Name, strings.Join(t.Nodes, ", ")), Code: "57P03"}
	case !t.Allows(want.Database):
		return nil, &protocols.Refusal{Rule: "no-database", Reason: fmt.Sprintf("database %q is not open on target %q; name one of: %s", want.Database, want.Target, strings.Join(t.Databases, ", ")), Code: "3D000"}
	}
	return t, nil
}

func sensitive(t *bundle.Target, database string) []policy.Resource {
	var out []policy.Resource
	for _, s := range t.Sensitive {
		if s.Database == database {
			out = append(out, policy.Resource{Type: policy.Column, Path: []string{t.Name, s.Database, s.Schema, s.Table, s.Column}})
		}
	}
	return out
}

// backgroundRelease drops the account after the session has ended, so that
// neither a client nor a revocation waits for it.
type backgroundRelease struct {
	protocols.Lease
	n    *Node
	id   string
	once sync.Once
}

func (b *backgroundRelease) Release(context.Context) error {
	b.once.Do(func() {
		b.n.background.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			if err := b.Lease.Release(ctx); err != nil {
				b.n.log.Warn("a session's account was not dropped; the sweeper will", "session", b.id, "err", err)
			}
		})
	})
	return nil
}

// ask brings a held operation to the approvers.
func (n *Node) ask(ctx context.Context, h *protocols.Hold) (protocols.Ticket, error) {
	token := n.tokens.get(h.Access.Subject)
	if token == "" {
		return nil, errors.New("the session's token is gone")
	}
	t, err := n.approvals.Ask(ctx, h, token)
	if e := n.sessions.Get(h.Access.SessionID); err == nil && e != nil {
		t = &waiting{t, e}
	}
	return t, err
}

// waiting shows the session as held while it waits.
type waiting struct {
	protocols.Ticket
	e *session.Entry
}

func (w *waiting) Wait(ctx context.Context) ([]string, error) {
	w.e.Waiting.Add(1)
	defer w.e.Waiting.Add(-1)
	return w.Ticket.Wait(ctx)
}

// propose brings an event of this node to the leader.
func (n *Node) propose(ctx context.Context, typ string, id event.ID, payload any, token string) (uint64, error) {
	data, err := json.Marshal(payload)
	if err != nil {
		return 0, err
	}
	c, err := n.api.Propose(ctx, &api.Proposal{Type: typ, ID: id, Payload: data, Token: token})
	if err != nil {
		return 0, err
	}
	return c.Seq, nil
}

// verifyVote checks an approver's own credential from what the vote holds: a
// token that was valid when the vote was stored, or a signature over exactly
// this approval of exactly this request.
func (n *Node) verifyVote(ctx context.Context, a *state.Approval, vote state.Vote) (*policy.Subject, error) {
	plain, err := n.unseal(approval.ProofName(a.ID, vote.Approver), vote.Proof)
	if err != nil {
		return nil, err
	}
	var p identity.Proof
	if err := json.Unmarshal(plain, &p); err != nil {
		return nil, err
	}
	if p.Kind == identity.Certificate {
		want := fmt.Sprintf("/v1/approvals/%s/approve?digest=%x", a.ID, a.Digest)
		if p.Method != http.MethodPost || p.Path != want {
			return nil, errors.New("the signature is for another call")
		}
	}
	return n.verifyProof(ctx, &p, identity.ProofOptions{At: vote.At})
}

// verifyProof says whose proof p is. Of administrators' certificates only the
// one that the cluster was made with counts, whatever else its CA has signed.
func (n *Node) verifyProof(ctx context.Context, p *identity.Proof, o identity.ProofOptions) (*policy.Subject, error) {
	o.Roots, o.Cluster = pki.Pool(n.ca.Raw), n.cluster
	subject, err := n.verifier.VerifyProof(ctx, p, o)
	if err == nil && p.Kind == identity.Certificate && pki.Fingerprint(p.Cert) != n.state.View().AdminCertFP {
		return nil, &protocols.AuthError{Code: "unknown-issuer", Reason: "this is not the administrator's certificate that the cluster was made with"}
	}
	return subject, err
}

// apiDeps is what the API sees of the node.
func (n *Node) apiDeps() api.Deps {
	return api.Deps{
		Node: n.cfg.Name, Dev: n.cfg.Dev, FeatureLevel: n.featureLevel(), Store: n.store, State: n.state, Sessions: n.sessions, Approvals: n.approvals, Mesh: n.mesh, Recordings: n.recordings, Live: n.spool, EventLog: n.eventLog,
		Authenticate: n.authenticateRequest, Known: n.known, Decide: n.decide, DecideAt: decideAt, Analyze: n.analyze,
		LogoutToken: n.verifier.LogoutToken, SecurityEvent: n.verifier.SecurityEvent,
		VerifyToken: func(ctx context.Context, token string) (*policy.Subject, error) { return n.verifier.Verify(ctx, token) },
		Seal:        n.seal, SealSecret: n.sealSecret, Open: n.unseal, WantSealed: n.wantSealed, SignNode: n.signMember,
		SignRenewal: n.signRenewal, MinRenewal: n.minRenewal(), Rotate: n.rotate, Backup: n.backup,
		Grantor: n.leases.grantor, Lease: n.cfg.Lease, FreezeHere: n.freezeHere, Folded: n.leases.folded.Load,
		Leave: n.leave, Release: n.members.release, Health: n.health, LocalStatus: n.status, Audit: n.audit.call,
		Now: time.Now, Log: n.log,
	}
}

// known looks at a request's credential before its body is there: a token can
// be verified, of a signed request only the certificate.
func (n *Node) known(ctx context.Context, r *http.Request) error {
	p, err := identity.ProofFromRequest(r, nil)
	if err != nil {
		return err
	}
	if p.Kind == identity.Certificate {
		if pki.Fingerprint(p.Cert) != n.state.View().AdminCertFP {
			return &protocols.AuthError{Code: "unknown-issuer", Reason: "this is not the administrator's certificate that the cluster was made with"}
		}
		return nil
	}
	_, err = n.verifyProof(ctx, p, identity.ProofOptions{})
	return err
}

func (n *Node) authenticateRequest(ctx context.Context, r *http.Request, body []byte, relayed bool) (*policy.Subject, []byte, error) {
	p, err := identity.ProofFromRequest(r, body)
	if err != nil {
		return nil, nil, err
	}
	// At the door a signed request is good once. One that a node hands on may
	// come again after a lost answer: its signature covers the idempotency key,
	// so that the log makes it happen once.
	nonces := &n.nonces
	if relayed {
		nonces = nil
	}
	subject, err := n.verifyProof(ctx, p, identity.ProofOptions{Nonces: nonces})
	if err != nil {
		return nil, nil, err
	}
	proof, err := json.Marshal(p)
	return subject, proof, err
}

// freezeFor is how long a node freezes what is to be revoked when there is no
// leader to decide it: as long as a leader's own Freeze.
const freezeFor = 5 * time.Second

// freezeHere stops the sessions that a revocation would end, for a moment.
func (n *Node) freezeHere(id event.ID, sc event.Scope) {
	name := "here/" + id.String()
	n.sessions.Freeze(name, func(i session.Info) bool { return bearer(i).Ends(sc) })
	time.AfterFunc(freezeFor, func() { n.sessions.Thaw(name) })
}

// errRemoved stops a node that is taken out of the cluster.
var errRemoved = errors.New("this node was removed from the cluster")

// leave lets no new session in, those there are go on for drain, ends them, and
// stops the node.
func (n *Node) leave(ctx context.Context, drain time.Duration) {
	dctx, cancel := context.WithTimeout(ctx, drain)
	defer cancel()
	n.sessions.Drain(dctx, &protocols.Refusal{Rule: "shutdown", Reason: "this node leaves the cluster: connect to another node", Code: "57P01"})
	// The answer to the leader must still leave.
	time.AfterFunc(time.Second, func() { n.fail(errRemoved) })
}

// providers are the identity providers of the configuration; those for trials
// only on a node for trials.
func providers(v *state.View, dev bool) []identity.ProviderConfig {
	if v.Config == nil {
		return nil
	}
	var out []identity.ProviderConfig
	for _, p := range v.Config.Providers {
		if dev || !p.Dev {
			out = append(out, p.ProviderConfig)
		}
	}
	slices.SortFunc(out, func(a, b identity.ProviderConfig) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// servePostgres serves one PostgreSQL connection.
func (n *Node) servePostgres(ctx context.Context) func(context.Context, net.Conn, bool, func()) {
	return func(_ context.Context, c net.Conn, direct bool, authenticated func()) {
		env := *n.env
		open := env.Open
		env.Open = func(ctx context.Context, s *protocols.Session, sub *policy.Subject, want protocols.Want) (*protocols.Access, error) {
			a, err := open(ctx, s, sub, want)
			if err == nil {
				authenticated()
			}
			return a, err
		}
		s := &protocols.Session{Client: c, Secured: direct, Protocol: n.postgres.Name(), Env: &env}
		if err := n.postgres.Serve(ctx, s); err != nil {
			n.log.Debug("session ended", "client", c.RemoteAddr(), "err", err)
		}
	}
}

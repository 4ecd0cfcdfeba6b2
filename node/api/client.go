package api

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/raftstore/event"
)

// Client calls the API of a cluster at any of its nodes.
type Client struct {
	servers []string // host:port, tried in order
	http    *http.Client
	token   func() (string, error)
	cert    *x509.Certificate
	key     *ecdsa.PrivateKey
	// position is the newest event of this client's own changes: its reads see
	// it at whichever node they come to.
	position atomic.Uint64
}

// ClientConfig says where the cluster is and who calls. Token or the
// certificate is the credential; join needs neither.
type ClientConfig struct {
	Servers []string
	Roots   *x509.CertPool
	// Verify, when not nil, replaces the check against Roots.
	Verify func(chain []*x509.Certificate) error
	Token  func() (string, error) // read anew for every call
	Cert   *x509.Certificate
	Key    *ecdsa.PrivateKey
}

// NewClient returns a Client; it connects when first used.
func NewClient(cfg ClientConfig) (*Client, error) {
	if len(cfg.Servers) == 0 {
		return nil, errors.New("no server is known: give --server host:port or set SALLYPORT_SERVER")
	}
	tc := &tls.Config{RootCAs: cfg.Roots, MinVersion: tls.VersionTLS13}
	if cfg.Verify != nil {
		tc.InsecureSkipVerify = true // replaced by the check of a pinned authority
		tc.VerifyConnection = func(cs tls.ConnectionState) error { return cfg.Verify(cs.PeerCertificates) }
	}
	return &Client{
		servers: cfg.Servers, token: cfg.Token, cert: cfg.Cert, key: cfg.Key,
		http: &http.Client{
			Transport: &http.Transport{TLSClientConfig: tc, TLSHandshakeTimeout: 10 * time.Second, IdleConnTimeout: 30 * time.Second},
			Timeout:   2 * time.Minute,
		},
	}, nil
}

// Call sends in (nil for none) and decodes the answer into out. A node that
// cannot be reached is passed over for the next; the same Idempotency-Key goes
// with every try, so that a change happens once.
func (c *Client) Call(ctx context.Context, method, path string, in, out any) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return err
		}
	}
	id := event.NewID()
	var errs []error
	for _, server := range c.servers {
		err := c.try(ctx, server, method, path, id, body, out)
		var f *Failure
		if err == nil || (errors.As(err, &f) && f.Status != http.StatusServiceUnavailable && f.Status != http.StatusGatewayTimeout) || ctx.Err() != nil {
			return err
		}
		errs = append(errs, fmt.Errorf("%s: %w", server, err))
	}
	return errors.Join(errs...)
}

func (c *Client) try(ctx context.Context, server, method, path string, id event.ID, body []byte, out any) error {
	u, err := url.Parse("https://" + server + path)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if method != http.MethodGet {
		req.Header.Set("Idempotency-Key", id.String())
	} else if seq := c.position.Load(); seq > 0 {
		req.Header.Set(PositionHeader, strconv.FormatUint(seq, 10))
	}
	switch {
	case c.token != nil:
		tok, err := c.token()
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+tok)
	case c.cert != nil:
		if err := identity.SignRequest(req, body, c.cert.Raw, c.key); err != nil {
			return err
		}
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return err
	}
	defer resp.Body.Close()
	defer func() { _, _ = io.CopyN(io.Discard, resp.Body, 1<<10) }() // keeps the connection
	if seq, err := strconv.ParseUint(resp.Header.Get(PositionHeader), 10, 64); err == nil && method != http.MethodGet {
		for old := c.position.Load(); seq > old && !c.position.CompareAndSwap(old, seq); old = c.position.Load() {
		}
	}
	return readReply(resp, out)
}

// Status is the state of every node.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	return call[Status](ctx, c, http.MethodGet, "/v1/status", nil)
}

// Whoami says who the caller is.
func (c *Client) Whoami(ctx context.Context) (*Whoami, error) {
	return call[Whoami](ctx, c, http.MethodGet, "/v1/whoami", nil)
}

// Sessions lists live sessions of all nodes.
func (c *Client) Sessions(ctx context.Context) (*Sessions, error) {
	return call[Sessions](ctx, c, http.MethodGet, "/v1/sessions", nil)
}

// Events returns those from seq on, waiting up to wait for the first.
func (c *Client) Events(ctx context.Context, from uint64, wait time.Duration) ([]EventInfo, error) {
	q := url.Values{"from": {strconv.FormatUint(from, 10)}, "wait": {wait.String()}}
	v, err := call[[]EventInfo](ctx, c, http.MethodGet, "/v1/events?"+q.Encode(), nil)
	if err != nil {
		return nil, err
	}
	return *v, nil
}

// Event returns one event.
func (c *Client) Event(ctx context.Context, seq uint64) (*EventInfo, error) {
	return call[EventInfo](ctx, c, http.MethodGet, "/v1/events/"+strconv.FormatUint(seq, 10), nil)
}

// StateAt says what the cluster had agreed on at a Raft index or a time (RFC
// 3339), "" for now.
func (c *Client) StateAt(ctx context.Context, at string) (*StateAt, error) {
	return call[StateAt](ctx, c, http.MethodGet, "/v1/state?"+url.Values{"at": {at}}.Encode(), nil)
}

// Explain asks what is or was decided for somebody, and why.
func (c *Client) Explain(ctx context.Context, in *ExplainRequest) (*Explanation, error) {
	return call[Explanation](ctx, c, http.MethodPost, "/v1/policy/explain", in)
}

// Config downloads the applied configuration.
func (c *Client) Config(ctx context.Context) (*ConfigDownload, error) {
	return call[ConfigDownload](ctx, c, http.MethodGet, "/v1/config", nil)
}

// Apply uploads a configuration, or plans it.
func (c *Client) Apply(ctx context.Context, up *ConfigUpload) (*ConfigResult, error) {
	return call[ConfigResult](ctx, c, http.MethodPost, "/v1/config", up)
}

// JoinToken makes a one-time token for a new node of a role. The secret in it is
// made here and goes nowhere; ca is the cluster's authority, DER, which the
// token pins.
func (c *Client) JoinToken(ctx context.Context, ttl time.Duration, role string, ca []byte) (*JoinTokenReply, error) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	rep, err := call[JoinTokenReply](ctx, c, http.MethodPost, "/v1/cluster/tokens", JoinTokenRequest{TTL: ttl, Role: role, Key: pub})
	if err == nil {
		rep.Token = joinToken(rep.ID, key.Seed(), ca)
	}
	return rep, err
}

// Join makes a node a member.
func (c *Client) Join(ctx context.Context, in *JoinRequest) (*JoinReply, error) {
	return call[JoinReply](ctx, c, http.MethodPost, "/v1/cluster/join", in)
}

// RemoveNode takes a node out of the cluster.
func (c *Client) RemoveNode(ctx context.Context, name, reason string, drain time.Duration) (*RemoveNodeReply, error) {
	return call[RemoveNodeReply](ctx, c, http.MethodPost, "/v1/cluster/nodes/"+url.PathEscape(name)+"/remove", RemoveNodeRequest{reason, drain})
}

// Members lists all nodes with their parts in the cluster.
func (c *Client) Members(ctx context.Context) (*Members, error) {
	return call[Members](ctx, c, http.MethodGet, "/v1/cluster/members", nil)
}

// SetVoters says how many voters the cluster is to have, 3 or 5.
func (c *Client) SetVoters(ctx context.Context, n int) (*Committed, error) {
	return call[Committed](ctx, c, http.MethodPost, "/v1/cluster/voters", VotersRequest{n})
}

// Approvals lists approval requests; state "" means all.
func (c *Client) Approvals(ctx context.Context, state string) ([]ApprovalInfo, error) {
	v, err := call[[]ApprovalInfo](ctx, c, http.MethodGet, "/v1/approvals?state="+url.QueryEscape(state), nil)
	if err != nil {
		return nil, err
	}
	return *v, nil
}

// Approval shows one request with its text.
func (c *Client) Approval(ctx context.Context, id string) (*ApprovalInfo, error) {
	return call[ApprovalInfo](ctx, c, http.MethodGet, "/v1/approvals/"+url.PathEscape(id), nil)
}

// Vote approves or denies the request whose digest the caller has seen.
func (c *Client) Vote(ctx context.Context, id, digest string, approve bool, comment string) (*Committed, error) {
	verb := "deny"
	if approve {
		verb = "approve"
	}
	return call[Committed](ctx, c, http.MethodPost, "/v1/approvals/"+url.PathEscape(id)+"/"+verb+"?digest="+url.QueryEscape(digest), VoteRequest{comment})
}

// Revoke ends what the scope says, waits up to wait for every node to have
// stopped (0: 20 s), and reports how each stands.
func (c *Client) Revoke(ctx context.Context, scope event.Scope, reason string, wait time.Duration) (*RevocationInfo, error) {
	return call[RevocationInfo](ctx, c, http.MethodPost, "/v1/revocations", RevokeRequest{Scope: scope, Reason: reason, Timeout: wait})
}

// Revocation shows one, waiting up to wait, at most a minute, for every node to
// have stopped.
func (c *Client) Revocation(ctx context.Context, id string, wait time.Duration) (*RevocationInfo, error) {
	return call[RevocationInfo](ctx, c, http.MethodGet, "/v1/revocations/"+url.PathEscape(id)+"?wait="+wait.String(), nil)
}

// Revocations lists all of them.
func (c *Client) Revocations(ctx context.Context) ([]RevocationInfo, error) {
	v, err := call[[]RevocationInfo](ctx, c, http.MethodGet, "/v1/revocations", nil)
	if err != nil {
		return nil, err
	}
	return *v, nil
}

// Undo undoes a revocation; credentials issued before stay dead.
func (c *Client) Undo(ctx context.Context, id, reason string) (*RevocationInfo, error) {
	return call[RevocationInfo](ctx, c, http.MethodPost, "/v1/revocations/"+url.PathEscape(id)+"/undo", UndoRequest{reason})
}

func call[T any](ctx context.Context, c *Client, method, path string, in any) (*T, error) {
	out := new(T)
	if err := c.Call(ctx, method, path, in, out); err != nil {
		return nil, err
	}
	return out, nil
}

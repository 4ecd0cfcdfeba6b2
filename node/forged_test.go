package node

import (
	"context"
	"crypto"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/approval"
	"github.com/sallyport/sallyport/node/config"
	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/session"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/raftstore/event"
)

// holding is a node that holds statements, with the product's own approvals,
// proofs, policy and sealing, over an event log that somebody else writes: the
// leader, who may be anybody's.
type holding struct {
	*Node
	t         *testing.T
	ctx       context.Context
	authority *pki.CA
	admin     *administrator
	mu        sync.Mutex // held to append
	versions  map[string]uint64
}

type administrator struct {
	cert []byte
	key  crypto.Signer
}

func mustAdmin(t *testing.T, ca *pki.CA, name string) *administrator {
	t.Helper()
	cert, key, err := ca.IssueAdmin("acme", name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &administrator{cert, key}
}

func newHolding(t *testing.T, policies string) *holding {
	t.Helper()
	policies += ` permit (principal in Group::"ops", action == Action::"admin:apply", resource);` // without it none is taken
	quiet := slog.New(slog.DiscardHandler)
	ca := mustCA(t)
	ident, err := vault.NewNodeIdentity()
	if err != nil {
		t.Fatal(err)
	}
	h := &holding{t: t, ctx: t.Context(), authority: ca, admin: mustAdmin(t, ca, "root"), versions: map[string]uint64{}, Node: &Node{
		cfg: &config.Config{Name: "n1"}, ca: ca.Cert, cluster: "acme", role: pki.Voter, state: state.New(quiet), ident: ident, log: quiet,
		sessions: session.NewRegistry(1),
	}}
	if h.verifier, err = identity.NewVerifier(nil, identity.Options{Log: quiet}); err != nil {
		t.Fatal(err)
	}
	h.fences = newFences(t.Context(), h.state, h.sessions, quiet)
	h.commit(event.TypeClusterCreated, "cluster", event.ClusterCreated{ID: "acme", CA: ca.Cert.Raw, AdminCertFP: pki.Fingerprint(h.admin.cert),
		Node: event.NodeInfo{Name: "n1", Role: pki.Voter, Recipient: ident.Recipient()}})
	h.commit(event.TypeSecretsSealed, "config", event.SecretsSealed{Keys: map[string]event.SealedKey{"ca-key": {}}}) // sealed to nodes, not to a vault
	h.commit(event.TypeConfigApplied, "config", event.ConfigApplied{Files: []event.ConfigFile{{Path: "rules.cedar", Data: []byte(policies)}}})
	if err := h.state.View().ConfigErr; err != nil {
		t.Fatal(err)
	}
	h.approvals = approval.New(approval.Env{
		Node: "n1", State: h.state, Seal: h.sealHere, VerifyVote: h.verifyVote, Decide: h.decide, Now: time.Now, Log: quiet,
		Propose: func(_ context.Context, typ string, _ event.ID, payload any, _ string) (uint64, error) {
			var id string
			switch p := payload.(type) {
			case event.ApprovalAsked:
				id = p.ID
			case event.ApprovalEnded:
				id = p.ID
			}
			return h.commit(typ, "approval/"+id, payload), nil
		},
	})
	return h
}

// commit stores an event as a leader does who checks nothing.
func (h *holding) commit(typ, aggregate string, payload any) uint64 {
	h.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	data, err := json.Marshal(payload)
	if err != nil {
		h.t.Fatal(err)
	}
	h.versions[aggregate]++
	seq := h.state.View().Seq + 1
	if err := h.state.Fold([]event.Event{{
		Proposal: event.Proposal{ID: event.NewID(), Type: typ, Version: event.Newest(typ), Aggregate: aggregate, Payload: data},
		Seq:      seq, Index: seq, Time: time.Now(), AggregateVersion: h.versions[aggregate],
	}}); err != nil {
		h.t.Fatal(err)
	}
	return seq
}

// heldStatement waits for one approval.
type heldStatement struct {
	protocols.Ticket
	digest [32]byte
	done   chan error
}

func (h *holding) hold(digest byte) *heldStatement {
	h.t.Helper()
	s := &heldStatement{digest: [32]byte{digest}, done: make(chan error, 1)}
	who := &policy.Subject{Kind: policy.Workload, Provider: "ci", Name: "repo:acme/shop"}
	var err error
	s.Ticket, err = h.approvals.Ask(h.ctx, &protocols.Hold{
		Access:   &protocols.Access{SessionID: "s", Subject: who, Target: "prod-db", Database: "shop"},
		Approval: &policy.Approval{Rules: []string{"drop"}, Count: 1, Expires: time.Hour}, Digest: s.digest, Text: []byte("DROP TABLE x"),
	}, "token")
	if err != nil {
		h.t.Fatal(err)
	}
	go func() {
		_, err := s.Wait(h.ctx)
		s.done <- err
	}()
	return s
}

// signed is the proof of a call that an administrator signed.
func (h *holding) signed(a *administrator, path string) identity.Proof {
	h.t.Helper()
	body := []byte(`{}`)
	req := httptest.NewRequest(http.MethodPost, path, nil)
	req.Header.Set("Idempotency-Key", event.NewID().String())
	if err := identity.SignRequest(req, body, a.cert, a.key); err != nil {
		h.t.Fatal(err)
	}
	p, err := identity.ProofFromRequest(req, body)
	if err != nil {
		h.t.Fatal(err)
	}
	return *p
}

func approvePath(id string, digest [32]byte) string {
	return fmt.Sprintf("/v1/approvals/%s/approve?digest=%x", id, digest)
}

// vote commits a vote for s with a proof that is sealed as it should be.
func (h *holding) vote(s *heldStatement, approver string, p identity.Proof) {
	h.t.Helper()
	plain, err := json.Marshal(p)
	if err != nil {
		h.t.Fatal(err)
	}
	sealed, err := h.sealHere(approval.ProofName(s.ID(), approver), plain)
	if err != nil {
		h.t.Fatal(err)
	}
	h.voteSealed(s, approver, sealed)
}

func (h *holding) voteSealed(s *heldStatement, approver string, proof event.Sealed) {
	h.t.Helper()
	h.commit(event.TypeApprovalVoted, "approval/"+s.ID(), event.ApprovalVoted{ID: s.ID(), Approver: approver, Approve: true, Digest: s.digest[:], Proof: proof})
}

// counted says whom of s's votes the node counts, once.
func (h *holding) counted(s *heldStatement) bool {
	h.t.Helper()
	if got := h.state.View().Approvals.Get(s.ID()).State(time.Now()); got != "approved" {
		h.t.Fatalf("by the log alone the request is %s: the vote is not what the test means", got)
	}
	select {
	case err := <-s.done:
		if err != nil {
			h.t.Fatal(err)
		}
		return true
	case <-time.After(300 * time.Millisecond): // a vote that counts does at once
		return false
	}
}

const root = policy.BootstrapProvider + "/root"

// A leader commits votes that nobody cast: by the event log the request is
// approved. The node that holds the statement does not release it, and does
// when the approver has really voted.
func TestForgedVotes(t *testing.T) {
	const permit = `permit (principal, action == Action::"approve", resource);`
	made := func(kind string) string { // an unsigned token of whom one likes
		enc := base64.RawURLEncoding.EncodeToString
		return enc([]byte(`{"alg":"`+kind+`"}`)) + "." + enc([]byte(`{"iss":"https://id.example","sub":"root","aud":"sallyport"}`)) + "." + enc([]byte("x"))
	}
	for _, c := range []struct {
		name, policies string
		forge          func(h *holding, s *heldStatement)
	}{
		{"a certificate that the authority's key has signed", permit, func(h *holding, s *heldStatement) {
			h.vote(s, root, h.signed(mustAdmin(h.t, h.authority, "root"), approvePath(s.ID(), s.digest)))
		}},
		{"a certificate of another authority", permit, func(h *holding, s *heldStatement) {
			h.vote(s, root, h.signed(mustAdmin(h.t, mustCA(h.t), "root"), approvePath(s.ID(), s.digest)))
		}},
		{"the certificate, and a signature by another key", permit, func(h *holding, s *heldStatement) {
			h.vote(s, root, h.signed(&administrator{h.admin.cert, mustAdmin(h.t, h.authority, "root").key}, approvePath(s.ID(), s.digest)))
		}},
		{"the approval of another request, sealed anew", permit, func(h *holding, s *heldStatement) {
			h.vote(s, root, h.signed(h.admin, approvePath("0123456789", s.digest)))
		}},
		{"the approval of another request, as it was sealed", permit, func(h *holding, s *heldStatement) {
			other := h.hold(s.digest[0])
			h.vote(other, root, h.signed(h.admin, approvePath(other.ID(), other.digest)))
			if !h.counted(other) {
				h.t.Error("the approver's own vote does not count")
			}
			h.voteSealed(s, root, h.state.View().Approvals.Get(other.ID()).Votes[0].Proof)
		}},
		{"the approval of the same request for another statement", permit, func(h *holding, s *heldStatement) {
			h.vote(s, root, h.signed(h.admin, approvePath(s.ID(), [32]byte{99})))
		}},
		{"a denial", permit, func(h *holding, s *heldStatement) {
			h.vote(s, root, h.signed(h.admin, strings.Replace(approvePath(s.ID(), s.digest), "/approve?", "/deny?", 1)))
		}},
		{"another call", permit, func(h *holding, s *heldStatement) { h.vote(s, root, h.signed(h.admin, "/v1/revocations")) }},
		{"a call that was read only", permit, func(h *holding, s *heldStatement) {
			p := h.signed(h.admin, approvePath(s.ID(), s.digest))
			p.Method = http.MethodGet
			h.vote(s, root, p)
		}},
		{"a path that was changed afterwards", permit, func(h *holding, s *heldStatement) {
			p := h.signed(h.admin, approvePath("0123456789", s.digest))
			p.Path = approvePath(s.ID(), s.digest)
			h.vote(s, root, p)
		}},
		{"an old signature", permit, func(h *holding, s *heldStatement) {
			p := h.signed(h.admin, approvePath(s.ID(), s.digest))
			p.Time -= 3600
			h.vote(s, root, p)
		}},
		{"an administrator's own, in another's name", permit, func(h *holding, s *heldStatement) {
			h.vote(s, "sso/robin", h.signed(h.admin, approvePath(s.ID(), s.digest)))
		}},
		{"a token without a signature", permit, func(h *holding, s *heldStatement) {
			h.vote(s, "sso/root", identity.Proof{Kind: identity.Bearer, Token: made("none")})
		}},
		{"a token of no provider of the configuration", permit, func(h *holding, s *heldStatement) {
			h.vote(s, "sso/root", identity.Proof{Kind: identity.Bearer, Token: made("RS256")})
		}},
		{"no proof", permit, func(h *holding, s *heldStatement) { h.voteSealed(s, root, nil) }},
		{"a proof that is none", permit, func(h *holding, s *heldStatement) { h.vote(s, root, identity.Proof{}) }},
		{"somebody whom no rule permits to approve", `permit (principal, action == Action::"connect", resource);`, func(h *holding, s *heldStatement) {
			h.vote(s, root, h.signed(h.admin, approvePath(s.ID(), s.digest)))
		}},
		{"somebody who was revoked", permit, func(h *holding, s *heldStatement) {
			h.commit(event.TypeRevoked, "revocation/r", event.NewRevoked("r", event.Scope{Kind: event.ScopeSubject, Value: root}, "left"))
			h.vote(s, root, h.signed(h.admin, approvePath(s.ID(), s.digest)))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHolding(t, c.policies)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			h.ctx = ctx
			s := h.hold(7)
			c.forge(h, s)
			if h.counted(s) {
				t.Fatal("the statement is released")
			}
		})
	}
	t.Run("the approver's own", func(t *testing.T) {
		h := newHolding(t, permit)
		s := h.hold(7)
		h.vote(s, root, h.signed(mustAdmin(t, h.authority, "root"), approvePath(s.ID(), s.digest)))
		if h.counted(s) {
			t.Fatal("a forged vote counts")
		}
		h.vote(s, root, h.signed(h.admin, approvePath(s.ID(), s.digest))) // and then the person votes
		if !h.counted(s) {
			t.Error("a forged vote keeps the approver's own from counting")
		}
	})
}

// A voter opens the authority's key and makes administrators' certificates with
// it. None counts but the one the cluster was made with: not at the API's door,
// before or after the body is there, nor handed on by a node.
func TestForgedAdministrator(t *testing.T) {
	h := newHolding(t, "")
	forged := mustAdmin(t, h.authority, "root")
	leaf := mustCert(forged.cert)
	if _, err := pki.VerifyPeer(leaf, pki.Pool(h.ca.Raw), "acme", pki.Admin); err != nil {
		t.Fatalf("the double is no good certificate of the authority: %v", err)
	}
	for _, c := range []struct {
		name  string
		admin *administrator
		good  bool
	}{
		{"the one that the cluster was made with", h.admin, true},
		{"of the same name, signed by the authority", forged, false},
		{"the one that the cluster was made with, and another's key", &administrator{h.admin.cert, forged.key}, false},
		{"of a node", &administrator{mustSign(t, h.authority, pki.Voter, "n2", time.Now()), forged.key}, false},
	} {
		for _, relayed := range []bool{false, true} {
			body := []byte(`{"reason":"x"}`)
			req := httptest.NewRequest(http.MethodPost, "/v1/cluster/tokens", nil)
			req.Header.Set("Idempotency-Key", hex.EncodeToString(make([]byte, 16)))
			if err := identity.SignRequest(req, body, c.admin.cert, c.admin.key); err != nil {
				t.Fatal(err)
			}
			who, _, err := h.authenticateRequest(t.Context(), req, body, relayed)
			if (err == nil) != c.good || (who != nil) != c.good {
				t.Errorf("%s, relayed %v: %v, %v", c.name, relayed, who, err)
			}
			// Before the body is there only the certificate can be looked at.
			if known := h.known(t.Context(), req); (known == nil) != (string(c.admin.cert) == string(h.admin.cert)) {
				t.Errorf("%s, before the body: %v", c.name, known)
			}
		}
	}
}

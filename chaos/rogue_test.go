package chaos

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/tunnel"
	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// rogue is a gateway that has been taken over: it has a member's certificate, its
// keys and its place in the network, and speaks as it likes.
type rogue struct {
	s     *suite
	e     *transport.Endpoint
	ident *vault.NodeIdentity
	key   *tls.Certificate
	ca    *x509.Certificate
}

// newRogue joins a gateway that is never started, and takes its directory.
func newRogue(t *testing.T, s *suite) *rogue {
	t.Helper()
	token := strings.TrimSpace(s.cli(t, s.AdminEnv(), "cluster", "token", "create", "--role", "gateway"))
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	s.must(t, err)
	dir := filepath.Join(s.Dir, "rogue")
	s.cli(t, nil, "cluster", "join", "--token", token, "--server", s.Nodes[0].Addr, "--name", "g1", "--data-dir", dir, "--addr", udp.LocalAddr().String(), "--dev")
	key, err := pki.LoadKey(filepath.Join(dir, "node.key"))
	s.must(t, err)
	cert, err := pki.LoadCert(filepath.Join(dir, "node.crt"))
	s.must(t, err)
	r := &rogue{s: s, key: &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}}
	r.ca, err = pki.LoadCert(filepath.Join(dir, "ca.crt"))
	s.must(t, err)
	r.ident, err = vault.LoadNodeIdentity(filepath.Join(dir, "node.age"))
	s.must(t, err)
	r.e = r.endpoint(t, udp, r.key)
	return r
}

func (r *rogue) endpoint(t *testing.T, udp net.PacketConn, cert *tls.Certificate) *transport.Endpoint {
	t.Helper()
	e, err := transport.Listen(transport.EndpointConfig{
		UDPConn: udp, Classes: transport.Classes,
		Certificate: func() (*tls.Certificate, error) { return cert, nil },
		Roots:       func() *x509.CertPool { return pki.Pool(r.ca.Raw) },
		Authorize: func(_ string, leaf *x509.Certificate) (string, error) {
			id, err := pki.ParseIdentity(leaf)
			return id.Name, err
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

// heard says whether a node takes a stream of a class from e: an error is its
// refusal.
func heard(ctx context.Context, e *transport.Endpoint, class string, n *cluster.Node) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := e.Dial(ctx, class, n.Addr, n.Name)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte("\x00 is anybody there?")); err != nil {
		return err
	}
	// A node that takes the connection waits for more, or answers.
	c.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err = c.Read(make([]byte, 1)); err == nil || err == io.EOF {
		return nil
	}
	if ne, ok := err.(net.Error); ok && ne.Timeout() {
		return nil
	}
	return err
}

// call asks a node over the mesh, with a header or two.
func (r *rogue) call(t *testing.T, n *cluster.Node, method, path string, body any, header map[string]string) (int, string) {
	t.Helper()
	mesh := tunnel.New(r.e, func(name string) (string, bool) { return n.Addr, name == n.Name }, slog.New(slog.DiscardHandler))
	defer mesh.CloseIdle()
	data, ok := body.([]byte)
	if !ok {
		var err error
		data, err = json.Marshal(body)
		r.s.must(t, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+n.Name+path, bytes.NewReader(data))
	r.s.must(t, err)
	for k, v := range header {
		req.Header.Set(k, v)
	}
	resp, err := mesh.Transport().RoundTrip(req)
	r.s.must(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	r.s.must(t, err)
	return resp.StatusCode, string(b)
}

// TestRogueGateway is a gateway that has been taken over, and what it cannot do.
func TestRogueGateway(t *testing.T) {
	s := start(t, cluster.Options{Nodes: 2})
	ctx := t.Context()
	// The target is for the voters: the gateway may not serve it.
	s.edit(t, "target.yaml", func(c string) string {
		return strings.Replace(c, "databases: [shop, bench]", "databases: [shop, bench]\nnodes: [n1, n2]", 1)
	})
	r := newRogue(t, s)
	leader, err := s.Leader(ctx)
	s.must(t, err)
	var term uint64
	for _, n := range s.status(t, leader).Nodes {
		term = max(term, n.Term)
	}
	s.cli(t, s.AdminEnv(), "revoke", "--subject", subject("rogue"), "--reason", "test")
	events := func() int { return len(s.events(t)) }

	t.Run("has no part in Raft", func(t *testing.T) {
		for _, n := range s.Nodes {
			for _, class := range []string{transport.ClassRaft, transport.ClassBulk} {
				if err := heard(ctx, r.e, class, n); err == nil {
					t.Errorf("%s listens to a gateway on %s", n.Name, class)
				}
			}
			if err := heard(ctx, r.e, transport.ClassMesh, n); err != nil {
				t.Errorf("the double cannot speak at all: %v", err)
			}
		}
	})
	t.Run("is nobody else", func(t *testing.T) {
		// A certificate of its own making, for a voter's name and role.
		for _, role := range []string{pki.Voter, pki.Gateway} {
			own, err := pki.NewCA(r.ca.Subject.CommonName[len("Sallyport CA "):], time.Now())
			s.must(t, err)
			key, err := pki.NewNodeKey()
			s.must(t, err)
			csr, err := pki.CSR(key)
			s.must(t, err)
			id, err := pki.ParseIdentity(r.key.Leaf)
			s.must(t, err)
			der, err := own.SignNode(csr, id.Cluster, role, "n2", pki.SANs{}, time.Now())
			s.must(t, err)
			leaf, err := x509.ParseCertificate(der)
			s.must(t, err)
			udp, err := net.ListenPacket("udp", "127.0.0.1:0")
			s.must(t, err)
			e := r.endpoint(t, udp, &tls.Certificate{Certificate: [][]byte{der, own.Cert.Raw}, PrivateKey: key, Leaf: leaf})
			for _, class := range transport.Classes {
				if err := heard(ctx, e, class, s.Nodes[0]); err == nil {
					t.Errorf("a certificate of another authority speaks %s as %s n2", class, role)
				}
			}
		}
	})
	t.Run("proposes nothing without the caller", func(t *testing.T) {
		before := events()
		token := s.job(t, "rogue-job", "main", nil)
		ask := func(p event.ApprovalAsked, token string) api.Proposal {
			b, err := json.Marshal(p)
			s.must(t, err)
			return api.Proposal{Type: event.TypeApprovalAsked, ID: event.NewID(), Payload: b, Token: token}
		}
		good := event.ApprovalAsked{ID: "x", Node: "g1", Subject: subject("rogue-job"), Digest: make([]byte, 32), Rules: []string{"r"}, Count: 1, Expires: time.Now().Add(time.Minute)}
		other, as := good, good
		other.Subject, as.Node = subject("somebody-else"), "n1"
		for name, p := range map[string]api.Proposal{
			"a vote":                         {Type: event.TypeApprovalVoted, ID: event.NewID(), Payload: []byte("{}")},
			"a revocation's undoing":         {Type: event.TypeRevocationUndone, ID: event.NewID(), Payload: []byte("{}")},
			"a revocation's report":          {Type: event.TypeRevocationReport, ID: event.NewID(), Payload: []byte("{}")},
			"a configuration":                {Type: event.TypeConfigApplied, ID: event.NewID(), Payload: []byte("{}")},
			"a member":                       {Type: event.TypeNodeJoined, ID: event.NewID(), Payload: []byte("{}")},
			"another's certificate":          {Type: event.TypeNodeRenewed, ID: event.NewID(), Payload: []byte(`{"name":"n1"}`)},
			"a restored cluster":             {Type: event.TypeClusterRestored, ID: event.NewID(), Payload: []byte("{}")},
			"a higher feature level":         {Type: event.TypeFeatureLevel, ID: event.NewID(), Payload: []byte(`{"level":99}`)},
			"the authority's key":            {Type: event.TypeSecretsSealed, ID: event.NewID(), Payload: []byte(`{"keys":{"ca-key":{"sealed":"AA==","sealed_to":["x"]}}}`)},
			"a request without a token":      ask(good, ""),
			"a request with a made-up token": ask(good, "eyJhbGciOiJub25lIn0.e30."),
			"a request of another subject":   ask(other, token),
			"a request in another's name":    ask(as, token),
		} {
			if status, body := r.call(t, leader, http.MethodPost, "/mesh/v1/propose", p, nil); status/100 == 2 || !strings.Contains(body, `"error":"`) {
				t.Errorf("%s: %d %s", name, status, body)
			}
		}
		if after := events(); after != before {
			t.Errorf("%d events came of it", after-before)
		}
	})
	t.Run("calls nothing without the caller", func(t *testing.T) {
		before := events()
		for _, path := range []string{
			"POST /v1/config", "POST /v1/cluster/tokens", "POST /v1/cluster/backup", "POST /v1/cluster/nodes/n1/remove", "POST /v1/cluster/nodes/n1/rotate",
			"POST /v1/revocations", "POST /v1/revocations/x/undo", "POST /v1/approvals/x/approve", "GET /v1/approvals", "GET /v1/recordings", "GET /v1/events?from=1",
		} {
			method, path, _ := strings.Cut(path, " ")
			if status, body := r.call(t, leader, method, path, struct{}{}, nil); status != http.StatusUnauthorized {
				t.Errorf("%s %s: %d %s", method, path, status, body)
			}
		}
		for _, path := range []string{"/mesh/v1/leave", "/mesh/v1/rotate"} {
			if status, body := r.call(t, s.Nodes[1], http.MethodPost, path, struct{}{}, nil); status != http.StatusForbidden {
				t.Errorf("%s: %d %s", path, status, body)
			}
		}
		if after := events(); after != before {
			t.Errorf("%d events came of it", after-before)
		}
	})
	t.Run("joins no node", func(t *testing.T) {
		_, key, err := ed25519.GenerateKey(nil)
		s.must(t, err)
		pin := pki.CAHash(r.ca.Raw)
		enc := base64.RawURLEncoding
		for _, ev := range s.events(t) {
			if ev.Type != event.TypeJoinTokenMade {
				continue
			}
			id := fmt.Sprint(ev.Payload["id"])
			tok, err := api.ParseJoinToken("sp2." + id + "." + enc.EncodeToString(key.Seed()) + "." + enc.EncodeToString(pin[:]))
			s.must(t, err)
			in := api.JoinRequest{Name: "evil", Addr: "127.0.0.1:1", CSR: []byte("x"), Recipient: r.ident.Recipient()}
			s.must(t, in.Sign(tok))
			if status, body := r.call(t, leader, http.MethodPost, "/v1/cluster/join", in, nil); status != http.StatusUnauthorized {
				t.Errorf("token %s with a key of its own: %d %s", id, status, body)
			}
		}
	})
	t.Run("repeats a signed call to no effect", func(t *testing.T) {
		cert, err := pki.LoadCert(s.AdminCert)
		s.must(t, err)
		key, err := pki.LoadKey(s.AdminKey)
		s.must(t, err)
		pub, _, err := ed25519.GenerateKey(nil)
		s.must(t, err)
		body, err := json.Marshal(api.JoinTokenRequest{Key: pub})
		s.must(t, err)
		req, err := http.NewRequest(http.MethodPost, "http://"+leader.Name+"/v1/cluster/tokens", bytes.NewReader(body))
		s.must(t, err)
		id := event.NewID()
		req.Header.Set("Idempotency-Key", id.String())
		s.must(t, identity.SignRequest(req, body, cert.Raw, key))
		header := map[string]string{"Authorization": req.Header.Get("Authorization"), "Idempotency-Key": id.String()}
		if status, answer := r.call(t, leader, http.MethodPost, "/v1/cluster/tokens", body, header); status != http.StatusOK {
			t.Fatalf("handing a call on, as a gateway does: %d %s", status, answer)
		}
		before := events()
		r.call(t, leader, http.MethodPost, "/v1/cluster/tokens", body, header) // the same event again
		if after := events(); after != before {
			t.Errorf("a repeated call made %d events", after-before)
		}
		header["Idempotency-Key"] = event.NewID().String()
		if status, answer := r.call(t, leader, http.MethodPost, "/v1/cluster/tokens", body, header); status != http.StatusUnauthorized {
			t.Errorf("with another key: %d %s", status, answer)
		}
		header["Idempotency-Key"] = id.String()
		changed := bytes.Replace(body, []byte(`"key":"`), []byte(`"role":"voter","key":"`), 1)
		if status, answer := r.call(t, leader, http.MethodPost, "/v1/cluster/tokens", changed, header); status != http.StatusUnauthorized {
			t.Errorf("with another body: %d %s", status, answer)
		}
		if status, answer := r.call(t, leader, http.MethodPost, "/v1/revocations", body, header); status != http.StatusUnauthorized {
			t.Errorf("for another call: %d %s", status, answer)
		}
	})
	t.Run("opens nothing that is not for it", func(t *testing.T) {
		seen := map[string]bool{}
		open := func(name, what string, blob any) {
			sealed, err := base64.StdEncoding.DecodeString(fmt.Sprint(blob))
			s.must(t, err)
			seen[what] = true
			if _, err := r.ident.Open(name, sealed); err == nil {
				t.Errorf("the gateway opens %s", what)
			}
		}
		for _, ev := range s.events(t) {
			if ev.Type == event.TypeSecretsSealed {
				keys, _ := ev.Payload["keys"].(map[string]any)
				if k, ok := keys["ca-key"].(map[string]any); ok {
					open("ca-key", "the authority's key", k["sealed"])
				}
			}
			if secrets, ok := ev.Payload["secrets"].(map[string]any); ok {
				for name, blob := range secrets {
					open(api.SecretName(name), "a target's password", blob)
				}
			}
		}
		if len(seen) != 2 {
			t.Errorf("only found: %v", seen)
		}
	})
	t.Run("has changed nothing", func(t *testing.T) {
		st := s.status(t, leader)
		for _, n := range st.Nodes {
			if n.Node != "g1" && n.Term != term {
				t.Errorf("%s is in term %d, was in %d", n.Node, n.Term, term)
			}
		}
		out := s.cli(t, s.AdminEnv(), "cluster", "remove", "g1", "--reason", "taken over")
		if !strings.Contains(out, "no member any more") {
			t.Error(out)
		}
		for _, class := range transport.Classes {
			if err := heard(ctx, r.e, class, leader); err == nil {
				t.Errorf("a removed gateway is heard on %s", class)
			}
		}
	})
}

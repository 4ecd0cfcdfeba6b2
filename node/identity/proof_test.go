package identity

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/policy"
)

type admin struct {
	ca   *pki.CA
	cert []byte
	key  *ecdsa.PrivateKey
}

func newAdmin(t *testing.T, now time.Time) admin {
	t.Helper()
	ca, err := pki.NewCA("acme", now)
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := ca.IssueAdmin("acme", "root", now)
	if err != nil {
		t.Fatal(err)
	}
	return admin{ca, cert, key}
}

func (a admin) request(t *testing.T, now time.Time, body string) *http.Request {
	t.Helper()
	req, err := http.NewRequest("POST", "https://node:6432/v1/apply?yes=1", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if err := signRequestAt(req, []byte(body), a.cert, a.key, now); err != nil {
		t.Fatal(err)
	}
	return req
}

// received is the request as a server sees it: a path only.
func received(req *http.Request) *http.Request {
	r := req.Clone(context.Background())
	r.URL.Scheme, r.URL.Host = "", ""
	return r
}

func TestSignedRequest(t *testing.T) {
	clk := newClock()
	a := newAdmin(t, clk.now())
	v := mustVerifier(t, clk, false)
	o := func(n *Nonces) ProofOptions { return ProofOptions{Roots: a.ca.Pool(), Cluster: "acme", Nonces: n} }
	door, leader := &Nonces{}, &Nonces{}
	p, err := ProofFromRequest(received(a.request(t, clk.now(), "body")), []byte("body"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := v.VerifyProof(context.Background(), p, o(door))
	if err != nil {
		t.Fatal(err)
	}
	if s.ID() != "bootstrap/root" || s.Kind != policy.User || len(s.Groups) != 1 || s.Groups[0] != AdminGroup || !strings.HasPrefix(s.TokenID, "cert:") {
		t.Errorf("%+v", s)
	}
	// The leader verifies what was passed on, once.
	wire, _ := json.Marshal(p)
	var p2 Proof
	if err := json.Unmarshal(wire, &p2); err != nil {
		t.Fatal(err)
	}
	if _, err := v.VerifyProof(context.Background(), &p2, o(leader)); err != nil {
		t.Error(err)
	}
	for _, n := range []*Nonces{door, leader} {
		_, err := v.VerifyProof(context.Background(), &p2, o(n))
		wantCode(t, err, "bad-signature")
	}
	// From a stored event it can be verified later, as of its time.
	at := clk.now()
	clk.add(time.Hour)
	if _, err := v.VerifyProof(context.Background(), &p2, ProofOptions{Roots: a.ca.Pool(), Cluster: "acme", At: at}); err != nil {
		t.Error(err)
	}
	_, err = v.VerifyProof(context.Background(), &p2, o(nil))
	wantCode(t, err, "expired")
	for _, text := range []string{fmt.Sprint(p), fmt.Sprintf("%+v %#v", p, *p)} {
		if strings.Contains(text, p.Nonce) {
			t.Errorf("printing shows the proof: %s", text)
		}
	}
}

func TestSignedRequestRefused(t *testing.T) {
	clk := newClock()
	now := clk.now()
	a, b := newAdmin(t, now), newAdmin(t, now)
	v := mustVerifier(t, clk, false)
	nodeKey, _ := pki.NewNodeKey()
	csr, _ := pki.CSR(nodeKey)
	nodeCert, err := a.ca.SignNode(csr, "acme", pki.Voter, "n1", pki.SANs{}, now)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		by     admin
		at     time.Time
		change func(*Proof)
		code   string
	}{
		"method":           {a, now, func(p *Proof) { p.Method = "DELETE" }, "bad-signature"},
		"path":             {a, now, func(p *Proof) { p.Path = "/v1/apply?yes=2" }, "bad-signature"},
		"body":             {a, now, func(p *Proof) { p.BodyHash = bytes.Repeat([]byte{1}, 32) }, "bad-signature"},
		"time":             {a, now, func(p *Proof) { p.Time++ }, "bad-signature"},
		"nonce":            {a, now, func(p *Proof) { p.Nonce = strings.Repeat("0", 32) }, "bad-signature"},
		"no nonce":         {a, now, func(p *Proof) { p.Nonce = "" }, "malformed-token"},
		"no body hash":     {a, now, func(p *Proof) { p.BodyHash = nil }, "malformed-token"},
		"line feed":        {a, now, func(p *Proof) { p.Path = "/a\n/b" }, "malformed-token"},
		"no certificate":   {a, now, func(p *Proof) { p.Cert = nil }, "malformed-token"},
		"other's cert":     {a, now, func(p *Proof) { p.Cert = b.cert }, "unknown-issuer"},
		"other cluster CA": {b, now, func(*Proof) {}, "unknown-issuer"},
		"old":              {a, now.Add(-MaxSkew - time.Second), func(*Proof) {}, "expired"},
		"future":           {a, now.Add(MaxSkew + time.Second), func(*Proof) {}, "not-yet-valid"},
		"a node's":         {admin{a.ca, nodeCert, nodeKey}, now, func(*Proof) {}, "unknown-issuer"},
		"kind":             {a, now, func(p *Proof) { p.Kind = "x" }, "malformed-token"},
	} {
		p, err := ProofFromRequest(received(tc.by.request(t, tc.at, "body")), []byte("body"))
		if err != nil {
			t.Fatal(err)
		}
		tc.change(p)
		_, err = v.VerifyProof(context.Background(), p, ProofOptions{Roots: a.ca.Pool(), Cluster: "acme", Nonces: &Nonces{}})
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		wantCode(t, err, tc.code)
	}
	// A body other than the signed one.
	p, _ := ProofFromRequest(received(a.request(t, now, "body")), []byte("Body"))
	_, err = v.VerifyProof(context.Background(), p, ProofOptions{Roots: a.ca.Pool(), Cluster: "acme", Nonces: &Nonces{}})
	wantCode(t, err, "bad-signature")
	_, err = v.VerifyProof(context.Background(), p, ProofOptions{Cluster: "acme"})
	wantCode(t, err, "unknown-issuer")
	_, err = v.VerifyProof(context.Background(), nil, ProofOptions{})
	wantCode(t, err, "no-token")
}

func TestProofFromRequest(t *testing.T) {
	i, clk := newIssuer(t), newClock()
	v := mustVerifier(t, clk, false, i.config())
	token := sign(t, jose.RS256, i.rsa, "r1", claimsAt(clk.now(), i.srv.URL))
	for _, tc := range []struct {
		auth []string
		code string
	}{
		{nil, "no-token"}, {[]string{""}, "no-token"}, {[]string{"Basic eDp5"}, "malformed-token"}, {[]string{"Bearer a", "Bearer b"}, "malformed-token"},
		{[]string{certScheme + " %%"}, "malformed-token"}, {[]string{"Bearer " + strings.Repeat("x", maxAuthorization)}, "malformed-token"},
		{[]string{"bearer " + token}, ""},
	} {
		req, _ := http.NewRequest("GET", "/v1/status", nil)
		req.Header["Authorization"] = tc.auth
		p, err := ProofFromRequest(req, nil)
		if tc.code != "" {
			wantCode(t, err, tc.code)
			continue
		}
		if err != nil {
			t.Error(err)
			continue
		}
		if _, err := v.VerifyProof(context.Background(), p, ProofOptions{}); err != nil {
			t.Error(err)
		}
		if strings.Contains(fmt.Sprintf("%v %+v %#v", p, p, *p), token[:20]) {
			t.Error("printing shows the token")
		}
		// As of the time of an event long ago it still proves what it proved then.
		at := clk.now()
		if _, err := v.VerifyProof(context.Background(), p, ProofOptions{At: at.Add(time.Hour)}); err == nil {
			t.Error("accepted after its expiry")
		}
	}
}

func TestNoncesBounded(t *testing.T) {
	var n Nonces
	now := time.Now()
	for k := range maxNonces {
		if err := n.use(fmt.Sprint(k), now.Add(MaxSkew), now); err != nil {
			t.Fatal(err)
		}
	}
	wantCode(t, n.use("more", now.Add(MaxSkew), now), "issuer-unavailable")
	later := now.Add(MaxSkew + time.Second)
	if err := n.use("more", later.Add(MaxSkew), later); err != nil || len(n.seen) != 1 {
		t.Errorf("%v, %d kept", err, len(n.seen))
	}
}

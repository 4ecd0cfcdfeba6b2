package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
)

const audience = "sallyport.acme"

// testIssuer is an OIDC issuer whose failures the test controls.
type testIssuer struct {
	srv     *httptest.Server
	rsa     *rsa.PrivateKey
	ec      *ecdsa.PrivateKey
	fetches atomic.Int64 // of the key set

	mu      sync.Mutex
	keys    []jose.JSONWebKey
	down    bool
	docs    map[string]any // overrides of the discovery document
	rawKeys []byte         // instead of keys
}

var testRSA = sync.OnceValue(func() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
})

func newIssuer(t testing.TB) *testIssuer {
	t.Helper()
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i := &testIssuer{rsa: testRSA(), ec: ec}
	i.keys = []jose.JSONWebKey{
		{Key: &i.rsa.PublicKey, KeyID: "r1", Algorithm: "RS256", Use: "sig"},
		{Key: &i.ec.PublicKey, KeyID: "e1", Use: "sig"},
	}
	i.srv = httptest.NewUnstartedServer(http.HandlerFunc(i.serve))
	i.srv.Config.ErrorLog = nil
	i.srv.StartTLS()
	t.Cleanup(i.srv.Close)
	return i
}

func (i *testIssuer) set(f func()) { i.mu.Lock(); defer i.mu.Unlock(); f() }

func (i *testIssuer) serve(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.down {
		http.Error(w, "down: <secret internals>", http.StatusServiceUnavailable)
		return
	}
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		doc := map[string]any{"issuer": i.srv.URL, "jwks_uri": i.srv.URL + "/jwks"}
		maps.Copy(doc, i.docs)
		json.NewEncoder(w).Encode(doc)
	case "/jwks":
		i.fetches.Add(1)
		if i.rawKeys != nil {
			w.Write(i.rawKeys)
			return
		}
		json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: i.keys})
	case "/redirected":
		http.Redirect(w, r, "/jwks", http.StatusFound)
	default:
		http.NotFound(w, r)
	}
}

func (i *testIssuer) ca() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.srv.Certificate().Raw})
}

func (i *testIssuer) config() ProviderConfig {
	return ProviderConfig{
		Name: "ci", Issuer: i.srv.URL, Audience: audience, Kind: policy.Workload, CA: i.ca(),
		Groups: []string{"ci-jobs"}, GroupsClaim: "realm_access.roles",
		GroupRules: []GroupRule{
			{When: map[string][]string{"repository": {"acme/shop", "acme/infra"}, "ref": {"refs/heads/main", "refs/tags/*"}}, Groups: []string{"migrators"}},
			{When: map[string][]string{"repository": {"other/*"}}, Groups: []string{"others"}},
		},
		Claims:       []string{"repository", "run_id", "protected", "labels", "realm_access", "absent"},
		PersonClaims: []string{"actor", "approvers"},
		Require:      map[string][]string{"repository_owner": {"acme", "acme-labs"}},
	}
}

func claimsAt(now time.Time, iss string) map[string]any {
	return map[string]any{
		"iss": iss, "sub": "repo:acme/shop:ref:refs/heads/main", "aud": audience, "jti": "j1",
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(),
		"repository": "acme/shop", "repository_owner": "acme", "ref": "refs/heads/main",
		"run_id": 42, "protected": true, "labels": []string{"a", "b"}, "actor": "alice", "approvers": []string{"bob", "alice"},
		"realm_access": map[string]any{"roles": []string{"ops", "Sallyport-Admins", "sallyport-admins"}},
	}
}

// with returns claims changed: nil deletes.
func with(c map[string]any, kv ...any) map[string]any {
	c = maps.Clone(c)
	for i := 0; i < len(kv); i += 2 {
		if kv[i+1] == nil {
			delete(c, kv[i].(string))
		} else {
			c[kv[i].(string)] = kv[i+1]
		}
	}
	return c
}

func sign(t testing.TB, alg jose.SignatureAlgorithm, key any, kid string, claims any) string {
	t.Helper()
	return signTyped(t, "JWT", alg, key, kid, claims)
}

func signTyped(t testing.TB, typ string, alg jose.SignatureAlgorithm, key any, kid string, claims any) string {
	t.Helper()
	opts := (&jose.SignerOptions{}).WithType(jose.ContentType(typ))
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, opts)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := s.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	out, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func raw(header string, claims any, sig string) string {
	payload, _ := json.Marshal(claims)
	enc := base64.RawURLEncoding
	return enc.EncodeToString([]byte(header)) + "." + enc.EncodeToString(payload) + "." + sig
}

type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock               { return &clock{t: time.Now().Truncate(time.Second)} }
func (c *clock) now() time.Time      { c.mu.Lock(); defer c.mu.Unlock(); return c.t }
func (c *clock) add(d time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); c.t = c.t.Add(d) }

func mustVerifier(t testing.TB, clk *clock, dev bool, configs ...ProviderConfig) *Verifier {
	t.Helper()
	v, err := NewVerifier(configs, Options{Dev: dev, Now: clk.now})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func wantCode(t testing.TB, err error, want string) string {
	t.Helper()
	var ae *protocols.AuthError
	if !errors.As(err, &ae) {
		t.Errorf("got %v, want an AuthError %s", err, want)
		return ""
	}
	if ae.Code != want {
		t.Errorf("got code %s (%s), want %s", ae.Code, ae.Reason, want)
	}
	return ae.Reason
}

func TestVerifyGood(t *testing.T) {
	i, clk := newIssuer(t), newClock()
	v := mustVerifier(t, clk, false, i.config())
	c := claimsAt(clk.now(), i.srv.URL)
	for name, token := range map[string]string{
		"RS256":       sign(t, jose.RS256, i.rsa, "r1", c),
		"ES256":       sign(t, jose.ES256, i.ec, "e1", c),
		"no key id":   sign(t, jose.ES256, i.ec, "", c),
		"aud list":    sign(t, jose.RS256, i.rsa, "r1", with(c, "aud", []string{"x", audience})),
		"fraction":    sign(t, jose.RS256, i.rsa, "r1", with(c, "exp", float64(clk.now().Unix())+100.5)),
		"just within": sign(t, jose.RS256, i.rsa, "r1", with(c, "exp", clk.now().Add(-Leeway+time.Second).Unix())),
		"early":       sign(t, jose.RS256, i.rsa, "r1", with(c, "nbf", clk.now().Add(Leeway).Unix())),
	} {
		s, err := v.Verify(context.Background(), token)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if s.ID() != "ci/repo:acme/shop:ref:refs/heads/main" || s.Kind != policy.Workload || s.Issuer != i.srv.URL || s.TokenID != "j1" {
			t.Errorf("%s: %+v", name, s)
		}
		// The reserved group of the token's own claim is not there.
		if !slices.Equal(s.Groups, []string{"ci-jobs", "migrators", "ops"}) {
			t.Errorf("%s: groups %q", name, s.Groups)
		}
		want := map[string]any{"repository": "acme/shop", "run_id": int64(42), "protected": true, "labels": []string{"a", "b"}}
		if fmt.Sprint(s.Claims) != fmt.Sprint(want) {
			t.Errorf("%s: claims %v", name, s.Claims)
		}
		if !slices.Equal(s.Persons, []string{"alice", "bob"}) {
			t.Errorf("%s: persons %q", name, s.Persons)
		}
		if !s.IssuedAt.Equal(clk.now()) {
			t.Errorf("%s: iat %v", name, s.IssuedAt)
		}
	}
	if n := i.fetches.Load(); n != 1 {
		t.Errorf("%d fetches", n)
	}
	// Without jti the id is a digest that does not cover the signature.
	a, err := v.Verify(context.Background(), sign(t, jose.ES256, i.ec, "e1", with(c, "jti", nil)))
	if err != nil {
		t.Fatal(err)
	}
	b, _ := v.Verify(context.Background(), sign(t, jose.ES256, i.ec, "e1", with(c, "jti", nil)))
	if a.TokenID != b.TokenID || !strings.HasPrefix(a.TokenID, "sha256:") {
		t.Errorf("token ids %q %q", a.TokenID, b.TokenID)
	}
}

func TestVerifyRefuses(t *testing.T) {
	i, clk := newIssuer(t), newClock()
	v := mustVerifier(t, clk, false, i.config())
	now := clk.now()
	c := claimsAt(now, i.srv.URL)
	good := sign(t, jose.RS256, i.rsa, "r1", c)
	parts := strings.Split(good, ".")
	other, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	rs := func(kv ...any) string { return sign(t, jose.RS256, i.rsa, "r1", with(c, kv...)) }
	evil := "evil\x1b[31m\u202e" + strings.Repeat("x", 500)
	for _, tc := range []struct{ name, token, code, says string }{
		{"empty", "", "no-token", "PGPASSWORD"},
		{"password", "hunter2", "malformed-token", "3"},
		{"huge", strings.Repeat("a", MaxTokenBytes+1), "malformed-token", "larger"},
		{"cut header", good[1:], "malformed-token", "header"},
		{"five parts", "a.b.c.d.e", "malformed-token", ""},
		{"not json", raw(`{"alg":"RS256"}`, "x", "AAAA"), "malformed-token", "JSON"},
		{"json serialization", `{"payload":"` + parts[1] + `"}`, "malformed-token", ""},
		{"alg none", raw(`{"alg":"none"}`, c, ""), "unsigned-token", "not signed"},
		{"alg nOnE with signature", raw(`{"alg":"nOnE"}`, c, parts[2]), "unsigned-token", ""},
		{"no alg", raw(`{}`, c, parts[2]), "unsigned-token", ""},
		{"signature cut off", parts[0] + "." + parts[1] + ".", "unsigned-token", ""},
		{"HS256 with the public key", sign(t, jose.HS256, i.rsa.N.Bytes(), "r1", c), "unsigned-token", "HS256"},
		{"RS512 not allowed", sign(t, jose.RS512, i.rsa, "r1", c), "unsigned-token", "RS512"},
		{"crit", raw(`{"alg":"RS256","crit":["b64"],"b64":false}`, c, parts[2]), "malformed-token", "crit"},
		{"unknown issuer", rs("iss", "https://evil.example.com"), "unknown-issuer", "evil.example.com"},
		{"issuer with slash", rs("iss", i.srv.URL+"/"), "unknown-issuer", ""},
		{"no issuer", rs("iss", nil), "unknown-issuer", ""},
		{"issuer a list", rs("iss", []string{i.srv.URL}), "unknown-issuer", ""},
		{"escaped and cut", rs("iss", evil), "unknown-issuer", `evil\x1b[31m\u202e`},
		{"changed claims", parts[0] + "." + strings.Split(raw("", with(c, "sub", "root"), ""), ".")[1] + "." + parts[2], "bad-signature", ""},
		{"other key, our key id", sign(t, jose.ES256, other, "e1", c), "bad-signature", ""},
		{"wrong audience", rs("aud", "other"), "wrong-audience", `"other", not for "` + audience + `"`},
		{"audience prefix", rs("aud", audience+".evil"), "wrong-audience", ""},
		{"no audience", rs("aud", nil), "wrong-audience", "no audience"},
		{"expired", rs("exp", now.Add(-Leeway).Unix()), "expired", "1m0s ago"},
		{"no exp", rs("exp", nil), "malformed-token", "exp"},
		{"exp a string", rs("exp", "9999999999"), "malformed-token", "exp"},
		{"exp too far", rs("exp", 1e300), "malformed-token", "exp"},
		{"no iat", rs("iat", nil), "malformed-token", "iat"},
		{"not yet", rs("nbf", now.Add(Leeway+time.Second).Unix()), "not-yet-valid", "clocks"},
		{"issued in the future", rs("iat", now.Add(time.Hour).Unix()), "not-yet-valid", ""},
		{"no tenant", rs("repository_owner", nil), "missing-tenant", "repository_owner"},
		{"tenant an object", rs("repository_owner", map[string]any{"a": "acme"}), "missing-tenant", ""},
		{"wrong tenant", rs("repository_owner", "umbrella"), "wrong-tenant", "umbrella"},
		{"tenant case", rs("repository_owner", "ACME"), "wrong-tenant", ""},
		{"no sub", rs("sub", nil), "malformed-token", "sub"},
		{"sub with control", rs("sub", "a\nb"), "malformed-token", "sub"},
		{"trial token", rs(DevClaim, true), "unknown-issuer", "--dev"},
		{"trial token says false", rs(DevClaim, false), "unknown-issuer", "--dev"},
	} {
		s, err := v.Verify(context.Background(), tc.token)
		if err == nil {
			t.Errorf("%s: accepted as %v", tc.name, s)
			continue
		}
		reason := wantCode(t, err, tc.code)
		if !strings.Contains(reason, tc.says) {
			t.Errorf("%s: %q does not say %q", tc.name, reason, tc.says)
		}
		if len(reason) > 600 || strings.ContainsAny(reason, "\x1b\n\u202e") || len(tc.token) > 40 && strings.Contains(reason, tc.token[:40]) {
			t.Errorf("%s: reason shows too much: %q", tc.name, reason)
		}
	}
	many := make([]string, maxGroups+1)
	for n := range many {
		many[n] = fmt.Sprint("g", n)
	}
	_, err := v.Verify(context.Background(), rs("realm_access", map[string]any{"roles": many}))
	wantCode(t, err, "malformed-token")
}

// Two tenants of one issuer are two providers; the better refusal wins.
func TestSharedIssuer(t *testing.T) {
	i, clk := newIssuer(t), newClock()
	a, b := i.config(), i.config()
	b.Name, b.Require = "ci-labs", map[string][]string{"repository_owner": {"labs"}}
	a.Audience = "only-a"
	v := mustVerifier(t, clk, false, a, b)
	c := claimsAt(clk.now(), i.srv.URL)
	s, err := v.Verify(context.Background(), sign(t, jose.RS256, i.rsa, "r1", with(c, "repository_owner", "labs")))
	if err != nil || s.Provider != "ci-labs" {
		t.Errorf("%v %v", s, err)
	}
	_, err = v.Verify(context.Background(), sign(t, jose.RS256, i.rsa, "r1", with(c, "repository_owner", "umbrella")))
	wantCode(t, err, "wrong-tenant")
	if n := i.fetches.Load(); n != 1 {
		t.Errorf("%d fetches for one issuer", n)
	}
}

// Random key ids cost the issuer one request per interval, whoever sends how many.
func TestRandomKeyIDs(t *testing.T) {
	i, clk := newIssuer(t), newClock()
	v := mustVerifier(t, clk, false, i.config())
	c := claimsAt(clk.now(), i.srv.URL)
	other, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	var wg sync.WaitGroup
	for n := range 20 {
		wg.Go(func() {
			_, err := v.Verify(context.Background(), sign(t, jose.ES256, other, fmt.Sprint("k", n), c))
			wantCode(t, err, "bad-signature")
		})
	}
	wg.Wait()
	if n := i.fetches.Load(); n != 1 {
		t.Errorf("%d fetches, want 1", n)
	}
	// A bad signature under a known key id never fetches.
	clk.add(minInterval)
	for range 5 {
		_, err := v.Verify(context.Background(), sign(t, jose.ES256, other, "e1", c))
		wantCode(t, err, "bad-signature")
	}
	if n := i.fetches.Load(); n != 1 {
		t.Errorf("%d fetches, want 1", n)
	}
	// A new key is found once the interval has passed.
	i.set(func() { i.keys = append(i.keys, jose.JSONWebKey{Key: &other.PublicKey, KeyID: "new", Use: "sig"}) })
	if _, err := v.Verify(context.Background(), sign(t, jose.ES256, other, "new", c)); err != nil {
		t.Error(err)
	}
	if n := i.fetches.Load(); n != 2 {
		t.Errorf("%d fetches, want 2", n)
	}
}

func TestIssuerDown(t *testing.T) {
	i, clk := newIssuer(t), newClock()
	v := mustVerifier(t, clk, false, i.config())
	token := func() string { return sign(t, jose.RS256, i.rsa, "r1", claimsAt(clk.now(), i.srv.URL)) }
	i.set(func() { i.down = true })
	for range 3 {
		_, err := v.Verify(context.Background(), token())
		if reason := wantCode(t, err, "issuer-unavailable"); strings.Contains(reason, "internals") {
			t.Error(reason)
		}
	}
	i.set(func() { i.down = false })
	// Not asked again before the interval is over.
	_, err := v.Verify(context.Background(), token())
	wantCode(t, err, "issuer-unavailable")
	clk.add(minInterval)
	if _, err := v.Verify(context.Background(), token()); err != nil {
		t.Fatal(err)
	}
	// Fetched keys outlive an outage, up to the limit.
	i.set(func() { i.down = true })
	for clkAge := time.Duration(0); clkAge < maxStale-time.Hour; clkAge += time.Hour {
		clk.add(time.Hour)
		if _, err := v.Verify(context.Background(), token()); err != nil {
			t.Fatalf("after %v: %v", clkAge, err)
		}
	}
	clk.add(time.Hour)
	_, err = v.Verify(context.Background(), token())
	wantCode(t, err, "issuer-unavailable")
}

// A key the issuer withdraws stops working after refreshAfter.
func TestWithdrawnKey(t *testing.T) {
	i, clk := newIssuer(t), newClock()
	v := mustVerifier(t, clk, false, i.config())
	token := func() string { return sign(t, jose.RS256, i.rsa, "r1", claimsAt(clk.now(), i.srv.URL)) }
	if _, err := v.Verify(context.Background(), token()); err != nil {
		t.Fatal(err)
	}
	i.set(func() { i.keys = i.keys[1:] })
	clk.add(refreshAfter)
	_, err := v.Verify(context.Background(), token())
	wantCode(t, err, "bad-signature")
}

func TestHostileIssuer(t *testing.T) {
	weak, _ := rsa.GenerateKey(rand.Reader, 1024)
	for name, f := range map[string]func(*testIssuer){
		"keys too large":     func(i *testIssuer) { i.rawKeys = []byte(`{"keys":[]}` + strings.Repeat(" ", maxDocument)) },
		"not json":           func(i *testIssuer) { i.rawKeys = []byte("<html>") },
		"no keys":            func(i *testIssuer) { i.rawKeys = []byte(`{"keys":[]}`) },
		"too many keys":      func(i *testIssuer) { i.rawKeys = []byte(`{"keys":[` + strings.Repeat("{},", maxKeys) + `{}]}`) },
		"symmetric":          func(i *testIssuer) { i.rawKeys = []byte(`{"keys":[{"kty":"oct","k":"AAAA","kid":"r1"}]}`) },
		"weak":               func(i *testIssuer) { i.keys = []jose.JSONWebKey{{Key: &weak.PublicKey, KeyID: "r1"}} },
		"for encryption":     func(i *testIssuer) { i.keys[0].Use, i.keys[1].Use = "enc", "enc" },
		"plain http":         func(i *testIssuer) { i.docs = map[string]any{"jwks_uri": "http://127.0.0.1:1/jwks"} },
		"other issuer":       func(i *testIssuer) { i.docs = map[string]any{"issuer": "https://other.example.com"} },
		"discovery is large": func(i *testIssuer) { i.docs = map[string]any{"x": strings.Repeat("x", maxDocument)} },
		"redirect":           func(i *testIssuer) { i.docs = map[string]any{"jwks_uri": i.srv.URL + "/redirected"} },
		"trial issuer":       func(i *testIssuer) { i.docs = map[string]any{DevClaim: true} },
	} {
		i, clk := newIssuer(t), newClock()
		i.set(func() { f(i) })
		v := mustVerifier(t, clk, false, i.config())
		_, err := v.Verify(context.Background(), sign(t, jose.RS256, i.rsa, "r1", claimsAt(clk.now(), i.srv.URL)))
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		wantCode(t, err, "issuer-unavailable")
	}
	// An authority that is not the provider's is not believed.
	i, clk := newIssuer(t), newClock()
	cfg := i.config()
	cfg.CA = nil
	v := mustVerifier(t, clk, false, cfg)
	_, err := v.Verify(context.Background(), sign(t, jose.RS256, i.rsa, "r1", claimsAt(clk.now(), i.srv.URL)))
	wantCode(t, err, "issuer-unavailable")
}

func TestUpdateKeepsKeys(t *testing.T) {
	i, clk := newIssuer(t), newClock()
	v := mustVerifier(t, clk, false, i.config())
	token := sign(t, jose.RS256, i.rsa, "r1", claimsAt(clk.now(), i.srv.URL))
	if _, err := v.Verify(context.Background(), token); err != nil {
		t.Fatal(err)
	}
	cfg := i.config()
	cfg.Name = "renamed"
	if err := v.Update([]ProviderConfig{cfg}); err != nil {
		t.Fatal(err)
	}
	if s, err := v.Verify(context.Background(), token); err != nil || s.Provider != "renamed" {
		t.Errorf("%v %v", s, err)
	}
	if n := i.fetches.Load(); n != 1 {
		t.Errorf("%d fetches", n)
	}
	bad := cfg
	bad.Audience = ""
	if err := v.Update([]ProviderConfig{bad}); err == nil {
		t.Error("invalid provider accepted")
	}
	if _, err := v.Verify(context.Background(), token); err != nil {
		t.Errorf("a refused update changed something: %v", err)
	}
	if err := v.Update(nil); err != nil {
		t.Fatal(err)
	}
	_, err := v.Verify(context.Background(), token)
	wantCode(t, err, "unknown-issuer")
}

func TestValidate(t *testing.T) {
	good := ProviderConfig{Name: "ci", Issuer: "https://ci.example.com", Audience: "a", Kind: policy.User}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(*ProviderConfig){
		"no name":       func(p *ProviderConfig) { p.Name = "" },
		"slash":         func(p *ProviderConfig) { p.Name = "a/b" },
		"reserved":      func(p *ProviderConfig) { p.Name = BootstrapProvider },
		"http":          func(p *ProviderConfig) { p.Issuer = "http://ci.example.com" },
		"query":         func(p *ProviderConfig) { p.Issuer += "?x" },
		"no audience":   func(p *ProviderConfig) { p.Audience = "" },
		"kind":          func(p *ProviderConfig) { p.Kind = "Robot" },
		"HS256":         func(p *ProviderConfig) { p.Algorithms = []string{"HS256"} },
		"none":          func(p *ProviderConfig) { p.Algorithms = []string{"none"} },
		"CA":            func(p *ProviderConfig) { p.CA = []byte("x") },
		"empty tenant":  func(p *ProviderConfig) { p.Require = map[string][]string{"org": {}} },
		"empty value":   func(p *ProviderConfig) { p.Require = map[string][]string{"org": {""}} },
		"rule for all":  func(p *ProviderConfig) { p.GroupRules = []GroupRule{{Groups: []string{"g"}}} },
		"rule for none": func(p *ProviderConfig) { p.GroupRules = []GroupRule{{When: map[string][]string{"a": {"b"}}}} },
	} {
		p := good
		f(&p)
		if p.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := NewVerifier([]ProviderConfig{good, good}, Options{}); err == nil {
		t.Error("the same provider twice was accepted")
	}
}

func TestMatch(t *testing.T) {
	for _, tc := range []struct {
		pattern, s string
		want       bool
	}{
		{"", "", true}, {"a", "a", true}, {"a", "ab", false}, {"*", "", true}, {"*", "x", true}, {"a*", "abc", true}, {"a*", "ba", false},
		{"*c", "abc", true}, {"a*c", "ac", true}, {"a*a", "a", false}, {"a*b*c", "axxbyyc", true}, {"a*b*c", "acb", false}, {"a**b", "ab", true},
		{"refs/tags/*", "refs/heads/x", false}, {"*ab*ab", "ab", false}, {"*ab*ab", "abab", true},
	} {
		if match(tc.pattern, tc.s) != tc.want {
			t.Errorf("match(%q, %q) is not %v", tc.pattern, tc.s, tc.want)
		}
	}
}

func FuzzVerify(f *testing.F) {
	i, clk := newIssuer(f), newClock()
	v := mustVerifier(f, clk, false, i.config())
	c := claimsAt(clk.now(), i.srv.URL)
	good := sign(f, jose.RS256, i.rsa, "r1", c)
	f.Add(good)
	f.Add("")
	f.Add("a.b.c")
	f.Add(raw(`{"alg":"none"}`, c, ""))
	f.Fuzz(func(t *testing.T, token string) {
		s, err := v.Verify(context.Background(), token)
		// The last character of a signature has spare bits; what is signed has none.
		if err == nil && !strings.HasPrefix(token, good[:strings.LastIndexByte(good, '.')+1]) {
			t.Fatalf("a token nobody signed is %v", s)
		}
		var ae *protocols.AuthError
		if err != nil && (!errors.As(err, &ae) || !printable(ae.Reason)) {
			t.Fatalf("%#v", err)
		}
	})
}

package chaos

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/node/devissuer"
)

// testTokens presents tokens that are not good, at the database's port and at
// the API. Each is refused in its own words and recorded by the node that did.
func testTokens(t *testing.T, s *suite) {
	good := s.job(t, "good", "main", nil)
	issuer := issuerOf(t, good)
	stranger, err := devissuer.Create(t.TempDir(), "127.0.0.1:9")
	s.must(t, err)
	// Claims to be the configured issuer, and has other keys.
	u, err := url.Parse(issuer)
	s.must(t, err)
	impostor, err := devissuer.Create(t.TempDir(), u.Host)
	s.must(t, err)
	mint := func(i *devissuer.Issuer, alg string, change map[string]any) string {
		claims := map[string]any{
			"sub": "repo:acme/shop:job:bad", "aud": cluster.AudienceCI, "exp": time.Now().Add(time.Hour).Unix(),
			"repository": "acme/shop", "repository_owner": "acme", "ref": "refs/heads/main",
		}
		for k, v := range change {
			claims[k] = v
		}
		token, err := i.Mint(alg, claims)
		s.must(t, err)
		return s.remember(token)
	}
	unsigned := mint(impostor, devissuer.AlgNone, nil)
	parts := strings.Split(good, ".")
	forgedClaims := strings.Replace(decode(t, parts[1]), "acme/shop:job:good", "acme/shop:job:evil", 1)
	altered := parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(forgedClaims)) + "." + parts[2]

	bad := []struct {
		name, token, code string
		has               []string
	}{
		{"wrong audience", s.job(t, "bad", "main", map[string]any{"aud": "another-service"}), "wrong-audience", []string{"another-service", cluster.AudienceCI}},
		{"no audience", s.job(t, "bad", "main", map[string]any{"aud": nil}), "wrong-audience", []string{"no audience", cluster.AudienceCI}},
		{"expired", s.job(t, "bad", "main", map[string]any{"iat": time.Now().Add(-2 * time.Hour).Unix(), "nbf": time.Now().Add(-2 * time.Hour).Unix(), "exp": time.Now().Add(-time.Hour).Unix()}), "expired", []string{"expired at", "get a new one"}},
		{"not yet valid", s.job(t, "bad", "main", map[string]any{"nbf": time.Now().Add(time.Hour).Unix(), "exp": time.Now().Add(2 * time.Hour).Unix()}), "not-yet-valid", []string{"valid from"}},
		{"unsigned", unsigned, "unsigned-token", []string{"not signed"}},
		{"signature taken off", parts[0] + "." + parts[1] + ".", "unsigned-token", []string{"not signed"}},
		{"other issuer", mint(stranger, devissuer.ES256, nil), "unknown-issuer", []string{"https://127.0.0.1:9"}},
		{"keys not the issuer's", mint(impostor, devissuer.ES256, nil), "bad-signature", []string{"key"}},
		{"claims altered", altered, "bad-signature", []string{"signature"}},
		{"no tenant", s.job(t, "bad", "main", map[string]any{"repository_owner": nil}), "missing-tenant", []string{"repository_owner"}},
		{"other tenant", s.job(t, "bad", "main", map[string]any{"repository_owner": "mallory"}), "wrong-tenant", []string{"repository_owner", "mallory"}},
		{"no token", "correct horse battery staple", "malformed-token", []string{"not a signed OIDC token"}},
	}
	words := map[string]string{} // what is said, and for which code
	for i, b := range bad {
		n := s.Nodes[i%len(s.Nodes)]
		t.Run(b.name, func(t *testing.T) {
			out, err := n.PSQL(t.Context(), "bench", b.token, "SELECT 'let in'")
			if err == nil || strings.Contains(out, "let in") {
				t.Fatalf("let in: %s", out)
			}
			if want := "(" + b.code + ")"; !strings.Contains(out, want) {
				t.Errorf("psql does not show %s: %s", want, out)
			}
			for _, h := range b.has {
				if !strings.Contains(out, h) {
					t.Errorf("psql does not show %q: %s", h, out)
				}
			}
			_, said, _ := strings.Cut(out, "FATAL")
			_, said, _ = strings.Cut(said, "): ")
			if other := words[said]; said == "" || other != "" && other != b.code {
				t.Errorf("%s is refused in the words of %q: %s", b.code, other, out)
			}
			words[said] = b.code
			if b.code == "malformed-token" {
				return
			}
			s.cliRefused(t, on(n, s.TokenEnv(b.token)), []string{"whoami"}, b.has...)
		})
	}
	t.Run("recorded", func(t *testing.T) {
		eventually(t, 20*time.Second, func() string {
			missing := map[string]bool{}
			for _, b := range bad {
				missing[b.code] = true
			}
			for _, e := range s.ownEntries(t) {
				if e.Effect == "refuse" && missing[e.Rule] && e.Reason != "" && e.Detail["client"] != "" {
					delete(missing, e.Rule)
				}
			}
			if len(missing) > 0 {
				return fmt.Sprintf("no node's own recording has refusals %v", missing)
			}
			return ""
		})
	})

	// The same job with a good token, so that what is refused above is so for its reason.
	t.Run("good", func(t *testing.T) {
		for _, n := range s.Nodes {
			if out, err := n.PSQL(t.Context(), "bench", good, "SELECT 'let in'"); err != nil || !strings.Contains(out, "let in") {
				t.Errorf("%s: %v: %s", n.Name, err, out)
			}
		}
	})

	// Good for jobs is not good for people, and the other way round.
	t.Run("other provider", func(t *testing.T) {
		_, err := s.tryLogin(t, s.Nodes[0], "bench", s.person(t, "robin", "dba"), nil)
		refused(t, err, "28000", "connect")
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if out, err := s.CLI(ctx, append(s.TokenEnv(good), "TARGET_PASSWORD=x"), "apply", "-f", s.ConfigDir, "--dev", "--yes"); err == nil || !strings.Contains(err.Error(), "admin:apply") {
			t.Errorf("a job applied a configuration: %v\n%s", err, out)
		}
	})
}

func decode(t *testing.T, part string) string {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func issuerOf(t *testing.T, token string) string {
	t.Helper()
	var claims struct {
		Iss string `json:"iss"`
	}
	if err := json.Unmarshal([]byte(decode(t, strings.Split(token, ".")[1])), &claims); err != nil {
		t.Fatal(err)
	}
	return claims.Iss
}

package devissuer

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
)

func mustServe(t *testing.T) *Issuer {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	free.Close()
	i, err := Create(filepath.Join(t.TempDir(), "issuer"), addr)
	if err != nil {
		t.Fatal(err)
	}
	l, err := i.Listen()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return i
}

func verifier(t *testing.T, i *Issuer, dev, providerDev bool) *identity.Verifier {
	t.Helper()
	ca, err := os.ReadFile(i.CAPath())
	if err != nil {
		t.Fatal(err)
	}
	v, err := identity.NewVerifier([]identity.ProviderConfig{{
		Name: "dev", Issuer: i.URL(), Audience: "sallyport", Kind: policy.Workload, CA: ca, Dev: providerDev,
	}}, identity.Options{Dev: dev})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestMintAndVerify(t *testing.T) {
	i := mustServe(t)
	// Minted by another process that only has the directory.
	offline, err := Open(i.dir)
	if err != nil {
		t.Fatal(err)
	}
	v := verifier(t, i, true, true)
	for _, alg := range []string{RS256, ES256} {
		token, err := offline.Mint(alg, map[string]any{"aud": "sallyport", "sub": "repo:acme/shop"})
		if err != nil {
			t.Fatal(err)
		}
		s, err := v.Verify(context.Background(), token)
		if err != nil || s.ID() != "dev/repo:acme/shop" {
			t.Fatalf("%s: %v %v", alg, s, err)
		}
		// Nodes not started with --dev refuse it, whatever the configuration
		// says, and whatever claims were asked for.
		for _, providerDev := range []bool{true, false} {
			for _, mark := range []any{nil, false, true} {
				token, _ := offline.Mint(alg, map[string]any{"aud": "sallyport", identity.DevClaim: mark})
				_, err = verifier(t, i, false, providerDev).Verify(context.Background(), token)
				wantCode(t, err, "unknown-issuer")
			}
		}
	}
	for _, tc := range []struct {
		alg    string
		claims map[string]any
		code   string
	}{
		{AlgNone, map[string]any{"aud": "sallyport"}, "unsigned-token"},
		{RS256, map[string]any{"aud": "other"}, "wrong-audience"},
		{RS256, map[string]any{"aud": "sallyport", "exp": time.Now().Add(-time.Hour).Unix()}, "expired"},
		{RS256, map[string]any{"aud": "sallyport", "iss": "https://elsewhere.example.com"}, "unknown-issuer"},
		{RS256, map[string]any{"aud": "sallyport", "iat": nil}, "malformed-token"},
	} {
		token, err := i.Mint(tc.alg, tc.claims)
		if err != nil {
			t.Fatal(err)
		}
		_, err = v.Verify(context.Background(), token)
		wantCode(t, err, tc.code)
	}
	if _, err := i.Mint("HS256", nil); err == nil {
		t.Error("HS256 minted")
	}
}

func TestKeysPersist(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "i")
	a, err := Create(dir, "127.0.0.1:7001")
	if err != nil {
		t.Fatal(err)
	}
	b, err := Create(dir, "localhost:7002")
	if err != nil {
		t.Fatal(err)
	}
	if !a.ec.Equal(b.ec) || !a.rsa.Equal(b.rsa) || b.URL() != "https://localhost:7002" {
		t.Error("keys or URL")
	}
	files, _ := os.ReadDir(dir)
	for _, f := range files {
		if fi, _ := f.Info(); fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v", f.Name(), fi.Mode())
		}
	}
	if _, err := Open(t.TempDir()); err == nil {
		t.Error("opened an empty directory")
	}
}

func TestLoopbackOnly(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:7001", ":7001", "[::]:7001", "10.1.2.3:7001", "example.com:7001", "127.0.0.1:0", "127.0.0.1"} {
		if _, err := Create(t.TempDir(), addr); err == nil {
			t.Errorf("%s accepted", addr)
		}
	}
	// Nor by editing the file, nor through a listener made elsewhere.
	i, err := Create(t.TempDir(), "127.0.0.1:7001")
	if err != nil {
		t.Fatal(err)
	}
	i.url = "https://0.0.0.0:7001"
	if _, err := i.Listen(); err == nil {
		t.Error("bound all interfaces")
	}
	if err := i.Serve(context.Background(), fakeListener{}); err == nil {
		t.Error("served on a listener that is not loopback")
	}
}

type fakeListener struct{}

func (fakeListener) Accept() (net.Conn, error) { return nil, errors.New("closed") }
func (fakeListener) Close() error              { return nil }
func (fakeListener) Addr() net.Addr            { return &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 1} }

func TestNoMintingEndpoint(t *testing.T) {
	i := mustServe(t)
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: 5 * time.Second}
	defer c.CloseIdleConnections()
	for _, path := range []string{"/not-offered", "/token", "/"} {
		resp, err := c.Get(i.URL() + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %d", path, resp.StatusCode)
		}
	}
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	var ae *protocols.AuthError
	if !errors.As(err, &ae) || ae.Code != code {
		t.Errorf("got %v, want %s", err, code)
	}
}

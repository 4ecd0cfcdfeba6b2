// Package devissuer is a small OIDC issuer for trials on one machine: it
// stands in for a CI platform, so that Sallyport can be tried without one.
//
// It mints whatever claims it is asked for, so it is worth nothing as proof.
// Hence it binds to loopback only, every token it mints and its discovery
// document carry the mark sallyport_dev, and nodes not started with --dev
// refuse both (see node/identity). Keys live in a directory, so that tokens
// can be minted by a command while another process serves the keys; there is
// no minting over the network.
package devissuer

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/node/pki"
)

// Files in an issuer's directory.
const (
	CAFile     = "ca.pem" // trust this for the issuer's HTTPS
	urlFile    = "issuer.url"
	tlsFile    = "tls.pem"
	tlsKeyFile = "tls-key.pem"
	rsaFile    = "rs256.pem"
	ecFile     = "es256.pem"
)

// DefaultLifetime of a minted token.
const DefaultLifetime = 15 * time.Minute

const keysPath = "/keys"

// Issuer is a trial issuer. Mint and Serve may be called concurrently.
type Issuer struct {
	url  string
	dir  string
	rsa  *rsa.PrivateKey
	ec   *ecdsa.PrivateKey
	cert tls.Certificate
}

// Create makes an issuer in dir, to be served at addr (a loopback address with
// its port), or opens the one that is there; its keys are then kept, its
// address becomes addr.
func Create(dir, addr string) (*Issuer, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("devissuer: address %q: %w", addr, err)
	}
	if err := checkLoopback(host); err != nil {
		return nil, err
	}
	if port == "" || port == "0" {
		return nil, errors.New("devissuer: name a port: it becomes part of the issuer's URL")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// The URL is written last: a directory without it is not complete and is made anew.
	if _, err := os.Stat(filepath.Join(dir, urlFile)); errors.Is(err, fs.ErrNotExist) {
		if err := makeKeys(dir); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	url := "https://" + net.JoinHostPort(host, port)
	if err := pki.WriteFile(filepath.Join(dir, urlFile), []byte(url+"\n")); err != nil {
		return nil, err
	}
	return Open(dir)
}

// Open loads an issuer made by Create, to mint or to serve.
func Open(dir string) (*Issuer, error) {
	url, err := os.ReadFile(filepath.Join(dir, urlFile))
	if err != nil {
		return nil, fmt.Errorf("devissuer: no issuer in %s: %w", dir, err)
	}
	i := &Issuer{url: strings.TrimSpace(string(url)), dir: dir}
	if i.rsa, err = loadRSA(filepath.Join(dir, rsaFile)); err != nil {
		return nil, err
	}
	if i.ec, err = pki.LoadKey(filepath.Join(dir, ecFile)); err != nil {
		return nil, err
	}
	tlsKey, err := pki.LoadKey(filepath.Join(dir, tlsKeyFile))
	if err != nil {
		return nil, err
	}
	tlsCert, err := pki.LoadCert(filepath.Join(dir, tlsFile))
	if err != nil {
		return nil, err
	}
	i.cert = tls.Certificate{Certificate: [][]byte{tlsCert.Raw}, PrivateKey: tlsKey}
	return i, nil
}

func makeKeys(dir string) error {
	now := time.Now()
	ca, err := pki.NewCA("dev-issuer", now)
	if err != nil {
		return err
	}
	sans, err := pki.ParseSANs(nil, true)
	if err != nil {
		return err
	}
	tlsKey, err := pki.NewNodeKey()
	if err != nil {
		return err
	}
	csr, err := pki.CSR(tlsKey)
	if err != nil {
		return err
	}
	// The CA key is thrown away: nothing else will ever be signed with it.
	cert, err := ca.SignNode(csr, "dev-issuer", pki.Gateway, "dev-issuer", sans, now)
	if err != nil {
		return err
	}
	ec, err := pki.NewNodeKey()
	if err != nil {
		return err
	}
	rk, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	rsaDER, err := x509.MarshalPKCS8PrivateKey(rk)
	if err != nil {
		return err
	}
	return errors.Join(
		pki.SaveCert(filepath.Join(dir, CAFile), ca.Cert.Raw),
		pki.SaveCert(filepath.Join(dir, tlsFile), cert),
		pki.SaveKey(filepath.Join(dir, tlsKeyFile), tlsKey),
		pki.SaveKey(filepath.Join(dir, ecFile), ec),
		pki.WriteFile(filepath.Join(dir, rsaFile), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: rsaDER})),
	)
}

func loadRSA(path string) (*rsa.PrivateKey, error) {
	if err := pki.CheckPrivate(path); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("devissuer: %s holds no key", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("devissuer: %s: %w", path, err)
	}
	key, ok := k.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("devissuer: %s holds no RSA key", path)
	}
	return key, nil
}

// URL is the issuer, as `iss` and a provider's configuration name it.
func (i *Issuer) URL() string { return i.url }

// CAPath is the file with the CA to trust for URL.
func (i *Issuer) CAPath() string { return filepath.Join(i.dir, CAFile) }

// Algorithms that Mint knows. AlgNone makes an unsigned token, to see it refused.
const (
	RS256   = "RS256"
	ES256   = "ES256"
	AlgNone = "none"
)

// Mint makes a token signed with alg. claims are added to iss, sub ("dev"),
// iat, nbf, exp (DefaultLifetime) and jti and replace them; one that is nil is
// left out. The mark sallyport_dev is always there.
func (i *Issuer) Mint(alg string, claims map[string]any) (string, error) {
	now := time.Now()
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return "", err
	}
	all := map[string]any{
		"iss": i.url, "sub": "dev", "jti": hex.EncodeToString(id),
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(DefaultLifetime).Unix(),
	}
	maps.Copy(all, claims)
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	all[identity.DevClaim] = true
	payload, err := json.Marshal(all)
	if err != nil {
		return "", fmt.Errorf("devissuer: claims: %w", err)
	}
	key := jose.SigningKey{Algorithm: jose.SignatureAlgorithm(alg)}
	switch alg {
	case RS256:
		key.Key = jose.JSONWebKey{Key: i.rsa, KeyID: kid(&i.rsa.PublicKey)}
	case ES256:
		key.Key = jose.JSONWebKey{Key: i.ec, KeyID: kid(&i.ec.PublicKey)}
	case AlgNone:
		enc := base64.RawURLEncoding
		return enc.EncodeToString([]byte(`{"alg":"none","typ":"JWT"}`)) + "." + enc.EncodeToString(payload) + ".", nil
	default:
		return "", fmt.Errorf("devissuer: algorithm %q is none of %s, %s, %s", alg, RS256, ES256, AlgNone)
	}
	signer, err := jose.NewSigner(key, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", err
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		return "", err
	}
	return jws.CompactSerialize()
}

// kid names a key by the beginning of its digest, so that minting and
// serving processes agree on it.
func kid(pub any) string {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		panic("devissuer: a public key of ours cannot be encoded: " + err.Error())
	}
	return pki.Fingerprint(der)[:16]
}

// Handler serves discovery and keys.
func (i *Issuer) Handler() http.Handler {
	keys := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: &i.rsa.PublicKey, KeyID: kid(&i.rsa.PublicKey), Algorithm: RS256, Use: "sig"},
		{Key: &i.ec.PublicKey, KeyID: kid(&i.ec.PublicKey), Algorithm: ES256, Use: "sig"},
	}}
	doc := map[string]any{
		"issuer": i.url, "jwks_uri": i.url + keysPath,
		"authorization_endpoint": i.url + "/not-offered", "token_endpoint": i.url + "/not-offered",
		"response_types_supported": []string{"id_token"}, "subject_types_supported": []string{"public"},
		"id_token_signing_alg_values_supported": []string{RS256, ES256},
		identity.DevClaim:                       true,
	}
	mux := http.NewServeMux()
	for path, v := range map[string]any{"/.well-known/openid-configuration": doc, keysPath: keys} {
		body, err := json.Marshal(v)
		if err != nil {
			panic("devissuer: a document of ours cannot be encoded: " + err.Error())
		}
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Write(body)
		})
	}
	return mux
}

// Listen binds the issuer's address, loopback only.
func (i *Issuer) Listen() (net.Listener, error) {
	addr := strings.TrimPrefix(i.url, "https://")
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("devissuer: issuer %q: %w", i.url, err)
	}
	if err := checkLoopback(host); err != nil {
		return nil, err
	}
	return net.Listen("tcp", addr)
}

// Serve answers on l, over TLS, until ctx ends. It closes l.
func (i *Issuer) Serve(ctx context.Context, l net.Listener) error {
	if a, ok := l.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
		l.Close()
		return fmt.Errorf("devissuer: %s is not loopback", l.Addr())
	}
	srv := &http.Server{
		Handler:           i.Handler(),
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{i.cert}, MinVersion: tls.VersionTLS12},
		ReadHeaderTimeout: 5 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    16 << 10,
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// checkLoopback takes addresses and "localhost", whose meaning is fixed (RFC 6761 §6.3).
func checkLoopback(host string) error {
	if ip := net.ParseIP(host); host == "localhost" || ip != nil && ip.IsLoopback() {
		return nil
	}
	return fmt.Errorf("devissuer: %q is not a loopback address; the trial issuer serves this machine only", host)
}

package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
)

const (
	// fetchTimeout bounds one refresh, discovery and keys together: a login waits for it.
	fetchTimeout = 5 * time.Second
	// maxDocument bounds each document of an issuer; real ones are below 50 KiB.
	maxDocument = 1 << 20
	// maxKeys bounds an issuer's keys; real ones have below 20.
	maxKeys = 100
	// minRSABits follows NIST SP 800-131A.
	minRSABits = 2048

	// refreshAfter is how old keys may grow before they are fetched again, so
	// that a key the issuer withdrew dies here too.
	refreshAfter = 15 * time.Minute
	// maxStale is how long fetched keys go on working while the issuer is
	// down: most outages are shorter, and whoever can cut us off from the
	// issuer must not keep a withdrawn key alive for days.
	maxStale = 6 * time.Hour
	// minInterval is the least time between two fetches from one issuer,
	// whatever tokens are presented: made-up key ids cannot make us hammer it.
	// A key the issuer introduced just after a fetch waits this long.
	minInterval = 10 * time.Second
	// maxBackoff is the longest wait after repeated failures.
	maxBackoff = 60 * time.Second
)

// keySet holds an issuer's keys. It is an oidc.KeySet.
type keySet struct {
	issuer string
	client *http.Client
	opts   Options

	mu struct {
		sync.Mutex
		keys     []jose.JSONWebKey
		fetched  time.Time     // of keys; zero before the first success
		tried    time.Time     // last attempt
		failures int           // since the last success
		err      error         // of the last attempt
		inflight chan struct{} // closed when the attempt under way ends; nil when none is
	}
}

func newKeySet(issuer string, ca []byte, opts Options) (*keySet, error) {
	tc := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(ca) > 0 {
		p, err := pool(ca)
		if err != nil {
			return nil, err
		}
		tc.RootCAs = p
	}
	return &keySet{
		issuer: issuer,
		opts:   opts,
		client: &http.Client{
			Timeout: fetchTimeout,
			Transport: bounded{&http.Transport{
				Proxy:                  http.ProxyFromEnvironment,
				TLSClientConfig:        tc,
				ForceAttemptHTTP2:      true,
				MaxResponseHeaderBytes: 64 << 10,
				MaxConnsPerHost:        2,
				IdleConnTimeout:        30 * time.Second,
			}},
			CheckRedirect: func(*http.Request, []*http.Request) error {
				return errors.New("the issuer answers with a redirect, which is not followed")
			},
		},
	}, nil
}

func pool(pem []byte) (*x509.CertPool, error) {
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(pem) {
		return nil, errors.New("ca holds no certificate in PEM form")
	}
	return p, nil
}

// VerifySignature implements oidc.KeySet. The caller has checked the algorithm.
func (k *keySet) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	payload, err := k.verify(ctx, token)
	if r, ok := ctx.Value(resultKey{}).(*error); ok {
		*r = err
	}
	return payload, err
}

func (k *keySet) verify(ctx context.Context, token string) ([]byte, error) {
	algs := make([]jose.SignatureAlgorithm, len(allowedAlgorithms))
	for i, a := range allowedAlgorithms {
		algs[i] = jose.SignatureAlgorithm(a)
	}
	jws, err := jose.ParseSignedCompact(token, algs)
	if err != nil || len(jws.Signatures) != 1 {
		return nil, refuse("malformed-token", "the token cannot be read; it may have been cut or changed on its way")
	}
	h := jws.Signatures[0].Header
	keys, err := k.find(ctx, h.KeyID, h.Algorithm)
	if err != nil {
		return nil, err
	}
	for i := range keys {
		if payload, err := jws.Verify(keys[i].Key); err == nil {
			return payload, nil
		}
	}
	return nil, refuse("bad-signature", "the token's signature does not match the keys of issuer %s; it was changed on its way or made by someone else", echo(k.issuer))
}

// find returns the keys a token with this key id and algorithm may be signed
// with, fetching when they are not known or old, within the limits above. Keys
// already known are used without waiting for anybody.
func (k *keySet) find(ctx context.Context, kid, alg string) ([]jose.JSONWebKey, error) {
	for waited := false; ; {
		k.mu.Lock()
		now := k.opts.Now()
		age := now.Sub(k.mu.fetched)
		have := !k.mu.fetched.IsZero() && age < maxStale
		var found []jose.JSONWebKey
		if have {
			found = candidates(k.mu.keys, kid, alg)
		}
		if len(found) > 0 && (age < refreshAfter || k.mu.inflight != nil || waited || !k.due(now)) {
			k.mu.Unlock()
			return found, nil
		}
		if wait := k.mu.inflight; wait != nil && !waited {
			k.mu.Unlock()
			select {
			case <-wait:
				waited = true
				continue
			case <-ctx.Done():
				return nil, k.unavailable()
			}
		}
		if waited || !k.due(now) {
			lastErr, next := k.mu.err, k.next().Sub(now)
			k.mu.Unlock()
			if !have || lastErr != nil {
				return nil, k.unavailable()
			}
			hint := ""
			if next > 0 {
				hint = fmt.Sprintf("; if the issuer has just changed its keys, try again in %d s", int(next.Seconds())+1)
			}
			return nil, refuse("bad-signature", "issuer %s has no %s key with the id %s that the token names%s", echo(k.issuer), echo(alg), echo(kid), hint)
		}
		done := make(chan struct{})
		k.mu.inflight, k.mu.tried = done, now
		k.mu.Unlock()

		keys, err := k.fetch(ctx)

		k.mu.Lock()
		k.mu.err = err
		if err == nil {
			k.mu.keys, k.mu.fetched, k.mu.failures = keys, k.opts.Now(), 0
		} else {
			k.mu.failures++
		}
		failures := k.mu.failures
		k.mu.inflight = nil
		close(done)
		k.mu.Unlock()
		if err != nil {
			k.opts.Log.Warn("issuer's keys could not be fetched", "issuer", k.issuer, "error", echo(err.Error()), "failures", failures)
		}
		waited = true
	}
}

// next is the earliest time of another fetch; due whether it has come. mu is held.
func (k *keySet) next() time.Time {
	if k.mu.tried.IsZero() {
		return time.Time{}
	}
	wait := minInterval << min(max(k.mu.failures-1, 0), 3)
	return k.mu.tried.Add(min(wait, maxBackoff))
}

func (k *keySet) due(now time.Time) bool { return !now.Before(k.next()) }

func (k *keySet) unavailable() error {
	return refuse("issuer-unavailable", "the signing keys of issuer %s cannot be fetched at the moment, so the token cannot be checked; try again shortly, and see the node's log for the cause", echo(k.issuer))
}

// candidates are the keys that fit; without a key id all of the algorithm do.
func candidates(keys []jose.JSONWebKey, kid, alg string) []jose.JSONWebKey {
	var out []jose.JSONWebKey
	for _, key := range keys {
		if (kid == "" || key.KeyID == kid) && (key.Algorithm == "" || key.Algorithm == alg) {
			out = append(out, key)
		}
	}
	return out
}

// fetch gets the issuer's keys. It goes on when the caller who happened to
// start it leaves, since others may wait for it.
func (k *keySet) fetch(ctx context.Context) ([]jose.JSONWebKey, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
	defer cancel()
	p, err := oidc.NewProvider(oidc.ClientContext(ctx, k.client), k.issuer)
	if err != nil {
		return nil, fmt.Errorf("discovery: %w", err)
	}
	var doc struct {
		JWKS string `json:"jwks_uri"`
		Dev  any    `json:"sallyport_dev"`
	}
	if err := p.Claims(&doc); err != nil {
		return nil, fmt.Errorf("discovery: %w", err)
	}
	if doc.Dev != nil && !k.opts.Dev {
		return nil, errors.New("this is the trial issuer (dev-issuer); only nodes started with --dev accept it")
	}
	if u, err := url.Parse(doc.JWKS); err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, errors.New("discovery: jwks_uri is not an https URL")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, doc.JWKS, nil)
	if err != nil {
		return nil, err
	}
	resp, err := k.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("keys: the issuer answers %d", resp.StatusCode)
	}
	body, err := io.ReadAll(resp.Body) // bounded by the transport
	if err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	return parseKeys(body)
}

// parseKeys reads a key set (RFC 7517 §5), leaving out keys we cannot or must
// not use: of unknown kinds, symmetric, for encryption, too weak.
func parseKeys(body []byte) ([]jose.JSONWebKey, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(body, &set); err != nil {
		return nil, errors.New("keys: not a JSON key set")
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("keys: %d keys; at most %d are taken", len(set.Keys), maxKeys)
	}
	var keys []jose.JSONWebKey
	for _, raw := range set.Keys {
		var key jose.JSONWebKey
		if json.Unmarshal(raw, &key) != nil || (key.Use != "" && key.Use != "sig") {
			continue
		}
		key = key.Public()
		switch pub := key.Key.(type) {
		case *rsa.PublicKey:
			if pub.N.BitLen() < minRSABits {
				continue
			}
		case *ecdsa.PublicKey, ed25519.PublicKey:
		default:
			continue
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, errors.New("keys: the issuer publishes no usable signing key")
	}
	return keys, nil
}

// bounded makes every response end with an error after maxDocument bytes.
type bounded struct{ rt *http.Transport }

func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" {
		return nil, errors.New("only https is spoken to issuers")
	}
	resp, err := b.rt.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	resp.Body = &boundedBody{resp.Body, maxDocument}
	return resp, nil
}

func (b bounded) CloseIdleConnections() { b.rt.CloseIdleConnections() }

type boundedBody struct {
	io.ReadCloser
	left int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if len(p) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if n > b.left {
		return 0, fmt.Errorf("the issuer's answer is larger than %d bytes", maxDocument)
	}
	b.left -= n
	return n, err
}

package identity

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/policy"
)

// Kinds of Proof.
const (
	Bearer      = "bearer"
	Certificate = "certificate"
)

const (
	// certScheme is the Authorization scheme of a signed request; its one
	// parameter is a Proof (without what the request itself says), JSON in base64url.
	certScheme = "Sallyport-Certificate"
	// signContext begins what is signed, so that a signature made for anything
	// else with the same key is none here.
	signContext = "sallyport request v1"

	// MaxSkew is how far a signed request's time may be from the verifier's.
	MaxSkew = 2 * time.Minute

	// maxNonces bounds a nonce cache: at 150 bytes each below 10 MiB, and 270
	// signed requests a second for the whole window, by certificate holders only.
	maxNonces = 64 << 10

	maxAuthorization = 32 << 10 // a token of MaxTokenBytes, or a certificate proof of about 2 KiB
	nonceBytes       = 16
)

// Proof is how a caller of the API showed who it is, in a form that another
// node can verify again itself. It is secret: whoever holds a bearer token can
// use it. Seal it before it is stored.
type Proof struct {
	Kind  string `json:"kind"`            // Bearer or Certificate
	Token string `json:"token,omitempty"` // Bearer: the OIDC token

	// The rest is for Certificate. What is signed is Method, Path, BodyHash,
	// Time, Nonce and Key: whoever verifies a stored Proof must check that Method,
	// Path and BodyHash are those of the act it is to prove.
	Method    string `json:"method,omitempty"`
	Path      string `json:"path,omitempty"` // with query
	BodyHash  []byte `json:"body_hash,omitempty"`
	Time      int64  `json:"time,omitempty"` // seconds since 1970
	Nonce     string `json:"nonce,omitempty"`
	Key       string `json:"key,omitempty"`  // the request's Idempotency-Key
	Cert      []byte `json:"cert,omitempty"` // DER
	Signature []byte `json:"signature,omitempty"`
}

// String keeps a Proof out of logs; encoding it for the wire or for sealing is
// json.Marshal's work.
func (p Proof) String() string   { return "[proof: " + p.Kind + "]" }
func (p Proof) GoString() string { return p.String() }

// SignRequest signs req, which carries body, with an administrator's
// certificate (DER) and key, and attaches the proof to it. Nothing of method,
// URL, body or Idempotency-Key may change afterwards; sending it a second time is refused.
func SignRequest(req *http.Request, body, cert []byte, key crypto.Signer) error {
	return signRequestAt(req, body, cert, key, time.Now())
}

func signRequestAt(req *http.Request, body, cert []byte, key crypto.Signer, now time.Time) error {
	nonce := make([]byte, nonceBytes)
	if _, err := rand.Read(nonce); err != nil {
		return err
	}
	p := requestProof(req, body)
	p.Time, p.Nonce, p.Cert = now.Unix(), hex.EncodeToString(nonce), cert
	sum := sha256.Sum256(p.signed())
	sig, err := key.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		return fmt.Errorf("sign request: %w", err)
	}
	data, err := json.Marshal(Proof{Time: p.Time, Nonce: p.Nonce, Cert: cert, Signature: sig})
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", certScheme+" "+base64.RawURLEncoding.EncodeToString(data))
	return nil
}

func requestProof(req *http.Request, body []byte) *Proof {
	sum := sha256.Sum256(body)
	method := req.Method
	if method == "" {
		method = http.MethodGet
	}
	return &Proof{Kind: Certificate, Method: method, Path: req.URL.RequestURI(), BodyHash: sum[:], Key: req.Header.Get("Idempotency-Key")}
}

// signed is what the signature covers. No part can hold a line feed (verified
// before use), so two different requests never give the same bytes.
func (p *Proof) signed() []byte {
	return fmt.Appendf(nil, "%s\n%s\n%s\n%x\n%d\n%s\n%s\n", signContext, p.Method, p.Path, p.BodyHash, p.Time, p.Nonce, p.Key)
}

// ProofFromRequest reads what a request presents: a bearer token or a signed
// request over body. It verifies nothing; errors are *protocols.AuthError.
func ProofFromRequest(req *http.Request, body []byte) (*Proof, error) {
	auth := req.Header.Values("Authorization")
	if len(auth) == 0 || auth[0] == "" {
		return nil, refuse("no-token", "the request carries no credential; set SALLYPORT_TOKEN, use sallyport login, or name the administrator's certificate")
	}
	if len(auth) > 1 || len(auth[0]) > maxAuthorization {
		return nil, refuse("malformed-token", "the request carries more than one credential, or one that is too large")
	}
	kind, value, _ := strings.Cut(auth[0], " ")
	switch {
	case strings.EqualFold(kind, "Bearer"):
		return &Proof{Kind: Bearer, Token: strings.TrimSpace(value)}, nil
	case strings.EqualFold(kind, certScheme):
		data, err := base64.RawURLEncoding.DecodeString(value)
		var sent Proof
		if err != nil || json.Unmarshal(data, &sent) != nil {
			return nil, refuse("malformed-token", "the request's signature cannot be read")
		}
		p := requestProof(req, body)
		p.Time, p.Nonce, p.Cert, p.Signature = sent.Time, sent.Nonce, sent.Cert, sent.Signature
		return p, nil
	}
	return nil, refuse("malformed-token", "the Authorization scheme %s is not known; use Bearer", echo(kind))
}

// ProofOptions say what a Proof is verified against.
type ProofOptions struct {
	Roots   *x509.CertPool // the cluster's CA
	Cluster string
	// At is the time to judge by, for a Proof stored in an event: the event's
	// time. Zero means now.
	At time.Time
	// Nonces refuses a signed request seen before; nil does not look, which is
	// right only for a Proof taken from a stored event. Each place that accepts
	// requests has one of its own: the API's door, and the leader's second look.
	Nonces *Nonces
}

// VerifyProof says whose Proof this is. Errors are *protocols.AuthError.
func (v *Verifier) VerifyProof(ctx context.Context, p *Proof, o ProofOptions) (*policy.Subject, error) {
	at := o.At
	if at.IsZero() {
		at = v.opts.Now()
	}
	switch {
	case p == nil:
		return nil, refuse("no-token", "no credential was presented")
	case p.Kind == Bearer:
		return v.verifyAt(ctx, p.Token, at)
	case p.Kind == Certificate:
		return verifyCertificate(p, o, at)
	}
	return nil, refuse("malformed-token", "the credential is of no known kind")
}

func verifyCertificate(p *Proof, o ProofOptions, at time.Time) (*policy.Subject, error) {
	if len(p.BodyHash) != sha256.Size || len(p.Nonce) != 2*nonceBytes || len(p.Cert) > 16<<10 || len(p.Signature) > 256 ||
		len(p.Path) > 16<<10 || len(p.Key) > 64 || strings.ContainsAny(p.Method+p.Path+p.Nonce+p.Key, "\n\r\x00") {
		return nil, refuse("malformed-token", "the request's signature is incomplete")
	}
	cert, err := x509.ParseCertificate(p.Cert)
	if err != nil {
		return nil, refuse("malformed-token", "the request's certificate cannot be read")
	}
	id, err := pki.VerifyPeerAt(cert, o.Roots, o.Cluster, at, pki.Admin)
	if err != nil {
		var inv x509.CertificateInvalidError
		if errors.As(err, &inv) && inv.Reason == x509.Expired {
			if at.Before(cert.NotBefore) {
				return nil, refuse("not-yet-valid", "the administrator's certificate is valid from %s only; check the clocks", cert.NotBefore.UTC().Format(time.RFC3339))
			}
			return nil, refuse("expired", "the administrator's certificate expired at %s", cert.NotAfter.UTC().Format(time.RFC3339))
		}
		return nil, refuse("unknown-issuer", "the certificate is not an administrator's of this cluster")
	}
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	sum := sha256.Sum256(p.signed())
	if !ok || !ecdsa.VerifyASN1(pub, sum[:], p.Signature) {
		return nil, refuse("bad-signature", "the request's signature does not match it; it was changed on its way")
	}
	sent := time.Unix(p.Time, 0)
	switch d := at.Sub(sent); {
	case d > MaxSkew:
		return nil, refuse("expired", "the request was signed %s ago, at most %s is accepted; check the clocks and send it again", d.Round(time.Second), MaxSkew)
	case d < -MaxSkew:
		return nil, refuse("not-yet-valid", "the request was signed %s in the future; check the clocks", (-d).Round(time.Second))
	}
	fp := pki.Fingerprint(p.Cert)
	if o.Nonces != nil {
		if err := o.Nonces.use(fp+p.Nonce, sent.Add(MaxSkew), at); err != nil {
			return nil, err
		}
	}
	return &policy.Subject{
		Kind: policy.User, Provider: BootstrapProvider, Name: id.Name,
		Groups: []string{AdminGroup},
		Claims: map[string]any{},
		// The certificate is the credential: what was issued before a
		// revocation stays dead when the revocation is undone.
		IssuedAt: cert.NotBefore, ExpiresAt: cert.NotAfter,
		TokenID: "cert:" + fp,
	}, nil
}

// Nonces remembers signed requests until they are too old to be accepted, so
// that each is accepted once. The zero value is ready.
type Nonces struct {
	mu   sync.Mutex
	seen map[string]time.Time // until when it could be accepted
	next time.Time            // of the next clearing out
}

func (n *Nonces) use(nonce string, until, now time.Time) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.seen == nil {
		n.seen = map[string]time.Time{}
	}
	if now.After(n.next) || len(n.seen) >= maxNonces {
		for k, t := range n.seen {
			if now.After(t) {
				delete(n.seen, k)
			}
		}
		n.next = now.Add(MaxSkew)
	}
	if _, again := n.seen[nonce]; again {
		return refuse("bad-signature", "this signed request was received before; sign it anew to repeat it")
	}
	if len(n.seen) >= maxNonces {
		return refuse("issuer-unavailable", "too many signed requests within %s; try again shortly", MaxSkew)
	}
	n.seen[nonce] = until
	return nil
}

// Package identity says who presents a token or a signed request. It turns an
// OIDC token, or a request signed with an administrator's certificate, into a
// policy.Subject, or refuses with a protocols.AuthError whose code tells the
// causes apart and whose text tells what to do.
//
// It decides nothing about what a Subject may do, and keeps no session. Its
// only state is the issuers' public keys and the nonces of recent requests,
// both bounded. Nothing it returns or logs holds a token.
package identity

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/url"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
)

const (
	// MaxTokenBytes bounds a token: platforms' tokens are 1 to 4 KiB, and a
	// PostgreSQL password message must stay small before anyone is known.
	MaxTokenBytes = 16 << 10
	// Leeway is how far the issuer's clock and ours may be apart.
	Leeway = 60 * time.Second

	// maxNameBytes bounds `sub`, which becomes part of every record.
	maxNameBytes = 512
	// maxGroups bounds the groups of one Subject, each of which costs policy time.
	maxGroups = 512
	// maxEcho is how much of a token's claim an error may repeat.
	maxEcho = 100
	// maxJTIBytes: a longer token id is replaced by a digest.
	maxJTIBytes = 128

	// ReservedPrefix begins the names of groups that Sallyport itself gives a
	// meaning. A token's groups claim cannot confer them; the configuration can.
	ReservedPrefix = "sallyport-"
	// AdminGroup holds the bearers of an administrator's certificate.
	AdminGroup = ReservedPrefix + "admins"
	// BootstrapProvider is the provider of certificate holders; no configured
	// provider may have its name.
	BootstrapProvider = policy.BootstrapProvider
	// DevClaim marks tokens, and the discovery document, of the trial issuer.
	DevClaim = "sallyport_dev"
)

// DefaultAlgorithms are accepted where a provider names none.
var DefaultAlgorithms = []string{oidc.RS256, oidc.ES256}

// allowedAlgorithms are what a provider may name: asymmetric ones only, since
// a symmetric key could not be public.
var allowedAlgorithms = []string{
	oidc.RS256, oidc.RS384, oidc.RS512, oidc.PS256, oidc.PS384, oidc.PS512,
	oidc.ES256, oidc.ES384, oidc.ES512, oidc.EdDSA,
}

// GroupRule puts a Subject into Groups when each claim of When has a value that
// matches one of its patterns. In a pattern * stands for any run of
// characters, so write it only where the issuer controls what it covers.
type GroupRule struct {
	When   map[string][]string
	Groups []string
}

// ProviderConfig is an identity provider. Claims are named by their literal
// name or, where there is none of that name, by a dotted path into nested
// objects ("realm_access.roles").
type ProviderConfig struct {
	Name       string
	Issuer     string // https URL, compared exactly with iss
	Audience   string // must be among aud
	Kind       policy.SubjectKind
	CA         []byte   // PEM of the authorities to trust for the issuer; empty trusts the system's
	Algorithms []string // empty means DefaultAlgorithms

	Groups      []string // every Subject of this provider
	GroupsClaim string   // claim that lists groups; "" reads none
	GroupRules  []GroupRule

	Claims       []string // claims passed on to policies and records
	PersonClaims []string // claims that name people
	// Require lists, per claim, the values one of which the token must have:
	// the tenant, at issuers that strangers share. Values match exactly.
	Require map[string][]string
	// Dev admits the trial issuer; such a provider works only on nodes started with --dev.
	Dev bool
	// SignalAudience is the audience of this issuer's logout tokens and security
	// events; empty takes none.
	SignalAudience string
}

// Validate says what is wrong with a provider, or nil.
func (p *ProviderConfig) Validate() error {
	switch {
	case p.Name == "" || strings.ContainsAny(p.Name, "/ \t\r\n"):
		return fmt.Errorf("provider name %q: must not be empty nor contain a slash or white space", p.Name)
	case p.Name == BootstrapProvider:
		return fmt.Errorf("provider name %q is taken by the bootstrap certificate", p.Name)
	case p.Audience == "":
		return fmt.Errorf("provider %s: audience is missing; use one that only Sallyport accepts", p.Name)
	case p.Kind != policy.Workload && p.Kind != policy.User:
		return fmt.Errorf("provider %s: kind %q is neither %s nor %s", p.Name, p.Kind, policy.Workload, policy.User)
	}
	u, err := url.Parse(p.Issuer)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return fmt.Errorf("provider %s: issuer %q must be an https URL without user, query or fragment", p.Name, p.Issuer)
	}
	if len(p.CA) > 0 {
		if _, err := pool(p.CA); err != nil {
			return fmt.Errorf("provider %s: %w", p.Name, err)
		}
	}
	for _, a := range p.Algorithms {
		if !slices.Contains(allowedAlgorithms, a) {
			return fmt.Errorf("provider %s: algorithm %q cannot be used; choose from %s", p.Name, a, strings.Join(allowedAlgorithms, ", "))
		}
	}
	for claim, values := range p.Require {
		if claim == "" || len(values) == 0 || slices.Contains(values, "") {
			return fmt.Errorf("provider %s: required claim %q needs at least one value, none empty", p.Name, claim)
		}
	}
	for i, r := range p.GroupRules {
		if len(r.When) == 0 || len(r.Groups) == 0 {
			return fmt.Errorf("provider %s: group rule %d needs a condition and a group", p.Name, i+1)
		}
	}
	return nil
}

// Options of a Verifier.
type Options struct {
	Dev bool             // node was started with --dev: the trial issuer is accepted
	Now func() time.Time // nil means time.Now
	Log *slog.Logger     // nil discards
}

// Verifier verifies tokens of the configured providers. It is safe for
// concurrent use and starts no goroutines: a caller whose token needs the
// issuer's keys fetches them, the others wait for it.
type Verifier struct {
	opts Options
	cur  atomic.Pointer[providers]
}

type providers struct {
	byIssuer map[string][]*provider
	keys     map[string]*keySet // by issuer and CA, so that reconfiguration keeps them
}

type provider struct {
	ProviderConfig
	keys *keySet
}

// NewVerifier makes a Verifier; it contacts nobody. An error names the first
// provider that is invalid.
func NewVerifier(configs []ProviderConfig, opts Options) (*Verifier, error) {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	v := &Verifier{opts: opts}
	v.cur.Store(&providers{})
	return v, v.Update(configs)
}

// Update replaces the providers at once; keys already fetched from an issuer
// are kept. On an error nothing changes. Not to be called concurrently with itself.
func (v *Verifier) Update(configs []ProviderConfig) error {
	old := v.cur.Load()
	next := &providers{byIssuer: map[string][]*provider{}, keys: map[string]*keySet{}}
	names := map[string]bool{}
	for _, c := range configs {
		if err := c.Validate(); err != nil {
			return err
		}
		if names[c.Name] {
			return fmt.Errorf("provider %s is defined twice", c.Name)
		}
		names[c.Name] = true
		if len(c.Algorithms) == 0 {
			c.Algorithms = DefaultAlgorithms
		}
		sum := sha256.Sum256(c.CA)
		id := c.Issuer + "\x00" + string(sum[:])
		ks := next.keys[id]
		if ks == nil {
			if ks = old.keys[id]; ks == nil {
				var err error
				if ks, err = newKeySet(c.Issuer, c.CA, v.opts); err != nil {
					return fmt.Errorf("provider %s: %w", c.Name, err)
				}
			}
			next.keys[id] = ks
		}
		next.byIssuer[c.Issuer] = append(next.byIssuer[c.Issuer], &provider{c, ks})
	}
	v.cur.Store(next)
	for id, ks := range old.keys {
		if next.keys[id] == nil {
			ks.client.CloseIdleConnections()
		}
	}
	return nil
}

// Verify says whose token this is. Errors are *protocols.AuthError.
func (v *Verifier) Verify(ctx context.Context, token string) (*policy.Subject, error) {
	return v.verifyAt(ctx, token, v.opts.Now())
}

// verifyAt judges times as of at.
func (v *Verifier) verifyAt(ctx context.Context, token string, at time.Time) (*policy.Subject, error) {
	header, claims, err := peek(token)
	if err != nil {
		return nil, err
	}
	if isSignal(header, claims) {
		return nil, refuse("malformed-token", "this is a logout token or a security event, which lets nobody in")
	}
	iss, _ := claims["iss"].(string)
	candidates := v.cur.Load().byIssuer[iss]
	if len(candidates) == 0 {
		if iss == "" {
			return nil, refuse("unknown-issuer", "the token names no issuer (iss); present a token of an identity provider that is configured here")
		}
		return nil, refuse("unknown-issuer", "no identity provider is configured for the token's issuer %s; check the provider's issuer (it must be equal to the letter)", echo(iss))
	}
	// Several providers may share an issuer (two tenants, two audiences): the
	// first that accepts the token names the subject. Otherwise the refusal of
	// the one that came furthest is the useful one.
	var worst error
	rank := -1
	for _, p := range candidates {
		s, err := v.verifyWith(ctx, p, token, header, claims, at)
		if err == nil {
			return s, nil
		}
		if r := slices.Index(stages, code(err)); r > rank || worst == nil {
			worst, rank = err, r
		}
	}
	return nil, worst
}

// stages orders refusals by how far a token came.
var stages = []string{"unknown-issuer", "unsigned-token", "issuer-unavailable", "bad-signature", "malformed-token",
	"wrong-audience", "missing-tenant", "wrong-tenant", "not-yet-valid", "expired"}

func code(err error) string {
	var ae *protocols.AuthError
	if errors.As(err, &ae) {
		return ae.Code
	}
	return ""
}

func (v *Verifier) verifyWith(ctx context.Context, p *provider, token string, h header, claims map[string]any, at time.Time) (*policy.Subject, error) {
	if !v.opts.Dev {
		if _, marked := claims[DevClaim]; marked || p.Dev {
			return nil, refuse("unknown-issuer", "the token comes from the trial issuer (dev-issuer), which this node refuses: only nodes started with --dev accept it")
		}
	}
	if !slices.Contains(p.Algorithms, h.Alg) {
		return nil, refuse("unsigned-token", "the token is signed with %s, which provider %s does not accept; it accepts %s", echo(h.Alg), p.Name, strings.Join(p.Algorithms, ", "))
	}
	if err := p.checkSignature(ctx, token); err != nil {
		return nil, err
	}
	// From here on the claims are the issuer's word.
	exp, iat, err := p.checkTimes(claims, at)
	if err != nil && code(err) == "malformed-token" {
		return nil, err
	}
	timeErr := err
	if aud := list(claims["aud"]); !slices.Contains(aud, p.Audience) {
		if len(aud) == 0 {
			return nil, refuse("wrong-audience", "the token has no audience (aud); ask provider %s for a token with audience %s", p.Name, echo(p.Audience))
		}
		return nil, refuse("wrong-audience", "the token is meant for audience %s, not for %s; ask the platform for a token with audience %s", echo(strings.Join(aud, ", ")), echo(p.Audience), echo(p.Audience))
	}
	if err := p.checkTenant(claims); err != nil {
		return nil, err
	}
	if timeErr != nil {
		return nil, timeErr
	}
	return p.subject(claims, token, iat, exp)
}

// checkSignature verifies signature and issuer.
func (p *provider) checkSignature(ctx context.Context, token string) error {
	verifier := oidc.NewVerifier(p.Issuer, p.keys, &oidc.Config{
		SupportedSigningAlgs: p.Algorithms,
		SkipClientIDCheck:    true, // audience and times are checked by us, for the codes and the leeway
		SkipExpiryCheck:      true,
	})
	result := new(error)
	_, err := verifier.Verify(context.WithValue(ctx, resultKey{}, result), token)
	if err == nil {
		return nil
	}
	// go-oidc flattens errors of the key set to text: the key set leaves its
	// own in result.
	var ae *protocols.AuthError
	if errors.As(*result, &ae) {
		return ae
	}
	return refuse("malformed-token", "the token's claims are not those of an OIDC token")
}

// resultKey is under which a context carries where keySet puts its error.
type resultKey struct{}

func (p *provider) checkTimes(claims map[string]any, at time.Time) (exp, iat time.Time, err error) {
	exp, ok := numericDate(claims["exp"])
	if !ok {
		return exp, iat, refuse("malformed-token", "the token has no valid expiry (exp)")
	}
	iat, ok = numericDate(claims["iat"])
	if !ok {
		return exp, iat, refuse("malformed-token", "the token has no valid time of issue (iat)")
	}
	nbf := iat
	if raw, present := claims["nbf"]; present {
		n, ok := numericDate(raw)
		if !ok {
			return exp, iat, refuse("malformed-token", "the token's nbf is not a time")
		}
		if n.After(nbf) {
			nbf = n
		}
	}
	switch {
	case !at.Before(exp.Add(Leeway)):
		return exp, iat, refuse("expired", "the token expired at %s, %s ago; get a new one", exp.UTC().Format(time.RFC3339), at.Sub(exp).Round(time.Second))
	case nbf.After(at.Add(Leeway)):
		return exp, iat, refuse("not-yet-valid", "the token is valid from %s, %s from now; check the clocks of issuer and node", nbf.UTC().Format(time.RFC3339), nbf.Sub(at).Round(time.Second))
	}
	return exp, iat, nil
}

func (p *provider) checkTenant(claims map[string]any) error {
	names := make([]string, 0, len(p.Require))
	for name := range p.Require {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		got := list(lookup(claims, name))
		if len(got) == 0 {
			return refuse("missing-tenant", "the token lacks the claim %s, by which provider %s tells tenants apart", echo(name), p.Name)
		}
		if !slices.ContainsFunc(got, func(v string) bool { return slices.Contains(p.Require[name], v) }) {
			return refuse("wrong-tenant", "the token's %s is %s, which provider %s does not accept", echo(name), echo(strings.Join(got, ", ")), p.Name)
		}
	}
	return nil
}

func (p *provider) subject(claims map[string]any, token string, iat, exp time.Time) (*policy.Subject, error) {
	sub, _ := claims["sub"].(string)
	if sub == "" || len(sub) > maxNameBytes || !printable(sub) {
		return nil, refuse("malformed-token", "the token's subject (sub) is missing, longer than %d bytes or not printable", maxNameBytes)
	}
	s := &policy.Subject{
		Kind: p.Kind, Provider: p.Name, Issuer: p.Issuer, Name: sub,
		Claims:   map[string]any{},
		IssuedAt: iat, ExpiresAt: exp,
	}
	groups := slices.Clone(p.Groups)
	if p.GroupsClaim != "" {
		for _, g := range list(lookup(claims, p.GroupsClaim)) {
			if !strings.HasPrefix(strings.ToLower(g), ReservedPrefix) && printable(g) {
				groups = append(groups, g)
			}
		}
	}
	for _, r := range p.GroupRules {
		if r.matches(claims) {
			groups = append(groups, r.Groups...)
		}
	}
	slices.Sort(groups)
	s.Groups = slices.Compact(groups)
	if len(s.Groups) > maxGroups {
		// Dropping some could drop what a forbid rule asks for.
		return nil, refuse("malformed-token", "the token brings %d groups; at most %d are taken: have the issuer filter them", len(s.Groups), maxGroups)
	}
	for _, name := range p.Claims {
		if v := simple(lookup(claims, name)); v != nil {
			s.Claims[name] = v
		}
	}
	for _, name := range p.PersonClaims {
		for _, person := range list(lookup(claims, name)) {
			if person != "" && !slices.Contains(s.Persons, person) {
				s.Persons = append(s.Persons, person)
			}
		}
	}
	s.TokenID = tokenID(claims, token)
	return s, nil
}

func tokenID(claims map[string]any, token string) string {
	if jti, _ := claims["jti"].(string); jti != "" && len(jti) <= maxJTIBytes && printable(jti) {
		return jti
	}
	return digest(token)
}

// TokenID is Subject.TokenID of a token, without verifying it: what names a
// token that leaked. Anything that is no token is returned as it is.
func TokenID(s string) string {
	_, claims, err := peek(s)
	if err != nil {
		return s
	}
	return tokenID(claims, s)
}

// digest names a token that has no jti. It covers what is signed and not the
// signature, which an ES256 token's bearer can change without breaking it.
func digest(token string) string {
	h := sha256.Sum256([]byte(token[:strings.LastIndexByte(token, '.')]))
	return "sha256:" + hex.EncodeToString(h[:])
}

func (r *GroupRule) matches(claims map[string]any) bool {
	for name, patterns := range r.When {
		got := list(lookup(claims, name))
		if !slices.ContainsFunc(got, func(v string) bool {
			return slices.ContainsFunc(patterns, func(p string) bool { return match(p, v) })
		}) {
			return false
		}
	}
	return len(r.When) > 0
}

// match compares s with a pattern in which * stands for any run of characters.
// It takes each part where it first fits, so its time is linear in practice
// and len(s)*len(pattern) at most.
func match(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == s
	}
	s, ok := strings.CutPrefix(s, parts[0])
	if !ok {
		return false
	}
	last := len(parts) - 1
	for _, part := range parts[1:last] {
		i := strings.Index(s, part)
		if i < 0 {
			return false
		}
		s = s[i+len(part):]
	}
	return strings.HasSuffix(s, parts[last])
}

type header struct {
	Alg  string          `json:"alg"`
	Typ  string          `json:"typ"`
	Kid  string          `json:"kid"`
	Crit json.RawMessage `json:"crit"`
}

// peek reads what a token says of itself, before anything is verified. It
// takes the compact form of a JWS (RFC 7515 §7.1) and nothing else.
func peek(token string) (header, map[string]any, error) {
	var h header
	if token == "" {
		return h, nil, refuse("no-token", "no token was presented; give the OIDC token as the password (PGPASSWORD=$TOKEN) or in SALLYPORT_TOKEN")
	}
	if len(token) > MaxTokenBytes {
		return h, nil, refuse("malformed-token", "the token is larger than %d bytes", MaxTokenBytes)
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return h, nil, refuse("malformed-token", "this is not a signed OIDC token: it has %d parts instead of 3; is it a password, or a variable that was not filled in?", len(parts))
	}
	enc := base64.RawURLEncoding.Strict()
	hb, err := enc.DecodeString(parts[0])
	if err != nil || json.Unmarshal(hb, &h) != nil {
		return h, nil, refuse("malformed-token", "the token's header cannot be read; it may have been cut or changed on its way")
	}
	pb, err := enc.DecodeString(parts[1])
	if err != nil {
		return h, nil, refuse("malformed-token", "the token's claims cannot be read; it may have been cut or changed on its way")
	}
	dec := json.NewDecoder(strings.NewReader(string(pb)))
	dec.UseNumber()
	var claims map[string]any
	if dec.Decode(&claims) != nil || claims == nil || dec.More() {
		return h, nil, refuse("malformed-token", "the token's claims are not a JSON object")
	}
	if h.Alg == "" || strings.EqualFold(h.Alg, "none") || parts[2] == "" {
		return h, nil, refuse("unsigned-token", "the token is not signed; only tokens signed by their issuer are accepted")
	}
	if len(h.Crit) > 0 {
		return h, nil, refuse("malformed-token", "the token demands extensions (crit) that are not supported")
	}
	return h, claims, nil
}

// lookup finds a claim by its literal name, else by a dotted path.
func lookup(claims map[string]any, name string) any {
	if v, ok := claims[name]; ok {
		return v
	}
	var v any = claims
	for part := range strings.SplitSeq(name, ".") {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[part]
	}
	return v
}

// list reads a claim as strings: a string, number or boolean is a list of one;
// anything else in a list is left out.
func list(v any) []string {
	switch v := v.(type) {
	case []any:
		out := make([]string, 0, len(v))
		for _, e := range v {
			if s, ok := scalar(e); ok {
				out = append(out, s)
			}
		}
		return out
	default:
		if s, ok := scalar(v); ok {
			return []string{s}
		}
		return nil
	}
}

func scalar(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, true
	case bool:
		return strconv.FormatBool(v), true
	case json.Number:
		return v.String(), true
	}
	return "", false
}

// simple turns a claim into what policies can use: string, bool, int64 or
// []string; nil for anything else.
func simple(v any) any {
	switch v := v.(type) {
	case string, bool:
		return v
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
	case []any:
		out := make([]string, 0, len(v))
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil
			}
			out = append(out, s)
		}
		return out
	}
	return nil
}

// numericDate reads seconds since 1970 (RFC 7519 §2), up to the year 9999.
func numericDate(v any) (time.Time, bool) {
	n, ok := v.(json.Number)
	if !ok {
		return time.Time{}, false
	}
	f, err := n.Float64()
	if err != nil || math.IsNaN(f) || f < 0 || f > 253402300799 {
		return time.Time{}, false
	}
	return time.Unix(int64(f), 0), true
}

func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool {
		return !unicode.IsGraphic(r) || unicode.Is(unicode.Bidi_Control, r)
	})
}

// echo prepares a value from outside for an error's text: escaped, quoted and cut.
func echo(s string) string {
	cut := ""
	if len(s) > maxEcho {
		n := maxEcho
		for n > 0 && !utf8.RuneStart(s[n]) {
			n--
		}
		s, cut = s[:n], "…"
	}
	return strconv.QuoteToASCII(s) + cut
}

func refuse(code, format string, args ...any) error {
	return &protocols.AuthError{Code: code, Reason: fmt.Sprintf(format, args...)}
}

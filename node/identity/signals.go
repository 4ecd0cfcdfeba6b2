package identity

import (
	"context"
	"slices"
	"strings"
	"time"
)

// Types of events in security event tokens (RFC 8417) that are understood.
const (
	// EventLogout is OpenID Connect Back-Channel Logout 1.0, section 2.4.
	EventLogout = "http://schemas.openid.net/event/backchannel-logout"
	// EventSessionRevoked is OpenID CAEP 1.0, section 3.1.
	EventSessionRevoked = "https://schemas.openid.net/secevent/caep/event-type/session-revoked"
	// EventVerification is OpenID Shared Signals Framework 1.0, section 8.1.4: it
	// asks for an acknowledgement and nothing else.
	EventVerification = "https://schemas.openid.net/secevent/ssf/event-type/verification"
)

// SignalMaxAge is how old a signal may be: transmitters repeat what was not
// acknowledged for days. An old one ends only what was issued before it.
const SignalMaxAge = 7 * 24 * time.Hour

// Signal is an identity provider's word that somebody's access ends.
type Signal struct {
	Provider string // name of the provider it concerns
	Issuer   string
	ID       string // jti: one signal, however often it is delivered
	Event    string // one of the Event constants, or one that is not understood
	// Subject is the sub whose sessions end. When it is empty, Claim and Value
	// say whose: those whose token has that value.
	Subject      string
	Claim, Value string
	// At is when it happened: credentials issued later are not meant.
	At time.Time
	// Reason is the provider's own, for administrators; it may be empty.
	Reason string
}

// maxSignalReason bounds what a provider may have us store for ever.
const maxSignalReason = 500

// LogoutToken reads a logout token of OpenID Connect Back-Channel Logout 1.0
// (section 2.6) and returns a signal for each configured provider that it
// concerns. Errors are *protocols.AuthError.
func (v *Verifier) LogoutToken(ctx context.Context, token string) ([]Signal, error) {
	return v.signals(ctx, token, func(h header, claims, events map[string]any, p *provider) (Signal, error) {
		// The type is recommended only; what makes it a logout token is the event.
		if t := h.typ(); t != "" && t != "jwt" && t != "logout+jwt" {
			return Signal{}, refuse("malformed-token", "the token's type is %s, which is not that of a logout token", echo(h.Typ))
		}
		if _, ok := events[EventLogout].(map[string]any); !ok {
			return Signal{}, refuse("malformed-token", "this is not a logout token: it lacks the event %s", EventLogout)
		}
		if _, there := claims["nonce"]; there {
			return Signal{}, refuse("malformed-token", "a logout token must not have a nonce")
		}
		now := v.opts.Now()
		if raw, there := claims["exp"]; there {
			if exp, ok := numericDate(raw); !ok || !now.Before(exp.Add(Leeway)) {
				return Signal{}, refuse("expired", "the logout token has expired; send a new one")
			}
		}
		s := Signal{Event: EventLogout}
		sub, _ := claims["sub"].(string)
		sid, _ := claims["sid"].(string)
		switch {
		case sid != "" && slices.Contains(p.Claims, "sid"):
			s.Claim, s.Value = "sid", sid
		case sub != "":
			s.Subject = sub
		case sid != "":
			return s, refuse("unusable-signal", "the logout token names a session (sid) and no subject; list sid in the claims of provider %s, so that sessions can be told by it", p.Name)
		default:
			return s, refuse("malformed-token", "the logout token names neither a subject (sub) nor a session (sid)")
		}
		return s, nil
	})
}

// SecurityEvent reads a security event token as the Shared Signals Framework
// pushes it (RFC 8935), and returns a signal for each configured provider that
// it concerns. An event that is not understood is returned with its type and
// without subject. Errors are *protocols.AuthError.
func (v *Verifier) SecurityEvent(ctx context.Context, token string) ([]Signal, error) {
	return v.signals(ctx, token, func(h header, claims, events map[string]any, p *provider) (Signal, error) {
		if h.typ() != "secevent+jwt" {
			return Signal{}, refuse("malformed-token", "the token's type is %s; a security event token has secevent+jwt", echo(h.Typ))
		}
		if len(events) != 1 {
			return Signal{}, refuse("malformed-token", "the token has %d events; want one", len(events))
		}
		var s Signal
		var ev map[string]any
		for name, e := range events {
			s.Event = name
			ev, _ = e.(map[string]any)
		}
		if len(s.Event) > maxNameBytes || !printable(s.Event) {
			return Signal{}, refuse("malformed-token", "the name of the event is not printable or too long")
		}
		if s.Event != EventSessionRevoked {
			return s, nil
		}
		s.Reason = reason(ev["reason_admin"])
		if raw, there := ev["event_timestamp"]; there {
			at, ok := numericDate(raw)
			if !ok {
				return s, refuse("malformed-token", "event_timestamp is not a time in seconds")
			}
			s.At = at
		}
		id, _ := claims["sub_id"].(map[string]any)
		if id == nil { // drafts of the framework had it in the event
			id, _ = ev["subject"].(map[string]any)
		}
		return s, p.whose(&s, id, 0)
	})
}

// whose reads a subject identifier (RFC 9493) into s.
func (p *provider) whose(s *Signal, id map[string]any, depth int) error {
	text := func(name string) string { t, _ := id[name].(string); return t }
	claim := func(name, value string) error {
		if !slices.Contains(p.Claims, name) {
			return refuse("unusable-signal", "the event names its subject by %s; list %s in the claims of provider %s, so that sessions can be told by it", name, name, p.Name)
		}
		s.Claim, s.Value = name, value
		return nil
	}
	format := text("format")
	switch {
	case id == nil || depth > 1:
		return refuse("malformed-token", "the event does not say whose session it is (sub_id)")
	case format == "iss_sub" && text("iss") == p.Issuer && text("sub") != "":
		s.Subject = text("sub")
		return nil
	case format == "iss_sub":
		return refuse("unusable-signal", "the event is about a subject of issuer %s, which is not that of provider %s", echo(text("iss")), p.Name)
	case format == "opaque" && text("id") != "":
		// Within a complex subject it is the session, alone the subject.
		if depth > 0 {
			return claim("sid", text("id"))
		}
		s.Subject = text("id")
		return nil
	case format == "email" && text("email") != "":
		return claim("email", text("email"))
	case format == "complex" || format == "" && (id["user"] != nil || id["session"] != nil):
		session, _ := id["session"].(map[string]any)
		user, _ := id["user"].(map[string]any)
		if session != nil && p.whose(s, session, depth+1) == nil {
			return nil // the narrower of the two
		}
		return p.whose(s, user, depth)
	}
	return refuse("unusable-signal", "the event names its subject in the form %s; want iss_sub, opaque, email or a complex one of these", echo(format))
}

// reason reads a text, or the first of texts by language (CAEP 1.0 section 2).
func reason(v any) string {
	var text string
	switch v := v.(type) {
	case string:
		text = v
	case map[string]any:
		langs := make([]string, 0, len(v))
		for l := range v {
			langs = append(langs, l)
		}
		slices.Sort(langs)
		for _, l := range langs {
			if t, ok := v[l].(string); ok && (text == "" || strings.HasPrefix(l, "en")) {
				text = t
			}
		}
	}
	if len(text) > maxSignalReason || !printable(text) {
		return ""
	}
	return text
}

// signals verifies what all signals have in common, and has read take the rest.
// A signal is accepted by the providers of its issuer that have SignalAudience.
func (v *Verifier) signals(ctx context.Context, token string, read func(h header, claims, events map[string]any, p *provider) (Signal, error)) ([]Signal, error) {
	h, claims, err := peek(token)
	if err != nil {
		return nil, err
	}
	iss, _ := claims["iss"].(string)
	var out []Signal
	var refused error
	for _, p := range v.cur.Load().byIssuer[iss] {
		if p.SignalAudience == "" {
			continue
		}
		s, err := v.signal(ctx, token, h, claims, p, read)
		if err != nil {
			refused = err
			continue
		}
		out = append(out, s)
	}
	switch {
	case len(out) > 0:
		return out, nil
	case refused != nil:
		return nil, refused
	}
	return nil, refuse("unknown-issuer", "no identity provider with the issuer %s takes signals here; set signalAudience on the provider", echo(iss))
}

func (v *Verifier) signal(ctx context.Context, token string, h header, claims map[string]any, p *provider, read func(h header, claims, events map[string]any, p *provider) (Signal, error)) (Signal, error) {
	none := Signal{}
	if p.Dev && !v.opts.Dev {
		return none, refuse("unknown-issuer", "the token comes from the trial issuer (dev-issuer), which this node refuses: only nodes started with --dev accept it")
	}
	if !slices.Contains(p.Algorithms, h.Alg) {
		return none, refuse("unsigned-token", "the token is signed with %s, which provider %s does not accept; it accepts %s", echo(h.Alg), p.Name, strings.Join(p.Algorithms, ", "))
	}
	if err := p.checkSignature(ctx, token); err != nil {
		return none, err
	}
	if !slices.Contains(list(claims["aud"]), p.SignalAudience) {
		return none, refuse("wrong-audience", "the token is not meant for audience %s, which provider %s has for signals", echo(p.SignalAudience), p.Name)
	}
	iat, ok := numericDate(claims["iat"])
	now := v.opts.Now()
	switch {
	case !ok:
		return none, refuse("malformed-token", "the token has no valid time of issue (iat)")
	case iat.After(now.Add(Leeway)):
		return none, refuse("not-yet-valid", "the token was issued %s from now; check the clocks of issuer and node", iat.Sub(now).Round(time.Second))
	case now.Sub(iat) > SignalMaxAge:
		return none, refuse("expired", "the token was issued %s ago; signals are taken for %s", now.Sub(iat).Round(time.Second), SignalMaxAge)
	}
	jti, _ := claims["jti"].(string)
	if jti == "" || len(jti) > maxNameBytes || !printable(jti) {
		return none, refuse("malformed-token", "the token has no valid id (jti)")
	}
	events, _ := claims["events"].(map[string]any)
	s, err := read(h, claims, events, p)
	if err != nil {
		return none, err
	}
	for _, name := range []string{s.Subject, s.Value} {
		if len(name) > maxNameBytes || !printable(name) {
			return none, refuse("malformed-token", "the name of the subject is longer than %d bytes or not printable", maxNameBytes)
		}
	}
	s.Provider, s.Issuer, s.ID = p.Name, p.Issuer, jti
	if s.At.IsZero() || s.At.After(iat) { // what has not happened yet is not taken
		s.At = iat
	}
	return s, nil
}

// isSignal says whether a token is a signal: it must not open anything.
func isSignal(h header, claims map[string]any) bool {
	_, events := claims["events"]
	return events || h.typ() == "secevent+jwt" || h.typ() == "logout+jwt"
}

// typ is the media type in the header, without the prefix that may be left out
// (RFC 7515 section 4.1.9).
func (h *header) typ() string {
	return strings.TrimPrefix(strings.ToLower(h.Typ), "application/")
}

package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const signalAudience = "https://gw.acme.example/signals"

type obj = map[string]any

func signalConfig(i *testIssuer) ProviderConfig {
	p := i.config()
	p.SignalAudience = signalAudience
	p.Claims = append(p.Claims, "sid", "email")
	return p
}

func logoutClaims(now time.Time, iss string) obj {
	return obj{
		"iss": iss, "aud": signalAudience, "iat": now.Unix(), "exp": now.Add(2 * time.Minute).Unix(), "jti": "logout-1",
		"sub": "alice", "events": obj{EventLogout: obj{}},
	}
}

func TestLogoutToken(t *testing.T) {
	i, clk := newIssuer(t), newClock()
	v := mustVerifier(t, clk, false, signalConfig(i))
	good := logoutClaims(clk.now(), i.srv.URL)
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, typ, code string
		claims          obj
		key             any
		want            Signal
	}{
		{name: "subject", typ: "logout+jwt", claims: good, want: Signal{Subject: "alice"}},
		{name: "without type", typ: "JWT", claims: good, want: Signal{Subject: "alice"}},
		{name: "session", typ: "logout+jwt", claims: with(good, "sid", "s-1"), want: Signal{Claim: "sid", Value: "s-1"}},
		{name: "session alone", typ: "logout+jwt", claims: with(good, "sid", "s-1", "sub", nil), want: Signal{Claim: "sid", Value: "s-1"}},
		{name: "nobody", typ: "logout+jwt", claims: with(good, "sub", nil), code: "malformed-token"},
		{name: "nonce", typ: "logout+jwt", claims: with(good, "nonce", "n"), code: "malformed-token"},
		{name: "no event", typ: "logout+jwt", claims: with(good, "events", nil), code: "malformed-token"},
		{name: "another event", typ: "logout+jwt", claims: with(good, "events", obj{EventSessionRevoked: obj{}}), code: "malformed-token"},
		{name: "event is no object", typ: "logout+jwt", claims: with(good, "events", obj{EventLogout: true}), code: "malformed-token"},
		{name: "security event", typ: "secevent+jwt", claims: good, code: "malformed-token"},
		{name: "audience", typ: "logout+jwt", claims: with(good, "aud", audience), code: "wrong-audience"},
		{name: "expired", typ: "logout+jwt", claims: with(good, "exp", clk.now().Add(-2*time.Minute).Unix()), code: "expired"},
		{name: "old", typ: "logout+jwt", claims: with(good, "exp", nil, "iat", clk.now().Add(-SignalMaxAge-time.Hour).Unix()), code: "expired"},
		{name: "future", typ: "logout+jwt", claims: with(good, "iat", clk.now().Add(time.Hour).Unix()), code: "not-yet-valid"},
		{name: "no id", typ: "logout+jwt", claims: with(good, "jti", nil), code: "malformed-token"},
		{name: "no time", typ: "logout+jwt", claims: with(good, "iat", nil), code: "malformed-token"},
		{name: "issuer", typ: "logout+jwt", claims: with(good, "iss", "https://other.example"), code: "unknown-issuer"},
		{name: "signature", typ: "logout+jwt", claims: good, key: other, code: "bad-signature"},
		{name: "unprintable", typ: "logout+jwt", claims: with(good, "sub", "a\nb"), code: "malformed-token"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.key == nil {
				c.key = i.ec
			}
			got, err := v.LogoutToken(t.Context(), signTyped(t, c.typ, jose.ES256, c.key, "e1", c.claims))
			if c.code != "" {
				wantCode(t, err, c.code)
				return
			}
			c.want.Provider, c.want.Issuer, c.want.ID, c.want.Event, c.want.At = "ci", i.srv.URL, "logout-1", EventLogout, clk.now()
			if err != nil || len(got) != 1 || !got[0].At.Equal(c.want.At) {
				t.Fatalf("%+v, %v", got, err)
			}
			got[0].At = c.want.At
			if got[0] != c.want {
				t.Fatalf("got %+v, want %+v", got[0], c.want)
			}
		})
	}
	t.Run("sid not kept", func(t *testing.T) {
		p := i.config()
		p.SignalAudience = signalAudience
		v := mustVerifier(t, clk, false, p)
		_, err := v.LogoutToken(t.Context(), signTyped(t, "logout+jwt", jose.ES256, i.ec, "e1", with(good, "sid", "s-1", "sub", nil)))
		wantCode(t, err, "unusable-signal")
	})
	t.Run("not taken", func(t *testing.T) {
		v := mustVerifier(t, clk, false, i.config())
		_, err := v.LogoutToken(t.Context(), signTyped(t, "logout+jwt", jose.ES256, i.ec, "e1", good))
		wantCode(t, err, "unknown-issuer")
	})
}

func TestSecurityEvent(t *testing.T) {
	i, clk := newIssuer(t), newClock()
	v := mustVerifier(t, clk, false, signalConfig(i))
	user := obj{"format": "iss_sub", "iss": i.srv.URL, "sub": "alice"}
	happened := clk.now().Add(-time.Hour)
	revoked := func(kv ...any) obj {
		return obj{EventSessionRevoked: with(obj{"event_timestamp": happened.Unix(), "reason_admin": obj{"en": "stolen laptop", "de": "gestohlen"}}, kv...)}
	}
	good := obj{"iss": i.srv.URL, "aud": []string{"other", signalAudience}, "iat": clk.now().Unix(), "jti": "set-1", "sub_id": user, "events": revoked()}
	for _, c := range []struct {
		name, typ, code string
		claims          obj
		want            Signal
	}{
		{name: "iss_sub", claims: good, want: Signal{Subject: "alice"}},
		{name: "draft form", claims: with(good, "sub_id", nil, "events", revoked("subject", user)), want: Signal{Subject: "alice"}},
		{name: "opaque", claims: with(good, "sub_id", obj{"format": "opaque", "id": "alice"}), want: Signal{Subject: "alice"}},
		{name: "email", claims: with(good, "sub_id", obj{"format": "email", "email": "a@acme.example"}), want: Signal{Claim: "email", Value: "a@acme.example"}},
		{name: "session of a user", claims: with(good, "sub_id", obj{"format": "complex", "user": user, "session": obj{"format": "opaque", "id": "s-9"}}), want: Signal{Claim: "sid", Value: "s-9"}},
		{name: "user of a complex", claims: with(good, "sub_id", obj{"format": "complex", "user": user}), want: Signal{Subject: "alice"}},
		{name: "time to come", claims: with(good, "events", revoked("event_timestamp", clk.now().Add(time.Hour).Unix())), want: Signal{Subject: "alice", At: clk.now()}},
		{name: "other issuer's subject", claims: with(good, "sub_id", obj{"format": "iss_sub", "iss": "https://other.example", "sub": "alice"}), code: "unusable-signal"},
		{name: "phone", claims: with(good, "sub_id", obj{"format": "phone_number", "phone_number": "+1"}), code: "unusable-signal"},
		{name: "nested without end", claims: with(good, "sub_id", obj{"format": "complex", "session": obj{"format": "complex", "session": obj{"format": "complex", "session": obj{}}}}), code: "malformed-token"},
		{name: "nobody", claims: with(good, "sub_id", nil), code: "malformed-token"},
		{name: "two events", claims: with(good, "events", obj{EventSessionRevoked: obj{}, EventVerification: obj{}}), code: "malformed-token"},
		{name: "type", typ: "JWT", claims: good, code: "malformed-token"},
		{name: "time", claims: with(good, "events", revoked("event_timestamp", "yesterday")), code: "malformed-token"},
		{name: "audience", claims: with(good, "aud", audience), code: "wrong-audience"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.typ == "" {
				c.typ = "secevent+jwt"
			}
			got, err := v.SecurityEvent(t.Context(), signTyped(t, c.typ, jose.RS256, i.rsa, "r1", c.claims))
			if c.code != "" {
				wantCode(t, err, c.code)
				return
			}
			if c.want.At.IsZero() {
				c.want.At = happened
			}
			if err != nil || len(got) != 1 || !got[0].At.Equal(c.want.At) {
				t.Fatalf("%+v, %v", got, err)
			}
			c.want.Provider, c.want.Issuer, c.want.ID, c.want.Event, c.want.Reason = "ci", i.srv.URL, "set-1", EventSessionRevoked, "stolen laptop"
			got[0].At = c.want.At
			if got[0] != c.want {
				t.Fatalf("got %+v, want %+v", got[0], c.want)
			}
		})
	}
	t.Run("not understood", func(t *testing.T) {
		for _, event := range []string{EventVerification, "https://example.com/other"} {
			got, err := v.SecurityEvent(t.Context(), signTyped(t, "secevent+jwt", jose.RS256, i.rsa, "r1", with(good, "sub_id", nil, "events", obj{event: obj{}})))
			if err != nil || len(got) != 1 || got[0].Event != event || got[0].Subject != "" {
				t.Fatalf("%+v, %v", got, err)
			}
		}
	})
}

// What ends access opens nothing, whatever else it says.
func TestSignalLetsNobodyIn(t *testing.T) {
	i, clk := newIssuer(t), newClock()
	v := mustVerifier(t, clk, false, i.config())
	claims := claimsAt(clk.now(), i.srv.URL)
	for _, typ := range []string{"logout+jwt", "secevent+jwt", "application/secevent+jwt"} {
		_, err := v.Verify(t.Context(), signTyped(t, typ, jose.ES256, i.ec, "e1", claims))
		wantCode(t, err, "malformed-token")
	}
	_, err := v.Verify(t.Context(), sign(t, jose.ES256, i.ec, "e1", with(claims, "events", obj{EventLogout: obj{}})))
	wantCode(t, err, "malformed-token")
}

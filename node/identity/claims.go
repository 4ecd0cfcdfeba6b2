package identity

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sallyport/sallyport/policy"
)

// ErrNotOurs says that claims are of another issuer or for another audience
// than a provider's.
var ErrNotOurs = errors.New("the token is not one of this provider")

// Claimed is the Subject that a token with these claims, a JSON object, stands
// for by the provider's rules. It verifies no signature and no time: it is for
// asking what would be decided, never for letting anybody in.
func (p *ProviderConfig) Claimed(claims []byte) (*policy.Subject, error) {
	m, err := object(claims)
	if err != nil {
		return nil, err
	}
	if iss, _ := m["iss"].(string); iss != p.Issuer || !slices.Contains(list(m["aud"]), p.Audience) {
		return nil, ErrNotOurs
	}
	full := &provider{ProviderConfig: *p}
	if err := full.checkTenant(m); err != nil {
		return nil, err
	}
	iat, ok := numericDate(m["iat"])
	if !ok {
		return nil, errors.New("the claims have no time of issue (iat)")
	}
	exp, ok := numericDate(m["exp"])
	if !ok {
		exp = iat.Add(time.Hour)
	}
	return full.subject(m, ".", iat, exp)
}

// Attributes reads claims as recordings show them, a JSON object, as policies
// use them.
func Attributes(claims []byte) (map[string]any, error) {
	m, err := object(claims)
	if err != nil {
		return nil, err
	}
	out := make(map[string]any, len(m))
	for name, v := range m {
		if v = simple(v); v == nil {
			return nil, fmt.Errorf("claim %s is neither text, a number, true, false nor a list of texts", echo(name))
		}
		out[name] = v
	}
	return out, nil
}

func object(data []byte) (map[string]any, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var m map[string]any
	if dec.Decode(&m) != nil || m == nil || dec.More() {
		return nil, errors.New("the claims are not a JSON object")
	}
	return m, nil
}

package api

import (
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"

	"github.com/sallyport/sallyport/raftstore/event"
)

// Join tokens are the only tokens that a cluster makes. One reads
//
//	sp2.ID.SEED.CAHASH
//
// where SEED is an Ed25519 seed that its maker's command drew and no node has
// seen; the cluster knows the public key, the role and the expiry. By CAHASH the
// node that joins knows which authority it may talk to. Tokens of earlier builds,
// sp1.ID.SECRET.CAHASH, were sent whole, and are still taken until they expire.
type JoinToken struct {
	ID   string
	Pin  [32]byte // SHA-256 of the authority's certificate
	seed []byte   // sp2
	old  string   // sp1: the secret
}

func joinToken(id string, seed, ca []byte) string {
	pin := sha256.Sum256(ca)
	enc := base64.RawURLEncoding
	return "sp2." + id + "." + enc.EncodeToString(seed) + "." + enc.EncodeToString(pin[:])
}

// ParseJoinToken reads a token as `cluster token create` prints it.
func ParseJoinToken(s string) (*JoinToken, error) {
	parts := strings.Split(strings.TrimSpace(s), ".")
	if len(parts) != 4 || (parts[0] != "sp1" && parts[0] != "sp2") {
		return nil, errors.New("that is no join token: want the whole line that `sallyport cluster token create` printed, sp2.….….…")
	}
	pin, err := base64.RawURLEncoding.DecodeString(parts[3])
	if err != nil || len(pin) != 32 {
		return nil, errors.New("the join token is damaged: its last part is not a hash")
	}
	t := &JoinToken{ID: parts[1], Pin: [32]byte(pin)}
	if parts[0] == "sp1" {
		t.old = parts[2]
		return t, nil
	}
	if t.seed, err = base64.RawURLEncoding.DecodeString(parts[2]); err != nil || len(t.seed) != ed25519.SeedSize {
		return nil, errors.New("the join token is damaged: its third part is not a key")
	}
	return t, nil
}

// Sign proves that whoever makes this request has the token. Nothing in it may
// change afterwards.
func (q *JoinRequest) Sign(t *JoinToken) error {
	q.TokenID, q.Secret, q.Proof = t.ID, t.old, nil
	if t.seed == nil {
		return nil
	}
	b, err := q.signed()
	if err == nil {
		q.Proof = ed25519.Sign(ed25519.NewKeyFromSeed(t.seed), b)
	}
	return err
}

// signed is all of the request but the proof.
func (q JoinRequest) signed() ([]byte, error) {
	q.Proof, q.Secret = nil, ""
	b, err := json.Marshal(q)
	return append([]byte("sallyport join request v2\n"), b...), err
}

// presents says whether the request was made by who has the token.
func (q *JoinRequest) presents(t *event.JoinTokenMade) bool {
	if t.Key != nil {
		b, err := q.signed()
		return err == nil && len(t.Key) == ed25519.PublicKeySize && ed25519.Verify(t.Key, b, q.Proof)
	}
	secret, err := base64.RawURLEncoding.DecodeString(q.Secret)
	sum := sha256.Sum256(secret)
	return err == nil && subtle.ConstantTimeCompare(sum[:], t.Hash) == 1
}

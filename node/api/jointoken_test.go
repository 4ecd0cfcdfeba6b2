package api

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"testing"

	"github.com/sallyport/sallyport/raftstore/event"
)

// A join request counts with its token's signature, and only as it was signed:
// a node that hands it on can change nothing in it.
func TestJoinRequestSigned(t *testing.T) {
	pub, key, _ := ed25519.GenerateKey(nil)
	tok, err := ParseJoinToken(joinToken("abc", key.Seed(), []byte("ca")))
	if err != nil || tok.ID != "abc" || tok.Pin != sha256.Sum256([]byte("ca")) {
		t.Fatal(tok, err)
	}
	made := &event.JoinTokenMade{ID: "abc", Key: pub}
	good := JoinRequest{Name: "n2", Addr: "a:1", CSR: []byte("csr"), Hosts: []string{"h"}, Recipient: "age1"}
	if err := good.Sign(tok); err != nil || !good.presents(made) {
		t.Fatal("refused", err)
	}
	for name, change := range map[string]func(q *JoinRequest){
		"name":      func(q *JoinRequest) { q.Name = "n3" },
		"addr":      func(q *JoinRequest) { q.Addr = "b:1" },
		"key":       func(q *JoinRequest) { q.CSR = []byte("other") },
		"hosts":     func(q *JoinRequest) { q.Hosts = nil },
		"recipient": func(q *JoinRequest) { q.Recipient = "age2" },
		"token":     func(q *JoinRequest) { q.TokenID = "abd" },
		"proof":     func(q *JoinRequest) { q.Proof = nil },
		"the public key as secret": func(q *JoinRequest) {
			q.Proof, q.Secret = nil, base64.RawURLEncoding.EncodeToString(pub)
		},
	} {
		q := good
		if change(&q); q.presents(made) {
			t.Errorf("%s changed: taken", name)
		}
	}
	if good.presents(&event.JoinTokenMade{ID: "abc"}) {
		t.Error("a token without key or hash is taken")
	}

	// Tokens that the build before made.
	secret := []byte("secret")
	sum := sha256.Sum256(secret)
	old := &JoinRequest{TokenID: "abc", Secret: base64.RawURLEncoding.EncodeToString(secret)}
	if !old.presents(&event.JoinTokenMade{Hash: sum[:]}) || old.presents(&event.JoinTokenMade{Hash: sum[1:]}) {
		t.Error("tokens of version 1")
	}
	for _, s := range []string{"", "sp2.a.b.c", "sp3.a.b.c", "sp2.a.AAAA." + base64.RawURLEncoding.EncodeToString(sum[:])} {
		if _, err := ParseJoinToken(s); err == nil {
			t.Errorf("%q parsed", s)
		}
	}
}

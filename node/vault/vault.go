// Package vault keeps the cluster's secrets readable by its nodes and by
// nobody else. The cluster has one vault key (age, X25519); what is stored in
// the replicated state is sealed to it. Each node has a key of its own, kept in
// a file, and the vault key is stored once per node, wrapped to that key: so
// neither disk nor snapshot nor backup of the state shows a secret.
//
// What is sealed carries its name ("target/prod-db/admin-password"), checked
// when it is opened: one blob cannot be put in another's place. Sealing needs
// the public half only, so a sealed blob does not say who made it; that is for
// the event that carries it.
package vault

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"filippo.io/age"

	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/raftstore/event"
)

const (
	// magic begins every plaintext, so that a blob sealed by something else
	// with the same key is not taken for one of ours.
	magic = "sallyport-sealed-v1\x00"
	// MaxPlaintext bounds what is sealed and what Open unpacks: held
	// operations are at most 64 KiB, secrets far smaller.
	MaxPlaintext = 1 << 20
	// maxName bounds a secret's name.
	maxName = 512
	// maxBlob leaves room for age's header and per-chunk tags.
	maxBlob = MaxPlaintext + maxName + 64<<10

	wrapName = "vault-identity"
)

// ErrWrongName means that a sealed blob opened, but is not the one asked for.
var ErrWrongName = errors.New("vault: sealed secret bears another name")

// Vault is the cluster's vault key. Only nodes allowed to serve hold one.
type Vault struct{ id *age.X25519Identity }

// New makes a vault key.
func New() (*Vault, error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, err
	}
	return &Vault{id}, nil
}

// Derive returns a 32-byte key for purpose, the same on every node that holds
// the vault and telling nothing about it.
func (v *Vault) Derive(purpose string) []byte {
	mac := hmac.New(sha256.New, []byte(v.id.String()))
	mac.Write([]byte("sallyport derived key\x00" + purpose))
	return mac.Sum(nil)
}

// Recipient is the public half, to which anyone may seal.
func (v *Vault) Recipient() string { return v.id.Recipient().String() }

// Seal encrypts plaintext to recipient under name. The same name must be given to Open.
func Seal(recipient, name string, plaintext []byte) (event.Sealed, error) {
	r, err := age.ParseX25519Recipient(recipient)
	if err != nil {
		return nil, fmt.Errorf("vault: recipient: %w", err)
	}
	if name == "" || len(name) > maxName {
		return nil, fmt.Errorf("vault: a sealed secret's name has 1 to %d bytes", maxName)
	}
	if len(plaintext) > MaxPlaintext {
		return nil, fmt.Errorf("vault: %d bytes to seal; at most %d", len(plaintext), MaxPlaintext)
	}
	var out bytes.Buffer
	w, err := age.Encrypt(&out, r)
	if err != nil {
		return nil, fmt.Errorf("vault: seal %s: %w", name, err)
	}
	head := binary.BigEndian.AppendUint16([]byte(magic), uint16(len(name)))
	head = append(head, name...)
	for _, part := range [][]byte{head, plaintext} {
		if _, err := w.Write(part); err != nil {
			return nil, fmt.Errorf("vault: seal %s: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("vault: seal %s: %w", name, err)
	}
	return out.Bytes(), nil
}

// Open decrypts what was sealed to this vault under name.
func (v *Vault) Open(name string, sealed event.Sealed) ([]byte, error) {
	return open(v.id, name, sealed)
}

// OpenSecret is Open for a secret string.
func (v *Vault) OpenSecret(name string, sealed event.Sealed) (Secret, error) {
	b, err := v.Open(name, sealed)
	if err != nil {
		return Secret{}, err
	}
	return NewSecret(string(b)), nil
}

func open(id age.Identity, name string, sealed []byte) ([]byte, error) {
	if len(sealed) > maxBlob {
		return nil, fmt.Errorf("vault: open %s: %d bytes are more than any sealed secret has", name, len(sealed))
	}
	r, err := age.Decrypt(bytes.NewReader(sealed), id)
	if err != nil {
		return nil, fmt.Errorf("vault: open %s: %w", name, err)
	}
	plain, err := io.ReadAll(io.LimitReader(r, maxBlob))
	if err != nil {
		return nil, fmt.Errorf("vault: open %s: %w", name, err)
	}
	rest, ok := bytes.CutPrefix(plain, []byte(magic))
	if !ok || len(rest) < 2 {
		return nil, fmt.Errorf("vault: open %s: not a sealed secret of ours", name)
	}
	n := int(binary.BigEndian.Uint16(rest))
	if rest = rest[2:]; n > len(rest) {
		return nil, fmt.Errorf("vault: open %s: cut short", name)
	}
	if string(rest[:n]) != name {
		return nil, fmt.Errorf("%w: wanted %s", ErrWrongName, name)
	}
	return rest[n:], nil
}

// Wrap encrypts the vault key to a node's recipient.
func (v *Vault) Wrap(nodeRecipient string) ([]byte, error) {
	return Seal(nodeRecipient, wrapName, []byte(v.id.String()))
}

// Unwrap recovers the vault key from a node's wrap and checks that it is the
// one the cluster's state names (recipient), so that nobody can hand a node a
// vault of their own.
func Unwrap(node *NodeIdentity, wrap []byte, recipient string) (*Vault, error) {
	plain, err := open(node.id, wrapName, wrap)
	if err != nil {
		return nil, err
	}
	id, err := age.ParseX25519Identity(string(plain))
	if err != nil {
		return nil, errors.New("vault: the wrapped vault key is damaged")
	}
	v := &Vault{id}
	if v.Recipient() != recipient {
		return nil, errors.New("vault: the wrapped key is not the cluster's vault key")
	}
	return v, nil
}

// NodeIdentity is a node's own key, to which the vault key is wrapped.
type NodeIdentity struct{ id *age.X25519Identity }

// NewNodeIdentity makes a node's key.
func NewNodeIdentity() (*NodeIdentity, error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, err
	}
	return &NodeIdentity{id}, nil
}

// Recipient is the public half, as NodeInfo.Recipient carries it.
func (n *NodeIdentity) Recipient() string { return n.id.Recipient().String() }

// Save writes the key to path, readable by the owner only, atomically.
func (n *NodeIdentity) Save(path string) error {
	return pki.WriteFile(path, []byte(n.id.String()+"\n"))
}

// LoadNodeIdentity reads a key written by Save. It refuses a file that other
// users may read.
func LoadNodeIdentity(path string) (*NodeIdentity, error) {
	if err := pki.CheckPrivate(path); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	id, err := age.ParseX25519Identity(strings.TrimSpace(string(data)))
	if err != nil {
		// age's error may quote the key: keep it out.
		return nil, fmt.Errorf("vault: %s does not hold a node's key", path)
	}
	return &NodeIdentity{id}, nil
}

// The vault's and the nodes' keys show nothing of themselves when printed.
func (v *Vault) String() string          { return hidden }
func (v *Vault) GoString() string        { return hidden }
func (n *NodeIdentity) String() string   { return hidden }
func (n *NodeIdentity) GoString() string { return hidden }

// Package vault keeps the cluster's secrets readable by the nodes that need
// them and by nobody else. Each node has a key of its own (age, X25519), kept in
// a file; what is stored in the replicated state is sealed to the keys of those
// that may open it: neither disk nor snapshot nor backup of the state shows a
// secret, nor does one node's key open what is another's.
//
// Clusters of the first release have one key instead, the Vault, wrapped to each
// node's. What was sealed to it stays readable to those that hold it.
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
	// MaxRecipients bounds to how many nodes one secret is sealed: each costs
	// about 100 bytes.
	MaxRecipients = 1024
	// maxBlob leaves room for age's header and per-chunk tags.
	maxBlob = MaxPlaintext + maxName + 64<<10 + 128*MaxRecipients

	wrapName = "vault-identity"
)

// ErrWrongName means that a sealed blob opened, but is not the one asked for.
var ErrWrongName = errors.New("vault: sealed secret bears another name")

// ErrNotSealedToUs means that a blob was sealed to others' keys.
var ErrNotSealedToUs = errors.New("vault: sealed to other nodes than this one")

// Vault is the one key of a cluster of the first release.
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

// CheckRecipient says whether s is a node's public key.
func CheckRecipient(s string) error {
	if _, err := age.ParseX25519Recipient(s); err != nil {
		return fmt.Errorf("vault: recipient: %w", err)
	}
	return nil
}

// Seal encrypts plaintext to each of the recipients (at least one) under name.
// The same name must be given to Open.
func Seal(name string, plaintext []byte, recipients ...string) (event.Sealed, error) {
	if len(recipients) == 0 || len(recipients) > MaxRecipients {
		return nil, fmt.Errorf("vault: seal %s: to %d recipients; want 1 to %d", name, len(recipients), MaxRecipients)
	}
	to := make([]age.Recipient, len(recipients))
	for i, s := range recipients {
		r, err := age.ParseX25519Recipient(s)
		if err != nil {
			return nil, fmt.Errorf("vault: recipient: %w", err)
		}
		to[i] = r
	}
	if name == "" || len(name) > maxName {
		return nil, fmt.Errorf("vault: a sealed secret's name has 1 to %d bytes", maxName)
	}
	if len(plaintext) > MaxPlaintext {
		return nil, fmt.Errorf("vault: %d bytes to seal; at most %d", len(plaintext), MaxPlaintext)
	}
	var out bytes.Buffer
	w, err := age.Encrypt(&out, to...)
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

func open(id age.Identity, name string, sealed []byte) ([]byte, error) {
	if len(sealed) > maxBlob {
		return nil, fmt.Errorf("vault: open %s: %d bytes are more than any sealed secret has", name, len(sealed))
	}
	r, err := age.Decrypt(bytes.NewReader(sealed), id)
	if none := new(age.NoIdentityMatchError); errors.As(err, &none) {
		return nil, fmt.Errorf("%w: %s", ErrNotSealedToUs, name)
	}
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
	return Seal(wrapName, []byte(v.id.String()), nodeRecipient)
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

// NodeIdentity is a node's own key, to which its secrets are sealed.
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

// Open decrypts what was sealed to this node, among others or alone, under name.
func (n *NodeIdentity) Open(name string, sealed event.Sealed) ([]byte, error) {
	return open(n.id, name, sealed)
}

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

package tlog

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// A Checkpoint is a tree head: which log, how many events, and the root over
// them. Its text is that of C2SP tlog-checkpoint without extension lines.
type Checkpoint struct {
	Origin string // the cluster's id
	Size   uint64
	Root   Hash
}

// MaxNote bounds a checkpoint with its cosignatures: 100 of them, at most 240
// bytes each, is more than x/mod's note takes.
const MaxNote = 32 << 10

var (
	// ErrNote says that bytes are not a checkpoint.
	ErrNote = errors.New("not a checkpoint")
	// ErrCosignature says that a cosignature is not its key's.
	ErrCosignature = errors.New("a cosignature is wrong")
)

// Text is what cosignatures are over, and the part of a note before them.
func (c Checkpoint) Text() string {
	return fmt.Sprintf("%s\n%d\n%s\n", c.Origin, c.Size, c.Root)
}

// parseText reads what Text wrote, in that one form.
func parseText(s string) (Checkpoint, error) {
	lines := strings.Split(s, "\n")
	if len(lines) != 4 || lines[0] == "" || lines[3] != "" {
		return Checkpoint{}, fmt.Errorf("%w: want three lines", ErrNote)
	}
	size, err := strconv.ParseUint(lines[1], 10, 64)
	if err != nil || size > maxSize {
		return Checkpoint{}, fmt.Errorf("%w: size %q", ErrNote, lines[1])
	}
	root, err := tlog.ParseHash(lines[2])
	if err != nil {
		return Checkpoint{}, fmt.Errorf("%w: root: %w", ErrNote, err)
	}
	c := Checkpoint{Origin: lines[0], Size: size, Root: root}
	if c.Text() != s {
		return Checkpoint{}, fmt.Errorf("%w: not in its one form", ErrNote)
	}
	return c, nil
}

// keyType begins what a key's id is over: 0xff, for a type that signed-note
// assigns no byte to, and the type's name. Cosignatures as tlog-cosignature
// defines them are of Ed25519 and ML-DSA keys; nodes have ECDSA P-256 keys, in
// certificates that their cluster's CA signed.
const keyType = "\xffsallyport/ecdsa-p256-cosignature/v1"

// cosignHeader begins what a cosignature is over. A node's key also signs TLS
// handshakes ("TLS 1.3, …" after 64 spaces), recordings ("sallyport recording
// …") and tokens: none can be taken for another.
const cosignHeader = "sallyport/cosignature/v1\n"

// A Cosigner is a voter's name and public key.
type Cosigner struct {
	Name string // of the node
	Key  *ecdsa.PublicKey
}

// NewCosigner is the cosigner of a node's certificate. Who signed the
// certificate is for the caller to check.
func NewCosigner(name string, cert *x509.Certificate) (Cosigner, error) {
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return Cosigner{}, fmt.Errorf("the certificate of %s has no ECDSA P-256 key", name)
	}
	return Cosigner{Name: name, Key: key}, nil
}

// keyName is a cosigner's name in a note: ORIGIN/NODE.
func keyName(origin, node string) string { return origin + "/" + node }

func (c Cosigner) keyID(origin string) (uint32, error) {
	spki, err := x509.MarshalPKIXPublicKey(c.Key)
	if err != nil {
		return 0, err
	}
	h := sha256.New()
	h.Write([]byte(keyName(origin, c.Name) + "\n" + keyType))
	h.Write(spki)
	return binary.BigEndian.Uint32(h.Sum(nil)), nil
}

// cosigned is what a cosignature is over: its header line, the time in seconds,
// and the checkpoint's text.
func cosigned(text string, unix uint64) []byte {
	d := sha256.Sum256(fmt.Appendf(nil, "%stime %d\n%s", cosignHeader, unix, text))
	return d[:]
}

// Cosign returns a node's cosignature: be32 key id, be64 time in seconds since
// 1970, ECDSA signature in ASN.1. It says that the node's own events up to
// c.Size have the root c.Root; the caller has made sure of that.
func Cosign(c Checkpoint, node string, key crypto.Signer, now time.Time) ([]byte, error) {
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("checkpoints are cosigned with ECDSA keys")
	}
	id, err := Cosigner{Name: node, Key: pub}.keyID(c.Origin)
	if err != nil {
		return nil, err
	}
	unix := uint64(max(now.Unix(), 0))
	sig, err := key.Sign(rand.Reader, cosigned(c.Text(), unix), crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("cosign a checkpoint: %w", err)
	}
	b := binary.BigEndian.AppendUint32(nil, id)
	b = binary.BigEndian.AppendUint64(b, unix)
	return append(b, sig...), nil
}

// maxCosignature: 12 bytes before the signature, which has up to 72.
const maxCosignature = 96

// Check checks one cosignature of this cosigner's and returns its time.
func (c Cosigner) Check(cp Checkpoint, cosignature []byte) (time.Time, error) {
	if len(cosignature) < 12 || len(cosignature) > maxCosignature {
		return time.Time{}, fmt.Errorf("%w: %d bytes", ErrCosignature, len(cosignature))
	}
	id, err := c.keyID(cp.Origin)
	if err != nil {
		return time.Time{}, err
	}
	unix := binary.BigEndian.Uint64(cosignature[4:])
	if binary.BigEndian.Uint32(cosignature) != id || unix > 1<<62 || !ecdsa.VerifyASN1(c.Key, cosigned(cp.Text(), unix), cosignature[12:]) {
		return time.Time{}, fmt.Errorf("%w: that of %s", ErrCosignature, c.Name)
	}
	return time.Unix(int64(unix), 0).UTC(), nil
}

// Note puts a checkpoint and cosignatures, by node, together: a signed note as
// C2SP signed-note defines it. It does not check them.
func Note(c Checkpoint, cosignatures map[string][]byte) []byte {
	var b bytes.Buffer
	b.WriteString(c.Text() + "\n")
	names := make([]string, 0, len(cosignatures))
	for n := range cosignatures {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		fmt.Fprintf(&b, "— %s %s\n", keyName(c.Origin, n), base64.StdEncoding.EncodeToString(cosignatures[n]))
	}
	return b.Bytes()
}

// Cosignature is one line under a checkpoint.
type Cosignature struct {
	Node string
	Sig  []byte // as Cosign returned it
}

// ParseNote takes a checkpoint and its cosignatures apart, without checking
// them. What it accepts, Note writes in the same way, but for the order of lines.
func ParseNote(b []byte) (Checkpoint, []Cosignature, error) {
	if len(b) > MaxNote {
		return Checkpoint{}, nil, fmt.Errorf("%w: %d bytes", ErrNote, len(b))
	}
	_, err := note.Open(b, note.VerifierList()) // knows no key: everything stays unverified
	var unverified *note.UnverifiedNoteError
	if !errors.As(err, &unverified) {
		return Checkpoint{}, nil, fmt.Errorf("%w: %w", ErrNote, err)
	}
	n := unverified.Note
	c, err := parseText(n.Text)
	if err != nil {
		return Checkpoint{}, nil, err
	}
	var out []Cosignature
	for _, s := range n.UnverifiedSigs {
		node, ok := strings.CutPrefix(s.Name, c.Origin+"/")
		if !ok || node == "" {
			return Checkpoint{}, nil, fmt.Errorf("%w: signed by %q, which is no node of %q", ErrNote, s.Name, c.Origin)
		}
		raw, err := base64.StdEncoding.DecodeString(s.Base64)
		if err != nil {
			return Checkpoint{}, nil, fmt.Errorf("%w: %w", ErrNote, err)
		}
		if slices.ContainsFunc(out, func(o Cosignature) bool { return o.Node == node }) {
			return Checkpoint{}, nil, fmt.Errorf("%w: signed twice by %s", ErrNote, node)
		}
		out = append(out, Cosignature{Node: node, Sig: raw})
	}
	return c, out, nil
}

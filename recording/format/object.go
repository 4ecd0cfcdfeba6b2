// Package format is how recordings are stored: three kinds of signed objects
// (header, segment, trailer), the frames entries are kept in, and the Merkle
// tree over them. docs/recording-format.md is its specification.
//
// The package only encodes, decodes and checks one object at a time; what holds
// between objects is checked by recording/replay. Parsers are strict, never
// panic and allocate no more than a small multiple of their input, apart from
// decompression, which is bounded by MaxFramesBytes.
package format

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/sallyport/sallyport/recording"
)

// Version is the version of the format written. Parsers know this one only.
const Version = 1

// Kind is the kind of an object.
type Kind byte

const (
	KindHeader  Kind = 'H'
	KindSegment Kind = 'S'
	KindTrailer Kind = 'T'
)

func (k Kind) String() string {
	switch k {
	case KindHeader:
		return "header"
	case KindSegment:
		return "segment"
	case KindTrailer:
		return "trailer"
	}
	return fmt.Sprintf("kind %#02x", byte(k))
}

const (
	magic       = "SLYR"
	prefixBytes = 16 // magic, version, kind, two zero bytes, length of meta, length of body
	// MaxMetaBytes bounds an object's JSON. A header's claims are the largest
	// part of it; a token is at most 64 KiB.
	MaxMetaBytes = 1 << 20
	maxCertBytes = 64 << 10
	maxSigBytes  = 256 // ECDSA P-521 in ASN.1 needs 139
)

// ErrMalformed is wrapped by every error that says that bytes are not an
// object, a frame or an entry of this format.
var ErrMalformed = errors.New("malformed recording")

// ErrCut is ErrMalformed of an object that ends before it should.
var ErrCut = fmt.Errorf("%w: it is cut", ErrMalformed)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
}

// Hash is a SHA-256 digest; in JSON it is lower-case hex.
type Hash [sha256.Size]byte

func (h Hash) String() string               { return hex.EncodeToString(h[:]) }
func (h Hash) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h[:]), nil }

// UnmarshalText accepts exactly 64 hex digits.
func (h *Hash) UnmarshalText(b []byte) error {
	if len(b) != 2*len(h) {
		return malformed("a digest has %d hex digits, not %d", 2*len(h), len(b))
	}
	_, err := hex.Decode(h[:], b)
	return err
}

// Sum is the hash objects are chained by: SHA-256 of the whole object, its
// signature included.
func Sum(object []byte) Hash { return sha256.Sum256(object) }

// An object is the envelope common to the three kinds.
type object struct {
	kind   Kind
	meta   []byte // JSON
	body   []byte // certificate, compressed frames, or empty
	sig    []byte
	digest Hash // what sig is over
}

// signed returns the digest that the signature of an object is over: SHA-256
// of a domain that names format, version and kind, and all bytes before the
// signature's length.
func signed(kind Kind, before []byte) Hash {
	h := sha256.New()
	fmt.Fprintf(h, "sallyport recording v%d %s\x00", Version, kind)
	h.Write(before)
	return Hash(h.Sum(nil))
}

// seal builds and signs an object.
func seal(kind Kind, meta any, body []byte, signer crypto.Signer) ([]byte, error) {
	m, err := json.Marshal(meta)
	if err != nil {
		return nil, fmt.Errorf("recording: encode %s: %w", kind, err)
	}
	if len(m) > MaxMetaBytes {
		return nil, fmt.Errorf("recording: a %s of %d bytes is larger than %d", kind, len(m), MaxMetaBytes)
	}
	b := make([]byte, 0, prefixBytes+len(m)+len(body)+2+maxSigBytes)
	b = append(b, magic...)
	b = append(b, Version, byte(kind), 0, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(m)))
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
	b = append(b, m...)
	b = append(b, body...)
	d := signed(kind, b)
	sig, err := signer.Sign(rand.Reader, d[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("recording: sign %s: %w", kind, err)
	}
	if len(sig) == 0 || len(sig) > maxSigBytes {
		return nil, fmt.Errorf("recording: sign %s: a signature of %d bytes", kind, len(sig))
	}
	b = binary.BigEndian.AppendUint16(b, uint16(len(sig)))
	return append(b, sig...), nil
}

// parse takes an object apart. The result's slices point into b.
func parse(kind Kind, b []byte) (*object, error) {
	if len(b) > recording.MaxObjectBytes {
		return nil, malformed("%s of %d bytes", kind, len(b))
	}
	if len(b) < prefixBytes+2 {
		return nil, fmt.Errorf("%w: %s ends after %d bytes", ErrCut, kind, len(b))
	}
	if string(b[:4]) != magic {
		return nil, malformed("not a recording object")
	}
	if b[4] != Version {
		return nil, malformed("version %d of the format is not known to this program", b[4])
	}
	if Kind(b[5]) != kind {
		return nil, malformed("a %s where a %s belongs", Kind(b[5]), kind)
	}
	if b[6] != 0 || b[7] != 0 {
		return nil, malformed("reserved bytes are set")
	}
	metaLen, bodyLen := int64(binary.BigEndian.Uint32(b[8:])), int64(binary.BigEndian.Uint32(b[12:]))
	if metaLen > MaxMetaBytes {
		return nil, malformed("%s with %d bytes of meta data", kind, metaLen)
	}
	end := prefixBytes + metaLen + bodyLen
	if end+2 > int64(len(b)) {
		return nil, fmt.Errorf("%w: %s has %d bytes of at least %d", ErrCut, kind, len(b), end+2)
	}
	sigLen := int64(binary.BigEndian.Uint16(b[end:]))
	if end+2+sigLen > int64(len(b)) {
		return nil, fmt.Errorf("%w: %s has %d bytes of %d", ErrCut, kind, len(b), end+2+sigLen)
	}
	if sigLen == 0 || sigLen > maxSigBytes || end+2+sigLen != int64(len(b)) {
		return nil, malformed("%s is %d bytes long where its parts say %d", kind, len(b), end+2+sigLen)
	}
	return &object{
		kind:   kind,
		meta:   b[prefixBytes : prefixBytes+metaLen],
		body:   b[prefixBytes+metaLen : end],
		sig:    b[end+2:],
		digest: signed(kind, b[:end]),
	}, nil
}

// decodeMeta reads the JSON of an object: no unknown fields, nothing after it.
func (o *object) decodeMeta(to any) error {
	d := json.NewDecoder(bytes.NewReader(o.meta))
	d.DisallowUnknownFields()
	d.UseNumber()
	if err := d.Decode(to); err != nil {
		return malformed("%s: %v", o.kind, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return malformed("%s: bytes after its meta data", o.kind)
	}
	return nil
}

// SignedBy says whether the object was signed with the key of pub.
func (o *object) SignedBy(pub crypto.PublicKey) bool {
	k, ok := pub.(*ecdsa.PublicKey)
	return ok && ecdsa.VerifyASN1(k, o.digest[:], o.sig)
}

// CheckSigner returns the certificate in der when signer can sign recordings
// with it: an ECDSA key that is the certificate's.
func CheckSigner(signer crypto.Signer, der []byte) (*x509.Certificate, error) {
	if signer == nil {
		return nil, errors.New("recording: no key to sign with")
	}
	if len(der) > maxCertBytes {
		return nil, fmt.Errorf("recording: a certificate of %d bytes", len(der))
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("recording: the node's certificate: %w", err)
	}
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("recording: the node's key is %T; recordings are signed with ECDSA", cert.PublicKey)
	}
	if !pub.Equal(signer.Public()) {
		return nil, errors.New("recording: the node's certificate is for another key")
	}
	return cert, nil
}

package format

import (
	"crypto"
	"crypto/x509"

	"github.com/sallyport/sallyport/recording"
)

// TrailerMeta is what closes a recording.
type TrailerMeta struct {
	Session  string           `json:"session"`
	Ending   recording.Ending `json:"ending"`
	Segments uint64           `json:"segments"`
	Entries  uint64           `json:"entries"`
	Prev     Hash             `json:"prev"` // Sum of the last segment, or of the header when there is none
	Root     Hash             `json:"root"` // of the Merkle tree over all entries
	// CutBytes counts bytes found in the spool after a crash behind the last
	// whole entry: an entry that Append had not returned for, or damage.
	CutBytes int64 `json:"cut_bytes,omitempty"`
	// Failed tells why entries could no longer be written, when that happened.
	Failed string `json:"failed,omitempty"`
	// Certificate is set when another certificate than the header's signed.
	Certificate Continued `json:"certificate,omitempty"`
}

// Trailer is a parsed trailer object.
type Trailer struct {
	*object
	TrailerMeta
	Signer *x509.Certificate // nil: the header's
}

// SealTrailer returns the trailer object, signed by signer.
func SealTrailer(m TrailerMeta, signer crypto.Signer) ([]byte, error) {
	return seal(KindTrailer, &m, nil, signer)
}

// ParseTrailer takes a trailer object apart without checking its signature.
func ParseTrailer(b []byte) (*Trailer, error) {
	o, err := parse(KindTrailer, b)
	if err != nil {
		return nil, err
	}
	t := &Trailer{object: o}
	if err := o.decodeMeta(&t.TrailerMeta); err != nil {
		return nil, err
	}
	if len(o.body) != 0 {
		return nil, malformed("trailer with a body")
	}
	if err := recording.CheckSession(t.Session); err != nil {
		return nil, malformed("trailer: %v", err)
	}
	if t.Signer, err = t.Certificate.Parse(); err != nil {
		return nil, err
	}
	return t, nil
}

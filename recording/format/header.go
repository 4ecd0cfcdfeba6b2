package format

import (
	"crypto"
	"crypto/x509"

	"github.com/sallyport/sallyport/recording"
)

// Header is a parsed header object. Its Certificate is what the object
// carries: whether it can be trusted is for the reader to decide.
type Header struct {
	*object
	recording.Header
	Certificate *x509.Certificate
}

// SealHeader returns the header object of a recording, signed by signer, whose
// certificate is cert (DER).
func SealHeader(h *recording.Header, cert []byte, signer crypto.Signer) ([]byte, error) {
	return seal(KindHeader, h, cert, signer)
}

// ParseHeader takes a header object apart without checking its signature.
func ParseHeader(b []byte) (*Header, error) {
	o, err := parse(KindHeader, b)
	if err != nil {
		return nil, err
	}
	h := &Header{object: o}
	if err := o.decodeMeta(&h.Header); err != nil {
		return nil, err
	}
	if err := recording.CheckSession(h.Session); err != nil {
		return nil, malformed("header: %v", err)
	}
	if h.NodeSeq == 0 || (h.NodeSeq == 1) != (h.Prev == "") {
		return nil, malformed("header: number %d in the node's chain with predecessor %q", h.NodeSeq, h.Prev)
	}
	if len(o.body) > maxCertBytes {
		return nil, malformed("header: a certificate of %d bytes", len(o.body))
	}
	if h.Certificate, err = x509.ParseCertificate(o.body); err != nil {
		return nil, malformed("header: certificate: %v", err)
	}
	return h, nil
}

// Continued is a certificate that differs from the header's: that of who
// sealed this object after a restart with a new certificate.
type Continued []byte

// Parse returns the certificate, nil when there is none.
func (c Continued) Parse() (*x509.Certificate, error) {
	if len(c) == 0 {
		return nil, nil
	}
	if len(c) > maxCertBytes {
		return nil, malformed("a certificate of %d bytes", len(c))
	}
	cert, err := x509.ParseCertificate(c)
	if err != nil {
		return nil, malformed("certificate: %v", err)
	}
	return cert, nil
}

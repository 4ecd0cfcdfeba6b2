package postgres

import (
	"encoding/binary"

	"github.com/sallyport/sallyport/protocols/mask"
)

// column is one field of a RowDescription.
type column struct {
	table   uint32 // OID, 0 for an expression
	number  int16  // attribute number
	typ     uint32
	mask    mask.Kind
	masked  bool
	textual bool
}

// shape reads a RowDescription into dst.
func shape(dst []column, frame []byte) ([]column, error) {
	r := body(frame)
	n := r.count(19)
	dst = dst[:0]
	for range n {
		r.cstring()
		c := column{table: uint32(r.int32()), number: int16(r.int16()), typ: uint32(r.int32())}
		r.take(2 + 4 + 2) // typlen, typmod, format
		c.textual = textual(c.typ)
		dst = append(dst, c)
	}
	if !r.done() {
		return nil, malformed("RowDescription")
	}
	return dst, nil
}

// textual says that any text is a value of the type, the same in text and in
// binary format. A domain is reported as its base type.
func textual(oid uint32) bool {
	switch oid {
	case 25, 1043, 1042, 19: // text, varchar, bpchar, name
		return true
	}
	return false
}

// maskRow appends a DataRow with the masked columns replaced. It copies the
// others as they are, and allocates nothing when dst has room.
func maskRow(dst, frame []byte, cols []column, m *mask.Masker) ([]byte, error) {
	if len(frame) < headerBytes+2 || int(binary.BigEndian.Uint16(frame[headerBytes:])) != len(cols) {
		return dst, malformed("DataRow")
	}
	at, from, p := len(dst), 0, headerBytes+2 // frame[from:p] is to be copied
	for i := range cols {
		if len(frame)-p < 4 {
			return dst, malformed("DataRow")
		}
		n := int(int32(binary.BigEndian.Uint32(frame[p:])))
		end := p + 4 + max(n, 0)
		if n < -1 || end > len(frame) {
			return dst, malformed("DataRow")
		}
		if cols[i].masked && n >= 0 { // NULL stays NULL
			dst = append(dst, frame[from:p]...)
			v := len(dst)
			dst = append(dst, 0, 0, 0, 0)
			var null bool
			if dst, null = m.Append(dst, cols[i].mask, cols[i].textual, frame[p+4:end]); null {
				binary.BigEndian.PutUint32(dst[v:], 0xFFFFFFFF)
			} else {
				binary.BigEndian.PutUint32(dst[v:], uint32(len(dst)-v-4))
			}
			from = end
		}
		p = end
	}
	if p != len(frame) {
		return dst, malformed("DataRow")
	}
	dst = append(dst, frame[from:]...)
	binary.BigEndian.PutUint32(dst[at+1:], uint32(len(dst)-at-1))
	return dst, nil
}

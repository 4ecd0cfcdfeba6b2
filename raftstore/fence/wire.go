package fence

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// The stream: frames of a length (u32, of what follows it), a kind (u8) and
// fields in the order below, integers big-endian. The node speaks first.
//
//	hello   incarnation 16, length i64 ns, enforced u64, quiet u64, level u8, granted u8
//	renew   n u64, quiet u64, level u8
//	ack     seq u64, quiet u64, note …
//	bye     –
//
//	freeze  id 16, payload …
//	abort   id 16
//	revoke  prev u64, seq u64, id 16, payload …
//	grant   n u64, length i64 ns, revoked u64, folded u64
//	refuse  length of id u8, id, addr …
//
// A frame of another kind or shape ends the stream. Fields are fixed: what
// changes them is another class of connection.
type kind uint8

const (
	kindHello  kind = 1
	kindRenew  kind = 2
	kindAck    kind = 3
	kindBye    kind = 4
	kindFreeze kind = 16
	kindAbort  kind = 17
	kindRevoke kind = 18
	kindGrant  kind = 19
	kindRefuse kind = 20
)

// frame is any of them; which fields count, the kind says.
type frame struct {
	kind kind

	incarnation ID
	granted     bool // hello: this process has held a lease
	level       uint8
	length      time.Duration // of a lease
	n           uint64        // of a renewal
	// enforced: all revocations up to it fail their checks here. quiet: they
	// have come to rest, too.
	enforced, quiet uint64

	id        ID
	prev, seq uint64 // no revocation is between them
	revoked   uint64 // the newest revocation before a grant
	folded    uint64 // the event that a grant's user must have folded
	data      []byte // payload, note or address
	leader    string
}

const (
	headerBytes = 4
	maxFrame    = MaxPayload + 64
)

var errFrame = errors.New("malformed frame on the fence stream")

// append adds f to b as it goes on the wire.
func (f *frame) append(b []byte) []byte {
	at := len(b)
	b = append(b, 0, 0, 0, 0, byte(f.kind))
	u64 := func(vs ...uint64) {
		for _, v := range vs {
			b = binary.BigEndian.AppendUint64(b, v)
		}
	}
	switch f.kind {
	case kindHello:
		b = append(b, f.incarnation[:]...)
		u64(uint64(f.length), f.enforced, f.quiet)
		b = append(b, f.level, 0)
		if f.granted {
			b[len(b)-1] = 1
		}
	case kindRenew:
		u64(f.n, f.quiet)
		b = append(b, f.level)
	case kindAck:
		u64(f.seq, f.quiet)
		b = append(b, f.data...)
	case kindFreeze:
		b = append(append(b, f.id[:]...), f.data...)
	case kindAbort:
		b = append(b, f.id[:]...)
	case kindRevoke:
		u64(f.prev, f.seq)
		b = append(append(b, f.id[:]...), f.data...)
	case kindGrant:
		u64(f.n, uint64(f.length), f.revoked, f.folded)
	case kindRefuse:
		b = append(append(append(b, byte(len(f.leader))), f.leader...), f.data...)
	}
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at-headerBytes))
	return b
}

// parse reads the body of a frame, which it keeps.
func parse(b []byte) (*frame, error) {
	if len(b) == 0 {
		return nil, errFrame
	}
	f := &frame{kind: kind(b[0])}
	b = b[1:]
	ok := true
	u64 := func() (v uint64) {
		if len(b) < 8 {
			ok = false
			return 0
		}
		v, b = binary.BigEndian.Uint64(b), b[8:]
		return v
	}
	u8 := func() (v uint8) {
		if len(b) < 1 {
			ok = false
			return 0
		}
		v, b = b[0], b[1:]
		return v
	}
	id := func() (v ID) {
		if len(b) < len(v) {
			ok = false
			return v
		}
		b = b[copy(v[:], b):]
		return v
	}
	rest := func(most int) (v []byte) {
		if len(b) > most {
			ok = false
		}
		v, b = b, nil
		return v
	}
	switch f.kind {
	case kindHello:
		f.incarnation, f.length = id(), time.Duration(u64())
		f.enforced, f.quiet, f.level = u64(), u64(), u8()
		g := u8()
		f.granted = g == 1
		ok = ok && g <= 1 && f.length > 0
	case kindRenew:
		f.n, f.quiet, f.level = u64(), u64(), u8()
	case kindAck:
		f.seq, f.quiet, f.data = u64(), u64(), rest(MaxNote)
	case kindBye:
	case kindFreeze:
		f.id, f.data = id(), rest(MaxPayload)
	case kindAbort:
		f.id = id()
	case kindRevoke:
		f.prev, f.seq, f.id, f.data = u64(), u64(), id(), rest(MaxPayload)
		ok = ok && f.prev < f.seq
	case kindGrant:
		f.n, f.length, f.revoked, f.folded = u64(), time.Duration(u64()), u64(), u64()
		ok = ok && f.length > 0 && f.length <= MaxLength
	case kindRefuse:
		n := int(u8())
		if ok = ok && len(b) >= n; ok {
			f.leader, b = string(b[:n]), b[n:]
		}
		f.data = rest(1 << 10)
	default:
		return nil, fmt.Errorf("%w: kind %d", errFrame, f.kind)
	}
	if !ok || len(b) > 0 {
		return nil, fmt.Errorf("%w: kind %d", errFrame, f.kind)
	}
	return f, nil
}

// readFrame reads one frame.
func readFrame(r io.Reader) (*frame, error) {
	var head [headerBytes]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > maxFrame {
		return nil, fmt.Errorf("%w: %d bytes", errFrame, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	return parse(b)
}

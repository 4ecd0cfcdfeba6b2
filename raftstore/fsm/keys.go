package fsm

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// Keys of the state. The first byte tells the family; numbers are big-endian
// in keys, so that they sort.
//
//	D be64(k)      digest of the projections, 32 bytes, after the log entry that
//	               stored event 1024k
//	E be64(seq)    event: chain, 32 bytes, then the envelope
//	H 1 aggregate  be64 seq of an event of the aggregate, newest first: the key
//	               ends in the complements of be64(index) and be32(sub)
//	I id           be64 seq of the event with that idempotency id
//	M digest       see progress.writeDigest
//	M format       1
//	M head         see head
//	M history      1, be64 seq: events up to it are under H, but for the gap
//	M historygap   be64 from, be64 to: events from up to, not including, to are
//	               not under H yet; absent for none
//	M ids          be64 seq of the oldest event whose id may still be under I
//	M level        be32 the cluster's feature level; absent means event.BaseLevel
//	V aggregate    be64 version
//	X be64(index)  be64 first seq, be32 number of events of that log entry
const (
	prefixDigest    = 'D'
	prefixEvent     = 'E'
	prefixHistory   = 'H'
	prefixID        = 'I'
	prefixAggregate = 'V'
	prefixIndex     = 'X'

	stateFormat = 1
)

var (
	keyFormat = []byte("Mformat")
	keyHead   = []byte("Mhead")
	keyLevel  = []byte("Mlevel")
	keyIDs    = []byte("Mids")
	keyDigest = []byte("Mdigest")

	keyHistory    = []byte("Mhistory")
	keyHistoryGap = []byte("Mhistorygap")
)

func eventKey(seq uint64) []byte {
	return binary.BigEndian.AppendUint64(append(make([]byte, 0, 9), prefixEvent), seq)
}

func indexKey(index uint64) []byte {
	return binary.BigEndian.AppendUint64(append(make([]byte, 0, 9), prefixIndex), index)
}

func prefixed(p byte, s []byte) []byte { return append(append(make([]byte, 0, 1+len(s)), p), s...) }

// versionValue is nil for an aggregate that does not exist.
func versionValue(v uint64) []byte {
	if v == 0 {
		return nil
	}
	return binary.BigEndian.AppendUint64(nil, v)
}

// Head is where the state stands.
type Head struct {
	Applied uint64 // Raft index of the newest entry applied; no-ops and barriers do not move it
	Term    uint64 // and its term
	Seq     uint64 // newest event, 0 for none
	Index   uint64 // and its Raft index
	Time    int64  // and its time, ns since 1970 UTC
	Chain   [32]byte
}

const headSize = 5*8 + 32

func (h *Head) marshal() []byte {
	b := make([]byte, 0, headSize)
	for _, v := range []uint64{h.Applied, h.Term, h.Seq, h.Index, uint64(h.Time)} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return append(b, h.Chain[:]...)
}

func unmarshalHead(b []byte) (Head, error) {
	if len(b) != headSize {
		return Head{}, fmt.Errorf("the state's head has %d bytes, want %d", len(b), headSize)
	}
	h := Head{
		Applied: binary.BigEndian.Uint64(b),
		Term:    binary.BigEndian.Uint64(b[8:]),
		Seq:     binary.BigEndian.Uint64(b[16:]),
		Index:   binary.BigEndian.Uint64(b[24:]),
		Time:    int64(binary.BigEndian.Uint64(b[32:])),
	}
	copy(h.Chain[:], b[40:])
	return h, nil
}

// MarshalText is the head's stored bytes in hexadecimal, for manifests.
func (h Head) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h.marshal()), nil }

// UnmarshalText reads what MarshalText wrote.
func (h *Head) UnmarshalText(b []byte) error {
	raw, err := hex.AppendDecode(nil, b)
	if err == nil {
		*h, err = unmarshalHead(raw)
	}
	return err
}

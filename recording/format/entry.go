package format

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/sallyport/sallyport/recording"
)

const (
	// MaxEntryBytes bounds the encoding of one entry. Larger responses are
	// split by who records them.
	MaxEntryBytes = 16 << 20
	// MaxFramesBytes bounds the frames of one segment: what a segment may hold
	// before it is closed (at most 16 MiB) and one entry more, with what was
	// buffered before it.
	MaxFramesBytes = 40 << 20

	maxActions  = 1 << 14 // pairs in one statement; the gateway's own limit is far lower
	maxDetail   = 1 << 10
	frameHead   = 8 // length and CRC-32C, big endian
	endingField = 100
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Field numbers of an entry. They are never used for anything else.
const (
	fieldLSN         = 1
	fieldAt          = 2
	fieldType        = 3
	fieldOp          = 4
	fieldVerb        = 5
	fieldEffect      = 6
	fieldRule        = 7
	fieldReason      = 8
	fieldPolicyIndex = 9
	fieldActions     = 10
	fieldApproval    = 11
	fieldActor       = 12
	fieldDetail      = 13
	fieldText        = 14
	fieldData        = 15
	fieldRows        = 16
	fieldDuration    = 17
)

// AppendEntry appends the frame of e to b. It fails, leaving b as it was, when
// e cannot be stored; it keeps nothing of e.
func AppendEntry(b []byte, e *recording.Entry) ([]byte, error) {
	if len(e.Actions) > maxActions {
		return b, fmt.Errorf("recording: an entry with %d actions; at most %d can be recorded", len(e.Actions), maxActions)
	}
	if len(e.Detail) > maxDetail {
		return b, fmt.Errorf("recording: an entry with %d details; at most %d can be recorded", len(e.Detail), maxDetail)
	}
	// Refused before it is copied; the exact check follows.
	if len(e.Data) > MaxEntryBytes || len(e.Text) > MaxEntryBytes {
		return b, fmt.Errorf("recording: an entry of %d bytes; at most %d can be recorded", len(e.Data)+len(e.Text), MaxEntryBytes)
	}
	start := len(b)
	out := append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	out = appendUint(out, fieldLSN, uint64(e.LSN))
	if !e.At.IsZero() {
		out = appendUint(out, fieldAt, protowire.EncodeZigZag(e.At.UnixNano()))
	}
	out = appendUint(out, fieldType, uint64(e.Type))
	out = appendUint(out, fieldOp, e.Op)
	out = appendString(out, fieldVerb, e.Verb)
	out = appendString(out, fieldEffect, e.Effect)
	out = appendString(out, fieldRule, e.Rule)
	out = appendString(out, fieldReason, e.Reason)
	out = appendUint(out, fieldPolicyIndex, e.PolicyIndex)
	for _, a := range e.Actions {
		out = protowire.AppendTag(out, fieldActions, protowire.BytesType)
		out = protowire.AppendString(out, a)
	}
	out = appendString(out, fieldApproval, e.Approval)
	out = appendString(out, fieldActor, e.Actor)
	if len(e.Detail) > 0 {
		var few [8]string
		keys := few[:0]
		for k := range e.Detail {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for _, k := range keys {
			v := e.Detail[k]
			n := 1 + protowire.SizeBytes(len(k)) + 1 + protowire.SizeBytes(len(v))
			out = protowire.AppendTag(out, fieldDetail, protowire.BytesType)
			out = protowire.AppendVarint(out, uint64(n))
			out = protowire.AppendTag(out, 1, protowire.BytesType)
			out = protowire.AppendString(out, k)
			out = protowire.AppendTag(out, 2, protowire.BytesType)
			out = protowire.AppendString(out, v)
		}
	}
	out = appendBytes(out, fieldText, e.Text)
	out = appendBytes(out, fieldData, e.Data)
	out = appendUint(out, fieldRows, e.Rows)
	out = appendUint(out, fieldDuration, protowire.EncodeZigZag(int64(e.Duration)))
	if n := len(out) - start - frameHead; n > MaxEntryBytes {
		return b, fmt.Errorf("recording: an entry of %d bytes; at most %d can be recorded", n, MaxEntryBytes)
	}
	closeFrame(out[start:])
	return out, nil
}

// AppendEnding appends the frame by which a spool file tells that its
// recording was closed. It is not part of a segment.
func AppendEnding(b []byte, end recording.Ending) ([]byte, error) {
	j, err := json.Marshal(end)
	if err != nil {
		return b, fmt.Errorf("recording: encode ending: %w", err)
	}
	start := len(b)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	b = protowire.AppendTag(b, endingField, protowire.BytesType)
	b = protowire.AppendBytes(b, j)
	closeFrame(b[start:])
	return b, nil
}

// closeFrame writes length and checksum into the first bytes of frame.
func closeFrame(frame []byte) {
	payload := frame[frameHead:]
	binary.BigEndian.PutUint32(frame, uint32(len(payload)))
	binary.BigEndian.PutUint32(frame[4:], crc32.Checksum(payload, castagnoli))
}

func appendUint(b []byte, f protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, f, protowire.VarintType), v)
}

func appendString(b []byte, f protowire.Number, v string) []byte {
	if v == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, f, protowire.BytesType), v)
}

func appendBytes(b []byte, f protowire.Number, v []byte) []byte {
	if len(v) == 0 {
		return b
	}
	return protowire.AppendBytes(protowire.AppendTag(b, f, protowire.BytesType), v)
}

// NextFrame returns the payload of the frame b begins with, and what follows.
// The payload points into b.
func NextFrame(b []byte) (payload, rest []byte, err error) {
	if len(b) < frameHead {
		return nil, nil, malformed("a frame ends after %d bytes", len(b))
	}
	n := int64(binary.BigEndian.Uint32(b))
	if n == 0 || n > MaxEntryBytes {
		return nil, nil, malformed("a frame of %d bytes", n)
	}
	if int64(len(b)) < frameHead+n {
		return nil, nil, malformed("a frame of %d bytes ends after %d", n, len(b)-frameHead)
	}
	payload, rest = b[frameHead:frameHead+n], b[frameHead+n:]
	if crc32.Checksum(payload, castagnoli) != binary.BigEndian.Uint32(b[4:]) {
		return nil, nil, malformed("a frame's checksum is wrong")
	}
	return payload, rest, nil
}

// DecodeEnding returns the ending that payload holds; false when the payload
// is an entry.
func DecodeEnding(payload []byte) (recording.Ending, bool, error) {
	var end recording.Ending
	num, typ, n := protowire.ConsumeTag(payload)
	if n < 0 || num != endingField || typ != protowire.BytesType {
		return end, false, nil
	}
	j, m := protowire.ConsumeBytes(payload[n:])
	if m < 0 || n+m != len(payload) {
		return end, true, malformed("ending: %v", protowire.ParseError(m))
	}
	if err := json.Unmarshal(j, &end); err != nil {
		return end, true, malformed("ending: %v", err)
	}
	return end, true, nil
}

// EntryLSN returns the LSN of an encoded entry without decoding the rest.
func EntryLSN(payload []byte) (recording.LSN, error) {
	num, typ, n := protowire.ConsumeTag(payload)
	if n < 0 || num != fieldLSN || typ != protowire.VarintType {
		return 0, malformed("an entry does not begin with its number")
	}
	v, m := protowire.ConsumeVarint(payload[n:])
	if m < 0 || v == 0 {
		return 0, malformed("an entry's number")
	}
	return recording.LSN(v), nil
}

// DecodeEntry decodes the payload of a frame. Text and Data of the result
// point into payload. It accepts what AppendEntry writes: fields in ascending
// order, none unknown, none with its zero value.
func DecodeEntry(payload []byte) (recording.Entry, error) {
	var e recording.Entry
	last := protowire.Number(0)
	lastKey := ""
	for len(payload) > 0 {
		num, typ, n := protowire.ConsumeTag(payload)
		if n < 0 {
			return e, malformed("entry: %v", protowire.ParseError(n))
		}
		payload = payload[n:]
		if num < last || num == last && num != fieldActions && num != fieldDetail {
			return e, malformed("entry: field %d after field %d", num, last)
		}
		last = num
		var v uint64
		var s []byte
		switch typ {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(payload)
			if n >= 0 && v == 0 {
				return e, malformed("entry: field %d is zero", num)
			}
		case protowire.BytesType:
			s, n = protowire.ConsumeBytes(payload)
			if n >= 0 && len(s) == 0 && num != fieldActions {
				return e, malformed("entry: field %d is empty", num)
			}
		default:
			return e, malformed("entry: field %d has wire type %d", num, typ)
		}
		if n < 0 {
			return e, malformed("entry: field %d: %v", num, protowire.ParseError(n))
		}
		payload = payload[n:]
		if isNumber(num) != (typ == protowire.VarintType) {
			return e, malformed("entry: field %d has wire type %d", num, typ)
		}
		switch num {
		case fieldLSN:
			e.LSN = recording.LSN(v)
		case fieldAt:
			e.At = time.Unix(0, protowire.DecodeZigZag(v)).UTC()
		case fieldType:
			if v > uint64(recording.Note) {
				return e, malformed("entry: type %d", v)
			}
			e.Type = recording.EntryType(v)
		case fieldOp:
			e.Op = v
		case fieldVerb:
			e.Verb = string(s)
		case fieldEffect:
			e.Effect = string(s)
		case fieldRule:
			e.Rule = string(s)
		case fieldReason:
			e.Reason = string(s)
		case fieldPolicyIndex:
			e.PolicyIndex = v
		case fieldActions:
			if len(e.Actions) == maxActions {
				return e, malformed("entry: more than %d actions", maxActions)
			}
			e.Actions = append(e.Actions, string(s))
		case fieldApproval:
			e.Approval = string(s)
		case fieldActor:
			e.Actor = string(s)
		case fieldDetail:
			k, val, err := decodeDetail(s)
			if err != nil {
				return e, err
			}
			if e.Detail == nil {
				e.Detail = make(map[string]string)
			} else if k <= lastKey {
				return e, malformed("entry: detail %q after %q", k, lastKey)
			}
			if len(e.Detail) == maxDetail {
				return e, malformed("entry: more than %d details", maxDetail)
			}
			lastKey = k
			e.Detail[k] = val
		case fieldText:
			e.Text = s
		case fieldData:
			e.Data = s
		case fieldRows:
			e.Rows = v
		case fieldDuration:
			e.Duration = time.Duration(protowire.DecodeZigZag(v))
		default:
			return e, malformed("entry: field %d is not known", num)
		}
	}
	if e.LSN == 0 || e.Type == 0 {
		return e, malformed("entry without number or type")
	}
	return e, nil
}

func isNumber(num protowire.Number) bool {
	switch num {
	case fieldLSN, fieldAt, fieldType, fieldOp, fieldPolicyIndex, fieldRows, fieldDuration:
		return true
	}
	return false
}

// decodeDetail takes one key and value apart: field 1 and field 2, both always there.
func decodeDetail(b []byte) (k, v string, err error) {
	var part [2]string
	for i := range part {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 || int(num) != i+1 || typ != protowire.BytesType {
			return "", "", malformed("entry: detail")
		}
		s, m := protowire.ConsumeBytes(b[n:])
		if m < 0 {
			return "", "", malformed("entry: detail: %v", protowire.ParseError(m))
		}
		part[i], b = string(s), b[n+m:]
	}
	if len(b) != 0 {
		return "", "", malformed("entry: bytes after a detail")
	}
	return part[0], part[1], nil
}

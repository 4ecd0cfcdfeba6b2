package event

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Limits of a proposal, in bytes. They bound what one caller can put into
// every node's log and state for ever.
const (
	MaxPayload   = 1 << 20 // a whole configuration directory is one event
	MaxType      = 128
	MaxAggregate = 512
	MaxActor     = 1 << 10 // each string of an Actor; a subject is issuer and sub together

	maxProposal = MaxPayload + MaxType + MaxAggregate + 6*MaxActor + 256
	maxEnvelope = maxProposal + 128
)

var (
	// ErrInvalid says that a proposal breaks a limit or lacks a field.
	ErrInvalid = errors.New("invalid event")
	// ErrUnknownType says that this build does not know the event's type or
	// its version.
	ErrUnknownType = errors.New("event type or version not known to this build")
	// ErrCorrupt says that bytes are not what this package writes.
	ErrCorrupt = errors.New("corrupt event")
)

// Validate checks the limits and that the type is known. It says nothing on
// the payload's meaning.
func (p *Proposal) Validate() error {
	if !Known(p.Type, p.Version) {
		return fmt.Errorf("%w: %q version %d", ErrUnknownType, p.Type, p.Version)
	}
	return p.validateShape()
}

func (p *Proposal) validateShape() error {
	switch {
	case p.ID.IsZero():
		return fmt.Errorf("%w: no id", ErrInvalid)
	case p.Type == "" || len(p.Type) > MaxType:
		return fmt.Errorf("%w: type of %d bytes, want 1 to %d", ErrInvalid, len(p.Type), MaxType)
	case p.Version == 0:
		return fmt.Errorf("%w: no version", ErrInvalid)
	case p.Aggregate == "" || len(p.Aggregate) > MaxAggregate:
		return fmt.Errorf("%w: aggregate of %d bytes, want 1 to %d", ErrInvalid, len(p.Aggregate), MaxAggregate)
	case len(p.Payload) > MaxPayload:
		return fmt.Errorf("%w: payload of %d bytes, at most %d", ErrInvalid, len(p.Payload), MaxPayload)
	case !utf8.ValidString(p.Type) || !utf8.ValidString(p.Aggregate):
		return fmt.Errorf("%w: type or aggregate is not UTF-8", ErrInvalid)
	}
	a := &p.Actor
	for _, s := range []string{a.Principal, string(a.Kind), a.Authn, a.CertFP, a.Source, a.Via} {
		if len(s) > MaxActor || !utf8.ValidString(s) {
			return fmt.Errorf("%w: an actor's text has %d bytes or is not UTF-8, at most %d", ErrInvalid, len(s), MaxActor)
		}
	}
	return nil
}

// Fields of a stored proposal. Numbers are never used again for something else.
//
//	 1 id        bytes, 16
//	 2 principal string
//	 3 kind      string
//	 4 authn     string
//	 5 certfp    string
//	 6 source    string
//	 7 via       string
//	 8 type      string
//	 9 version   uint32
//	10 aggregate string
//	11 expect    uint64, plus one so that Any is absent and 0 is 1
//	12 payload   bytes
//	13 cause     bytes, 16
//
// Empty fields are absent, fields stand in ascending order, each at most once.
// Another number is an error: it would be something this build cannot judge.
const (
	pID protowire.Number = iota + 1
	pPrincipal
	pKind
	pAuthn
	pCertFP
	pSource
	pVia
	pType
	pVersion
	pAggregate
	pExpect
	pPayload
	pCause
)

// Marshal encodes a proposal. The bytes go into the Raft log and from there,
// verbatim, into the event's envelope.
func (p *Proposal) Marshal() ([]byte, error) {
	if err := p.validateShape(); err != nil {
		return nil, err
	}
	b := make([]byte, 0, len(p.Payload)+len(p.Aggregate)+len(p.Type)+256)
	b = appendBytes(b, pID, p.ID[:])
	b = appendString(b, pPrincipal, p.Actor.Principal)
	b = appendString(b, pKind, string(p.Actor.Kind))
	b = appendString(b, pAuthn, p.Actor.Authn)
	b = appendString(b, pCertFP, p.Actor.CertFP)
	b = appendString(b, pSource, p.Actor.Source)
	b = appendString(b, pVia, p.Actor.Via)
	b = appendString(b, pType, p.Type)
	b = appendUint(b, pVersion, uint64(p.Version))
	b = appendString(b, pAggregate, p.Aggregate)
	b = appendUint(b, pExpect, p.Expect+1)
	if len(p.Payload) > 0 {
		b = appendBytes(b, pPayload, p.Payload)
	}
	if !p.Cause.IsZero() {
		b = appendBytes(b, pCause, p.Cause[:])
	}
	return b, nil
}

// UnmarshalProposal reads what Marshal wrote; anything else is ErrCorrupt.
// Whether the type is known is for the caller to ask. The payload is a copy.
func UnmarshalProposal(b []byte) (Proposal, error) {
	p := Proposal{Expect: Any}
	if len(b) > maxProposal {
		return Proposal{}, fmt.Errorf("%w: proposal of %d bytes", ErrCorrupt, len(b))
	}
	err := fields(b, func(n protowire.Number, v uint64, s []byte) error {
		switch n {
		case pID:
			return setID(&p.ID, s)
		case pPrincipal:
			p.Actor.Principal = string(s)
		case pKind:
			p.Actor.Kind = ActorKind(s)
		case pAuthn:
			p.Actor.Authn = string(s)
		case pCertFP:
			p.Actor.CertFP = string(s)
		case pSource:
			p.Actor.Source = string(s)
		case pVia:
			p.Actor.Via = string(s)
		case pType:
			p.Type = string(s)
		case pVersion:
			if v != uint64(uint32(v)) {
				return fmt.Errorf("%w: version %d", ErrCorrupt, v)
			}
			p.Version = uint32(v)
		case pAggregate:
			p.Aggregate = string(s)
		case pExpect:
			p.Expect = v - 1
		case pPayload:
			p.Payload = append([]byte(nil), s...)
		case pCause:
			return setID(&p.Cause, s)
		default:
			return fmt.Errorf("%w: unknown field %d of a proposal", ErrCorrupt, n)
		}
		return nil
	}, func(n protowire.Number) bool { return n == pVersion || n == pExpect })
	if err != nil {
		return Proposal{}, err
	}
	if err := p.validateShape(); err != nil {
		return Proposal{}, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return p, nil
}

// Fields of an envelope, the stored and hashed form of an event.
//
//	1 seq       uint64
//	2 index     uint64
//	3 sub       uint32
//	4 term      uint64
//	5 time      uint64, nanoseconds since 1970 UTC
//	6 version   uint64, the aggregate's version after the event
//	7 proposal  bytes, verbatim from the Raft log
//
// The rules of a proposal's fields hold here too. The chain is not part of the
// envelope, it is over it.
const (
	eSeq protowire.Number = iota + 1
	eIndex
	eSub
	eTerm
	eTime
	eVersion
	eProposal
)

// MarshalEnvelope encodes an event around its proposal's bytes, which are not
// looked into. The event's own Proposal and Chain are not used.
func MarshalEnvelope(e *Event, proposal []byte) []byte {
	b := make([]byte, 0, len(proposal)+64)
	b = appendUint(b, eSeq, e.Seq)
	b = appendUint(b, eIndex, e.Index)
	b = appendUint(b, eSub, uint64(e.Sub))
	b = appendUint(b, eTerm, e.Term)
	b = appendUint(b, eTime, uint64(e.Time.UnixNano()))
	b = appendUint(b, eVersion, e.AggregateVersion)
	return appendBytes(b, eProposal, proposal)
}

// UnmarshalEnvelope reads what MarshalEnvelope wrote. The event's Chain is
// left zero. The event keeps nothing of b.
func UnmarshalEnvelope(b []byte) (Event, error) {
	var e Event
	if len(b) > maxEnvelope {
		return Event{}, fmt.Errorf("%w: envelope of %d bytes", ErrCorrupt, len(b))
	}
	seen := false
	err := fields(b, func(n protowire.Number, v uint64, s []byte) error {
		switch n {
		case eSeq:
			e.Seq = v
		case eIndex:
			e.Index = v
		case eSub:
			if v != uint64(uint32(v)) {
				return fmt.Errorf("%w: position %d", ErrCorrupt, v)
			}
			e.Sub = uint32(v)
		case eTerm:
			e.Term = v
		case eTime:
			e.Time = Time(int64(v))
		case eVersion:
			e.AggregateVersion = v
		case eProposal:
			seen = true
			var err error
			e.Proposal, err = UnmarshalProposal(s)
			return err
		default:
			return fmt.Errorf("%w: unknown field %d of an envelope", ErrCorrupt, n)
		}
		return nil
	}, func(n protowire.Number) bool { return n < eProposal })
	if err != nil {
		return Event{}, err
	}
	if !seen || e.Seq == 0 {
		return Event{}, fmt.Errorf("%w: envelope without proposal or number", ErrCorrupt)
	}
	return e, nil
}

// Time is an event's time from nanoseconds since 1970, in UTC.
func Time(ns int64) time.Time { return time.Unix(0, ns).UTC() }

// Chain is the head of the hash chain after an envelope:
// SHA-256(0x02 || prev || SHA-256(envelope)). Before the first event it is zero.
func Chain(prev [32]byte, envelope []byte) [32]byte {
	leaf := sha256.Sum256(envelope)
	var b [65]byte
	b[0] = 0x02
	copy(b[1:], prev[:])
	copy(b[33:], leaf[:])
	return sha256.Sum256(b[:])
}

// fields walks an encoding's fields, which must ascend strictly: one meaning
// has one encoding. isUint tells a number's wire type, all others are bytes.
func fields(b []byte, f func(n protowire.Number, v uint64, s []byte) error, isUint func(protowire.Number) bool) error {
	var last protowire.Number
	for len(b) > 0 {
		n, typ, k := protowire.ConsumeTag(b)
		if k < 0 {
			return fmt.Errorf("%w: %w", ErrCorrupt, protowire.ParseError(k))
		}
		if n <= last {
			return fmt.Errorf("%w: field %d after %d", ErrCorrupt, n, last)
		}
		last, b = n, b[k:]
		var (
			v uint64
			s []byte
		)
		switch {
		case typ == protowire.VarintType && isUint(n):
			v, k = protowire.ConsumeVarint(b)
			if k >= 0 && v == 0 {
				return fmt.Errorf("%w: field %d is zero and not absent", ErrCorrupt, n)
			}
		case typ == protowire.BytesType && !isUint(n):
			s, k = protowire.ConsumeBytes(b)
			if k >= 0 && len(s) == 0 {
				return fmt.Errorf("%w: field %d is empty and not absent", ErrCorrupt, n)
			}
		default:
			return fmt.Errorf("%w: field %d has wire type %d", ErrCorrupt, n, typ)
		}
		if k < 0 {
			return fmt.Errorf("%w: %w", ErrCorrupt, protowire.ParseError(k))
		}
		if err := f(n, v, s); err != nil {
			return err
		}
		b = b[k:]
	}
	return nil
}

func setID(id *ID, s []byte) error {
	if len(s) != len(id) {
		return fmt.Errorf("%w: id of %d bytes", ErrCorrupt, len(s))
	}
	copy(id[:], s)
	return nil
}

func appendBytes(b []byte, n protowire.Number, v []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v)
}

func appendString(b []byte, n protowire.Number, v string) []byte {
	if v == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), v)
}

func appendUint(b []byte, n protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
}

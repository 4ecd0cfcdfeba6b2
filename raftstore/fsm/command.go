package fsm

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// Limits of one command, so that one Append cannot hold up the log: at 100
// Mbit/s the largest takes under a second to a follower.
const (
	MaxBatch   = 64      // proposals
	MaxCommand = 8 << 20 // bytes
)

// Command is one Raft log entry: proposals that are stored together or not at
// all, and what the leader knew when it proposed them.
//
// On the wire: a byte 1, the format, then fields in ascending order, absent
// when zero:
//
//	1 time   uint64, the leader's clock, ns since 1970 UTC
//	2 seq    uint64, the newest event the leader had applied
//	3 chain  bytes, 32, the leader's chain at that event
//	4 proposal bytes, repeated: see event.Proposal.Marshal
//	5 digest seq   uint64, of the newest digest the leader had recorded; from feature level 2 on
//	6 digest       bytes, 32
type Command struct {
	TimeNanos int64
	Seq       uint64
	Chain     [32]byte
	Proposals [][]byte
	Digest    Digest // Seq 0 for none
}

const commandFormat = 1

var errCommand = errors.New("log entry is not a command this build knows")

// Marshal encodes a command.
func (c *Command) Marshal() ([]byte, error) {
	if len(c.Proposals) == 0 || len(c.Proposals) > MaxBatch {
		return nil, fmt.Errorf("a batch of %d events, want 1 to %d", len(c.Proposals), MaxBatch)
	}
	size := 128
	for _, p := range c.Proposals {
		size += len(p) + 8
	}
	if size > MaxCommand {
		return nil, fmt.Errorf("a batch of %d bytes, at most %d", size, MaxCommand)
	}
	b := append(make([]byte, 0, size), commandFormat)
	if c.TimeNanos > 0 {
		b = protowire.AppendVarint(protowire.AppendTag(b, 1, protowire.VarintType), uint64(c.TimeNanos))
	}
	if c.Seq > 0 {
		b = protowire.AppendVarint(protowire.AppendTag(b, 2, protowire.VarintType), c.Seq)
		b = protowire.AppendBytes(protowire.AppendTag(b, 3, protowire.BytesType), c.Chain[:])
	}
	for _, p := range c.Proposals {
		b = protowire.AppendBytes(protowire.AppendTag(b, 4, protowire.BytesType), p)
	}
	if c.Digest.Seq > 0 {
		b = protowire.AppendVarint(protowire.AppendTag(b, 5, protowire.VarintType), c.Digest.Seq)
		b = protowire.AppendBytes(protowire.AppendTag(b, 6, protowire.BytesType), c.Digest.Sum[:])
	}
	return b, nil
}

// unmarshalCommand reads what Marshal wrote. Proposals point into b.
func unmarshalCommand(b []byte) (Command, error) {
	var c Command
	if len(b) == 0 || b[0] != commandFormat || len(b) > MaxCommand {
		return c, fmt.Errorf("%w: %d bytes", errCommand, len(b))
	}
	last := protowire.Number(0)
	for b = b[1:]; len(b) > 0; {
		n, typ, k := protowire.ConsumeTag(b)
		if k < 0 || n < last || n == last && n != 4 {
			return c, fmt.Errorf("%w: bad or misplaced field", errCommand)
		}
		last, b = n, b[k:]
		switch {
		case (n <= 2 || n == 5) && typ == protowire.VarintType:
			var v uint64
			v, k = protowire.ConsumeVarint(b)
			switch n {
			case 1:
				c.TimeNanos = int64(v)
			case 2:
				c.Seq = v
			default:
				c.Digest.Seq = v
			}
		case (n == 3 || n == 6) && typ == protowire.BytesType:
			var s []byte
			s, k = protowire.ConsumeBytes(b)
			if len(s) != len(c.Chain) {
				return c, fmt.Errorf("%w: a hash of %d bytes", errCommand, len(s))
			}
			if n == 3 {
				copy(c.Chain[:], s)
			} else {
				copy(c.Digest.Sum[:], s)
			}
		case n == 4 && typ == protowire.BytesType && len(c.Proposals) < MaxBatch:
			var s []byte
			s, k = protowire.ConsumeBytes(b)
			c.Proposals = append(c.Proposals, s)
		default:
			return c, fmt.Errorf("%w: field %d of wire type %d", errCommand, n, typ)
		}
		if k < 0 {
			return c, fmt.Errorf("%w: %w", errCommand, protowire.ParseError(k))
		}
		b = b[k:]
	}
	if len(c.Proposals) == 0 || c.TimeNanos < 0 {
		return c, fmt.Errorf("%w: no proposals or a negative time", errCommand)
	}
	return c, nil
}

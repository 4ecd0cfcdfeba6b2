package fsm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/cockroachdb/pebble/v2"

	"github.com/sallyport/sallyport/raftstore/event"
)

const (
	// digestEvery is after how many events the projections' digest is recorded.
	digestEvery = 1024
	// keepDigests bounds the recorded ones. A leader sends its newest, and who
	// follows is behind it by less than the log.
	keepDigests = 64
	// LevelDigest is the feature level from which commands carry digests.
	LevelDigest = 2
)

// Digest is over everything under the prefixes I, V and X after an event: what
// decides whether the next proposal is accepted. The chain covers the events
// alone; a node that keeps them right and the projections wrong, by a defect or
// a damaged disk, shows here. The history (H) is not in it: it decides nothing
// and may still be being built.
type Digest struct {
	Seq uint64 // a multiple of 1024, the event it was due at
	Sum [32]byte
}

// sum is a multiset hash: the sum of the SHA-256 of all pairs, as 256-bit
// numbers. It does not depend on an order, and changes by one hash for each
// pair that comes or goes. It finds faults, not forgeries.
type sum [4]uint64

func (s *sum) add(key, value []byte) {
	h, carry := pairHash(key, value), uint64(0)
	for i := range s {
		s[i], carry = bits.Add64(s[i], h[i], carry)
	}
}

func (s *sum) remove(key, value []byte) {
	h, borrow := pairHash(key, value), uint64(0)
	for i := range s {
		s[i], borrow = bits.Sub64(s[i], h[i], borrow)
	}
}

func pairHash(key, value []byte) (h [4]uint64) {
	b := make([]byte, 0, 128)
	b = binary.BigEndian.AppendUint32(b, uint32(len(key)))
	d := sha256.Sum256(append(append(b, key...), value...))
	for i := range h {
		h[i] = binary.LittleEndian.Uint64(d[8*i:])
	}
	return h
}

func (s *sum) marshal() (b [32]byte) {
	for i, v := range s {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return b
}

// project writes a pair of the projections in place of an old one, nil for
// none; value nil deletes it.
func (p *progress) project(b *pebble.Batch, key, old, value []byte) error {
	if old != nil {
		p.sum.remove(key, old)
	}
	if value == nil {
		return b.Delete(key, nil)
	}
	p.sum.add(key, value)
	return b.Set(key, value, nil)
}

// writeDigest stores the sum with the number of the event it is at.
func (p *progress) writeDigest(b *pebble.Batch) error {
	s := p.sum.marshal()
	return b.Set(keyDigest, append(binary.BigEndian.AppendUint64(nil, p.Seq), s[:]...), nil)
}

func digestKey(k uint64) []byte {
	return binary.BigEndian.AppendUint64(append(make([]byte, 0, 9), prefixDigest), k)
}

// recordDigest keeps the digest for comparison with the leader's.
func (p *progress) recordDigest(b *pebble.Batch) error {
	k := p.Seq / digestEvery
	p.mark = &Digest{Seq: k * digestEvery, Sum: p.sum.marshal()}
	if err := b.Set(digestKey(k), p.mark.Sum[:], nil); err != nil || k <= keepDigests {
		return err
	}
	return b.Delete(digestKey(k-keepDigests), nil)
}

// checkDigest compares our projections with the leader's. A digest we have
// not, or no longer, says nothing.
func checkDigest(r pebble.Reader, seq uint64, theirs Digest) error {
	if theirs.Seq == 0 {
		return nil
	}
	if theirs.Seq > seq || theirs.Seq%digestEvery != 0 {
		return fmt.Errorf("%w: the leader had a digest at event %d and we have only %d events", ErrDiverged, theirs.Seq, seq)
	}
	v, err := get(r, digestKey(theirs.Seq/digestEvery))
	if err != nil || v == nil {
		return err
	}
	if !bytes.Equal(v, theirs.Sum[:]) {
		return fmt.Errorf("%w: at event %d the projections' digest is %x here and %x there", ErrDiverged, theirs.Seq, v, theirs.Sum)
	}
	return nil
}

// Digest is the newest recorded digest of the projections, Seq 0 for none.
func (f *FSM) Digest() Digest {
	if d := f.digest.Load(); d != nil {
		return *d
	}
	return Digest{}
}

// adoptDigest reads the digest, or computes it over all of the projections
// when an older build wrote the newest events.
func (f *FSM) adoptDigest(p *progress) error {
	v, err := get(f.db, keyDigest)
	if err != nil {
		return err
	}
	if len(v) == 8+32 && binary.BigEndian.Uint64(v) == p.Seq {
		for i := range p.sum {
			p.sum[i] = binary.LittleEndian.Uint64(v[8+8*i:])
		}
	} else if err := f.sumUp(&p.sum); err != nil {
		return err
	} else {
		b := f.db.NewBatch()
		defer b.Close()
		if err := p.writeDigest(b); err != nil {
			return err
		}
		if err := b.Commit(pebble.NoSync); err != nil {
			return err
		}
	}
	k := p.Seq / digestEvery
	v, err = get(f.db, digestKey(k))
	p.mark = new(Digest)
	if err == nil && len(v) == len(p.mark.Sum) {
		p.mark.Seq = k * digestEvery
		copy(p.mark.Sum[:], v)
	}
	return err
}

func (f *FSM) sumUp(s *sum) error {
	for _, prefix := range []byte{prefixID, prefixAggregate, prefixIndex} {
		it, err := f.db.NewIter(&pebble.IterOptions{LowerBound: []byte{prefix}, UpperBound: []byte{prefix + 1}})
		if err != nil {
			return err
		}
		for ok := it.First(); ok; ok = it.Next() {
			v, err := it.ValueAndErr()
			if err != nil {
				it.Close()
				return err
			}
			s.add(it.Key(), v)
		}
		if err := it.Close(); err != nil {
			return err
		}
	}
	return nil
}

const (
	// levelForget is the feature level from which ids are forgotten: all nodes
	// must do it at the same entry.
	levelForget = 2
	// rememberNanos is how long an id is remembered at least, by the events'
	// time, and rememberEvents of how many events, so that a leader whose clock
	// is days ahead does not make all of them forgotten.
	rememberNanos  = 24 * 60 * 60 * 1_000_000_000
	rememberEvents = 4096
)

// forget removes the ids of events that are old, at most n: more than came
// with the command, so that it catches up, and bounded, so that no command is
// slow.
func (p *progress) forget(b *pebble.Batch, n int) error {
	from := p.ids
	for ; n > 0 && p.ids+rememberEvents <= p.Seq; n-- {
		v, err := get(b, eventKey(p.ids))
		if err != nil {
			return err
		}
		e, err := decodeEvent(p.ids, v)
		if err != nil {
			return err
		}
		if e.Time.UnixNano() > p.Time-rememberNanos {
			break
		}
		key := prefixed(prefixID, e.ID[:])
		v, err = get(b, key)
		if err != nil {
			return err
		}
		if len(v) == 8 && binary.BigEndian.Uint64(v) == p.ids { // not a later event's
			if err := p.project(b, key, v, nil); err != nil {
				return err
			}
		}
		p.ids++
	}
	if p.ids == from {
		return nil
	}
	return b.Set(keyIDs, binary.BigEndian.AppendUint64(nil, p.ids), nil)
}

func readIDs(r pebble.Reader) (uint64, error) {
	v, err := get(r, keyIDs)
	if err != nil || v == nil {
		return 1, err
	}
	if len(v) != 8 {
		return 0, fmt.Errorf("ids: %w", event.ErrCorrupt)
	}
	return binary.BigEndian.Uint64(v), nil
}

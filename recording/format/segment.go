package format

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/sallyport/sallyport/recording"
)

// SegmentMeta is what a segment says of itself.
type SegmentMeta struct {
	Session string        `json:"session"`
	Number  uint64        `json:"number"` // from 1
	First   recording.LSN `json:"first"`  // of its entries; they are consecutive
	Last    recording.LSN `json:"last"`
	Prev    Hash          `json:"prev"` // Sum of the object before: the previous segment, or the header
	Sealed  time.Time     `json:"sealed"`
	Bytes   int64         `json:"bytes"` // of its frames, uncompressed
	// Frontier is that of the Merkle tree over all entries from 1 to Last, so
	// that a recording can be continued from its newest segment alone.
	Frontier []Hash `json:"frontier"`
	// Certificate is set when another certificate than the header's signed.
	Certificate Continued `json:"certificate,omitempty"`
}

// Segment is a parsed segment object.
type Segment struct {
	*object
	SegmentMeta
	Signer *x509.Certificate // nil: the header's
	Tree   Tree              // after Last, as the segment says
}

// SealSegment compresses frames (the frames of m.First to m.Last, as
// AppendEntry made them), sets what follows from them in m (Bytes, Frontier,
// from tree, which must already hold the entries) and signs.
func SealSegment(m SegmentMeta, tree *Tree, frames []byte, signer crypto.Signer) ([]byte, error) {
	if len(frames) > MaxFramesBytes {
		return nil, fmt.Errorf("recording: a segment of %d bytes", len(frames))
	}
	if tree.Size() != uint64(m.Last) {
		return nil, errors.New("recording: the tree does not end where the segment does")
	}
	m.Bytes, m.Frontier = int64(len(frames)), tree.Frontier()
	enc := encoders.Get().(*zstd.Encoder)
	defer encoders.Put(enc)
	return seal(KindSegment, &m, enc.EncodeAll(frames, nil), signer)
}

// windowBytes is the zstd window. A reader must not need more memory than that
// for a window, whatever the frame's header asks for.
const windowBytes = 1 << 20

var encoders = sync.Pool{New: func() any {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(windowBytes), zstd.WithLowerEncoderMem(true))
	if err != nil {
		panic(err) // only for options that cannot be
	}
	return e
}}

var decoders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(windowBytes), zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(err)
	}
	return d
}}

// ParseSegment takes a segment object apart without checking its signature or
// its entries.
func ParseSegment(b []byte) (*Segment, error) {
	o, err := parse(KindSegment, b)
	if err != nil {
		return nil, err
	}
	s := &Segment{object: o}
	if err := o.decodeMeta(&s.SegmentMeta); err != nil {
		return nil, err
	}
	if err := recording.CheckSession(s.Session); err != nil {
		return nil, malformed("segment: %v", err)
	}
	if s.Number == 0 || s.First == 0 || s.Last < s.First {
		return nil, malformed("segment %d with entries %d to %d", s.Number, s.First, s.Last)
	}
	if s.Bytes <= 0 || s.Bytes > MaxFramesBytes {
		return nil, malformed("segment of %d bytes", s.Bytes)
	}
	var ok bool
	if s.Tree, ok = TreeAt(uint64(s.Last), s.Frontier); !ok {
		return nil, malformed("segment: a tree of %d entries with %d subtrees", s.Last, len(s.Frontier))
	}
	if s.Signer, err = s.Certificate.Parse(); err != nil {
		return nil, err
	}
	return s, nil
}

// oneGo is the size of frames up to which they are decompressed at once into
// memory for all of them: twice the usual segment. A third faster: see BenchmarkEntries.
const oneGo = 2 << 20

// Frames returns the segment's frames, decompressed. Above oneGo it allocates
// as it reads, so that a small object cannot claim much memory.
func (s *Segment) Frames() ([]byte, error) {
	d := decoders.Get().(*zstd.Decoder)
	defer decoders.Put(d)
	if s.Bytes <= oneGo {
		b, err := d.DecodeAll(s.body, make([]byte, 0, s.Bytes))
		if err != nil {
			return nil, malformed("segment: %v", err)
		}
		if int64(len(b)) != s.Bytes {
			return nil, malformed("segment: its frames are not %d bytes long", s.Bytes)
		}
		return b, nil
	}
	if err := d.Reset(bytes.NewReader(s.body)); err != nil {
		return nil, malformed("segment: %v", err)
	}
	defer d.Reset(nil)
	var buf bytes.Buffer
	buf.Grow(int(min(s.Bytes+1, 1<<20)))
	n, err := io.Copy(&buf, io.LimitReader(d, s.Bytes+1))
	if err != nil {
		return nil, malformed("segment: %v", err)
	}
	if n != s.Bytes {
		return nil, malformed("segment: its frames are not %d bytes long", s.Bytes)
	}
	return buf.Bytes(), nil
}

// Entries decompresses the segment and calls fn with each entry in order. It
// checks checksums and numbers, and that the entries extend tree, which
// it advances, to the tree that the segment states; with a nil tree (after a
// missing segment) it cannot. The entry's Text and Data are not reused and may
// be kept.
func (s *Segment) Entries(tree *Tree, fn func(*recording.Entry) error) error {
	if tree != nil && tree.Size() != uint64(s.First)-1 {
		return malformed("segment %d begins with entry %d after entry %d", s.Number, s.First, tree.Size())
	}
	frames, err := s.Frames()
	if err != nil {
		return err
	}
	lsn := s.First
	for ; len(frames) > 0; lsn++ {
		var payload []byte
		if payload, frames, err = NextFrame(frames); err != nil {
			return err
		}
		e, err := DecodeEntry(payload)
		if err != nil {
			return err
		}
		if e.LSN != lsn || lsn > s.Last {
			return malformed("entry %d where entry %d belongs", e.LSN, lsn)
		}
		if tree != nil {
			tree.Add(LeafHash(payload))
		}
		if fn != nil {
			if err := fn(&e); err != nil {
				return err
			}
		}
	}
	if lsn != s.Last+1 || tree != nil && tree.Root() != s.Tree.Root() {
		return malformed("the entries of segment %d are not those it was signed for", s.Number)
	}
	return nil
}

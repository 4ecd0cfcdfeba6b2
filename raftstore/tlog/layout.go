package tlog

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Root is what the keys of all objects of a log begin with. Below it:
//
//	checkpoint/NNNNNNNNN/NNN   a checkpoint with its cosignatures, numbered from 1
//	tile/L/N[.p/W]             hashes, as tlog-tiles
//	entries/N[.p/W]            entry bundles
//	large/N                    an entry too long for a bundle, by its leaf's number
//	cert/HEX                   a certificate (DER) by its SHA-256
const Root = "log/"

// CheckpointRoot is what the keys of checkpoints begin with. In the byte order
// of keys they are in the order of their numbers.
const CheckpointRoot = Root + "checkpoint/"

// CheckpointKey is the key of a checkpoint.
func CheckpointKey(number uint64) string {
	return fmt.Sprintf("%s%09d/%03d", CheckpointRoot, number/1000, number%1000)
}

// ParseCheckpointKey is the reverse of CheckpointKey.
func ParseCheckpointKey(key string) (number uint64, ok bool) {
	s, ok := strings.CutPrefix(key, CheckpointRoot)
	if !ok {
		return 0, false
	}
	high, low, _ := strings.Cut(s, "/")
	n, err := strconv.ParseUint(high+low, 10, 64)
	return n, err == nil && n > 0 && CheckpointKey(n) == key
}

// tilePath is N[.p/W] with N in groups of three digits, all but the last
// beginning with an x.
func tilePath(n uint64, width int) string {
	s := fmt.Sprintf("%03d", n%1000)
	for n >= 1000 {
		n /= 1000
		s = fmt.Sprintf("x%03d/%s", n%1000, s)
	}
	if width < TileWidth {
		s += fmt.Sprintf(".p/%d", width)
	}
	return s
}

func parseTilePath(s string) (n uint64, width int, ok bool) {
	width = TileWidth
	head, w, partial := strings.Cut(s, ".p/")
	if partial {
		var err error
		if width, err = strconv.Atoi(w); err != nil || width < 1 || width >= TileWidth {
			return 0, 0, false
		}
	}
	for part := range strings.SplitSeq(head, "/") {
		d, err := strconv.ParseUint(strings.TrimPrefix(part, "x"), 10, 16)
		if err != nil || d > 999 || n > maxSize {
			return 0, 0, false
		}
		n = n*1000 + d
	}
	return n, width, tilePath(n, width) == s
}

// TileKey is the key of the n-th tile of a level; width is TileWidth for a full one.
func TileKey(level int, n uint64, width int) string {
	return fmt.Sprintf("%stile/%d/%s", Root, level, tilePath(n, width))
}

// EntriesKey is the key of the n-th bundle of entries.
func EntriesKey(n uint64, width int) string { return Root + "entries/" + tilePath(n, width) }

// LargeKey is the key of the entry of a leaf that is not in its bundle.
func LargeKey(leaf uint64) string { return Root + "large/" + tilePath(leaf, TileWidth) }

// CertKey is the key of a certificate.
func CertKey(der []byte) string { return fmt.Sprintf("%scert/%x", Root, sha256.Sum256(der)) }

// ObjectKind is what an object holds.
type ObjectKind int

// Kinds of objects.
const (
	KindUnknown ObjectKind = iota
	KindCheckpoint
	KindTile
	KindEntries
	KindLarge
	KindCert
)

// Object is a key taken apart.
type Object struct {
	Kind   ObjectKind
	Level  int    // of a tile
	Number uint64 // of a checkpoint, tile, bundle or leaf
	Width  int    // of a tile or bundle
	Hash   Hash   // of a certificate
}

// ParseKey takes a key apart; KindUnknown for one that is none of ours.
func ParseKey(key string) Object {
	s, ok := strings.CutPrefix(key, Root)
	if !ok {
		return Object{}
	}
	dir, rest, _ := strings.Cut(s, "/")
	switch dir {
	case "checkpoint":
		if n, ok := ParseCheckpointKey(key); ok {
			return Object{Kind: KindCheckpoint, Number: n}
		}
	case "entries":
		if n, w, ok := parseTilePath(rest); ok {
			return Object{Kind: KindEntries, Number: n, Width: w}
		}
	case "tile":
		l, path, _ := strings.Cut(rest, "/")
		level, err := strconv.Atoi(l)
		n, w, ok := parseTilePath(path)
		if err == nil && ok && level >= 0 && level < 8 && TileKey(level, n, w) == key {
			return Object{Kind: KindTile, Level: level, Number: n, Width: w}
		}
	case "large":
		if n, w, ok := parseTilePath(rest); ok && w == TileWidth {
			return Object{Kind: KindLarge, Number: n}
		}
	case "cert":
		o := Object{Kind: KindCert}
		if h, err := hex.DecodeString(rest); err == nil && copy(o.Hash[:], h) == len(h) && hex.EncodeToString(o.Hash[:]) == rest {
			return o
		}
	}
	return Object{}
}

// TileSpan is a tile of some level, or a bundle.
type TileSpan struct {
	Level int
	N     uint64
	Width int
}

// NewTiles are the tiles that a tree of size newSize has and one of oldSize had
// not, lower levels first. Bundles are those of level 0.
func NewTiles(oldSize, newSize uint64) []TileSpan {
	var out []TileSpan
	for l := 0; newSize>>(TileHeight*l) > 0; l++ {
		from, to := oldSize>>(TileHeight*l), newSize>>(TileHeight*l)
		for n := from / TileWidth; n*TileWidth < to && from < to; n++ {
			out = append(out, TileSpan{Level: l, N: n, Width: int(min(to-n*TileWidth, TileWidth))})
		}
	}
	return out
}

const (
	// maxInBundle bounds an entry inside a bundle, and with it a bundle: 256
	// times this and a little. Longer ones, whole configurations mostly, are
	// objects of their own, so that a partial bundle does not repeat them.
	maxInBundle = 16 << 10
	// MaxBundle bounds a bundle.
	MaxBundle = TileWidth * (2 + maxInBundle)

	elsewhere = 0xffff // the length of an entry that is an object of its own
)

// ErrBundle says that bytes are not a bundle.
var ErrBundle = errors.New("not a bundle of entries")

// AppendEntry adds an envelope to a bundle. As in tlog-tiles an entry is its
// length, 16 bits big-endian, and its bytes; other than there, an entry longer
// than 16 KiB is 0xffff and its leaf hash, and large says that the envelope is
// to be stored at its LargeKey.
func AppendEntry(b, envelope []byte) (bundle []byte, large bool) {
	if len(envelope) > maxInBundle {
		leaf := LeafHash(envelope)
		return append(binary.BigEndian.AppendUint16(b, elsewhere), leaf[:]...), true
	}
	return append(binary.BigEndian.AppendUint16(b, uint16(len(envelope))), envelope...), false
}

// BundleEntry is an entry, or where it is.
type BundleEntry struct {
	Envelope []byte // nil when it is an object of its own
	Leaf     Hash   // set only then
}

// ParseBundle takes a bundle of width entries apart. Envelopes point into b.
func ParseBundle(b []byte, width int) ([]BundleEntry, error) {
	out := make([]BundleEntry, 0, min(max(width, 0), TileWidth))
	for len(b) > 0 {
		if len(out) == width {
			return nil, fmt.Errorf("%w: more than %d entries", ErrBundle, width)
		}
		if len(b) < 2 {
			return nil, fmt.Errorf("%w: cut after %d entries", ErrBundle, len(out))
		}
		n := int(binary.BigEndian.Uint16(b))
		b = b[2:]
		var e BundleEntry
		switch {
		case n == elsewhere && len(b) >= HashSize:
			copy(e.Leaf[:], b)
			n = HashSize
		case n == 0 || n > maxInBundle || n > len(b):
			return nil, fmt.Errorf("%w: entry %d of %d bytes", ErrBundle, len(out), n)
		default:
			e.Envelope = b[:n:n]
		}
		out = append(out, e)
		b = b[n:]
	}
	if len(out) != width {
		return nil, fmt.Errorf("%w: %d entries of %d", ErrBundle, len(out), width)
	}
	return out, nil
}

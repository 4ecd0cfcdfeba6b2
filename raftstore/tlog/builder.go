package tlog

import (
	"crypto/sha256"
	"math/bits"

	"golang.org/x/mod/sumdb/tlog"
)

// A Builder computes roots of a growing tree and its tiles, and keeps only what
// is not full: at most 256 hashes for each level of tiles. The zero Builder is
// the empty tree.
type Builder struct {
	size uint64
	tail [][]Hash // tail[l]: the hashes of level l's last tile, fewer than TileWidth
	// Full, when set, is called with each tile as it becomes full, the lower
	// before the higher; the hashes are valid during the call.
	Full func(level int, n uint64, hashes []Hash)
}

// Size is the number of leaves.
func (b *Builder) Size() uint64 { return b.size }

// Append adds a leaf.
func (b *Builder) Append(leaf Hash) {
	b.size++
	h := leaf
	for l := 0; ; l++ {
		if l == len(b.tail) {
			b.tail = append(b.tail, make([]Hash, 0, TileWidth))
		}
		b.tail[l] = append(b.tail[l], h)
		if len(b.tail[l]) < TileWidth {
			return
		}
		if b.Full != nil {
			b.Full(l, b.size>>(TileHeight*(l+1))-1, b.tail[l])
		}
		h = subtree(b.tail[l])
		b.tail[l] = b.tail[l][:0]
	}
}

// Tail is the partial tile of a level: nil when there is none. It is valid
// until the next Append.
func (b *Builder) Tail(level int) []Hash {
	if level >= len(b.tail) || len(b.tail[level]) == 0 {
		return nil
	}
	return b.tail[level]
}

// Levels is the number of levels of tiles.
func (b *Builder) Levels() int { return len(b.tail) }

// Root is the tree's hash; that of the empty tree is SHA-256("").
func (b *Builder) Root() Hash {
	if b.size == 0 {
		return sha256.Sum256(nil)
	}
	// The perfect subtrees of RFC 6962, from the right, smallest first.
	var (
		root Hash
		some bool
		buf  [TileWidth]Hash
	)
	for _, tail := range b.tail {
		for end := len(tail); end > 0; {
			w := 1 << bits.TrailingZeros(uint(end))
			h := subtree(buf[:copy(buf[:], tail[end-w:end])])
			if some {
				h = tlog.NodeHash(h, root)
			}
			root, some = h, true
			end -= w
		}
	}
	return root
}

// Clone returns a Builder that grows on its own, without Full.
func (b *Builder) Clone() *Builder {
	c := &Builder{size: b.size}
	for _, t := range b.tail {
		c.tail = append(c.tail, append(make([]Hash, 0, TileWidth), t...))
	}
	return c
}

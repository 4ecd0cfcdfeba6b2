package format

import (
	"crypto/sha256"
	"math/bits"
)

// Tree is the Merkle tree of RFC 6962 §2.1 over the entries of a recording, in
// compact form: the roots of its complete subtrees, largest first. The zero
// value is the empty tree.
type Tree struct {
	size     uint64
	frontier []Hash // one for each bit set in size
}

// LeafHash is the hash of one entry's encoding as a leaf.
func LeafHash(entry []byte) Hash {
	h := sha256.New()
	h.Write([]byte{0})
	h.Write(entry)
	return Hash(h.Sum(nil))
}

func nodeHash(left, right Hash) Hash {
	var b [1 + 2*sha256.Size]byte
	b[0] = 1
	copy(b[1:], left[:])
	copy(b[1+sha256.Size:], right[:])
	return sha256.Sum256(b[:])
}

// TreeAt returns the tree of that size with that frontier, as Frontier
// returned it. It reports false when they do not belong together.
func TreeAt(size uint64, frontier []Hash) (Tree, bool) {
	if bits.OnesCount64(size) != len(frontier) {
		return Tree{}, false
	}
	return Tree{size: size, frontier: append([]Hash(nil), frontier...)}, true
}

// Add appends a leaf.
func (t *Tree) Add(leaf Hash) {
	for s := t.size; s&1 == 1; s >>= 1 {
		last := len(t.frontier) - 1
		leaf = nodeHash(t.frontier[last], leaf)
		t.frontier = t.frontier[:last]
	}
	t.frontier = append(t.frontier, leaf)
	t.size++
}

// Size returns the number of leaves.
func (t *Tree) Size() uint64 { return t.size }

// Frontier returns a copy of the roots of the complete subtrees.
func (t *Tree) Frontier() []Hash { return append([]Hash{}, t.frontier...) }

// Clone returns a copy that grows independently.
func (t *Tree) Clone() Tree { return Tree{size: t.size, frontier: t.Frontier()} }

// Root returns the Merkle tree hash.
func (t *Tree) Root() Hash {
	if t.size == 0 {
		return sha256.Sum256(nil)
	}
	root := t.frontier[len(t.frontier)-1]
	for i := len(t.frontier) - 2; i >= 0; i-- {
		root = nodeHash(t.frontier[i], root)
	}
	return root
}

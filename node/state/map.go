package state

import (
	"hash/maphash"
	"iter"
	"math/bits"
	"slices"
)

// Map is a persistent map: With and Without return another one that shares all
// but a path of nodes with it, and what was handed out never changes. So a View
// keeps its maps, and the next View costs as much as what changed, however much
// there is. The zero Map is empty. Two Maps are equal with == when one is the
// other, unchanged.
//
// It is a hash array mapped trie: a branch has up to 32 slots, one for each
// value of the next 5 bits of the hash, and only those that are used have room.
// 10,000 keys are three branches deep. The seed is drawn for each process, so
// that nobody can choose keys that share their hashes.
type Map[V any] struct {
	root *branch[V]
	n    int
}

// branch holds the keys whose hashes begin alike. None but the root is empty or
// holds nothing but a leaf.
type branch[V any] struct {
	used  uint32 // bit i: there is a slot for i
	slots []slot[V]
}

// slot is a branch or a leaf.
type slot[V any] struct {
	branch *branch[V]
	leaf   *leaf[V]
}

// leaf is a key; next is another one with the same hash.
type leaf[V any] struct {
	hash  uint64
	key   string
	value V
	next  *leaf[V]
}

const (
	hashBits = 5
	hashMask = 1<<hashBits - 1
)

var seed = maphash.MakeSeed()

// Len is how many keys there are.
func (m Map[V]) Len() int { return m.n }

// Get returns the value of k, the zero value if there is none.
func (m Map[V]) Get(k string) V {
	v, _ := m.Find(k)
	return v
}

// Find returns the value of k, and whether there is one.
func (m Map[V]) Find(k string) (v V, found bool) {
	if m.root == nil {
		return v, false
	}
	return m.root.find(maphash.String(seed, k), k)
}

// With returns m with the value v for k.
func (m Map[V]) With(k string, v V) Map[V] { return m.with(maphash.String(seed, k), k, v) }

// Without returns m without k.
func (m Map[V]) Without(k string) Map[V] { return m.without(maphash.String(seed, k), k) }

// All yields all keys and their values, in no order.
func (m Map[V]) All() iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		if m.root != nil {
			m.root.each(yield)
		}
	}
}

// Values yields all values, in no order.
func (m Map[V]) Values() iter.Seq[V] {
	return func(yield func(V) bool) {
		for _, v := range m.All() {
			if !yield(v) {
				return
			}
		}
	}
}

func (m Map[V]) with(hash uint64, k string, v V) Map[V] {
	root := m.root
	if root == nil {
		root = &branch[V]{}
	}
	b, added := root.with(0, &leaf[V]{hash: hash, key: k, value: v})
	if added {
		m.n++
	}
	m.root = b
	return m
}

func (m Map[V]) without(hash uint64, k string) Map[V] {
	if m.root == nil {
		return m
	}
	s := m.root.without(0, hash, k)
	switch {
	case s.branch == m.root:
		return m
	case s.leaf != nil: // one is left: the root is a branch all the same
		s.branch, _ = (&branch[V]{}).with(0, s.leaf)
	}
	return Map[V]{root: s.branch, n: m.n - 1}
}

func (b *branch[V]) find(hash uint64, k string) (v V, found bool) {
	for h := hash; ; h >>= hashBits {
		bit := uint32(1) << (h & hashMask)
		if b.used&bit == 0 {
			return v, false
		}
		s := &b.slots[bits.OnesCount32(b.used&(bit-1))]
		if s.branch != nil {
			b = s.branch
			continue
		}
		for l := s.leaf; l != nil && l.hash == hash; l = l.next {
			if l.key == k {
				return l.value, true
			}
		}
		return v, false
	}
}

func (b *branch[V]) each(yield func(string, V) bool) bool {
	for i := range b.slots {
		s := &b.slots[i]
		if s.branch != nil && !s.branch.each(yield) {
			return false
		}
		for l := s.leaf; l != nil; l = l.next {
			if !yield(l.key, l.value) {
				return false
			}
		}
	}
	return true
}

// with returns b with l, a leaf of one key; the hash's first shift bits are
// b's. added says that the key is new.
func (b *branch[V]) with(shift uint, l *leaf[V]) (next *branch[V], added bool) {
	bit := uint32(1) << (l.hash >> shift & hashMask)
	at := bits.OnesCount32(b.used & (bit - 1))
	if b.used&bit == 0 {
		slots := make([]slot[V], len(b.slots)+1)
		copy(slots, b.slots[:at])
		copy(slots[at+1:], b.slots[at:])
		slots[at].leaf = l
		return &branch[V]{b.used | bit, slots}, true
	}
	next = &branch[V]{b.used, slices.Clone(b.slots)}
	s := &next.slots[at]
	switch old := s.leaf; {
	case s.branch != nil:
		s.branch, added = s.branch.with(shift+hashBits, l)
	case old.hash == l.hash:
		l.next, added = old.without(l.key)
		s.leaf, added = l, !added
	default: // two hashes that go on alike, for a while
		below := &branch[V]{1 << (old.hash >> (shift + hashBits) & hashMask), []slot[V]{{leaf: old}}}
		s.leaf = nil
		s.branch, added = below.with(shift+hashBits, l)
	}
	return next, added
}

// without returns what b is without k: b itself if it has no such key, another
// branch, a leaf alone, or nothing.
func (b *branch[V]) without(shift uint, hash uint64, k string) slot[V] {
	bit := uint32(1) << (hash >> shift & hashMask)
	at := bits.OnesCount32(b.used & (bit - 1))
	if b.used&bit == 0 {
		return slot[V]{branch: b}
	}
	var now slot[V]
	switch old := b.slots[at]; {
	case old.branch != nil:
		if now = old.branch.without(shift+hashBits, hash, k); now.branch == old.branch {
			return slot[V]{branch: b}
		}
	case old.leaf.hash == hash:
		var had bool
		if now.leaf, had = old.leaf.without(k); !had {
			return slot[V]{branch: b}
		}
	default:
		return slot[V]{branch: b}
	}
	if now == (slot[V]{}) {
		slots := slices.Delete(slices.Clone(b.slots), at, at+1)
		if len(slots) == 0 || len(slots) == 1 && slots[0].leaf != nil {
			return append(slots, slot[V]{})[0]
		}
		return slot[V]{branch: &branch[V]{b.used &^ bit, slots}}
	}
	if now.leaf != nil && len(b.slots) == 1 {
		return now
	}
	next := &branch[V]{b.used, slices.Clone(b.slots)}
	next.slots[at] = now
	return slot[V]{branch: next}
}

// without returns the list without k, and whether k was in it.
func (l *leaf[V]) without(k string) (rest *leaf[V], had bool) {
	switch {
	case l == nil:
		return nil, false
	case l.key == k:
		return l.next, true
	}
	if rest, had = l.next.without(k); !had {
		return l, false
	}
	c := *l
	c.next = rest
	return &c, true
}

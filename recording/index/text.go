package index

import "slices"

// Texts are compared with ASCII letters in lower case and each run of white
// space as one space, so that a statement is found however it was laid out.

// normalize appends text so to dst.
func normalize(dst, text []byte) []byte {
	space := false
	for _, c := range text {
		switch {
		case c == ' ' || c >= '\t' && c <= '\r':
			space = true
			continue
		case c >= 'A' && c <= 'Z':
			c += 'a' - 'A'
		}
		if space {
			dst = append(dst, ' ')
			space = false
		}
		dst = append(dst, c)
	}
	if space {
		dst = append(dst, ' ')
	}
	return dst
}

const (
	// maxTrigrams is how many different ones a filter is made for. With more it
	// would have to be larger than a row should be: those texts are read.
	maxTrigrams = 16 << 10
	// filterBits for each trigram and filterHashes: one that is not there is
	// taken to be there three times in a hundred, and a text has several.
	filterBits    = 8
	filterHashes  = 3
	minFilter     = 64 // bytes
	filterStep    = 64
	shortestText  = 3
	mostLookedFor = 64 // trigrams of a text that are looked for
)

// trigrams collects those of a recording's texts.
type trigrams struct {
	set  map[uint32]struct{}
	over bool
	buf  []byte
}

func (t *trigrams) add(text []byte) {
	if t.over || len(text) == 0 {
		return
	}
	if t.set == nil {
		t.set = map[uint32]struct{}{}
	}
	t.buf = normalize(t.buf[:0], text)
	for i := 0; i+3 <= len(t.buf); i++ {
		t.set[trigram(t.buf[i:])] = struct{}{}
		if len(t.set) > maxTrigrams {
			t.over, t.set = true, nil
			return
		}
	}
}

func trigram(b []byte) uint32 { return uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2]) }

// filter returns a Bloom filter of what was added: its size follows from how
// many there are, so that the same texts give the same bytes.
func (t *trigrams) filter() []byte {
	if t.over {
		return nil
	}
	n := max(minFilter, len(t.set)*filterBits/8)
	f := make([]byte, (n+filterStep-1)/filterStep*filterStep)
	for g := range t.set {
		for _, bit := range bits(g, len(f)) {
			f[bit/8] |= 1 << (bit % 8)
		}
	}
	return f
}

// bits are the places of a trigram in a filter of that many bytes.
func bits(g uint32, size int) (at [filterHashes]uint64) {
	// The finalizer of splitmix64 spreads 24 bits well over 64.
	x := uint64(g) + 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	x ^= x >> 31
	m := uint64(size) * 8
	step := x>>32 | 1
	for i := range at {
		at[i] = x % m
		x += step
	}
	return at
}

// mayHold says whether texts with that filter may hold text, which is
// normalized. A filter that tells nothing may hold anything.
func mayHold(filter []byte, text []byte) bool {
	if len(filter) == 0 || len(text) < shortestText {
		return true
	}
	for i := 0; i+3 <= len(text) && i < mostLookedFor; i++ {
		for _, bit := range bits(trigram(text[i:]), len(filter)) {
			if filter[bit/8]&(1<<(bit%8)) == 0 {
				return false
			}
		}
	}
	return true
}

// has says whether a set holds what a pattern asks for.
func has(set []string, pattern string) bool {
	return slices.ContainsFunc(set, func(s string) bool { return match(pattern, s) })
}

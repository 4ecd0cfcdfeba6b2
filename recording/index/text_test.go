package index

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// TestFilter: what is in a text is never denied, and what is not in it nearly
// always is.
func TestFilter(t *testing.T) {
	seed := rand.Uint64()
	t.Log("seed", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	const letters = "abcdefghijklmnopqrstuvwxyz_., 0123456789\n\tABC\xc3\xa9"
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = letters[rnd.IntN(len(letters))]
		}
		return b
	}
	falsely := 0
	const rounds = 2000
	for range rounds {
		text := random(rnd.IntN(2000))
		var tg trigrams
		tg.add(text)
		f := tg.filter()
		whole := normalize(nil, text)
		if len(whole) > 0 {
			from := rnd.IntN(len(whole))
			part := whole[from:min(len(whole), from+rnd.IntN(200))]
			if !mayHold(f, part) {
				t.Fatalf("%q is in %q, and the filter denies it", part, text)
			}
		}
		if other := normalize(nil, random(12)); !bytes.Contains(whole, other) && mayHold(f, other) {
			falsely++
		}
	}
	if falsely > rounds/50 {
		t.Errorf("%d of %d texts that are not there may be there", falsely, rounds)
	}
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"", "x", true}, {"x", "x", true}, {"x", "xy", false}, {"x*", "xy", true}, {"*y", "xy", true}, {"x*y", "xy", true},
		{"x*y*", "xaybz", true}, {"a*b*c", "axbxc", true}, {"a*b*c", "axcxb", false}, {"ab*ba", "aba", false}, {"*", "", true}, {"**x**", "yxy", true},
		{"*ab", "abab", true}, {"*a*ab", "aab", true},
	} {
		if got := match(c.pattern, c.s); got != c.want {
			t.Errorf("match(%q, %q) = %v", c.pattern, c.s, got)
		}
	}
}

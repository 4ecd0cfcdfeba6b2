package state

import (
	"fmt"
	"hash/maphash"
	"maps"
	"math/bits"
	"math/rand/v2"
	"testing"
)

// Random steps on a Map and on Go's own; earlier versions stay what they were,
// and the shape depends on what is in it alone. Hashes are made to collide, for
// a while or altogether.
func TestMap(t *testing.T) {
	for _, c := range []struct {
		name string
		hash func(string) uint64
	}{
		{"hashed", func(k string) uint64 { return maphash.String(seed, k) }},
		{"few hashes", func(k string) uint64 { return uint64(k[0] % 5) }},
		{"alike but for the last bits", func(k string) uint64 { return uint64(k[len(k)-1]) << 58 }},
		{"one hash", func(string) uint64 { return 1 << 63 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := rand.Uint64()
			t.Logf("seed %d", n)
			rng := rand.New(rand.NewPCG(n, 0))
			var m Map[int]
			want := map[string]int{}
			type version struct {
				m    Map[int]
				want map[string]int
			}
			var versions []version
			for i := range 4000 {
				k, grow := fmt.Sprint(rng.IntN(200)), 2+i/1000%2*5 // grows, shrinks, grows, shrinks
				if rng.IntN(9) >= grow {
					m, want[k] = m.with(c.hash(k), k, i), i
				} else {
					before := m
					m = m.without(c.hash(k), k)
					if _, had := want[k]; !had && m != before {
						t.Fatal("another map, though nothing was removed")
					}
					delete(want, k)
				}
				if i%97 == 0 {
					versions = append(versions, version{m, maps.Clone(want)})
				}
			}
			for i, last := range []string{"0", "1"} { // down to nothing, and up again
				if i == 1 {
					versions = append(versions, version{m, maps.Clone(want)})
				}
				for k := range want {
					m = m.without(c.hash(k), k)
				}
				if m.Len() != 0 || m.root != nil {
					t.Fatalf("%d left", m.Len())
				}
				m = m.with(c.hash(last), last, i)
				want = map[string]int{last: i}
			}
			for _, v := range versions {
				got := maps.Collect(v.m.All())
				if !maps.Equal(got, v.want) || v.m.Len() != len(v.want) {
					t.Fatalf("%d keys: %v\nwant %v", v.m.Len(), got, v.want)
				}
				for i := range 200 {
					if v.m.root == nil {
						continue
					}
					k := fmt.Sprint(i)
					got, found := v.m.root.find(c.hash(k), k)
					if want, has := v.want[k]; got != want || found != has {
						t.Fatalf("key %s: %d %v, want %d %v", k, got, found, want, has)
					}
				}
				checkShape(t, v.m.root, true)
			}
		})
	}
}

// checkShape: a slot for each bit, and no branch that could be its only leaf.
func checkShape(t *testing.T, b *branch[int], root bool) {
	t.Helper()
	if b == nil {
		return
	}
	if bits.OnesCount32(b.used) != len(b.slots) {
		t.Fatalf("%d slots for %b", len(b.slots), b.used)
	}
	if !root && (len(b.slots) == 0 || len(b.slots) == 1 && b.slots[0].leaf != nil) {
		t.Fatal("a branch for one leaf")
	}
	for _, s := range b.slots {
		if (s.branch == nil) == (s.leaf == nil) {
			t.Fatal("a slot is a branch or a leaf")
		}
		checkShape(t, s.branch, false)
	}
}

// The zero Map, and the exported ways in.
func TestMapExported(t *testing.T) {
	var m Map[int]
	if _, found := m.Find("a"); found || m.Get("a") != 0 || m.Len() != 0 || m.Without("a") != m {
		t.Fatal("the zero Map is not empty")
	}
	for k := range m.All() {
		t.Fatalf("it has %q", k)
	}
	one := m.With("a", 1)
	two := one.With("b", 2).With("a", 3)
	if one.Get("a") != 1 || one.Len() != 1 || two.Get("a") != 3 || two.Len() != 2 || two.Without("a").Len() != 1 || one == two {
		t.Fatal(maps.Collect(one.All()), maps.Collect(two.All()))
	}
	n := 0
	for range two.Values() {
		n++
		break // the iteration ends where its user does
	}
	if n != 1 {
		t.Fatal(n)
	}
}

//go:build chaosnext

package event

// ahead makes this the build that chaos runs upgrade to and back from: it
// stands for a release that stores a new type of event and a new version of one
// that there is. A cluster that has stored either can never be used by a
// release. Only builds with the tag chaosnext have it. A test holds that others
// do not.
const ahead = 1

// TypeMarked is stored by the leader now and then.
const TypeMarked = "chaos.marked"

// Marked means nothing.
type Marked struct {
	Node string `json:"node"`
}

func init() {
	kinds[TypeMarked] = of[Marked](Level)
	kinds[TypeRevoked].adds(Level, "chaos_marked")
}

// TestOnly says whether a type is one that only chaos runs store.
func TestOnly(typ string) bool { return typ == TypeMarked }

//go:build !chaosnext

package event

// ahead is 1 in the build that chaos runs upgrade to and back from (tag
// chaosnext).
const ahead = 0

// TestOnly says whether a type is one that only chaos runs store.
func TestOnly(string) bool { return false }

//go:build !chaosnext

package node

import "context"

// storeMarks stores events that only chaos runs know; there are none.
func (n *Node) storeMarks(context.Context) error { return nil }

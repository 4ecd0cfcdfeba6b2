package postgres

import "slices"

// maxName is the longest name of a prepared statement, portal or cursor. The
// target tells longer ones apart by their first 63 bytes only (NAMEDATALEN), so
// two names here could be one there.
const maxName = 63

// names knows what a name of a prepared statement or portal will mean to the
// target when a message that is being decoded now reaches it.
//
// The gateway decodes ahead of the target's answers, and after an error the
// target skips messages until Sync: what they would have changed stays as it
// was. So each change is a version: pending until the target has answered it,
// then confirmed, or undone when it was skipped or failed.
//
// Invariant: a pending version may be relied on within its own segment only
// (the messages up to the same Sync: when the change was skipped, so is
// whoever relies on it). Anyone else must wait for the target's answer.
// Guarded by session.mu.
type names[T any] struct {
	m map[string][]*version[T]
}

type version[T any] struct {
	name      string
	value     *T // nil: closed
	segment   uint64
	confirmed bool
}

func newNames[T any]() *names[T] { return &names[T]{m: map[string][]*version[T]{}} }

// len is how many names are in use.
func (n *names[T]) len() int { return len(n.m) }

// put gives name a new meaning, pending.
func (n *names[T]) put(name string, value *T, segment uint64) *version[T] {
	v := &version[T]{name: name, value: value, segment: segment}
	n.m[name] = append(n.m[name], v)
	return v
}

// get returns what name means in segment, nil for nothing. certain is false
// when that depends on an answer that is still to come.
func (n *names[T]) get(name string, segment uint64) (value *T, certain bool) {
	vs := n.m[name]
	if len(vs) == 0 {
		return nil, true
	}
	last := vs[len(vs)-1]
	return last.value, last.confirmed || last.segment == segment
}

// confirm says that the target has made the change.
func (n *names[T]) confirm(v *version[T]) {
	v.confirmed = true
	vs := n.m[v.name]
	for i := range vs {
		if vs[i] == v {
			vs = vs[i:]
			break
		}
	}
	if len(vs) == 1 && v.value == nil {
		delete(n.m, v.name)
		return
	}
	n.m[v.name] = vs
}

// undo says that the target has not made the change and never will.
func (n *names[T]) undo(v *version[T]) {
	vs := n.m[v.name]
	for i := range vs {
		if vs[i] == v {
			vs = append(vs[:i:i], vs[i+1:]...)
			break
		}
	}
	if len(vs) == 0 || (len(vs) == 1 && vs[0].confirmed && vs[0].value == nil) {
		delete(n.m, v.name)
		return
	}
	n.m[v.name] = vs
}

// any says whether some name that match takes is, or may come to be, in use.
func (n *names[T]) any(match func(name string) bool) bool {
	for name, vs := range n.m {
		if match(name) && slices.ContainsFunc(vs, func(v *version[T]) bool { return v.value != nil }) {
			return true
		}
	}
	return false
}

// forget drops everything confirmed, as the target has, but for what keep, when
// not nil, says that it keeps.
func (n *names[T]) forget(keep func(*T) bool) {
	for name, vs := range n.m {
		kept := vs[:0]
		for _, v := range vs {
			if !v.confirmed || (v.value != nil && keep != nil && keep(v.value)) {
				kept = append(kept, v)
			}
		}
		if len(kept) == 0 {
			delete(n.m, name)
		} else {
			n.m[name] = kept
		}
	}
}

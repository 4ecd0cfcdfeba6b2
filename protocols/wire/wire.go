// Package wire holds the bytes of one direction of a connection between a read
// and a write, without copying them: frames are slices of the buffer that the
// read filled.
package wire

import (
	"errors"
	"io"
)

// ErrFull is Fill's answer when there is no room: the caller must Discard or Grow.
var ErrFull = errors.New("wire: buffer is full")

// Buffer is a read buffer with a read position. It belongs to one goroutine.
type Buffer struct {
	b    []byte
	r, w int // b[r:w] is unread
	size int // what the buffer shrinks back to
}

// NewBuffer returns a buffer of size bytes.
func NewBuffer(size int) *Buffer { return &Buffer{b: make([]byte, size), size: size} }

// Unread is what was filled and not yet discarded. It is valid until the next
// Fill or Grow.
func (b *Buffer) Unread() []byte { return b.b[b.r:b.w] }

// Free is how many bytes Fill could read without growing.
func (b *Buffer) Free() int { return len(b.b) - (b.w - b.r) }

// Discard drops the first n unread bytes. It panics when there are fewer.
func (b *Buffer) Discard(n int) {
	if n < 0 || n > b.w-b.r {
		panic("wire: Discard of more than is there")
	}
	b.r += n
	if b.r == b.w {
		b.r, b.w = 0, 0
		if len(b.b) > b.size {
			b.b = make([]byte, b.size) // one large frame must not cost memory for the rest of the session
		}
	}
}

// Grow makes room for at least n unread bytes in all. The caller has checked n
// against a limit.
func (b *Buffer) Grow(n int) {
	if n <= len(b.b) {
		return
	}
	grown := make([]byte, n)
	b.w = copy(grown, b.b[b.r:b.w])
	b.b, b.r = grown, 0
}

// Append adds bytes that were read elsewhere. It reports false, and adds
// nothing, when there is no room.
func (b *Buffer) Append(p []byte) bool {
	if b.Free() < len(p) {
		return false
	}
	b.compact()
	b.w += copy(b.b[b.w:], p)
	return true
}

// Fill reads once from r. It returns r's error when it read nothing, and
// ErrFull when there is no room to read into.
func (b *Buffer) Fill(r io.Reader) error {
	b.compact()
	if b.w == len(b.b) {
		return ErrFull
	}
	n, err := r.Read(b.b[b.w:])
	b.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

func (b *Buffer) compact() {
	if b.r > 0 {
		b.w = copy(b.b, b.b[b.r:b.w])
		b.r = 0
	}
}

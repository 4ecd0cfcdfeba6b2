package wire

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

func TestBufferPassesEveryByteInOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	want := make([]byte, 200_000)
	for i := range want {
		want[i] = byte(r.Uint32())
	}
	src := iotest.HalfReader(bytes.NewReader(want))
	b := NewBuffer(1000)
	var got []byte
	for {
		if b.Free() == 0 {
			b.Grow(1000 + r.IntN(5000))
		}
		err := b.Fill(src)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
		n := r.IntN(len(b.Unread()) + 1)
		got = append(got, b.Unread()[:n]...)
		b.Discard(n)
	}
	got = append(got, b.Unread()...)
	if !bytes.Equal(got, want) {
		t.Fatal("bytes were lost or reordered")
	}
}

func TestBufferShrinksBack(t *testing.T) {
	b := NewBuffer(16)
	b.Grow(1 << 20)
	if !b.Append(make([]byte, 1<<20)) || b.Append([]byte{1}) {
		t.Fatal("Append does not respect the room")
	}
	if err := b.Fill(bytes.NewReader([]byte{1})); !errors.Is(err, ErrFull) {
		t.Fatalf("Fill of a full buffer: %v", err)
	}
	b.Discard(1 << 20)
	if b.Free() != 16 {
		t.Fatalf("holds %d bytes after a large frame", b.Free())
	}
}

package protocols

import (
	"net"
	"testing"
	"time"
)

// A client that was left inside a frame cannot be told anything: a cut does not
// wait for the end of a frame that nobody will send.
func TestCutInsideAFrame(t *testing.T) {
	defer func(d time.Duration) { lastWordsWait = d }(lastWordsWait)
	lastWordsWait = time.Hour
	client, far := net.Pipe()
	defer far.Close()
	s := &Session{Client: client, LastWords: func(*Refusal) []byte {
		t.Error("words inside a frame")
		return nil
	}}
	s.init()
	s.sending <- struct{}{} // whoever relays answers has it, inside a frame
	cut := make(chan struct{})
	go func() {
		defer close(cut)
		s.Cut(&Refusal{Rule: "revocation/1"})
	}()
	select {
	case <-cut:
		t.Fatal("cut while the frame may still be completed")
	case <-time.After(20 * time.Millisecond):
	}
	close(s.torn)
	select {
	case <-cut:
	case <-time.After(time.Minute):
		t.Fatal("the cut waits for the end of a frame that nobody sends")
	}
	if _, err := far.Read(make([]byte, 1)); err == nil {
		t.Fatal("the client's connection is open")
	}
}

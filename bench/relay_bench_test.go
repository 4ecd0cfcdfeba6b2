//go:build bench

// The last line of `make bench-raft`: what the fence's check costs a relay. It
// is here because only here may be imported what it needs: a session's fence,
// the gate that asks it, and a lease.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/session"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/raftstore/fence"
	"github.com/sallyport/sallyport/raftstore/storetest"
)

var (
	relayRounds  = flag.Int("relay-rounds", 40, "measurements of each kind, in turns")
	relayBytes   = flag.Int64("relay-bytes", 128<<20, "bytes relayed in each")
	benchResults = flag.String("results", "", "file that keeps the results, as JSON")
)

const relayChunk = 32 << 10

// open lets everything pass and asks nobody.
type open struct{}

func (open) Check() error                { return nil }
func (open) Enter(<-chan struct{}) error { return nil }
func (open) Holds() bool                 { return true }
func (open) Leave(int)                   {}

// quiet has nothing to enforce.
type quiet struct{}

func (quiet) Freeze(fence.ID, []byte) {}
func (quiet) Thaw(fence.ID)           {}
func (quiet) Enforce(fence.Revocation) <-chan []byte {
	c := make(chan []byte)
	close(c)
	return c
}

// lessee is a holder with a lease of the usual length, kept up in this process.
func lessee(t *testing.T) *fence.Holder {
	const length = 2500 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	g := fence.NewGrantor(fence.GrantorConfig{
		Length: length, Leads: func() (uint64, bool) { return 1, true },
		Prepare: func(context.Context) (uint64, time.Duration, error) { return 1, length, nil },
		Confirm: func(context.Context) (uint64, error) { return 1, nil },
		Members: func() []string { return []string{"n1"} }, Former: func() []string { return nil },
		Leader: func() (string, string) { return "n1", "" },
	})
	served := make(chan struct{})
	h := fence.NewHolder(fence.HolderConfig{
		Length: length, Enforcer: quiet{}, Leader: func() (string, string) { return "n1", "here" },
		Dial: func(context.Context, string, string) (net.Conn, error) {
			a, b := net.Pipe()
			go g.Serve(b, "n1") // ends with the stream, which the holder closes
			return a, nil
		},
	})
	go func() { defer close(served); g.Run(ctx) }()
	ended := make(chan struct{})
	go func() { defer close(ended); h.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-served; <-ended })
	for h.Check(0) != nil {
		changed := h.Changed()
		if h.Check(0) == nil {
			break
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Second):
			t.Fatal("no lease")
		}
	}
	return h
}

// pair is a connection over loopback.
func pair(t *testing.T) (a, b net.Conn) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = net.Dial("tcp", ln.Addr().String()); err == nil {
		b, err = ln.Accept()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// relay moves bytes from a source to a client through the gate of a session
// that f fences.
type relay struct {
	source, from, client net.Conn
	to                   *protocols.Gate
}

func newRelay(t *testing.T, f protocols.Fence) *relay {
	r := &relay{}
	r.source, r.from = pair(t)
	out, client := pair(t)
	r.to, r.client = protocols.NewGate(out), client
	s := &protocols.Session{Client: r.to, Env: &protocols.Env{Log: slog.New(slog.DiscardHandler)}}
	s.Begin(&protocols.Access{Fence: f, OnCut: func(func()) {}}) // sockets as sessions have them
	return r
}

func (r *relay) move(n int64) (time.Duration, error) {
	began := time.Now()
	errs := make(chan error, 2)
	go func() {
		b := make([]byte, relayChunk)
		var err error
		for sent := int64(0); sent < n && err == nil; sent += relayChunk {
			_, err = r.source.Write(b)
		}
		errs <- err
	}()
	go func() {
		b := make([]byte, relayChunk)
		var err error
		for moved, k := int64(0), 0; moved < n && err == nil; moved += int64(k) {
			if k, err = r.from.Read(b); err == nil {
				_, err = r.to.Write(b[:k])
			}
		}
		errs <- err
	}()
	_, err := io.CopyN(io.Discard, r.client, n)
	return time.Since(began), errors.Join(err, <-errs, <-errs)
}

func TestBenchRaft(t *testing.T) {
	h := lessee(t)
	entry := session.NewEntry(session.Info{ID: "measured"}, session.Lease{Check: func() error { return h.Check(0) }, Changed: h.Changed})
	checked := newRelay(t, &entry.Fence)
	free := newRelay(t, open{})
	var with, without storetest.Durations
	for i := range *relayRounds + 1 {
		a, err := checked.move(*relayBytes)
		b, err2 := free.move(*relayBytes)
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		if i > 0 { // buffers have grown
			with, without = append(with, a), append(without, b)
		}
	}
	speed := func(d time.Duration) string {
		return fmt.Sprintf("%.0f MiB/s", float64(*relayBytes)/(1<<20)/d.Seconds())
	}
	all := []storetest.Ratio{{Target: "T10", What: "bytes relayed with the fence's check / without, chunks of 32 KiB", AtLeast: true,
		Ratio: float64(without.At(50)) / float64(with.At(50)), Bound: 0.97, Beside: speed(with.At(50)) + " and " + speed(without.At(50))}}
	if *benchResults != "" {
		var err error
		if all, err = storetest.Keep(*benchResults, all); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range all {
		fmt.Println(r)
	}
}

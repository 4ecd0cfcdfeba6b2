package gossip

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// web is a network of nodes that dial each other by name.
type web struct {
	t       *testing.T
	mu      *sync.Mutex // guards addrs, which two webs may share
	addrs   map[string]string
	members []string
}

type node struct {
	*Gossip
	web  *web
	name string
	ln   net.Listener
	stop func()

	mu   sync.Mutex
	info Info
	key  []byte // nil: not there yet
}

func newWeb(t *testing.T, members ...string) *web {
	return &web{t: t, mu: new(sync.Mutex), addrs: map[string]string{}, members: members}
}

func (w *web) dial(ctx context.Context, name string) (net.Conn, error) {
	w.mu.Lock()
	addr := w.addrs[name]
	w.mu.Unlock()
	if addr == "" {
		return nil, errors.New("no such node")
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", addr)
}

var clusterKey = sha256.Sum256([]byte("key"))

func (w *web) start(name string, key []byte) *node {
	w.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	w.addrs[name] = ln.Addr().String()
	w.mu.Unlock()
	n := &node{web: w, name: name, ln: ln, key: key, info: Info{Zone: "zone-" + name, Version: "1", FeatureLevel: 2, Serving: true}}
	n.Gossip = New(Options{
		Node: name, Dial: w.dial, Listener: ln, Members: func() []string { return w.members },
		Key: func() ([]byte, error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			if n.key == nil {
				return nil, errors.New("no key yet")
			}
			return n.key, nil
		},
		Info: func() Info { n.mu.Lock(); defer n.mu.Unlock(); return n.info },
		Log:  slog.New(slog.DiscardHandler),
	})
	n.probe, n.gossip = 200*time.Millisecond, 20*time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		w.mu.Lock()
		delete(w.addrs, name)
		w.mu.Unlock()
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("%s: %v", name, err)
		}
		ln.Close()
	})
	w.t.Cleanup(n.stop)
	return n
}

// says waits until n says that about another.
func (n *node) says(about string, want func(Member) bool) {
	n.web.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		var got string
		for _, m := range n.Members() {
			if m.Name == about {
				if want(m) {
					return
				}
				got = fmt.Sprintf("%+v", m)
			}
		}
		if time.Now().After(deadline) {
			n.web.t.Fatalf("%s says of %s: %s", n.name, about, got)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func is(state string) func(Member) bool { return func(m Member) bool { return m.State == state } }

func TestGossip(t *testing.T) {
	w := newWeb(t, "a", "b", "c", "d")
	a, b := w.start("a", clusterKey[:]), w.start("b", clusterKey[:])
	c := w.start("c", clusterKey[:])
	for _, n := range []*node{a, b, c} {
		for _, o := range []string{"a", "b", "c"} {
			n.says(o, func(m Member) bool {
				return m.State == Alive && m.Zone == "zone-"+o && m.FeatureLevel == 2 && m.Serving && !m.Since.IsZero()
			})
		}
		n.says("d", is(Unknown))
	}
	// What a node says of itself goes round, cut to what others take.
	b.mu.Lock()
	b.info.Problem, b.info.Serving = strings.Repeat("x", 500), false
	b.mu.Unlock()
	a.says("b", func(m Member) bool { return len(m.Problem) == maxText && !m.Serving })
	c.stop()
	a.says("c", is(Dead))
	w.start("c", clusterKey[:])
	a.says("c", is(Alive))
	b.says("c", is(Alive))
}

// TestStrangers: who is no member, or has not the key, is not listened to.
func TestStrangers(t *testing.T) {
	w := newWeb(t, "a", "b", "c")
	a, b := w.start("a", clusterKey[:]), w.start("b", clusterKey[:])
	other := sha256.Sum256([]byte("another"))
	c := w.start("c", other[:])
	stranger := newWeb(t, "a", "b", "x")
	stranger.addrs, stranger.mu = w.addrs, w.mu
	x := stranger.start("x", clusterKey[:])
	a.says("b", is(Alive))
	x.says("x", is(Alive))
	// x has joined by its own lights, and told them of itself.
	x.says("a", is(Alive))
	for _, n := range []*node{a, b} {
		for _, m := range n.Members() {
			if m.Name == "x" || m.Name == "c" && m.State != Unknown {
				t.Errorf("%s says %+v", n.name, m)
			}
		}
		n.Gossip.mu.Lock()
		for name := range n.Gossip.mu.heard {
			if name == "x" || name == "c" {
				t.Errorf("%s has heard %s", n.name, name)
			}
		}
		n.Gossip.mu.Unlock()
	}
	if m := c.Members(); m[0].State != Unknown {
		t.Errorf("who has not the key hears: %+v", m)
	}
}

func TestKeyComesLate(t *testing.T) {
	w := newWeb(t, "a", "b")
	a, b := w.start("a", nil), w.start("b", clusterKey[:])
	if m := a.Members(); len(m) != 2 || m[0].State != Unknown {
		t.Errorf("%+v", m)
	}
	a.mu.Lock()
	a.key = clusterKey[:]
	a.mu.Unlock()
	a.says("b", is(Alive))
	b.says("a", is(Alive))
}

// TestGarbage: bytes that are none of ours do no harm.
func TestGarbage(t *testing.T) {
	w := newWeb(t, "a", "b")
	a := w.start("a", clusterKey[:])
	a.says("a", is(Alive))
	for _, s := range []string{"", "x", "P", "P\x00", "P\x00\x00", "P\xff\xffabc", "P\x00\x05hello", "S", "Shello", strings.Repeat("S", 1<<16)} {
		c, err := w.dial(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = c.Write([]byte(s))
		c.Close()
	}
	b := w.start("b", clusterKey[:])
	a.says("b", is(Alive))
	b.says("a", is(Alive))
}

func TestTransportRefuses(t *testing.T) {
	tr := &transport{}
	if _, err := tr.WriteTo(nil, "127.0.0.1:1"); err == nil {
		t.Error("wrote to an address")
	}
	if _, err := tr.DialTimeout("127.0.0.1:1", time.Second); err == nil {
		t.Error("dialled an address")
	}
}

package postgres_test

import (
	"bytes"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/protocols/protocoltest/pgserver"
	"github.com/sallyport/sallyport/recording"
)

var cutSeeds = flag.Int("cuts", 25, "how many random cuttings to try")
var cutSeed = flag.Uint64("cutseed", 0, "one seed to try")

// cutting reads in pieces of random size.
type cutting struct {
	net.Conn
	mu *sync.Mutex
	r  *rand.Rand
	n  int
}

func (c cutting) Read(b []byte) (int, error) {
	if len(b) > 0 {
		c.mu.Lock()
		b = b[:1+c.r.IntN(min(len(b), c.n))]
		c.mu.Unlock()
	}
	return c.Conn.Read(b)
}

func (c cutting) NetConn() net.Conn { return c.Conn }

// However both streams are cut, the client reads the same bytes and the record
// holds the same operations.
func TestCuttingChangesNothing(t *testing.T) {
	server := pgserver.Start(t, pgserver.WithHBA("host all all 127.0.0.1/32 scram-sha-256"))
	g := startOn(t, server).masked()
	effects := refuseDrop()
	g.Decide(rules(effects))
	g.Secured()
	var script []byte
	add := func(parts ...[]byte) {
		for _, p := range parts {
			script = append(script, p...)
		}
	}
	sync_ := frame('S')
	add(frame('Q', "SELECT id, email, pin, note FROM users ORDER BY id\x00"))
	add(extended("SELECT email, id FROM users ORDER BY id"), sync_)
	add(frame('Q', "DROP TABLE items\x00"), frame('Q', "SELECT label FROM items WHERE id < 20\x00"))
	add(extended("SELECT 1"), extended("DROP TABLE items"), extended("SELECT 2"), sync_)
	add(extended("SELECT 1/0"), extended("SELECT 2"), sync_)
	add(frame('P', "s\x00SELECT label FROM items WHERE id = $1\x00\x00\x00"), frame('D', "Ss\x00"), sync_)
	for i := range 3 {
		add(frame('B', "\x00s\x00\x00\x00\x00\x01\x00\x00\x00\x01", fmt.Sprint(i), "\x00\x00"), frame('D', "P\x00"), frame('E', "\x00\x00\x00\x00\x00"))
	}
	add(frame('H'), sync_, frame('C', "Ss\x00"), sync_)
	add(frame('Q', "BEGIN\x00"), frame('B', "p\x00\x00\x00\x00\x00\x00\x00\x00"), sync_)
	add(frame('Q', "ROLLBACK\x00"), frame('Q', "COPY items TO STDOUT\x00"), frame('Q', "\x00"), frame('Q', "SELECT upper(email) FROM users\x00"), frame('F', "\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00"))
	add(frame('Q', "SELECT repeat('x', 100000) AS big, g FROM generate_series(1, 3) g\x00"))
	add(frame('X'))

	run := func(seed uint64, n int) (string, string) {
		r := rand.New(rand.NewPCG(seed, 7))
		mu := &sync.Mutex{}
		wrap := func(c net.Conn) net.Conn { return cutting{c, mu, r, n} }
		g.WrapClient(wrap)
		g.WrapTarget(wrap)
		c := g.dial()
		c.startup("user", "prod-db", "database", g.db)
		c.expect('R')
		c.send('p', "good\x00")
		c.until('Z', 1)
		go c.Write(script)
		b, err := io.ReadAll(c)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		s := g.Last()
		<-s.Ended
		var ops strings.Builder
		var recorded []byte
		// What the target skips has no effect, and names in it mean what was
		// known of the error by then: that, and so how it is judged, is a matter
		// of time. Its outcome is not.
		skipped := map[uint64]bool{}
		for _, e := range s.Record.Entries(recording.Outcome) {
			skipped[e.Op] = e.Effect == "skipped"
		}
		for _, e := range s.Record.Entries() {
			if skipped[e.Op] {
				e.Text, e.Effect, e.Rule = nil, "", ""
			}
			switch e.Type {
			case recording.Response:
				recorded = append(recorded, e.Data...)
			case recording.Command, recording.Decided:
				fmt.Fprintf(&ops, "%d %d %s %s %s %s\n", e.Type, e.Op, e.Verb, e.Effect, e.Text, e.Rule)
			}
		}
		for _, e := range s.Record.Entries(recording.Outcome) {
			fmt.Fprintf(&ops, "outcome %d %s %s %d\n", e.Op, e.Effect, e.Reason, e.Rows)
		}
		if !bytes.Equal(recorded, b) {
			t.Fatalf("seed %d: the record differs from what left", seed)
		}
		if l := leak(b); l != "" {
			t.Fatalf("seed %d: leaked %q", seed, l)
		}
		return string(b), ops.String()
	}
	want, wantOps := run(0, 1<<20)
	if !strings.Contains(want, "[masked]") || strings.Count(wantOps, "refuse ") < 4 {
		t.Fatalf("the script does not do what it is to do:\n%s", wantOps)
	}
	seeds := []uint64{*cutSeed}
	if *cutSeed == 0 {
		seeds = nil
		base := uint64(time.Now().UnixNano())
		for i := range *cutSeeds {
			seeds = append(seeds, base+uint64(i))
		}
	}
	for i, seed := range seeds {
		size := []int{1, 9, 200, 5000}[(i+1)%4]
		if got, ops := run(seed, size); got != want || ops != wantOps {
			t.Fatalf("-cutseed %d: cut in pieces of up to %d bytes:\n%s\nwant\n%s", seed, size, ops, wantOps)
		}
	}
}

// A row of hundreds of megabytes passes in constant memory.
func TestGiantRow(t *testing.T) {
	g := start(t)
	r := g.login()
	g.Last().Record.Quiet()
	r.SetDeadline(time.Now().Add(2 * time.Minute))
	r.send('Q', "SELECT repeat(repeat('x', 1000000), 256)\x00")
	r.expect('T')
	var before, peak runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	buf := make([]byte, 64<<10)
	total := 0
	for total < 256_000_000 {
		n, err := r.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if total += n; total%(64<<20) < n {
			runtime.ReadMemStats(&peak)
			if grown := int64(peak.HeapAlloc) - int64(before.HeapAlloc); grown > 24<<20 {
				t.Fatalf("%d MiB more after %d MiB", grown>>20, total>>20)
			}
		}
	}
}

// A client that does not read stalls its own session and no other, and costs
// no memory; it can still be cut off.
func TestSlowClient(t *testing.T) {
	g := start(t)
	slow := g.login()
	slow.send('Q', "SELECT repeat('x', 1000) FROM generate_series(1, 300000)\x00")
	slowSession := g.Last()
	time.Sleep(500 * time.Millisecond)
	sent := slowSession.Access.Stats.BytesOut.Load()
	if sent > 50<<20 {
		t.Fatalf("%d bytes were taken on", sent)
	}
	c := g.connect()
	began := time.Now()
	for range 50 {
		if _, err := c.Exec(t.Context(), "SELECT 1"); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("50 statements beside it in %v", time.Since(began))
	began = time.Now()
	slowSession.Revoke("slow")
	select {
	case <-slowSession.Ended:
	case <-time.After(5 * time.Second):
		t.Fatal("a stalled session cannot be cut off")
	}
	if d := time.Since(began); d > 2*time.Second {
		t.Errorf("cut off after %v", d)
	}
}

// A masked row above the limit ends the result, not the node's memory.
func TestMaskedRowTooLarge(t *testing.T) {
	g := start(t).masked()
	if err := g.server.Exec(t.Context(), g.db, "UPDATE users SET name = repeat('n', 20000000) WHERE id = 1"); err != nil {
		t.Fatal(err)
	}
	r := g.login()
	r.send('Q', "SELECT email, name FROM users WHERE id = 1\x00")
	r.expect('T')
	if got := line('E', r.expect('E')); !strings.HasPrefix(got, "E 54000") {
		t.Fatal(got)
	}
}

// Deep pipelines neither stall nor grow without bound.
func TestDeepPipeline(t *testing.T) {
	g := start(t)
	r := g.login()
	go func() {
		var b []byte
		for range 20_000 {
			b = append(b, frame('B', "\x00\x00\x00\x00\x00\x00\x00\x00")...)
		}
		r.Write(append(frame('P', "\x00SELECT 1\x00\x00\x00"), append(b, frame('S')...)...))
	}()
	if got := r.until('Z', 1); len(got) != 20_002 {
		t.Fatalf("%d messages", len(got))
	}
}

// Direct TLS: the listener has ended it, and the client begins with its
// StartupMessage.
func TestDirectTLS(t *testing.T) {
	g := start(t)
	g.Secured()
	config := g.TLS.Clone()
	config.NextProtos = []string{"postgresql"}
	g.WrapClient(func(c net.Conn) net.Conn { return tls.Server(c, config) })
	r := g.dial()
	r.Conn = tls.Client(r.Conn, &tls.Config{RootCAs: g.Roots, ServerName: "localhost", NextProtos: []string{"postgresql"}})
	r.startup("user", "prod-db", "database", g.db)
	r.expect('R')
	r.send('p', "good\x00")
	r.until('Z', 1)
	r.send('Q', "SELECT 1\x00")
	if got := r.until('Z', 1); len(got) != 4 {
		t.Fatalf("%q", got)
	}
	// SSLRequest inside TLS is not a thing.
	r = g.dial()
	r.Conn = tls.Client(r.Conn, &tls.Config{RootCAs: g.Roots, ServerName: "localhost"})
	r.Write([]byte{0, 0, 0, 8, 4, 210, 22, 47})
	if got := line('E', r.expect('E')); !strings.HasPrefix(got, "E 08P01") {
		t.Error(got)
	}
}

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestSandbox runs the tests below inside a sandbox, in a process of its own.
func TestSandbox(t *testing.T) {
	if Inside() {
		t.Skip("already there")
	}
	if err := Available(t.Context()); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("CI must not skip this: %v", err)
		}
		t.Skip(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := Command(ctx, os.Args[0], "-test.run=^TestInside", "-test.v").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestInside") {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

func TestInside(t *testing.T) {
	if !Inside() {
		t.Skip("run by TestSandbox")
	}
	box, err := New()
	must(t, err)
	a, err := box.AddHost("a")
	must(t, err)
	b, err := box.AddHost("b")
	must(t, err)

	var udp net.PacketConn
	var tcp net.Listener
	must(t, b.Do(func() (err error) {
		if udp, err = net.ListenPacket("udp", b.IP.String()+":7000"); err == nil {
			tcp, err = net.Listen("tcp", b.IP.String()+":7000")
		}
		return err
	}))
	go echoUDP(udp)
	go acceptAll(tcp)
	// ping returns how long an echo from a took, or an error.
	ping := func() (took time.Duration, err error) {
		err = a.Do(func() error {
			c, err := net.Dial("udp", b.IP.String()+":7000")
			if err != nil {
				return err
			}
			defer c.Close()
			began := time.Now()
			buf := make([]byte, 16)
			for range 3 { // one packet may be lost anywhere
				if _, err = c.Write([]byte("ping")); err != nil {
					return err
				}
				must(t, c.SetReadDeadline(time.Now().Add(700*time.Millisecond)))
				if _, err = c.Read(buf); err == nil {
					took = time.Since(began)
					return nil
				}
			}
			return err
		})
		return took, err
	}
	up := func(when string) {
		t.Helper()
		if _, err := ping(); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
	}
	down := func(when string) {
		t.Helper()
		if _, err := ping(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%s: want silence, got %v", when, err)
		}
	}
	up("nothing is cut")
	must(t, Cut(b, a)) // the answers
	down("a is deaf")
	must(t, Mend(b, a))
	up("mended")
	must(t, Part([]*Host{a}, []*Host{b}))
	down("parted")
	must(t, Join([]*Host{a}, []*Host{b}))
	up("joined")

	t.Run("slow", func(t *testing.T) {
		if err := Slow(a, b, Line{Delay: 150 * time.Millisecond}); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("CI must not skip this: %v", err)
			}
			t.Skip(err)
		}
		if took, err := ping(); err != nil || took < 150*time.Millisecond {
			t.Fatalf("an echo over a link of 150 ms took %v, %v", took, err)
		}
		must(t, Slow(a, b, Line{Loss: 1}))
		down("everything is lost")
		must(t, box.MendAll())
		up("unslowed")
	})

	t.Run("capture", func(t *testing.T) {
		watch, err := a.NewCapture()
		must(t, err)
		defer watch.Stop()
		var c net.Conn
		must(t, a.Do(func() (err error) { c, err = net.Dial("tcp", b.IP.String()+":7000"); return err }))
		defer c.Close()
		f := Flow{Port: netip.MustParseAddrPort(c.LocalAddr().String()).Port(), To: netip.AddrPortFrom(b.IP, 7000)}
		_, err = c.Write(make([]byte, 1000))
		must(t, err)
		await(t, func() string {
			if sent := watch.After(f, time.Time{}); sum(sent) != 1000 {
				return fmt.Sprintf("of 1000 bytes the capture has %v", sent)
			}
			return ""
		})
		between := time.Now()
		if late := watch.After(f, between); len(late) != 0 {
			t.Fatalf("nothing was sent after %v: %v", between, late)
		}
		_, err = c.Write(make([]byte, 10))
		must(t, err)
		await(t, func() string {
			if late := watch.After(f, between); sum(late) != 10 {
				return fmt.Sprintf("after the first 1000 the capture has %v", late)
			}
			return ""
		})
		if watch.Lost() != 0 {
			t.Errorf("%d packets were lost", watch.Lost())
		}
	})
}

func sum(sent []Sent) (n int) {
	for _, s := range sent {
		n += s.Bytes
	}
	return n
}

func await(t *testing.T, try func() string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		why := try()
		if why == "" {
			return
		}
		if time.Now().After(end) {
			t.Fatal(why)
		}
	}
}

func echoUDP(c net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(buf[:n], from)
	}
}

func acceptAll(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() { _, _ = io.Copy(io.Discard, c) }()
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

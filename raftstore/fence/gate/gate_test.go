package gate

import (
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain runs the tests in a network namespace of their own; it also is the
// process that a test stops.
func TestMain(m *testing.M) {
	switch os.Getenv("SALLYPORT_GATE_TEST") {
	case "":
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), "SALLYPORT_GATE_TEST=inside")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL,
			UidMappings: []syscall.SysProcIDMap{{Size: 1, HostID: os.Getuid()}},
			GidMappings: []syscall.SysProcIDMap{{Size: 1, HostID: os.Getgid()}},
		}
		runtime.LockOSThread() // Pdeathsig is the thread's
		err := cmd.Run()
		if cmd.Process == nil {
			if os.Getenv("CI") != "" {
				println("namespaces cannot be made:", err.Error())
				os.Exit(1)
			}
			println("skipped, user namespaces are not allowed here:", err.Error())
			os.Exit(0)
		}
		os.Exit(cmd.ProcessState.ExitCode())
	case "inside":
		if out, err := exec.Command("/sbin/ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			if err := loopbackUp(); err != nil {
				println(string(out), err.Error())
				os.Exit(1)
			}
		}
		os.Exit(m.Run())
	case "writer":
		writer()
	}
}

// loopbackUp sets the flag that `ip link set lo up` would.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

const testMark = 0x5a000001

func lasting(d time.Duration) func() time.Duration { return func() time.Duration { return d } }

// control marks a socket before it connects.
func control(_, _ string, c syscall.RawConn) error {
	var err error
	if cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, testMark)
	}); cerr != nil {
		return cerr
	}
	return err
}

func guard(c net.Conn) error {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	return control("", "", raw)
}

func open(t *testing.T) *Gate {
	t.Helper()
	g, err := Open(testMark)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// pair returns two ends of a TCP connection; the first is the one to mark.
func pair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// arrives says whether a byte written to a comes out of b within d.
func arrives(t *testing.T, a, b net.Conn, d time.Duration) bool {
	t.Helper()
	if _, err := a.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	_ = b.SetReadDeadline(time.Now().Add(d))
	_, err := b.Read(make([]byte, 1))
	return err == nil
}

func TestGate(t *testing.T) {
	g := open(t)
	a, b := pair(t)
	if !arrives(t, a, b, 5*time.Second) {
		t.Fatal("an unmarked socket is held back")
	}
	if err := guard(a); err != nil {
		t.Fatal(err)
	}
	if arrives(t, a, b, 300*time.Millisecond) {
		t.Fatal("a shut gate let a byte out")
	}
	if packets, _, err := g.Dropped(); err != nil || packets == 0 {
		t.Fatalf("dropped %d packets, %v", packets, err)
	}
	if err := g.Extend(lasting(time.Minute)); err != nil {
		t.Fatal(err)
	}
	// The kernel repeats what was dropped.
	_ = b.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := b.Read(make([]byte, 1)); err != nil {
		t.Fatal("nothing comes through an open gate:", err)
	}
	if err := g.Shut(); err != nil {
		t.Fatal(err)
	}
	if arrives(t, a, b, 300*time.Millisecond) {
		t.Fatal("a gate that was shut again let a byte out")
	}
	// The end of the connection is told all the same, and no data with it.
	_ = a.(*net.TCPConn).SetLinger(0)
	a.Close()
	_ = b.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := b.Read(make([]byte, 1)); n != 0 || err == nil || err == io.EOF || os.IsTimeout(err) {
		t.Fatalf("read %d bytes, %v: want a reset", n, err)
	}
}

func TestGateEndsByItself(t *testing.T) {
	g := open(t)
	a, b := pair(t)
	if err := guard(a); err != nil {
		t.Fatal(err)
	}
	if err := g.Extend(lasting(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(310 * time.Millisecond)
	if arrives(t, a, b, 300*time.Millisecond) {
		t.Fatal("a byte left after the end of the lease")
	}
}

// Each of the two ends closes the gate alone: an element that has timed out,
// and a time that has passed.
func TestEitherEnds(t *testing.T) {
	for name, spoil := range map[string]func(*Gate){
		"timer": func(g *Gate) { g.nl.FlushSet(g.set) },
		"clock": func(g *Gate) { g.nl.FlushChain(g.lease) },
	} {
		t.Run(name, func(t *testing.T) {
			g := open(t)
			a, b := pair(t)
			if err := guard(a); err != nil {
				t.Fatal(err)
			}
			if err := g.Extend(lasting(time.Minute)); err != nil {
				t.Fatal(err)
			}
			if !arrives(t, a, b, 10*time.Second) {
				t.Fatal("an open gate holds back")
			}
			spoil(g)
			if err := g.nl.Flush(); err != nil {
				t.Fatal(err)
			}
			if arrives(t, a, b, 300*time.Millisecond) {
				t.Fatal("the other alone lets out")
			}
		})
	}
}

// A socket that has the mark before it connects is held back from its first packet on.
func TestDial(t *testing.T) {
	g := open(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d := net.Dialer{Control: control, Timeout: 300 * time.Millisecond}
	if c, err := d.Dial("tcp", l.Addr().String()); err == nil {
		c.Close()
		t.Fatal("dialled through a shut gate")
	}
	if err := g.Extend(lasting(time.Minute)); err != nil {
		t.Fatal(err)
	}
	d.Timeout = 10 * time.Second
	c, err := d.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// writer fills a connection as fast as it can; it checks nothing.
func writer() {
	signal.Ignore(syscall.SIGPIPE)
	d := net.Dialer{Control: control}
	c, err := d.Dial("tcp", os.Getenv("SALLYPORT_GATE_ADDR"))
	if err != nil {
		println(err.Error())
		os.Exit(1)
	}
	b := make([]byte, 64<<10)
	for {
		if _, err := c.Write(b); err != nil {
			os.Exit(0)
		}
	}
}

// A stopped process sends nothing after its lease, though its socket's buffers
// are full, and nothing when it wakes though it checks nothing itself.
func TestStoppedProcess(t *testing.T) {
	g := open(t)
	if err := g.Extend(lasting(time.Minute)); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var stderr strings.Builder
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "SALLYPORT_GATE_TEST=writer", "SALLYPORT_GATE_ADDR="+l.Addr().String())
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(20 * time.Second))
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err, stderr.String())
	}
	defer c.Close()
	buf := make([]byte, 1<<20)
	for total := 0; total < 8<<20; {
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		total += n
	}
	// Our side stops reading; the writer's buffers fill.
	time.Sleep(200 * time.Millisecond)
	const lease = 400 * time.Millisecond
	if err := g.Extend(lasting(lease)); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(lease + 50*time.Millisecond)
	waiting := func() int { // what has arrived and was not read
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		_ = raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	arrived := waiting()
	for read := 0; read < arrived; {
		n, err := c.Read(buf[:min(len(buf), arrived-read)])
		if err != nil {
			t.Fatal(err)
		}
		read += n
	}
	none := func(when string) {
		_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if n, err := c.Read(buf); err == nil {
			t.Fatalf("%s, %d bytes came after the end of the lease", when, n)
		}
	}
	none("while stopped") // the window is open again: only the gate holds it
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	none("after waking")
	if packets, _, err := g.Dropped(); err != nil || packets == 0 {
		t.Fatalf("nothing was held back (%d packets, %v): the test proves nothing", packets, err)
	}
}

// What a killed process left is replaced.
func TestReopen(t *testing.T) {
	g, err := Open(testMark)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Extend(lasting(time.Minute)); err != nil {
		t.Fatal(err)
	}
	_ = g.nl.CloseLasting() // the process is gone, its table is not
	again := open(t)
	a, b := pair(t)
	if err := guard(a); err != nil {
		t.Fatal(err)
	}
	if arrives(t, a, b, 300*time.Millisecond) {
		t.Fatal("the lease of the process before lets out")
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if err := again.Extend(lasting(time.Minute)); err == nil {
		t.Fatal("a closed gate was extended")
	}
}

func BenchmarkExtend(b *testing.B) {
	g, err := Open(testMark)
	if err != nil {
		b.Fatal(err)
	}
	defer g.Close()
	for b.Loop() {
		if err := g.Extend(lasting(time.Second)); err != nil {
			b.Fatal(err)
		}
	}
}

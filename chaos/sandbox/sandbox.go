// Package sandbox gives a chaos run a network of its own: a bridge, and hosts
// that are network namespaces with one cable to it, all inside a user, network
// and mount namespace that only this run sees. The machine's own network,
// firewall and mounts are not touched, and everything disappears with the last
// process of the run.
//
// A program that wants a sandbox starts itself again by Command and finds
// itself Inside. There, New makes the bridge and AddHost the hosts; Cut, Slow
// and Capture disturb and watch the cables.
package sandbox

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const insideVar = "SALLYPORT_CHAOS_SANDBOX"

// Inside reports whether this process was started by Command.
func Inside() bool { return os.Getenv(insideVar) != "" }

// Command is a program that will find itself Inside. It dies with the thread
// that starts it: the caller locks its goroutine to its thread while it waits.
//
// Root keeps all ids, so that PostgreSQL can run as a user of its own; anybody
// else keeps their own id, with the capabilities that a namespace's maker has.
func Command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), insideVar+"=1")
	attr := &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	if uid, gid := os.Getuid(), os.Getgid(); uid == 0 {
		const all = 65536 // ids beyond belong to nobody we start
		attr.UidMappings = []syscall.SysProcIDMap{{Size: all}}
		attr.GidMappings = []syscall.SysProcIDMap{{Size: all}}
		attr.GidMappingsEnableSetgroups = true
	} else {
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
		attr.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SYS_ADMIN}
	}
	cmd.SysProcAttr = attr
	return cmd
}

// Available says what keeps this machine from having sandboxes, or nil.
func Available(ctx context.Context) error {
	for _, tool := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is not installed: run `make test-deps`", tool)
		}
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	out, err := Command(ctx, "/bin/sh", "-c", "ip link add probe type bridge && ip link add probe0 type veth peer name probe1 && nft add table inet probe").CombinedOutput()
	if err != nil {
		return fmt.Errorf("no network namespace of our own: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Gateway is the driver's own address, at which hosts reach what it serves.
const Gateway = "10.99.0.1"

const bridge = "sp0"

// Sandbox is the bridge and its hosts. Safe for concurrent use.
type Sandbox struct {
	mu    sync.Mutex
	hosts []*Host
}

// New makes the bridge, with the driver's own address on it. Once per process,
// which must be Inside.
func New() (*Sandbox, error) {
	if !Inside() {
		return nil, fmt.Errorf("sandbox.New: not inside one")
	}
	return &Sandbox{}, ip(
		"link set lo up",
		"link add "+bridge+" type bridge",
		"addr add "+Gateway+"/24 dev "+bridge,
		"link set "+bridge+" up",
	)
}

// Host is a network namespace with one cable to the bridge.
type Host struct {
	Name string
	IP   netip.Addr
	veth string // the cable's end at the bridge
	ns   int    // file descriptor of the namespace
	box  *Sandbox
	slow slowEnd
	cuts cuts
}

// AddHost makes a host.
func (s *Sandbox) AddHost(name string) (*Host, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &Host{Name: name, IP: netip.AddrFrom4([4]byte{10, 99, 0, byte(11 + len(s.hosts))}), box: s, veth: fmt.Sprintf("v%d", len(s.hosts))}
	err := onThread(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			h.ns, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("network namespace of %s: %w", name, err)
	}
	if err := ip(
		fmt.Sprintf("link add %s type veth peer name eth0 netns /proc/%d/fd/%d", h.veth, os.Getpid(), h.ns),
		fmt.Sprintf("link set %s master %s up", h.veth, bridge),
	); err != nil {
		return nil, err
	}
	if err := h.Do(func() error {
		return ip("link set lo up", "addr add "+h.IP.String()+"/24 dev eth0", "link set eth0 up")
	}); err != nil {
		return nil, err
	}
	s.hosts = append(s.hosts, h)
	return h, nil
}

// Do runs f on a thread inside the host: the sockets it makes and the
// processes it starts are the host's.
func (h *Host) Do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(h.ns, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %s: %w", h.Name, err)
		}
		return f()
	})
}

// onThread runs f on a thread of its own, which ends with it: what f changes
// of the thread is nobody else's.
func onThread(f func() error) error {
	answer := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		answer <- f()
	}()
	return <-answer
}

// ip runs iproute2's program once for each command.
func ip(commands ...string) error {
	for _, c := range commands {
		if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", c, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

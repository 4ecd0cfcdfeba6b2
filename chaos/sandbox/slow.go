package sandbox

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Line is what a slow link does to packets.
type Line struct {
	Delay  time.Duration // one way
	Jitter time.Duration // up to this much more; packets keep their order
	Loss   float64       // share of packets dropped, 0 to 1
}

// slowEnd is a host's end of the slow links: a tun device whose packets we
// carry ourselves. A packet for a peer takes it when a route says so.
type slowEnd struct {
	mu    sync.Mutex
	tun   *os.File
	lines map[*Host]*slowLine // by peer
}

type slowLine struct {
	Line
	to    *os.File
	queue chan slowPacket
	last  time.Time
}

type slowPacket struct {
	due  time.Time
	data []byte
}

// slowQueue bounds the packets under way on one slow link; more are dropped,
// as a router would. 1,500 bytes each: 6 MiB.
const slowQueue = 4096

// Slow makes what from sends to to take longer, get lost, or both, TCP and UDP
// alike. It replaces an earlier Slow of the same direction. It needs
// /dev/net/tun.
func Slow(from, to *Host, line Line) error {
	for _, h := range []*Host{from, to} {
		if err := h.openTun(); err != nil {
			return err
		}
	}
	from.slow.mu.Lock()
	defer from.slow.mu.Unlock()
	if old := from.slow.lines[to]; old != nil {
		close(old.queue)
	}
	l := &slowLine{Line: line, to: to.slow.tun, queue: make(chan slowPacket, slowQueue)}
	from.slow.lines[to] = l
	go l.carry()
	return from.Do(func() error {
		return ip(fmt.Sprintf("route replace %s/32 dev slow src %s", to.IP, from.IP))
	})
}

// unslow takes a host's packets back to the cable.
func (h *Host) unslow() error {
	h.slow.mu.Lock()
	defer h.slow.mu.Unlock()
	for to, l := range h.slow.lines {
		if err := h.Do(func() error { return ip(fmt.Sprintf("route del %s/32 dev slow", to.IP)) }); err != nil {
			return err
		}
		delete(h.slow.lines, to)
		close(l.queue)
	}
	return nil
}

func (h *Host) openTun() error {
	h.slow.mu.Lock()
	defer h.slow.mu.Unlock()
	if h.slow.tun != nil {
		return nil
	}
	err := h.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("slow links need /dev/net/tun: %w", err)
		}
		ifr, _ := unix.NewIfreq("slow")
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			unix.Close(fd)
			return fmt.Errorf("slow links: %w", err)
		}
		h.slow.tun = os.NewFile(uintptr(fd), "tun")
		return ip("link set slow up")
	})
	if err != nil {
		return err
	}
	h.slow.lines = map[*Host]*slowLine{}
	go h.readTun(h.slow.tun)
	return nil
}

// readTun puts the packets that the host sends on the line of their peer.
func (h *Host) readTun(tun *os.File) {
	buf := make([]byte, 65536)
	for {
		n, err := tun.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return
		} else if err != nil || n < 20 || buf[0]>>4 != 4 {
			continue
		}
		h.slow.mu.Lock()
		for to, l := range h.slow.lines {
			if a := to.IP.As4(); string(a[:]) == string(buf[16:20]) {
				l.send(buf[:n])
			}
		}
		h.slow.mu.Unlock()
	}
}

func (l *slowLine) send(packet []byte) {
	if rand.Float64() < l.Loss {
		return
	}
	due := time.Now().Add(l.Delay)
	if l.Jitter > 0 {
		due = due.Add(rand.N(l.Jitter))
	}
	if due.Before(l.last) {
		due = l.last
	}
	l.last = due
	select {
	case l.queue <- slowPacket{due, append([]byte(nil), packet...)}:
	default:
	}
}

func (l *slowLine) carry() {
	for p := range l.queue {
		time.Sleep(time.Until(p.due))
		_, _ = l.to.Write(p.data) // a full device drops, as the real thing does
	}
}

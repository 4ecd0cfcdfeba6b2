package sandbox

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Flow is one direction of a TCP connection: what a host sends from its port
// to a peer.
type Flow struct {
	Port uint16 // the host's own
	To   netip.AddrPort
}

// Sent is one packet with data.
type Sent struct {
	At    time.Time // when the kernel put it on the cable
	Bytes int       // of TCP's payload
}

// Capture watches what leaves a host, outside of it: a packet that it saw has
// left, whatever the host's processes believe, and none can leave unseen.
type Capture struct {
	fd    int
	mu    sync.Mutex
	flows map[Flow][]Sent
	lost  int
	done  chan struct{}
}

// NewCapture starts watching the TCP packets that carry data from h.
func (h *Host) NewCapture() (*Capture, error) {
	ifi, err := net.InterfaceByName(h.veth)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	c := &Capture{fd: fd, flows: map[Flow][]Sent{}, done: make(chan struct{})}
	if err := c.open(ifi.Index); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("capture: %w", err)
	}
	go c.run()
	return c, nil
}

func (c *Capture) open(ifindex int) error {
	if err := c.filter(); err != nil {
		return err
	}
	_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<20)      // as far as it is let
	_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) // where root is root
	if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
		return err
	}
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
		return err
	}
	protocol := binary.NativeEndian.Uint16([]byte{unix.ETH_P_ALL >> 8, unix.ETH_P_ALL & 0xff}) // network order
	return unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: ifindex})
}

// snap is how much of a packet is kept: the headers.
const snap = 128

// filter lets the kernel keep IPv4 TCP alone, and the headers alone.
func (c *Capture) filter() error {
	prog := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 9}, // protocol
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_TCP, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: snap},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	return unix.SetsockoptSockFprog(c.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]})
}

func (c *Capture) run() {
	buf, oob := make([]byte, snap), make([]byte, 128)
	for {
		n, oobn, _, from, err := unix.Recvmsg(c.fd, buf, oob, 0)
		select {
		case <-c.done:
			unix.Close(c.fd)
			return
		default:
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		// What goes to the host passes here too, the other way.
		if err != nil || !ok || ll.Pkttype == unix.PACKET_OUTGOING || n < 40 || buf[0]>>4 != 4 {
			continue
		}
		ihl := int(buf[0]&15) * 4
		if n < ihl+20 {
			continue
		}
		payload := int(binary.BigEndian.Uint16(buf[2:])) - ihl - int(buf[ihl+12]>>4)*4
		if payload <= 0 {
			continue
		}
		at := time.Now()
		if msgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
			for _, m := range msgs {
				if m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= int(unsafe.Sizeof(unix.Timespec{})) {
					ts := (*unix.Timespec)(unsafe.Pointer(&m.Data[0]))
					at = time.Unix(ts.Unix())
				}
			}
		}
		f := Flow{
			Port: binary.BigEndian.Uint16(buf[ihl:]),
			To:   netip.AddrPortFrom(netip.AddrFrom4([4]byte(buf[16:20])), binary.BigEndian.Uint16(buf[ihl+2:])),
		}
		c.mu.Lock()
		c.flows[f] = append(c.flows[f], Sent{at, payload})
		c.mu.Unlock()
	}
}

// After returns what was sent on a flow after t.
func (c *Capture) After(f Flow, t time.Time) (late []Sent) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.flows[f] {
		if s.At.After(t) {
			late = append(late, s)
		}
	}
	return late
}

// Packets is how many packets with data were seen on a flow.
func (c *Capture) Packets(f Flow) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.flows[f])
}

// Forget drops what was seen of a flow.
func (c *Capture) Forget(f Flow) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.flows, f)
}

// Lost is how many packets the kernel could not hand over so far. A run in
// which it is not zero has not measured everything.
func (c *Capture) Lost() int {
	st, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		c.lost += int(st.Drops) // reading sets it to zero
	}
	return c.lost
}

// Stop ends the watching.
func (c *Capture) Stop() { close(c.done) }

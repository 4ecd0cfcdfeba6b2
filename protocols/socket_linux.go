package protocols

import (
	"errors"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// notSentBytes is how much of what was written may wait in the kernel to be
	// sent: what a process that is stopped still lets out by itself.
	notSentBytes = 16 << 10
	// sendBytes bounds what the kernel keeps of a connection to send again. It
	// is what 20 MB/s need over 10 ms, twice over, since the kernel counts its
	// own bookkeeping too.
	sendBytes = 256 << 10
)

// tune sets up the socket beneath c, if there is one.
func tune(c net.Conn, mark uint32) error {
	for {
		inner, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = inner.NetConn()
	}
	sc, ok := c.(syscall.Conn)
	if _, tcp := c.(*net.TCPConn); !ok || !tcp {
		if mark != 0 {
			return fmt.Errorf("a %T has no socket to mark for the kernel gate", c)
		}
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var errs [3]error
	err = raw.Control(func(fd uintptr) {
		errs[0] = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSentBytes)
		errs[1] = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, sendBytes)
		if mark != 0 {
			errs[2] = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark))
		}
	})
	return errors.Join(append(errs[:], err)...)
}

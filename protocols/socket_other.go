//go:build !linux

package protocols

import "net"

// tune does nothing where the kernel has other means.
func tune(net.Conn, uint32) error { return nil }

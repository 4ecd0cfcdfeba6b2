package protocols

import "net"

// Session is one client's connection to one target: who, to where, recorded as what.
type Session struct {
	Client net.Conn
	Env    *Env
}

package postgres

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"sync"
)

// maxCancels bounds the sessions of one node that can be cancelled.
const maxCancels = 100_000

// cancels knows the keys that were given to clients. Nothing of a target's own
// key is ever shown.
type cancels struct {
	mu sync.Mutex
	m  map[uint32]cancelEntry
}

type cancelEntry struct {
	key    [4]byte // protocol 3.0 has no more
	cancel func(context.Context)
}

var errTooMany = errors.New("too many sessions on this node")

// add gives a session a process id and key. cancel is called for each request
// that bears both.
func (c *cancels) add(cancel func(context.Context)) (pid uint32, key [4]byte, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		c.m = map[uint32]cancelEntry{}
	}
	if len(c.m) >= maxCancels {
		return 0, key, errTooMany
	}
	rand.Read(key[:])
	for {
		var b [4]byte
		rand.Read(b[:])
		pid = binary.BigEndian.Uint32(b[:]) &^ (1 << 31) // clients show it as a positive number
		if _, taken := c.m[pid]; !taken && pid != 0 {
			break
		}
	}
	c.m[pid] = cancelEntry{key, cancel}
	return pid, key, nil
}

func (c *cancels) remove(pid uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.m, pid)
}

// request serves the body of a CancelRequest. A wrong one gets no answer
// either, as PostgreSQL does it.
func (c *cancels) request(ctx context.Context, packet []byte) {
	if len(packet) < 8 || len(packet) > 4+maxCancelKey {
		return
	}
	c.mu.Lock()
	e, ok := c.m[binary.BigEndian.Uint32(packet)]
	c.mu.Unlock()
	if subtle.ConstantTimeCompare(e.key[:], packet[4:]) == 1 && ok {
		e.cancel(ctx)
	}
}

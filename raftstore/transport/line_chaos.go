//go:build chaos

package transport

import (
	"context"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// line holds up a stream while the file named by SALLYPORT_CHAOS_NET names the
// short name of its class, such as "gossip": nothing is lost, reset or told, as
// when packets do not arrive. All classes share a socket, so that no filter
// outside can cut one of them off from the rest.
//
// Only builds with the tag chaos have it. A test holds that others do not.
type line struct {
	class     string
	deadlines [2]atomic.Int64 // ns since 1970, 0 for none
	gone      chan struct{}
}

// direction of what is held up.
type direction int

const (
	reading direction = iota
	writing
)

func newLine(class string) line { return line{class: class, gone: make(chan struct{})} }

func (l *line) close() { close(l.gone) }

func (l *line) until(d direction, t time.Time) {
	at := t.UnixNano()
	if t.IsZero() {
		at = 0
	}
	l.deadlines[d].Store(at)
}

// wait returns when the class is not held up, or as a read or write that has
// waited for its peer too long.
func (l *line) wait(d direction) error {
	for held(l.class) {
		if at := l.deadlines[d].Load(); at != 0 && time.Now().UnixNano() >= at {
			return os.ErrDeadlineExceeded
		}
		select {
		case <-l.gone:
			return net.ErrClosed
		case <-time.After(holdTick):
		}
	}
	return nil
}

// reachable returns when a class may be dialled.
func reachable(ctx context.Context, class string) error {
	for held(class) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(holdTick):
		}
	}
	return nil
}

// holdTick is how soon an order is noticed: the file is read no more often.
const holdTick = 5 * time.Millisecond

var orders struct {
	sync.Mutex
	read  time.Time
	names []string
}

// held says whether a class is held up now.
func held(class string) bool {
	control := os.Getenv("SALLYPORT_CHAOS_NET")
	if control == "" {
		return false
	}
	orders.Lock()
	defer orders.Unlock()
	if time.Since(orders.read) > holdTick {
		b, _ := os.ReadFile(control)
		orders.read, orders.names = time.Now(), strings.Fields(string(b))
	}
	short, _, _ := strings.Cut(strings.TrimPrefix(class, "sallyport-"), "/")
	for _, n := range orders.names {
		if n == short {
			return true
		}
	}
	return false
}

package sandbox

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
)

// cuts are the peers that a host hears nothing of.
type cuts struct {
	sync.Mutex
	deaf map[netip.Addr]bool
}

// Cut makes to deaf for what from sends: a one-way partition. Packets are
// dropped where they arrive, so that the sender learns nothing. Connections
// that are open stall, they are not reset.
func Cut(from, to *Host) error { return to.hear(from.IP, false) }

// Mend undoes Cut.
func Mend(from, to *Host) error { return to.hear(from.IP, true) }

// Part cuts both ways between all of a and all of b.
func Part(a, b []*Host) error { return each(a, b, Cut) }

// Join undoes Part.
func Join(a, b []*Host) error { return each(a, b, Mend) }

func each(a, b []*Host, do func(from, to *Host) error) error {
	for _, x := range a {
		for _, y := range b {
			if x == y {
				continue
			}
			if err := do(x, y); err != nil {
				return err
			}
			if err := do(y, x); err != nil {
				return err
			}
		}
	}
	return nil
}

// MendAll ends every Cut and Slow.
func (s *Sandbox) MendAll() error {
	s.mu.Lock()
	hosts := s.hosts
	s.mu.Unlock()
	for _, h := range hosts {
		h.cuts.Lock()
		h.cuts.deaf = nil
		err := h.load()
		h.cuts.Unlock()
		if err == nil {
			err = h.unslow()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// hear switches whether h hears what comes from peer.
func (h *Host) hear(peer netip.Addr, yes bool) error {
	h.cuts.Lock()
	defer h.cuts.Unlock()
	if h.cuts.deaf == nil {
		h.cuts.deaf = map[netip.Addr]bool{}
	}
	if yes {
		delete(h.cuts.deaf, peer)
	} else {
		h.cuts.deaf[peer] = true
	}
	return h.load()
}

// load brings the host's filter in line with deaf, in one transaction of
// nftables. The table is ours alone; the product's gate has its own.
func (h *Host) load() error {
	var b strings.Builder
	b.WriteString("add table inet chaos\ndelete table inet chaos\n")
	if len(h.cuts.deaf) > 0 {
		b.WriteString("table inet chaos {\n chain in {\n type filter hook input priority 0\n")
		for peer := range h.cuts.deaf {
			fmt.Fprintf(&b, " ip saddr %s drop\n", peer)
		}
		b.WriteString(" }\n}\n")
	}
	return h.Do(func() error {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(b.String())
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft in %s: %w: %s", h.Name, err, out)
		}
		return nil
	})
}

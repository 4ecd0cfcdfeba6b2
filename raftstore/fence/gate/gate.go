// Package gate is level 2 of the fence: the kernel drops what a node's
// sessions send when its lease has ended, whether the process runs or not.
//
// The sockets of sessions carry a mark. A table of nftables lets marked packets
// out while the lease stands, and drops them otherwise; so a stopped process
// sends nothing either, not even what its sockets had buffered. Connections to
// other nodes, the API and recordings carry no mark. Resets pass always: they
// carry no data, and tell a peer that its connection is over.
//
// The lease is written into the kernel twice, in one transaction. The element
// of a set times out by the kernel's own timer, which no setting of a clock
// moves. A rule compares the wall clock with the end of the lease, so that a
// process that was paused between reading its clock and the system call does
// not open the gate late. A packet must pass both.
//
// Not covered: what the network card has taken already, and a machine that is
// suspended, whose timers stand still; nothing is sent meanwhile, and the wall
// clock closes the gate when it wakes.
package gate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// slack is taken off each lease: the kernel's timers tick every 1 to 10 ms.
const slack = 10 * time.Millisecond

// ErrUnavailable says that this process may not, or this kernel cannot, filter.
var ErrUnavailable = errors.New("the kernel gate needs nftables in the kernel and CAP_NET_ADMIN")

// Gate is one node's. Safe for concurrent use.
type Gate struct {
	mark  uint32
	table *nftables.Table
	lease *nftables.Chain // the rule that lets out
	out   *nftables.Chain
	set   *nftables.Set

	mu sync.Mutex
	nl *nftables.Conn // nil when closed
}

// Mark is the mark of the sockets of the node of that name at that address:
// nodes on one machine have different ones.
func Mark(name, addr string) uint32 {
	h := fnv.New32a()
	fmt.Fprintf(h, "%s\x00%s", name, addr)
	return 0x5a000000 | h.Sum32()&0x00ffffff
}

// Open makes the gate, shut. A table that a killed process of the same mark
// left is replaced.
func Open(mark uint32) (*Gate, error) {
	nl, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	g := &Gate{mark: mark, nl: nl}
	g.table = &nftables.Table{Family: nftables.TableFamilyINet, Name: fmt.Sprintf("sallyport-%08x", mark)}
	nl.AddTable(g.table) // so that there is one to delete
	nl.DelTable(g.table)
	nl.AddTable(g.table)
	g.set = &nftables.Set{Table: g.table, Name: "lease", KeyType: nftables.TypeMark, HasTimeout: true}
	if err := nl.AddSet(g.set, nil); err != nil {
		return nil, errors.Join(fmt.Errorf("make the kernel gate: %w", err), nl.CloseLasting())
	}
	policy := nftables.ChainPolicyAccept
	g.out = nl.AddChain(&nftables.Chain{
		Name: "out", Table: g.table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput,
		Priority: nftables.ChainPriorityFilter, Policy: &policy,
	})
	g.lease = nl.AddChain(&nftables.Chain{Name: "standing", Table: g.table})
	verdict := func(k expr.VerdictKind, chain string) expr.Any { return &expr.Verdict{Kind: k, Chain: chain} }
	for _, exprs := range [][]expr.Any{
		{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: g.key()},
			verdict(expr.VerdictAccept, ""),
		},
		{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{tcpReset}, Xor: []byte{0}},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
			verdict(expr.VerdictAccept, ""),
		},
		{verdict(expr.VerdictJump, g.lease.Name)},
		{&expr.Counter{}, verdict(expr.VerdictDrop, "")},
	} {
		nl.AddRule(&nftables.Rule{Table: g.table, Chain: g.out, Exprs: exprs})
	}
	if err := nl.Flush(); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrUnavailable, err), nl.CloseLasting())
	}
	return g, nil
}

// Mark is the mark of the sockets that the gate holds back (SO_MARK).
func (g *Gate) Mark() uint32 { return g.mark }

const tcpReset = 0x04 // RFC 9293 section 3.1

func (g *Gate) key() []byte { return binaryutil.NativeEndian.PutUint32(g.mark) }

// Extend lets packets out for as long as left says, and not longer. It replaces
// what was set before; left() ≤ 0 shuts the gate. When it fails, what was set
// before stands, and ends at its time.
func (g *Gate) Extend(left func() time.Duration) error {
	// The wall clock first: a pause after it makes the end come early, whether
	// it is before left looks at its own clock, or before the system call.
	wall := time.Now().Round(0)
	d := left()
	end := wall.Add(d - slack)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.nl == nil {
		return os.ErrClosed
	}
	g.nl.FlushChain(g.lease)
	g.nl.FlushSet(g.set)
	if d > slack {
		el := []nftables.SetElement{{Key: g.key(), Timeout: (d - slack).Truncate(time.Millisecond)}}
		if el[0].Timeout <= 0 {
			el[0].Timeout = time.Millisecond
		}
		if err := g.nl.SetAddElements(g.set, el); err != nil {
			return fmt.Errorf("extend the kernel gate: %w", err)
		}
		g.nl.AddRule(&nftables.Rule{Table: g.table, Chain: g.lease, Exprs: []expr.Any{
			&expr.Meta{Key: metaKeyTimeNanos, Register: 1},
			&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 8, Size: 8},
			&expr.Cmp{Op: expr.CmpOpLt, Register: 1, Data: binary.BigEndian.AppendUint64(nil, uint64(end.UnixNano()))},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
			&expr.Lookup{SourceRegister: 1, SetName: g.set.Name, SetID: g.set.ID},
			&expr.Verdict{Kind: expr.VerdictAccept},
		}})
	}
	if err := g.nl.Flush(); err != nil {
		return fmt.Errorf("extend the kernel gate: %w", err)
	}
	return nil
}

// metaKeyTimeNanos is the wall clock in nanoseconds: NFT_META_TIME_NS of Linux's
// nf_tables.h, since 5.4.
const metaKeyTimeNanos expr.MetaKey = 30

// Shut lets nothing out.
func (g *Gate) Shut() error { return g.Extend(func() time.Duration { return 0 }) }

// Dropped is what the gate has held back since Open.
func (g *Gate) Dropped() (packets, bytes uint64, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.nl == nil {
		return 0, 0, os.ErrClosed
	}
	rules, err := g.nl.GetRules(g.table, g.out)
	if err != nil {
		return 0, 0, err
	}
	for _, r := range rules {
		for _, e := range r.Exprs {
			if c, ok := e.(*expr.Counter); ok {
				packets, bytes = packets+c.Packets, bytes+c.Bytes
			}
		}
	}
	return packets, bytes, nil
}

// Close removes the gate. Call it when no session is left: nothing is held
// back any more. A process that is killed leaves its gate, so that what its
// sockets had buffered ends with the lease too; the next Open replaces it.
func (g *Gate) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.nl == nil {
		return nil
	}
	g.nl.DelTable(g.table)
	err := g.nl.Flush()
	err = errors.Join(err, g.nl.CloseLasting())
	g.nl = nil
	return err
}

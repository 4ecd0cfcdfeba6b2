//go:build bench

package raftstore_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fence"
	"github.com/sallyport/sallyport/raftstore/storetest"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// benchLease is what nodes have by default.
const benchLease = 2500 * time.Millisecond

// fenceNode is both sides of the fence on a store's node, joined as a node of
// the product joins them, and one session of X on it.
type fenceNode struct {
	*storetest.Node
	grantor *fence.Grantor
	holder  *fence.Holder
	x       atomic.Pointer[pump]
	folded  atomic.Uint64
	changed chan struct{} // one token when folded has changed
	streams sync.WaitGroup
}

// pump writes what X may read to a client, as long as it may: 1 KiB every so
// often. The client notes when the last of it came.
type pump struct {
	stop  atomic.Bool
	quiet chan []byte // closed when nothing will be written any more
	last  chan time.Time
}

func (n *fenceNode) startPump(every time.Duration) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer ln.Close()
	out, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		return err
	}
	in, err := ln.Accept()
	if err != nil {
		return errors.Join(err, out.Close())
	}
	p := &pump{quiet: make(chan []byte), last: make(chan time.Time, 1)}
	go func() {
		defer close(p.quiet)
		defer out.Close()
		b := make([]byte, 1<<10)
		for {
			if p.stop.Load() || n.holder.Check(0) != nil {
				return
			}
			if _, err := out.Write(b); err != nil {
				return
			}
			time.Sleep(every) // three of them share the machine with what is measured
		}
	}()
	go func() {
		defer in.Close()
		var last time.Time
		b := make([]byte, 4<<10)
		for {
			k, err := in.Read(b)
			if k > 0 {
				last = time.Now()
			}
			if err != nil {
				p.last <- last
				return
			}
		}
	}()
	n.x.Store(p)
	return nil
}

// Freeze implements fence.Enforcer. Every revocation here is of X.
func (n *fenceNode) Freeze(fence.ID, []byte) {
	if p := n.x.Load(); p != nil {
		p.stop.Store(true)
	}
}

// Thaw implements fence.Enforcer: what was stopped here is revoked next.
func (n *fenceNode) Thaw(fence.ID) {}

// Enforce implements fence.Enforcer.
func (n *fenceNode) Enforce(fence.Revocation) <-chan []byte {
	if p := n.x.Load(); p != nil {
		p.stop.Store(true)
		return p.quiet
	}
	c := make(chan []byte)
	close(c)
	return c
}

// fenceCluster joins both sides of the fence to the stores of c, until the test
// ends.
func fenceCluster(t *testing.T, c *storetest.Cluster) map[*storetest.Node]*fenceNode {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var names []string
	nodes := map[*storetest.Node]*fenceNode{}
	for _, n := range c.Nodes {
		names = append(names, n.Name)
		nodes[n] = &fenceNode{Node: n, changed: make(chan struct{}, 1)}
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		for _, v := range nodes {
			v.streams.Wait()
		}
	})
	for _, v := range nodes {
		store, end, name := v.Store, v.Endpoint, v.Name
		v.grantor = fence.NewGrantor(fence.GrantorConfig{
			Length: benchLease, Leads: store.Leads, Leader: store.Leader,
			Prepare: func(ctx context.Context) (uint64, time.Duration, error) {
				seq, term, err := store.Newest(ctx)
				for err == nil && v.folded.Load() < seq {
					select {
					case <-v.changed:
					case <-ctx.Done():
						err = ctx.Err()
					}
				}
				return term, benchLease, err
			},
			Confirm: func(ctx context.Context) (uint64, error) { term, _, err := store.Confirm(ctx); return term, err },
			Members: func() []string { return names }, Former: func() []string { return nil },
		})
		v.holder = fence.NewHolder(fence.HolderConfig{
			Length: benchLease, Enforcer: v, Leader: store.Leader,
			Dial: func(ctx context.Context, id, addr string) (net.Conn, error) {
				if id == name {
					a, b := net.Pipe()
					v.streams.Go(func() { v.grantor.Serve(b, id) })
					return a, nil
				}
				return end.Dial(ctx, transport.ClassFence, addr, id)
			},
		})
		ln := end.Listener(transport.ClassFence)
		context.AfterFunc(ctx, func() { ln.Close() })
		wg.Go(func() { v.grantor.Run(ctx) })
		wg.Go(func() { v.holder.Run(ctx) })
		wg.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				v.streams.Go(func() { v.grantor.Serve(c, c.(*transport.Conn).Peer()) })
			}
		})
		wg.Go(func() {
			store.Follow(ctx, 1, func(es []event.Event) error {
				for _, e := range es {
					if e.Type == event.TypeRevoked {
						r := fence.Revocation{Seq: e.Seq, ID: fence.ID(e.ID), Payload: e.Payload}
						v.grantor.Revoked(r)
						v.holder.Revoked(r)
					}
				}
				seq := es[len(es)-1].Seq
				v.holder.Folded(seq)
				v.folded.Store(seq)
				select {
				case v.changed <- struct{}{}:
				default:
				}
				return nil
			})
		})
	}
	return nodes
}

// revokeX does what a node's API does to revoke, and says how long the commit
// took and how long until it was in force everywhere.
func (n *fenceNode) revokeX(ctx context.Context) (commit, complete time.Duration, err error) {
	id := event.NewID()
	payload, _ := json.Marshal(event.NewRevoked(id.String(), event.Scope{Kind: event.ScopeSubject, Value: "oidc/x"}, "measured")) // of strings: does not fail
	began := time.Now()
	n.grantor.Freeze(fence.ID(id), payload)
	es, err := n.Store.Append(ctx, event.Proposal{
		ID: id, Type: event.TypeRevoked, Version: 1, Actor: event.Actor{Principal: "bench", Kind: event.Service, Authn: "oidc"},
		Aggregate: "revocation/" + id.String(), Expect: 0, Payload: payload,
	})
	if err != nil {
		return 0, 0, err
	}
	commit = time.Since(began)
	report, err := n.grantor.Await(ctx, es[0].Seq, 0)
	complete = time.Since(began)
	if err == nil && !report.Complete {
		err = fmt.Errorf("the revocation is not complete: %+v", report)
	}
	return commit, complete, err
}

// stalledFS is a disk whose syncs wait while it is stalled.
type stalledFS struct {
	vfs.FS
	stalled *atomic.Pointer[chan struct{}]
}

type stalledFile struct {
	vfs.File
	stalled *atomic.Pointer[chan struct{}]
}

func (s *stalledFS) wrap(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &stalledFile{f, s.stalled}, nil
}

func (s *stalledFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return s.wrap(s.FS.Create(name, c))
}

func (s *stalledFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, o ...vfs.OpenOption) (vfs.File, error) {
	return s.wrap(s.FS.OpenReadWrite(name, c, o...))
}

func (s *stalledFS) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return s.wrap(s.FS.ReuseForWrite(old, name, c))
}

func (s *stalledFS) Unwrap() vfs.FS { return s.FS }

func (f *stalledFile) wait() {
	if c := f.stalled.Load(); c != nil {
		<-*c
	}
}

func (f *stalledFile) Sync() error                  { f.wait(); return f.File.Sync() }
func (f *stalledFile) SyncData() error              { f.wait(); return f.File.SyncData() }
func (f *stalledFile) SyncTo(n int64) (bool, error) { f.wait(); return f.File.SyncTo(n) }

// benchFence measures revocations with all nodes alive: T3, T4.
func benchFence(t *testing.T, b *bench) ([]storetest.Ratio, error) {
	stalled := map[string]*atomic.Pointer[chan struct{}]{}
	c := storetest.NewBare(t, 3, func(cfg *raftstore.Config) {
		heartbeats(cfg)
		s := &atomic.Pointer[chan struct{}]{}
		stalled[cfg.NodeID] = s
		cfg.SetFS(&stalledFS{vfs.Default, s})
	})
	nodes := fenceCluster(t, c)
	leader := nodes[c.Leader()]
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := held(ctx, nodes); err != nil {
		return nil, err
	}
	// round revokes X on all nodes once; last is how long after the call the
	// last byte of X came.
	round := func(every time.Duration, before, during func()) (commit, complete, last time.Duration, err error) {
		for _, n := range nodes {
			if err := n.startPump(every); err != nil {
				return 0, 0, 0, err
			}
		}
		time.Sleep(10 * time.Millisecond) // the sessions are under way
		before()
		began := time.Now()
		during()
		commit, complete, err = leader.revokeX(ctx)
		if err != nil {
			return 0, 0, 0, err
		}
		for _, n := range nodes {
			last = max(last, (<-n.x.Load().last).Sub(began))
		}
		return commit, complete, last, nil
	}
	nothing := func() {}
	const fast, calm = 50 * time.Microsecond, 2 * time.Millisecond
	var p probes
	var last, complete storetest.Durations
	for i := range 5 * *benchRounds {
		if err := b.probe(&p, 10); err != nil {
			return nil, err
		}
		_, _, l, err := round(fast, nothing, nothing)
		if err != nil {
			return nil, fmt.Errorf("revocation %d: %w", i, err)
		}
		_, done, _, err := round(calm, nothing, nothing)
		if err != nil {
			return nil, fmt.Errorf("revocation %d: %w", i, err)
		}
		complete, last = append(complete, done), append(last, l)
	}
	var slow, slowLast storetest.Durations
	for range *benchRounds {
		hang := make(chan struct{})
		commit, _, l, err := round(fast, func() { stalled[leader.Name].Store(&hang) }, func() {
			time.AfterFunc(200*time.Millisecond, func() { stalled[leader.Name].Store(nil); close(hang) })
		})
		if err != nil {
			return nil, fmt.Errorf("revocation with a stalled disk: %w", err)
		}
		slow, slowLast = append(slow, commit), append(slowLast, l)
	}
	return []storetest.Ratio{
		{Target: "T3", What: fmt.Sprintf("last byte of X after the call, %d times, p99 / echo p99", len(last)), Ratio: ratio(last.At(99), p.echo.At(99)), Bound: 10,
			Beside: us("last byte p50", last.At(50)) + us(", p99", last.At(99)) + us(", echo p99", p.echo.At(99))},
		{Target: "T3b", What: "the same with the leader's disk stalled, p99 / commit p99", Ratio: ratio(slowLast.At(99), slow.At(99)), Bound: 0.05,
			Beside: us("last byte p99", slowLast.At(99)) + us(", commit p99", slow.At(99))},
		{Target: "T4", What: "revocation in force everywhere, p50 / (2 syncs + 2 echoes, p50)", Ratio: ratio(complete.At(50), p.floor(50, 2, 2)), Bound: 2,
			Beside: us("complete", complete.At(50)) + us(", sync", p.sync.At(50)) + us(", echo", p.echo.At(50))},
	}, nil
}

// held waits until all nodes have leases.
func held(ctx context.Context, nodes map[*storetest.Node]*fenceNode) error {
	for _, n := range nodes {
		for n.holder.Check(0) != nil {
			changed := n.holder.Changed()
			if n.holder.Check(0) == nil {
				break
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return fmt.Errorf("%s has no lease", n.Name)
			}
		}
	}
	return nil
}

// benchStop takes a node off the network and revokes: T5. Its holder goes on,
// and nobody hears it; that a stopped process is no worse, make chaos-revoke shows.
func benchStop(t *testing.T, _ *bench) ([]storetest.Ratio, error) {
	c := storetest.New(t, 3, heartbeats)
	nodes := fenceCluster(t, c)
	leader := nodes[c.Leader()]
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	worst := time.Duration(0)
	for range *benchStops {
		victim := nodes[c.Followers()[0]]
		if err := held(ctx, nodes); err != nil {
			return nil, err
		}
		// Right after a renewal, when its lease lasts longest.
		for at := victim.holder.Left(0); ; {
			now := victim.holder.Left(0)
			if now > at {
				break
			}
			at = now
			if ctx.Err() != nil {
				return nil, errors.New("a lease is not renewed")
			}
			time.Sleep(time.Millisecond)
		}
		victim.Network.Cut.Store(true)
		_, done, err := leader.revokeX(ctx)
		if err == nil && victim.holder.Check(0) == nil {
			err = errors.New("a cut node passes checks after the revocation was complete")
		}
		victim.Network.Cut.Store(false)
		if err != nil {
			return nil, err
		}
		worst = max(worst, done)
		c.Converge()
	}
	return []storetest.Ratio{
		{Target: "T5", What: fmt.Sprintf("the same with a stopped node, worst of %d / length of leases", *benchStops), Ratio: ratio(worst, benchLease), Bound: 1.03},
	}, nil
}

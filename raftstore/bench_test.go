//go:build bench

// What `make bench-raft` runs: the event store against what the machine can do
// at best, in one run: an overwrite of 4 KiB with fdatasync, and an echo over
// TCP. Machines differ and drift, so only ratios are printed, each with its
// target. Three stores run in this process, with their disks below TMPDIR and
// QUIC over loopback, as nodes have them; probes and measurements take turns.
package raftstore_test

import (
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/logstore"
	"github.com/sallyport/sallyport/raftstore/storetest"
)

const benchHeartbeat = 500 * time.Millisecond

var (
	benchRounds    = flag.Int("rounds", 40, "rounds of 20 probes and 20 appends, or of 20 probes and a revocation")
	benchFailovers = flag.Int("failovers", 10, "leaders to take away")
	benchStops     = flag.Int("stops", 4, "nodes to stop before a revocation")
	benchWindow    = flag.Duration("window", 8*time.Second, "for how long CPU is counted")
	benchOnly      = flag.String("only", "", "log, store, failovers, fence, stops or leases: only that part")
	benchResults   = flag.String("results", "", "file that keeps the results, as JSON")
)

// bench is what all parts of the run share: the probes of this machine.
type bench struct {
	disk *diskProbe
	echo *echo
	dir  string
}

func TestBenchRaft(t *testing.T) {
	if os.Getenv(leaseClients) != "" {
		runLeaseClients(t)
		return
	}
	dir := t.TempDir()
	disk, err := newDiskProbe(filepath.Join(dir, "probe"))
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	echo, err := newEcho()
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	b := &bench{disk, echo, dir}
	var all []storetest.Ratio
	for _, part := range []struct {
		name string
		run  func(*testing.T, *bench) ([]storetest.Ratio, error)
	}{{"log", benchLog}, {"store", benchStore}, {"failovers", benchFailover}, {"fence", benchFence}, {"stops", benchStop}, {"leases", benchLeases}} {
		if *benchOnly != "" && *benchOnly != part.name {
			continue
		}
		// A test of its own: what it started is gone before the next one measures.
		t.Run(part.name, func(t *testing.T) {
			rs, err := part.run(t, b)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, rs...)
		})
	}
	if t.Failed() {
		return
	}
	if *benchResults != "" {
		if all, err = storetest.Keep(*benchResults, all); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range all {
		fmt.Println(r)
	}
}

// probes are the samples of both probes, taken between what is measured.
type probes struct{ sync, echo storetest.Durations }

func (b *bench) probe(p *probes, n int) error {
	for range n {
		if err := errors.Join(p.sync.Time(b.disk.sync), p.echo.Time(b.echo.call)); err != nil {
			return err
		}
	}
	return nil
}

// floor is n syncs and m echoes, at a percentile.
func (p *probes) floor(percent, syncs, echoes int) time.Duration {
	return time.Duration(syncs)*p.sync.At(percent) + time.Duration(echoes)*p.echo.At(percent)
}

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }

// us words durations for people.
func us(what string, d time.Duration) string {
	return fmt.Sprintf("%s %v", what, d.Round(time.Microsecond))
}

// benchLog measures the log's database alone: T8, T9.
func benchLog(t *testing.T, b *bench) ([]storetest.Ratio, error) {
	log, err := logstore.Open(logstore.Config{Dir: filepath.Join(b.dir, "log"), Log: storetest.Logger(t)})
	if err != nil {
		return nil, err
	}
	defer log.Close()
	index := uint64(0)
	data := random(1 << 20)
	store := func(n int) error {
		ls := make([]*raft.Log, n)
		for i := range ls {
			index++
			at := index * 4096 % (1<<20 - 1500)
			ls[i] = &raft.Log{Index: index, Term: 1, Data: data[at : at+1500]}
		}
		return log.StoreLogs(ls)
	}
	// batches are stored, and cut to a tail as raft cuts them, until there were
	// so many flushes.
	batches := func(flushes int64) error {
		for log.Metrics().Flush.Count < flushes {
			if err := store(64); err != nil {
				return err
			}
			if index%16384 < 64 {
				if err := log.DeleteRange(1, index-2048); err != nil {
					return err
				}
			}
		}
		return nil
	}
	// Steady state: memtables have grown to their full size, 64 MiB in.
	if err := batches(8); err != nil {
		return nil, err
	}
	var p probes
	var single storetest.Durations
	for range 20 * *benchRounds {
		if err := errors.Join(b.probe(&p, 1), single.Time(func() error { return store(1) })); err != nil {
			return nil, err
		}
	}
	before, from := log.Metrics(), index
	if err := batches(before.Flush.Count + 8); err != nil {
		return nil, err
	}
	after := log.Metrics()
	written := after.WAL.BytesWritten - before.WAL.BytesWritten
	for i := range after.Levels {
		written += after.Levels[i].TableBytesFlushed + after.Levels[i].TableBytesCompacted - before.Levels[i].TableBytesFlushed - before.Levels[i].TableBytesCompacted
	}
	return []storetest.Ratio{
		{Target: "T8", What: "one log entry of 1.5 KiB, steady, p50 / sync p50", Ratio: ratio(single.At(50), p.sync.At(50)), Bound: 1.35, Beside: us("entry", single.At(50)) + us(", sync", p.sync.At(50))},
		{Target: "T9", What: "bytes written / bytes of entries, batches of 64", Ratio: float64(written) / float64((index-from)*1500), Bound: 1.35},
	}, nil
}

// benchStore measures three stores: T1, T2, T6.
func benchStore(t *testing.T, b *bench) ([]storetest.Ratio, error) {
	var p probes
	var apply, lag storetest.Durations
	c := storetest.NewBare(t, 3, heartbeats)
	leader, followers := c.Leader(), c.Followers()
	for range *benchRounds {
		if err := b.probe(&p, 20); err != nil {
			return nil, err
		}
		for range 20 {
			began := time.Now()
			es, err := leader.Store.Append(t.Context(), storetest.Proposal("approval/bench", event.Any, string(random(400))))
			if err != nil {
				return nil, err
			}
			acked := time.Now()
			apply = append(apply, acked.Sub(began))
			for _, n := range followers {
				if err := n.Store.WaitIndex(t.Context(), es[0].Index); err != nil {
					return nil, err
				}
			}
			lag = append(lag, time.Since(acked))
		}
	}
	return []storetest.Ratio{
		{Target: "T1", What: "append p50 / (2 syncs + 1 echo, p50)", Ratio: ratio(apply.At(50), p.floor(50, 2, 1)), Bound: 1.3,
			Beside: us("append", apply.At(50)) + us(", sync", p.sync.At(50)) + us(", echo", p.echo.At(50))},
		{Target: "T2", What: "append p99 / (2 syncs + 1 echo, p99)", Ratio: ratio(apply.At(99), p.floor(99, 2, 1)), Bound: 1.5,
			Beside: us("append", apply.At(99)) + us(", sync", p.sync.At(99)) + us(", echo", p.echo.At(99))},
		{Target: "T6", What: "until both followers applied, after the append, p99 / echo p50", Ratio: ratio(lag.At(99), p.echo.At(50)), Bound: 20,
			Beside: us("lag p50", lag.At(50)) + us(", p99", lag.At(99))},
	}, nil
}

// benchFailover takes leaders away: T7.
func benchFailover(t *testing.T, _ *bench) ([]storetest.Ratio, error) {
	c := storetest.New(t, 3, heartbeats)
	worst := time.Duration(0)
	for range *benchFailovers {
		l := c.Leader()
		began := time.Now()
		c.Crash(l)
		c.Leader()
		worst = max(worst, time.Since(began))
		c.Start(l)
		c.Converge()
	}
	return []storetest.Ratio{
		{Target: "T7", What: fmt.Sprintf("worst of %d failovers / heartbeat timeout", *benchFailovers), Ratio: ratio(worst, benchHeartbeat), Bound: 3},
	}, nil
}

func heartbeats(cfg *raftstore.Config) { cfg.HeartbeatTimeout = benchHeartbeat }

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// diskProbe overwrites 4 KiB of a file that has its size already, and syncs.
type diskProbe struct {
	*os.File
	b []byte
	n int64
}

const probeBlocks = 256

func newDiskProbe(path string) (*diskProbe, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	p := &diskProbe{File: f, b: random(4096)}
	for range probeBlocks {
		if _, err := f.Write(p.b); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return p, f.Sync()
}

func (p *diskProbe) sync() error {
	p.n = (p.n + 1) % probeBlocks
	_, err := p.WriteAt(p.b, p.n*int64(len(p.b)))
	if err != nil {
		return err
	}
	return syscall.Fdatasync(int(p.Fd()))
}

// echo is a TCP connection on loopback whose other end sends back 600 bytes.
type echo struct {
	net.Conn
	ln net.Listener
	b  []byte
}

func newEcho() (*echo, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() { // ends when the connection does
		c, err := ln.Accept()
		if err == nil {
			io.Copy(c, c)
			c.Close()
		}
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return &echo{Conn: c, ln: ln, b: make([]byte, 600)}, nil
}

func (e *echo) call() error {
	if _, err := e.Write(e.b); err != nil {
		return err
	}
	_, err := io.ReadFull(e.Conn, e.b)
	return err
}

func (e *echo) Close() error { return errors.Join(e.Conn.Close(), e.ln.Close()) }

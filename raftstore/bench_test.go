//go:build bench

// What `make bench-raft` runs: the event store against what the machine can do
// at best, in one run: an overwrite of 4 KiB with fdatasync, and an echo over
// TCP. Machines differ and drift, so only ratios are printed, each with its
// target. Three stores run in this process, with their disks below TMPDIR and
// QUIC over loopback, as nodes have them; probes and measurements take turns.
package raftstore_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
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

// result is one line of the table.
type result struct {
	Target string  `json:"target"` // T1 …
	What   string  `json:"what"`
	Ratio  float64 `json:"ratio"`
	Most   float64 `json:"most"` // the ratio aimed at
}

var (
	benchRounds    = flag.Int("rounds", 40, "rounds of 20 probes and 20 appends")
	benchFailovers = flag.Int("failovers", 10, "leaders to take away")
	benchJSON      = flag.String("results", "", "file to write the results to, as JSON")
)

func TestBenchRaft(t *testing.T) {
	results, err := benchRaft(t, *benchRounds, *benchFailovers)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		verdict := "met"
		if r.Ratio > r.Most {
			verdict = "missed"
		}
		fmt.Printf("%-4s %-62s %7.2f   target at most %-5.4g %s\n", r.Target, r.What, r.Ratio, r.Most, verdict)
	}
	fmt.Println("T3, T4, T5, T10 and T11 are the fence's and not measured here.")
	if *benchJSON != "" {
		b, err := json.MarshalIndent(results, "", "  ")
		if err == nil {
			err = os.WriteFile(*benchJSON, append(b, '\n'), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func benchRaft(t *testing.T, rounds, failovers int) ([]result, error) {
	dir := t.TempDir()
	disk, err := newDiskProbe(filepath.Join(dir, "probe"))
	if err != nil {
		return nil, err
	}
	defer disk.Close()
	echo, err := newEcho()
	if err != nil {
		return nil, err
	}
	defer echo.Close()

	var f, r, apply, lag, single samples
	c := storetest.New(t, 3, func(cfg *raftstore.Config) { cfg.HeartbeatTimeout = benchHeartbeat })
	log, err := logstore.Open(logstore.Config{Dir: filepath.Join(dir, "log"), Log: storetest.Logger(t)})
	if err != nil {
		return nil, err
	}
	defer log.Close()
	index := uint64(0)
	store := func(n int) error {
		ls := make([]*raft.Log, n)
		for i := range ls {
			index++
			ls[i] = &raft.Log{Index: index, Term: 1, Data: random(1500)}
		}
		return log.StoreLogs(ls)
	}
	// Steady state: until WALs are written over older ones, about 100 MiB in.
	for log.Metrics().Flush.Count < 10 {
		if err := store(64); err != nil {
			return nil, err
		}
	}
	leader, followers := c.Leader(), c.Followers()
	for range rounds {
		for range 20 {
			if err := errors.Join(f.time(disk.sync), r.time(echo.call), single.time(func() error { return store(1) })); err != nil {
				return nil, err
			}
		}
		for range 20 {
			began := time.Now()
			es, err := leader.Store.Append(context.Background(), storetest.Proposal("approval/bench", event.Any, string(random(400))))
			if err != nil {
				return nil, err
			}
			acked := time.Now()
			apply = append(apply, acked.Sub(began))
			for _, n := range followers {
				if err := n.Store.WaitIndex(context.Background(), es[0].Index); err != nil {
					return nil, err
				}
			}
			lag = append(lag, time.Since(acked))
		}
	}
	// Write amplification: entries in batches, cut to a tail as raft cuts them.
	before, from := log.Metrics(), index
	for range 1500 {
		if err := store(64); err != nil {
			return nil, err
		}
		if index%16384 < 64 {
			if err := log.DeleteRange(1, index-2048); err != nil {
				return nil, err
			}
		}
	}
	after := log.Metrics()
	written := after.WAL.BytesWritten - before.WAL.BytesWritten
	for i := range after.Levels {
		written += after.Levels[i].TableBytesFlushed + after.Levels[i].TableBytesCompacted - before.Levels[i].TableBytesFlushed - before.Levels[i].TableBytesCompacted
	}
	amplification := float64(written) / float64((index-from)*1500)

	worst := time.Duration(0)
	for range failovers {
		l := c.Leader()
		began := time.Now()
		c.Crash(l)
		c.Leader()
		worst = max(worst, time.Since(began))
		c.Start(l)
		c.Converge()
	}
	ratio := func(a, b time.Duration) float64 { return float64(a) / float64(b) }
	return []result{
		{"T1", "append p50 / (2 syncs + 1 echo, p50)", ratio(apply.at(50), 2*f.at(50)+r.at(50)), 1.3},
		{"T2", "append p99 / (2 syncs + 1 echo, p99)", ratio(apply.at(99), 2*f.at(99)+r.at(99)), 1.5},
		{"T6", "until both followers applied, after the append, p99 / echo p50", ratio(lag.at(99), r.at(50)), 20},
		{"T7", fmt.Sprintf("worst of %d failovers / heartbeat timeout", failovers), ratio(worst, benchHeartbeat), 3},
		{"T8", "one log entry of 1.5 KiB, steady, p50 / sync p50", ratio(single.at(50), f.at(50)), 1.35},
		{"T9", "bytes written / bytes of entries, batches of 64", amplification, 1.35},
	}, nil
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

type samples []time.Duration

func (s *samples) time(f func() error) error {
	began := time.Now()
	err := f()
	*s = append(*s, time.Since(began))
	return err
}

// at is a percentile.
func (s samples) at(percent int) time.Duration {
	o := slices.Sorted(slices.Values(s))
	return o[min(len(o)-1, len(o)*percent/100)]
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

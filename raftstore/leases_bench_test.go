//go:build bench

package raftstore_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore/fence"
	"github.com/sallyport/sallyport/raftstore/storetest"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// leaseClients names the file that tells this binary, run again, to be a
// thousand nodes that renew leases.
const leaseClients = "SALLYPORT_BENCH_LEASES"

// clientsOf is what is in the file.
type clientsOf struct {
	Mode, Addr string // "quic" or "tcp"
	Nodes      int
	Cert, Key  []byte // the authority's
}

const (
	leaseNodes  = 1000
	renewLength = 2 * time.Second // two renewals a second
)

func clientName(i int) string { return fmt.Sprintf("g%06d", i) }

// benchLeases counts the leader's CPU for a thousand nodes that renew leases
// twice a second: T11. They live in a process of their own.
func benchLeases(t *testing.T, _ *bench) ([]storetest.Ratio, error) {
	ca := storetest.NewCA(t)
	cpu := map[string]time.Duration{}
	for _, mode := range []string{"tcp", "quic"} {
		spent, err := leaderCPU(t, ca, mode)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", mode, err)
		}
		cpu[mode] = spent
	}
	share := func(mode string) string {
		return fmt.Sprintf("%s %.1f %%", mode, 100*cpu[mode].Seconds()/benchWindow.Seconds())
	}
	return []storetest.Ratio{{Target: "T11", What: fmt.Sprintf("leader's CPU for %d leases, QUIC / TCP", leaseNodes), Ratio: ratio(cpu["quic"], cpu["tcp"]), Bound: 2,
		Beside: share("quic") + ", " + share("tcp") + " of a core"}}, nil
}

func leaderCPU(t *testing.T, ca *storetest.CA, mode string) (time.Duration, error) {
	names := make([]string, leaseNodes)
	for i := range names {
		names[i] = clientName(i)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	g := fence.NewGrantor(fence.GrantorConfig{
		Length: renewLength, Leads: func() (uint64, bool) { return 1, true },
		Prepare: func(context.Context) (uint64, time.Duration, error) { return 1, renewLength, nil },
		Confirm: func(context.Context) (uint64, error) { return 1, nil }, // a round is for all of them: nothing beside their streams
		Members: func() []string { return names }, Former: func() []string { return nil }, Leader: func() (string, string) { return "", "" },
	})
	wg.Go(func() { g.Run(ctx) })
	var addr string
	accept := func(next func() (net.Conn, string, error)) {
		wg.Go(func() {
			for {
				c, name, err := next()
				if err != nil {
					return
				}
				wg.Go(func() { g.Serve(c, name) })
			}
		})
	}
	if mode == "tcp" {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return 0, err
		}
		defer ln.Close()
		addr = ln.Addr().String()
		accept(func() (net.Conn, string, error) {
			c, err := ln.Accept()
			if err != nil {
				return nil, "", err
			}
			name := make([]byte, len(clientName(0)))
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			_, err = io.ReadFull(c, name)
			return c, string(name), err
		})
	} else {
		e, err := leaseEndpoint(t, ca, "leader")
		if err != nil {
			return 0, err
		}
		defer e.Close()
		addr = e.Addr().String()
		ln := e.Listener(transport.ClassFence)
		accept(func() (net.Conn, string, error) {
			c, err := ln.Accept()
			if err != nil {
				return nil, "", err
			}
			return c, c.(*transport.Conn).Peer(), nil
		})
	}
	stop, err := startLeaseClients(t, ca, mode, addr)
	if err != nil {
		return 0, err
	}
	defer stop()
	holding := func() (n int) {
		for _, l := range g.Leases() {
			if l.Connected && l.Left > renewLength/4 {
				n++
			}
		}
		return n
	}
	for end := time.Now().Add(90 * time.Second); holding() < leaseNodes; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			return 0, fmt.Errorf("%d of %d nodes have a lease", holding(), leaseNodes)
		}
	}
	time.Sleep(time.Second) // handshakes are over
	before := processCPU()
	time.Sleep(*benchWindow)
	spent := processCPU() - before
	if n := holding(); n < leaseNodes {
		return 0, fmt.Errorf("at the end %d of %d nodes have a lease", n, leaseNodes)
	}
	return spent, nil
}

// runLeaseClients is the other process.
func runLeaseClients(t *testing.T) {
	b, err := os.ReadFile(os.Getenv(leaseClients))
	if err != nil {
		t.Fatal(err)
	}
	var of clientsOf
	if err := json.Unmarshal(b, &of); err != nil {
		t.Fatal(err)
	}
	ca, err := of.authority()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range of.Nodes {
		name := clientName(i)
		dial := func(ctx context.Context, _, addr string) (net.Conn, error) {
			c, err := net.Dial("tcp", addr)
			if err == nil {
				_, err = io.WriteString(c, name)
			}
			return c, err
		}
		if of.Mode == "quic" {
			e, err := leaseEndpoint(t, ca, name)
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			dial = func(ctx context.Context, _, addr string) (net.Conn, error) {
				return e.Dial(ctx, transport.ClassFence, addr, "leader")
			}
		}
		h := fence.NewHolder(fence.HolderConfig{
			Length: renewLength, Enforcer: new(fenceNode), Dial: dial,
			Leader: func() (string, string) { return "leader", of.Addr },
		})
		wg.Go(func() { h.Run(ctx) })
		time.Sleep(2 * time.Millisecond) // not all handshakes at once: the endpoint refuses too many
	}
	io.Copy(io.Discard, os.Stdin) // until the leader hangs up
	cancel()
	wg.Wait()
}

// leaseEndpoint is an endpoint on a socket of the operating system's, as nodes
// have it: one that can be cut off costs more.
func leaseEndpoint(t *testing.T, ca *storetest.CA, name string) (*transport.Endpoint, error) {
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	cert := ca.Issue(t, name)
	return transport.Listen(transport.EndpointConfig{
		UDPConn:     c,
		Certificate: func() (*tls.Certificate, error) { return cert, nil },
		Roots:       ca.Pool,
		Authorize:   func(_ string, leaf *x509.Certificate) (string, error) { return leaf.Subject.CommonName, nil },
		Classes:     transport.Classes,
	})
}

// startLeaseClients runs this binary again as the nodes.
func startLeaseClients(t *testing.T, ca *storetest.CA, mode, addr string) (stop func(), err error) {
	key, err := x509.MarshalECPrivateKey(ca.Key)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(clientsOf{Mode: mode, Addr: addr, Nodes: leaseNodes, Cert: ca.Cert.Raw, Key: key})
	path := filepath.Join(t.TempDir(), "clients")
	if err = errors.Join(err, os.WriteFile(path, b, 0o600)); err != nil {
		return nil, err
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestBenchRaft$")
	cmd.Env = append(os.Environ(), leaseClients+"="+path)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	return func() {
		in.Close()
		kill := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait()
		kill.Stop()
	}, nil
}

func (of *clientsOf) authority() (*storetest.CA, error) {
	cert, err := x509.ParseCertificate(of.Cert)
	if err != nil {
		return nil, err
	}
	var key *ecdsa.PrivateKey
	key, err = x509.ParseECPrivateKey(of.Key)
	return &storetest.CA{Cert: cert, Key: key}, err
}

// processCPU is the CPU that this process has used.
func processCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err) // documented not to fail for this process
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

package chaos

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
)

// TestRotation is scenario S31: every node gets a new key and certificate while
// sessions run on it. No session notices, the earlier keys are dead, recordings of
// before, during and after verify, and a node that starts again has its new key.
// With SALLYPORT_LARGE, certificates also end and are renewed without a command.
func TestRotation(t *testing.T) {
	const lifetime = 60 * time.Second
	s := start(t, cluster.Options{Prepare: func(dir string) error {
		path := filepath.Join(dir, "node.yaml")
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(path, []byte(strings.Replace(string(b), "certLifetime: 720h0m0s", "certLifetime: "+lifetime.String(), 1)), 0o600)
	}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	token := s.job(t, "rotation", "main", nil)

	// One session on each node works all the time; backends must stay the same.
	var wg sync.WaitGroup
	failed := make(chan error, len(s.Nodes))
	done := make(chan struct{})
	for _, n := range s.Nodes {
		conn := s.login(t, n, "bench", token)
		wg.Go(func() {
			defer conn.Close(context.WithoutCancel(ctx)) // a node that stops waits for its sessions
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				case <-time.After(50 * time.Millisecond):
				}
				var got int
				if err := conn.QueryRow(ctx, "SELECT 1").Scan(&got); err != nil {
					failed <- fmt.Errorf("session on %s, query %d: %w", n.Name, i, err)
					return
				}
			}
		})
	}
	before := map[string][32]byte{}
	for _, n := range s.Nodes {
		before[n.Name] = leafOf(t, n)
	}
	time.Sleep(lifetime / 6) // a node renews no more often
	out := s.cli(t, s.AdminEnv(), "cluster", "rotate", "--all")
	for _, n := range s.Nodes {
		if after := leafOf(t, n); after == before[n.Name] || !strings.Contains(out, n.Name+" has a new key") {
			t.Errorf("%s has the certificate of before; %s", n.Name, out)
		}
	}
	if events := s.cli(t, s.AdminEnv(), "events", "tail"); strings.Count(events, "node.renewed") != 2*len(s.Nodes) {
		t.Errorf("want two node.renewed for each node:\n%s", events)
	}
	if os.Getenv("SALLYPORT_LARGE") != "" {
		for _, n := range s.Nodes {
			before[n.Name] = leafOf(t, n)
		}
		time.Sleep(lifetime + 10*time.Second) // all certificates of then have ended
		for _, n := range s.Nodes {
			if leafOf(t, n) == before[n.Name] {
				t.Errorf("%s did not renew its certificate", n.Name)
			}
		}
	}
	// The cluster works: a leader that goes, a node that starts again with its
	// new key, changes, logins.
	close(done)
	wg.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	leader, err := s.Leader(ctx)
	s.must(t, err)
	leader.Kill()
	s.must(t, leader.Restart(ctx))
	for _, n := range s.Nodes {
		if _, err := n.PSQL(ctx, "bench", token, "SELECT 1"); err != nil {
			t.Errorf("a login at %s: %v", n.Name, err)
		}
	}
	for _, n := range s.Nodes { // the last ones without a majority: they let nobody in any more
		s.must(t, n.Terminate(ctx))
	}
	s.verify(t, s.Recordings)
}

// leafOf is the certificate that clients see.
func leafOf(t *testing.T, n *cluster.Node) [32]byte {
	t.Helper()
	d := &tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}}} // only looked at
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := d.DialContext(ctx, "tcp", n.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return sha256.Sum256(c.(*tls.Conn).ConnectionState().PeerCertificates[0].Raw)
}

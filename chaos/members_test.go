package chaos

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/raftstore/event"
)

// TestMembers has five nodes that may vote, of which three do, and a gateway. A
// voter is killed, the leader is removed, another voter is removed: each is
// replaced, clients are served by the gateway all the while, and no acknowledged
// change is lost.
func TestMembers(t *testing.T) {
	s := start(t, cluster.Options{Nodes: 6, Gateways: 1})
	ctx := t.Context()
	token := s.job(t, "member", "main", nil)
	removed := map[*cluster.Node]bool{}

	members := func() *api.Members {
		var addrs []string
		for _, n := range s.Nodes {
			if n.Running() && !removed[n] {
				addrs = append(addrs, n.Addr)
			}
		}
		c, err := s.AdminClient(addrs...)
		s.must(t, err)
		actx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		m, err := c.Members(actx)
		if err != nil {
			t.Logf("members: %v", err)
			return &api.Members{}
		}
		return m
	}
	voters := func(m *api.Members) map[string]bool {
		v := map[string]bool{}
		for _, n := range m.Members {
			if n.Voter {
				v[n.Name] = true
			}
		}
		return v
	}
	until := func(what string, ok func(m *api.Members) bool) *api.Members {
		t.Helper()
		end := time.Now().Add(90 * time.Second)
		for {
			m := members()
			if ok(m) {
				return m
			}
			if time.Now().After(end) {
				t.Fatalf("not within 90 s: %s: %+v", what, m)
			}
			time.Sleep(200 * time.Millisecond)
		}
	}
	m := until("three voters and three subscribers", func(m *api.Members) bool {
		well := 0
		for _, n := range m.Members {
			if n.Healthy && (n.Voter || n.Health.State == "subscriber" && n.Health.Source != "") {
				well++
			}
		}
		return well == 6 && len(voters(m)) == 3
	})
	byName := map[string]*cluster.Node{}
	for _, n := range s.Nodes {
		byName[n.Name] = n
	}
	served := func(n *cluster.Node) {
		t.Helper()
		out, err := n.PSQL(ctx, "bench", token, "SELECT 'there'")
		if err != nil || !strings.Contains(out, "there") {
			t.Fatalf("%s: %v %q", n.Name, err, out)
		}
	}
	gateway := s.Nodes[5]
	served(gateway)

	// Changes all the while, through the gateway.
	var (
		mu    sync.Mutex
		acked = map[uint64]bool{}
		wg    sync.WaitGroup
	)
	lctx, stop := context.WithCancel(ctx)
	defer stop()
	writer, err := s.AdminClient(gateway.Addr)
	s.must(t, err)
	wg.Go(func() {
		for lctx.Err() == nil {
			wctx, cancel := context.WithTimeout(lctx, 10*time.Second)
			c, err := writer.SetVoters(wctx, 3)
			cancel()
			if err == nil {
				mu.Lock()
				acked[c.Seq] = true
				mu.Unlock()
			}
			select {
			case <-time.After(50 * time.Millisecond):
			case <-lctx.Done():
			}
		}
	})

	// A voter that does not lead dies; a subscriber takes its place.
	var dead *cluster.Node
	for name := range voters(m) {
		if name != m.Leader {
			dead = byName[name]
		}
	}
	dead.Kill()
	until(dead.Name+" is replaced", func(m *api.Members) bool {
		v := voters(m)
		return len(v) == 3 && !v[dead.Name] && !v[gateway.Name]
	})
	served(gateway)
	// When it is back it subscribes: it is still a node of the cluster.
	s.must(t, dead.Start())
	until(dead.Name+" subscribes", func(m *api.Members) bool {
		for _, n := range m.Members {
			if n.Name == dead.Name {
				return n.Healthy && n.Health.State == "subscriber"
			}
		}
		return false
	})

	// The leader goes, then the last of the first three.
	first := map[string]bool{"n1": true, "n2": true, "n3": true}
	for range 2 {
		m = members()
		gone := byName[m.Leader]
		if gone == nil || !first[gone.Name] {
			for name := range voters(m) {
				if first[name] && name != dead.Name {
					gone = byName[name]
				}
			}
		}
		if gone == nil {
			t.Fatalf("nobody to remove: %+v", m)
		}
		s.cli(t, on(gateway, s.AdminEnv()), "cluster", "remove", gone.Name, "--reason", "replaced", "--drain", "0s")
		removed[gone] = true
		until(gone.Name+" is replaced", func(m *api.Members) bool {
			v := voters(m)
			return len(v) == 3 && !v[gone.Name] && !v[gateway.Name] && m.Leader != "" && m.Leader != gone.Name
		})
		served(gateway)
	}
	stop()
	wg.Wait()

	mu.Lock()
	defer mu.Unlock()
	if len(acked) < 10 {
		t.Errorf("only %d changes were acknowledged", len(acked))
	}
	stored := map[uint64]bool{}
	for from := uint64(1); ; {
		es, err := writer.Events(ctx, from, 0)
		s.must(t, err)
		if len(es) == 0 {
			break
		}
		for _, e := range es {
			if e.Type == event.TypeVotersSet {
				stored[e.Seq] = true
			}
			from = e.Seq + 1
		}
	}
	for seq := range acked {
		if !stored[seq] {
			t.Errorf("change %d was acknowledged and is lost", seq)
		}
	}
	t.Logf("%d changes acknowledged, %d stored", len(acked), len(stored))
}

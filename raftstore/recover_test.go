package raftstore_test

import (
	"testing"

	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/storetest"
)

// raft's own way out when a majority is gone for good works on our stores, with
// the log as it is and behind a snapshot: the one node left has all events and
// leads alone.
func TestRaftRecoverCluster(t *testing.T) {
	for _, snapshot := range []bool{false, true} {
		c := storetest.New(t, 3, func(cfg *raftstore.Config) { cfg.TrailingLogs = 2 })
		for range 30 {
			c.Append(storetest.Proposal("approval/a", event.Any, ""))
		}
		c.Converge()
		left := c.Followers()[0]
		if snapshot {
			if err := left.Store.Snapshot(t.Context()); err != nil {
				t.Fatal(err)
			}
			c.Append(storetest.Proposal("approval/b", event.Any, ""))
			c.Converge()
		}
		seq, _, chain := left.Store.Head()
		for _, n := range c.Nodes {
			if n != left {
				c.Crash(n)
			}
		}
		c.Stop(left)
		alone := raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(left.Name), Address: raft.ServerAddress(left.Addr)}}}
		before, after, err := raftstore.Recover(left.Dir, left.Name, alone)
		if err != nil {
			t.Fatal(err)
		}
		if len(before.Servers) != 3 || len(after.Servers) != 1 || after.Servers[0] != alone.Servers[0] {
			t.Fatalf("members before %v, after %v", before, after)
		}
		c.Start(left)
		if got, _, now := left.Store.Head(); got != seq || now != chain {
			t.Fatalf("the state is at event %d, not %d", got, seq)
		}
		if e := c.Append(storetest.Proposal("approval/c", 0, "")); e[0].Seq != seq+1 {
			t.Fatalf("the next event is %d after %d", e[0].Seq, seq)
		}
	}
}

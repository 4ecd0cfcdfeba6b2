package raftstore

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/transport"
)

// installer plays the leader "l" to followers named "f". Its events 1 to 10 are
// of term 1, the others of term 2; it has a snapshot at 60, whose content is as
// new as 62, and the entries behind it.
type installer struct {
	conf     raft.Configuration
	snapshot []byte
	chains   map[uint64][32]byte // by event
}

const (
	installBefore   = 10 // what the follower has committed at first
	installIndex    = 60
	installContent  = 62
	installLast     = 70
	installPatience = 20 * time.Second
)

func leaderEntry(t *testing.T, i uint64) *raft.Log {
	if i <= installBefore {
		return mustEntry(t, i, 1)
	}
	return mustEntry(t, i, 2)
}

func newInstaller(t *testing.T) *installer {
	t.Helper()
	s := mustState(t, vfs.NewMem())
	x := &installer{chains: make(map[uint64][32]byte)}
	for _, id := range []raft.ServerID{"l", "f"} {
		x.conf.Servers = append(x.conf.Servers, raft.Server{ID: id, Address: raft.ServerAddress(id)})
	}
	for i := uint64(1); i <= installLast; i++ {
		s.Apply(leaderEntry(t, i))
		x.chains[i] = s.Head().Chain
		if i != installContent {
			continue
		}
		var err error
		if x.snapshot, err = io.ReadAll(mustExport(t, s)); err != nil {
			t.Fatal(err)
		}
	}
	return x
}

// follower is a store on a disk, and the only way to it.
type follower struct {
	*Store
	trans *simTransport
	fatal atomic.Pointer[error]
}

func openFollower(fs vfs.FS) (*follower, error) {
	f := new(follower)
	var err error
	f.Store, err = Open(Config{
		Dir: "/data", NodeID: "f", Addr: "f", HeartbeatTimeout: time.Minute, // it stands for no election
		Log: slog.New(slog.DiscardHandler), OnFatal: func(err error) { f.fatal.Store(&err) },
		SnapshotInterval: 1000 * time.Hour, TrailingLogs: 2,
		seams: seams{fs: fs, transport: func(c transport.RaftConfig) raftTransport {
			f.trans = newSimNet(rand.New(rand.NewPCG(1, 1))).transport("f", c)
			return f.trans
		}},
	})
	return f, err
}

// call delivers a call of the leader and waits for the answer.
func (f *follower) call(cmd any, data io.Reader) (any, error) {
	answers := make(chan raft.RPCResponse, 1)
	f.trans.deliver("l", raft.RPC{Command: cmd, Reader: data, RespChan: answers}, false)
	select {
	case a := <-answers:
		return a.Response, a.Error
	case <-time.After(installPatience):
		return nil, fmt.Errorf("no answer to %T; %v", cmd, f.Err())
	}
}

func leaderHeader() raft.RPCHeader {
	return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte("l"), Addr: []byte("l")}
}

// entries sends es, which come after prev; those up to commit are committed.
func (x *installer) entries(f *follower, term, prev uint64, es []*raft.Log, commit uint64) (bool, error) {
	q := &raft.AppendEntriesRequest{RPCHeader: leaderHeader(), Term: term, PrevLogEntry: prev, Entries: es, LeaderCommitIndex: commit}
	switch {
	case prev > installBefore:
		q.PrevLogTerm = 2
	case prev > 0:
		q.PrevLogTerm = 1
	}
	a, err := f.call(q, nil)
	if err != nil {
		return false, err
	}
	return a.(*raft.AppendEntriesResponse).Success, nil
}

func (x *installer) install(f *follower) error {
	a, err := f.call(&raft.InstallSnapshotRequest{
		RPCHeader: leaderHeader(), SnapshotVersion: raft.SnapshotVersionMax, Term: 2,
		LastLogIndex: installIndex, LastLogTerm: 2, Size: int64(len(x.snapshot)),
		Configuration: raft.EncodeConfiguration(x.conf), ConfigurationIndex: 1,
	}, bytes.NewReader(x.snapshot))
	if err == nil && !a.(*raft.InstallSnapshotResponse).Success {
		err = fmt.Errorf("the snapshot was not taken")
	}
	return err
}

func (x *installer) between(t *testing.T, from, to uint64) (es []*raft.Log) {
	for i := from; i <= to; i++ {
		es = append(es, leaderEntry(t, i))
	}
	return es
}

// check starts what a crash left: the state is the old one or a new one, the log
// has what was acknowledged, and the leader brings it to the end. The state may
// be behind the log, but not behind a snapshot that was acknowledged.
func (x *installer) check(t *testing.T, fs vfs.FS, acked uint64) error {
	f, err := openFollower(fs)
	if err != nil {
		return fmt.Errorf("it does not start: %w", err)
	}
	defer f.Close()
	seq, _, chain := f.Head()
	if acked >= installIndex && seq < installContent || seq != installBefore && seq < installContent || chain != x.chains[seq] {
		return fmt.Errorf("its state is at event %d, chain %x; %d was acknowledged", seq, chain[:4], acked)
	}
	if last := f.Status().LastIndex; last < acked {
		return fmt.Errorf("its log ends at %d; %d was acknowledged", last, acked)
	}
	for from := uint64(1); from <= seq; {
		es, err := f.Events(from, 100)
		if err != nil || len(es) == 0 || es[0].Seq != from {
			return fmt.Errorf("event %d is missing: %w", from, err)
		}
		for _, e := range es {
			if e.Chain != x.chains[e.Seq] {
				return fmt.Errorf("event %d is another one", e.Seq)
			}
		}
		from += uint64(len(es))
	}
	if names, err := fs.List("/data/" + snapshotsDir); err == nil && strings.Contains(strings.Join(names, " "), tmpSuffix) {
		return fmt.Errorf("left over: %v", names)
	}
	// The leader looks backwards for an entry that fits, and sends its snapshot
	// when it has no older one.
	for sent, prev := false, uint64(installLast); ; prev-- {
		ok, err := x.entries(f, 2, prev, x.between(t, prev+1, installLast), installLast)
		if err != nil {
			return err
		}
		if ok {
			break
		}
		if prev > installIndex {
			continue
		}
		if sent || seq >= installContent {
			return fmt.Errorf("its log does not fit the snapshot it has: it would be sent it again")
		}
		if err := x.install(f); err != nil {
			return fmt.Errorf("the snapshot again: %w", err)
		}
		sent, prev = true, installIndex+1
	}
	ctx, cancel := context.WithTimeout(context.Background(), installPatience)
	defer cancel()
	if err := f.WaitSeq(ctx, installLast); err != nil {
		return fmt.Errorf("it does not catch up: %w", err)
	}
	if _, _, chain := f.Head(); chain != x.chains[installLast] {
		return fmt.Errorf("it caught up to another state")
	}
	return nil
}

// installSteps must all be met.
var installSteps = []string{
	"mkdir in snapshots", "create in snapshots", "write in snapshots", "sync in snapshots", "rename in snapshots",
	"link in snapshots", "write in state", "sync in state", "write in log", "sync in log", "remove in snapshots",
}

// stepOf names an operation and where it is.
func stepOf(op errorfs.Op) string {
	where := "elsewhere"
	for _, d := range []string{snapshotsDir, stateDir, logDir} {
		if strings.Contains(op.Path+"/", "/"+d+"/") {
			where = d
			break
		}
	}
	verb := "other"
	switch op.Kind {
	case errorfs.OpMkdirAll:
		verb = "mkdir"
	case errorfs.OpCreate:
		verb = "create"
	case errorfs.OpLink:
		verb = "link"
	case errorfs.OpRename:
		verb = "rename"
	case errorfs.OpRemove, errorfs.OpRemoveAll:
		verb = "remove"
	case errorfs.OpFileWrite, errorfs.OpFileWriteAt:
		verb = "write"
	case errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo:
		verb = "sync"
	}
	return verb + " in " + where
}

// Killed, and cut from its power, before any operation on any file while it
// takes a snapshot from the leader, restores it, mends its log and removes older
// snapshots: a follower starts again with the old state or the new one, and
// catches up.
func TestKillAtEveryStepOfASnapshot(t *testing.T) {
	for _, c := range []struct {
		name string
		log  uint64 // the follower's log ends here; behind installBefore nobody else has it
	}{
		{"a follower that was away", installBefore},
		{"a deposed leader", installIndex + 15}, // hashicorp/raft #697
	} {
		t.Run(c.name, func(t *testing.T) {
			seed := seedOf(t)
			chance := rand.New(rand.NewPCG(seed, 1))
			x := newInstaller(t)
			mem := vfs.NewCrashableMem()
			var (
				armed   atomic.Bool
				acked   atomic.Uint64
				mu      sync.Mutex
				failed  error
				crashes = map[string]int{}
				synced  = true // since the last crash without what was not synced
			)
			hook := func(op errorfs.Op) error {
				if !armed.Load() || op.Kind.ReadOrWrite() != errorfs.OpIsWrite {
					return nil
				}
				mu.Lock()
				defer mu.Unlock()
				for _, unsynced := range []int{100, 0, 50} {
					if failed != nil || unsynced == 0 && !synced || unsynced == 50 && chance.IntN(4) > 0 {
						continue
					}
					was := acked.Load()
					fs := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: unsynced, RNG: chance})
					crashes[stepOf(op)]++
					if err := x.check(t, fs, was); err != nil {
						failed = fmt.Errorf("before %s, %s, with %d %% of what was not synced: %w", stepOf(op), op.Path, unsynced, err)
					}
				}
				synced = op.Kind == errorfs.OpFileSync || op.Kind == errorfs.OpFileSyncData || op.Kind == errorfs.OpFileSyncTo
				return nil
			}
			f, err := openFollower(errorfs.Wrap(mem, errorfs.InjectorFunc(hook)))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			do := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			reach := func(seq, log uint64) {
				t.Helper()
				ctx, cancel := context.WithTimeout(t.Context(), installPatience)
				defer cancel()
				do(f.WaitSeq(ctx, seq))
				acked.Store(log)
			}
			take := func(term, prev uint64, es []*raft.Log, commit uint64) {
				t.Helper()
				if ok, err := x.entries(f, term, prev, es, commit); err != nil || !ok {
					t.Fatalf("entries after %d: %v, %v", prev, ok, err)
				}
			}
			own := x.between(t, 1, installBefore)
			for i := uint64(installBefore + 1); i <= c.log; i++ {
				own = append(own, mustEntry(t, i, 1))
			}
			take(1, 0, own, installBefore)
			reach(installBefore, installBefore)
			do(f.state.Sync()) // what is applied is otherwise not, and applied again

			armed.Store(true)
			do(x.install(f))
			reach(installContent, installIndex)
			take(2, installIndex, x.between(t, 61, 64), 64)
			reach(64, 64)
			do(f.Snapshot(t.Context()))
			take(2, 64, x.between(t, 65, 66), 66)
			reach(66, 66)
			do(f.Snapshot(t.Context())) // the leader's goes
			armed.Store(false)
			mu.Lock()
			defer mu.Unlock()
			if failed != nil {
				t.Fatal(failed)
			}
			t.Logf("crashes: %v", crashes)
			list, err := f.Store.cfg.seams.fs.List("/data/" + snapshotsDir)
			if err != nil || len(list) != retainSnapshots {
				t.Fatalf("snapshots left: %v %v", list, err)
			}
			for _, step := range installSteps {
				if crashes[step] == 0 {
					t.Errorf("no crash before %s", step)
				}
			}
		})
	}
}

package raftstore

import (
	"errors"
	"fmt"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/fsm"
	"github.com/sallyport/sallyport/raftstore/logstore"
)

// retainSnapshots: the newest, and the one before in case a follower is still
// reading it.
const retainSnapshots = 2

// boundaryLog is raft's log but that a deletion from the front leaves its last
// entry, unless it deletes everything. That entry may be the one a snapshot
// ends with, and a follower that lacks it while it has later ones refuses the
// leader's next entries, is sent the snapshot again, and so for ever: the
// other half of hashicorp/raft #697, see mend.
type boundaryLog struct{ *raft.LogCache }

func (l boundaryLog) DeleteRange(lo, hi uint64) error {
	first, err := l.FirstIndex()
	if err != nil {
		return err
	}
	last, err := l.LastIndex()
	if err != nil {
		return err
	}
	if lo <= first && hi < last {
		hi--
	}
	if hi < lo {
		return nil
	}
	return l.LogCache.DeleteRange(lo, hi)
}

// snapshotStore is raft's store of snapshot files, and mends the log when a
// snapshot from the leader contradicts it.
type snapshotStore struct {
	*raft.FileSnapshotStore
	logs raft.LogStore // the cache above our log, below boundaryLog
	fail func(error)
}

func newSnapshotStore(dir string, log hclog.Logger, logs raft.LogStore, fail func(error)) (*snapshotStore, error) {
	f, err := raft.NewFileSnapshotStoreWithLogger(dir, retainSnapshots, log)
	if err != nil {
		return nil, fmt.Errorf("open the snapshots: %w", err)
	}
	return &snapshotStore{FileSnapshotStore: f, logs: logs, fail: fail}, nil
}

// Create starts a snapshot, one of our own or one from the leader.
func (s *snapshotStore) Create(v raft.SnapshotVersion, index, term uint64, c raft.Configuration, ci uint64, t raft.Transport) (raft.SnapshotSink, error) {
	sink, err := s.FileSnapshotStore.Create(v, index, term, c, ci, t)
	if err != nil {
		return nil, err
	}
	return &snapshotSink{SnapshotSink: sink, store: s, index: index, term: term}, nil
}

type snapshotSink struct {
	raft.SnapshotSink
	store       *snapshotStore
	index, term uint64
}

func (s *snapshotSink) Close() error {
	if err := s.SnapshotSink.Close(); err != nil {
		return err
	}
	atEnd, err := s.store.mend(s.index, s.term)
	if atEnd {
		// raft remembers the old term of the last entry and cannot be told.
		s.store.fail(errors.New("the log was mended at its end; start this node again"))
	}
	return err
}

// mend makes the log have the entry a snapshot ends with, of the snapshot's
// term. raft sees only the log when it compares its past with what a leader
// sends, not the snapshot. Without the entry, or with another of that index
// (which was never committed, nor was what follows it), it refuses the leader's
// next entries, is sent the snapshot again, and so for ever (hashicorp/raft
// #697; also a new node that restarts between its first snapshot and its first
// acknowledgement). With the entry, the leader's next ones fit, and replace
// what is wrong after it.
//
// The entry is not the true one, whose content only the snapshot has, so this
// node must never send it when it leads: what precedes it is deleted, and
// without that raft sends the snapshot.
//
// It comes after the snapshot is durable: before, a crash would leave an entry
// that fits over others that do not.
func (s *snapshotStore) mend(index, term uint64) (atEnd bool, err error) {
	var l raft.Log
	err = s.logs.GetLog(index, &l)
	if err == nil && l.Term == term {
		return false, nil
	}
	replaced := err == nil
	if replaced || errors.Is(err, raft.ErrLogNotFound) {
		// The deletion is synced with what is stored after it.
		if err = s.logs.DeleteRange(0, index-1); err == nil {
			err = s.logs.StoreLog(&raft.Log{Index: index, Term: term, Type: raft.LogNoop})
		}
	}
	if err != nil {
		return false, fmt.Errorf("mend the log at the snapshot's end: %w", err)
	}
	last, err := s.logs.LastIndex()
	return replaced && last == index, err
}

// catchUp makes the state as new as what this node knows to be committed,
// before raft starts: the newest snapshot, if the state is older or the log not
// mended (a crash between the arrival of a snapshot and its restore), then the
// log up to the commit index stored with it (a power failure may have taken the
// state's last writes). raft.Config.RestoreCommittedLogs would do the second,
// and lose the configuration entries it passes (v1.8.0, api.go NewRaft).
func catchUp(state *fsm.FSM, logs *logstore.Store, snaps *snapshotStore) error {
	list, err := snaps.List()
	if err != nil {
		return fmt.Errorf("list the snapshots: %w", err)
	}
	have := state.Head().Applied
	if len(list) > 0 {
		if list[0].Index > have {
			if err := restoreIfNewer(state, snaps, list[0].ID); err != nil {
				return err
			}
			have = max(state.Head().Applied, list[0].Index)
		}
		if _, err := snaps.mend(list[0].Index, list[0].Term); err != nil {
			return err
		}
	}
	first, err := logs.FirstIndex()
	if err != nil {
		return err
	}
	if first > have+1 {
		return fmt.Errorf("the log begins at %d and the state ends at %d: entries are missing; delete this node's data and join again", first, have)
	}
	commit, err := logs.GetCommitIndex()
	if err != nil {
		return err
	}
	var batch []*raft.Log
	for i := have + 1; i <= commit; i++ {
		l := new(raft.Log)
		if err := logs.GetLog(i, l); err != nil {
			return fmt.Errorf("read log entry %d: %w", i, err)
		}
		if l.Type == raft.LogCommand || l.Type == raft.LogConfiguration {
			batch = append(batch, l)
		}
		if len(batch) == maxAppendEntries {
			state.ApplyBatch(batch)
			batch = nil
		}
	}
	state.ApplyBatch(batch)
	return state.Err()
}

// restoreIfNewer restores a snapshot whose content is newer than the state.
// Its metadata cannot tell: it may name the index of a barrier, which the
// state does not count.
func restoreIfNewer(state *fsm.FSM, snaps raft.SnapshotStore, id string) error {
	_, rc, err := snaps.Open(id)
	if err != nil {
		return fmt.Errorf("open snapshot %s: %w", id, err)
	}
	defer rc.Close()
	return state.Restore(rc) // leaves the state alone unless newer
}

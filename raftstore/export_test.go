package raftstore

import (
	"errors"
	"log/slog"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/fsm"
	"github.com/sallyport/sallyport/raftstore/logstore"
)

// Promises are a node's term and vote, as stored.
type Promises struct {
	Term, VoteTerm uint64
	Vote           string
}

// Promises are this node's.
func (s *Store) Promises() (p Promises) {
	p.Term, _ = s.logs.GetUint64([]byte("CurrentTerm"))
	p.VoteTerm, _ = s.logs.GetUint64([]byte("LastVoteTerm"))
	cand, _ := s.logs.Get([]byte("LastVoteCand"))
	p.Vote = string(cand)
	return p
}

// LogIsEmpty says whether this node's log and snapshots are gone.
func (s *Store) LogIsEmpty() bool {
	last, _ := s.logs.LastIndex()
	snaps, _ := s.hasSnapshots()
	return last == 0 && !snaps
}

// Recover opens a stopped node's directory as raft's own tools do, and makes
// conf the cluster's members (raft.RecoverCluster). It returns the members that
// raft.GetConfiguration finds before and after.
func Recover(dir, id string, conf raft.Configuration) (before, after raft.Configuration, err error) {
	log := slog.New(slog.DiscardHandler)
	fs := vfs.Default
	for _, c := range []*raft.Configuration{&before, nil, &after} {
		state, err := fsm.Open(fsm.Config{Dir: fs.PathJoin(dir, stateDir), FS: fs, Log: log})
		if err != nil {
			return before, after, err
		}
		logs, err := logstore.Open(logstore.Config{Dir: fs.PathJoin(dir, logDir), FS: fs, Log: log})
		if err != nil {
			return before, after, errors.Join(err, state.Close())
		}
		snaps, err := newSnapshotStore(fs, dir, log, state, logs, func(error) {})
		rc := raft.DefaultConfig()
		rc.LocalID, rc.Logger = raft.ServerID(id), newRaftLogger(log)
		_, trans := raft.NewInmemTransport("")
		switch {
		case err != nil:
		case c == nil:
			err = raft.RecoverCluster(rc, state, logs, logs, snaps, trans, conf)
		default:
			*c, err = raft.GetConfiguration(rc, state, logs, logs, snaps, trans)
		}
		if there, e := raft.HasExistingState(logs, logs, snaps); e != nil || !there {
			err = errors.Join(err, e, errors.New("raft finds no state"))
		}
		if err = errors.Join(err, trans.Close(), logs.Close(), state.Close()); err != nil {
			return before, after, err
		}
	}
	return before, after, nil
}

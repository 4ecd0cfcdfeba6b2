package raftstore

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/transport"
)

// A node has a part in Raft or subscribes, and changes from one to the other
// without a restart:
//
//	            in the committed configuration
//	subscriber ────────────────────────────────► nonvoter ──► voter
//	    ▲                                            │  ▲ Demote │
//	    └────────────────────────────────────────────┘  └────────┘
//	      not in the committed configuration: the log is wiped
//
// What decides is Raft's own committed configuration, which reaches a node
// through its log or through the stream of another node. Nobody is told to
// change by a call that could be lost.
//
// Why it is safe:
//
//   - A node leaves Raft when a configuration without it is committed. From
//     then on neither its log nor its acknowledgements count: a majority of the
//     new configuration holds everything committed before, and each majority of
//     the old one, less this node, meets it.
//   - Term and vote are never deleted. The same id comes back as a voter with
//     the memory of what it voted.
//   - A node that still has a vote, as it knows, wipes its log only on a
//     configuration newer than its whole log, after strangerGrace without a
//     leader: it was away while it was replaced.
//   - The state is not touched. A new voter begins with an empty log below a
//     state that is far ahead; entries up to that are skipped by their index, as
//     they are after every restart.
//   - Raft and the stream may both bring entries to the state: each brings all
//     of them in order, and whoever comes second is skipped (applier).

// part is this node's part in Raft.
type part struct {
	raft  *raft.Raft
	trans raftTransport
	since time.Time

	notify chan bool     // raft's NotifyCh
	done   chan struct{} // ends what drains notify
	wg     sync.WaitGroup

	once   sync.Once
	future raft.Future // of the one call of raft.Shutdown that can be waited for
}

// shutdown tells raft to stop, and does not wait.
func (p *part) shutdown() { p.once.Do(func() { p.future = p.raft.Shutdown() }) }

// end stops raft and waits for everything of it.
func (p *part) end() error {
	p.shutdown()
	err := p.trans.Close() // before waiting: raft may wait for a call to a dead peer
	err = errors.Join(err, p.future.Error())
	close(p.done)
	p.wg.Wait()
	return err
}

// configuration is a committed one.
type configuration struct {
	index   uint64
	servers []raft.Server
}

func (c *configuration) has(id string) bool {
	return c != nil && slices.ContainsFunc(c.servers, func(s raft.Server) bool { return string(s.ID) == id })
}

// configured takes up a committed configuration unless a newer one is known.
func (s *Store) configured(index uint64, c raft.Configuration) {
	for {
		old := s.conf.Load()
		if old != nil && old.index >= index {
			return
		}
		if s.conf.CompareAndSwap(old, &configuration{index, slices.Clone(c.Servers)}) {
			break
		}
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// begins takes up what this node was when it stopped.
func (s *Store) begins() error {
	snaps, err := s.hasSnapshots()
	if err != nil {
		return err
	}
	last, _ := s.logs.LastIndex()
	was, known, err := s.logs.InRaft()
	if err != nil {
		return err
	}
	if !known { // made by an earlier build, or new
		was = last > 0 || snaps || !s.cfg.Subscribe
	}
	if was {
		return s.startRaft(true)
	}
	if s.cfg.Sources == nil {
		return errors.New("this node subscribes and was given no sources")
	}
	// A crash may have come in the middle of a wipe, or of a snapshot that came in.
	return errors.Join(s.wipe(), s.cfg.seams.fs.RemoveAll(s.incomingDir()))
}

func (s *Store) hasSnapshots() (bool, error) {
	names, err := s.cfg.seams.fs.List(s.cfg.seams.fs.PathJoin(s.cfg.Dir, snapshotsDir))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return len(names) > 0, err
}

// wipe makes this node's log empty, keeps its term and vote, and removes its
// snapshots. The state is synced before: it has what the log had.
func (s *Store) wipe() error {
	if err := s.state.Sync(); err != nil {
		return err
	}
	if err := s.logs.Wipe(); err != nil {
		return err
	}
	return s.cfg.seams.fs.RemoveAll(s.cfg.seams.fs.PathJoin(s.cfg.Dir, snapshotsDir))
}

// startRaft gives this node a part in Raft. At the opening of the store, the
// state is brought up to what the log knows first.
func (s *Store) startRaft(opening bool) error {
	hlog := newRaftLogger(s.log)
	cache, err := raft.NewLogCache(logCacheEntries, s.logs)
	if err != nil {
		return err
	}
	snaps, err := newSnapshotStore(s.cfg.seams.fs, s.cfg.Dir, s.log, s.state, cache, s.fail)
	if err != nil {
		return err
	}
	if opening {
		if err := catchUp(s.state, s.logs, snaps); err != nil {
			return err
		}
		list, err := snaps.List()
		if err != nil {
			return err
		}
		if len(list) > 0 {
			s.configured(list[0].ConfigurationIndex, list[0].Configuration)
		}
		s.apply.opened()
	}
	p := &part{since: time.Now(), notify: make(chan bool), done: make(chan struct{})}
	p.trans = s.cfg.seams.transport(transport.RaftConfig{
		Endpoint: s.cfg.Endpoint, Addr: s.cfg.Addr, Log: hlog, LogBusy: s.logs.Busy,
		Admit: func(peer string) error { return s.admit(p.since, peer) },
	})
	p.wg.Go(func() { s.watchLeadership(p) })
	stable := raft.StableStore(s.logs)
	if s.cfg.seams.stable != nil {
		stable = s.cfg.seams.stable(stable)
	}
	p.raft, err = raft.NewRaft(s.raftConfig(hlog, p.notify), s.apply, boundaryLog{cache}, stable, snaps, p.trans)
	if err != nil {
		err = errors.Join(fmt.Errorf("start raft: %w", err), p.trans.Close())
		close(p.done)
		p.wg.Wait()
		return err
	}
	p.trans.SetRaft(p.raft)
	p.raft.RegisterObserver(raft.NewObserver(nil, false, func(o *raft.Observation) bool {
		if _, ok := o.Data.(raft.LeaderObservation); ok {
			s.leaderChanged()
		}
		return false // nothing goes through the observer's channel
	}))
	s.part.Store(p)
	s.raft.Store(p.raft)
	s.leaderChanged()               // for what happened before the observer was there
	if err := s.Err(); err != nil { // fail found no raft to stop
		s.raft.Store(nil)
		s.part.Store(nil)
		return errors.Join(err, p.end())
	}
	return nil
}

// watchLeadership drains raft's NotifyCh, on which raft would block.
func (s *Store) watchLeadership(p *part) {
	for {
		select {
		case <-p.notify:
			s.leaderChanged()
		case <-p.done:
			return
		}
	}
}

// supervise keeps this node's part in Raft, and the stream that feeds it, as
// the committed configuration wants them, until the store is closed or fails.
func (s *Store) supervise() {
	defer s.feed.stop()
	if s.cfg.Sources == nil {
		return
	}
	tick := time.NewTicker(s.cfg.HeartbeatTimeout / 2)
	defer tick.Stop()
	for {
		select {
		case <-s.wake:
		case <-tick.C:
		case <-s.fatal.c:
			return
		case <-s.done:
			return
		}
		if s.Err() != nil {
			return
		}
		if err := s.adjust(); err != nil {
			s.fail(fmt.Errorf("change this node's part in Raft: %w", err))
			return
		}
	}
}

// adjust does what the configuration asks for now.
func (s *Store) adjust() error {
	conf, r := s.conf.Load(), s.raft.Load()
	switch {
	case r == nil && conf.has(s.cfg.NodeID):
		s.log.Info("this node is in Raft's configuration: it takes its part", "configuration", conf.index)
		if err := s.join(); err != nil {
			return err
		}
	case r != nil && conf != nil && !conf.has(s.cfg.NodeID) && s.feed.current() && s.mayLeave(r, conf):
		s.log.Info("this node is not in Raft's configuration any more: it subscribes", "configuration", conf.index)
		if err := s.withdraw(); err != nil {
			return err
		}
	}
	if s.wantsFeed() {
		s.feed.start(s.follow)
	} else {
		s.feed.stop()
	}
	return nil
}

// mayLeave says whether this node's log may be wiped, given a committed
// configuration without it.
func (s *Store) mayLeave(r *raft.Raft, conf *configuration) bool {
	if r.State() == raft.Leader {
		return false
	}
	if !s.votes(r) {
		return true
	}
	return s.lonely(r) && conf.index > r.LastIndex()
}

// votes says whether this node has a vote in the newest configuration it knows.
func (s *Store) votes(r *raft.Raft) bool {
	return slices.ContainsFunc(r.GetConfiguration().Configuration().Servers, func(v raft.Server) bool {
		return string(v.ID) == s.cfg.NodeID && v.Suffrage == raft.Voter
	})
}

// lonely says whether Raft has heard of no leader for so long that this node
// may have been replaced.
func (s *Store) lonely(r *raft.Raft) bool {
	contact := r.LastContact()
	if p := s.part.Load(); p != nil && contact.Before(p.since) {
		contact = p.since
	}
	return r.State() != raft.Leader && time.Since(contact) > strangerGrace*s.cfg.HeartbeatTimeout
}

// wantsFeed says whether this node is to be fed by another: it is no voter, or
// one that nobody has talked to for long. A voter nobody has talked to and that
// has no configuration yet waits for Bootstrap.
func (s *Store) wantsFeed() bool {
	r := s.raft.Load()
	if r == nil {
		return true
	}
	if last, _ := s.logs.LastIndex(); last == 0 && s.conf.Load() == nil {
		return false
	}
	return !s.votes(r) || s.lonely(r)
}

// join starts Raft with an empty log under the state there is.
func (s *Store) join() error {
	// What is in the state was committed in its term; this node has voted in
	// none that it does not remember.
	if err := s.logs.BeginRaft(s.state.Head().Term); err != nil {
		return err
	}
	return s.startRaft(false)
}

// withdraw ends this node's part in Raft.
func (s *Store) withdraw() error {
	p := s.part.Load()
	s.raft.Store(nil)
	s.leaderChanged()
	err := p.end()
	s.part.Store(nil)
	if err != nil {
		return err
	}
	return s.wipe()
}

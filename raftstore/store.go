// Package raftstore is the cluster's event store: events are appended at the
// leader, in order, all or nothing and once, and read on every node. It hides
// Raft and Pebble; their types do not leave it.
//
// It knows what an event is and nothing of what it means: who may append what
// is decided before Append. See DESIGN.md for the stored formats and why it is
// built as it is.
package raftstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fsm"
	"github.com/sallyport/sallyport/raftstore/internal/disk"
	"github.com/sallyport/sallyport/raftstore/logstore"
	"github.com/sallyport/sallyport/raftstore/transport"
)

var (
	// ErrNoLeader says that no leader is known now; nothing was appended.
	ErrNoLeader = errors.New("the cluster has no leader now")
	// ErrUnknownOutcome says that the events may be stored or not, or be
	// stored later: leadership or patience was lost on the way. Append the same
	// proposals, with the same ids, again: they are stored once.
	ErrUnknownOutcome = errors.New("it is not known whether the events were stored")
	// ErrBusy says that too much waits already; nothing was appended.
	ErrBusy = errors.New("the event store is busy")
	// ErrClosed says that the store was closed.
	ErrClosed = errors.New("the event store is closed")
	// ErrIDReused rejects proposals some of whose ids belong to other events.
	ErrIDReused = fsm.ErrIDReused
	// ErrDiverged is the fatal reason of a node whose events differ from the leader's.
	ErrDiverged = fsm.ErrDiverged
	// ErrNotFresh refuses to bootstrap a store that has state.
	ErrNotFresh = errors.New("the event store is not empty")
)

// NotLeaderError tells who the leader is. Nothing was appended.
type NotLeaderError struct{ ID, Addr string }

func (e *NotLeaderError) Error() string {
	return fmt.Sprintf("not the leader, which is %s at %s", e.ID, e.Addr)
}

// ConflictError rejects proposals because an aggregate is not at the expected
// version. Nothing was appended.
type ConflictError = fsm.Conflict

const (
	defaultHeartbeat = 500 * time.Millisecond
	// maxPending bounds the Appends that wait: each may hold MaxCommand.
	maxPending = 1024
	// enqueueTimeout is how long raft may take to look at an Append.
	enqueueTimeout = 10 * time.Second
	// maxAppendEntries is also the number of entries in one state batch.
	maxAppendEntries  = 256
	logCacheEntries   = 512
	snapshotInterval  = 120 * time.Second
	snapshotThreshold = 16384
	trailingLogs      = 20480
	// transferPause is longer than a call to a dead peer and raft's longest
	// pause between two calls to it take together.
	transferPause = 30 * time.Second
	// cacheBytes and maxOpenTables are for both databases together. Memtables
	// are taken from it as they grow, the log's up to 64 MiB each, the state's 32.
	cacheBytes    = 192 << 20
	maxOpenTables = 512
	// In Config.Dir.
	logDir, stateDir, snapshotsDir = "log", "state", "snapshots"
	// strangerGrace times the heartbeat timeout is how long a node must have
	// been without a leader to listen to one it does not know: see admit.
	strangerGrace = 10
)

// Config is what a Store needs.
type Config struct {
	Dir      string              // created if missing; one Store at a time
	NodeID   string              // the name in this node's certificate
	Addr     string              // advertised host:port of the Endpoint
	Endpoint *transport.Endpoint // not closed by the Store
	// HeartbeatTimeout is after how long without a leader an election starts;
	// a new leader is there within three times of it. Default 500 ms.
	HeartbeatTimeout time.Duration
	Log              *slog.Logger // default: none
	// Subscribe makes an empty store begin outside Raft, fed by Sources. False,
	// it waits in Raft for Bootstrap or for a leader that adds it. A store that
	// is not empty goes on as what it was.
	Subscribe bool
	// Sources names the nodes that may feed this one while it is no voter, best
	// first. Its content is taken as committed: name nobody whose word would not
	// do in Raft. nil means that this node is never fed and never leaves Raft.
	Sources func() []Source
	// OnFatal hears, once and on its own goroutine, that this node must stop:
	// its events differ from the leader's, there is an event this build does
	// not know, or a disk failed. The Store takes no part in Raft from then on.
	OnFatal func(error)

	// FeatureLevel is the newest level this build supports, event.Level when 0;
	// a lower one makes it an older build.
	FeatureLevel uint32
	// HeldBack tells who keeps the cluster at its feature level, for people to
	// read; nil when nobody knows.
	HeldBack func() []string

	// SnapshotInterval, SnapshotThreshold and TrailingLogs are raft's: how often
	// to look whether a snapshot is due, after how many entries it is, and how
	// many entries are kept for followers that are behind. Zero means the
	// defaults: 120 s, 16384, 20480.
	SnapshotInterval                time.Duration
	SnapshotThreshold, TrailingLogs uint64

	// WALDir is where Raft's log is synced, instead of Dir/log: a directory on
	// another partition or disk. WALFailoverDir, on yet another one, takes the
	// log while the first stalls. Both may be empty.
	WALDir, WALFailoverDir string

	seams seams
}

// seams are where tests put in what they can break. The zero value is the
// product.
type seams struct {
	fs        vfs.FS
	transport func(transport.RaftConfig) raftTransport
	tune      func(*raft.Config)
	stable    func(raft.StableStore) raft.StableStore
}

// raftTransport is what the Store needs of *transport.Raft.
type raftTransport interface {
	raft.Transport
	raft.WithPreVote
	raft.WithClose
	SetRaft(*raft.Raft)
	Committed(index uint64)
}

// Store is one node's event store. Safe for concurrent use.
type Store struct {
	cfg   Config
	log   *slog.Logger
	state *fsm.FSM
	apply *applier
	logs  *logstore.Store
	raft  atomic.Pointer[raft.Raft] // nil while this node has no part in Raft
	feed  feed
	conf  atomic.Pointer[configuration] // newest committed one known here, nil when none is
	ask   *confirmer

	pending chan struct{} // a token for each waiting Append
	leader  chan struct{} // LeaderChanges
	wake    chan struct{} // one token: conf changed
	done    chan struct{} // closed by Close
	wg      sync.WaitGroup

	// part is this node's part in Raft, nil while it has none. Open sets it,
	// then the supervisor alone, then Close.
	part atomic.Pointer[part]

	transfer struct {
		sync.Mutex // held over a transfer
		failed     time.Time
	}
	fatal struct {
		once sync.Once
		c    chan struct{} // closed when err is set
		err  error
	}
	use struct {
		sync.RWMutex // held for reading while the databases are used
		closed       bool
		closing      atomic.Bool // tells who reads for long to end
	}
}

// Open opens what is in cfg.Dir, or an empty store, and takes up the part in
// Raft that it had: see Config.Subscribe.
func Open(cfg Config) (_ *Store, err error) {
	if cfg.Dir == "" || cfg.NodeID == "" || cfg.Addr == "" || cfg.Endpoint == nil && cfg.seams.transport == nil {
		return nil, errors.New("raftstore.Open: incomplete configuration")
	}
	setDefaults(&cfg)
	s := &Store{
		cfg:     cfg,
		log:     cfg.Log,
		pending: make(chan struct{}, maxPending),
		leader:  make(chan struct{}, 1),
		wake:    make(chan struct{}, 1),
		done:    make(chan struct{}),
	}
	s.fatal.c = make(chan struct{})
	s.ask = newConfirmer(s)
	fs := cfg.seams.fs
	err = fs.MkdirAll(cfg.Dir, 0o700)
	if err == nil {
		err = syncDir(fs, fs.PathDir(cfg.Dir)) // what is acknowledged must not vanish with its directory
	}
	if err != nil {
		return nil, fmt.Errorf("open the event store: %w", err)
	}
	shared := disk.NewShared(cacheBytes, maxOpenTables)
	defer shared.Release() // the databases hold it
	s.state, err = fsm.Open(fsm.Config{Dir: fs.PathJoin(cfg.Dir, stateDir), FS: fs, Shared: shared, Log: s.log, OnFatal: s.fail, Level: cfg.FeatureLevel})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.state.Close())
		}
	}()
	s.apply = newApplier(s.state, s.configured, s.tell)
	s.logs, err = logstore.Open(logstore.Config{
		Dir: fs.PathJoin(cfg.Dir, logDir), FS: fs, WALDir: cfg.WALDir, WALFailoverDir: cfg.WALFailoverDir, Shared: shared,
		Log: s.log, OnFatal: s.fail, Committed: s.committed,
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.logs.Close())
		}
	}()
	if err = s.begins(); err != nil {
		return nil, err
	}
	if cfg.Endpoint != nil {
		s.serveStreams()
		s.ask.serve()
	}
	s.wg.Go(s.supervise)
	return s, nil
}

func setDefaults(cfg *Config) {
	often(cfg)
	if cfg.HeartbeatTimeout == 0 {
		cfg.HeartbeatTimeout = defaultHeartbeat
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.SnapshotInterval == 0 {
		cfg.SnapshotInterval = snapshotInterval
	}
	if cfg.SnapshotThreshold == 0 {
		cfg.SnapshotThreshold = snapshotThreshold
	}
	if cfg.TrailingLogs == 0 {
		cfg.TrailingLogs = trailingLogs
	}
	if cfg.seams.fs == nil {
		cfg.seams.fs = disk.FS()
	}
	if cfg.seams.transport == nil {
		cfg.seams.transport = func(c transport.RaftConfig) raftTransport { return transport.NewRaft(c) }
	}
}

// committed is an index that this node's own log is known to have committed.
// What a stream brought to the state says nothing on that.
func (s *Store) committed() uint64 {
	index := s.apply.fromRaft.Load()
	if r := s.raft.Load(); r != nil {
		index = max(index, r.CommitIndex())
	}
	return index
}

// tell has the followers told that entries up to index are committed.
func (s *Store) tell(index uint64) {
	if p := s.part.Load(); p != nil {
		p.trans.Committed(index)
	}
}

func (s *Store) raftConfig(hlog hclog.Logger, notify chan bool) *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(s.cfg.NodeID)
	c.HeartbeatTimeout = s.cfg.HeartbeatTimeout
	c.ElectionTimeout = s.cfg.HeartbeatTimeout
	c.LeaderLeaseTimeout = s.cfg.HeartbeatTimeout
	c.CommitTimeout = 5 * time.Millisecond // how long followers wait to hear of a commit that transport.Push did not bring
	c.MaxAppendEntries = maxAppendEntries
	c.BatchApplyCh = true
	c.ShutdownOnRemove = false
	c.SnapshotInterval = s.cfg.SnapshotInterval
	c.SnapshotThreshold = s.cfg.SnapshotThreshold
	c.TrailingLogs = s.cfg.TrailingLogs
	c.NoSnapshotRestoreOnStart = true // catchUp did what is needed
	c.NotifyCh = notify
	c.Logger = hlog
	if s.cfg.seams.tune != nil {
		s.cfg.seams.tune(c)
	}
	return c
}

// admit says whether a peer may call us: a voter of the configuration we know.
//
// What we know may be old. A node that joins learns the past configurations
// one after the other, from a leader that is in none of them: while we are not
// in the configuration ourselves, we listen to everyone the Endpoint's
// Authorize let in. And a node that was down while all others were replaced
// knows none of the living: after strangerGrace without any leader, we listen
// too. A healthy node never does.
func (s *Store) admit(since time.Time, peer string) error {
	r := s.raft.Load()
	if r == nil {
		return errors.New("starting")
	}
	member := false
	for _, v := range r.GetConfiguration().Configuration().Servers {
		if string(v.ID) == peer && v.Suffrage == raft.Voter {
			return nil
		}
		member = member || string(v.ID) == s.cfg.NodeID
	}
	if !member {
		return nil
	}
	contact := r.LastContact()
	if contact.Before(since) {
		contact = since
	}
	if r.State() != raft.Leader && time.Since(contact) > strangerGrace*s.cfg.HeartbeatTimeout {
		return nil
	}
	return fmt.Errorf("%q is not a voter", peer)
}

// Bootstrap makes an empty store a cluster with this node as its one voter.
// It returns ErrNotFresh when there is state. Exactly one node of a cluster is
// bootstrapped, once; its store was opened without Subscribe.
func (s *Store) Bootstrap() error {
	r := s.raft.Load()
	if r == nil {
		return ErrNotFresh
	}
	err := r.BootstrapCluster(raft.Configuration{Servers: []raft.Server{{
		ID: raft.ServerID(s.cfg.NodeID), Address: raft.ServerAddress(s.cfg.Addr),
	}}}).Error()
	if errors.Is(err, raft.ErrCantBootstrap) {
		return ErrNotFresh
	}
	return err
}

// Append stores proposals as events, together and in order or not at all, and
// returns them. Only the leader can. If all ids are stored already, the events
// they became are returned and nothing is appended; see ByID for how long.
//
// Errors: *NotLeaderError, ErrNoLeader, *ConflictError, ErrIDReused, ErrBusy,
// *event.LevelError, event.ErrInvalid and event.ErrUnknownType say that nothing was appended.
// After ErrUnknownOutcome, or any other, append the same again.
func (s *Store) Append(ctx context.Context, batch ...event.Proposal) ([]event.Event, error) {
	if err := s.Err(); err != nil {
		return nil, err
	}
	r := s.raft.Load()
	if r == nil || r.State() != raft.Leader {
		return nil, s.notLeader()
	}
	head := s.state.Head()
	c := fsm.Command{TimeNanos: time.Now().UnixNano(), Seq: head.Seq, Chain: head.Chain, Proposals: make([][]byte, len(batch))}
	for i := range batch {
		err := batch[i].Validate()
		if err == nil {
			c.Proposals[i], err = batch[i].Marshal()
		}
		if err != nil {
			return nil, err
		}
	}
	if err := s.checkLevel(batch); err != nil {
		return nil, err
	}
	if s.state.Level() >= fsm.LevelDigest {
		c.Digest = s.state.Digest()
	}
	b, err := c.Marshal()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", event.ErrInvalid, err)
	}
	var f raft.ApplyFuture
	err = s.await(ctx, func(r *raft.Raft) raft.Future {
		f = r.Apply(b, enqueueTimeout)
		return f
	})
	if err != nil {
		return nil, err
	}
	res, ok := f.Response().(fsm.Result)
	switch {
	case !ok:
		return nil, ErrUnknownOutcome
	case errors.Is(res.Err, fsm.ErrHalted):
		return nil, fmt.Errorf("%w: %w", ErrUnknownOutcome, res.Err)
	}
	return res.Events, res.Err
}

// checkLevel refuses to propose what not every member can read.
func (s *Store) checkLevel(batch []event.Proposal) error {
	level := s.state.Level()
	for _, p := range batch {
		if need := event.Needs(p.Type, p.Version); need > level {
			e := &event.LevelError{Type: p.Type, Version: p.Version, Needs: need, Have: level}
			if s.cfg.HeldBack != nil {
				e.HeldBack = s.cfg.HeldBack()
			}
			return e
		}
		if p.Type != event.TypeFeatureLevel {
			continue
		}
		raise, err := event.Decode[event.FeatureLevel](event.Event{Proposal: p})
		if err != nil {
			return fmt.Errorf("%w: %w", event.ErrInvalid, err)
		}
		if raise.Level > s.supports() {
			return fmt.Errorf("%w: this build supports feature level %d, not %d", event.ErrInvalid, s.supports(), raise.Level)
		}
		level = raise.Level
	}
	return nil
}

func (s *Store) supports() uint32 {
	if s.cfg.FeatureLevel > 0 {
		return s.cfg.FeatureLevel
	}
	return event.Level
}

// await runs a call of raft and waits for its future or ctx. A call ctx ended
// goes on alone; its token stays taken until raft answers.
func (s *Store) await(ctx context.Context, call func(*raft.Raft) raft.Future) error {
	r := s.raft.Load()
	if r == nil {
		return s.notLeader()
	}
	select {
	case s.pending <- struct{}{}:
	default:
		return ErrBusy
	}
	answer := make(chan error, 1)
	end, err := s.begin() // Close waits for wg
	if err != nil {
		<-s.pending
		return err
	}
	s.wg.Go(func() {
		err := call(r).Error()
		<-s.pending
		answer <- err
	})
	end()
	select {
	case err := <-answer:
		return s.outcome(err)
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrUnknownOutcome, context.Cause(ctx))
	case <-s.fatal.c:
		return fmt.Errorf("%w: %w", ErrUnknownOutcome, s.fatal.err)
	case <-s.done:
		return fmt.Errorf("%w: %w", ErrUnknownOutcome, ErrClosed)
	}
}

// outcome translates raft's errors. Those raft gives before it takes an entry
// into its log are certain, all others are not.
func (s *Store) outcome(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader):
		return s.notLeader()
	case errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return ErrNoLeader
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return ErrBusy
	}
	return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
}

func (s *Store) notLeader() error {
	id, addr := s.Leader()
	if id == "" || id == s.cfg.NodeID { // leadership comes or goes this moment
		return ErrNoLeader
	}
	return &NotLeaderError{ID: id, Addr: addr}
}

// Barrier returns when this node, the leader, has applied everything that was
// committed before the call, by any leader. It is one entry in the log.
func (s *Store) Barrier(ctx context.Context) error {
	return s.await(ctx, func(r *raft.Raft) raft.Future { return r.Barrier(enqueueTimeout) })
}

// AddVoter adds a node with a vote, gives a vote to one that has none, or
// changes its address. Leader only. The node's store must be open and empty, or
// one that was a member before.
func (s *Store) AddVoter(ctx context.Context, id, addr string) error {
	return s.await(ctx, func(r *raft.Raft) raft.Future {
		return r.AddVoter(raft.ServerID(id), raft.ServerAddress(addr), 0, enqueueTimeout)
	})
}

// AddNonvoter adds a node without a vote: it receives the log and counts for
// nothing. A subscriber starts its part in Raft when it hears of it. Leader only.
func (s *Store) AddNonvoter(ctx context.Context, id, addr string) error {
	return s.await(ctx, func(r *raft.Raft) raft.Future {
		return r.AddNonvoter(raft.ServerID(id), raft.ServerAddress(addr), 0, enqueueTimeout)
	})
}

// Demote takes a node's vote; it goes on receiving the log until Remove. Taking
// the vote first is what lets a running node hear that it has none, and so
// leave Raft by itself. Leader only.
func (s *Store) Demote(ctx context.Context, id string) error {
	return s.await(ctx, func(r *raft.Raft) raft.Future {
		return r.DemoteVoter(raft.ServerID(id), 0, enqueueTimeout)
	})
}

// Remove takes a node out of Raft. Leader only. One that is fed by a stream
// hears of it and subscribes; one that was removed from the cluster may never:
// what makes it powerless is that the Endpoint's Authorize refuses it.
func (s *Store) Remove(ctx context.Context, id string) error {
	return s.await(ctx, func(r *raft.Raft) raft.Future {
		return r.RemoveServer(raft.ServerID(id), 0, enqueueTimeout)
	})
}

// TransferLeadership makes the most advanced other voter the leader. Leader only.
//
// After one that failed it refuses another for transferPause: raft asks the
// target's replication to catch up, over a channel that holds one request. Two
// of them unanswered when leadership is lost, and raft never again takes an
// Append on this node: the goroutine that would end the transfer hangs (v1.8.0,
// raft.go leadershipTransfer). By then the first was answered.
func (s *Store) TransferLeadership(ctx context.Context) error {
	if !s.transfer.TryLock() {
		return errors.New("leadership is being transferred already")
	}
	defer s.transfer.Unlock()
	if wait := transferPause - time.Since(s.transfer.failed); !s.transfer.failed.IsZero() && wait > 0 {
		return fmt.Errorf("a transfer of leadership failed just now; try again in %v", wait.Round(time.Second))
	}
	err := s.await(ctx, func(r *raft.Raft) raft.Future { return r.LeadershipTransfer() })
	var not *NotLeaderError
	if err != nil && !errors.As(err, &not) {
		s.transfer.failed = time.Now()
	}
	return err
}

// Snapshot takes a snapshot now, whatever the threshold, and shortens the log.
// A node without a part in Raft has no log to shorten.
func (s *Store) Snapshot(ctx context.Context) error {
	if s.raft.Load() == nil {
		return nil
	}
	err := s.await(ctx, func(r *raft.Raft) raft.Future { return r.Snapshot() })
	if errors.Is(err, raft.ErrNothingNewToSnapshot) {
		return nil
	}
	return err
}

// fail stops this node's part in Raft and tells the owner, once.
func (s *Store) fail(err error) {
	s.fatal.once.Do(func() {
		s.fatal.err = err
		close(s.fatal.c)
		s.shutdown() // not waited for: we may be on one of raft's goroutines
		if s.cfg.OnFatal != nil {
			go s.cfg.OnFatal(err)
		}
	})
}

// Err is why this node had to stop, or nil.
func (s *Store) Err() error {
	select {
	case <-s.fatal.c:
		return s.fatal.err
	default:
		return nil
	}
}

// closeTimeout bounds how long a failed disk can hold up Close.
const closeTimeout = 5 * time.Second

// Close hands leadership to another voter if this node has it, leaves Raft and
// closes the databases. After a fatal error it may leave them as they are.
func (s *Store) Close() error {
	if r := s.raft.Load(); r != nil && r.State() == raft.Leader && s.otherVoters(r) {
		ctx, cancel := context.WithTimeout(context.Background(), 4*s.cfg.HeartbeatTimeout)
		if err := s.TransferLeadership(ctx); err != nil {
			s.log.Warn("leadership was not handed over", "error", err)
		}
		cancel()
	}
	s.use.closing.Store(true)
	s.use.Lock()
	defer s.use.Unlock()
	if s.use.closed {
		return nil
	}
	s.use.closed = true

	stopped := make(chan error, 1)
	go func() { stopped <- s.leave() }()
	broken := s.fatal.c
	var patience <-chan time.Time
	for {
		select {
		case err := <-stopped:
			return errors.Join(err, s.logs.Close(), s.state.Close())
		case <-broken: // before, or while we wait: what has failed does not return
			broken, patience = nil, time.After(closeTimeout)
		case <-patience:
			return fmt.Errorf("the event store's disk hangs: %w", s.Err())
		}
	}
}

// leave ends this node's part in Raft and waits for all that uses the databases.
func (s *Store) leave() error {
	close(s.done)
	s.shutdown() // appends wait for it
	var err error
	if p := s.part.Load(); p != nil {
		err = p.trans.Close() // before waiting: raft may wait for a call to a dead peer
	}
	s.wg.Wait() // from here on nobody else changes part
	if p := s.part.Load(); p != nil {
		err = errors.Join(err, p.end())
	}
	return err
}

// shutdown tells raft to stop, and waits for nothing.
func (s *Store) shutdown() {
	if p := s.part.Load(); p != nil {
		p.shutdown()
	}
}

func (s *Store) otherVoters(r *raft.Raft) bool {
	for _, v := range r.GetConfiguration().Configuration().Servers {
		if v.Suffrage == raft.Voter && string(v.ID) != s.cfg.NodeID {
			return true
		}
	}
	return false
}

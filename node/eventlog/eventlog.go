// Package eventlog makes the cluster's event log verifiable from outside. On
// each voter a Service keeps the Merkle tree over the events; the leader's asks
// the others for cosignatures of its head, every ten seconds or thousand
// events, and copies what an auditor needs to the store of recordings. Verify
// and Prove are the auditor's side: they need the store, or a node's API, and
// the hash of the cluster's CA certificate.
//
// docs/event-log.md specifies the formats and says what is proved. The
// arithmetic is raftstore/tlog's.
package eventlog

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/tlog"
	"github.com/sallyport/sallyport/recording"
)

// When a checkpoint is due.
const (
	DefaultEvery  = 10 * time.Second
	DefaultEvents = 1000
)

const (
	aggregate = "checkpoint"
	// askTimeout bounds how long the leader waits for one voter's cosignature.
	askTimeout = 5 * time.Second
	// behindTimeout is how long a voter that is asked waits for events that it
	// has not applied yet.
	behindTimeout = 3 * time.Second
	// recheckEvery bounds how often a node computes its root from all events
	// again because somebody stated another one: it reads the whole log.
	recheckEvery = 10 * time.Minute
	readEvents   = 1024
	signedFile   = "cosigned.json"
	minBackoff   = time.Second
	maxBackoff   = 30 * time.Second
)

// Kinds of entries in the tree's index.
const (
	kindMembers    = 'm' // changes who may cosign
	kindCheckpoint = 'c' // a checkpoint, the n-th is number n
	kindGood       = 'g' // a checkpoint that this node found well cosigned
)

// Store is what a Service needs of raftstore.Store.
type Store interface {
	Envelopes(from uint64, max int) ([]raftstore.StoredEvent, error)
	WaitSeq(ctx context.Context, seq uint64) error
	Append(ctx context.Context, batch ...event.Proposal) ([]event.Event, error)
	IsLeader() bool
	Leader() (id, addr string)
}

// Request asks a voter what the root of its own first Size events is.
type Request struct {
	Size uint64 `json:"size"`
	Root []byte `json:"root"` // the leader's
}

// Reply is a voter's answer: its own root, and its cosignature of that.
type Reply struct {
	Root        []byte `json:"root"`
	Cosignature []byte `json:"cosignature"`
}

// Options are what a Service needs of its node.
type Options struct {
	Dir   string // for the tree and what was cosigned; created if missing
	Node  string
	Store Store
	// Keys are the keys of this node's certificates, the older first.
	Keys func() []crypto.Signer
	// FeatureLevel is the cluster's: below what checkpoints need, none are made.
	FeatureLevel func() uint32
	// Ask sends a request to another node.
	Ask func(ctx context.Context, node string, r *Request) (*Reply, error)
	// Objects is where the log is exported to; nil for nowhere.
	Objects recording.Store
	// Fatal hears that this node's events are not those of the majority.
	Fatal func(error)
	Log   *slog.Logger
	Now   func() time.Time // default time.Now
	// Every and Events say when a checkpoint is due; zero means the defaults.
	Every  time.Duration
	Events uint64
}

// Service is one node's part. All methods are safe for concurrent use.
type Service struct {
	o    Options
	tree *tlog.Tree

	mu struct {
		sync.Mutex
		members  []membersAt // ascending
		trusted  tlog.Voters // as of the newest good checkpoint; before the first: the first node
		last     checkpoint  // the newest, good or not
		since    time.Time   // when the oldest event that no checkpoint covers was seen; zero for none
		problem  string      // why the last round made no checkpoint
		alarms   map[string]string
		recheck  time.Time // when the root was last computed from all events
		export   ExportStatus
		advanced chan struct{} // closed and replaced when events were taken
		restart  func()        // has follow look at the tree again
	}
	signing sync.Mutex // one cosignature at a time; guards the file of what was cosigned
}

// membersAt is who may cosign after seq events.
type membersAt struct {
	seq uint64
	tlog.Members
}

// checkpoint is one as its event states it.
type checkpoint struct {
	number uint64
	tlog.Checkpoint
	at time.Time // of the event
}

// ErrDiverged is why a node must stop: a majority of the voters vouches for
// other events than it has.
var ErrDiverged = fmt.Errorf("%w: a majority of the voters has cosigned another root", raftstore.ErrDiverged)

// Open opens the tree. Run does the rest.
func Open(o Options) (*Service, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Every == 0 {
		o.Every = DefaultEvery
	}
	if o.Events == 0 {
		o.Events = DefaultEvents
	}
	s := &Service{o: o}
	s.mu.alarms = map[string]string{}
	s.mu.advanced = make(chan struct{})
	var err error
	if s.tree, err = tlog.OpenTree(o.Dir); err != nil {
		return nil, err
	}
	if err := s.restore(); err != nil {
		return nil, errors.Join(err, s.tree.Close())
	}
	return s, nil
}

// restore reads what the tree's index names: who may cosign, and the newest
// checkpoints. If the store has not these events (a node whose state was lost
// and that will be sent it again) the tree is computed anew.
func (s *Service) restore() error {
	err := s.restoreFrom()
	if err != nil {
		s.o.Log.Warn("the event log's tree is computed anew", "err", err)
		s.mu.members, s.mu.trusted, s.mu.last = nil, nil, checkpoint{}
		err = s.tree.Reset()
	}
	return err
}

func (s *Service) restoreFrom() error {
	size := s.tree.Size()
	if size == 0 {
		return nil
	}
	// The tree must be of these events: its last leaf at least.
	last, err := s.stored(size)
	if err != nil {
		return err
	}
	proof, err := s.tree.Inclusion(size-1, size)
	if err != nil {
		return err
	}
	root, err := s.tree.Root(size)
	if err != nil {
		return err
	}
	if err := tlog.CheckInclusion(proof, size, root, size-1, tlog.LeafHash(last.Envelope)); err != nil {
		return fmt.Errorf("the tree is not of these events: %w", err)
	}
	for _, leaf := range s.tree.Leaves(kindMembers) {
		e, err := s.event(leaf + 1)
		if err == nil {
			err = s.fold(&e)
		}
		if err != nil {
			return err
		}
	}
	if cs := s.tree.Leaves(kindCheckpoint); len(cs) > 0 {
		if s.mu.last, _, err = s.checkpoint(uint64(len(cs))); err != nil {
			return err
		}
	}
	s.mu.trusted = s.membersAt(size).Genesis
	if gs := s.tree.Leaves(kindGood); len(gs) > 0 {
		e, err := s.event(gs[len(gs)-1] + 1)
		if err != nil {
			return err
		}
		p, err := event.Decode[event.CheckpointCosigned](e)
		if err != nil {
			return err
		}
		s.mu.trusted = s.membersAt(p.Size).Voters
	}
	if s.pending(size) > 0 {
		s.mu.since = s.o.Now()
	}
	return nil
}

// Run follows the events, cosigns and exports until ctx ends; it closes the
// tree when all it started has ended. An error is this node's end: its disk
// failed, or Fatal was called.
func (s *Service) Run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.follow(gctx) })
	g.Go(func() error { return s.lead(gctx) })
	if s.o.Objects != nil {
		g.Go(func() error { return s.exportLoop(gctx) })
	}
	err := g.Wait()
	if ctx.Err() != nil {
		err = nil
	}
	return errors.Join(err, s.tree.Close())
}

// stored reads one event as it is stored.
func (s *Service) stored(seq uint64) (raftstore.StoredEvent, error) {
	es, err := s.o.Store.Envelopes(seq, 1)
	if err == nil && len(es) == 0 {
		err = fmt.Errorf("event %d is not there", seq)
	}
	if err != nil {
		return raftstore.StoredEvent{}, err
	}
	return es[0], nil
}

func (s *Service) event(seq uint64) (event.Event, error) {
	st, err := s.stored(seq)
	if err != nil {
		return event.Event{}, err
	}
	return event.UnmarshalEnvelope(st.Envelope)
}

// checkpoint reads a checkpoint by its number.
func (s *Service) checkpoint(number uint64) (checkpoint, string, error) {
	cs := s.tree.Leaves(kindCheckpoint)
	if number == 0 || number > uint64(len(cs)) {
		return checkpoint{}, "", recording.ErrNotFound
	}
	e, err := s.event(cs[number-1] + 1)
	if err != nil {
		return checkpoint{}, "", err
	}
	return parseCheckpoint(&e)
}

func parseCheckpoint(e *event.Event) (checkpoint, string, error) {
	p, err := event.Decode[event.CheckpointCosigned](*e)
	if err != nil {
		return checkpoint{}, "", err
	}
	c := checkpoint{number: e.AggregateVersion, at: e.Time, Checkpoint: tlog.Checkpoint{Size: p.Size}}
	copy(c.Root[:], p.Root)
	return c, p.Note, nil
}

// membersAt is who may cosign after seq events.
func (s *Service) membersAt(seq uint64) *tlog.Members {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := sort.Search(len(s.mu.members), func(i int) bool { return s.mu.members[i].seq > seq })
	if i == 0 {
		return &tlog.Members{}
	}
	m := s.mu.members[i-1].Members
	return &m
}

// fold takes up an event that changes who may cosign.
func (s *Service) fold(e *event.Event) error {
	m := *s.membersAt(e.Seq)
	if err := m.Fold(e, checkVoter(e.Time)); err != nil {
		return fmt.Errorf("event %d (%s): %w", e.Seq, e.Type, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.members = append(s.mu.members, membersAt{e.Seq, m})
	if s.mu.trusted == nil {
		s.mu.trusted = m.Genesis
	}
	return nil
}

// checkVoter checks a voter's certificate as of an event's time.
func checkVoter(at time.Time) func(ca []byte, cert *x509.Certificate, cluster, name string) error {
	return func(ca []byte, cert *x509.Certificate, cluster, name string) error {
		id, err := pki.VerifyPeerAt(cert, pki.Pool(ca), cluster, at, pki.Voter)
		if err == nil && id.Name != name {
			err = fmt.Errorf("it is of %s", id)
		}
		return err
	}
}

// follow keeps the tree up to date.
func (s *Service) follow(ctx context.Context) error {
	for {
		wctx, cancel := context.WithCancel(ctx)
		s.mu.Lock()
		s.mu.restart = cancel
		s.mu.Unlock()
		from := s.tree.Size() + 1
		err := s.o.Store.WaitSeq(wctx, from)
		restarted := wctx.Err() != nil && ctx.Err() == nil
		cancel()
		if restarted {
			continue
		}
		if err != nil {
			return err
		}
		es, err := s.o.Store.Envelopes(from, readEvents)
		if err != nil {
			return err
		}
		if err := s.take(es); err != nil && !errors.Is(err, tlog.ErrMoved) && !errors.Is(err, errRestart) {
			return err
		}
	}
}

// take adds events to the tree and judges the checkpoints among them.
func (s *Service) take(es []raftstore.StoredEvent) error {
	var (
		at      = es[0].Seq - 1
		leaves  []tlog.Hash
		entries []tlog.Entry
	)
	flush := func() error {
		err := s.tree.Append(at, leaves, entries...)
		at += uint64(len(leaves))
		leaves, entries = leaves[:0], entries[:0]
		return err
	}
	for _, st := range es {
		e, err := event.UnmarshalEnvelope(st.Envelope)
		if err != nil {
			return err
		}
		leaf := st.Seq - 1
		switch {
		case tlog.Concerns(e.Type):
			if err := s.fold(&e); err != nil {
				// The others fold the same: they cannot cosign either.
				s.alarm("members", err)
			}
			entries = append(entries, tlog.Entry{Kind: kindMembers, Leaf: leaf})
		case e.Type == event.TypeCheckpoint:
			if err := flush(); err != nil { // judging needs the tree before it
				return err
			}
			good, err := s.judge(&e)
			if err != nil {
				return err
			}
			entries = append(entries, tlog.Entry{Kind: kindCheckpoint, Leaf: leaf})
			if good {
				entries = append(entries, tlog.Entry{Kind: kindGood, Leaf: leaf})
			}
		}
		leaves = append(leaves, tlog.LeafHash(st.Envelope))
	}
	if err := flush(); err != nil {
		return err
	}
	size := s.tree.Size()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.pendingLocked(size) == 0:
		s.mu.since = time.Time{}
	case s.mu.since.IsZero():
		s.mu.since = s.o.Now()
	}
	close(s.mu.advanced)
	s.mu.advanced = make(chan struct{})
	return nil
}

// errRestart: the tree's files were wrong and are being written anew.
var errRestart = errors.New("the tree is computed anew")

// judge checks a checkpoint's event: that a majority vouches for it, and that it
// is about our own events. The tree has all events before it.
func (s *Service) judge(e *event.Event) (good bool, err error) {
	c, note, err := parseCheckpoint(e)
	if err != nil {
		return false, err
	}
	what := fmt.Sprintf("checkpoint %d", c.number)
	s.mu.Lock()
	trusted, before := s.mu.trusted, s.mu.last
	s.mu.Unlock()
	m := s.membersAt(c.Size)
	c.Origin = m.Cluster
	stated, by, err := m.CheckNote([]byte(note), trusted)
	switch {
	case c.Size >= e.Seq || c.Size <= before.Size:
		err = fmt.Errorf("it is of %d events, in event %d, after one of %d", c.Size, e.Seq, before.Size)
	case err == nil && stated != c.Checkpoint:
		err = errors.New("its note is of another checkpoint than its event")
	}
	if err == nil {
		own, err := s.tree.Root(c.Size)
		if err != nil {
			return false, err
		}
		if own != c.Root {
			return false, s.diverged(c.Checkpoint, fmt.Sprintf("%s, cosigned by %v", what, by))
		}
	}
	s.mu.Lock()
	c.Size = max(c.Size, before.Size)
	s.mu.last = c
	if err == nil {
		s.mu.trusted = m.Voters
		if !s.mu.since.IsZero() {
			s.mu.since = s.o.Now() // what it does not cover came later
		}
		s.mu.problem = ""
	}
	s.mu.Unlock()
	if err != nil {
		s.alarm(what, fmt.Errorf("node %s appended a checkpoint that does not count: %w", e.Actor.Principal, err))
	}
	return err == nil, nil
}

// diverged finds out whether our events or only the tree's files differ from
// what a majority vouches for, and stops the node or has them computed anew.
func (s *Service) diverged(c tlog.Checkpoint, what string) error {
	root, err := s.compute(c.Size)
	if err != nil {
		return err
	}
	if root == c.Root {
		s.o.Log.Error("the files of the event log's tree were damaged and are computed anew", "dir", s.o.Dir)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.mu.members, s.mu.trusted, s.mu.last, s.mu.since = nil, nil, checkpoint{}, time.Time{}
		if err := s.tree.Reset(); err != nil {
			return err
		}
		s.mu.restart()
		return errRestart
	}
	err = fmt.Errorf("%w: over events 1 to %d it is %s there and %s here (%s)", ErrDiverged, c.Size, c.Root, root, what)
	s.alarm("divergence", err)
	s.o.Fatal(err)
	return err
}

// compute is the root over our first size events, from the events themselves.
func (s *Service) compute(size uint64) (tlog.Hash, error) {
	var b tlog.Builder
	for b.Size() < size {
		es, err := s.o.Store.Envelopes(b.Size()+1, int(min(readEvents, size-b.Size())))
		if err != nil {
			return tlog.Hash{}, err
		}
		if len(es) == 0 {
			return tlog.Hash{}, fmt.Errorf("event %d is not there", b.Size()+1)
		}
		for _, e := range es {
			b.Append(tlog.LeafHash(e.Envelope))
		}
	}
	return b.Root(), nil
}

// alarm tells that something is wrong, until the node is started again.
func (s *Service) alarm(what string, err error) {
	s.mu.Lock()
	known := s.mu.alarms[what] == err.Error()
	if len(s.mu.alarms) < 16 { // the first ones tell the story
		s.mu.alarms[what] = err.Error()
	}
	s.mu.Unlock()
	if !known {
		s.o.Log.Error("the event log cannot be vouched for", "what", what, "err", err)
	}
}

// pending counts events that no checkpoint covers, checkpoints aside: an idle
// cluster makes none.
func (s *Service) pending(size uint64) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pendingLocked(size)
}

func (s *Service) pendingLocked(size uint64) uint64 {
	from := s.mu.last.Size
	cs := s.tree.Leaves(kindCheckpoint)
	own := len(cs) - sort.Search(len(cs), func(i int) bool { return cs[i] >= from })
	return max(size, from) - from - uint64(own)
}

// Cosign answers the leader: this node's own root, and its cosignature of it.
// Whoever asks, it vouches for nothing but its own events.
func (s *Service) Cosign(ctx context.Context, r *Request) (*Reply, error) {
	if r.Size == 0 {
		return nil, errors.New("there is nothing to vouch for")
	}
	ctx, cancel := context.WithTimeout(ctx, behindTimeout)
	defer cancel()
	for {
		s.mu.Lock()
		advanced := s.mu.advanced
		s.mu.Unlock()
		if s.tree.Size() >= r.Size {
			break
		}
		select {
		case <-advanced:
		case <-ctx.Done():
			return nil, fmt.Errorf("node %s has %d events, not %d", s.o.Node, s.tree.Size(), r.Size)
		}
	}
	root, err := s.tree.Root(r.Size)
	if err != nil {
		return nil, err
	}
	if string(r.Root) != string(root[:]) {
		if root, err = s.recheck(r.Size, root); err != nil {
			return nil, err
		}
		if string(r.Root) != string(root[:]) {
			s.alarm("divergence", fmt.Errorf("the leader's root over %d events is %x, this node's is %x: one of them is wrong, and the majority will tell", r.Size, r.Root, root[:]))
		}
	}
	sig, err := s.sign(tlog.Checkpoint{Origin: s.membersAt(r.Size).Cluster, Size: r.Size, Root: root})
	if err != nil {
		return nil, err
	}
	return &Reply{Root: root[:], Cosignature: sig}, nil
}

// recheck computes the root from the events, unless it did a while ago.
func (s *Service) recheck(size uint64, root tlog.Hash) (tlog.Hash, error) {
	s.mu.Lock()
	done := !s.mu.recheck.IsZero() && s.o.Now().Sub(s.mu.recheck) < recheckEvery
	if !done {
		s.mu.recheck = s.o.Now()
	}
	s.mu.Unlock()
	if done {
		return root, nil
	}
	return s.compute(size)
}

// vouched is the newest head this node cosigned.
type vouched struct {
	Size uint64    `json:"size"`
	Root tlog.Hash `json:"root"`
}

// sign cosigns c, which is about our own events. What was cosigned is kept, and
// it must be our past: a node whose disk was set back does not vouch for two
// histories.
func (s *Service) sign(c tlog.Checkpoint) ([]byte, error) {
	s.signing.Lock()
	defer s.signing.Unlock()
	path := filepath.Join(s.o.Dir, signedFile)
	var v vouched
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, &v)
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return nil, fmt.Errorf("what this node has cosigned: %w", err)
	}
	if v.Size > 0 && v.Size <= s.tree.Size() {
		own, err := s.tree.Root(v.Size)
		if err != nil {
			return nil, err
		}
		if own != v.Root {
			err := fmt.Errorf("this node has cosigned root %s over %d events, and its root is %s now", v.Root, v.Size, own)
			s.alarm("divergence", err)
			return nil, err
		}
	}
	key, err := s.signer()
	if err != nil {
		return nil, err
	}
	if c.Size > v.Size {
		if data, err = json.Marshal(vouched{c.Size, c.Root}); err == nil {
			err = pki.WriteFile(path, data)
		}
		if err != nil {
			return nil, err
		}
	}
	return tlog.Cosign(c, s.o.Node, key, s.o.Now())
}

// signer is the newest of our keys that counts: one that the newest checkpoint's
// voters have for us, or, before we are among them, the newest.
func (s *Service) signer() (crypto.Signer, error) {
	keys := s.o.Keys()
	if len(keys) == 0 {
		return nil, errors.New("this node has no key")
	}
	s.mu.Lock()
	certs := s.mu.trusted[s.o.Node]
	s.mu.Unlock()
	for _, k := range slices.Backward(keys) {
		for _, c := range certs {
			if pub, ok := c.PublicKey.(*ecdsa.PublicKey); ok && pub.Equal(k.Public()) {
				return k, nil
			}
		}
	}
	return keys[len(keys)-1], nil
}

// Settled returns nil when the newest checkpoint knows who the voters are now.
// Voters that leave are to wait for it: see tlog.Members.CheckNote.
func (s *Service) Settled() error {
	if s.o.FeatureLevel() < event.Needs(event.TypeCheckpoint, 1) {
		return nil // there are none, and nobody waits for them
	}
	now := s.membersAt(s.tree.Size()).Voters
	s.mu.Lock()
	defer s.mu.Unlock()
	if maps.EqualFunc(now, s.mu.trusted, func(a, b []*x509.Certificate) bool { return slices.EqualFunc(a, b, (*x509.Certificate).Equal) }) {
		return nil
	}
	if s.mu.problem != "" {
		return fmt.Errorf("the last change of members is not cosigned yet: %s", s.mu.problem)
	}
	return errors.New("the last change of members is not cosigned yet")
}

// Package fsm turns committed Raft entries into the event store: one Pebble
// batch for each batch of entries. It decides nothing but order: a proposal's
// id is new, its aggregate has the expected version. Rules of business were
// applied by the leader before it proposed.
//
// It is deterministic: the same entries give the same bytes on every node and
// on every replay. So applying reads no clock, draws no random number, starts
// no goroutine and writes nothing in the order of a map. An entry this build
// cannot judge stops the node; skipping it would part it from the others.
package fsm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/internal/disk"
)

var (
	// ErrHalted wraps why the state machine stopped. It applies nothing more
	// until the node is started again.
	ErrHalted = errors.New("the event store stopped")
	// ErrDiverged is the reason when this node's events differ from the
	// leader's: a defect or a damaged disk. The remedy is to remove the node,
	// delete its data and let it join again.
	ErrDiverged = errors.New("this node's events differ from the leader's")
	// ErrIDReused rejects a batch some of whose ids belong to events already
	// stored, or to events of another type or aggregate.
	ErrIDReused = errors.New("event id belongs to another event")
)

// Conflict rejects a batch because an aggregate is not at the expected version.
type Conflict struct {
	Aggregate string
	Want      uint64 // what the proposal expected
	Have      uint64 // what it is
}

func (c *Conflict) Error() string {
	return fmt.Sprintf("%s is at version %d, not %d", c.Aggregate, c.Have, c.Want)
}

// Result is the FSM's answer to a command, in raft's ApplyFuture.Response.
type Result struct {
	Events []event.Event // in the order of the proposals
	// Err is a *Conflict or ErrIDReused when the batch was rejected, the same
	// on every node, and ErrHalted when this node could not apply it, which
	// says nothing on the others.
	Err error
}

// Config is where the state is and who hears of its troubles.
type Config struct {
	Dir string
	FS  vfs.FS // nil means the operating system's
	// Shared are caches shared with the log's database; nil for its own.
	Shared *disk.Shared
	Log    *slog.Logger
	// OnFatal hears, once, why this node must stop: divergence, an event this
	// build does not know, a failed database. It must not block.
	OnFatal func(error)
	// Level is the newest feature level this build supports, event.Level when 0;
	// a lower one makes it an older build.
	Level uint32
	// Needs is the level from which a version of a type may be stored, 0 for one
	// that is not known; nil means event.Needs.
	Needs func(typ string, version uint32) uint32
}

// FSM is raft's state machine. raft calls Apply, ApplyBatch, Snapshot and
// Restore from one goroutine; everything else is safe from any.
type FSM struct {
	cfg    Config
	opts   *pebble.Options
	db     *pebble.DB
	logger *disk.Logger
	head   atomic.Pointer[Head]   // what readers see: committed to the database
	level  atomic.Uint32          // the cluster's feature level at head
	digest atomic.Pointer[Digest] // newest one recorded, Seq 0 for none
	halted atomic.Pointer[error]

	now     progress // as committed; of the goroutine that applies
	history builder

	changed struct {
		sync.Mutex
		c chan struct{} // closed and replaced whenever head moves
	}
}

var _ raft.BatchingFSM = (*FSM)(nil)

// memTableSize: a larger one means fewer flushes, a smaller one a shorter
// replay of Pebble's WAL at start; 32 MiB replays in well under a second.
const memTableSize = 32 << 20

// Open opens or creates the state in cfg.Dir.
func Open(cfg Config) (*FSM, error) {
	if cfg.FS == nil {
		cfg.FS = vfs.Default
	}
	if cfg.Level == 0 {
		cfg.Level = event.Level
	}
	if cfg.Needs == nil {
		cfg.Needs = event.Needs
	}
	l := disk.NewLogger(cfg.Log, cfg.OnFatal)
	o := disk.Options(cfg.FS, l, memTableSize, cfg.Shared)
	o.ApplyCompressionSettings(func() pebble.DBCompressionSettings { return pebble.DBCompressionBalanced })
	for i := range o.Levels {
		o.Levels[i].FilterPolicy = bloom.FilterPolicy(10) // most ids asked for are new
	}
	db, err := disk.Open(cfg.Dir, o, l)
	if err != nil {
		return nil, fmt.Errorf("open the event store: %w", err)
	}
	f := &FSM{cfg: cfg, opts: o, db: db, logger: l}
	f.changed.c = make(chan struct{})
	if err := l.Await(f.load); err != nil { // it may write
		return nil, errors.Join(fmt.Errorf("open the event store: %w", err), l.Await(db.Close))
	}
	if err := cfg.FS.RemoveAll(f.restoreDir()); err != nil {
		return nil, errors.Join(fmt.Errorf("remove a half restored snapshot: %w", err), l.Await(db.Close))
	}
	f.startHistory()
	return f, nil
}

// progress is where the state stands and what else each command moves. It is
// stored in the batch of the events that moved it.
type progress struct {
	Head
	level uint32
	ids   uint64  // number of the oldest event whose id may still be remembered
	sum   sum     // over the projections
	mark  *Digest // recorded by this batch; nil for none
}

func (f *FSM) load() error {
	v, err := get(f.db, keyFormat)
	if err != nil {
		return err
	}
	h := new(Head)
	switch {
	case v == nil:
		b := f.db.NewBatch()
		defer b.Close()
		if err := errors.Join(b.Set(keyFormat, []byte{stateFormat}, nil), b.Set(keyHead, h.marshal(), nil)); err != nil {
			return err
		}
		if err := b.Commit(pebble.Sync); err != nil {
			return err
		}
	case !bytes.Equal(v, []byte{stateFormat}):
		return fmt.Errorf("the state has format %x and this build knows %d", v, stateFormat)
	default:
		if v, err = get(f.db, keyHead); err != nil {
			return err
		}
		if *h, err = unmarshalHead(v); err != nil {
			return err
		}
	}
	return f.adopt(h)
}

// adopt takes up what the database holds, of which h is the head: at the start
// and after a restore. The builder of the history does not run meanwhile. What
// an older build did not keep is made up: the digest at once, the history in
// the background.
func (f *FSM) adopt(h *Head) error {
	p := progress{Head: *h}
	var err error
	if p.level, err = readLevel(f.db); err != nil {
		return err
	}
	if p.level > f.cfg.Level {
		return fmt.Errorf("%w: the state is at feature level %d and this build supports %d; run a newer build", event.ErrUnknownType, p.level, f.cfg.Level)
	}
	if p.ids, err = readIDs(f.db); err != nil {
		return err
	}
	if err := f.adoptDigest(&p); err != nil {
		return err
	}
	if err := f.adoptHistory(h); err != nil {
		return err
	}
	f.publish(&p)
	return nil
}

// Close closes the database. After a failure of it, it is left as it is.
func (f *FSM) Close() error {
	if err := f.logger.Await(func() error {
		f.history.stop()
		return errors.Join(f.db.LogData(nil, pebble.Sync), f.db.Close())
	}); err != nil {
		return fmt.Errorf("close the event store: %w", err)
	}
	return nil
}

// Apply is ApplyBatch of one entry.
func (f *FSM) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch applies committed entries in order, writes them in one batch and
// lets readers see them. With a batching FSM raft hands over configuration
// entries here too, not through raft.ConfigurationStore. When one entry cannot
// be applied nothing of the batch is written: the others are in the log.
func (f *FSM) ApplyBatch(logs []*raft.Log) []any {
	results := make([]any, len(logs))
	b := f.db.NewIndexedBatch()
	defer b.Close()
	p := f.now
	err := f.haltedError()
	for i := 0; i < len(logs) && err == nil; i++ {
		l := logs[i]
		if l.Index <= p.Applied {
			continue // replayed by raft after a restart; nobody waits for it
		}
		if l.Type == raft.LogCommand { // a configuration only moves the head
			if results[i], err = f.applyCommand(b, &p, l); err != nil {
				f.halt(fmt.Errorf("log entry %d of term %d: %w", l.Index, l.Term, err))
			}
		}
		p.Applied, p.Term = l.Index, l.Term
	}
	if err == nil && p.Applied > f.now.Applied {
		err = f.commit(b, &p)
	}
	if err != nil {
		for i := range results {
			results[i] = Result{Err: f.haltedError()}
		}
	}
	return results
}

// commit does not sync: raft's log has these entries, synced, until a
// snapshot, and a snapshot syncs the state first.
func (f *FSM) commit(b *pebble.Batch, p *progress) error {
	err := b.Set(keyHead, p.Head.marshal(), nil)
	if err == nil && p.Seq > f.now.Seq {
		err = errors.Join(p.writeDigest(b), writeHistory(b, p.Seq))
	}
	if err == nil {
		err = b.Commit(pebble.NoSync)
	}
	if err != nil {
		f.halt(fmt.Errorf("write log entries up to %d: %w", p.Applied, err))
		return err
	}
	f.publish(p)
	return nil
}

// applyCommand writes a command's events into b and moves h. An error means
// that this node must stop and b be thrown away; a rejection is in the result
// and writes nothing.
func (f *FSM) applyCommand(b *pebble.Batch, h *progress, l *raft.Log) (Result, error) {
	c, err := unmarshalCommand(l.Data)
	if err != nil {
		return Result{}, err
	}
	if err := checkChain(b, &h.Head, &c); err != nil {
		return Result{}, err
	}
	if err := checkDigest(b, h.Seq, c.Digest); err != nil {
		return Result{}, err
	}
	ps := make([]event.Proposal, len(c.Proposals))
	for i, raw := range c.Proposals {
		if ps[i], err = event.UnmarshalProposal(raw); err != nil {
			return Result{}, err
		}
		if need := f.cfg.Needs(ps[i].Type, ps[i].Version); need == 0 || need > f.cfg.Level {
			return Result{}, fmt.Errorf("%w: %q version %d; run a newer build", event.ErrUnknownType, ps[i].Type, ps[i].Version)
		}
	}
	earlier, rejected, err := findEarlier(b, ps)
	if err != nil || rejected != nil || earlier != nil {
		return Result{Events: earlier, Err: rejected}, err
	}
	level, rejected, err := f.checkLevel(h.level, ps)
	if err != nil || rejected != nil {
		return Result{Err: rejected}, err
	}
	versions, rejected, err := nextVersions(b, ps)
	if err != nil || rejected != nil {
		return Result{Err: rejected}, err
	}
	if level != h.level {
		h.level = level
		if err := b.Set(keyLevel, binary.BigEndian.AppendUint32(nil, level), nil); err != nil {
			return Result{}, err
		}
	}

	events := make([]event.Event, len(ps))
	first := h.Seq + 1
	for i, p := range ps {
		h.Seq++
		h.Index = l.Index
		h.Time = max(c.TimeNanos, h.Time+1)
		e := event.Event{
			Proposal:         p,
			Seq:              h.Seq,
			Index:            l.Index,
			Sub:              uint32(i),
			Term:             l.Term,
			Time:             event.Time(h.Time),
			AggregateVersion: versions[i],
		}
		envelope := event.MarshalEnvelope(&e, c.Proposals[i])
		h.Chain = event.Chain(h.Chain, envelope)
		e.Chain = h.Chain
		events[i] = e
		seq := binary.BigEndian.AppendUint64(nil, h.Seq)
		err := errors.Join(
			b.Set(eventKey(h.Seq), append(h.Chain[:len(h.Chain):len(h.Chain)], envelope...), nil),
			h.project(b, prefixed(prefixID, p.ID[:]), nil, seq),
			h.project(b, prefixed(prefixAggregate, []byte(p.Aggregate)), versionValue(versions[i]-1), versionValue(versions[i])),
			b.Set(historyKey(p.Aggregate, l.Index, uint32(i)), seq, nil),
		)
		if err != nil {
			return Result{}, err
		}
	}
	at := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, first), uint32(len(ps)))
	if err := h.project(b, indexKey(l.Index), nil, at); err != nil {
		return Result{}, err
	}
	if h.level >= levelForget {
		if err := h.forget(b, 2*len(ps)); err != nil {
			return Result{}, err
		}
	}
	if h.Seq/digestEvery > (first-1)/digestEvery {
		if err := h.recordDigest(b); err != nil {
			return Result{}, err
		}
	}
	return Result{Events: events}, nil
}

// checkChain compares our history with the leader's, as it was when it
// proposed the command. Those events are committed and precede the command, so
// this node has them.
func checkChain(r pebble.Reader, h *Head, c *Command) error {
	var ours [32]byte
	switch {
	case c.Seq > h.Seq:
		return fmt.Errorf("%w: the leader had event %d and we have only %d", ErrDiverged, c.Seq, h.Seq)
	case c.Seq == h.Seq:
		ours = h.Chain
	case c.Seq > 0:
		v, err := get(r, eventKey(c.Seq))
		if err != nil {
			return err
		}
		if copy(ours[:], v) != len(ours) {
			return fmt.Errorf("%w: event %d is missing", ErrDiverged, c.Seq)
		}
	}
	if ours != c.Chain {
		return fmt.Errorf("%w: at event %d the chain is %x here and %x there", ErrDiverged, c.Seq, ours, c.Chain)
	}
	return nil
}

// findEarlier looks for events with the proposals' ids. All found, of the same
// type and aggregate, in the same order: the batch was stored before, and its
// events are the answer. None found: nil. All else is a rejection.
func findEarlier(r pebble.Reader, ps []event.Proposal) (earlier []event.Event, rejected, err error) {
	for i := range ps {
		for j := range i {
			if ps[i].ID == ps[j].ID {
				return nil, fmt.Errorf("%w: %s is twice in a batch", ErrIDReused, ps[i].ID), nil
			}
		}
		e, ok, err := byID(r, ps[i].ID)
		if err != nil {
			return nil, nil, err
		}
		if !ok {
			continue
		}
		if len(earlier) != i || e.Type != ps[i].Type || e.Aggregate != ps[i].Aggregate {
			return nil, fmt.Errorf("%w: %s is event %d", ErrIDReused, ps[i].ID, e.Seq), nil
		}
		earlier = append(earlier, e)
	}
	if len(earlier) > 0 && len(earlier) != len(ps) {
		return nil, fmt.Errorf("%w: %d of %d are stored", ErrIDReused, len(earlier), len(ps)), nil
	}
	return earlier, nil, nil
}

// checkLevel rejects proposals that need a higher feature level than the
// cluster has agreed on, counting what those before it in the batch raise, and
// returns the level after them. A leader never proposes such a thing; a
// defective one does not get it stored. A level above this build's stops it.
func (f *FSM) checkLevel(level uint32, ps []event.Proposal) (after uint32, rejected, err error) {
	for _, p := range ps {
		if need := f.cfg.Needs(p.Type, p.Version); need > level {
			return 0, &event.LevelError{Type: p.Type, Version: p.Version, Needs: need, Have: level}, nil
		}
		if p.Type != event.TypeFeatureLevel {
			continue
		}
		raise, err := event.Decode[event.FeatureLevel](event.Event{Proposal: p})
		switch {
		case err != nil:
			return 0, fmt.Errorf("%w: %w", event.ErrInvalid, err), nil
		case raise.Level <= level:
			return 0, fmt.Errorf("%w: the feature level is %d already and never goes down", event.ErrInvalid, level), nil
		case raise.Level > f.cfg.Level:
			return 0, nil, fmt.Errorf("%w: feature level %d, this build supports %d; run a newer build", event.ErrUnknownType, raise.Level, f.cfg.Level)
		}
		level = raise.Level
	}
	return level, nil, nil
}

// nextVersions checks each proposal's expected version, counting those before
// it in the batch, and returns the aggregates' versions after each.
func nextVersions(r pebble.Reader, ps []event.Proposal) (versions []uint64, rejected, err error) {
	versions = make([]uint64, len(ps))
	now := make(map[string]uint64, len(ps))
	for i, p := range ps {
		have, ok := now[p.Aggregate]
		if !ok {
			if have, err = version(r, p.Aggregate); err != nil {
				return nil, nil, err
			}
		}
		if p.Expect != event.Any && p.Expect != have {
			return nil, &Conflict{Aggregate: p.Aggregate, Want: p.Expect, Have: have}, nil
		}
		now[p.Aggregate] = have + 1
		versions[i] = have + 1
	}
	return versions, nil, nil
}

// halt stops the state machine for good.
func (f *FSM) halt(err error) {
	err = fmt.Errorf("%w: %w", ErrHalted, err)
	if !f.halted.CompareAndSwap(nil, &err) {
		return
	}
	f.cfg.Log.Error("the event store stops; this node must stop", "error", err)
	if f.cfg.OnFatal != nil {
		f.cfg.OnFatal(err)
	}
}

func (f *FSM) haltedError() error {
	if p := f.halted.Load(); p != nil {
		return *p
	}
	return nil
}

// publish lets readers see p, which is in the database, and wakes them.
func (f *FSM) publish(p *progress) {
	if p.mark != nil {
		f.digest.Store(p.mark)
		p.mark = nil
	}
	f.now = *p
	f.level.Store(p.level)
	f.head.Store(&p.Head)
	f.changed.Lock()
	defer f.changed.Unlock()
	close(f.changed.c)
	f.changed.c = make(chan struct{})
}

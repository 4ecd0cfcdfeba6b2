package raftstore

import (
	"io"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/fsm"
)

// applier brings committed entries to the state: from Raft, and from the stream
// of another node. Each source brings all entries in order, from one that the
// state has on; those it has are skipped by their index. So the one that is
// ahead moves the state, and no entry is missed or applied twice.
//
// It keeps the newest entries for the streams that this node serves.
type applier struct {
	*fsm.FSM
	configured func(index uint64, c raft.Configuration) // a committed configuration was seen
	committed  func(index uint64)                       // Raft has committed entries up to index; must not wait
	recent     recent

	// fromRaft is the newest entry that Raft, not a stream, has brought: what
	// this node's own log is known to have committed.
	fromRaft atomic.Uint64

	mu sync.Mutex // one batch at a time
}

var _ raft.BatchingFSM = (*applier)(nil)

func newApplier(f *fsm.FSM, configured func(uint64, raft.Configuration), committed func(uint64)) *applier {
	a := &applier{FSM: f, configured: configured, committed: committed}
	a.recent.changed = make(chan struct{})
	a.recent.reset(f.Head().Applied)
	return a
}

// opened takes note of what was applied from the log before Raft started.
func (a *applier) opened() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.recent.reset(a.Head().Applied)
}

// Apply is ApplyBatch of one entry.
func (a *applier) Apply(l *raft.Log) any { return a.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch applies entries that Raft has committed.
func (a *applier) ApplyBatch(logs []*raft.Log) []any {
	if n := len(logs); n > 0 {
		a.committed(logs[n-1].Index) // before the work: followers do theirs meanwhile
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	results := a.applyBatch(logs)
	if n := len(logs); n > 0 && a.Err() == nil {
		a.fromRaft.Store(max(a.fromRaft.Load(), logs[n-1].Index))
	}
	return results
}

func (a *applier) applyBatch(logs []*raft.Log) []any {
	before := a.Head().Applied
	results := a.FSM.ApplyBatch(logs)
	if a.Err() != nil {
		return results
	}
	a.recent.add(before, logs)
	for _, l := range logs {
		if l.Type == raft.LogConfiguration {
			a.configured(l.Index, raft.DecodeConfiguration(l.Data))
		}
	}
	return results
}

// streamed applies entries that a stream brought, each with the index of the
// one before it. errGap says that one is missing between; nothing was applied.
func (a *applier) streamed(entries []entry) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	at := a.Head().Applied
	var logs []*raft.Log
	for _, e := range entries {
		if e.index <= at {
			continue // Raft was faster
		}
		if e.prev != at {
			return errGap
		}
		at = e.index
		logs = append(logs, &raft.Log{Index: e.index, Term: e.term, Type: e.typ, Data: e.data})
	}
	a.applyBatch(logs)
	return a.Err()
}

// Restore replaces the state by a snapshot's, from Raft or from a stream.
func (a *applier) Restore(rc io.ReadCloser) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	defer func() { a.recent.reset(a.Head().Applied) }()
	return a.FSM.Restore(rc)
}

// Snapshot pins the state between two batches.
func (a *applier) Snapshot() (raft.FSMSnapshot, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.FSM.Snapshot()
}

// entry is a committed entry that the state machine sees, as it is in Raft's log.
type entry struct {
	prev  uint64 // index of the one before it, 0 for the first
	index uint64
	term  uint64
	typ   raft.LogType
	data  []byte
}

// What is kept for streams in memory. A subscriber that is further behind is
// served from the log, or gets a snapshot: that of 1,000 subscribers one is
// slow costs the others nothing.
const (
	recentEntries = 4096
	recentBytes   = 16 << 20 // two of the largest commands
)

// recent is the newest entries applied here.
type recent struct {
	mu      sync.Mutex
	entries []entry
	bytes   int
	last    uint64        // index of the newest
	changed chan struct{} // closed and replaced when there are more
}

// reset forgets all entries; the state is at last.
func (r *recent) reset(last uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.entries, r.bytes, r.last = nil, 0, last
	close(r.changed)
	r.changed = make(chan struct{})
}

// add takes up those of logs that are newer than the index before.
func (r *recent) add(before uint64, logs []*raft.Log) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range logs {
		if l.Index <= before {
			continue
		}
		r.entries = append(r.entries, entry{before, l.Index, l.Term, l.Type, l.Data})
		r.bytes += len(l.Data)
		before = l.Index
	}
	if before <= r.last {
		return
	}
	r.last = before
	n := 0
	for len(r.entries)-n > recentEntries || r.bytes > recentBytes && len(r.entries)-n > 1 {
		r.bytes -= len(r.entries[n].data)
		r.entries[n] = entry{} // append moves the rest to a new array in time
		n++
	}
	r.entries = r.entries[n:]
	close(r.changed)
	r.changed = make(chan struct{})
}

// after returns entries newer than index, of at most maxBytes but at least one;
// none when there are none yet, and then a channel that is closed when there
// may be. ok is false when the one that follows on index is not kept any more.
func (r *recent) after(index uint64, maxBytes int) (es []entry, more <-chan struct{}, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if index >= r.last {
		return nil, r.changed, true
	}
	lo, hi := 0, len(r.entries)
	for lo < hi { // the first with prev >= index
		m := (lo + hi) / 2
		if r.entries[m].prev < index {
			lo = m + 1
		} else {
			hi = m
		}
	}
	if lo == len(r.entries) || r.entries[lo].prev != index {
		return nil, nil, false
	}
	size := 0
	for _, e := range r.entries[lo:] {
		if size += len(e.data); size > maxBytes && len(es) > 0 {
			break
		}
		es = append(es, e)
	}
	return es, nil, true
}

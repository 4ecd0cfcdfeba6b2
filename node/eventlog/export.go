package eventlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sort"
	"time"

	"github.com/sallyport/sallyport/raftstore/tlog"
	"github.com/sallyport/sallyport/recording"
)

// putTimeout ends a request to the store that hangs.
const putTimeout = 2 * time.Minute

// errDiffers: what the store holds under one of our keys is not ours.
var errDiffers = errors.New("the store holds something else than this log; it was not overwritten")

// ExportStatus is how far the store is behind the log. It is kept by the node
// that leads.
type ExportStatus struct {
	Store      string    `json:"store,omitempty"`
	Checkpoint uint64    `json:"checkpoint"`      // number of the newest in the store, as this node knows
	Events     uint64    `json:"events"`          // that it covers
	Waiting    uint64    `json:"waiting"`         // checkpoints that are not in the store yet
	Oldest     time.Time `json:"oldest,omitzero"` // when the first of them was made
	LastError  string    `json:"last_error,omitempty"`
	Alarm      string    `json:"alarm,omitempty"` // the store contradicts the log
}

// exportLoop copies the log to the store while this node leads. What another
// leader left off is continued: the newest checkpoint in the store says how far
// it came, and an object that is there already must be the same.
func (s *Service) exportLoop(ctx context.Context) error {
	t := time.NewTicker(tick)
	defer t.Stop()
	var (
		e        *exporter // nil until the store was looked at in this leadership
		failures int
		notUntil time.Time
	)
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		if !s.o.Store.IsLeader() {
			e, failures, notUntil = nil, 0, time.Time{}
			s.mu.Lock()
			s.mu.export = ExportStatus{}
			s.mu.Unlock()
			continue
		}
		if time.Now().Before(notUntil) || e != nil && e.number >= s.checkpoints() {
			continue
		}
		if e == nil {
			e = &exporter{Service: s, certs: map[string]bool{}}
		}
		err := e.step(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			failures, notUntil = 0, time.Time{}
		} else {
			failures++
			d := min(minBackoff<<min(failures-1, 8), maxBackoff)
			notUntil = time.Now().Add(d/2 + rand.N(d/2))
			if failures == 1 || errors.Is(err, errDiffers) {
				s.o.Log.Error("the event log is not exported", "store", s.o.Objects.String(), "err", err)
			}
		}
		e.report(err)
	}
}

// checkpoints is how many there are.
func (s *Service) checkpoints() uint64 { return uint64(len(s.tree.Leaves(kindCheckpoint))) }

// exporter is one leadership's view of the store.
type exporter struct {
	*Service
	resumed bool
	number  uint64 // newest checkpoint in the store
	size    uint64 // events it covers
	certs   map[string]bool
}

func (e *exporter) report(err error) {
	have := e.checkpoints()
	st := ExportStatus{Store: e.o.Objects.String(), Checkpoint: e.number, Events: e.size, Waiting: max(have, e.number) - e.number}
	if st.Waiting > 0 {
		if c, _, cerr := e.checkpoint(e.number + 1); cerr == nil {
			st.Oldest = c.at
		}
	}
	if err != nil {
		st.LastError = err.Error()
	}
	if errors.Is(err, errDiffers) {
		st.Alarm = err.Error()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.mu.export = st
}

// step brings the store to the newest checkpoint there is now.
func (e *exporter) step(ctx context.Context) error {
	if !e.resumed {
		if err := e.resume(ctx); err != nil {
			return err
		}
	}
	newest := e.checkpoints()
	if newest <= e.number {
		return nil
	}
	c, _, err := e.checkpoint(newest)
	if err != nil {
		return err
	}
	if err := e.putCerts(ctx, c.Size); err != nil {
		return err
	}
	// Between two checkpoints some tiles became full that checkpoints in between
	// would have as partial ones: a reader takes the full ones.
	for _, t := range tlog.NewTiles(e.size, c.Size) {
		if t.Level == 0 {
			if err := e.putEntries(ctx, t); err != nil {
				return err
			}
		}
		if err := e.copy(ctx, tlog.TileKey(t.Level, t.N, t.Width)); err != nil {
			return err
		}
	}
	for e.number < newest {
		if err := e.copy(ctx, tlog.CheckpointKey(e.number+1)); err != nil {
			return err
		}
		e.number++
		e.report(nil)
	}
	e.size = c.Size
	return nil
}

// resume finds out how far the store is, and that it is ours.
func (e *exporter) resume(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, putTimeout)
	defer cancel()
	n, err := Newest(ctx, e.o.Objects)
	if err != nil {
		return err
	}
	if n == 0 {
		e.resumed = true
		return nil
	}
	c, note, err := e.checkpoint(n)
	if errors.Is(err, recording.ErrNotFound) {
		return fmt.Errorf("%w: it has checkpoint %d and this log has %d; was the cluster restored from a backup? Give it a store, or a prefix, of its own", errDiffers, n, e.checkpoints())
	}
	if err != nil {
		return err
	}
	got, err := e.o.Objects.Get(ctx, tlog.CheckpointKey(n))
	if err != nil {
		return err
	}
	if string(got) != note {
		return fmt.Errorf("%w: checkpoint %d; was the cluster restored from a backup, or is the store another cluster's? Give it a store, or a prefix, of its own", errDiffers, n)
	}
	e.resumed, e.number, e.size = true, n, c.Size
	return nil
}

func (e *exporter) putEntries(ctx context.Context, t tlog.TileSpan) error {
	key := tlog.EntriesKey(t.N, t.Width)
	bundle, large, err := e.bundle(t.N, t.Width)
	if err != nil {
		return err
	}
	for _, leaf := range large {
		if err := e.copy(ctx, tlog.LargeKey(leaf)); err != nil {
			return err
		}
	}
	return e.put(ctx, key, bundle)
}

// putCerts exports the certificates of all who were voters up to size events.
func (e *exporter) putCerts(ctx context.Context, size uint64) error {
	for key, der := range e.allCerts(size) {
		if e.certs[key] {
			continue
		}
		if err := e.put(ctx, key, der); err != nil {
			return err
		}
		e.certs[key] = true
	}
	return nil
}

func (e *exporter) copy(ctx context.Context, key string) error {
	data, err := e.Get(ctx, key)
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return e.put(ctx, key, data)
}

// put writes an object and reads it back: only what the store returns counts.
func (e *exporter) put(ctx context.Context, key string, data []byte) error {
	if !e.o.Store.IsLeader() {
		return errors.New("another node leads now")
	}
	ctx, cancel := context.WithTimeout(ctx, putTimeout)
	defer cancel()
	if err := e.o.Objects.Put(ctx, key, data); err != nil && !errors.Is(err, recording.ErrExists) {
		return fmt.Errorf("%s: %w", key, err)
	}
	got, err := e.o.Objects.Get(ctx, key)
	if err != nil && !errors.Is(err, recording.ErrTooLarge) {
		return fmt.Errorf("%s: read back: %w", key, err)
	}
	if err != nil || !bytes.Equal(got, data) {
		return fmt.Errorf("%w: %s", errDiffers, key)
	}
	return nil
}

// Get returns an object of the log as it is here, under the key and in the form
// it is exported: a Service is a source to Verify and Prove from.
func (s *Service) Get(_ context.Context, key string) ([]byte, error) {
	o := tlog.ParseKey(key)
	size := s.tree.Size()
	switch o.Kind {
	case tlog.KindCheckpoint:
		_, note, err := s.checkpoint(o.Number)
		return []byte(note), err
	case tlog.KindTile:
		if (o.Number*tlog.TileWidth+uint64(o.Width))<<(tlog.TileHeight*o.Level) > size {
			return nil, recording.ErrNotFound
		}
		return s.tree.Tile(o.Level, o.Number, o.Width)
	case tlog.KindEntries:
		if o.Number*tlog.TileWidth+uint64(o.Width) > size {
			return nil, recording.ErrNotFound
		}
		b, _, err := s.bundle(o.Number, o.Width)
		return b, err
	case tlog.KindLarge:
		if o.Number >= size {
			return nil, recording.ErrNotFound
		}
		st, err := s.stored(o.Number + 1)
		return st.Envelope, err
	case tlog.KindCert:
		if der, ok := s.allCerts(size)[key]; ok {
			return der, nil
		}
	}
	return nil, recording.ErrNotFound
}

// bundle makes a bundle of entries, and tells which are objects of their own.
func (s *Service) bundle(n uint64, width int) (b []byte, large []uint64, err error) {
	for i := 0; i < width; {
		es, err := s.o.Store.Envelopes(n*tlog.TileWidth+uint64(i)+1, width-i)
		if err != nil {
			return nil, nil, err
		}
		if len(es) == 0 {
			return nil, nil, recording.ErrNotFound
		}
		for _, e := range es {
			var isLarge bool
			if b, isLarge = tlog.AppendEntry(b, e.Envelope); isLarge {
				large = append(large, e.Seq-1)
			}
		}
		i += len(es)
	}
	return b, large, nil
}

// allCerts are the certificates of the CA and of all who were voters up to size
// events, by key.
func (s *Service) allCerts(size uint64) map[string][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string][]byte{}
	for _, m := range s.mu.members {
		if m.seq > size {
			break
		}
		out[tlog.CertKey(m.CA)] = m.CA
		for _, certs := range m.Voters {
			for _, c := range certs {
				out[tlog.CertKey(c.Raw)] = c.Raw
			}
		}
	}
	return out
}

// List lists checkpoints, and nothing else: all other keys follow from them.
func (s *Service) List(_ context.Context, prefix, after string, fn func(recording.Object) error) error {
	if prefix != tlog.CheckpointRoot {
		return nil
	}
	n := s.checkpoints()
	first := uint64(1)
	if after != "" {
		first += uint64(sort.Search(int(n), func(i int) bool { return tlog.CheckpointKey(uint64(i)+1) > after }))
	}
	for ; first <= n; first++ {
		if err := fn(recording.Object{Key: tlog.CheckpointKey(first)}); errors.Is(err, recording.ErrStop) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return nil
}

// Source is where a log is read from: a recording.Store, or a node's API.
type Source interface {
	Get(ctx context.Context, key string) ([]byte, error)
	List(ctx context.Context, prefix, after string, fn func(recording.Object) error) error
}

// maxNumber is the largest that keys of checkpoints are sorted up to.
const maxNumber = 1_000_000_000_000 - 1

// Newest finds the number of the newest checkpoint in a store, 0 for none, by
// some 40 listings of one object each however many there are, and whichever of
// them are missing.
func Newest(ctx context.Context, src Source) (uint64, error) {
	// next is the first one above n, 0 for none.
	next := func(n uint64) (uint64, error) {
		after, found := "", uint64(0)
		if n > 0 {
			after = tlog.CheckpointKey(n)
		}
		err := src.List(ctx, tlog.CheckpointRoot, after, func(o recording.Object) error {
			var ok bool
			if found, ok = tlog.ParseCheckpointKey(o.Key); !ok {
				return nil
			}
			return recording.ErrStop
		})
		return found, err
	}
	have, err := next(0)
	if err != nil || have == 0 {
		return 0, err
	}
	none := uint64(maxNumber) // nothing is above it
	for step := uint64(1); have < none; {
		// First in steps twice as long each, then by halves.
		at := min(have+step-1, have+(none-have)/2)
		n, err := next(at)
		if err != nil {
			return 0, err
		}
		if n > 0 {
			have = n
			step *= 2
		} else {
			none = at
		}
	}
	return have, nil
}

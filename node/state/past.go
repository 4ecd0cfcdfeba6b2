package state

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/sallyport/sallyport/raftstore/event"
)

// Source is what At reads of an event store.
type Source interface {
	Event(seq uint64) (event.Event, error)
	// Aggregates calls fn with each aggregate that existed as of event seq and
	// the number of its newest event then.
	Aggregates(prefix string, seq uint64, fn func(aggregate string, newest uint64) bool) error
	// History calls fn with the numbers of an aggregate's events up to event
	// seq, newest first.
	History(aggregate string, seq uint64, fn func(seq uint64) bool) error
}

// At folds the View as of event seq. It does not read all events, but those of
// the aggregates that there were: of the configuration from the last one
// applied on, of approvals and join tokens those that something happened to
// last (as many as a current View keeps of those that are over), of
// checkpoints none, which say nothing about the state. So it costs as much as
// there were members and revocations. It holds no secrets and no keys, and not
// what earlier configurations tolerated: nothing is opened or forwarded in the
// past.
func At(ctx context.Context, src Source, seq uint64) (*View, error) {
	v := empty()
	if seq == 0 {
		return v, nil
	}
	seqs, err := relevant(ctx, src, seq)
	if err != nil {
		return nil, fmt.Errorf("state as of event %d: %w", seq, err)
	}
	f := fold{v: v}
	for _, n := range seqs {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		e, err := src.Event(n)
		if err == nil {
			err = f.apply(e)
		}
		if err != nil {
			return nil, fmt.Errorf("state as of event %d: event %d: %w", seq, n, err)
		}
	}
	last, err := src.Event(seq)
	if err != nil {
		return nil, err
	}
	v.Seq, v.Index = last.Seq, last.Index
	v.CAKey, v.Keys, v.Secrets, v.SealedTo, v.tolerances = nil, nil, nil, nil, nil
	return v, nil
}

// relevant lists the events that the View as of event seq follows from, in
// their order.
func relevant(ctx context.Context, src Source, seq uint64) ([]uint64, error) {
	var (
		whole             []string // aggregates all of whose events count
		approvals, tokens newest
		config            bool
	)
	err := src.Aggregates("", seq, func(aggregate string, last uint64) bool {
		switch {
		case aggregate == "checkpoint":
		case aggregate == "config":
			config = true
		case strings.HasPrefix(aggregate, "approval/"):
			approvals.add(aggregate, last)
		case strings.HasPrefix(aggregate, "jointoken/"):
			tokens.add(aggregate, last)
		default:
			whole = append(whole, aggregate)
		}
		return ctx.Err() == nil
	})
	if err != nil {
		return nil, err
	}
	var seqs []uint64
	for _, aggregate := range slices.Concat(whole, approvals.names(), tokens.names()) {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err := src.History(aggregate, seq, func(n uint64) bool { seqs = append(seqs, n); return true }); err != nil {
			return nil, err
		}
	}
	if config {
		more, err := sinceApplied(src, seq)
		if err != nil {
			return nil, err
		}
		seqs = append(seqs, more...)
	}
	slices.Sort(seqs)
	return seqs, nil
}

// sinceApplied lists the events of the configuration from the last one applied
// on. There is one for each change of members since.
func sinceApplied(src Source, seq uint64) (seqs []uint64, err error) {
	var all []uint64
	if err := src.History("config", seq, func(n uint64) bool { all = append(all, n); return true }); err != nil {
		return nil, err
	}
	for _, n := range all {
		e, err := src.Event(n)
		if err != nil {
			return nil, err
		}
		if seqs = append(seqs, n); e.Type == event.TypeConfigApplied {
			break
		}
	}
	return seqs, nil
}

// newest keeps the aggregates with the newest events, at least keepEnded of
// them and at most twice as many.
type newest []lastEvent

type lastEvent struct {
	aggregate string
	seq       uint64
}

func (n *newest) add(aggregate string, seq uint64) {
	if *n = append(*n, lastEvent{aggregate, seq}); len(*n) > 2*keepEnded {
		slices.SortFunc(*n, func(a, b lastEvent) int { return cmp.Compare(b.seq, a.seq) })
		*n = (*n)[:keepEnded]
	}
}

func (n newest) names() []string {
	out := make([]string, len(n))
	for i, a := range n {
		out[i] = a.aggregate
	}
	return out
}

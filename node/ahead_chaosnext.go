//go:build chaosnext

package node

import (
	"context"
	"errors"
	"time"

	"github.com/sallyport/sallyport/raftstore/event"
)

// storeMarks stores, at the leader, an event that an earlier build cannot read,
// as often as it can: never before the cluster's feature level lets it. See
// event.TypeMarked.
func (n *Node) storeMarks(ctx context.Context) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	told := false
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if !n.store.IsLeader() {
			continue
		}
		_, err := n.storeMark(ctx)
		var low *event.LevelError
		if errors.As(err, &low) && !told {
			told = true
			n.log.Info("a mark was refused", "err", err)
		}
	}
}

func (n *Node) storeMark(ctx context.Context) ([]event.Event, error) {
	version, payload, err := event.Encode(event.Level, event.TypeMarked, event.Marked{Node: n.cfg.Name})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return n.store.Append(ctx, event.Proposal{
		ID: event.NewID(), Actor: n.actor(), Type: event.TypeMarked, Version: version,
		Aggregate: "marks", Expect: event.Any, Payload: payload,
	})
}

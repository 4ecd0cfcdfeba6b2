package node

import (
	"context"
	"crypto/sha256"
	"sync/atomic"
	"time"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/raftstore/event"
)

// featureLevel is the newest feature level that this node offers the cluster.
func (n *Node) featureLevel() uint32 {
	if m := n.cfg.MaxFeatureLevel; m > 0 {
		return min(m, event.Level)
	}
	return event.Level
}

// features keeps who holds the cluster at its feature level, as the leader
// last heard.
type features struct{ heldBack atomic.Pointer[[]string] }

func (f *features) list() []string {
	if p := f.heldBack.Load(); p != nil {
		return *p
	}
	return nil
}

// featurePoll is how soon a leader notices that the last member was upgraded.
const featurePoll = time.Second

// raiseLevel, at the leader, raises the cluster's feature level once every
// member offers more. Members are asked over the mesh; gossip may tell the
// leader sooner, but only an answer to its own question counts.
func (n *Node) raiseLevel(ctx context.Context) error {
	tick := time.NewTicker(featurePoll)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		current, wanted := n.store.FeatureLevel(), n.featureLevel()
		if !n.store.IsLeader() || n.state.View().Seq == 0 || current >= wanted {
			n.features.heldBack.Store(nil)
			continue
		}
		expect := n.store.Version(event.FeatureLevelAggregate)
		level, heldBack := api.Agree(current, wanted, n.api.Offers(ctx))
		n.features.heldBack.Store(&heldBack)
		if level <= current {
			continue
		}
		actx, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := n.store.Append(actx, event.RaiseTo(level, expect, event.NewID(), n.actor()))
		cancel()
		if err != nil {
			n.log.Warn("the feature level was not raised; it will be tried again", "level", level, "err", err)
			continue
		}
		n.log.Info("every member supports more: the cluster's feature level was raised", "from", current, "to", level)
	}
}

// firstLevel is, in a new cluster, the level it begins with. Its id follows
// from that of the cluster's first event, so that a start that is repeated
// makes the same two.
func (n *Node) firstLevel() []event.Proposal {
	if n.featureLevel() == event.BaseLevel {
		return nil
	}
	sum := sha256.Sum256(append([]byte("feature level\x00"), n.first.ID[:]...))
	return []event.Proposal{event.RaiseTo(n.featureLevel(), 0, event.ID(sum[:16]), n.actor())}
}

// actor is this node, acting on its own.
func (n *Node) actor() event.Actor {
	return event.Actor{Principal: n.cfg.Name, Kind: event.Node, Authn: "node", CertFP: pki.Fingerprint(n.self.Load().cert.Raw), Via: n.cfg.Name}
}

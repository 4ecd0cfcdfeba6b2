package node

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"fmt"
	"maps"
	"net"
	"slices"

	"github.com/sallyport/sallyport/node/gossip"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// newGossip is this node's part of the gossip.
func (n *Node) newGossip() *gossip.Gossip {
	return gossip.New(gossip.Options{
		Node: n.cfg.Name, Listener: n.endpoint.Listener(transport.ClassGossip),
		Dial: func(ctx context.Context, node string) (net.Conn, error) {
			addr, ok := n.resolve(node)
			if !ok {
				return nil, fmt.Errorf("node %q is not a member of the cluster", node)
			}
			return n.endpoint.Dial(ctx, transport.ClassGossip, addr, node)
		},
		Members: func() []string { return slices.Collect(maps.Keys(n.state.View().Nodes)) },
		Key:     n.gossipKey,
		Info: func() gossip.Info {
			return gossip.Info{Zone: n.cfg.Zone, Version: n.version, FeatureLevel: n.featureLevel(), Serving: n.serving.Load(), Problem: n.worst()}
		},
		Log: n.log,
	})
}

// gossipKey is derived from a key that all members hold.
func (n *Node) gossipKey() ([]byte, error) {
	key, err := n.maskKey(n.state.View())
	if err != nil {
		return nil, err
	}
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("sallyport gossip"))
	return mac.Sum(nil), nil
}

// worst is what is wrong with this node, in a few words, or "".
func (n *Node) worst() string {
	sp := n.spool.Status()
	switch {
	case n.state.View().ConfigErr != nil:
		return "its configuration cannot be used"
	case len(n.eventLog.Status().Alarms) > 0:
		return "the event log cannot be vouched for"
	case len(sp.Alarms) > 0:
		return "recordings contradict their store"
	case sp.LastError != "":
		return "recordings do not reach their store"
	}
	return ""
}

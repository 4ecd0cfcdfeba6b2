package node

import (
	"context"
	"crypto"
	"path/filepath"

	"github.com/sallyport/sallyport/node/eventlog"
	"github.com/sallyport/sallyport/recording"
)

// openEventLog opens this node's part in making the event log verifiable. It is
// exported beside the recordings.
func (n *Node) openEventLog(dest recording.Store) (*eventlog.Service, error) {
	return eventlog.Open(eventlog.Options{
		Dir: filepath.Join(n.cfg.DataDir, "tlog"), Node: n.cfg.Name, Store: n.store,
		Keys:         n.keys,
		FeatureLevel: n.store.FeatureLevel,
		Ask: func(ctx context.Context, node string, r *eventlog.Request) (*eventlog.Reply, error) {
			return n.api.Cosign(ctx, node, r)
		},
		Objects: dest, Fatal: n.fail, Log: n.log,
	})
}

// keys are the keys of this node's certificates, the older first: for a moment
// after a renewal the earlier one is still the one that counts.
func (n *Node) keys() []crypto.Signer {
	self := n.self.Load()
	if self.before != nil {
		return []crypto.Signer{self.before, self.key}
	}
	return []crypto.Signer{self.key}
}

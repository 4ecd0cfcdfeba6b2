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
		Keys:         func() []crypto.Signer { return []crypto.Signer{n.key} },
		FeatureLevel: n.store.FeatureLevel,
		Ask: func(ctx context.Context, node string, r *eventlog.Request) (*eventlog.Reply, error) {
			return n.api.Cosign(ctx, node, r)
		},
		Objects: dest, Fatal: n.fail, Log: n.log,
	})
}

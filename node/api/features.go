package api

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"

	"github.com/sallyport/sallyport/raftstore/event"
)

// features is what a member tells the leader about its build.
type features struct {
	Level uint32 `json:"level"` // the newest feature level it offers
}

// Offer is the newest feature level that a member offers, or why it could not
// be asked. Level 0 means event.BaseLevel: a build that does not know of levels.
type Offer struct {
	Level uint32
	Err   error
}

// Agree decides on the feature level that every member offers, never below
// current, and names those that offer less than wanted. Who does not answer
// offers nothing new: it might come back with a build that cannot read what is
// stored meanwhile.
func Agree(current, wanted uint32, offers map[string]Offer) (level uint32, heldBack []string) {
	level = wanted
	for _, node := range slices.Sorted(maps.Keys(offers)) {
		o := offers[node]
		switch {
		case o.Err != nil:
			level = current
			heldBack = append(heldBack, fmt.Sprintf("%s does not answer", node))
		case max(o.Level, event.BaseLevel) < wanted:
			level = min(level, max(o.Level, event.BaseLevel))
			heldBack = append(heldBack, fmt.Sprintf("%s supports %d", node, max(o.Level, event.BaseLevel)))
		}
	}
	if current >= wanted {
		heldBack = nil
	}
	return max(level, current), heldBack
}

// offer is what this node offers.
func (s *Server) offer() uint32 {
	if s.FeatureLevel == 0 {
		return event.Level
	}
	return s.FeatureLevel
}

// Offers asks every member which feature level it offers.
func (s *Server) Offers(ctx context.Context) map[string]Offer {
	offers := map[string]Offer{}
	local := func() features { return features{s.offer()} }
	everyNode(ctx, s, "/mesh/v1/features", local, func(node string, f features, err error) {
		if p := (*Failure)(nil); errors.As(err, &p) && p.Status == http.StatusNotFound {
			err = nil // a build of before there were levels
		}
		offers[node] = Offer{f.Level, err}
	})
	return offers
}

func (s *Server) meshFeatures(w http.ResponseWriter, _ *http.Request) { reply(w, features{s.offer()}) }

package api

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// PositionHeader is a token for reading one's own writes at any node. The answer
// to a change carries it: the number of the event that the change became. A read
// that carries it back is answered from a state that has that event. As a
// read's position, Newest stands for everything that the cluster had agreed on
// when the read came (a linearizable read).
const (
	PositionHeader = "Sallyport-Position"
	Newest         = "newest"
)

// positionWait bounds how long a read waits for its position; behind it the
// caller asks another node.
const positionWait = 5 * time.Second

// reach waits until this node has folded what the request wants to see.
func (s *Server) reach(ctx context.Context, r *http.Request) *Problem {
	want := r.Header.Get(PositionHeader)
	if want == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, positionWait)
	defer cancel()
	seq, err := strconv.ParseUint(want, 10, 64)
	if want == Newest {
		if seq, err = s.ClusterHead(ctx); err != nil {
			return &Problem{Code: "unavailable", Status: http.StatusServiceUnavailable,
				Error: fmt.Sprintf("the leader could not say what is newest: %v; try again", err)}
		}
	} else if err != nil {
		return &Problem{Code: "invalid", Status: http.StatusBadRequest,
			Error: fmt.Sprintf("%s: want what a change was answered with, or %q", PositionHeader, Newest)}
	}
	for {
		changed := s.State.Changed()
		have := s.State.View().Seq
		if have >= seq {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return &Problem{Code: "unavailable", Status: http.StatusServiceUnavailable,
				Error: fmt.Sprintf("node %s has the events up to %d, and not yet event %d: try again, or at another node", s.Node, have, seq)}
		}
	}
}

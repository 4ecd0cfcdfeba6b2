package eventlog

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/tlog"
)

// tick is how often the leader looks whether a checkpoint is due.
const tick = 200 * time.Millisecond

// lead makes checkpoints while this node leads.
func (s *Service) lead(ctx context.Context) error {
	t := time.NewTicker(tick)
	defer t.Stop()
	var (
		backoff  time.Duration
		notUntil time.Time
	)
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		if !s.o.Store.IsLeader() {
			backoff, notUntil = 0, time.Time{}
			continue
		}
		now := s.o.Now()
		size := s.tree.Size()
		if now.Before(notUntil) || !s.due(size, now) {
			continue
		}
		err := s.round(ctx, size)
		if errors.Is(err, ErrDiverged) {
			return err
		}
		backoff, notUntil = 0, time.Time{}
		problem := ""
		if err != nil {
			backoff = min(max(2*backoff, minBackoff), s.o.Every, maxBackoff)
			notUntil = s.o.Now().Add(backoff)
			problem = err.Error()
			if ctx.Err() == nil {
				s.o.Log.Warn("no checkpoint of the event log was made", "events", size, "err", err)
			}
		}
		s.mu.Lock()
		s.mu.problem = problem
		s.mu.Unlock()
	}
}

func (s *Service) due(size uint64, now time.Time) bool {
	if s.o.FeatureLevel() < event.Needs(event.TypeCheckpoint, 1) {
		return false
	}
	pending := s.pending(size)
	s.mu.Lock()
	since := s.mu.since
	s.mu.Unlock()
	switch {
	case pending == 0:
		return false
	case pending >= s.o.Events, !since.IsZero() && now.Sub(since) >= s.o.Every:
		return true
	}
	return s.Settled() != nil // voters came or went: the sooner it is vouched for, the better
}

// answer is what a voter said.
type answer struct {
	node string
	root tlog.Hash
	sig  []byte
	err  error
}

// round asks all voters for their root over our first size events, and appends
// a checkpoint when a majority has ours.
func (s *Service) round(ctx context.Context, size uint64) error {
	root, err := s.tree.Root(size)
	if err != nil {
		return err
	}
	m := s.membersAt(size)
	c := tlog.Checkpoint{Origin: m.Cluster, Size: size, Root: root}
	s.mu.Lock()
	trusted, number := s.mu.trusted, s.mu.last.number+1
	s.mu.Unlock()

	// Those who have just left may be asked too: a change of several at once
	// needs the old majority.
	names := maps.Clone(m.Voters)
	if names == nil {
		return errors.New("no voter is known")
	}
	maps.Copy(names, trusted)
	roots := map[tlog.Hash]map[string][]byte{}
	var missing []string
	for _, a := range s.askAll(ctx, names.Names(), c) {
		if a.err == nil {
			a.err = s.checkAnswer(m.Voters, trusted, c, a)
		}
		if a.err != nil {
			missing = append(missing, fmt.Sprintf("%s: %v", a.node, a.err))
			continue
		}
		if roots[a.root] == nil {
			roots[a.root] = map[string][]byte{}
		}
		roots[a.root][a.node] = a.sig
	}
	for other, sigs := range roots {
		if other == root {
			continue
		}
		o := c
		o.Root = other
		if _, by, err := m.CheckNote(tlog.Note(o, sigs), trusted); err == nil {
			return s.diverged(o, fmt.Sprintf("the majority's, %v", by))
		}
		for node := range sigs {
			s.alarm("divergence of "+node, fmt.Errorf("its root over %d events is %s, this node's is %s", size, other, root))
			missing = append(missing, node+": its events differ")
		}
	}
	note := tlog.Note(c, roots[root])
	if len(roots[root]) == 0 {
		return fmt.Errorf("nobody cosigned: %s", strings.Join(missing, "; "))
	}
	if _, _, err := m.CheckNote(note, trusted); err != nil {
		return fmt.Errorf("%w; %s", err, strings.Join(missing, "; "))
	}
	payload := event.CheckpointCosigned{Size: size, Root: root[:], Note: string(note)}
	version, data, err := event.Encode(s.o.FeatureLevel(), event.TypeCheckpoint, payload)
	if err != nil {
		return err
	}
	actx, cancel := context.WithTimeout(ctx, 2*askTimeout)
	defer cancel()
	evs, err := s.o.Store.Append(actx, event.Proposal{
		ID: event.NewID(), Type: event.TypeCheckpoint, Version: version, Aggregate: aggregate, Expect: number - 1, Payload: data,
		Actor: event.Actor{Principal: s.o.Node, Kind: event.Node, Authn: "node", Via: s.o.Node},
	})
	if err != nil {
		return err
	}
	// The next one is due by what comes after this one: take it up first.
	return s.await(actx, evs[len(evs)-1].Seq)
}

// await returns when the tree has seq events.
func (s *Service) await(ctx context.Context, seq uint64) error {
	for {
		s.mu.Lock()
		advanced := s.mu.advanced
		s.mu.Unlock()
		if s.tree.Size() >= seq {
			return nil
		}
		select {
		case <-advanced:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// askAll asks voters at once, ourselves included.
func (s *Service) askAll(ctx context.Context, names []string, c tlog.Checkpoint) []answer {
	answers := make([]answer, len(names))
	var wg sync.WaitGroup
	for i, n := range names {
		wg.Go(func() {
			a := answer{node: n}
			ctx, cancel := context.WithTimeout(ctx, askTimeout)
			defer cancel()
			req := &Request{Size: c.Size, Root: c.Root[:]}
			var r *Reply
			if n == s.o.Node {
				r, a.err = s.Cosign(ctx, req)
			} else {
				r, a.err = s.o.Ask(ctx, n, req)
			}
			if a.err == nil && copy(a.root[:], r.Root) != len(a.root) {
				a.err = errors.New("its answer holds no root")
			}
			if a.err == nil {
				a.sig = r.Cosignature
			}
			answers[i] = a
		})
	}
	wg.Wait()
	return answers
}

// checkAnswer checks a cosignature: nobody's mistake is to spoil the note.
func (s *Service) checkAnswer(now, then tlog.Voters, c tlog.Checkpoint, a answer) error {
	c.Root = a.root
	err := errors.New("it has no certificate")
	for _, cert := range slices.Concat(now[a.node], then[a.node]) {
		var who tlog.Cosigner
		if who, err = tlog.NewCosigner(a.node, cert); err == nil {
			_, err = who.Check(c, a.sig)
		}
		if err == nil {
			return nil
		}
	}
	return err
}

// Status is how the log stands on a node.
type Status struct {
	Events     uint64       `json:"events"`     // in the tree
	Checkpoint uint64       `json:"checkpoint"` // number of the newest
	Cosigned   uint64       `json:"cosigned"`   // events it covers
	At         time.Time    `json:"at,omitzero"`
	Problem    string       `json:"problem,omitempty"` // why the last round, on the leader, made none
	Alarms     []string     `json:"alarms,omitempty"`
	Export     ExportStatus `json:"export,omitzero"`
}

// Status tells how the log stands here.
func (s *Service) Status() Status {
	size := s.tree.Size()
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{Events: size, Checkpoint: s.mu.last.number, Cosigned: s.mu.last.Size, At: s.mu.last.at, Problem: s.mu.problem, Export: s.mu.export}
	if s.o.FeatureLevel() < event.Needs(event.TypeCheckpoint, 1) {
		st.Problem = "no checkpoints yet: the cluster's feature level is too low for them"
	}
	for _, k := range slices.Sorted(maps.Keys(s.mu.alarms)) {
		st.Alarms = append(st.Alarms, k+": "+s.mu.alarms[k])
	}
	return st
}

package api

import (
	"context"
	"encoding/json"
	"net/http"
	"time"

	"github.com/sallyport/sallyport/node/tunnel"
	"github.com/sallyport/sallyport/raftstore/event"
)

// Health is how a node does, as it says itself to the leader that asks.
type Health struct {
	State     string        `json:"state"` // leader, follower, candidate, subscriber
	Term      uint64        `json:"term"`
	LastIndex uint64        `json:"last_index"`
	Events    uint64        `json:"events"`
	Contact   time.Duration `json:"contact_ns"`       // since the leader was heard; -1 for never
	Source    string        `json:"source,omitempty"` // who feeds it, if not Raft
	Relays    int           `json:"relays,omitempty"` // nodes between the source and Raft

	Serving      bool   `json:"serving"`
	Version      string `json:"version"`
	FeatureLevel uint32 `json:"feature_level"`
	Zone         string `json:"zone,omitempty"`
}

func (s *Server) meshHealth(w http.ResponseWriter, _ *http.Request) { reply(w, s.Health()) }

// HealthOf asks a node how it does.
func (s *Server) HealthOf(ctx context.Context, node string) (Health, error) {
	var h Health
	err := s.get(ctx, node, "/mesh/v1/health", &h)
	return h, err
}

// Members are all nodes and their parts.
type Members struct {
	Cluster string   `json:"cluster"`
	Leader  string   `json:"leader,omitempty"`
	Voters  int      `json:"voters"` // how many are wanted
	Members []Member `json:"members"`
}

// Member is a node of the cluster.
type Member struct {
	Name  string `json:"name"`
	Addr  string `json:"addr"`
	Role  string `json:"role"` // what its certificate allows: voter or gateway
	Zone  string `json:"zone,omitempty"`
	Voter bool   `json:"voter"` // it has a vote now
	// Health is nil when the node did not answer; Error says why.
	Health *Health `json:"health,omitempty"`
	Error  string  `json:"error,omitempty"`
	// Healthy: it answers, has heard of the leader lately and lets clients in.
	Healthy bool   `json:"healthy"`
	Lag     uint64 `json:"lag"` // events it lacks of those the answering node has
}

// healthyContact is how long ago a healthy node has heard of the leader.
const healthyContact = 5 * time.Second

func (s *Server) members(_ http.ResponseWriter, r *request) (any, error) {
	v := s.State.View()
	leader, _ := s.Store.Leader()
	out := Members{Cluster: v.ClusterID, Leader: leader, Voters: v.WantVoters()}
	votes := map[string]bool{}
	servers, err := s.Store.Members()
	if err != nil {
		return nil, err
	}
	for _, m := range servers {
		votes[m.ID] = m.Voter
	}
	newest, _, _ := s.Store.Head()
	everyNode(r.Context(), s, "/mesh/v1/health", s.Health, func(node string, h Health, err error) {
		info := v.Nodes[node]
		m := Member{Name: node, Addr: info.Addr, Role: info.Role, Zone: info.Zone, Voter: votes[node]}
		if err != nil {
			m.Error = err.Error()
		} else {
			m.Health = &h
			m.Healthy = h.Serving && h.Contact >= 0 && h.Contact < healthyContact
			if h.Zone != "" {
				m.Zone = h.Zone
			}
			if h.Events < newest {
				m.Lag = newest - h.Events
			}
		}
		out.Members = append(out.Members, m)
	})
	for name, vote := range votes {
		if _, member := v.Nodes[name]; !member {
			out.Members = append(out.Members, Member{Name: name, Voter: vote, Error: "removed, and still in Raft's configuration: the leader takes it out"})
		}
	}
	return out, nil
}

// VotersRequest says how many voters the cluster is to have.
type VotersRequest struct {
	Voters int `json:"voters"` // 3 or 5
}

func (s *Server) setVoters(w http.ResponseWriter, r *request) (any, error) {
	var in VotersRequest
	if err := r.decode(&in); err != nil {
		return nil, err
	}
	if in.Voters != 3 && in.Voters != 5 {
		return nil, invalid("voters: 3 or 5; more make every change slower and nothing safer")
	}
	if ev, done := s.done(r, event.TypeVotersSet); done {
		return Committed{ev.Seq, ev.Index, ev.Time}, nil
	}
	ev, err := s.propose(w, r, event.TypeVotersSet, "voters", event.Any, event.VotersSet{Voters: in.Voters})
	if err != nil {
		return nil, err
	}
	return Committed{ev.Seq, ev.Index, ev.Time}, nil
}

// maxDrain bounds how long a node that leaves lets its sessions go on: the
// call that removes it waits.
const maxDrain = time.Minute

// removeNode takes a node out of the cluster: out of Raft, with a replacement
// first where there is one; its sessions ended; its certificate refused by all.
// The leader makes another node lead and has that remove it.
func (s *Server) removeNode(w http.ResponseWriter, r *request) (any, error) {
	var in RemoveNodeRequest
	if err := r.decode(&in); err != nil {
		return nil, err
	}
	name := r.PathValue("name")
	if ev, done := s.done(r, event.TypeNodeRemoved); done {
		return RemoveNodeReply{Committed: Committed{ev.Seq, ev.Index, ev.Time}, Detail: "removed before"}, nil
	}
	switch _, member := s.State.View().Nodes[name]; {
	case !member:
		return nil, notFound("no node is named %q; `sallyport cluster members` lists them", name)
	case in.Reason == "":
		return nil, invalid("a reason is needed")
	case in.Drain < 0 || in.Drain > maxDrain:
		return nil, invalid("drain: at most %v", maxDrain)
	}
	ctx, cancel := context.WithTimeout(r.Context(), in.Drain+90*time.Second)
	defer cancel()
	if name == s.Node {
		if err := s.handOver(ctx); err != nil {
			return nil, err
		}
		s.toLeader(w, r.Request.WithContext(ctx), r.body)
		return nil, nil
	}
	s.awaitSettled(ctx)
	// Out of Raft first: once the event is there, the nodes refuse each other's
	// word, and Raft would count on one that cannot answer.
	rctx, done := context.WithTimeout(ctx, 40*time.Second)
	defer done()
	if err := s.Release(rctx, name); err != nil {
		return nil, &Failure{&Problem{Code: "unavailable", Error: err.Error(), Status: http.StatusServiceUnavailable}}
	}
	// The others refuse a removed node from the event on, so it might never
	// hear of its removal: it is told first. One that cannot be told has its
	// sessions ended by its lease.
	lctx, stop := context.WithTimeout(ctx, in.Drain+15*time.Second)
	defer stop()
	told := s.exchange(lctx, http.MethodPost, name, "/mesh/v1/leave", LeaveRequest{in.Drain}, nil)
	ev, err := s.propose(w, r, event.TypeNodeRemoved, "node/"+name, event.Any, event.NodeRemoved{Name: name, Reason: in.Reason})
	if err != nil {
		return nil, err
	}
	rep := RemoveNodeReply{Committed: Committed{ev.Seq, ev.Index, ev.Time}, Stopped: told == nil}
	if told != nil {
		rep.Detail = told.Error()
	}
	return rep, nil
}

// handOver makes another node lead, and returns when this one knows it.
func (s *Server) handOver(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var err error
	for s.Store.IsLeader() {
		if err = s.Store.TransferLeadership(ctx); err == nil {
			break
		}
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
			return &Failure{&Problem{Code: "unavailable", Status: http.StatusServiceUnavailable,
				Error: s.Node + " leads, and no other voter could take over: let another node join first"}}
		}
	}
	for {
		if leader, _ := s.Store.Leader(); leader != "" && leader != s.Node {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return &Failure{&Problem{Code: "unavailable", Error: "no other node leads yet: repeat", Status: http.StatusServiceUnavailable}}
		}
	}
}

// LeaveRequest is the leader's word to a node that it is about to remove.
type LeaveRequest struct {
	Drain time.Duration `json:"drain_ns"` // how long sessions may go on
}

// meshLeave stops this node: the leader is about to remove it. It answers when
// no session is left.
func (s *Server) meshLeave(w http.ResponseWriter, r *http.Request) {
	if leader, _ := s.Store.Leader(); leader != tunnel.Peer(r.Context()) {
		fail(w, &Problem{Code: "forbidden", Error: "only the leader removes nodes", Status: http.StatusForbidden})
		return
	}
	var in LeaveRequest
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil || in.Drain < 0 || in.Drain > maxDrain {
		fail(w, problem(invalid("drain: want at most %v (%v)", maxDrain, err)))
		return
	}
	s.Leave(r.Context(), in.Drain)
	reply(w, struct{}{})
}

// Package autopilot decides which nodes have a vote: three or five of those
// that may, spread over zones, the dead replaced by the living. It only
// decides, one step at a time; node takes the steps at the leader.
//
// Why not hashicorp/raft-autopilot (v0.3.0): it expects every server to be in
// Raft's configuration already. Ours subscribe. It would give a vote to one
// with an empty log (its AddVoter makes a voter at once), leave demoted servers
// in the configuration for ever, and take the vote of a failed server before
// another one has it. What remains of it is what is here.
package autopilot

import (
	"cmp"
	"slices"
	"time"
)

const (
	// MinVoters is below what the dead are not taken out without replacement.
	MinVoters = 3
	// Stable is how long a node must have been well before it gets a vote, once
	// there are MinVoters.
	Stable = 10 * time.Second
	// Dead is how long a node must have been silent to be replaced: longer than
	// a restart takes.
	Dead = 20 * time.Second
)

// Node is a node of the cluster as the leader knows it from its own questions.
type Node struct {
	Name, Zone string
	// Eligible: its certificate allows a vote, its build is new enough, and it
	// is not about to leave.
	Eligible bool
	Alive    bool      // it answered the last question, and does well
	Since    time.Time // from when on it has been alive
	Silent   time.Duration

	InRaft bool // in Raft's configuration
	Voter  bool // with a vote
	// Caught: its log is as long as the leader's was when it was asked.
	Caught bool
}

func (n *Node) dead() bool { return !n.Alive && n.Silent >= Dead }

// good says whether a voter does its duty, as far as can be known.
func (n *Node) good() bool { return n.Eligible && !n.dead() }

// Action is what a Step does.
type Action string

const (
	None     Action = ""
	Stage    Action = "stage"    // let it receive the log, without a vote
	Promote  Action = "promote"  // give a staged one a vote
	Withdraw Action = "withdraw" // take the vote, if any, and take it out of Raft
	Transfer Action = "transfer" // let another voter lead: this one must go
)

// Step is one change of Raft's configuration.
type Step struct {
	Action Action
	Node   string
	Why    string
}

// Plan is the next step to have want voters, or None. It is pure. leader is the
// node that would take the step.
//
// A replacement has its vote before the replaced one loses it, so that the
// number of voters that are alive never falls by a step; one node is on its way
// at a time. Nothing is done that a majority of voters could not confirm.
func Plan(want int, leader string, nodes []Node, now time.Time) Step {
	p := &plan{want: want, leader: leader, now: now, zones: map[string]int{}}
	for i := range nodes {
		n := &nodes[i]
		switch {
		case n.InRaft && n.Voter:
			p.voters = append(p.voters, n)
			if n.Alive || n.Name == leader {
				p.alive++
			}
			if n.good() {
				p.good++
				p.zones[n.Zone]++
			}
		case n.InRaft:
			p.staged = append(p.staged, n)
		case n.Eligible && n.Alive:
			p.spare = append(p.spare, n)
		}
	}
	for _, do := range []func() Step{p.clean, p.shrink, p.grow, p.abandon, p.unstage} {
		if s := do(); s.Action != None {
			return s
		}
	}
	return Step{}
}

type plan struct {
	want                  int
	leader                string
	now                   time.Time
	voters, staged, spare []*Node
	good, alive           int            // of the voters
	zones                 map[string]int // good voters in each
}

// clean takes out staged nodes that will never be voters.
func (p *plan) clean() Step {
	for _, n := range p.staged {
		if !n.good() {
			return Step{Withdraw, n.Name, "it was to have a vote and is gone or may not"}
		}
	}
	return Step{}
}

// survives says whether the voters without n have a living majority.
func (p *plan) survives(n *Node) bool {
	alive := p.alive
	if n.Alive || n.Name == p.leader {
		alive--
	}
	left := len(p.voters) - 1
	return left > 0 && alive > left/2
}

// take is the step that takes n out, if the others can do without it.
func (p *plan) take(n *Node, why string) Step {
	switch {
	case !p.survives(n):
		return Step{}
	case n.Name == p.leader:
		return Step{Transfer, n.Name, why}
	}
	return Step{Withdraw, n.Name, why}
}

// shrink takes out one voter of too many: the dead first, then those that may
// not be, then the silent, then one of the zone with most. The leader comes last
// among its equals.
func (p *plan) shrink() Step {
	if len(p.voters) <= p.want {
		return Step{}
	}
	rank := func(n *Node) (r int) {
		switch {
		case n.dead():
			return 0
		case !n.Eligible:
			return 1
		case !n.Alive && n.Name != p.leader:
			return 2
		}
		return 3
	}
	order := slices.Clone(p.voters)
	slices.SortFunc(order, func(a, b *Node) int {
		return cmp.Or(
			cmp.Compare(rank(a), rank(b)),
			-cmp.Compare(p.zones[a.Zone], p.zones[b.Zone]),
			compareBool(a.Name == p.leader, b.Name == p.leader),
			cmp.Compare(a.Name, b.Name),
		)
	})
	why := [...]string{"it is dead and another has its place", "it may not be a voter any more", "there are more voters than wanted and it does not answer", "there are more voters than wanted"}
	return p.take(order[0], why[rank(order[0])])
}

// grow stages or promotes a node where a voter is missing, dead or about to
// leave, or where voters crowd in one zone and another has a spare.
func (p *plan) grow() Step {
	why := "a voter is missing"
	spread := false
	if p.good >= p.want {
		if p.good < len(p.voters) { // shrink comes first
			return Step{}
		}
		spread, why = true, "voters crowd in one zone"
	}
	need := Stable
	if p.good < MinVoters && len(p.voters) < MinVoters {
		need = 0 // the cluster is being made
	}
	helps := func(n *Node) bool { return !spread || p.crowd()-p.zones[n.Zone] >= 2 }
	for _, n := range p.staged {
		if helps(n) && n.Alive && n.Caught && p.now.Sub(n.Since) >= need {
			return Step{Promote, n.Name, why}
		}
	}
	if len(p.staged) > 0 {
		return Step{}
	}
	var best *Node
	for _, n := range p.spare {
		if !helps(n) || p.now.Sub(n.Since) < need {
			continue
		}
		if best == nil || cmp.Or(cmp.Compare(p.zones[n.Zone], p.zones[best.Zone]), n.Since.Compare(best.Since), cmp.Compare(n.Name, best.Name)) < 0 {
			best = n
		}
	}
	if best == nil {
		return Step{}
	}
	return Step{Stage, best.Name, why}
}

// crowd is how many good voters the fullest zone has.
func (p *plan) crowd() (most int) {
	for _, n := range p.zones {
		most = max(most, n)
	}
	return most
}

// abandon takes out voters that nobody can replace: those about to leave, and
// the dead while MinVoters remain.
func (p *plan) abandon() Step {
	if len(p.staged) > 0 {
		return Step{}
	}
	for _, n := range p.voters {
		switch {
		case n.dead() && len(p.voters) > MinVoters:
			if s := p.take(n, "it is dead and nobody can take its place"); s.Action != None {
				return s
			}
		case !n.Eligible && !slices.ContainsFunc(p.spare, func(s *Node) bool { return s.Eligible }):
			if s := p.take(n, "it may not be a voter any more and nobody can take its place"); s.Action != None {
				return s
			}
		}
	}
	return Step{}
}

// unstage takes out a staged node that is not needed any more.
func (p *plan) unstage() Step {
	for _, n := range p.staged {
		if p.good >= p.want && p.crowd()-p.zones[n.Zone] < 2 {
			return Step{Withdraw, n.Name, "there are voters enough"}
		}
	}
	return Step{}
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

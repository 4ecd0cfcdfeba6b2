package policy

import (
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"

	"github.com/cedar-policy/cedar-go"
)

// maxPairs bounds the work that one statement can ask for. A statement that
// joins hundreds of tables and writes each column by name stays below it.
const maxPairs = 4096

// actionIndex holds the rules that can apply to one action; what a rule says
// about the action and the principal in its scope decides where it is.
type actionIndex struct {
	permits, forbids ruleIndex
	uses             uses
}

// ruleIndex is rules by what their scope asks of the principal.
type ruleIndex struct {
	anyone []*rule
	by     map[cedar.EntityUID][]*rule // principal == X, principal in X
}

func (x *ruleIndex) add(r *rule) {
	if r.scope.principal == nil {
		x.anyone = append(x.anyone, r)
		return
	}
	if x.by == nil {
		x.by = make(map[cedar.EntityUID][]*rule)
	}
	x.by[*r.scope.principal] = append(x.by[*r.scope.principal], r)
}

func (x *ruleIndex) len() int { return len(x.anyone) + len(x.by) }

// buildIndex files every rule under each action that its scope can match. What
// it leaves out cannot match, and so cannot fail either: Cedar looks at the
// scope first.
func buildIndex(rules []*rule) map[Action]*actionIndex {
	index := make(map[Action]*actionIndex, len(catalogue))
	for i := range catalogue {
		info := &catalogue[i]
		ix := &actionIndex{}
		for _, r := range rules {
			if !r.scope.coversAction(info) {
				continue
			}
			if r.permit {
				ix.permits.add(r)
			} else {
				ix.forbids.add(r)
			}
			ix.uses |= r.uses
		}
		index[info.Name] = ix
	}
	return index
}

// candidates are the rules of an index that can apply to a principal. It is a
// cedar.PolicyIterator.
type candidates struct {
	index *ruleIndex
	who   *principal
}

// All yields every candidate once.
func (c *candidates) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) {
		give := func(rules []*rule) bool {
			for _, r := range rules {
				if !yield(cedar.PolicyID(r.id), r.policy) {
					return false
				}
			}
			return true
		}
		if !give(c.index.anyone) || len(c.index.by) == 0 || !give(c.index.by[c.who.entity.UID]) {
			return
		}
		for _, g := range c.who.groups {
			if !give(c.index.by[g]) {
				return
			}
		}
	}
}

// Decide answers r. It is a function of s and r alone, safe for concurrent
// use, takes no lock and keeps nothing of r but its Subject. A nil Set refuses.
//
// For each pair: a request that cannot be judged, or a forbid rule that cannot
// be evaluated, refuses; then a forbid that is no approval rule; then the lack
// of a permit; then, if approval rules forbid it that are not in
// Context.Approved, the pair is held. A permit that cannot be evaluated does
// not permit. The first pair that is refused decides; without one, a held pair
// holds all.
func (s *Set) Decide(r *Request) Decision {
	if s == nil {
		return Decision{Rule: RuleDefaultDeny, Reason: "no policy is in force, so nothing is permitted; an administrator must apply one"}
	}
	if r.Subject == nil {
		return Decision{Rule: RulePolicyError, Reason: "there is no subject to judge"}
	}
	if len(r.Pairs) == 0 || len(r.Pairs) > maxPairs {
		return Decision{Rule: RulePolicyError, Reason: fmt.Sprintf("a statement must be 1 to %d pairs of action and resource to be judged, not %d; split it", maxPairs, len(r.Pairs))}
	}
	who := s.cache.principal(r.Subject)
	if who.err != nil {
		return Decision{Rule: RulePolicyError, Reason: who.err.Error()}
	}

	d := Decision{Effect: Permit}
	var approval *Approval
	var firstHold *rule
	env := entities{principal: &who.entity}
	var context cedar.Record
	haveContext := false

	for i, pair := range r.Pairs {
		info := actionsByName[pair.Action]
		if info == nil {
			return d.refuse(i, RulePolicyError, fmt.Sprintf("%s is no action that rules know", quote(string(pair.Action))))
		}
		if !slices.Contains(info.Resources, pair.Resource.Type) || len(pair.Resource.Path) != depth[pair.Resource.Type] {
			return d.refuse(i, RulePolicyError, fmt.Sprintf("%s cannot be judged on %s", pair.Action, pair.Resource))
		}
		ix := s.actions[pair.Action]
		if ix.uses&usesContext != 0 && !haveContext {
			context, haveContext = contextRecord(&r.Context), true
		}
		d.Volatile = d.Volatile || ix.uses&usesTime != 0
		env.resource = s.cache.resource(pair.Resource)
		req := cedar.Request{Principal: who.entity.UID, Action: actionUID(string(pair.Action)), Resource: env.resource.UID, Context: context}

		_, forbidden := cedar.Authorize(&candidates{&ix.forbids, who}, &env, req)
		if len(forbidden.Errors) > 0 {
			broken := s.firstError(forbidden.Errors)
			return d.refuse(i, RulePolicyError, fmt.Sprintf("%s on %s: rule %s (%s:%d), which could forbid it, cannot be evaluated: %s; an administrator must correct the rule",
				pair.Action, pair.Resource, broken.id, broken.path, broken.line, errorOf(forbidden.Errors, broken.id)))
		}
		if f := s.first(forbidden.Reasons, func(f *rule) bool { return f.approval == nil }); f != nil {
			reason := fmt.Sprintf("%s on %s is forbidden for %s by rule %s", pair.Action, pair.Resource, quote(r.Subject.ID()), f.id)
			if f.reason != "" {
				reason += ": " + f.reason
			}
			return d.refuse(i, f.id, reason)
		}

		_, permitted := cedar.Authorize(&candidates{&ix.permits, who}, &env, req)
		tolerance := BestEffort
		p := s.first(permitted.Reasons, func(p *rule) bool {
			d.Obligations.Durability = max(d.Obligations.Durability, p.durable)
			tolerance = min(tolerance, p.tolerance)
			return true
		})
		if p == nil {
			return d.refuse(i, RuleDefaultDeny, s.unpermitted(r, info, pair))
		}
		if d.Rule == "" {
			d.Rule, d.Reason = p.id, p.permitted
		}
		if pair.Action == Connect && len(r.Pairs) == 1 {
			d.Obligations.Tolerance = tolerance
		}

		for _, reason := range forbidden.Reasons {
			f := s.byID[reason.PolicyID]
			if slices.Contains(r.Context.Approved, f.id) {
				continue
			}
			approval = approval.with(f.approval)
			if firstHold == nil || f.order < firstHold.order {
				firstHold = f
				d.Pair = i
			}
		}
	}
	if approval != nil {
		pair := r.Pairs[d.Pair]
		d.Effect, d.Rule = Hold, firstHold.id
		d.Obligations.Approval = approval
		d.Reason = fmt.Sprintf("%s on %s needs the approval of %d in group %s (rule %s)", pair.Action, pair.Resource,
			approval.Count, strings.Join(approval.Groups, " and "), strings.Join(approval.Rules, " and "))
		if firstHold.reason != "" {
			d.Reason += ": " + firstHold.reason
		}
	}
	return d
}

// refuse is d as a refusal.
func (d Decision) refuse(pair int, rule, reason string) Decision {
	return Decision{Effect: Refuse, Rule: rule, Reason: reason, Pair: pair, Volatile: d.Volatile}
}

// first is the rule that comes first in the files among those that matched and
// that want says yes to. want is asked about every one of them.
func (s *Set) first(reasons []cedar.DiagnosticReason, want func(*rule) bool) *rule {
	var first *rule
	for _, d := range reasons {
		if r := s.byID[d.PolicyID]; want(r) && (first == nil || r.order < first.order) {
			first = r
		}
	}
	return first
}

func (s *Set) firstError(errs []cedar.DiagnosticError) *rule {
	var first *rule
	for _, e := range errs {
		if r := s.byID[e.PolicyID]; first == nil || r.order < first.order {
			first = r
		}
	}
	return first
}

func errorOf(errs []cedar.DiagnosticError, id string) string {
	for _, e := range errs {
		if string(e.PolicyID) == id {
			return e.Message
		}
	}
	return ""
}

// unpermitted words the refusal of a pair that no rule permits, with what to
// ask an administrator for.
func (s *Set) unpermitted(r *Request, info *ActionInfo, pair Pair) string {
	what := string(info.Name)
	if len(info.Groups) > 0 {
		what += ", or for its group " + info.Groups[0] + ","
	}
	groups := "in no group"
	if n := len(r.Subject.Groups); n > 0 {
		shown := make([]string, 0, 5)
		for _, g := range r.Subject.Groups[:min(n, 5)] {
			shown = append(shown, quote(g))
		}
		groups = "in " + strings.Join(shown, ", ")
		if n > 5 {
			groups += " …"
		}
	}
	return fmt.Sprintf("no rule permits %s on %s for %s (%s); if it should be, ask an administrator for a permit rule for action %s on it",
		info.Name, pair.Resource, quote(r.Subject.ID()), groups, what)
}

// with is the stricter of both: all rules and groups, the most approvers, the
// shortest times. a may be nil; b is not changed.
func (a *Approval) with(b *Approval) *Approval {
	if a == nil {
		a = &Approval{Count: b.Count, Expires: b.Expires, InTransaction: b.InTransaction}
	}
	a.Rules = union(a.Rules, b.Rules)
	a.Groups = union(a.Groups, b.Groups)
	a.Count = max(a.Count, b.Count)
	a.Expires = min(a.Expires, b.Expires)
	a.InTransaction = min(a.InTransaction, b.InTransaction)
	return a
}

func union(a, b []string) []string {
	for _, s := range b {
		if i, found := slices.BinarySearch(a, s); !found {
			a = slices.Insert(a, i, s)
		}
	}
	return a
}

// quote shows s with control and invisible characters escaped.
func quote(s string) string { return strconv.Quote(s) }

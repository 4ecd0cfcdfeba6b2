package state

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore/event"
)

// Revocation is what was revoked and what became of it. It is immutable.
type Revocation struct {
	ID, Reason string
	Scope      event.Scope
	EventID    event.ID
	Seq, Index uint64 // of its event
	At         time.Time
	Until      time.Time // zero, or: only credentials issued until then end
	Undone     time.Time // zero while in force
	UndoReason string
	// Fenced says how each node stopped; nil until all have. FencedAt is when
	// that was stored.
	Fenced   *event.RevocationFenced
	FencedAt time.Time
	// Report is what was known of a revocation from before there were leases.
	Report *event.RevocationReport
}

// Why words the refusal of what r matches.
func (r *Revocation) Why() string {
	if !r.Until.IsZero() {
		return fmt.Sprintf("this credential is from before %s, when access of %s ended (%s): %s; get a new one", r.Until.UTC().Format(time.RFC3339), r.Scope, r.ID, r.Reason)
	}
	if !r.Undone.IsZero() {
		return fmt.Sprintf("this credential is from before the revocation of %s (%s) was undone: get a new one", r.Scope, r.ID)
	}
	return fmt.Sprintf("access of %s has been revoked (%s): %s", r.Scope, r.ID, r.Reason)
}

// Bearer is whom and what a credential, a call or a session stands for. Fields
// that do not apply, or are not known yet, are empty and match nothing.
type Bearer struct {
	Subject, TokenID string
	Groups           []string
	Claims           map[string]any
	IssuedAt         time.Time // of the credential

	Session, Target, Node string
}

// BearerOf is the bearer of a subject's credential.
func BearerOf(s *policy.Subject) Bearer {
	return Bearer{Subject: s.ID(), TokenID: s.TokenID, Groups: s.Groups, Claims: s.Claims, IssuedAt: s.IssuedAt}
}

// At is b, using node, and going to target ("" for none).
func (b Bearer) At(node, target string) Bearer {
	b.Node, b.Target = node, target
	return b
}

// standing is what the revocations of one scope come to.
type standing struct {
	revoked *Revocation // the oldest in force, or nil
	// later are the ids of those after it, oldest first, some of them undone
	// meanwhile. It is only appended to and cut at its front, so earlier Views
	// may share it.
	later []string
	// undone is the one that was undone last: credentials issued until then are
	// dead for this scope, for ever. Nil if none was.
	undone *Revocation
	// until is the one with the latest Until, or nil.
	until *Revocation
}

// scopes are the standings by scope, a Map for each kind: most are asked for at
// each decision, and those of a kind that was never revoked cost nothing.
type scopes struct {
	subject, token, session, target, node, group Map[*standing]
	claim                                        map[string]Map[*standing] // by the claim's name; never changed
}

// of is the Map of a kind that has no names, nil for any other.
func (s *scopes) of(k event.ScopeKind) *Map[*standing] {
	switch k {
	case event.ScopeSubject:
		return &s.subject
	case event.ScopeToken:
		return &s.token
	case event.ScopeSession:
		return &s.session
	case event.ScopeTarget:
		return &s.target
	case event.ScopeNode:
		return &s.node
	case event.ScopeGroup:
		return &s.group
	}
	return nil
}

// get is a copy of the standing of a scope.
func (s *scopes) get(sc event.Scope) standing {
	var st *standing
	if m := s.of(sc.Kind); m != nil {
		st = m.Get(sc.Value)
	} else if sc.Kind == event.ScopeClaim {
		st = s.claim[sc.Name].Get(sc.Value)
	}
	if st == nil {
		return standing{}
	}
	return *st
}

// put sets the standing of a scope. Earlier Views keep theirs.
func (s *scopes) put(sc event.Scope, st standing) {
	if m := s.of(sc.Kind); m != nil {
		*m = m.With(sc.Value, &st)
	} else if sc.Kind == event.ScopeClaim {
		claim := maps.Clone(s.claim) // as large as a configuration has claims
		if claim == nil {
			claim = map[string]Map[*standing]{}
		}
		claim[sc.Name] = claim[sc.Name].With(sc.Value, &st)
		s.claim = claim
	}
}

// refuses is the revocation that refuses a credential issued at issued, or nil.
func (s *standing) refuses(issued time.Time) *Revocation {
	if s == nil {
		return nil
	}
	if s.revoked != nil {
		return s.revoked
	}
	// An issuer's clock may be ahead by as much as is tolerated, and iat has
	// whole seconds.
	if s.undone != nil && issued.Unix() <= s.undone.Undone.Add(identity.Leeway).Unix() {
		return s.undone
	}
	if s.until != nil && issued.Unix() <= s.until.Until.Unix() { // one clock says both
		return s.until
	}
	return nil
}

// Refuses returns the revocation that refuses b, or nil. Of several it is one
// in force, if any is, and else one that was undone after b's credential was
// issued: undoing revives no credential from before it, with clocks that
// differ from before a minute (identity.Leeway) after it. It costs a few
// lookups, and nothing where nothing was ever revoked: BenchmarkRefuses.
func (v *View) Refuses(b *Bearer) *Revocation {
	if v.Revocations.Len() == 0 {
		return nil
	}
	var undone *Revocation
	// look says which revocation in force there is, and keeps one that was undone.
	look := func(m *Map[*standing], value string) *Revocation {
		if value == "" || m.Len() == 0 {
			return nil
		}
		r := m.Get(value).refuses(b.IssuedAt)
		if r != nil && !r.Undone.IsZero() {
			if undone == nil {
				undone = r
			}
			return nil
		}
		return r
	}
	s := &v.scopes
	for _, l := range [...]struct {
		m     *Map[*standing]
		value string
	}{{&s.subject, b.Subject}, {&s.token, b.TokenID}, {&s.session, b.Session}, {&s.target, b.Target}, {&s.node, b.Node}} {
		if r := look(l.m, l.value); r != nil {
			return r
		}
	}
	for _, g := range b.Groups {
		if r := look(&s.group, g); r != nil {
			return r
		}
	}
	for name, m := range s.claim {
		value, has := b.Claims[name]
		if !has {
			continue
		}
		var hit *Revocation
		eachValue(value, func(s string) bool {
			hit = look(&m, s)
			return hit == nil
		})
		if hit != nil {
			return hit
		}
	}
	return undone
}

// NodeRevoked returns the revocation that takes name's certificate, and all
// that its key has signed, out of use; nil if there is none. Nothing undoes it.
func (v *View) NodeRevoked(name string) *Revocation {
	return v.scopes.node.Get(name).refuses(time.Time{})
}

// Ends says whether a revocation of s ends what b stands for.
func (b *Bearer) Ends(s event.Scope) bool {
	if s.Value == "" {
		return false
	}
	switch s.Kind {
	case event.ScopeSubject:
		return b.Subject == s.Value
	case event.ScopeToken:
		return b.TokenID == s.Value
	case event.ScopeSession:
		return b.Session == s.Value
	case event.ScopeTarget:
		return b.Target == s.Value
	case event.ScopeNode:
		return b.Node == s.Value
	case event.ScopeGroup:
		return slices.Contains(b.Groups, s.Value)
	case event.ScopeClaim:
		hit := false
		eachValue(b.Claims[s.Name], func(v string) bool {
			hit = v == s.Value
			return !hit
		})
		return hit
	}
	return false
}

// EndedBy says whether r ends what b stands for.
func (b *Bearer) EndedBy(r event.Revoked) bool {
	return b.Ends(r.Ends()) && (r.Until.IsZero() || b.IssuedAt.Unix() <= r.Until.Unix())
}

// eachValue calls f for each value of a claim, written as a scope has it, until
// f says no.
func eachValue(v any, f func(string) bool) {
	switch v := v.(type) {
	case string:
		f(v)
	case bool:
		f(strconv.FormatBool(v))
	case int64:
		f(strconv.FormatInt(v, 10))
	case int:
		f(strconv.Itoa(v))
	case float64: // a claim that came through JSON
		f(strconv.FormatFloat(v, 'f', -1, 64))
	case []string:
		for _, s := range v {
			if !f(s) {
				return
			}
		}
	case []any:
		for _, e := range v {
			if s, ok := e.(string); ok && !f(s) {
				return
			}
		}
	}
}

// Final says why r cannot be undone, or "".
func (r *Revocation) Final() string {
	if !r.Until.IsZero() {
		return "it ended what had been issued before it, and nothing of that is revived: get a new token"
	}
	switch r.Scope.Kind {
	case event.ScopeSession:
		return "a session that was ended does not come back: open a new one"
	case event.ScopeToken:
		return "a token was issued before any undoing, and none of those is revived: get a new one"
	case event.ScopeNode:
		return "a revoked node's keys are not trusted again: remove the node and join it anew under another name"
	}
	return ""
}

// toleranceFrom is the largest tolerance of the configurations from index on.
type toleranceFrom struct {
	index   uint64
	largest policy.Tolerance
}

// LargestTolerance is the most that a session may have been given by a node
// that has folded everything up to index: of the configuration in force then,
// or of any later one.
func (v *View) LargestTolerance(index uint64) policy.Tolerance {
	// Largest first; the last one that began at or before index is the first
	// that such a node still knows.
	most := policy.Strict
	for _, t := range slices.Backward(v.tolerances) {
		most = max(most, t.largest)
		if t.index <= index {
			break
		}
	}
	return most
}

// tolerance takes note of the tolerance of a configuration applied at index.
// Of the earlier ones only those matter that allowed more than all later ones,
// so the list is as short as there are different ones at a time.
func (f *fold) tolerance(index uint64) {
	now := toleranceFrom{index, policy.Strict}
	if f.v.Config != nil {
		now.largest = f.v.Config.Policies.LargestTolerance()
	}
	list := slices.Clip(f.v.tolerances)
	for len(list) > 0 && list[len(list)-1].largest <= now.largest {
		now.index = list[len(list)-1].index
		list = list[:len(list)-1]
	}
	f.v.tolerances = append(slices.Clone(list), now)
}

// unfenced are the revocations of which no event says yet that every node has
// stopped what they end. Both lists are appended to at their ends alone, and
// replaced when they are made shorter, so that earlier Views may share them.
type unfenced struct {
	all    []unfencedOne // by number; some are fenced meanwhile
	fenced int           // how many of all
}

type unfencedOne struct {
	seq uint64
	id  string
}

// minFenced is how many fenced ones are left in the list at least before it is
// made anew.
const minFenced = 64

// without is u after one of its revocations was fenced. The list is made anew
// when most of it is fenced: that costs as much as was fenced since.
func (u unfenced) without(revocations Map[*Revocation]) unfenced {
	if u.fenced++; u.fenced < minFenced || u.fenced <= len(u.all)/2 {
		return u
	}
	left := make([]unfencedOne, 0, len(u.all)-u.fenced)
	for _, o := range u.all {
		if revocations.Get(o.id).Fenced == nil {
			left = append(left, o)
		}
	}
	return unfenced{all: left}
}

// Unfenced yields the revocations of which no event says yet that every node
// has stopped what they end, from number from on, in the order of their events.
func (v *View) Unfenced(from uint64) iter.Seq[*Revocation] {
	return func(yield func(*Revocation) bool) {
		all := v.unfenced.all
		i, _ := slices.BinarySearchFunc(all, from, func(o unfencedOne, seq uint64) int { return cmp.Compare(o.seq, seq) })
		for _, o := range all[i:] {
			if r := v.Revocations.Get(o.id); r.Fenced == nil && !yield(r) {
				return
			}
		}
	}
}

func (f *fold) revocation(e event.Event) error {
	switch e.Type {
	case event.TypeRevoked:
		p, err := event.Decode[event.Revoked](e)
		if err != nil {
			return err
		}
		f.revoked(&Revocation{ID: p.ID, Reason: p.Reason, Scope: p.Ends(), Until: p.Until, EventID: e.ID, At: e.Time, Seq: e.Seq, Index: e.Index})
	case event.TypeRevocationUndone:
		p, err := event.Decode[event.RevocationUndone](e)
		if err != nil {
			return err
		}
		if r := f.v.Revocations.Get(p.ID); r != nil && r.Undone.IsZero() {
			c := *r
			c.Undone, c.UndoReason = e.Time, p.Reason
			f.replace(r, &c)
			f.undone(&c)
		}
	case event.TypeRevocationReport:
		p, err := event.Decode[event.RevocationReport](e)
		if err != nil {
			return err
		}
		if r := f.v.Revocations.Get(p.ID); r != nil {
			c := *r
			c.Report = &p
			f.replace(r, &c)
		}
	case event.TypeRevocationFenced:
		p, err := event.Decode[event.RevocationFenced](e)
		if err != nil {
			return err
		}
		if r := f.v.Revocations.Get(p.ID); r != nil && r.Fenced == nil {
			c := *r
			c.Fenced, c.FencedAt = &p, e.Time
			f.replace(r, &c)
			f.v.unfenced = f.v.unfenced.without(f.v.Revocations)
		}
	}
	return nil
}

// revoked adds r, which is in force from now on.
func (f *fold) revoked(r *Revocation) {
	f.v.Revocations = f.v.Revocations.With(r.ID, r)
	f.v.unfenced.all = append(f.v.unfenced.all, unfencedOne{r.Seq, r.ID})
	st := f.v.scopes.get(r.Scope)
	switch {
	case r.Until.IsZero() && st.revoked == nil:
		st.revoked = r
	case r.Until.IsZero():
		st.later = append(st.later, r.ID)
	case st.until == nil || r.Until.After(st.until.Until):
		st.until = r
	}
	f.v.scopes.put(r.Scope, st)
}

// undone lifts r, which is undone. Another revocation of the same stands.
func (f *fold) undone(r *Revocation) {
	st := f.v.scopes.get(r.Scope)
	st.undone = r
	if st.revoked == r {
		st.revoked = nil
		for st.revoked == nil && len(st.later) > 0 {
			if next := f.v.Revocations.Get(st.later[0]); next.Scope == r.Scope && next.Undone.IsZero() {
				st.revoked = next
			}
			st.later = st.later[1:]
		}
	}
	f.v.scopes.put(r.Scope, st)
}

// replace puts r where its state before, old, was.
func (f *fold) replace(old, r *Revocation) {
	f.v.Revocations = f.v.Revocations.With(r.ID, r)
	st := f.v.scopes.get(r.Scope)
	if st.revoked == old {
		st.revoked = r
	}
	if st.undone == old {
		st.undone = r
	}
	if st.until == old {
		st.until = r
	}
	f.v.scopes.put(r.Scope, st)
}

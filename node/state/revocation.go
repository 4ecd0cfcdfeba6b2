package state

import (
	"fmt"
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
	// undone is the one that was undone last: credentials issued until then are
	// dead for this scope, for ever. Nil if none was.
	undone *Revocation
	// until is the one with the latest Until, or nil.
	until *Revocation
}

// refuses is the revocation that refuses a credential issued at issued, or nil.
func (s standing) refuses(issued time.Time) *Revocation {
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
// differ from before a minute (identity.Leeway) after it. It costs a few map
// lookups, and nothing where nothing was ever revoked.
func (v *View) Refuses(b *Bearer) *Revocation {
	if len(v.scopes) == 0 {
		return nil
	}
	var undone *Revocation
	look := func(s event.Scope) *Revocation {
		r := v.scopes[s].refuses(b.IssuedAt)
		if r != nil && !r.Undone.IsZero() {
			if undone == nil {
				undone = r
			}
			return nil
		}
		return r
	}
	for _, s := range [...]event.Scope{
		{Kind: event.ScopeSubject, Value: b.Subject}, {Kind: event.ScopeToken, Value: b.TokenID}, {Kind: event.ScopeSession, Value: b.Session},
		{Kind: event.ScopeTarget, Value: b.Target}, {Kind: event.ScopeNode, Value: b.Node},
	} {
		if s.Value == "" {
			continue
		}
		if r := look(s); r != nil {
			return r
		}
	}
	for _, g := range b.Groups {
		if r := look(event.Scope{Kind: event.ScopeGroup, Value: g}); r != nil {
			return r
		}
	}
	for name := range v.claims {
		value, has := b.Claims[name]
		if !has {
			continue
		}
		var hit *Revocation
		eachValue(value, func(s string) bool {
			hit = look(event.Scope{Kind: event.ScopeClaim, Name: name, Value: s})
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
	return v.scopes[event.Scope{Kind: event.ScopeNode, Value: name}].refuses(time.Time{})
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

func (f *fold) revocation(e event.Event) error {
	m := own(&f.v.Revocations, &f.revocations)
	switch e.Type {
	case event.TypeRevoked:
		p, err := event.Decode[event.Revoked](e)
		if err != nil {
			return err
		}
		r := &Revocation{ID: p.ID, Reason: p.Reason, Scope: p.Ends(), Until: p.Until, EventID: e.ID, At: e.Time, Seq: e.Seq, Index: e.Index}
		m[p.ID] = r
		own(&f.v.Unfenced, &f.unfenced)[p.ID] = r
		if r.Scope.Kind == event.ScopeClaim {
			own(&f.v.claims, &f.claims)[r.Scope.Name] = true
		}
		scopes := own(&f.v.scopes, &f.scopes)
		st := scopes[r.Scope]
		switch {
		case r.Until.IsZero() && st.revoked == nil:
			st.revoked = r
		case !r.Until.IsZero() && (st.until == nil || r.Until.After(st.until.Until)):
			st.until = r
		}
		scopes[r.Scope] = st
	case event.TypeRevocationUndone:
		p, err := event.Decode[event.RevocationUndone](e)
		if err != nil {
			return err
		}
		if r := m[p.ID]; r != nil && r.Undone.IsZero() {
			c := *r
			c.Undone, c.UndoReason = e.Time, p.Reason
			f.replace(&c)
			st := standing{undone: &c, until: f.v.scopes[c.Scope].until}
			for _, o := range m { // another revocation of the same stands
				if o.Scope == c.Scope && o.Undone.IsZero() && o.Until.IsZero() && (st.revoked == nil || o.Seq < st.revoked.Seq) {
					st.revoked = o
				}
			}
			own(&f.v.scopes, &f.scopes)[c.Scope] = st
		}
	case event.TypeRevocationReport:
		p, err := event.Decode[event.RevocationReport](e)
		if err != nil {
			return err
		}
		if r := m[p.ID]; r != nil {
			c := *r
			c.Report = &p
			f.replace(&c)
		}
	case event.TypeRevocationFenced:
		p, err := event.Decode[event.RevocationFenced](e)
		if err != nil {
			return err
		}
		if r := m[p.ID]; r != nil && r.Fenced == nil {
			c := *r
			c.Fenced, c.FencedAt = &p, e.Time
			f.replace(&c)
		}
	}
	return nil
}

// replace puts r where the state of it before was.
func (f *fold) replace(r *Revocation) {
	m := own(&f.v.Revocations, &f.revocations)
	old := m[r.ID]
	m[r.ID] = r
	unfenced := own(&f.v.Unfenced, &f.unfenced)
	if r.Fenced != nil {
		delete(unfenced, r.ID)
	} else {
		unfenced[r.ID] = r
	}
	scopes := own(&f.v.scopes, &f.scopes)
	st := scopes[r.Scope]
	if st.revoked == old {
		st.revoked = r
	}
	if st.undone == old {
		st.undone = r
	}
	if st.until == old {
		st.until = r
	}
	scopes[r.Scope] = st
}

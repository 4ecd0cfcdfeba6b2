package state

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore/event"
)

func (s *script) revoked(id string, sc event.Scope) event.Event {
	e := s.event(event.TypeRevoked, "revocation/"+id, event.NewRevoked(id, sc, "leak"))
	e.Version = 2
	return e
}

func (s *script) undone(id string) event.Event {
	return s.event(event.TypeRevocationUndone, "revocation/"+id, event.RevocationUndone{ID: id, Reason: "found"})
}

// job is a bearer that every kind of scope can match.
func job(issued time.Time) *Bearer {
	return &Bearer{
		Subject: "ci/repo:acme/shop", TokenID: "jti-1", Groups: []string{"ci", "ci-main"}, IssuedAt: issued,
		Claims:  map[string]any{"repository": "acme/shop", "run_id": int64(77), "admin": false, "teams": []string{"a", "b"}},
		Session: "s1", Target: "prod-db", Node: "n1",
	}
}

// Each kind of scope refuses and ends what it names and nothing else, and what
// its undoing lifts is for credentials issued later only.
func TestScopes(t *testing.T) {
	for _, c := range []struct {
		match, other event.Scope
	}{
		{event.Scope{Kind: event.ScopeSubject, Value: "ci/repo:acme/shop"}, event.Scope{Kind: event.ScopeSubject, Value: "ci/repo:acme/other"}},
		{event.Scope{Kind: event.ScopeGroup, Value: "ci-main"}, event.Scope{Kind: event.ScopeGroup, Value: "ci-mai"}},
		{event.Scope{Kind: event.ScopeClaim, Name: "repository", Value: "acme/shop"}, event.Scope{Kind: event.ScopeClaim, Name: "repository", Value: "acme/other"}},
		{event.Scope{Kind: event.ScopeClaim, Name: "run_id", Value: "77"}, event.Scope{Kind: event.ScopeClaim, Name: "run_id", Value: "7"}},
		{event.Scope{Kind: event.ScopeClaim, Name: "admin", Value: "false"}, event.Scope{Kind: event.ScopeClaim, Name: "admin", Value: "true"}},
		{event.Scope{Kind: event.ScopeClaim, Name: "teams", Value: "b"}, event.Scope{Kind: event.ScopeClaim, Name: "teams", Value: "a,b"}},
		{event.Scope{Kind: event.ScopeSession, Value: "s1"}, event.Scope{Kind: event.ScopeSession, Value: "s2"}},
		{event.Scope{Kind: event.ScopeTarget, Value: "prod-db"}, event.Scope{Kind: event.ScopeTarget, Value: "test-db"}},
		{event.Scope{Kind: event.ScopeToken, Value: "jti-1"}, event.Scope{Kind: event.ScopeToken, Value: "jti-2"}},
		{event.Scope{Kind: event.ScopeNode, Value: "n1"}, event.Scope{Kind: event.ScopeNode, Value: "n2"}},
	} {
		t.Run(c.match.String(), func(t *testing.T) {
			p, s := New(slog.New(slog.DiscardHandler)), &script{t: t}
			if r := p.View().Refuses(job(epoch)); r != nil {
				t.Fatalf("refused by %v before anything was revoked", r)
			}
			v := mustFold(t, p, s.revoked("other", c.other))
			if r := v.Refuses(job(epoch)); r != nil || job(epoch).Ends(c.other) {
				t.Fatalf("%s refuses or ends it: %v", c.other, r)
			}
			v = mustFold(t, p, s.revoked("a", c.match))
			if r := v.Refuses(job(epoch)); r == nil || r.ID != "a" || !job(epoch).Ends(c.match) {
				t.Fatalf("not refused or not ended: %v", r)
			}
			if r := v.Refuses(&Bearer{IssuedAt: epoch}); r != nil {
				t.Fatalf("a bearer of nothing is refused by %s", r.Scope)
			}
			// Another one of the same scope stands by itself.
			v = mustFold(t, p, s.revoked("b", c.match), s.undone("a"))
			if r := v.Refuses(job(epoch.Add(time.Hour))); r == nil || r.ID != "b" {
				t.Fatalf("undoing one of two lifted both: %v", r)
			}
			undo := s.undone("b")
			v = mustFold(t, p, undo)
			for _, at := range []struct {
				issued  time.Time
				refused bool
			}{
				{epoch, true}, {undo.Time, true}, {undo.Time.Add(identity.Leeway), true}, {undo.Time.Add(identity.Leeway + time.Second), false},
			} {
				r := v.Refuses(job(at.issued))
				if (r != nil) != at.refused || (r != nil && (r.ID != "b" || r.Undone.IsZero())) {
					t.Errorf("issued %v after the undoing: %v, want refused %v", at.issued.Sub(undo.Time), r, at.refused)
				}
			}
			// Revoked and lifted once more: only the last undoing counts.
			mustFold(t, p, s.revoked("c", c.match))
			v = mustFold(t, p, s.undone("c"))
			if r := v.Refuses(job(epoch.Add(identity.Leeway + time.Second))); r == nil {
				t.Error("an earlier token lives again")
			}
		})
	}
}

// Of several that match, one in force is named rather than one that was undone.
func TestWhichRevocationRefuses(t *testing.T) {
	p, s := New(slog.New(slog.DiscardHandler)), &script{t: t}
	mustFold(t, p, s.revoked("undone", event.Scope{Kind: event.ScopeSubject, Value: "ci/repo:acme/shop"}), s.undone("undone"))
	if r := p.View().Refuses(job(epoch)); r == nil || r.ID != "undone" {
		t.Fatalf("%v", r)
	}
	v := mustFold(t, p, s.revoked("group", event.Scope{Kind: event.ScopeGroup, Value: "ci"}))
	if r := v.Refuses(job(epoch)); r == nil || r.ID != "group" {
		t.Fatalf("%v", r)
	}
}

// What was stored by the first version is a revocation of a subject.
func TestRevokedVersion1(t *testing.T) {
	p, s := New(slog.New(slog.DiscardHandler)), &script{t: t}
	v := mustFold(t, p, s.event(event.TypeRevoked, "revocation/a", map[string]string{"id": "a", "subject": "ci/x", "reason": "leak"}))
	if r := v.Refuses(&Bearer{Subject: "ci/x", IssuedAt: epoch}); r == nil || r.Reason != "leak" || r.Scope.Kind != event.ScopeSubject {
		t.Fatalf("%v", r)
	}
	mustFold(t, p, s.event(event.TypeRevocationReport, "revocation/a", event.RevocationReport{ID: "a", Nodes: []event.NodeReported{{Node: "n1", State: "confirmed"}}}))
	if r := p.View().Revocations.Get("a"); r.Report == nil || !slices.Equal(slices.Collect(p.View().Unfenced(0)), []*Revocation{r}) {
		t.Fatalf("%+v", r)
	}
}

func TestNodeRevoked(t *testing.T) {
	p, s := New(slog.New(slog.DiscardHandler)), &script{t: t}
	mustFold(t, p, s.revoked("a", event.Scope{Kind: event.ScopeNode, Value: "n2"}))
	if p.View().NodeRevoked("n2") == nil || p.View().NodeRevoked("n1") != nil || p.View().NodeRevoked("") != nil {
		t.Fatal("the wrong node is revoked")
	}
	// The API refuses to undo it; should an event say so all the same, the key stays dead.
	mustFold(t, p, s.undone("a"))
	if p.View().NodeRevoked("n2") == nil {
		t.Fatal("a node's key lives again")
	}
}

func TestUnfenced(t *testing.T) {
	p, s := New(slog.New(slog.DiscardHandler)), &script{t: t}
	mustFold(t, p, s.revoked("a", event.Scope{Kind: event.ScopeSession, Value: "x"}), s.revoked("b", event.Scope{Kind: event.ScopeSession, Value: "y"}))
	before := p.View()
	v := mustFold(t, p, s.event(event.TypeRevocationFenced, "revocation/a", event.RevocationFenced{ID: "a", Nodes: []event.NodeFenced{{Node: "n1", State: event.FenceConfirmed}}}))
	if !slices.Equal(unfencedIDs(v), []string{"b"}) || v.Revocations.Get("a").Fenced == nil || !slices.Equal(unfencedIDs(before), []string{"a", "b"}) {
		t.Fatalf("unfenced %v, before %v", unfencedIDs(v), unfencedIDs(before))
	}
	// An undoing does not make it unnecessary to stop what was revoked.
	if v = mustFold(t, p, s.undone("b")); !slices.Equal(unfencedIDs(v), []string{"b"}) || v.Revocations.Get("b").Undone.IsZero() {
		t.Fatalf("unfenced %v", unfencedIDs(v))
	}
	if r := v.Refuses(&Bearer{Session: "x"}); r == nil || r.Fenced == nil {
		t.Fatalf("the index knows another revocation than the list: %+v", r)
	}
}

// A node that has not folded a stricter configuration yet may let sessions run
// on for as long as the earlier one allowed.
func TestLargestTolerance(t *testing.T) {
	p, s := New(slog.New(slog.DiscardHandler)), &script{t: t}
	apply := func(mode string) uint64 {
		rule := `permit (principal, action in [Action::"admin:apply", Action::"approve"], resource); @revocation("` + mode + `") permit (principal, action == Action::"connect", resource);`
		v := mustFold(t, p, s.event(event.TypeConfigApplied, "config", event.ConfigApplied{Files: []event.ConfigFile{{Path: "x.cedar", Data: []byte(rule)}}}))
		_ = v
		return v.ConfigIndex
	}
	minutes := func(n int) policy.Tolerance { return policy.Tolerance(time.Duration(n) * time.Minute) }
	check := func(index uint64, want policy.Tolerance) {
		t.Helper()
		if got := p.View().LargestTolerance(index); got != want {
			t.Errorf("from %d on: %v, want %v", index, got, want)
		}
	}
	if apply("strict"); p.View().ConfigErr != nil {
		t.Fatal(p.View().ConfigErr)
	}
	check(0, policy.Strict)
	a := apply("bounded(5m)")
	b := apply("bounded(2m)")
	c := apply("strict")
	check(0, minutes(5))
	check(a, minutes(5))
	check(b-1, minutes(5))
	check(b, minutes(2))
	check(c, policy.Strict)
	check(c+100, policy.Strict)
	d := apply("bounded(3m)")
	check(b, minutes(3))
	check(d, minutes(3))
	check(a, minutes(5))
	apply("best_effort")
	check(0, policy.BestEffort)
}

func unfencedIDs(v *View) (ids []string) {
	for r := range v.Unfenced(0) {
		ids = append(ids, r.ID)
	}
	return ids
}

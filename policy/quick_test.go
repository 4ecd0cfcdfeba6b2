package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"pgregory.net/rapid"
)

// TestQuick compares Decide with an evaluator that has no index, no cache and
// no shared entities, over random rules and requests.
func TestQuick(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := drawRules(t)
		set, problems := Compile([]File{{"p.cedar", []byte(text)}})
		if set == nil {
			t.Fatalf("%v\n%s", problems, text)
		}
		for range 8 {
			r := drawRequest(t)
			got := set.Decide(r)
			effect, rule, approval := dumb(set, r)
			if got.Effect != effect || got.Rule != rule {
				t.Fatalf("got %v by %q (%s), want %v by %q\n%s\n%+v %+v", got.Effect, got.Rule, got.Reason, effect, rule, text, r.Subject, r)
			}
			if a := got.Obligations.Approval; fmt.Sprint(approval) != fmt.Sprint(a) {
				t.Fatalf("approval %+v, want %+v\n%s", a, approval, text)
			}
		}
	})
}

var (
	quickGroups  = []string{"a", "b", "c"}
	quickActions = []string{`action`, `action == Action::"postgres:select"`, `action in Action::"postgres:read"`, `action in Action::"postgres"`,
		`action in [Action::"postgres:write", Action::"postgres:select"]`, `action == Action::"postgres:insert"`}
	quickPrincipals = []string{`principal`, `principal is User`, `principal in Group::"a"`, `principal in Group::"b"`, `principal is Workload in Group::"c"`,
		`principal == User::"p/x"`, `principal in Workload::"p/x"`}
	quickResources = []string{`resource`, `resource in Target::"t1"`, `resource in Schema::"t1/d/s"`, `resource == Table::"t1/d/s/x"`, `resource is Table`,
		`resource in Cluster::"sallyport"`, `resource is Column in Table::"t1/d/s/x"`}
	quickConditions = []string{``, `when { context.client.isInRange(ip("10.0.0.0/8")) }`, `unless { context.inTransaction }`,
		`when { principal.claims has n && principal.claims.n * 2 > 4 }`, `when { resource is Table && resource.table == "x" }`,
		`when { principal.groups.contains("b") }`, `when { action in Action::"postgres:write" }`, `when { resource in Table::"t1/d/s/x" || principal in Group::"c" }`}
	quickNotes = []string{"", "", `@approval("dba") `, `@approval("ops") @approvals("2") @expires("1m") `, `@approval("dba") @hold_in_transaction("20s") `}
)

func drawRules(t *rapid.T) string {
	var b strings.Builder
	for i := range rapid.IntRange(1, 12).Draw(t, "rules") {
		pick := func(from []string) string { return rapid.SampledFrom(from).Draw(t, "part") }
		fmt.Fprintf(&b, `@id("r%02d") `, i)
		if rapid.Bool().Draw(t, "permit") {
			b.WriteString("permit")
		} else {
			b.WriteString(pick(quickNotes) + "forbid")
		}
		fmt.Fprintf(&b, "(%s, %s, %s) %s;\n", pick(quickPrincipals), pick(quickActions), pick(quickResources), pick(quickConditions))
	}
	// One rule that is always valid keeps sets that say nothing out of the way.
	b.WriteString(`@id("base") permit(principal in Group::"a", action in Action::"postgres:read", resource in Target::"t1");`)
	return strings.ReplaceAll(b.String(), `resource is Column in Table::"t1/d/s/x") when { resource is Table`, `resource) when { resource is Table`)
}

func drawRequest(t *rapid.T) *Request {
	s := &Subject{Kind: rapid.SampledFrom([]SubjectKind{User, Workload}).Draw(t, "kind"), Provider: "p",
		Name: rapid.SampledFrom([]string{"x", "y"}).Draw(t, "name"), ExpiresAt: time.Unix(2e9, 0)}
	for _, g := range quickGroups {
		if rapid.Bool().Draw(t, g) {
			s.Groups = append(s.Groups, g)
		}
	}
	switch rapid.IntRange(0, 3).Draw(t, "n") {
	case 1:
		s.Claims = map[string]any{"n": int64(1)}
	case 2:
		s.Claims = map[string]any{"n": 3.0}
	case 3:
		s.Claims = map[string]any{"n": "three"} // fails when it is multiplied
	}
	r := &Request{Subject: s}
	r.Context.ClientAddr = rapid.SampledFrom([]string{"10.0.0.1", "::ffff:10.0.0.1", "192.0.2.1", "192.0.2.1", ""}).Draw(t, "client")
	r.Context.InTransaction = rapid.Bool().Draw(t, "tx")
	for i := range 12 {
		if rapid.IntRange(0, 2).Draw(t, "approved") == 0 {
			r.Context.Approved = append(r.Context.Approved, fmt.Sprintf("r%02d", i))
		}
	}
	for range rapid.IntRange(1, 3).Draw(t, "pairs") {
		action := rapid.SampledFrom([]Action{PostgresSelect, PostgresInsert, PostgresUpdate}).Draw(t, "action")
		path := []string{rapid.SampledFrom([]string{"t1", "t2"}).Draw(t, "target"), "d", "s", rapid.SampledFrom([]string{"x", "y"}).Draw(t, "table")}
		res := Resource{Table, path}
		if rapid.IntRange(0, 3).Draw(t, "column") == 0 {
			res = Resource{Column, append(slices.Clone(path), "c")}
		}
		r.Pairs = append(r.Pairs, Pair{action, res})
	}
	return r
}

// dumb judges each pair against each rule by itself.
func dumb(set *Set, r *Request) (Effect, string, *Approval) {
	world := cedar.EntityMap{}
	for uid, e := range actionEntities {
		world[uid] = e
	}
	p := newPrincipal(r.Subject)
	world[p.entity.UID] = p.entity
	rule := ""
	var pending []*rulePair
	for _, pair := range r.Pairs {
		// The chain of entities with one parent each, as the schema has it.
		for i := range pair.Resource.Path {
			res := Resource{pathTypes[i+1], pair.Resource.Path[:i+1]}
			e := newResource(res)
			parent := newResource(Resource{pathTypes[i], pair.Resource.Path[:i]})
			world[e.UID] = cedar.Entity{UID: e.UID, Attributes: e.Attributes, Parents: cedar.NewEntityUIDSet(parent.UID)}
		}
		req := cedar.Request{Principal: p.entity.UID, Action: actionUID(string(pair.Action)),
			Resource: cedar.NewEntityUID(cedar.EntityType(pair.Resource.Type), types.String(pair.Resource.ID())), Context: contextRecord(&r.Context)}
		var permit, forbid *ruleInfo
		failed := false
		var holds []*rulePair
		for _, rule := range set.rules {
			one := cedar.NewPolicySet()
			one.Add("p", rule.policy)
			_, diag := cedar.Authorize(one, world, req)
			matched := len(diag.Reasons) > 0
			switch {
			case len(diag.Errors) > 0:
				failed = failed || !rule.permit
			case matched && rule.permit && permit == nil:
				permit = &ruleInfo{rule.id}
			case matched && !rule.permit && rule.approval == nil && forbid == nil:
				forbid = &ruleInfo{rule.id}
			case matched && rule.approval != nil && !slices.Contains(r.Context.Approved, rule.id):
				holds = append(holds, &rulePair{rule.id, rule.approval})
			}
		}
		switch {
		case failed:
			return Refuse, RulePolicyError, nil
		case forbid != nil:
			return Refuse, forbid.id, nil
		case permit == nil:
			return Refuse, RuleDefaultDeny, nil
		}
		if rule == "" {
			rule = permit.id
		}
		pending = append(pending, holds...)
	}
	if len(pending) == 0 {
		return Permit, rule, nil
	}
	a := &Approval{Count: 0, Expires: time.Hour * 1000, InTransaction: time.Hour * 1000}
	first := pending[0].id
	for _, h := range pending {
		first = min(first, h.id)
		a.Rules = append(a.Rules, h.id)
		a.Groups = append(a.Groups, h.approval.Groups...)
		a.Count = max(a.Count, h.approval.Count)
		a.Expires = min(a.Expires, h.approval.Expires)
		a.InTransaction = min(a.InTransaction, h.approval.InTransaction)
	}
	slices.Sort(a.Rules)
	slices.Sort(a.Groups)
	a.Rules, a.Groups = slices.Compact(a.Rules), slices.Compact(a.Groups)
	return Hold, first, a
}

type ruleInfo struct{ id string }

type rulePair struct {
	id       string
	approval *Approval
}

// FuzzPolicy: whatever the text, Compile neither panics nor returns a set with
// problems, and what it compiles can decide.
func FuzzPolicy(f *testing.F) {
	f.Add(`permit(principal, action, resource);`)
	f.Add(`@id("a") @approval("dba") @expires("5m") forbid(principal in Group::"a", action in Action::"postgres", resource in Target::"t") unless { context.inTransaction };`)
	f.Add(`permit(principal, action, resource) when { principal.claims has x && principal.claims.x like "a*" }; /* ; */ // ;`)
	f.Add("permit(principal, action, resource) when { if true then [1,2].contains(1) else {a: \"\\u{41}\"}.a == \"A\" };")
	request := &Request{
		Subject: &Subject{Kind: User, Provider: "p", Name: "n", Groups: []string{"a"}, Claims: map[string]any{"x": "abc"}},
		Pairs:   []Pair{{PostgresSelect, Resource{Table, []string{"t", "d", "s", "x"}}}, {StatusRead, Resource{Type: Cluster}}},
	}
	f.Fuzz(func(t *testing.T, text string) {
		set, problems := Compile([]File{{"p.cedar", []byte(text)}})
		if (set == nil) == (len(problems) == 0) {
			t.Fatalf("set %v, problems %v", set, problems)
		}
		for _, p := range problems {
			if p.Line < 0 || p.Line > strings.Count(text, "\n")+1 {
				t.Fatalf("line %d of %d: %s", p.Line, strings.Count(text, "\n")+1, p)
			}
		}
		if set != nil {
			if d := set.Decide(request); d.Rule == "" || d.Reason == "" {
				t.Fatalf("%+v", d)
			}
		}
	})
}

// BenchmarkDecide: 50 rules, a statement of three pairs. The allocations are
// Cedar's lists of reasons, the iterators and, where a rule asks for it, the context.
func BenchmarkDecide(b *testing.B) {
	for _, rules := range []int{50, 1000} {
		var text strings.Builder
		text.WriteString(`permit(principal in Group::"devs", action in Action::"postgres:read", resource in Target::"prod");`)
		for i := range rules - 3 {
			fmt.Fprintf(&text, `permit(principal in Group::"g%d", action in Action::"postgres:write", resource in Schema::"prod/shop/s%d") when { principal.claims has ref && principal.claims.ref == "refs/heads/main" };`, i, i%7)
		}
		text.WriteString(`forbid(principal, action in Action::"postgres:ddl", resource); forbid(principal is Workload, action, resource in Table::"prod/shop/public/secrets");`)
		set := mustCompile(b, text.String())
		r := &Request{
			Subject: &Subject{Kind: Workload, Provider: "ci", Name: "job", Groups: []string{"devs", "g1", "g2"}, Claims: map[string]any{"ref": "refs/heads/main", "repository": "acme/shop"}},
			Context: Context{Now: time.Unix(1e9, 0), ClientAddr: "10.0.0.1", Database: "shop"},
		}
		for _, table := range []string{"users", "orders", "items"} {
			r.Pairs = append(r.Pairs, Pair{PostgresSelect, Resource{Table, []string{"prod", "shop", "public", table}}})
		}
		b.Run(fmt.Sprint(rules, "rules"), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if d := set.Decide(r); d.Effect != Permit {
					b.Fatal(d)
				}
			}
		})
	}
}

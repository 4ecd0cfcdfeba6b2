package policy

import (
	"fmt"
	"regexp"
	"slices"
	"sort"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
)

// This file is the only one that uses Cedar's experimental packages: the
// syntax tree, the schema and the validator.

// scope is what a rule's scope says about action and principal.
type scope struct {
	principal *cedar.EntityUID // nil: anyone, or anyone of a type
	anyAction bool
	actions   []string // names of actions or action groups
	exact     bool     // `action == X`: X's members are not meant
}

func (s *scope) coversAction(info *ActionInfo) bool {
	if s.anyAction || slices.Contains(s.actions, string(info.Name)) {
		return true
	}
	return !s.exact && slices.ContainsFunc(info.Groups, func(g string) bool { return slices.Contains(s.actions, g) })
}

// uses says which parts of the request a rule's conditions read.
type uses uint8

const (
	usesContext uses = 1 << iota
	usesTime
)

// inspect reads scope and conditions of r's syntax tree, and says what the
// validator would not say well.
func (r *rule) inspect(st statement) (problems []Problem) {
	tree := (*ast.Policy)(r.policy.AST())
	r.scope.principal = scopeEntity(tree.Principal)
	for _, uid := range []*cedar.EntityUID{r.scope.principal, scopeEntity(tree.Resource)} {
		if uid != nil {
			r.names = append(r.names, *uid)
		}
	}
	switch a := tree.Action.(type) {
	case ast.ScopeTypeEq:
		r.scope.actions, r.scope.exact = []string{string(a.Entity.ID)}, true
	case ast.ScopeTypeIn:
		r.scope.actions = []string{string(a.Entity.ID)}
	case ast.ScopeTypeInSet:
		for _, uid := range a.Entities {
			r.scope.actions = append(r.scope.actions, string(uid.ID))
		}
	default:
		r.scope.anyAction = true
	}
	r.text = st
	r.claims = map[string]claimType{}
	note := func(name string, t claimType) {
		old, seen := r.claims[name]
		if seen && old != t && old != claimUnknown && t != claimUnknown {
			problems = append(problems, r.problem(fmt.Sprintf("claim `%s` is used as %s here and as %s there", name, old, t)))
			return
		}
		if !seen || old == claimUnknown {
			r.claims[name] = t
		}
	}
	for _, cond := range tree.Conditions {
		if name, ok := claimOf(cond.Body); ok {
			note(name, claimBool)
		}
		ast.Inspect(ast.NewNode(cond.Body), func(n ast.IsNode) bool {
			switch n := n.(type) {
			case ast.NodeValue:
				if uid, ok := n.Value.(cedar.EntityUID); ok {
					r.names = append(r.names, uid)
				}
			case ast.NodeTypeVariable:
				if n.Name == "context" {
					r.uses |= usesContext
				}
			case ast.NodeTypeAccess:
				if isContext(n.Arg) && n.Value == "now" {
					r.uses |= usesTime
				}
				if isContext(n.Arg) && n.Value == "approved" {
					problems = append(problems, r.problem("there is no `context.approved`: leave the condition out, @approval(\"group\") on the forbid rule says it all"))
				}
			case ast.NodeTypeHas:
				if isContext(n.Arg) && n.Value == "approved" {
					problems = append(problems, r.problem("there is no `context.approved`: leave the condition out, @approval(\"group\") on the forbid rule says it all"))
				}
			}
			if timeAgainstNumber(n) {
				problems = append(problems, r.problem("a time is compared with a number; write datetime(\"2026-06-01\") or datetime(\"2026-06-01T08:00:00Z\")"))
			}
			noteClaims(n, note)
			return true
		})
	}
	return problems
}

// timeAgainstNumber finds `context.now < 3`, which the validator lets pass: it
// would fail whenever it is evaluated.
func timeAgainstNumber(n ast.IsNode) bool {
	var sides ast.BinaryNode
	switch n := n.(type) {
	case ast.NodeTypeLessThan:
		sides = n.BinaryNode
	case ast.NodeTypeLessThanOrEqual:
		sides = n.BinaryNode
	case ast.NodeTypeGreaterThan:
		sides = n.BinaryNode
	case ast.NodeTypeGreaterThanOrEqual:
		sides = n.BinaryNode
	default:
		return false
	}
	isTime := func(n ast.IsNode) bool {
		a, ok := n.(ast.NodeTypeAccess)
		return ok && (isContext(a.Arg) && a.Value == "now" || a.Value == "expires" && !isClaims(a.Arg))
	}
	return isTime(sides.Left) && typeOfLiteral(sides.Right) == claimLong || isTime(sides.Right) && typeOfLiteral(sides.Left) == claimLong
}

// scopeEntity is the entity that the scope of a principal or resource names.
func scopeEntity(n ast.IsScopeNode) *cedar.EntityUID {
	switch n := n.(type) {
	case ast.ScopeTypeEq:
		return &n.Entity
	case ast.ScopeTypeIn:
		return &n.Entity
	case ast.ScopeTypeIsIn:
		return &n.Entity
	}
	return nil
}

// claimType is the type that rules take a claim to have, found from how they
// use it: a token's claims have no declared types.
type claimType string

const (
	claimUnknown claimType = ""
	claimString  claimType = "String"
	claimLong    claimType = "Long"
	claimBool    claimType = "Bool"
	claimSet     claimType = "Set<String>"
)

// claimOf says whether n is principal.claims.NAME.
func claimOf(n ast.IsNode) (string, bool) {
	a, ok := n.(ast.NodeTypeAccess)
	if !ok || !isClaims(a.Arg) {
		return "", false
	}
	return string(a.Value), true
}

func isClaims(n ast.IsNode) bool {
	a, ok := n.(ast.NodeTypeAccess)
	if !ok || a.Value != "claims" {
		return false
	}
	v, ok := a.Arg.(ast.NodeTypeVariable)
	return ok && v.Name == "principal"
}

func isContext(n ast.IsNode) bool {
	v, ok := n.(ast.NodeTypeVariable)
	return ok && v.Name == "context"
}

// noteClaims reports the claims that are operands of n with the type that n
// asks of them.
func noteClaims(n ast.IsNode, note func(string, claimType)) {
	one := func(operand ast.IsNode, t claimType) {
		if name, ok := claimOf(operand); ok {
			note(name, t)
		}
	}
	switch n := n.(type) {
	case ast.NodeTypeHas:
		if isClaims(n.Arg) {
			note(string(n.Value), claimUnknown)
		}
	case ast.NodeTypeAccess:
		one(n, claimUnknown)
	case ast.NodeTypeLike:
		one(n.Arg, claimString)
	case ast.NodeTypeEquals:
		one(n.Left, typeOfLiteral(n.Right))
		one(n.Right, typeOfLiteral(n.Left))
	case ast.NodeTypeNotEquals:
		one(n.Left, typeOfLiteral(n.Right))
		one(n.Right, typeOfLiteral(n.Left))
	case ast.NodeTypeContains:
		one(n.Left, claimSet)
		one(n.Right, claimString)
	case ast.NodeTypeContainsAll:
		one(n.Left, claimSet)
		one(n.Right, claimSet)
	case ast.NodeTypeContainsAny:
		one(n.Left, claimSet)
		one(n.Right, claimSet)
	case ast.NodeTypeIsEmpty:
		one(n.Arg, claimSet)
	case ast.NodeTypeLessThan:
		one(n.Left, claimLong)
		one(n.Right, claimLong)
	case ast.NodeTypeLessThanOrEqual:
		one(n.Left, claimLong)
		one(n.Right, claimLong)
	case ast.NodeTypeGreaterThan:
		one(n.Left, claimLong)
		one(n.Right, claimLong)
	case ast.NodeTypeGreaterThanOrEqual:
		one(n.Left, claimLong)
		one(n.Right, claimLong)
	case ast.NodeTypeAdd:
		one(n.Left, claimLong)
		one(n.Right, claimLong)
	case ast.NodeTypeSub:
		one(n.Left, claimLong)
		one(n.Right, claimLong)
	case ast.NodeTypeMult:
		one(n.Left, claimLong)
		one(n.Right, claimLong)
	case ast.NodeTypeNegate:
		one(n.Arg, claimLong)
	case ast.NodeTypeNot:
		one(n.Arg, claimBool)
	case ast.NodeTypeAnd:
		one(n.Left, claimBool)
		one(n.Right, claimBool)
	case ast.NodeTypeOr:
		one(n.Left, claimBool)
		one(n.Right, claimBool)
	case ast.NodeTypeIfThenElse:
		one(n.If, claimBool)
	}
}

func typeOfLiteral(n ast.IsNode) claimType {
	switch n := n.(type) {
	case ast.NodeTypeSet:
		return claimSet
	case ast.NodeValue:
		switch n.Value.(type) {
		case types.String:
			return claimString
		case types.Long:
			return claimLong
		case types.Boolean:
			return claimBool
		case types.Set:
			return claimSet
		}
	}
	return claimUnknown
}

// validateRules checks rules against the schema, with the claims that they
// read as optional attributes.
func validateRules(rules []*rule) (mentions []Mention, problems []Problem) {
	claims := map[string]claimType{}
	first := map[string]*rule{}
	for _, r := range rules {
		names := make([]string, 0, len(r.claims))
		for name := range r.claims {
			names = append(names, name)
		}
		sort.Strings(names)
		for _, name := range names {
			t, old := r.claims[name], claims[name]
			mentions = append(mentions, Mention{MentionClaim, name, r.path, r.lineOf(name)})
			switch {
			case old == claimUnknown:
				claims[name] = t
				if t != claimUnknown {
					first[name] = r
				}
			case t != claimUnknown && t != old:
				problems = append(problems, r.problem(fmt.Sprintf("claim `%s` is used as %s here and as %s by rule %s", name, t, old, first[name].id)))
			}
		}
		mentions = append(mentions, r.mentions()...)
	}

	var parsed schema.Schema
	if err := parsed.UnmarshalCedar([]byte(schemaText(claims))); err != nil {
		return nil, []Problem{{Message: "the schema cannot be read: " + err.Error()}}
	}
	resolved, err := parsed.Resolve()
	if err != nil {
		return nil, []Problem{{Message: "the schema cannot be resolved: " + err.Error()}}
	}
	validator := validate.New(resolved)
	for _, r := range rules {
		if r.faulty {
			continue // what it says of a rule that is known to be wrong is noise
		}
		err := validator.Policy("", (*ast.Policy)(r.policy.AST()))
		if err == nil {
			continue
		}
		for _, msg := range r.explain(flatten(err)) {
			problems = append(problems, r.problem(msg))
		}
	}
	return mentions, problems
}

func flatten(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var out []error
		for _, e := range joined.Unwrap() {
			out = append(out, flatten(e)...)
		}
		return out
	}
	return []error{err}
}

var (
	noAttribute = regexp.MustCompile("^attribute `([^`]+)` on entity type `([^`]+)` not found")
	noContext   = regexp.MustCompile("^attribute `([^`]+)` in context for .* not found")
	mayLack     = regexp.MustCompile("optional attribute `claims\\.?([^`]+)`")
)

// explain words what the validator found for those who write rules: one line
// for each mistake, though the validator repeats it for every action and type
// that the rule can meet, in an order that is not fixed.
func (r *rule) explain(errs []error) []string {
	var out []string
	lacking := map[string][]string{} // attribute -> types
	known := true
	for _, err := range errs {
		msg := err.Error()
		known = known && !strings.HasPrefix(msg, "unrecognized")
		if m := noAttribute.FindStringSubmatch(msg); m != nil {
			lacking[m[1]] = union(lacking[m[1]], []string{m[2]})
		} else if m := noContext.FindStringSubmatch(msg); m != nil {
			out = append(out, fmt.Sprintf("there is no `context.%s`; the context has now, profile, database, client, protocol and inTransaction", m[1]))
		} else if m := mayLack.FindStringSubmatch(msg); m != nil {
			out = append(out, fmt.Sprintf("claim `%s` may be missing from a token: ask `principal.claims has ...` before reading it", m[1]))
		} else if !strings.HasPrefix(msg, "unable to find an applicable action") {
			out = append(out, msg)
		}
	}
	for attr, types := range lacking {
		out = append(out, fmt.Sprintf("attribute `%s` does not exist on %s, which the rule can meet; is it misspelt, or should the rule ask for a type first, as in `resource is Table`?", attr, strings.Join(types, ", ")))
	}
	if len(out) == 0 && known {
		msg := "no action that the rule names is ever asked about such a principal and resource"
		if r.scope.exact && groupDescriptions[r.scope.actions[0]] != "" {
			msg = fmt.Sprintf("`%s` is a group of actions: write `action in`, not `action ==`", r.scope.actions[0])
		}
		out = append(out, msg)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

var quoted = regexp.MustCompile("`([^`]+)`")

// problem places a message of the validator: the tree has no positions inside
// a rule, but the words between backticks are mostly those of the text.
func (r *rule) problem(msg string) Problem {
	p := Problem{Path: r.path, Line: r.line, Message: "rule " + r.id + ": " + msg}
	for _, m := range quoted.FindAllStringSubmatch(msg, -1) {
		if line := r.lineOf(m[1]); line != r.line || strings.Contains(r.text.text, m[1]) {
			p.Line = line
			break
		}
	}
	return p
}

// mentions lists the targets and providers that r names in entity ids.
func (r *rule) mentions() []Mention {
	var out []Mention
	for _, uid := range r.names {
		m := Mention{Path: r.path, Line: r.lineOf(string(uid.ID))}
		id := string(uid.ID)
		switch ResourceType(uid.Type) {
		case Target, Database, Schema, Table, Column, Function:
			m.Kind = MentionTarget
			m.Name, _, _ = strings.Cut(id, "/")
		case ResourceType(Workload), ResourceType(User):
			m.Kind = MentionProvider
			m.Name, _, _ = strings.Cut(id, "/")
		default:
			continue
		}
		if !slices.ContainsFunc(out, func(o Mention) bool { return o.Kind == m.Kind && o.Name == m.Name }) {
			out = append(out, m)
		}
	}
	return out
}

// lineOf is the line where word first stands in the rule's text, else the
// line where the rule begins.
func (r *rule) lineOf(word string) int {
	body := r.body()
	i := strings.Index(body, word)
	if i < 0 {
		return r.line
	}
	return r.line + strings.Count(body[:i], "\n")
}

// body is r's text from the line on which it begins.
func (r *rule) body() string {
	text := r.text.text
	for n := r.text.line; n < r.line; n++ {
		_, text, _ = strings.Cut(text, "\n")
	}
	return text
}

// SchemaText is the Cedar schema that policies are checked against, as text. The
// claims in it are examples: any claim that an identity provider passes on may
// be read.
func SchemaText() string {
	return schemaText(map[string]claimType{
		"repository": claimString, "repository_owner": claimString, "ref": claimString, "sha": claimString,
		"environment": claimString, "actor": claimString, "email": claimString, "groups": claimSet, "email_verified": claimBool,
	})
}

func schemaText(claims map[string]claimType) string {
	var b strings.Builder
	b.WriteString("// Claims that identity providers pass on. All are optional: ask with `has` first.\ntype Claims = {\n")
	names := make([]string, 0, len(claims))
	for name := range claims {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		t := claims[name]
		if t == claimUnknown {
			t = claimString
		}
		fmt.Fprintf(&b, "  %s?: %s,\n", types.String(name).MarshalCedar(), t)
	}
	b.WriteString(`};

entity Group;
entity Workload, User in [Group] {
  provider: String,     // name of the identity provider in the configuration
  issuer: String,       // the token's iss
  name: String,         // the token's sub
  groups: Set<String>,
  claims: Claims,
  expires: datetime,
};

entity Cluster;
entity Target in [Cluster] { name: String, target: String };
entity Database in [Target] { name: String, target: String, database: String };
entity Schema in [Database] { name: String, target: String, database: String, schema: String };
entity Table in [Schema] { name: String, target: String, database: String, schema: String, table: String };
entity Function in [Schema] { name: String, target: String, database: String, schema: String, function: String };
entity Column in [Table] { name: String, target: String, database: String, schema: String, table: String, column: String };

type Context = {
  now: datetime,
  profile: String,        // the target profile named at login, "" for none
  database: String,
  client: ipaddr,         // address of the caller
  protocol: String,       // "postgres", "api"
  inTransaction: Bool,    // a transaction block is open
};

`)
	groups := make([]string, 0, len(groupDescriptions))
	parents := map[string]string{}
	for name := range groupDescriptions {
		groups = append(groups, name)
	}
	for _, info := range catalogue {
		for i := 1; i < len(info.Groups); i++ {
			parents[info.Groups[i-1]] = info.Groups[i]
		}
	}
	sort.Strings(groups)
	for _, g := range groups {
		fmt.Fprintf(&b, "// %s\naction %q", groupDescriptions[g], g)
		if p := parents[g]; p != "" {
			fmt.Fprintf(&b, " in [%q]", p)
		}
		b.WriteString(";\n")
	}
	b.WriteByte('\n')
	for _, info := range catalogue {
		fmt.Fprintf(&b, "// %s\naction %q", info.Description, info.Name)
		if len(info.Groups) > 0 {
			fmt.Fprintf(&b, " in [%q]", info.Groups[0])
		}
		resources := make([]string, len(info.Resources))
		for i, r := range info.Resources {
			resources[i] = string(r)
		}
		fmt.Fprintf(&b, " appliesTo { principal: [Workload, User], resource: [%s], context: Context };\n", strings.Join(resources, ", "))
	}
	return b.String()
}

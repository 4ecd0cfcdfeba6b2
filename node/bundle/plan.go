package bundle

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sallyport/sallyport/policy"
)

// Change is one line of a plan.
type Change struct {
	Op       byte   // '+' comes, '-' goes, '~' changes
	Object   string // "target prod-db", "rule no-drop", "file policies/a.cedar"
	Field    string // "" for the object as a whole
	Old, New string
}

// String is the line: "~ target prod-db: maxSession: 1h0m0s -> 30m0s".
func (c Change) String() string {
	s := string(c.Op) + " " + c.Object
	if c.Field != "" {
		s += ": " + c.Field
	}
	switch {
	case c.Old != "" && c.New != "":
		s += ": " + c.Old + " -> " + c.New
	case c.Old+c.New != "":
		s += ": " + c.Old + c.New
	}
	return s
}

// Plan says how b differs from a; a may be nil. It is empty exactly when both
// hold the same files.
func Plan(a, b *Bundle) []Change {
	if a == nil {
		a = &Bundle{}
	}
	if a.Digest == b.Digest {
		return nil
	}
	var out []Change
	out = append(out, planObjects("target ", describeAll(a.Targets, (*Target).describe), describeAll(b.Targets, (*Target).describe))...)
	out = append(out, planObjects("identity provider ", describeAll(a.Providers, (*Provider).describe), describeAll(b.Providers, (*Provider).describe))...)
	out = append(out, planRules(a.Policies, b.Policies)...)
	return append(out, planFiles(a, b, len(out) > 0)...)
}

// field is a line of an object's description; names are unique within it.
type field struct{ name, value string }

func describeAll[T any](objects map[string]T, describe func(T) []field) map[string][]field {
	out := make(map[string][]field, len(objects))
	for name, o := range objects {
		out[name] = describe(o)
	}
	return out
}

func planObjects(kind string, a, b map[string][]field) (out []Change) {
	names := sortedKeys(a)
	for _, name := range sortedKeys(b) {
		if a[name] == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		object := kind + name
		switch {
		case a[name] == nil:
			out = append(out, Change{Op: '+', Object: object})
			out = append(out, planFields(object, nil, b[name])...)
		case b[name] == nil:
			out = append(out, Change{Op: '-', Object: object})
		default:
			out = append(out, planFields(object, a[name], b[name])...)
		}
	}
	return out
}

func planFields(object string, a, b []field) (out []Change) {
	find := func(in []field, name string) (string, bool) {
		i := slices.IndexFunc(in, func(f field) bool { return f.name == name })
		if i < 0 {
			return "", false
		}
		return in[i].value, true
	}
	for _, f := range a {
		if _, ok := find(b, f.name); !ok {
			out = append(out, Change{Op: '-', Object: object, Field: f.name, Old: f.value})
		}
	}
	for _, f := range b {
		old, ok := find(a, f.name)
		if !ok {
			out = append(out, Change{Op: '+', Object: object, Field: f.name, New: f.value})
		} else if old != f.value {
			out = append(out, Change{Op: '~', Object: object, Field: f.name, Old: old, New: f.value})
		}
	}
	return out
}

// fields collects a description, leaving out what is empty.
type fields []field

func (fs *fields) add(name, value string) {
	if value != "" {
		*fs = append(*fs, field{name, value})
	}
}

func (fs *fields) list(name string, values []string) { fs.add(name, strings.Join(values, ", ")) }

func (fs *fields) time(name string, d time.Duration) {
	if d != 0 {
		fs.add(name, d.String())
	}
}

func (fs *fields) flag(name string, v bool) {
	if v {
		fs.add(name, "true")
	}
}

func (t *Target) describe() []field {
	var out fields
	out.add("protocol", t.Protocol)
	out.add("address", t.Address)
	out.flag("dev", t.Dev)
	out.add("tls.mode", string(t.TLS.Mode))
	out.add("tls.caFile", caText(t.TLS.CAFile, t.TLS.CA))
	out.add("tls.serverName", t.TLS.ServerName)
	out.add("admin.user", t.Admin.User)
	out.add("admin.database", t.Admin.Database)
	if t.Admin.keep {
		out.add("admin.password", "(kept)")
	} else {
		out.add("admin.password", "(given)")
	}
	out.list("databases", t.Databases)
	out.list("searchPath", t.SearchPath)
	for i, r := range t.Roles {
		who := "groups " + strings.Join(r.Groups, ", ")
		if r.Profile != "" {
			who += " with profile " + r.Profile
		}
		out.add(fmt.Sprintf("roles %d", i+1), who+" as "+r.Role)
	}
	out.list("nodes", t.Nodes)
	out.time("maxSession", t.MaxSession)
	for _, s := range t.Sensitive {
		out.add("sensitive "+strings.Join([]string{s.Database, s.Schema, s.Table, s.Column}, "."), string(s.Mask))
	}
	for _, k := range sortedKeys(t.Labels) {
		out.add("label "+k, t.Labels[k])
	}
	return out
}

func (p *Provider) describe() []field {
	var out fields
	out.add("issuer", p.Issuer)
	out.add("audience", p.Audience)
	out.add("signalAudience", p.SignalAudience)
	out.add("subjects", strings.ToLower(string(p.Kind)))
	out.flag("dev", p.Dev)
	out.flag("shared", p.Shared)
	for _, claim := range sortedKeys(p.Require) {
		out.list("require "+claim, p.Require[claim])
	}
	out.add("caFile", caText(p.CAFile, p.CA))
	out.list("algorithms", p.Algorithms)
	out.list("groups", p.Groups)
	out.add("groupsClaim", p.GroupsClaim)
	for i, r := range p.GroupRules {
		var when []string
		for _, claim := range sortedKeys(r.When) {
			when = append(when, claim+" is "+strings.Join(r.When[claim], " or "))
		}
		out.add(fmt.Sprintf("groupRules %d", i+1), strings.Join(r.Groups, ", ")+" when "+strings.Join(when, " and "))
	}
	out.list("claims", p.Claims)
	out.list("personClaims", p.PersonClaims)
	return out
}

// caText names a file with the subjects of its certificates, so that another
// content under the same name shows.
func caText(name string, data []byte) string {
	if name == "" {
		return ""
	}
	certs, _ := certificates(data)
	var who []string
	for _, c := range certs {
		who = append(who, fmt.Sprintf("%q until %s", c.Subject.String(), c.NotAfter.UTC().Format(time.DateOnly)))
	}
	return name + " (" + strings.Join(who, ", ") + ")"
}

func planRules(a, b *policy.Set) (out []Change) {
	rules := func(s *policy.Set) map[string]policy.RuleInfo {
		m := map[string]policy.RuleInfo{}
		if s != nil {
			for _, r := range s.Rules() {
				m[r.ID] = r
			}
		}
		return m
	}
	was, is := rules(a), rules(b)
	for _, id := range sortedKeys(was) {
		if _, ok := is[id]; !ok {
			out = append(out, Change{Op: '-', Object: "rule " + id})
		}
	}
	for _, id := range sortedKeys(is) {
		r := is[id]
		where := fmt.Sprintf("%s:%d", r.Path, r.Line)
		if old, ok := was[id]; !ok {
			out = append(out, Change{Op: '+', Object: "rule " + id, New: where})
		} else if old.Text != r.Text {
			out = append(out, Change{Op: '~', Object: "rule " + id, New: where})
		}
	}
	return out
}

// planFiles tells of files whose change has no other line: comments, layout, a
// certificate that nothing uses, a file renamed.
func planFiles(a, b *Bundle, more bool) (out []Change) {
	was, is := map[string][]byte{}, map[string][]byte{}
	for _, f := range a.Files {
		was[f.Path] = f.Data
	}
	for _, f := range b.Files {
		is[f.Path] = f.Data
	}
	for _, name := range sortedKeys(was) {
		if _, ok := is[name]; !ok {
			out = append(out, Change{Op: '-', Object: "file " + name})
		}
	}
	for _, name := range sortedKeys(is) {
		if old, ok := was[name]; !ok {
			out = append(out, Change{Op: '+', Object: "file " + name})
		} else if !bytes.Equal(old, is[name]) {
			c := Change{Op: '~', Object: "file " + name}
			if !more {
				c.New = "comments or layout only"
			}
			out = append(out, c)
		}
	}
	return out
}

package policy

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/txtar"
)

var rewrite = flag.Bool("rewrite", false, "rewrite the expectations in testdata")

// TestDecide runs testdata/decide: archives of policy files and a script of
// requests, each followed by the decision.
func TestDecide(t *testing.T) {
	eachArchive(t, "testdata/decide/*.txt", "script", func(t *testing.T, files []File, script string) string {
		set, problems := Compile(files)
		for _, p := range problems {
			t.Fatal(p)
		}
		return runScript(t, set, script)
	})
}

// TestProblems runs testdata/problems: policy files and what is wrong with them.
func TestProblems(t *testing.T) {
	eachArchive(t, "testdata/problems/*.txt", "problems", func(t *testing.T, files []File, _ string) string {
		set, problems := Compile(files)
		if set != nil {
			t.Error("compiled")
		}
		var b strings.Builder
		for _, p := range problems {
			fmt.Fprintln(&b, p)
		}
		return b.String()
	})
}

// eachArchive runs the archives that match pattern; run gives what the section
// should hold.
func eachArchive(t *testing.T, pattern, section string, run func(t *testing.T, files []File, text string) string) {
	paths, _ := filepath.Glob(pattern)
	if len(paths) == 0 {
		t.Fatalf("nothing matches %s", pattern)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			archive, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var files []File
			at := -1
			for i, f := range archive.Files {
				if f.Name == section {
					at = i
				} else {
					files = append(files, File{f.Name, f.Data})
				}
			}
			if at < 0 {
				archive.Files = append(archive.Files, txtar.File{Name: section})
				at = len(archive.Files) - 1
			}
			want := archive.Files[at].Data
			got := []byte(run(t, files, string(want)))
			if bytes.Equal(got, want) {
				return
			}
			if !*rewrite {
				t.Fatalf("%s is now (use -rewrite if this is right):\n%s", section, got)
			}
			archive.Files[at].Data = got
			if err := os.WriteFile(path, txtar.Format(archive), 0o644); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// runScript answers the requests of a script. Its lines:
//
//	subject NAME KIND PROVIDER/SUB [groups=a,b] [CLAIM=VALUE]...
//	context [now=RFC3339] [client=IP] [profile=P] [database=D] [tx]
//	NAME ACTION TYPE PATH [+ ACTION TYPE PATH]... [approved=ID,ID]
//
// Indented lines are answers and are made anew.
func runScript(t *testing.T, set *Set, script string) string {
	subjects := map[string]*Subject{}
	context := Context{Now: time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)}
	var out strings.Builder
	for _, line := range strings.Split(strings.TrimSuffix(script, "\n"), "\n") {
		if strings.HasPrefix(line, "  ") {
			continue
		}
		out.WriteString(line + "\n")
		words := strings.Fields(line)
		switch {
		case len(words) == 0 || strings.HasPrefix(line, "#"):
		case words[0] == "subject":
			subjects[words[1]] = scriptSubject(words[2:])
		case words[0] == "context":
			context = scriptContext(t, context.Now, words[1:])
		default:
			r := &Request{Subject: subjects[words[0]], Context: context}
			if r.Subject == nil {
				t.Fatalf("no subject %q", words[0])
			}
			for words = words[1:]; len(words) >= 3; {
				r.Pairs = append(r.Pairs, Pair{Action(words[0]), scriptResource(words[1], words[2])})
				if words = words[3:]; len(words) > 0 && words[0] == "+" {
					words = words[1:]
				}
			}
			if len(words) == 1 {
				r.Context.Approved = strings.Split(strings.TrimPrefix(words[0], "approved="), ",")
			} else if len(words) != 0 {
				t.Fatalf("what is %q?", words)
			}
			out.WriteString(describe(set.Decide(r)))
		}
	}
	return out.String()
}

func describe(d Decision) string {
	s := fmt.Sprintf("  %s %s", [...]string{"refuse", "permit", "hold"}[d.Effect], d.Rule)
	if d.Pair != 0 {
		s += fmt.Sprintf(" pair=%d", d.Pair)
	}
	if d.Obligations.Durability == Durable {
		s += " durable"
	}
	if d.Volatile {
		s += " volatile"
	}
	if a := d.Obligations.Approval; a != nil {
		s += fmt.Sprintf("\n  rules=%v groups=%v count=%d expires=%s tx=%s", a.Rules, a.Groups, a.Count, a.Expires, a.InTransaction)
	}
	return s + "\n  " + d.Reason + "\n"
}

func scriptSubject(words []string) *Subject {
	s := &Subject{Kind: SubjectKind(words[0]), Issuer: "https://issuer.example", ExpiresAt: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
	s.Provider, s.Name, _ = strings.Cut(words[1], "/")
	for _, w := range words[2:] {
		k, v, _ := strings.Cut(w, "=")
		if k == "groups" {
			s.Groups = strings.Split(v, ",")
			continue
		}
		if s.Claims == nil {
			s.Claims = map[string]any{}
		}
		n, err := strconv.ParseInt(v, 10, 64)
		switch {
		case v == "true" || v == "false":
			s.Claims[k] = v == "true"
		case err == nil:
			s.Claims[k] = n
		case v == "nil":
			s.Claims[k] = nil
		case strings.HasPrefix(v, "["):
			s.Claims[k] = strings.Split(strings.Trim(v, "[]"), ",")
		default:
			s.Claims[k] = v
		}
	}
	return s
}

func scriptContext(t *testing.T, now time.Time, words []string) Context {
	c := Context{Now: now}
	for _, w := range words {
		k, v, _ := strings.Cut(w, "=")
		switch k {
		case "now":
			var err error
			if c.Now, err = time.Parse(time.RFC3339, v); err != nil {
				t.Fatal(err)
			}
		case "client":
			c.ClientAddr = v
		case "profile":
			c.Profile = v
		case "database":
			c.Database = v
		case "tx":
			c.InTransaction = true
		default:
			t.Fatalf("what is %q?", w)
		}
	}
	return c
}

func scriptResource(typ, path string) Resource {
	if path == "-" {
		return Resource{Type: ResourceType(typ)}
	}
	return Resource{ResourceType(typ), strings.Split(path, "/")}
}

func TestDecideNeedsPolicy(t *testing.T) {
	ask := &Request{Subject: &Subject{Kind: User, Provider: "p", Name: "n"}, Pairs: []Pair{{StatusRead, Resource{Type: Cluster}}}}
	var none *Set
	if d := none.Decide(ask); d.Effect != Refuse {
		t.Errorf("no set: %+v", d)
	}
	all := mustCompile(t, "permit(principal, action, resource);")
	if d := all.Decide(ask); d.Effect != Permit {
		t.Errorf("permit all: %+v", d)
	}
	for name, r := range map[string]*Request{
		"no subject":  {Pairs: ask.Pairs},
		"no pairs":    {Subject: ask.Subject},
		"many pairs":  {Subject: ask.Subject, Pairs: make([]Pair, maxPairs+1)},
		"kind":        {Subject: &Subject{Kind: "Robot"}, Pairs: ask.Pairs},
		"zero kind":   {Subject: &Subject{}, Pairs: ask.Pairs},
		"claim":       {Subject: &Subject{Kind: User, Claims: map[string]any{"x": 1.5}}, Pairs: ask.Pairs},
		"claim list":  {Subject: &Subject{Kind: User, Claims: map[string]any{"x": []any{"a", 1}}}, Pairs: ask.Pairs},
		"action":      {Subject: ask.Subject, Pairs: []Pair{{"postgres:read", scriptResource("Table", "t/d/s/x")}}},
		"zero action": {Subject: ask.Subject, Pairs: []Pair{{}}},
		"type":        {Subject: ask.Subject, Pairs: []Pair{{PostgresSelect, scriptResource("Database", "t/d")}}},
		"path":        {Subject: ask.Subject, Pairs: []Pair{{PostgresSelect, scriptResource("Table", "t/d/s")}}},
	} {
		d := all.Decide(r)
		if d.Effect != Refuse || d.Rule != RulePolicyError || d.Reason == "" {
			t.Errorf("%s: %+v", name, d)
		}
	}
}

// TestSplitAgrees: cutting files into rules must not change what they say.
func TestSplitAgrees(t *testing.T) {
	for text, want := range map[string]int{
		"":                 0,
		" // a; b\n":       0,
		"/* ; */":          0,
		"a;b;":             2,
		"a;b":              2,
		`";" ; "\";" ;`:    2,
		"a // ;\n;":        1,
		"a /* \" ; */ ; b": 2,
		"/* open ; ":       1,
		`"open ; `:         1,
	} {
		parts := split(text)
		if len(parts) != want {
			t.Errorf("%q: %d parts, want %d", text, len(parts), want)
		}
	}
	parts := split("a;\n/* x\n y */ b\n; c;")
	if parts[1].line != 1 || parts[2].line != 4 || parts[2].col != 1 {
		t.Errorf("%+v", parts)
	}
}

func TestResourceID(t *testing.T) {
	for _, c := range []struct {
		r          Resource
		id, people string
	}{
		{Resource{Type: Cluster}, "sallyport", "the cluster"},
		{Resource{Table, []string{"t", "d", "s", "x"}}, "t/d/s/x", `table "t/d/s/x"`},
		{Resource{Table, []string{"t", "d", "s/x", "50%"}}, "t/d/s%2Fx/50%25", `table "t/d/s%2Fx/50%25"`},
		{Resource{Function, []string{"t", "d", "", "f"}}, "t/d//f", `function "t/d//f"`},
		{Resource{Target, []string{"a\u202eb"}}, "a\u202eb", `target "a\u202eb"`},
	} {
		if c.r.ID() != c.id || c.r.String() != c.people {
			t.Errorf("%v: %q %q", c.r, c.r.ID(), c.r.String())
		}
	}
}

func TestCatalogue(t *testing.T) {
	names := map[Action]bool{}
	for _, info := range Catalogue() {
		if names[info.Name] || info.Description == "" || len(info.Resources) == 0 {
			t.Errorf("%+v: named twice or not described", info)
		}
		names[info.Name] = true
		for _, g := range info.Groups {
			if groupDescriptions[g] == "" {
				t.Errorf("group %s is not described", g)
			}
		}
		for _, r := range info.Resources {
			if _, ok := depth[r]; !ok || !info.Name.Accepts(r) {
				t.Errorf("%s on %s", info.Name, r)
			}
		}
	}
	if !PostgresSelect.Accepts(Table) || PostgresSelect.Accepts(Cluster) || Action("nothing").Accepts(Table) {
		t.Error("Accepts")
	}
	if !slices.ContainsFunc(strings.Split(SchemaText(), "\n"), func(l string) bool {
		return strings.HasPrefix(l, `action "postgres:select" in ["postgres:read"] appliesTo`)
	}) {
		t.Error("the schema lacks postgres:select")
	}
}

func TestMentionsAndRules(t *testing.T) {
	set := mustCompile(t, `// first
@id("one")
permit (principal == Workload::"ci/x", action == Action::"connect", resource in Database::"prod-db/shop")
when {
  principal.claims has ref &&
  !(resource in Target::"other")
};
permit (principal in Group::"g", action, resource);`)
	var got []string
	for _, m := range set.Mentions() {
		got = append(got, fmt.Sprintf("%s %s %s:%d", m.Kind, m.Name, m.Path, m.Line))
	}
	want := []string{"claim ref p.cedar:5", "provider ci p.cedar:3", "target prod-db p.cedar:3", "target other p.cedar:6"}
	if !slices.Equal(got, want) {
		t.Errorf("mentions %q", got)
	}
	rules := set.Rules()
	if len(rules) != 2 || rules[0].ID != "one" || rules[0].Line != 2 || !strings.HasPrefix(rules[0].Text, `@id("one")`) || rules[1].ID != "p.cedar#2" {
		t.Errorf("rules %+v", rules)
	}
	if !set.AnyPermit(Connect) || !set.AnyPermit(AdminApply) || mustCompile(t, `forbid(principal, action, resource);`).AnyPermit(Connect) {
		t.Error("AnyPermit")
	}
}

func TestDigest(t *testing.T) {
	a, b := File{"a.cedar", []byte("permit(principal, action, resource);")}, File{"b.cedar", []byte("forbid(principal, action, resource);")}
	compile := func(files ...File) string {
		set, problems := Compile(files)
		if set == nil {
			t.Fatal(problems)
		}
		return set.Digest()
	}
	if compile(a, b) != compile(b, a) {
		t.Error("the order of files changes the digest")
	}
	renamed := b
	renamed.Path = "c.cedar"
	if compile(a, b) == compile(a, renamed) || compile(a) == compile(b) {
		t.Error("the digest does not change")
	}
}

// TestLimits: what could cost every node dearly is refused before it is parsed.
func TestLimits(t *testing.T) {
	for name, text := range map[string]string{
		"long rule":   "permit(principal, action, resource) when { " + strings.Repeat("!", maxRuleBytes) + "true };",
		"deep":        "permit(principal, action, resource) when { " + strings.Repeat("(", maxRuleBytes) + ";",
		"many rules":  strings.Repeat("permit(principal, action, resource);", maxRules+1),
		"not utf8":    "permit(principal, action, resource); // \xff",
		"nested":      "permit(principal, action, resource) when { " + strings.Repeat("(", 7000) + "true" + strings.Repeat(")", 7000) + " && 1 };",
		"nested ifs":  "permit(principal, action, resource) when { " + strings.Repeat("if true then ", 1000) + "1" + strings.Repeat(" else 1", 1000) + "};",
		"nested nots": "permit(principal, action, resource) when { " + strings.Repeat("!", 8000) + "1 };",
	} {
		start := time.Now()
		set, problems := Compile([]File{{"p.cedar", []byte(text)}})
		if set != nil || len(problems) == 0 {
			t.Errorf("%s: compiled", name)
		}
		t.Log(name, time.Since(start))
	}
}

func mustCompile(t testing.TB, text string) *Set {
	t.Helper()
	set, problems := Compile([]File{{"p.cedar", []byte(text)}})
	if set == nil {
		t.Fatal(problems)
	}
	return set
}

// TestDocumentation keeps the list of actions in docs/policy.md as it is here.
func TestDocumentation(t *testing.T) {
	const path = "../docs/policy.md"
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(data), "-rewrite -->\n")
	_, tail, ok2 := strings.Cut(rest, "<!-- end of actions -->")
	if !ok || !ok2 {
		t.Fatal("the marks are missing")
	}
	var b strings.Builder
	b.WriteString(head + "-rewrite -->\n| action | in | on | |\n|---|---|---|---|\n")
	for _, info := range Catalogue() {
		in := make([]string, len(info.Groups))
		for i, g := range info.Groups {
			in[i] = "`" + g + "`"
		}
		on := make([]string, len(info.Resources))
		for i, r := range info.Resources {
			on[i] = string(r)
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", info.Name, strings.Join(in, ", "), strings.Join(on, ", "), info.Description)
	}
	b.WriteString("<!-- end of actions -->" + tail)
	if b.String() == string(data) {
		return
	}
	if !*rewrite {
		t.Fatal("the list of actions in docs/policy.md is old (use -rewrite)")
	}
	if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

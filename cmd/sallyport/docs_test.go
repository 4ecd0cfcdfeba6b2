package main

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sallyport/sallyport/node/config"
	"github.com/sallyport/sallyport/protocols/postgres/sql"
)

// What documents say of commands, settings, files and functions is held
// against the code. `go test ./cmd/sallyport -rewrite` writes the generated
// parts anew.

var rewrite = flag.Bool("rewrite", false, "write the generated documents anew")

// repository is the module's directory, as seen from this package's.
const repository = "../.."

// TestCLIReference holds docs/cli.md against the commands and flags there are.
func TestCLIReference(t *testing.T) {
	var b bytes.Buffer
	root := newRoot()
	fmt.Fprintf(&b, "# Commands\n\nWritten by `go test ./cmd/sallyport -rewrite`; `sallyport COMMAND --help` shows the same.\n\n")
	fmt.Fprintf(&b, "%s\n\n%s\n", "Exit codes: 0 done; 1 failed, refused, or (verify, doctor) not as it should be; 2 not understood; 3 (revoke, revocations show --wait) the revocation stands and not every node is known to have stopped.",
		"Flags of every command:\n")
	flags(&b, root.PersistentFlags())
	fmt.Fprint(&b, "\nA flag wins over its environment variable, both win over what `sallyport login` stored.\n")
	describe(&b, root)
	compareFile(t, filepath.Join(repository, "docs", "cli.md"), b.Bytes())
}

func describe(b *bytes.Buffer, c *cobra.Command) {
	for _, sub := range c.Commands() {
		if sub.Name() == "help" || sub.Name() == "completion" || sub.Hidden {
			continue
		}
		if sub.Runnable() {
			fmt.Fprintf(b, "\n## %s\n\n%s.\n\n```\n%s\n```\n", sub.CommandPath(), sub.Short, sub.UseLine())
			if sub.Long != "" {
				fmt.Fprintf(b, "\n%s\n", sub.Long)
			}
			if sub.Example != "" {
				fmt.Fprintf(b, "\n```sh\n%s\n```\n", unindent(sub.Example))
			}
			own := pflag.NewFlagSet("", pflag.ContinueOnError)
			for f := c; f.HasParent(); f = f.Parent() { // what groups of commands share
				own.AddFlagSet(f.PersistentFlags())
			}
			own.AddFlagSet(sub.LocalNonPersistentFlags())
			if own.HasFlags() {
				fmt.Fprintln(b)
				flags(b, own)
			}
		}
		describe(b, sub)
	}
}

func unindent(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = strings.TrimPrefix(lines[i], "  ")
	}
	return strings.Join(lines, "\n")
}

func flags(b *bytes.Buffer, fs *pflag.FlagSet) {
	fmt.Fprint(b, "| flag | | default |\n|---|---|---|\n")
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		if kind := f.Value.Type(); kind != "bool" {
			name += " " + strings.ToUpper(kind)
		}
		def := f.DefValue
		switch def {
		case "", "[]", "false", "0", "0s":
			def = ""
		default:
			def = "`" + def + "`"
		}
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", name, strings.ReplaceAll(f.Usage, "|", `\|`), def)
	})
}

// TestConfigurationReference holds docs/configuration.md against node.yaml's
// fields: name, default and the comment of each.
func TestConfigurationReference(t *testing.T) {
	c := config.Config{Name: "n1", Addr: "ADDR", DataDir: "DATADIR"}
	c.SetDefaults()
	comments := fieldComments(t, "node/config/config.go", "Config")
	var b bytes.Buffer
	fmt.Fprint(&b, "| field | unit | default | meaning |\n|---|---|---|---|\n")
	v := reflect.ValueOf(c)
	for i := range v.NumField() {
		f := v.Type().Field(i)
		name, opts, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if name == "-" {
			continue
		}
		unit, def := "text", fmt.Sprint(v.Field(i).Interface())
		switch v.Field(i).Interface().(type) {
		case time.Duration:
			unit = "time, such as `5s`"
		case int64:
			unit = "bytes"
		case int:
			unit = "number"
		case bool:
			unit = "true or false"
		}
		switch {
		case !strings.Contains(opts, "omitempty"):
			def = "required"
		case def == "ADDR":
			def = "`addr`"
		default:
			def = "`" + def + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", name, unit, def, comments[f.Name])
	}
	comparePart(t, "docs/configuration.md", "fields", b.String())
}

// fieldComments returns the comments of a struct's fields, on one line each.
func fieldComments(t *testing.T, file, typ string) map[string]string {
	t.Helper()
	out := map[string]string{}
	ast.Inspect(parseFile(t, file), func(n ast.Node) bool {
		ts, ok := n.(*ast.TypeSpec)
		if !ok || ts.Name.Name != typ {
			return true
		}
		for _, f := range ts.Type.(*ast.StructType).Fields.List {
			for _, name := range f.Names {
				out[name.Name] = strings.Join(strings.Fields(f.Doc.Text()), " ")
			}
		}
		return false
	})
	return out
}

// TestSettingsReference holds the settings that docs/postgresql.md lists
// against the gateway's list.
func TestSettingsReference(t *testing.T) {
	var harmless, planner []string
	pinned := map[string][]string{}
	for _, d := range parseFile(t, "protocols/postgres/sql/settings.go").Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.VAR {
			continue
		}
		spec := g.Specs[0].(*ast.ValueSpec)
		switch spec.Names[0].Name {
		case "harmlessSettings":
			harmless = strings.Fields(unquote(t, spec.Values[0].(*ast.CallExpr).Args[0]))
		case "plannerSettings":
			planner = strings.Fields(unquote(t, spec.Values[0].(*ast.CallExpr).Args[0]))
		case "pinnedValues":
			for _, e := range spec.Values[0].(*ast.CompositeLit).Elts {
				kv := e.(*ast.KeyValueExpr)
				for _, v := range kv.Value.(*ast.CompositeLit).Elts {
					k := unquote(t, kv.Key)
					pinned[k] = append(pinned[k], unquote(t, v))
				}
			}
		}
	}
	if len(harmless) < 20 || len(planner) < 20 || len(pinned) < 5 {
		t.Fatalf("settings.go lists %d and %d settings: has it changed its form?", len(harmless), len(pinned))
	}
	slices.Sort(harmless)
	var free bytes.Buffer
	for _, s := range harmless {
		if ok, _ := sql.StartupParameterAllowed(s, "notice"); !ok {
			t.Errorf("%s is on the list and is not allowed", s)
		}
		fmt.Fprintf(&free, "`%s` ", s)
	}
	comparePart(t, "docs/postgresql.md", "settings", strings.TrimSpace(free.String())+"\n")
	slices.Sort(planner)
	var steering bytes.Buffer
	for _, s := range planner {
		if ok, _ := sql.StartupParameterAllowed(s, "on"); ok {
			t.Errorf("%s steers the planner and is allowed at start-up", s)
		}
		fmt.Fprintf(&steering, "`%s` ", s)
	}
	comparePart(t, "docs/postgresql.md", "planner", strings.TrimSpace(steering.String())+"\n")
	var held bytes.Buffer
	fmt.Fprint(&held, "| setting | value |\n|---|---|\n")
	for _, k := range sortedKeys(pinned) {
		for _, v := range pinned[k] {
			if ok, _ := sql.StartupParameterAllowed(k, v); !ok {
				t.Errorf("%s = %s is on the list and is not allowed", k, v)
			}
		}
		fmt.Fprintf(&held, "| `%s` | `%s` |\n", k, strings.Join(pinned[k], "`, `"))
	}
	comparePart(t, "docs/postgresql.md", "pinned", held.String())
}

func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func unquote(t *testing.T, e ast.Expr) string {
	t.Helper()
	s, err := strconv.Unquote(e.(*ast.BasicLit).Value)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var (
	codeLink = regexp.MustCompile("\\[`([^`]+)`\\]\\(([^)#\\s]+\\.go)\\)")
	shBlock  = regexp.MustCompile("(?ms)^```sh\n(.*?)^```")
	inShell  = regexp.MustCompile(`(?m)(?:^|\$\(|[|;(] *|do +|then +)sallyport +([^\n]*)`)
	heredoc  = regexp.MustCompile(`(?ms)<<'?([A-Z]+)'?[^\n]*\n.*?^([A-Z]+)$`)
)

// TestCodeLinks checks documents that name functions: in [`Type.Method`](file.go)
// the file must exist and declare just that.
func TestCodeLinks(t *testing.T) {
	count := 0
	for path, text := range documents(t) {
		for _, m := range codeLink.FindAllStringSubmatch(text, -1) {
			count++
			file := filepath.Join(filepath.Dir(path), m[2])
			if _, err := os.Stat(filepath.Join(repository, file)); err != nil {
				t.Errorf("%s links to %s, which does not exist", path, m[2])
			} else if name := strings.TrimSuffix(m[1], "()"); !strings.Contains(name, "/") && !strings.HasSuffix(name, ".go") && !declared(t, file)[name] {
				t.Errorf("%s links to %s in %s, which does not declare it", path, m[1], file)
			}
		}
	}
	if count < 40 {
		t.Errorf("%d links to code were found; is the pattern still right?", count)
	}
}

// declared are the names that a file declares: functions, methods as
// Type.Method, types, variables and constants.
func declared(t *testing.T, file string) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	for _, d := range parseFile(t, file).Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			name := d.Name.Name
			if d.Recv != nil {
				r := d.Recv.List[0].Type
				if s, ok := r.(*ast.StarExpr); ok {
					r = s.X
				}
				if id, ok := r.(*ast.Ident); ok {
					name = id.Name + "." + name
				}
			}
			out[name] = true
		case *ast.GenDecl:
			for _, s := range d.Specs {
				switch s := s.(type) {
				case *ast.TypeSpec:
					out[s.Name.Name] = true
				case *ast.ValueSpec:
					for _, n := range s.Names {
						out[n.Name] = true
					}
				}
			}
		}
	}
	return out
}

// TestCommandsInDocuments checks that the commands which documents tell people
// to type exist, with the flags they are given.
func TestCommandsInDocuments(t *testing.T) {
	count := 0
	for path, text := range documents(t) {
		for _, block := range shBlock.FindAllStringSubmatch(text, -1) {
			script := heredoc.ReplaceAllString(block[1], "<<\n")
			script = strings.ReplaceAll(script, "\\\n", " ")
			for _, m := range inShell.FindAllStringSubmatch(script, -1) {
				count++
				if err := understood(strings.Fields(m[1])); err != nil {
					t.Errorf("%s: sallyport %s: %v", path, m[1], err)
				}
			}
		}
	}
	if count < 20 {
		t.Errorf("%d commands were found; is the pattern still right?", count)
	}
}

// understood checks the words of a command line up to where the shell takes
// over again. Quoted text is not taken apart: only flags matter here.
func understood(words []string) error {
	for i, w := range words {
		if strings.ContainsAny(w[:1], "|;&#<>)") || strings.HasPrefix(w, "2>") || strings.HasPrefix(w, "$(") {
			words = words[:i]
			break
		}
		words[i] = strings.TrimRight(w, ")\"';")
	}
	cmd, rest, err := newRoot().Find(words)
	if err != nil {
		return err
	}
	if !cmd.Runnable() && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
		return fmt.Errorf("%s has no command %q", cmd.CommandPath(), rest[0])
	}
	for _, w := range rest {
		if strings.HasPrefix(w, "--") {
			name, _, _ := strings.Cut(w[2:], "=")
			if name != "help" && name != "version" && cmd.Flags().Lookup(name) == nil && cmd.InheritedFlags().Lookup(name) == nil {
				return fmt.Errorf("no flag --%s", name)
			}
		}
	}
	return nil
}

// documents are the repository's Markdown files by their path.
func documents(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, pattern := range []string{"*.md", "docs/*.md", "deploy/*/*.md", "protocols/*.md"} {
		paths, err := filepath.Glob(filepath.Join(repository, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range paths {
			b, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			rel, _ := filepath.Rel(repository, p)
			out[rel] = string(b)
		}
	}
	return out
}

func parseFile(t *testing.T, file string) *ast.File {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(repository, file), nil, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// comparePart holds the part of a document between its markers against want.
func comparePart(t *testing.T, doc, part, want string) {
	t.Helper()
	path := filepath.Join(repository, doc)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	begin := "<!-- " + part + ": written by go test ./cmd/sallyport -rewrite -->\n"
	end := "<!-- end of " + part + " -->"
	from, to := bytes.Index(b, []byte(begin)), bytes.Index(b, []byte(end))
	if from < 0 || to < from {
		t.Fatalf("%s has no part between %q and %q", doc, begin, end)
	}
	compareFile(t, path, slices.Concat(b[:from+len(begin)], []byte(want), b[to:]))
}

func compareFile(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err == nil && bytes.Equal(got, want) {
		return
	}
	if *rewrite {
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("%s is not what the code says: go test ./cmd/sallyport -rewrite", path)
}

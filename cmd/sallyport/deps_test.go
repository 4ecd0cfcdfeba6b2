package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The house rules of the whole module: which package may import which, where
// a foreign library lives, and that documents keep their promises.

const module = "github.com/sallyport/sallyport"

// layers says what of ours the packages under a path may import, themselves
// and what is under them aside. The longest matching path counts. What is not
// listed has no place in the layout.
var layers = []struct {
	path string
	may  []string
}{
	{"cmd", []string{"node", "protocols", "policy", "recording", "raftstore", "chaos/cluster", "protocols/protocoltest/pgserver"}},
	{"bench", []string{"cmd", "node", "protocols", "policy", "recording", "raftstore", "chaos"}},
	{"chaos", []string{"cmd", "node", "protocols", "policy", "recording", "raftstore", "bench"}},
	{"node", []string{"protocols", "policy", "recording", "raftstore"}},
	// The enforcement point and the tools that every protocol shares.
	{"protocols", []string{"policy", "recording"}},
	{"protocols/wire", nil},
	{"protocols/mask", []string{"policy", "protocols/wire"}},
	{"protocols/protocoltest", []string{"policy", "recording", "=protocols", "protocols/wire", "protocols/mask"}},
	// The protocols, which do not know each other. The last two are dialects of HTTP.
	{"protocols/postgres", protocolMay},
	{"protocols/mysql", protocolMay},
	{"protocols/ssh", protocolMay},
	{"protocols/httpproxy", protocolMay},
	{"protocols/tcp", protocolMay},
	{"protocols/kubernetes", append([]string{"protocols/httpproxy"}, protocolMay...)},
	{"protocols/mcp", append([]string{"protocols/httpproxy"}, protocolMay...)},
	// Three that know nothing of each other.
	{"policy", nil},
	{"recording", nil},
	{"raftstore", nil},
	{"raftstore/event", nil},
}

// "=p" is the package p without what is under it.
var protocolMay = []string{"policy", "recording", "=protocols", "protocols/wire", "protocols/mask"}

// notBelow are the packages under protocols that protocols itself may not import.
var notBelow = regexp.MustCompile(`^protocols/(postgres|mysql|ssh|httpproxy|tcp|kubernetes|mcp)(/|$)`)

// homes are the only places where a foreign library may be imported, tests
// included. Doubles beside a home may too, and bench and chaos, which look at
// the product from outside.
var homes = map[string]string{
	"github.com/hashicorp/raft":        "raftstore",
	"github.com/hashicorp/raft-":       "raftstore",
	"github.com/cockroachdb/pebble":    "raftstore",
	"github.com/minio/minio-go":        "recording/upload",
	"github.com/parquet-go/parquet-go": "recording/columnar",
	"github.com/hashicorp/memberlist":  "node/gossip",
	"github.com/cedar-policy":          "policy",
	"github.com/multigres/multigres":   "protocols/postgres/sql",
}

type pkg struct {
	ImportPath, Dir, Doc               string
	Imports, TestImports, XTestImports []string
	GoFiles                            []string
}

// rel is the path inside the module, "" for its root.
func (p *pkg) rel() string { return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/") }

func TestImports(t *testing.T) {
	for _, p := range packages(t) {
		if p.rel() == "" {
			t.Errorf("the module's root holds a package; the layout has none there")
			continue
		}
		for _, imp := range p.Imports {
			checkImport(t, p.rel(), imp, false)
		}
		for _, imp := range slices.Concat(p.TestImports, p.XTestImports) {
			checkImport(t, p.rel(), imp, true)
		}
	}
}

func checkImport(t *testing.T, from, imp string, inTest bool) {
	t.Helper()
	if why := badImport(from, imp, inTest); why != "" {
		t.Errorf("%s imports %s: %s", from, imp, why)
	}
}

// badImport says why the package from may not import imp, or "".
func badImport(from, imp string, inTest bool) string {
	for lib, home := range homes {
		top := topFolder(from)
		exempt := top == "bench" || top == "chaos" || isTestOnly(from) && top == topFolder(home)
		if strings.HasPrefix(imp, lib) && !under(from, home) && !exempt {
			return "its home is " + home
		}
	}
	to, ours := strings.CutPrefix(imp, module+"/")
	if !ours {
		return ""
	}
	layer := ""
	var may []string
	for _, l := range layers {
		if under(from, l.path) && len(l.path) > len(layer) {
			layer, may = l.path, l.may
		}
	}
	if layer == "" {
		return from + " is not in the layout; see layers in this file"
	}
	if isTestOnly(to) && !isTestOnly(from) {
		if inTest || under(from, "bench") || under(from, "chaos") || slices.Contains(may, to) {
			return ""
		}
		return "it is for tests only"
	}
	switch {
	case layer == "protocols" && notBelow.MatchString(to):
		return "the enforcement point knows no protocol"
	case under(to, layer):
		return ""
	}
	for _, m := range may {
		if exact, ok := strings.CutPrefix(m, "="); ok && to == exact || !ok && under(to, m) {
			return ""
		}
	}
	return "imports run downward only, and " + layer + " may import of ours: " + strings.Join(append(may, layer), ", ")
}

// under reports whether path is dir or inside it.
func under(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

func topFolder(path string) string {
	top, _, _ := strings.Cut(path, "/")
	return top
}

// isTestOnly reports whether a package is in a directory named for tests,
// such as protocols/protocoltest.
func isTestOnly(path string) bool {
	return slices.ContainsFunc(strings.Split(path, "/"), func(dir string) bool { return strings.HasSuffix(dir, "test") })
}

// TestImportRules tries the rules on imports that are and are not allowed.
func TestImportRules(t *testing.T) {
	for _, c := range []struct {
		from, imp string
		inTest    bool
		ok        bool
	}{
		{"cmd/sallyport", module + "/node", false, true},
		{"node/api", module + "/node/state", false, true},
		{"node", module + "/protocols/postgres", false, true},
		{"node", module + "/cmd/sallyport", false, false},
		{"protocols", module + "/recording", false, true},
		{"protocols", module + "/protocols/postgres", false, false},
		{"protocols", module + "/protocols/wire", false, true},
		{"protocols", module + "/node/session", false, false},
		{"protocols/postgres", module + "/protocols", false, true},
		{"protocols/postgres", module + "/protocols/postgres/sql", false, true},
		{"protocols/postgres/sql", module + "/policy", false, true},
		{"protocols/postgres", module + "/protocols/mysql", false, false},
		{"protocols/postgres", module + "/raftstore", false, false},
		{"protocols/mcp", module + "/protocols/httpproxy", false, true},
		{"policy", module + "/recording", false, false},
		{"recording", module + "/policy", true, false},
		{"raftstore", module + "/policy", false, false},
		{"raftstore/event", module + "/raftstore", false, false},
		{"raftstore/fsm", module + "/raftstore/event", false, true},
		{"elsewhere", module + "/policy", false, false},
		{"node", module + "/protocols/protocoltest/pgserver", false, false},
		{"node", module + "/protocols/protocoltest/pgserver", true, true},
		{"cmd/sallyport", module + "/protocols/protocoltest/pgserver", false, true},
		{"cmd/sallyport", module + "/raftstore/storetest", false, false},
		{"chaos/cluster", module + "/protocols/protocoltest/pgserver", false, true},
		{"node", "github.com/hashicorp/raft", true, false},
		{"raftstore/transport", "github.com/hashicorp/raft", false, true},
		{"recording/spool", "github.com/cockroachdb/pebble/v2", false, false},
		{"recording/replay", "github.com/minio/minio-go/v7", false, false},
		{"recording/upload", "github.com/minio/minio-go/v7", false, true},
		{"recording/recordingtest/s3server", "github.com/minio/minio-go/v7", false, true},
		{"chaos", "github.com/minio/minio-go/v7", true, true},
		{"node/nodetest", "github.com/minio/minio-go/v7", false, false},
		{"node/api", "github.com/cedar-policy/cedar-go", false, false},
		{"protocols/postgres", "github.com/multigres/multigres/go/common/parser", false, false},
	} {
		if why := badImport(c.from, c.imp, c.inTest); (why == "") != c.ok {
			t.Errorf("%s importing %s (in test: %v): %q, want allowed: %v", c.from, c.imp, c.inTest, why, c.ok)
		}
	}
}

func TestEveryPackageHasAComment(t *testing.T) {
	for _, p := range packages(t) {
		if len(p.GoFiles) > 0 && p.Doc == "" {
			t.Errorf("%s has no package comment", p.rel())
		}
	}
}

// forbidden are texts that no file of the kind may hold, with the reason. Each
// is written in two parts here, so that this file may be searched too.
var forbidden = []struct{ suffix, text, why string }{
	{".go", "Verify" + "Leader(", "it answers wrongly on the heartbeat path that Raft is given; read through a barrier instead"},
	{"", "/wor" + "k/", "a path of one machine"},
	{"", "/tmp/pla" + "n", "a path of one machine"},
	{"", "/roo" + "t/go", "a path of one machine"},
	{"", "proxy.golang" + ".org", "where modules come from is each machine's business"},
}

func TestForbiddenTexts(t *testing.T) {
	for path, content := range files(t) {
		for _, f := range forbidden {
			if strings.HasSuffix(path, f.suffix) && bytes.Contains(content, []byte(f.text)) {
				t.Errorf("%s holds %q: %s", path, f.text, f.why)
			}
		}
	}
}

var (
	mdFence   = regexp.MustCompile("(?ms)^ *```.*?^ *```")
	mdCode    = regexp.MustCompile("`[^`\n]*`")
	mdLink    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	mdHeading = regexp.MustCompile(`(?m)^#+ +(.*?) *#*$`)
	mdStrip   = regexp.MustCompile(`[^\p{L}\p{N}\- _]`)
)

// TestLinks checks that what documents link to inside the repository exists,
// headings included.
func TestLinks(t *testing.T) {
	all := files(t)
	for path, content := range all {
		if !strings.HasSuffix(path, ".md") {
			continue
		}
		text := mdCode.ReplaceAllString(mdFence.ReplaceAllString(string(content), ""), "")
		for _, m := range mdLink.FindAllStringSubmatch(text, -1) {
			link, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(link, "://") || strings.HasPrefix(link, "mailto:") {
				continue
			}
			target := path
			if link != "" {
				target = filepath.Join(filepath.Dir(path), link)
			}
			if _, err := os.Stat(filepath.Join(root, target)); err != nil {
				t.Errorf("%s links to %s, which does not exist", path, m[1])
			} else if anchor != "" && strings.HasSuffix(target, ".md") && !slices.Contains(anchors(all[target]), anchor) {
				t.Errorf("%s links to %s: no such heading", path, m[1])
			}
		}
	}
}

// anchors are the link targets of a document's headings, as the usual
// renderers make them.
func anchors(md []byte) []string {
	var out []string
	for _, h := range mdHeading.FindAllSubmatch(mdFence.ReplaceAll(md, nil), -1) {
		s := mdStrip.ReplaceAllString(strings.ToLower(string(h[1])), "")
		out = append(out, strings.ReplaceAll(s, " ", "-"))
	}
	return out
}

// root is the module's directory, as seen from this package's.
const root = "../.."

// packages lists the module's packages, those that do not compile included.
func packages(t *testing.T) []*pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,Doc,Imports,TestImports,XTestImports,GoFiles", "./...")
	cmd.Dir = root
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []*pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		p := new(pkg)
		if err := dec.Decode(p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 5 {
		t.Fatalf("go list found %d packages only", len(all))
	}
	return all
}

// files reads the repository's text files by their path in it. What make
// builds and what git ignores is left out.
func files(t *testing.T) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		switch {
		case d.IsDir() && slices.Contains([]string{".git", ".cache", "bin", "demo-data"}, rel):
			return filepath.SkipDir
		case !d.Type().IsRegular() || strings.HasSuffix(path, ".test") || strings.HasSuffix(path, ".prof"):
			return nil
		}
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // another test's temporary file
		}
		if err == nil && !bytes.Contains(b[:min(len(b), 8000)], []byte{0}) {
			all[rel] = b
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

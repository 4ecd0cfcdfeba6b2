package node

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// TestNothingIsDecidedFromGossip holds the gossip's users to making it, running
// it and showing it: whatever is said of a node, dead or alive, changes neither
// its lease nor its vote nor its sessions, because nobody reads it.
func TestNothingIsDecidedFromGossip(t *testing.T) {
	uses := map[string]bool{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		dir := filepath.ToSlash(filepath.Dir(path))
		if strings.HasPrefix(dir, "../node/gossip") || strings.HasPrefix(dir, "../.") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		for _, decl := range f.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(fn, func(x ast.Node) bool {
				if s, ok := x.(*ast.SelectorExpr); ok && (s.Sel.Name == "gossip" || s.Sel.Name == "Gossip") {
					uses[dir+" "+fn.Name.Name] = true
				}
				return true
			})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	allowed := map[string]bool{
		"../node Run": true, "../node newGossip": true, "../node status": true, // the type in newGossip's result
		"../cmd/sallyport heard": true,
	}
	for u := range uses {
		if !allowed[u] && !strings.HasPrefix(u, "../chaos/") { // which looks whether it is so
			t.Errorf("%s uses the gossip: it is a hint for the status, and nothing is decided from it", u)
		}
	}
	if !uses["../node status"] || !uses["../node Run"] {
		t.Errorf("found %v only: has the gossip another name now?", uses)
	}
}

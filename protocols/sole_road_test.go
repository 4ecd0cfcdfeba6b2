package protocols_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/protocols"
)

// Nothing outside this package can get at the target's connection: neither a
// field nor a method hands it out.
func TestUpstreamIsNotHandedOut(t *testing.T) {
	conn := reflect.TypeFor[net.Conn]()
	for _, typ := range []reflect.Type{reflect.TypeFor[*protocols.Session](), reflect.TypeFor[*protocols.Channel]()} {
		for i := range typ.NumMethod() {
			m := typ.Method(i)
			for o := range m.Type.NumOut() {
				if out := m.Type.Out(o); out.Implements(conn) || (out.Kind() == reflect.Interface && conn.Implements(out) && out.NumMethod() > 0) {
					t.Errorf("%v.%s returns a %v", typ, m.Name, out)
				}
			}
		}
		for i := range typ.Elem().NumField() {
			f := typ.Elem().Field(i)
			if f.IsExported() && f.Type.Implements(conn) && f.Name != "Client" {
				t.Errorf("%v.%s is a connection", typ, f.Name)
			}
		}
	}
	admission := reflect.TypeFor[protocols.Admission]()
	if f, ok := admission.FieldByName("ok"); !ok || f.IsExported() {
		t.Error("an Admission can be made outside Admit")
	}
}

// In this package, one function writes to the target. Protocol packages keep
// no connection and take no lease.
func TestOneFunctionWritesUpstream(t *testing.T) {
	fset := token.NewFileSet()
	var writers []string
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if strings.HasSuffix(path, "test") || d.Name() == "testdata" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(fset, path, nil, 0)
		if err != nil {
			return err
		}
		core := filepath.Dir(path) == "."
		for _, decl := range file.Decls {
			name := ""
			if f, ok := decl.(*ast.FuncDecl); ok {
				name = f.Name.Name
			}
			ast.Inspect(decl, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.CallExpr:
					sel, ok := n.Fun.(*ast.SelectorExpr)
					if !ok {
						break
					}
					x, _ := sel.X.(*ast.SelectorExpr)
					if core && x != nil && x.Sel.Name == "upstream" && strings.HasPrefix(sel.Sel.Name, "Write") {
						writers = append(writers, name)
					}
					if !core && (sel.Sel.Name == "Credential" || sel.Sel.Name == "Dial" || sel.Sel.Name == "DialContext") {
						t.Errorf("%s: %s reaches for a target of its own", fset.Position(n.Pos()), sel.Sel.Name)
					}
				case *ast.StructType:
					if core {
						break
					}
					for _, f := range n.Fields.List {
						if s := typeName(f.Type); s == "net.Conn" || s == "tls.Conn" || s == "io.Writer" || s == "io.ReadWriteCloser" || s == "protocols.Upstream" || s == "protocols.Login" || s == "protocols.Lease" {
							t.Errorf("%s: a protocol keeps a %s", fset.Position(f.Pos()), s)
						}
					}
				case *ast.AssignStmt:
					// s.upstream handed to a variable would be a way round.
					for _, r := range n.Rhs {
						if sel, ok := r.(*ast.SelectorExpr); core && ok && sel.Sel.Name == "upstream" {
							t.Errorf("%s: the target's connection is copied", fset.Position(n.Pos()))
						}
					}
				}
				return true
			})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(writers) != 1 || writers[0] != "forward" {
		t.Errorf("the target is written to by %q; only forward may", writers)
	}
}

func typeName(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return typeName(e.X)
	case *ast.ArrayType:
		return typeName(e.Elt)
	case *ast.SelectorExpr:
		if x, ok := e.X.(*ast.Ident); ok {
			return x.Name + "." + e.Sel.Name
		}
	}
	return ""
}

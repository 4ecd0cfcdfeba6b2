package fsm

import (
	"go/parser"
	"go/token"
	"strconv"
	"testing"
)

// Nothing in the state machine may depend on the machine or the moment.
func TestImports(t *testing.T) {
	forbidden := map[string]bool{"time": true, "os": true, "math/rand": true, "math/rand/v2": true, "crypto/rand": true, "net": true, "runtime": true}
	for _, name := range []string{"command.go", "fsm.go", "keys.go", "read.go", "snapshot.go", "tables.go"} {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range f.Imports {
			if path, _ := strconv.Unquote(i.Path.Value); forbidden[path] {
				t.Errorf("%s imports %s", name, path)
			}
		}
	}
}

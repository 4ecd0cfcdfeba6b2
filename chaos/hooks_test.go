package chaos

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/chaos/cluster"
)

// faultMarks are in the name of everything by which a chaos run steers a node,
// and in what the build stores that it upgrades to.
var faultMarks = []string{"SALLYPORT_CHAOS_", "chaos.marked"}

// TestNoFaultsInTheProduct holds that the faults a chaos run can ask a node for
// are in builds with the tag chaos only, and the events of the build it upgrades
// to in those with the tag chaosnext: neither the binary that users get nor any
// file it is built from knows of them.
func TestNoFaultsInTheProduct(t *testing.T) {
	bin, err := cluster.Binary(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	product, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	for _, mark := range faultMarks {
		if bytes.Contains(product, []byte(mark)) {
			t.Errorf("%s knows %s…: it was built with the tag chaos or chaosnext", bin, mark)
		}
	}
	files := func(tags, mark string) (hooked []string) {
		cmd := exec.Command("go", "list", "-tags", tags, "-deps", "-f", `{{if .Module}}{{$d := .Dir}}{{range .GoFiles}}{{$d}}/{{.}}{{"\n"}}{{end}}{{end}}`, "../cmd/sallyport")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go list: %v", err)
		}
		root, err := filepath.Abs("..")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range strings.Fields(string(out)) {
			if !strings.HasPrefix(name, root+"/") {
				continue
			}
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(b, []byte(mark)) {
				hooked = append(hooked, name)
			}
		}
		return hooked
	}
	for i, tags := range []string{"chaos", "chaosnext"} {
		if hooked := files("", faultMarks[i]); len(hooked) != 0 {
			t.Errorf("files of the product know of %s…: %v", faultMarks[i], hooked)
		}
		if hooked := files(tags, faultMarks[i]); len(hooked) == 0 {
			t.Errorf("a build with the tag %s knows nothing of %s… either: this test sees nothing", tags, faultMarks[i])
		}
	}
}

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

// faultMark is in the name of everything by which a chaos run steers a node.
const faultMark = "SALLYPORT_CHAOS_"

// TestNoFaultsInTheProduct holds that the faults a chaos run can ask a node for
// are in builds with the tag chaos only: neither the binary that users get nor
// any file it is built from knows of them.
func TestNoFaultsInTheProduct(t *testing.T) {
	bin, err := cluster.Binary(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	product, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(product, []byte(faultMark)) {
		t.Errorf("%s knows %s…: it was built with the tag chaos", bin, faultMark)
	}
	files := func(tags string) (hooked []string) {
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
			if bytes.Contains(b, []byte(faultMark)) {
				hooked = append(hooked, name)
			}
		}
		return hooked
	}
	if hooked := files(""); len(hooked) != 0 {
		t.Errorf("files of the product know of faults: %v", hooked)
	}
	if hooked := files("chaos"); len(hooked) == 0 {
		t.Error("a build with the tag chaos has no faults either: this test sees nothing")
	}
}

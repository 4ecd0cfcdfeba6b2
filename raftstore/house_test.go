package raftstore

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// raft's leadership check counts answers to questions asked before it, and
// those of servers without a vote: a deposed leader passes it (DESIGN.md). No
// code of ours calls it.
func TestNobodyAsksRaftForLeadership(t *testing.T) {
	const call = "Verify" + "Leader("
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatal(err)
	}
	n := 0
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // other packages' tests make and remove files
		}
		if d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		n++
		if strings.Contains(string(b), call) {
			t.Errorf("%s calls %s)", path, call)
		}
		return nil
	})
	if err != nil || n < 10 {
		t.Fatalf("%d files, %v", n, err)
	}
}

//go:build chaos

package disk

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

func TestFaultyFS(t *testing.T) {
	dir := t.TempDir()
	control := filepath.Join(dir, "control")
	t.Setenv("SALLYPORT_CHAOS_DISK", control)
	f, err := FS().Create(filepath.Join(dir, "file"), vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	write := func() error {
		_, err := f.Write([]byte("x"))
		return errors.Join(err, f.Sync())
	}
	order := func(s string) {
		t.Helper()
		if err := os.WriteFile(control, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := write(); err != nil {
		t.Fatalf("without an order: %v", err)
	}
	order("fail")
	if err := write(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("told to fail: %v", err)
	}
	order("slow 50ms")
	if began := time.Now(); write() != nil || time.Since(began) < 50*time.Millisecond {
		t.Fatal("told to be slow, and is not")
	}
	order("hang")
	done := make(chan error, 1)
	go func() { done <- write() }()
	select {
	case err := <-done:
		t.Fatalf("told to hang: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	order("")
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

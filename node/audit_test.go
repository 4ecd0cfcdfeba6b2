package node

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/recordingtest"
	"github.com/sallyport/sallyport/recording/spool"
	"github.com/sallyport/sallyport/recording/upload"
)

// A spool that could not be written for a while stops calls, which nothing
// could record, for that while and not for the rest of the day.
func TestAuditGoesOn(t *testing.T) {
	store, err := upload.Open(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	n, dir := recordingtest.NewCA(t).Node(t, "n1"), t.TempDir()
	s, err := spool.Open(spool.Options{Dir: dir, Node: "n1", Cluster: "c", Signer: n.Key, Certificate: n.Cert, Store: store})
	if err != nil {
		t.Fatal(err)
	}
	a, err := openAudit(s, "n1", "test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	call := func() error { return a.call(&recording.Entry{Type: recording.Note, Verb: "status", Effect: "permit"}) }
	begun := func() int {
		t.Helper()
		headers, err := filepath.Glob(filepath.Join(dir, "rec", "*.header"))
		if err != nil {
			t.Fatal(err)
		}
		return len(headers)
	}
	rec := filepath.Join(dir, "rec")
	if err := os.Rename(rec, rec+".gone"); err != nil {
		t.Fatal(err)
	}
	if err := call(); err == nil {
		t.Fatal("recorded nowhere")
	}
	if err := os.Rename(rec+".gone", rec); err != nil {
		t.Fatal(err)
	}
	if err := call(); err == nil || begun() != 1 {
		t.Fatalf("%v, %d recordings begun: each call begins one, which on a full disk takes the last of the room", err, begun())
	}
	a.mu.failed = a.mu.failed.Add(-retryAudit)
	if err := call(); err != nil || begun() != 2 {
		t.Fatalf("there is room again, and calls are still refused: %v, %d recordings begun", err, begun())
	}
	a.close()
}

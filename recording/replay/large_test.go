//go:build large

package replay_test

import (
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/recordingtest"
	"github.com/sallyport/sallyport/recording/recordingtest/recorder"
	"github.com/sallyport/sallyport/recording/replay"
	"github.com/sallyport/sallyport/recording/upload"
)

var (
	bigStore = flag.String("store", "", "directory for the store; default a temporary one")
	bigSize  = flag.Int("mib", 64, "size of each recording before it is compressed")
)

// TestLargeVerify measures verifying recordings of many segments beside reading
// the same files and hashing them once, which no verifying can do without.
func TestLargeVerify(t *testing.T) {
	dir := *bigStore
	if dir == "" {
		dir = t.TempDir()
	}
	store, err := upload.Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	ca := recordingtest.NewCA(t)
	r := recorder.Start(t, ca, "n1", store, "")
	rnd := rand.New(rand.NewPCG(1, 1))
	for n := range 8 {
		w := r.Begin(recording.Header{Session: fmt.Sprint("big", n), Started: started, Protocol: "postgres"})
		for size := 0; size < *bigSize<<20; size += 16 << 10 {
			data := make([]byte, 16<<10) // rows of numbers: they compress to a third
			for i := range data {
				data[i] = "0123456789|\n"[rnd.IntN(12)]
			}
			if err := w.Buffer(&recording.Entry{Type: recording.Response, Op: 1, Data: data}); err != nil {
				t.Fatal(err)
			}
			for r.Status().BytesWaiting > 256<<20 {
				time.Sleep(20 * time.Millisecond) // the store is slower than who records
			}
		}
		if err := w.Close(recording.Ending{Reason: "closed"}); err != nil {
			t.Fatal(err)
		}
	}
	r.Close()
	for range 3 {
		began := time.Now()
		var read int64
		err := filepath.WalkDir(filepath.Join(dir, "sessions"), func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			n, err := io.Copy(h, f)
			read += n
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		plain := time.Since(began)
		began = time.Now()
		rep, err := replay.Verify(t.Context(), store, replay.VerifyOptions{Trust: replay.Trust{Roots: ca.Pool()}})
		if err != nil || !rep.OK() || rep.Verified != 8 {
			t.Fatalf("%+v %v", rep, err)
		}
		took := time.Since(began)
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		unpacked := float64(8 * *bigSize << 20)
		t.Logf("read and hash, one core: %.0f MB/s; verify: %.0f MB/s (%.0f MB/s of entries), %d MB, %d MiB from the system", float64(read)/1e6/plain.Seconds(), float64(rep.Bytes)/1e6/took.Seconds(), unpacked/1e6/took.Seconds(), rep.Bytes/1e6, m.Sys>>20)
	}
}

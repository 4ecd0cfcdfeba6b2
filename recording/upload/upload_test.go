package upload_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/recordingtest/s3server"
	"github.com/sallyport/sallyport/recording/upload"
)

func TestDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := mustOpen(t, "file://"+dir)
	suite(t, s)
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if want := map[bool]os.FileMode{true: 0o700, false: 0o600}[d.IsDir()]; info.Mode().Perm() != want {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, ".tmp")); len(left) != 0 {
		t.Error("temporary files are left:", left)
	}
}

func TestS3(t *testing.T) {
	srv := s3server.Start(t)
	t.Run("prefix", func(t *testing.T) { suite(t, mustOpen(t, srv.URL("a/b"))) })
	t.Run("root", func(t *testing.T) { suite(t, mustOpen(t, srv.URL(""))) })
	t.Run("denied", func(t *testing.T) {
		t.Setenv("AWS_SECRET_ACCESS_KEY", "wrong")
		s := mustOpen(t, srv.URL("c"))
		ctx := context.Background()
		if err := s.Put(ctx, "sessions/x", []byte("x")); err == nil || errors.Is(err, recording.ErrExists) {
			t.Error(err)
		}
		if _, err := s.Get(ctx, "sessions/x"); err == nil || errors.Is(err, recording.ErrNotFound) {
			t.Error(err)
		}
		if err := s.List(ctx, "", "", func(recording.Object) error { return nil }); err == nil {
			t.Error("listed")
		}
	})
	srv.Down()
	if err := mustOpen(t, srv.URL("a/b")).Put(context.Background(), "sessions/y", nil); err == nil {
		t.Error("put into a server that is down")
	}
}

// suite is what every store must do.
func suite(t *testing.T, s recording.Store) {
	t.Helper()
	ctx := context.Background()
	if err := upload.CheckWriteOnce(ctx, s); err != nil {
		t.Fatal(err)
	}
	if err := upload.CheckWriteOnce(ctx, s); err != nil {
		t.Fatal("again:", err)
	}
	const day = "sessions/2026/01/02/"
	// In byte order "s-1/" comes before "s/".
	keys := []string{day + "s-1/000001.seg", day + "s-1/header", day + "s/000001.seg", day + "s/000002.seg", day + "s/header", day + "s/trailer", "sessions/2026/01/03/s/header"}
	big := bytes.Repeat([]byte("0123456789abcdef"), 20<<20/16)
	for i, k := range keys {
		data := fmt.Appendf(nil, "object %d", i)
		if i == 2 {
			data = big
		}
		if err := s.Put(ctx, k, data); err != nil {
			t.Fatal(k, err)
		}
	}
	if err := s.Put(ctx, keys[1], []byte("other")); !errors.Is(err, recording.ErrExists) {
		t.Fatal("overwritten:", err)
	}
	if b, err := s.Get(ctx, keys[1]); err != nil || string(b) != "object 1" {
		t.Fatal(string(b), err)
	}
	if b, err := s.Get(ctx, keys[2]); err != nil || !bytes.Equal(b, big) {
		t.Fatal(len(b), err)
	}
	if _, err := s.Get(ctx, day+"none"); !errors.Is(err, recording.ErrNotFound) {
		t.Fatal(err)
	}
	for _, c := range []struct {
		prefix, after string
		want          []string
	}{
		{"sessions/", "", keys},
		{day + "s/", "", keys[2:6]},
		{day + "s", "", keys[:6]},
		{"sessions/", keys[2], keys[3:]},
		{"sessions/", day[:len(day)-1] + "0", keys[6:]},
		{"sessions/", "sessions/2026/01/02", keys},
		{day, day + "s-1/zzz", keys[2:6]},
		{"nothing/", "", nil},
	} {
		var got []string
		err := s.List(ctx, c.prefix, c.after, func(o recording.Object) error {
			if o.Size == 0 || o.Modified.IsZero() {
				t.Errorf("%+v", o)
			}
			got = append(got, o.Key)
			return nil
		})
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("List(%q, %q) = %q, %v; want %q", c.prefix, c.after, got, err, c.want)
		}
	}
	n := 0
	if err := s.List(ctx, "sessions/", "", func(recording.Object) error { n++; return recording.ErrStop }); err != nil || n != 1 {
		t.Error(n, err)
	}
	other := errors.New("other")
	if err := s.List(ctx, "sessions/", "", func(recording.Object) error { return other }); !errors.Is(err, other) {
		t.Error(err)
	}
	for _, k := range []string{"", "/x", "x/", "a/../b", "../x", "a//b", ".tmp/x", "a/\x00", strings.Repeat("x/", 300) + "x"} {
		if err := s.Put(ctx, k, nil); err == nil {
			t.Errorf("key %q was taken", k)
		}
	}

	// Of many writers of one key one wins, and nobody sees a part of an object.
	var wg sync.WaitGroup
	won := make(chan int, 8)
	for i := range 8 {
		wg.Go(func() {
			err := s.Put(ctx, "sessions/race", bytes.Repeat([]byte{byte('a' + i)}, 100_000))
			if err == nil {
				won <- i
			} else if !errors.Is(err, recording.ErrExists) {
				t.Log("race:", err) // a server may answer 409: try again
			}
			if b, err := s.Get(ctx, "sessions/race"); err == nil && (len(b) != 100_000 || b[0] != b[99_999]) {
				t.Errorf("read %d bytes of a part", len(b))
			}
		})
	}
	wg.Wait()
	close(won)
	var winners []int
	for i := range won {
		winners = append(winners, i)
	}
	if b, err := s.Get(ctx, "sessions/race"); err != nil || len(winners) != 1 || b[0] != byte('a'+winners[0]) {
		t.Errorf("writers %v won; %v", winners, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, loc := range []string{
		"", "ftp://x/y", "s3://", "s3://user:secret@b/", "s3://b?endpoint=http://10.0.0.1:9000", "s3://b?endpoint=10.0.0.1",
		"s3://b?nonsense=1", "s3://b?path-style=maybe", "s3://b?region=a&region=b", "file://host/x", "file:///x?y=1",
	} {
		_, err := upload.Open(context.Background(), loc)
		if err == nil {
			t.Errorf("%q was opened", loc)
		} else if strings.Contains(err.Error(), "secret") && !strings.Contains(err.Error(), "AWS_") {
			t.Error("shows a secret:", err)
		}
	}
}

// TestCheckWriteOnce: a server that ignores If-None-Match is found out.
func TestCheckWriteOnce(t *testing.T) {
	objects := map[string][]byte{}
	var mu sync.Mutex
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if r.Method == http.MethodPut {
			objects[r.URL.Path] = nil
			w.Header().Set("ETag", `"x"`)
			return
		}
		w.Write(objects[r.URL.Path])
	}))
	defer srv.Close()
	t.Setenv("AWS_ACCESS_KEY_ID", "x")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "y")
	s := mustOpen(t, "s3://bucket?path-style=true&region=us-east-1&endpoint="+srv.URL)
	if err := upload.CheckWriteOnce(context.Background(), s); err == nil || !strings.Contains(err.Error(), "overwrites") {
		t.Fatal(err)
	}
}

func mustOpen(t *testing.T, loc string) recording.Store {
	t.Helper()
	s, err := upload.Open(context.Background(), loc)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

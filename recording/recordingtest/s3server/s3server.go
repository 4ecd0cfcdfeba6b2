// Package s3server starts a real S3 server (VersityGW) for tests.
package s3server

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// Server is a running server with an empty bucket.
type Server struct {
	Bucket   string
	Endpoint string // http://127.0.0.1:port
	t        testing.TB
	dir      string
	addr     string
	bin      string
	cmd      *exec.Cmd
}

const (
	// AccessKey and SecretKey are the server's credentials, which Start puts
	// into the test's environment.
	AccessKey = "sallyport-test"
	SecretKey = "sallyport-test-secret"
)

// Start runs a server on a free port of loopback until the test ends, and sets
// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the test. The test fails when
// there is no server to run: what is not tested does not count as working.
func Start(t *testing.T) *Server {
	t.Helper()
	s := &Server{Bucket: "recordings", t: t, dir: t.TempDir(), bin: find(t)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	l.Close()
	s.Endpoint = "http://" + s.addr
	t.Setenv("AWS_ACCESS_KEY_ID", AccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", SecretKey)
	s.Up()
	t.Cleanup(s.Down)
	if err := s.Client().MakeBucket(context.Background(), s.Bucket, minio.MakeBucketOptions{}); err != nil {
		t.Fatal("s3server: make bucket:", err)
	}
	return s
}

// find returns the server's program: $SALLYPORT_TEST_VERSITYGW, .cache/bin of
// the repository, the path, or the cache `make tools` fills.
func find(t testing.TB) string {
	t.Helper()
	var tried []string
	if p := os.Getenv("SALLYPORT_TEST_VERSITYGW"); p != "" {
		tried = append(tried, p)
	}
	dir, err := os.Getwd()
	for err == nil {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			tried = append(tried, filepath.Join(dir, ".cache", "bin", "versitygw"))
			break
		}
		if dir == filepath.Dir(dir) {
			break
		}
		dir = filepath.Dir(dir)
	}
	if p, err := exec.LookPath("versitygw"); err == nil {
		tried = append(tried, p)
	}
	for _, p := range tried {
		if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return p
		}
	}
	t.Fatalf("s3server: versitygw is not there (looked at %v): run `make tools`, or set SALLYPORT_TEST_VERSITYGW", tried)
	return ""
}

// Up starts the server, with what it held before, and waits until it answers.
func (s *Server) Up() {
	s.t.Helper()
	s.cmd = exec.Command(s.bin, "--port", s.addr, "--region", "us-east-1", "posix", s.dir)
	s.cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID="+AccessKey, "ROOT_SECRET_ACCESS_KEY="+SecretKey)
	s.cmd.Stderr = os.Stderr
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal("s3server:", err)
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_, err := s.Client().ListBuckets(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatal("s3server: does not answer:", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Down stops the server at once. Up starts it again.
func (s *Server) Down() {
	if s.cmd != nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.cmd = nil
	}
}

// URL is the store's location in the bucket, under prefix.
func (s *Server) URL(prefix string) string {
	u := url.URL{Scheme: "s3", Host: s.Bucket, Path: "/" + prefix, RawQuery: fmt.Sprintf("endpoint=%s&region=us-east-1&path-style=true", url.QueryEscape(s.Endpoint))}
	return u.String()
}

// Client is a client with the server's credentials, to do what the project's
// own store cannot: overwrite and delete.
func (s *Server) Client() *minio.Client {
	c, err := minio.New(s.addr, &minio.Options{Creds: credentials.NewStaticV4(AccessKey, SecretKey, ""), Region: "us-east-1", BucketLookup: minio.BucketLookupPath, MaxRetries: 1})
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// Overwrite replaces an object as somebody could who owns the bucket.
func (s *Server) Overwrite(t testing.TB, key string, data []byte) {
	t.Helper()
	_, err := s.Client().PutObject(context.Background(), s.Bucket, key, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{})
	if err != nil {
		t.Fatal("s3server: overwrite:", err)
	}
}

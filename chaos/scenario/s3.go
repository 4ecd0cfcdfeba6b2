package scenario

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/sallyport/sallyport/chaos/sandbox"
)

// s3Server is a real server behind a proxy of ours that can be down, slow, or
// change what it says.
type s3Server struct {
	cmd   *exec.Cmd
	front *http.Server
	addr  string
	mood  atomic.Pointer[string] // "", down, slow, lie
	ended chan struct{}          // closed when the process has
}

const s3Key, s3Secret, s3Bucket = "sallyport-chaos", "sallyport-chaos-secret", "recordings"

// startS3 starts it before there is a network of the run: only loopback, which
// sandbox.New leaves up.
func startS3(ctx context.Context, dir string) (*s3Server, error) {
	bin, err := exec.LookPath("versitygw")
	if err != nil {
		return nil, fmt.Errorf("an S3 server: %w: run `make tools`, and put .cache/bin on the PATH", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("loopback: %w: %s", err, out)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	back := l.Addr().String()
	l.Close()
	s := &s3Server{cmd: exec.Command(bin, "--port", back, "--region", "us-east-1", "posix", dir), ended: make(chan struct{})}
	s.cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID="+s3Key, "ROOT_SECRET_ACCESS_KEY="+s3Secret)
	if err := s.spawn(); err != nil {
		return nil, err
	}
	s.set("")
	os.Setenv("AWS_ACCESS_KEY_ID", s3Key) // which nodes and the judge inherit
	os.Setenv("AWS_SECRET_ACCESS_KEY", s3Secret)
	target := &url.URL{Scheme: "http", Host: back}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		r.Out.Host = r.In.Host // what the caller signed
	}}
	proxy.ModifyResponse = func(r *http.Response) error {
		if *s.mood.Load() == "lie" && r.Request.Method == http.MethodPut {
			r.Header.Set("ETag", `"00000000000000000000000000000000"`)
		}
		return nil
	}
	s.front = &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch *s.mood.Load() {
		case "down":
			panic(http.ErrAbortHandler) // the connection breaks
		case "slow":
			select {
			case <-time.After(3 * time.Second):
			case <-r.Context().Done():
				return
			}
		}
		proxy.ServeHTTP(w, r)
	})}
	all, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(all.Addr().String())
	s.addr = net.JoinHostPort(sandbox.Gateway, port)
	go func() { _ = s.front.Serve(all) }()

	client, err := minio.New(back, &minio.Options{Creds: credentials.NewStaticV4(s3Key, s3Secret, ""), Region: "us-east-1", BucketLookup: minio.BucketLookupPath})
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(30 * time.Second); ; {
		err := client.MakeBucket(ctx, s3Bucket, minio.MakeBucketOptions{})
		if err == nil {
			return s, nil
		}
		if time.Now().After(end) {
			s.stop()
			return nil, fmt.Errorf("the S3 server does not answer: %w", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// spawn starts the server as a process that ends with ours. The signal for
// that comes when the thread ends that made the process, and threads do end
// (sandbox.Host.Do): this one is kept until the process has.
func (s *s3Server) spawn() error {
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(s.ended)
		err := s.cmd.Start()
		started <- err
		if err == nil {
			_ = s.cmd.Wait()
		}
	}()
	return <-started
}

func (s *s3Server) set(mood string) { s.mood.Store(&mood) }

func (s *s3Server) url() string {
	u := url.URL{Scheme: "s3", Host: s3Bucket, Path: "/chaos", RawQuery: "endpoint=" + url.QueryEscape("http://"+s.addr) + "&region=us-east-1&path-style=true&plaintext=true"}
	return u.String()
}

func (s *s3Server) stop() {
	if s.front != nil {
		s.front.Close()
	}
	_ = s.cmd.Process.Kill()
	<-s.ended
}

// s3Moods is how many moods playS3 goes through.
const s3Moods = 4

// playS3 has the store of recordings down, slow and lying. Sessions go on, and
// at the end every recording is there and verifies.
func playS3(ctx context.Context, w *World) error {
	for _, mood := range [s3Moods]string{"down", "slow", "lie", "down"} {
		if err := w.load.await(ctx, 3); err != nil {
			return err
		}
		w.fault("the store of recordings: %s", mood)
		w.s3.set(mood)
		w.revokeSome(ctx, 2)
		if err := sleep(ctx, w.length(15*time.Second)); err != nil {
			return err
		}
		// Its spool is all that a killed node has of them.
		n := w.any()
		w.kill(n)
		if err := w.start(n); err != nil {
			return err
		}
		w.fault("the store of recordings is well")
		w.s3.set("")
		if err := w.whole(ctx); err != nil {
			return err
		}
	}
	return nil
}

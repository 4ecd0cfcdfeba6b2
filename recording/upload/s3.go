package upload

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/sallyport/sallyport/recording"
)

// s3Store keeps objects in a bucket, each written by one PUT with
// "If-None-Match: *". No multipart upload is used: parts that were never
// completed would be there without being listed.
type s3Store struct {
	c      *minio.Client
	bucket string
	prefix string // "" or ending in "/"
}

func openS3(u *url.URL) (*s3Store, error) {
	fail := func(format string, args ...any) (*s3Store, error) {
		return nil, fmt.Errorf("recording: store %s: %s", u.Redacted(), fmt.Sprintf(format, args...))
	}
	if u.User != nil {
		return fail("credentials do not belong in the address; use AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
	}
	if u.Host == "" || u.Fragment != "" {
		return fail("it is given as s3://bucket/prefix?region=…")
	}
	q := u.Query()
	for k, v := range q {
		if len(v) != 1 {
			return fail("%s is given %d times", k, len(v))
		}
	}
	flag := func(name string) (bool, error) {
		v := q.Get(name)
		q.Del(name)
		if v == "" {
			return false, nil
		}
		return strconv.ParseBool(v)
	}
	pathStyle, err := flag("path-style")
	if err != nil {
		return fail("path-style is true or false")
	}
	plaintext, err := flag("plaintext")
	if err != nil {
		return fail("plaintext is true or false")
	}
	endpoint, region := q.Get("endpoint"), q.Get("region")
	q.Del("endpoint")
	q.Del("region")
	for k := range q {
		return fail("unknown option %q; known are endpoint, region, path-style, plaintext", k)
	}
	host, secure := "s3.amazonaws.com", true
	if endpoint != "" {
		e, err := url.Parse(endpoint)
		if err != nil || e.Host == "" || e.User != nil || strings.Trim(e.Path, "/") != "" || e.RawQuery != "" || e.Scheme != "http" && e.Scheme != "https" {
			return fail("endpoint is given as https://host:port")
		}
		host, secure = e.Host, e.Scheme == "https"
		if !secure && !plaintext && !loopback(e.Hostname()) {
			return fail("recordings would cross the network in plain text to %s; use https, or say plaintext=true", e.Host)
		}
	}
	lookup := minio.BucketLookupAuto
	if pathStyle {
		lookup = minio.BucketLookupPath
	}
	prefix := strings.Trim(u.Path, "/")
	if prefix != "" {
		prefix += "/"
	}
	transport, err := minio.DefaultTransport(secure)
	if err != nil {
		return fail("%v", err)
	}
	transport.ResponseHeaderTimeout = time.Minute
	c, err := minio.New(host, &minio.Options{
		Creds: credentials.NewChainCredentials([]credentials.Provider{
			&credentials.EnvAWS{},
			&credentials.FileAWSCredentials{},
			&credentials.IAM{Client: &http.Client{Transport: transport, Timeout: 5 * time.Second}},
		}),
		Secure:       secure,
		Region:       region,
		BucketLookup: lookup,
		Transport:    transport,
		MaxRetries:   2, // the spool retries for ever, with a backoff of its own
	})
	if err != nil {
		return fail("%v", err)
	}
	return &s3Store{c: c, bucket: u.Host, prefix: prefix}, nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (s *s3Store) String() string { return "s3://" + s.bucket + "/" + s.prefix }

func (s *s3Store) Put(ctx context.Context, key string, data []byte) error {
	if err := checkKeyName(key); err != nil {
		return err
	}
	o := minio.PutObjectOptions{
		ContentType:      "application/octet-stream",
		DisableMultipart: true,
		// Integrity on the way, and what buckets with Object Lock ask for.
		SendContentMd5: true,
	}
	o.SetMatchETagExcept("*")
	_, err := s.c.PutObject(ctx, s.bucket, s.prefix+key, bytes.NewReader(data), int64(len(data)), o)
	return s3Error(err)
}

func (s *s3Store) Get(ctx context.Context, key string) ([]byte, error) {
	if err := checkKeyName(key); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Core reads with one GET; Object would stat the object before.
	r, info, _, err := minio.Core{Client: s.c}.GetObject(ctx, s.bucket, s.prefix+key, minio.GetObjectOptions{})
	if err != nil {
		return nil, s3Error(err)
	}
	defer r.Close()
	b, err := readObject(r, info.Size)
	if err == nil && int64(len(b)) != info.Size {
		err = fmt.Errorf("recording: store: %d bytes of %d came", len(b), info.Size)
	}
	return b, err
}

func (s *s3Store) List(ctx context.Context, prefix, after string, fn func(recording.Object) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	o := minio.ListObjectsOptions{Prefix: s.prefix + prefix, Recursive: true}
	if after != "" {
		o.StartAfter = s.prefix + after
	}
	last := ""
	for info := range s.c.ListObjectsIter(ctx, s.bucket, o) {
		if info.Err != nil {
			return s3Error(info.Err)
		}
		key, ok := strings.CutPrefix(info.Key, s.prefix)
		if !ok || !strings.HasPrefix(key, prefix) || key <= after {
			continue
		}
		// Readers rely on the order; a server that breaks it must not hide objects.
		if key <= last {
			return fmt.Errorf("recording: store: the listing is out of order at %q", key)
		}
		last = key
		err := fn(recording.Object{Key: key, Size: info.Size, Modified: info.LastModified})
		if errors.Is(err, recording.ErrStop) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

// s3Error turns what callers act on into our errors.
func s3Error(err error) error {
	if err == nil {
		return nil
	}
	switch r := minio.ToErrorResponse(err); {
	case r.StatusCode == http.StatusPreconditionFailed, r.Code == minio.PreconditionFailed:
		return recording.ErrExists
	case r.Code == minio.NoSuchKey:
		return recording.ErrNotFound
	}
	return fmt.Errorf("recording: store: %w", err)
}

package chaos

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/recording/recordingtest/s3server"
)

// TestS3 keeps recordings in a real S3 server. They are listed, replayed and
// verified from its URL alone, and what is done to them in the bucket shows.
func TestS3(t *testing.T) {
	server := s3server.Start(t) // sets credentials, which nodes and CLI inherit
	s := start(t, cluster.Options{Recordings: server.URL("prod")})
	ctx := t.Context()
	if !strings.HasPrefix(s.Recordings, "s3://") {
		t.Fatalf("recordings are in %s", s.Recordings)
	}
	for i, n := range s.Nodes {
		token := s.job(t, fmt.Sprint("s3-", i), "main", nil)
		out, err := n.PSQL(ctx, "shop", token, "SELECT name, email FROM users; SELECT count(*) AS n FROM orders")
		if err != nil || !strings.Contains(out, "Ada|[masked]") {
			t.Fatalf("%v: %s", err, out)
		}
	}
	// The server goes away while a session runs; nothing is lost.
	c := s.login(t, s.Nodes[0], "bench", s.job(t, "s3-outage", "main", nil))
	s.must(t, c.simple(ctx, "SELECT 'before the outage'"))
	server.Down()
	s.must(t, c.simple(ctx, "SELECT 'during the outage'"))
	eventually(t, 30*time.Second, func() string {
		for _, n := range s.status(t, s.Nodes[1]).Nodes {
			if n.Spool.LastError != "" {
				return ""
			}
		}
		return "no node's status tells that the store is down"
	})
	server.Up()
	s.must(t, c.simple(ctx, "SELECT 'after the outage'"))
	s.must(t, c.Close(ctx))

	var session string
	eventually(t, 60*time.Second, func() string {
		done := 0
		for _, r := range s.listRecordings(t, "--kind", "session") {
			if r.Ending != nil {
				done++
			}
			if r.Subject == subject("s3-outage") && r.Ending != nil {
				session = r.Session
			}
		}
		if done != 4 || session == "" {
			return fmt.Sprintf("%d of 4 recordings are complete in the bucket", done)
		}
		return ""
	})
	out := s.cli(t, s.AdminEnv(), "recordings", "replay", session, "--store", s.Recordings)
	for _, want := range []string{"before the outage", "during the outage", "after the outage", subject("s3-outage"), "acme/shop"} {
		if !strings.Contains(out, want) {
			t.Errorf("the replay does not show %q:\n%s", want, out)
		}
	}
	for _, n := range s.Nodes {
		s.must(t, n.Terminate(ctx))
	}
	s.verify(t, s.Recordings)

	// A bucket administrator cannot change it unseen.
	client := server.Client()
	objects := func() (keys []string) {
		for o := range client.ListObjects(ctx, server.Bucket, minio.ListObjectsOptions{Prefix: "prod/", Recursive: true}) {
			s.must(t, o.Err)
			if strings.Contains(o.Key, session) {
				keys = append(keys, o.Key)
			}
		}
		return keys
	}
	put := func(key string, data []byte) {
		_, err := client.PutObject(ctx, server.Bucket, key, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{})
		s.must(t, err)
	}
	keys := objects()
	if len(keys) < 3 {
		t.Fatalf("the recording is of objects %v", keys)
	}
	for _, key := range keys {
		o, err := client.GetObject(ctx, server.Bucket, key, minio.GetObjectOptions{})
		s.must(t, err)
		data, err := io.ReadAll(o)
		s.must(t, err)
		changed := bytes.Clone(data)
		changed[len(changed)/2] ^= 1
		put(key, changed)
		if out := s.cliRefused(t, s.AdminEnv(), []string{"recordings", "verify", "--store", s.Recordings}); !strings.Contains(out, session) || !strings.Contains(out, "altered") {
			t.Errorf("a changed bit in %s is not named:\n%s", key, out)
		}
		s.must(t, client.RemoveObject(context.WithoutCancel(ctx), server.Bucket, key, minio.RemoveObjectOptions{}))
		var rep struct {
			Verified, Recordings int
		}
		out, _ := s.CLI(ctx, s.AdminEnv(), "recordings", "verify", "--json", "--store", s.Recordings)
		s.must(t, json.Unmarshal([]byte(out), &rep))
		if rep.Recordings == 0 || rep.Verified == rep.Recordings {
			t.Errorf("without %s everything verifies: %s", key, out)
		}
		put(key, data)
	}
	s.verify(t, s.Recordings)
}

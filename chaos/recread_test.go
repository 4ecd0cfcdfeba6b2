package chaos

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/index"
)

// TestReadRecordings: a session is watched through a node that it does not run
// on, and afterwards found, exported and verified from the store.
func TestReadRecordings(t *testing.T) {
	s := start(t, cluster.Options{})
	admin := s.AdminEnv()
	session := s.login(t, s.Nodes[0], "bench", s.job(t, "watched", "main", map[string]any{"sha": "feedc0ffee"}))
	s.must(t, session.simple(t.Context(), "SELECT 'the first statement'"))

	id := ""
	eventually(t, 10*time.Second, func() string {
		var live struct {
			Sessions []struct{ ID, Node, Subject string }
		}
		s.must(t, json.Unmarshal([]byte(s.cli(t, admin, "sessions", "list", "--json")), &live))
		for _, l := range live.Sessions {
			if l.Subject == subject("watched") && l.Node == s.Nodes[0].Name {
				id = l.ID
				return ""
			}
		}
		return "the session is not listed"
	})

	// Through another node, by somebody who may and by somebody who may not.
	s.cliRefused(t, on(s.Nodes[1], s.TokenEnv(s.job(t, "nobody", "main", nil))), []string{"recordings", "watch", id}, "sessions:watch")
	s.cliRefused(t, admin, []string{"recordings", "watch", "nosuchsession"}, "no node has a live session")
	watch := s.follow(t, on(s.Nodes[1], admin), "recordings", "watch", id)
	eventually(t, 10*time.Second, func() string { return watch.lacks("the first statement", "permit") })
	s.must(t, session.simple(t.Context(), "SELECT 'the second ' || 'statement'"))
	eventually(t, 10*time.Second, func() string { return watch.lacks("'the second ' || 'statement'", "the second statement") })
	if err := session.simple(t.Context(), "DROP TABLE numbers"); err == nil {
		t.Fatal("the table was dropped")
	}
	s.must(t, session.Close(t.Context()))
	eventually(t, 20*time.Second, func() string { return watch.lacks("DROP TABLE numbers", "refuse", "ended: closed") })
	if err := watch.wait(); err != nil {
		t.Errorf("watch ended with %v\n%s", err, watch.String())
	}

	store := []string{"--store", s.Recordings}
	search := func(env []string, args ...string) (got struct {
		Hits  []index.Hit
		Stats index.Stats
	}) {
		t.Helper()
		out := s.cli(t, env, append([]string{"recordings", "search", "--json"}, args...)...)
		s.must(t, json.Unmarshal([]byte(out), &got))
		return got
	}
	eventually(t, 20*time.Second, func() string {
		r := search(admin, append(store, "--commit", "feedc0ffee", "--text", "drop table NUMBERS", "--decision", "refuse")...)
		if len(r.Hits) != 1 || r.Hits[0].State != "verified" || r.Hits[0].Matches != 1 {
			return "the session is not found, or not finished in the store"
		}
		return ""
	})
	s.cli(t, admin, append([]string{"recordings", "index"}, store...)...)
	byIndex := search(admin, append(store, "--commit", "feedc0ffee", "--table", "numbers")...)
	if len(byIndex.Hits) != 1 || byIndex.Stats.LookedUp == 0 || !byIndex.Hits[0].Indexed {
		t.Errorf("by the index: %+v", byIndex)
	}
	// Through the API, the index too.
	if r := search(admin, "--commit", "feedc0ffee"); len(r.Hits) != 1 || r.Stats.LookedUp != byIndex.Stats.LookedUp {
		t.Errorf("through a node: %+v", r)
	}
	s.cli(t, admin, append([]string{"recordings", "index", "--check"}, store...)...)
	if out := s.cli(t, admin, append([]string{"recordings", "search", "--table", "numbers"}, store...)...); !strings.Contains(out, "looked up in the index") || !strings.Contains(out, "DROP TABLE numbers") {
		t.Errorf("search says:\n%s", out)
	}
	for _, format := range []string{"jsonl", "parquet", "ocsf", "asciicast-v2", "asciicast-v3", "html"} {
		file := filepath.Join(t.TempDir(), format)
		s.cli(t, admin, append([]string{"recordings", "export", id, "--format", format, "--out", file}, store...)...)
		b, err := os.ReadFile(file)
		s.must(t, err)
		if !bytes.Contains(b, []byte("DROP TABLE numbers")) || !bytes.Contains(b, []byte("verified")) {
			t.Errorf("%s: %d bytes without the statement or the verification", format, len(b))
		}
		s.cliRefused(t, admin, append([]string{"recordings", "export", id, "--format", format, "--out", file}, store...), "is there already")
	}
	if out := s.cli(t, admin, append([]string{"recordings", "verify", id}, store...)...); !strings.Contains(out, "MB/s") {
		t.Error(out)
	}
	// A node adds what it has finished to the index when it is stopped.
	s.must(t, s.Nodes[0].Terminate(t.Context()))
	files, err := filepath.Glob(filepath.Join(s.Recordings, "index", "*", "*", "*", "node."+s.Nodes[0].Name+".*.parquet"))
	if err != nil || len(files) == 0 {
		t.Error("the node added nothing to the index", err)
	}
	var calls int
	for _, e := range s.ownEntries(t) {
		if e.Type == recording.Decided && strings.HasSuffix(e.Verb, "/"+id+"/watch") && e.Effect == "permit" {
			calls++
		}
	}
	if calls == 0 {
		t.Error("watching is not in the nodes' recordings")
	}
}

// following is a command whose output is looked at while it runs.
type following struct {
	mu   sync.Mutex
	b    bytes.Buffer
	done chan error
}

func (f *following) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.b.Write(p)
}

func (f *following) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.b.String()
}

// lacks says which of the texts it has not printed yet.
func (f *following) lacks(texts ...string) string {
	for _, text := range texts {
		if !strings.Contains(f.String(), text) {
			return "it has not printed " + text
		}
	}
	return ""
}

// wait waits for its end.
func (f *following) wait() error {
	select {
	case err := <-f.done:
		return err
	case <-time.After(30 * time.Second):
		return context.DeadlineExceeded
	}
}

// follow starts the CLI; it is killed when the test ends.
func (s *suite) follow(t *testing.T, env []string, args ...string) *following {
	t.Helper()
	f := &following{done: make(chan error, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, s.Binary, args...)
	cmd.Env = append([]string{"HOME=" + s.Dir, "PATH=" + os.Getenv("PATH")}, env...)
	cmd.Stdout, cmd.Stderr = f, f
	s.must(t, cmd.Start())
	ended := make(chan struct{})
	go func() {
		f.done <- cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return f
}

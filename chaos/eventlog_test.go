package chaos

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/node/eventlog"
	"github.com/sallyport/sallyport/raftstore/tlog"
)

// TestEventLog: a cluster's event log is exported while nodes die and others
// lead, and an auditor with the CA's certificate verifies it.
func TestEventLog(t *testing.T) {
	s := start(t, cluster.Options{})
	ctx := t.Context()
	state := filepath.Join(t.TempDir(), "seen.json")
	env := []string{"SALLYPORT_CA=" + s.CAFile, "XDG_CONFIG_HOME=" + t.TempDir()}
	verify := func(env []string, args ...string) (eventlog.Report, string) {
		var rep eventlog.Report
		out, err := s.CLI(ctx, env, append([]string{"events", "verify", "--json", "--state", state}, args...)...)
		if jerr := json.Unmarshal([]byte(out), &rep); jerr != nil && err == nil {
			t.Fatalf("%v in %s", jerr, out)
		}
		if err != nil {
			return rep, err.Error()
		}
		return rep, ""
	}
	// seen waits until the exported log covers everything there is now.
	seen := func() eventlog.Report {
		t.Helper()
		var up *cluster.Node
		for _, n := range s.Nodes {
			if n.Running() {
				up = n
			}
		}
		var events uint64
		for _, n := range s.status(t, up).Nodes {
			for _, a := range n.EventLog.Alarms {
				t.Errorf("%s: %s", n.Node, a)
			}
			events = max(events, n.Events)
		}
		var rep eventlog.Report
		eventually(t, time.Minute, func() string {
			var why string
			// A checkpoint's own event is covered by the next one only.
			if rep, why = verify(env, s.Recordings); why == "" && rep.Events+1 < events {
				why = "it ends too early"
			}
			return why
		})
		return rep
	}
	first := seen()
	if len(first.Voters) != 3 || len(first.Cosigned) < 2 {
		t.Errorf("%+v", first)
	}

	leader, err := s.Leader(ctx)
	s.must(t, err)
	leader.Kill()
	s.must(t, s.WaitReady(ctx))
	s.cli(t, s.AdminEnv(), "cluster", "token", "create")
	second := seen()
	if second.Events <= first.Events || !second.Anchored {
		t.Errorf("%+v after %+v", second, first)
	}
	if live, why := verify(append(s.AdminEnv(), env...)); why != "" || live.Events < second.Events {
		t.Errorf("through the API: %s %+v", why, live)
	}
	s.must(t, leader.Start())
	s.must(t, s.WaitReady(ctx))

	proof := filepath.Join(t.TempDir(), "proof.json")
	s.cli(t, env, "events", "prove", "1", s.Recordings, "--out", proof)
	if out := s.cli(t, env, "events", "verify", "--proof", proof, "--state", state); !strings.Contains(out, "cluster.created") {
		t.Errorf("%s", out)
	}

	// One byte of a copy.
	forged := t.TempDir()
	s.must(t, os.CopyFS(forged, os.DirFS(s.Recordings)))
	bundles, err := filepath.Glob(filepath.Join(forged, tlog.Root, "entries", "000.p", "*"))
	if err != nil || len(bundles) == 0 {
		t.Fatalf("%v, %d bundles", err, len(bundles))
	}
	for _, b := range bundles {
		data, err := os.ReadFile(b)
		s.must(t, err)
		data[1000] ^= 1
		s.must(t, os.WriteFile(b, data, 0o600))
	}
	if rep, why := verify(env, forged); why == "" || len(rep.Problems) == 0 || rep.Problems[0].Kind != eventlog.AlteredEntry {
		t.Errorf("a changed event: %q %+v", why, rep.Problems)
	}
}

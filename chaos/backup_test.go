package chaos

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/sallyport/sallyport/chaos/cluster"
)

// TestBackup loses a whole cluster and makes it anew from its backup: what was
// configured works, what was revoked stays revoked, others can join, and the file
// shows nothing and can be nothing else.
func TestBackup(t *testing.T) {
	s := start(t, cluster.Options{Nodes: 2})
	ctx := t.Context()
	token, gone := s.job(t, "survivor", "main", nil), s.job(t, "revoked", "main", nil)
	s.cli(t, s.AdminEnv(), "revoke", "--subject", subject("revoked"), "--reason", "test")

	key, err := age.GenerateX25519Identity()
	s.must(t, err)
	keyFile, passFile := filepath.Join(s.Dir, "backup.key"), filepath.Join(s.Dir, "pass")
	s.must(t, os.WriteFile(keyFile, []byte(key.String()+"\n"), 0o600))
	s.must(t, os.WriteFile(passFile, []byte("a passphrase for the test\n"), 0o600))
	file, withPass := filepath.Join(s.Dir, "cluster.backup"), filepath.Join(s.Dir, "pass.backup")
	// Each node is asked once: one of them hands it to the leader.
	s.cli(t, on(s.Nodes[0], s.AdminEnv()), "cluster", "backup", "-o", file, "--recipient", key.Recipient().String())
	s.cli(t, on(s.Nodes[1], s.AdminEnv()), "cluster", "backup", "-o", withPass, "--passphrase-file", passFile)
	s.cliRefused(t, s.AdminEnv(), []string{"cluster", "backup", "-o", file, "--recipient", key.Recipient().String()}, "exists already")
	s.cliRefused(t, s.TokenEnv(token), []string{"cluster", "backup", "-o", file + "2", "--recipient", key.Recipient().String()}, "admin")
	whole, err := os.ReadFile(file)
	s.must(t, err)
	for _, secret := range []string{"PRIVATE KEY", "AGE-SECRET-KEY", "prod-db", "cluster.created", cluster.TargetName} {
		if bytes.Contains(whole, []byte(secret)) {
			t.Errorf("the file shows %q", secret)
		}
	}

	// Disaster.
	for _, n := range s.Nodes {
		n.Kill()
	}
	addr := s.Nodes[0].Addr
	restore := func(dir, from, name string, more ...string) []string {
		return append([]string{"cluster", "restore", from, "--name", name, "--data-dir", filepath.Join(s.Dir, dir), "--addr", addr,
			"--recordings", s.Recordings, "--dev", "--ca", s.CAFile}, more...)
	}
	damaged := filepath.Join(s.Dir, "damaged.backup")
	for i, c := range []struct {
		content []byte
		has     string
	}{
		{whole[:len(whole)-100], ""},
		{append(bytes.Clone(whole[:len(whole)/2]), append([]byte{whole[len(whole)/2] ^ 1}, whole[len(whole)/2+1:]...)...), ""},
		{[]byte("something else entirely"), "not a backup"},
	} {
		s.must(t, os.WriteFile(damaged, c.content, 0o600))
		s.cliRefused(t, nil, restore("damaged", damaged, "r1", "--identity", keyFile), c.has)
		if _, err := os.Stat(filepath.Join(s.Dir, "damaged", "raft")); err == nil {
			t.Errorf("case %d: a refused backup left something", i)
		}
	}
	other, err := age.GenerateX25519Identity()
	s.must(t, err)
	otherKey := filepath.Join(s.Dir, "other.key")
	s.must(t, os.WriteFile(otherKey, []byte(other.String()), 0o600))
	s.cliRefused(t, nil, restore("other", file, "r1", "--identity", otherKey), "another key")
	s.cliRefused(t, nil, restore("same", file, "n1", "--identity", keyFile), "choose another name")
	// A backup that somebody made who knows the recipient, and not the CA's key.
	forged := filepath.Join(s.Dir, "forged.backup")
	var b bytes.Buffer
	w, err := age.Encrypt(&b, key.Recipient())
	s.must(t, err)
	_, err = w.Write([]byte("sallyport-backup-v1\n\x00\x00\x00\x00\x00\x00\x00\x02{}\x00\x00\x00\x00"))
	s.must(t, err)
	s.must(t, w.Close())
	s.must(t, os.WriteFile(forged, b.Bytes(), 0o600))
	s.cliRefused(t, nil, restore("forged", forged, "r1", "--identity", keyFile), "")

	for _, c := range []struct{ name, from, flag, secret string }{{"r1", file, "--identity", keyFile}, {"r2", withPass, "--passphrase-file", passFile}} {
		s.cli(t, nil, restore(c.name, c.from, c.name, c.flag, c.secret)...)
		dir := filepath.Join(s.Dir, c.name)
		s.must(t, filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			data, err := os.ReadFile(path)
			if bytes.Contains(data, []byte(cluster.AdminPassword)) {
				t.Errorf("%s shows the target's password", path)
			}
			return err
		}))
		n := s.Nodes[0] // same address, so the client side is the same
		cmd := exec.Command(s.Binary, "serve", "--data-dir", dir, "--dev")
		p, err := s.Spawn(filepath.Join(s.Dir, c.name+".log"), cmd)
		s.must(t, err)
		deadline := time.Now().Add(90 * time.Second)
		for {
			out, err := n.PSQL(ctx, "bench", token, "SELECT 'there'")
			if err == nil && strings.Contains(out, "there") {
				break
			}
			if time.Now().After(deadline) {
				log, _ := os.ReadFile(filepath.Join(s.Dir, c.name+".log"))
				t.Fatalf("%s does not serve: %v %s\n%s", c.name, err, out, log)
			}
			time.Sleep(300 * time.Millisecond)
		}
		if out, err := n.PSQL(ctx, "bench", gone, "SELECT 'there'"); err == nil || !strings.Contains(out, "revoked") {
			t.Errorf("who was revoked before the backup is let in after it: %s", out)
		}
		env := on(n, s.AdminEnv())
		if st := s.status(t, n); len(st.Nodes) != 1 || st.Nodes[0].Node != c.name {
			t.Errorf("nodes of before are members: %+v", st.Nodes)
		}
		if join := s.cli(t, env, "cluster", "token", "create"); !strings.HasPrefix(join, "sp2.") {
			t.Errorf("the CA's key did not come back: %s", join)
		}
		if out := s.cli(t, env, "events", "tail"); !strings.Contains(out, "cluster.restored") || !strings.Contains(out, "cluster.created") {
			t.Errorf("events:\n%s", out)
		}
		p.Kill()
	}
}

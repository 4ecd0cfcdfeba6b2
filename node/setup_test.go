package node

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport/sallyport/node/config"
	"github.com/sallyport/sallyport/node/pki"
)

func initNode(t *testing.T) (dir, admin string) {
	t.Helper()
	dir, admin = filepath.Join(t.TempDir(), "n1"), t.TempDir()
	err := Init(InitOptions{Config: &config.Config{Name: "n1", DataDir: dir, Addr: "127.0.0.1:7443"}, Cluster: "c1", AdminOut: admin})
	if err != nil {
		t.Fatal(err)
	}
	return dir, admin
}

// The CA's key is on disk in no form that the disk alone could open, and
// nothing secret is readable by others.
func TestInitLeavesNoKeyOfTheCA(t *testing.T) {
	dir, admin := initNode(t)
	ca, err := pki.LoadCert(filepath.Join(admin, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{dir, admin} {
		err := filepath.WalkDir(d, func(path string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			if st, err := e.Info(); err != nil || st.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s has mode %v", path, st.Mode())
			}
			if key, err := pki.LoadKey(path); err == nil && key.PublicKey.Equal(ca.PublicKey) {
				t.Errorf("%s holds the CA's key", path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := Init(InitOptions{Config: &config.Config{Name: "n1", DataDir: dir, Addr: "127.0.0.1:7443"}, AdminOut: admin}); err == nil || !strings.Contains(err.Error(), "already holds a node") {
		t.Fatalf("a second init of one directory: %v", err)
	}
}

func TestNewChecksItsKeys(t *testing.T) {
	dir, _ := initNode(t)
	cfg, err := config.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(cfg, "test", nil); err != nil {
		t.Fatal(err)
	}
	cfg.Name = "n2"
	if _, err := New(cfg, "test", nil); err == nil {
		t.Fatal("a node under another name than its certificate's")
	}
	cfg.Name = "n1"
	other, _ := initNode(t)
	ca, err := os.ReadFile(filepath.Join(other, caFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, caFile), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(cfg, "test", nil); err == nil {
		t.Fatal("a node whose certificate another CA has signed")
	}
}

// Before the token's secret is sent, the server must show the CA that the
// token pins, and a certificate of it.
func TestVerifyPinned(t *testing.T) {
	load := func(dir string) (leaf, ca *x509.Certificate) {
		var err error
		if leaf, err = pki.LoadCert(filepath.Join(dir, nodeCertFile)); err != nil {
			t.Fatal(err)
		}
		if ca, err = pki.LoadCert(filepath.Join(dir, caFile)); err != nil {
			t.Fatal(err)
		}
		return leaf, ca
	}
	dir, admin := initNode(t)
	leaf, ca := load(dir)
	otherDir, _ := initNode(t)
	otherLeaf, otherCA := load(otherDir)
	adminCert, err := pki.LoadCert(filepath.Join(admin, "admin.crt"))
	if err != nil {
		t.Fatal(err)
	}
	hash := pki.CAHash(ca.Raw)
	for _, c := range []struct {
		name  string
		chain []*x509.Certificate
		good  bool
	}{
		{"the cluster's", []*x509.Certificate{leaf, ca}, true},
		{"no CA sent", []*x509.Certificate{leaf}, false},
		{"another cluster's", []*x509.Certificate{otherLeaf, otherCA}, false},
		{"another's leaf under the pinned CA", []*x509.Certificate{otherLeaf, ca}, false},
		{"an administrator's certificate", []*x509.Certificate{adminCert, ca}, false},
		{"nothing", nil, false},
	} {
		if err := verifyPinned(c.chain, hash[:]); (err == nil) != c.good {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestJoinRefusesBadTokens(t *testing.T) {
	for name, token := range map[string]string{
		"empty":        "",
		"another kind": "abc.def.ghi.jkl",
		"no hash":      "sp1.id.secret.",
		"short hash":   "sp1.id.secret." + base64.RawURLEncoding.EncodeToString(bytes.Repeat([]byte{1}, 8)),
	} {
		dir := filepath.Join(t.TempDir(), "n2")
		err := Join(t.Context(), JoinOptions{Config: &config.Config{Name: "n2", DataDir: dir, Addr: "127.0.0.1:7444"}, Token: token, Server: "127.0.0.1:1"})
		if err == nil || !strings.Contains(err.Error(), "token") {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(filepath.Join(dir, config.FileName)); err == nil {
			t.Errorf("%s: a node was made all the same", name)
		}
	}
}

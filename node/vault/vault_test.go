package vault

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"
	"gopkg.in/yaml.v3"
)

func mustVault(t *testing.T) *Vault {
	t.Helper()
	v, err := New()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestSealOpen(t *testing.T) {
	v, other := mustVault(t), mustVault(t)
	const name = "target/prod-db/admin-password"
	for _, plain := range [][]byte{nil, []byte("hunter2"), bytes.Repeat([]byte("x"), MaxPlaintext)} {
		sealed, err := Seal(name, plain, v.Recipient())
		if err != nil {
			t.Fatal(err)
		}
		if len(plain) > 0 && bytes.Contains(sealed, plain) {
			t.Fatal("sealed blob shows its content")
		}
		got, err := v.Open(name, sealed)
		if err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("%d bytes: got %d, %v", len(plain), len(got), err)
		}
		if _, err := v.Open("target/other/admin-password", sealed); !errors.Is(err, ErrWrongName) {
			t.Errorf("swapped blob: %v", err)
		}
		if _, err := other.Open(name, sealed); err == nil {
			t.Error("another vault opened it")
		}
		for _, i := range []int{len(sealed) - 1, len(sealed) / 2, 30} {
			bad := append([]byte(nil), sealed...)
			bad[i] ^= 1
			if _, err := v.Open(name, bad); err == nil {
				t.Errorf("opened with byte %d changed", i)
			}
		}
		if _, err := v.Open(name, sealed[:len(sealed)-1]); err == nil {
			t.Error("opened when cut short")
		}
	}
}

func TestSealRefuses(t *testing.T) {
	v := mustVault(t)
	for what, f := range map[string]func() error{
		"recipient": func() error { _, e := Seal("n", nil, "age1nope"); return e },
		"nobody":    func() error { _, e := Seal("n", nil); return e },
		"no name":   func() error { _, e := Seal("", nil, v.Recipient()); return e },
		"long name": func() error { _, e := Seal(strings.Repeat("n", maxName+1), nil, v.Recipient()); return e },
		"too large": func() error { _, e := Seal("n", make([]byte, MaxPlaintext+1), v.Recipient()); return e },
		"huge blob": func() error { _, e := v.Open("n", make([]byte, maxBlob+1)); return e },
		"not ours": func() error {
			r, _ := age.ParseX25519Recipient(v.Recipient())
			var b bytes.Buffer
			w, _ := age.Encrypt(&b, r)
			w.Write([]byte("hello"))
			w.Close()
			_, e := v.Open("n", b.Bytes())
			return e
		},
	} {
		if f() == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}

func TestWrap(t *testing.T) {
	v := mustVault(t)
	n1, err := NewNodeIdentity()
	if err != nil {
		t.Fatal(err)
	}
	n2, _ := NewNodeIdentity()
	wrap, err := v.Wrap(n1.Recipient())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "node.key")
	if err := n1.Save(path); err != nil {
		t.Fatal(err)
	}
	loaded, err := LoadNodeIdentity(path)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Unwrap(loaded, wrap, v.Recipient())
	if err != nil || got.Recipient() != v.Recipient() {
		t.Fatal(err)
	}
	if _, err := Unwrap(n2, wrap, v.Recipient()); err == nil {
		t.Error("another node unwrapped it")
	}
	if _, err := Unwrap(n1, wrap, mustVault(t).Recipient()); err == nil {
		t.Error("a vault other than the cluster's was accepted")
	}
	// A wrap is not a secret and a secret is not a wrap.
	sealed, _ := Seal("x", []byte("y"), n1.Recipient())
	if _, err := Unwrap(n1, sealed, v.Recipient()); err == nil {
		t.Error("a sealed secret was unwrapped")
	}
	os.Chmod(path, 0o644)
	if _, err := LoadNodeIdentity(path); err == nil {
		t.Error("loaded a key that every user may read")
	}
	os.Chmod(path, 0o600)
	os.WriteFile(path, []byte("AGE-SECRET-KEY-1OOPS"), 0o600)
	if _, err := LoadNodeIdentity(path); err == nil || strings.Contains(err.Error(), "OOPS") {
		t.Errorf("damaged key: %v", err)
	}
}

func TestSecretSaysNothing(t *testing.T) {
	const plain = "hunter2"
	s := NewSecret(plain)
	v := mustVault(t)
	holder := struct {
		A      Secret
		hidden Secret
		P      *Secret
		M      map[string]Secret
	}{s, s, &s, map[string]Secret{"k": s}}
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%T"} {
		fmt.Fprintf(&out, verb, s)
		fmt.Fprintf(&out, verb, &s)
		fmt.Fprintf(&out, verb, holder)
		fmt.Fprintf(&out, verb, v)
	}
	j, err := json.Marshal(holder)
	if err != nil {
		t.Fatal(err)
	}
	y, err := yaml.Marshal(holder.A)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(j)
	out.Write(y)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "s", s, "h", holder)
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "s", s, "h", holder)
	for _, leak := range []string{plain, fmt.Sprintf("%x", plain), "AGE-SECRET"} {
		if strings.Contains(out.String(), leak) {
			t.Errorf("output shows %q:\n%s", leak, out.String())
		}
	}
	if s.Reveal() != plain || (Secret{}).Reveal() != "" || !(Secret{}).IsZero() || s.IsZero() {
		t.Error("Reveal or IsZero")
	}
}

// What is sealed to some nodes is opened by each of them and by no other.
func TestSealToNodes(t *testing.T) {
	var ids []*NodeIdentity
	for range 3 {
		n, err := NewNodeIdentity()
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, n)
	}
	sealed, err := Seal("target/a", []byte("secret"), ids[0].Recipient(), ids[1].Recipient())
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range ids {
		got, err := n.Open("target/a", sealed)
		if i < 2 && (err != nil || string(got) != "secret") {
			t.Errorf("node %d: %q, %v", i, got, err)
		}
		if i == 2 && !errors.Is(err, ErrNotSealedToUs) {
			t.Errorf("another node: %q, %v", got, err)
		}
	}
	if _, err := ids[0].Open("target/b", sealed); !errors.Is(err, ErrWrongName) {
		t.Errorf("under another name: %v", err)
	}
}

package bundle

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore/event"
)

var rewrite = flag.Bool("rewrite", false, "rewrite the expectations in testdata")

const permitAdmins = `permit (principal in Group::"admins", action in Action::"api", resource);`

const minimalTarget = `kind: Target
name: db
address: db:5432
admin: {user: admin, password: keep}
databases: [shop]
roles: [{groups: [ci], role: app}]
`

const minimalProvider = `kind: IdentityProvider
name: sso
subjects: user
issuer: https://login.example.com
audience: sallyport
`

// TestExample: the example that we hand out is valid, and reads the same again.
func TestExample(t *testing.T) {
	env := func(name string) string { return map[string]string{"PROD_DB_ADMIN_PASSWORD": "s3cret"}[name] }
	b, secrets, problems := Load(os.DirFS("../../deploy/example"), LoadOptions{Getenv: env})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	if len(secrets) != 1 || string(secrets["target/prod-db/admin-password"]) != "s3cret" {
		t.Errorf("secrets are %v", secrets)
	}
	again, problems := Parse(b.Files, b.SecretNames(), ParseOptions{})
	if len(problems) > 0 || again.Digest != b.Digest || len(again.Digest) != 64 {
		t.Errorf("read again: digest %s, was %s; problems %v", again.Digest, b.Digest, problems)
	}
	if changes := Plan(b, again); len(changes) != 0 {
		t.Errorf("plan to the same: %v", changes)
	}
	if _, problems := Parse(b.Files, nil, ParseOptions{}); len(problems) != 1 || !strings.HasPrefix(problems[0].String(), "targets.yaml:11: ") {
		t.Errorf("without the password: %v", problems)
	}
	target := b.Targets["prod-db"]
	for _, c := range []struct {
		groups  []string
		profile string
		role    string
	}{
		{[]string{"deployers", "ci"}, "migrate", "shop_owner"},
		{[]string{"deployers", "ci"}, "", "shop_app"},
		{[]string{"ci"}, "migrate", ""},
		{[]string{"dba"}, "", "shop_read"},
		{nil, "", ""},
	} {
		if role, ok := target.RoleFor(c.groups, c.profile); role != c.role || ok != (c.role != "") {
			t.Errorf("%v with profile %q: role %q, %v", c.groups, c.profile, role, ok)
		}
	}
	if !target.Allows("shop") || target.Allows("postgres") {
		t.Error("Allows")
	}
	if p := b.Providers["github"]; !p.Shared || p.Kind != policy.Workload || p.Validate() != nil {
		t.Errorf("provider %+v: %v", p, p.Validate())
	}
	if b.Providers["sso"].Shared {
		t.Error("sso is shared")
	}
}

// TestRefusals runs testdata/refusals: configurations and what is wrong with
// them. An archive whose comment says "dev" is read as with --dev.
func TestRefusals(t *testing.T) {
	eachArchive(t, "testdata/refusals/*.txt", "problems", func(a *txtar.Archive) string {
		var files []event.ConfigFile
		for _, f := range a.Files {
			if f.Name != "problems" {
				files = append(files, event.ConfigFile{Path: f.Name, Data: f.Data})
			}
		}
		files = append(files, event.ConfigFile{Path: "zz-admins.cedar", Data: []byte(permitAdmins)})
		opts := ParseOptions{Dev: strings.Contains(string(a.Comment), "dev")}
		b, problems := Parse(files, []string{"target/db/admin-password"}, opts)
		if (b == nil) == (len(problems) == 0) {
			t.Errorf("bundle %v with %d problems", b, len(problems))
		}
		return lines(problems)
	})
}

// TestPlan runs testdata/plan: files under old/ and new/, and the plan.
func TestPlan(t *testing.T) {
	eachArchive(t, "testdata/plan/*.txt", "plan", func(a *txtar.Archive) string {
		side := func(dir string) *Bundle {
			var files []event.ConfigFile
			for _, f := range a.Files {
				if name, ok := strings.CutPrefix(f.Name, dir+"/"); ok {
					files = append(files, event.ConfigFile{Path: name, Data: f.Data})
				}
			}
			if files == nil {
				return nil
			}
			b, problems := Parse(files, []string{"target/db/admin-password", "target/other/admin-password"}, ParseOptions{})
			if b == nil {
				t.Fatalf("%s: %v", dir, problems)
			}
			return b
		}
		return lines(Plan(side("old"), side("new")))
	})
}

func eachArchive(t *testing.T, pattern, section string, run func(*txtar.Archive) string) {
	paths, _ := filepath.Glob(pattern)
	if len(paths) == 0 {
		t.Fatalf("nothing matches %s", pattern)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			archive, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			at := slices.IndexFunc(archive.Files, func(f txtar.File) bool { return f.Name == section })
			if at < 0 {
				t.Fatalf("no section %s", section)
			}
			got := []byte(run(archive))
			if bytes.Equal(got, archive.Files[at].Data) {
				return
			}
			if !*rewrite {
				t.Fatalf("%s is now (use -rewrite if this is right):\n%s", section, got)
			}
			archive.Files[at].Data = got
			if err := os.WriteFile(path, txtar.Format(archive), 0o644); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func lines[T fmt.Stringer](in []T) string {
	var b strings.Builder
	for _, l := range in {
		fmt.Fprintln(&b, l)
	}
	return b.String()
}

func TestLoad(t *testing.T) {
	dir := func(extra map[string]string) fstest.MapFS {
		m := fstest.MapFS{"p.cedar": {Data: []byte(permitAdmins)}, "t.yaml": {Data: []byte(minimalTarget)}}
		for name, text := range extra {
			m[name] = &fstest.MapFile{Data: []byte(text)}
		}
		return m
	}
	with := func(how string) string { return strings.Replace(minimalTarget, "password: keep", how, 1) }
	opts := LoadOptions{
		Getenv: func(name string) string { return map[string]string{"PW": "from-env", "LINES": "a\nb"}[name] },
		ReadFile: func(name string) ([]byte, error) {
			switch name {
			case "/etc/pw", "secrets/pw.txt":
				return []byte("from-file\r\n"), nil
			case "/etc/empty":
				return []byte("\n"), nil
			case "/etc/long":
				return make([]byte, 5000), nil
			}
			return nil, fs.ErrNotExist
		},
	}
	for name, c := range map[string]struct {
		files  map[string]string
		secret string // "" for none
		bad    string // what a problem says; "" for none
	}{
		"keep":          {nil, "", ""},
		"env":           {map[string]string{"t.yaml": with("passwordEnv: PW")}, "from-env", ""},
		"file":          {map[string]string{"t.yaml": with("passwordFile: /etc/pw")}, "from-file", ""},
		"file inside":   {map[string]string{"t.yaml": with("passwordFile: secrets/pw.txt"), "secrets/pw.txt": "x"}, "from-file", ""},
		"no env":        {map[string]string{"t.yaml": with("passwordEnv: NONE")}, "", "t.yaml:1: target db: admin: environment variable NONE is not set"},
		"two lines":     {map[string]string{"t.yaml": with("passwordEnv: LINES")}, "", "t.yaml:1: target db: admin: environment variable LINES holds more than one line"},
		"no file":       {map[string]string{"t.yaml": with("passwordFile: /nowhere")}, "", "t.yaml:1: target db: admin: password file /nowhere cannot be read: file does not exist"},
		"empty file":    {map[string]string{"t.yaml": with("passwordFile: /etc/empty")}, "", "t.yaml:1: target db: admin: password file /etc/empty is empty"},
		"long file":     {map[string]string{"t.yaml": with("passwordFile: /etc/long")}, "", "t.yaml:1: target db: admin: password file /etc/long holds more than 1023 bytes"},
		"left out":      {map[string]string{"README.md": "x", ".git/config": "x", ".hidden.yaml": "kind: Nothing", "sub/README": "x"}, "", ""},
		"stranger":      {map[string]string{"notes.txt": "x"}, "", "notes.txt: not a file of a configuration"},
		"script":        {map[string]string{"sub/run.sh": "x"}, "", "sub/run.sh: not a file of a configuration"},
		"too large":     {map[string]string{"big.yaml": "# " + strings.Repeat("x", maxTotalBytes)}, "", "big.yaml: with this file the configuration is larger"},
		"stranger also": {map[string]string{"x.json": "{}", "y.yaml": "kind: Y"}, "", "y.yaml:1: unknown kind \"Y\""},
	} {
		b, secrets, problems := Load(dir(c.files), opts)
		if c.bad != "" {
			if b != nil || !strings.Contains(lines(problems), c.bad) {
				t.Errorf("%s: problems %v", name, problems)
			}
			continue
		}
		if b == nil {
			t.Errorf("%s: %v", name, problems)
			continue
		}
		if got := string(secrets["target/db/admin-password"]); got != c.secret {
			t.Errorf("%s: secret %q", name, got)
		}
		if strings.Contains(fmt.Sprintf("%v %s %#v %+v", secrets, secrets, secrets, secrets), "from-") {
			t.Errorf("%s: the secret shows when printed", name)
		}
		again, problems := Parse(b.Files, []string{"target/db/admin-password"}, ParseOptions{})
		if again == nil || again.Digest != b.Digest {
			t.Errorf("%s: read again: %v", name, problems)
		}
	}
	// Without ReadFile, only files inside the directory are read.
	for _, name := range []string{"/etc/passwd", "../x"} {
		_, _, problems := Load(dir(map[string]string{"t.yaml": with("passwordFile: " + name)}), LoadOptions{})
		if len(problems) != 1 {
			t.Errorf("%s: %v", name, problems)
		}
	}
	if _, _, problems := Load(brokenFS{}, LoadOptions{}); len(problems) != 1 {
		t.Errorf("unreadable: %v", problems)
	}
	many := map[string]string{}
	for i := range maxFiles {
		many[fmt.Sprintf("f%d.yaml", i)] = "# nothing\n"
	}
	if _, _, problems := Load(dir(many), LoadOptions{}); len(problems) != 1 || !strings.Contains(problems[0].Message, "larger than 500 files") {
		t.Errorf("many files: %v", problems)
	}
}

type brokenFS struct{}

func (brokenFS) Open(string) (fs.File, error) { return nil, errors.New("broken") }

// TestParseFiles: what an event may hold is checked as what a directory holds.
func TestParseFiles(t *testing.T) {
	ok := event.ConfigFile{Path: "p.cedar", Data: []byte(permitAdmins)}
	for name, files := range map[string][]event.ConfigFile{
		"none":     {},
		"outside":  {ok, {Path: "../x.yaml"}},
		"absolute": {ok, {Path: "/x.yaml"}},
		"unclean":  {ok, {Path: "a/../x.yaml"}},
		"control":  {ok, {Path: "a\nb.yaml"}},
		"stranger": {ok, {Path: "x.sh"}},
		"twice":    {ok, ok},
		"large":    {ok, {Path: "x.yaml", Data: make([]byte, maxTotalBytes+1)}},
		"many":     slices.Repeat([]event.ConfigFile{ok}, maxFiles+1),
		"no admin": {{Path: "p.cedar", Data: []byte(`permit (principal, action == Action::"connect", resource);`)}},
	} {
		if b, problems := Parse(files, nil, ParseOptions{}); b != nil || len(problems) == 0 {
			t.Errorf("%s: taken", name)
		}
	}
	if b, problems := Parse([]event.ConfigFile{ok}, nil, ParseOptions{}); b == nil {
		t.Error(problems)
	}
}

func TestCertificates(t *testing.T) {
	cert, key := selfSigned(t)
	parse := func(pemData []byte, use string) (*Bundle, []policy.Problem) {
		return Parse([]event.ConfigFile{
			{Path: "p.cedar", Data: []byte(permitAdmins)},
			{Path: "tls/ca.pem", Data: pemData},
			{Path: "t.yaml", Data: []byte(minimalTarget + "tls: " + use + "\n")},
			{Path: "i.yaml", Data: []byte(minimalProvider + "caFile: tls/ca.pem\n")},
		}, []string{"target/db/admin-password"}, ParseOptions{})
	}
	b, problems := parse(cert, "{caFile: tls/ca.pem, serverName: db.internal}")
	if b == nil {
		t.Fatal(problems)
	}
	if !bytes.Equal(b.Targets["db"].TLS.CA, cert) || !bytes.Equal(b.Providers["sso"].CA, cert) {
		t.Error("the certificate did not arrive")
	}
	if b, _ := parse(cert, "{mode: verify-ca, caFile: tls/ca.pem}"); b == nil || b.Targets["db"].TLS.Mode != VerifyCA {
		t.Error("verify-ca")
	}
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"key":     {slices.Concat(cert, key), "tls/ca.pem: the file holds a private key"},
		"empty":   {nil, "tls/ca.pem: the file holds no certificate"},
		"cut":     {cert[:len(cert)/2], "tls/ca.pem: the file holds no certificate"},
		"cut two": {slices.Concat(cert, cert[:len(cert)/2]), "tls/ca.pem: what follows certificate 1"},
		"broken":  {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}), "tls/ca.pem: certificate 1 cannot be read"},
	} {
		b, problems := parse(c.data, "{caFile: tls/ca.pem}")
		if b != nil || !strings.Contains(lines(problems), c.want) {
			t.Errorf("%s: %v", name, problems)
		}
	}
	// The plan shows that a certificate changed though its name did not.
	old, _ := parse(cert, "{caFile: tls/ca.pem}")
	other, _ := selfSigned(t)
	is, _ := parse(other, "{caFile: tls/ca.pem}")
	if plan := lines(Plan(old, is)); !strings.Contains(plan, "~ file tls/ca.pem") {
		t.Errorf("plan: %s", plan)
	}
}

func selfSigned(t *testing.T) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

// FuzzParse: whatever the files, Parse neither panics nor takes what it
// complains about, and what it takes reads the same again.
func FuzzParse(f *testing.F) {
	f.Add(minimalTarget, permitAdmins)
	f.Add(minimalProvider+"---\n"+minimalTarget, permitAdmins)
	f.Add("kind: Target\nname: &a x\ntls: *a\n", "")
	f.Add("kind: IdentityProvider\nrequire: {a: [b, c], d: e}\ngroupRules:\n  - when: {x: y}\n", "permit(")
	f.Add("- a\n- {b: c}\n", permitAdmins)
	f.Fuzz(func(t *testing.T, yaml, cedar string) {
		files := []event.ConfigFile{{Path: "a.yaml", Data: []byte(yaml)}, {Path: "b.cedar", Data: []byte(cedar)}}
		b, problems := Parse(files, []string{"target/db/admin-password"}, ParseOptions{})
		if (b == nil) == (len(problems) == 0) {
			t.Fatalf("bundle %v, problems %v", b, problems)
		}
		if b == nil {
			return
		}
		again, _ := Parse(b.Files, b.SecretNames(), ParseOptions{})
		if again == nil || again.Digest != b.Digest || len(Plan(b, again)) != 0 || len(Plan(nil, b)) == 0 {
			t.Fatal("reads otherwise the second time")
		}
	})
}

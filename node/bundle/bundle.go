// Package bundle is the configuration that a cluster shares: targets, identity
// providers and policies, as a directory of files that people write and
// review. Load reads a directory with the secrets that it names; Parse reads
// the same files on every node, out of the event that carries them; Plan says
// what changes from one to the next.
//
// A bundle is taken whole or not at all: with any Problem there is no Bundle.
// Parse is a function of its input, so that all nodes agree; secrets are never
// in the files, and never in this package's messages.
package bundle

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore/event"
)

// Limits on a bundle. It becomes one event that every node stores and parses;
// Raft entries should stay below a few MiB.
const (
	maxTotalBytes = 1 << 20
	maxFiles      = 500
	maxPathBytes  = 255
)

// Bundle is a valid configuration. It is immutable.
type Bundle struct {
	Targets   map[string]*Target
	Providers map[string]*Provider
	Policies  *policy.Set
	Files     []event.ConfigFile // sorted by path
	Digest    string             // SHA-256 in hex over Files
}

// SecretNames lists the secrets that the bundle needs, sorted.
func (b *Bundle) SecretNames() []string {
	names := make([]string, 0, len(b.Targets))
	for _, t := range b.Targets {
		names = append(names, t.SecretName())
	}
	slices.Sort(names)
	return names
}

// ParseOptions of Parse.
type ParseOptions struct {
	// Dev admits what is marked `dev: true`, as on nodes started with --dev.
	Dev bool
}

type file = event.ConfigFile

// reading collects what the files say.
type reading struct {
	dev       bool
	secrets   map[string]bool // nil: any secret may be there
	files     map[string]file
	targets   map[string]*Target
	providers map[string]*Provider
	problems  []policy.Problem
}

// Parse reads files. secretNames are the secrets that exist, given now or
// stored before: a target whose password is not among them is a Problem.
func Parse(files []event.ConfigFile, secretNames []string, opts ParseOptions) (*Bundle, []policy.Problem) {
	secrets := make(map[string]bool, len(secretNames))
	for _, n := range secretNames {
		secrets[n] = true
	}
	b, r := parse(files, secrets, opts)
	return b, r.problems
}

// parse returns a Bundle, or a reading with problems.
func parse(files []event.ConfigFile, secrets map[string]bool, opts ParseOptions) (*Bundle, *reading) {
	files = slices.Clone(files)
	slices.SortStableFunc(files, func(a, b file) int { return strings.Compare(a.Path, b.Path) })
	r := &reading{dev: opts.Dev, secrets: secrets, files: map[string]file{}, targets: map[string]*Target{}, providers: map[string]*Provider{}}
	if r.problems = checkFiles(files); len(r.problems) > 0 {
		return nil, r
	}
	for _, f := range files {
		r.files[f.Path] = f
	}
	var policies []policy.File
	for _, f := range files {
		switch path.Ext(f.Path) {
		case ".cedar":
			policies = append(policies, policy.File{Path: f.Path, Data: f.Data})
		case ".pem":
			if _, err := certificates(f.Data); err != nil {
				r.report(f.Path, 0, "%s", err)
			}
		case ".yaml", ".yml":
			report := func(line int, format string, args ...any) { r.report(f.Path, line, format, args...) }
			for _, doc := range documents(f, report) {
				r.document(f, doc)
			}
		}
	}
	r.together()
	set, problems := policy.Compile(policies)
	r.problems = append(r.problems, problems...)
	if set != nil {
		r.policies(set)
	}
	if len(r.problems) > 0 {
		sortProblems(r.problems)
		return nil, r
	}
	return &Bundle{Targets: r.targets, Providers: r.providers, Policies: set, Files: files, Digest: digest(files)}, r
}

func sortProblems(problems []policy.Problem) {
	slices.SortStableFunc(problems, func(a, b policy.Problem) int {
		if c := strings.Compare(a.Path, b.Path); c != 0 {
			return c
		}
		return a.Line - b.Line
	})
}

// checkFiles checks what must hold before anything is read.
func checkFiles(files []file) (problems []policy.Problem) {
	total := 0
	for i, f := range files {
		total += len(f.Data)
		switch {
		case f.Path == "" || len(f.Path) > maxPathBytes || f.Path != path.Clean(f.Path) || path.IsAbs(f.Path) || strings.HasPrefix(f.Path, "../") || f.Path == ".." || strings.ContainsAny(f.Path, "\\\x00\n\r"):
			problems = append(problems, policy.Problem{Path: fmt.Sprintf("%q", f.Path), Message: fmt.Sprintf("not a relative path of at most %d bytes", maxPathBytes)})
		case !taken(f.Path):
			problems = append(problems, policy.Problem{Path: f.Path, Message: wrongKind})
		case i > 0 && files[i-1].Path == f.Path:
			problems = append(problems, policy.Problem{Path: f.Path, Message: "the file is given twice"})
		}
	}
	if len(files) > maxFiles {
		return []policy.Problem{{Message: fmt.Sprintf("%d files; a configuration has at most %d", len(files), maxFiles)}}
	}
	if total > maxTotalBytes {
		return []policy.Problem{{Message: fmt.Sprintf("%d bytes in all; a configuration has at most %d", total, maxTotalBytes)}}
	}
	if len(files) == 0 {
		return []policy.Problem{{Message: "no files: a configuration needs at least policies (*.cedar)"}}
	}
	return problems
}

const wrongKind = "not a file of a configuration: only *.yaml, *.yml, *.cedar and *.pem are taken (README files, hidden files and password files that a target names are left out)"

func taken(name string) bool {
	switch path.Ext(name) {
	case ".yaml", ".yml", ".cedar", ".pem":
		return true
	}
	return false
}

// digest is over paths and contents in order; lengths keep one from running
// into the next.
func digest(files []file) string {
	h := sha256.New()
	for _, f := range files {
		for _, part := range [][]byte{[]byte(f.Path), f.Data} {
			var n [8]byte
			binary.BigEndian.PutUint64(n[:], uint64(len(part)))
			h.Write(n[:])
			h.Write(part)
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

func (r *reading) report(path string, line int, format string, args ...any) {
	r.problems = append(r.problems, policy.Problem{Path: path, Line: line, Message: fmt.Sprintf(format, args...)})
}

func (r *reading) document(f file, o *object) {
	switch kind := o.required("kind"); kind {
	case "Target":
		r.target(f, o)
	case "IdentityProvider":
		r.provider(f, o)
	case "":
	default:
		o.report(o.line("kind"), "unknown kind %q; want Target or IdentityProvider", kind)
	}
}

// together checks what only shows between documents.
func (r *reading) together() {
	byAudience := map[[2]string]*Provider{}
	for _, name := range sortedKeys(r.providers) {
		p := r.providers[name]
		key := [2]string{p.Issuer, p.Audience}
		if first := byAudience[key]; first != nil && p.Issuer != "" {
			r.report(p.path, p.line, "identity provider %s: issuer and audience are those of identity provider %s (%s:%d); a token must belong to one provider", p.Name, first.Name, first.path, first.line)
			continue
		}
		byAudience[key] = p
	}
}

// policies checks the rules against the targets and providers: what a rule
// names and nothing defines makes a rule that never matches.
func (r *reading) policies(set *policy.Set) {
	claims := map[string]bool{}
	for _, p := range r.providers {
		for _, c := range p.Claims {
			claims[c] = true
		}
	}
	for _, m := range set.Mentions() {
		switch m.Kind {
		case policy.MentionClaim:
			if !claims[m.Name] {
				r.report(m.Path, m.Line, "no identity provider passes on a claim %q, so this never matches; list it under claims of a provider", m.Name)
			}
		case policy.MentionTarget:
			if r.targets[m.Name] == nil {
				r.report(m.Path, m.Line, "there is no target %q, so this never matches", m.Name)
			}
		case policy.MentionProvider:
			if r.providers[m.Name] == nil && m.Name != policy.BootstrapProvider {
				r.report(m.Path, m.Line, "there is no identity provider %q, so this never matches; principals are named provider/subject", m.Name)
			}
		}
	}
	if !set.AnyPermit(policy.AdminApply) {
		r.report("", 0, "no rule permits the action %s: nobody could change this configuration again; permit it to a group of administrators", policy.AdminApply)
	}
}

// certificates reads a PEM file of certificates. Anything else in it is an
// error, a private key above all: files are stored readable.
func certificates(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	rest := data
	for {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("the file holds a %s; only certificates may be in a configuration, which is not secret", strings.ToLower(block.Type))
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d cannot be read: %w", len(out)+1, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("the file holds no certificate in PEM form")
	}
	if strings.Contains(string(rest), "-----BEGIN") {
		return nil, fmt.Errorf("what follows certificate %d is not valid PEM", len(out))
	}
	return out, nil
}

// caFile is the PEM of the file that a field names; nil when it names none.
func (r *reading) caFile(o *object, field string) (name string, data []byte) {
	name = o.text(field)
	if name == "" {
		return "", nil
	}
	f, ok := r.files[path.Clean(name)]
	if !ok || path.Ext(name) != ".pem" {
		o.bad(field, "there is no file %q in the configuration; give the path of a .pem file from the top of its directory", name)
		return name, nil
	}
	return name, f.Data
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

package bundle

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"

	"github.com/sallyport/sallyport/policy"
)

// Secret is a value that no log, record or message shows.
type Secret []byte

// String says nothing.
func (Secret) String() string { return "(secret)" }

// GoString says nothing.
func (Secret) GoString() string { return "(secret)" }

// maxSecretBytes: PostgreSQL takes passwords of at most 1023 bytes over some
// ways; more is a wrong file.
const maxSecretBytes = 1023

// LoadOptions of Load.
type LoadOptions struct {
	// Dev admits what is marked `dev: true`. The nodes judge again.
	Dev bool
	// Getenv reads the variable that passwordEnv names; nil knows none.
	Getenv func(string) string
	// ReadFile reads the file that passwordFile names, given as written: an
	// absolute path, or one from the top of the directory. Nil reads relative
	// paths inside fsys and refuses others.
	ReadFile func(name string) ([]byte, error)
}

// Load reads a configuration from a directory, with the secrets that its
// targets name, by secret name. A target with `password: keep` brings none:
// whether one is stored, the node says. Files other than *.yaml, *.yml,
// *.cedar and *.pem are problems, but for README files, hidden ones and
// password files inside the directory.
func Load(fsys fs.FS, opts LoadOptions) (*Bundle, map[string]Secret, []policy.Problem) {
	files, strangers, problems := readDir(fsys)
	if len(problems) > 0 {
		return nil, nil, problems
	}
	// Secrets are not known yet: all are taken to be there.
	b, r := parse(files, nil, ParseOptions{Dev: opts.Dev})
	problems = r.problems
	for _, name := range strangers {
		if !r.namesPasswordFile(name) {
			problems = append(problems, policy.Problem{Path: name, Message: wrongKind})
		}
	}
	if len(problems) > 0 {
		sortProblems(problems)
		return nil, nil, problems
	}
	secrets := map[string]Secret{}
	for _, name := range sortedKeys(b.Targets) {
		t := b.Targets[name]
		secret, err := t.readPassword(fsys, opts)
		if err != nil {
			problems = append(problems, policy.Problem{Path: t.path, Line: t.line, Message: fmt.Sprintf("target %s: admin: %s", t.Name, err)})
		} else if secret != nil {
			secrets[t.SecretName()] = secret
		}
	}
	if len(problems) > 0 {
		return nil, nil, problems
	}
	return b, secrets, nil
}

// readDir reads the files of a configuration, and names those that are none.
func readDir(fsys fs.FS) (files []file, strangers []string, problems []policy.Problem) {
	total := 0
	errStop := errors.New("stop")
	err := fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		base := path.Base(name)
		switch {
		case err != nil:
			return err
		case name == ".":
			return nil
		case strings.HasPrefix(base, "."):
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case d.IsDir() || strings.HasPrefix(base, "README"):
			return nil
		}
		// Stat follows links: configuration that an orchestrator mounts is often
		// links to files.
		info, err := fs.Stat(fsys, name)
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			problems = append(problems, policy.Problem{Path: name, Message: "neither a file nor a directory"})
			return nil
		}
		if !taken(name) {
			strangers = append(strangers, name)
			if len(strangers) > maxFiles {
				problems = append(problems, policy.Problem{Message: fmt.Sprintf("more than %d files that are none of a configuration, %s among them; is this the right directory?", maxFiles, name)})
				return errStop
			}
			return nil
		}
		data, err := readLimited(fsys, name, maxTotalBytes-total)
		if err != nil {
			return err
		}
		total += len(data)
		if total > maxTotalBytes || len(files) == maxFiles {
			problems = append(problems, policy.Problem{Path: name, Message: fmt.Sprintf("with this file the configuration is larger than %d files or %d bytes; is this the right directory?", maxFiles, maxTotalBytes)})
			return errStop
		}
		files = append(files, file{Path: name, Data: data})
		return nil
	})
	if err != nil && !errors.Is(err, errStop) {
		problems = append(problems, policy.Problem{Message: "the directory cannot be read: " + err.Error()})
	}
	return files, strangers, problems
}

// readLimited reads one byte more than limit at most, which tells that it is
// exceeded.
func readLimited(fsys fs.FS, name string, limit int) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, int64(limit)+1))
}

func (r *reading) namesPasswordFile(name string) bool {
	for _, t := range r.targets {
		if t.Admin.passwordFile != "" && path.Clean(t.Admin.passwordFile) == name {
			return true
		}
	}
	return false
}

// readPassword reads the administrative password from where the target says;
// nil for one that is kept. Errors do not show it.
func (t *Target) readPassword(fsys fs.FS, opts LoadOptions) (Secret, error) {
	var data []byte
	var from string
	switch {
	case t.Admin.keep:
		return nil, nil
	case t.Admin.passwordEnv != "":
		from = "environment variable " + t.Admin.passwordEnv
		if opts.Getenv != nil {
			data = []byte(opts.Getenv(t.Admin.passwordEnv))
		}
		if len(data) == 0 {
			return nil, fmt.Errorf("%s is not set", from)
		}
	default:
		from = "password file " + t.Admin.passwordFile
		read := opts.ReadFile
		if read == nil {
			read = func(name string) ([]byte, error) { return readLimited(fsys, path.Clean(name), maxSecretBytes+2) }
		}
		var err error
		if data, err = read(t.Admin.passwordFile); err != nil {
			return nil, fmt.Errorf("%s cannot be read: %w", from, err)
		}
		data = []byte(strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r"))
	}
	switch {
	case len(data) == 0:
		return nil, fmt.Errorf("%s is empty", from)
	case len(data) > maxSecretBytes:
		return nil, fmt.Errorf("%s holds more than %d bytes", from, maxSecretBytes)
	case strings.ContainsAny(string(data), "\x00\r\n"):
		return nil, fmt.Errorf("%s holds more than one line", from)
	}
	return Secret(data), nil
}

package main

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/recording/terminal"
)

// clientFlags say which cluster and who calls. Each has an environment
// variable; a flag wins over it, both win over what `login` stored.
type clientFlags struct {
	server, ca, tokenFile, adminCert, adminKey string
	json                                       bool
}

func (f *clientFlags) register(root *cobra.Command) {
	p := root.PersistentFlags()
	p.StringVar(&f.server, "server", "", "nodes as host:port, comma-separated, tried in order (SALLYPORT_SERVER)")
	p.StringVar(&f.ca, "ca", "", "file with the cluster's CA certificate (SALLYPORT_CA)")
	p.StringVar(&f.tokenFile, "token-file", "", "file with an OIDC token, read anew for every call (SALLYPORT_TOKEN holds a token itself)")
	p.StringVar(&f.adminCert, "admin-cert", "", "administrator certificate file (SALLYPORT_ADMIN_CERT)")
	p.StringVar(&f.adminKey, "admin-key", "", "its key file (SALLYPORT_ADMIN_KEY)")
	p.BoolVar(&f.json, "json", false, "print JSON")
}

// stored is what `sallyport login` keeps.
type stored struct {
	Server    string `json:"server"`
	CA        string `json:"ca"` // PEM
	TokenFile string `json:"token_file,omitempty"`
	AdminCert string `json:"admin_cert,omitempty"`
	AdminKey  string `json:"admin_key,omitempty"`
}

func storedPath() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "sallyport", "login.json"), nil
}

func loadStored() (stored, error) {
	var s stored
	path, err := storedPath()
	if err != nil {
		return s, nil // no home directory: nothing stored
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err != nil {
		return s, fmt.Errorf("%s: %w; `sallyport login` writes it anew", path, err)
	}
	return s, nil
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// settings are the flags, the environment and the stored login together.
type settings struct {
	stored
	token string // from SALLYPORT_TOKEN
}

func (f *clientFlags) resolve() (settings, error) {
	saved, err := loadStored()
	if err != nil && (f.server == "" || f.ca == "") {
		return settings{}, err
	}
	s := settings{stored: stored{Server: first(f.server, os.Getenv("SALLYPORT_SERVER"), saved.Server), CA: saved.CA}}
	if path := first(f.ca, os.Getenv("SALLYPORT_CA")); path != "" {
		pem, err := os.ReadFile(path)
		if err != nil {
			return settings{}, fmt.Errorf("the cluster's CA certificate: %w", err)
		}
		s.CA = string(pem)
	}
	// One kind of credential, from the nearest place that names any.
	switch {
	case f.tokenFile != "":
		s.TokenFile = f.tokenFile
	case f.adminCert != "" || f.adminKey != "":
		s.AdminCert, s.AdminKey = f.adminCert, f.adminKey
	case os.Getenv("SALLYPORT_TOKEN") != "":
		s.token = os.Getenv("SALLYPORT_TOKEN")
	case os.Getenv("SALLYPORT_ADMIN_CERT") != "":
		s.AdminCert, s.AdminKey = os.Getenv("SALLYPORT_ADMIN_CERT"), os.Getenv("SALLYPORT_ADMIN_KEY")
	default:
		s.TokenFile, s.AdminCert, s.AdminKey = saved.TokenFile, saved.AdminCert, saved.AdminKey
	}
	return s, nil
}

// client returns a client with the caller's credential.
func (f *clientFlags) client() (*api.Client, error) {
	s, err := f.resolve()
	if err != nil {
		return nil, err
	}
	return s.client()
}

func (s *settings) client() (*api.Client, error) {
	if s.Server == "" {
		return nil, errors.New("no cluster is known: give --server host:port, set SALLYPORT_SERVER, or run `sallyport login` once")
	}
	cfg := api.ClientConfig{Servers: strings.Split(s.Server, ",")}
	if s.CA == "" {
		return nil, errors.New("the cluster's CA certificate is not known: give --ca FILE or set SALLYPORT_CA (ca.crt in a node's data directory, or beside the administrator's certificate)")
	}
	cfg.Roots = x509.NewCertPool()
	if !cfg.Roots.AppendCertsFromPEM([]byte(s.CA)) {
		return nil, errors.New("the CA file holds no certificate")
	}
	switch {
	case s.token != "":
		cfg.Token = func() (string, error) { return strings.TrimSpace(s.token), nil }
	case s.TokenFile != "":
		cfg.Token = func() (string, error) {
			data, err := os.ReadFile(s.TokenFile)
			if err != nil {
				return "", fmt.Errorf("the token: %w", err)
			}
			return strings.TrimSpace(string(data)), nil
		}
	case s.AdminCert != "":
		var err error
		if cfg.Cert, err = pki.LoadCert(s.AdminCert); err != nil {
			return nil, fmt.Errorf("the administrator's certificate: %w", err)
		}
		if s.AdminKey == "" {
			return nil, errors.New("the administrator's key is missing: give --admin-key or set SALLYPORT_ADMIN_KEY")
		}
		if cfg.Key, err = pki.LoadKey(s.AdminKey); err != nil {
			return nil, fmt.Errorf("the administrator's key: %w", err)
		}
	default:
		return nil, errors.New("no credential: set SALLYPORT_TOKEN, give --token-file, or --admin-cert with --admin-key; `sallyport login` remembers one")
	}
	return api.NewClient(cfg)
}

// printJSON prints v for programs.
func printJSON(w io.Writer, v any) error {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return err
	}
	_, err := w.Write(buf.Bytes())
	return err
}

// table prints rows in columns. Every cell is escaped: names, reasons and
// statements come from others and may hold terminal control.
func table(w io.Writer, head string, rows [][]string) {
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, strings.ReplaceAll(head, " ", "\t"))
	for _, r := range rows {
		for i, c := range r {
			if i > 0 {
				fmt.Fprint(tw, "\t")
			}
			if c == "" {
				c = "-"
			}
			fmt.Fprint(tw, terminal.EscapeLine(c))
		}
		fmt.Fprintln(tw)
	}
	tw.Flush()
}

// say prints a format of ours. What it is given comes from others as a rule
// (claims, names, reasons), so that it is escaped, newlines too: nobody writes
// lines that look like ours.
func say(w io.Writer, format string, args ...any) {
	for i, a := range args {
		switch a := a.(type) {
		case int, int64, uint64, uint32, bool, time.Duration:
		case string:
			args[i] = terminal.EscapeLine(a)
		case error:
			args[i] = terminal.EscapeLine(a.Error())
		default:
			args[i] = terminal.EscapeLine(fmt.Sprint(a))
		}
	}
	fmt.Fprintf(w, format+"\n", args...)
}

func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return time.Since(t).Round(time.Second).String() + " ago"
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z")
}

// reason makes sure that a command that changes something for others says why.
func reasonFlag(c *cobra.Command, reason *string) {
	c.Flags().StringVar(reason, "reason", "", "why; kept for ever and shown to those concerned (required)")
	_ = c.MarkFlagRequired("reason")
}

// Package config holds a node's own settings, node.yaml in its data directory.
// What the cluster shares (targets, policies) is not here but in node/bundle.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/raftstore/fence"
)

// FileName is the settings file's name in a data directory.
const FileName = "node.yaml"

// Config is one node's settings. Zero values mean the default named in the comment.
type Config struct {
	// Name is the node's name in the cluster: lower-case letters, digits and dashes.
	Name string `yaml:"name"`
	// Addr is the host:port that clients and other nodes use, TCP and UDP alike.
	Addr string `yaml:"addr"`
	// Listen is the host:port to bind; the default is Addr.
	Listen string `yaml:"listen,omitempty"`
	// Recordings is where finished and running recordings are copied to: a
	// directory, or s3://bucket/prefix?endpoint=…&region=…. The default is
	// DATADIR/recordings.
	Recordings string `yaml:"recordings,omitempty"`
	// SpoolBytes bounds recordings not yet in the store; when it is reached,
	// commands are refused. Default 2 GiB.
	SpoolBytes int64 `yaml:"spoolBytes,omitempty"`
	// SegmentAge is how long an entry waits at most before its segment is
	// sent to the store. Default 5s.
	SegmentAge time.Duration `yaml:"segmentAge,omitempty"`
	// Zone is where the node is: a data centre, a region. Voters are spread over
	// zones, and a node takes the event stream from its own zone when it can.
	Zone string `yaml:"zone,omitempty"`
	// HeartbeatTimeout is Raft's; raise it on slow disks. Default 500ms.
	HeartbeatTimeout time.Duration `yaml:"heartbeatTimeout,omitempty"`
	// WALDir is where the cluster's log is synced, instead of DATADIR/raft/log:
	// a directory on a partition or disk of its own, so that recordings and
	// other files do not slow it down. Move it only while the node is stopped.
	WALDir string `yaml:"walDir,omitempty"`
	// WALFailoverDir, on yet another disk, takes the cluster's log while the
	// first one stalls for more than 0.2 s. Once set it is needed at every start.
	WALFailoverDir string `yaml:"walFailoverDir,omitempty"`
	// Lease is how long a node that is cut off from the leader goes on to pass
	// data, and so how long a revocation waits for it. It must last over a change
	// of leader: at least four times heartbeatTimeout. Default four times
	// heartbeatTimeout and 500ms: 2.5s. The same on all nodes.
	Lease time.Duration `yaml:"lease,omitempty"`
	// AllowUnstableClock starts a node on a machine whose kernel counts time by
	// interrupts (clock source jiffies, refined-jiffies or pit). Its lease may
	// then end later than others believe, so a revocation may be reported as
	// complete before it is. Default false.
	AllowUnstableClock bool `yaml:"allowUnstableClock,omitempty"`
	// KernelGate has the kernel hold back what sessions send when the lease has
	// ended, even while the process is stopped. It needs nftables and
	// CAP_NET_ADMIN. auto uses it where it can be had, and the log and the report
	// of a revocation say so (level 2); require does not start without; off does
	// not use it (level 1). Default auto; off with dev.
	KernelGate string `yaml:"kernelGate,omitempty"`
	// MaxConnections bounds all client connections of this node. Default 4096.
	MaxConnections int `yaml:"maxConnections,omitempty"`
	// MaxUnauthenticated bounds those that have not logged in yet. Default 1024.
	MaxUnauthenticated int `yaml:"maxUnauthenticated,omitempty"`
	// MaxUnauthenticatedPerIP bounds them by client address. Default 256.
	MaxUnauthenticatedPerIP int `yaml:"maxUnauthenticatedPerIP,omitempty"`
	// CertLifetime is how long certificates live that this node issues as the
	// leader; nodes renew theirs at two thirds. Default 720h (30 days). A node
	// that is down for longer than a third of it may have to join anew.
	CertLifetime time.Duration `yaml:"certLifetime,omitempty"`
	// Dev accepts what is for local trials only: tokens of `sallyport
	// dev-issuer`, targets without TLS. Default false.
	Dev bool `yaml:"dev,omitempty"`

	// MaxFeatureLevel is the highest feature level that the node offers the
	// cluster. Set it below the build's own before an upgrade to be able to go
	// back to the earlier build; take it out afterwards. Default 0: what the
	// build supports.
	MaxFeatureLevel uint32 `yaml:"maxFeatureLevel,omitempty"`

	// DataDir is the directory the file was read from; not stored.
	DataDir string `yaml:"-"`
}

// Load reads DIR/node.yaml, fills in defaults and validates.
func Load(dir string) (*Config, error) {
	path := filepath.Join(dir, FileName)
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s holds no node: make one with `sallyport cluster init` or `sallyport cluster join`", dir)
	} else if err != nil {
		return nil, err
	}
	c := &Config{}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	if err := dec.Decode(c); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	c.DataDir = dir
	c.SetDefaults()
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Save writes DIR/node.yaml; it refuses to overwrite one.
func (c *Config) Save() error {
	data, err := yaml.Marshal(c)
	if err != nil {
		return err
	}
	path := filepath.Join(c.DataDir, FileName)
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s exists already", path)
	}
	return pki.WriteFile(path, data)
}

// SetDefaults replaces zero values by the defaults.
func (c *Config) SetDefaults() {
	if c.Listen == "" {
		c.Listen = c.Addr
	}
	if c.Recordings == "" {
		c.Recordings = filepath.Join(c.DataDir, "recordings")
	}
	if c.SpoolBytes == 0 {
		c.SpoolBytes = 2 << 30
	}
	if c.CertLifetime == 0 {
		c.CertLifetime = 30 * 24 * time.Hour
	}
	if c.SegmentAge == 0 {
		c.SegmentAge = 5 * time.Second
	}
	if c.HeartbeatTimeout == 0 {
		c.HeartbeatTimeout = 500 * time.Millisecond
	}
	if c.Lease == 0 {
		c.Lease = 4*c.HeartbeatTimeout + 500*time.Millisecond
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = 4096
	}
	if c.MaxUnauthenticated == 0 {
		c.MaxUnauthenticated = 1024
	}
	if c.MaxUnauthenticatedPerIP == 0 {
		c.MaxUnauthenticatedPerIP = 256
	}
}

var nameRE = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidName reports whether name can name a node.
func ValidName(name string) bool { return nameRE.MatchString(name) }

// Validate says what is wrong with the settings, in words that name the field.
func (c *Config) Validate() error {
	var errs []error
	if !ValidName(c.Name) {
		errs = append(errs, fmt.Errorf("name: %q is not a node name (lower-case letters, digits and dashes, at most 63)", c.Name))
	}
	for _, f := range []struct{ field, addr string }{{"addr", c.Addr}, {"listen", c.Listen}} {
		host, port, err := net.SplitHostPort(f.addr)
		if err != nil || port == "" || port == "0" || (f.field == "addr" && host == "") {
			errs = append(errs, fmt.Errorf("%s: %q is not host:port", f.field, f.addr))
		}
	}
	for _, f := range []struct{ field, dir string }{{"walDir", c.WALDir}, {"walFailoverDir", c.WALFailoverDir}} {
		if f.dir != "" && !filepath.IsAbs(f.dir) {
			errs = append(errs, fmt.Errorf("%s: %q is not an absolute path", f.field, f.dir))
		}
	}
	if c.WALFailoverDir != "" && c.WALFailoverDir == c.WALDir {
		errs = append(errs, errors.New("walFailoverDir: is walDir; it must be on another disk"))
	}
	if c.Zone != "" && !ValidName(c.Zone) {
		errs = append(errs, fmt.Errorf("zone: %q is not a zone's name (lower-case letters, digits and dashes, at most 63)", c.Zone))
	}
	if c.SpoolBytes < 16<<20 {
		errs = append(errs, fmt.Errorf("spoolBytes: %d is below the least, 16 MiB (16777216)", c.SpoolBytes))
	}
	if c.SegmentAge < 100*time.Millisecond || c.SegmentAge > 10*time.Minute {
		errs = append(errs, fmt.Errorf("segmentAge: %v is not between 100ms and 10m", c.SegmentAge))
	}
	if c.HeartbeatTimeout < 100*time.Millisecond || c.HeartbeatTimeout > 10*time.Second {
		errs = append(errs, fmt.Errorf("heartbeatTimeout: %v is not between 100ms and 10s", c.HeartbeatTimeout))
	}
	if c.Lease < 4*c.HeartbeatTimeout || c.Lease > fence.MaxLength {
		errs = append(errs, fmt.Errorf("lease: %v is not between four times heartbeatTimeout (%v) and %v", c.Lease, 4*c.HeartbeatTimeout, fence.MaxLength))
	}
	if c.CertLifetime < 20*time.Second || c.CertLifetime > 365*24*time.Hour {
		errs = append(errs, fmt.Errorf("certLifetime: %v is not between 20s (for trials; use days) and 8760h", c.CertLifetime))
	}
	if c.MaxConnections < 1 || c.MaxUnauthenticated < 1 || c.MaxUnauthenticatedPerIP < 1 {
		errs = append(errs, errors.New("maxConnections, maxUnauthenticated and maxUnauthenticatedPerIP must be positive"))
	}
	if !slices.Contains([]string{"", "auto", "require", "off"}, c.KernelGate) {
		errs = append(errs, fmt.Errorf("kernelGate: %q is none of auto, require, off", c.KernelGate))
	}
	return errors.Join(errs...)
}

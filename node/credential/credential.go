// Package credential makes just-in-time accounts on PostgreSQL targets and
// takes them away again. For each session it creates a role with a random name
// and password, a member of what the target's configuration maps the caller's
// groups to. As soon as the gateway has logged in with it the role loses LOGIN
// and password, so that nothing the session does can make it a way in. At the
// end what it owns goes to the mapped role and it is dropped; a sweeper removes
// what a crash left behind.
//
// The target's administrative account needs CREATEROLE and the mapped roles
// WITH ADMIN OPTION (see SetupSQL), and nothing else: whatever concerns a
// just-in-time role is done as that role (SET LOCAL ROLE), so that PostgreSQL
// itself refuses to let us touch another's backend or objects.
//
// The life of a role, as its row in pg_roles tells it:
//
//	LOGIN, password, CONNECTION LIMIT 1, VALID UNTIL +2 min   after Issue
//	NOLOGIN, no password, CONNECTION LIMIT 0, long expired    after LoggedIn
//	gone                                                      after Release
//
// Its comment names cluster, node, session and the latest end, for the sweeper.
package credential

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
)

const (
	// loginWindow is how long a fresh role can be logged in with; dialling and
	// a TLS handshake across a slow network fit in easily.
	loginWindow = 2 * time.Minute
	// DefaultMaxSession is used where a target sets none.
	DefaultMaxSession = 8 * time.Hour
	// sweepMargin is how long past a role's end another node's role is left
	// alone, for clocks and for a node that is just releasing it.
	sweepMargin = 10 * time.Minute

	dialTimeout = 5 * time.Second
	// opTimeout bounds one administrative step, waiting for a connection included.
	opTimeout = 15 * time.Second
	// terminateTimeout is how long a backend may take to go once it was told to.
	terminateTimeout = 5 * time.Second
)

// TLS modes of a target.
const (
	TLSVerifyFull = "verify-full" // chain and name; the default
	TLSVerifyCA   = "verify-ca"   // chain only, to the authorities of CA, which must be given
	TLSDisable    = "disable"     // nodes started with --dev only
)

// RoleRule maps a caller to a role of the target: the first rule whose Profile
// equals the one asked for and whose Groups share one with the caller's.
type RoleRule struct {
	Groups  []string
	Profile string // "" is the default profile
	Role    string
}

// TargetConfig is a PostgreSQL target.
type TargetConfig struct {
	Name    string
	Address string // host:port

	TLSMode    string // "" means TLSVerifyFull
	CA         []byte // PEM; empty trusts the system's authorities
	ServerName string // name in the server's certificate; "" means Address's host

	AdminUser     string
	AdminPassword vault.Secret
	AdminDatabase string // "" means postgres

	Roles      []RoleRule
	MaxSession time.Duration // longest session; 0 means DefaultMaxSession
}

func (t *TargetConfig) setDefaults() {
	if t.TLSMode == "" {
		t.TLSMode = TLSVerifyFull
	}
	if t.AdminDatabase == "" {
		t.AdminDatabase = "postgres"
	}
	if t.MaxSession == 0 {
		t.MaxSession = DefaultMaxSession
	}
}

// Validate says what is wrong with a target, or nil. dev allows TLSDisable.
func (t *TargetConfig) Validate(dev bool) error {
	if t.Name == "" {
		return errors.New("target without a name")
	}
	host, port, err := net.SplitHostPort(t.Address)
	switch {
	case err != nil || host == "" || port == "":
		return fmt.Errorf("target %s: address %q is not host:port", t.Name, t.Address)
	case t.TLSMode == TLSDisable && !dev:
		return fmt.Errorf("target %s: tls.mode disable would send credentials and data in the clear; only nodes started with --dev allow it", t.Name)
	case t.TLSMode == TLSVerifyCA && len(t.CA) == 0:
		return fmt.Errorf("target %s: tls.mode %s needs a ca of its own: any certificate of a public authority would do otherwise", t.Name, TLSVerifyCA)
	case !slices.Contains([]string{"", TLSVerifyFull, TLSVerifyCA, TLSDisable}, t.TLSMode):
		return fmt.Errorf("target %s: tls.mode %q is none of %s, %s, %s", t.Name, t.TLSMode, TLSVerifyFull, TLSVerifyCA, TLSDisable)
	case t.AdminUser == "":
		return fmt.Errorf("target %s: admin user is missing", t.Name)
	case t.MaxSession < 0:
		return fmt.Errorf("target %s: max session %s is negative", t.Name, t.MaxSession)
	}
	if len(t.CA) > 0 && !x509.NewCertPool().AppendCertsFromPEM(t.CA) {
		return fmt.Errorf("target %s: ca holds no certificate in PEM form", t.Name)
	}
	for i, r := range t.Roles {
		if r.Role == "" || len(r.Groups) == 0 {
			return fmt.Errorf("target %s: role rule %d needs groups and a role", t.Name, i+1)
		}
		if jitName.MatchString(r.Role) {
			return fmt.Errorf("target %s: role %s has the form of a just-in-time role's name", t.Name, r.Role)
		}
	}
	return nil
}

// tlsConfig is nil for TLSDisable.
func (t *TargetConfig) tlsConfig() (*tls.Config, error) {
	if t.TLSMode == TLSDisable {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.ServerName}
	if c.ServerName == "" {
		host, _, err := net.SplitHostPort(t.Address)
		if err != nil {
			return nil, err
		}
		c.ServerName = host
	}
	if len(t.CA) > 0 {
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(t.CA) {
			return nil, fmt.Errorf("target %s: ca holds no certificate in PEM form", t.Name)
		}
	}
	if t.TLSMode == TLSVerifyCA {
		if c.RootCAs == nil {
			return nil, fmt.Errorf("target %s: tls.mode %s without ca", t.Name, TLSVerifyCA)
		}
		// The standard check would want the name too: ours stands in for it,
		// on every handshake, resumed ones included.
		c.InsecureSkipVerify = true
		roots := c.RootCAs
		c.VerifyConnection = func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("the target shows no certificate")
			}
			between := x509.NewCertPool()
			for _, cert := range s.PeerCertificates[1:] {
				between.AddCert(cert)
			}
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between})
			return err
		}
	}
	return c, nil
}

// role picks what the subject is mapped to.
func (t *TargetConfig) role(s *policy.Subject, profile string) (string, error) {
	known := profile == ""
	for _, r := range t.Roles {
		if r.Profile != profile {
			continue
		}
		known = true
		if slices.ContainsFunc(r.Groups, func(g string) bool { return slices.Contains(s.Groups, g) }) {
			return r.Role, nil
		}
	}
	reason := fmt.Sprintf("none of your groups is mapped to a role of target %s", t.Name)
	if profile != "" {
		reason += fmt.Sprintf(" for profile %.100q", profile)
	}
	if !known {
		reason = fmt.Sprintf("target %s has no profile %.100q", t.Name, profile)
	}
	return "", &protocols.Refusal{Rule: "no-role", Reason: reason + "; ask for a role rule in the target's configuration", Code: "42501"}
}

// Options of an Issuer.
type Options struct {
	Cluster string // in every role's comment: two clusters on one target leave each other alone
	Node    string
	Dev     bool // allows TLSDisable
	// Dial opens a connection to a target; nil dials directly.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	Log  *slog.Logger // nil discards
}

// Issuer makes just-in-time credentials. It is safe for concurrent use and
// starts no goroutines; call Close at the end.
type Issuer struct {
	opts  Options
	pools pools

	mu struct {
		sync.Mutex
		targets map[string]*TargetConfig
		leases  map[string]*Lease // by role name, from before its creation to the end of Release
	}
}

// NewIssuer makes an Issuer without targets: see Update.
func NewIssuer(opts Options) *Issuer {
	if opts.Dial == nil {
		d := &net.Dialer{Timeout: dialTimeout, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}
		opts.Dial = d.DialContext
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	i := &Issuer{opts: opts}
	i.mu.targets = map[string]*TargetConfig{}
	i.mu.leases = map[string]*Lease{}
	return i
}

// Update replaces the targets. On an error nothing changes. Leases that are out
// go on under the newest configuration of their target, or under their own
// where the target is gone.
func (i *Issuer) Update(targets []TargetConfig) error {
	next := make(map[string]*TargetConfig, len(targets))
	for _, t := range targets {
		if err := t.Validate(i.opts.Dev); err != nil {
			return err
		}
		if next[t.Name] != nil {
			return fmt.Errorf("target %s is defined twice", t.Name)
		}
		t.setDefaults()
		next[t.Name] = &t
	}
	i.mu.Lock()
	i.mu.targets = next
	i.mu.Unlock()
	i.pools.keep(func(k poolKey) bool { t := next[k.target]; return t != nil && t.sum() == k.sum })
	return nil
}

// Close closes the administrative connections. Leases cannot be used afterwards.
func (i *Issuer) Close() { i.pools.close() }

func (i *Issuer) target(name string) (*TargetConfig, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if t := i.mu.targets[name]; t != nil {
		return t, nil
	}
	return nil, &protocols.Refusal{Rule: "unknown-target", Reason: fmt.Sprintf("there is no target %.100q", name)}
}

// jitName is the form of a just-in-time role's name. The random part is what
// keeps others from guessing it, the time is for the operator who reads it.
var jitName = regexp.MustCompile(`^sp_[0-9a-f]{16}_[0-9]{12}$`)

const jitPattern = `^sp_[0-9a-f]{16}_[0-9]{12}$`

func newName(now time.Time) (string, error) {
	b := make([]byte, 8)
	if _, err := rand.Read(b); err != nil {
		return "", err
	}
	return "sp_" + hex.EncodeToString(b) + "_" + now.UTC().Format("200601021504"), nil
}

// note is what a just-in-time role's comment tells, as JSON.
type note struct {
	Version  int    `json:"sallyport"` // 1
	Cluster  string `json:"cluster"`
	Node     string `json:"node"`
	Session  string `json:"session"`
	Role     string `json:"role"`
	Database string `json:"database"`
	Expires  int64  `json:"expires"` // by the target's clock, seconds since 1970
}

// Issue makes an account on target for subject's session with database. The
// mapped role is the first that the target's rules give for profile. A refusal
// is a *protocols.Refusal; any other error means that the target could not be
// used. Release must be called on the result.
func (i *Issuer) Issue(ctx context.Context, target string, subject *policy.Subject, session, database, profile string) (*Lease, error) {
	t, err := i.target(target)
	if err != nil {
		return nil, err
	}
	role, err := t.role(subject, profile)
	if err != nil {
		return nil, err
	}
	tc, err := t.tlsConfig()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	name, err := newName(time.Now())
	if err != nil {
		return nil, err
	}
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return nil, err
	}
	password := base64.RawURLEncoding.EncodeToString(secret)
	verifier, err := SCRAMVerifier(password)
	if err != nil {
		return nil, err
	}
	l := &Lease{issuer: i, config: t, tls: tc, name: name, password: vault.NewSecret(password), role: role, database: database, session: session}
	i.mu.Lock()
	i.mu.leases[name] = l // first, so that our own sweeper never sees it unowned
	i.mu.Unlock()
	asked := false
	err = i.with(ctx, t, t.AdminDatabase, work, func(ctx context.Context, c *pgx.Conn) error {
		if err := checkRole(ctx, c, t, role, database); err != nil {
			return err
		}
		var validUntil string
		var now int64
		// By the target's clock, which is the one that counts for VALID UNTIL.
		if err := c.QueryRow(ctx, `SELECT pg_catalog.to_char((pg_catalog.now() + $1::pg_catalog.interval) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') || '+00',
			EXTRACT(epoch FROM pg_catalog.now())::pg_catalog.int8`, fmt.Sprintf("%d seconds", int(loginWindow.Seconds()))).Scan(&validUntil, &now); err != nil {
			return err
		}
		comment, err := json.Marshal(note{1, i.opts.Cluster, i.opts.Node, session, role, database, now + int64((t.MaxSession + loginWindow).Seconds())})
		if err != nil {
			return err
		}
		asked = true
		// One transaction: a role of ours never exists without its comment.
		return exec(ctx, c,
			"BEGIN",
			"CREATE ROLE "+ident(name)+" LOGIN INHERIT CONNECTION LIMIT 1 PASSWORD "+literal(verifier)+
				" VALID UNTIL "+literal(validUntil)+" IN ROLE "+ident(role)+" ROLE CURRENT_USER",
			"COMMENT ON ROLE "+ident(name)+" IS "+literal(string(comment)),
			"COMMIT")
	})
	if err != nil {
		if !asked {
			l.forget()
		} else {
			// It may have been created and the answer lost.
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), opTimeout)
			defer cancel()
			if rerr := l.Release(clean); rerr != nil {
				i.opts.Log.Warn("just-in-time role may be left for the sweeper", "target", target, "role", name, "error", rerr)
			}
		}
		return nil, fmt.Errorf("target %s: just-in-time account: %w", target, err)
	}
	return l, nil
}

// checkRole refuses to hand out what could be made a way in, or what cannot work.
func checkRole(ctx context.Context, c *pgx.Conn, t *TargetConfig, role, database string) error {
	no := func(format string, args ...any) error {
		return &protocols.Refusal{Rule: "target-role", Reason: fmt.Sprintf(format, args...) + "; an operator of the target must mend this", Code: "42501"}
	}
	// Whatever the role is a member of, it can SET ROLE to. A role with LOGIN
	// could be given a password (ALTER ROLE of oneself), one with CREATEROLE or
	// ADMIN OPTION could let others in, the rest step out of the database.
	rows, err := c.Query(ctx, `WITH RECURSIVE reach(oid) AS (
			SELECT oid FROM pg_catalog.pg_roles WHERE rolname = $1
			UNION
			SELECT m.roleid FROM pg_catalog.pg_auth_members m JOIN reach ON m.member = reach.oid
		)
		SELECT r.rolname::pg_catalog.text, CASE
			WHEN r.rolsuper THEN 'is a superuser'
			WHEN r.rolcanlogin THEN 'may log in'
			WHEN r.rolcreaterole THEN 'may create roles'
			WHEN r.rolreplication THEN 'may replicate'
			WHEN r.rolname = ANY ('{pg_execute_server_program,pg_read_server_files,pg_write_server_files,pg_create_subscription}') THEN 'reaches beyond the database'
			WHEN EXISTS (SELECT FROM pg_catalog.pg_auth_members a WHERE a.member = r.oid AND a.admin_option) THEN 'may grant roles (ADMIN OPTION)'
			ELSE '' END
		FROM reach JOIN pg_catalog.pg_roles r USING (oid)`, role)
	if err != nil {
		return err
	}
	defer rows.Close()
	found := false
	for rows.Next() {
		var name, fault string
		if err := rows.Scan(&name, &fault); err != nil {
			return err
		}
		found = true
		if fault != "" && name == role {
			return no("role %s of target %s %s and so cannot be lent to a session", role, t.Name, fault)
		} else if fault != "" {
			return no("role %s of target %s is a member of %s, which %s, and so cannot be lent to a session", role, t.Name, name, fault)
		}
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if !found {
		return no("target %s has no role %s, to which its configuration maps you", t.Name, role)
	}
	if database == "" {
		return nil
	}
	var connect *bool
	err = c.QueryRow(ctx, `SELECT pg_catalog.has_database_privilege($1, d.oid, 'CONNECT') FROM pg_catalog.pg_database d
		WHERE d.datname = $2 AND d.datallowconn AND NOT d.datistemplate`, role, database).Scan(&connect)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return &protocols.Refusal{Rule: "unknown-database", Reason: fmt.Sprintf("target %s has no database %.100q", t.Name, database), Code: "3D000"}
	case err != nil:
		return err
	case connect == nil || !*connect:
		return no("role %s of target %s may not connect to database %.100q", role, t.Name, database)
	}
	return nil
}

// WithConn lends f an administrative connection to database of target, with
// pg_catalog as search_path, to read the catalogue. f must not keep it, and
// must not write; whatever it set is undone afterwards.
func (i *Issuer) WithConn(ctx context.Context, target, database string, f func(context.Context, *pgx.Conn) error) error {
	t, err := i.target(target)
	if err != nil {
		return err
	}
	return i.with(ctx, t, database, catalogue, f)
}

// Check looks whether a target can be used as configured: connection, version,
// rights of the administrative account, each mapped role. It changes nothing.
// The error joins all it finds.
func (i *Issuer) Check(ctx context.Context, target string) error {
	t, err := i.target(target)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	return i.with(ctx, t, t.AdminDatabase, work, func(ctx context.Context, c *pgx.Conn) error {
		var version int
		var createRole, super bool
		if err := c.QueryRow(ctx, `SELECT pg_catalog.current_setting('server_version_num')::pg_catalog.int4, rolcreaterole, rolsuper
			FROM pg_catalog.pg_roles WHERE rolname = current_user`).Scan(&version, &createRole, &super); err != nil {
			return err
		}
		var faults []error
		if version < 150000 {
			// Up to 14 a role may administer its own membership, and so shake us off.
			faults = append(faults, fmt.Errorf("target %s: PostgreSQL %d is too old; 15 is the oldest that is supported", t.Name, version/10000))
		}
		if !createRole && !super {
			faults = append(faults, fmt.Errorf("target %s: %s lacks CREATEROLE; see sallyport targets setup-sql", t.Name, t.AdminUser))
		}
		if super {
			faults = append(faults, fmt.Errorf("target %s: %s is a superuser, which it need not be; see sallyport targets setup-sql", t.Name, t.AdminUser))
		}
		seen := map[string]bool{}
		for _, r := range t.Roles {
			if seen[r.Role] {
				continue
			}
			seen[r.Role] = true
			if err := checkRole(ctx, c, t, r.Role, ""); err != nil {
				faults = append(faults, err)
				continue
			}
			var admin bool
			if err := c.QueryRow(ctx, `SELECT pg_catalog.pg_has_role(current_user, $1::pg_catalog.name, 'MEMBER WITH ADMIN OPTION')`, r.Role).Scan(&admin); err != nil {
				return err
			}
			if !admin {
				faults = append(faults, fmt.Errorf("target %s: GRANT %s TO %s WITH ADMIN OPTION is missing", t.Name, ident(r.Role), ident(t.AdminUser)))
			}
		}
		return errors.Join(faults...)
	})
}

// exec runs statements one after the other, without parameters, in the simple
// protocol and in one round trip; an error ends the run and, since the
// connection is then inside a failed transaction, the connection.
func exec(ctx context.Context, c *pgx.Conn, statements ...string) error {
	_, err := c.PgConn().Exec(ctx, strings.Join(statements, ";\n")).ReadAll()
	return err
}

// ident quotes an identifier, literal a string; the session runs with
// standard_conforming_strings on and UTF8.
func ident(s string) string { return pgx.Identifier{s}.Sanitize() }

func literal(s string) string {
	s = strings.ReplaceAll(s, "\x00", "")
	return "'" + strings.ReplaceAll(s, "'", "''") + "'"
}

// sum identifies what an administrative connection depends on.
func (t *TargetConfig) sum() [32]byte {
	b, err := json.Marshal([]string{t.Address, t.TLSMode, string(t.CA), t.ServerName, t.AdminUser, t.AdminPassword.Reveal()})
	if err != nil {
		panic("credential: strings cannot be encoded: " + err.Error())
	}
	return sha256.Sum256(b)
}

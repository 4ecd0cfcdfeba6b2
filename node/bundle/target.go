package bundle

import (
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Target is a database server that sessions are let to.
type Target struct {
	Name     string // what clients log in as: "prod-db"
	Protocol string // "postgres"
	Address  string // host:port
	TLS      TLS
	Admin    Admin
	// Databases are those that sessions may be opened on; others are refused
	// before policy is asked.
	Databases  []string
	SearchPath []string // pinned for every session; default [public]
	Roles      []Role   // the first that matches gives the session its role
	MaxSession time.Duration
	Sensitive  []Sensitive
	Labels     map[string]string
	// Nodes are those that may serve the target, and have its password; all when
	// empty.
	Nodes []string
	// Dev marks a target for trials; nodes started without --dev do not serve it.
	Dev bool

	path string
	line int
}

// TLSMode says how the target's certificate is checked.
type TLSMode string

const (
	VerifyFull TLSMode = "verify-full" // chain and name; the default
	VerifyCA   TLSMode = "verify-ca"   // chain only, to authorities of CA
	TLSDisable TLSMode = "disable"     // no TLS; for trials only
)

// TLS is how connections to a target are secured.
type TLS struct {
	Mode       TLSMode
	CAFile     string // path in the bundle; "" trusts the system's authorities
	CA         []byte // PEM, the content of CAFile
	ServerName string // name in the certificate; the address's host when not given
}

// Admin is the account that makes and drops sessions' accounts. Its password
// is the secret Target.SecretName.
type Admin struct {
	User     string
	Database string // to connect to for administration; default "postgres"

	passwordFile, passwordEnv string
	keep                      bool
}

// Role maps groups to a role of the target, of which the sessions' accounts
// become members.
type Role struct {
	Groups  []string // one of them is enough
	Profile string   // only for logins as TARGET.PROFILE; "" only for logins without
	Role    string
}

// Mask is what stands in place of a sensitive value.
type Mask string

const (
	MaskRedact Mask = "redact" // a fixed text; the default
	MaskNull   Mask = "null"
	MaskHash   Mask = "hash"
	MaskLast4  Mask = "last4"
)

// Sensitive is a column whose values are masked for whoever lacks `reveal`.
type Sensitive struct {
	Database, Schema, Table, Column string
	Mask                            Mask
}

// SecretName is the name under which the administrative password is sealed.
func (t *Target) SecretName() string { return "target/" + t.Name + "/admin-password" }

// ServedBy says whether a node may serve the target.
func (t *Target) ServedBy(node string) bool {
	return len(t.Nodes) == 0 || slices.Contains(t.Nodes, node)
}

// RoleFor is the role of a session of a subject in groups that logged in with
// profile ("" for none). Without a match there is no session.
func (t *Target) RoleFor(groups []string, profile string) (role string, ok bool) {
	for _, r := range t.Roles {
		if r.Profile == profile && slices.ContainsFunc(r.Groups, func(g string) bool { return slices.Contains(groups, g) }) {
			return r.Role, true
		}
	}
	return "", false
}

// Allows says whether sessions may be opened on database.
func (t *Target) Allows(database string) bool { return slices.Contains(t.Databases, database) }

const (
	defaultMaxSession = time.Hour
	longestSession    = 24 * time.Hour
	// maxIdentifier is PostgreSQL's NAMEDATALEN - 1: the server would cut what
	// is longer, and a cut name is another name.
	maxIdentifier = 63
)

// loginName is what can stand before and after the dot of a login name.
var loginName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// nodeName is what nodes may be called.
var nodeName = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)

const loginNameRule = "want 1 to 63 of the characters a-z, 0-9 and -, not beginning or ending with -"

func (r *reading) target(f file, o *object) {
	t := &Target{path: f.Path, line: o.node.Line}
	t.Name = o.required("name")
	if t.Name != "" {
		o.what = "target " + t.Name
		if !loginName.MatchString(t.Name) {
			o.bad("name", "%s", loginNameRule)
		}
	}
	if t.Protocol = o.text("protocol"); t.Protocol == "" {
		t.Protocol = "postgres"
	} else if t.Protocol != "postgres" {
		o.bad("protocol", "%q is not served; want postgres", t.Protocol)
	}
	t.Dev = o.bool("dev")
	if t.Dev && !r.dev {
		o.bad("dev", "a target marked dev is for trials; this node was not started with --dev")
	}
	if t.Address = o.required("address"); t.Address != "" {
		host, port, err := net.SplitHostPort(t.Address)
		n, perr := strconv.Atoi(port)
		if err != nil || host == "" || strings.ContainsAny(host, " /@") || perr != nil || n < 1 || n > 65535 {
			o.bad("address", "%q is not host:port", t.Address)
		}
	}
	r.tls(o, t)
	r.admin(o, t)
	t.Databases = r.identifiers(o, "databases")
	if len(t.Databases) == 0 {
		o.bad("databases", "list the databases that sessions may be opened on, at least one")
	}
	if t.SearchPath = r.identifiers(o, "searchPath"); t.SearchPath == nil {
		t.SearchPath = []string{"public"}
	}
	for _, s := range t.SearchPath {
		if strings.HasPrefix(s, "pg_") || s == "$user" {
			o.bad("searchPath", "%q cannot be in a pinned search path; name schemas that hold your own objects", s)
		}
	}
	r.roles(o, t)
	t.MaxSession = o.duration("maxSession", defaultMaxSession, time.Minute, longestSession)
	r.sensitive(o, t)
	t.Labels = o.textMap("labels")
	t.Nodes = o.texts("nodes")
	if o.values["nodes"] != nil && len(t.Nodes) == 0 {
		o.bad("nodes", "the list is empty; leave it out for all nodes")
	}
	for _, n := range t.Nodes {
		if !nodeName.MatchString(n) {
			o.bad("nodes", "%q is no name of a node", n)
		}
	}
	o.done()
	if first := r.targets[t.Name]; first != nil {
		o.bad("name", "there is another target of this name at %s:%d", first.path, first.line)
		return
	}
	if t.Name != "" {
		r.targets[t.Name] = t
	}
}

func (r *reading) tls(o *object, t *Target) {
	t.TLS.Mode = VerifyFull
	in := o.object("tls")
	if in == nil {
		return
	}
	if mode := in.text("mode"); mode != "" {
		t.TLS.Mode = TLSMode(mode)
	}
	t.TLS.CAFile, t.TLS.CA = r.caFile(in, "caFile")
	t.TLS.ServerName = in.text("serverName")
	switch t.TLS.Mode {
	case VerifyFull:
	case VerifyCA:
		if t.TLS.CAFile == "" {
			in.bad("mode", "verify-ca needs a caFile: any certificate of a public authority would do otherwise")
		}
		if t.TLS.ServerName != "" {
			in.bad("serverName", "verify-ca checks no name; use verify-full")
		}
	case TLSDisable:
		if !t.Dev {
			in.bad("mode", "disable is allowed only on a target with dev: true: a password would cross the network in the clear")
		}
		if t.TLS.CAFile != "" || t.TLS.ServerName != "" {
			in.bad("mode", "with disable, caFile and serverName mean nothing")
		}
	default:
		in.bad("mode", "%q is not known; want verify-full or verify-ca", string(t.TLS.Mode))
	}
	in.done()
}

func (r *reading) admin(o *object, t *Target) {
	in := o.object("admin")
	if in == nil {
		if !o.has("admin") {
			o.report(o.node.Line, "%s: admin is missing", o.what)
		}
		return
	}
	t.Admin.User = r.identifier(in, "user", true)
	if t.Admin.Database = r.identifier(in, "database", false); t.Admin.Database == "" {
		t.Admin.Database = "postgres"
	}
	given := 0
	if in.has("password") {
		given++
		// The value is not repeated in the message: it may be the password.
		n := in.take("password")
		if v, _ := scalar(n); v == "keep" {
			t.Admin.keep = true
		} else {
			in.bad("password", "a password must not stand in a file; write passwordFile or passwordEnv, or keep for the one stored before")
		}
	}
	if in.has("passwordFile") {
		given++
		t.Admin.passwordFile = in.text("passwordFile")
	}
	if in.has("passwordEnv") {
		given++
		if t.Admin.passwordEnv = in.text("passwordEnv"); !envName.MatchString(t.Admin.passwordEnv) {
			in.bad("passwordEnv", "want the name of an environment variable")
		}
	}
	in.taken["password"], in.taken["passwordFile"], in.taken["passwordEnv"] = true, true, true
	if given != 1 {
		in.report(in.node.Line, "%s: give one of passwordFile, passwordEnv and password: keep", in.what)
	} else if r.secrets != nil && !r.secrets[t.SecretName()] && t.Name != "" && (t.Admin.keep || !in.has("password")) {
		field := "password"
		if t.Admin.passwordEnv != "" {
			field = "passwordEnv"
		} else if t.Admin.passwordFile != "" {
			field = "passwordFile"
		}
		in.bad(field, "no password of this target is stored, and none was given; apply with passwordFile or passwordEnv")
	}
	in.done()
}

var envName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,127}$`)

func (r *reading) roles(o *object, t *Target) {
	for _, in := range o.objects("roles") {
		role := Role{Groups: in.texts("groups"), Profile: in.text("profile"), Role: r.identifier(in, "role", true)}
		if len(role.Groups) == 0 {
			in.bad("groups", "list at least one group")
		}
		if role.Profile != "" && !loginName.MatchString(role.Profile) {
			in.bad("profile", "%s", loginNameRule)
		}
		if strings.HasPrefix(role.Role, "pg_") {
			in.bad("role", "%q is one of PostgreSQL's own roles, whose rights reach beyond a database's tables; make a role of your own", role.Role)
		}
		if role.Role != "" && role.Role == t.Admin.User {
			in.bad("role", "%q is the administrative account; sessions must not be members of it", role.Role)
		}
		in.done()
		t.Roles = append(t.Roles, role)
	}
	if len(t.Roles) == 0 {
		o.bad("roles", "list at least one role, or nobody can have a session")
	}
}

func (r *reading) sensitive(o *object, t *Target) {
	first := map[[4]string]int{}
	for _, in := range o.objects("sensitive") {
		s := Sensitive{
			Database: r.identifier(in, "database", true), Schema: r.identifier(in, "schema", true),
			Table: r.identifier(in, "table", true), Column: r.identifier(in, "column", true), Mask: Mask(in.text("mask")),
		}
		switch s.Mask {
		case "":
			s.Mask = MaskRedact
		case MaskRedact, MaskNull, MaskHash, MaskLast4:
		default:
			in.bad("mask", "%q is not known; want redact, null, hash or last4", string(s.Mask))
		}
		if s.Database != "" && len(t.Databases) > 0 && !t.Allows(s.Database) {
			in.bad("database", "%q is not among the target's databases", s.Database)
		}
		key := [4]string{s.Database, s.Schema, s.Table, s.Column}
		if line := first[key]; line != 0 {
			in.bad("column", "the column is listed twice, first on line %d", line)
		}
		first[key] = in.node.Line
		in.done()
		t.Sensitive = append(t.Sensitive, s)
	}
}

// identifier reads a name of PostgreSQL's, exactly as the server holds it.
func (r *reading) identifier(o *object, field string, required bool) string {
	v := ""
	if required {
		v = o.required(field)
	} else {
		v = o.text(field)
	}
	if why := badIdentifier(v); why != "" {
		o.bad(field, "%s", why)
	}
	return v
}

func (r *reading) identifiers(o *object, field string) []string {
	list := o.texts(field)
	for _, v := range list {
		if why := badIdentifier(v); why != "" {
			o.bad(field, "%s", why)
		}
	}
	return list
}

func badIdentifier(v string) string {
	switch {
	case len(v) > maxIdentifier:
		return strconv.Quote(v[:maxIdentifier]) + "… is longer than PostgreSQL's 63 bytes"
	case strings.ContainsFunc(v, func(c rune) bool { return !strconv.IsPrint(c) }):
		return strconv.Quote(v) + " has characters that cannot be seen"
	case strings.TrimSpace(v) != v:
		return strconv.Quote(v) + " begins or ends with a space"
	}
	return ""
}

package credential

import (
	"fmt"
	"strings"
)

// SetupOptions say what SetupSQL prints for.
type SetupOptions struct {
	Target    string   // for the comments
	Admin     string   // administrative account; "" means sallyport
	Verifier  string   // SCRAM verifier of its password (SCRAMVerifier); "" leaves the password to psql's \password
	Roles     []string // roles that sessions are mapped to
	Databases []string // databases that sessions connect to
}

// SetupSQL is what an operator runs once, with psql and as a superuser, on
// their own PostgreSQL (15 and later) to let Sallyport make just-in-time
// accounts. It can be run again after Roles or Databases have grown.
func SetupSQL(o SetupOptions) string {
	if o.Admin == "" {
		o.Admin = "sallyport"
	}
	admin := ident(o.Admin)
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	on := ""
	if o.Target != "" {
		on = " on target " + comment(o.Target)
	}
	p("-- Sallyport%s: run with psql as a superuser.", on)
	p("--")
	p("-- The account below makes one role per session and drops it at the session's end.")
	p("-- It needs CREATEROLE, and ADMIN OPTION on the roles that sessions may use; it reads")
	p("-- no table. On PostgreSQL 16 and later CREATEROLE reaches only the roles it was given")
	p("-- or has made itself. On PostgreSQL 15 it can grant any role that is not a superuser's")
	p("-- (pg_execute_server_program, for example): guard its password as you would root's.")
	p("")
	p(`\set ON_ERROR_STOP on`)
	p("SELECT NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = %s) AS sallyport_new", literal(o.Admin))
	p(`\gset`)
	p(`\if :sallyport_new`)
	p("CREATE ROLE %s;", admin)
	p(`\endif`)
	p("ALTER ROLE %s LOGIN CREATEROLE NOINHERIT NOSUPERUSER NOCREATEDB NOREPLICATION NOBYPASSRLS;", admin)
	if o.Verifier != "" {
		p("ALTER ROLE %s PASSWORD %s;", admin, literal(o.Verifier))
	} else {
		p("-- asks for the password; the server sees a SCRAM verifier only")
		p("SET password_encryption = 'scram-sha-256';")
		p(`\password %s`, admin)
	}
	p("")
	p("-- The roles sessions are mapped to. Each must be NOLOGIN, without CREATEROLE,")
	p("-- REPLICATION and ADMIN OPTION on others: Sallyport refuses to lend any other, since a")
	p("-- session could make it a way in. Create them, and grant them what they are for:")
	for _, r := range o.Roles {
		p("-- CREATE ROLE %s NOLOGIN;", comment(ident(r)))
	}
	for _, r := range o.Roles {
		p("GRANT %s TO %s WITH ADMIN OPTION;", ident(r), admin)
	}
	if len(o.Databases) > 0 {
		p("")
	}
	for _, d := range o.Databases {
		p("GRANT CONNECT ON DATABASE %s TO %s;", ident(d), admin)
	}
	p("")
	p("-- pg_hba.conf: TLS and SCRAM only, from Sallyport's nodes (put their network for")
	p("-- 192.0.2.0/24); a line with +role covers the sessions' accounts, which are its members.")
	p("--   hostssl  all  %s  192.0.2.0/24  scram-sha-256", comment(admin))
	for _, r := range o.Roles {
		p("--   hostssl  all  +%s  192.0.2.0/24  scram-sha-256", comment(ident(r)))
	}
	p("-- Then: SELECT pg_reload_conf();")
	return b.String()
}

// comment keeps s on its line.
func comment(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == 0x85 || r == 0x2028 || r == 0x2029 {
			return '?'
		}
		return r
	}, s)
}

package credential

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/protocols"
)

var _ protocols.Lease = (*Lease)(nil)

// releaseTries and releaseWait say how stubborn Release is before it leaves a
// role to the sweeper; what stands in the way is mostly another's lock.
const (
	releaseTries = 3
	releaseWait  = 500 * time.Millisecond
	// maxDatabases bounds in how many databases a role's belongings are
	// looked after; a session sees one.
	maxDatabases = 64
)

// Lease is a just-in-time account: see protocols.Lease. Its methods are safe
// for concurrent use.
type Lease struct {
	issuer   *Issuer
	config   *TargetConfig // as it was when issued
	tls      *tls.Config   // nil for TLSDisable
	name     string
	password vault.Secret
	role     string
	database string
	session  string

	mu struct {
		sync.Mutex
		backend uint32
	}
	release struct { // serialises Release
		sync.Mutex
		done bool
	}
}

func (l *Lease) User() string     { return l.name }
func (l *Lease) Password() string { return l.password.Reveal() }
func (l *Lease) Role() string     { return l.role }
func (l *Lease) Database() string { return l.database }

// String names the account without its password.
func (l *Lease) String() string { return "account " + l.name + " on " + l.config.Name }

// TLS is a copy, the caller's to change.
func (l *Lease) TLS() *tls.Config {
	if l.tls == nil {
		return nil
	}
	return l.tls.Clone()
}

// Dial opens a TCP connection, or one through a tunnel, to the target.
func (l *Lease) Dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	c, err := l.issuer.opts.Dial(ctx, "tcp", l.config.Address)
	if err != nil {
		return nil, fmt.Errorf("dial target %s: %w", l.config.Name, err)
	}
	return c, nil
}

// current is the newest configuration of the lease's target, for as long as
// that is the same server: the account is where it was made.
func (l *Lease) current() *TargetConfig {
	if t, err := l.issuer.target(l.config.Name); err == nil && t.Address == l.config.Address {
		return t
	}
	return l.config
}

// LoggedIn implements protocols.Lease. On an error the account's backends have
// been told to end, and the caller must close its connection.
func (l *Lease) LoggedIn(ctx context.Context, backend uint32) error {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	t := l.current()
	// The password goes first, in a transaction of its own. The limit and the
	// date are bolts behind it: even LOGIN given back by mistake would not help.
	err := l.issuer.with(ctx, t, t.AdminDatabase, urgent, func(ctx context.Context, c *pgx.Conn) error {
		if err := exec(ctx, c, "ALTER ROLE "+ident(l.name)+" NOLOGIN PASSWORD NULL CONNECTION LIMIT 0 VALID UNTIL '1970-01-01 00:00:00+00'"); err != nil {
			return err
		}
		pids, err := backends(ctx, c, l.name)
		if err != nil {
			return err
		}
		if len(pids) != 1 || pids[0] != backend {
			return fmt.Errorf("the login's backend is %d, but the target shows %v for the account; is a connection pooler in between? Name the PostgreSQL server itself as target", backend, pids)
		}
		return nil
	})
	if err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), opTimeout)
		defer cancel()
		return errors.Join(fmt.Errorf("target %s: taking LOGIN away from the just-in-time account: %w", t.Name, err), l.Terminate(clean))
	}
	l.mu.Lock()
	l.mu.backend = backend
	l.mu.Unlock()
	return nil
}

// backends lists the processes that belong to a role.
func backends(ctx context.Context, c *pgx.Conn, role string) ([]uint32, error) {
	rows, err := c.Query(ctx, `SELECT pid::pg_catalog.int8 FROM pg_catalog.pg_stat_activity WHERE usename = $1`, role)
	if err != nil {
		return nil, err
	}
	pids, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return nil, err
	}
	out := make([]uint32, len(pids))
	for n, p := range pids {
		out[n] = uint32(p)
	}
	return out, nil
}

// Cancel implements protocols.Lease.
func (l *Lease) Cancel(ctx context.Context) error {
	l.mu.Lock()
	backend := l.mu.backend
	l.mu.Unlock()
	if backend == 0 {
		return nil // not logged in yet: nothing runs
	}
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	t := l.current()
	err := l.issuer.with(ctx, t, t.AdminDatabase, urgent, func(ctx context.Context, c *pgx.Conn) error {
		return asRole(ctx, c, l.name, fmt.Sprintf("SELECT pg_catalog.pg_cancel_backend(pid) FROM pg_catalog.pg_stat_activity WHERE pid = %d AND usename = %s", backend, literal(l.name)))
	})
	if err != nil {
		return fmt.Errorf("target %s: cancel: %w", t.Name, err)
	}
	return nil
}

// Terminate implements protocols.Lease: it returns nil when no backend of the
// account is left.
func (l *Lease) Terminate(ctx context.Context) error {
	t := l.current()
	if err := l.issuer.terminate(ctx, t, l.name); err != nil {
		return fmt.Errorf("target %s: terminate: %w", t.Name, err)
	}
	return nil
}

// terminate ends every backend of role and waits until they are gone: a backend
// takes about a millisecond to end, and a revocation waits for it. So the first
// word is said without a look, and the look comes a millisecond after it, in two
// round trips together. Between looks the connection is free for others: a
// revocation ends many at once.
func (i *Issuer) terminate(ctx context.Context, t *TargetConfig, role string) error {
	ctx, cancel := context.WithTimeout(ctx, terminateTimeout+dialTimeout)
	defer cancel()
	deadline := time.Now().Add(terminateTimeout)
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		var left []string
		err := i.with(ctx, t, t.AdminDatabase, urgent, func(ctx context.Context, c *pgx.Conn) error {
			if wait < 4*time.Millisecond || wait > 16*time.Millisecond { // else it was told a moment ago
				// As the role itself: a process id that meanwhile belongs to
				// somebody else is not ours to signal, and PostgreSQL sees to it.
				err := asRole(ctx, c, role, "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE usename = "+literal(role))
				if err != nil {
					return err
				}
			}
			results, err := c.PgConn().Exec(ctx, "SELECT pg_catalog.pg_sleep(0.001); SELECT pid FROM pg_catalog.pg_stat_activity WHERE usename = "+literal(role)).ReadAll()
			if err != nil {
				return err
			}
			for _, row := range results[len(results)-1].Rows {
				left = append(left, string(row[0]))
			}
			return nil
		})
		if err != nil {
			return err
		}
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("backends %v of %s were told to end and are still there after %s", left, role, terminateTimeout)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// asRole runs statements in one transaction as role, which need not exist any
// more. Should the administrative account have lost its membership in role, it
// takes it back.
func asRole(ctx context.Context, c *pgx.Conn, role string, statements ...string) error {
	all := append([]string{"BEGIN", "SET LOCAL ROLE " + ident(role)}, statements...)
	err := exec(ctx, c, append(all, "COMMIT")...)
	if err == nil {
		return nil
	}
	if rerr := exec(ctx, c, "ROLLBACK"); rerr != nil {
		return errors.Join(err, rerr)
	}
	var pe *pgconn.PgError
	if !errors.As(err, &pe) {
		return err
	}
	switch pe.Code {
	case "22023", "42704": // SET ROLE of a role that is gone
		if there, qerr := exists(ctx, c, role); qerr == nil && !there {
			return nil
		}
	case "42501":
		if gerr := exec(ctx, c, "GRANT "+ident(role)+" TO CURRENT_USER"); gerr != nil {
			return err
		}
		if err = exec(ctx, c, append(all, "COMMIT")...); err == nil {
			return nil
		}
		return errors.Join(err, exec(ctx, c, "ROLLBACK"))
	}
	return err
}

func exists(ctx context.Context, c *pgx.Conn, role string) (there bool, err error) {
	err = c.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = $1)`, role).Scan(&there)
	return there, err
}

// Release implements protocols.Lease. What it cannot finish is left, without
// LOGIN and password, to the sweeper.
func (l *Lease) Release(ctx context.Context) error {
	l.release.Lock()
	defer l.release.Unlock()
	if l.release.done {
		return nil
	}
	t := l.current()
	var err error
	for try := 1; ; try++ {
		if err = l.issuer.drop(ctx, t, l.name, l.role, l.database); err == nil {
			l.release.done = true
			break
		}
		if try == releaseTries || ctx.Err() != nil {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(try) * releaseWait):
		}
	}
	// From here on the sweeper may have it.
	l.forget()
	if err != nil {
		return fmt.Errorf("target %s: release %s: %w", t.Name, l.name, err)
	}
	return nil
}

func (l *Lease) forget() {
	l.issuer.mu.Lock()
	defer l.issuer.mu.Unlock()
	delete(l.issuer.mu.leases, l.name)
}

// drop ends the role's backends, gives what it owns to heir and removes it. It
// may be repeated, and be run by several nodes at once.
func (i *Issuer) drop(ctx context.Context, t *TargetConfig, role, heir, database string) error {
	if !jitName.MatchString(role) {
		return fmt.Errorf("%q is not a just-in-time role", role)
	}
	// A login under way ends here too, before we look for backends.
	gone := false
	err := i.with(ctx, t, t.AdminDatabase, urgent, func(ctx context.Context, c *pgx.Conn) error {
		there, err := exists(ctx, c, role)
		if err != nil || !there {
			gone = !there
			return err
		}
		return exec(ctx, c, "ALTER ROLE "+ident(role)+" NOLOGIN PASSWORD NULL CONNECTION LIMIT 0")
	})
	if err != nil || gone {
		return err
	}
	if err := i.terminate(ctx, t, role); err != nil {
		return err
	}
	var where []string
	err = i.with(ctx, t, t.AdminDatabase, work, func(ctx context.Context, c *pgx.Conn) (err error) {
		where, err = belongings(ctx, c, role, database)
		return err
	})
	if err != nil {
		return err
	}
	for _, db := range where {
		err := i.with(ctx, t, db, work, func(ctx context.Context, c *pgx.Conn) error {
			if err := rollbackPrepared(ctx, c, role); err != nil {
				return err
			}
			return asRole(ctx, c, role, "REASSIGN OWNED BY "+ident(role)+" TO "+ident(heir), "DROP OWNED BY "+ident(role))
		})
		if err != nil {
			return fmt.Errorf("hand over what it owns in database %s to %s: %w", db, heir, err)
		}
	}
	return i.with(ctx, t, t.AdminDatabase, work, func(ctx context.Context, c *pgx.Conn) error {
		return exec(ctx, c, "DROP ROLE IF EXISTS "+ident(role))
	})
}

// belongings lists the databases in which something depends on role: objects
// it owns, privileges and policies that name it, transactions it prepared. What
// belongs to the whole server (a database it created) is counted to the
// session's database.
func belongings(ctx context.Context, c *pgx.Conn, role, database string) ([]string, error) {
	rows, err := c.Query(ctx, `SELECT DISTINCT coalesce(d.datname::pg_catalog.text, $2)
		FROM pg_catalog.pg_shdepend s
		JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
		LEFT JOIN pg_catalog.pg_database d ON d.oid = s.dbid
		WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass AND r.rolname = $1
		AND (s.dbid <> 0 OR s.classid <> 'pg_catalog.pg_auth_members'::pg_catalog.regclass)
		UNION SELECT database::pg_catalog.text FROM pg_catalog.pg_prepared_xacts WHERE owner = $1
		LIMIT $3`, role, database, maxDatabases)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// rollbackPrepared ends the transactions (PREPARE TRANSACTION) that role left
// in this database: they hold locks, and nobody could commit them once the role
// is gone.
func rollbackPrepared(ctx context.Context, c *pgx.Conn, role string) error {
	rows, err := c.Query(ctx, `SELECT gid FROM pg_catalog.pg_prepared_xacts
		WHERE owner = $1 AND database = pg_catalog.current_database()`, role)
	if err != nil {
		return err
	}
	gids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(gids) == 0 {
		return err
	}
	// ROLLBACK PREPARED must stand alone, so the role is set for the session;
	// a connection on which it cannot be reset is not used again.
	if err := exec(ctx, c, "SET ROLE "+ident(role)); err != nil {
		return err
	}
	for _, gid := range gids {
		if err = exec(ctx, c, "ROLLBACK PREPARED "+literal(gid)); err != nil {
			break
		}
	}
	if rerr := exec(ctx, c, "RESET ROLE"); rerr != nil {
		shut(c)
		return errors.Join(err, rerr)
	}
	return err
}

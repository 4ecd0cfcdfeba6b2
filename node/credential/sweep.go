package credential

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Liveness is what is known about a session. The zero value knows nothing.
type Liveness uint8

const (
	Unknown Liveness = iota // the node cannot be asked: its role waits for its end
	Live
	Dead // the node that runs it, or would, says it is over
)

// maxSweep bounds how many roles one sweep looks at; the next one goes on.
const maxSweep = 1000

type leftover struct {
	name    string
	note    note
	idle    bool // NOLOGIN, or past its VALID UNTIL, and without a backend
	expired bool // past its end by more than sweepMargin
}

// Sweep drops just-in-time roles that this cluster's nodes left on target and
// says how many. state tells about a session of a node; it is asked without
// locks held. Dropped is
//
//   - what a session left that is Dead, once nobody can log in with it and
//     nobody is;
//   - what is past the latest end of any session it could belong to, whatever
//     state says: its backends are ended.
//
// A role that a lease of this process holds, another cluster's, and one without
// our comment are left alone. Errors concern single roles and are joined.
func (i *Issuer) Sweep(ctx context.Context, target string, state func(node, session string) Liveness) (int, error) {
	t, err := i.target(target)
	if err != nil {
		return 0, err
	}
	var found []leftover
	err = i.with(ctx, t, t.AdminDatabase, work, func(ctx context.Context, c *pgx.Conn) (err error) {
		found, err = i.leftovers(ctx, c)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("target %s: sweep: %w", target, err)
	}
	dropped := 0
	var errs []error
	for _, l := range found {
		if i.leased(l.name) {
			continue
		}
		if !l.expired && !(l.idle && state(l.note.Node, l.note.Session) == Dead) {
			continue
		}
		if err := ctx.Err(); err != nil {
			errs = append(errs, err)
			break
		}
		if err := i.drop(ctx, t, l.name, l.note.Role, l.note.Database); err != nil {
			errs = append(errs, fmt.Errorf("target %s: sweep %s: %w", target, l.name, err))
			continue
		}
		dropped++
		i.opts.Log.Info("swept a just-in-time role", "target", target, "role", l.name, "node", l.note.Node, "session", l.note.Session)
	}
	return dropped, errors.Join(errs...)
}

func (i *Issuer) leased(name string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.mu.leases[name] != nil
}

// leftovers reads roles of ours. Only accounts with CREATEROLE can comment on a
// role, so a session cannot forge or change a note.
func (i *Issuer) leftovers(ctx context.Context, c *pgx.Conn) ([]leftover, error) {
	rows, err := c.Query(ctx, `SELECT r.rolname::pg_catalog.text,
			coalesce(pg_catalog.shobj_description(r.oid, 'pg_authid'), ''),
			(NOT r.rolcanlogin OR coalesce(r.rolvaliduntil < pg_catalog.now(), false))
				AND NOT EXISTS (SELECT FROM pg_catalog.pg_stat_activity a WHERE a.usename = r.rolname),
			EXTRACT(epoch FROM pg_catalog.now())::pg_catalog.int8
		FROM pg_catalog.pg_roles r WHERE r.rolname ~ $1 AND NOT r.rolsuper ORDER BY r.oid LIMIT $2`, jitPattern, maxSweep)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []leftover
	for rows.Next() {
		var l leftover
		var comment string
		var now int64
		if err := rows.Scan(&l.name, &comment, &l.idle, &now); err != nil {
			return nil, err
		}
		if json.Unmarshal([]byte(comment), &l.note) != nil || l.note.Version != 1 || l.note.Cluster != i.opts.Cluster || l.note.Role == "" || l.note.Expires <= 0 {
			continue
		}
		l.expired = now > l.note.Expires+int64(sweepMargin.Seconds())
		out = append(out, l)
	}
	return out, rows.Err()
}

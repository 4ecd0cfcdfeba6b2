package sql

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/sallyport/sallyport/policy"
)

// Limits of a catalogue. A database beyond them is refused, not half read.
const (
	maxColumns    = 200_000
	maxRelations  = 100_000
	maxDefinition = 64 << 20 // bytes of view definitions and expressions together
)

// Querier is the part of a connection that reading a catalogue needs; a
// *pgx.Conn and a pgx.Tx are Queriers.
type Querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// Load reads the catalogue of the database that conn is connected to, in one
// read-only repeatable-read transaction. sensitive are the declared sensitive
// columns of the target; those of other databases are left out. Inside an open
// transaction of conn it sees what that transaction made, and leaves it as it
// was by a savepoint. On an error conn may be inside a failed transaction:
// close it unless it was idle before.
func Load(ctx context.Context, conn *pgx.Conn, sensitive []policy.Resource) (*Catalog, error) {
	var tx pgx.Tx
	var err error
	switch status := conn.PgConn().TxStatus(); status {
	case 'I':
		tx, err = conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
		if err != nil {
			return nil, fmt.Errorf("read catalogue: %w", err)
		}
		defer tx.Rollback(context.WithoutCancel(ctx))
		return LoadFrom(ctx, tx, sensitive)
	case 'T':
		if _, err := conn.Exec(ctx, "SAVEPOINT sallyport_catalogue"); err != nil {
			return nil, fmt.Errorf("read catalogue: %w", err)
		}
		c, err := LoadFrom(ctx, conn, sensitive)
		if _, e := conn.Exec(ctx, "ROLLBACK TO SAVEPOINT sallyport_catalogue; RELEASE SAVEPOINT sallyport_catalogue"); e != nil {
			err = errors.Join(err, e)
		}
		if err != nil {
			return nil, err
		}
		return c, nil
	default:
		return nil, errors.New("read catalogue: the connection's transaction has failed")
	}
}

// LoadFrom reads the catalogue through q, which must be inside a transaction of
// the caller's; it sets search_path locally, so that names in definitions come
// qualified, and the caller rolls back.
func LoadFrom(ctx context.Context, q Querier, sensitive []policy.Resource) (*Catalog, error) {
	r := &rows{}
	for _, step := range loadSteps {
		if err := step.read(ctx, q, r); err != nil {
			return nil, fmt.Errorf("read catalogue: %s: %w", step.name, err)
		}
	}
	c, err := build(r, sensitive)
	if err != nil {
		return nil, fmt.Errorf("read catalogue: %w", err)
	}
	return c, nil
}

type loadStep struct {
	name string
	read func(context.Context, Querier, *rows) error
}

// collect runs a query and appends every row to out. scan must return
// pointers to the fields of its argument, in the query's order.
func collect[T any](ctx context.Context, q Querier, out *[]T, limit int, scan func(*T) []any, query string) error {
	res, err := q.Query(ctx, query, pgx.QueryExecModeExec)
	if err != nil {
		return err
	}
	defer res.Close()
	for res.Next() {
		var row T
		if err := res.Scan(scan(&row)...); err != nil {
			return err
		}
		if len(*out) >= limit {
			return fmt.Errorf("more than %d rows", limit)
		}
		*out = append(*out, row)
	}
	return res.Err()
}

// Text that only the database holds is cast to text: types of other names
// need no codec, and the simple form of every value is stable.
var loadSteps = []loadStep{
	{"search_path", func(ctx context.Context, q Querier, r *rows) error {
		type head struct{ database, temp, path string }
		var heads []head
		// The first of pg_catalog's names that a connection resolves is this one.
		err := collect(ctx, q, &heads, 1, func(h *head) []any { return []any{&h.database, &h.temp, &h.path} }, `
			SELECT pg_catalog.current_database()::text,
			       coalesce((SELECT nspname FROM pg_catalog.pg_namespace WHERE oid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()), '')::text,
			       pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true)`)
		if err == nil && len(heads) == 1 {
			r.Database, r.Temp = heads[0].database, heads[0].temp
		}
		return err
	}},
	{"schemas", func(ctx context.Context, q Querier, r *rows) error {
		return collect(ctx, q, &r.Schemas, maxRelations, func(s *string) []any { return []any{s} },
			`SELECT nspname::text FROM pg_namespace ORDER BY 1`)
	}},
	{"relations", func(ctx context.Context, q Querier, r *rows) error {
		var size int
		type row struct {
			relationRow
			kind string
		}
		var out []row
		err := collect(ctx, q, &out, maxRelations, func(x *row) []any {
			return []any{&x.OID, &x.Schema, &x.Name, &x.kind, &x.Triggers, &x.Rules, &x.RowSecurity, &x.RowType, &x.Definition}
		}, `
			SELECT c.oid, n.nspname::text, c.relname::text, c.relkind::text,
			       EXISTS (SELECT 1 FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal),
			       EXISTS (SELECT 1 FROM pg_rewrite w WHERE w.ev_class = c.oid AND w.rulename <> '_RETURN'),
			       c.relrowsecurity, c.reltype,
			       CASE WHEN c.relkind IN ('v', 'm') AND c.oid >= 16384 THEN coalesce(pg_get_viewdef(c.oid), '') ELSE '' END
			FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
			WHERE n.nspname <> 'pg_toast' AND c.relkind <> 'c'
			ORDER BY c.oid`)
		for _, x := range out {
			x.Kind = x.kind[0]
			if size += len(x.Definition); size > maxDefinition {
				return fmt.Errorf("view definitions of more than %d bytes", maxDefinition)
			}
			r.Relations = append(r.Relations, x.relationRow)
		}
		return err
	}},
	{"columns", func(ctx context.Context, q Querier, r *rows) error {
		return collect(ctx, q, &r.Columns, maxColumns, func(c *columnRow) []any { return []any{&c.Table, &c.Num, &c.Name, &c.Type} }, `
			SELECT a.attrelid, a.attnum, a.attname::text, a.atttypid
			FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
			WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.oid >= 16384
			ORDER BY 1, 2`)
	}},
	{"inheritance", func(ctx context.Context, q Querier, r *rows) error {
		return collect(ctx, q, &r.Inherits, maxRelations, func(p *[2]uint32) []any { return []any{&p[0], &p[1]} },
			`SELECT inhrelid, inhparent FROM pg_inherits ORDER BY 1, 2`)
	}},
	{"views", func(ctx context.Context, q Querier, r *rows) error {
		return collect(ctx, q, &r.Depends, maxColumns, func(p *[2]uint32) []any { return []any{&p[0], &p[1]} }, `
			SELECT DISTINCT w.ev_class, d.refobjid
			FROM pg_depend d JOIN pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
			WHERE d.refclassid = 'pg_class'::regclass AND w.rulename = '_RETURN' AND d.refobjid <> w.ev_class
			ORDER BY 1, 2`)
	}},
	{"expressions", func(ctx context.Context, q Querier, r *rows) error {
		err := collect(ctx, q, &r.Exprs, maxColumns, func(e *exprRow) []any { return []any{&e.Table, &e.Policy, &e.Text} }, `
			SELECT adrelid, false, coalesce(pg_get_expr(adbin, adrelid), '') FROM pg_attrdef WHERE adrelid >= 16384
			UNION ALL
			SELECT conrelid, false, coalesce(pg_get_expr(conbin, conrelid), '') FROM pg_constraint WHERE contype = 'c' AND conrelid >= 16384
			UNION ALL
			SELECT indrelid, false, coalesce(pg_get_expr(e, indrelid), '')
			FROM pg_index, LATERAL (VALUES (indexprs), (indpred)) x(e) WHERE e IS NOT NULL AND indrelid >= 16384
			UNION ALL
			SELECT polrelid, true, coalesce(pg_get_expr(e, polrelid), '')
			FROM pg_policy, LATERAL (VALUES (polqual), (polwithcheck)) x(e) WHERE e IS NOT NULL
			ORDER BY 1, 2, 3`)
		var size int
		for _, e := range r.Exprs {
			if size += len(e.Text); size > maxDefinition {
				return fmt.Errorf("expressions of more than %d bytes", maxDefinition)
			}
		}
		return err
	}},
	{"foreign keys", func(ctx context.Context, q Querier, r *rows) error {
		return collect(ctx, q, &r.Keys, maxColumns, func(k *keyRow) []any { return []any{&k.From, &k.To, &k.FromCols, &k.Cols, &k.Cascades} }, `
			SELECT conrelid, confrelid, conkey, confkey, confdeltype IN ('c', 'n', 'd') OR confupdtype IN ('c', 'n', 'd')
			FROM pg_constraint WHERE contype = 'f' ORDER BY oid`)
	}},
	{"generated columns", func(ctx context.Context, q Querier, r *rows) error {
		return collect(ctx, q, &r.Generated, maxColumns, func(g *generatedRow) []any { return []any{&g.Table, &g.Column, &g.From} }, `
			SELECT d.objid, d.objsubid::int2, d.refobjsubid::int2 FROM pg_depend d
			WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.objid = d.refobjid
			      AND d.objsubid > 0 AND d.refobjsubid > 0 AND d.objsubid <> d.refobjsubid
			UNION
			SELECT a.adrelid, a.adnum, d.refobjsubid::int2
			FROM pg_attrdef a JOIN pg_attribute t ON t.attrelid = a.adrelid AND t.attnum = a.adnum
			     JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid
			WHERE t.attgenerated <> '' AND d.refclassid = 'pg_class'::regclass AND d.refobjid = a.adrelid AND d.refobjsubid > 0 AND d.refobjsubid <> a.adnum
			ORDER BY 1, 2, 3`)
	}},
	{"functions", func(ctx context.Context, q Querier, r *rows) error {
		return collect(ctx, q, &r.Functions, maxRelations, func(f *routine) []any { return []any{&f.OID, &f.Schema, &f.Name, &f.Types, &f.Row} }, `
			SELECT p.oid, n.nspname::text, p.proname::text,
			       CASE WHEN EXISTS (SELECT 1 FROM unnest(p.proargtypes) a(o) WHERE a.o >= 16384)
			                 -- a string type of a user's could draw untyped literals to it
			                 AND NOT EXISTS (SELECT 1 FROM unnest(p.proargtypes) a(o) JOIN pg_type t ON t.oid = a.o
			                                 WHERE a.o >= 16384 AND t.typcategory = 'S'
			                                 AND NOT EXISTS (SELECT 1 FROM pg_proc b WHERE b.proname = p.proname
			                                                 AND b.pronamespace = 'pg_catalog'::regnamespace AND 25 = ANY (b.proargtypes)))
			            THEN ARRAY(SELECT a.o FROM unnest(p.proargtypes) a(o) WHERE a.o >= 16384 ORDER BY 1) ELSE '{}' END,
			       p.pronargs >= 1 AND p.pronargs - p.pronargdefaults <= 1
			       AND EXISTS (SELECT 1 FROM pg_type t WHERE t.oid = p.proargtypes[0]
			                   AND (t.typtype IN ('c', 'p') OR t.typtype = 'd' AND EXISTS (SELECT 1 FROM pg_type b WHERE b.oid = t.typbasetype AND b.typtype = 'c')))
			FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
			WHERE n.nspname NOT IN ('pg_catalog', 'information_schema')
			ORDER BY 1`)
	}},
	{"operators", func(ctx context.Context, q Querier, r *rows) error {
		return collect(ctx, q, &r.Operators, maxRelations, func(o *routine) []any { return []any{&o.OID, &o.Schema, &o.Name, &o.Types} }, `
			SELECT o.oid, n.nspname::text, o.oprname::text,
			       ARRAY(SELECT a.o FROM unnest(ARRAY[o.oprleft, o.oprright]) a(o) WHERE a.o >= 16384 ORDER BY 1)
			FROM pg_operator o JOIN pg_namespace n ON n.oid = o.oprnamespace
			WHERE n.nspname <> 'pg_catalog' ORDER BY 1`)
	}},
	{"built-in functions", func(ctx context.Context, q Querier, r *rows) error {
		return collect(ctx, q, &r.Builtin, maxRelations, func(s *string) []any { return []any{s} },
			`SELECT DISTINCT proname::text FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace ORDER BY 1`)
	}},
	{"types", func(ctx context.Context, q Querier, r *rows) error {
		type row struct {
			typeRow
			kind string
		}
		var out []row
		err := collect(ctx, q, &out, maxColumns, func(t *row) []any {
			return []any{&t.OID, &t.Schema, &t.Name, &t.kind, &t.Base, &t.Elem, &t.Checked}
		}, `
			SELECT t.oid, n.nspname::text, t.typname::text, t.typtype::text, t.typbasetype,
			       CASE WHEN t.typcategory = 'A' THEN t.typelem ELSE 0 END,
			       t.typtype = 'd' AND EXISTS (SELECT 1 FROM pg_constraint k WHERE k.contypid = t.oid)
			FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
			WHERE t.oid >= 16384 AND n.nspname <> 'pg_toast' ORDER BY 1`)
		for _, t := range out {
			t.Kind = t.kind[0]
			r.Types = append(r.Types, t.typeRow)
		}
		return err
	}},
	{"casts", func(ctx context.Context, q Querier, r *rows) error {
		type row struct {
			castRow
			context string
		}
		var out []row
		err := collect(ctx, q, &out, maxRelations, func(c *row) []any {
			return []any{&c.Source, &c.Target, &c.context, &c.Function, &c.InOut}
		}, `
			SELECT c.castsource, c.casttarget, c.castcontext::text,
			       CASE WHEN c.castfunc >= 16384 THEN coalesce((SELECT p.proname FROM pg_proc p WHERE p.oid = c.castfunc), '')::text ELSE '' END,
			       c.castmethod = 'i'
			FROM pg_cast c WHERE c.oid >= 16384 ORDER BY c.oid`)
		for _, c := range out {
			c.Context = c.context[0]
			r.Casts = append(r.Casts, c.castRow)
		}
		return err
	}},
}

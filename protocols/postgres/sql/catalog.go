package sql

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/sallyport/sallyport/policy"
)

// Catalog is what one database's catalogue said at one moment. It is immutable
// to its users and safe for concurrent use; sessions of a target share it.
type Catalog struct {
	database  string
	temp      string // this connection's temporary schema when it was loaded, "" for none
	relations map[uint32]*Relation
	names     map[qualified]*Relation
	tempNames map[string]bool // relations of any session's temporary schema
	schemas   map[string]bool

	functions map[string][]routine // outside pg_catalog
	operators map[string][]routine // outside pg_catalog
	builtin   map[string]bool      // names of the functions in pg_catalog
	types     map[qualified]*typeRow
	typeOIDs  map[uint32]*typeRow
	casts     []castRow // not built in
	// users are the relations with a column of the type, of an array of it or of
	// a domain over it, for types outside pg_catalog.
	users map[uint32][]*Relation

	// missing are declared sensitive columns of tables that do not exist.
	missing []policy.Resource
	tables  []*Relation // those with sensitive columns, by OID

	digest [sha256.Size]byte

	mu struct {
		sync.Mutex
		reads  map[uint32]string // hazards found so far; see hazard.go
		writes map[uint32]string
		parsed map[string]finding
	}
}

type qualified struct{ schema, name string }

// Relation is a table, view, sequence, index or the like.
type Relation struct {
	OID          uint32
	Schema, Name string
	// Kind is pg_class.relkind: r table, p partitioned table, v view, m
	// materialised view, f foreign table, S sequence, i and I index.
	Kind byte
	// Columns are those not dropped, in order; nil for system relations.
	Columns     []Column
	Triggers    bool // triggers that users made
	Rules       bool // rewrite rules other than a view's own
	RowSecurity bool

	byName     map[string]int // index in Columns, for tables of many columns
	rowType    uint32
	definition string   // of a view
	exprs      []string // defaults, checks and index expressions: what a write evaluates
	policies   []string // expressions of row security
	parents    []*Relation
	children   []*Relation
	bases      []*Relation // what a view depends on, directly
	views      []*Relation // the reverse: views that read it, directly
	keys       []*foreignKey
	generated  []generatedRow
	sensitive  map[int16][]policy.Resource // declared for this column or for one of its family
}

// Column is a column of a Relation.
type Column struct {
	Num  int16
	Name string
	Type uint32
}

type foreignKey struct {
	from, to       *Relation
	fromCols, cols []int16
	cascades       bool // on delete or update, rows of from change
}

// routine is a function, an aggregate, an operator or the like outside pg_catalog.
type routine struct {
	OID    uint32
	Schema string
	Name   string
	// Types are those argument types that are not built in. A routine with
	// none can stand in for a built-in one of the same name at any call.
	Types []uint32
	Row   bool // takes one row: t.name calls it
}

type typeRow struct {
	OID          uint32
	Schema, Name string
	Kind         byte // pg_type.typtype
	Base, Elem   uint32
	Checked      bool // a domain with constraints
}

type castRow struct {
	Source, Target uint32
	Context        byte   // i implicit, a assignment, e explicit
	Function       string // "" when no function outside pg_catalog runs
	InOut          bool
}

// firstUserOID is FirstNormalObjectId: smaller ones were made by initdb.
const firstUserOID = 16384

// rows is a catalogue as read, before it is linked.
type rows struct {
	Database, Temp string
	Schemas        []string
	Relations      []relationRow
	Columns        []columnRow
	Inherits       [][2]uint32 // child, parent
	Depends        [][2]uint32 // view, what it reads
	Exprs          []exprRow
	Keys           []keyRow
	Generated      []generatedRow
	Functions      []routine
	Operators      []routine
	Builtin        []string
	Types          []typeRow
	Casts          []castRow
}

type relationRow struct {
	OID                          uint32
	Schema, Name                 string
	Kind                         byte
	Triggers, Rules, RowSecurity bool
	RowType                      uint32
	Definition                   string
}

type columnRow struct {
	Table uint32
	Column
}

type exprRow struct {
	Table  uint32
	Policy bool
	Text   string
}

// generatedRow says that a generated column is computed from another.
type generatedRow struct {
	Table        uint32
	Column, From int16
}

type keyRow struct {
	From, To       uint32
	FromCols, Cols []int16
	Cascades       bool
}

// build links rows into a Catalog. sensitive are Column resources, or Table
// ones for all columns of a table; those of other databases are left out.
func build(r *rows, sensitive []policy.Resource) (*Catalog, error) {
	c := &Catalog{
		database: r.Database, temp: r.Temp,
		relations: make(map[uint32]*Relation, len(r.Relations)), names: make(map[qualified]*Relation, len(r.Relations)),
		tempNames: map[string]bool{}, schemas: make(map[string]bool, len(r.Schemas)),
		functions: make(map[string][]routine), operators: make(map[string][]routine), builtin: make(map[string]bool, len(r.Builtin)),
		types: make(map[qualified]*typeRow, len(r.Types)), typeOIDs: make(map[uint32]*typeRow, len(r.Types)), casts: r.Casts,
		users: map[uint32][]*Relation{},
	}
	c.mu.reads, c.mu.writes, c.mu.parsed = map[uint32]string{}, map[uint32]string{}, map[string]finding{}
	for _, s := range r.Schemas {
		c.schemas[s] = true
	}
	for i := range r.Relations {
		row := &r.Relations[i]
		rel := &Relation{OID: row.OID, Schema: row.Schema, Name: row.Name, Kind: row.Kind, Triggers: row.Triggers, Rules: row.Rules,
			RowSecurity: row.RowSecurity, rowType: row.RowType, definition: row.Definition}
		c.relations[row.OID] = rel
		c.names[qualified{row.Schema, row.Name}] = rel
		if strings.HasPrefix(row.Schema, "pg_temp") {
			c.tempNames[row.Name] = true
		}
	}
	for _, col := range r.Columns {
		if rel := c.relations[col.Table]; rel != nil {
			rel.Columns = append(rel.Columns, col.Column)
		}
	}
	for _, rel := range c.relations {
		if len(rel.Columns) > 32 {
			rel.byName = make(map[string]int, len(rel.Columns))
			for i := range rel.Columns {
				rel.byName[rel.Columns[i].Name] = i
			}
		}
	}
	for _, p := range r.Inherits {
		child, parent := c.relations[p[0]], c.relations[p[1]]
		if child != nil && parent != nil {
			child.parents = append(child.parents, parent)
			parent.children = append(parent.children, child)
		}
	}
	for _, p := range r.Depends {
		view, base := c.relations[p[0]], c.relations[p[1]]
		if view != nil && base != nil {
			view.bases = append(view.bases, base)
			base.views = append(base.views, view)
		}
	}
	for _, e := range r.Exprs {
		if rel := c.relations[e.Table]; rel != nil && e.Policy {
			rel.policies = append(rel.policies, e.Text)
		} else if rel != nil {
			rel.exprs = append(rel.exprs, e.Text)
		}
	}
	for _, k := range r.Keys {
		from, to := c.relations[k.From], c.relations[k.To]
		if from == nil || to == nil {
			continue
		}
		key := &foreignKey{from: from, to: to, fromCols: k.FromCols, cols: k.Cols, cascades: k.Cascades}
		from.keys = append(from.keys, key)
		if from != to {
			to.keys = append(to.keys, key)
		}
	}
	for _, g := range r.Generated {
		if rel := c.relations[g.Table]; rel != nil {
			rel.generated = append(rel.generated, g)
		}
	}
	for _, f := range r.Functions {
		c.functions[f.Name] = append(c.functions[f.Name], f)
	}
	for _, o := range r.Operators {
		c.operators[o.Name] = append(c.operators[o.Name], o)
	}
	for _, n := range r.Builtin {
		c.builtin[n] = true
	}
	for i := range r.Types {
		t := &r.Types[i]
		c.types[qualified{t.Schema, t.Name}], c.typeOIDs[t.OID] = t, t
	}
	for _, col := range r.Columns {
		rel := c.relations[col.Table]
		at := col.Type
		for range 100 {
			if rel == nil || at < firstUserOID {
				break
			}
			c.users[at] = append(c.users[at], rel)
			t := c.typeOIDs[at]
			if t == nil {
				break
			}
			at = max(t.Base, t.Elem)
		}
	}
	if err := c.declare(sensitive); err != nil {
		return nil, err
	}
	h := sha256.New()
	for _, v := range []any{r, sensitive} {
		if err := json.NewEncoder(h).Encode(v); err != nil {
			return nil, err
		}
	}
	h.Sum(c.digest[:0])
	return c, nil
}

// declare marks sensitive columns; by name, the same columns of all tables that
// share rows with theirs (parents, children, partitions); and columns that are
// generated from any of them.
func (c *Catalog) declare(sensitive []policy.Resource) error {
	for _, r := range sensitive {
		var columns []string
		switch {
		case r.Type == policy.Column && len(r.Path) == 5:
			columns = r.Path[4:]
		case r.Type == policy.Table && len(r.Path) == 4:
		default:
			return fmt.Errorf("sensitive %s %v: not a column or a table of a database", r.Type, r.Path)
		}
		if r.Path[1] != c.database {
			continue
		}
		rel := c.names[qualified{r.Path[2], r.Path[3]}]
		if rel == nil {
			c.missing = append(c.missing, r)
			continue
		}
		if columns == nil {
			for _, col := range rel.Columns {
				columns = append(columns, col.Name)
			}
		}
		for _, name := range columns {
			found := rel.column(name) != nil
			c.spread(rel, name, r, map[*Relation]bool{})
			if !found {
				c.missing = append(c.missing, r)
			}
		}
	}
	for _, rel := range c.relations {
		if len(rel.sensitive) > 0 {
			c.tables = append(c.tables, rel)
		}
	}
	slices.SortFunc(c.tables, func(a, b *Relation) int { return int(int64(a.OID) - int64(b.OID)) })
	return nil
}

func (c *Catalog) spread(rel *Relation, name string, r policy.Resource, seen map[*Relation]bool) {
	if seen[rel] {
		return
	}
	seen[rel] = true
	col := rel.column(name)
	if col == nil {
		return
	}
	if rel.sensitive == nil {
		rel.sensitive = map[int16][]policy.Resource{}
	}
	rel.sensitive[col.Num] = append(rel.sensitive[col.Num], r)
	for _, g := range rel.generated {
		for i := range rel.Columns {
			if g.From == col.Num && rel.Columns[i].Num == g.Column {
				// A generated column cannot be computed from another one.
				c.spread(rel, rel.Columns[i].Name, r, map[*Relation]bool{})
			}
		}
	}
	for _, p := range rel.parents {
		c.spread(p, name, r, seen)
	}
	for _, p := range rel.children {
		c.spread(p, name, r, seen)
	}
}

func (r *Relation) column(name string) *Column {
	if r.byName != nil {
		if i, ok := r.byName[name]; ok {
			return &r.Columns[i]
		}
		return nil
	}
	for i := range r.Columns {
		if r.Columns[i].Name == name {
			return &r.Columns[i]
		}
	}
	return nil
}

// family calls f for r and all tables below it.
func (r *Relation) family(f func(*Relation)) {
	seen := map[*Relation]bool{}
	var walk func(*Relation)
	walk = func(r *Relation) {
		if seen[r] {
			return
		}
		seen[r] = true
		f(r)
		for _, c := range r.children {
			walk(c)
		}
	}
	walk(r)
}

// Digest identifies the catalogue's content together with what was declared
// sensitive. Equal digests mean equal analyses.
func (c *Catalog) Digest() [sha256.Size]byte { return c.digest }

// Equal says whether analyses under c and other are the same.
func (c *Catalog) Equal(other *Catalog) bool {
	return c == other || c != nil && other != nil && c.digest == other.digest
}

// Database is the name of the database that the catalogue describes.
func (c *Catalog) Database() string { return c.database }

// Relation returns the relation with this name, or nil.
func (c *Catalog) Relation(schema, name string) *Relation { return c.names[qualified{schema, name}] }

// RelationByOID returns the relation with this OID, or nil.
func (c *Catalog) RelationByOID(oid uint32) *Relation { return c.relations[oid] }

// Sensitive says whether a column is declared sensitive, itself or through a
// table that shares rows with its own. col is the attribute number.
func (c *Catalog) Sensitive(table uint32, col int16) bool {
	rel := c.relations[table]
	return rel != nil && len(rel.sensitive[col]) > 0
}

// MaskedColumn says whether the session must not see the column, given by table
// OID and attribute number as a RowDescription names it.
func (sc *Scope) MaskedColumn(table uint32, col int16) bool {
	if sc.Catalog == nil {
		return false
	}
	rel := sc.Catalog.relations[table]
	return rel != nil && sc.masked(rel, col)
}

// Masking says whether any column of the database is masked for the session.
func (sc *Scope) Masking() bool {
	if sc.Masked == nil || sc.Catalog == nil {
		return false
	}
	for _, rel := range sc.Catalog.tables {
		if sc.maskedAny(rel) {
			return true
		}
	}
	return slices.ContainsFunc(sc.Catalog.missing, sc.Masked)
}

func (sc *Scope) masked(rel *Relation, col int16) bool {
	return sc.Masked != nil && slices.ContainsFunc(rel.sensitive[col], sc.Masked)
}

// maskedAny says whether rel has a masked column of its own.
func (sc *Scope) maskedAny(rel *Relation) bool {
	for col := range rel.sensitive {
		if sc.masked(rel, col) {
			return true
		}
	}
	return false
}

// tainted returns the table with masked columns that rel shows through a view,
// however deep, or nil.
func (sc *Scope) tainted(rel *Relation) *Relation {
	if len(rel.bases) == 0 {
		return nil
	}
	seen := map[*Relation]bool{rel: true}
	queue := slices.Clone(rel.bases)
	for len(queue) > 0 {
		r := queue[0]
		queue = queue[1:]
		if seen[r] {
			continue
		}
		seen[r] = true
		if sc.maskedAny(r) {
			return r
		}
		queue = append(queue, r.bases...)
		queue = append(queue, r.children...)
	}
	return nil
}

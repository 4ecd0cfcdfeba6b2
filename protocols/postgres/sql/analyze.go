package sql

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/multigres/multigres/go/common/parser/ast"

	"github.com/sallyport/sallyport/policy"
)

// Analyze reads a query string: what each of its statements does, and what
// stands against it. A Problem of its own is for text that does not parse as a
// whole; then nothing of it may be sent on. An empty query has no statements.
//
// Every statement is analysed against sc as it was before the string; tables
// that a statement of the string creates are known to those after it.
func Analyze(text string, sc *Scope) ([]Statement, *Problem) {
	if problem := checkScope(sc); problem != nil {
		return nil, problem
	}
	if len(text) > largeText {
		large <- struct{}{}
		defer func() { <-large }()
	}
	list, problem := parse(text)
	if problem != nil {
		return nil, problem
	}
	return analyze(list, sc, false)
}

// Texts of more than largeText bytes are analysed a few at a time in this
// process: one of the longest takes most of a second and some 100 MB.
const largeText = 64 << 10

var large = make(chan struct{}, runtime.GOMAXPROCS(0))

func checkScope(sc *Scope) *Problem {
	if sc == nil || sc.Catalog == nil {
		return &Problem{Rule: "unsupported", Reason: "the gateway has no catalogue of this database", Code: "58000"}
	}
	if i := slices.Index(sc.SearchPath, "pg_catalog"); i > 0 {
		return unsupported("the session's search_path names pg_catalog after %q, so that built-in names may mean something else", sc.SearchPath[0])
	}
	return nil
}

// analyze turns parsed statements into Statements. inside says that the text
// is a definition stored in the database, whose masking is judged by its user.
func analyze(list []parsed, sc *Scope, inside bool) (out []Statement, problem *Problem) {
	defer func() {
		if r := recover(); r != nil {
			out, problem = nil, unsupported("the statement cannot be analysed")
		}
	}()
	b := &batch{created: map[qualified]*Relation{}, masking: !inside && sc.Masking()}
	out = make([]Statement, len(list))
	for i := range list {
		st := &out[i]
		st.Text = list[i].text
		if st.Problem = inspect(&list[i]); st.Problem != nil {
			continue
		}
		a := newAnalysis(sc, b, st)
		a.tokens = list[i].tokens
		a.run(list[i].tree)
	}
	return out, nil
}

// batch is what the statements of one string know of each other.
type batch struct {
	created map[qualified]*Relation // tables made earlier in the string
	renamed bool                    // a name has changed its meaning
	masking bool                    // some column is masked for the session
}

// analysis is the reading of one statement.
type analysis struct {
	sc      *Scope
	cat     *Catalog
	batch   *batch
	st      *Statement
	tokens  []token
	problem *Problem

	ctes    []string // names in scope, innermost last
	handled map[*ast.RangeVar]bool
	locking int  // inside a FROM list whose rows are locked
	utility bool // not inside a query: type names are definitions

	paired    map[pairKey]bool // what st.Pairs holds
	named     map[pairKey]bool // the relations and functions of st.Pairs, without action
	relations int              // how many of them are relations
	functions int              // and functions

	touched    []touch
	touchedAt  map[*Relation]int // index in touched
	unknown    []string          // relations that the catalogue does not know
	calls      []call
	called     map[call]bool
	objects    map[uint32]bool  // what st.Objects holds
	funcs, ops map[nameUse]bool // unqualified names: judged at the end
	funcNames  []nameUse        // the same in order
	opNames    []nameUse
	types      []uint32 // types outside pg_catalog that values may have
	casts      []string // built-in types that are cast to
	subqueries int
	evaluates  bool // holds an operator, a function or a cast
	cte        bool
	creates    []*Relation        // plain tables that it makes
	created    []*Relation        // others that it makes
	falls      map[*Relation]bool // with DROP … CASCADE
	alters     []ast.AlterTableType
	columns    []*ast.TypeName // types of columns that it defines
	temporary  bool
	after      []func()
}

type touch struct {
	rel   *Relation
	write bool // anything but reading its rows
}

type call struct {
	name string
	ok   bool // touches no table: possible while columns are masked
}

// nameUse is an unqualified name of a function or an operator.
type nameUse struct{ name string }

func newAnalysis(sc *Scope, b *batch, st *Statement) *analysis {
	return &analysis{sc: sc, cat: sc.Catalog, batch: b, st: st, handled: map[*ast.RangeVar]bool{},
		paired: map[pairKey]bool{}, named: map[pairKey]bool{}, touchedAt: map[*Relation]int{}, called: map[call]bool{},
		objects: map[uint32]bool{}, funcs: map[nameUse]bool{}, ops: map[nameUse]bool{}}
}

func (a *analysis) run(tree ast.Stmt) {
	a.statement(tree)
	a.finish(tree)
	a.st.Problem = a.problem
	if a.problem != nil {
		a.st.Reads, a.st.Output = false, nil
	}
	for _, f := range a.after {
		f()
	}
	for _, rel := range a.creates {
		a.batch.created[qualified{rel.Schema, rel.Name}] = rel
	}
	for _, rel := range a.created {
		if !a.batch.masking {
			a.batch.created[qualified{rel.Schema, rel.Name}] = rel
		}
	}
}

// refuse sets the first problem. Its reason may hold names of the statement;
// what is longer than a person reads is cut.
func (a *analysis) refuse(p *Problem) {
	const longest = 1000
	if a.problem != nil {
		return
	}
	if len(p.Reason) > longest {
		cut := longest
		for !utf8.RuneStart(p.Reason[cut]) {
			cut--
		}
		p.Reason = p.Reason[:cut] + "…"
	}
	a.problem = p
}

// Resources.

func (a *analysis) database() policy.Resource {
	return policy.Resource{Type: policy.Database, Path: []string{a.sc.Target, a.sc.Database}}
}

func (a *analysis) schema(name string) policy.Resource {
	return policy.Resource{Type: policy.Schema, Path: []string{a.sc.Target, a.sc.Database, name}}
}

func (a *analysis) table(n qualified) policy.Resource {
	return policy.Resource{Type: policy.Table, Path: []string{a.sc.Target, a.sc.Database, n.schema, n.name}}
}

func (a *analysis) function(n qualified) policy.Resource {
	return policy.Resource{Type: policy.Function, Path: []string{a.sc.Target, a.sc.Database, n.schema, n.name}}
}

// pairKey is a pair of one statement: target and database are the same for all.
type pairKey struct {
	action       policy.Action
	kind         policy.ResourceType
	schema, name string
}

func (a *analysis) pair(action policy.Action, r policy.Resource) {
	key := pairKey{action: action, kind: r.Type}
	if len(r.Path) > 2 {
		key.schema = r.Path[2]
	}
	if len(r.Path) > 3 {
		key.name = r.Path[3]
	}
	if a.paired[key] {
		return
	}
	resource := key
	resource.action = ""
	if !a.named[resource] {
		switch r.Type {
		case policy.Table:
			a.relations++
		case policy.Function:
			a.functions++
		}
		if a.relations > maxNamed || a.functions > maxNamed {
			a.refuse(tooMuch("54001", "the statement names more than %d tables or functions; split it", maxNamed))
			return
		}
		a.named[resource] = true
	}
	a.paired[key] = true
	a.st.Pairs = append(a.st.Pairs, policy.Pair{Action: action, Resource: r})
}

func (a *analysis) onDatabase(action policy.Action) { a.pair(action, a.database()) }

// Names.

// path is the schemas that an unqualified relation name is looked up in, in
// the server's order: the temporary schema and pg_catalog come first unless
// the path names them.
func (a *analysis) path() []string {
	out := make([]string, 0, len(a.sc.SearchPath)+2)
	if !slices.Contains(a.sc.SearchPath, "pg_temp") {
		out = append(out, "pg_temp")
	}
	if !slices.Contains(a.sc.SearchPath, "pg_catalog") {
		out = append(out, "pg_catalog")
	}
	for _, s := range a.sc.SearchPath {
		if s == "$user" {
			s = a.sc.Role
		}
		out = append(out, s)
	}
	return out
}

// creation is the schema that a new object without a schema goes to.
func (a *analysis) creation() string {
	for _, s := range a.path() {
		if s != "pg_temp" && s != "pg_catalog" && a.cat.schemas[s] {
			return s
		}
	}
	for _, s := range a.sc.SearchPath {
		if s != "pg_temp" && s != "pg_catalog" && s != "$user" {
			return s
		}
	}
	return "public"
}

// lookup finds a relation by its exact schema.
func (a *analysis) lookup(schema, name string) *Relation {
	if rel := a.batch.created[qualified{schema, name}]; rel != nil {
		return rel
	}
	if schema == "pg_temp" {
		if a.cat.temp == "" {
			return nil
		}
		schema = a.cat.temp
	}
	return a.cat.names[qualified{schema, name}]
}

// canonical is how resources name a relation.
func (a *analysis) canonical(rel *Relation) qualified {
	if rel.Schema == a.cat.temp && a.cat.temp != "" {
		return qualified{"pg_temp", rel.Name}
	}
	return qualified{rel.Schema, rel.Name}
}

// resolve returns every relation that the name may mean. More than one, when
// it is not known, so that all of them must be permitted; rel is nil then.
func (a *analysis) resolve(catalog, schema, name string) (names []qualified, rel *Relation) {
	if catalog != "" && catalog != a.sc.Database {
		a.refuse(unsupported("%s.%s.%s is in another database; connect to that one", catalog, schema, name))
	}
	if schema != "" {
		if rel = a.lookup(schema, name); rel != nil {
			return []qualified{a.canonical(rel)}, rel
		}
		return []qualified{{schema, name}}, nil
	}
	for _, s := range a.path() {
		if rel = a.lookup(s, name); rel != nil {
			break
		}
	}
	if rel != nil {
		names = append(names, a.canonical(rel))
	} else {
		for _, s := range a.path() {
			if s != "pg_catalog" && s != "pg_temp" && a.cat.schemas[s] {
				names = append(names, qualified{s, name})
			}
		}
		if names == nil {
			names = append(names, qualified{a.creation(), name})
		}
	}
	if a.cat.temp == "" && a.cat.tempNames[name] {
		names = append(names, qualified{"pg_temp", name})
	}
	return names, rel
}

// use adds the pair for a relation and remembers that it is touched.
func (a *analysis) use(action policy.Action, catalog, schema, name string, write bool) *Relation {
	names, rel := a.resolve(catalog, schema, name)
	for _, n := range names {
		a.pair(action, a.table(n))
	}
	if rel == nil {
		a.unknown = append(a.unknown, joinName(schema, name))
		return nil
	}
	a.touch(rel, write)
	return rel
}

func (a *analysis) touch(rel *Relation, write bool) {
	if i, ok := a.touchedAt[rel]; ok {
		a.touched[i].write = a.touched[i].write || write
		return
	}
	a.touchedAt[rel] = len(a.touched)
	a.touched = append(a.touched, touch{rel, write})
}

func joinName(schema, name string) string {
	if schema == "" {
		return name
	}
	return schema + "." + name
}

// on is use for a RangeVar, which is then not read as well.
func (a *analysis) on(action policy.Action, rv *ast.RangeVar) *Relation {
	if rv == nil {
		a.refuse(unsupported("the statement names no table"))
		return nil
	}
	a.handled[rv] = true
	return a.use(action, rv.CatalogName, rv.SchemaName, rv.RelName, true)
}

// onNew is for a relation that the statement creates. The name goes to the
// first schema of the path, whatever exists elsewhere.
func (a *analysis) onNew(action policy.Action, rv *ast.RangeVar) *Relation {
	if rv == nil {
		a.refuse(unsupported("the statement names no table"))
		return nil
	}
	a.handled[rv] = true
	if rv.CatalogName != "" && rv.CatalogName != a.sc.Database {
		a.refuse(unsupported("%s is in another database; connect to that one", rv.RelName))
	}
	n := qualified{rv.SchemaName, rv.RelName}
	if rv.RelPersistence == ast.RELPERSISTENCE_TEMP || n.schema == "pg_temp" {
		n.schema = "pg_temp"
		a.temporary = true
	} else if n.schema == "" {
		n.schema = a.creation()
	}
	a.pair(action, a.table(n))
	if rel := a.lookup(n.schema, n.name); rel != nil {
		a.touch(rel, true) // IF NOT EXISTS, OR REPLACE, or an error of the server's
		return rel
	}
	return &Relation{Schema: n.schema, Name: n.name, Kind: 'r'}
}

// namesOf returns the parts of a list of names, nil when it is something else.
func namesOf(n ast.Node) []string {
	switch n := n.(type) {
	case *ast.String:
		return []string{n.SVal}
	case *ast.TypeName:
		if n == nil || n.Names == nil {
			return nil
		}
		return namesOf(n.Names)
	case *ast.ObjectWithArgs:
		if n == nil || n.Objname == nil {
			return nil
		}
		return namesOf(n.Objname)
	case *ast.RangeVar:
		if n.SchemaName == "" {
			return []string{n.RelName}
		}
		return []string{n.SchemaName, n.RelName}
	case *ast.NodeList:
		if n == nil {
			return nil
		}
		out := make([]string, 0, len(n.Items))
		for _, item := range n.Items {
			s, ok := item.(*ast.String)
			if !ok {
				return nil
			}
			out = append(out, s.SVal)
		}
		return out
	}
	return nil
}

// splitName takes catalog, schema and name from dotted parts.
func splitName(parts []string) (catalog, schema, name string, ok bool) {
	switch len(parts) {
	case 1:
		return "", "", parts[0], true
	case 2:
		return "", parts[0], parts[1], true
	case 3:
		return parts[0], parts[1], parts[2], true
	}
	return "", "", "", false
}

// onParts is use for a relation named by a list of parts.
func (a *analysis) onParts(action policy.Action, parts []string) *Relation {
	catalog, schema, name, ok := splitName(parts)
	if !ok {
		a.refuse(unsupported("the name %s has too many parts", strings.Join(parts, ".")))
		return nil
	}
	return a.use(action, catalog, schema, name, true)
}

// onFunction is for DDL on a function.
func (a *analysis) onFunction(action policy.Action, parts []string, create bool) {
	_, schema, name, ok := splitName(parts)
	if !ok {
		a.refuse(unsupported("the name %s has too many parts", strings.Join(parts, ".")))
		return
	}
	var found []routine
	for _, f := range a.cat.functions[name] {
		if schema == f.Schema || schema == "" && slices.Contains(a.path(), f.Schema) {
			found = append(found, f)
		}
	}
	switch {
	case schema != "":
		a.pair(action, a.function(qualified{schema, name}))
	case create || len(found) == 0:
		a.pair(action, a.function(qualified{a.creation(), name}))
	default:
		for _, f := range found {
			a.pair(action, a.function(qualified{f.Schema, name}))
		}
	}
	for _, f := range found {
		a.object(f.OID)
	}
}

// onSchemaOf is for DDL on an object that is known by its schema only.
func (a *analysis) onSchemaOf(action policy.Action, parts []string) {
	_, schema, _, ok := splitName(parts)
	if !ok {
		a.onDatabase(action)
		return
	}
	if schema == "" {
		schema = a.creation()
	}
	a.pair(action, a.schema(schema))
}

func (a *analysis) object(oid uint32) {
	if oid != 0 && !a.objects[oid] {
		a.objects[oid] = true
		a.st.Objects = append(a.st.Objects, oid)
	}
}

// Calls.

func (a *analysis) call(n qualified) {
	a.pair(policy.PostgresCall, a.function(n))
	if c := (call{joinName(n.schema, n.name), blindCalls[n.name] && n.schema == "pg_catalog"}); !a.called[c] {
		a.called[c] = true
		a.calls = append(a.calls, c)
	}
}

// useFunction judges a call by name.
func (a *analysis) useFunction(parts []string) {
	a.evaluates = true
	_, schema, name, ok := splitName(parts)
	switch {
	case !ok:
		a.refuse(unsupported("the function name %s has too many parts", strings.Join(parts, ".")))
	case schema == "pg_catalog":
		if name == "set_config" {
			a.refuse(pinned("set_config", ""))
		}
		if !pureFunctions[name] && volatileButHarmless[name] == "" {
			a.call(qualified{schema, name})
		}
	case schema != "":
		if !pureElsewhere[qualified{schema, name}] {
			for _, f := range a.cat.functions[name] {
				if f.Schema == schema {
					a.object(f.OID)
				}
			}
			a.call(qualified{schema, name})
		}
	default:
		if !a.funcs[nameUse{name}] {
			a.funcs[nameUse{name}] = true
			a.funcNames = append(a.funcNames, nameUse{name})
		}
	}
}

// useOperator judges an operator by name.
func (a *analysis) useOperator(parts []string) {
	a.evaluates = true
	_, schema, name, ok := splitName(parts)
	switch {
	case !ok:
		a.refuse(unsupported("the operator name %s has too many parts", strings.Join(parts, ".")))
	case schema == "pg_catalog":
		if !pureOperators[name] {
			a.call(qualified{schema, name})
		}
	case schema != "":
		a.call(qualified{schema, name})
	default:
		if !a.ops[nameUse{name}] {
			a.ops[nameUse{name}] = true
			a.opNames = append(a.opNames, nameUse{name})
		}
	}
}

// useType judges a type that a value is converted to.
func (a *analysis) useType(t *ast.TypeName) {
	parts := namesOf(t)
	_, schema, name, ok := splitName(parts)
	if !ok {
		a.refuse(unsupported("a type's name has too many parts"))
		return
	}
	a.evaluates = true
	builtin := builtinTypes[name] || strings.HasPrefix(name, "_") && builtinTypes[name[1:]]
	if (schema == "" || schema == "pg_catalog") && builtin && !(schema == "" && a.cat.tempNames[name]) {
		a.casts = append(a.casts, name)
		return
	}
	found := a.findType(schema, name)
	if found == nil {
		a.call(qualified{schema, name})
		return
	}
	a.types = append(a.types, found.OID)
	for t := found; ; {
		switch {
		case t.Elem != 0 && a.cat.typeOIDs[t.Elem] != nil:
			t = a.cat.typeOIDs[t.Elem]
		case t.Kind == 'd' && !t.Checked && t.Base < firstUserOID:
			return
		case t.Kind == 'd' && !t.Checked && a.cat.typeOIDs[t.Base] != nil:
			t = a.cat.typeOIDs[t.Base]
		case t.Kind == 'e', t.Elem != 0:
			return // enum input and output are built in
		default:
			a.call(qualified{found.Schema, found.Name})
			return
		}
		a.types = append(a.types, t.OID)
	}
}

// findType returns a type outside pg_catalog, or nil.
func (a *analysis) findType(schema, name string) *typeRow {
	if schema != "" {
		return a.cat.types[qualified{schema, name}]
	}
	if a.cat.tempNames[name] {
		return nil
	}
	for _, s := range a.path() {
		if t := a.cat.types[qualified{s, name}]; t != nil {
			return t
		}
	}
	return nil
}

// quietType says whether giving a column this type runs no code of a user's:
// a domain with constraints does, when the table is rewritten.
func (a *analysis) quietType(t *ast.TypeName) bool {
	_, schema, name, ok := splitName(namesOf(t))
	if !ok {
		return false
	}
	if (schema == "" || schema == "pg_catalog") && (builtinTypes[name] || strings.HasSuffix(name, "serial")) {
		return !a.cat.tempNames[name]
	}
	found := a.findType(schema, name)
	for range 100 {
		switch {
		case found == nil || found.Checked:
			return false
		case found.Elem >= firstUserOID:
			found = a.cat.typeOIDs[found.Elem]
		case found.Kind == 'd' && found.Base >= firstUserOID:
			found = a.cat.typeOIDs[found.Base]
		default:
			return true
		}
	}
	return false
}

// judgeCalls finds, once all types are known that values of the statement may
// have, which built-in names other definitions can stand in for.
func (a *analysis) judgeCalls() {
	if len(a.funcNames) == 0 && len(a.opNames) == 0 && len(a.casts) == 0 && !a.evaluates {
		return
	}
	path := a.path()
	reach := a.reachableTypes()
	for _, f := range a.funcNames {
		pure := pureFunctions[f.name] || volatileButHarmless[f.name] != ""
		if f.name == "set_config" {
			a.refuse(pinned("set_config", ""))
		}
		found := false
		for _, r := range a.cat.functions[f.name] {
			if slices.Contains(path, r.Schema) && (!pure || reachable(r, reach)) {
				a.call(qualified{r.Schema, f.name})
				a.object(r.OID)
				found = true
			}
		}
		if !pure && (!found || a.cat.builtin[f.name]) {
			schema := ""
			if a.cat.builtin[f.name] {
				schema = "pg_catalog"
			}
			a.call(qualified{schema, f.name})
		}
	}
	for _, o := range a.opNames {
		found := false
		for _, r := range a.cat.operators[o.name] {
			if slices.Contains(path, r.Schema) && (!pureOperators[o.name] || reachable(r, reach)) {
				a.call(qualified{r.Schema, o.name})
				a.object(r.OID)
				found = true
			}
		}
		if !found && !pureOperators[o.name] {
			a.call(qualified{"", o.name})
		}
	}
	for _, c := range a.cat.casts {
		if c.Function == "" && !c.InOut {
			continue
		}
		// A cast between built-in types, or from or to a type in use, may run
		// wherever a value is converted.
		known := func(t uint32) bool { return t < firstUserOID || reach[t] }
		if known(c.Source) && known(c.Target) || reach[c.Source] || reach[c.Target] {
			a.call(qualified{"", "cast " + c.Function})
		}
	}
}

// reachableTypes are the types outside pg_catalog that a value may have.
func (a *analysis) reachableTypes() map[uint32]bool {
	reach := map[uint32]bool{}
	var add func(oid uint32)
	add = func(oid uint32) {
		if oid < firstUserOID || reach[oid] {
			return
		}
		reach[oid] = true
		if t := a.cat.typeOIDs[oid]; t != nil {
			add(t.Base)
			add(t.Elem)
		}
	}
	for _, t := range a.types {
		add(t)
	}
	for _, t := range a.sc.ParamTypes {
		add(t)
	}
	for _, t := range a.touched {
		add(t.rel.rowType)
		for _, col := range t.rel.Columns {
			add(col.Type)
		}
	}
	for again := true; again; {
		again = false
		for _, c := range a.cat.casts {
			if c.Context == 'i' && !reach[c.Target] && c.Target >= firstUserOID && (c.Source < firstUserOID || reach[c.Source]) {
				add(c.Target)
				again = true
			}
		}
	}
	return reach
}

func reachable(r routine, reach map[uint32]bool) bool {
	if len(r.Types) == 0 {
		return true
	}
	for _, t := range r.Types {
		if reach[t] {
			return true
		}
	}
	return false
}

func pinned(name, value string) *Problem {
	p := &Problem{Rule: "pinned-setting", Code: "42501"}
	switch {
	case name == "set_config":
		p.Reason = "set_config is refused: the gateway must see which setting changes; use SET"
	case value != "":
		p.Reason = fmt.Sprintf("%s is pinned to %q for this session, so that statements mean what was judged; leave it out", name, value)
	default:
		p.Reason = fmt.Sprintf("%s is not a setting that a session may change through the gateway; leave it out", name)
	}
	return p
}

// The walk.

// visit walks expressions and queries.
func (a *analysis) visit(n ast.Node) {
	if a.problem != nil || isNil(n) {
		return
	}
	switch n := n.(type) {
	case *ast.SelectStmt:
		a.query(n, n.WithClause, func() { a.selectStmt(n) })
		return
	case *ast.InsertStmt:
		a.query(n, n.WithClause, func() { a.insert(n) })
		return
	case *ast.UpdateStmt:
		a.query(n, n.WithClause, func() { a.update(n) })
		return
	case *ast.DeleteStmt:
		a.query(n, n.WithClause, func() { a.delete(n) })
		return
	case *ast.MergeStmt:
		a.query(n, n.WithClause, func() { a.merge(n) })
		return
	case *ast.RangeVar:
		a.rangeVar(n)
		return
	case *ast.LockingClause:
		return // names aliases of the FROM list
	case *ast.RangeSubselect:
		a.subqueries++
	case *ast.SubLink:
		a.subqueries++
		if n.OperName != nil {
			a.useOperator(namesOf(n.OperName))
		} else if !isNil(n.Testexpr) {
			a.useOperator([]string{"="})
		}
	case *ast.FuncCall:
		a.useFunction(namesOf(n.Funcname))
	case *ast.A_Expr:
		a.expression(n)
	case *ast.CaseExpr:
		if !isNil(n.Arg) {
			a.useOperator([]string{"="})
		}
	case *ast.JoinExpr:
		if n.IsNatural || n.UsingClause != nil {
			a.useOperator([]string{"="})
		}
	case *ast.SortBy:
		if n.UseOp != nil {
			a.useOperator(namesOf(n.UseOp))
		}
	case *ast.RangeTableSample:
		if parts := namesOf(n.Method); len(parts) != 1 || parts[0] != "system" && parts[0] != "bernoulli" {
			a.useFunction(append([]string{}, parts...))
		}
	case *ast.TypeCast:
		a.useType(n.TypeName)
		a.visit(n.Arg)
		return
	case *ast.TypeName:
		if !a.utility {
			a.useType(n)
		}
	case *ast.ColumnDef:
		if a.utility && n.TypeName != nil {
			a.columns = append(a.columns, n.TypeName)
		}
	case *ast.ColumnRef:
		a.columnRef(n.Fields, 1)
	case *ast.A_Indirection:
		a.columnRef(n.Indirection, 0)
	case *ast.XmlSerialize, *ast.XmlExpr, *ast.RangeTableFunc:
		a.evaluates = true
	}
	if _, statement := statementTypes[nodeName(n)]; statement {
		a.refuse(unsupported("the statement holds %s where this gateway does not expect one", nodeName(n)))
		return
	}
	eachChild(n, a.visit)
}

var statementTypes = func() map[string]struct{} {
	m := map[string]struct{}{}
	for _, n := range statementNodes {
		m[nodeName(n)] = struct{}{}
	}
	return m
}()

// columnRef finds a function that is called in the notation of a column: t.f
// is f(t) when t has no column f. Names before from cannot be functions.
func (a *analysis) columnRef(fields *ast.NodeList, from int) {
	for i, item := range items(fields) {
		s, ok := item.(*ast.String)
		if !ok || i < from || len(a.cat.functions[s.SVal]) == 0 {
			continue
		}
		for _, f := range a.cat.functions[s.SVal] {
			if f.Row && slices.Contains(a.path(), f.Schema) {
				a.call(qualified{f.Schema, f.Name})
				a.object(f.OID)
			}
		}
	}
}

func (a *analysis) expression(n *ast.A_Expr) {
	switch n.Kind {
	case ast.AEXPR_BETWEEN, ast.AEXPR_NOT_BETWEEN, ast.AEXPR_BETWEEN_SYM, ast.AEXPR_NOT_BETWEEN_SYM:
		for _, op := range []string{">=", "<=", "<", ">"} {
			a.useOperator([]string{op})
		}
	default:
		parts := namesOf(n.Name)
		if len(parts) == 0 {
			a.refuse(unsupported("an operator has no name"))
			return
		}
		a.useOperator(parts)
	}
}

func (a *analysis) rangeVar(rv *ast.RangeVar) {
	if a.handled[rv] {
		return
	}
	if rv.CatalogName == "" && rv.SchemaName == "" && slices.Contains(a.ctes, rv.RelName) {
		return
	}
	a.use(policy.PostgresSelect, rv.CatalogName, rv.SchemaName, rv.RelName, false)
	if a.locking > 0 {
		names, _ := a.resolve(rv.CatalogName, rv.SchemaName, rv.RelName)
		for _, n := range names {
			a.pair(policy.PostgresLock, a.table(n))
		}
	}
}

// query walks a query with its CTEs in scope.
func (a *analysis) query(n ast.Node, with *ast.WithClause, body func()) {
	utility, mark := a.utility, len(a.ctes)
	a.utility = false
	if with != nil {
		a.cte = true
		if len(a.ctes)+len(items(with.Ctes)) > maxNamed {
			a.refuse(tooMuch("54001", "the statement holds more than %d WITH queries; split it", maxNamed))
			return
		}
		if with.Recursive {
			for _, item := range with.Ctes.Items {
				if cte, ok := item.(*ast.CommonTableExpr); ok {
					a.ctes = append(a.ctes, cte.Ctename)
				}
			}
		}
		for _, item := range with.Ctes.Items {
			cte, ok := item.(*ast.CommonTableExpr)
			if !ok {
				a.refuse(unsupported("the statement holds %s in WITH", nodeName(item)))
				return
			}
			eachChild(cte, a.visit)
			if !with.Recursive {
				a.ctes = append(a.ctes, cte.Ctename)
			}
		}
	}
	body()
	a.ctes, a.utility = a.ctes[:mark], utility
}

// rest walks what n holds but for those nodes that are walked otherwise.
func (a *analysis) rest(n ast.Node, except ...ast.Node) {
	eachChild(n, func(c ast.Node) {
		for _, e := range except {
			if c == e {
				return
			}
		}
		a.visit(c)
	})
}

func (a *analysis) selectStmt(n *ast.SelectStmt) {
	if n.Larg != nil || n.Rarg != nil {
		a.subqueries++ // a set operation's arms are queries of their own
	}
	if n.IntoClause != nil {
		a.into(n.IntoClause)
	}
	locks := n.LockingClause != nil && len(n.LockingClause.Items) > 0
	if locks {
		a.locking++
	}
	if n.FromClause != nil {
		a.visit(n.FromClause)
	}
	if locks {
		a.locking--
	}
	a.rest(n, n.WithClause, n.FromClause, n.IntoClause)
}

// into is SELECT INTO and the target of CREATE TABLE AS.
func (a *analysis) into(n *ast.IntoClause) {
	if rel := a.onNew(policy.PostgresCreateTable, n.Rel); rel != nil && rel.OID == 0 {
		a.creates = append(a.creates, rel)
	}
	a.st.ChangesCatalog = true
	utility := a.utility
	a.utility = true
	a.rest(n, n.Rel, n.ViewQuery)
	a.utility = utility
}

func (a *analysis) insert(n *ast.InsertStmt) {
	a.on(policy.PostgresInsert, n.Relation)
	if n.ReturningList != nil {
		a.alsoOn(policy.PostgresSelect, n.Relation)
	}
	if c := n.OnConflictClause; c != nil && c.Action == ast.ONCONFLICT_UPDATE {
		a.alsoOn(policy.PostgresUpdate, n.Relation)
		a.alsoOn(policy.PostgresSelect, n.Relation)
	}
	a.rest(n, n.WithClause, n.Relation)
}

func (a *analysis) update(n *ast.UpdateStmt) {
	a.on(policy.PostgresUpdate, n.Relation)
	if !isNil(n.WhereClause) || n.FromClause != nil || n.ReturningList != nil || refersToColumns(n.TargetList) {
		a.alsoOn(policy.PostgresSelect, n.Relation)
	}
	a.rest(n, n.WithClause, n.Relation)
}

func (a *analysis) delete(n *ast.DeleteStmt) {
	a.on(policy.PostgresDelete, n.Relation)
	if !isNil(n.WhereClause) || n.UsingClause != nil || n.ReturningList != nil {
		a.alsoOn(policy.PostgresSelect, n.Relation)
	}
	a.rest(n, n.WithClause, n.Relation)
}

func (a *analysis) merge(n *ast.MergeStmt) {
	a.on(policy.PostgresMerge, n.Relation)
	a.alsoOn(policy.PostgresSelect, n.Relation)
	if n.MergeWhenClauses != nil {
		for _, item := range n.MergeWhenClauses.Items {
			when, ok := item.(*ast.MergeWhenClause)
			if !ok {
				a.refuse(unsupported("the statement holds %s in MERGE", nodeName(item)))
				return
			}
			switch when.CommandType {
			case ast.CMD_INSERT:
				a.alsoOn(policy.PostgresInsert, n.Relation)
			case ast.CMD_UPDATE:
				a.alsoOn(policy.PostgresUpdate, n.Relation)
			case ast.CMD_DELETE:
				a.alsoOn(policy.PostgresDelete, n.Relation)
			case ast.CMD_NOTHING:
			default:
				a.refuse(unsupported("MERGE holds an action that this gateway does not know"))
			}
		}
	}
	a.rest(n, n.WithClause, n.Relation)
}

// alsoOn adds a second action on a relation that on has named.
func (a *analysis) alsoOn(action policy.Action, rv *ast.RangeVar) {
	if rv != nil {
		a.use(action, rv.CatalogName, rv.SchemaName, rv.RelName, true)
	}
}

// refersToColumns says whether the values of SET read columns.
func refersToColumns(list *ast.NodeList) bool {
	found := false
	var walk func(ast.Node)
	walk = func(n ast.Node) {
		if _, ok := n.(*ast.ColumnRef); ok {
			found = true
		}
		if !found {
			eachChild(n, walk)
		}
	}
	if list != nil {
		walk(list)
	}
	return found
}

// finish judges what only the whole statement shows.
func (a *analysis) finish(tree ast.Stmt) {
	if a.problem != nil {
		return
	}
	a.judgeCalls()
	if len(a.st.Pairs) == 0 {
		// SELECT 1, VALUES (1), SELECT version(): no table is read, and what is
		// told is what SHOW tells.
		a.onDatabase(policy.PostgresShow)
	}
	for _, t := range a.touched {
		a.object(t.rel.OID)
	}
	slices.Sort(a.st.Objects)
	if a.batch.renamed && (len(a.touched) > 0 || len(a.unknown) > 0 || len(a.calls) > 0) {
		a.refuse(unsupported("an earlier statement of this string gives names another meaning; send what follows as a string of its own"))
	}
	if a.batch.masking {
		a.mask(tree)
	}
}

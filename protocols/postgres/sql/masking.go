package sql

import (
	"fmt"
	"slices"
	"strings"

	"github.com/multigres/multigres/go/common/parser/ast"

	"github.com/sallyport/sallyport/policy"
)

// Masking in its simple strict form. A table with masked columns may be read by
// a plain SELECT only, in which a masked column stands alone in the select
// list; the value goes out masked. Everything else that touches the table, or
// could read it unseen, is refused. docs/threat-model.md says what remains.

// maskingActions are those that stay possible, on other tables, while columns
// of the database are masked for the session.
var maskingActions = map[policy.Action]bool{
	policy.PostgresSelect: true, policy.PostgresCopyTo: true, policy.PostgresExplain: true, policy.PostgresDeclareCursor: true, policy.PostgresFetch: true,
	policy.PostgresInsert: true, policy.PostgresUpdate: true, policy.PostgresDelete: true, policy.PostgresMerge: true, policy.PostgresTruncate: true,
	policy.PostgresCopyFrom: true, policy.PostgresLock: true,
	policy.PostgresCreateTable: true, policy.PostgresCreateIndex: true, policy.PostgresCreateSequence: true, policy.PostgresCreateSchema: true,
	policy.PostgresCreateType: true, policy.PostgresAlterTable: true, policy.PostgresAlterIndex: true, policy.PostgresAlterSequence: true,
	policy.PostgresDropTable: true, policy.PostgresDropView: true, policy.PostgresDropIndex: true, policy.PostgresDropSequence: true,
	policy.PostgresDropType: true, policy.PostgresDropFunction: true, policy.PostgresDropTrigger: true, policy.PostgresComment: true,
	policy.PostgresSet: true, policy.PostgresReset: true, policy.PostgresSetRole: true, policy.PostgresShow: true, policy.PostgresTransaction: true,
	policy.PostgresPrepare: true, policy.PostgresDiscard: true, policy.PostgresNotify: true,
	policy.PostgresAnalyze: true, policy.PostgresVacuum: true,
	policy.PostgresCall: true, // judged call by call
}

// maskingAlters are the forms of ALTER TABLE that stay possible.
var maskingAlters = map[ast.AlterTableType]bool{
	ast.AT_AddColumn: true, ast.AT_ColumnDefault: true, ast.AT_DropNotNull: true, ast.AT_SetNotNull: true, ast.AT_DropExpression: true,
	ast.AT_SetStatistics: true, ast.AT_SetOptions: true, ast.AT_ResetOptions: true, ast.AT_SetStorage: true, ast.AT_SetCompression: true,
	ast.AT_DropColumn: true, ast.AT_AddConstraint: true, ast.AT_AlterConstraint: true, ast.AT_ValidateConstraint: true,
	ast.AT_AddIndexConstraint: true, ast.AT_DropConstraint: true, ast.AT_AlterColumnType: true, ast.AT_ClusterOn: true, ast.AT_DropCluster: true,
	ast.AT_SetLogged: true, ast.AT_SetUnLogged: true, ast.AT_SetRelOptions: true, ast.AT_ResetRelOptions: true,
	ast.AT_AddIdentity: true, ast.AT_SetIdentity: true, ast.AT_DropIdentity: true, ast.AT_AttachPartition: true, ast.AT_DetachPartition: true,
	ast.AT_AddInherit: true, ast.AT_DropInherit: true,
}

func masking(format string, args ...any) *Problem {
	return &Problem{Rule: "masking", Reason: fmt.Sprintf(format, args...), Code: "42501"}
}

// mask judges a statement while some column is masked for the session.
func (a *analysis) mask(tree ast.Stmt) {
	if a.problem != nil {
		return
	}
	if len(a.unknown) > 0 {
		a.refuse(&Problem{Rule: "masking", Code: "42P01",
			Reason: fmt.Sprintf("unknown relation %s: what it shows cannot be told while columns of this database are masked for you (has the schema changed? retry)", a.unknown[0])})
		return
	}
	if a.temporary {
		a.refuse(masking("temporary objects would change what names mean while columns of this database are masked for you; use a table of your own schema"))
		return
	}
	for _, p := range a.st.Pairs {
		if !maskingActions[p.Action] {
			a.refuse(masking("%s is refused while columns of this database are masked for you: it could read them, or make something that does, unseen", p.Action))
			return
		}
		if (p.Action == policy.PostgresAnalyze || p.Action == policy.PostgresVacuum) && p.Resource.Type == policy.Database {
			a.refuse(masking("%s of the whole database is refused while columns of it are masked for you; name the tables", a.st.Verb))
			return
		}
		if p.Action == policy.PostgresCreateSchema && p.Resource.Type == policy.Schema && slices.Contains(a.path(), p.Resource.Path[2]) {
			a.refuse(masking("creating schema %s, which is in the session's search_path, would change what names mean while columns of this database are masked for you", p.Resource.Path[2]))
			return
		}
	}
	reads := false // a table with masked columns
	for _, t := range a.touched {
		rel := t.rel
		if base := a.sc.tainted(rel); base != nil {
			a.refuse(masking("view %s shows rows of %s.%s, which has masked columns; select from the table itself", rel.Name, base.Schema, base.Name))
			return
		}
		if a.sc.maskedAny(rel) || a.declaredMasked(rel) {
			reads = true
			continue
		}
		if reason := a.cat.readHazard(rel); reason != "" {
			a.refuse(masking("reading %s.%s is refused while columns of this database are masked for you: %s", rel.Schema, rel.Name, reason))
			return
		}
		if t.write {
			if reason := a.sc.writeHazard(rel); reason != "" && !a.onlyRemoves() {
				a.refuse(masking("%s on %s.%s is refused while columns of this database are masked for you: %s", a.st.Verb, rel.Schema, rel.Name, reason))
				return
			}
		}
		if rel.Schema == "pg_catalog" && rel.Name == "pg_attribute" && readsMissingValues(tree) {
			a.refuse(masking("pg_attribute holds values in attmissingval; name the columns that you need, without it"))
			return
		}
	}
	if reads {
		a.plainSelect(tree)
		if a.problem != nil {
			return
		}
	}
	for _, c := range a.calls {
		if !c.ok || reads {
			a.refuse(masking("%s is not a built-in function, operator or cast known to be pure; it could read masked columns unseen", c.name))
			return
		}
	}
	for _, t := range a.columns {
		if !a.quietType(t) {
			a.refuse(masking("type %s, unknown or with constraints, is refused while columns of this database are masked for you: it could run code that reads them unseen", strings.Join(namesOf(t), ".")))
			return
		}
	}
	for _, t := range a.alters {
		if !maskingAlters[t] {
			a.refuse(masking("this form of ALTER TABLE is refused while columns of this database are masked for you"))
			return
		}
	}
}

// onlyRemoves says that the statement runs nothing of the relation's own.
func (a *analysis) onlyRemoves() bool {
	for _, p := range a.st.Pairs {
		switch p.Action {
		case policy.PostgresDropTable, policy.PostgresDropView, policy.PostgresDropIndex, policy.PostgresDropSequence, policy.PostgresDropTrigger,
			policy.PostgresAlterIndex, policy.PostgresComment:
		default:
			return false
		}
	}
	return true
}

// declaredMasked says whether a table made in this string was declared to have
// a masked column before it existed.
func (a *analysis) declaredMasked(rel *Relation) bool {
	return rel.OID == 0 && slices.ContainsFunc(a.cat.missing, func(r policy.Resource) bool {
		return r.Path[2] == rel.Schema && r.Path[3] == rel.Name && a.sc.Masked(r)
	})
}

// readsMissingValues says whether a query of pg_attribute may show or compare
// attmissingval, the value that ADD COLUMN … DEFAULT gave to older rows: by
// name, by a star, by a whole row, by a join over all columns.
func readsMissingValues(tree ast.Node) bool {
	aliases := map[string]bool{"pg_attribute": true}
	var names []string
	found := false
	alias := func(as *ast.Alias) {
		if as != nil {
			aliases[as.AliasName] = true
			found = found || as.ColNames != nil // columns under other names
		}
	}
	var walk func(ast.Node)
	walk = func(n ast.Node) {
		switch n := n.(type) {
		case *ast.RangeVar:
			if n.RelName == "pg_attribute" {
				alias(n.Alias)
			}
		case *ast.JoinExpr:
			alias(n.Alias)
			found = found || n.IsNatural
		case *ast.ColumnRef:
			parts := items(n.Fields)
			switch last := parts[len(parts)-1].(type) {
			case *ast.A_Star:
				found = true
			case *ast.String:
				names = append(names, last.SVal)
			}
		}
		eachText(n, func(s string) { found = found || s == "attmissingval" })
		if !found {
			eachChild(n, walk)
		}
	}
	walk(tree)
	for _, n := range names {
		found = found || aliases[n]
	}
	return found
}

// fromItem is a table of the FROM list under the name that columns use.
type fromItem struct {
	rel     *Relation
	name    string
	aliased bool
}

// selection is the reading of a plain SELECT over a table with masked columns.
type selection struct {
	a     *analysis
	from  []fromItem
	using map[string]int // names of USING: how much of from is judged for it
	names []string       // of the output columns, beside Output
	items map[string]*fromItem
	found map[string]reference // of unqualified names
	keys  int
}

// reference is what an unqualified name in a selection refers to.
type reference struct {
	rel    *Relation
	col    *Column
	tables int // how many have such a column
}

// plainSelect judges a statement that touches a table with masked columns, and
// says what its result columns are.
func (a *analysis) plainSelect(tree ast.Stmt) {
	masked := ""
	for _, t := range a.touched {
		if a.sc.maskedAny(t.rel) || a.declaredMasked(t.rel) {
			masked = t.rel.Name
			if t.rel.OID == 0 {
				a.refuse(masking("table %s, made in this string, has columns that are declared sensitive; send what follows as a string of its own", masked))
				return
			}
			if t.write {
				a.refuse(masking("table %s has columns that are masked for you; it may only be read, by a plain SELECT", masked))
				return
			}
		}
	}
	n, ok := tree.(*ast.SelectStmt)
	switch {
	case !ok:
		a.refuse(masking("%s over table %s, which has masked columns, is refused; use a plain SELECT", a.st.Verb, masked))
	case a.cte:
		a.refuse(masking("WITH beside table %s, which has masked columns, is refused; use a plain SELECT", masked))
	case n.Op != ast.SETOP_NONE:
		a.refuse(masking("a set operation over table %s, which has masked columns, is refused; use a plain SELECT", masked))
	case a.subqueries > 0:
		a.refuse(masking("a subquery beside table %s, which has masked columns, is refused; use a join", masked))
	case n.DistinctClause != nil:
		a.refuse(masking("DISTINCT over table %s compares masked values; select without it", masked))
	case n.IntoClause != nil || n.ValuesLists != nil:
		a.refuse(masking("copying rows of table %s, which has masked columns, is refused; use a plain SELECT", masked))
	case len(items(n.WindowClause)) > 0:
		a.refuse(masking("a window over table %s, which has masked columns, is refused", masked))
	}
	if a.problem != nil {
		return
	}
	s := &selection{a: a, using: map[string]int{}, items: map[string]*fromItem{}, found: map[string]reference{}}
	for _, item := range items(n.FromClause) {
		s.addFrom(item)
	}
	if a.problem != nil {
		return
	}
	judged := map[string]bool{}
	for _, f := range s.from {
		if f.rel == nil {
			return
		}
		for num := range f.rel.sensitive {
			for _, col := range f.rel.Columns {
				if col.Num != num || judged[col.Name] {
					continue
				}
				judged[col.Name] = true
				if isKeyword(col.Name) && !accounts(&parsed{tokens: a.tokens, tree: tree}, col.Name) {
					a.refuse(masking("the word %s stands in the statement where this gateway does not expect a column", col.Name))
				}
			}
		}
	}
	for _, item := range items(n.TargetList) {
		s.target(item)
	}
	for _, item := range items(n.GroupClause) {
		s.sortKey(item, "GROUP BY")
	}
	for _, item := range items(n.SortClause) {
		by, ok := item.(*ast.SortBy)
		if !ok {
			a.refuse(masking("ORDER BY holds something that this gateway does not know"))
			return
		}
		s.sortKey(by.Node, "ORDER BY")
	}
	eachChild(n, func(c ast.Node) {
		if c != ast.Node(n.TargetList) && c != ast.Node(n.GroupClause) && c != ast.Node(n.SortClause) {
			s.sweep(c)
		}
	})
	if a.problem == nil {
		a.st.Reads = true
	}
}

func (s *selection) addFrom(n ast.Node) {
	a := s.a
	if a.problem != nil {
		return
	}
	if len(s.from) >= maxFrom {
		a.refuse(tooMuch("54001", "the statement reads more than %d tables beside masked columns", maxFrom))
		return
	}
	switch n := n.(type) {
	case *ast.RangeVar:
		_, rel := a.resolve(n.CatalogName, n.SchemaName, n.RelName)
		item := fromItem{rel: rel, name: n.RelName}
		if n.Alias != nil {
			item.name, item.aliased = n.Alias.AliasName, true
			if n.Alias.ColNames != nil {
				a.refuse(masking("renaming the columns of a table beside masked ones is refused; name the columns as they are"))
			}
		}
		switch {
		case rel == nil:
			a.refuse(masking("unknown relation %s", n.RelName))
		case rel.Kind != 'r' && rel.Kind != 'p' || rel.Columns == nil:
			a.refuse(masking("%s is not an ordinary table; beside masked columns only ordinary tables may be read", n.RelName))
		case rel.RowSecurity && a.sc.maskedAny(rel):
			a.refuse(masking("table %s has masked columns and row security; whether its policies reveal them cannot be told", n.RelName))
		case rel.Rules:
			a.refuse(masking("table %s has rewrite rules; what a query of it shows cannot be told", n.RelName))
		}
		s.from = append(s.from, item)
	case *ast.JoinExpr:
		s.addFrom(n.Larg)
		s.addFrom(n.Rarg)
		switch {
		case n.IsNatural:
			a.refuse(masking("NATURAL JOIN beside masked columns is refused; write JOIN … ON over columns that are not masked"))
		case n.Alias != nil || n.JoinUsingAlias != nil:
			a.refuse(masking("a join with a name of its own, beside masked columns, is refused; leave the name out"))
		}
		for _, c := range items(n.UsingClause) {
			name, _ := c.(*ast.String)
			if name == nil {
				a.refuse(masking("USING holds something that this gateway does not know"))
				return
			}
			if _, ok := s.using[name.SVal]; !ok && len(s.using) >= maxOutput {
				a.refuse(tooMuch("54011", "the joins are over more than %d columns", maxOutput))
				return
			}
			rest := s.from[s.using[name.SVal]:]
			s.using[name.SVal] = len(s.from)
			for _, f := range rest {
				if f.rel == nil {
					return
				}
				if col := f.rel.column(name.SVal); col != nil && a.sc.masked(f.rel, col.Num) {
					a.refuse(masking("joining on column %s compares masked values; join on another column", name.SVal))
				}
			}
		}
	default:
		a.refuse(masking("%s in FROM beside a table with masked columns is refused; use ordinary tables", nodeName(n)))
	}
}

// unwrap takes brackets off: to the server (x) is x.
func unwrap(n ast.Node) ast.Node {
	for {
		p, ok := n.(*ast.ParenExpr)
		if !ok || isNil(p.Expr) {
			return n
		}
		n = p.Expr
	}
}

// target reads one item of the select list.
func (s *selection) target(n ast.Node) {
	a := s.a
	if a.problem != nil {
		return
	}
	t, ok := n.(*ast.ResTarget)
	if !ok || len(items(t.Indirection)) > 0 {
		a.refuse(masking("the select list holds something that this gateway does not know"))
		return
	}
	ref, ok := unwrap(t.Val).(*ast.ColumnRef)
	if !ok {
		s.sweep(t.Val)
		s.output(Output{}, t.Name)
		return
	}
	last := len(items(ref.Fields)) - 1
	if last >= 0 {
		if _, star := ref.Fields.Items[last].(*ast.A_Star); star {
			s.star(ref.Fields.Items[:last])
			return
		}
	}
	rel, col, merged := s.column(ref)
	if a.problem != nil {
		return
	}
	out := Output{}
	name := ""
	if rel != nil && !merged {
		out = Output{Table: rel.OID, Column: col.Num, Masked: a.sc.masked(rel, col.Num)}
	}
	if col != nil {
		name = col.Name
	}
	if t.Name != "" {
		name = t.Name
	}
	s.output(out, name)
}

// output adds a result column.
func (s *selection) output(o Output, name string) {
	if len(s.names) >= maxOutput {
		s.a.refuse(tooMuch("54011", "the select list has more than %d columns, which is the server's limit", maxOutput))
		return
	}
	s.a.st.Output = append(s.a.st.Output, o)
	s.names = append(s.names, name)
}

// star expands * and t.*.
func (s *selection) star(qualifier []ast.Node) {
	a := s.a
	list := s.from
	if len(qualifier) == 0 {
		if len(s.using) > 0 {
			a.refuse(masking("* over a join with USING is refused beside masked columns; name the columns, or write ON"))
			return
		}
	} else {
		parts := namesOf(&ast.NodeList{Items: qualifier})
		item := s.item(parts)
		if item == nil {
			a.refuse(masking("%s.* names no table of the FROM list", strings.Join(parts, ".")))
			return
		}
		list = []fromItem{*item}
	}
	for _, f := range list {
		for _, col := range f.rel.Columns {
			if s.output(Output{Table: f.rel.OID, Column: col.Num, Masked: a.sc.masked(f.rel, col.Num)}, col.Name); a.problem != nil {
				return
			}
		}
	}
}

// item finds the table that a qualifier names, or nil.
func (s *selection) item(parts []string) *fromItem {
	if len(parts) > 3 {
		return nil
	}
	key := strings.Join(parts, "\x00") // a name holds none
	found, ok := s.items[key]
	if !ok {
		found = s.itemNow(parts)
		s.items[key] = found
	}
	return found
}

func (s *selection) itemNow(parts []string) *fromItem {
	var found *fromItem
	for i := range s.from {
		f := &s.from[i]
		match := false
		switch len(parts) {
		case 1:
			match = f.name == parts[0]
		case 2, 3:
			match = !f.aliased && f.rel != nil && f.rel.Name == parts[len(parts)-1] && f.rel.Schema == parts[len(parts)-2] &&
				(len(parts) == 2 || parts[0] == s.a.sc.Database)
		}
		if match {
			if found != nil {
				return nil // ambiguous: the server's to refuse
			}
			found = f
		}
	}
	return found
}

var systemColumns = words("tableoid ctid xmin xmax cmin cmax")

// column resolves a reference. rel and col are nil for a system column. merged
// says that the column comes out of USING. What it cannot resolve it refuses:
// it may be a whole row, or a function in the notation of a column.
func (s *selection) column(ref *ast.ColumnRef) (rel *Relation, col *Column, merged bool) {
	a := s.a
	parts := namesOf(ref.Fields)
	if len(parts) == 0 {
		a.refuse(masking("a star inside an expression takes in masked columns; name the columns"))
		return nil, nil, false
	}
	name := parts[len(parts)-1]
	if len(parts) > 1 {
		item := s.item(parts[:len(parts)-1])
		if item == nil || item.rel == nil {
			a.refuse(masking("%s names no column of the FROM list", strings.Join(parts, ".")))
			return nil, nil, false
		}
		col = item.rel.column(name)
		if col == nil && !systemColumns[name] {
			a.refuse(masking("%s is not a column of table %s (has the schema changed? retry)", strings.Join(parts, "."), item.rel.Name))
			return nil, nil, false
		}
		if col == nil {
			return nil, nil, false
		}
		return item.rel, col, false
	}
	if r, ok := s.found[name]; ok {
		return r.rel, r.col, r.tables > 1
	}
	found := 0
	for _, f := range s.from {
		if f.rel == nil {
			continue
		}
		if f.name == name {
			a.refuse(masking("%s is the name of a table in the FROM list; a whole row takes in masked columns: name the columns, with the table's name", name))
			return nil, nil, false
		}
		if c := f.rel.column(name); c != nil {
			found++
			// Of several only USING makes one; a masked one then decides.
			if rel == nil || a.sc.masked(f.rel, c.Num) {
				rel, col = f.rel, c
			}
		}
	}
	if found == 0 && !systemColumns[name] {
		a.refuse(masking("%s names no column of the FROM list (has the schema changed? retry)", name))
	}
	if found > 1 && col != nil && a.sc.masked(rel, col.Num) {
		a.refuse(masking("column %s is in several tables and masked in one of them; write it with the table's name", name))
	}
	s.found[name] = reference{rel, col, found}
	return rel, col, found > 1
}

// sortKey judges a member of ORDER BY or GROUP BY, which may also name a
// column of the result by name or by position.
func (s *selection) sortKey(n ast.Node, clause string) {
	a := s.a
	if a.problem != nil {
		return
	}
	if s.keys++; s.keys > maxOutput {
		a.refuse(tooMuch("54011", "ORDER BY and GROUP BY have more than %d keys", maxOutput))
		return
	}
	switch n := unwrap(n).(type) {
	case *ast.RowExpr:
		// GROUP BY (a, b) is GROUP BY a, b: a number inside is a position.
		eachChild(n, func(c ast.Node) {
			if list, ok := c.(*ast.NodeList); ok {
				for _, item := range list.Items {
					s.sortKey(item, clause)
				}
				return
			}
			s.sortKey(c, clause)
		})
	case *ast.GroupingSet:
		a.refuse(masking("grouping sets over a table with masked columns are refused; use plain GROUP BY"))
	case *ast.A_Const:
		i, ok := n.Val.(*ast.Integer)
		if !ok {
			return // an error of the server's
		}
		if i.IVal >= 1 && i.IVal <= len(a.st.Output) && a.st.Output[i.IVal-1].Masked {
			a.refuse(masking("%s %d is by column %s, which is masked for you; its order would tell its values: use another column", clause, i.IVal, s.names[i.IVal-1]))
		}
	case *ast.ColumnRef:
		if parts := namesOf(n.Fields); len(parts) == 1 {
			known := false
			for i, name := range s.names {
				if name != parts[0] {
					continue
				}
				known = true
				if a.st.Output[i].Masked {
					a.refuse(masking("%s is by column %s, which is masked for you; its order would tell its values: use another column", clause, parts[0]))
					return
				}
			}
			if known && !s.isColumn(parts[0]) {
				return
			}
		}
		s.sweep(n)
	default:
		s.sweep(n)
	}
}

func (s *selection) isColumn(name string) bool {
	return systemColumns[name] || slices.ContainsFunc(s.from, func(f fromItem) bool {
		return f.name == name || f.rel != nil && f.rel.column(name) != nil
	})
}

// sweep walks an expression, in which no masked column may appear.
func (s *selection) sweep(n ast.Node) {
	a := s.a
	if a.problem != nil || isNil(n) {
		return
	}
	switch n := n.(type) {
	case *ast.ColumnRef:
		if rel, col, _ := s.column(n); rel != nil && col != nil && a.sc.masked(rel, col.Num) {
			a.refuse(masking("column %s.%s is masked for you and cannot be used in an expression, a condition or a key; select the column by itself; it will be masked", rel.Name, col.Name))
		}
		return
	case *ast.FuncCall:
		if n.Over != nil {
			a.refuse(masking("a window over a table with masked columns is refused"))
			return
		}
	case *ast.SelectStmt, *ast.SubLink, *ast.RangeSubselect:
		a.refuse(masking("a subquery beside a table with masked columns is refused; use a join"))
		return
	}
	eachChild(n, s.sweep)
}

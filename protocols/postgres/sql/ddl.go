package sql

import (
	"github.com/multigres/multigres/go/common/parser/ast"

	"github.com/sallyport/sallyport/policy"
)

// definition is for statements that create, change and drop objects of a
// schema. Each names its object; what else it holds (queries, expressions,
// other tables) is walked and judged as in a query.
func (a *analysis) definition(n ast.Node) bool {
	a.st.ChangesCatalog = true
	switch n := n.(type) {
	case *ast.CreateStmt:
		a.verb("CREATE TABLE")
		a.createTable(n)
	case *ast.CreateForeignTableStmt:
		a.verb("CREATE FOREIGN TABLE")
		if n.Base == nil {
			a.refuse(unsupported("CREATE FOREIGN TABLE names no table"))
			return true
		}
		a.createTable(n.Base)
		a.onDatabase(policy.PostgresCreateOther)
	case *ast.ViewStmt:
		a.verb("CREATE VIEW")
		a.onNew(policy.PostgresCreateView, n.View)
		a.visit(n.Query)
	case *ast.RefreshMatViewStmt:
		a.verb("REFRESH MATERIALIZED VIEW")
		a.on(policy.PostgresRefreshMatview, n.Relation)
	case *ast.IndexStmt:
		a.verb("CREATE INDEX")
		a.on(policy.PostgresCreateIndex, n.Relation)
		a.rest(n, n.Relation)
	case *ast.CreateStatsStmt:
		a.verb("CREATE STATISTICS")
		for _, item := range items(n.Relations) {
			rv, _ := item.(*ast.RangeVar)
			a.on(policy.PostgresCreateOther, rv)
		}
		a.rest(n)
	case *ast.AlterStatsStmt:
		a.verb("ALTER STATISTICS")
		a.onSchemaOf(policy.PostgresAlterOther, namesOf(n.DefNames))
	case *ast.CreateSeqStmt:
		a.verb("CREATE SEQUENCE")
		a.onNew(policy.PostgresCreateSequence, n.Sequence)
		a.rest(n, n.Sequence)
	case *ast.AlterSeqStmt:
		a.verb("ALTER SEQUENCE")
		a.on(policy.PostgresAlterSequence, n.Sequence)
		a.rest(n, n.Sequence)
	case *ast.CreateSchemaStmt:
		a.verb("CREATE SCHEMA")
		if n.Schemaname == "" {
			a.onDatabase(policy.PostgresCreateSchema)
		} else {
			a.pair(policy.PostgresCreateSchema, a.schema(n.Schemaname))
		}
		if len(items(n.SchemaElts)) > 0 {
			a.refuse(unsupported("CREATE SCHEMA with objects inside is not supported through the gateway; create them by statements of their own"))
		}
	case *ast.TruncateStmt:
		a.verb("TRUNCATE TABLE")
		a.st.ChangesCatalog = false
		for _, item := range items(n.Relations) {
			rv, _ := item.(*ast.RangeVar)
			a.on(policy.PostgresTruncate, rv)
		}
	case *ast.AlterTableStmt:
		a.alterTable(n)
	case *ast.RenameStmt:
		a.st.Shifts = true
		a.rename(n)
	case *ast.AlterObjectSchemaStmt:
		a.st.Shifts = true
		a.verb("ALTER")
		a.alterObject(n.ObjectType, n.Relation, n.Object)
		a.pair(policy.PostgresAlterSchema, a.schema(n.NewSchema))
		a.later(func() { a.batch.renamed = true })
	case *ast.AlterOwnerStmt:
		a.verb("ALTER")
		a.alterObject(n.ObjectType, n.Relation, n.Object)
	case *ast.AlterObjectDependsStmt:
		a.verb("ALTER")
		a.alterObject(n.ObjectType, n.Relation, n.Object)
	case *ast.DropStmt:
		a.drop(n)
	case *ast.CommentStmt:
		a.verb("COMMENT")
		a.st.ChangesCatalog = false
		a.onObject(policy.PostgresComment, n.Objtype, n.Object)
	case *ast.ReindexStmt:
		a.verb("REINDEX")
		a.st.ChangesCatalog = false
		switch {
		case n.Relation != nil:
			a.on(policy.PostgresReindex, n.Relation)
		case n.Kind == ast.REINDEX_OBJECT_SCHEMA:
			a.pair(policy.PostgresReindex, a.schema(n.Name))
		default:
			a.onDatabase(policy.PostgresReindex)
		}
	case *ast.ClusterStmt:
		a.verb("CLUSTER")
		a.st.ChangesCatalog = false
		if n.Relation == nil {
			a.onDatabase(policy.PostgresCluster)
		} else {
			a.on(policy.PostgresCluster, n.Relation)
		}
	case *ast.CreateTriggerStmt:
		a.verb("CREATE TRIGGER")
		a.on(policy.PostgresCreateTrigger, n.Relation)
		a.useFunction(namesOf(n.Funcname))
		a.rest(n, n.Relation)
	case *ast.RuleStmt:
		a.verb("CREATE RULE")
		if len(items(n.Actions)) > 1 {
			a.refuse(unsupported("CREATE RULE with more than one action is not supported through the gateway"))
			return true
		}
		a.on(policy.PostgresCreateOther, n.Relation)
		a.visit(n.WhereClause)
		for _, item := range items(n.Actions) {
			switch item.(type) {
			case *ast.SelectStmt, *ast.InsertStmt, *ast.UpdateStmt, *ast.DeleteStmt:
				// NEW and OLD are the rule's own names, not relations.
				a.ctes = append(a.ctes, "new", "old")
				a.visit(item)
				a.ctes = nil
			case *ast.NotifyStmt:
				a.onDatabase(policy.PostgresNotify)
			default:
				a.refuse(unsupported("CREATE RULE with an action of %s is not supported through the gateway", nodeName(item)))
			}
		}
	case *ast.CreatePolicyStmt:
		a.verb("CREATE POLICY")
		a.on(policy.PostgresCreateOther, n.Table)
		a.rest(n, n.Table)
	case *ast.AlterPolicyStmt:
		a.verb("ALTER POLICY")
		a.on(policy.PostgresAlterOther, n.Table)
		a.rest(n, n.Table)
	case *ast.CreateFunctionStmt:
		a.verb("CREATE FUNCTION")
		if n.IsProcedure {
			a.st.Verb = "CREATE PROCEDURE"
		}
		a.onFunction(policy.PostgresCreateFunction, namesOf(n.FuncName), true)
		for _, item := range items(n.Parameters) {
			if p, ok := item.(*ast.FunctionParameter); ok {
				a.visit(p.DefExpr)
			}
		}
		// The body of a string is not read: it does nothing until it is called,
		// and calling it is a permission of its own. A parsed body resolves its
		// names now, so they are judged now.
		a.functionBody(n.SQLBody)
	case *ast.AlterFunctionStmt:
		a.verb("ALTER FUNCTION")
		if n.Func != nil {
			a.onFunction(policy.PostgresAlterFunction, namesOf(n.Func.Objname), false)
		}
	case *ast.DefineStmt:
		a.define(n)
	case *ast.CompositeTypeStmt:
		a.verb("CREATE TYPE")
		a.onSchemaOf(policy.PostgresCreateType, namesOf(n.Typevar))
		a.visit(n.Coldeflist)
	case *ast.CreateEnumStmt:
		a.verb("CREATE TYPE")
		a.onSchemaOf(policy.PostgresCreateType, namesOf(n.TypeName))
	case *ast.CreateRangeStmt:
		a.verb("CREATE TYPE")
		a.onSchemaOf(policy.PostgresCreateType, namesOf(n.TypeName))
		a.onDatabase(policy.PostgresCreateOther) // names functions that values of it run
	case *ast.CreateDomainStmt:
		a.verb("CREATE DOMAIN")
		a.onSchemaOf(policy.PostgresCreateType, namesOf(n.Domainname))
		a.rest(n)
	case *ast.AlterEnumStmt:
		a.verb("ALTER TYPE")
		a.onSchemaOf(policy.PostgresAlterType, namesOf(n.TypeName))
	case *ast.AlterDomainStmt:
		a.verb("ALTER DOMAIN")
		a.onSchemaOf(policy.PostgresAlterType, namesOf(n.TypeName))
		a.visit(n.Def)
	case *ast.AlterTypeStmt:
		a.verb("ALTER TYPE")
		a.onSchemaOf(policy.PostgresAlterType, namesOf(n.TypeName))
		a.onDatabase(policy.PostgresAlterOther)
	case *ast.AlterCompositeTypeStmt:
		a.verb("ALTER TYPE")
		a.onSchemaOf(policy.PostgresAlterType, namesOf(n.TypeName))
		a.visit(n.Cmds)
	case *ast.AlterCollationStmt:
		a.verb("ALTER COLLATION")
		a.onSchemaOf(policy.PostgresAlterOther, namesOf(n.Collname))
	case *ast.AlterOperatorStmt:
		a.verb("ALTER OPERATOR")
		a.onDatabase(policy.PostgresAlterOther)
	case *ast.CreateOpClassStmt:
		a.verb("CREATE OPERATOR CLASS")
		a.onDatabase(policy.PostgresCreateOther)
	case *ast.CreateOpFamilyStmt:
		a.verb("CREATE OPERATOR FAMILY")
		a.onDatabase(policy.PostgresCreateOther)
	case *ast.AlterOpFamilyStmt:
		a.verb("ALTER OPERATOR FAMILY")
		a.onDatabase(policy.PostgresAlterOther)
	case *ast.CreateConversionStmt:
		a.verb("CREATE CONVERSION")
		a.onDatabase(policy.PostgresCreateOther)
	case *ast.AlterTSConfigurationStmt, *ast.AlterTSDictionaryStmt:
		a.verb("ALTER TEXT SEARCH")
		a.onDatabase(policy.PostgresAlterOther)
	case *ast.CreatePublicationStmt:
		a.verb("CREATE PUBLICATION")
		a.onDatabase(policy.PostgresCreateOther)
		a.rest(n)
	case *ast.AlterPublicationStmt:
		a.verb("ALTER PUBLICATION")
		a.onDatabase(policy.PostgresAlterOther)
		a.rest(n)
	default:
		return false
	}
	return true
}

// later notes what is true only after the statement: it does not stand
// against the statement itself.
func (a *analysis) later(f func()) { a.after = append(a.after, f) }

func (a *analysis) createTable(n *ast.CreateStmt) {
	rel := a.onNew(policy.PostgresCreateTable, n.Relation)
	if rel != nil && rel.OID == 0 {
		plain := len(items(n.InhRelations)) == 0 && n.PartBound == nil && n.OfTypename == nil
		for _, item := range items(n.TableElts) {
			switch item := item.(type) {
			case *ast.TableLikeClause:
				plain = false
			case *ast.ColumnDef:
				rel.Columns = append(rel.Columns, Column{Num: int16(len(rel.Columns) + 1), Name: item.Colname})
			}
		}
		if plain && rel.Schema != "pg_temp" {
			a.creates = append(a.creates, rel)
		} else {
			a.created = append(a.created, rel) // known to exist, not what is in it
		}
	}
	for _, item := range items(n.InhRelations) {
		rv, _ := item.(*ast.RangeVar)
		a.on(policy.PostgresAlterTable, rv)
	}
	self := n.Relation
	a.constraints(self, n.TableElts)
	for _, c := range n.Constraints {
		a.constraint(self, c)
	}
	a.rest(n, n.Relation, n.InhRelations)
}

// constraints names the tables that foreign keys refer to: they get triggers.
func (a *analysis) constraints(self *ast.RangeVar, list *ast.NodeList) {
	for _, item := range items(list) {
		switch item := item.(type) {
		case *ast.Constraint:
			a.constraint(self, item)
		case *ast.ColumnDef:
			a.constraints(self, item.Constraints)
		case *ast.NodeList:
			a.constraints(self, item)
		}
	}
}

func (a *analysis) constraint(self *ast.RangeVar, c *ast.Constraint) {
	if c == nil || c.Pktable == nil {
		return
	}
	if self != nil && c.Pktable.SchemaName == self.SchemaName && c.Pktable.RelName == self.RelName {
		a.handled[c.Pktable] = true // to itself
		return
	}
	a.on(policy.PostgresAlterTable, c.Pktable)
}

// relationAction is the action for a kind of relation.
func relationAction(t ast.ObjectType, table, view, index, sequence policy.Action) (policy.Action, bool) {
	switch t {
	case ast.OBJECT_TABLE, ast.OBJECT_FOREIGN_TABLE, ast.OBJECT_COLUMN, ast.OBJECT_TABCONSTRAINT:
		return table, true
	case ast.OBJECT_VIEW, ast.OBJECT_MATVIEW:
		return view, true
	case ast.OBJECT_INDEX:
		return index, true
	case ast.OBJECT_SEQUENCE:
		return sequence, true
	}
	return "", false
}

// relationKindAction goes by what the relation is: the server takes ALTER TABLE
// for views, indexes and sequences too, and theirs for tables.
func relationKindAction(rel *Relation, action policy.Action, view, index, sequence policy.Action) policy.Action {
	if rel == nil {
		return action
	}
	switch rel.Kind {
	case 'v', 'm':
		return view
	case 'i', 'I':
		return index
	case 'S':
		return sequence
	case 'r', 'p', 'f':
		return policy.PostgresAlterTable // ALTER INDEX t RENAME is taken for a table
	}
	return action
}

func (a *analysis) alterRelation(t ast.ObjectType, rv *ast.RangeVar) {
	action, ok := relationAction(t, policy.PostgresAlterTable, policy.PostgresAlterView, policy.PostgresAlterIndex, policy.PostgresAlterSequence)
	if !ok {
		action = policy.PostgresAlterTable
	}
	if rv == nil {
		a.refuse(unsupported("the statement names no table"))
		return
	}
	_, rel := a.resolve(rv.CatalogName, rv.SchemaName, rv.RelName)
	a.on(relationKindAction(rel, action, policy.PostgresAlterView, policy.PostgresAlterIndex, policy.PostgresAlterSequence), rv)
	if rel == nil {
		a.alsoOn(policy.PostgresAlterTable, rv)
	}
}

func (a *analysis) alterTable(n *ast.AlterTableStmt) {
	switch n.Objtype {
	case ast.OBJECT_TYPE:
		a.verb("ALTER TYPE")
		a.onSchemaOf(policy.PostgresAlterType, namesOf(n.Relation))
		a.handled[n.Relation] = true
	default:
		a.verb("ALTER " + n.Objtype.String())
		a.alterRelation(n.Objtype, n.Relation)
	}
	for _, item := range items(n.Cmds) {
		cmd, ok := item.(*ast.AlterTableCmd)
		if !ok {
			a.refuse(unsupported("ALTER TABLE holds %s, which this gateway does not know", nodeName(item)))
			return
		}
		a.alters = append(a.alters, cmd.Subtype)
		switch def := cmd.Def.(type) {
		case *ast.RangeVar: // INHERIT, NO INHERIT
			a.on(policy.PostgresAlterTable, def)
		case *ast.PartitionCmd: // ATTACH, DETACH
			if def.Name != nil {
				a.on(policy.PostgresAlterTable, def.Name)
			}
		case *ast.Constraint:
			a.constraint(n.Relation, def)
		case *ast.ColumnDef:
			a.constraints(n.Relation, def.Constraints)
		}
		a.rest(cmd)
	}
}

// alterObject is for statements that name any kind of object.
func (a *analysis) alterObject(t ast.ObjectType, rv *ast.RangeVar, object ast.Node) {
	if t == ast.OBJECT_COLUMN || t == ast.OBJECT_TABCONSTRAINT {
		a.verb("ALTER TABLE")
	}
	if rv != nil {
		a.verb("ALTER " + t.String())
		if t == ast.OBJECT_TYPE || t == ast.OBJECT_ATTRIBUTE {
			a.handled[rv] = true
			a.onSchemaOf(policy.PostgresAlterType, namesOf(rv))
			return
		}
		if t == ast.OBJECT_TRIGGER {
			a.on(policy.PostgresAlterTrigger, rv)
			return
		}
		if t == ast.OBJECT_POLICY || t == ast.OBJECT_RULE {
			a.on(policy.PostgresAlterOther, rv)
			return
		}
		a.alterRelation(t, rv)
		return
	}
	a.verb("ALTER " + t.String())
	parts := namesOf(object)
	switch t {
	case ast.OBJECT_FUNCTION, ast.OBJECT_PROCEDURE, ast.OBJECT_ROUTINE, ast.OBJECT_AGGREGATE:
		a.onFunction(policy.PostgresAlterFunction, parts, false)
	case ast.OBJECT_SCHEMA:
		if len(parts) == 1 {
			a.pair(policy.PostgresAlterSchema, a.schema(parts[0]))
		} else {
			a.onDatabase(policy.PostgresAlterSchema)
		}
	case ast.OBJECT_TYPE, ast.OBJECT_DOMAIN, ast.OBJECT_DOMCONSTRAINT:
		if t == ast.OBJECT_DOMCONSTRAINT {
			a.onDatabase(policy.PostgresAlterType)
		} else {
			a.onSchemaOf(policy.PostgresAlterType, parts)
		}
	case ast.OBJECT_DATABASE:
		a.onDatabase(policy.PostgresAlterDatabase)
	case ast.OBJECT_ROLE:
		a.onDatabase(policy.PostgresAlterRole)
	case ast.OBJECT_EXTENSION:
		a.onDatabase(policy.PostgresAlterExtension)
	default:
		a.onDatabase(policy.PostgresAlterOther)
	}
}

func (a *analysis) rename(n *ast.RenameStmt) {
	if n.RenameType == ast.OBJECT_ROLE {
		a.verb("ALTER ROLE")
		a.onDatabase(policy.PostgresAlterRole)
		return
	}
	if n.RenameType == ast.OBJECT_DATABASE {
		a.verb("ALTER DATABASE")
		a.onDatabase(policy.PostgresAlterDatabase)
		return
	}
	if n.RenameType == ast.OBJECT_SCHEMA {
		a.verb("ALTER SCHEMA")
		a.pair(policy.PostgresAlterSchema, a.schema(n.Subname))
	} else {
		a.alterObject(n.RenameType, n.Relation, n.Object)
	}
	if n.RenameType != ast.OBJECT_COLUMN && n.RenameType != ast.OBJECT_TABCONSTRAINT && n.RenameType != ast.OBJECT_TRIGGER {
		a.later(func() { a.batch.renamed = true })
	}
}

func (a *analysis) drop(n *ast.DropStmt) {
	a.verb("DROP " + n.RemoveType.String())
	if action, ok := relationAction(n.RemoveType, policy.PostgresDropTable, policy.PostgresDropView, policy.PostgresDropIndex, policy.PostgresDropSequence); ok {
		for _, o := range items(n.Objects) {
			_, schema, name, ok := splitName(namesOf(o))
			if !ok {
				a.refuse(unsupported("DROP names something that this gateway does not know"))
				return
			}
			before := len(a.unknown)
			if rel := a.onParts(action, namesOf(o)); rel != nil {
				schema, name = rel.Schema, rel.Name
				if n.Behavior == ast.DropCascade {
					a.cascade(rel)
				}
			}
			if n.Behavior == ast.DropCascade && n.RemoveType == ast.OBJECT_SEQUENCE {
				a.onDatabase(policy.PostgresAlterTable) // defaults that call it
			}
			a.unknown = a.unknown[:before] // dropping what is not there says so
			a.later(func() { delete(a.batch.created, qualified{schema, name}) })
		}
		return
	}
	switch n.RemoveType {
	case ast.OBJECT_TRIGGER, ast.OBJECT_POLICY, ast.OBJECT_RULE:
		parts := namesOf(n.Objects)
		if len(parts) < 2 {
			a.refuse(unsupported("DROP names something that this gateway does not know"))
			return
		}
		action := policy.PostgresDropOther
		if n.RemoveType == ast.OBJECT_TRIGGER {
			action = policy.PostgresDropTrigger
		}
		a.onParts(action, parts[:len(parts)-1])
		return
	}
	if n.Behavior == ast.DropCascade {
		// Tables and columns of a type, and all that is in a schema or belongs to
		// an extension or a server, fall with it.
		a.onDatabase(policy.PostgresDropTable)
		a.onDatabase(policy.PostgresAlterTable)
	}
	for _, o := range items(n.Objects) {
		parts := namesOf(o)
		switch n.RemoveType {
		case ast.OBJECT_FUNCTION, ast.OBJECT_PROCEDURE, ast.OBJECT_ROUTINE, ast.OBJECT_AGGREGATE:
			a.onFunction(policy.PostgresDropFunction, parts, false)
		case ast.OBJECT_TYPE, ast.OBJECT_DOMAIN:
			a.onSchemaOf(policy.PostgresDropType, parts)
		case ast.OBJECT_SCHEMA:
			if len(parts) != 1 {
				a.onDatabase(policy.PostgresDropSchema)
				continue
			}
			a.pair(policy.PostgresDropSchema, a.schema(parts[0]))
			a.later(func() { a.batch.renamed = true })
		case ast.OBJECT_EXTENSION:
			a.onDatabase(policy.PostgresDropExtension)
		default:
			a.onDatabase(policy.PostgresDropOther)
		}
	}
	if len(items(n.Objects)) == 0 {
		a.onDatabase(policy.PostgresDropOther)
	}
}

// cascade names what falls with a relation: tables that inherit from it, views
// of it, keys that refer to it and columns of its row type.
func (a *analysis) cascade(rel *Relation) {
	if a.falls == nil {
		a.falls = map[*Relation]bool{}
	}
	queue := []*Relation{rel}
	for len(queue) > 0 {
		r := queue[0]
		queue = queue[1:]
		if a.falls[r] {
			continue
		}
		a.falls[r] = true
		if r != rel {
			action := policy.PostgresDropTable
			if r.Kind == 'v' || r.Kind == 'm' {
				action = policy.PostgresDropView
			}
			a.pair(action, a.table(a.canonical(r)))
			a.touch(r, true)
		}
		queue = append(queue, r.children...)
		queue = append(queue, r.views...)
		for _, k := range r.keys {
			if k.to == r && k.from != r {
				a.pair(policy.PostgresAlterTable, a.table(a.canonical(k.from)))
				a.object(k.from.OID)
			}
		}
		for _, user := range a.cat.users[r.rowType] {
			a.pair(policy.PostgresAlterTable, a.table(a.canonical(user)))
			a.object(user.OID)
		}
	}
}

// onObject is for COMMENT and SECURITY LABEL.
func (a *analysis) onObject(action policy.Action, t ast.ObjectType, object ast.Node) {
	parts := namesOf(object)
	switch t {
	case ast.OBJECT_TABLE, ast.OBJECT_VIEW, ast.OBJECT_MATVIEW, ast.OBJECT_INDEX, ast.OBJECT_SEQUENCE, ast.OBJECT_FOREIGN_TABLE:
		a.onParts(action, parts)
	case ast.OBJECT_COLUMN, ast.OBJECT_TABCONSTRAINT, ast.OBJECT_TRIGGER, ast.OBJECT_POLICY, ast.OBJECT_RULE:
		if len(parts) < 2 {
			a.onDatabase(action)
			return
		}
		a.onParts(action, parts[:len(parts)-1])
	case ast.OBJECT_SCHEMA:
		if len(parts) == 1 {
			a.pair(action, a.schema(parts[0]))
			return
		}
		a.onDatabase(action)
	case ast.OBJECT_FUNCTION, ast.OBJECT_PROCEDURE, ast.OBJECT_ROUTINE, ast.OBJECT_AGGREGATE:
		if parts == nil {
			a.onDatabase(action)
			return
		}
		a.onFunction(action, parts, false)
	default:
		a.onDatabase(action)
	}
}

func (a *analysis) functionBody(body ast.Node) {
	if isNil(body) {
		return
	}
	switch body := body.(type) {
	case *ast.NodeList:
		for _, item := range body.Items {
			a.functionBody(item)
		}
	case *ast.ReturnStmt:
		a.visit(body.ReturnVal)
	case *ast.SelectStmt, *ast.InsertStmt, *ast.UpdateStmt, *ast.DeleteStmt, *ast.MergeStmt:
		a.visit(body)
	default:
		a.refuse(unsupported("a function body with %s is not supported through the gateway", nodeName(body)))
	}
}

func (a *analysis) define(n *ast.DefineStmt) {
	a.verb("CREATE " + n.Kind.String())
	parts := namesOf(n.DefNames)
	switch n.Kind {
	case ast.OBJECT_AGGREGATE:
		a.onFunction(policy.PostgresCreateFunction, parts, true)
	case ast.OBJECT_TYPE:
		a.onSchemaOf(policy.PostgresCreateType, parts)
		a.onDatabase(policy.PostgresCreateOther) // names functions that values of it run
	default:
		a.onSchemaOf(policy.PostgresCreateOther, parts)
	}
}

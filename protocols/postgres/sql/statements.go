package sql

import (
	"slices"
	"strings"

	"github.com/multigres/multigres/go/common/parser/ast"

	"github.com/sallyport/sallyport/policy"
)

// statement names what a statement does. Statements that are not in the list
// are refused.
func (a *analysis) statement(n ast.Node) {
	if isNil(n) {
		a.refuse(unsupported("the statement is empty"))
		return
	}
	switch n := n.(type) {
	case *ast.SelectStmt:
		a.verb("SELECT")
		if n.IntoClause != nil {
			a.verb("SELECT INTO")
		}
		a.visit(n)
		return
	case *ast.InsertStmt:
		a.verb("INSERT")
		a.visit(n)
		return
	case *ast.UpdateStmt:
		a.verb("UPDATE")
		a.visit(n)
		return
	case *ast.DeleteStmt:
		a.verb("DELETE")
		a.visit(n)
		return
	case *ast.MergeStmt:
		a.verb("MERGE")
		a.visit(n)
		return
	}
	a.utility = true
	if !a.session(n) && !a.wrapper(n) && !a.definition(n) && !a.administration(n) {
		a.refuse(unsupported("%s is not supported through the gateway", nodeName(n)))
	}
}

// verb sets the command tag once: of EXPLAIN SELECT it is EXPLAIN.
func (a *analysis) verb(v string) {
	if a.st.Verb == "" || strings.HasPrefix(v, a.st.Verb+" ") {
		a.st.Verb = v
	}
}

// session is for statements about the session alone.
func (a *analysis) session(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.TransactionStmt:
		a.onDatabase(policy.PostgresTransaction)
		switch n.Kind {
		case ast.TRANS_STMT_BEGIN, ast.TRANS_STMT_START:
			a.verb("BEGIN")
			a.st.Transaction = "begin"
		case ast.TRANS_STMT_COMMIT:
			a.verb("COMMIT")
			a.st.Transaction = "commit"
		case ast.TRANS_STMT_ROLLBACK:
			a.verb("ROLLBACK")
			a.st.Transaction = "rollback"
			a.st.ChangesCatalog = true // what it made is gone
		case ast.TRANS_STMT_SAVEPOINT:
			a.verb("SAVEPOINT")
		case ast.TRANS_STMT_RELEASE:
			a.verb("RELEASE")
		case ast.TRANS_STMT_ROLLBACK_TO:
			a.verb("ROLLBACK")
			a.st.ChangesCatalog = true
		default:
			a.refuse(unsupported("two-phase commit is not supported through the gateway: a prepared transaction would outlive the session"))
		}
	case *ast.VariableSetStmt:
		a.setting(n)
	case *ast.VariableShowStmt:
		a.verb("SHOW")
		a.onDatabase(policy.PostgresShow)
	case *ast.ConstraintsSetStmt:
		a.verb("SET CONSTRAINTS")
		a.onDatabase(policy.PostgresTransaction)
	case *ast.DeallocateStmt:
		a.verb("DEALLOCATE")
		a.onDatabase(policy.PostgresPrepare)
		a.st.Deallocate = n.Name
		if n.IsAll || n.Name == "" {
			a.verb("DEALLOCATE ALL")
			a.st.Deallocate = "*"
		}
	case *ast.FetchStmt:
		a.verb("FETCH")
		if n.IsMove {
			a.st.Verb = "MOVE"
		}
		a.onDatabase(policy.PostgresFetch)
		a.st.Cursor = n.PortalName
	case *ast.ClosePortalStmt:
		a.verb("CLOSE CURSOR")
		a.onDatabase(policy.PostgresFetch)
		if a.st.Cursor = n.PortalName; n.PortalName == "" {
			a.st.Cursor = "*"
		}
	case *ast.DiscardStmt:
		a.verb("DISCARD " + n.Target.String())
		a.onDatabase(policy.PostgresDiscard)
		a.st.ChangesCatalog = true
		if n.Target == ast.DISCARD_ALL {
			a.refuse(&Problem{Rule: "pinned-setting", Code: "42501",
				Reason: "DISCARD ALL would reset the session's role and pinned settings; use CLOSE ALL, UNLISTEN *, DEALLOCATE ALL, DISCARD PLANS, DISCARD SEQUENCES and DISCARD TEMP"})
		}
	case *ast.ListenStmt:
		a.verb("LISTEN")
		a.onDatabase(policy.PostgresListen)
	case *ast.UnlistenStmt:
		a.verb("UNLISTEN")
		a.onDatabase(policy.PostgresListen)
	case *ast.NotifyStmt:
		a.verb("NOTIFY")
		a.onDatabase(policy.PostgresNotify)
	case *ast.LockStmt:
		a.verb("LOCK TABLE")
		for _, item := range items(n.Relations) {
			rv, _ := item.(*ast.RangeVar)
			a.on(policy.PostgresLock, rv)
		}
	case *ast.CheckPointStmt:
		a.verb("CHECKPOINT")
		a.onDatabase(policy.PostgresCheckpoint)
	case *ast.LoadStmt:
		a.verb("LOAD")
		a.onDatabase(policy.PostgresLoad)
	default:
		return false
	}
	return true
}

func items(l *ast.NodeList) []ast.Node {
	if l == nil {
		return nil
	}
	return l.Items
}

// wrapper is for statements that hold another, or code.
func (a *analysis) wrapper(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.ExplainStmt:
		a.verb("EXPLAIN")
		a.onDatabase(policy.PostgresExplain)
		a.statement(n.Query)
	case *ast.PrepareStmt:
		a.verb("PREPARE")
		a.onDatabase(policy.PostgresPrepare)
		a.st.Prepare, a.st.Inner = n.Name, a.innerText()
		for _, t := range items(n.Argtypes) {
			if t, ok := t.(*ast.TypeName); ok {
				a.useType(t)
			}
		}
		a.statement(n.Query)
	case *ast.ExecuteStmt:
		a.verb("EXECUTE")
		a.onDatabase(policy.PostgresPrepare)
		a.st.Execute = n.Name
		a.utility = false
		a.rest(n)
	case *ast.DeclareCursorStmt:
		a.verb("DECLARE CURSOR")
		a.onDatabase(policy.PostgresDeclareCursor)
		if a.st.Verb == "DECLARE CURSOR" { // EXPLAIN DECLARE makes no cursor
			a.st.Cursor = n.PortalName
		}
		a.statement(n.Query)
	case *ast.CopyStmt:
		a.copy(n)
	case *ast.CreateTableAsStmt:
		action := policy.PostgresCreateTable
		a.verb("CREATE TABLE AS")
		if n.ObjType == ast.OBJECT_MATVIEW {
			action = policy.PostgresCreateView
			a.st.Verb = strings.Replace(a.st.Verb, "CREATE TABLE AS", "CREATE MATERIALIZED VIEW", 1)
		}
		a.st.ChangesCatalog = true
		if n.Into == nil {
			a.refuse(unsupported("CREATE TABLE AS names no table"))
			return true
		}
		if rel := a.onNew(action, n.Into.Rel); rel != nil && rel.OID == 0 {
			a.creates = append(a.creates, rel)
		}
		a.rest(n.Into, n.Into.Rel, n.Into.ViewQuery)
		a.statement(n.Query)
	case *ast.DoStmt:
		a.verb("DO")
		a.onDatabase(policy.PostgresDo)
		a.st.ChangesCatalog = true
	case *ast.CallStmt:
		a.verb("CALL")
		a.st.ChangesCatalog = true
		if n.Funccall == nil {
			a.refuse(unsupported("CALL names no procedure"))
			return true
		}
		parts := namesOf(n.Funccall.Funcname)
		_, schema, name, ok := splitName(parts)
		if !ok {
			a.refuse(unsupported("the procedure's name has too many parts"))
			return true
		}
		found := false
		for _, f := range a.cat.functions[name] {
			if f.Schema == schema || schema == "" && slices.Contains(a.path(), f.Schema) {
				a.call(qualified{f.Schema, name})
				a.object(f.OID)
				found = true
			}
		}
		if !found {
			a.call(qualified{schema, name})
		}
		a.utility = false
		a.rest(n.Funccall)
	case *ast.VacuumStmt:
		action := policy.PostgresAnalyze
		a.verb("ANALYZE")
		if n.IsVacuumcmd {
			action = policy.PostgresVacuum
			a.st.Verb = strings.Replace(a.st.Verb, "ANALYZE", "VACUUM", 1)
		}
		if len(items(n.Rels)) == 0 {
			a.onDatabase(action)
		}
		for _, item := range items(n.Rels) {
			if rel, ok := item.(*ast.VacuumRelation); ok && rel.Relation != nil {
				a.on(action, rel.Relation)
			} else {
				a.refuse(unsupported("the statement holds %s where a table belongs", nodeName(item)))
			}
		}
	default:
		return false
	}
	return true
}

// innerText is the text after the AS of PREPARE.
func (a *analysis) innerText() string {
	depth := 0
	for i, t := range a.tokens {
		switch {
		case t.kind == tokenOperator && t.value == "(":
			depth++
		case t.kind == tokenOperator && t.value == ")":
			depth--
		case depth == 0 && i > 1 && t.kind == tokenWord && t.value == "as" && i+1 < len(a.tokens):
			return a.st.Text[a.tokens[i+1].start-a.tokens[0].start:]
		}
	}
	return ""
}

func (a *analysis) copy(n *ast.CopyStmt) {
	a.verb("COPY")
	table := policy.PostgresCopyTo
	if n.IsFrom {
		table = policy.PostgresCopyFrom
	}
	if n.Relation != nil {
		a.on(table, n.Relation)
		if n.IsFrom {
			a.alsoOn(policy.PostgresInsert, n.Relation)
			if !isNil(n.WhereClause) {
				a.alsoOn(policy.PostgresSelect, n.Relation)
			}
		} else {
			a.alsoOn(policy.PostgresSelect, n.Relation)
		}
	} else {
		a.onDatabase(table)
	}
	switch {
	case n.IsProgram:
		a.onDatabase(policy.PostgresCopyProgram)
	case n.Filename != "":
		a.onDatabase(policy.PostgresCopyFile)
	case n.IsFrom:
		a.st.CopyIn = true
	default:
		a.st.CopyOut = true
	}
	a.utility = false
	a.visit(n.WhereClause)
	a.utility = true
	if !isNil(n.Query) {
		a.statement(n.Query)
	} else if n.Relation == nil {
		a.refuse(unsupported("COPY names neither a table nor a query"))
	}
}

// setting is SET and RESET.
func (a *analysis) setting(n *ast.VariableSetStmt) {
	name := strings.ToLower(n.Name)
	a.st.ChangesCatalog = false
	switch n.Kind {
	case ast.VAR_RESET, ast.VAR_SET_DEFAULT:
		a.verb("RESET")
		if n.Kind == ast.VAR_SET_DEFAULT {
			a.st.Verb = "SET"
		}
		a.onDatabase(policy.PostgresReset)
		a.st.Set = name
		switch {
		case harmlessSettings[name], plannerSettings[name]:
		case name == "role", name == "session_authorization":
			a.pair(policy.PostgresSetRole, a.database())
			a.refuse(pinned(name, a.sc.Role))
		case pinnedValues[name] != nil:
			// RESET goes to the value given at start-up, which is the pinned one
			// only if the gateway gave it there.
			if !a.sc.PinnedAtStartup {
				a.refuse(pinned(name, pinnedValues[name][0]))
			}
		case name == "search_path":
			if !a.sc.PinnedAtStartup {
				a.refuse(pinned(name, strings.Join(a.sc.SearchPath, ", ")))
			}
		default:
			a.refuse(pinned(name, ""))
		}
	case ast.VAR_RESET_ALL:
		a.verb("RESET")
		a.onDatabase(policy.PostgresReset)
		a.st.Set = "*"
		if !a.sc.PinnedAtStartup {
			a.refuse(&Problem{Rule: "pinned-setting", Code: "42501", Reason: "RESET ALL would reset settings that are pinned for this session; reset what you have set by name"})
		}
	case ast.VAR_SET_MULTI:
		if name == "transaction snapshot" {
			a.refuse(unsupported("SET TRANSACTION SNAPSHOT is not supported through the gateway"))
		}
		a.verb("SET")
		a.onDatabase(policy.PostgresTransaction)
		if name != "transaction" {
			a.onDatabase(policy.PostgresSet)
		}
	case ast.VAR_SET_VALUE:
		a.verb("SET")
		values, ok := settingValues(n.Args)
		a.st.Set, a.st.Value = name, strings.Join(values, ", ")
		switch name {
		case "role", "session_authorization":
			a.onDatabase(policy.PostgresSetRole)
			if name != "role" || !ok || len(values) != 1 || values[0] != a.sc.Role || a.sc.Role == "" {
				a.refuse(pinned(name, a.sc.Role))
			}
		case "search_path":
			a.onDatabase(policy.PostgresSet)
			if !ok || !slices.Equal(values, a.sc.SearchPath) {
				a.refuse(pinned(name, strings.Join(a.sc.SearchPath, ", ")))
			}
		default:
			a.onDatabase(policy.PostgresSet)
			if plannerSettings[name] && a.batch.masking {
				a.refuse(masking("%s steers the planner: the order of rows could tell the values of columns that are masked for you; leave it out", name))
			} else if allowed, want := settingAllowed(a.sc, name, a.st.Value); !ok || !allowed {
				a.refuse(pinned(name, want))
			}
		}
	default:
		a.refuse(unsupported("this form of SET is not supported through the gateway"))
	}
}

// settingValues are the values of SET as text; ok is false for what it cannot
// read.
func settingValues(args *ast.NodeList) (values []string, ok bool) {
	for _, arg := range items(args) {
		if cast, ok := arg.(*ast.TypeCast); ok { // SET TIME ZONE INTERVAL '1' HOUR
			arg = cast.Arg
		}
		if c, ok := arg.(*ast.A_Const); ok {
			arg = c.Val
		}
		switch v := arg.(type) {
		case *ast.String:
			values = append(values, v.SVal)
		case *ast.Integer:
			values = append(values, number(v.IVal))
		case *ast.Float:
			values = append(values, v.FVal)
		case *ast.Boolean:
			if v.BoolVal {
				values = append(values, "on")
			} else {
				values = append(values, "off")
			}
		default:
			return values, false
		}
	}
	return values, len(values) > 0
}

// administration is for statements about roles, privileges, databases and the
// server.
func (a *analysis) administration(n ast.Node) bool {
	a.st.ChangesCatalog = true
	plain := func(verb string, action policy.Action) {
		a.verb(verb)
		a.onDatabase(action)
	}
	switch n := n.(type) {
	case *ast.GrantStmt:
		a.grant(n)
		return true // names only
	case *ast.GrantRoleStmt:
		if n.IsGrant {
			plain("GRANT ROLE", policy.PostgresGrant)
		} else {
			plain("REVOKE ROLE", policy.PostgresRevokePrivilege)
		}
	case *ast.AlterDefaultPrivilegesStmt:
		plain("ALTER DEFAULT PRIVILEGES", policy.PostgresAlterPrivileges)
		return true
	case *ast.CreateRoleStmt:
		plain("CREATE ROLE", policy.PostgresCreateRole)
	case *ast.AlterRoleStmt, *ast.AlterRoleSetStmt:
		plain("ALTER ROLE", policy.PostgresAlterRole)
		return true
	case *ast.DropRoleStmt:
		plain("DROP ROLE", policy.PostgresDropRole)
	case *ast.DropOwnedStmt:
		plain("DROP OWNED", policy.PostgresReassignOwned)
	case *ast.ReassignOwnedStmt:
		plain("REASSIGN OWNED", policy.PostgresReassignOwned)
	case *ast.CreatedbStmt:
		plain("CREATE DATABASE", policy.PostgresCreateDatabase)
	case *ast.AlterDatabaseStmt, *ast.AlterDatabaseSetStmt, *ast.AlterDatabaseRefreshCollStmt:
		plain("ALTER DATABASE", policy.PostgresAlterDatabase)
		return true
	case *ast.DropdbStmt:
		plain("DROP DATABASE", policy.PostgresDropDatabase)
	case *ast.CreateExtensionStmt:
		plain("CREATE EXTENSION", policy.PostgresCreateExtension)
	case *ast.AlterExtensionStmt, *ast.AlterExtensionContentsStmt:
		plain("ALTER EXTENSION", policy.PostgresAlterExtension)
		return true
	case *ast.AlterSystemStmt:
		plain("ALTER SYSTEM", policy.PostgresAlterSystem)
		return true
	case *ast.SecLabelStmt:
		a.verb("SECURITY LABEL")
		a.onObject(policy.PostgresSecurityLabel, n.Objtype, n.Object)
		return true
	case *ast.CreateTableSpaceStmt:
		plain("CREATE TABLESPACE", policy.PostgresCreateOther)
	case *ast.AlterTableSpaceStmt:
		plain("ALTER TABLESPACE", policy.PostgresAlterOther)
	case *ast.AlterTableMoveAllStmt:
		plain("ALTER TABLE", policy.PostgresAlterOther)
	case *ast.DropTableSpaceStmt:
		plain("DROP TABLESPACE", policy.PostgresDropOther)
	case *ast.CreateSubscriptionStmt:
		plain("CREATE SUBSCRIPTION", policy.PostgresCreateOther)
	case *ast.AlterSubscriptionStmt:
		plain("ALTER SUBSCRIPTION", policy.PostgresAlterOther)
	case *ast.CreateForeignServerStmt:
		plain("CREATE SERVER", policy.PostgresCreateOther)
	case *ast.AlterForeignServerStmt:
		plain("ALTER SERVER", policy.PostgresAlterOther)
	case *ast.CreateFdwStmt:
		plain("CREATE FOREIGN DATA WRAPPER", policy.PostgresCreateOther)
	case *ast.AlterFdwStmt:
		plain("ALTER FOREIGN DATA WRAPPER", policy.PostgresAlterOther)
	case *ast.CreateUserMappingStmt:
		plain("CREATE USER MAPPING", policy.PostgresCreateOther)
	case *ast.AlterUserMappingStmt:
		plain("ALTER USER MAPPING", policy.PostgresAlterOther)
	case *ast.DropUserMappingStmt:
		plain("DROP USER MAPPING", policy.PostgresDropOther)
	case *ast.CreateEventTrigStmt:
		plain("CREATE EVENT TRIGGER", policy.PostgresCreateOther)
		a.useFunction(namesOf(n.FuncName))
	case *ast.AlterEventTrigStmt:
		plain("ALTER EVENT TRIGGER", policy.PostgresAlterOther)
	case *ast.CreateAmStmt:
		plain("CREATE ACCESS METHOD", policy.PostgresCreateOther)
	case *ast.CreatePLangStmt:
		plain("CREATE LANGUAGE", policy.PostgresCreateOther)
	case *ast.CreateTransformStmt:
		plain("CREATE TRANSFORM", policy.PostgresCreateOther)
	case *ast.CreateCastStmt:
		plain("CREATE CAST", policy.PostgresCreateOther)
		return true
	case *ast.ImportForeignSchemaStmt:
		a.verb("IMPORT FOREIGN SCHEMA")
		schema := ""
		if n.LocalSchema != nil {
			schema = n.LocalSchema.SVal
		}
		a.pair(policy.PostgresImportForeignSchema, a.schema(schema))
		return true
	default:
		return false
	}
	a.rest(n)
	return true
}

func (a *analysis) grant(n *ast.GrantStmt) {
	a.st.ChangesCatalog = false
	action := policy.PostgresGrant
	a.verb("GRANT")
	if !n.IsGrant {
		action = policy.PostgresRevokePrivilege
		a.st.Verb = "REVOKE"
	}
	if len(items(n.Objects)) == 0 {
		a.onDatabase(action)
	}
	for _, o := range items(n.Objects) {
		parts := namesOf(o)
		switch {
		case n.Targtype == ast.ACL_TARGET_ALL_IN_SCHEMA && len(parts) == 1, n.Objtype == ast.OBJECT_SCHEMA && len(parts) == 1:
			a.pair(action, a.schema(parts[0]))
		case n.Objtype == ast.OBJECT_TABLE || n.Objtype == ast.OBJECT_SEQUENCE:
			rv, ok := o.(*ast.RangeVar)
			if !ok {
				a.refuse(unsupported("GRANT names %s where a table belongs", nodeName(o)))
				return
			}
			a.on(action, rv)
		case n.Objtype == ast.OBJECT_FUNCTION || n.Objtype == ast.OBJECT_PROCEDURE || n.Objtype == ast.OBJECT_ROUTINE:
			a.onFunction(action, parts, false)
		default:
			a.onDatabase(action)
		}
	}
}

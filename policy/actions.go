package policy

import "slices"

// Actions on a session and on what a column shows.
const (
	Connect Action = "connect" // open a session on a database of a target
	Reveal  Action = "reveal"  // see the true values of a sensitive column
	Approve Action = "approve" // lift approval rules for others on a target
)

// Actions of the API, in the group "api". Approve is not in it: permitting
// the whole API never makes anyone an approver.
const (
	AdminApply     Action = "admin:apply"     // replace the configuration
	AdminCluster   Action = "admin:cluster"   // add and remove nodes
	Revoke         Action = "revoke"          // revoke a subject, undo a revocation
	RecordingsRead Action = "recordings:read" // list and replay recordings
	SessionsRead   Action = "sessions:read"   // list live sessions
	SessionsWatch  Action = "sessions:watch"  // see what a live session does
	EventsRead     Action = "events:read"     // follow the event log
	ApprovalsRead  Action = "approvals:read"  // list and show approval requests
	StatusRead     Action = "status:read"     // see the state of the cluster
	StateRead      Action = "state:read"      // see what the cluster had agreed on at a past index
	PolicyExplain  Action = "policy:explain"  // ask what is decided for somebody, now or at a past index
)

// Actions on PostgreSQL, one for each kind of statement. A statement that does
// several things is several pairs; EXPLAIN, PREPARE, DECLARE, COPY (query) TO and
// CREATE TABLE AS are their own action and those of the statement inside.
const (
	// In "postgres:read".
	PostgresSelect        Action = "postgres:select"
	PostgresCopyTo        Action = "postgres:copy_to"
	PostgresExplain       Action = "postgres:explain"
	PostgresDeclareCursor Action = "postgres:declare_cursor"
	PostgresFetch         Action = "postgres:fetch" // FETCH, MOVE, CLOSE

	// In "postgres:write".
	PostgresInsert         Action = "postgres:insert"
	PostgresUpdate         Action = "postgres:update"
	PostgresDelete         Action = "postgres:delete"
	PostgresMerge          Action = "postgres:merge"
	PostgresTruncate       Action = "postgres:truncate"
	PostgresCopyFrom       Action = "postgres:copy_from"
	PostgresLock           Action = "postgres:lock" // LOCK TABLE and SELECT … FOR UPDATE or SHARE
	PostgresRefreshMatview Action = "postgres:refresh_matview"
	PostgresLargeObject    Action = "postgres:large_object"

	// In "postgres:ddl".
	PostgresCreateTable         Action = "postgres:create_table" // CREATE TABLE AS and SELECT INTO too
	PostgresCreateView          Action = "postgres:create_view"  // materialised views too
	PostgresCreateIndex         Action = "postgres:create_index"
	PostgresCreateSequence      Action = "postgres:create_sequence"
	PostgresCreateType          Action = "postgres:create_type" // types and domains
	PostgresCreateFunction      Action = "postgres:create_function"
	PostgresCreateTrigger       Action = "postgres:create_trigger"
	PostgresCreateSchema        Action = "postgres:create_schema"
	PostgresCreateOther         Action = "postgres:create_other"
	PostgresAlterTable          Action = "postgres:alter_table"
	PostgresAlterView           Action = "postgres:alter_view"
	PostgresAlterIndex          Action = "postgres:alter_index"
	PostgresAlterSequence       Action = "postgres:alter_sequence"
	PostgresAlterType           Action = "postgres:alter_type"
	PostgresAlterFunction       Action = "postgres:alter_function"
	PostgresAlterTrigger        Action = "postgres:alter_trigger"
	PostgresAlterSchema         Action = "postgres:alter_schema"
	PostgresAlterOther          Action = "postgres:alter_other"
	PostgresDropTable           Action = "postgres:drop_table"
	PostgresDropView            Action = "postgres:drop_view"
	PostgresDropIndex           Action = "postgres:drop_index"
	PostgresDropSequence        Action = "postgres:drop_sequence"
	PostgresDropType            Action = "postgres:drop_type"
	PostgresDropFunction        Action = "postgres:drop_function"
	PostgresDropTrigger         Action = "postgres:drop_trigger"
	PostgresDropSchema          Action = "postgres:drop_schema"
	PostgresDropOther           Action = "postgres:drop_other"
	PostgresComment             Action = "postgres:comment"
	PostgresImportForeignSchema Action = "postgres:import_foreign_schema"

	// In "postgres:session".
	PostgresSet         Action = "postgres:set"
	PostgresReset       Action = "postgres:reset"
	PostgresShow        Action = "postgres:show"
	PostgresTransaction Action = "postgres:transaction" // BEGIN, COMMIT, ROLLBACK, SAVEPOINT, RELEASE, SET TRANSACTION, SET CONSTRAINTS
	PostgresPrepare     Action = "postgres:prepare"     // PREPARE and DEALLOCATE; EXECUTE is judged as what was prepared
	PostgresDiscard     Action = "postgres:discard"
	PostgresListen      Action = "postgres:listen" // LISTEN and UNLISTEN
	PostgresNotify      Action = "postgres:notify"

	// In "postgres" alone.
	PostgresCall Action = "postgres:call" // CALL, and any function, operator or cast that is not built in and known to be pure

	// In "postgres:maintain".
	PostgresAnalyze Action = "postgres:analyze"
	PostgresVacuum  Action = "postgres:vacuum"
	PostgresReindex Action = "postgres:reindex"
	PostgresCluster Action = "postgres:cluster"

	// In "postgres:admin".
	PostgresDo              Action = "postgres:do" // code of the caller's own: nothing in it can be judged
	PostgresSetRole         Action = "postgres:set_role"
	PostgresGrant           Action = "postgres:grant"
	PostgresRevokePrivilege Action = "postgres:revoke_privilege"
	PostgresAlterPrivileges Action = "postgres:alter_default_privileges"
	PostgresCreateRole      Action = "postgres:create_role"
	PostgresAlterRole       Action = "postgres:alter_role"
	PostgresDropRole        Action = "postgres:drop_role"
	PostgresReassignOwned   Action = "postgres:reassign_owned" // REASSIGN OWNED and DROP OWNED
	PostgresCreateDatabase  Action = "postgres:create_database"
	PostgresAlterDatabase   Action = "postgres:alter_database"
	PostgresDropDatabase    Action = "postgres:drop_database"
	PostgresCreateExtension Action = "postgres:create_extension"
	PostgresAlterExtension  Action = "postgres:alter_extension"
	PostgresDropExtension   Action = "postgres:drop_extension"
	PostgresAlterSystem     Action = "postgres:alter_system"
	PostgresCheckpoint      Action = "postgres:checkpoint"
	PostgresLoad            Action = "postgres:load"
	PostgresSecurityLabel   Action = "postgres:security_label"
	PostgresCopyFile        Action = "postgres:copy_file"    // COPY to or from a file of the server
	PostgresCopyProgram     Action = "postgres:copy_program" // COPY to or from a program on the server
)

// ActionInfo describes an action for people and for the schema.
type ActionInfo struct {
	Name        Action
	Groups      []string       // action groups it is in, nearest first, outer ones included
	Resources   []ResourceType // types of resource it may be asked about; any other is refused
	Description string
}

// Resource types by the family of action. Where a name cannot be resolved, the
// classifier names the Schema or the Database that it would be in.
var (
	onCluster  = []ResourceType{Cluster}
	onTarget   = []ResourceType{Cluster, Target}
	onDatabase = []ResourceType{Database}
	onRows     = []ResourceType{Table, Column}
	onCopy     = []ResourceType{Table, Column, Database}
	onTable    = []ResourceType{Table, Schema, Database}
	onFunction = []ResourceType{Function, Schema, Database}
	onObject   = []ResourceType{Schema, Database}
	onAny      = []ResourceType{Database, Schema, Table, Column, Function}
)

var (
	inRead     = []string{"postgres:read", "postgres"}
	inWrite    = []string{"postgres:write", "postgres"}
	inDDL      = []string{"postgres:ddl", "postgres"}
	inSession  = []string{"postgres:session", "postgres"}
	inMaintain = []string{"postgres:maintain", "postgres"}
	inAdmin    = []string{"postgres:admin", "postgres"}
	inPostgres = []string{"postgres"}
	inAPIAdmin = []string{"admin", "api"}
	inAPIRead  = []string{"api:read", "api"}
	inAPI      = []string{"api"}
)

// catalogue is the one place where actions are described; the schema, the
// index and the documentation follow from it.
var catalogue = []ActionInfo{
	{Connect, nil, []ResourceType{Target, Database}, "open a session on a database of a target"},
	{Reveal, nil, []ResourceType{Column}, "see the true values of a sensitive column"},
	{Approve, nil, []ResourceType{Target, Database}, "lift approval rules for what others ask on a target"},

	{AdminApply, inAPIAdmin, onCluster, "plan and apply the configuration"},
	{AdminCluster, inAPIAdmin, onCluster, "make join tokens, add and remove nodes"},
	{Revoke, inAPI, onCluster, "revoke a subject and undo a revocation"},
	{RecordingsRead, inAPIRead, onTarget, "list, replay and verify recordings"},
	{SessionsRead, inAPIRead, onTarget, "list live sessions"},
	{SessionsWatch, inAPIRead, onTarget, "see what a live session sends and gets, as it is recorded"},
	{EventsRead, inAPIRead, onCluster, "follow the event log"},
	{ApprovalsRead, inAPIRead, onTarget, "list and show approval requests"},
	{StatusRead, inAPIRead, onCluster, "see nodes, leader and health"},
	{StateRead, inAPIRead, onCluster, "see what the cluster had agreed on, now or at a past index"},
	{PolicyExplain, inAPIRead, onCluster, "ask what is decided for somebody, now or at a past index, and why"},

	{PostgresSelect, inRead, onRows, "SELECT, TABLE, VALUES over a table, RETURNING"},
	{PostgresCopyTo, inRead, onCopy, "COPY … TO STDOUT"},
	{PostgresExplain, inRead, onDatabase, "EXPLAIN; the explained statement is judged too"},
	{PostgresDeclareCursor, inRead, onDatabase, "DECLARE … CURSOR; its query is judged too"},
	{PostgresFetch, inRead, onDatabase, "FETCH, MOVE and CLOSE of a cursor"},

	{PostgresInsert, inWrite, onRows, "INSERT"},
	{PostgresUpdate, inWrite, onRows, "UPDATE, ON CONFLICT DO UPDATE"},
	{PostgresDelete, inWrite, onRows, "DELETE"},
	{PostgresMerge, inWrite, onRows, "MERGE"},
	{PostgresTruncate, inWrite, onRows, "TRUNCATE"},
	{PostgresCopyFrom, inWrite, onCopy, "COPY … FROM STDIN"},
	{PostgresLock, inWrite, onTable, "LOCK TABLE, SELECT … FOR UPDATE or SHARE"},
	{PostgresRefreshMatview, inWrite, onTable, "REFRESH MATERIALIZED VIEW"},
	{PostgresLargeObject, inWrite, onDatabase, "read or write large objects"},

	{PostgresCreateTable, inDDL, onTable, "CREATE TABLE, CREATE TABLE AS, SELECT INTO"},
	{PostgresCreateView, inDDL, onTable, "CREATE VIEW, CREATE MATERIALIZED VIEW"},
	{PostgresCreateIndex, inDDL, onTable, "CREATE INDEX, on the table"},
	{PostgresCreateSequence, inDDL, onTable, "CREATE SEQUENCE"},
	{PostgresCreateType, inDDL, onObject, "CREATE TYPE, CREATE DOMAIN"},
	{PostgresCreateFunction, inDDL, onFunction, "CREATE FUNCTION, PROCEDURE or AGGREGATE"},
	{PostgresCreateTrigger, inDDL, onTable, "CREATE TRIGGER, on the table"},
	{PostgresCreateSchema, inDDL, onObject, "CREATE SCHEMA"},
	{PostgresCreateOther, inDDL, onAny, "CREATE of any other kind of object"},
	{PostgresAlterTable, inDDL, onTable, "ALTER TABLE, renames too"},
	{PostgresAlterView, inDDL, onTable, "ALTER VIEW, ALTER MATERIALIZED VIEW"},
	{PostgresAlterIndex, inDDL, onTable, "ALTER INDEX"},
	{PostgresAlterSequence, inDDL, onTable, "ALTER SEQUENCE"},
	{PostgresAlterType, inDDL, onObject, "ALTER TYPE, ALTER DOMAIN"},
	{PostgresAlterFunction, inDDL, onFunction, "ALTER FUNCTION, PROCEDURE, ROUTINE or AGGREGATE"},
	{PostgresAlterTrigger, inDDL, onTable, "ALTER TRIGGER, on the table"},
	{PostgresAlterSchema, inDDL, onObject, "ALTER SCHEMA"},
	{PostgresAlterOther, inDDL, onAny, "ALTER of any other kind of object"},
	{PostgresDropTable, inDDL, onTable, "DROP TABLE"},
	{PostgresDropView, inDDL, onTable, "DROP VIEW, DROP MATERIALIZED VIEW"},
	{PostgresDropIndex, inDDL, onTable, "DROP INDEX"},
	{PostgresDropSequence, inDDL, onTable, "DROP SEQUENCE"},
	{PostgresDropType, inDDL, onObject, "DROP TYPE, DROP DOMAIN"},
	{PostgresDropFunction, inDDL, onFunction, "DROP FUNCTION, PROCEDURE, ROUTINE or AGGREGATE"},
	{PostgresDropTrigger, inDDL, onTable, "DROP TRIGGER, on the table"},
	{PostgresDropSchema, inDDL, onObject, "DROP SCHEMA"},
	{PostgresDropOther, inDDL, onAny, "DROP of any other kind of object"},
	{PostgresComment, inDDL, onAny, "COMMENT ON"},
	{PostgresImportForeignSchema, inDDL, onObject, "IMPORT FOREIGN SCHEMA"},

	{PostgresSet, inSession, onDatabase, "SET of a setting that is not pinned"},
	{PostgresReset, inSession, onDatabase, "RESET"},
	{PostgresShow, inSession, onDatabase, "SHOW"},
	{PostgresTransaction, inSession, onDatabase, "BEGIN, COMMIT, ROLLBACK, SAVEPOINT, RELEASE, SET TRANSACTION, SET CONSTRAINTS"},
	{PostgresPrepare, inSession, onDatabase, "PREPARE and DEALLOCATE; the prepared statement is judged too"},
	{PostgresDiscard, inSession, onDatabase, "DISCARD"},
	{PostgresListen, inSession, onDatabase, "LISTEN and UNLISTEN"},
	{PostgresNotify, inSession, onDatabase, "NOTIFY"},

	{PostgresCall, inPostgres, onFunction, "CALL, and any function, operator or cast that is not built in and known to be pure"},

	{PostgresAnalyze, inMaintain, onTable, "ANALYZE"},
	{PostgresVacuum, inMaintain, onTable, "VACUUM"},
	{PostgresReindex, inMaintain, onTable, "REINDEX"},
	{PostgresCluster, inMaintain, onTable, "CLUSTER"},

	{PostgresDo, inAdmin, onDatabase, "DO: code of the caller's own, nothing in it can be judged"},
	{PostgresSetRole, inAdmin, onDatabase, "SET ROLE, SET SESSION AUTHORIZATION"},
	{PostgresGrant, inAdmin, onAny, "GRANT of privileges or roles"},
	{PostgresRevokePrivilege, inAdmin, onAny, "REVOKE of privileges or roles"},
	{PostgresAlterPrivileges, inAdmin, onObject, "ALTER DEFAULT PRIVILEGES"},
	{PostgresCreateRole, inAdmin, onDatabase, "CREATE ROLE, USER or GROUP"},
	{PostgresAlterRole, inAdmin, onDatabase, "ALTER ROLE, USER or GROUP"},
	{PostgresDropRole, inAdmin, onDatabase, "DROP ROLE, USER or GROUP"},
	{PostgresReassignOwned, inAdmin, onDatabase, "REASSIGN OWNED, DROP OWNED"},
	{PostgresCreateDatabase, inAdmin, onDatabase, "CREATE DATABASE"},
	{PostgresAlterDatabase, inAdmin, onDatabase, "ALTER DATABASE"},
	{PostgresDropDatabase, inAdmin, onDatabase, "DROP DATABASE"},
	{PostgresCreateExtension, inAdmin, onDatabase, "CREATE EXTENSION"},
	{PostgresAlterExtension, inAdmin, onDatabase, "ALTER EXTENSION"},
	{PostgresDropExtension, inAdmin, onDatabase, "DROP EXTENSION"},
	{PostgresAlterSystem, inAdmin, onDatabase, "ALTER SYSTEM"},
	{PostgresCheckpoint, inAdmin, onDatabase, "CHECKPOINT"},
	{PostgresLoad, inAdmin, onDatabase, "LOAD of a shared library"},
	{PostgresSecurityLabel, inAdmin, onAny, "SECURITY LABEL"},
	{PostgresCopyFile, inAdmin, onCopy, "COPY to or from a file of the server"},
	{PostgresCopyProgram, inAdmin, onCopy, "COPY to or from a program on the server"},
}

// groupDescriptions are the action groups and what each is for.
var groupDescriptions = map[string]string{
	"postgres":          "everything a statement can do",
	"postgres:read":     "reading rows, without calling code",
	"postgres:write":    "changing rows",
	"postgres:ddl":      "creating, changing and dropping objects of a schema",
	"postgres:session":  "what concerns the session only",
	"postgres:maintain": "ANALYZE, VACUUM, REINDEX, CLUSTER",
	"postgres:admin":    "roles, privileges, databases, extensions and code of the caller's own",
	"api":               "the whole API but for approving",
	"api:read":          "seeing the cluster's state, sessions and recordings",
	"admin":             "changing the cluster and its configuration",
}

// Catalogue lists every action in a fixed order. The caller owns the slice;
// what it points to must not be changed.
func Catalogue() []ActionInfo { return slices.Clone(catalogue) }

var actionsByName = func() map[Action]*ActionInfo {
	m := make(map[Action]*ActionInfo, len(catalogue))
	for i := range catalogue {
		m[catalogue[i].Name] = &catalogue[i]
	}
	return m
}()

// Accepts says whether a may be asked about resources of type t. Decide
// refuses every other pair.
func (a Action) Accepts(t ResourceType) bool {
	info := actionsByName[a]
	return info != nil && slices.Contains(info.Resources, t)
}

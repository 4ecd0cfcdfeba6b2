// Package sql reads PostgreSQL statements: what each does to which resources,
// and whether its results can be masked with certainty. It decides nothing and
// does no I/O but for Load, which reads a target's catalogue.
//
// The grammar is a PostgreSQL one (multigres); its types stay in this package.
package sql

import "github.com/sallyport/sallyport/policy"

// Scope is what a statement's meaning depends on besides its text.
type Scope struct {
	Target     string
	Database   string
	SearchPath []string // pinned by the gateway
	Role       string   // the role that the session acts as
	// PinnedAtStartup says that the pinned settings were given in the start-up
	// packet, so that RESET returns to them.
	PinnedAtStartup bool
	Catalog         *Catalog
	// ParamTypes are the type OIDs that a Parse message gives to parameters, 0
	// for none: a value of a user-defined type can draw calls to its own code.
	ParamTypes []uint32
	// Masked says whether this session must not see the column. It is asked
	// only about columns that the catalogue holds to be sensitive.
	Masked func(column policy.Resource) bool
}

// Statement is what one SQL statement does.
type Statement struct {
	Text string // its own part of the string
	Verb string // command tag, such as SELECT or DROP TABLE
	// Pairs are all (action, resource) pairs that must be permitted. Never
	// empty for a statement without a Problem.
	Pairs []policy.Pair
	// Problem, when not nil, refuses the statement whatever policy says.
	Problem *Problem
	// Reads says that the statement reads a table with columns masked for
	// this session: its errors lose DETAIL, HINT and CONTEXT, its result is
	// masked, and its shape must be known before a row leaves.
	Reads bool
	// Output holds, for a statement with Reads, what each result column is.
	Output []Output
	// Objects are the resolved object ids, sorted, that an approval binds.
	Objects []uint32
	// ChangesCatalog says that analyses made before it may be wrong after it.
	ChangesCatalog bool
	// Prepare, Execute and Deallocate name an SQL-level prepared statement;
	// Inner is the text behind PREPARE.
	Prepare, Execute, Deallocate, Inner string
	// Cursor is the name that DECLARE, FETCH, MOVE or CLOSE names, "*" for CLOSE
	// ALL. FETCH, MOVE and CLOSE take portals of the protocol by that name too.
	Cursor string
	// Shifts says that the statement renames an object or moves it to another
	// schema: a name may mean another object after it.
	Shifts bool
	// Set and Value name a setting and what SET gives it, for tracked settings.
	Set, Value string
	// Transaction is begin, commit, rollback or "" .
	Transaction string
	// CopyIn and CopyOut mark COPY FROM STDIN and COPY TO STDOUT.
	CopyIn, CopyOut bool
}

// Problem is why a statement is refused before policy is asked.
type Problem struct {
	Rule   string // unparsable, masking, pinned-setting, unsupported, limits
	Reason string // what, why, and what to do instead
	Code   string // SQLSTATE
}

// Output is one result column of a statement that reads a masked table.
type Output struct {
	Table  uint32 // OID, 0 for an expression
	Column int16  // attribute number
	Masked bool
}

// Package policy decides. It turns Cedar policies into decisions about what a
// Subject may do to Resources of a Target, and says by which rule.
//
// It does no I/O, keeps no session and starts no goroutine: callers give it a
// Request and act on the Decision. Cedar's types stay inside this package.
//
// The order of answers is fixed: what cannot be decided is refused; a forbid
// wins over any permit; an operation is held for approval when, and only when,
// a permit exists for every pair and approval rules alone stand against it.
package policy

import "time"

// SubjectKind says what kind of caller a Subject is; it is the Cedar entity
// type of the principal.
type SubjectKind string

const (
	Workload SubjectKind = "Workload" // a CI job, a service account, an AI agent
	User     SubjectKind = "User"     // a person
)

// BootstrapProvider is the Provider of whoever holds the certificate that
// `sallyport cluster init` made. No configured provider may have this name.
const BootstrapProvider = "bootstrap"

// Subject is an authenticated caller. It is immutable once made.
type Subject struct {
	Kind     SubjectKind
	Provider string // name of the identity provider in the configuration, or BootstrapProvider
	Issuer   string // the token's iss; empty for certificates
	Name     string // the token's sub, or the certificate's common name

	Groups []string
	// Claims are the string, boolean, integer and string-list claims of the
	// token that the provider's configuration passes on, by claim name.
	Claims map[string]any
	// Persons are names of people found in the claims (the run's actor, an
	// e-mail address): none of them may approve what this Subject asks.
	Persons []string

	IssuedAt  time.Time // iat; a revocation's undo never revives tokens issued before it
	ExpiresAt time.Time
	TokenID   string // jti, or a digest of the token when it has none; never the token
}

// ID is the subject as policies, revocations and records name it:
// "provider/name", for example "ci/repo:acme/shop:ref:refs/heads/main".
func (s *Subject) ID() string { return s.Provider + "/" + s.Name }

// Action is what is to be done, such as "postgres:select", "connect",
// "approve" or "admin:apply". Catalogue lists them all with their groups.
type Action string

// ResourceType is the Cedar entity type of a Resource.
type ResourceType string

const (
	Cluster  ResourceType = "Cluster"  // Path: {}
	Target   ResourceType = "Target"   // Path: {target}
	Database ResourceType = "Database" // Path: {target, database}
	Schema   ResourceType = "Schema"   // Path: {target, database, schema}
	Table    ResourceType = "Table"    // Path: {target, database, schema, table}; views, sequences and indexes too
	Column   ResourceType = "Column"   // Path: {target, database, schema, table, column}
	Function ResourceType = "Function" // Path: {target, database, schema, function}; schema is "" when not resolved
)

// Resource is a thing acted on. Each is `in` its parent: a Column in its
// Table, a Table and a Function in their Schema, up to the Target, in the Cluster.
type Resource struct {
	Type ResourceType
	Path []string
}

// Pair is one thing a statement does to one resource.
type Pair struct {
	Action   Action
	Resource Resource
}

// Request asks whether Subject may do all of Pairs at once.
type Request struct {
	Subject *Subject
	Pairs   []Pair
	Context Context
}

// Context is what a rule may ask about besides who, what and on what.
type Context struct {
	Now           time.Time // passed in so that deciding stays a function of its input
	Profile       string    // the target profile named at login, "" for none
	Database      string
	ClientAddr    string // IP address of the caller, without port
	Protocol      string // "postgres", "api"
	InTransaction bool   // an explicit transaction block is open

	// Approved lists the ids of approval rules that an approver has lifted for
	// exactly this operation. Nil before any approval.
	Approved []string
}

// Effect is a Decision's verdict. The zero value refuses.
type Effect uint8

const (
	Refuse Effect = iota
	Permit
	Hold // only approval rules stand against it; Obligations.Approval says which
)

// Decision is the answer to a Request.
type Decision struct {
	Effect Effect
	// Rule is the id of the rule that decided: the forbid that stood against
	// it, the permit that allowed it, or "default-deny" when no permit covers
	// a pair, or "policy-error" when a rule could not be evaluated.
	Rule   string
	Reason string // one sentence a caller can act on; names the action and the resource
	// Pair is the index in Request.Pairs of the pair that decided a refusal.
	Pair        int
	Obligations Obligations
	// Volatile says that a rule about one of the actions asks for the time: the
	// decision must not be cached. Any other is good for as long as Set,
	// Subject, Pairs and the Context without Now are the same.
	Volatile bool
}

// Durability is how safe a command's record must be before it is forwarded.
type Durability uint8

const (
	Kernel  Durability = iota // in the kernel's hands: survives the process
	Durable                   // fsynced
)

// Obligations are what a Decision owes; of several, the strictest holds.
type Obligations struct {
	Durability Durability
	Approval   *Approval // set when Effect is Hold
	// Tolerance is the session's when connect is permitted, else Strict.
	Tolerance Tolerance
}

// Approval is what must be granted before a held operation runs.
type Approval struct {
	Rules   []string      // ids of the rules to lift, sorted
	Groups  []string      // from @approval("dba"): approvers must be in every one of these groups, besides being permitted `approve`
	Count   int           // how many different approvers (the largest asked for)
	Expires time.Duration // how long the request may wait (the shortest asked for)
	// InTransaction is how long a hold inside an open transaction may last;
	// zero, the default, refuses it.
	InTransaction time.Duration
}

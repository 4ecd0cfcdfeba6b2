package postgres

import (
	"context"
	"crypto/sha256"
	"slices"
	"strings"
	"time"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/postgres/sql"
)

const (
	// maxAnalyses and maxAnalysisBytes bound a session's cache of analyses.
	maxAnalyses      = 512
	maxAnalysisBytes = 4 << 20
	// lookEvery is how often a session looks whether the catalogue or what is
	// masked for it has changed without its doing.
	lookEvery = time.Second
	// catalogWait bounds loading a catalogue.
	catalogWait = 30 * time.Second
)

// world is what analyses depend on; analyses of an older world are made again.
// scope, masking and masked never change; index and at are the request
// goroutine's.
type world struct {
	scope   *sql.Scope
	masking bool   // some column is masked for this session
	index   uint64 // policy index at which that was decided
	masked  map[string]bool
	at      time.Time
}

// analysis is what a statement string does, in one world.
type analysis struct {
	text    string
	world   *world
	parts   []sql.Statement
	pairs   []policy.Pair // of all parts
	problem *protocols.Refusal

	reads    bool // some part's result or errors may show masked columns
	changes  bool // some part changes the catalogue
	shifts   bool // and may make a name mean something that existed before
	resolves bool // some part is EXECUTE: what it does depends on a name
	prepares bool // all parts are PREPARE: nothing runs
	copyIn   bool
	renames  bool // some part changes names of prepared statements
	cursors  bool // some part names a cursor
	sets     bool // some part is SET, of a setting that is tracked
	plain    bool // one SELECT or the like: its result's shape is fixed at Parse
	weight   int  // bytes that it takes, by estimate
	memo     protocols.Memo
}

// statement is a prepared statement.
type statement struct {
	text  string
	raw   []byte    // the same, for the record
	oids  []uint32  // parameter types as the client declared them
	an    *analysis // at Parse; the request goroutine alone replaces it
	sqlly bool      // made by PREPARE

	// Guarded by conversation.mu.
	params []uint32 // parameter types as the target resolved them
	shape  []column
	shaped bool
	sealed bool // its errors are scrubbed
}

func (s *statement) described() bool { return s != nil && s.shaped }
func (s *statement) reads() bool     { return s.sealed }

// portal is a bound statement.
type portal struct {
	stmt     *statement
	an       *analysis            // at Bind
	admitted *protocols.Admission // when approval was given for it
	digest   [sha256.Size]byte    // of what was approved
	values   []byte               // digest of its parameters, when digest is set

	// The response goroutine's.
	planned bool
	cols    []column
}

// parameters takes note of a ParameterDescription.
func (s *statement) parameters(frame []byte) error {
	r := body(frame)
	n := r.count(4)
	params := make([]uint32, n)
	for i := range params {
		params[i] = uint32(r.int32())
	}
	if !r.done() {
		return malformed("ParameterDescription")
	}
	s.params = params
	return nil
}

// look returns the world as it is now. refresh loads the catalogue anew.
func (q *requests) look(ctx context.Context, refresh bool) error {
	now := q.s.Env.Now()
	index := q.s.Env.PolicyIndex()
	if old := q.world; old != nil && !refresh && index == old.index && now.Sub(old.at) < lookEvery {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, catalogWait)
	defer cancel()
	catalog, err := q.p.cfg.Catalog(ctx, q.a.Target, q.a.Database, refresh)
	if err != nil {
		return &protocols.Refusal{Rule: "catalogue", Reason: "the target's catalogue could not be read: " + err.Error(), Code: "08006"}
	}
	masked := map[string]bool{}
	for _, column := range q.a.Sensitive {
		d, _ := q.s.Env.Decide(&policy.Request{Subject: q.a.Subject, Pairs: []policy.Pair{{Action: policy.Reveal, Resource: column}},
			Context: policy.Context{Now: now, Profile: q.a.Profile, Database: q.a.Database, ClientAddr: q.a.Client, Protocol: Name}})
		masked[key(column)] = d.Effect != policy.Permit
	}
	if old := q.world; old != nil && old.scope.Catalog.Equal(catalog) && mapsEqual(old.masked, masked) {
		old.index, old.at = index, now // analyses stay good
		return nil
	}
	w := &world{index: index, at: now, masked: masked}
	w.scope = &sql.Scope{
		Target: q.a.Target, Database: q.a.Database, SearchPath: q.searchPath, Role: q.role, Catalog: catalog,
		// A sensitive column that the node did not list is masked.
		Masked: func(c policy.Resource) bool { m, known := masked[key(c)]; return m || !known },
	}
	w.masking = w.scope.Masking()
	q.world = w
	clear(q.analyses)
	q.analysisBytes = 0
	q.mu.Lock()
	q.guard = w.masking
	q.mu.Unlock()
	return nil
}

func key(r policy.Resource) string { return string(r.Type) + "\x00" + strings.Join(r.Path, "\x00") }

func mapsEqual(a, b map[string]bool) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || w != v {
			return false
		}
	}
	return true
}

// firstUserOID is the least OID that something made by a user can have
// (FirstNormalObjectId in PostgreSQL's transam.h).
const firstUserOID = 16384

// analyse says what text does in the world as it is now, with parameters of
// the types that a Parse declared, if any. The answer is shared: nothing but
// its memo is changed.
func (q *requests) analyse(ctx context.Context, text []byte, params ...uint32) (*analysis, error) {
	if err := q.look(ctx, false); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(params, func(oid uint32) bool { return oid >= firstUserOID }) {
		// A parameter of a user's type can make operators and functions mean
		// the user's own. It is rare, and not worth a place in the cache.
		scope := *q.world.scope
		scope.ParamTypes = params
		return newAnalysis(string(text), q.world, &scope), nil
	}
	if an, ok := q.analyses[string(text)]; ok {
		return an, nil
	}
	an := newAnalysis(string(text), q.world, q.world.scope)
	if an.unknown() && !q.refreshed() {
		// Somebody else may have made what it names.
		q.lastRefresh = q.s.Env.Now()
		if err := q.look(ctx, true); err != nil {
			return nil, err
		}
		an = newAnalysis(string(text), q.world, q.world.scope)
	}
	if an.weight > maxAnalysisBytes/4 {
		return an, nil // one giant must not push out all others
	}
	if len(q.analyses) >= maxAnalyses || q.analysisBytes+an.weight > maxAnalysisBytes {
		clear(q.analyses)
		q.analysisBytes = 0
	}
	q.analyses[an.text] = an
	q.analysisBytes += an.weight
	return an, nil
}

// weigh estimates the bytes that an takes. Names within pairs are the
// catalogue's own strings, or pieces of the text.
func (an *analysis) weigh() int {
	const (
		base     = 512
		perPart  = 512
		perPair  = 2 * 160 // in the part and in the list of all, with a path of five strings
		perOut   = 16
		perOther = 8
	)
	n := base + len(an.text)
	for i := range an.parts {
		p := &an.parts[i]
		n += perPart + len(p.Value) + perPair*len(p.Pairs) + perOut*len(p.Output) + perOther*len(p.Objects)
	}
	return n
}

// weight is the memory behind a prepared statement.
func (s *statement) weight() int {
	n := len(s.raw) + 16*(len(s.oids)+len(s.shape))
	if s.an != nil {
		n += s.an.weight
	}
	return n
}

// refreshed keeps statements with unknown names from loading the catalogue
// more than once a second.
func (q *requests) refreshed() bool {
	return q.s.Env.Now().Sub(q.lastRefresh) < time.Second
}

func newAnalysis(text string, w *world, scope *sql.Scope) *analysis {
	an := &analysis{text: text, world: w, prepares: true}
	parts, problem := sql.Analyze(text, scope)
	an.parts = parts
	if problem != nil {
		an.problem = asRefusal(problem)
	}
	for i := range parts {
		p := &parts[i]
		if p.Problem != nil && an.problem == nil {
			an.problem = asRefusal(p.Problem)
		}
		if len(p.Pairs) == 0 && p.Problem == nil && p.Execute == "" && an.problem == nil {
			an.problem = &protocols.Refusal{Rule: "unknown", Reason: "the gateway cannot tell what " + orElse(p.Verb, "this") + " does", Code: "0A000"}
		}
		an.pairs = append(an.pairs, p.Pairs...)
		an.reads = an.reads || p.Reads
		an.changes = an.changes || p.ChangesCatalog
		an.shifts = an.shifts || (p.ChangesCatalog && !additive(p))
		an.resolves = an.resolves || p.Execute != ""
		an.prepares = an.prepares && p.Prepare != ""
		an.copyIn = an.copyIn || p.CopyIn
		an.cursors = an.cursors || p.Cursor != ""
		an.sets = an.sets || p.Set != ""
		an.renames = an.renames || p.Prepare != "" || p.Deallocate != "" || closesAll(p)
	}
	an.prepares = an.prepares && len(parts) > 0
	if len(parts) == 1 {
		switch parts[0].Verb {
		case "SELECT", "INSERT", "UPDATE", "DELETE", "MERGE":
			an.plain = true
		}
	}
	an.weight = an.weigh()
	return an
}

func unsettledCatalog() *protocols.Refusal {
	return &protocols.Refusal{Rule: "masking", Reason: "the catalogue was changed earlier in this transaction, so what is masked in this statement is not certain: commit first", Code: "42501"}
}

// additive says that what a statement does to the catalogue leaves every name
// that meant something with the same meaning.
func additive(p *sql.Statement) bool {
	if p.Shifts { // a rename, whatever the action is called
		return false
	}
	for _, pair := range p.Pairs {
		switch pair.Action {
		case policy.PostgresCreateTable, policy.PostgresCreateIndex, policy.PostgresCreateSequence, policy.PostgresAlterTable, policy.PostgresAlterIndex,
			policy.PostgresAlterSequence, policy.PostgresComment, policy.PostgresSelect, policy.PostgresInsert, policy.PostgresGrant, policy.PostgresRevokePrivilege:
		default:
			return false
		}
	}
	return true
}

// blind says that a statement reads nothing, so that it may run where the
// catalogue is not certain. Inside one string package sql sees to it.
func blind(p *sql.Statement) bool {
	for _, pair := range p.Pairs {
		switch pair.Action {
		case policy.PostgresTransaction, policy.PostgresInsert, policy.PostgresComment, policy.PostgresSet, policy.PostgresShow, policy.PostgresReset, policy.PostgresPrepare,
			policy.PostgresCreateTable, policy.PostgresCreateIndex, policy.PostgresCreateSequence, policy.PostgresCreateType, policy.PostgresCreateSchema,
			policy.PostgresAlterTable, policy.PostgresAlterIndex, policy.PostgresAlterSequence, policy.PostgresAlterType, policy.PostgresAlterSchema,
			policy.PostgresDropTable, policy.PostgresDropView, policy.PostgresDropIndex, policy.PostgresDropSequence, policy.PostgresDropType, policy.PostgresDropSchema,
			policy.PostgresGrant, policy.PostgresRevokePrivilege:
		default:
			return false
		}
	}
	return true
}

// unknown says that the analysis failed for want of a name.
func (an *analysis) unknown() bool {
	return an.problem != nil && slices.Contains([]string{"42P01", "42703", "42883", "42704", "3F000"}, an.problem.Code)
}

func asRefusal(p *sql.Problem) *protocols.Refusal {
	return &protocols.Refusal{Rule: p.Rule, Reason: p.Reason, Code: p.Code}
}

// closesAll recognises DEALLOCATE ALL and DISCARD ALL; other forms of DISCARD
// leave prepared statements alone.
func closesAll(p *sql.Statement) bool {
	return p.Verb == "DISCARD ALL" || p.Verb == "DEALLOCATE ALL"
}

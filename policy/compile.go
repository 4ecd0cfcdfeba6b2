package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/cedar-policy/cedar-go"
)

// Limits on what Compile takes. Every node compiles every applied set, so a
// set must not cost any of them more than a few seconds, nor overflow a stack.
const (
	maxRules     = 2000     // validation costs up to a few milliseconds a rule
	maxRuleBytes = 16 << 10 // bounds the recursion of parser, validator and evaluator
	maxIDBytes   = 100      // an id is in every record and refusal
)

// Defaults and limits of an approval rule's annotations.
const (
	DefaultApprovalExpiry = 10 * time.Minute
	maxApprovalExpiry     = 24 * time.Hour
	maxInTransaction      = 10 * time.Minute // locks are held all the while
	maxApprovers          = 10
)

// Ids in Decision.Rule that are no rule of a file's.
const (
	RuleDefaultDeny = "default-deny" // no permit covers a pair
	RulePolicyError = "policy-error" // a rule, or the request, could not be evaluated
)

// reservedIDs are what the gateway itself puts where a rule's id stands; a
// rule of that name would make a record say something untrue.
var reservedIDs = []string{RuleDefaultDeny, RulePolicyError, "unparsable", "masking", "pinned-setting", "unsupported", "limits", "revoked", "no-record"}

// File is a policy file. Path is relative, with slashes.
type File struct {
	Path string
	Data []byte
}

// Problem is why files were refused. Line and Column count from 1; 0 means the
// file as a whole.
type Problem struct {
	Path         string
	Line, Column int
	Message      string
}

// String is "path:line: message".
func (p Problem) String() string {
	switch {
	case p.Path == "":
		return p.Message
	case p.Line == 0:
		return p.Path + ": " + p.Message
	}
	return p.Path + ":" + strconv.Itoa(p.Line) + ": " + p.Message
}

// Set is a compiled policy set. It is immutable, but for caches that do not
// show, and safe for concurrent use.
type Set struct {
	rules    []*rule // in order of files, then of their place in the file
	byID     map[cedar.PolicyID]*rule
	actions  map[Action]*actionIndex
	mentions []Mention
	digest   string
	cache    entityCache
}

// rule is one permit or forbid.
type rule struct {
	id       string
	order    int // place in Set.rules; the first of several is the one named
	policy   *cedar.Policy
	reason   string // @reason
	approval *Approval
	durable  Durability
	// tolerance is from @revocation; it means something for connect only.
	tolerance Tolerance
	tolerates bool // @revocation is there
	scope     scope
	uses      uses
	claims    map[string]claimType // that its conditions read
	names     []cedar.EntityUID    // entities that it names
	text      statement
	faulty    bool // inspect has reported it
	path      string
	line      int
	permit    bool
	// permitted is the Reason of a permit, made once.
	permitted string
}

// MentionKind says what a Mention names.
type MentionKind string

const (
	MentionClaim    MentionKind = "claim"    // a claim of the principal
	MentionTarget   MentionKind = "target"   // the target of a resource
	MentionProvider MentionKind = "provider" // the identity provider of a principal
)

// Mention is a rule's mention of something that the rest of the configuration
// must know: misspelt, the rule would never match, and nobody would see it.
type Mention struct {
	Kind MentionKind
	Name string
	Path string
	Line int
}

// Mentions lists what rules name, once a rule, in order of the rules.
func (s *Set) Mentions() []Mention { return slices.Clone(s.mentions) }

// RuleInfo describes a rule for people.
type RuleInfo struct {
	ID   string
	Path string
	Line int
	Text string // without what stands before it, as comments
}

// Rules lists the rules in order of files and places.
func (s *Set) Rules() []RuleInfo {
	out := make([]RuleInfo, len(s.rules))
	for i, r := range s.rules {
		out[i] = RuleInfo{r.id, r.path, r.line, strings.TrimSpace(r.body())}
	}
	return out
}

// Digest is the SHA-256, in hex, over paths and contents of the files.
func (s *Set) Digest() string { return s.digest }

// Len is the number of rules.
func (s *Set) Len() int { return len(s.rules) }

// AnyPermit says whether some permit rule is about action at all. It does not
// say that anyone meets its conditions.
func (s *Set) AnyPermit(action Action) bool {
	ix := s.actions[action]
	return ix != nil && ix.permits.len() > 0
}

// Compile makes a Set of files, whatever their order. It returns every problem
// it finds, sorted by place; with any, the Set is nil. What is refused:
// text that is no Cedar, what the schema does not know (entity types, actions,
// attributes, types that cannot match), unknown or misplaced annotations,
// ids that are not unique, templates, and a set without rules.
func Compile(files []File) (*Set, []Problem) {
	files = slices.Clone(files)
	slices.SortStableFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })

	s := &Set{byID: make(map[cedar.PolicyID]*rule)}
	var problems []Problem
	hash := sha256.New()
	for i, f := range files {
		if i > 0 && files[i-1].Path == f.Path {
			problems = append(problems, Problem{Path: f.Path, Message: "the file is given twice"})
			continue
		}
		for _, part := range [][]byte{[]byte(f.Path), f.Data} {
			var n [8]byte
			binary.BigEndian.PutUint64(n[:], uint64(len(part)))
			hash.Write(n[:])
			hash.Write(part)
		}
		rules, more := parseFile(f)
		problems = append(problems, more...)
		for _, r := range rules {
			r.order = len(s.rules)
			s.rules = append(s.rules, r)
			if first := s.byID[cedar.PolicyID(r.id)]; first != nil {
				problems = append(problems, Problem{Path: r.path, Line: r.line,
					Message: fmt.Sprintf("rule id %q is taken by the rule at %s:%d", r.id, first.path, first.line)})
				continue
			}
			s.byID[cedar.PolicyID(r.id)] = r
		}
	}
	if len(s.rules) > maxRules {
		return nil, []Problem{{Message: fmt.Sprintf("%d rules; a set has at most %d", len(s.rules), maxRules)}}
	}
	if len(s.rules) == 0 && len(problems) == 0 {
		return nil, []Problem{{Message: "no policy rules: with an empty set everything would be refused; write at least one permit rule in a .cedar file"}}
	}
	mentions, more := validateRules(s.rules)
	problems = append(problems, more...)
	if len(problems) > 0 {
		slices.SortStableFunc(problems, func(a, b Problem) int {
			if c := strings.Compare(a.Path, b.Path); c != 0 {
				return c
			}
			return a.Line - b.Line
		})
		return nil, slices.Compact(problems)
	}
	s.mentions = mentions
	s.actions = buildIndex(s.rules)
	s.digest = hex.EncodeToString(hash.Sum(nil))
	return s, nil
}

// statement is the text of one policy with where it begins in its file.
type statement struct {
	text string
	line int // of the first byte of text, from 1
	col  int // bytes before it on that line
}

// split cuts Cedar text at the semicolons that end policies, so that each is
// parsed by itself: one error does not hide the others. What follows the last
// semicolon is a statement too, unless it is blank.
func split(data string) []statement {
	var out []statement
	cur := statement{line: 1}
	start, line, lineStart, blank := 0, 1, 0, true
	for i := 0; i < len(data); {
		end, space := lexeme(data, i)
		if n := strings.Count(data[i:end], "\n"); n > 0 {
			line += n
			lineStart = i + strings.LastIndexByte(data[i:end], '\n') + 1
		}
		blank = blank && space
		if data[i] == ';' {
			cur.text = data[start:end]
			out = append(out, cur)
			start, blank = end, true
			cur = statement{line: line, col: end - lineStart}
		}
		i = end
	}
	if !blank {
		cur.text = data[start:]
		out = append(out, cur)
	}
	return out
}

// lexeme says where what begins at data[i] ends, and whether Cedar skips it: a
// comment, a string, or one byte of anything else. What is not closed ends
// with the data and is left to the parser to complain about.
func lexeme(data string, i int) (end int, space bool) {
	rest := data[i:]
	switch {
	case strings.HasPrefix(rest, "//"):
		if n := strings.IndexByte(rest, '\n'); n >= 0 {
			return i + n, true
		}
		return len(data), true
	case strings.HasPrefix(rest, "/*"):
		if n := strings.Index(rest[2:], "*/"); n >= 0 {
			return i + 2 + n + 2, true
		}
		return len(data), false
	case rest[0] == '"':
		for n := 1; n < len(rest); n++ {
			switch rest[n] {
			case '\\':
				n++
			case '"':
				return i + n + 1, false
			}
		}
		return len(data), false
	}
	return i + 1, strings.IndexByte(" \t\r\n", rest[0]) >= 0
}

func parseFile(f File) (rules []*rule, problems []Problem) {
	if !utf8.Valid(f.Data) {
		return nil, []Problem{{Path: f.Path, Message: "the file is not UTF-8 text"}}
	}
	for n, st := range split(string(f.Data)) {
		if len(st.text) > maxRuleBytes {
			problems = append(problems, Problem{Path: f.Path, Line: st.line,
				Message: fmt.Sprintf("a rule of %d bytes; at most %d are allowed (is a semicolon missing?)", len(st.text), maxRuleBytes)})
			continue
		}
		if n >= maxRules {
			return nil, []Problem{{Path: f.Path, Line: st.line, Message: fmt.Sprintf("more than %d rules", maxRules)}}
		}
		list, err := cedar.NewPolicyListFromBytes(f.Path, []byte(st.text))
		if err != nil {
			line, col, msg := parseError(err)
			if line == 1 && col > 0 {
				col += st.col
			}
			problems = append(problems, Problem{Path: f.Path, Line: st.line + line - 1, Column: col, Message: msg})
			continue
		}
		for _, p := range list { // one, as split cuts at semicolons
			r := &rule{id: f.Path + "#" + strconv.Itoa(n+1), policy: p, path: f.Path, line: st.line + p.Position().Line - 1}
			for _, msg := range r.annotate(p) {
				problems = append(problems, Problem{Path: f.Path, Line: r.line, Message: msg})
			}
			wrong := r.inspect(st)
			if r.tolerates && r.permit && len(wrong) == 0 && !r.scope.coversAction(actionsByName[Connect]) {
				wrong = append(wrong, Problem{Path: f.Path, Line: r.line, Message: "@revocation on a rule that is not about connect has no meaning: a session has one mode from its beginning"})
			}
			r.faulty = len(wrong) > 0
			problems = append(problems, wrong...)
			rules = append(rules, r)
		}
	}
	return rules, problems
}

var errorPosition = regexp.MustCompile(`(?:<input>|^|\s):?(\d+):(\d+)`)

// parseError takes line and column out of Cedar's message; line 1 if it has none.
func parseError(err error) (line, col int, msg string) {
	msg = strings.TrimPrefix(err.Error(), "parser error: ")
	m := errorPosition.FindStringSubmatchIndex(msg)
	if m == nil {
		return 1, 0, msg
	}
	line, _ = strconv.Atoi(msg[m[2]:m[3]])
	col, _ = strconv.Atoi(msg[m[4]:m[5]])
	rest := strings.TrimLeft(msg[m[5]:], ": ")
	return max(line, 1), col, "syntax error at " + rest
}

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:/-]*$`)

// annotate reads the annotations of p into r and says what is wrong with them.
func (r *rule) annotate(p *cedar.Policy) (wrong []string) {
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	r.permit = p.Effect() == cedar.Permit
	notes := map[string]string{}
	var names []string
	for k, v := range p.Annotations() {
		notes[string(k)] = string(v)
		names = append(names, string(k))
	}
	slices.Sort(names)

	group, isApproval := notes["approval"]
	if isApproval && r.permit {
		bad("@approval on a permit rule: an approval rule stands in the way, so write forbid; what it forbids runs once approved")
	}
	if isApproval {
		r.approval = &Approval{Count: 1, Expires: DefaultApprovalExpiry}
		if group == "" {
			bad(`@approval needs the group whose members may approve, as in @approval("dba")`)
		} else {
			r.approval.Groups = []string{group}
		}
	}
	for _, name := range names {
		v := notes[name]
		switch name {
		case "id":
			if len(v) > maxIDBytes || !idPattern.MatchString(v) {
				bad("@id(%q): an id is at most %d of the characters A-Z a-z 0-9 . _ : / - and begins with a letter or digit", v, maxIDBytes)
			} else if slices.Contains(reservedIDs, v) {
				bad("@id(%q): the gateway uses this id itself", v)
			} else {
				r.id = v
			}
		case "reason":
			if v == "" || len(v) > 500 {
				bad("@reason must have 1 to 500 bytes of text")
			}
			r.reason = v
		case "approval":
		case "approvals", "expires", "hold_in_transaction":
			if !isApproval {
				bad("@%s without @approval has no meaning", name)
				continue
			}
			switch name {
			case "approvals":
				n, err := strconv.Atoi(v)
				if err != nil || n < 1 || n > maxApprovers {
					bad("@approvals(%q): want a number from 1 to %d", v, maxApprovers)
				}
				r.approval.Count = n
			case "expires":
				r.approval.Expires = r.duration(name, v, maxApprovalExpiry, bad)
			case "hold_in_transaction":
				r.approval.InTransaction = r.duration(name, v, maxInTransaction, bad)
			}
		case "durability":
			switch {
			case !r.permit:
				bad("@durability belongs on permit rules: it says how safe the record of what they permit must be")
			case v == "durable":
				r.durable = Durable
			case v != "kernel":
				bad(`@durability(%q): want "kernel" or "durable"`, v)
			}
		case "revocation":
			r.tolerates = true
			var err error
			if r.tolerance, err = parseTolerance(v); err != nil {
				wrong = append(wrong, err.Error())
			}
			if !r.permit {
				bad("@revocation belongs on permit rules: it says how long sessions that they permit run on when their node cannot learn what was revoked")
			}
		default:
			bad("unknown annotation @%s; known are @id, @reason, @approval, @approvals, @expires, @hold_in_transaction, @durability and @revocation", name)
		}
	}
	if isApproval {
		r.approval.Rules = []string{r.id}
	}
	if r.permit {
		r.permitted = "permitted by rule " + r.id
		if r.reason != "" {
			r.permitted += ": " + r.reason
		}
	}
	return wrong
}

// duration reads a time between one second and most.
func (r *rule) duration(name, v string, most time.Duration, bad func(string, ...any)) time.Duration {
	d, err := time.ParseDuration(v)
	if err != nil || d < time.Second || d > most {
		bad(`@%s(%q): want a time from 1s to %s, such as "30s" or "10m"`, name, v, most)
	}
	return d
}

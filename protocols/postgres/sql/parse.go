package sql

import (
	"fmt"
	"reflect"
	"strings"
	"unicode/utf8"

	"github.com/multigres/multigres/go/common/parser"
	"github.com/multigres/multigres/go/common/parser/ast"
)

// parsed is one statement of a query string.
type parsed struct {
	text   string
	tokens []token
	tree   ast.Stmt
}

func unparsable(format string, args ...any) *Problem {
	return &Problem{Rule: "unparsable", Reason: fmt.Sprintf(format, args...), Code: "42601"}
}

func unsupported(format string, args ...any) *Problem {
	return &Problem{Rule: "unsupported", Reason: fmt.Sprintf(format, args...), Code: "0A000"}
}

// tooMuch is for statements beyond a limit of the analysis.
func tooMuch(code, format string, args ...any) *Problem {
	return &Problem{Rule: "limits", Reason: fmt.Sprintf(format, args...), Code: code}
}

// errorWords are words without which the grammar cannot meet a mistake that it
// reports and reads on after.
var errorWords = words("is isnull notnull unique encoding set rows range groups limit value assertion")

// tooLong bounds what the text costs before the grammar sees it. The grammar
// reads the text from its beginning at each mistake that it finds, so that the
// words that can be mistaken times the length are bounded too.
func tooLong(text string, tokens []token) *Problem {
	if len(tokens) > maxTokens {
		return tooMuch("54001", "the query string has more than %d words and signs; split it", maxTokens)
	}
	names, mistakes := 0, 0
	role := false // CREATE ROLE: any word may be an option, and a mistaken one
	for i, t := range tokens {
		if t.kind != tokenWord && t.kind != tokenName {
			continue
		}
		switch t.value {
		case "null", "true", "false", "default":
			continue // what rows of values are made of
		case "role", "user", "group":
			role = role || i > 0 && (tokens[i-1].value == "create" || tokens[i-1].value == "alter")
		}
		names++
		if role || errorWords[t.value] {
			mistakes++
		}
	}
	if names > maxNames {
		return tooMuch("54001", "the query string has more than %d names and keywords; split it", maxNames)
	}
	if mistakes*len(text) > maxMistakes {
		return tooMuch("54001", "the query string is too long for a statement of this kind; split it")
	}
	return nil
}

// parse reads a query string. Three things must agree before a tree is
// trusted: this package's scanner and the grammar's cut the same tokens; the
// grammar finds as many statements as there are spans between semicolons; and
// every identifier of a span is found again in its tree, so that no part of
// the text was dropped on the way.
func parse(text string) (out []parsed, problem *Problem) {
	switch {
	case len(text) > MaxStatement:
		return nil, &Problem{Rule: "unsupported", Reason: fmt.Sprintf("the query string has %d bytes; the limit is %d", len(text), MaxStatement), Code: "54000"}
	case strings.IndexByte(text, 0) >= 0:
		return nil, unparsable("the query string holds a NUL byte")
	case !utf8.ValidString(text):
		return nil, unparsable("the query string is not valid UTF-8; set client_encoding to UTF8")
	}
	tokens, reason := scan(text)
	if reason != "" {
		return nil, unparsable("%s", reason)
	}
	if len(tokens) == 0 {
		return nil, nil
	}
	if problem := tooLong(text, tokens); problem != nil {
		return nil, problem
	}
	spans := split(text, tokens)
	if len(spans) == 0 {
		return nil, nil
	}
	if len(spans) > MaxStatements {
		return nil, &Problem{Rule: "unsupported", Reason: fmt.Sprintf("the query string holds %d statements; the limit is %d", len(spans), MaxStatements), Code: "54000"}
	}
	defer func() {
		if r := recover(); r != nil {
			out, problem = nil, unparsable("the statement cannot be parsed")
		}
	}()
	if problem := compareTokens(text, tokens); problem != nil {
		return nil, problem
	}
	trees, err := parser.ParseSQL(text)
	if err != nil {
		return nil, unparsable("the statement cannot be parsed: %s", err)
	}
	if len(trees) != len(spans) {
		return nil, unparsable("the statement cannot be parsed: its parts are not clear")
	}
	out = make([]parsed, len(spans))
	for i, s := range spans {
		if isNil(trees[i]) {
			return nil, unparsable("the statement cannot be parsed: its parts are not clear")
		}
		out[i] = parsed{text: s.text, tokens: s.tokens, tree: trees[i]}
	}
	return out, nil
}

// compareTokens runs the grammar's scanner beside ours.
func compareTokens(text string, tokens []token) *Problem {
	lexer := parser.NewLexer(text)
	for _, want := range tokens {
		got := lexer.NextToken()
		same := got.Type != parser.EOF && got.Type != parser.INVALID && got.Position == want.start && !lexer.HasErrors()
		if same {
			switch want.kind {
			case tokenWord:
				if got.Value.Keyword != "" {
					same = got.Value.Keyword == want.value
				} else {
					same = got.Type == parser.IDENT && got.Value.Str == want.value
				}
			case tokenName:
				same = got.Type == parser.IDENT && got.Value.Str == want.value
			case tokenString:
				switch got.Type {
				case parser.SCONST, parser.BCONST, parser.XCONST:
					same = !want.exact || got.Type == parser.SCONST && got.Value.Str == want.value
				default:
					same = false
				}
			case tokenNumber:
				same = (got.Type == parser.ICONST || got.Type == parser.FCONST) && got.Text == want.value
			case tokenParam:
				same = got.Type == parser.PARAM && got.Text == want.value
			case tokenOperator:
				same = got.Text == want.value
			}
		}
		if !same {
			return unparsable("the text at byte %d can be read in more than one way", want.start+1)
		}
	}
	if got := lexer.NextToken(); got.Type != parser.EOF {
		return unparsable("the text at byte %d can be read in more than one way", got.Position+1)
	}
	return nil
}

// inspect checks that every node of the tree is of a known type, that the tree
// is not too deep, and that every identifier of the text is in it.
func inspect(p *parsed) *Problem {
	i := inspector{names: make(map[string]int, 16)}
	isDot := func(at int) bool {
		return at >= 0 && at < len(p.tokens) && p.tokens[at].kind == tokenOperator && p.tokens[at].value == "."
	}
	for at, t := range p.tokens {
		// Keywords that are not reserved may be names too. Beside a dot they are;
		// elsewhere it cannot be told from the text, so they are not counted here
		// (plainSelect counts those that name masked columns).
		if t.kind == tokenName || t.kind == tokenWord && (!isKeyword(t.value) || isDot(at-1) || isDot(at+1)) {
			i.names[t.value]++
		}
	}
	i.visit(p.tree)
	if i.problem != nil {
		return i.problem
	}
	for _, t := range p.tokens {
		if (t.kind == tokenWord || t.kind == tokenName) && i.names[t.value] > 0 && !i.parts[t.value] { // a setting's name has its dots inside
			return unsupported("the grammar of this gateway does not account for %q in the statement; write it more plainly", t.value)
		}
	}
	return nil
}

// accounts says whether the tree holds name as often as the text does, for a
// name that may be a keyword.
func accounts(p *parsed, name string) bool {
	n := 0
	for _, t := range p.tokens {
		if (t.kind == tokenName || t.kind == tokenWord) && t.value == name {
			n++
		}
	}
	var walk func(ast.Node)
	walk = func(node ast.Node) {
		eachText(node, func(s string) {
			if s == name {
				n--
			}
		})
		eachChild(node, walk)
	}
	walk(p.tree)
	return n <= 0
}

func isKeyword(name string) bool { return parser.IsKeyword(name) }

type inspector struct {
	names   map[string]int
	parts   map[string]bool // of texts with dots in them
	depth   int
	problem *Problem
}

func (i *inspector) visit(n ast.Node) {
	if i.problem != nil {
		return
	}
	if i.depth++; i.depth > maxDepth {
		i.problem = &Problem{Rule: "unsupported", Reason: "the statement is nested too deeply", Code: "54001"}
		return
	}
	if !eachChild(n, i.visit) {
		i.problem = unsupported("the statement holds %s, which this gateway does not know", nodeName(n))
		return
	}
	if i.problem == nil {
		eachText(n, i.text)
		for _, w := range impliedWords(n) {
			i.text(w)
		}
	}
	i.depth--
}

// impliedWords are words that the grammar turns into flags though they are no
// keywords: the tree does not hold them.
func impliedWords(n ast.Node) []string {
	switch n := n.(type) {
	case *ast.PartitionBoundSpec:
		return []string{"modulus", "remainder"}
	case *ast.RoleSpec:
		if n.Roletype == ast.ROLESPEC_PUBLIC {
			return []string{"public"}
		}
	case *ast.CreatePolicyStmt:
		return []string{"permissive", "restrictive"}
	case *ast.DefElem:
		switch n.Defname {
		case "canlogin", "isreplication", "superuser", "inherit", "createdb", "createrole", "bypassrls":
			w := strings.TrimPrefix(strings.TrimPrefix(n.Defname, "can"), "is")
			return []string{w, "no" + w}
		}
	}
	return nil
}

func (i *inspector) text(s string) {
	if n, ok := i.names[s]; ok && n > 0 {
		i.names[s] = n - 1
	} else if strings.IndexByte(s, '.') >= 0 {
		if i.parts == nil {
			i.parts = map[string]bool{}
		}
		for part := range strings.SplitSeq(s, ".") {
			i.parts[part] = true
		}
	}
}

func nodeName(n ast.Node) string {
	if n == nil {
		return "nothing"
	}
	t := reflect.TypeOf(n)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t.Name()
}

package sql

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// This scanner is independent of the grammar's own. Both must cut a text into
// the same tokens, or the text is refused: a disagreement about where a string
// or a comment ends is how statements are hidden from a gateway. It follows
// PostgreSQL's scan.l with standard_conforming_strings on, and refuses what
// versions of the server read differently (123abc, \v as a space, N'…').

// Limits of what is analysed.
const (
	// MaxStatement is the longest query string, in bytes.
	MaxStatement = 1 << 20
	// MaxStatements is how many statements a query string may hold.
	MaxStatements = 1000
	// maxNesting bounds brackets, and maxDepth the depth of the tree: the
	// analysis recurses. The server's own stack of 2 MB ends near there too.
	maxNesting = 400
	maxDepth   = 3000
	// maxIdentifier is NAMEDATALEN-1: the server cuts longer names, so that two
	// spellings would name one table.
	maxIdentifier = 63
	// maxDollarWork bounds dollar-quoted strings times the length of the text:
	// the grammar's scanner copies the rest of the text at each of them.
	maxDollarWork = 128 << 20
	// maxTokens, maxNames and maxMistakes keep an analysis below about a second
	// and 200 MB: they are what a megabyte of rows in an INSERT needs. maxNames
	// counts identifiers and keywords; maxMistakes is a number of words times
	// the bytes of the text.
	maxTokens   = 400_000
	maxNames    = 100_000
	maxMistakes = 1 << 30
	// maxNamed is how many different tables, and functions, a statement may
	// name: each is asked of the policy. It bounds WITH queries as well.
	maxNamed = 2000
	// maxOutput is the server's own limit of result columns, and maxFrom our
	// limit of tables beside masked columns.
	maxOutput = 1664
	maxFrom   = 1000
)

type tokenKind uint8

const (
	tokenWord     tokenKind = iota // unquoted identifier or keyword; value is lower-cased
	tokenName                      // "quoted" identifier; value is what it names
	tokenString                    // any string constant; value set for plain and dollar-quoted ones
	tokenNumber                    //
	tokenParam                     // $1
	tokenOperator                  // operators and single characters
)

type token struct {
	kind       tokenKind
	start, end int
	value      string
	exact      bool // value is the decoded value
}

// scan cuts text into tokens. On refusal it returns a reason.
func scan(text string) ([]token, string) {
	s := scanner{text: text, tokens: make([]token, 0, 16+len(text)/5)}
	for s.pos < len(text) {
		if reason := s.next(); reason != "" {
			return nil, reason
		}
	}
	return s.tokens, ""
}

type scanner struct {
	text    string
	pos     int
	nesting int
	dollars int
	tokens  []token
}

func isSpace(b byte) bool {
	return b == ' ' || b == '\t' || b == '\n' || b == '\r' || b == '\f'
}

func isDigit(b byte) bool { return b >= '0' && b <= '9' }

func isIdentStart(b byte) bool {
	return b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b == '_' || b >= 0x80
}

func isIdentCont(b byte) bool { return isIdentStart(b) || isDigit(b) || b == '$' }

func isOperator(b byte) bool { return strings.IndexByte("~!@#^&|`?+-*/%<>=", b) >= 0 }

// peek returns the byte i places ahead, or 0 (which no text contains).
func (s *scanner) peek(i int) byte {
	if s.pos+i < len(s.text) {
		return s.text[s.pos+i]
	}
	return 0
}

func (s *scanner) emit(kind tokenKind, start int, value string, exact bool) {
	s.tokens = append(s.tokens, token{kind: kind, start: start, end: s.pos, value: value, exact: exact})
}

func (s *scanner) next() string {
	b := s.text[s.pos]
	switch {
	case isSpace(b):
		s.pos++
		return ""
	case b == '-' && s.peek(1) == '-':
		s.lineComment()
		return ""
	case b == '/' && s.peek(1) == '*':
		return s.comment()
	case b == '\'':
		return s.plainString(s.pos)
	case b == '"':
		return s.quotedName(s.pos, false)
	case (b == 'u' || b == 'U') && s.peek(1) == '&' && s.peek(2) == '"':
		start := s.pos
		s.pos += 2
		return s.quotedName(start, true)
	case (b == 'u' || b == 'U') && s.peek(1) == '&' && s.peek(2) == '\'':
		start := s.pos
		s.pos += 2
		return s.escapeString(start, false)
	case (b == 'e' || b == 'E') && s.peek(1) == '\'':
		start := s.pos
		s.pos++
		return s.escapeString(start, true)
	case (b == 'b' || b == 'B' || b == 'x' || b == 'X') && s.peek(1) == '\'':
		start := s.pos
		s.pos++
		return s.escapeString(start, false)
	case (b == 'n' || b == 'N') && s.peek(1) == '\'':
		return "N'…' strings are not supported; write the string without N"
	case b == '$':
		return s.dollar()
	case isDigit(b) || b == '.' && isDigit(s.peek(1)):
		return s.number()
	case isIdentStart(b):
		start := s.pos
		for s.pos < len(s.text) && isIdentCont(s.text[s.pos]) {
			s.pos++
		}
		if s.pos-start > maxIdentifier {
			return fmt.Sprintf("the identifier at byte %d is longer than %d bytes; the server would cut it", start+1, maxIdentifier)
		}
		s.emit(tokenWord, start, lowerASCII(s.text[start:s.pos]), true)
		return ""
	case isOperator(b):
		return s.operator()
	case strings.IndexByte(",()[].;:", b) >= 0:
		return s.punctuation(b)
	}
	return fmt.Sprintf("the character %q at byte %d has no meaning in SQL", rune(b), s.pos+1)
}

func lowerASCII(s string) string {
	for i := 0; i < len(s); i++ {
		if s[i] >= 'A' && s[i] <= 'Z' {
			b := []byte(s)
			for ; i < len(b); i++ {
				if b[i] >= 'A' && b[i] <= 'Z' {
					b[i] += 'a' - 'A'
				}
			}
			return string(b)
		}
	}
	return s
}

// lineComment passes a comment up to its newline, which is left.
func (s *scanner) lineComment() {
	i := strings.IndexAny(s.text[s.pos:], "\r\n")
	if i < 0 {
		s.pos = len(s.text)
		return
	}
	s.pos += i
}

// comment passes a block comment; they nest.
func (s *scanner) comment() string {
	start, depth := s.pos, 0
	for s.pos < len(s.text) {
		switch {
		case s.text[s.pos] == '/' && s.peek(1) == '*':
			depth++
			s.pos += 2
		case s.text[s.pos] == '*' && s.peek(1) == '/':
			depth--
			s.pos += 2
			if depth == 0 {
				return ""
			}
		default:
			s.pos++
		}
	}
	return fmt.Sprintf("the comment that begins at byte %d does not end", start+1)
}

// continues passes white space with a newline in it, and comments to the end
// of a line, if a further piece of the same string constant follows.
func (s *scanner) continues() bool {
	p, newline := s.pos, false
	for p < len(s.text) {
		switch b := s.text[p]; {
		case b == '\n' || b == '\r':
			newline = true
			p++
		case isSpace(b):
			p++
		case b == '-' && p+1 < len(s.text) && s.text[p+1] == '-':
			i := strings.IndexAny(s.text[p:], "\r\n")
			if i < 0 {
				return false
			}
			p += i
		case b == '\'' && newline:
			s.pos = p
			return true
		default:
			return false
		}
	}
	return false
}

// plainString reads '…' with s.pos at the quote.
func (s *scanner) plainString(start int) string {
	var value strings.Builder
	for {
		s.pos++ // the opening quote
		for {
			i := strings.IndexByte(s.text[s.pos:], '\'')
			if i < 0 {
				return fmt.Sprintf("the string that begins at byte %d does not end", start+1)
			}
			value.WriteString(s.text[s.pos : s.pos+i])
			s.pos += i + 1
			if s.peek(0) != '\'' {
				break
			}
			value.WriteByte('\'')
			s.pos++
		}
		if !s.continues() {
			s.emit(tokenString, start, value.String(), true)
			return ""
		}
	}
}

// escapeString passes E'…', U&'…', B'…' and X'…' with s.pos at the quote.
func (s *scanner) escapeString(start int, backslash bool) string {
	for {
		s.pos++
		for {
			if s.pos >= len(s.text) {
				return fmt.Sprintf("the string that begins at byte %d does not end", start+1)
			}
			b := s.text[s.pos]
			s.pos++
			if b == '\\' && backslash {
				if s.pos >= len(s.text) {
					return fmt.Sprintf("the string that begins at byte %d does not end", start+1)
				}
				s.pos++
				continue
			}
			if b == '\'' {
				if s.peek(0) != '\'' {
					break
				}
				s.pos++
			}
		}
		if !s.continues() {
			s.emit(tokenString, start, "", false)
			return ""
		}
	}
}

// quotedName reads "…" with s.pos at the quote.
func (s *scanner) quotedName(start int, unicode bool) string {
	var value strings.Builder
	s.pos++
	for {
		i := strings.IndexByte(s.text[s.pos:], '"')
		if i < 0 {
			return fmt.Sprintf("the quoted name that begins at byte %d does not end", start+1)
		}
		value.WriteString(s.text[s.pos : s.pos+i])
		s.pos += i + 1
		if s.peek(0) != '"' {
			break
		}
		value.WriteByte('"')
		s.pos++
	}
	name := value.String()
	if unicode {
		decoded, ok := decodeUnicode(name)
		if !ok {
			return fmt.Sprintf("the quoted name at byte %d holds an escape that is not valid", start+1)
		}
		name = decoded
	}
	switch {
	case name == "":
		return fmt.Sprintf("the quoted name at byte %d is empty", start+1)
	case len(name) > maxIdentifier:
		return fmt.Sprintf("the identifier at byte %d is longer than %d bytes; the server would cut it", start+1, maxIdentifier)
	case strings.IndexByte(name, 0) >= 0:
		return "a name cannot hold a NUL"
	}
	s.emit(tokenName, start, name, true)
	return ""
}

// decodeUnicode decodes \XXXX, \+XXXXXX and \\ of U&"…". Surrogates are refused.
func decodeUnicode(in string) (string, bool) {
	var out strings.Builder
	for i := 0; i < len(in); {
		if in[i] != '\\' {
			out.WriteByte(in[i])
			i++
			continue
		}
		digits, at := 4, i+1
		switch {
		case strings.HasPrefix(in[at:], `\`):
			out.WriteByte('\\')
			i += 2
			continue
		case strings.HasPrefix(in[at:], "+"):
			digits, at = 6, i+2
		}
		if at+digits > len(in) {
			return "", false
		}
		var r rune
		for _, c := range []byte(in[at : at+digits]) {
			switch {
			case isDigit(c):
				r = r<<4 | rune(c-'0')
			case c >= 'a' && c <= 'f':
				r = r<<4 | rune(c-'a'+10)
			case c >= 'A' && c <= 'F':
				r = r<<4 | rune(c-'A'+10)
			default:
				return "", false
			}
		}
		if !utf8.ValidRune(r) {
			return "", false
		}
		out.WriteRune(r)
		i = at + digits
	}
	return out.String(), true
}

// dollar reads $1 or a dollar-quoted string.
func (s *scanner) dollar() string {
	start := s.pos
	if isDigit(s.peek(1)) {
		s.pos++
		for isDigit(s.peek(0)) {
			s.pos++
		}
		// $65536 and above are beyond the protocol's parameter count.
		if s.pos-start > 6 || s.pos < len(s.text) && isIdentCont(s.text[s.pos]) {
			return fmt.Sprintf("the parameter at byte %d is not valid", start+1)
		}
		s.emit(tokenParam, start, s.text[start:s.pos], true)
		return ""
	}
	p := s.pos + 1
	for p < len(s.text) && (isIdentStart(s.text[p]) || p > s.pos+1 && isDigit(s.text[p])) {
		p++
	}
	if p >= len(s.text) || s.text[p] != '$' {
		return fmt.Sprintf("the character '$' at byte %d has no meaning in SQL", start+1)
	}
	tag := s.text[start : p+1]
	s.dollars++
	if s.dollars*len(s.text) > maxDollarWork {
		return "too many dollar-quoted strings in one text; send it in pieces"
	}
	i := strings.Index(s.text[p+1:], tag)
	if i < 0 {
		return fmt.Sprintf("the string that begins at byte %d does not end", start+1)
	}
	value := s.text[p+1 : p+1+i]
	s.pos = p + 1 + i + len(tag)
	s.emit(tokenString, start, value, true)
	return ""
}

func (s *scanner) number() string {
	start := s.pos
	digits := func() {
		for isDigit(s.peek(0)) {
			s.pos++
		}
	}
	digits()
	if s.peek(0) == '.' && (s.peek(1) != '.' || s.pos == start) {
		s.pos++
		digits()
	}
	if b := s.peek(0); b == 'e' || b == 'E' {
		p := 1
		if c := s.peek(1); c == '+' || c == '-' {
			p = 2
		}
		if isDigit(s.peek(p)) {
			s.pos += p
			digits()
		}
	}
	if s.pos < len(s.text) && isIdentCont(s.text[s.pos]) {
		return fmt.Sprintf("the number at byte %d runs into a word; put a space between them", start+1)
	}
	s.emit(tokenNumber, start, s.text[start:s.pos], true)
	return ""
}

func (s *scanner) operator() string {
	start := s.pos
	end := start
	for end < len(s.text) && isOperator(s.text[end]) {
		if end > start && end+1 < len(s.text) &&
			(s.text[end] == '/' && s.text[end+1] == '*' || s.text[end] == '-' && s.text[end+1] == '-') {
			break
		}
		end++
	}
	// A multi-character operator ends in + or - only if it holds one of ~!@#^&|`?%.
	if end-start > 1 && !strings.ContainsAny(s.text[start:end], "~!@#^&|`?%") {
		for end-start > 1 && (s.text[end-1] == '+' || s.text[end-1] == '-') {
			end--
		}
	}
	if end-start > maxIdentifier {
		return fmt.Sprintf("the operator at byte %d is too long", start+1)
	}
	s.pos = end
	s.emit(tokenOperator, start, s.text[start:end], true)
	return ""
}

func (s *scanner) punctuation(b byte) string {
	start := s.pos
	s.pos++
	switch b {
	case '(', '[':
		if s.nesting++; s.nesting > maxNesting {
			return fmt.Sprintf("brackets are nested deeper than %d", maxNesting)
		}
	case ')', ']':
		s.nesting--
	case ':':
		if c := s.peek(0); c == ':' || c == '=' {
			s.pos++
		}
	case '.':
		if s.peek(0) == '.' {
			s.pos++
		}
	}
	s.emit(tokenOperator, start, s.text[start:s.pos], true)
	return ""
}

// span is one statement's tokens and its text, without the semicolon.
type span struct {
	tokens []token
	text   string
}

// split cuts the tokens at semicolons that end a statement: those outside
// brackets and outside the BEGIN ATOMIC … END body of a function.
func split(text string, tokens []token) []span {
	var spans []span
	first, depth, begins := 0, 0, 0
	flush := func(i int) {
		if i > first {
			spans = append(spans, span{tokens[first:i], text[tokens[first].start:tokens[i-1].end]})
		}
		first = i + 1
	}
	for i, t := range tokens {
		switch t.kind {
		case tokenOperator:
			switch t.value {
			case "(", "[":
				depth++
			case ")", "]":
				depth--
			case ";":
				if depth <= 0 && begins == 0 {
					flush(i)
					depth = 0
				}
			}
		case tokenWord:
			switch t.value {
			case "atomic":
				if i > first && tokens[i-1].value == "begin" && tokens[i-1].kind == tokenWord && definesFunction(tokens[first:i]) {
					begins++
				}
			case "case":
				if begins > 0 {
					begins++
				}
			case "end":
				if begins > 0 {
					begins--
				}
			}
		}
	}
	flush(len(tokens))
	return spans
}

func definesFunction(tokens []token) bool {
	words := make([]string, 0, 4)
	for _, t := range tokens[:min(len(tokens), 4)] {
		words = append(words, t.value)
	}
	line := strings.Join(words, " ") + " "
	for _, p := range []string{"create function ", "create procedure ", "create or replace function ", "create or replace procedure "} {
		if strings.HasPrefix(line, p) {
			return true
		}
	}
	return false
}

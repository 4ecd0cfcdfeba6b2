package postgres

import (
	"encoding/binary"
	"strings"
)

// fields are those of an ErrorResponse or NoticeResponse that the gateway looks at.
type fields struct {
	severity string // not localised
	code     string
	text     string
	raised   bool // by code of the database's own: its text can be anything
}

// readReport reads an ErrorResponse or NoticeResponse; of a cut-off one, what
// is there.
func readReport(frame []byte) (f fields) {
	r := body(frame)
	for len(r.b) > 0 && r.b[0] != 0 {
		key := r.byte()
		v := r.cstring()
		if r.bad {
			return f
		}
		switch key {
		case 'S':
			if f.severity == "" {
				f.severity = string(v)
			}
		case 'V':
			f.severity = string(v)
		case 'C':
			f.code = string(v)
		case 'M':
			f.text = string(v)
		case 'W':
			f.raised = true // has a context: a function or trigger was running
		case 'R':
			f.raised = f.raised || string(v) == "exec_stmt_raise"
		}
	}
	return f
}

// How much of an error's text may leave.
type discretion uint8

const (
	open    discretion = iota // as it is: nothing is masked for this session
	guarded                   // this session must not see some column of the database
	sealed                    // the statement touches a table with such a column
)

// scrub appends an ErrorResponse or NoticeResponse without what might carry a
// value: DETAIL ("Failing row contains …"), HINT, CONTEXT and internal queries
// always; the message itself, too, when the statement touches masked columns
// and the error is not of a kind whose message names things only.
func scrub(dst, frame []byte, how discretion) []byte {
	if how == open {
		return append(dst, frame...)
	}
	f := readReport(frame)
	if how == guarded && namesOnly(f.code) && !f.raised {
		return append(dst, frame...)
	}
	at := len(dst)
	dst = append(dst, frame[0], 0, 0, 0, 0)
	r := body(frame)
	for len(r.b) > 0 && r.b[0] != 0 {
		key := r.byte()
		v := r.cstring()
		if r.bad {
			break
		}
		switch key {
		case 'S', 'V', 'C', 'P', 's', 't', 'c', 'd', 'n', 'F', 'L', 'R':
		case 'M':
			if how == sealed && (f.raised || !namesOnly(f.code)) {
				v = []byte("the target reported " + condition(f.code) + "; its message is withheld because the statement touches masked columns")
			}
		default:
			continue
		}
		dst = append(dst, key)
		dst = append(dst, v...)
		dst = append(dst, 0)
	}
	dst = append(dst, 0)
	binary.BigEndian.PutUint32(dst[at+1:], uint32(len(dst)-at-1))
	return dst
}

// namesOnly says that the messages of a SQLSTATE name objects, limits and
// states, never values of columns.
func namesOnly(code string) bool {
	switch code {
	case "57014", "57P01", "57P02", "57P03", "57P05", // cancelled, shut down
		"25P01", "25P02", "25P03", "25001", "25006", // transaction state
		"26000", "34000", "3F000", "0A000",
		"40001", "40P01", "55P03",
		"42501", "42601", "42P01", "42703", "42883", "42702", "42P02", "42P05", "42P03", "42704", "42P18", "42804", "42P07":
		return true
	}
	return strings.HasPrefix(code, "08") || strings.HasPrefix(code, "53")
}

func condition(code string) string {
	switch {
	case code == "23505":
		return "a duplicate key (SQLSTATE 23505)"
	case strings.HasPrefix(code, "23"):
		return "a violated constraint (SQLSTATE " + code + ")"
	case strings.HasPrefix(code, "22"):
		return "a value that cannot be converted or computed (SQLSTATE " + code + ")"
	case code == "":
		return "an error"
	}
	return "an error (SQLSTATE " + code + ")"
}

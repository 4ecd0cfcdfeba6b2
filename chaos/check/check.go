// Package check judges what a chaos run wrote down. It knows histories and
// nothing of how they came about, so that each of its checkers can be given a
// history that is wrong, and must say so.
//
// All times come from one machine's clock. The product never relies on such a
// clock; only the judge does.
package check

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// Op is one operation on one object, as the client saw it. An object is a
// small state machine that begins in the state "":
//
//   - the configuration: a change expects From and makes it To (a CAS on a register)
//   - a request for approval: a vote takes it from "" to "approved" or
//     "denied", its use from "approved" to "used"
//   - a subject: revoking takes it from Any to "revoked"; a login that was let
//     in was From "", one refused as revoked was From "revoked"
type Op struct {
	Object string    `json:"object"`
	What   string    `json:"what"` // for people
	From   string    `json:"from"` // the state it needs; Any: whichever
	To     string    `json:"to"`   // the state it makes; Same: no other
	Call   time.Time `json:"call"`
	// Return is zero when the outcome is not known: the operation may have
	// taken effect at any time since Call, may do so in future, or never.
	Return time.Time `json:"return,omitzero"`
}

// Any and Same are From and To of operations that do not care.
const (
	Any  = "*"
	Same = "="
)

// limit bounds the search of one object's orders.
const limit = 20 * time.Second

// Linearizable says which object's operations cannot have happened one after
// the other, each between its call and its return; nil when all can. An object
// whose orders cannot be searched in time is an error too.
func Linearizable(ops []Op) error {
	objects := map[string][]porcupine.Operation{}
	for _, op := range ops {
		ret := int64(1) << 62 // never
		if !op.Return.IsZero() {
			ret = op.Return.UnixNano()
		}
		objects[op.Object] = append(objects[op.Object], porcupine.Operation{Input: op, Call: op.Call.UnixNano(), Return: ret})
	}
	model := porcupine.Model{
		Init: func() any { return "" },
		Step: func(state, input, _ any) (bool, any) {
			s, op := state.(string), input.(Op)
			possible := op.From == Any || op.From == s
			switch {
			case !possible:
				return op.Return.IsZero(), s // without effect, where nobody was told otherwise
			case op.To == Same:
				return true, s
			}
			return true, op.To
		},
	}
	var wrong []string
	for name, history := range objects {
		switch porcupine.CheckOperationsTimeout(model, history, limit) {
		case porcupine.Illegal:
			wrong = append(wrong, fmt.Sprintf("%s: no order explains what was answered:\n%s", name, describe(history)))
		case porcupine.Unknown:
			wrong = append(wrong, fmt.Sprintf("%s: %d operations: their orders could not be searched within %v", name, len(history), limit))
		}
	}
	return failed("histories are linearizable (I9)", wrong)
}

func describe(history []porcupine.Operation) string {
	var b strings.Builder
	slices.SortFunc(history, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	for _, h := range history {
		op := h.Input.(Op)
		ret := "never"
		if !op.Return.IsZero() {
			ret = op.Return.Format(clock)
		}
		fmt.Fprintf(&b, "  %s to %s: %s (%q -> %q)\n", op.Call.Format(clock), ret, op.What, op.From, op.To)
	}
	return b.String()
}

const clock = "15:04:05.000000"

// failed makes one error of what is wrong with an invariant, or nil.
func failed(invariant string, wrong []string) error {
	if len(wrong) == 0 {
		return nil
	}
	slices.Sort(wrong)
	more := ""
	if n := len(wrong); n > 20 {
		wrong, more = wrong[:20], fmt.Sprintf("\n… and %d more", n-20)
	}
	return fmt.Errorf("%s: violated:\n%s%s", invariant, strings.Join(wrong, "\n"), more)
}

// Event is one event of the log as one node gave it.
type Event struct {
	Seq   uint64
	Chain string // the hash chain's value after it
}

// Logs holds the logs of nodes that have come to rest against each other:
// no event is missing or there twice, and the chains are equal (I5, I6).
func Logs(logs map[string][]Event) error {
	var wrong []string
	var longest string
	for node, log := range logs {
		for i, e := range log {
			if e.Seq != uint64(i+1) {
				wrong = append(wrong, fmt.Sprintf("%s: event %d stands at place %d", node, e.Seq, i+1))
				break
			}
		}
		if longest == "" || len(log) > len(logs[longest]) {
			longest = node
		}
	}
	for node, log := range logs {
		if len(log) != len(logs[longest]) {
			wrong = append(wrong, fmt.Sprintf("%s has %d events, %s has %d", node, len(log), longest, len(logs[longest])))
		}
		for i, e := range log {
			if e.Chain != logs[longest][i].Chain {
				wrong = append(wrong, fmt.Sprintf("%s and %s differ from event %d on", node, longest, e.Seq))
				break
			}
		}
	}
	return failed("all nodes have the same events (I5, I6)", wrong)
}

// Once checks that each acknowledged change is in the log exactly once (I4, I8).
// acked and log hold what identifies a change.
func Once(acked, log []string) error {
	count := map[string]int{}
	for _, id := range log {
		count[id]++
	}
	var wrong []string
	for _, id := range acked {
		if n := count[id]; n != 1 {
			wrong = append(wrong, fmt.Sprintf("%s was acknowledged and is in the log %d times", id, n))
		}
	}
	return failed("an acknowledged change is in the log once (I4, I8)", wrong)
}

// Leader is a node that said that it led in a term.
type Leader struct {
	Node string
	Term uint64
}

// Leaders checks that each term has one leader at most (I7), and that no node
// saw its term go back (I18). seen is in order of time.
func Leaders(seen []Leader, terms map[string][]uint64) error {
	of := map[uint64]string{}
	var wrong []string
	for _, l := range seen {
		if other, ok := of[l.Term]; ok && other != l.Node {
			wrong = append(wrong, fmt.Sprintf("term %d was led by %s and by %s", l.Term, other, l.Node))
		}
		of[l.Term] = l.Node
	}
	for node, ts := range terms {
		if !slices.IsSorted(ts) {
			wrong = append(wrong, fmt.Sprintf("%s went back in terms: %v", node, ts))
		}
	}
	return failed("one leader a term, and terms grow (I7, I18)", wrong)
}

// Rows checks that what was acknowledged to each writer is there: found says
// which of its rows 1 to n are, and n how many were acknowledged (I22, and the
// target's own).
func Rows(acked map[string]int, found map[string]map[int]int) error {
	var wrong []string
	for writer, n := range acked {
		for i := 1; i <= n; i++ {
			if c := found[writer][i]; c != 1 {
				wrong = append(wrong, fmt.Sprintf("%s: row %d of %d acknowledged is there %d times", writer, i, n, c))
			}
		}
	}
	return failed("what was acknowledged is there once", wrong)
}

package postgres

import (
	"testing"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols/postgres/sql"
)

// A short text with a large analysis weighs what it takes, so that bounds on
// memory hold.
func TestWeight(t *testing.T) {
	small := &analysis{text: "SELECT 1", parts: []sql.Statement{{Verb: "SELECT", Pairs: make([]policy.Pair, 1)}}}
	large := &analysis{text: "SELECT *", parts: []sql.Statement{{Verb: "SELECT", Pairs: make([]policy.Pair, 10_000), Output: make([]sql.Output, 1600), Objects: make([]uint32, 1000)}}}
	if small.weigh() > 2<<10 || large.weigh() < 1<<20 {
		t.Fatal(small.weigh(), large.weigh())
	}
	q := &requests{conversation: newConversation(nil)}
	s := &statement{an: large}
	large.weight = large.weigh()
	for _, name := range []string{"a", "b"} {
		q.stmts.put(name, s, 0)
	}
	q.portals.put("p", &portal{stmt: &statement{an: large}, an: small}, 0)
	if q.weigh(); q.held < 2*large.weight || q.held > 2*large.weight+4<<10 {
		t.Fatal(q.held, large.weight)
	}
	// As many as fit, and no more.
	for n := 0; ; n++ {
		why, err := q.statementRoom(t.Context(), "c", s)
		if err != nil {
			t.Fatal(err)
		}
		if why != nil {
			if n > maxStatementBytes/large.weight {
				t.Fatal(n)
			}
			break
		}
		held := &statement{an: large}
		q.stmts.put(string(rune('c'+n)), held, 0)
		q.held += held.weight()
	}
}

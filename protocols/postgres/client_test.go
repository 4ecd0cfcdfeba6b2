package postgres_test

import (
	"strings"
	"testing"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/recording"
)

func TestPsqlSelect(t *testing.T) {
	g := start(t)
	out, err := g.psql("SELECT label FROM items WHERE id = 7;\n")
	if err != nil || strings.TrimSpace(out) != "item 7" {
		t.Fatalf("%v: %s", err, out)
	}
	s := g.Last()
	<-s.Ended
	var commands, outcomes int
	for _, e := range s.Record.Entries() {
		switch e.Type {
		case recording.Command:
			commands++
			if string(e.Text) != "SELECT label FROM items WHERE id = 7;" {
				t.Errorf("recorded %q", e.Text)
			}
		case recording.Outcome:
			outcomes++
			if e.Effect != "ok" || e.Rows != 1 || e.Reason != "SELECT 1" {
				t.Errorf("outcome %+v", e)
			}
		}
	}
	if commands != 1 || outcomes != 1 {
		t.Errorf("%d commands, %d outcomes", commands, outcomes)
	}
	if in, _, _, released := s.Lease.Counts(); in != 1 || released != 1 {
		t.Errorf("logged in %d times, released %d times", in, released)
	}
}

func TestPsqlRefusal(t *testing.T) {
	g := start(t)
	g.Decide(rules(map[policy.Action]policy.Effect{policy.PostgresDropTable: policy.Refuse}))
	out, _ := g.psql("DROP TABLE items;\nSELECT count(*) FROM items;\nSELECT 1; DROP TABLE items;\n")
	if strings.Count(out, "refused by no-postgres:drop_table") != 2 || !strings.Contains(out, "100") {
		t.Fatal(out)
	}
}

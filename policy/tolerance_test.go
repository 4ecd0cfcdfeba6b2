package policy

import (
	"strings"
	"testing"
	"time"
)

func TestTolerance(t *testing.T) {
	const scope = ` permit (principal in Group::"g", action == Action::"connect", resource in Target::"t");`
	subject := &Subject{Kind: Workload, Provider: "ci", Name: "x", Groups: []string{"g"}}
	for name, c := range map[string]struct {
		rules string
		want  Tolerance
		most  Tolerance
	}{
		"default":             {scope, Strict, Strict},
		"strict":              {`@revocation("strict")` + scope, Strict, Strict},
		"bounded":             {`@revocation("bounded(5m)")` + scope, Tolerance(5 * time.Minute), Tolerance(5 * time.Minute)},
		"best effort":         {`@revocation("best_effort")` + scope, BestEffort, BestEffort},
		"least bounded":       {`@revocation("bounded(10s)")` + scope, Tolerance(10 * time.Second), Tolerance(10 * time.Second)},
		"most bounded":        {`@revocation("bounded(24h)")` + scope, Tolerance(24 * time.Hour), Tolerance(24 * time.Hour)},
		"strictest holds":     {`@revocation("best_effort")` + scope + `@revocation("bounded(5m)")` + scope, Tolerance(5 * time.Minute), BestEffort},
		"silence is strict":   {`@revocation("best_effort")` + scope + scope, Strict, BestEffort},
		"another's rule":      {`@revocation("bounded(5m)")` + scope + `permit (principal in Group::"other", action == Action::"connect", resource);`, Tolerance(5 * time.Minute), Tolerance(5 * time.Minute)},
		"rule of all actions": {`@revocation("bounded(5m)") permit (principal in Group::"g", action, resource in Target::"t");`, Tolerance(5 * time.Minute), Tolerance(5 * time.Minute)},
	} {
		set, problems := Compile([]File{{"p.cedar", []byte(c.rules)}})
		if set == nil {
			t.Errorf("%s: %v", name, problems)
			continue
		}
		d := set.Decide(&Request{Subject: subject, Pairs: []Pair{{Connect, Resource{Database, []string{"t", "d"}}}}})
		if d.Effect != Permit || d.Obligations.Tolerance != c.want {
			t.Errorf("%s: effect %v, tolerance %v, want %v", name, d.Effect, d.Obligations.Tolerance, c.want)
		}
		if most := set.LargestTolerance(); most != c.most {
			t.Errorf("%s: at most %v, want %v", name, most, c.most)
		}
	}
	set, _ := Compile([]File{{"p.cedar", []byte(`@revocation("bounded(2m)")` + scope + `@revocation("bounded(1m)")` + scope + `@revocation("best_effort")` + scope + scope)}})
	if d := set.LeastBounded(); d != time.Minute {
		t.Errorf("least bound %v", d)
	}
	if (*Set)(nil).LargestTolerance() != Strict {
		t.Error("no rules tolerate something")
	}
}

func TestToleranceRefused(t *testing.T) {
	const connect = ` permit (principal, action == Action::"connect", resource);`
	for rules, want := range map[string]string{
		`@revocation("bounded(9s)")` + connect:                                                         "10s to 24h",
		`@revocation("bounded(25h)")` + connect:                                                        "10s to 24h",
		`@revocation("bounded(-5m)")` + connect:                                                        "10s to 24h",
		`@revocation("bounded()")` + connect:                                                           "10s to 24h",
		`@revocation("bounded(5m")` + connect:                                                          "want \"strict\"",
		`@revocation("bounded")` + connect:                                                             "want \"strict\"",
		`@revocation("Strict")` + connect:                                                              "want \"strict\"",
		`@revocation("")` + connect:                                                                    "want \"strict\"",
		`@revocation("strict") @revocation("strict")` + connect:                                        "annotation",
		`@revocation("strict") forbid (principal, action == Action::"connect", resource);`:             "permit rules",
		`@revocation("strict") permit (principal, action == Action::"postgres:select", resource);`:     "not about connect",
		`@revocation("best_effort") permit (principal, action in Action::"postgres:write", resource);`: "not about connect",
	} {
		set, problems := Compile([]File{{"p.cedar", []byte(rules)}})
		if set != nil || len(problems) == 0 || !strings.Contains(problems[0].Message, want) {
			t.Errorf("%s\n\tgot %v, want %q", rules, problems, want)
		}
	}
}

func TestToleranceString(t *testing.T) {
	for in, want := range map[Tolerance]string{
		Strict: "strict", BestEffort: "best_effort",
		Tolerance(5 * time.Minute): "bounded(5m)", Tolerance(90 * time.Second): "bounded(1m30s)", Tolerance(2 * time.Hour): "bounded(2h)", Tolerance(90 * time.Minute): "bounded(1h30m)",
	} {
		if got := in.String(); got != want {
			t.Errorf("%v, want %v", got, want)
		}
		if back, err := parseTolerance(in.String()); err != nil || back != in {
			t.Errorf("%v read back as %v, %v", in, back, err)
		}
	}
}

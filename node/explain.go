package node

import (
	"context"
	"fmt"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/postgres"
	"github.com/sallyport/sallyport/protocols/postgres/sql"
)

// analyze says what a statement does in a session of subject as the
// configuration of v would have opened it. Names mean what they mean at the
// target now.
func (n *Node) analyze(ctx context.Context, v *state.View, subject *policy.Subject, in *api.ExplainRequest) ([]policy.Pair, *protocols.Refusal, error) {
	target := v.Config.Targets[in.Target]
	if target.Protocol != postgres.Name {
		return nil, nil, fmt.Errorf("its statements are not PostgreSQL's but %s's", target.Protocol)
	}
	catalog, err := n.targets.catalog(ctx, in.Target, in.Database, false)
	if err != nil {
		return nil, nil, err
	}
	role, _ := target.RoleFor(subject.Groups, in.Profile)
	statements, problem := sql.Analyze(in.Statement, &sql.Scope{
		Target: in.Target, Database: in.Database, SearchPath: target.SearchPath, Role: role, Catalog: catalog,
		Masked: func(column policy.Resource) bool {
			return decideAt(v, n.cfg.Name, &policy.Request{Subject: subject, Pairs: []policy.Pair{{Action: policy.Reveal, Resource: column}},
				Context: policy.Context{Now: subject.IssuedAt, Profile: in.Profile, Database: in.Database, ClientAddr: in.Client, Protocol: postgres.Name}}).Effect != policy.Permit
		},
	})
	var pairs []policy.Pair
	for i := range statements {
		pairs = append(pairs, statements[i].Pairs...)
		if problem == nil {
			problem = statements[i].Problem
		}
	}
	if problem != nil {
		return pairs, &protocols.Refusal{Rule: problem.Rule, Reason: problem.Reason, Code: problem.Code}, nil
	}
	return pairs, nil, nil
}

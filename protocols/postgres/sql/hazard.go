package sql

import (
	"fmt"
	"slices"
	"strings"
)

// While columns of a database are masked for a session, nothing may run that
// could read them unseen: code behind views, policies, triggers, defaults. What
// the database stores as text is analysed like a statement, once for each
// catalogue, when it is first met.

// finding is what a stored definition does.
type finding struct {
	reason    string // why it cannot be trusted, "" when it can
	relations []*Relation
}

// examine analyses a stored query. Names in it are as pg_get_viewdef and
// pg_get_expr print them under search_path "pg_catalog, pg_temp".
func (c *Catalog) examine(text string) finding {
	c.mu.Lock()
	f, ok := c.mu.parsed[text]
	c.mu.Unlock()
	if ok {
		return f
	}
	f = c.examineNow(text)
	c.mu.Lock()
	c.mu.parsed[text] = f
	c.mu.Unlock()
	return f
}

func (c *Catalog) examineNow(text string) finding {
	list, problem := parse(text)
	if problem != nil {
		return finding{reason: "its definition cannot be read"}
	}
	if len(list) != 1 {
		return finding{reason: "its definition cannot be read"}
	}
	if p := inspect(&list[0]); p != nil {
		return finding{reason: "its definition cannot be read"}
	}
	var f finding
	a := newAnalysis(&Scope{Database: c.database, SearchPath: []string{"pg_catalog", "pg_temp"}, Catalog: c}, &batch{}, &Statement{})
	func() {
		defer func() {
			if recover() != nil {
				f.reason = "its definition cannot be read"
			}
		}()
		a.statement(list[0].tree)
		a.judgeCalls()
	}()
	for _, t := range a.touched {
		f.relations = append(f.relations, t.rel)
		if f.reason == "" && t.rel.Schema == "pg_catalog" && t.rel.Name == "pg_attribute" && readsMissingValues(list[0].tree) {
			f.reason = "it reads pg_attribute.attmissingval, which holds values"
		}
	}
	switch {
	case f.reason != "":
	case a.problem != nil || len(a.unknown) > 0:
		f.reason = "its definition cannot be read"
	default:
		for _, call := range a.calls {
			if !call.ok {
				f.reason = fmt.Sprintf("it calls %s, which could read masked columns unseen", call.name)
				break
			}
		}
	}
	return f
}

// readHazard says why reading rel may show or use columns unseen, or "". It
// does not look at which columns are masked; tainted does.
func (c *Catalog) readHazard(rel *Relation) string {
	c.mu.Lock()
	reason, ok := c.mu.reads[rel.OID]
	if !ok && rel.OID != 0 {
		c.mu.reads[rel.OID] = "" // ends the recursion of a circle
	}
	c.mu.Unlock()
	if ok || rel.OID == 0 {
		return reason
	}
	reason = c.readHazardNow(rel)
	c.mu.Lock()
	c.mu.reads[rel.OID] = reason
	c.mu.Unlock()
	return reason
}

func (c *Catalog) readHazardNow(rel *Relation) string {
	switch {
	case rel.Schema == "pg_catalog":
		if !plainSystem[rel.Name] {
			return "it can show values of masked columns, or what other sessions do"
		}
		return ""
	case rel.Schema == "information_schema":
		return ""
	case strings.HasPrefix(rel.Schema, "pg_toast"), strings.HasPrefix(rel.Schema, "pg_temp"):
		return "it is internal to the server or to another session"
	}
	foreign := false
	rel.family(func(r *Relation) { foreign = foreign || r.Kind == 'f' })
	if foreign {
		return "it is a foreign table, whose rows may come from a masked one"
	}
	if rel.Kind == 'v' || rel.Kind == 'm' {
		f := c.examine(rel.definition)
		if f.reason != "" {
			return f.reason
		}
		for _, base := range f.relations {
			if reason := c.readHazard(base); reason != "" {
				return fmt.Sprintf("it reads %s.%s, and %s", base.Schema, base.Name, reason)
			}
		}
	}
	return c.policyHazard(rel)
}

func (c *Catalog) policyHazard(rel *Relation) string {
	if !rel.RowSecurity {
		return ""
	}
	for _, p := range rel.policies {
		f := c.examine("SELECT " + p)
		if f.reason != "" {
			return "of a row security policy, " + f.reason
		}
		for _, base := range f.relations {
			if len(base.sensitive) > 0 || len(base.bases) > 0 {
				return "one of its row security policies reads other tables"
			}
		}
	}
	return ""
}

// writeHazard says why writing to rel may run code that reads columns unseen,
// or answer questions about a masked column, or "".
func (sc *Scope) writeHazard(rel *Relation) string {
	c := sc.Catalog
	seen := map[*Relation]bool{}
	queue := []*Relation{rel}
	for len(queue) > 0 {
		r := queue[0]
		queue = queue[1:]
		if seen[r] {
			continue
		}
		seen[r] = true
		if r != rel && sc.maskedAny(r) {
			return fmt.Sprintf("rows of %s.%s, which has masked columns, change with it", r.Schema, r.Name)
		}
		if reason := c.storedHazard(r); reason != "" {
			if r != rel {
				return fmt.Sprintf("%s.%s changes with it, and %s", r.Schema, r.Name, reason)
			}
			return reason
		}
		queue = append(queue, r.children...)
		for _, k := range r.keys {
			for i := range min(len(k.fromCols), len(k.cols)) {
				if sc.masked(k.from, k.fromCols[i]) || sc.masked(k.to, k.cols[i]) {
					return fmt.Sprintf("a foreign key between %s and %s would tell which values a masked column holds", k.from.Name, k.to.Name)
				}
			}
			if k.cascades && k.to == r {
				queue = append(queue, k.from)
			}
		}
	}
	return ""
}

// storedHazard is writeHazard for what rel itself runs.
func (c *Catalog) storedHazard(rel *Relation) string {
	if rel.OID == 0 {
		return ""
	}
	c.mu.Lock()
	reason, ok := c.mu.writes[rel.OID]
	c.mu.Unlock()
	if ok {
		return reason
	}
	reason = c.storedHazardNow(rel)
	c.mu.Lock()
	c.mu.writes[rel.OID] = reason
	c.mu.Unlock()
	return reason
}

func (c *Catalog) storedHazardNow(rel *Relation) string {
	switch {
	case rel.Schema == "pg_catalog" || rel.Schema == "information_schema":
		return "it belongs to the server"
	case rel.Triggers:
		return "it has triggers, which could read masked columns unseen"
	case rel.Rules:
		return "it has rewrite rules, which could read masked columns unseen"
	case !slices.Contains([]byte("rpS"), rel.Kind):
		return "it is not an ordinary table"
	}
	for _, e := range rel.exprs {
		f := c.examine("SELECT " + e)
		if f.reason != "" {
			return "of a default, a check or an index expression, " + f.reason
		}
	}
	for _, col := range rel.Columns {
		t := c.typeOIDs[col.Type]
		for range 100 {
			if t == nil {
				break
			}
			if t.Checked {
				return fmt.Sprintf("column %s is of a domain with constraints, which could run code unseen", col.Name)
			}
			t = c.typeOIDs[max(t.Base, t.Elem)]
		}
	}
	return c.policyHazard(rel)
}

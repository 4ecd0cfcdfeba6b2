package postgres

import (
	"fmt"
	"slices"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/postgres/sql"
)

// described takes note of what the target says a statement's or portal's
// result is. r.mu is held.
func (r *responses) described(w *awaited, frame []byte) error {
	var cols []column
	if frame[0] == 'T' {
		var err error
		if cols, err = shape(nil, frame); err != nil {
			return err
		}
	} else if len(frame) != headerBytes {
		return malformed("NoData")
	}
	if w.stmt != nil {
		w.stmt.shape, w.stmt.shaped = cols, true
		return nil // checked when rows are to come: what is masked may change until then
	}
	p := w.portal
	if len(p.an.parts) != 1 {
		return nil // there is no such portal, or it is empty
	}
	if len(cols) > 0 {
		if err := r.plan(cols, &p.an.parts[0], p.an.world); err != nil {
			return err
		}
	}
	p.cols, p.planned = cols, true
	return nil
}

// planPortal finds out what is masked in a portal's rows, when it was not
// described itself. Only what is planned at Parse has the shape that it had
// then: that of FETCH, EXECUTE and the like is decided at Bind, after which the
// gateway asks for it. r.mu is held.
func (r *responses) planPortal(p *portal) error {
	if !p.stmt.described() || !p.an.plain {
		return &protocols.Refusal{Rule: "masking", Reason: "rows came whose columns the gateway does not know", Code: "42501"}
	}
	p.cols = slices.Clone(p.stmt.shape)
	if err := r.plan(p.cols, &p.an.parts[0], p.an.world); err != nil {
		return err
	}
	p.planned = true
	return nil
}

// plan marks in cols, which the target described, what is masked, after
// checking every column against what the analysis says it is. A column that
// the catalogue says is masked and the analysis judged clean is a mistake of
// ours, or a target that lies: nothing of the result may leave.
func (r *responses) plan(cols []column, part *sql.Statement, w *world) error {
	if !w.masking {
		return nil
	}
	if part.Reads && len(part.Output) != len(cols) {
		return r.alarm(fmt.Sprintf("%s: %d columns described, %d analysed", part.Verb, len(cols), len(part.Output)))
	}
	for i := range cols {
		c := &cols[i]
		c.masked = c.table != 0 && w.scope.MaskedColumn(c.table, c.number)
		if !part.Reads {
			if c.masked {
				return r.alarm(fmt.Sprintf("%s: column %d is %d.%d, which is masked; the analysis says nothing is", part.Verb, i+1, c.table, c.number))
			}
			continue
		}
		out := part.Output[i]
		same := c.table == out.Table && c.number == out.Column
		if c.masked != out.Masked || (out.Masked && !same) || (!same && c.table != 0 && out.Table != 0) {
			return r.alarm(fmt.Sprintf("%s: column %d is %d.%d (masked: %t); the analysis says %d.%d (masked: %t)",
				part.Verb, i+1, c.table, c.number, c.masked, out.Table, out.Column, out.Masked))
		}
		if c.masked {
			c.mask = r.p.cfg.MaskKind(resource(w.scope, c))
		}
	}
	return nil
}

// resource names a column as policies do.
func resource(sc *sql.Scope, c *column) policy.Resource {
	rel := sc.Catalog.RelationByOID(c.table)
	name := ""
	for _, col := range rel.Columns {
		if col.Num == c.number {
			name = col.Name
		}
	}
	return policy.Resource{Type: policy.Column, Path: []string{sc.Target, sc.Database, rel.Schema, rel.Name, name}}
}

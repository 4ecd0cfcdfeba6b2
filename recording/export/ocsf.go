package export

import (
	"errors"
	"slices"
	"strings"

	"github.com/sallyport/sallyport/recording"
)

// Version 1.8.0 of the OCSF schema, class Datastore Activity with the profile
// Security Control. Attributes that the schema has no place for are under
// "unmapped".
const (
	ocsfVersion  = "1.8.0"
	ocsfClass    = 6005
	ocsfCategory = 6
)

// Activities of the class.
const (
	activityUnknown = 0
	activityRead    = 1
	activityUpdate  = 2
	activityConnect = 3
	activityQuery   = 4
	activityWrite   = 5
	activityCreate  = 6
	activityDelete  = 7
	activityOther   = 99
)

var activityNames = map[int]string{
	activityUnknown: "Unknown", activityRead: "Read", activityUpdate: "Update", activityConnect: "Connect", activityQuery: "Query",
	activityWrite: "Write", activityCreate: "Create", activityDelete: "Delete", activityOther: "Other",
}

// activityOf maps an action of policy. Of several in one statement the one that
// comes last in byWeight counts.
func activityOf(action string) int {
	_, verb, _ := strings.Cut(action, ":")
	switch {
	case verb == "select" || verb == "explain" || verb == "declare_cursor" || verb == "fetch":
		return activityQuery
	case verb == "copy_to":
		return activityRead
	case verb == "insert" || verb == "copy_from":
		return activityWrite
	case verb == "update" || verb == "merge" || strings.HasPrefix(verb, "alter_"):
		return activityUpdate
	case verb == "delete" || verb == "truncate" || strings.HasPrefix(verb, "drop_"):
		return activityDelete
	case strings.HasPrefix(verb, "create_"):
		return activityCreate
	}
	return activityOther
}

var byWeight = []int{activityUnknown, activityOther, activityQuery, activityRead, activityWrite, activityUpdate, activityCreate, activityDelete}

type object map[string]any

// ocsf writes an event for the session's begin and one for each operation, when
// it is known how that ended.
type ocsf struct {
	exporter
	ops   map[uint64]*operation
	order []uint64
}

// operation is what is known of one so far.
type operation struct {
	first    recording.Entry // the command, or the first entry there is
	decision *recording.Entry
	outcome  *recording.Entry
	actions  []string
	approval object
	bytes    int64
}

const (
	maxOpen  = 1 << 12 // operations that more can come of; the oldest is written without
	maxQuery = 64 << 10
)

func (o *ocsf) begin() error {
	h := o.res.Header
	if h.Kind != "session" {
		return errors.New("recording: a node's own recording holds no activity of a datastore: export it as jsonl")
	}
	o.ops = map[uint64]*operation{}
	e := o.event(activityConnect, h.Started.UnixMilli(), 0)
	e["status_id"], e["status"] = 1, "Success"
	e["action_id"], e["action"], e["disposition_id"], e["disposition"] = 1, "Allowed", 1, "Allowed"
	if rule := h.Labels["rule"]; rule != "" {
		e["policy"] = object{"uid": rule, "version": str(h.PolicyIndex)}
	}
	e["unmapped"] = object{"verification": o.verification()}
	return o.line(e)
}

// event is what all have.
func (o *ocsf) event(activity int, at int64, lsn recording.LSN) object {
	h := o.res.Header
	user := object{"name": h.Subject, "uid": h.Subject, "type_id": 1, "type": "User"}
	if h.SubjectKind != "User" {
		user["type_id"], user["type"] = 4, "Service"
	}
	if len(h.Groups) > 0 {
		var groups []object
		for _, g := range h.Groups {
			groups = append(groups, object{"name": g})
		}
		user["groups"] = groups
	}
	session := object{"uid": h.Session, "created_time": h.Started.UnixMilli(), "is_remote": true}
	put(session, "issuer", h.Issuer)
	put(session, "credential_uid", h.TokenID)
	actor := object{"user": user, "session": session}
	put(actor, "app_name", h.Labels["application_name"])
	src := object{"ip": h.Client}
	if h.Client == "" {
		src = object{"name": "unknown"}
	}
	return object{
		"activity_id": activity, "activity_name": activityNames[activity],
		"category_uid": ocsfCategory, "category_name": "Application Activity",
		"class_uid": ocsfClass, "class_name": "Datastore Activity",
		"type_uid": ocsfClass*100 + activity, "type_name": "Datastore Activity: " + activityNames[activity],
		"severity_id": 1, "severity": "Informational",
		"time": at,
		"metadata": object{
			"version": ocsfVersion, "profiles": []string{"security_control"},
			"product": object{"name": "Sallyport", "vendor_name": "Sallyport", "version": o.o.Version},
			"uid":     o.item.Name() + "/" + str(uint64(lsn)), "correlation_uid": h.Session, "sequence": uint64(lsn),
			"log_name": "recording", "log_provider": h.Node, "tenant_uid": h.Cluster,
		},
		"actor":        actor,
		"src_endpoint": src,
		"dst_endpoint": object{"name": h.Target, "svc_name": h.Protocol},
		"database":     object{"name": h.Database, "type_id": 1, "type": "Relational"},
		"type_id":      1, "type": "Database",
	}
}

func put(o object, key, value string) {
	if value != "" {
		o[key] = value
	}
}

func (o *ocsf) entry(e *recording.Entry) error {
	if e.Op == 0 {
		return nil
	}
	p := o.ops[e.Op]
	if p == nil {
		if e.Type != recording.Command && e.Type != recording.Decided {
			return nil // the rest of one that was written
		}
		if len(o.order) == maxOpen {
			if err := o.flush(o.order[0]); err != nil {
				return err
			}
		}
		p = &operation{first: *e}
		p.first.Data = nil
		p.first.Text = slices.Clone(e.Text[:min(len(e.Text), maxQuery)])
		p.first.Rows = uint64(len(e.Text)) // its whole length; a command has no rows
		o.ops[e.Op] = p
		o.order = append(o.order, e.Op)
	}
	switch e.Type {
	case recording.Decided:
		c := *e
		p.decision = &c
		if len(e.Actions) > 0 {
			p.actions = e.Actions
		}
	case recording.Approval:
		p.approval = object{"uid": e.Approval, "step": e.Effect, "actor": e.Actor}
	case recording.Response:
		p.bytes += int64(len(e.Data))
	case recording.Outcome:
		c := *e
		p.outcome = &c
		return o.flush(e.Op)
	}
	return nil
}

// flush writes the operation's event.
func (o *ocsf) flush(op uint64) error {
	p := o.ops[op]
	delete(o.ops, op)
	o.order = slices.DeleteFunc(o.order, func(x uint64) bool { return x == op })
	activity, table := activityUnknown, ""
	tables := 0
	for _, a := range p.actions {
		action, resource, _ := strings.Cut(a, " ")
		if act := activityOf(action); slices.Index(byWeight, act) > slices.Index(byWeight, activity) {
			activity = act
		}
		if strings.Count(resource, ".") == 3 { // target.database.schema.table
			if resource != table {
				tables++
			}
			table = resource
		}
	}
	e := o.event(activity, p.first.At.UnixMilli(), p.first.LSN)
	query := object{"uid": str(op), "query_string": strings.ToValidUTF8(string(p.first.Text), "\ufffd"), "query_time": p.first.At.UnixMilli()}
	if p.bytes > 0 {
		query["bytes"] = p.bytes
	}
	if whole := p.first.Rows; whole > maxQuery {
		m := e["metadata"].(object)
		m["is_truncated"], m["untruncated_size"] = true, whole
	}
	put(query, "name", p.first.Verb)
	e["query_info"] = query
	if tables == 1 {
		e["table"] = object{"name": table[strings.LastIndexByte(table, '.')+1:], "uid": table}
	}
	o.decided(e, p)
	unmapped := object{}
	if len(p.actions) > 0 {
		unmapped["actions"] = p.actions
	}
	if p.approval != nil {
		unmapped["approval"] = p.approval
	}
	if p.outcome != nil {
		unmapped["rows"] = p.outcome.Rows
		e["duration"] = p.outcome.Duration.Milliseconds()
	}
	if len(unmapped) > 0 {
		e["unmapped"] = unmapped
	}
	return o.line(e)
}

// decided fills in what policy said and how it ended.
func (o *ocsf) decided(e object, p *operation) {
	status, detail := 0, ""
	switch d := p.decision; {
	case d == nil:
		e["action_id"], e["action"], e["disposition_id"], e["disposition"] = 0, "Unknown", 0, "Unknown"
	case d.Effect == "permit":
		e["action_id"], e["action"], e["disposition_id"], e["disposition"] = 1, "Allowed", 1, "Allowed"
		if p.approval != nil {
			e["disposition_id"], e["disposition"] = 8, "Approved"
		}
	default: // refused, or held and never approved
		e["action_id"], e["action"], e["disposition_id"], e["disposition"] = 2, "Denied", 2, "Blocked"
		e["severity_id"], e["severity"], e["is_alert"] = 2, "Low", true
		status, detail = 2, d.Reason
	}
	if d := p.decision; d != nil && d.Rule != "" {
		policy := object{"uid": d.Rule, "version": str(d.PolicyIndex)}
		put(policy, "desc", d.Reason)
		e["policy"] = policy
		e["authorizations"] = []object{{"decision": d.Effect, "policy": policy}}
	}
	if out := p.outcome; out != nil && status == 0 {
		status, detail = 1, out.Reason
		if out.Effect == "error" {
			status = 2
		}
	}
	e["status_id"], e["status"] = status, []string{"Unknown", "Success", "Failure"}[status]
	put(e, "status_detail", detail)
}

func (o *ocsf) end() error {
	for len(o.order) > 0 {
		if err := o.flush(o.order[0]); err != nil {
			return err
		}
	}
	return nil
}

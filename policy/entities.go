package policy

import (
	"encoding/json"
	"fmt"
	"hash/maphash"
	"math"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
)

// ClusterID is the id of the one Cluster entity, as in Cluster::"sallyport".
const ClusterID = "sallyport"

// depth is how many names the Path of a resource type has.
var depth = map[ResourceType]int{Cluster: 0, Target: 1, Database: 2, Schema: 3, Table: 4, Column: 5, Function: 4}

// ID is the resource as policies name it: the names of its Path, joined by
// "/", with "%" written %25 and "/" written %2F inside a name.
func (r Resource) ID() string {
	if len(r.Path) == 0 {
		return ClusterID
	}
	return joinPath(r.Path)
}

// String is for people: `table "prod-db/shop/public/users"`.
func (r Resource) String() string {
	if r.Type == Cluster {
		return "the cluster"
	}
	return strings.ToLower(string(r.Type)) + " " + quote(r.ID())
}

var escapePath = strings.NewReplacer("%", "%25", "/", "%2F")

func joinPath(path []string) string {
	n := len(path)
	plain := true
	for _, p := range path {
		n += len(p)
		plain = plain && !strings.ContainsAny(p, "%/")
	}
	if plain {
		return strings.Join(path, "/")
	}
	var b strings.Builder
	b.Grow(n + 8)
	for i, p := range path {
		if i > 0 {
			b.WriteByte('/')
		}
		escapePath.WriteString(&b, p)
	}
	return b.String()
}

// pathTypes are the types of a resource's ancestors and itself, by length of
// the path.
var pathTypes = [...]ResourceType{Cluster, Target, Database, Schema, Table, Column}

// newResource builds the entity of r. Its parents are all its ancestors, not
// only the nearest, so that `in` needs this one entity.
func newResource(r Resource) *cedar.Entity {
	attrs := types.RecordMap{}
	parents := make([]cedar.EntityUID, 0, len(r.Path))
	for i := range r.Path {
		parents = append(parents, cedar.NewEntityUID(cedar.EntityType(pathTypes[i]), cedar.String(Resource{Path: r.Path[:i]}.ID())))
		name := cedar.String(r.Path[i])
		if i == len(r.Path)-1 {
			attrs["name"] = name
			attrs[types.String(strings.ToLower(string(r.Type)))] = name
		} else {
			attrs[types.String(strings.ToLower(string(pathTypes[i+1])))] = name
		}
	}
	return &cedar.Entity{
		UID:        cedar.NewEntityUID(cedar.EntityType(r.Type), cedar.String(r.ID())),
		Parents:    cedar.NewEntityUIDSet(parents...),
		Attributes: cedar.NewRecord(attrs),
	}
}

// principal is a Subject as Cedar sees it.
type principal struct {
	entity cedar.Entity
	groups []cedar.EntityUID // each once
	err    error             // the subject cannot be judged
}

func newPrincipal(s *Subject) *principal {
	p := &principal{}
	if s.Kind != Workload && s.Kind != User {
		p.err = fmt.Errorf("the subject is of unknown kind %q", s.Kind)
		return p
	}
	names := make([]types.Value, 0, len(s.Groups))
	seen := make(map[string]bool, len(s.Groups))
	for _, g := range s.Groups {
		if seen[g] {
			continue
		}
		seen[g] = true
		names = append(names, cedar.String(g))
		p.groups = append(p.groups, cedar.NewEntityUID("Group", cedar.String(g)))
	}
	claims := make(types.RecordMap, len(s.Claims))
	for name, v := range s.Claims {
		value, ok := claimValue(v)
		if !ok {
			p.err = fmt.Errorf("claim %q of the token has a value of a kind that rules cannot judge (%T)", name, v)
			return p
		}
		claims[types.String(name)] = value
	}
	attrs := types.RecordMap{
		"provider": cedar.String(s.Provider),
		"issuer":   cedar.String(s.Issuer),
		"name":     cedar.String(s.Name),
		"groups":   cedar.NewSet(names...),
		"claims":   cedar.NewRecord(claims),
	}
	if !s.ExpiresAt.IsZero() {
		attrs["expires"] = types.NewDatetime(s.ExpiresAt)
	}
	p.entity = cedar.Entity{
		UID:        cedar.NewEntityUID(cedar.EntityType(s.Kind), cedar.String(s.ID())),
		Parents:    cedar.NewEntityUIDSet(p.groups...),
		Attributes: cedar.NewRecord(attrs),
	}
	return p
}

// claimValue turns a claim into a Cedar value: strings, booleans, whole
// numbers and lists of strings.
func claimValue(v any) (types.Value, bool) {
	switch v := v.(type) {
	case string:
		return cedar.String(v), true
	case bool:
		return cedar.Boolean(v), true
	case int:
		return cedar.Long(v), true
	case int64:
		return cedar.Long(v), true
	case float64:
		// 2^53: beyond it a float no longer tells whole numbers apart.
		if v != math.Trunc(v) || math.Abs(v) > 1<<53 {
			return nil, false
		}
		return cedar.Long(int64(v)), true
	case json.Number:
		n, err := v.Int64()
		return cedar.Long(n), err == nil
	case []string:
		out := make([]types.Value, len(v))
		for i := range v {
			out[i] = cedar.String(v[i])
		}
		return cedar.NewSet(out...), true
	case []any:
		out := make([]types.Value, len(v))
		for i := range v {
			text, ok := v[i].(string)
			if !ok {
				return nil, false
			}
			out[i] = cedar.String(text)
		}
		return cedar.NewSet(out...), true
	}
	return nil, false
}

// contextRecord is Context as Cedar sees it. An address that does not parse is
// left out, so that a rule that asks for it fails to evaluate.
func contextRecord(c *Context) cedar.Record {
	m := types.RecordMap{
		"now":           types.NewDatetime(c.Now),
		"profile":       cedar.String(c.Profile),
		"database":      cedar.String(c.Database),
		"protocol":      cedar.String(c.Protocol),
		"inTransaction": cedar.Boolean(c.InTransaction),
	}
	// An IPv4 address that came in over an IPv6 socket is compared as IPv4.
	if addr, err := netip.ParseAddr(c.ClientAddr); err == nil {
		if ip, err := types.ParseIPAddr(addr.Unmap().WithZone("").String()); err == nil {
			m["client"] = ip
		}
	}
	return cedar.NewRecord(m)
}

// actionEntities are all actions with the groups they are in; they never change.
var actionEntities = func() cedar.EntityMap {
	m := cedar.EntityMap{}
	for _, info := range catalogue {
		var parents []cedar.EntityUID
		for _, g := range info.Groups {
			parents = append(parents, actionUID(g))
		}
		uid := actionUID(string(info.Name))
		m[uid] = cedar.Entity{UID: uid, Parents: cedar.NewEntityUIDSet(parents...)}
	}
	return m
}()

func actionUID(name string) cedar.EntityUID { return cedar.NewEntityUID("Action", cedar.String(name)) }

// entities is what one pair is judged with.
type entities struct {
	principal *cedar.Entity
	resource  *cedar.Entity
}

// Get implements types.EntityGetter.
func (e *entities) Get(uid cedar.EntityUID) (cedar.Entity, bool) {
	switch {
	case uid == e.resource.UID:
		return *e.resource, true
	case uid == e.principal.UID:
		return *e.principal, true
	case uid.Type == "Action":
		a, ok := actionEntities[uid]
		return a, ok
	}
	return cedar.Entity{}, false
}

// entityCache keeps entities that were built, as building one costs more than
// judging it. Both tables are of fixed size and direct-mapped: a newcomer
// replaces what was in its slot, so nothing a peer sends makes them grow, and
// a lookup is one atomic load.
type entityCache struct {
	principals [256]atomic.Pointer[cachedPrincipal]
	resources  [1024]atomic.Pointer[cachedResource]
}

type cachedPrincipal struct {
	subject *Subject // kept, so that its address cannot become another's
	*principal
}

type cachedResource struct {
	Resource
	entity *cedar.Entity
}

// maxCachedPath keeps what a slot holds small: PostgreSQL's names have at most
// 63 bytes, and five of them make a column.
const maxCachedPath = 512

var seed = maphash.MakeSeed()

// principal is the entity of subject, which must not have changed since it was
// first seen.
func (c *entityCache) principal(s *Subject) *principal {
	slot := &c.principals[maphash.Comparable(seed, s)%uint64(len(c.principals))]
	if got := slot.Load(); got != nil && got.subject == s {
		return got.principal
	}
	p := newPrincipal(s)
	slot.Store(&cachedPrincipal{s, p})
	return p
}

func (c *entityCache) resource(r Resource) *cedar.Entity {
	var h maphash.Hash
	h.SetSeed(seed)
	h.WriteString(string(r.Type))
	size := 0
	for _, p := range r.Path {
		h.WriteByte(0)
		h.WriteString(p)
		size += len(p)
	}
	if size > maxCachedPath {
		return newResource(r)
	}
	slot := &c.resources[h.Sum64()%uint64(len(c.resources))]
	if got := slot.Load(); got != nil && got.Type == r.Type && slices.Equal(got.Path, r.Path) {
		return got.entity
	}
	// The caller's strings may be parts of a large buffer, and its slice is reused.
	own := Resource{r.Type, make([]string, len(r.Path))}
	for i, p := range r.Path {
		own.Path[i] = strings.Clone(p)
	}
	e := newResource(own)
	slot.Store(&cachedResource{own, e})
	return e
}

package event

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Level is the newest feature level this build supports. It goes up by one
// with a release that stores something an earlier build cannot read; what is
// added between two releases shares one level. A cluster uses a level once all
// its members support it: see FeatureLevel.
//
//	1  the first release: no event of type cluster.feature_level in the log
//	2  idempotency ids are forgotten after a day, digests of the projections
//	   travel with proposals; the types and versions marked 2 below
const Level = 2 + ahead

// BaseLevel is the level of a cluster that has not agreed on one.
const BaseLevel = 1

// kinds is every type of event that was ever stored, with all its versions.
// Nothing is ever taken out: a stored event is read for ever.
//
// To add a type: a constant and a struct in payload.go and a line here,
//
//	TypeThingDone: of[ThingDone](Level),
//
// To add optional fields to a stored type: mark the new fields omitempty and
// name their JSON paths (dots between names, arrays are looked through). A zero
// value must mean what an event without the field meant.
//
//	TypeThingDone: of[ThingDone](1).adds(2, "reason", "node.zone"),
//
// Any other change: a pure function from the former version's payload to the
// new one's.
//
//	TypeThingDone: of[ThingDone](1).then(2, thingDoneV1toV2),
//
// Then `go test ./raftstore/event -rewrite` writes the fixtures of what is
// new, which are committed and never change, and the projections (node/state)
// learn what the event means. Callers build payloads with Encode, which takes
// the newest version the cluster can use, and read them with Decode, which
// always gives the newest.
var kinds = map[string]*kind{
	TypeClusterCreated:   of[ClusterCreated](1).adds(2, "node.zone"),
	TypeFeatureLevel:     of[FeatureLevel](1), // judged by the level it names: see fsm
	TypeVotersSet:        of[VotersSet](2),
	TypeNodeJoined:       of[NodeJoined](1).adds(2, "node.zone"),
	TypeNodeRemoved:      of[NodeRemoved](1),
	TypeNodeRenewed:      of[NodeRenewed](2),
	TypeClusterRestored:  of[ClusterRestored](2),
	TypeSecretsSealed:    of[SecretsSealed](2),
	TypeJoinTokenMade:    of[JoinTokenMade](1).adds(2, "key", "role", "nodes"),
	TypeJoinTokenUsed:    of[JoinTokenUsed](1),
	TypeConfigApplied:    of[ConfigApplied](1).adds(2, "sealed_to"),
	TypeApprovalAsked:    of[ApprovalAsked](1),
	TypeApprovalVoted:    of[ApprovalVoted](1),
	TypeApprovalEnded:    of[ApprovalEnded](1),
	TypeRevoked:          of[Revoked](1).adds(2, "scope", "until"),
	TypeRevocationUndone: of[RevocationUndone](1),
	TypeRevocationReport: of[RevocationReport](1),
	TypeLeaseLengthened:  of[LeaseLengthened](2),
	TypeCheckpoint:       of[CheckpointCosigned](2),
	TypeRevocationFenced: of[RevocationFenced](2),
}

// Upcaster turns a payload of one version into the next version's. It is pure:
// the same bytes give the same bytes on every node and in every build.
type Upcaster func(payload []byte) ([]byte, error)

// kind is one type with its versions, the first first.
type kind struct {
	newPayload func() any // a pointer to the newest version's struct
	versions   []step
}

// step is one version of a type.
type step struct {
	level uint32   // feature level from which it may be stored
	up    Upcaster // from the version before; nil for the first, and for one that only adds
	added []string // optional fields that the version before has not; nil unless it only adds
}

// of begins a type at its first version.
func of[T any](level uint32) *kind {
	return &kind{newPayload: func() any { return new(T) }, versions: []step{{level: level}}}
}

// adds is a next version with more optional fields.
func (k *kind) adds(level uint32, paths ...string) *kind {
	k.versions = append(k.versions, step{level: level, added: paths})
	return k
}

// then is a next version that up leads to.
func (k *kind) then(level uint32, up Upcaster) *kind {
	k.versions = append(k.versions, step{level: level, up: up})
	return k
}

// Known tells whether this build understands events of that type and version.
// A node that meets a committed event it does not know stops: skipping it
// would make its state differ from everyone else's.
func Known(typ string, version uint32) bool { return Needs(typ, version) > 0 }

// Needs is the feature level from which events of that type and version may be
// stored; 0 when this build does not know them.
func Needs(typ string, version uint32) uint32 {
	k := kinds[typ]
	if k == nil || version == 0 || int(version) > len(k.versions) {
		return 0
	}
	return k.versions[version-1].level
}

// Newest is the newest version of a type that this build knows, 0 for none.
func Newest(typ string) uint32 {
	if k := kinds[typ]; k != nil {
		return uint32(len(k.versions))
	}
	return 0
}

// Types lists all types this build knows, sorted.
func Types() []string { return slices.Sorted(maps.Keys(kinds)) }

// LevelError refuses to store an event before every member can read it.
type LevelError struct {
	Type     string
	Version  uint32
	Needs    uint32
	Have     uint32   // the cluster's feature level
	HeldBack []string // who holds the level back and why, when that is known
}

func (e *LevelError) Error() string {
	s := fmt.Sprintf("%s version %d needs feature level %d and the cluster is at %d", e.Type, e.Version, e.Needs, e.Have)
	if len(e.HeldBack) > 0 {
		return s + ": held back by " + strings.Join(e.HeldBack, "; ")
	}
	return s + ": it rises when every member runs a build that supports it; see `sallyport status`"
}

// Encode writes payload, a value or pointer of the type's struct, as the newest
// version that may be stored at a feature level. Where that is an older one
// than the newest, it must mean the same: every field it lacks is absent. If
// none does the error is a *LevelError.
func Encode(level uint32, typ string, payload any) (version uint32, data []byte, err error) {
	k := kinds[typ]
	if k == nil {
		return 0, nil, fmt.Errorf("%w: %q", ErrUnknownType, typ)
	}
	if data, err = json.Marshal(payload); err != nil {
		return 0, nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	var fields any
	for v := len(k.versions); v > 0; v-- {
		s := k.versions[v-1]
		if s.level <= level {
			return uint32(v), data, nil
		}
		if fields == nil && s.added != nil {
			if err := json.Unmarshal(data, &fields); err != nil {
				return 0, nil, fmt.Errorf("%w: %w", ErrInvalid, err)
			}
		}
		uses := func(path string) bool { return present(fields, strings.Split(path, ".")) }
		if s.added == nil || slices.ContainsFunc(s.added, uses) {
			return 0, nil, &LevelError{Type: typ, Version: uint32(v), Needs: s.level, Have: level}
		}
	}
	panic("event: a type's first version only adds to nothing") // s.added is nil for it
}

// present tells whether a decoded JSON value has something at a path.
func present(v any, path []string) bool {
	if len(path) == 0 {
		return true
	}
	switch v := v.(type) {
	case map[string]any:
		inner, ok := v[path[0]]
		return ok && present(inner, path[1:])
	case []any:
		return slices.ContainsFunc(v, func(e any) bool { return present(e, path) })
	}
	return false
}

// Upcast turns a stored payload into the newest version's. The stored bytes are
// not changed: they stay what is hashed. The result may share them.
func Upcast(typ string, version uint32, payload []byte) ([]byte, error) {
	if !Known(typ, version) {
		return nil, fmt.Errorf("%w: %q version %d", ErrUnknownType, typ, version)
	}
	for i, s := range kinds[typ].versions[version:] {
		if s.up == nil {
			continue
		}
		var err error
		if payload, err = s.up(payload); err != nil {
			return nil, fmt.Errorf("%s from version %d to %d: %w", typ, int(version)+i, int(version)+i+1, err)
		}
	}
	return payload, nil
}

// Decode reads the payload of a stored event as the newest version's struct,
// which T must be.
func Decode[T any](e Event) (T, error) {
	var p T
	if k := kinds[e.Type]; k != nil {
		if _, ok := k.newPayload().(*T); !ok {
			return p, fmt.Errorf("%s is not read as a %T", e.Type, p)
		}
	}
	data, err := Upcast(e.Type, e.Version, e.Payload)
	if err == nil {
		err = json.Unmarshal(data, &p)
	}
	return p, err
}

// DecodeAny reads the payload of a stored event, whatever its type, as a
// pointer to the newest version's struct.
func DecodeAny(e Event) (any, error) {
	data, err := Upcast(e.Type, e.Version, e.Payload)
	if err != nil {
		return nil, err
	}
	p := kinds[e.Type].newPayload()
	return p, json.Unmarshal(data, p)
}

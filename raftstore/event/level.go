package event

import "fmt"

// FeatureLevel says that from here on events that need up to Level may be
// stored: every member runs a build that supports it. It never goes down. A
// build that does not support it stops there.
type FeatureLevel struct {
	Level uint32 `json:"level"`
}

// FeatureLevelAggregate is what FeatureLevel happens to.
const FeatureLevelAggregate = "feature_level"

// RaiseTo proposes a feature level; expect is the version of the aggregate
// FeatureLevelAggregate.
func RaiseTo(level uint32, expect uint64, id ID, actor Actor) Proposal {
	return Proposal{
		ID: id, Actor: actor, Type: TypeFeatureLevel, Version: 1, Aggregate: FeatureLevelAggregate, Expect: expect,
		Payload: fmt.Appendf(nil, `{"level":%d}`, level),
	}
}

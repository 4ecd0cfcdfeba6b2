package event

// known holds, for each type, the newest version of its payload this build
// understands. Versions start at 1 and none is ever taken out: a stored event
// is read for ever.
var known = map[string]uint32{
	TypeClusterCreated:   1,
	TypeNodeJoined:       1,
	TypeNodeRemoved:      1,
	TypeJoinTokenMade:    1,
	TypeJoinTokenUsed:    1,
	TypeConfigApplied:    1,
	TypeApprovalAsked:    1,
	TypeApprovalVoted:    1,
	TypeApprovalEnded:    1,
	TypeRevoked:          1,
	TypeRevocationUndone: 1,
	TypeRevocationReport: 1,
}

// Known tells whether this build understands events of that type and version.
// A node that meets a committed event it does not know stops: skipping it
// would make its state differ from everyone else's.
func Known(typ string, version uint32) bool {
	return version > 0 && version <= known[typ]
}

package api

import (
	"encoding/json"
	"time"

	"github.com/sallyport/sallyport/node/eventlog"
	"github.com/sallyport/sallyport/node/gossip"
	"github.com/sallyport/sallyport/node/session"
	"github.com/sallyport/sallyport/raftstore/event"
)

// Problem is every error's body.
type Problem struct {
	Code   string   `json:"code"`            // for programs: unauthenticated, forbidden, not-found, conflict, invalid, unavailable, internal
	Error  string   `json:"error"`           // for people: what, why and what to do
	Lines  []string `json:"lines,omitempty"` // one per problem in an uploaded configuration
	Status int      `json:"-"`
}

// Whoami says who the caller is to this cluster.
type Whoami struct {
	Subject string         `json:"subject"`
	Kind    string         `json:"kind"`
	Groups  []string       `json:"groups"`
	Claims  map[string]any `json:"claims,omitempty"`
	Expires time.Time      `json:"expires"`
	Node    string         `json:"node"`
}

// NodeStatus is one node as it sees itself.
type NodeStatus struct {
	Node         string    `json:"node"`
	Addr         string    `json:"addr"`
	Reachable    bool      `json:"reachable"`
	Serving      bool      `json:"serving"` // lets clients in: it knows what the cluster had agreed on when it started
	Error        string    `json:"error,omitempty"`
	Version      string    `json:"version,omitempty"`
	Started      time.Time `json:"started,omitzero"`
	Now          time.Time `json:"now,omitzero"`
	RaftState    string    `json:"raft_state,omitempty"`
	Voter        bool      `json:"voter"`
	Leader       string    `json:"leader,omitempty"`
	Term         uint64    `json:"term,omitempty"`
	LastIndex    uint64    `json:"last_index,omitempty"`
	CommitIndex  uint64    `json:"commit_index,omitempty"`
	AppliedIndex uint64    `json:"applied_index,omitempty"`
	Events       uint64    `json:"events,omitempty"`
	Chain        string    `json:"chain,omitempty"` // hash chain over all events, hex: equal on nodes with equal events
	ConfigIndex  uint64    `json:"config_index,omitempty"`
	ConfigError  string    `json:"config_error,omitempty"`
	FeatureLevel uint32    `json:"feature_level,omitempty"` // the newest that this node offers
	Sessions     int       `json:"sessions"`
	Spool        Spool     `json:"spool,omitzero"`
	Dev          bool      `json:"dev,omitempty"`
	// EventLog tells how far the event log is vouched for, and exported.
	EventLog eventlog.Status `json:"event_log,omitzero"`
	// Gossip is what this node hears of all members: a hint, which may be wrong.
	Gossip []gossip.Member `json:"gossip,omitempty"`
	// Targets tells, by name, whether the administrative login works ("ok" or why not).
	Targets map[string]string `json:"targets,omitempty"`
}

// Spool is how far a node's recordings are behind the store.
type Spool struct {
	Open         int           `json:"open"`
	BytesWaiting int64         `json:"bytes_waiting"`
	OldestUnsent time.Duration `json:"oldest_unsent_ns"`
	Store        string        `json:"store"`
	LastError    string        `json:"last_error,omitempty"`
}

// Status is the whole cluster as the answering node could reach it.
type Status struct {
	Cluster string       `json:"cluster"`
	Nodes   []NodeStatus `json:"nodes"`
	// FeatureLevel says which events may be stored; HeldBack names the members
	// that keep it from rising to what the answering node supports, and why.
	FeatureLevel uint32   `json:"feature_level"`
	HeldBack     []string `json:"held_back,omitempty"`
}

// Sessions are the live sessions of the nodes that answered.
type Sessions struct {
	Sessions    []session.Info    `json:"sessions"`
	Unreachable map[string]string `json:"unreachable,omitempty"` // nodes that did not answer, and why
}

// ConfigUpload is a configuration directory, its secrets apart.
type ConfigUpload struct {
	Files   []event.ConfigFile `json:"files"`
	Secrets map[string][]byte  `json:"secrets,omitempty"` // name -> value; names without one are kept
	// Expect is the index of the configuration the plan was made against; an
	// apply on any other is refused.
	Expect uint64 `json:"expect"`
	// DryRun only plans.
	DryRun bool `json:"dry_run,omitempty"`
}

// ConfigResult is what an upload changed, or would.
type ConfigResult struct {
	Changes []string `json:"changes"`
	Index   uint64   `json:"index"` // of the configuration: applied, or planned against
	Applied bool     `json:"applied"`
}

// ConfigDownload is the applied configuration, secrets left out.
type ConfigDownload struct {
	Index       uint64             `json:"index"`
	Digest      string             `json:"digest"`
	Files       []event.ConfigFile `json:"files"`
	SecretNames []string           `json:"secret_names"`
}

// JoinTokenRequest asks for a token for `cluster join`.
type JoinTokenRequest struct {
	TTL  time.Duration `json:"ttl_ns"`
	Role string        `json:"role,omitempty"` // voter (also when empty) or gateway
	// Key is the token's Ed25519 public key. The caller keeps the private half,
	// which is the token's secret: no node ever sees it.
	Key []byte `json:"key"`
}

// JoinTokenReply names the token that was made. Token is put together by the
// client.
type JoinTokenReply struct {
	ID      string    `json:"id"`
	Role    string    `json:"role"`
	Token   string    `json:"token,omitempty"`
	Expires time.Time `json:"expires"`
}

// JoinRequest is a new node's. It is authenticated by the token alone: Proof is
// a signature over all the rest, so that a node that hands the request on can
// neither change it nor use the token itself.
type JoinRequest struct {
	TokenID   string   `json:"token_id"`
	Proof     []byte   `json:"proof,omitempty"`  // see Sign
	Secret    string   `json:"secret,omitempty"` // of tokens that earlier builds made
	Name      string   `json:"name"`
	Addr      string   `json:"addr"`
	CSR       []byte   `json:"csr"` // DER; only its public key is used
	Hosts     []string `json:"hosts"`
	Recipient string   `json:"recipient"` // age recipient of the node
	Zone      string   `json:"zone,omitempty"`
	// FeatureLevel is what the node's build supports; 0, from the first release, means 1.
	FeatureLevel uint32 `json:"feature_level,omitempty"`
}

// JoinReply makes the node a member.
type JoinReply struct {
	Cluster string           `json:"cluster"`
	CA      []byte           `json:"ca"`   // DER
	Cert    []byte           `json:"cert"` // DER
	Peers   []event.NodeInfo `json:"peers"`
}

// RemoveNodeRequest removes a member.
type RemoveNodeRequest struct {
	Reason string        `json:"reason"`
	Drain  time.Duration `json:"drain_ns,omitempty"` // how long its sessions may go on, at most a minute
}

// RemoveNodeReply says whether the removed node has stopped serving.
type RemoveNodeReply struct {
	Committed
	Stopped bool   `json:"stopped"` // it ended its sessions and stopped before it was removed
	Detail  string `json:"detail,omitempty"`
}

// ApprovalInfo is an approval request as shown to approvers.
type ApprovalInfo struct {
	ID       string            `json:"id"`
	State    string            `json:"state"`
	Session  string            `json:"session"`
	Node     string            `json:"node"`
	Subject  string            `json:"subject"`
	Claims   map[string]any    `json:"claims,omitempty"`
	Target   string            `json:"target"`
	Database string            `json:"database"`
	Digest   string            `json:"digest"`
	Text     string            `json:"text,omitempty"` // what will run; only in a single request's answer
	Detail   map[string]string `json:"detail,omitempty"`
	Rules    []string          `json:"rules"`
	Groups   []string          `json:"groups"`
	Count    int               `json:"count"`
	Asked    time.Time         `json:"asked"`
	Expires  time.Time         `json:"expires"`
	Votes    []VoteInfo        `json:"votes,omitempty"`
	Ended    string            `json:"ended,omitempty"`
}

// VoteInfo is one approver's decision.
type VoteInfo struct {
	Approver string    `json:"approver"`
	Approve  bool      `json:"approve"`
	Comment  string    `json:"comment,omitempty"`
	At       time.Time `json:"at"`
}

// VoteRequest approves or denies.
type VoteRequest struct {
	Comment string `json:"comment,omitempty"`
}

// RevokeRequest revokes what its scope says.
type RevokeRequest struct {
	Scope  event.Scope `json:"scope,omitzero"`
	Reason string      `json:"reason"`
	// Subject is short for the scope of a subject.
	Subject string `json:"subject,omitempty"`
	// Timeout is how long the answer waits for every node to have stopped, at
	// most a minute; 0 means 20 s. The cluster goes on by itself.
	Timeout time.Duration `json:"timeout_ns,omitempty"`
}

// RevocationInfo is a revocation and what it did.
type RevocationInfo struct {
	ID         string      `json:"id"`
	Scope      event.Scope `json:"scope"`
	Reason     string      `json:"reason"`
	At         time.Time   `json:"at"`
	Index      uint64      `json:"index"`
	Until      time.Time   `json:"until,omitzero"` // only credentials issued until then end; zero: all
	Undone     time.Time   `json:"undone,omitzero"`
	UndoReason string      `json:"undo_reason,omitempty"`
	// Complete says that no node passes a byte of it any more. Fenced is when
	// that was stored.
	Complete bool      `json:"complete"`
	Fenced   time.Time `json:"fenced,omitzero"`
	// Limit is how long a node that cannot be reached may pass on what was
	// revoked, by the rules and leases in force: a duration, or "no bound".
	Limit string             `json:"limit,omitempty"`
	Nodes []event.NodeFenced `json:"nodes,omitempty"`
}

// UndoRequest undoes a revocation.
type UndoRequest struct {
	Reason string `json:"reason"`
}

// EventInfo is an event as shown.
type EventInfo struct {
	Seq       uint64         `json:"seq"`
	Index     uint64         `json:"index"`
	Term      uint64         `json:"term"`
	Time      time.Time      `json:"time"`
	Type      string         `json:"type"`
	Version   uint32         `json:"version"`
	Aggregate string         `json:"aggregate"`
	Actor     event.Actor    `json:"actor"`
	Chain     string         `json:"chain"`
	Payload   map[string]any `json:"payload"`
}

// Proposal is what one node asks the leader to propose for it: the opening and
// the ending of an approval request, and secrets sealed anew.
type Proposal struct {
	Type    string `json:"type"`
	ID      event.ID
	Payload []byte `json:"payload"`
	Token   string `json:"token,omitempty"` // the caller's own token, verified again by the leader
}

// SealedProposal is a Proposal's payload for secrets sealed anew.
type SealedProposal struct {
	event.SecretsSealed
	Expect uint64 `json:"expect"` // the version of "config" that they were read at
}

// Committed answers a state change.
type Committed struct {
	Seq   uint64    `json:"seq"`
	Index uint64    `json:"index"`
	Time  time.Time `json:"time"`
}

// StateAt is what the cluster had agreed on at a moment.
type StateAt struct {
	Seq          uint64           `json:"seq"`   // of the newest event then, 0 before the first
	Index        uint64           `json:"index"` // and its Raft index
	Time         time.Time        `json:"time"`  // what approvals' expiry is judged by
	Cluster      string           `json:"cluster"`
	FeatureLevel uint32           `json:"feature_level"`
	Nodes        []MemberInfo     `json:"nodes"`
	Removed      []string         `json:"removed,omitempty"`
	ConfigIndex  uint64           `json:"config_index"`
	ConfigDigest string           `json:"config_digest,omitempty"`
	ConfigError  string           `json:"config_error,omitempty"`
	Files        []string         `json:"files,omitempty"`
	Targets      []string         `json:"targets,omitempty"`
	Providers    []string         `json:"providers,omitempty"`
	Revocations  []RevocationInfo `json:"revocations"` // in force
	Approvals    []ApprovalInfo   `json:"approvals"`   // pending, or approved and not used
}

// MemberInfo is a member of the cluster.
type MemberInfo struct {
	Name string `json:"name"`
	Addr string `json:"addr"`
	Role string `json:"role"`
}

// ExplainRequest asks what policy decided, or would have, at a moment. Who: a
// token's claims, or a subject with groups and claims as a recording shows
// them. What: a statement, or an action with its resource.
type ExplainRequest struct {
	At string `json:"at,omitempty"` // a Raft index, a time as in RFC 3339, "" for now

	Token    json.RawMessage `json:"token,omitempty"`   // claims of a token: an object
	Subject  string          `json:"subject,omitempty"` // provider/name
	Kind     string          `json:"kind,omitempty"`    // User or Workload; default the provider's
	Groups   []string        `json:"groups,omitempty"`
	Claims   json.RawMessage `json:"claims,omitempty"`   // an object
	IssuedAt time.Time       `json:"issued_at,omitzero"` // of the credential; default the moment
	TokenID  string          `json:"token_id,omitempty"` // of the credential, for revocations of a token

	Target        string   `json:"target,omitempty"`
	Database      string   `json:"database,omitempty"`
	Profile       string   `json:"profile,omitempty"`
	Statement     string   `json:"statement,omitempty"`
	Action        string   `json:"action,omitempty"`
	Resource      []string `json:"resource,omitempty"` // within the database: schema, table or function, column
	Client        string   `json:"client,omitempty"`   // IP address
	Node          string   `json:"node,omitempty"`     // default the node that answers
	Approved      []string `json:"approved,omitempty"` // approval rules held to be lifted
	InTransaction bool     `json:"in_transaction,omitempty"`
}

// Explanation answers an ExplainRequest.
type Explanation struct {
	Seq          uint64         `json:"seq"`
	Index        uint64         `json:"index"`
	Time         time.Time      `json:"time"`
	ConfigIndex  uint64         `json:"config_index"`
	ConfigDigest string         `json:"config_digest,omitempty"`
	Subject      string         `json:"subject"`
	Kind         string         `json:"kind"`
	Groups       []string       `json:"groups,omitempty"`
	Claims       map[string]any `json:"claims,omitempty"`
	Node         string         `json:"node"`

	Verdict
	// Connect is whether a session may be opened on the database; nil without a target.
	Connect *Verdict        `json:"connect,omitempty"`
	Pairs   []ExplainedPair `json:"pairs,omitempty"` // each by itself; all must be permitted
	// Revocations are those in force that end what the subject stands for.
	Revocations []RevocationInfo `json:"revocations"`
	// Problem is the rule that refuses the statement before policy is asked.
	Problem string `json:"problem,omitempty"`
	// Catalogue is when the target's catalogue was read, by which names in the
	// statement were resolved: catalogues of the past are not kept.
	Catalogue time.Time `json:"catalogue,omitzero"`
}

// Verdict is a decision and the rule behind it.
type Verdict struct {
	Effect   string        `json:"effect"` // permit, hold, refuse
	Rule     string        `json:"rule"`
	Where    string        `json:"where,omitempty"` // file:line of the rule
	Text     string        `json:"text,omitempty"`  // of the rule
	Reason   string        `json:"reason,omitempty"`
	Approval *ApprovalOwed `json:"approval,omitempty"`
	Durable  bool          `json:"durable,omitempty"` // its record is synced before it is forwarded
}

// ApprovalOwed is what must be granted before a held operation runs.
type ApprovalOwed struct {
	Rules   []string `json:"rules"`
	Groups  []string `json:"groups"`
	Count   int      `json:"count"`
	Expires string   `json:"expires"`
}

// ExplainedPair is one thing a statement does.
type ExplainedPair struct {
	Action   string `json:"action"`
	Resource string `json:"resource"`
	Verdict
}

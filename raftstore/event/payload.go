package event

import "time"

// Types of events. Payloads are JSON of the struct named beside each.
const (
	TypeClusterCreated   = "cluster.created"       // ClusterCreated, aggregate "cluster"
	TypeFeatureLevel     = "cluster.feature_level" // FeatureLevel, aggregate "feature_level"
	TypeNodeJoined       = "node.joined"           // NodeJoined, aggregate "node/NAME"
	TypeVotersSet        = "cluster.voters"        // VotersSet, aggregate "voters"
	TypeNodeRemoved      = "node.removed"          // NodeRemoved, aggregate "node/NAME"
	TypeNodeRenewed      = "node.renewed"          // NodeRenewed, aggregate "node/NAME"
	TypeSecretsSealed    = "secrets.sealed"        // SecretsSealed, aggregate "config"
	TypeClusterRestored  = "cluster.restored"      // ClusterRestored, aggregate "cluster"
	TypeJoinTokenMade    = "jointoken.made"        // JoinTokenMade, aggregate "jointoken/ID"
	TypeJoinTokenUsed    = "jointoken.used"        // JoinTokenUsed, aggregate "jointoken/ID"
	TypeConfigApplied    = "config.applied"        // ConfigApplied, aggregate "config"
	TypeApprovalAsked    = "approval.asked"        // ApprovalAsked, aggregate "approval/ID"
	TypeApprovalVoted    = "approval.voted"        // ApprovalVoted, aggregate "approval/ID"
	TypeApprovalEnded    = "approval.ended"        // ApprovalEnded, aggregate "approval/ID": used, expired, cancelled
	TypeRevoked          = "revocation.made"       // Revoked, aggregate "revocation/ID"
	TypeRevocationUndone = "revocation.undone"     // RevocationUndone, aggregate "revocation/ID"
	TypeRevocationReport = "revocation.report"     // RevocationReport, aggregate "revocation/ID"; read only
	TypeRevocationFenced = "revocation.fenced"     // RevocationFenced, aggregate "revocation/ID"
	TypeLeaseLengthened  = "lease.lengthened"      // LeaseLengthened, aggregate "lease"
	TypeCheckpoint       = "checkpoint.cosigned"   // CheckpointCosigned, aggregate "checkpoint": its version is the checkpoint's number
)

// Sealed is a secret encrypted (age, X25519) to the nodes that may open it, or,
// before a SecretsSealed, to the cluster's vault key.
type Sealed []byte

// Recipients are age recipients, sorted: whom something is sealed to.
type Recipients []string

// NodeInfo is a member as all know it.
type NodeInfo struct {
	Name      string `json:"name"`
	Addr      string `json:"addr"`       // host:port, the same port number for TCP and QUIC
	Role      string `json:"role"`       // voter, gateway or connector, as in its certificate
	Cert      []byte `json:"cert"`       // DER; its key signs the node's recordings
	Recipient string `json:"recipient"`  // age recipient of the node
	VaultWrap []byte `json:"vault_wrap"` // the vault identity, encrypted to Recipient
	// Zone is where it was when it joined, "" for a cluster's first node: a hint
	// for choosing whom to be fed by.
	Zone string `json:"zone,omitempty"`
}

type ClusterCreated struct {
	ID             string   `json:"id"`
	CA             []byte   `json:"ca"`     // DER
	CAKey          Sealed   `json:"ca_key"` // PKCS#8 DER, sealed to the vault
	VaultRecipient string   `json:"vault_recipient"`
	Node           NodeInfo `json:"node"`
	AdminCertFP    string   `json:"admin_cert_fp"` // SHA-256 hex of the bootstrap administrator's certificate
}

type NodeJoined struct {
	Node  NodeInfo `json:"node"`
	Token string   `json:"token"` // id of the join token it used
}

// NodeRenewed gives a member a new certificate, or, with Retired, ends the use of
// the one before: until then both count, so that nothing is cut in between.
type NodeRenewed struct {
	Name    string `json:"name"`
	Cert    []byte `json:"cert"` // DER; of a new key, for the same name and role
	Retired bool   `json:"retired,omitempty"`
}

// SecretsSealed seals secrets anew, to the nodes that may open them now. What is
// absent stays as it was. The first one ends the use of the cluster's one vault
// key: from then on each secret is sealed to its nodes' own keys.
type SecretsSealed struct {
	Secrets  map[string]Sealed     `json:"secrets,omitempty"`   // the configuration's, by name
	SealedTo map[string]Recipients `json:"sealed_to,omitempty"` // whom each of Secrets is sealed to now
	Keys     map[string]SealedKey  `json:"keys,omitempty"`      // the cluster's own
}

// ClusterRestored is the first event of a cluster that was made from a backup of
// another: all that were members are none any more, Node is the one there is, and
// to it all secrets of the backup are sealed.
type ClusterRestored struct {
	Backup  string        `json:"backup"` // SHA-256 hex of the backup's content
	Seq     uint64        `json:"seq"`    // the newest event in the backup
	Node    NodeInfo      `json:"node"`
	Secrets SecretsSealed `json:"secrets"`
	Missing []string      `json:"missing,omitempty"` // secrets that were not in the backup
}

// SealedKey is a key of the cluster, such as its authority's.
type SealedKey struct {
	Sealed   Sealed     `json:"sealed"`
	SealedTo Recipients `json:"sealed_to"`
}

// VotersSet says how many voters the cluster is to have.
type VotersSet struct {
	Voters int `json:"voters"` // 3 or 5; 3 before the first of these
}

type NodeRemoved struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

// JoinTokenMade lets one node join. Since version 2 the token's secret is a key
// that its maker keeps: nodes see the public half only, and a join request is
// signed with it.
type JoinTokenMade struct {
	ID      string    `json:"id"`
	Hash    []byte    `json:"hash,omitempty"` // version 1: SHA-256 of the secret part
	Key     []byte    `json:"key,omitempty"`  // version 2: Ed25519 public key
	Expires time.Time `json:"expires"`
	Role    string    `json:"role,omitempty"` // of the node that joins with it; voter when empty
	// Nodes are those that had a hand in it, the leader and the one that took the
	// call: the token is dead when one of them is removed.
	Nodes []string `json:"nodes,omitempty"`
}

type JoinTokenUsed struct {
	ID   string `json:"id"`
	Node string `json:"node"`
}

// ConfigFile is one file of an applied directory, secrets taken out.
type ConfigFile struct {
	Path string `json:"path"` // relative, slashes
	Data []byte `json:"data"`
}

// ConfigApplied replaces the whole configuration.
type ConfigApplied struct {
	Files   []ConfigFile      `json:"files"`
	Secrets map[string]Sealed `json:"secrets"` // "target/NAME/admin-password"
	// SealedTo says whom each secret is sealed to; a secret not in it is sealed to
	// the vault key.
	SealedTo map[string]Recipients `json:"sealed_to,omitempty"`
	Digest   string                `json:"digest"` // SHA-256 hex over files, so that a second apply of the same shows no change
}

type ApprovalAsked struct {
	ID       string            `json:"id"`
	Session  string            `json:"session"`
	Node     string            `json:"node"`
	Subject  string            `json:"subject"`
	Issuer   string            `json:"issuer,omitempty"` // of the requester's token
	Name     string            `json:"name,omitempty"`   // its sub
	Persons  []string          `json:"persons"`          // people named in the requester's claims
	Claims   map[string]any    `json:"claims"`
	Target   string            `json:"target"`
	Database string            `json:"database"`
	Digest   []byte            `json:"digest"` // SHA-256 over everything that decides what will run
	Text     Sealed            `json:"text"`   // what will run, for the approver to read; at most 64 KiB before sealing
	Detail   map[string]string `json:"detail"` // role, settings, action list: shown to the approver
	Rules    []string          `json:"rules"`
	Groups   []string          `json:"groups"`
	Count    int               `json:"count"`
	Expires  time.Time         `json:"expires"`
	Index    uint64            `json:"index"` // policy index it was held at
}

type ApprovalVoted struct {
	ID       string `json:"id"`
	Approver string `json:"approver"` // subject id
	Approve  bool   `json:"approve"`
	Comment  string `json:"comment,omitempty"`
	Digest   []byte `json:"digest"` // what the approver saw
	// Proof is the approver's own credential (token, or signed request), sealed:
	// the node that releases the hold verifies it again itself.
	Proof Sealed `json:"proof"`
}

type ApprovalEnded struct {
	ID     string `json:"id"`
	How    string `json:"how"` // used, expired, cancelled
	Reason string `json:"reason,omitempty"`
}

// CheckpointCosigned is a head of the event log that a majority of the voters
// has vouched for, each from its own events: see raftstore/tlog.
type CheckpointCosigned struct {
	Size uint64 `json:"size"` // events, of which this one is none
	Root []byte `json:"root"` // of the Merkle tree over them
	Note string `json:"note"` // the checkpoint with its cosignatures, as it is exported
}

// LeaseLengthened says that from here on leaders may grant leases of up to this
// length; the longest ever said is what a new leader waits out.
type LeaseLengthened struct {
	Nanoseconds int64 `json:"nanoseconds"`
}

// Package tlog is the event log as a transparency log: the Merkle tree over
// all events, proofs, checkpoints with the cosignatures of voters, and the
// objects (tiles, entry bundles, checkpoints) by which somebody without access
// to the cluster can verify all of it. docs/event-log.md is the specification.
//
// The tree is that of RFC 6962 §2.1 over the envelopes of the events; leaf i is
// event i+1. The arithmetic of proofs is golang.org/x/mod/sumdb/tlog's.
//
// The package reads no clock, knows no network and no store of objects; who
// asks whom to cosign, and where objects go, is node/eventlog's.
package tlog

import (
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"
)

const (
	// HashSize is the length of a Hash.
	HashSize = tlog.HashSize
	// TileHeight is the height of tiles: the 8 of tlog-tiles.
	TileHeight = 8
	// TileWidth is the number of hashes in a full tile and of entries in a full
	// bundle.
	TileWidth = 1 << TileHeight
)

// Hash is a node of the tree; its String is base64.
type Hash = tlog.Hash

// ErrProof says that a proof does not prove what it should.
var ErrProof = errors.New("the proof is wrong")

// LeafHash is the leaf of an event: SHA-256(0x00 || envelope).
func LeafHash(envelope []byte) Hash { return tlog.RecordHash(envelope) }

// CheckInclusion checks that the tree of size leaves with that root has leaf at
// index.
func CheckInclusion(proof []Hash, size uint64, root Hash, index uint64, leaf Hash) error {
	if size > maxSize || index >= size {
		return fmt.Errorf("%w: leaf %d of a tree of %d", ErrProof, index, size)
	}
	if err := tlog.CheckRecord(proof, int64(size), root, int64(index), leaf); err != nil {
		return fmt.Errorf("%w: leaf %d of a tree of %d: %w", ErrProof, index, size, err)
	}
	return nil
}

// CheckConsistency checks that the tree of size leaves with that root begins
// with the tree of oldSize leaves with oldRoot.
func CheckConsistency(proof []Hash, size uint64, root Hash, oldSize uint64, oldRoot Hash) error {
	if size > maxSize || oldSize > size || oldSize == 0 {
		return fmt.Errorf("%w: sizes %d and %d", ErrProof, oldSize, size)
	}
	if err := tlog.CheckTree(proof, int64(size), root, int64(oldSize), oldRoot); err != nil {
		return fmt.Errorf("%w: trees of %d and %d: %w", ErrProof, oldSize, size, err)
	}
	return nil
}

// maxSize bounds sizes that others state, so that they fit what the arithmetic
// takes; at a million events a second it lasts 35,000 years.
const maxSize = 1 << 60

// subtree is the hash of a perfect subtree from its lowest hashes; their number
// is a power of two, at most TileWidth. It overwrites hashes.
func subtree(hashes []Hash) Hash {
	for n := len(hashes); n > 1; n /= 2 {
		for i := range n / 2 {
			hashes[i] = tlog.NodeHash(hashes[2*i], hashes[2*i+1])
		}
	}
	return hashes[0]
}

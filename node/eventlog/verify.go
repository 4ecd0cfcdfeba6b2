package eventlog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	sumdb "golang.org/x/mod/sumdb/tlog"

	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/tlog"
	"github.com/sallyport/sallyport/recording"
)

// Kind names what is wrong with a log.
type Kind string

// What Verify finds.
const (
	WrongCluster       Kind = "wrong-cluster"       // its CA is not the one that is trusted
	RolledBack         Kind = "rolled-back"         // it ends before a checkpoint that was seen
	Forked             Kind = "forked"              // a majority vouches for something else than what is there, or was seen
	AlteredEntry       Kind = "altered-entry"       // an event is not the one that was logged
	AlteredTile        Kind = "altered-tile"        // hashes are not those of the events
	AlteredCheckpoint  Kind = "altered-checkpoint"  // not the one that the log itself names
	AlteredCertificate Kind = "altered-certificate" // not the one that the log itself names
	Forged             Kind = "forged"              // a cosignature is not of the voter it names
	NotCosigned        Kind = "not-cosigned"        // no majority of those who were voters vouches for it
	Missing            Kind = "missing-object"      // deleted, or never written
	Truncated          Kind = "truncated"           // an object that ends early, or is not one of its kind
	Foreign            Kind = "foreign-object"      // belongs to no log
	Broken             Kind = "broken-log"          // events whose numbers, times or order contradict each other
	Unknown            Kind = "unknown-event"       // this build cannot read it; a newer one may
	ForgedMember       Kind = "forged-member"       // a voter whose certificate the CA did not sign
)

// Problem is one thing that is wrong.
type Problem struct {
	Kind   Kind   `json:"kind"`
	Object string `json:"object"` // its key, or "event N"
	Text   string `json:"text"`
}

// Report is the outcome of Verify.
type Report struct {
	Cluster     string    `json:"cluster"`
	CA          string    `json:"ca"` // SHA-256 of the certificate, hex
	Checkpoints uint64    `json:"checkpoints"`
	Events      uint64    `json:"events"` // covered by the newest checkpoint
	Root        string    `json:"root"`
	Chain       string    `json:"chain"` // hex, as `status` shows it for that event
	Newest      time.Time `json:"newest,omitzero"`
	Voters      []string  `json:"voters"` // as of the newest checkpoint
	Cosigned    []string  `json:"cosigned"`
	// Anchored says that the log was held against a checkpoint known before.
	Anchored bool      `json:"anchored"`
	Problems []Problem `json:"problems"`
	More     int       `json:"more,omitempty"` // problems beyond those listed

	// Seen is what to remember for the next time, when nothing is wrong.
	Seen *State `json:"-"`
}

// OK says whether nothing is wrong.
func (r *Report) OK() bool { return len(r.Problems) == 0 }

const maxProblems = 1000

// State is what an auditor remembers: the newest checkpoint seen, and who the
// voters were.
type State struct {
	Cluster string              `json:"cluster"`
	CA      string              `json:"ca"` // SHA-256 of the certificate, hex
	Number  uint64              `json:"number"`
	Size    uint64              `json:"size"`
	Root    tlog.Hash           `json:"root"`
	Voters  map[string][][]byte `json:"voters"` // certificates, DER
	Seen    time.Time           `json:"seen"`
}

// VerifyOptions say what to trust.
type VerifyOptions struct {
	// CA is the SHA-256 of the cluster's CA certificate (DER).
	CA [32]byte
	// Seen is what Verify returned the last time, nil for the first.
	Seen *State
	// From is a checkpoint known from elsewhere, nil for none. What is before it
	// must lead to it and needs no cosignatures.
	From *tlog.Checkpoint
	// Progress, when not nil, is called now and then.
	Progress func(events, of uint64)
	Now      func() time.Time // default time.Now
}

// Verify reads a whole log and checks it: every event against the tree, every
// checkpoint's cosignatures against those who were voters then, that all
// checkpoints are of one log, and that it leads on from what was seen. The
// error tells that it could not be carried out; what is wrong is in the report.
func Verify(ctx context.Context, src Source, o VerifyOptions) (*Report, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	v := &verifier{src: src, o: o, rep: &Report{Problems: []Problem{}}, notes: map[uint64][32]byte{}}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err := v.run(ctx)
	if errors.Is(err, errStop) {
		err = nil
	}
	if err != nil {
		return nil, err
	}
	v.finish()
	return v.rep, nil
}

// errStop: a problem that makes the rest senseless was reported.
var errStop = errors.New("stop")

type verifier struct {
	src  Source
	o    VerifyOptions
	rep  *Report
	size uint64 // of the newest checkpoint
	root tlog.Hash

	b       tlog.Builder
	members tlog.Members
	trusted tlog.Voters
	chain   [32]byte
	last    event.Event
	good    *State // the newest checkpoint that is all right

	newest      uint64              // number of the newest stored checkpoint
	cp          *loaded             // the next one to reach
	notes       map[uint64][32]byte // hashes of those reached whose event has not come
	logged      uint64              // number of the newest checkpoint that the log names
	gap         bool                // an event could not be read: who may cosign is not certain
	hashErr     error               // from tiles, of the builder's callback
	forked      bool
	fullTiles   func() (tile, bool)
	checkpoints func() (*loaded, bool)
}

func (v *verifier) problem(k Kind, object, format string, args ...any) {
	if len(v.rep.Problems) == maxProblems {
		v.rep.More++
		return
	}
	v.rep.Problems = append(v.rep.Problems, Problem{Kind: k, Object: object, Text: fmt.Sprintf(format, args...)})
}

// loaded is a checkpoint from the store.
type loaded struct {
	number uint64
	note   []byte
	tlog.Checkpoint
	err error // it could not be read or is none
}

// tile is one 256-wide piece of the log from the store.
type tile struct {
	n      uint64
	width  int
	bundle []byte
	hashes []byte // of level 0
	err    error  // of the bundle
	terr   error  // of the hashes
}

func (v *verifier) run(ctx context.Context) error {
	var err error
	if v.newest, err = Newest(ctx, v.src); err != nil {
		return err
	}
	v.rep.Checkpoints = v.newest
	if v.newest == 0 {
		if v.o.Seen != nil {
			v.problem(RolledBack, tlog.CheckpointRoot, "there is no checkpoint at all, and one of %d events had been seen", v.o.Seen.Size)
		} else {
			v.problem(Missing, tlog.CheckpointRoot, "there is no checkpoint: nothing was exported yet, this is no store of an event log, or all was deleted")
		}
		return errStop
	}
	end, err := v.findEnd(ctx)
	if err != nil {
		return err
	}
	v.checkpoints = prefetch(ctx, end, func(ctx context.Context, i uint64) *loaded { return v.loadCheckpoint(ctx, i+1) })
	v.nextCheckpoint()
	tiles := (v.size + tlog.TileWidth - 1) / tlog.TileWidth
	v.fullTiles = prefetch(ctx, tiles, v.loadTile)
	v.b.Full = func(level int, n uint64, hashes []tlog.Hash) {
		if level > 0 {
			v.checkTile(ctx, level, n, hashes)
		}
	}
	for {
		t, ok := v.fullTiles()
		if !ok {
			break
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := v.takeTile(ctx, t); err != nil {
			return err
		}
		if v.hashErr != nil {
			return v.hashErr
		}
		if v.o.Progress != nil {
			v.o.Progress(v.b.Size(), v.size)
		}
	}
	// The last, partial tiles of the levels above.
	for l := 1; l < v.b.Levels(); l++ {
		if tail := v.b.Tail(l); tail != nil {
			v.checkTile(ctx, l, v.size>>(tlog.TileHeight*(l+1)), tail)
		}
	}
	if v.hashErr != nil {
		return v.hashErr
	}
	if err := v.checkCerts(ctx); err != nil {
		return err
	}
	return v.listing(ctx)
}

// findEnd says how far the log goes: to the newest checkpoint that can be read
// and whose hashes are there. It names those after it.
func (v *verifier) findEnd(ctx context.Context) (number uint64, err error) {
	for n := v.newest; n > 0; n-- {
		c := v.loadCheckpoint(ctx, n)
		key := tlog.CheckpointKey(n)
		if unreachable(c.err) {
			return 0, c.err
		}
		if c.err == nil && c.Size > 0 {
			at := (c.Size - 1) / tlog.TileWidth
			key = tlog.TileKey(0, at, int(c.Size-at*tlog.TileWidth))
			_, c.err = v.getTile(ctx, 0, at, int(c.Size-at*tlog.TileWidth))
			if unreachable(c.err) {
				return 0, c.err
			}
			if !errors.Is(c.err, recording.ErrNotFound) { // a damaged one is named when its turn comes
				v.size, v.root = c.Size, c.Root
				return n, nil
			}
			c.err = fmt.Errorf("the last hashes of checkpoint %d, of %d events, are not there: they were deleted, or the checkpoint was changed: %w", n, c.Size, c.err)
		} else if c.err == nil {
			c.err = tlog.ErrNote
		}
		v.problem(kindOf(c.err), key, "%v", c.err)
	}
	v.problem(Missing, tlog.CheckpointRoot, "no checkpoint can be used")
	return 0, errStop
}

// unreachable tells errors of the store from those of the objects in it.
func unreachable(err error) bool {
	if err == nil {
		return false
	}
	for _, e := range []error{recording.ErrNotFound, recording.ErrTooLarge, errCut, tlog.ErrNote, tlog.ErrBundle} {
		if errors.Is(err, e) {
			return false
		}
	}
	return true
}

func (v *verifier) loadCheckpoint(ctx context.Context, n uint64) *loaded {
	c := &loaded{number: n}
	if c.note, c.err = v.src.Get(ctx, tlog.CheckpointKey(n)); c.err == nil {
		c.Checkpoint, _, c.err = tlog.ParseNote(c.note)
	}
	return c
}

// loadTile loads a bundle and the hashes beside it; of the last ones, which may
// have been partial then, the full ones do as well.
func (v *verifier) loadTile(ctx context.Context, n uint64) tile {
	t := tile{n: n, width: int(min(v.size-n*tlog.TileWidth, tlog.TileWidth))}
	t.bundle, t.err = v.src.Get(ctx, tlog.EntriesKey(n, t.width))
	if errors.Is(t.err, recording.ErrNotFound) && t.width < tlog.TileWidth {
		t.bundle, t.err = v.src.Get(ctx, tlog.EntriesKey(n, tlog.TileWidth))
	}
	t.hashes, t.terr = v.getTile(ctx, 0, n, t.width)
	return t
}

func (v *verifier) getTile(ctx context.Context, level int, n uint64, width int) ([]byte, error) {
	b, err := v.src.Get(ctx, tlog.TileKey(level, n, width))
	if errors.Is(err, recording.ErrNotFound) && width < tlog.TileWidth {
		b, err = v.src.Get(ctx, tlog.TileKey(level, n, tlog.TileWidth))
	}
	if err == nil && (len(b)%tlog.HashSize != 0 || len(b) < width*tlog.HashSize || len(b) > tlog.TileWidth*tlog.HashSize) {
		return nil, errCut
	}
	if err != nil {
		return nil, err
	}
	return b[:width*tlog.HashSize], nil
}

var errCut = errors.New("it has not the length of its kind")

// kindOf is what an error of an object means.
func kindOf(err error) Kind {
	if errors.Is(err, recording.ErrNotFound) {
		return Missing
	}
	return Truncated
}

// checkTile holds a tile above level 0 against the events.
func (v *verifier) checkTile(ctx context.Context, level int, n uint64, want []tlog.Hash) {
	got, err := v.getTile(ctx, level, n, len(want))
	key := tlog.TileKey(level, n, len(want))
	switch {
	case unreachable(err):
		v.hashErr = errors.Join(v.hashErr, err)
	case err != nil:
		v.problem(kindOf(err), key, "%v", err)
	default:
		for i, h := range want {
			if !bytes.Equal(got[i*tlog.HashSize:(i+1)*tlog.HashSize], h[:]) {
				v.problem(AlteredTile, key, "hash %d is not that of the events below it", i)
				return
			}
		}
	}
}

// takeTile takes 256 events, or the last ones.
func (v *verifier) takeTile(ctx context.Context, t tile) error {
	ekey, tkey := tlog.EntriesKey(t.n, t.width), tlog.TileKey(0, t.n, t.width)
	for _, err := range []error{t.err, t.terr} {
		if unreachable(err) {
			return err
		}
	}
	if t.terr != nil {
		v.problem(kindOf(t.terr), tkey, "%v", t.terr)
	}
	var entries []tlog.BundleEntry
	if t.err == nil {
		// A full bundle may stand for a partial one.
		for _, w := range []int{t.width, tlog.TileWidth} {
			if entries, t.err = tlog.ParseBundle(t.bundle, w); t.err == nil {
				entries = entries[:t.width]
				break
			}
		}
	}
	if t.err != nil {
		v.problem(kindOf(t.err), ekey, "events %d to %d: %v", t.n*tlog.TileWidth+1, t.n*tlog.TileWidth+uint64(t.width), t.err)
		if t.terr != nil {
			v.problem(Missing, tkey, "neither events %d to %d nor their hashes can be read: nothing after them can be checked", t.n*tlog.TileWidth+1, t.n*tlog.TileWidth+uint64(t.width))
			return errStop
		}
	}
	for i := range t.width {
		index := t.n*tlog.TileWidth + uint64(i)
		var stated *tlog.Hash
		if t.terr == nil {
			h := tlog.Hash(t.hashes[i*tlog.HashSize : (i+1)*tlog.HashSize])
			stated = &h
		}
		var envelope []byte
		if t.err == nil {
			var err error
			if envelope, err = v.envelope(ctx, entries[i], index); err != nil {
				return err
			}
		}
		if err := v.takeEntry(ctx, index, envelope, entryLeaf(entries, i), stated); err != nil {
			return err
		}
	}
	return nil
}

// entryLeaf is the hash that a bundle gives instead of a large entry.
func entryLeaf(entries []tlog.BundleEntry, i int) *tlog.Hash {
	if i < len(entries) && entries[i].Envelope == nil {
		return &entries[i].Leaf
	}
	return nil
}

// envelope returns an entry's bytes; nil when they cannot be had.
func (v *verifier) envelope(ctx context.Context, e tlog.BundleEntry, index uint64) ([]byte, error) {
	if e.Envelope != nil {
		return e.Envelope, nil
	}
	b, err := v.src.Get(ctx, tlog.LargeKey(index))
	if unreachable(err) {
		return nil, err
	}
	if err != nil {
		v.problem(kindOf(err), tlog.LargeKey(index), "event %d: %v", index+1, err)
		return nil, nil
	}
	if tlog.LeafHash(b) != e.Leaf {
		v.problem(AlteredEntry, tlog.LargeKey(index), "event %d is not the one that its bundle names", index+1)
		return nil, nil
	}
	return b, nil
}

// takeEntry adds one event to the tree. Where the event and the hash in the
// tile differ, the tree up to the newest checkpoint says which one is right.
func (v *verifier) takeEntry(ctx context.Context, index uint64, envelope []byte, leafInBundle, stated *tlog.Hash) error {
	name := fmt.Sprintf("event %d", index+1)
	var leaf tlog.Hash
	switch {
	case envelope != nil:
		leaf = tlog.LeafHash(envelope)
	case stated != nil:
		leaf = *stated
	case leafInBundle != nil:
		leaf = *leafInBundle
	}
	if envelope != nil && stated != nil && leaf != *stated {
		right, err := v.inTree(ctx, index, *stated)
		if err != nil {
			return err
		}
		if right {
			v.problem(AlteredEntry, name, "in %s: it is not the event that the tree of checkpoint %d has there", tlog.EntriesKey(index/tlog.TileWidth, tlog.TileWidth), v.newest)
			leaf, envelope = *stated, nil
		} else {
			v.problem(AlteredTile, tlog.TileKey(0, index/tlog.TileWidth, tlog.TileWidth), "hash %d is not that of event %d", index%tlog.TileWidth, index+1)
		}
	}
	if envelope == nil {
		v.gap = true
	} else if err := v.takeEvent(name, index, envelope); err != nil {
		return err
	}
	v.b.Append(leaf)
	return v.reached()
}

// inTree says whether the tiles of the newest checkpoint lead to leaf at index.
func (v *verifier) inTree(ctx context.Context, index uint64, leaf tlog.Hash) (bool, error) {
	tr := &tileReader{ctx: ctx, v: v}
	r := sumdb.TileHashReader(sumdb.Tree{N: int64(v.size), Hash: v.root}, tr)
	hs, err := r.ReadHashes([]int64{sumdb.StoredHashIndex(0, int64(index))})
	if tr.err != nil {
		return false, tr.err
	}
	return err == nil && hs[0] == leaf, nil
}

// tileReader reads tiles of the newest checkpoint's tree.
type tileReader struct {
	ctx context.Context
	v   *verifier
	err error // the store's, not the tiles'
}

func (r *tileReader) Height() int                      { return tlog.TileHeight }
func (r *tileReader) SaveTiles([]sumdb.Tile, [][]byte) {}
func (r *tileReader) ReadTiles(ts []sumdb.Tile) ([][]byte, error) {
	out := make([][]byte, len(ts))
	for i, t := range ts {
		b, err := r.v.getTile(r.ctx, t.L, uint64(t.N), t.W)
		if unreachable(err) {
			r.err = err
		}
		if err != nil {
			return nil, err
		}
		out[i] = b
	}
	return out, nil
}

// takeEvent reads what an event says and checks that it follows on the one
// before.
func (v *verifier) takeEvent(name string, index uint64, envelope []byte) error {
	e, err := event.UnmarshalEnvelope(envelope)
	if err != nil {
		v.problem(Broken, name, "%v", err)
		v.gap = true
		return nil
	}
	v.chain = event.Chain(v.chain, envelope)
	l := &v.last
	switch {
	case e.Seq != index+1:
		v.problem(Broken, name, "it says that it is event %d", e.Seq)
	case v.gap || index == 0:
	case !e.Time.After(l.Time):
		v.problem(Broken, name, "it is of %v, not after the event before, of %v", e.Time, l.Time)
	case e.Term < l.Term || e.Index < l.Index || e.Index == l.Index && e.Sub != l.Sub+1 || e.Index > l.Index && e.Sub != 0:
		v.problem(Broken, name, "log entry %d/%d of term %d does not follow %d/%d of term %d", e.Index, e.Sub, e.Term, l.Index, l.Sub, l.Term)
	}
	v.last = e
	if _, err := event.DecodeAny(e); err != nil {
		v.problem(Unknown, name, "%s version %d: %v", e.Type, e.Version, err)
	}
	switch {
	case tlog.Concerns(e.Type):
		if err := v.members.Fold(&e, checkVoter(e.Time)); err != nil {
			v.problem(ForgedMember, name, "%v", err)
		}
		if index == 0 {
			return v.genesis(&e)
		}
	case index == 0:
		v.problem(WrongCluster, name, "the log does not begin with the making of a cluster")
		return errStop
	case e.Type == event.TypeCheckpoint:
		v.logs(name, &e)
	}
	return nil
}

// genesis checks the first event: it names the CA that all else hangs on.
func (v *verifier) genesis(*event.Event) error {
	sum := sha256.Sum256(v.members.CA)
	v.rep.Cluster, v.rep.CA = v.members.Cluster, hex.EncodeToString(sum[:])
	if sum != v.o.CA {
		v.problem(WrongCluster, "event 1", "the log is of cluster %q with the CA %x, and %x is trusted", v.members.Cluster, sum, v.o.CA)
		return errStop
	}
	v.trusted = v.members.Genesis
	return nil
}

// logs holds a checkpoint's event against the object in the store.
func (v *verifier) logs(name string, e *event.Event) {
	c, note, err := parseCheckpoint(e)
	key := tlog.CheckpointKey(c.number)
	if err != nil {
		v.problem(Broken, name, "%v", err)
		return
	}
	if c.number != v.logged+1 && !v.gap {
		v.problem(Broken, name, "it is checkpoint %d and follows %d", c.number, v.logged)
	}
	v.logged = c.number
	sum, ok := v.notes[c.number]
	switch {
	case !ok:
		// Missing and unreadable ones were named when their turn came.
		if c.number > v.newest {
			v.problem(Missing, key, "%s names it, and the store has none after %d", name, v.newest)
		}
	case sum != sha256.Sum256([]byte(note)):
		v.problem(AlteredCheckpoint, key, "it is not the one that %s names", name)
	}
	delete(v.notes, c.number)
}

// nextCheckpoint makes the next readable one the one to reach.
func (v *verifier) nextCheckpoint() {
	before := v.cp
	for {
		c, ok := v.checkpoints()
		if !ok {
			v.cp = nil
			return
		}
		key := tlog.CheckpointKey(c.number)
		switch {
		case unreachable(c.err):
			v.hashErr = errors.Join(v.hashErr, c.err)
		case errors.Is(c.err, recording.ErrNotFound):
			v.problem(Missing, key, "checkpoint %d of %d is not there", c.number, v.newest)
		case c.err != nil:
			v.problem(Truncated, key, "%v", c.err)
		case before != nil && c.Size <= before.Size:
			v.problem(Forked, key, "it is of %d events, and checkpoint %d before it of %d", c.Size, before.number, before.Size)
		case c.Size > v.size:
			v.problem(Forked, key, "it is of %d events, and the newest checkpoint of %d", c.Size, v.size)
		default:
			v.notes[c.number] = sha256.Sum256(c.note)
			v.cp = c
			return
		}
	}
}

// reached checks what there is to check when the tree has the size of a
// checkpoint: one in the store, the one seen before, the one known from elsewhere.
func (v *verifier) reached() error {
	size := v.b.Size()
	var root tlog.Hash
	if v.cp != nil && v.cp.Size == size || v.o.Seen != nil && v.o.Seen.Size == size || v.o.From != nil && v.o.From.Size == size {
		root = v.b.Root()
	}
	for _, a := range []struct {
		at   *tlog.Checkpoint
		what string
	}{{v.seen(), "the checkpoint seen before"}, {v.o.From, "the checkpoint that --from names"}} {
		if a.at == nil || a.at.Size != size {
			continue
		}
		if a.at.Root != root {
			v.problem(Forked, fmt.Sprintf("events 1 to %d", size), "their root is %s here, and %s in %s: this is another history", root, a.at.Root, a.what)
			v.forked = true
			continue
		}
		v.rep.Anchored = true
		v.trusted = v.members.Voters
	}
	for v.cp != nil && v.cp.Size == size {
		c := v.cp
		v.judge(c, root)
		v.nextCheckpoint()
		if v.hashErr != nil {
			return v.hashErr
		}
	}
	return nil
}

func (v *verifier) seen() *tlog.Checkpoint {
	if v.o.Seen == nil {
		return nil
	}
	return &tlog.Checkpoint{Size: v.o.Seen.Size, Root: v.o.Seen.Root}
}

// known says whether size is covered by a checkpoint that was known before.
func (v *verifier) known(size uint64) bool {
	return v.o.Seen != nil && size <= v.o.Seen.Size || v.o.From != nil && size <= v.o.From.Size
}

// judge checks a stored checkpoint against the events and the voters so far.
func (v *verifier) judge(c *loaded, root tlog.Hash) {
	key := tlog.CheckpointKey(c.number)
	stated, by, err := v.members.CheckNote(c.note, v.trusted)
	switch {
	case errors.Is(err, tlog.ErrCosigners) && v.known(c.Size) && c.Root == root:
		// What is known needs nobody's word.
		err = nil
	case errors.Is(err, tlog.ErrCosigners) && v.gap:
		v.problem(NotCosigned, key, "%v (events before it cannot be read, so that the voters may be others)", err)
	case errors.Is(err, tlog.ErrCosigners):
		v.problem(NotCosigned, key, "%v", err)
	case errors.Is(err, tlog.ErrCosignature):
		v.problem(Forged, key, "%v", err)
	case err != nil:
		v.problem(AlteredCheckpoint, key, "%v", err)
	case stated.Root != root:
		if !v.forked { // all after it are, too
			v.problem(Forked, key, "%s vouch for the root %s over %d events, and the events here have %s: the events were changed together with their hashes, or the voters have vouched for two histories", strings.Join(by, ", "), stated.Root, c.Size, root)
		}
		v.forked = true
		return
	}
	if err != nil || c.Root != root {
		return
	}
	v.trusted = v.members.Voters
	st := &State{Cluster: v.members.Cluster, CA: v.rep.CA, Number: c.number, Size: c.Size, Root: c.Root, Voters: map[string][][]byte{}, Seen: v.o.Now().UTC()}
	for name, certs := range v.members.Voters {
		for _, cert := range certs {
			st.Voters[name] = append(st.Voters[name], cert.Raw)
		}
	}
	v.good = st
	v.rep.Events, v.rep.Root, v.rep.Chain = c.Size, root.String(), hex.EncodeToString(v.chain[:])
	v.rep.Newest, v.rep.Voters, v.rep.Cosigned = v.last.Time, v.members.Voters.Names(), by
}

// checkCerts checks the certificates that were exported beside the log.
func (v *verifier) checkCerts(ctx context.Context) error {
	check := func(der []byte) error {
		got, err := v.src.Get(ctx, tlog.CertKey(der))
		switch {
		case unreachable(err):
			return err
		case err != nil:
			v.problem(kindOf(err), tlog.CertKey(der), "%v", err)
		case !bytes.Equal(got, der):
			v.problem(AlteredCertificate, tlog.CertKey(der), "it is not the certificate in the log")
		}
		return nil
	}
	if err := check(v.members.CA); err != nil {
		return err
	}
	for _, certs := range v.members.Voters {
		for _, c := range certs {
			if err := check(c.Raw); err != nil {
				return err
			}
		}
	}
	return nil
}

// listing looks for objects that belong to no log. A node's API lists none.
func (v *verifier) listing(ctx context.Context) error {
	return v.src.List(ctx, tlog.Root, "", func(o recording.Object) error {
		if tlog.ParseKey(o.Key).Kind == tlog.KindUnknown {
			v.problem(Foreign, o.Key, "it belongs to no event log")
		}
		return nil
	})
}

// finish looks at the end: is it behind what was seen?
func (v *verifier) finish() {
	for _, a := range []struct {
		at   *tlog.Checkpoint
		what string
	}{{v.seen(), "had been seen"}, {v.o.From, "is what --from names"}} {
		if a.at != nil && v.newest > 0 && a.at.Size > v.size && v.rep.Cluster != "" {
			v.problem(RolledBack, tlog.CheckpointRoot, "the log ends at %d events, and a checkpoint of %d %s: it was cut, or an older copy was put in its place", v.size, a.at.Size, a.what)
		}
	}
	if v.o.Seen != nil && v.rep.Cluster != "" && v.o.Seen.Cluster != v.rep.Cluster {
		v.problem(WrongCluster, "event 1", "the log is of %q, and what had been seen of %q", v.rep.Cluster, v.o.Seen.Cluster)
	}
	if v.rep.OK() && v.good != nil {
		v.rep.Seen = v.good
	}
}

// prefetchDepth bounds what is fetched ahead: 16 bundles are at most 64 MiB, and
// 100 ms to an answer make 40,000 events a second.
const prefetchDepth = 16

// prefetch calls get for 0 to n-1, some at a time, and returns the results in
// order. It ends with ctx.
func prefetch[T any](ctx context.Context, n uint64, get func(ctx context.Context, i uint64) T) func() (T, bool) {
	queue := make(chan chan T, prefetchDepth-1)
	go func() {
		defer close(queue)
		for i := range n {
			c := make(chan T, 1)
			select {
			case queue <- c:
			case <-ctx.Done():
				return
			}
			go func() { c <- get(ctx, i) }() // ends with its request, at most with ctx
		}
	}()
	return func() (T, bool) {
		c, ok := <-queue
		if !ok {
			var zero T
			return zero, false
		}
		return <-c, true
	}
}

// Proof shows that one event is in the log, to somebody who has verified the
// log up to some checkpoint and has no access to it now.
type Proof struct {
	Seq        uint64   `json:"seq"`
	Envelope   []byte   `json:"envelope"`
	Checkpoint string   `json:"checkpoint"` // with its cosignatures
	Hashes     []string `json:"hashes"`     // base64, from the leaf upwards
}

// Prove makes the proof for event seq in the newest checkpoint. Tiles are
// checked against the checkpoint, its cosignatures are not: who checks the proof
// does.
func Prove(ctx context.Context, src Source, seq uint64) (*Proof, error) {
	v := &verifier{src: src}
	n, err := Newest(ctx, src)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, errors.New("there is no checkpoint yet: nothing can be proved")
	}
	c := v.loadCheckpoint(ctx, n)
	if c.err != nil {
		return nil, fmt.Errorf("%s: %w", tlog.CheckpointKey(n), c.err)
	}
	if v.size, v.root = c.Size, c.Root; seq == 0 || seq > c.Size {
		return nil, fmt.Errorf("checkpoint %d covers the events 1 to %d: wait for the next one", n, c.Size)
	}
	index := seq - 1
	t := v.loadTile(ctx, index/tlog.TileWidth)
	if t.err != nil {
		return nil, fmt.Errorf("%s: %w", tlog.EntriesKey(t.n, t.width), t.err)
	}
	entries, err := tlog.ParseBundle(t.bundle, t.width)
	if err != nil {
		if entries, err = tlog.ParseBundle(t.bundle, tlog.TileWidth); err != nil {
			return nil, err
		}
	}
	p := &Proof{Seq: seq, Checkpoint: string(c.note), Envelope: entries[index%tlog.TileWidth].Envelope}
	if p.Envelope == nil {
		if p.Envelope, err = src.Get(ctx, tlog.LargeKey(index)); err != nil {
			return nil, fmt.Errorf("%s: %w", tlog.LargeKey(index), err)
		}
	}
	tr := &tileReader{ctx: ctx, v: v}
	hashes, err := sumdb.ProveRecord(int64(c.Size), int64(index), sumdb.TileHashReader(sumdb.Tree{N: int64(c.Size), Hash: c.Root}, tr))
	if err = errors.Join(tr.err, err); err == nil {
		err = tlog.CheckInclusion(hashes, c.Size, c.Root, index, tlog.LeafHash(p.Envelope))
	}
	if err != nil {
		return nil, fmt.Errorf("the store does not prove event %d, verify it: %w", seq, err)
	}
	for _, h := range hashes {
		p.Hashes = append(p.Hashes, base64.StdEncoding.EncodeToString(h[:]))
	}
	return p, nil
}

// maxProofHashes is above the height of any tree.
const maxProofHashes = 64

// Check checks a proof against what was seen when the log was verified: its
// checkpoint must be the one seen, or be cosigned by a majority of those who
// were voters then. It returns the event and the checkpoint.
func (p *Proof) Check(ca [32]byte, seen *State) (event.Event, tlog.Checkpoint, error) {
	fail := func(err error) (event.Event, tlog.Checkpoint, error) { return event.Event{}, tlog.Checkpoint{}, err }
	if seen == nil {
		return fail(errors.New("who were the voters? Verify the log once; what it remembers says so"))
	}
	if seen.CA != hex.EncodeToString(ca[:]) {
		return fail(fmt.Errorf("what had been seen is of a cluster with another CA, %s", seen.CA))
	}
	c, _, err := tlog.ParseNote([]byte(p.Checkpoint))
	if err != nil {
		return fail(err)
	}
	if c.Size == seen.Size && c.Origin == seen.Cluster {
		if c.Root != seen.Root {
			return fail(fmt.Errorf("%w: its checkpoint has another root than the one seen", tlog.ErrProof))
		}
	} else {
		m, err := seen.members()
		if err != nil {
			return fail(err)
		}
		if _, _, err := m.CheckNote([]byte(p.Checkpoint), m.Voters); err != nil {
			return fail(fmt.Errorf("%w (if voters came or went since, verify the log first)", err))
		}
	}
	if len(p.Hashes) > maxProofHashes {
		return fail(fmt.Errorf("%w: %d hashes", tlog.ErrProof, len(p.Hashes)))
	}
	var hashes []tlog.Hash
	for _, s := range p.Hashes {
		h, err := sumdb.ParseHash(s)
		if err != nil {
			return fail(fmt.Errorf("%w: %w", tlog.ErrProof, err))
		}
		hashes = append(hashes, h)
	}
	if p.Seq == 0 {
		return fail(fmt.Errorf("%w: events are numbered from 1", tlog.ErrProof))
	}
	if err := tlog.CheckInclusion(hashes, c.Size, c.Root, p.Seq-1, tlog.LeafHash(p.Envelope)); err != nil {
		return fail(err)
	}
	e, err := event.UnmarshalEnvelope(p.Envelope)
	if err == nil && e.Seq != p.Seq {
		err = fmt.Errorf("%w: the event says that it is number %d", tlog.ErrProof, e.Seq)
	}
	return e, c, err
}

// members are the voters as of what was seen.
func (st *State) members() (*tlog.Members, error) {
	m := &tlog.Members{Cluster: st.Cluster, Voters: tlog.Voters{}}
	for name, certs := range st.Voters {
		for _, der := range certs {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, fmt.Errorf("what had been seen: %w", err)
			}
			m.Voters[name] = append(m.Voters[name], c)
		}
	}
	return m, nil
}

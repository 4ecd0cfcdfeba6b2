package raftstore

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/fsm"
	"github.com/sallyport/sallyport/raftstore/logstore"
	"github.com/sallyport/sallyport/raftstore/transport"
)

// The stream of committed entries that feeds nodes without a vote, over a QUIC
// stream of ClassEvents. The subscriber opens it and says where its state
// stands; all else the source sends. A frame is
//
//	be32 length of what follows, u8 kind, body
//
//	hello     u8 1, be64 applied, be64 seq, chain 32
//	entry     be64 prev, be64 index, be64 term, u8 type, data as in Raft's log
//	config    be64 index, a committed configuration as raft encodes it
//	status    be64 applied, be64 seq, chain 32, be64 term, be32 ms since the
//	          leader was heard, leader's id, its address, then the path: the
//	          nodes from the source to Raft, the source first; strings have a
//	          be16 length before them
//	snapshot  nothing: the whole state follows in place of entries
//	chunk     bytes of the state as fsm.Export writes it
//	end       nothing: the state is complete
//	diverged  be64 seq, chain 32: the source's at the subscriber's event
//	refuse    why
//
// Every entry names the one before it, so a gap shows. A status compares the
// chains, so a difference shows also while nothing happens.
const (
	frameHello byte = iota + 1
	frameEntry
	frameConfig
	frameStatus
	frameSnapshot
	frameChunk
	frameEnd
	frameDiverged
	frameRefuse
)

const (
	streamFormat = 1
	maxFrame     = fsm.MaxCommand + 4<<10
	chunkBytes   = 128 << 10
	// burstBytes is how much is encoded for one write, unless one entry is larger.
	burstBytes = 256 << 10

	// maxStreams bounds the subscribers of one node: 5,000 gateways on three
	// voters. Each costs a goroutine and one burst.
	maxStreams = 2048
	// maxPeerStreams of one subscriber: one in use, one that it has given up.
	maxPeerStreams = 2
	// maxSnapshots are sent at a time: each reads the whole state.
	maxSnapshots = 2
	// maxRelays is how many subscribers may stand between one and Raft.
	maxRelays = 2

	helloTimeout = 5 * time.Second
	// writeTimeout is how long a subscriber may take nothing at all; one that
	// writes a snapshot to a slow disk gets longer.
	writeTimeout    = 10 * time.Second
	snapshotTimeout = time.Minute
)

var (
	errGap    = errors.New("an entry is missing in the stream")
	errFrame  = errors.New("a frame this build does not know")
	errBehind = errors.New("too far behind for the log")
)

// Source is a node that may feed this one.
type Source struct{ ID, Addr string }

// status is what a source says of itself and of the leader.
type status struct {
	applied, seq uint64
	chain        [32]byte
	term         uint64
	age          time.Duration // since the leader was heard; -1 for never
	leader, addr string
	path         []string
}

func appendFrame(b []byte, kind byte, body ...[]byte) []byte {
	n := 1
	for _, p := range body {
		n += len(p)
	}
	b = append(binary.BigEndian.AppendUint32(b, uint32(n)), kind)
	for _, p := range body {
		b = append(b, p...)
	}
	return b
}

func be64(vs ...uint64) []byte {
	b := make([]byte, 0, 8*len(vs))
	for _, v := range vs {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

func (e *entry) appendTo(b []byte) []byte {
	return appendFrame(b, frameEntry, be64(e.prev, e.index, e.term), []byte{byte(e.typ)}, e.data)
}

func (s *status) appendTo(b []byte) []byte {
	age := ^uint32(0)
	if s.age >= 0 {
		age = uint32(min(s.age.Milliseconds(), int64(age)-1))
	}
	body := append(be64(s.applied, s.seq), s.chain[:]...)
	body = binary.BigEndian.AppendUint64(body, s.term)
	body = binary.BigEndian.AppendUint32(body, age)
	for _, v := range append([]string{s.leader, s.addr}, s.path...) {
		body = append(binary.BigEndian.AppendUint16(body, uint16(len(v))), v...)
	}
	return appendFrame(b, frameStatus, body)
}

// readFrame reads one frame; its body is the caller's.
func readFrame(r *bufio.Reader) (kind byte, body []byte, err error) {
	var h [5]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(h[:])
	if n < 1 || n > maxFrame {
		return 0, nil, fmt.Errorf("%w: %d bytes", errFrame, n)
	}
	body = make([]byte, n-1)
	_, err = io.ReadFull(r, body)
	return h[4], body, err
}

// fields takes a frame's body apart; after a short one, err is set and all
// further fields are zero.
type fields struct {
	b   []byte
	err error
}

func (f *fields) take(n int) []byte {
	if len(f.b) < n {
		f.err, f.b = errFrame, nil
		return make([]byte, n)
	}
	v := f.b[:n]
	f.b = f.b[n:]
	return v
}

func (f *fields) u64() uint64 { return binary.BigEndian.Uint64(f.take(8)) }

func (f *fields) text() string { return string(f.take(int(binary.BigEndian.Uint16(f.take(2))))) }

func decodeEntry(body []byte) (entry, error) {
	f := fields{b: body}
	e := entry{prev: f.u64(), index: f.u64(), term: f.u64(), typ: raft.LogType(f.take(1)[0])}
	e.data = f.b
	switch {
	case f.err != nil:
	case e.index <= e.prev || e.typ != raft.LogCommand && e.typ != raft.LogConfiguration:
		f.err = fmt.Errorf("%w: entry %d of type %d after %d", errFrame, e.index, e.typ, e.prev)
	case e.typ == raft.LogConfiguration:
		_, f.err = decodeConfiguration(e.data)
	}
	return e, f.err
}

// decodeConfiguration is raft's, which panics.
func decodeConfiguration(b []byte) (c raft.Configuration, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: configuration: %v", errFrame, p)
		}
	}()
	return raft.DecodeConfiguration(b), nil
}

func decodeStatus(body []byte) (status, error) {
	f := fields{b: body}
	s := status{applied: f.u64(), seq: f.u64(), chain: [32]byte(f.take(32)), term: f.u64(), age: -1}
	if ms := binary.BigEndian.Uint32(f.take(4)); ms != ^uint32(0) {
		s.age = time.Duration(ms) * time.Millisecond
	}
	s.leader, s.addr = f.text(), f.text()
	for len(f.b) > 0 && len(s.path) <= maxRelays+1 {
		s.path = append(s.path, f.text())
	}
	if f.err == nil && (len(f.b) > 0 || len(s.path) == 0) {
		f.err = fmt.Errorf("%w: status", errFrame)
	}
	return s, f.err
}

// streams is what this node serves.
type streams struct {
	mu        sync.Mutex
	peers     map[string]int
	all       int
	snapshots chan struct{}
}

func (t *streams) enter(peer string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.all >= maxStreams || t.peers[peer] >= maxPeerStreams {
		return false
	}
	t.all++
	t.peers[peer]++
	return true
}

func (t *streams) exit(peer string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.all--
	if t.peers[peer]--; t.peers[peer] == 0 {
		delete(t.peers, peer)
	}
}

// serveStreams accepts subscribers until the store is closed or fails.
func (s *Store) serveStreams() {
	t := &streams{peers: make(map[string]int), snapshots: make(chan struct{}, maxSnapshots)}
	ln := s.cfg.Endpoint.Listener(transport.ClassEvents)
	s.wg.Go(func() {
		select {
		case <-s.done:
		case <-s.fatal.c:
		}
		ln.Close() // and so ends what runs
	})
	s.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conn := c.(*transport.Conn)
			if !t.enter(conn.Peer()) {
				s.log.Warn("refused a subscriber: too many", "peer", conn.Peer())
				conn.Close()
				continue
			}
			s.wg.Go(func() {
				defer t.exit(conn.Peer())
				defer conn.Close()
				if err := s.serveStream(t, conn); err != nil {
					s.log.Debug("a subscriber's stream ended", "peer", conn.Peer(), "error", err)
				}
			})
		}
	})
}

// serveStream feeds one subscriber. Nothing is queued for it: what it has not
// taken stays in what all share.
func (s *Store) serveStream(t *streams, c *transport.Conn) error {
	if err := c.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	kind, body, err := readFrame(bufio.NewReaderSize(c, 128))
	if err != nil {
		return err
	}
	f := fields{b: body}
	if v := f.take(1)[0]; kind != frameHello || v != streamFormat {
		return s.refuse(c, fmt.Sprintf("a stream of format %d, this build knows %d", v, streamFormat))
	}
	at, seq, chain := f.u64(), f.u64(), [32]byte(f.take(32))
	if f.err != nil {
		return f.err
	}
	if err := s.sameChain(seq, chain); errors.Is(err, ErrDiverged) {
		es, eerr := s.state.Events(seq, 1)
		if eerr == nil {
			s.say(c, appendFrame(nil, frameDiverged, be64(seq), es[0].Chain[:]))
		}
		return errors.Join(err, eerr)
	} else if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	s.wg.Go(func() {
		_, _ = io.Copy(io.Discard, c) // a subscriber says nothing more; it leaves
		cancel()
	})
	tick := time.NewTicker(s.cfg.HeartbeatTimeout)
	defer tick.Stop()
	var sent uint64 // configuration
	write := func(b []byte, within time.Duration) error {
		if err := c.SetWriteDeadline(time.Now().Add(within)); err != nil {
			return err
		}
		_, err := c.Write(b)
		return err
	}
	for due := true; ; {
		if due {
			due = false
			st, ok := s.ownStatus()
			if !ok {
				return s.refuse(c, "this node is fed by nobody itself")
			}
			var b []byte
			if conf := s.conf.Load(); conf != nil && conf.index > sent {
				sent = conf.index
				b = appendFrame(b, frameConfig, be64(sent), raft.EncodeConfiguration(raft.Configuration{Servers: conf.servers}))
			}
			if err := write(st.appendTo(b), writeTimeout); err != nil {
				return err
			}
		}
		es, more, err := s.entriesAfter(at)
		switch {
		case errors.Is(err, errBehind):
			select {
			case t.snapshots <- struct{}{}:
			default:
				return s.refuse(c, "this node sends snapshots to others")
			}
			at, err = s.sendState(func(b []byte) error { return write(b, snapshotTimeout) })
			<-t.snapshots
			if err != nil {
				return err
			}
			due = true
			continue
		case err != nil:
			return err
		case len(es) > 0:
			var b []byte
			for i := range es {
				b = es[i].appendTo(b)
			}
			if err := write(b, writeTimeout); err != nil {
				return err
			}
			at = es[len(es)-1].index
			select {
			case <-tick.C:
				due = true
			default:
			}
			continue
		}
		select {
		case <-more:
		case <-tick.C:
			due = true
		case <-ctx.Done():
			return nil
		case <-s.fatal.c:
			return s.fatal.err
		case <-s.done:
			return ErrClosed
		}
	}
}

func (s *Store) refuse(c *transport.Conn, why string) error {
	s.say(c, appendFrame(nil, frameRefuse, []byte(why)))
	return errors.New(why)
}

// say writes a last word; whether it arrives does not matter.
func (s *Store) say(c *transport.Conn, b []byte) {
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = c.Write(b)
}

// sameChain says whether an event's chain is ours; true for one we lack.
func (s *Store) sameChain(seq uint64, chain [32]byte) error {
	h := s.state.Head()
	ours := h.Chain
	switch {
	case seq == 0 || seq > h.Seq:
		return nil
	case seq < h.Seq:
		es, err := s.state.Events(seq, 1)
		if err != nil {
			return err
		}
		ours = es[0].Chain
	}
	if ours != chain {
		return fmt.Errorf("%w: at event %d the chain is %x here and %x there", ErrDiverged, seq, ours, chain)
	}
	return nil
}

// ownStatus is what this node says as a source. It is no source while it is
// fed by nobody and has no part in Raft.
func (s *Store) ownStatus() (status, bool) {
	st := s.Status()
	out := status{applied: st.Applied, seq: st.Seq, chain: st.Chain, term: st.Term, age: st.LastContact}
	out.leader, out.addr = s.Leader()
	if r := s.raft.Load(); r == nil || !s.votes(r) {
		out.path = s.feed.path()
		if r == nil && len(out.path) == 0 {
			return out, false
		}
	}
	out.path = append([]string{s.cfg.NodeID}, out.path...)
	return out, true
}

// entriesAfter returns entries that follow on index, or a channel to wait on
// when there are none, or errBehind.
func (s *Store) entriesAfter(index uint64) ([]entry, <-chan struct{}, error) {
	es, more, ok := s.apply.recent.after(index, burstBytes)
	if ok {
		return es, more, nil
	}
	es, err := entriesFromLog(s.logs, index, s.apply.fromRaft.Load())
	return es, nil, err
}

// entriesFromLog reads entries that follow on one, up to a committed one. The
// log must have the one itself: then it has the others as they are (the entry a
// received snapshot ends with stands alone at the front and has no content).
func entriesFromLog(logs *logstore.Store, after, committed uint64) ([]entry, error) {
	visible := func(l *raft.Log) bool { return l.Type == raft.LogCommand || l.Type == raft.LogConfiguration }
	var l raft.Log
	from := max(after, 1)
	if err := logs.GetLog(from, &l); err != nil || !visible(&l) || after == 0 && l.Type != raft.LogConfiguration {
		return nil, errBehind
	}
	var es []entry
	size, prev := 0, after
	if after == 0 {
		es, prev = append(es, entry{0, l.Index, l.Term, l.Type, l.Data}), 1
	}
	for i := from + 1; i <= committed && size < burstBytes; i++ {
		if err := logs.GetLog(i, &l); err != nil {
			return nil, errBehind // shortened at this moment
		}
		if visible(&l) {
			es = append(es, entry{prev, l.Index, l.Term, l.Type, l.Data})
			size += len(l.Data)
			prev = l.Index
		}
	}
	if len(es) == 0 {
		return nil, errBehind // it is not in our log, and yet was applied
	}
	return es, nil
}

// sendState writes the whole state as chunks and returns the index it is at.
func (s *Store) sendState(write func([]byte) error) (uint64, error) {
	x, err := s.state.Export()
	if err != nil {
		return 0, err
	}
	defer x.Close()
	if err := write(appendFrame(nil, frameSnapshot)); err != nil {
		return 0, err
	}
	chunk := make([]byte, chunkBytes)
	var b []byte
	for {
		n, err := io.ReadFull(x, chunk)
		if n > 0 {
			b = appendFrame(b[:0], frameChunk, chunk[:n])
			if err := write(b); err != nil {
				return 0, err
			}
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return x.Head.Applied, write(appendFrame(nil, frameEnd))
		}
		if err != nil {
			return 0, err
		}
	}
}

// feed is the stream that feeds this node, and what it says.
type feed struct {
	run struct {
		sync.Mutex
		cancel context.CancelFunc // nil while none runs
		done   chan struct{}
	}
	mu struct {
		sync.Mutex
		status
		source  string    // "" while there is none
		contact time.Time // when the leader was heard last, by all between
		current bool      // the state is what the source had when it said so
	}
}

// start runs follow on a goroutine of its own unless it runs.
func (f *feed) start(follow func(context.Context)) {
	f.run.Lock()
	defer f.run.Unlock()
	if f.run.cancel != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	f.run.cancel, f.run.done = cancel, done
	go func() {
		defer close(done)
		follow(ctx)
	}()
}

// stop ends it and waits.
func (f *feed) stop() {
	f.run.Lock()
	defer f.run.Unlock()
	if f.run.cancel == nil {
		return
	}
	f.run.cancel()
	<-f.run.done
	f.run.cancel = nil
}

func (f *feed) leader() (id, addr string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.leader, f.mu.addr
}

func (f *feed) path() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.mu.status.path)
}

func (f *feed) current() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.current
}

// status fills in what only the stream knows; it returns when the leader was
// heard last.
func (f *feed) status(st *Status) time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	st.Source, st.Term, st.CommitIndex = f.mu.source, f.mu.term, f.mu.applied
	st.Relays = max(0, len(f.mu.status.path)-1)
	return f.mu.contact
}

// heard takes up a status; it tells whether the leader is another than before.
func (f *feed) heard(source string, st status, current bool) (changed bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	changed = f.mu.leader != st.leader
	f.mu.source, f.mu.status, f.mu.current = source, st, current
	if st.age >= 0 {
		if t := time.Now().Add(-st.age); t.After(f.mu.contact) {
			f.mu.contact = t
		}
	}
	return changed
}

// lost forgets all but when the leader was heard last.
func (f *feed) lost() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.source, f.mu.status, f.mu.current = "", status{}, false
}

const (
	dialTimeout = 3 * time.Second
	// minRetry and maxRetry are between two attempts to find a source.
	minRetry = 20 * time.Millisecond
	maxRetry = time.Second
	// goodStream is how long one must have lasted to start with the best source
	// again at once.
	goodStream = 5 * time.Second
)

// silence is how long a source may say nothing, and how old its word of the
// leader may be while there are other sources.
func (s *Store) silence() time.Duration { return max(6*s.cfg.HeartbeatTimeout, 2*time.Second) }

// follow keeps this node fed from one source or another until ctx ends.
func (s *Store) follow(ctx context.Context) {
	defer s.feed.lost()
	retry := minRetry
	for ctx.Err() == nil {
		lasted := false
		for _, src := range s.cfg.Sources() {
			if src.ID == s.cfg.NodeID {
				continue
			}
			began := time.Now()
			err := s.followOne(ctx, src)
			s.feed.lost()
			if ctx.Err() != nil || s.Err() != nil {
				return
			}
			s.log.Debug("the stream from a source ended", "source", src.ID, "error", err)
			if lasted = time.Since(began) > goodStream; lasted {
				break
			}
		}
		if retry = min(2*retry, maxRetry); lasted {
			retry = minRetry
		}
		select {
		case <-time.After(retry):
		case <-ctx.Done():
		}
	}
}

// followOne feeds the state from src until that ends or falls silent, or has
// lost the leader.
func (s *Store) followOne(ctx context.Context, src Source) error {
	dctx, cancel := context.WithTimeout(ctx, dialTimeout)
	nc, err := s.cfg.Endpoint.Dial(dctx, transport.ClassEvents, src.Addr, src.ID)
	cancel()
	if err != nil {
		return err
	}
	c := nc.(*transport.Conn)
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	h := s.state.Head()
	if err := c.SetWriteDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	if _, err := c.Write(appendFrame(nil, frameHello, []byte{streamFormat}, be64(h.Applied, h.Seq), h.Chain[:])); err != nil {
		return err
	}
	began := time.Now()
	r := bufio.NewReaderSize(c, burstBytes)
	next := func(within time.Duration) (byte, []byte, error) {
		if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
			return 0, nil, err
		}
		return readFrame(r)
	}
	for {
		kind, body, err := next(s.silence())
		if err != nil {
			return err
		}
		switch kind {
		case frameEntry:
			err = s.takeEntries(r, body)
		case frameConfig:
			f := fields{b: body}
			index := f.u64()
			var conf raft.Configuration
			if err = f.err; err == nil {
				conf, err = decodeConfiguration(f.b)
			}
			if err == nil {
				s.configured(index, conf)
			}
		case frameStatus:
			var st status
			if st, err = decodeStatus(body); err == nil {
				err = s.takeStatus(src, st, time.Since(began))
			}
		case frameSnapshot:
			s.log.Info("this node is too far behind for the log: it takes the whole state", "source", src.ID)
			err = s.takeState(func() (byte, []byte, error) { return next(writeTimeout) })
		case frameDiverged:
			f := fields{b: body}
			if err = s.diverged(f.u64(), [32]byte(f.take(32))); err == nil {
				err = errFrame
			}
		case frameRefuse:
			err = fmt.Errorf("%s refused: %.500s", src.ID, body)
		default:
			err = fmt.Errorf("%w: kind %d", errFrame, kind)
		}
		if err != nil {
			return err
		}
	}
}

// takeEntries applies an entry and those that have arrived behind it.
func (s *Store) takeEntries(r *bufio.Reader, body []byte) error {
	e, err := decodeEntry(body)
	if err != nil {
		return err
	}
	batch := []entry{e}
	for len(batch) < maxAppendEntries {
		h, err := r.Peek(min(r.Buffered(), 5))
		if err != nil || len(h) < 5 || h[4] != frameEntry {
			break
		}
		if n := binary.BigEndian.Uint32(h); uint64(n)+4 > uint64(r.Buffered()) {
			break
		}
		_, body, err := readFrame(r)
		if err != nil {
			return err
		}
		if e, err = decodeEntry(body); err != nil {
			return err
		}
		batch = append(batch, e)
	}
	return s.apply.streamed(batch)
}

// diverged stops this node if its chain at an event is not the source's.
func (s *Store) diverged(seq uint64, chain [32]byte) error {
	err := s.sameChain(seq, chain)
	if errors.Is(err, ErrDiverged) {
		s.fail(err)
	}
	return err
}

func (s *Store) takeStatus(src Source, st status, lasted time.Duration) error {
	if st.path[0] != src.ID || len(st.path) > maxRelays+1 || slices.Contains(st.path, s.cfg.NodeID) {
		return fmt.Errorf("fed through %q", st.path)
	}
	if err := s.diverged(st.seq, st.chain); err != nil {
		return err
	}
	if s.feed.heard(src.ID, st, s.state.Head().Applied >= st.applied) {
		s.leaderChanged()
	}
	if (st.age < 0 || st.age > s.silence()) && lasted > s.silence() {
		return fmt.Errorf("%s has lost the leader", src.ID)
	}
	return nil
}

// incomingDir is for the tables of a state that a stream brings.
func (s *Store) incomingDir() string {
	return s.cfg.seams.fs.PathJoin(s.cfg.Dir, stateDir+".incoming")
}

// takeState replaces the state by the one that comes in chunks. It is checked
// and written beside the state, which goes on meanwhile, then put in its place.
func (s *Store) takeState(next func() (byte, []byte, error)) error {
	fs, dir := s.cfg.seams.fs, s.incomingDir()
	if err := fs.RemoveAll(dir); err != nil {
		return err
	}
	defer fs.RemoveAll(dir)
	type result struct {
		t   *fsm.Tables
		err error
	}
	pr, pw := io.Pipe()
	received := make(chan result, 1)
	go func() { // ends when pw is closed
		t, err := s.state.Receive(pr, dir)
		pr.CloseWithError(errors.Join(err, io.ErrClosedPipe))
		received <- result{t, err}
	}()
	for {
		kind, body, err := next()
		switch {
		case err != nil:
		case kind == frameChunk:
			_, err = pw.Write(body)
		case kind == frameEnd:
			pw.Close()
			r := <-received
			if r.err != nil {
				return r.err
			}
			return s.apply.Restore(&fsm.Received{Tables: r.t})
		default:
			err = fmt.Errorf("%w: kind %d in a snapshot", errFrame, kind)
		}
		if err != nil {
			pw.CloseWithError(err)
			return errors.Join(err, (<-received).err)
		}
	}
}

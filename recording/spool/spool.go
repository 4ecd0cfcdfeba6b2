// Package spool writes recordings to local disk and brings them to a store.
//
// A Writer appends entries to log files; Append returns when the kernel has
// them. In the background one goroutine seals finished log files into signed
// segments, and a few others copy headers, segments and trailers to the store.
// What a crash leaves is completed by the next Open on the same directory.
//
// Files of the directory, all of mode 0600:
//
//	LOCK                      held by the process that has the spool open
//	chain.json                head of the node's chain of recordings
//	rec/SEQ.header            the header object; SEQ is the place in the chain
//	rec/SEQ.NNNNNN.log        frames being appended or waiting to be sealed
//	rec/SEQ.NNNNNN.seg        a sealed segment object
//	rec/SEQ.trailer           the trailer object
//	rec/SEQ.done              everything is in the store; the rest is being deleted
//	rec/*.tmp                 being written; worthless after a crash
//	rec/SEQ.NNNNNN.damaged    a log file that could not be read to its end
//
// Lock order: Spool.begin, Writer.mu, Spool.mu.
package spool

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
)

var (
	// ErrFull: the spool holds MaxSpoolBytes that are not in the store yet.
	// Nothing was recorded; it may succeed again once the store takes more.
	ErrFull = errors.New("recording: the spool is full: the store does not take recordings fast enough")
	// ErrClosed: the Writer or the Spool was closed.
	ErrClosed = errors.New("recording: closed")
)

// Options configure a Spool.
type Options struct {
	Dir           string          // of the spool; made when missing. Not shared with another process.
	Node, Cluster string          // written to every header
	Signer        crypto.Signer   // the node's ECDSA key
	Certificate   []byte          // DER, of that key
	Store         recording.Store // where recordings go
	// SegmentBytes closes a segment when its frames reach it: 1 MiB when
	// zero, at most 16 MiB. It is what a reader holds in memory.
	SegmentBytes int
	// SegmentAge closes a segment that long after its first entry, so that a
	// live session is in the store within about that time: 5 s when zero.
	SegmentAge time.Duration
	// MaxSpoolBytes bounds the directory: 2 GiB when zero. Above it Begin,
	// Append and Buffer fail with ErrFull. What closes recordings is written
	// even then.
	MaxSpoolBytes int64
	// Stored, when not nil, is told of each recording, YYYY/MM/DD/session, that
	// is in the store to its end. It must not block.
	Stored func(name string)
	Log    *slog.Logger // nil: discarded
}

func (o *Options) setDefaults() error {
	if o.SegmentBytes == 0 {
		o.SegmentBytes = 1 << 20
	}
	if o.SegmentAge == 0 {
		o.SegmentAge = 5 * time.Second
	}
	if o.MaxSpoolBytes == 0 {
		o.MaxSpoolBytes = 2 << 30
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.Dir == "":
		return errors.New("recording: no directory for the spool")
	case o.Node == "" || o.Cluster == "":
		return errors.New("recording: a spool needs the names of its node and cluster")
	case o.Store == nil:
		return errors.New("recording: no store")
	case o.SegmentBytes < 0 || o.SegmentBytes > 16<<20:
		return errors.New("recording: segments must be of 1 byte to 16 MiB")
	case o.SegmentAge < 0 || o.MaxSpoolBytes < 0:
		return errors.New("recording: negative limit")
	}
	return nil
}

// Spool is a node's recorder. Its methods are safe for concurrent use.
type Spool struct {
	o    Options
	dir  string   // o.Dir/rec
	dirF *os.File // dir, for fsync
	lock *os.File

	signer atomic.Pointer[signer] // for recordings that begin now

	used   atomic.Int64  // bytes of all files in dir
	failed atomic.Value  // error: the disk failed where nothing can be known any more; Begin fails
	stop   chan struct{} // closed by Close
	runs   sync.WaitGroup
	toSeal chan struct{} // capacity 1: there is something to seal
	toSend chan struct{} // capacity 1: there is something to send

	toFinish chan struct{} // capacity 1: something is completely in the store

	begin struct {
		sync.Mutex
		head chainHead // of the newest header written
		last *beginning
	}
	mu struct {
		sync.Mutex
		closed   bool
		recs     map[uint64]*rec      // all that have files
		sessions map[string]*rec      // the same by session
		open     map[*Writer]struct{} // not closed yet
		sealing  map[*rec]struct{}    // have logs or an ending to seal
		sending  map[*rec]struct{}    // have objects to send
		stored   []*rec               // completely in the store, to be deleted here
		durable  chainHead            // newest header that is on disk, as are all before it
		saved    chainHead            // what chain.json holds
		lastErr  error
		lastAt   time.Time
		sent     uint64 // objects
	}
}

// chainHead is the newest recording in the node's chain.
type chainHead struct {
	Chain   string `json:"chain"`
	Seq     uint64 `json:"seq"`
	Hash    string `json:"hash"` // Sum of its header object, hex
	Session string `json:"session"`
}

// A beginning is a Begin under way. They complete in the order of the chain, so
// that after a power cut everything behind the first header that is missing is
// known to have never begun.
type beginning struct {
	done chan struct{}
	err  error // set before done is closed
}

// rec is one recording that has files in the spool. Its fields are constant or
// guarded by Spool.mu, except those of the sealer.
type rec struct {
	seq       uint64
	session   string
	prefix    string  // of its keys in the store
	signer    *signer // of the whole recording
	continued []byte  // signer's certificate when the header has another one
	w         *Writer

	// The sealer's alone (Open's before it runs).
	tree     format.Tree
	prev     format.Hash
	segments uint64
	cut      int64

	sealFailures int // in a row
	sealAfter    time.Time

	logs     []logFile
	objects  []*object // in order of sending; sent segments leave when a newer one is sealed
	ending   *recording.Ending
	failure  string
	complete bool // the trailer is among objects
	busy     bool // a sender has it
	failures int
	notUntil time.Time
	alarm    error // what the store holds differs, or files are damaged
}

// name is the recording's in the store: YYYY/MM/DD/session.
func (r *rec) name() string {
	return strings.TrimSuffix(strings.TrimPrefix(r.prefix, recording.Root), "/")
}

// A logFile is closed and waits for the sealer.
type logFile struct {
	number uint64
	size   int64         // good bytes; what is behind them is not part of it
	last   recording.LSN // 0: not known (after a restart)
	born   time.Time
}

type object struct {
	name string // in the store, under the prefix
	file string // in dir
	size int64
	born time.Time // of its oldest content
	sent bool
}

// Open opens the spool in o.Dir, making it when it is not there, and takes up
// what an earlier process left: recordings without ending are completed, with
// reason "crash", when Run runs. It starts nothing.
func Open(o Options) (*Spool, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	cert, err := format.CheckSigner(o.Signer, o.Certificate)
	if err != nil {
		return nil, err
	}
	s := &Spool{
		o:      o,
		dir:    filepath.Join(o.Dir, "rec"),
		stop:   make(chan struct{}),
		toSeal: make(chan struct{}, 1),
		toSend: make(chan struct{}, 1),

		toFinish: make(chan struct{}, 1),
	}
	s.signer.Store(&signer{o.Signer, cert})
	s.mu.recs = make(map[uint64]*rec)
	s.mu.sessions = make(map[string]*rec)
	s.mu.open = make(map[*Writer]struct{})
	s.mu.sealing = make(map[*rec]struct{})
	s.mu.sending = make(map[*rec]struct{})
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("recording: spool: %w", err)
	}
	if s.lock, err = os.OpenFile(filepath.Join(o.Dir, "LOCK"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("recording: spool: %w", err)
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		s.lock.Close()
		return nil, fmt.Errorf("recording: spool %s is used by another process: %w", o.Dir, err)
	}
	if s.dirF, err = os.Open(s.dir); err == nil {
		err = s.recover(cert)
	}
	if err != nil {
		s.release()
		return nil, fmt.Errorf("recording: spool: %w", err)
	}
	return s, nil
}

// signer is a key with its certificate.
type signer struct {
	crypto.Signer
	cert *x509.Certificate
}

// SetSigner changes the key that recordings are signed with. Those that have
// begun are signed to their end with the key they began with, which the Spool
// keeps for as long; after a restart, with the one given to Open.
func (s *Spool) SetSigner(key crypto.Signer, certificate []byte) error {
	cert, err := format.CheckSigner(key, certificate)
	if err == nil {
		s.signer.Store(&signer{key, cert})
	}
	return err
}

func (s *Spool) release() {
	if s.dirF != nil {
		s.dirF.Close()
	}
	s.lock.Close() // and with it the lock
}

// Begin starts a recording. When it returns, the header is on disk and the
// recording has its place in the node's chain. It fills in the header's Node,
// Cluster, Started (when zero) and chain fields.
func (s *Spool) Begin(h recording.Header) (*Writer, error) {
	if err := recording.CheckSession(h.Session); err != nil {
		return nil, err
	}
	h.Node, h.Cluster = s.o.Node, s.o.Cluster
	if h.Started.IsZero() {
		h.Started = time.Now()
	}
	h.Started = h.Started.UTC()
	if s.used.Load() >= s.o.MaxSpoolBytes {
		return nil, ErrFull
	}
	r := &rec{session: h.Session, prefix: recording.Prefix(h.Started, h.Session)}
	w := &Writer{s: s, r: r}
	r.w = w
	b, err := s.writeHeader(&h, r)
	if err != nil {
		return nil, err
	}
	// Outside the lock, so that the disk can take many at once.
	err = s.syncFile(s.header(r.seq))
	if err == nil {
		err = s.dirF.Sync()
	}
	if b.after != nil {
		<-b.after.done
		err = errors.Join(err, b.after.err)
	}
	if err != nil {
		// Later headers name this one, and nobody knows what is on disk.
		err = fmt.Errorf("recording: begin: %w", err)
		s.failed.CompareAndSwap(nil, err)
		b.err = err
		close(b.done)
		return nil, err
	}
	s.mu.Lock()
	s.mu.durable = b.head
	closed := s.mu.closed
	s.mu.open[w] = struct{}{}
	s.mu.sending[r] = struct{}{}
	s.mu.Unlock()
	close(b.done)
	wake(s.toSend)
	if closed {
		return nil, errors.Join(ErrClosed, w.Close(recording.Ending{Reason: "shutdown"}))
	}
	return w, nil
}

// begun is what writeHeader hands to Begin.
type begun struct {
	*beginning
	after *beginning // nil: none under way
	head  chainHead
}

// writeHeader gives the recording its place in the chain and writes its header
// file, not yet synced.
func (s *Spool) writeHeader(h *recording.Header, r *rec) (begun, error) {
	s.begin.Lock()
	defer s.begin.Unlock()
	if err, ok := s.failed.Load().(error); ok {
		return begun{}, err
	}
	head := s.begin.head
	h.Chain, h.NodeSeq, h.Prev, h.PrevSession = head.Chain, head.Seq+1, head.Hash, head.Session
	r.signer = s.signer.Load()
	obj, err := format.SealHeader(h, r.signer.cert.Raw, r.signer)
	if err != nil {
		return begun{}, err
	}
	r.seq, r.prev = h.NodeSeq, format.Sum(obj)
	r.objects = []*object{{name: recording.HeaderName, file: s.header(r.seq), size: int64(len(obj)), born: h.Started}}

	s.mu.Lock()
	_, taken := s.mu.sessions[h.Session]
	closed := s.mu.closed
	if !taken && !closed {
		s.mu.sessions[h.Session], s.mu.recs[r.seq] = r, r
	}
	s.mu.Unlock()
	if closed {
		return begun{}, ErrClosed
	}
	if taken {
		return begun{}, fmt.Errorf("recording: session %s is being recorded already", h.Session)
	}
	if err := s.writeFile(s.header(r.seq), obj, false); err != nil {
		os.Remove(s.header(r.seq))
		s.mu.Lock()
		delete(s.mu.sessions, h.Session)
		delete(s.mu.recs, r.seq)
		s.mu.Unlock()
		return begun{}, fmt.Errorf("recording: begin: %w", err)
	}
	b := begun{
		beginning: &beginning{done: make(chan struct{})},
		after:     s.begin.last,
		head:      chainHead{Chain: head.Chain, Seq: r.seq, Hash: r.prev.String(), Session: h.Session},
	}
	s.begin.head, s.begin.last = b.head, b.beginning
	return b, nil
}

// Status is what an operator wants to know of a spool.
type Status struct {
	Open    int // recordings being written
	Waiting int // recordings that are closed and not completely in the store
	// BytesWaiting is the size of the spool; MaxBytes its limit.
	BytesWaiting, MaxBytes int64
	// OldestUnsent is the age of the oldest entry that is not in the store.
	OldestUnsent time.Duration
	Sent         uint64 // objects, since Open
	LastError    string // of sealing or sending, "" when there was none
	LastErrorAt  time.Time
	// Alarms name recordings that need a person: the store holds something else
	// under their names, or their files are damaged.
	Alarms []string
	Full   bool
}

// Status returns the state of the spool.
func (s *Spool) Status() Status {
	now := time.Now()
	st := Status{BytesWaiting: s.used.Load(), MaxBytes: s.o.MaxSpoolBytes}
	st.Full = st.BytesWaiting >= st.MaxBytes
	oldest := now
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Open, st.Sent, st.LastErrorAt = len(s.mu.open), s.mu.sent, s.mu.lastAt
	st.Waiting = len(s.mu.recs) - st.Open
	if s.mu.lastErr != nil {
		st.LastError = s.mu.lastErr.Error()
	}
	for _, seq := range slices.Sorted(maps.Keys(s.mu.recs)) {
		r := s.mu.recs[seq]
		if r.alarm != nil && len(st.Alarms) < 100 { // enough to act on
			st.Alarms = append(st.Alarms, r.alarm.Error())
		}
		for _, o := range r.objects {
			if !o.sent && o.born.Before(oldest) {
				oldest = o.born
			}
		}
		if len(r.logs) > 0 && r.logs[0].born.Before(oldest) {
			oldest = r.logs[0].born
		}
		if r.w != nil {
			if born := r.w.born.Load(); born != 0 && born < oldest.UnixNano() {
				oldest = time.Unix(0, born)
			}
		}
	}
	st.OldestUnsent = now.Sub(oldest)
	return st
}

// Close closes what is still being recorded, with reason "shutdown", waits for
// Run to return and gives the directory free. What is not in the store yet is
// sent after the next Open.
func (s *Spool) Close() error {
	s.mu.Lock()
	if s.mu.closed {
		s.mu.Unlock()
		return nil
	}
	s.mu.closed = true
	open := slices.Collect(maps.Keys(s.mu.open))
	s.mu.Unlock()
	var errs []error
	for _, w := range open {
		errs = append(errs, w.Close(recording.Ending{Reason: "shutdown"}))
	}
	close(s.stop)
	s.runs.Wait()
	s.release()
	return errors.Join(errs...)
}

// Drain returns when every recording that is closed is in the store, or with
// the reason why not when ctx ends. Run must be running.
func (s *Spool) Drain(ctx context.Context) error {
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		s.mu.Lock()
		n, err := len(s.mu.recs)-len(s.mu.open), s.mu.lastErr
		s.mu.Unlock()
		if n <= 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("recording: %d recordings are not in the store yet: %w", n, errors.Join(ctx.Err(), err))
		case <-t.C:
		}
	}
}

// note remembers and logs an error of the background work.
func (s *Spool) note(r *rec, what string, err error) {
	s.mu.Lock()
	s.mu.lastErr, s.mu.lastAt = fmt.Errorf("%s of session %s: %w", what, r.session, err), time.Now()
	s.mu.Unlock()
	s.o.Log.Warn("recording: "+what+" failed", "session", r.session, "err", err)
}

// setAlarm marks a recording that needs a person.
func (s *Spool) setAlarm(r *rec, err error) {
	err = fmt.Errorf("session %s: %w", r.session, err)
	s.mu.Lock()
	known := r.alarm != nil && r.alarm.Error() == err.Error()
	r.alarm = err
	s.mu.Unlock()
	if !known {
		s.o.Log.Error("recording: ALARM", "session", r.session, "err", err)
	}
}

func (s *Spool) file(seq uint64, ext string) string {
	return filepath.Join(s.dir, fmt.Sprintf("%016d.%s", seq, ext))
}
func (s *Spool) header(seq uint64) string  { return s.file(seq, "header") }
func (s *Spool) trailer(seq uint64) string { return s.file(seq, "trailer") }
func (s *Spool) done(seq uint64) string    { return s.file(seq, "done") }
func (s *Spool) log(seq, n uint64) string  { return s.file(seq, fmt.Sprintf("%06d.log", n)) }
func (s *Spool) seg(seq, n uint64) string  { return s.file(seq, fmt.Sprintf("%06d.seg", n)) }

// writeFile makes a file that must not be there yet and counts it. With tmp it
// is written under a temporary name, synced and renamed; the caller syncs the
// directory.
func (s *Spool) writeFile(path string, data []byte, tmp bool) error {
	name, flag := path, os.O_CREATE|os.O_WRONLY|os.O_EXCL
	if tmp {
		name, flag = path+".tmp", os.O_CREATE|os.O_WRONLY|os.O_TRUNC
	}
	f, err := os.OpenFile(name, flag, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && tmp {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil && tmp {
		err = os.Rename(name, path)
	}
	if err != nil {
		os.Remove(name)
		return err
	}
	s.used.Add(int64(len(data)))
	return nil
}

// remove deletes a file and no longer counts it. It is no error when it is gone.
func (s *Spool) remove(path string, size int64) error {
	err := os.Remove(path)
	if err == nil {
		s.used.Add(-size)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (s *Spool) syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// saveChain writes the durable head of the chain to chain.json, so that headers
// up to it may be deleted. Called by finishLoop alone.
func (s *Spool) saveChain() error {
	s.mu.Lock()
	head, saved := s.mu.durable, s.mu.saved
	s.mu.Unlock()
	if head == saved {
		return nil
	}
	if err := writeChain(s.o.Dir, head); err != nil {
		return err
	}
	s.mu.Lock()
	s.mu.saved = head
	s.mu.Unlock()
	return nil
}

func writeChain(dir string, head chainHead) error {
	b, err := json.Marshal(head)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "chain.json")
	f, err := os.OpenFile(path+".tmp", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// readChain returns the saved head; a zero one when there is none.
func readChain(dir string) (chainHead, error) {
	var head chainHead
	b, err := os.ReadFile(filepath.Join(dir, "chain.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return head, nil
	}
	if err != nil {
		return head, err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&head); err != nil || head.Chain == "" || (head.Seq == 0) != (head.Hash == "") {
		return head, fmt.Errorf("chain.json is damaged (%v); without it deleted recordings of this node cannot be told from missing ones", err)
	}
	return head, nil
}

func newChain() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// continuedBy returns cert when it is not the one of the header.
func continuedBy(h *format.Header, cert *x509.Certificate) []byte {
	if bytes.Equal(h.Certificate.Raw, cert.Raw) {
		return nil
	}
	return cert.Raw
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

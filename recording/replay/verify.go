package replay

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
	"github.com/sallyport/sallyport/recording/terminal"
)

// Trust says whose signatures count.
type Trust struct {
	// Roots are the cluster's certificate authorities, known from elsewhere
	// than the store. Required.
	Roots *x509.CertPool
	// CheckNode says whether a certificate that chains to Roots is that of
	// the named node, so that other holders of certificates (another node, an
	// administrator) cannot sign for it. nil: the common name or a DNS name
	// must be the node's name.
	CheckNode func(cert *x509.Certificate, node string) error

	known *knownCerts // nil: each certificate is verified each time
}

// Remember has certificates verified once and not for each of many recordings:
// a fourth of the time that small ones take. Roots must not change any more.
func (t *Trust) Remember() {
	if t.known == nil {
		t.known = &knownCerts{}
	}
}

// knownCerts are certificates that chain to the roots.
type knownCerts struct {
	sync.RWMutex
	m map[[sha256.Size]byte]validity
}

// validity is when a certificate and all that it chains to are valid.
type validity struct{ from, to time.Time }

const maxKnownCerts = 10_000 // of nodes, renewed every few months; more are verified each time

// chains says whether cert chains to the roots at that time.
func (t *Trust) chains(cert *x509.Certificate, at time.Time) error {
	var key [sha256.Size]byte
	if t.known != nil {
		key = sha256.Sum256(cert.Raw)
		t.known.RLock()
		v, ok := t.known.m[key]
		t.known.RUnlock()
		if ok && !at.Before(v.from) && !at.After(v.to) {
			return nil
		}
	}
	chains, err := cert.Verify(x509.VerifyOptions{
		Roots:       t.Roots,
		CurrentTime: at,
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil || t.known == nil {
		return err
	}
	v := validity{cert.NotBefore, cert.NotAfter}
	for _, c := range chains[0] {
		if c.NotBefore.After(v.from) {
			v.from = c.NotBefore
		}
		if c.NotAfter.Before(v.to) {
			v.to = c.NotAfter
		}
	}
	t.known.Lock()
	defer t.known.Unlock()
	if t.known.m == nil {
		t.known.m = map[[sha256.Size]byte]validity{}
	}
	if len(t.known.m) < maxKnownCerts {
		t.known.m[key] = v
	}
	return nil
}

func (t *Trust) check(cert *x509.Certificate, node string, at time.Time) error {
	if err := t.chains(cert, at); err != nil {
		return err
	}
	if t.CheckNode != nil {
		return t.CheckNode(cert, node)
	}
	if cert.Subject.CommonName != node && !slices.Contains(cert.DNSNames, node) {
		return fmt.Errorf("the certificate is for %q, not for node %q", cert.Subject.CommonName, node)
	}
	return nil
}

// Kind is what is wrong.
type Kind string

const (
	Altered          Kind = "altered"             // bytes are not those that were signed
	Forged           Kind = "forged"              // well formed and linked, but not signed by the node
	Truncated        Kind = "truncated"           // an object ends early
	MissingHeader    Kind = "missing-header"      //
	MissingSegment   Kind = "missing-segment"     //
	Reordered        Kind = "reordered"           // a segment in another's place
	Swapped          Kind = "swapped"             // an object of another recording
	Broken           Kind = "broken-chain"        // signed, but does not follow what is before it
	UnknownSigner    Kind = "unknown-certificate" // the signer's certificate is not the cluster's, or not this node's
	Foreign          Kind = "foreign-object"      // an object that belongs to no recording
	MissingRecording Kind = "missing-recording"   // a gap in a node's chain
	Forked           Kind = "forked-chain"        // two recordings in one place of a node's chain
	// Unfinished: there is no trailer. The session may be going on, its node
	// may be down, or its end was deleted: the store alone cannot tell.
	Unfinished Kind = "unfinished"
)

// Problem is one thing that is wrong. Its texts are safe to show on a terminal.
type Problem struct {
	Kind      Kind
	Recording string // YYYY/MM/DD/session; "" for a node's chain and foreign objects
	Object    string // header, 000001.seg, trailer, or a key
	Text      string
}

func (p Problem) Error() string {
	s := string(p.Kind)
	if p.Recording != "" {
		s = p.Recording + ": " + s
	}
	if p.Object != "" {
		s += " " + p.Object
	}
	return s + ": " + p.Text
}

// Result is what was found of one recording.
type Result struct {
	Name     string
	Header   *recording.Header // nil when it cannot be read
	Ending   *recording.Ending // nil when unfinished, or unreadable
	Entries  uint64            // that were verified
	Segments int
	Bytes    int64
	Lost     int64  // bytes the node found torn after a crash, as its trailer says
	Failed   string // why the node could record no further, as its trailer says
	Problems []Problem
	// Believed says that the header is the node's. Read sets it.
	Believed bool
	// Certificates are those that objects were signed with, or say they were, the
	// header's first.
	Certificates []*x509.Certificate
}

// Verified says whether the recording is complete and as its node wrote it.
func (r *Result) Verified() bool { return len(r.Problems) == 0 }

// NodeChain is what was found of one node's chain of recordings. A node that
// lost its spool begins another.
type NodeChain struct {
	Node, Chain string
	First, Last uint64    // places seen
	Newest      time.Time // when the last one started
	Recordings  int
}

// Report is the outcome of Verify.
type Report struct {
	Recordings int // looked at
	Verified   int
	Unfinished int // whole as far as they go
	Broken     int
	Entries    uint64
	Bytes      int64
	Chains     []NodeChain // only when the whole store was verified
	Problems   []Problem   // the first maxProblems, by recording
	More       int         // problems beyond those
}

// OK says whether nothing is wrong, unfinished recordings aside.
func (r *Report) OK() bool {
	return r.More == 0 && !slices.ContainsFunc(r.Problems, func(p Problem) bool { return p.Kind != Unfinished })
}

const (
	maxProblems     = 10_000
	verifyInFlight  = 8 // recordings at a time; each holds one segment, decompressed, and the object of the next
	maxChainEntries = 10_000_000
)

// VerifyOptions say what to verify and whom to tell.
type VerifyOptions struct {
	Trust
	// Recording names one (a session or YYYY/MM/DD/session); "" verifies the
	// whole store, and that each node's chain is without gap.
	Recording string
	// Each, when not nil, is called with every recording's result, one at a
	// time, in no order.
	Each func(*Result)
}

// Verify checks recordings against the signatures of the nodes that wrote them.
// The error tells that it could not be carried out; what is wrong with the
// recordings is in the report.
func Verify(ctx context.Context, store recording.Store, o VerifyOptions) (*Report, error) {
	if o.Roots == nil {
		return nil, errors.New("recording: verifying needs the cluster's CA certificate")
	}
	rep := &Report{}
	if o.Recording != "" {
		g, err := find(ctx, store, o.Recording)
		if err != nil {
			return nil, err
		}
		c := newCheck(store, o.Trust, g)
		if err := c.run(ctx); err != nil {
			return nil, err
		}
		rep.add(&c.res, o.Each)
		return rep, nil
	}
	o.Trust.Remember()
	chains := make(map[[2]string][]link)
	var mu sync.Mutex // rep, chains
	n := 0
	eg, ectx := errgroup.WithContext(ctx)
	eg.SetLimit(verifyInFlight)
	lerr := groups(ectx, store, time.Time{}, time.Time{}, func(g *group) error {
		if g.prefix == "" {
			mu.Lock()
			defer mu.Unlock()
			for _, key := range g.foreign {
				rep.problem(Problem{Kind: Foreign, Object: key, Text: "belongs to no recording"})
			}
			return nil
		}
		if n++; n > maxChainEntries {
			return fmt.Errorf("recording: more than %d recordings: verify them by parts", maxChainEntries)
		}
		eg.Go(func() error {
			c := newCheck(store, o.Trust, g)
			if err := c.run(ectx); err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			rep.add(&c.res, o.Each)
			if c.header != nil {
				k := [2]string{c.header.Node, c.header.Chain}
				chains[k] = append(chains[k], c.link())
			}
			return nil
		})
		return ectx.Err()
	})
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	if lerr != nil {
		return nil, lerr
	}
	for k, links := range chains {
		rep.chain(k[0], k[1], links)
	}
	slices.SortFunc(rep.Chains, func(a, b NodeChain) int {
		return strings.Compare(a.Node+"\x00"+a.Chain, b.Node+"\x00"+b.Chain)
	})
	slices.SortStableFunc(rep.Problems, func(a, b Problem) int { return strings.Compare(a.Recording, b.Recording) })
	return rep, nil
}

func (r *Report) problem(p Problem) {
	p.Object, p.Text = terminal.EscapeLine(p.Object), terminal.EscapeLine(p.Text)
	if len(r.Problems) < maxProblems {
		r.Problems = append(r.Problems, p)
	} else {
		r.More++
	}
}

func (r *Report) add(res *Result, each func(*Result)) {
	r.Recordings++
	r.Entries += res.Entries
	r.Bytes += res.Bytes
	switch {
	case res.Verified():
		r.Verified++
	case len(res.Problems) == 1 && res.Problems[0].Kind == Unfinished:
		r.Unfinished++
	default:
		r.Broken++
	}
	for _, p := range res.Problems {
		r.problem(p)
	}
	if each != nil {
		each(res)
	}
}

// A link is one recording's place in its node's chain.
type link struct {
	seq         uint64
	hash        format.Hash
	prev        string
	name        string
	prevSession string
	started     time.Time
	valid       bool // signed by a node we trust, in its own place; otherwise reported already
}

// chain looks for gaps and forks in one node's chain.
func (r *Report) chain(node, id string, links []link) {
	slices.SortFunc(links, func(a, b link) int {
		switch {
		case a.seq != b.seq:
			return int(min(max(int64(a.seq-b.seq), -1), 1))
		case a.valid != b.valid && a.valid:
			return -1
		case a.valid != b.valid:
			return 1
		}
		return strings.Compare(a.name, b.name)
	})
	// Anybody can make up headers; they are reported as such, and here they only
	// keep a place from being called empty.
	for len(links) > 0 && !links[len(links)-1].valid {
		links = links[:len(links)-1]
	}
	if len(links) == 0 {
		return
	}
	missing := func(from, to uint64, next link) {
		what := fmt.Sprintf("recording %d", from)
		if from != to {
			what = fmt.Sprintf("recordings %d to %d", from, to)
		}
		text := fmt.Sprintf("%s of node %s are not in the store; recording %d (%s) names session %s as the one before it", what, node, next.seq, next.name, next.prevSession)
		if from == to {
			text = strings.Replace(text, " are not", " is not", 1)
		}
		r.problem(Problem{Kind: MissingRecording, Text: text})
	}
	nc := NodeChain{Node: node, Chain: id}
	var last link
	for _, l := range links {
		if nc.Recordings > 0 && l.seq == last.seq {
			if l.valid && l.hash != last.hash {
				r.problem(Problem{Kind: Forked, Recording: l.name, Text: fmt.Sprintf("node %s signed this and %s as its recording %d", node, last.name, l.seq)})
			}
			continue
		}
		if l.seq != last.seq+1 {
			missing(last.seq+1, l.seq-1, l)
		} else if l.valid && last.valid && l.prev != last.hash.String() {
			r.problem(Problem{Kind: Broken, Recording: l.name, Object: recording.HeaderName, Text: fmt.Sprintf("it does not follow the header of recording %d (%s) of node %s", last.seq, last.name, node)})
		}
		if nc.Recordings == 0 {
			nc.First = l.seq
		}
		nc.Last, nc.Newest = l.seq, l.started
		nc.Recordings++
		last = l
	}
	r.Chains = append(r.Chains, nc)
}

// check verifies one recording, object by object.
type check struct {
	store recording.Store
	trust Trust
	g     *group
	res   Result
	// each, when not nil, gets the entries of segments that are as signed.
	each func(*recording.Entry) error
	// want, when not nil, is asked about a valid header; its no ends the check
	// with recording.ErrStop.
	want func(*recording.Header) bool
	// strict ends the check at the first problem, with it as error.
	strict bool

	header   *format.Header
	valid    bool        // the header can be believed
	hash     format.Hash // of the header
	prev     format.Hash // of the object before
	prevName string      // "" when nothing can be said of what follows it
	tree     *format.Tree
	ahead    <-chan fetched // the next segment; nil: it is not being fetched
	suspect  *Problem       // the object before has a wrong signature: altered, or, when what follows names its hash, forged
	forged   bool           // one was
}

func newCheck(store recording.Store, trust Trust, g *group) *check {
	return &check{store: store, trust: trust, g: g, res: Result{Name: g.name(), Bytes: g.bytes, Segments: len(g.segments)}, tree: &format.Tree{}}
}

func (c *check) link() link {
	h := c.header
	return link{seq: h.NodeSeq, hash: c.hash, prev: h.Prev, name: c.g.name(), prevSession: h.PrevSession, started: h.Started, valid: c.valid}
}

func (c *check) problem(k Kind, object, text string, args ...any) error {
	p := Problem{Kind: k, Recording: c.g.name(), Object: terminal.EscapeLine(object), Text: terminal.EscapeLine(fmt.Sprintf(text, args...))}
	c.res.Problems = append(c.res.Problems, p)
	if c.strict {
		return p
	}
	return nil
}

// fetched is an object that was read ahead.
type fetched struct {
	b   []byte
	err error
}

// fetch reads an object while the one before it is checked: reading and
// checking take about as long.
func (c *check) fetch(ctx context.Context, wg *sync.WaitGroup, name string) <-chan fetched {
	got := make(chan fetched, 1)
	key := c.g.prefix + name
	wg.Go(func() {
		b, err := c.store.Get(ctx, key)
		got <- fetched{b, err}
	})
	return got
}

// get reads an object, or takes it from where it was read ahead. A nil slice
// without error: it is not what it should be, which is reported.
func (c *check) get(ctx context.Context, name string, ahead <-chan fetched) ([]byte, error) {
	var b []byte
	var err error
	if ahead != nil {
		f := <-ahead
		b, err = f.b, f.err
	} else {
		b, err = c.store.Get(ctx, c.g.prefix+name)
	}
	switch {
	case errors.Is(err, recording.ErrTooLarge):
		return nil, c.problem(Altered, name, "is larger than any object of a recording")
	case errors.Is(err, recording.ErrNotFound):
		return nil, c.problem(missingKind(name), name, "vanished while it was read")
	}
	return b, err
}

func missingKind(name string) Kind {
	if name == recording.HeaderName {
		return MissingHeader
	}
	if name == recording.TrailerName {
		return Unfinished
	}
	return MissingSegment
}

// unreadable reports an object that does not parse.
func (c *check) unreadable(name string, err error) error {
	text := strings.TrimPrefix(err.Error(), format.ErrMalformed.Error()+": ")
	if errors.Is(err, format.ErrCut) {
		return c.problem(Truncated, name, "%s", text)
	}
	return c.problem(Altered, name, "%s", text)
}

// settle decides about an object whose signature is wrong: when the object
// after it names its hash, both were made to fit by one who has not the key.
func (c *check) settle(next *format.Hash, last bool) error {
	p := c.suspect
	if p == nil {
		return nil
	}
	c.suspect = nil
	if next != nil && *next == c.prev || last && c.forged {
		p.Kind, c.forged = Forged, true
		p.Text = "it was not signed by the node; what follows was made to fit it"
	}
	return c.problem(p.Kind, p.Object, "%s", p.Text)
}

const wrongSignature = "the node's signature is not for these bytes"

func (c *check) suspected(name string) error {
	c.suspect = &Problem{Kind: Altered, Object: name, Text: wrongSignature}
	if c.strict {
		return c.settle(nil, false)
	}
	return nil
}

// run verifies the recording. Its error, unless strict, is about reading the
// store.
func (c *check) run(ctx context.Context) error {
	for _, key := range c.g.foreign {
		if err := c.problem(Foreign, key, "is no object of a recording"); err != nil {
			return err
		}
	}
	if !c.g.header {
		return c.problem(MissingHeader, recording.HeaderName, "without it nothing of the recording can be verified")
	}
	if err := c.checkHeader(ctx); err != nil || c.header == nil {
		return err
	}
	if c.valid && c.want != nil && !c.want(&c.header.Header) {
		return recording.ErrStop
	}
	t, signed, err := c.getTrailer(ctx)
	if err != nil {
		return err
	}
	if t != nil && !signed && c.strict {
		return c.problem(Altered, recording.TrailerName, wrongSignature)
	}
	want := uint64(1) // next segment
	ctx, cancel := context.WithCancel(ctx)
	var ahead sync.WaitGroup
	defer ahead.Wait()
	defer cancel()
	for i, n := range c.g.segments {
		if signed && n > t.Segments {
			break
		}
		if err := c.gap(want, n); err != nil {
			return err
		}
		got := c.ahead
		if c.ahead = nil; i+1 < len(c.g.segments) {
			c.ahead = c.fetch(ctx, &ahead, recording.SegmentName(c.g.segments[i+1]))
		}
		if err := c.checkSegment(ctx, n, got); err != nil {
			return err
		}
		want = n + 1
	}
	if t == nil {
		if err := c.settle(nil, true); err != nil || c.g.trailer || c.strict {
			return err
		}
		return c.problem(Unfinished, "", "there is no trailer: the session is still going on, its node is down, or its end was deleted; the newest object is of %s", c.g.written.UTC().Format(time.RFC3339))
	}
	if !signed {
		if err := c.settle(&t.Prev, false); err != nil {
			return err
		}
		if c.forged {
			return c.problem(Forged, recording.TrailerName, "it was not signed by the node; it was made to fit what is before it")
		}
		return c.problem(Altered, recording.TrailerName, wrongSignature)
	}
	if err := c.gap(want, t.Segments+1); err != nil {
		return err
	}
	return c.checkTrailer(t)
}

// gap reports segments want to n-1 as missing.
func (c *check) gap(want, n uint64) error {
	if want == n {
		return nil
	}
	if err := c.settle(nil, false); err != nil {
		return err
	}
	c.prevName, c.tree = "", nil
	if want+1 == n {
		return c.problem(MissingSegment, recording.SegmentName(want), "is not in the store")
	}
	return c.problem(MissingSegment, recording.SegmentName(want), "and those up to %s are not in the store", recording.SegmentName(n-1))
}

func (c *check) checkHeader(ctx context.Context) error {
	const name = recording.HeaderName
	b, err := c.get(ctx, name, nil)
	if b == nil {
		return err
	}
	h, err := format.ParseHeader(b)
	if err != nil {
		return c.unreadable(name, err)
	}
	c.header, c.hash = h, format.Sum(b)
	c.prev, c.prevName = c.hash, name
	c.res.Header = &h.Header
	c.valid = true
	c.res.Certificates = append(c.res.Certificates, h.Certificate)
	if err := c.trust.check(h.Certificate, h.Node, h.Started); err != nil {
		c.valid = false
		if err := c.problem(UnknownSigner, name, "%v", err); err != nil {
			return err
		}
	}
	if !h.SignedBy(h.Certificate.PublicKey) {
		c.valid, c.prevName = false, ""
		return c.suspected(name)
	}
	if recording.Prefix(h.Started, h.Session) != c.g.prefix {
		c.valid, c.prevName = false, ""
		return c.problem(Swapped, name, "is that of session %s, started %s", h.Session, h.Started.UTC().Format(time.RFC3339))
	}
	return nil
}

// signer returns the certificate an object must be signed with: the header's,
// or the one it brings, when that is the same node's.
func (c *check) signer(name string, continued *x509.Certificate) (*x509.Certificate, error) {
	if continued == nil {
		return c.header.Certificate, nil
	}
	// When it was signed is known from the object alone, so the certificate is
	// checked for when it began to be valid.
	if err := c.trust.check(continued, c.header.Node, continued.NotBefore); err != nil {
		return nil, c.problem(UnknownSigner, name, "%v", err)
	}
	if !slices.ContainsFunc(c.res.Certificates, continued.Equal) {
		c.res.Certificates = append(c.res.Certificates, continued)
	}
	return continued, nil
}

// follows reports an object whose signature is right but that does not come
// after the one before it.
func (c *check) follows(name string, prev format.Hash) error {
	if c.prevName != "" && prev != c.prev {
		return c.problem(Broken, name, "does not follow the %s that is in the store", c.prevName)
	}
	return nil
}

// checkSegment checks segment n, which is being fetched when got is not nil.
func (c *check) checkSegment(ctx context.Context, n uint64, got <-chan fetched) error {
	name := recording.SegmentName(n)
	b, err := c.get(ctx, name, got)
	if b == nil {
		c.prevName, c.tree = "", nil
		return errors.Join(err, c.settle(nil, false))
	}
	s, err := format.ParseSegment(b)
	if err != nil {
		err = errors.Join(c.settle(nil, false), c.unreadable(name, err))
		c.prevName, c.tree = "", nil
		return err
	}
	if err := c.settle(&s.Prev, false); err != nil {
		return err
	}
	cert, err := c.signer(name, s.Signer)
	if err != nil {
		return err
	}
	tree := c.tree
	if tree != nil && tree.Size() != uint64(s.First)-1 {
		tree = nil
	}
	gapless := c.tree == nil || tree != nil
	// Later objects are judged by this one, or not at all if it is out of place.
	prevName := c.prevName
	defer func() { c.prev = format.Sum(b) }()
	c.prevName, c.tree = "", nil
	switch {
	case cert == nil:
		return nil
	case !s.SignedBy(cert.PublicKey):
		if s.Session != c.g.session() {
			return c.problem(Swapped, name, "is of session %s", s.Session)
		}
		return c.suspected(name)
	case s.Session != c.g.session():
		return c.problem(Swapped, name, "is of session %s", s.Session)
	case s.Number != n:
		return c.problem(Reordered, name, "holds segment %d", s.Number)
	}
	c.prevName = prevName
	if prevName != "" && s.Prev != c.prev {
		tree = nil
	}
	if err := c.follows(name, s.Prev); err != nil {
		return err
	}
	c.prevName = name
	if !gapless {
		if err := c.problem(Broken, name, "begins with entry %d", s.First); err != nil {
			return err
		}
	}
	var entries uint64
	err = s.Entries(tree, func(e *recording.Entry) error {
		entries++
		if c.each == nil {
			return nil
		}
		if err := c.each(e); err != nil {
			return stopError{err}
		}
		return nil
	})
	c.res.Entries += entries
	if stop := (stopError{}); errors.As(err, &stop) {
		return stop.error
	}
	t := s.Tree.Clone()
	c.tree = &t
	if err != nil {
		// Signed by the node and wrong all the same.
		return c.problem(Broken, name, "%v", err)
	}
	return nil
}

// stopError carries an error of the caller through the decoder.
type stopError struct{ error }

// getTrailer reads the trailer; nil when there is none that can be read. It is
// read before the segments, as it says how many there are; signed tells whether
// that can be believed.
func (c *check) getTrailer(ctx context.Context) (t *format.Trailer, signed bool, err error) {
	const name = recording.TrailerName
	if !c.g.trailer {
		return nil, false, nil
	}
	b, err := c.get(ctx, name, nil)
	if b == nil {
		return nil, false, err
	}
	if t, err = format.ParseTrailer(b); err != nil {
		return nil, false, c.unreadable(name, err)
	}
	cert, err := c.signer(name, t.Signer)
	if cert == nil {
		return nil, false, err
	}
	if t.Session != c.g.session() {
		return nil, false, c.problem(Swapped, name, "is of session %s", t.Session)
	}
	return t, t.SignedBy(cert.PublicKey), nil
}

func (c *check) checkTrailer(t *format.Trailer) error {
	const name = recording.TrailerName
	if err := c.settle(&t.Prev, false); err != nil {
		return err
	}
	if err := c.follows(name, t.Prev); err != nil {
		return err
	}
	for _, n := range c.g.segments {
		if n > t.Segments {
			if err := c.problem(Foreign, recording.SegmentName(n), "the recording was closed with %d segments", t.Segments); err != nil {
				return err
			}
		}
	}
	if c.tree != nil && (c.tree.Size() != t.Entries || c.tree.Root() != t.Root) {
		if err := c.problem(Broken, name, "was made for %d entries with another root than the %d that are here", t.Entries, c.tree.Size()); err != nil {
			return err
		}
	}
	c.res.Ending, c.res.Lost, c.res.Failed = &t.Ending, t.CutBytes, t.Failed
	return nil
}

package scenario

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/sallyport/sallyport/chaos/check"
	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/chaos/sandbox"
	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/raftstore/event"
)

// rules let the load do what it does. The mark makes each configuration
// another one.
func rules(mark string) string {
	return "// " + mark + `
@id("sleep")
permit (principal in Group::"ci", action == Action::"postgres:call", resource);
`
}

// tables of the load in the database bench.
const tables = `
CREATE TABLE numbers (client text NOT NULL, n bigint NOT NULL, note text, PRIMARY KEY (client, n));
CREATE TABLE scratch (n bigint PRIMARY KEY);
ALTER TABLE numbers OWNER TO app_migrator;
ALTER TABLE scratch OWNER TO app_migrator;
GRANT USAGE ON SCHEMA public TO app_migrator;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO app_ro;
GRANT SELECT, INSERT, DELETE ON ALL TABLES IN SCHEMA public TO app_rw;`

// beaconSQL keeps both legs busy: a statement goes up every few hundredths of
// a second, rows come down all the time.
const beaconSQL = `SELECT repeat('x', 2000), pg_sleep(0.005) FROM generate_series(1, 8)`

// load is what goes on while the nemesis works, and what it wrote down.
type load struct {
	w      *World
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // the loops
	judges sync.WaitGroup // pending judgements of revocations
	serial atomic.Int64   // makes names

	mu      sync.Mutex
	beacons []*beacon // alive and not being revoked
	ops     []check.Op
	markers map[int]string // ops of configuration changes whose outcome is unknown -> their marker
	revs    []check.Revocation
	times   []revokeTime
	changes []string       // acknowledged, as in the log
	acked   map[string]int // rows acknowledged to each writer
	kept    map[int64]bool // rows of scratch that must be there (true) or gone
	leaders []check.Leader // seen, in order
	terms   map[string][]uint64
	dull    int // revoked sessions that had carried nothing: a measurement of nothing
	counts  map[string]int
}

// revokeTime is how long one revoke took.
type revokeTime struct {
	took    time.Duration
	allLive bool // no node was stopped or cut off meanwhile
	stopped int  // nodes that were, all the time
}

// beacon is a subject with one session, through which bytes go both ways until
// it is cut.
type beacon struct {
	subject string
	token   string
	node    *node
	conn    *pgx.Conn
	flows   map[string]sandbox.Flow // by leg
	hold    chan struct{}           // closed when it may read on; nil when it never held back
	done    chan struct{}
	err     error        // why it ended; after done
	judged  atomic.Int32 // revocations of it that are not judged yet
}

// revoked is the answer of revoke, as far as it matters here.
type revoked struct {
	ID    string `json:"id"`
	Nodes []struct {
		Node      string    `json:"node"`
		State     string    `json:"state"`
		Level     int       `json:"level"`
		LeaseEnds time.Time `json:"lease_ends"`
	} `json:"nodes"`
}

// revoke revokes a subject at one node.
func revoke(ctx context.Context, c *api.Client, subject string) (*revoked, error) {
	out := new(revoked)
	return out, c.Call(ctx, http.MethodPost, "/v1/revocations", api.RevokeRequest{Subject: subject, Reason: "chaos"}, out)
}

// fenced is the answer's word about each node.
func (r *revoked) fenced() (out []check.Fenced) {
	for _, n := range r.Nodes {
		out = append(out, check.Fenced{Node: n.Node, State: n.State, Level: n.Level, Ends: n.LeaseEnds})
	}
	return out
}

func newLoad(w *World) (*load, error) {
	l := &load{w: w, markers: map[int]string{}, acked: map[string]int{}, kept: map[int64]bool{}, terms: map[string][]uint64{}, counts: map[string]int{}}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	before := time.Now()
	d, err := w.admin(w.members()[0]).Config(l.ctx)
	if err != nil {
		return nil, err
	}
	l.op(check.Op{Object: "config", What: "as it began", From: "", To: configState(d.Index), Call: before, Return: time.Now()})
	return l, nil
}

func configState(index uint64) string { return fmt.Sprintf("config@%d", index) }

// run starts the usual load: writers and a few beacons on each node, requests
// for approval, configuration changes, and the eye on who leads.
func (l *load) run(beacons int) {
	for range l.w.members() {
		l.loop("writer", 0, l.writer)
	}
	if beacons > 0 {
		l.loop("beacons", 50*time.Millisecond, func(ctx context.Context) { l.keepBeacons(ctx, beacons) })
	}
	l.loop("approval", 300*time.Millisecond, l.approval)
	for range 2 {
		l.loop("config", 700*time.Millisecond, l.config)
	}
	l.loop("watch", 500*time.Millisecond, l.watch)
}

// loop calls f until the load is stopped, with pause between.
func (l *load) loop(name string, pause time.Duration, f func(ctx context.Context)) {
	l.wg.Go(func() {
		for l.ctx.Err() == nil {
			f(l.ctx)
			if pause > 0 {
				_ = sleep(l.ctx, pause)
			}
		}
	})
}

// stop ends the load and returns when nothing of it runs.
func (l *load) stop() {
	l.cancel()
	l.wg.Wait()
	l.judges.Wait()
	l.mu.Lock()
	beacons := l.beacons
	l.beacons = nil
	l.mu.Unlock()
	for _, b := range beacons {
		b.release()
		_ = b.conn.PgConn().Conn().Close()
		<-b.done
	}
}

func (l *load) count(what string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts[what]++
}

func (l *load) op(o check.Op) int {
	l.mu.Lock()
	l.ops = append(l.ops, o)
	i := len(l.ops) - 1
	l.mu.Unlock()
	l.w.note("op", o)
	return i
}

// somewhere is a member by chance: the load, unlike the nemesis, does not
// follow the seed to the letter, as it runs beside itself.
func (l *load) somewhere() *node {
	all := l.w.members()
	return all[rand.IntN(len(all))]
}

func (l *load) name(kind string) string { return fmt.Sprintf("%s-%d", kind, l.serial.Add(1)) }

// token of a job; ref "main" may write, others read.
func (l *load) token(name, ref string) (string, error) {
	return l.w.Token(map[string]any{
		"sub": "repo:acme/shop:job:" + name, "aud": cluster.AudienceCI, "exp": time.Now().Add(3 * time.Hour).Unix(),
		"iat":        time.Now().Add(-2 * time.Hour).Unix(), // so that a node whose clock is wrong by an hour can take it
		"repository": "acme/shop", "repository_owner": "acme", "ref": "refs/heads/" + ref, "run_id": "1", "actor": "dana@example.com",
	})
}

func subject(job string) string { return "ci/repo:acme/shop:job:" + job }

// login within the usual time.
func (l *load) login(ctx context.Context, n *node, token string) (*pgx.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	return pgx.Connect(ctx, n.DSN("bench", token))
}

// writer writes numbered rows at one node until something breaks.
func (l *load) writer(ctx context.Context) {
	name := l.name("w")
	token, err := l.token(name, "main")
	if err != nil {
		return
	}
	c, err := l.login(ctx, l.somewhere(), token)
	if err != nil {
		_ = sleep(ctx, 200*time.Millisecond)
		return
	}
	defer hangUp(c)
	l.mu.Lock()
	l.acked[name] = 0
	l.mu.Unlock()
	for i := 1; i <= 400 && ctx.Err() == nil; i++ { // then another session, elsewhere
		// Not with ctx: a statement under way is waited for.
		qctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		_, err := c.Exec(qctx, "INSERT INTO numbers VALUES ($1, $2, $3)", pgx.QueryExecModeExec, name, i, fmt.Sprintf("%s%d;", noteMark, i))
		cancel()
		if err != nil {
			return
		}
		l.mu.Lock()
		l.acked[name] = i
		l.counts["rows"]++
		l.mu.Unlock()
		if sleep(ctx, 10*time.Millisecond) != nil {
			return
		}
	}
}

// noteMark begins the note of each row, by which a recording is searched.
const noteMark = "note-"

// hangUp closes a connection without waiting long for a node that may be stopped.
func hangUp(c *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = c.Close(ctx)
}

// keepBeacons has at least n beacons alive, on nodes by chance.
func (l *load) keepBeacons(ctx context.Context, n int) {
	for ctx.Err() == nil {
		l.mu.Lock()
		l.beacons = slices.DeleteFunc(l.beacons, func(b *beacon) bool { return !b.alive() })
		short := len(l.beacons) < n
		l.mu.Unlock()
		if !short {
			return
		}
		up := l.w.up()
		if len(up) == 0 {
			return
		}
		b, err := l.beacon(ctx, up[rand.IntN(len(up))], l.name("b"), false)
		if err != nil {
			_ = sleep(ctx, 200*time.Millisecond)
			return
		}
		l.mu.Lock()
		l.beacons = append(l.beacons, b)
		l.mu.Unlock()
	}
}

// beacon logs a subject in at n and lets it run. A deaf one asks for much and
// reads nothing before release: all buffers between it and the target fill.
func (l *load) beacon(ctx context.Context, n *node, job string, deaf bool) (*beacon, error) {
	token, err := l.token(job, "feature")
	if err != nil {
		return nil, err
	}
	began := time.Now()
	c, err := l.login(ctx, n, token)
	if err != nil {
		return nil, err
	}
	l.op(check.Op{Object: subject(job), What: "login at " + n.Name, From: "", To: check.Same, Call: began, Return: time.Now()})
	b := &beacon{subject: subject(job), token: token, node: n, conn: c, done: make(chan struct{})}
	var port int
	if err := c.QueryRow(ctx, "SELECT inet_client_port()").Scan(&port); err != nil {
		hangUp(c)
		return nil, err
	}
	gateway := netip.MustParseAddr(sandbox.Gateway)
	local := netip.MustParseAddrPort(c.PgConn().Conn().LocalAddr().String())
	b.flows = map[string]sandbox.Flow{
		"client": {Port: 7000, To: local},
		"target": {Port: uint16(port), To: netip.AddrPortFrom(gateway, uint16(l.w.PG.Port))},
	}
	if deaf {
		b.hold = make(chan struct{})
	}
	go func() {
		b.run()
		l.w.note("session ended", fmt.Sprintf("%s at %s: %v", b.subject, n.Name, b.err))
	}()
	l.count("beacons")
	return b, nil
}

func (b *beacon) run() {
	defer close(b.done)
	defer hangUp(b.conn)
	ctx := context.Background() // ended by the node's cut, or by whoever closes the socket
	if b.hold != nil {
		rows, err := b.conn.Query(ctx, "SELECT repeat('x', 100000) FROM generate_series(1, 2000)", pgx.QueryExecModeSimpleProtocol)
		if err != nil {
			return
		}
		<-b.hold
		for rows.Next() {
		}
		rows.Close()
	}
	for {
		if _, err := b.conn.PgConn().Exec(ctx, beaconSQL).ReadAll(); err != nil {
			b.err = err
			return
		}
	}
}

// release lets a deaf beacon read.
func (b *beacon) release() {
	if b.hold != nil {
		select {
		case <-b.hold:
		default:
			close(b.hold)
		}
	}
}

func (b *beacon) alive() bool {
	select {
	case <-b.done:
		return false
	default:
		return true
	}
}

// take returns up to n living beacons, which are from then on the caller's.
func (l *load) take(n int) (out []*beacon) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.beacons = slices.DeleteFunc(l.beacons, func(b *beacon) bool {
		if !b.alive() {
			return true
		}
		if len(out) < n {
			out = append(out, b)
			return true
		}
		return false
	})
	return out
}

// await returns when n beacons live.
func (l *load) await(ctx context.Context, n int) error {
	if l.w.flood.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, fmt.Errorf("no %d sessions within a minute", n))
	defer cancel()
	for {
		l.mu.Lock()
		live := 0
		for _, b := range l.beacons {
			if b.alive() {
				live++
			}
		}
		l.mu.Unlock()
		if live >= n {
			return nil
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// revoke revokes a beacon's subject at node via, and has what follows judged.
// It reports whether the answer was complete.
func (l *load) revoke(ctx context.Context, b *beacon, via *node) (bool, error) {
	return l.revokeBy(ctx, b, l.w.admin(via), via.Name)
}

// revokeBy is revoke by a client of the caller's, which calls the nodes named via.
func (l *load) revokeBy(ctx context.Context, b *beacon, client *api.Client, via string) (bool, error) {
	members := l.w.members()
	b.judged.Add(1)
	called := time.Now()
	info, err := revoke(ctx, client, b.subject)
	returned := time.Now()
	op := check.Op{Object: b.subject, What: "revoke at " + via, From: check.Any, To: "revoked", Call: called}
	if err != nil {
		l.op(op) // it may have been made, or be made later
		b.judged.Add(-1)
		l.count("revocations without an answer")
		l.w.note("revoke", map[string]any{"subject": b.subject, "via": via, "err": err.Error(), "took": returned.Sub(called).String()})
		return false, err
	}
	r := check.Revocation{Subject: b.subject, Called: called, Returned: returned, Nodes: info.fenced()}
	if r.Complete() {
		op.Return = returned
	}
	l.op(op)
	l.mu.Lock()
	l.changes = append(l.changes, "revocation/"+info.ID)
	t := revokeTime{took: returned.Sub(called), allLive: true}
	for _, n := range members {
		if n.wasStopped(called, returned) || !n.Running() {
			t.allLive = false
		}
		if n.wasSilent(called, returned) {
			t.allLive = false
			t.stopped++
			r.Silent = append(r.Silent, n.Name)
		}
	}
	l.times = append(l.times, t)
	l.counts["revocations"]++
	l.mu.Unlock()
	l.judges.Go(func() { l.judge(b, r) })
	return r.Complete(), nil
}

// judge waits until whatever was stopped runs again, and some, and looks at
// what left the nodes for the subject since the revocation returned.
func (l *load) judge(b *beacon, r check.Revocation) {
	for end := time.Now().Add(30 * time.Second); ; {
		time.Sleep(400 * time.Millisecond)
		if !slices.ContainsFunc(l.w.members(), (*node).isStopped) || time.Now().After(end) {
			break
		}
	}
	b.release()
	time.Sleep(400 * time.Millisecond)
	now := time.Now()
	for _, n := range l.w.members() {
		if n.wasStopped(r.Called, now) {
			r.Stopped = append(r.Stopped, n.Name)
		}
	}
	dull := false
	for leg, f := range b.flows {
		dull = dull || b.node.capture.Packets(f) == 0
		if late := b.node.capture.After(f, r.Returned); len(late) > 0 {
			x := check.Late{Node: b.node.Name, Leg: leg, Last: late[len(late)-1].At}
			for _, s := range late {
				x.Bytes += s.Bytes
			}
			r.Late = append(r.Late, x)
		}
	}
	if b.judged.Add(-1) == 0 {
		for _, f := range b.flows {
			b.node.capture.Forget(f)
		}
	}
	l.w.note("revocation", r)
	l.mu.Lock()
	l.revs = append(l.revs, r)
	if dull {
		l.dull++
	}
	l.mu.Unlock()
	if r.Complete() {
		l.tryRevoked(b, l.somewhere())
	}
	_ = b.conn.PgConn().Conn().Close()
	<-b.done
}

// tryRevoked logs in as a subject that has been revoked.
func (l *load) tryRevoked(b *beacon, n *node) {
	began := time.Now()
	c, err := l.login(context.Background(), n, b.token)
	op := check.Op{Object: b.subject, What: "login at " + n.Name, To: check.Same, Call: began, Return: time.Now()}
	var pe *pgconn.PgError
	switch {
	case err == nil:
		hangUp(c)
		op.From = ""
	case errors.As(err, &pe) && strings.Contains(pe.Message+pe.Detail, "revoked"):
		op.From = "revoked"
	default:
		return // the node is down, or lets nobody in
	}
	l.op(op)
}

// approval asks for the approval of one deletion, has two people vote at
// different nodes, at the same time, and sees what becomes of it.
func (l *load) approval(ctx context.Context) {
	k := l.serial.Add(1)
	job := fmt.Sprintf("a-%d", k)
	token, err := l.token(job, "main")
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if l.w.PG.Exec(ctx, "bench", fmt.Sprintf("INSERT INTO scratch VALUES (%d)", k)) != nil {
		return
	}
	c, err := l.login(ctx, l.somewhere(), token)
	if err != nil {
		return
	}
	defer hangUp(c)
	began := time.Now()
	ran := make(chan error, 1)
	go func() {
		_, err := c.Exec(ctx, fmt.Sprintf("DELETE FROM scratch WHERE n = %d", k), pgx.QueryExecModeSimpleProtocol)
		ran <- err
	}()
	id, digest := l.asked(ctx, subject(job))
	if id == "" {
		_ = c.PgConn().Conn().Close()
		<-ran
		return
	}
	object := "approval/" + id
	var votes sync.WaitGroup
	for _, v := range []struct {
		who     string
		approve bool
	}{{"robin", true}, {"kim", rand.IntN(3) > 0}} {
		votes.Go(func() { l.vote(ctx, object, id, digest, v.who, v.approve, k) })
	}
	err = <-ran
	op := check.Op{Object: object, What: "the statement ran", From: "approved", To: "used", Call: began, Return: time.Now()}
	var pe *pgconn.PgError
	switch {
	case err == nil:
		l.count("approved statements")
		l.op(op)
		l.keep(k, false)
	case !errors.As(err, &pe): // the connection broke: it may have run
		op.Return = time.Time{}
		l.op(op)
	}
	votes.Wait()
}

// keep notes that a row of scratch must be there, or gone. One that is known
// to be gone stays so.
func (l *load) keep(k int64, there bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if was, known := l.kept[k]; !known || was {
		l.kept[k] = there
	}
}

// asked waits for the subject's request; "" when there is none in time.
func (l *load) asked(ctx context.Context, subject string) (id, digest string) {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
		cctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		list, err := l.w.admin(l.somewhere()).Approvals(cctx, "pending")
		cancel()
		if err != nil {
			continue
		}
		for _, a := range list {
			if a.Subject == subject {
				return a.ID, a.Digest
			}
		}
	}
	return "", ""
}

func (l *load) vote(ctx context.Context, object, id, digest, who string, approve bool, k int64) {
	token, err := l.w.PersonToken(who, "dba")
	if err != nil {
		return
	}
	n := l.somewhere()
	c, err := l.w.TokenClient(token, n.Addr)
	if err != nil {
		return
	}
	op := check.Op{Object: object, What: fmt.Sprintf("%s at %s: %v", who, n.Name, approve), From: "", To: "denied", Call: time.Now()}
	if approve {
		op.To = "approved"
	}
	_, err = c.Vote(ctx, id, digest, approve, "")
	switch {
	case err == nil:
		op.Return = time.Now()
		l.op(op)
		l.count("votes")
		if !approve {
			l.keep(k, true)
		}
	case !definite(err):
		l.op(op)
	}
}

// definite reports whether an error of the API says that nothing was done.
func definite(err error) bool {
	var f *api.Failure
	return errors.As(err, &f) && f.Status >= 400 && f.Status < 500
}

// config changes the configuration, by a comment that is nobody else's.
func (l *load) config(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer cancel()
	d, err := l.w.admin(l.somewhere()).Config(ctx)
	if err != nil {
		return
	}
	mark := l.name("mark")
	files := slices.Clone(d.Files)
	for i := range files {
		if files[i].Path == "chaos.cedar" {
			files[i].Data = []byte(rules(mark))
		}
	}
	n := l.somewhere()
	op := check.Op{Object: "config", What: mark + " at " + n.Name, From: configState(d.Index), Call: time.Now()}
	res, err := l.w.admin(n).Apply(ctx, &api.ConfigUpload{Files: files, Expect: d.Index})
	switch {
	case err == nil && res.Applied:
		op.Return, op.To = time.Now(), configState(res.Index)
		l.op(op)
		l.mu.Lock()
		l.changes = append(l.changes, op.To)
		l.counts["configurations"]++
		l.mu.Unlock()
	case err != nil && !definite(err):
		i := l.op(op)
		l.mu.Lock()
		l.markers[i] = mark
		l.mu.Unlock()
	}
}

// watch notes who says that it leads.
func (l *load) watch(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	st, err := l.w.admin(l.somewhere()).Status(ctx)
	if err != nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range st.Nodes {
		if !s.Reachable {
			continue
		}
		if strings.EqualFold(s.RaftState, "leader") {
			l.leaders = append(l.leaders, check.Leader{Node: s.Node, Term: s.Term})
		}
		if ts := l.terms[s.Node]; len(ts) == 0 || ts[len(ts)-1] != s.Term {
			l.terms[s.Node] = append(ts, s.Term)
		}
	}
}

// resolve gives the configuration changes of unknown outcome the state they
// made, from the log; those that are not in it were never made. It returns all
// operations and what the log says was changed.
func (l *load) resolve(log []api.EventInfo) (ops []check.Op, changed []string) {
	made := map[string]string{} // marker -> state
	for _, e := range log {
		switch e.Type {
		case event.TypeConfigApplied:
			state := configState(e.Index)
			changed = append(changed, state)
			if files, ok := e.Payload["files"].([]any); ok {
				for _, f := range files {
					if m, ok := f.(map[string]any); ok && m["path"] == "chaos.cedar" {
						data, _ := base64.StdEncoding.DecodeString(fmt.Sprint(m["data"]))
						first, _, _ := strings.Cut(string(data), "\n")
						made[strings.TrimPrefix(first, "// ")] = state
					}
				}
			}
		case event.TypeRevoked:
			changed = append(changed, e.Aggregate)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	never := map[int]bool{}
	all := slices.Clone(l.ops)
	for i, mark := range l.markers {
		if state, ok := made[mark]; ok {
			all[i].To = state
		} else {
			never[i] = true
		}
	}
	for i, o := range all {
		if !never[i] {
			ops = append(ops, o)
		}
	}
	return ops, changed
}

func (l *load) ackedRows() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.acked)
}

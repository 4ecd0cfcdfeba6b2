package credential

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// A class keeps work that waits for locks, or that reads a large catalogue,
// from standing in the way of stopping a backend.
type class uint8

const (
	work      class = iota // create, hand over, drop, sweep
	urgent                 // cancel, terminate, take LOGIN away
	catalogue              // WithConn
)

// conns is how many connections a class may have per target and database.
var conns = [...]int{work: 3, urgent: 2, catalogue: 1}

const (
	// idleTimeout is after how long an unused connection is closed, when next
	// anybody looks. Urgent ones stay while a lease of their target is out: a
	// target whose connections are used up must not keep us from ending one.
	idleTimeout = 5 * time.Minute
	// pingAfter is how old an idle connection may be to be used unasked.
	pingAfter = time.Second
	// maxIdlePools bounds pools of databases nobody uses any more.
	maxIdlePools = 128
	// maxMessage bounds what a target can make us hold.
	maxMessage = 16 << 20
)

type poolKey struct {
	target   string
	sum      [32]byte
	database string
	class    class
}

type pools struct {
	mu     sync.Mutex
	m      map[poolKey]*pool
	closed bool
}

type pool struct {
	slots chan struct{} // one per connection in use

	mu   sync.Mutex
	idle []idle
	gone bool      // no longer in pools: do not keep connections
	used time.Time // last time
}

type idle struct {
	c     *pgx.Conn
	since time.Time
}

func (p *pools) get(k poolKey, hasLeases func(target string) bool) (*pool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errors.New("credential: issuer is closed")
	}
	now := time.Now()
	for other, q := range p.m {
		q.prune(now, len(p.m) > maxIdlePools || !(other.class == urgent && hasLeases(other.target)))
		if other != k && q.unused(now) {
			q.drop()
			delete(p.m, other)
		}
	}
	q := p.m[k]
	if q == nil {
		if p.m == nil {
			p.m = map[poolKey]*pool{}
		}
		q = &pool{slots: make(chan struct{}, conns[k.class])}
		p.m[k] = q
	}
	q.mu.Lock()
	q.used = now
	q.mu.Unlock()
	return q, nil
}

func (p *pools) keep(keep func(poolKey) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k, q := range p.m {
		if !keep(k) {
			q.drop()
			delete(p.m, k)
		}
	}
}

func (p *pools) close() {
	p.keep(func(poolKey) bool { return false })
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
}

func (q *pool) unused(now time.Time) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.idle) == 0 && len(q.slots) == 0 && now.Sub(q.used) > idleTimeout
}

func (q *pool) prune(now time.Time, may bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	kept := q.idle[:0]
	for _, i := range q.idle {
		if may && now.Sub(i.since) > idleTimeout {
			shut(i.c)
			continue
		}
		kept = append(kept, i)
	}
	q.idle = kept
}

func (q *pool) drop() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.gone = true
	for _, i := range q.idle {
		shut(i.c)
	}
	q.idle = nil
}

// shut closes without waiting for the server.
func shut(c *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	c.Close(ctx)
}

// with runs f on a connection of the class, as the administrative account.
func (i *Issuer) with(ctx context.Context, t *TargetConfig, database string, cl class, f func(context.Context, *pgx.Conn) error) error {
	q, err := i.pools.get(poolKey{t.Name, t.sum(), database, cl}, i.hasLeases)
	if err != nil {
		return err
	}
	select {
	case q.slots <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("no administrative connection to %s became free: %w", t.Name, ctx.Err())
	}
	defer func() { <-q.slots }()
	c, err := i.conn(ctx, q, t, database)
	if err != nil {
		return err
	}
	defer func() { i.giveBack(ctx, q, c, cl) }()
	return f(ctx, c)
}

func (i *Issuer) conn(ctx context.Context, q *pool, t *TargetConfig, database string) (*pgx.Conn, error) {
	for {
		q.mu.Lock()
		n := len(q.idle)
		if n == 0 {
			q.mu.Unlock()
			return i.connect(ctx, t, database)
		}
		last := q.idle[n-1]
		q.idle = q.idle[:n-1]
		q.mu.Unlock()
		if time.Since(last.since) < pingAfter {
			return last.c, nil
		}
		pctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := last.c.Ping(pctx)
		cancel()
		if err == nil {
			return last.c, nil
		}
		shut(last.c)
	}
}

func (i *Issuer) giveBack(ctx context.Context, q *pool, c *pgx.Conn, cl class) {
	ok := !c.IsClosed() && !c.PgConn().IsBusy() && c.PgConn().TxStatus() == 'I' && ctx.Err() == nil
	if ok && cl == catalogue {
		// Others' code ran on it.
		ok = exec(ctx, c, "DISCARD ALL") == nil
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if !ok || q.gone {
		shut(c)
		return
	}
	q.idle = append(q.idle, idle{c, time.Now()})
}

// connect opens an administrative connection. SCRAM is the only
// authentication it takes part in: a server, or someone in its place, that
// asks for the password in another way, or for none, is refused.
func (i *Issuer) connect(ctx context.Context, t *TargetConfig, database string) (*pgx.Conn, error) {
	host, portText, err := net.SplitHostPort(t.Address)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("target %s: port %q: %w", t.Name, portText, err)
	}
	// pgx takes a Config from its parser only, and the parser reads PG*
	// variables; so every field that matters is set here.
	cfg, err := pgx.ParseConfig("host=localhost port=5432 user=x password=x dbname=x sslmode=disable")
	if err != nil {
		return nil, fmt.Errorf("connection settings in the environment (PG*): %w", err)
	}
	tc, err := t.tlsConfig()
	if err != nil {
		return nil, err
	}
	cfg.Host, cfg.Port, cfg.Database, cfg.User, cfg.Password = host, uint16(port), database, t.AdminUser, t.AdminPassword.Reveal()
	cfg.TLSConfig, cfg.Fallbacks, cfg.SSLNegotiation, cfg.SSLCertMode = tc, nil, "postgres", ""
	cfg.RequireAuth, cfg.ChannelBinding = "scram-sha-256", "prefer"
	cfg.MinProtocolVersion, cfg.MaxProtocolVersion = "3.0", "3.0"
	cfg.OAuthTokenProvider, cfg.ValidateConnect, cfg.AfterConnect = nil, nil, nil
	cfg.ConnectTimeout = 2 * dialTimeout
	cfg.MaxProtocolMessageBodyLen = maxMessage
	cfg.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil }
	cfg.DialFunc = i.opts.Dial
	cfg.DefaultQueryExecMode = pgx.QueryExecModeExec
	cfg.StatementCacheCapacity, cfg.DescriptionCacheCapacity = 0, 0
	cfg.RuntimeParams = map[string]string{
		"application_name":                    "sallyport",
		"search_path":                         "pg_catalog, pg_temp",
		"client_encoding":                     "UTF8",
		"standard_conforming_strings":         "on",
		"statement_timeout":                   "10000",
		"lock_timeout":                        "4000",
		"idle_in_transaction_session_timeout": "20000",
	}
	c, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to target %s as %s: %w", t.Name, t.AdminUser, err)
	}
	return c, nil
}

func (i *Issuer) hasLeases(target string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, l := range i.mu.leases {
		if l.config.Name == target {
			return true
		}
	}
	return false
}

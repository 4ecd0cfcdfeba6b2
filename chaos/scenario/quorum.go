package scenario

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/sallyport/sallyport/chaos/cluster"
)

// modeRules let three groups of jobs in, each under another mode of revocation.
var modeRules = map[string]string{"rules.cedar": strings.Replace(cluster.Rules, cluster.ConnectRule, `@id("connect-strict")
permit (principal in Group::"ci", action == Action::"connect", resource)
unless { principal in Group::"ci-main" || principal in Group::"ci-migrate" };

@id("connect-bounded")
@revocation("bounded(5m)")
permit (principal in Group::"ci-main", action == Action::"connect", resource);

@id("connect-best-effort")
@revocation("best_effort")
permit (principal in Group::"ci-migrate", action == Action::"connect", resource);`, 1)}

// mode is one row of the table in cluster terms: what happens to whom while
// the quorum is lost.
type mode struct {
	name, ref string
	runs      bool // on, while the quorum is lost
	// again and anew say whether sessions begin meanwhile: of somebody who was
	// let in on this node before, and of somebody new.
	again, anew bool
}

var modes = []mode{{"strict", "feature", false, false, false}, {"bounded", "main", true, true, false}, {"best_effort", "migrate", true, true, true}}

// pinger is a session that asks and is answered as often as it can.
type pinger struct {
	mode
	subject, token string
	conn           *pgx.Conn
	mu             sync.Mutex
	last           time.Time     // of the newest answer
	stood          time.Duration // the longest without one since gap was called
	err            error
	done           chan struct{}
}

func (p *pinger) run(ctx context.Context) {
	defer close(p.done)
	for ctx.Err() == nil {
		_, err := p.conn.Exec(ctx, "SELECT 1", pgx.QueryExecModeSimpleProtocol)
		p.mu.Lock()
		if p.err = err; err == nil {
			now := time.Now()
			if !p.last.IsZero() {
				p.stood = max(p.stood, now.Sub(p.last))
			}
			p.last = now
		}
		p.mu.Unlock()
		if err != nil || sleep(ctx, 20*time.Millisecond) != nil {
			return
		}
	}
}

func (p *pinger) state() (last time.Time, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last, p.err
}

// gap is the longest time without an answer since it was last called.
func (p *pinger) gap() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := max(p.stood, time.Since(p.last))
	p.stood = 0
	return d
}

// playNoQuorum takes two of three nodes away for 30 s and looks at what the
// third does in each mode.
func playNoQuorum(ctx context.Context, w *World) error {
	n, err := w.follower(ctx)
	if err != nil {
		return err
	}
	pctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var pingers []*pinger
	for _, m := range modes {
		name := w.load.name("mode")
		token, err := w.load.token(name, m.ref)
		if err != nil {
			return err
		}
		c, err := w.load.login(ctx, n, token)
		if err != nil {
			return fmt.Errorf("login, %s: %w", m.name, err)
		}
		p := &pinger{mode: m, subject: subject(name), token: token, conn: c, done: make(chan struct{})}
		go p.run(pctx)
		pingers = append(pingers, p)
	}
	if err := sleep(ctx, time.Second); err != nil {
		return err
	}
	for _, m := range w.members() {
		if m != n {
			if err := w.pause(m); err != nil {
				return err
			}
		}
	}
	lost := time.Now()
	if err := sleep(ctx, leaseLength+settle); err != nil {
		return err
	}
	frozen := time.Now()
	if err := sleep(ctx, 10*time.Second); err != nil {
		return err
	}
	var wrong []string
	for _, p := range pingers {
		token, err := w.load.token(w.load.name("mode-new"), p.ref)
		if err != nil {
			return err
		}
		for _, l := range []struct {
			who, token string
			want       bool
		}{{"somebody new", token, p.anew}, {"who was let in before", p.token, p.again}} {
			c, err := w.load.login(ctx, n, l.token)
			if err == nil {
				hangUp(c)
			}
			w.log.Printf("quorum lost, new session, %s, %s: %v", p.name, l.who, err)
			if (err == nil) != l.want {
				wrong = append(wrong, fmt.Sprintf("a new session under %s, of %s: let in %v, want %v (%v)", p.name, l.who, err == nil, l.want, err))
			}
		}
	}
	// It is refused, and freezes for 5 s what it names: sessions that are not
	// strict stand still, and go on.
	for _, p := range pingers {
		p.gap()
		rctx, stop := context.WithTimeout(ctx, 10*time.Second)
		_, err := revoke(rctx, w.admin(n), p.subject)
		stop()
		serr := sleep(ctx, 2*time.Second)
		stood := p.gap()
		w.log.Printf("quorum lost, revoke of the %s session: %v; it has stood still for %v", p.name, err, stood.Round(time.Millisecond))
		if serr != nil {
			return serr
		}
		if err == nil || !strings.Contains(err.Error(), "no quorum") {
			wrong = append(wrong, fmt.Sprintf("revoke without a quorum says %v", err))
		}
		if stood < time.Second {
			wrong = append(wrong, fmt.Sprintf("revoke without a quorum did not freeze the %s session", p.name))
		}
	}
	if err := sleep(ctx, time.Until(lost.Add(30*time.Second))); err != nil {
		return err
	}
	for _, p := range pingers {
		last, err := p.state()
		w.log.Printf("quorum lost for %v, %s: last answer %v after the loss, %v", time.Since(lost).Round(time.Second), p.name, last.Sub(lost).Round(time.Millisecond), err)
		switch {
		case err != nil:
			wrong = append(wrong, fmt.Sprintf("the %s session ended: %v", p.name, err))
		case p.runs && time.Since(last) > 5*time.Second:
			wrong = append(wrong, fmt.Sprintf("the %s session stood still", p.name))
		case !p.runs && last.After(frozen):
			wrong = append(wrong, fmt.Sprintf("the %s session ran on %v after its lease", p.name, last.Sub(frozen)))
		}
	}
	for _, m := range w.members() {
		if m != n {
			if err := w.cont(m); err != nil {
				return err
			}
		}
	}
	back := time.Now()
	for _, p := range pingers {
		for {
			last, err := p.state()
			if err != nil {
				wrong = append(wrong, fmt.Sprintf("the %s session did not come back: %v", p.name, err))
				break
			}
			if last.After(back) {
				break
			}
			if time.Since(back) > 30*time.Second {
				wrong = append(wrong, fmt.Sprintf("the %s session still stands 30 s after the quorum is back", p.name))
				break
			}
			if err := sleep(ctx, 50*time.Millisecond); err != nil {
				return err
			}
		}
	}
	cancel()
	for _, p := range pingers {
		_ = p.conn.PgConn().Conn().Close()
		<-p.done
	}
	if len(wrong) > 0 {
		err = errors.New("loss of quorum: violated: " + strings.Join(wrong, "; "))
	} else {
		err = nil
	}
	return errors.Join(err, w.whole(ctx))
}

package node

import (
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/spool"
)

// audit is the node's own recording: refused logins and API calls. It begins
// anew with each start, each day, and after a write to it has failed.
type audit struct {
	spool   *spool.Spool
	node    string
	version string
	log     *slog.Logger
	mu      struct {
		sync.Mutex
		w          *spool.Writer
		day        string
		failed     time.Time // when a write to w failed; zero while none has
		tokens     float64   // of the bucket that bounds refusals
		filled     time.Time
		suppressed uint64
	}
}

const (
	// Anybody can make refusals, so they are bounded: those above the rate are
	// counted, not written one by one.
	refusalsPerSecond = 50
	refusalBurst      = 500
)

func openAudit(s *spool.Spool, node, version string, log *slog.Logger) (*audit, error) {
	a := &audit{spool: s, node: node, version: version, log: log}
	a.mu.tokens, a.mu.filled = refusalBurst, time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	return a, a.begin(time.Now())
}

// begin opens the day's recording, or one after that which can no longer be
// written: a disk that was full has room again. a.mu is held.
func (a *audit) begin(now time.Time) error {
	day := now.UTC().Format(time.DateOnly)
	failed := a.mu.failed
	if a.mu.w != nil && a.mu.day == day && (failed.IsZero() || now.Sub(failed) < retryAudit) {
		return nil
	}
	w, err := a.spool.Begin(recording.Header{Session: "node-" + a.node + "-" + newSessionID(), Kind: "node", Started: now, Labels: map[string]string{"version": a.version}})
	if err != nil {
		if !failed.IsZero() {
			a.mu.failed = now // not at each call
		}
		return err
	}
	if a.mu.w != nil && failed.IsZero() {
		err = a.mu.w.Close(recording.Ending{At: now, Reason: "closed", Detail: "a new day"})
	} else if a.mu.w != nil {
		// What it has is sealed, and says that it could not go on.
		a.log.Warn("the node's own recording goes on in another", "err", a.mu.w.Close(recording.Ending{At: now, Reason: "closed", Detail: "a write failed"}))
	}
	a.mu.w, a.mu.day, a.mu.failed = w, day, time.Time{}
	return err
}

// retryAudit is how long after a failed write another recording is begun: each
// is a few files, on a disk that may still be full.
const retryAudit = time.Second

// maxText bounds each text of an entry: much of it is what strangers sent.
const maxText = 512

func clip(s string) string {
	if len(s) > maxText {
		return s[:maxText] + fmt.Sprintf("… (%d bytes)", len(s))
	}
	return s
}

func (a *audit) append(e *recording.Entry) error {
	e.Verb, e.Rule, e.Reason, e.Actor = clip(e.Verb), clip(e.Rule), clip(e.Reason), clip(e.Actor)
	for k, v := range e.Detail {
		e.Detail[k] = clip(v)
	}
	for i, v := range e.Actions {
		e.Actions[i] = clip(v)
	}
	if err := a.begin(time.Now()); err != nil {
		return err
	}
	_, err := a.mu.w.Append(e)
	if err != nil && !errors.Is(err, spool.ErrFull) && a.mu.failed.IsZero() { // the bound of the spool is met before anything is written
		a.mu.failed = time.Now()
	}
	return err
}

// call records an API call. An error means that it is not recorded.
func (a *audit) call(e *recording.Entry) error {
	if e.Effect == "refuse" {
		a.refusal(e)
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.append(e)
}

// refusal records something refused. What is refused stays refused when it
// cannot be recorded.
func (a *audit) refusal(e *recording.Entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	a.mu.tokens = min(refusalBurst, a.mu.tokens+now.Sub(a.mu.filled).Seconds()*refusalsPerSecond)
	a.mu.filled = now
	if a.mu.tokens < 1 {
		a.mu.suppressed++
		return
	}
	a.mu.tokens--
	if err := errors.Join(a.noteSuppressed(), a.append(e)); err != nil {
		a.log.Error("a refusal could not be recorded", "rule", e.Rule, "err", err)
	}
}

// noteSuppressed writes how many refusals were only counted. a.mu is held.
func (a *audit) noteSuppressed() error {
	if a.mu.suppressed == 0 {
		return nil
	}
	n := a.mu.suppressed
	a.mu.suppressed = 0
	return a.append(&recording.Entry{Type: recording.Note, Reason: strconv.FormatUint(n, 10) + " more refusals came too fast to be recorded one by one"})
}

func (a *audit) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := errors.Join(a.noteSuppressed(), a.mu.w.Close(recording.Ending{At: time.Now(), Reason: "shutdown"}))
	if err != nil {
		a.log.Error("closing the node's own recording", "err", err)
	}
}

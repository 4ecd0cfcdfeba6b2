package spool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"github.com/sallyport/sallyport/recording"
)

const (
	// senders bounds the objects on their way to the store at one time, and with
	// it memory: each is read whole, and once more when it is compared.
	senders = 4
	// sendTimeout ends a request that hangs. 40 MiB in two minutes is 2.7 Mbit/s.
	sendTimeout = 2 * time.Minute
	minBackoff  = 200 * time.Millisecond
	maxBackoff  = 30 * time.Second
)

// errDiffers: what the store holds under our name is not ours.
var errDiffers = errors.New("the store holds another object under this name; it was not overwritten")

// Run seals and sends until ctx ends or Close is called, retrying for ever. It
// returns when everything it started has ended.
func (s *Spool) Run(ctx context.Context) error {
	s.mu.Lock()
	if s.mu.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.runs.Add(1)
	s.mu.Unlock()
	defer s.runs.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { s.sealLoop(ctx) })
	wg.Go(func() { s.sendLoop(ctx) })
	wg.Go(func() { s.finishLoop(ctx) })
	select {
	case <-ctx.Done():
	case <-s.stop:
		cancel()
	}
	wg.Wait()
	return nil
}

// sendLoop hands recordings that have something to send to at most `senders`
// goroutines, one recording to one of them at a time.
func (s *Spool) sendLoop(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	free := make(chan struct{}, senders)
	for {
		select {
		case free <- struct{}{}:
		case <-ctx.Done():
			return
		}
		r, wait := s.next()
		if r == nil {
			<-free
			timer := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-s.toSend:
			case <-timer.C:
			}
			timer.Stop()
			continue
		}
		wg.Go(func() {
			err := s.send(ctx, r)
			s.mu.Lock()
			r.busy = false
			if err == nil {
				r.failures = 0
			} else if ctx.Err() == nil {
				r.failures++
				r.notUntil = time.Now().Add(backoff(r.failures))
			}
			s.mu.Unlock()
			if err != nil && ctx.Err() == nil {
				s.note(r, "sending", err)
				if errors.Is(err, errDiffers) {
					s.setAlarm(r, err)
				}
			}
			<-free
			wake(s.toSend)
		})
	}
}

// next takes a recording that is due, or says how long none will be.
func (s *Spool) next() (*rec, time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, wait := time.Now(), time.Minute
	for r := range s.mu.sending {
		if r.busy {
			continue
		}
		if d := r.notUntil.Sub(now); d > 0 {
			wait = min(wait, d)
			continue
		}
		r.busy = true
		return r, 0
	}
	return nil, wait
}

// send brings everything of r that is sealed to the store, in order, and hands
// the recording to finishLoop when it is complete there.
func (s *Spool) send(ctx context.Context, r *rec) error {
	for {
		s.mu.Lock()
		var o *object
		for _, c := range r.objects {
			if !c.sent {
				o = c
				break
			}
		}
		if o == nil {
			delete(s.mu.sending, r)
			if r.complete {
				s.mu.stored = append(s.mu.stored, r)
				wake(s.toFinish)
			}
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		if err := s.sendObject(ctx, r.prefix+o.name, o.file); err != nil {
			return fmt.Errorf("%s: %w", o.name, err)
		}
		if err := s.sent(r, o); err != nil {
			return err
		}
	}
}

// sendObject writes one object and reads it back: only what the store returns
// counts as stored.
func (s *Spool) sendObject(ctx context.Context, key, file string) error {
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	// The key being taken is usual: an earlier attempt whose answer was lost, or
	// a restart.
	if err := s.o.Store.Put(ctx, key, data); err != nil && !errors.Is(err, recording.ErrExists) {
		return err
	}
	got, err := s.o.Store.Get(ctx, key)
	if errors.Is(err, recording.ErrTooLarge) {
		return errDiffers
	}
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	if !bytes.Equal(got, data) {
		return errDiffers
	}
	return nil
}

// sent notes that o is in the store and deletes what the spool no longer needs
// of a recording that goes on: all its segments that are stored but the newest
// one, from which it can be continued after a crash.
func (s *Spool) sent(r *rec, o *object) error {
	s.mu.Lock()
	o.sent = true
	s.mu.sent++
	var drop []*object
	keep := r.objects[:0:0]
	for i, c := range r.objects {
		newest := i == len(r.objects)-1 || i == len(r.objects)-2 && r.complete
		if i > 0 && c.sent && !newest {
			drop = append(drop, c)
		} else {
			keep = append(keep, c)
		}
	}
	r.objects = keep
	s.mu.Unlock()
	for _, c := range drop {
		if err := s.remove(c.file, c.size); err != nil {
			return err
		}
	}
	return nil
}

// finishLoop deletes recordings that are completely in the store, as many at a
// time as have come together.
func (s *Spool) finishLoop(ctx context.Context) {
	failures := 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.toFinish:
		}
		s.mu.Lock()
		recs := s.mu.stored
		s.mu.stored = nil
		s.mu.Unlock()
		if len(recs) == 0 {
			continue
		}
		err := s.finish(recs)
		if err == nil {
			failures = 0
			continue
		}
		s.note(recs[0], "deleting from the spool", err)
		s.mu.Lock()
		s.mu.stored = append(recs, s.mu.stored...)
		s.mu.Unlock()
		failures++
		select {
		case <-ctx.Done():
			return
		case <-time.After(backoff(failures)):
			wake(s.toFinish)
		}
	}
}

// finish deletes the files of recs. The head of the chain is saved first, as a
// header among them may be the one that holds it; the done files then make each
// deletion one step. It can be done again after an error.
func (s *Spool) finish(recs []*rec) error {
	if err := s.saveChain(); err != nil {
		return err
	}
	for _, r := range recs {
		if err := os.Rename(s.trailer(r.seq), s.done(r.seq)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := s.dirF.Sync(); err != nil {
		return err
	}
	for _, r := range recs {
		var size int64
		for _, o := range r.objects {
			if o.name == recording.TrailerName {
				size = o.size
			} else if err := s.remove(o.file, o.size); err != nil {
				return err
			}
		}
		if err := s.remove(s.done(r.seq), size); err != nil {
			return err
		}
	}
	s.mu.Lock()
	for _, r := range recs {
		delete(s.mu.recs, r.seq)
		delete(s.mu.sessions, r.session)
	}
	s.mu.Unlock()
	if s.o.Stored != nil {
		for _, r := range recs {
			s.o.Stored(r.name())
		}
	}
	return nil
}

// backoff is how long to wait after so many failures in a row: doubling, with a
// random half, so that recordings do not come back all at once.
func backoff(failures int) time.Duration {
	d := min(minBackoff<<min(failures-1, 16), maxBackoff)
	return d/2 + rand.N(d/2)
}

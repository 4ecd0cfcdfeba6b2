package scenario

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/chaos/sandbox"
)

// settings are the flags of a run.
type settings struct {
	gate     string
	scenario string
	seed     uint64
	time     time.Duration
	out      string
	binary   string
	beacons  int
	revokes  int
}

// Main is the program: it starts itself again in a sandbox, plays, judges, and
// returns the exit status. args are the command line without the name.
func Main(args []string, stdout io.Writer) int {
	var s settings
	flags := flag.NewFlagSet("chaos", flag.ContinueOnError)
	flags.SetOutput(stdout)
	flags.StringVar(&s.scenario, "scenario", "mix", "mix, revoke, smoke, all, or names of docs/reliability.md with commas between")
	flags.Uint64Var(&s.seed, "seed", 0, "seed of what is by chance; 0 makes one up")
	flags.DurationVar(&s.time, "time", 0, "length of the mix (default 10m), or of each thing that S27 does to the S3 server (default 15s)")
	flags.StringVar(&s.out, "out", "", "directory for journals and nodes' logs; default a temporary one, kept when the run fails")
	flags.StringVar(&s.binary, "binary", os.Getenv("SALLYPORT_BIN"), "sallyport, built with -tags chaos for scenarios with disk faults")
	flags.StringVar(&s.gate, "kernel-gate", "require", "require for nodes at level 2 of the fence, off for level 1")
	flags.IntVar(&s.beacons, "sessions", 8, "sessions to be revoked that are kept alive at a time")
	flags.IntVar(&s.revokes, "revocations", 10_000, "how many the scenario revoke makes")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if s.seed == 0 {
		s.seed = rand.Uint64N(1 << 40)
	}
	if !sandbox.Inside() {
		return outside(s, stdout)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := one(ctx, s, s.scenario, stdout); err != nil {
		fmt.Fprintln(stdout, "chaos:", err)
		return 1
	}
	return 0
}

// outside runs each scenario in a sandbox of its own. The directory of the
// runs goes with them, unless one failed.
func outside(s settings, stdout io.Writer) int {
	if err := sandbox.Available(context.Background()); err != nil {
		fmt.Fprintln(stdout, "chaos: skipped, this machine cannot run it:", err)
		if os.Getenv("CI") != "" {
			return 1
		}
		return 3
	}
	fail := func(err error) int {
		fmt.Fprintln(stdout, "chaos:", err)
		return 1
	}
	names, err := s.names()
	if err != nil {
		return fail(err)
	}
	if s.binary == "" {
		if s.binary, err = cluster.Binary(context.Background()); err != nil {
			return fail(err)
		}
	}
	keep := s.out != ""
	if s.out == "" {
		s.out, err = os.MkdirTemp("", "sallyport-chaos-")
	} else {
		s.out, err = filepath.Abs(s.out)
	}
	if err != nil {
		return fail(err)
	}
	signal.Ignore(os.Interrupt) // the processes inside handle it
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if slices.Contains(names, "S14") {
		if err := sandbox.Loops(filepath.Join(s.out, disksDir), smallDisks, smallDisk); err != nil {
			fmt.Fprintln(stdout, "chaos: full disks are in memory, no ext4 on a loop device:", err)
		}
	}
	var failed []string
	for _, name := range names {
		fmt.Fprintf(stdout, "chaos: scenario %s, seed %d\n", name, s.seed)
		cmd := sandbox.Command(context.Background(), "/proc/self/exe", "-scenario="+name, "-seed="+strconv.FormatUint(s.seed, 10),
			"-time="+s.time.String(), "-kernel-gate="+s.gate, "-out="+s.out, "-binary="+s.binary, "-sessions="+strconv.Itoa(s.beacons), "-revocations="+strconv.Itoa(s.revokes))
		cmd.Stdout, cmd.Stderr = stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			fmt.Fprintf(stdout, "chaos: %s FAILED (%v); again: make chaos SCENARIO=%s SEED=%d\n", name, err, name, s.seed)
			failed = append(failed, name)
		}
	}
	if len(failed) == 0 && !keep {
		os.RemoveAll(s.out)
	} else {
		fmt.Fprintf(stdout, "chaos: journals and logs are in %s\n", s.out)
	}
	if len(failed) > 0 {
		fmt.Fprintf(stdout, "chaos: FAILED: %s\n", strings.Join(failed, ", "))
		return 1
	}
	fmt.Fprintf(stdout, "chaos: passed: %s\n", strings.Join(names, ", "))
	return 0
}

// names are the scenarios asked for.
func (s *settings) names() (names []string, err error) {
	switch s.scenario {
	case "mix", "smoke", "revoke":
		return []string{s.scenario}, nil
	case "all":
		for _, sc := range Scenarios {
			names = append(names, sc.Name)
		}
		return names, nil
	}
	names = strings.Split(s.scenario, ",")
	for _, name := range names {
		if _, err := Find(name); err != nil {
			return nil, err
		}
	}
	return names, nil
}

// one plays one scenario, or a mix.
func one(ctx context.Context, s settings, name string, stdout io.Writer) error {
	began := time.Now()
	o := options{nodes: 3, seed: s.seed, time: s.time, out: filepath.Join(s.out, name), binary: s.binary, gate: s.gate, log: log.New(stdout, name+" ", log.Ltime|log.Lmicroseconds)}
	sc := Scenario{Name: name}
	switch name {
	case "mix":
		sc.play = func(ctx context.Context, w *World) error { return mix(ctx, w, w.length(10*time.Minute)) }
	case "smoke":
		sc.play = playSmoke
	case "revoke":
		sc.play = func(ctx context.Context, w *World) error { return playRevoke(ctx, w, s.revokes) }
	default:
		var err error
		if sc, err = Find(name); err != nil {
			return err
		}
	}
	if sc.Nodes > 0 {
		o.nodes = sc.Nodes
	}
	if sc.files != nil {
		o.files = sc.files
	}
	o.prepare, o.env = sc.prepare, sc.env
	var s3 *s3Server
	if sc.S3 {
		var err error
		if s3, err = startS3(ctx, filepath.Join(o.out, "s3")); err != nil {
			return err
		}
		defer s3.stop()
		o.recordings = s3.url()
	}
	ctx, cancel := context.WithTimeout(ctx, max(s3Moods*s.time, revokeLimit)+15*time.Minute)
	defer cancel()
	w, err := newWorld(ctx, o)
	if err != nil {
		return err
	}
	defer w.close()
	w.s3 = s3
	w.log.Printf("playing %s %s, seed %d", name, sc.Title, s.seed)
	if name != "revoke" { // which makes its own
		w.load.run(s.beacons)
		err = w.load.await(ctx, min(3, s.beacons))
	}
	if err == nil {
		err = sc.play(ctx, w)
	}
	r, ferr := w.finish(ctx)
	r.print(w.log, name, s.seed, time.Since(began))
	if len(r.Skipped) > 0 && os.Getenv("CI") != "" {
		ferr = errors.Join(ferr, fmt.Errorf("CI must not skip: %v", r.Skipped))
	}
	return errors.Join(err, ferr)
}

// playSmoke is what `make test` has time for: a node stopped, one killed, one
// cut off, each while subjects are revoked.
func playSmoke(ctx context.Context, w *World) error {
	n, err := w.follower(ctx)
	if err != nil {
		return err
	}
	if err := w.pause(n); err != nil {
		return err
	}
	w.revokeSome(ctx, 1)
	if err := w.cont(n); err != nil {
		return err
	}
	l, err := w.leader(ctx)
	if err != nil {
		return err
	}
	if err := w.during(ctx, 1, func() error { w.kill(l); return w.start(l) }); err != nil {
		return err
	}
	if err := w.whole(ctx); err != nil {
		return err
	}
	if err := w.load.await(ctx, 1); err != nil {
		return err
	}
	if n, err = w.follower(ctx); err != nil {
		return err
	}
	if err := w.isolate(n); err != nil {
		return err
	}
	w.revokeSome(ctx, 1)
	return w.rejoin(n)
}

func (r *Result) print(l *log.Logger, name string, seed uint64, took time.Duration) {
	var counts []string
	for what, n := range r.Counts {
		counts = append(counts, fmt.Sprintf("%d %s", n, what))
	}
	slices.Sort(counts)
	l.Printf("%s, seed %d, %v: %s", name, seed, took.Round(time.Second), strings.Join(counts, ", "))
	l.Printf("revocations: %d complete, %d not; nodes fenced by expiry %d; levels %v; at level 1 %d flows of stopped nodes let out %d bytes, at most %d",
		r.Fence.Complete, r.Fence.Incomplete, r.Fence.ByExpiry, r.Fence.Levels, r.Fence.AllowedFlows, r.Fence.AllowedBytes, r.Fence.MostBytes)
	for _, t := range []struct {
		what string
		d    []time.Duration
	}{{"all nodes live", r.Live}, {"one node silent", r.Stopped}} {
		if len(t.d) > 0 {
			l.Printf("revoke, %s: n=%d p50=%v p99=%v max=%v", t.what, len(t.d), at(t.d, 50), at(t.d, 99), t.d[len(t.d)-1])
		}
	}
	if r.Lost > 0 {
		l.Printf("%d packets were lost by the captures: the fence was measured in part", r.Lost)
	}
	for what, why := range r.Skipped {
		l.Printf("SKIPPED: %s: %s", what, why)
	}
}

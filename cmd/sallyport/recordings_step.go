package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sallyport/sallyport/recording/replay"
	"github.com/sallyport/sallyport/recording/terminal"
)

// stepOnTerminal steps through a recording by single keys.
func stepOnTerminal(ctx context.Context, r *replay.Recording) error {
	if !isTerminal(os.Stdin) || !isTerminal(os.Stdout) {
		return usageError{errors.New("--step reads keys and needs a terminal")}
	}
	restore, err := keys(int(os.Stdin.Fd()))
	if err != nil {
		return fmt.Errorf("the terminal: %w", err)
	}
	defer restore()
	// A read of the terminal does not end with ctx, which an interrupt ends: the
	// process does, when this returns.
	done := make(chan error, 1)
	go func() { done <- stepThrough(os.Stdin, os.Stdout, replay.Steps(ctx, r, formatData())) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return nil
	}
}

// keys makes the terminal give each key at once and not show it.
func keys(fd int) (restore func(), err error) {
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	t := *old
	t.Lflag &^= unix.ICANON | unix.ECHO
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &t); err != nil {
		return nil, err
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, old) }, nil
}

const (
	// keptSteps and keptBytes bound the steps that one can go back to.
	keptSteps = 10_000
	keptBytes = 64 << 20
	maxSought = 256 // bytes of a text that is searched for
)

// stepper shows steps and takes keys. It keeps those it has shown, as far as
// there is room, to go back to.
type stepper struct {
	in     *bufio.Reader
	out    io.Writer
	next   func() (replay.Step, error, bool)
	kept   []replay.Step
	bytes  int
	at     int // of kept, the one that is shown
	ended  bool
	sought string
}

// stepThrough shows the steps of a recording as keys from in ask for.
func stepThrough(in io.Reader, out io.Writer, steps iter.Seq2[replay.Step, error]) error {
	next, stop := iter.Pull2(steps)
	defer stop()
	s := &stepper{in: bufio.NewReader(in), out: out, next: next, at: -1}
	if err := s.forward(); err != nil {
		return err
	}
	for {
		fmt.Fprintf(s.out, "%s", s.prompt())
		key, err := s.in.ReadByte()
		fmt.Fprint(s.out, "\r\x1b[K") // the prompt goes
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch key {
		case 'q', 4: // Ctrl-D
			return nil
		case 'n', ' ', '\n', '\r', 'j':
			err = s.forward()
		case 'p', 'b', 'k':
			s.show(s.at - 1)
		case 'g':
			s.show(0)
		case '/':
			if err = s.ask(); err == nil {
				err = s.search()
			}
		case 'N':
			err = s.search()
		}
		if err != nil {
			return err
		}
	}
}

func (s *stepper) prompt() string {
	if s.ended && s.at == len(s.kept)-1 {
		return "(end) "
	}
	return fmt.Sprintf("(%d) n next, p previous, / search, q quit ", s.kept[s.at].N)
}

// show shows one that is kept.
func (s *stepper) show(i int) {
	if i < 0 {
		why := "(this is the beginning)"
		if s.kept[0].N > 0 {
			why = "(what was before is no longer kept: start again)"
		}
		fmt.Fprintln(s.out, why)
		return
	}
	s.at = i
	io.WriteString(s.out, s.kept[i].Text)
}

// forward shows the next step.
func (s *stepper) forward() error {
	ok, err := s.advance()
	if ok {
		s.show(s.at)
	}
	return err
}

// advance goes to the next step without showing it; false at the end.
func (s *stepper) advance() (bool, error) {
	if s.at+1 < len(s.kept) {
		s.at++
		return true, nil
	}
	if s.ended {
		return false, nil
	}
	st, err, ok := s.next()
	if !ok || err != nil {
		s.ended = true
		return false, err
	}
	s.kept = append(s.kept, st)
	s.bytes += len(st.Text)
	for len(s.kept) > keptSteps || s.bytes > keptBytes && len(s.kept) > 1 {
		s.bytes -= len(s.kept[0].Text)
		s.kept[0] = replay.Step{}
		s.kept = s.kept[1:]
	}
	s.at = len(s.kept) - 1
	return true, nil
}

// ask reads what is searched for, as a line.
func (s *stepper) ask() error {
	fmt.Fprint(s.out, "/")
	var line []byte
	for {
		c, err := s.in.ReadByte()
		switch {
		case errors.Is(err, io.EOF), c == '\n', c == '\r':
			fmt.Fprintln(s.out)
			if len(line) > 0 {
				s.sought = strings.ToLower(string(line))
			}
			return nil
		case err != nil:
			return err
		case c == 0x7f || c == 8:
			if len(line) > 0 {
				line = line[:len(line)-1]
				fmt.Fprint(s.out, "\b \b")
			}
		case c >= 0x20 && len(line) < maxSought:
			line = append(line, c)
			fmt.Fprint(s.out, terminal.EscapeLine(string(c)))
		}
	}
}

// search shows the next step that has the text.
func (s *stepper) search() error {
	if s.sought == "" {
		return nil
	}
	from := s.at
	for {
		ok, err := s.advance()
		if err != nil {
			return err
		}
		if !ok {
			fmt.Fprintf(s.out, "(%s does not come again)\n", terminal.EscapeLine(s.sought))
			if from < len(s.kept) && len(s.kept) > 0 {
				s.at = min(from, len(s.kept)-1)
			}
			return nil
		}
		if strings.Contains(strings.ToLower(s.kept[s.at].Text), s.sought) {
			s.show(s.at)
			return nil
		}
	}
}

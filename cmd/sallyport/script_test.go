package main

import (
	"errors"
	"os/exec"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain is the program itself when a script calls it.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"sallyport": main})
}

// TestScripts runs what a user types, in testdata/script, without a cluster.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", e.WorkDir)
			return nil
		},
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"code": code},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

// code runs sallyport, which must exit with a code: code 2 status extra.
func code(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: code N [sallyport's arguments]")
	}
	err := ts.Exec("sallyport", args[1:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if strconv.Itoa(got) != args[0] {
		ts.Fatalf("exit code %d, want %s", got, args[0])
	}
}

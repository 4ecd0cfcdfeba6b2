package raftstore_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// storeProcess is the environment variable that makes the test binary a process
// of a test.
const storeProcess = "RAFTSTORE_TEST_PROCESS"

// storeProcessMain is what the test binary does as a process of a test; nil
// where there are none.
var storeProcessMain func() int

func TestMain(m *testing.M) {
	if os.Getenv(storeProcess) != "" && storeProcessMain != nil {
		os.Exit(storeProcessMain())
	}
	goleak.VerifyTestMain(m)
}

//go:build chaos

package node

import (
	"os"
	"strings"
	"syscall"
)

// point does at the place of that name what the file named by
// SALLYPORT_CHAOS_POINT says, while it is there:
//
//	stop NAME   make a file with ".reached" at the end of its name, and stand still
//	die NAME    end the process, as kill -9 does
//
// Only builds with the tag chaos have it. A test holds that others do not.
func point(name string) {
	control := os.Getenv("SALLYPORT_CHAOS_POINT")
	if control == "" {
		return
	}
	b, err := os.ReadFile(control)
	if err != nil {
		return
	}
	switch verb, at, _ := strings.Cut(strings.TrimSpace(string(b)), " "); {
	case at != name:
	case verb == "stop":
		_ = os.WriteFile(control+".reached", nil, 0o600)
		select {}
	case verb == "die":
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

package fence

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// boottime reads CLOCK_BOOTTIME in nanoseconds. It is a system call, which
// takes 100 to 400 ns; Go's own clock stands still while the machine sleeps,
// and a time kept by another goroutine is not the time.
func boottime() int64 {
	var ts unix.Timespec
	// Raw: the scheduler need not know of a call that never waits.
	if _, _, errno := unix.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_BOOTTIME, uintptr(unsafe.Pointer(&ts)), 0); errno != 0 {
		panic("fence: CLOCK_BOOTTIME cannot be read: " + errno.Error())
	}
	return ts.Nano()
}

const clocksource = "/sys/devices/system/clocksource/clocksource0/current_clocksource"

// unstable are the kernel's clock sources that count interrupts, and lose time
// when they are late or disabled.
var unstable = []string{"jiffies", "refined-jiffies", "pit"}

// CheckClock refuses a machine whose clocks may drift by more than leases allow
// for, as the kernel's choice of clock source shows. A kernel that does not
// show its choice passes.
func CheckClock() error {
	b, err := os.ReadFile(clocksource)
	if err != nil {
		return nil
	}
	return checkSource(strings.TrimSpace(string(b)))
}

func checkSource(name string) error {
	if slices.Contains(unstable, name) {
		return fmt.Errorf("the kernel keeps time by %q (%s), which may lose time without limit, so that leases would not end when others count on it", name, clocksource)
	}
	return nil
}

var processStart = time.Now()

// monotonic is CLOCK_MONOTONIC in nanoseconds from some point on.
func monotonic() int64 { return int64(time.Since(processStart)) + 1 }

package fence

import "testing"

func TestCheckSource(t *testing.T) {
	for name, ok := range map[string]bool{
		"tsc": true, "kvm-clock": true, "arch_sys_counter": true, "hpet": true, "acpi_pm": true,
		"jiffies": false, "refined-jiffies": false, "pit": false,
	} {
		if err := checkSource(name); (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

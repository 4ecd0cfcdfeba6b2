// Command run plays chaos scenarios; `make chaos` builds what it needs and
// runs it. See docs/reliability.md.
package main

import (
	"os"

	"github.com/sallyport/sallyport/chaos/scenario"
)

func main() { os.Exit(scenario.Main(os.Args[1:], os.Stdout)) }

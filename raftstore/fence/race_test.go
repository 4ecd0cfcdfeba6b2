//go:build race

package fence

// The model runs in one goroutine; with the detector it takes ten times as long
// and shows nothing more.
const modelRuns = 30

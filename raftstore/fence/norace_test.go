//go:build !race

package fence

const modelRuns = 300

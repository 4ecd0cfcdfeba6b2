//go:build race

package sql

// slowdown is what the race detector costs; measured at 10 to 20.
const slowdown = 6

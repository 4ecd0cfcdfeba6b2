//go:build !race

package sql

const slowdown = 1

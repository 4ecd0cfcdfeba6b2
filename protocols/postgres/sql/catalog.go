package sql

// Catalog is an immutable snapshot of the parts of a target's catalogue that
// give names their meaning.
type Catalog struct{}

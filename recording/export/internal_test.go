package export

// EntryRow is a row of a Parquet file.
type EntryRow = entryRow

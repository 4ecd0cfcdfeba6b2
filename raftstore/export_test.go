package raftstore

// Promises are a node's term and vote, as stored.
type Promises struct {
	Term, VoteTerm uint64
	Vote           string
}

// Promises are this node's.
func (s *Store) Promises() (p Promises) {
	p.Term, _ = s.logs.GetUint64([]byte("CurrentTerm"))
	p.VoteTerm, _ = s.logs.GetUint64([]byte("LastVoteTerm"))
	cand, _ := s.logs.Get([]byte("LastVoteCand"))
	p.Vote = string(cand)
	return p
}

// LogIsEmpty says whether this node's log and snapshots are gone.
func (s *Store) LogIsEmpty() bool {
	last, _ := s.logs.LastIndex()
	snaps, _ := s.hasSnapshots()
	return last == 0 && !snaps
}

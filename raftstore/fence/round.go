package fence

// Tally counts the answers of voters to one question: in which term are you
// now? A majority in the asker's own term says that when the question was
// asked there was no later leader: a voter raises its term before it votes,
// and any later leader's voters share a member with this majority. Answers to
// earlier questions say nothing and do not count.
type Tally struct {
	term, nonce uint64
	open        map[string]struct{} // voters that have not answered
	need        int                 // answers still missing
	deposed     bool
}

// NewTally begins a question of self, the leader in term, to voters. nonce is
// another one for each question.
func NewTally(term, nonce uint64, voters []string, self string) *Tally {
	t := &Tally{term: term, nonce: nonce, open: make(map[string]struct{}, len(voters)), need: len(voters)/2 + 1}
	for _, v := range voters {
		t.open[v] = struct{}{}
	}
	t.Answer(self, nonce, term)
	return t
}

// Answer takes a voter's term, read after the question had come.
func (t *Tally) Answer(voter string, nonce, term uint64) {
	if nonce != t.nonce {
		return
	}
	if _, waits := t.open[voter]; !waits {
		return
	}
	delete(t.open, voter)
	switch {
	case term == t.term:
		t.need--
	case term > t.term:
		t.deposed = true
	}
}

// Confirmed says that a majority is in the asker's term.
func (t *Tally) Confirmed() bool { return t.need <= 0 && !t.deposed }

// Failed says that it cannot be confirmed any more.
func (t *Tally) Failed() bool { return t.deposed || len(t.open) < t.need }

package appliance

import "sync"

// Unit is what progress is counted in.
type Unit string

// The units.
const (
	Bytes    Unit = "bytes"
	Nodes    Unit = "map nodes"
	Segments Unit = "segments"
)

// Progress tells how far long work is.
type Progress struct {
	Subject string `json:"subject"` // what is being worked on
	Done    int64  `json:"done"`
	Total   int64  `json:"total"`
	Unit    Unit   `json:"unit"`
}

// counter turns steps that many goroutines report into progress, told to one
// listener at a time.
type counter struct {
	tell func(Progress)

	mu  sync.Mutex // guards the field below, and calls of tell
	now Progress
}

// add counts n more as done.
func (c *counter) add(n int64) {
	if c.tell == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now.Done += n
	c.tell(c.now)
}

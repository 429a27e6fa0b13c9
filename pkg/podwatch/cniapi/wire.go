package cniapi

import "time"

// Verbs, as they stand in paths and in what a server's Observe is told.
const (
	VerbAdd    = "add"
	VerbDel    = "del"
	VerbCheck  = "check"
	VerbGC     = "gc"
	VerbStatus = "status"
)

const (
	// MaxMessage bounds the body of a request and of an answer. The list of a GC
	// grows with the node: 1 MiB is some 9,000 attachments.
	MaxMessage = 1 << 20
	// ClientBudget leaves the plugin time to start and to answer within Budget.
	ClientBudget = Budget - 200*time.Millisecond
	// ServerBudget is shorter, so that the agent's own words on what took too
	// long arrive before the plugin stops waiting.
	ServerBudget = Budget - 500*time.Millisecond

	// WorkBudget is how long an ADD may take at an agent that says every AliveInterval
	// that it is at work. On a node with many pods to start, giving up would begin
	// everything anew, with even more to do.
	WorkBudget = 60 * time.Second
	// ServerWorkBudget is shorter, for the agent's own words again.
	ServerWorkBudget = WorkBudget - time.Second
	// AliveInterval is the time between two such signs: interim responses (102,
	// RFC 2518).
	AliveInterval = time.Second
	// AliveHeader is in a request that asks for them. The value does not matter.
	AliveHeader = "Sluice-Alive"
)

// Path is where a verb is asked for.
func Path(verb string) string { return "/v1/" + verb }

// An Answer is the body of every response; Error is empty on success.
type Answer struct {
	Error string `json:"error,omitempty"`
}

// A GCRequest is the body of a GC request.
type GCRequest struct {
	Network string         `json:"network"`
	Valid   []AttachmentID `json:"valid"`
}

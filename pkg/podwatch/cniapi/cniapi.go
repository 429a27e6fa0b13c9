package cniapi

import (
	"context"
	"errors"
	"net/netip"
	"time"
)

// Constants that plugin and agent share.
const (
	// DefaultSocket is where the agent listens.
	DefaultSocket = "/run/sluice/cni.sock"
	// Budget is how long the plugin waits for the agent, all in all.
	Budget = 5 * time.Second
)

// ErrUnavailable: nobody answers on the agent's socket.
var ErrUnavailable = errors.New("sluice agent is not available")

// An AttachmentID names one CNI attachment: one interface of one sandbox. An
// interface belongs to one network.
type AttachmentID struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
}

// An Attachment is what a CNI request says of a pod and its network.
type Attachment struct {
	AttachmentID
	// Network is the name of the network, that of the conflist. A node may have
	// several.
	Network string `json:"network"`
	// Netns is the path of the namespace; empty in a DEL whose sandbox is gone.
	Netns        string `json:"netns,omitempty"`
	PodNamespace string `json:"podNamespace"`
	PodName      string `json:"podName"`
	// PodUID is empty with runtimes that do not pass K8S_POD_UID.
	PodUID string `json:"podUID,omitempty"`
	// Interfaces are those inside the sandbox, from prevResult.
	Interfaces []Interface `json:"interfaces,omitempty"`
}

// An Interface is one interface inside the sandbox with its addresses.
type Interface struct {
	Name  string       `json:"name"`
	Addrs []netip.Addr `json:"addrs"`
}

// A Handler answers the plugin's requests. The agent implements it. Methods may
// be called concurrently; an error's text reaches the user as the CNI error.
type Handler interface {
	// Add returns once the pod's traffic is redirected, or at once if the pod
	// is not to be redirected.
	Add(ctx context.Context, a Attachment) error
	// Del forgets the attachment. Unknown attachments are no error.
	Del(ctx context.Context, a Attachment) error
	// Check returns an error naming what is missing of the redirection.
	Check(ctx context.Context, a Attachment) error
	// GC forgets every attachment of network that is not in valid. Those of
	// other networks stay: a runtime collects one network at a time.
	GC(ctx context.Context, network string, valid []AttachmentID) error
	// Status returns nil when Add would work.
	Status(ctx context.Context) error
}

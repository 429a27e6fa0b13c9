package cniapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// Verbs, as they stand in paths and in what Observe is told.
const (
	verbAdd    = "add"
	verbDel    = "del"
	verbCheck  = "check"
	verbGC     = "gc"
	verbStatus = "status"
)

const (
	// maxRequest bounds a request's body. The list of a GC grows with the
	// node: 1 MiB is some 9,000 attachments.
	maxRequest = 1 << 20
	// clientBudget leaves the plugin time to start and to answer within Budget.
	clientBudget = Budget - 200*time.Millisecond
	// serverBudget is shorter, so that the agent's own words on what took too
	// long arrive before the plugin stops waiting.
	serverBudget = Budget - 500*time.Millisecond
)

// An answer is the body of every response; Error is empty on success.
type answer struct {
	Error string `json:"error,omitempty"`
}

// A gcRequest is the body of a GC request.
type gcRequest struct {
	Network string         `json:"network"`
	Valid   []AttachmentID `json:"valid"`
}

func path(verb string) string { return "/v1/" + verb }

// decode reads exactly one JSON value into v. A field that v does not have is
// an error: a plugin that says more than this agent understands must not be
// told that all was done.
func decode(r io.Reader, v any) error {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("decode request: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("decode request: more than one JSON value")
	}
	return nil
}

// decodeAttachment reads an attachment. Only a DEL may lack the namespace.
func decodeAttachment(r io.Reader, verb string) (Attachment, error) {
	var a Attachment
	if err := decode(r, &a); err != nil {
		return Attachment{}, err
	}
	for _, f := range []struct{ name, value string }{
		{"containerID", a.ContainerID},
		{"ifName", a.IfName},
		{"network", a.Network},
		{"podNamespace", a.PodNamespace},
		{"podName", a.PodName},
	} {
		if f.value == "" {
			return Attachment{}, fmt.Errorf("decode request: %s is missing", f.name)
		}
	}
	if a.Netns == "" && verb != verbDel {
		return Attachment{}, errors.New("decode request: netns is missing")
	}
	for _, i := range a.Interfaces {
		if i.Name == "" {
			return Attachment{}, errors.New("decode request: an interface has no name")
		}
		for n, addr := range i.Addrs {
			if !addr.IsValid() || addr.Zone() != "" {
				return Attachment{}, fmt.Errorf("decode request: address %q of interface %s: want an IP address without zone", addr, i.Name)
			}
			i.Addrs[n] = addr.Unmap()
		}
	}
	return a, nil
}

// decodeGC reads the request of a GC.
func decodeGC(r io.Reader) (gcRequest, error) {
	var req gcRequest
	if err := decode(r, &req); err != nil {
		return gcRequest{}, err
	}
	if req.Network == "" {
		return gcRequest{}, errors.New("decode request: network is missing")
	}
	// Without the list everything would be forgotten; that must be said.
	if req.Valid == nil {
		return gcRequest{}, errors.New("decode request: valid is missing")
	}
	for _, id := range req.Valid {
		if id.ContainerID == "" || id.IfName == "" {
			return gcRequest{}, errors.New("decode request: a valid attachment lacks containerID or ifName")
		}
	}
	return req, nil
}

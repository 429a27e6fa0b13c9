package cniserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
)

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
func decodeAttachment(r io.Reader, verb string) (cniapi.Attachment, error) {
	var a cniapi.Attachment
	if err := decode(r, &a); err != nil {
		return cniapi.Attachment{}, err
	}
	for _, f := range []struct{ name, value string }{
		{"containerID", a.ContainerID},
		{"ifName", a.IfName},
		{"network", a.Network},
		{"podNamespace", a.PodNamespace},
		{"podName", a.PodName},
	} {
		if f.value == "" {
			return cniapi.Attachment{}, fmt.Errorf("decode request: %s is missing", f.name)
		}
	}
	if a.Netns == "" && verb != cniapi.VerbDel {
		return cniapi.Attachment{}, errors.New("decode request: netns is missing")
	}
	for _, i := range a.Interfaces {
		if i.Name == "" {
			return cniapi.Attachment{}, errors.New("decode request: an interface has no name")
		}
		for n, addr := range i.Addrs {
			if !addr.IsValid() || addr.Zone() != "" {
				return cniapi.Attachment{}, fmt.Errorf("decode request: address %q of interface %s: want an IP address without zone", addr, i.Name)
			}
			i.Addrs[n] = addr.Unmap()
		}
	}
	return a, nil
}

// decodeGC reads the request of a GC.
func decodeGC(r io.Reader) (cniapi.GCRequest, error) {
	var req cniapi.GCRequest
	if err := decode(r, &req); err != nil {
		return cniapi.GCRequest{}, err
	}
	if req.Network == "" {
		return cniapi.GCRequest{}, errors.New("decode request: network is missing")
	}
	// Without the list everything would be forgotten; that must be said.
	if req.Valid == nil {
		return cniapi.GCRequest{}, errors.New("decode request: valid is missing")
	}
	for _, id := range req.Valid {
		if id.ContainerID == "" || id.IfName == "" {
			return cniapi.GCRequest{}, errors.New("decode request: a valid attachment lacks containerID or ifName")
		}
	}
	return req, nil
}

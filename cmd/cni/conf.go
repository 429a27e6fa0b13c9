package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
)

// keyValidAttachments holds what a GC must keep.
const keyValidAttachments = "cni.dev/valid-attachments"

// A conf is what the plugin reads of its network configuration. Keys that it
// does not have are for others and pass.
type conf struct {
	CNIVersion string `json:"cniVersion"`
	// Name of the network. The runtime puts the conflist's here.
	Name string `json:"name"`
	// Socket of the agent; empty means cniapi.DefaultSocket.
	Socket string `json:"socket"`
	// ExcludeNamespaces are namespaces whose pods the agent is not asked about.
	ExcludeNamespaces []string `json:"excludeNamespaces"`

	// The runtime adds these. nil if the key is not there.
	PrevResult       json.RawMessage `json:"prevResult"`
	ValidAttachments json.RawMessage `json:"cni.dev/valid-attachments"`
}

func parseConf(data []byte) (conf, error) {
	var c conf
	if err := json.Unmarshal(data, &c); err != nil {
		return conf{}, types.NewError(types.ErrDecodingFailure, "sluice-cni configuration: "+decodeReason("", err), "")
	}
	if c.Socket != "" && !filepath.IsAbs(c.Socket) {
		return conf{}, invalidConf("socket: %q is no absolute path", c.Socket)
	}
	if slices.Contains(c.ExcludeNamespaces, "") {
		return conf{}, invalidConf("excludeNamespaces: a name is empty")
	}
	return c, nil
}

func invalidConf(format string, args ...any) error {
	return types.NewError(types.ErrInvalidNetworkConfig, "sluice-cni configuration: "+fmt.Sprintf(format, args...), "")
}

// decodeReason names the key that has a wrong type in words of the user's file.
func decodeReason(key string, err error) string {
	var wrong *json.UnmarshalTypeError
	if !errors.As(err, &wrong) {
		return strings.TrimPrefix(key+": ", ": ") + err.Error()
	}
	if wrong.Field != "" {
		key = strings.TrimPrefix(key+"."+wrong.Field, ".")
	}
	if key == "" {
		key = "the whole"
	}
	want := map[string]string{"string": "a string", "slice": "a list", "struct": "an object"}[wrong.Type.Kind().String()]
	if want == "" {
		want = wrong.Type.String()
	}
	return fmt.Sprintf("%s: want %s, got %s", key, want, wrong.Value)
}

// A result is what the plugin reads of prevResult. The keys have been the same
// since 0.3.1.
type result struct {
	CNIVersion *string `json:"cniVersion"`
	Interfaces []*struct {
		Name    string `json:"name"`
		Sandbox string `json:"sandbox"`
	} `json:"interfaces"`
	IPs []*struct {
		Address   string `json:"address"`
		Interface *int   `json:"interface"`
	} `json:"ips"`
	Routes []*struct{} `json:"routes"`
}

// prevResult returns what the plugins before made: as it is to be printed, and
// parsed. It is an error if there were none.
func (c conf) prevResult() (json.RawMessage, result, error) {
	var r result
	if c.PrevResult == nil || string(c.PrevResult) == "null" {
		return nil, r, invalidConf("prevResult is missing: sluice-cni must stand in a chain, after the plugin that makes the pod's interface")
	}
	if err := json.Unmarshal(c.PrevResult, &r); err != nil {
		return nil, r, invalidConf("%s", decodeReason("prevResult", err))
	}
	if slices.Contains(r.Interfaces, nil) || slices.Contains(r.IPs, nil) || slices.Contains(r.Routes, nil) {
		return nil, r, invalidConf("prevResult: an interface, address or route is null")
	}
	if r.CNIVersion != nil && *r.CNIVersion == c.CNIVersion {
		// As it is, with keys that nobody here knows.
		return c.PrevResult, r, nil
	}
	raw, err := c.convertPrevResult(r.CNIVersion)
	return raw, r, err
}

// convertPrevResult returns prevResult in the configuration's version. Results
// of before 1.0.0 may come without theirs; it is the configuration's then.
func (c conf) convertPrevResult(version *string) (json.RawMessage, error) {
	if version == nil {
		var keys map[string]json.RawMessage
		if err := json.Unmarshal(c.PrevResult, &keys); err != nil {
			return nil, invalidConf("prevResult: %v", err)
		}
		keys["cniVersion"] = json.RawMessage(strconv.Quote(c.CNIVersion))
		return json.Marshal(keys)
	}
	res, err := create.Create(*version, c.PrevResult)
	if err == nil {
		res, err = res.GetAsVersion(c.CNIVersion)
	}
	if err != nil {
		return nil, invalidConf("prevResult: %v", err)
	}
	return json.Marshal(res)
}

// validAttachments returns what a GC must keep.
func (c conf) validAttachments() ([]cniapi.AttachmentID, error) {
	// A null is what libcni makes of an empty list; without the key nothing
	// is known, and everything would be taken for garbage.
	if c.ValidAttachments == nil {
		return nil, invalidConf("%s is missing", keyValidAttachments)
	}
	var list []types.GCAttachment
	if err := json.Unmarshal(c.ValidAttachments, &list); err != nil {
		return nil, invalidConf("%s", decodeReason(keyValidAttachments, err))
	}
	valid := make([]cniapi.AttachmentID, 0, len(list))
	for _, a := range list {
		valid = append(valid, cniapi.AttachmentID{ContainerID: a.ContainerID, IfName: a.IfName})
	}
	return valid, nil
}

// interfaces returns those inside the sandbox that have an address. An address
// that names no interface belongs to the one that was asked for.
func (r result) interfaces(ifName string) ([]cniapi.Interface, error) {
	var list []cniapi.Interface
	for _, ip := range r.IPs {
		prefix, err := netip.ParsePrefix(ip.Address)
		if err != nil {
			return nil, invalidConf("prevResult: address: %v", err)
		}
		addr, name := prefix.Addr().Unmap(), ifName
		if n := ip.Interface; n != nil {
			if *n < 0 || *n >= len(r.Interfaces) {
				return nil, invalidConf("prevResult: address %s is of interface %d of %d", addr, *n, len(r.Interfaces))
			}
			if r.Interfaces[*n].Sandbox == "" {
				continue // an interface of the node
			}
			name = r.Interfaces[*n].Name
		}
		i := slices.IndexFunc(list, func(i cniapi.Interface) bool { return i.Name == name })
		if i < 0 {
			i = len(list)
			list = append(list, cniapi.Interface{Name: name})
		}
		list[i].Addrs = append(list[i].Addrs, addr)
	}
	return list, nil
}

// A pod is what container runtimes say of one in CNI_ARGS.
type pod struct{ namespace, name, uid string }

// parsePod returns the pod that CNI_ARGS name, or false if the sandbox is none.
// One that is named by half is an error: it must not pass for no pod.
func parsePod(args string) (pod, bool, error) {
	var p pod
	for pair := range strings.SplitSeq(args, ";") {
		key, value, ok := strings.Cut(pair, "=")
		if !ok && pair != "" {
			return pod{}, false, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_ARGS: %q is not KEY=VALUE", pair), "")
		}
		switch key {
		case "K8S_POD_NAMESPACE":
			p.namespace = value
		case "K8S_POD_NAME":
			p.name = value
		case "K8S_POD_UID":
			p.uid = value
		}
	}
	if (p.namespace == "") != (p.name == "") {
		return pod{}, false, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: of K8S_POD_NAMESPACE and K8S_POD_NAME there is only one", "")
	}
	return p, p.name != "", nil
}

package main

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
)

func TestParseConfRefuses(t *testing.T) {
	for _, tc := range []struct{ data, want string }{
		{`{"socket":7}`, `sluice-cni configuration: socket: want a string, got number`},
		{`{"excludeNamespaces":"kube-system"}`, `sluice-cni configuration: excludeNamespaces: want a list, got string`},
		{`{"excludeNamespaces":[true]}`, `sluice-cni configuration: excludeNamespaces: want a string, got bool`},
		{`{"excludeNamespaces":["a",""]}`, `sluice-cni configuration: excludeNamespaces: a name is empty`},
		{`{"socket":"cni.sock"}`, `sluice-cni configuration: socket: "cni.sock" is no absolute path`},
		{`[]`, `sluice-cni configuration: the whole: want an object, got array`},
		{`{`, `sluice-cni configuration: unexpected end of JSON input`},
	} {
		_, err := parseConf([]byte(tc.data))
		if err == nil || err.Error() != tc.want {
			t.Errorf("%s: got  %v\nwant %s", tc.data, err, tc.want)
		}
	}
	c, err := parseConf([]byte(`{"socket":"/s","excludeNamespaces":["a"],"mood":{"good":true}}`))
	if err != nil || c.Socket != "/s" || !slices.Equal(c.ExcludeNamespaces, []string{"a"}) {
		t.Errorf("keys of others: got %+v, %v", c, err)
	}
}

func TestPrevResult(t *testing.T) {
	for _, tc := range []struct{ name, version, in, out, err string }{
		// Byte by byte, with what this plugin has never heard of.
		{"unchanged", "1.1.0", `{"ips":[{"address":"10.1.0.5/16","mood":1}],"cniVersion":"1.1.0","new":[1, 2]}`, `{"ips":[{"address":"10.1.0.5/16","mood":1}],"cniVersion":"1.1.0","new":[1, 2]}`, ""},
		{"without version", "0.3.1", `{"ips":[{"version":"4","address":"10.1.0.5/16"}]}`, `{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.1.0.5/16"}]}`, ""},
		{"older version", "1.0.0", `{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.1.0.5/16"}]}`, `{"cniVersion":"1.0.0","ips":[{"address":"10.1.0.5/16"}]}`, ""},
		{"newer version", "0.4.0", `{"cniVersion":"1.1.0","ips":[{"address":"10.1.0.5/16"}]}`, `{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.1.0.5/16"}],"dns":{}}`, ""},
		{"null", "1.0.0", `null`, "", "prevResult is missing: sluice-cni must stand in a chain"},
		{"list", "1.0.0", `[]`, "", "prevResult: want an object, got array"},
		{"wrong type", "1.0.0", `{"ips":7}`, "", "prevResult.ips: want a list, got number"},
		{"null in a list", "0.4.0", `{"cniVersion":"1.0.0","interfaces":[null]}`, "", "prevResult: an interface, address or route is null"},
		{"wrong type of version", "1.0.0", `{"cniVersion":7}`, "", "prevResult.cniVersion: want a string, got number"},
		{"unknown version", "1.0.0", `{"cniVersion":"9.9.9"}`, "", "prevResult: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			raw, parsed, err := conf{CNIVersion: tc.version, PrevResult: json.RawMessage(tc.in)}.prevResult()
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("got %v, want %s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if string(raw) != tc.out {
				t.Errorf("got  %s\nwant %s", raw, tc.out)
			}
			if len(parsed.IPs) != 1 || parsed.IPs[0].Address != "10.1.0.5/16" {
				t.Errorf("parsed %+v", parsed)
			}
		})
	}
}

func TestInterfaces(t *testing.T) {
	addrs := func(s ...string) (a []netip.Addr) {
		for _, s := range s {
			a = append(a, netip.MustParseAddr(s))
		}
		return a
	}
	const links = `"interfaces":[{"name":"br0"},{"name":"veth1"},{"name":"eth0","sandbox":"/n"},{"name":"net1","sandbox":"/n"}]`
	for _, tc := range []struct {
		name, in string
		want     []cniapi.Interface
		err      string
	}{
		{
			"both families", `{` + links + `,"ips":[{"interface":2,"address":"10.1.0.5/16"},{"interface":2,"address":"fd00::5/64"}]}`,
			[]cniapi.Interface{{Name: "eth0", Addrs: addrs("10.1.0.5", "fd00::5")}},
			"",
		},
		{
			"two interfaces", `{` + links + `,"ips":[{"interface":3,"address":"10.2.0.5/16"},{"interface":2,"address":"10.1.0.5/16"}]}`,
			[]cniapi.Interface{{Name: "net1", Addrs: addrs("10.2.0.5")}, {Name: "eth0", Addrs: addrs("10.1.0.5")}},
			"",
		},
		{
			"of the node", `{` + links + `,"ips":[{"interface":0,"address":"10.1.0.1/16"},{"interface":2,"address":"10.1.0.5/16"}]}`,
			[]cniapi.Interface{{Name: "eth0", Addrs: addrs("10.1.0.5")}},
			"",
		},
		{
			"no index, as Calico", `{"interfaces":[{"name":"cali1"}],"ips":[{"address":"10.1.0.5/32"}]}`,
			[]cniapi.Interface{{Name: "eth9", Addrs: addrs("10.1.0.5")}},
			"",
		},
		{"no address", `{` + links + `}`, nil, ""},
		{"index too high", `{` + links + `,"ips":[{"interface":4,"address":"10.1.0.5/16"}]}`, nil, "address 10.1.0.5 is of interface 4 of 4"},
		{"bad address", `{"ips":[{"address":"10.1.0/16"}]}`, nil, `prevResult: address: netip.ParsePrefix("10.1.0/16")`},
		{"index below zero", `{` + links + `,"ips":[{"interface":-1,"address":"10.1.0.5/16"}]}`, nil, "address 10.1.0.5 is of interface -1 of 4"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, res, err := conf{CNIVersion: "1.0.0", PrevResult: json.RawMessage(tc.in)}.prevResult()
			if err != nil {
				t.Fatal(err)
			}
			got, err := res.interfaces("eth9")
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("got %v, want %s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("interfaces (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParsePod(t *testing.T) {
	for _, tc := range []struct {
		args string
		want pod
		ok   bool
		err  string
	}{
		{"", pod{}, false, ""},
		{"IgnoreUnknown=1;COLOUR=red", pod{}, false, ""},
		// As containerd and CRI-O write them.
		{"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c0ffee;K8S_POD_UID=0b6f", pod{"shop", "web-0", "0b6f"}, true, ""},
		{"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;X=a=b;", pod{"shop", "web-0", ""}, true, ""},
		{"K8S_POD_NAMESPACE=shop", pod{}, false, "CNI_ARGS: of K8S_POD_NAMESPACE and K8S_POD_NAME there is only one"},
		{"K8S_POD_NAME=web-0", pod{}, false, "CNI_ARGS: of K8S_POD_NAMESPACE and K8S_POD_NAME there is only one"},
		{"K8S_POD_NAME", pod{}, false, `CNI_ARGS: "K8S_POD_NAME" is not KEY=VALUE`},
	} {
		got, ok, err := parsePod(tc.args)
		if tc.err != "" {
			if err == nil || err.Error() != tc.err {
				t.Errorf("%s: got %v, want %s", tc.args, err, tc.err)
			}
			continue
		}
		if err != nil || ok != tc.ok || got != tc.want {
			t.Errorf("%s: got %+v, %v, %v", tc.args, got, ok, err)
		}
	}
}

func TestValidAttachments(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want []cniapi.AttachmentID
		err  string
	}{
		{`[{"containerID":"a","ifname":"eth0"}]`, []cniapi.AttachmentID{{ContainerID: "a", IfName: "eth0"}}, ""},
		{`[]`, []cniapi.AttachmentID{}, ""},
		{`null`, []cniapi.AttachmentID{}, ""},
		{``, nil, "cni.dev/valid-attachments is missing"},
		{`{}`, nil, "cni.dev/valid-attachments: want a list, got object"},
		{`[{"ifname":1}]`, nil, "cni.dev/valid-attachments.ifname: want a string, got number"},
	} {
		c := `{}`
		if tc.in != "" {
			c = `{"cni.dev/valid-attachments":` + tc.in + `}`
		}
		parsed, err := parseConf([]byte(c))
		if err != nil {
			t.Fatal(err)
		}
		got, err := parsed.validAttachments()
		if tc.err != "" {
			if err == nil || !strings.HasSuffix(err.Error(), tc.err) {
				t.Errorf("%s: got %v, want %s", tc.in, err, tc.err)
			}
			continue
		}
		if diff := cmp.Diff(tc.want, got); err != nil || diff != "" {
			t.Errorf("%s: %v\n%s", tc.in, err, diff)
		}
	}
}

// Whatever the configuration: no panic, CNI errors only, and a result that is
// of the version that was asked for.
func FuzzConf(f *testing.F) {
	for _, v := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		f.Add([]byte(`{"cniVersion":"`+v+`","name":"n","type":"sluice-cni","socket":"/s","excludeNamespaces":["a"],"prevResult":{"cniVersion":"`+v+`","interfaces":[{"name":"eth0","sandbox":"/n"}],"ips":[{"version":"4","interface":0,"address":"10.1.0.5/16"}]}}`), "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b")
	}
	f.Add([]byte(`{"cniVersion":"1.0.0","prevResult":{"ips":[{"address":"10.1.0.5/16"}]}}`), "X")
	f.Add([]byte(`{"cniVersion":"1.1.0","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}`), ";")
	for _, v := range []string{"0.4.0", "1.0.0"} {
		f.Add([]byte(`{"cniVersion":"`+v+`","prevResult":{"interfaces":[null],"ips":[{"interface":0,"address":"::1/1"}]}}`), "")
		f.Add([]byte(`{"cniVersion":"`+v+`","prevResult":{"ips":[null]}}`), "")
		f.Add([]byte(`{"cniVersion":"`+v+`","prevResult":{"routes":[null]}}`), "")
	}
	f.Fuzz(func(t *testing.T, data []byte, args string) {
		cniError := func(err error) {
			var e *types.Error
			if err != nil && !errors.As(err, &e) {
				t.Errorf("%q is no CNI error: %v", data, err)
			}
		}
		_, _, err := parsePod(args)
		cniError(err)
		c, err := parseConf(data)
		if err != nil {
			cniError(err)
			return
		}
		_, err = c.validAttachments()
		cniError(err)
		if !slices.Contains(versions().SupportedVersions(), c.CNIVersion) {
			return // refused before prevResult is looked at
		}
		raw, res, err := c.prevResult()
		if err != nil {
			cniError(err)
			return
		}
		var printed struct{ CNIVersion string }
		if err := json.Unmarshal(raw, &printed); err != nil || printed.CNIVersion != c.CNIVersion {
			t.Errorf("%q: printed %s (%v)", data, raw, err)
		}
		list, err := res.interfaces("eth0")
		cniError(err)
		for _, i := range list {
			if len(i.Addrs) == 0 || slices.ContainsFunc(i.Addrs, func(a netip.Addr) bool { return !a.IsValid() || a.Is4In6() }) {
				t.Errorf("%q: interface %+v", data, i)
			}
		}
	})
}

// The example that users copy is one that libcni and the plugin accept.
func TestDocumentedConfiguration(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "cni.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(doc), "```json\n")
	example, _, ok := strings.Cut(rest, "```")
	if !ok {
		t.Fatal("docs/cni.md has no example")
	}
	list, err := libcni.NetworkConfFromBytes([]byte(example))
	if err != nil {
		t.Fatal(err)
	}
	last := list.Plugins[len(list.Plugins)-1]
	c, err := parseConf(last.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if last.Network.Type != "sluice-cni" || c.Socket != cniapi.DefaultSocket || len(c.ExcludeNamespaces) == 0 {
		t.Errorf("got %s, %+v", last.Network.Type, c)
	}
}

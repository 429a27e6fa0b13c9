package cniinstall

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
)

// PluginType is the plugin's type in a network configuration and therefore the
// name of its binary.
const PluginType = "sluice-cni"

// manager marks entries that were made here and not by somebody's hand.
const manager = "sluice-agent"

// An entry is what the plugin reads of the network configuration.
type entry struct {
	Type              string   `json:"type"`
	ManagedBy         string   `json:"managedBy"`
	Socket            string   `json:"socket,omitempty"`
	ExcludeNamespaces []string `json:"excludeNamespaces,omitempty"`
}

// pluginVersions are the versions of the CNI specification that the plugin
// speaks: those before have no prevResult for it.
func pluginVersions() []string { return []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} }

// extensions are those of files that runtimes take for network configurations.
func extensions() []string { return []string{".conf", ".conflist", ".json"} }

func isConf(name string) bool { return slices.Contains(extensions(), filepath.Ext(name)) }

func isList(name string) bool { return filepath.Ext(name) == ".conflist" }

// load reads a configuration the way runtimes do, by the file's extension.
// Plugins that lie in a directory of their own are not in it.
func load(name string, data []byte) (*libcni.NetworkConfigList, error) {
	if isList(name) {
		list, err := libcni.NetworkConfFromBytes(data)
		if err == nil && len(list.Plugins) == 0 {
			err = fmt.Errorf("its plugins are not in it but in the directory %q beside it, which is not supported; list them under \"plugins\"", list.Name)
			return list, notSupported{err}
		}
		return list, err
	}
	plugin, err := libcni.NetworkPluginConfFromBytes(data)
	if err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(asList(data, plugin.Network.CNIVersion, plugin.Network.Name))
}

// A notSupported configuration is valid for runtimes, but no entry can be added.
type notSupported struct{ error }

// checkUsable says why the plugin cannot stand in a list.
func checkUsable(list *libcni.NetworkConfigList) error {
	if v := list.CNIVersion; !slices.Contains(pluginVersions(), v) {
		return notSupported{fmt.Errorf("cniVersion is %q: sluice-cni can only stand in a network of version %s; change it where the network is configured",
			v, strings.Join(pluginVersions(), ", "))}
	}
	if !slices.ContainsFunc(list.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Type != PluginType }) {
		return notSupported{fmt.Errorf("it has no plugin but %s, which makes no interface itself", PluginType)}
	}
	return nil
}

// asList wraps a single configuration into a list. The same bytes always give
// the same list, so that a list can be recognised as made here.
func asList(data []byte, version, name string) []byte {
	const indent = "    "
	var b bytes.Buffer
	head := struct {
		CNIVersion string `json:"cniVersion"`
		Name       string `json:"name"`
	}{version, name}
	text, err := json.MarshalIndent(head, "", "  ")
	if err != nil {
		return nil // two strings always can be encoded
	}
	b.Write(bytes.TrimSuffix(text, []byte("\n}")))
	b.WriteString(",\n  \"plugins\": [\n" + indent)
	if err := json.Indent(&b, bytes.TrimSpace(data), indent, "  "); err != nil {
		return nil // has been parsed before
	}
	b.WriteString("\n  ]\n}\n")
	return b.Bytes()
}

// listOf is asList of a file's content, nil if that is no configuration.
func listOf(data []byte) []byte {
	plugin, err := libcni.NetworkPluginConfFromBytes(data)
	if err != nil {
		return nil
	}
	return asList(data, plugin.Network.CNIVersion, plugin.Network.Name)
}

// A span is where an element of "plugins" stands in the text of a list.
type span struct {
	start, end int
	own        bool // it is of type PluginType
	managed    bool // and was made here
}

// plugins finds the elements of "plugins" in a list. The text is changed only
// there: order, numbers and spacing of everything else stay as they are.
func plugins(data []byte) ([]span, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.Join(errors.New("want an object"), err)
	}
	var spans []span
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, err
		}
		if key != "plugins" {
			var skip json.RawMessage
			if err := dec.Decode(&skip); err != nil {
				return nil, err
			}
			continue
		}
		// Of a key that is there twice the last one counts, as for runtimes.
		if spans, err = elements(dec); err != nil {
			return nil, fmt.Errorf("plugins: %w", err)
		}
	}
	return spans, nil
}

func elements(dec *json.Decoder) ([]span, error) {
	if t, err := dec.Token(); err != nil || t != json.Delim('[') {
		return nil, errors.Join(errors.New("want a list"), err)
	}
	spans := []span{}
	for dec.More() {
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return nil, err
		}
		var e entry
		// A key of another type does not matter: it is not made here then.
		_ = json.Unmarshal(raw, &e)
		end := int(dec.InputOffset())
		spans = append(spans, span{
			start: end - len(raw), end: end,
			own: e.Type == PluginType, managed: e.Type == PluginType && e.ManagedBy == manager,
		})
	}
	_, err := dec.Token()
	return spans, err
}

// withEntry returns the list with want as its last plugin and no other entry of
// ours; the very same bytes if it is so already.
func withEntry(data []byte, want entry) ([]byte, error) {
	spans, err := plugins(data)
	if err != nil {
		return nil, err
	}
	owned := 0
	for _, s := range spans {
		if s.own {
			owned++
		}
	}
	if n := len(spans) - 1; owned == 1 && spans[n].own && sameJSON(data[spans[n].start:spans[n].end], want) {
		return data, nil
	}
	if data, err = withoutEntry(data); err != nil {
		return nil, err
	}
	if spans, err = plugins(data); err != nil {
		return nil, err
	}
	if len(spans) == 0 {
		return nil, errors.New("plugins: the list is empty")
	}
	last := spans[len(spans)-1]
	text, err := entryText(want, gapBefore(data, last.start))
	if err != nil {
		return nil, err
	}
	return slices.Concat(data[:last.end], text, data[last.end:]), nil
}

// gapBefore returns the white space before a position.
func gapBefore(data []byte, at int) []byte {
	return data[len(bytes.TrimRight(data[:at], " \t\r\n")):at]
}

// entryText is the entry with the comma before it, on lines of its own if the
// element before it starts on one.
func entryText(e entry, gap []byte) ([]byte, error) {
	newline := bytes.LastIndexByte(gap, '\n')
	if newline < 0 {
		text, err := json.Marshal(e)
		return slices.Concat([]byte(", "), text), err
	}
	text, err := json.MarshalIndent(e, string(gap[newline+1:]), "  ")
	return slices.Concat([]byte(","), gap, text), err
}

func sameJSON(text []byte, want entry) bool {
	wanted, err := json.Marshal(want)
	if err != nil {
		return false
	}
	var a, b any
	return json.Unmarshal(text, &a) == nil && json.Unmarshal(wanted, &b) == nil && reflect.DeepEqual(a, b)
}

// withoutEntry returns the list without any entry of ours, and with it whatever
// separated it from the element before: what withEntry has added goes, byte by
// byte.
func withoutEntry(data []byte) ([]byte, error) {
	for {
		spans, err := plugins(data)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(spans, func(s span) bool { return s.own })
		switch {
		case i < 0:
			return data, nil
		case i > 0:
			data = slices.Concat(data[:spans[i-1].end], data[spans[i].end:])
		case len(spans) > 1:
			data = slices.Concat(data[:spans[0].start], data[spans[1].start:])
		default:
			data = slices.Concat(data[:spans[0].start], data[spans[0].end:])
		}
	}
}

// listNames are the names that a single configuration may have as a list: the
// first is what everybody expects, the second is for when that is taken.
func listNames(name string) []string {
	return []string{strings.TrimSuffix(name, filepath.Ext(name)) + ".conflist", name + ".conflist"}
}

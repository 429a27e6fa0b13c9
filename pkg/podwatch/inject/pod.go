package inject

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/api/resource"
)

// InjectKey is the label that says whether a pod gets a sidecar.
const (
	InjectKey      = annotationPrefix + "inject"
	InjectEnabled  = "enabled"
	InjectDisabled = "disabled"
)

// The names of containers that are a proxy already.
func proxyNames() []string { return []string{"sluice-proxy", "istio-proxy"} }

// Defaults of Kubernetes for what a pod does not say.
const (
	defaultGracePeriod   = 30 // seconds
	defaultRestartPolicy = "Always"
)

// A pod is a Pod or a pod template: something with metadata and spec.
type pod struct {
	field
	annotations map[string]string // those of injection that there are
}

// A skip is a reason why a pod gets no sidecar.
type skip struct {
	reason string
	quiet  bool // it is what the user said
}

// read looks at what decides. A skip that is not nil says that there is nothing
// to do.
func (in *Injector) read(f field) (*pod, *skip, error) {
	spec, err := f.get("spec")
	if err != nil {
		return nil, nil, err
	}
	if spec.node == nil {
		return nil, nil, fmt.Errorf("%s: is missing", spec.name())
	}
	label, err := textAt(f, "metadata", "labels", InjectKey)
	if err != nil {
		return nil, nil, err
	}
	switch label {
	case "", InjectEnabled:
	case InjectDisabled:
		return nil, &skip{quiet: true}, nil
	default:
		return nil, nil, fmt.Errorf("%s: %q: want %s or %s", join(f.path, "metadata.labels["+InjectKey+"]"), label, InjectEnabled, InjectDisabled)
	}
	if why, err := unfit(spec); err != nil || why != "" {
		return nil, &skip{reason: why}, err
	}
	p := &pod{field: f, annotations: make(map[string]string)}
	if err := in.readAnnotations(p); err != nil {
		return nil, nil, err
	}
	containers, err := containers(spec)
	if err != nil {
		return nil, nil, err
	}
	for _, c := range containers {
		name, err := textAt(c, "name")
		if err != nil {
			return nil, nil, err
		}
		if slices.Contains(proxyNames(), name) {
			return nil, &skip{reason: "it has a container " + name}, nil
		}
	}
	return p, nil, nil
}

// unfit says why a pod cannot have a sidecar, or nothing.
func unfit(spec field) (string, error) {
	hostNetwork, err := spec.get("hostNetwork")
	if err != nil {
		return "", err
	}
	if host, err := hostNetwork.truth(); err != nil || host {
		return "it is in the host's network (hostNetwork: true)", err
	}
	for _, where := range [][]string{{"os", "name"}, {"nodeSelector", "kubernetes.io/os"}} {
		if system, err := textAt(spec, where...); err != nil {
			return "", err
		} else if system != "" && system != "linux" {
			return "it runs on " + system, nil
		}
	}
	return "", nil
}

// readAnnotations takes the annotations of injection and refuses wrong ones.
func (in *Injector) readAnnotations(p *pod) error {
	all, err := p.at("metadata", "annotations")
	if err != nil || all.node == nil {
		return err
	}
	if all.node.Kind != yaml.MappingNode {
		return fmt.Errorf("%s: line %d: want a map", all.name(), all.node.Line)
	}
	known := in.description.annotations()
	var errs []error
	for i := 0; i+1 < len(all.node.Content); i += 2 {
		key := all.node.Content[i].Value
		here := field{path: all.path + "[" + key + "]", node: all.node.Content[i+1]}
		switch {
		case slices.Contains(known, key):
			if p.annotations[key], err = here.text(); err != nil {
				errs = append(errs, err)
			}
		case strings.HasPrefix(key, annotationPrefix+"proxy-"):
			errs = append(errs, fmt.Errorf("%s: not known; there are %s", here.path, strings.Join(known, ", ")))
		}
	}
	for _, parameter := range in.description.Parameters {
		if value, ok := p.annotations[annotationPrefix+parameter.Annotation]; ok && parameter.Annotation != "" {
			if err := parameter.Kind.check(value); err != nil {
				errs = append(errs, fmt.Errorf("%s[%s]: %q: %w", all.path, annotationPrefix+parameter.Annotation, value, err))
			}
		}
	}
	return errors.Join(errs...)
}

// containers returns all containers of a pod's spec.
func containers(spec field) ([]field, error) {
	var all []field
	for _, name := range []string{"initContainers", "containers"} {
		list, err := spec.get(name)
		if err != nil {
			return nil, err
		}
		items, err := list.items()
		if err != nil {
			return nil, err
		}
		all = append(all, items...)
	}
	return all, nil
}

// resolve returns what the parameters are for a pod.
func (in *Injector) resolve(p *pod) (map[string]string, error) {
	values := map[string]string{"bootstrap": in.bootstrap}
	for _, parameter := range in.description.Parameters {
		value, own := in.defaults[parameter.Name], false
		if parameter.Annotation != "" {
			if v, ok := p.annotations[annotationPrefix+parameter.Annotation]; ok {
				value, own = v, true
			}
		}
		if limit := values[parameter.NotAbove]; limit != "" && value != "" {
			above, err := exceeds(value, limit)
			switch {
			case err != nil:
				return nil, err
			case above && own:
				return nil, fmt.Errorf("%s[%s%s]: %q: want no more than the limit of %s, which annotation %s%s sets",
					join(p.path, "metadata.annotations"), annotationPrefix, parameter.Annotation, value, limit,
					annotationPrefix, in.description.parameter(parameter.NotAbove).Annotation)
			case above:
				value = limit
			}
		}
		if parameter.Kind == kindDrain {
			var err error
			if value, err = drain(p, value); err != nil {
				return nil, err
			}
		}
		values[parameter.Name] = value
	}
	return values, nil
}

// exceeds says whether quantity a is more than b.
func exceeds(a, b string) (bool, error) {
	qa, err := resource.ParseQuantity(a)
	if err != nil {
		return false, err
	}
	qb, err := resource.ParseQuantity(b)
	return err == nil && qa.Cmp(qb) > 0, err
}

// drain bounds the default by what the pod allows.
func drain(p *pod, seconds string) (string, error) {
	restart, err := textAt(p.field, "spec", "restartPolicy")
	if err != nil {
		return "", err
	}
	if restart != "" && restart != defaultRestartPolicy {
		return "0", nil
	}
	grace, err := p.at("spec", "terminationGracePeriodSeconds")
	if err != nil {
		return "", err
	}
	period, err := grace.number(defaultGracePeriod)
	if err != nil {
		return "", err
	}
	n, err := strconv.ParseInt(seconds, 10, 64)
	return strconv.FormatInt(min(n, period), 10), err
}

// checkUser refuses a pod with a container that runs as the proxy's user: its
// connections would pass the proxy by.
func checkUser(p *pod, uid string) error {
	ofPod, err := p.at("spec", "securityContext", "runAsUser")
	if err != nil {
		return err
	}
	without, err := ofPod.number(0)
	if err != nil {
		return err
	}
	spec, err := p.get("spec")
	if err != nil {
		return err
	}
	all, err := containers(spec)
	if err != nil {
		return err
	}
	for _, c := range all {
		user, err := c.at("securityContext", "runAsUser")
		if err != nil {
			return err
		}
		n, err := user.number(without)
		if err != nil {
			return err
		}
		if strconv.FormatInt(n, 10) == uid {
			return fmt.Errorf("%s runs as user %s, which is the proxy's: run it as another, or set annotation %sproxy-uid", c.name(), uid, annotationPrefix)
		}
	}
	return nil
}

// inject changes the pod.
func (in *Injector) inject(p *pod) error {
	values, err := in.resolve(p)
	if err != nil {
		return err
	}
	if err := checkUser(p, values["uid"]); err != nil {
		return err
	}
	container, err := in.build(&in.description.Container, values, false)
	if err != nil {
		return err
	}
	spec, err := p.get("spec")
	if err != nil {
		return err
	}
	if spec.node.Kind != yaml.MappingNode {
		return fmt.Errorf("%s: line %d: want a map", spec.name(), spec.node.Line)
	}
	list, err := spec.get("initContainers")
	if err != nil {
		return err
	}
	if list.node == nil {
		list.node = &yaml.Node{Kind: yaml.SequenceNode}
		put(spec.node, "initContainers", list.node, "containers")
	}
	list.node.Content = append([]*yaml.Node{container}, list.node.Content...)

	labels, err := p.at("metadata", "labels")
	if err != nil {
		return err
	}
	if labels.node == nil {
		labels.node = &yaml.Node{Kind: yaml.MappingNode}
		metadata, err := p.get("metadata")
		if err != nil {
			return err
		}
		if metadata.node == nil {
			metadata.node = &yaml.Node{Kind: yaml.MappingNode}
			put(p.node, "metadata", metadata.node, "spec")
		}
		put(metadata.node, "labels", labels.node, "")
	}
	if labels.node.Kind != yaml.MappingNode {
		return fmt.Errorf("%s: line %d: want a map", labels.name(), labels.node.Line)
	}
	for _, key := range in.description.labels() {
		put(labels.node, key, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Style: yaml.DoubleQuotedStyle, Value: in.description.Labels[key]}, "")
	}
	return nil
}

// build returns the container with the parameters in place, nil for what is left
// out.
func (in *Injector) build(n *yaml.Node, values map[string]string, inList bool) (*yaml.Node, error) {
	c := &yaml.Node{Kind: n.Kind, Tag: n.Tag, Value: n.Value}
	switch n.Kind {
	case yaml.ScalarNode:
		name, ok := strings.CutPrefix(n.Value, "$")
		if !ok {
			if c.ShortTag() == "!!str" && needsQuotes(c.Value) {
				c.Style = yaml.DoubleQuotedStyle
			}
			return c, nil
		}
		c.Value, c.Tag = values[name], "!!str"
		switch {
		case name == "bootstrap":
			c.Style = yaml.LiteralStyle
		case inList:
			if needsQuotes(c.Value) {
				c.Style = yaml.DoubleQuotedStyle
			}
		case in.description.parameter(name).Kind.numeric():
			if c.Tag = "!!int"; c.Value == "0" {
				return nil, nil
			}
		case c.Value == "":
			return nil, nil
		case needsQuotes(c.Value):
			c.Style = yaml.DoubleQuotedStyle
		}
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			value, err := in.build(n.Content[i+1], values, false)
			if err != nil {
				return nil, err
			}
			if value != nil {
				c.Content = append(c.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: n.Content[i].Value}, value)
			}
		}
		if len(n.Content) > 0 && len(c.Content) == 0 {
			return nil, nil
		}
	case yaml.SequenceNode:
		for _, item := range n.Content {
			value, err := in.build(item, values, true)
			if err != nil {
				return nil, err
			}
			c.Content = append(c.Content, value)
		}
	default:
		return nil, fmt.Errorf("build the sidecar: line %d of its description: want no alias", n.Line)
	}
	return c, nil
}

// needsQuotes says whether s, written bare, would be read as something else.
func needsQuotes(s string) bool {
	n := yaml.Node{Kind: yaml.ScalarNode, Value: s}
	return n.ShortTag() != "!!str"
}

// textAt returns the text at names, empty if it is not there.
func textAt(f field, names ...string) (string, error) {
	f, err := f.at(names...)
	if err != nil {
		return "", err
	}
	return f.text()
}

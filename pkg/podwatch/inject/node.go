package inject

import (
	"fmt"

	"go.yaml.in/yaml/v3"
)

// Limits of one document, as of the source files.
const (
	maxDepth = 100
	maxNodes = 100_000 // after aliases have been put in place
)

// A field is a node and how to call it.
type field struct {
	path string // such as spec.template.spec; empty for the document
	node *yaml.Node
}

// isNull says whether there is no value.
func isNull(n *yaml.Node) bool {
	return n == nil || n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

// get returns the field of that name in a map; its node is nil if it is not
// there or null. Anything but a map is an error.
func (f field) get(name string) (field, error) {
	child := field{path: join(f.path, name)}
	if isNull(f.node) {
		return child, nil
	}
	if f.node.Kind != yaml.MappingNode {
		return child, fmt.Errorf("%s: line %d: want a map", f.name(), f.node.Line)
	}
	for i := 0; i+1 < len(f.node.Content); i += 2 {
		if f.node.Content[i].Value == name && !isNull(f.node.Content[i+1]) {
			child.node = f.node.Content[i+1]
			return child, nil
		}
	}
	return child, nil
}

// at follows several names.
func (f field) at(names ...string) (field, error) {
	var err error
	for _, name := range names {
		if f, err = f.get(name); err != nil {
			return f, err
		}
	}
	return f, nil
}

// items returns the entries of a list.
func (f field) items() ([]field, error) {
	if isNull(f.node) {
		return nil, nil
	}
	if f.node.Kind != yaml.SequenceNode {
		return nil, fmt.Errorf("%s: line %d: want a list", f.name(), f.node.Line)
	}
	list := make([]field, len(f.node.Content))
	for i, n := range f.node.Content {
		list[i] = field{fmt.Sprintf("%s[%d]", f.path, i), n}
	}
	return list, nil
}

// text returns a text, empty if it is not there. Numbers and truth values that
// are not quoted are errors, as they are to the API server.
func (f field) text() (string, error) {
	if isNull(f.node) {
		return "", nil
	}
	if f.node.Kind != yaml.ScalarNode || f.node.ShortTag() != "!!str" {
		return "", fmt.Errorf("%s: line %d: %q: want a text, in quotes", f.name(), f.node.Line, f.node.Value)
	}
	return f.node.Value, nil
}

// truth returns a truth value, false if it is not there.
func (f field) truth() (bool, error) {
	if isNull(f.node) {
		return false, nil
	}
	var b bool
	if f.node.ShortTag() != "!!bool" || f.node.Decode(&b) != nil {
		return false, fmt.Errorf("%s: line %d: %q: want true or false", f.name(), f.node.Line, f.node.Value)
	}
	return b, nil
}

// number returns a whole number, or without if it is not there.
func (f field) number(without int64) (int64, error) {
	if isNull(f.node) {
		return without, nil
	}
	var n int64
	if f.node.ShortTag() != "!!int" || f.node.Decode(&n) != nil {
		return 0, fmt.Errorf("%s: line %d: %q: want a number", f.name(), f.node.Line, f.node.Value)
	}
	return n, nil
}

// name is the path for people.
func (f field) name() string {
	if f.path == "" {
		return "the object"
	}
	return f.path
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// put sets a field of a map, before the field of the name before if there is
// one, else at the end.
func put(m *yaml.Node, name string, value *yaml.Node, before string) {
	position := len(m.Content)
	for i := 0; i+1 < len(m.Content); i += 2 {
		switch m.Content[i].Value {
		case name:
			m.Content[i+1] = value
			return
		case before:
			position = i
		}
	}
	entry := []*yaml.Node{{Kind: yaml.ScalarNode, Tag: "!!str", Value: name}, value}
	// A comment above the field that comes next stays above that field.
	m.Content = append(m.Content[:position], append(entry, m.Content[position:]...)...)
}

// expand returns n with every alias and merge key replaced by what it stands
// for: one of several places that share text cannot be changed alone.
func expand(n *yaml.Node) (*yaml.Node, error) {
	nodes := 0
	return expandNode(n, 0, &nodes)
}

func expandNode(n *yaml.Node, depth int, nodes *int) (*yaml.Node, error) {
	if *nodes++; depth > maxDepth || *nodes > maxNodes {
		return nil, fmt.Errorf("line %d: nested deeper than %d, or more than %d values with what aliases repeat", n.Line, maxDepth, maxNodes)
	}
	if n.Kind == yaml.AliasNode {
		return expandNode(n.Alias, depth+1, nodes)
	}
	c := *n
	c.Anchor, c.Content = "", nil
	if n.Kind != yaml.MappingNode {
		for _, child := range n.Content {
			e, err := expandNode(child, depth+1, nodes)
			if err != nil {
				return nil, err
			}
			c.Content = append(c.Content, e)
		}
		return &c, nil
	}
	own := make(map[string]bool)
	var merged []*yaml.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, err := expandNode(n.Content[i], depth+1, nodes)
		if err != nil {
			return nil, err
		}
		value, err := expandNode(n.Content[i+1], depth+1, nodes)
		if err != nil {
			return nil, err
		}
		if key.ShortTag() != "!!merge" {
			own[key.Value] = true
			c.Content = append(c.Content, key, value)
			continue
		}
		from := []*yaml.Node{value}
		if value.Kind == yaml.SequenceNode {
			from = value.Content
		}
		for _, m := range from {
			if m.Kind != yaml.MappingNode {
				return nil, fmt.Errorf("line %d: only maps can be merged", m.Line)
			}
			merged = append(merged, m.Content...)
		}
	}
	for i := 0; i+1 < len(merged); i += 2 {
		if !own[merged[i].Value] { // the first of those that are merged counts
			own[merged[i].Value] = true
			c.Content = append(c.Content, merged[i], merged[i+1])
		}
	}
	return &c, nil
}

// hasAlias says whether something in n stands for something else.
func hasAlias(n *yaml.Node) bool {
	if n.Kind == yaml.AliasNode {
		return true
	}
	for _, child := range n.Content {
		if hasAlias(child) {
			return true
		}
	}
	return false
}

// tooDeep is an error if n is nested deeper than anything sensible.
func tooDeep(n *yaml.Node, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("line %d: nested deeper than %d", n.Line, maxDepth)
	}
	for _, child := range n.Content {
		if err := tooDeep(child, depth+1); err != nil {
			return err
		}
	}
	return nil
}

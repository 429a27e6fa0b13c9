package podwatch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Limits of one document.
const (
	maxDepth   = 100
	maxAliased = 100_000 // nodes that aliases may repeat, all in all
)

// A fieldError is something wrong at one place of a document.
type fieldError struct {
	line    int
	field   string
	message string
}

// A chunk is the text between two lines "---".
type chunk struct {
	// line is the file's line of the first line of text, counted from 1.
	line int
	text []byte
}

// split cuts a file into documents without parsing it, so that a document that
// does not parse takes no other one with it.
func split(data []byte) []chunk {
	var chunks []chunk
	start, startLine, line := 0, 1, 1
	cut := func(end int) {
		if text := data[start:end]; hasContent(text) {
			chunks = append(chunks, chunk{startLine, text})
		}
		start, startLine = end, line
	}
	for pos := 0; pos < len(data); line++ {
		if rest := data[pos:]; bytes.HasPrefix(rest, []byte("---")) && (len(rest) == 3 || strings.IndexByte(" \t\r\n", rest[3]) >= 0) {
			cut(pos)
		}
		end := bytes.IndexByte(data[pos:], '\n')
		if end < 0 {
			break
		}
		pos += end + 1
	}
	cut(len(data))
	return chunks
}

// hasContent says whether there is more than comments and directives.
func hasContent(text []byte) bool {
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(bytes.TrimPrefix(line, []byte("---")))
		if len(line) > 0 && line[0] != '#' && line[0] != '%' {
			return true
		}
	}
	return false
}

// yamlLine is how the YAML parser reports a place.
var yamlLine = regexp.MustCompile(`^yaml: line ([0-9]+): `)

// parseChunk parses one document, or several if they are separated by "...".
// Lines in the result are those of the file.
func parseChunk(c chunk) ([]*yaml.Node, *fieldError) {
	var docs []*yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(c.text))
	for {
		var n yaml.Node
		err := dec.Decode(&n)
		switch {
		case errors.Is(err, io.EOF):
			return docs, nil
		case err != nil:
			msg, line := err.Error(), c.line
			if m := yamlLine.FindStringSubmatch(msg); m != nil {
				msg = msg[len(m[0]):]
				if in, err := strconv.Atoi(m[1]); err == nil {
					// The parser may point behind the end.
					line += min(in-1, bytes.Count(bytes.TrimSuffix(c.text, []byte("\n")), []byte("\n")))
				}
			}
			return docs, &fieldError{line: line, message: "not YAML: " + strings.TrimPrefix(msg, "yaml: ")}
		}
		if len(n.Content) == 0 {
			continue
		}
		aliased := 0
		root, err := expand(n.Content[0], c.line-1, 0, &aliased, false)
		if err != nil {
			return docs, &fieldError{line: c.line, message: "not usable: " + err.Error()}
		}
		if tagOf(root) != "!!null" {
			docs = append(docs, root)
		}
	}
}

// expand copies a tree with lines moved by shift, aliases replaced by what they
// stand for and merge keys ("<<") merged.
func expand(n *yaml.Node, shift, depth int, aliased *int, inAlias bool) (*yaml.Node, error) {
	if n.Kind == yaml.AliasNode {
		n, inAlias = n.Alias, true
	}
	if inAlias {
		*aliased++
	}
	if depth > maxDepth || *aliased > maxAliased {
		return nil, errors.New("nested too deeply or too many aliases")
	}
	out := *n
	out.Line += shift
	out.Content = nil
	var merged []*yaml.Node
	for i, child := range n.Content {
		c, err := expand(child, shift, depth+1, aliased, inAlias)
		if err != nil {
			return nil, err
		}
		if n.Kind == yaml.MappingNode && i%2 == 1 && tagOf(n.Content[i-1]) == "!!merge" {
			out.Content = out.Content[:len(out.Content)-1]
			merged = append(merged, c)
			continue
		}
		out.Content = append(out.Content, c)
	}
	for _, m := range merged {
		if err := merge(&out, m); err != nil {
			return nil, err
		}
	}
	return &out, nil
}

// merge adds the keys of a mapping, or of a list of mappings, that n has not.
func merge(n, from *yaml.Node) error {
	switch from.Kind {
	case yaml.SequenceNode:
		for _, m := range from.Content {
			if m.Kind != yaml.MappingNode {
				return errors.New("a merge key needs a mapping")
			}
			if err := merge(n, m); err != nil {
				return err
			}
		}
		return nil
	case yaml.MappingNode:
		for i := 0; i+1 < len(from.Content); i += 2 {
			if child(n, from.Content[i].Value) == nil {
				n.Content = append(n.Content, from.Content[i], from.Content[i+1])
			}
		}
		return nil
	}
	return errors.New("a merge key needs a mapping")
}

// child returns the value of a key of a mapping, nil if there is none.
func child(n *yaml.Node, key string) *yaml.Node {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

// text returns the string below a path of keys, empty if there is none.
func text(n *yaml.Node, keys ...string) string {
	for _, k := range keys {
		n = child(n, k)
	}
	if n == nil || !isString(n) {
		return ""
	}
	return n.Value
}

// pathStep is one step of a field path: name, [index] or [key].
var pathStep = regexp.MustCompile(`\[[^\]]*\]|[^.\[\]]+`)

// lineOf returns the line of the field, or of the innermost part of its path
// that is there.
func lineOf(root *yaml.Node, path string) int {
	n, line := root, root.Line
	for _, step := range pathStep.FindAllString(path, -1) {
		step = strings.Trim(step, "[]")
		switch n.Kind {
		case yaml.MappingNode:
			next := child(n, step)
			if next == nil {
				return line
			}
			for i := 0; i+1 < len(n.Content); i += 2 {
				if n.Content[i+1] == next {
					line = n.Content[i].Line
				}
			}
			n = next
		case yaml.SequenceNode:
			i, err := strconv.Atoi(step)
			if err != nil || i < 0 || i >= len(n.Content) {
				return line
			}
			n = n.Content[i]
			line = n.Line
		default:
			return line
		}
	}
	return line
}

// A decoder fills Go values from YAML nodes by their json tags, as strictly as
// an API server does with fieldValidation=Strict, and goes on after an error.
// (Decoders of JSON lose the line, and stop at the first error.)
type decoder struct {
	types typeCache
	errs  []fieldError
}

func (d *decoder) fail(n *yaml.Node, path, format string, args ...any) {
	d.errs = append(d.errs, fieldError{n.Line, strings.TrimPrefix(path, "."), fmt.Sprintf(format, args...)})
}

var unmarshaler = reflect.TypeFor[json.Unmarshaler]()

func (d *decoder) decode(n *yaml.Node, v reflect.Value, path string) {
	if tagOf(n) == "!!null" {
		return
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		d.decode(n, v.Elem(), path)
		return
	}
	if v.Addr().Type().Implements(unmarshaler) {
		d.decodeJSON(n, v, path)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.decodeStruct(n, v, path)
	case reflect.Map:
		d.decodeMap(n, v, path)
	case reflect.Slice:
		d.decodeSlice(n, v, path)
	case reflect.String:
		if d.want(n, path, isString(n), "a string") {
			v.SetString(n.Value)
		}
	case reflect.Bool:
		var b bool
		plain := n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle) == 0
		if d.want(n, path, n.Kind == yaml.ScalarNode && plain && n.Decode(&b) == nil, "true or false") {
			v.SetBool(b)
		}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		var i int64
		if !d.want(n, path, tagOf(n) == "!!int" && n.Decode(&i) == nil, "an integer") {
			return
		}
		if v.OverflowInt(i) {
			d.fail(n, path, "%d is out of range", i)
			return
		}
		v.SetInt(i)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		var i uint64
		if !d.want(n, path, tagOf(n) == "!!int" && n.Decode(&i) == nil, "an integer that is not negative") {
			return
		}
		if v.OverflowUint(i) {
			d.fail(n, path, "%d is out of range", i)
			return
		}
		v.SetUint(i)
	default:
		d.decodeJSON(n, v, path)
	}
}

// want reports a type error unless ok.
func (d *decoder) want(n *yaml.Node, path string, ok bool, what string) bool {
	if !ok {
		d.fail(n, path, "must be %s, is %s", what, describe(n))
	}
	return ok
}

func (d *decoder) decodeStruct(n *yaml.Node, v reflect.Value, path string) {
	if !d.want(n, path, n.Kind == yaml.MappingNode, "a mapping") {
		return
	}
	fields := d.types.fields(v.Type())
	d.pairs(n, func(key, value *yaml.Node) {
		at := path + "." + key.Value
		index, ok := fields[key.Value]
		if !ok {
			d.fail(key, at, "unknown field")
			return
		}
		d.decode(value, fieldByIndex(v, index), at)
	}, func(key string) string { return path + "." + key })
}

// fieldByIndex is v.FieldByIndex that allocates embedded pointers.
func fieldByIndex(v reflect.Value, index []int) reflect.Value {
	for _, i := range index {
		if v.Kind() == reflect.Pointer {
			if v.IsNil() {
				v.Set(reflect.New(v.Type().Elem()))
			}
			v = v.Elem()
		}
		v = v.Field(i)
	}
	return v
}

func (d *decoder) decodeMap(n *yaml.Node, v reflect.Value, path string) {
	if !d.want(n, path, n.Kind == yaml.MappingNode, "a mapping") {
		return
	}
	v.Set(reflect.MakeMap(v.Type()))
	at := func(key string) string { return path + "[" + key + "]" }
	d.pairs(n, func(key, value *yaml.Node) {
		elem := reflect.New(v.Type().Elem()).Elem()
		d.decode(value, elem, at(key.Value))
		v.SetMapIndex(reflect.ValueOf(key.Value).Convert(v.Type().Key()), elem)
	}, at)
}

// pairs calls do for each key and value, and reports keys that are no scalars
// or there twice.
func (d *decoder) pairs(n *yaml.Node, do func(key, value *yaml.Node), at func(key string) string) {
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		if key.Kind != yaml.ScalarNode {
			d.fail(key, at(""), "a key must be a string, is %s", describe(key))
			continue
		}
		if line, ok := seen[key.Value]; ok {
			d.fail(key, at(key.Value), "already given in line %d", line)
			continue
		}
		seen[key.Value] = key.Line
		do(key, n.Content[i+1])
	}
}

func (d *decoder) decodeSlice(n *yaml.Node, v reflect.Value, path string) {
	if v.Type().Elem().Kind() == reflect.Uint8 {
		d.decodeJSON(n, v, path) // bytes are written in base64
		return
	}
	if !d.want(n, path, n.Kind == yaml.SequenceNode, "a list") {
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
	for i, item := range n.Content {
		d.decode(item, v.Index(i), fmt.Sprintf("%s[%d]", path, i))
	}
}

// decodeJSON is for types that know their own form, times and quantities for example.
func (d *decoder) decodeJSON(n *yaml.Node, v reflect.Value, path string) {
	x, err := toAny(n)
	if err != nil {
		d.fail(n, path, "%v", err)
		return
	}
	data, err := json.Marshal(x)
	if err == nil {
		err = json.Unmarshal(data, v.Addr().Interface())
	}
	if err != nil {
		d.fail(n, path, "%v", err)
	}
}

// toAny returns what encoding/json would make of the node's JSON.
func toAny(n *yaml.Node) (any, error) {
	switch n.Kind {
	case yaml.SequenceNode:
		list := make([]any, len(n.Content))
		for i, item := range n.Content {
			x, err := toAny(item)
			if err != nil {
				return nil, err
			}
			list[i] = x
		}
		return list, nil
	case yaml.MappingNode:
		m := map[string]any{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			x, err := toAny(n.Content[i+1])
			if err != nil {
				return nil, err
			}
			m[n.Content[i].Value] = x
		}
		return m, nil
	}
	if isString(n) {
		return n.Value, nil
	}
	var x any
	err := n.Decode(&x)
	return x, err
}

// tagOf is the short tag of a node, "!!str" for example.
func tagOf(n *yaml.Node) string { return n.ShortTag() }

// isString: what looks like a date is a string in Kubernetes.
func isString(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && (tagOf(n) == "!!str" || tagOf(n) == "!!timestamp")
}

func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch tagOf(n) {
	case "!!str", "!!timestamp":
		return "the string " + strconv.Quote(n.Value)
	case "!!int":
		return "the integer " + n.Value
	case "!!float":
		return "the number " + n.Value
	case "!!bool":
		return n.Value
	}
	return tagOf(n)
}

// A typeCache has the index of each field of a struct by its name in JSON.
type typeCache map[reflect.Type]map[string][]int

func (c typeCache) fields(t reflect.Type) map[string][]int {
	fields, ok := c[t]
	if !ok {
		fields = map[string][]int{}
		addFields(fields, t, nil)
		c[t] = fields
	}
	return fields
}

func addFields(fields map[string][]int, t reflect.Type, index []int) {
	for i := range t.NumField() {
		f := t.Field(i)
		at := append(index[:len(index):len(index)], i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		inner := f.Type
		if inner.Kind() == reflect.Pointer {
			inner = inner.Elem()
		}
		switch {
		case name == "-" || !f.IsExported():
		case inner.Kind() == reflect.Struct && name == "" && (f.Anonymous || options == "inline"):
			addFields(fields, inner, at)
		case name == "":
			fields[f.Name] = at
		default:
			fields[name] = at
		}
	}
}

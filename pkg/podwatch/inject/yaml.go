package inject

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// A Result is what became of a file.
type Result struct {
	// YAML is the file with sidecars.
	YAML []byte
	// Injected counts the pods and pod templates that were changed.
	Injected int
	// Notes name the pods and pod templates that got no sidecar although nobody
	// said so, and why.
	Notes []string
}

// Inject returns the YAML of a file with a sidecar in each pod and pod template
// that needs one. The name is for errors and notes. An error is all that is
// wrong with the file.
func (in *Injector) Inject(name string, data []byte) (Result, error) {
	var r Result
	var out bytes.Buffer
	var errs []error
	line := 0
	for i, text := range split(data) {
		f := file{in: in, place: fmt.Sprintf("%s, document %d", name, i+1), before: line}
		line += bytes.Count(text, []byte("\n"))
		changed, err := f.document(text)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out.Write(changed)
		r.Injected += f.injected
		r.Notes = append(r.Notes, f.notes...)
	}
	if err := errors.Join(errs...); err != nil {
		return Result{}, err
	}
	r.YAML = out.Bytes()
	return r, nil
}

// split cuts a file in front of every line that begins a document, without
// parsing it: put together, the parts are the file.
func split(data []byte) [][]byte {
	var parts [][]byte
	start, content := 0, false
	for pos := 0; pos < len(data); {
		end := len(data)
		if i := bytes.IndexByte(data[pos:], '\n'); i >= 0 {
			end = pos + i + 1
		}
		line := data[pos:end]
		if isSeparator(line) {
			// Comments and directives in front of the first "---" belong to it.
			if content {
				parts = append(parts, data[start:pos])
				start = pos
			}
			content = true
		} else if s := bytes.TrimSpace(line); len(s) > 0 && s[0] != '#' && s[0] != '%' {
			content = true
		}
		pos = end
	}
	if start < len(data) {
		parts = append(parts, data[start:])
	}
	return parts
}

// isSeparator says whether a document begins with this line.
func isSeparator(line []byte) bool {
	return bytes.HasPrefix(line, []byte("---")) && (len(line) == 3 || strings.IndexByte(" \t\r\n", line[3]) >= 0)
}

// A file is the work on one document.
type file struct {
	in       *Injector
	place    string
	before   int // lines of the file before the document
	injected int
	notes    []string
}

// document returns the text of a document with sidecars; if it needs none, the
// same bytes.
func (f *file) document(text []byte) ([]byte, error) {
	docs, err := parse(text, f.before)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.place, err)
	}
	var errs []error
	for i, doc := range docs {
		if len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
			continue // not an object
		}
		if err := tooDeep(doc, 0); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f.place, err))
			continue
		}
		if hasAlias(doc) {
			if doc, err = expand(doc); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", f.place, err))
				continue
			}
			docs[i] = doc
		}
		if err := f.object(field{node: doc.Content[0]}); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil || f.injected == 0 {
		return text, err
	}
	changed, err := encode(text, docs)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.place, err)
	}
	return changed, nil
}

// yamlLine is how the YAML parser reports a place.
var yamlLine = regexp.MustCompile(`^yaml: line ([0-9]+): `)

// parse returns the documents of a part, of which "..." may make several. Lines
// are those of the file, which has some before the part.
func parse(text []byte, before int) ([]*yaml.Node, error) {
	var docs []*yaml.Node
	for dec := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var n yaml.Node
		err := dec.Decode(&n)
		if errors.Is(err, io.EOF) {
			return docs, nil
		}
		if err != nil {
			message := err.Error()
			if m := yamlLine.FindStringSubmatch(message); m != nil {
				if line, err := strconv.Atoi(m[1]); err == nil {
					return nil, fmt.Errorf("line %d: %s", before+line, message[len(m[0]):])
				}
			}
			return nil, errors.New(strings.TrimPrefix(message, "yaml: "))
		}
		shift(&n, before)
		docs = append(docs, &n)
	}
}

// shift moves all lines.
func shift(n *yaml.Node, by int) {
	n.Line += by
	for _, child := range n.Content {
		shift(child, by)
	}
}

// encode writes documents in the style of the text that they were read from.
func encode(text []byte, docs []*yaml.Node) ([]byte, error) {
	var out bytes.Buffer
	// The separator and the directives in front of it.
	for line := range bytes.Lines(text) {
		trimmed := bytes.TrimSpace(line)
		if isSeparator(line) {
			out.WriteString("---\n") // a comment behind it is the first node's
			break
		}
		if len(trimmed) > 0 && trimmed[0] != '%' {
			break // no separator; comments are the nodes'
		}
		out.Write(line)
	}
	indent, compact := style(docs[0])
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(indent)
	if compact {
		enc.CompactSeqIndent()
	}
	for _, doc := range docs {
		if len(doc.Content) == 1 && doc.Content[0].Style&yaml.FlowStyle != 0 {
			quote(doc) // as JSON wants it, which this may be
		}
		if err := enc.Encode(doc); err != nil {
			return nil, fmt.Errorf("write document: %w", err)
		}
	}
	if err := enc.Close(); err != nil {
		return nil, fmt.Errorf("write document: %w", err)
	}
	return out.Bytes(), compare(docs, out.Bytes())
}

// compare sees that text says what the documents say: odd tags, for one, do not
// survive being written.
func compare(docs []*yaml.Node, text []byte) error {
	written, err := parse(text, 0)
	if err != nil {
		return fmt.Errorf("cannot be written anew: %w; write it in plainer YAML", err)
	}
	if len(written) != len(docs) {
		return fmt.Errorf("%d documents became %d; separate them by \"---\"", len(docs), len(written))
	}
	for i := range docs {
		var want, got any
		if err := errors.Join(docs[i].Decode(&want), written[i].Decode(&got)); err != nil {
			return fmt.Errorf("cannot be read: %w", err)
		}
		if !reflect.DeepEqual(want, got) {
			return errors.New("would mean something else when written anew; write it in plainer YAML, without tags")
		}
	}
	return nil
}

// style finds how far a document indents, and whether it writes the items of a
// list below the first letter of its name.
func style(n *yaml.Node) (indent int, compact bool) {
	indent, compact = 0, true
	list := false
	var walk func(n *yaml.Node)
	walk = func(n *yaml.Node) {
		if n.Kind == yaml.MappingNode && n.Style&yaml.FlowStyle == 0 {
			for i := 0; i+1 < len(n.Content); i += 2 {
				key, value := n.Content[i], n.Content[i+1]
				if value.Style&yaml.FlowStyle != 0 || len(value.Content) == 0 || key.Column == 0 {
					continue
				}
				switch first := value.Content[0].Column; { // an anchor may be in front of the value's own
				case value.Kind == yaml.MappingNode && indent == 0:
					indent = first - key.Column
				case value.Kind == yaml.SequenceNode && !list:
					list, compact = true, first-len("- ") == key.Column
				}
			}
		}
		for _, child := range n.Content {
			walk(child)
		}
	}
	walk(n)
	if indent < 2 || indent > 8 {
		indent = 2
	}
	return indent, compact
}

// quote puts all texts into double quotes.
func quote(n *yaml.Node) {
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!str" {
		n.Tag, n.Style = "!!str", yaml.DoubleQuotedStyle
	}
	for _, child := range n.Content {
		quote(child)
	}
}

// template returns where the pod template is in objects of a kind: nil if there
// is none, no names at all if the object is a pod.
func template(apiVersion, kind string) (path []string, ok bool) {
	group, _, grouped := strings.Cut(apiVersion, "/")
	if !grouped {
		group = ""
	}
	switch {
	case group == "" && kind == "Pod":
		return nil, true
	case group == "" && kind == "PodTemplate":
		return []string{"template"}, true
	case group == "" && kind == "ReplicationController",
		group == "batch" && kind == "Job",
		group == "apps" && slices.Contains([]string{"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"}, kind):
		return []string{"spec", "template"}, true
	case group == "batch" && kind == "CronJob":
		return []string{"spec", "jobTemplate", "spec", "template"}, true
	}
	return nil, false
}

// object injects into an object, or into the items of a list.
func (f *file) object(object field) error {
	apiVersion, kind := plain(object.node, "apiVersion"), plain(object.node, "kind")
	if strings.HasSuffix(kind, "List") {
		items, err := object.get("items")
		if err != nil {
			return fmt.Errorf("%s, %s: %w", f.place, kind, err)
		}
		list, err := items.items()
		if err != nil {
			return nil //nolint:nilerr // a kind of somebody else whose items are something else
		}
		var errs []error
		for _, item := range list {
			if item.node.Kind == yaml.MappingNode {
				errs = append(errs, f.object(item))
			}
		}
		return errors.Join(errs...)
	}
	path, ok := template(apiVersion, kind)
	if !ok {
		return nil
	}
	name := plain(object.node, "metadata", "name")
	namespace := plain(object.node, "metadata", "namespace")
	if name == "" {
		name = plain(object.node, "metadata", "generateName")
	}
	if namespace != "" {
		name = namespace + "/" + name
	}
	place := fmt.Sprintf("%s, %s %s", f.place, kind, name)
	if slices.Contains(f.in.excluded, namespace) {
		f.notes = append(f.notes, fmt.Sprintf("%s: not injected: nothing is in namespace %s", place, namespace))
		return nil
	}
	at, err := object.at(path...)
	if err != nil {
		return fmt.Errorf("%s: %w", place, err)
	}
	if at.node == nil {
		return fmt.Errorf("%s: %s: is missing", place, at.path)
	}
	pod, skipped, err := f.in.read(at)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", place, err)
	case skipped != nil:
		if !skipped.quiet {
			f.notes = append(f.notes, place+": not injected: "+skipped.reason)
		}
		return nil
	}
	if err := f.in.inject(pod); err != nil {
		return fmt.Errorf("%s: %w", place, err)
	}
	f.injected++
	return nil
}

// plain returns a text of an object that may be anything: empty if it is not
// there or no text.
func plain(n *yaml.Node, names ...string) string {
	f, err := field{node: n}.at(names...)
	if err != nil || f.node == nil || f.node.Kind != yaml.ScalarNode {
		return ""
	}
	return f.node.Value
}

package podwatch

import (
	"bytes"
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// A Problem is something wrong with a document.
type Problem struct {
	// File is the name inside the directory; for problems of the directory
	// itself it is its path and Line is 0.
	File string
	// Line counts from 1.
	Line int
	// Object names the object ("Service shop/details"), as far as it is known.
	Object string
	// Field is the path of the field ("spec.ports[0].port"), empty if the
	// problem is not in one field.
	Field   string
	Message string
}

// String is of the form "file:line: object: field: message", without the parts
// that are empty.
func (p Problem) String() string {
	place := p.File
	if p.Line > 0 {
		place = fmt.Sprintf("%s:%d", p.File, p.Line)
	}
	parts := slices.DeleteFunc([]string{place, p.Object, p.Field, p.Message}, func(s string) bool { return s == "" })
	return strings.Join(parts, ": ")
}

// A typeMeta is what says how the rest of a document is to be read.
type typeMeta struct{ apiVersion, kind string }

// A reader reads one kind of document: decode with strict types, then
// validate, then convert. Notes are about what the document asks for and does
// not get; the object is used nevertheless.
type reader struct {
	namespaced bool
	read       func(*yaml.Node, *decoder) (o decoded, invalid, notes field.ErrorList)
}

// A decoded object is one of the typed objects.
type decoded struct {
	object Object
	// unjudged pods have no Ready condition.
	unjudged bool
}

// readers has all kinds that the file source knows; the next one is one entry.
func readers() map[typeMeta]reader {
	return map[typeMeta]reader{
		{"v1", "Node"}: readAs(false, validateNode, nil, func(in *corev1.Node) decoded {
			return decoded{object: convertNode(in)}
		}),
		{"v1", "Namespace"}: readAs(false, validateNamespace, nil, func(in *corev1.Namespace) decoded {
			return decoded{object: convertNamespace(in)}
		}),
		{"v1", "Pod"}: readAs(true, validatePod, nil, func(in *corev1.Pod) decoded {
			return decoded{object: convertPod(in), unjudged: readyCondition(in) == nil}
		}),
		{"v1", "Service"}: readAs(true, validateService, nil, func(in *corev1.Service) decoded {
			return decoded{object: convertService(in)}
		}),
		{"discovery.k8s.io/v1", "EndpointSlice"}: readAs(true, validateSlice, nil, func(in *discoveryv1.EndpointSlice) decoded {
			return decoded{object: convertSlice(in)}
		}),
		{"gateway.networking.k8s.io/v1", "HTTPRoute"}: readAs(true, validateRoute, notesRoute, func(in *gatewayv1.HTTPRoute) decoded {
			return decoded{object: convertRoute(in)}
		}),
	}
}

// A kubernetesObject is a pointer to a Kubernetes object of type T.
type kubernetesObject[T any] interface {
	*T
	SetNamespace(string)
	GetNamespace() string
}

func readAs[T any, P kubernetesObject[T]](namespaced bool, validate, notes func(P) field.ErrorList, convert func(P) decoded) reader {
	return reader{namespaced, func(n *yaml.Node, d *decoder) (decoded, field.ErrorList, field.ErrorList) {
		in := P(new(T))
		d.decode(n, reflect.ValueOf(in).Elem(), "")
		if len(d.errs) > 0 {
			return decoded{}, nil, nil
		}
		if namespaced && in.GetNamespace() == "" {
			in.SetNamespace(corev1.NamespaceDefault)
		}
		if invalid := validate(in); len(invalid) > 0 {
			return decoded{}, invalid, nil
		}
		if notes == nil {
			return convert(in), nil, nil
		}
		return convert(in), nil, notes(in)
	}}
}

// A document is what became of one document of a file.
type document struct {
	line int
	// key is what the document is about, as far as it says so; the zero Key
	// if it does not. The kind may be one that Sluice does not know.
	key Key
	// decoded is empty if the document is broken or of an unknown kind.
	decoded
	unknownKind bool
	problems    []Problem
}

// A parser reads files. It is not safe for concurrent use.
type parser struct {
	readers map[typeMeta]reader
	types   typeCache
}

func newParser() *parser { return &parser{readers: readers(), types: typeCache{}} }

// parse reads all documents of a file. It never fails: what is wrong is in the
// documents' problems.
func (p *parser) parse(file string, data []byte) []document {
	if strings.HasSuffix(file, ".json") {
		// JSON allows tabs between tokens (and never elsewhere), YAML does not.
		data = bytes.ReplaceAll(data, []byte("\t"), []byte(" "))
	}
	var docs []document
	for _, c := range split(data) {
		roots, err := parseChunk(c)
		for _, root := range roots {
			docs = p.readDocument(docs, file, root)
		}
		if err != nil {
			docs = append(docs, document{line: c.line, problems: []Problem{{File: file, Line: err.line, Message: err.message}}})
		}
	}
	return docs
}

// readDocument appends what root holds: one object, or those of a List.
func (p *parser) readDocument(docs []document, file string, root *yaml.Node) []document {
	tm := typeMeta{text(root, "apiVersion"), text(root, "kind")}
	if items := child(root, "items"); tm == (typeMeta{"v1", "List"}) && items != nil && items.Kind == yaml.SequenceNode {
		for _, item := range items.Content {
			docs = p.readDocument(docs, file, item)
		}
		return docs
	}
	d := document{line: root.Line}
	problem := func(line int, field, message string) {
		d.problems = append(d.problems, Problem{File: file, Line: line, Object: d.key.object(), Field: field, Message: message})
	}
	r, known := p.readers[tm]
	name := text(root, "metadata", "name")
	switch {
	case root.Kind != yaml.MappingNode:
		problem(root.Line, "", "must be a mapping, is "+describe(root))
		return append(docs, d)
	case tm.kind == "" || tm.apiVersion == "":
		missing := "kind"
		if tm.kind != "" {
			missing = "apiVersion"
		}
		problem(lineOf(root, missing), missing, "Required value")
		return append(docs, d)
	case name != "":
		d.key = Key{Kind(tm.kind), text(root, "metadata", "namespace"), name}
		if d.key.Namespace == "" && (r.namespaced || !known) {
			d.key.Namespace = corev1.NamespaceDefault
		}
	}
	if !known {
		d.unknownKind = true
		problem(lineOf(root, "kind"), "", fmt.Sprintf("unknown kind %s of %s, ignored", tm.kind, tm.apiVersion))
		return append(docs, d)
	}
	dec := decoder{types: p.types}
	got, invalid, notes := r.read(root, &dec)
	for _, e := range dec.errs {
		problem(e.line, e.field, e.message)
	}
	for _, e := range append(invalid, notes...) {
		problem(lineOf(root, e.Field), e.Field, e.ErrorBody())
	}
	slices.SortStableFunc(d.problems, compareProblems)
	d.decoded = got
	return append(docs, d)
}

// object names an object for people, "" for the zero Key.
func (k Key) object() string {
	switch {
	case k.Name == "":
		return ""
	case k.Namespace == "":
		return fmt.Sprintf("%s %s", k.Kind, k.Name)
	}
	return fmt.Sprintf("%s %s/%s", k.Kind, k.Namespace, k.Name)
}

func compareProblems(a, b Problem) int {
	return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line),
		strings.Compare(a.Field, b.Field), strings.Compare(a.Message, b.Message))
}

package inject

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/api/resource"
)

// annotationPrefix comes before the names of all annotations here.
const annotationPrefix = "sluice.dev/"

// A description is sidecar.yaml; the comments there say what its fields mean.
type description struct {
	Parameters []parameter       `yaml:"parameters"`
	Labels     map[string]string `yaml:"labels"`
	Container  yaml.Node         `yaml:"container"`
}

// A parameter is something that may differ from sidecar to sidecar.
type parameter struct {
	Name       string `yaml:"name"`
	Value      string `yaml:"value"`
	Annotation string `yaml:"annotation"`
	Kind       kind   `yaml:"kind"`
	NotAbove   string `yaml:"notAbove"`
}

// A kind says which texts a parameter takes.
type kind string

const (
	kindText     kind = "text"
	kindLevel    kind = "level"
	kindQuantity kind = "quantity"
	kindCount    kind = "count"
	kindUID      kind = "uid"
	kindDrain    kind = "drain"
)

// numeric says whether fields of this kind hold a number.
func (k kind) numeric() bool { return k == kindUID || k == kindDrain }

func (k kind) valid() bool {
	return slices.Contains([]kind{kindText, kindLevel, kindQuantity, kindCount, kindUID, kindDrain}, k)
}

var (
	text  = regexp.MustCompile(`^[^\s]+$`)
	digit = regexp.MustCompile(`^[0-9]{1,10}$`)
)

// check returns what k wants if it does not want s. The policy says the same.
func (k kind) check(s string) error {
	switch k {
	case kindLevel:
		if !slices.Contains([]string{"trace", "debug", "info", "warning", "error", "critical", "off"}, s) {
			return errors.New("want trace, debug, info, warning, error, critical or off")
		}
	case kindQuantity:
		if q, err := resource.ParseQuantity(s); err != nil || q.Sign() <= 0 {
			return errors.New("want a quantity above 0, such as 100m or 128Mi")
		}
	case kindUID:
		if n, err := strconv.ParseInt(s, 10, 64); err != nil || !digit.MatchString(s) || s[0] == '0' || n > math.MaxInt32 {
			return errors.New("want a user ID from 1 to 2147483647")
		}
	case kindCount, kindDrain:
		if n, err := strconv.ParseInt(s, 10, 64); err != nil || !digit.MatchString(s) || n > math.MaxInt32 {
			return errors.New("want a number from 0 to 2147483647")
		}
	default:
		if !text.MatchString(s) {
			return errors.New("want a text without white space")
		}
	}
	return nil
}

// parseDescription reads sidecar.yaml and sees that it makes sense.
func parseDescription(data []byte) (description, error) {
	var d description
	dec := yaml.NewDecoder(strings.NewReader(string(data)))
	dec.KnownFields(true)
	if err := dec.Decode(&d); err != nil {
		return d, fmt.Errorf("parse description of the sidecar: %w", err)
	}
	known := map[string]bool{"bootstrap": true}
	for _, p := range d.Parameters {
		if !p.Kind.valid() || known[p.Name] || p.NotAbove != "" && !known[p.NotAbove] {
			return d, fmt.Errorf("parse description of the sidecar: parameter %+v: unknown kind, used name or unknown limit", p)
		}
		known[p.Name] = true
	}
	var walk func(n *yaml.Node) error
	walk = func(n *yaml.Node) error {
		n.HeadComment, n.LineComment, n.FootComment = "", "", ""
		if name, ok := strings.CutPrefix(n.Value, "$"); ok && !known[name] {
			return fmt.Errorf("parse description of the sidecar: line %d: %s is no parameter", n.Line, n.Value)
		}
		for _, child := range n.Content {
			if err := walk(child); err != nil {
				return err
			}
		}
		return nil
	}
	return d, walk(&d.Container)
}

// parameter returns the parameter of that name, which must be there.
func (d *description) parameter(name string) parameter {
	i := slices.IndexFunc(d.Parameters, func(p parameter) bool { return p.Name == name })
	return d.Parameters[i]
}

// annotations are the keys of all annotations, in the description's order.
func (d *description) annotations() []string {
	var keys []string
	for _, p := range d.Parameters {
		if p.Annotation != "" {
			keys = append(keys, annotationPrefix+p.Annotation)
		}
	}
	return keys
}

// labels are the labels in a fixed order.
func (d *description) labels() []string { return slices.Sorted(maps.Keys(d.Labels)) }

package inject

import (
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Sources are the files of the chart that an Injector works by.
type Sources struct {
	Sidecar   []byte // files/sidecar.yaml
	Bootstrap []byte // files/bootstrap.yaml
	Values    []byte // values.yaml, the defaults
}

// Options say how an Injector differs from the chart's defaults.
type Options struct {
	// Values is a file of values as Helm takes it, nil for none. What injection
	// does not need is not looked at.
	Values []byte
	// Set replaces values by the name of an Annotation, after Values.
	Set map[string]string
	// ReleaseNamespace is where Sluice itself runs. Nothing is injected there.
	ReleaseNamespace string
}

// An Injector adds sidecars to YAML.
type Injector struct {
	description description
	bootstrap   string
	defaults    map[string]string // by name of parameter
	excluded    []string          // namespaces
}

// New returns an Injector. A wrong value is an error that names it as the
// chart's values do.
func New(s Sources, o Options) (*Injector, error) {
	d, err := parseDescription(s.Sidecar)
	if err != nil {
		return nil, err
	}
	values, err := parseValues(nil, s.Values)
	if err != nil {
		return nil, fmt.Errorf("parse the chart's values: %w", err)
	}
	if values, err = parseValues(values, o.Values); err != nil {
		return nil, fmt.Errorf("parse values: %w", err)
	}
	in := &Injector{description: d, bootstrap: string(s.Bootstrap), defaults: make(map[string]string)}
	var errs []error
	set := maps.Clone(o.Set)
	for _, p := range d.Parameters {
		what := "value " + p.Value
		v, err := scalar(lookup(values, p.Value))
		if over, ok := set[p.Annotation]; ok && p.Annotation != "" {
			what, v, err = p.Annotation, over, nil
			delete(set, p.Annotation)
		}
		// Without a quantity the sidecar has no such request or limit.
		if err == nil && (v != "" || p.Kind != kindQuantity) {
			err = p.Kind.check(v)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %q: %w", what, v, err))
		}
		in.defaults[p.Name] = v
	}
	for _, name := range slices.Sorted(maps.Keys(set)) {
		errs = append(errs, fmt.Errorf("%s: there is no such annotation", name))
	}
	in.excluded = []string{"kube-system"}
	if o.ReleaseNamespace != "" {
		in.excluded = append(in.excluded, o.ReleaseNamespace)
	}
	for _, path := range []string{"excludeNamespaces", "injection.excludeNamespaces"} {
		list, err := stringList(lookup(values, path))
		if err != nil {
			errs = append(errs, fmt.Errorf("value %s: %w", path, err))
		}
		in.excluded = append(in.excluded, list...)
	}
	return in, errors.Join(errs...)
}

// An Annotation is a setting that a pod can make for itself.
type Annotation struct {
	// Name is the key after sluice.dev/.
	Name string
	// Wants tells which values there are.
	Wants string
	// Default is the value of the chart, empty for none.
	Default string
}

// Annotations returns the settings that a pod can make for itself, which are
// also those that Options.Set takes.
func Annotations(s Sources) ([]Annotation, error) {
	in, err := New(s, Options{})
	if err != nil {
		return nil, err
	}
	var list []Annotation
	for _, p := range in.description.Parameters {
		if p.Annotation != "" {
			list = append(list, Annotation{Name: p.Annotation, Wants: string(p.Kind), Default: in.defaults[p.Name]})
		}
	}
	return list, nil
}

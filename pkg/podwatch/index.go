package podwatch

import (
	"cmp"
	"slices"
	"strings"
)

// A nsName is a namespaced name.
type nsName struct{ namespace, name string }

// A labelPair is one label in one namespace.
type labelPair struct{ namespace, key, value string }

// A selectorIndex finds the services that select a pod without asking all of
// them: each service is kept under one pair of its selector, the one that
// fewest others are kept under.
type selectorIndex struct {
	under map[labelPair]map[string]*Service
	pair  map[nsName]labelPair
}

func newSelectorIndex() selectorIndex {
	return selectorIndex{under: map[labelPair]map[string]*Service{}, pair: map[nsName]labelPair{}}
}

// put replaces the service of this name; one without a selector is removed.
func (x *selectorIndex) put(s *Service) {
	x.remove(nsName{s.Namespace, s.Name})
	if len(s.Selector) == 0 {
		return
	}
	var best labelPair
	for k, v := range s.Selector {
		p := labelPair{s.Namespace, k, v}
		if best == (labelPair{}) || len(x.under[p]) < len(x.under[best]) {
			best = p
		}
	}
	insert(x.under, best, s.Name, s)
	x.pair[nsName{s.Namespace, s.Name}] = best
}

func (x *selectorIndex) remove(n nsName) {
	if p, ok := x.pair[n]; ok {
		remove(x.under, p, n.name)
		delete(x.pair, n)
	}
}

// selecting returns the services that select such a pod, sorted by name.
func (x *selectorIndex) selecting(namespace string, labels map[string]string) []*Service {
	var found []*Service
	for k, v := range labels {
		for _, s := range x.under[labelPair{namespace, k, v}] {
			if selects(s.Selector, labels) {
				found = append(found, s)
			}
		}
	}
	sortObjects(found)
	return found
}

// A podIndex finds the pods that a selector selects without asking all of them.
type podIndex struct {
	pods  map[nsName]*Pod
	under map[labelPair]map[string]*Pod
}

func newPodIndex() podIndex {
	return podIndex{pods: map[nsName]*Pod{}, under: map[labelPair]map[string]*Pod{}}
}

func (x *podIndex) put(p *Pod) {
	x.remove(nsName{p.Namespace, p.Name})
	x.pods[nsName{p.Namespace, p.Name}] = p
	for k, v := range p.Labels {
		insert(x.under, labelPair{p.Namespace, k, v}, p.Name, p)
	}
}

func (x *podIndex) remove(n nsName) {
	p, ok := x.pods[n]
	if !ok {
		return
	}
	for k, v := range p.Labels {
		remove(x.under, labelPair{n.namespace, k, v}, n.name)
	}
	delete(x.pods, n)
}

// selected returns the pods of a service, sorted by name.
func (x *podIndex) selected(s *Service) []*Pod {
	var candidates map[string]*Pod
	first := true
	for k, v := range s.Selector {
		under := x.under[labelPair{s.Namespace, k, v}]
		if first || len(under) < len(candidates) {
			candidates, first = under, false
		}
	}
	var found []*Pod
	for _, p := range candidates {
		if selects(s.Selector, p.Labels) {
			found = append(found, p)
		}
	}
	sortObjects(found)
	return found
}

// selects says whether a selector that is not empty selects these labels.
func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return len(selector) > 0
}

// insert puts v under outer and inner key.
func insert[O, I comparable, V any](m map[O]map[I]V, outer O, inner I, v V) {
	if m[outer] == nil {
		m[outer] = map[I]V{}
	}
	m[outer][inner] = v
}

// remove undoes insert and leaves no empty map behind.
func remove[O, I comparable, V any](m map[O]map[I]V, outer O, inner I) {
	delete(m[outer], inner)
	if len(m[outer]) == 0 {
		delete(m, outer)
	}
}

func sortObjects[T Object](objects []T) {
	slices.SortFunc(objects, func(a, b T) int { return compareKeys(a.Key(), b.Key()) })
}

func compareKeys(a, b Key) int {
	return cmp.Or(strings.Compare(string(a.Kind), string(b.Kind)),
		strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
}

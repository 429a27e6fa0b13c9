package redirect

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Reconcile brings r from installed, which List has returned, to exactly want:
// what is absent or not whole or different is added, what is not wanted is
// removed, the rest is not touched, nor what is installed under an ID in keep.
// What changed since List does no harm: Add and Remove look for themselves. It
// goes on after an error with one workload and returns all of them joined.
// Workloads whose namespace is gone are skipped without an error.
func Reconcile(ctx context.Context, r Redirector, installed []Installed, want []Workload, keep []ID) error {
	have := make(map[ID]Installed, len(installed))
	for _, i := range installed {
		have[i.ID] = i
	}
	want = slices.Clone(want)
	slices.SortFunc(want, func(a, b Workload) int { return strings.Compare(a.ID.String(), b.ID.String()) })

	var errs []error
	for _, w := range want {
		i, ok := have[w.ID]
		delete(have, w.ID)
		if ok && i.Whole(w) {
			continue
		}
		if err := r.Add(ctx, w); err != nil && !errors.Is(err, ErrGone) {
			errs = append(errs, fmt.Errorf("redirect pod %s: %w", w.Pod, err))
		}
	}
	for _, i := range installed {
		if _, unwanted := have[i.ID]; !unwanted || slices.Contains(keep, i.ID) {
			continue
		}
		if err := r.Remove(ctx, i.ID); err != nil {
			errs = append(errs, fmt.Errorf("end redirection of pod %s: %w", i.Pod, err))
		}
	}
	return errors.Join(errs...)
}

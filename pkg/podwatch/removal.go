package podwatch

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// KindDaemonSet is the kind of the Health of a Removal. A Store never has it.
const KindDaemonSet Kind = "DaemonSet"

// RemovalOptions configure a Removal.
type RemovalOptions struct {
	Source *Kubernetes
	// Namespace and Name are those of the DaemonSet that the agent belongs to.
	Namespace, Name string
	// Log may be nil: discards.
	Log *slog.Logger
}

// A Removal tells whether the agent ends because Sluice is being removed from
// the cluster, and not because it is restarted or replaced: whether its own
// DaemonSet is deleted.
//
// It watches the DaemonSet all the time, because afterwards it is too late to
// ask: with the DaemonSet the agent's right to ask goes, in no certain order,
// and a watch that is open gets the last event all the same. What counts is the
// last that is known of the DaemonSet by its name:
//
//   - it was there and is gone, or has a deletionTimestamp (a deletion that
//     waits for the pods), or its namespace is being deleted: removed;
//   - it is there, be it another one by the same name: a DaemonSet that was
//     deleted and made again replaces the agent's pods, and the new agent takes
//     over what is installed;
//   - it was never seen, or the API cannot be asked: not removed. What is
//     installed stays: a node that was not cleaned up is put right by hand or by
//     the next agent, but nobody mends traffic that went past its proxy.
//
// If the DaemonSet is made again only after the agent asked, the agent removes
// everything and the new one, which waits for the old one's lock, installs it
// again.
type Removal struct {
	source          *Kubernetes
	namespace, name string
	health          *health
	log             *slog.Logger

	mu      sync.Mutex
	seen    bool // the DaemonSet was there once
	removed bool
	changed chan struct{} // closed at the next change
}

// daemonSets is the resource of DaemonSets.
func daemonSets() schema.GroupResource {
	return schema.GroupResource{Group: "apps", Resource: "daemonsets"}
}

// NewRemoval returns a Removal; Run does the work.
func NewRemoval(o RemovalOptions) (*Removal, error) {
	if o.Source == nil || o.Namespace == "" || o.Name == "" {
		return nil, errors.New("watch own DaemonSet: source, namespace or name is missing")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Removal{
		source: o.Source, namespace: o.Namespace, name: o.Name, log: o.Log,
		health: newHealth(o.Log), changed: make(chan struct{}),
	}, nil
}

// Run watches until ctx ends, then returns nil. ctx must outlive the signal that
// makes the agent ask Removed. It may be called once.
func (r *Removal) Run(ctx context.Context) error {
	client := r.source.access.metadata.Resource(daemonSets().WithVersion("v1")).Namespace(r.namespace)
	f := r.source.reflection
	f.health = r.health
	f.run(withKlog(ctx, r.log), readOne(KindDaemonSet, client, daemonSets(), r.name, r.set))
	return nil
}

// set takes what is now known of the DaemonSet, nil if it is not there.
func (r *Removal) set(o *metav1.PartialObjectMetadata) {
	r.health.setSynced(KindDaemonSet)
	r.mu.Lock()
	defer r.mu.Unlock()
	removed := r.seen && o == nil || o != nil && o.DeletionTimestamp != nil
	r.seen = r.seen || o != nil
	if removed != r.removed {
		r.removed = removed
		r.log.Info("own DaemonSet has changed", "daemonset", r.namespace+"/"+r.name, "removed", removed)
		close(r.changed)
		r.changed = make(chan struct{})
	}
}

func (r *Removal) state() (removed, seen bool, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.removed || r.namespaceEnds(), r.seen, r.changed
}

// namespaceEnds: in a namespace that is deleted the pods may go before the
// DaemonSet does.
func (r *Removal) namespaceEnds() bool {
	ns, ok := Get[*Namespace](r.source.store, "", r.namespace)
	return ok && ns.Terminating
}

// Removed says whether Sluice is being removed, as far as can be told before
// ctx ends: give it a deadline of a few seconds. It answers at once if the API
// server does, and waits for the watch's last event if the server refuses.
func (r *Removal) Removed(ctx context.Context) bool {
	removed, seen, changed := r.state()
	if removed || !seen {
		return removed
	}
	client := r.source.access.metadata.Resource(daemonSets().WithVersion("v1")).Namespace(r.namespace)
	// A list without a resource version is not answered from a cache.
	now, err := client.List(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, r.name).String()})
	switch {
	case err == nil:
		return len(now.Items) == 0 || now.Items[0].DeletionTimestamp != nil
	case !apierrors.IsForbidden(err) && !apierrors.IsUnauthorized(err):
		r.log.Info("cannot ask whether the own DaemonSet is deleted: it is taken for a restart", "err", r.source.access.explain("list", daemonSets(), err))
		return false
	}
	// Our rights are gone already, and so may be the DaemonSet.
	select {
	case <-changed:
	case <-ctx.Done():
	}
	removed, _, _ = r.state()
	return removed
}

// Health says how well the DaemonSet is watched.
func (r *Removal) Health() KindHealth {
	if all := r.health.list(); len(all) > 0 {
		return all[0]
	}
	return KindHealth{Kind: KindDaemonSet}
}

// RemovalWait is a good deadline for Removed: the last event of a watch arrives
// within milliseconds or not at all.
const RemovalWait = 2 * time.Second

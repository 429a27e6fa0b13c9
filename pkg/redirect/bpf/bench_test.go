package bpf

import (
	"fmt"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/tests/netnstest"
)

// BenchmarkOperations measures what the agent does with one pod of both families
// while so many others are on the node.
func BenchmarkOperations(b *testing.B) {
	r := open(b, newOptions(b))
	node := netnstest.NewNode(b)
	others := 0
	for _, n := range []int{0, 200} {
		for ; others < n; others++ {
			mustAdd(b, r, workload(b, node.Pod(b, fmt.Sprintf("other%d", others))))
		}
		pod := node.Pod(b, fmt.Sprintf("pod%d", n))
		w := workload(b, pod)
		b.Run(fmt.Sprintf("add and remove/pods=%d", n+1), func(b *testing.B) {
			var add, remove time.Duration
			for b.Loop() {
				start := time.Now()
				mustAdd(b, r, w)
				added := time.Now()
				if err := r.Remove(b.Context(), w.ID); err != nil {
					b.Fatal(err)
				}
				add += added.Sub(start)
				remove += time.Since(added)
			}
			b.ReportMetric(float64(add.Microseconds())/float64(b.N), "us/add")
			b.ReportMetric(float64(remove.Microseconds())/float64(b.N), "us/remove")
		})
		mustAdd(b, r, w)
		for _, op := range []struct {
			name string
			do   func() error
		}{
			{"add what is there", func() error { return r.Add(b.Context(), w) }},
			{"list", func() error { _, err := r.List(b.Context()); return err }},
			{"counters", func() error { _, err := r.Counters(b.Context()); return err }},
		} {
			b.Run(fmt.Sprintf("%s/pods=%d", op.name, n+1), func(b *testing.B) {
				for b.Loop() {
					if err := op.do(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

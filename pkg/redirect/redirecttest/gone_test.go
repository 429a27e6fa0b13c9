package redirecttest

import (
	"strings"
	"testing"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/faultpoint"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// TestNamespaceGoneBeforeEachCall takes the pod's namespace away before every
// call of an operation. That ends, well or with a word of the namespace, and
// the next start leaves nothing behind.
func TestNamespaceGoneBeforeEachCall(t *testing.T) {
	need.EBPF(t)
	need.Tool(t, "iptables-restore")
	need.Tool(t, "ip6tables-restore")
	startHostPod(t, netnstest.NewNode(t))
	for _, d := range dangers() {
		if d.name != "add" && d.name != "change" && d.name != "remove" {
			continue
		}
		t.Run(string(d.node)+"/"+d.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, d)
			s.bring(nil, true)
			clean := s.around()
			for end, over := 0, false; !over; end++ {
				s.setPod(s.n.Pod(t, "pod"))
				s.bring(s.before, true)
				var before string
				calls, out := s.act(func(i int, c faultpoint.Call) faultpoint.Action {
					if i == end {
						before = c.Name
						s.pod.Remove(t)
					}
					return faultpoint.Go
				})
				over = calls <= end
				// It may have got through: the namespace lives as long as a thread is in it.
				if out != "" && !strings.Contains(out, redirect.ErrGone.Error()) {
					t.Errorf("namespace gone before call %d, %s: %s", end, before, out)
				}
				if over {
					if out != "" {
						t.Errorf("with nobody in its way: %s", out)
					}
					s.pod.Remove(t)
				}
				s.bring(nil, true)
				if diff := clean.Diff(s.around()); diff != "" {
					t.Errorf("namespace gone before call %d, %s: what the next start leaves (-want +got):\n%s", end, before, diff)
				}
				if t.Failed() {
					return
				}
			}
		})
	}
}

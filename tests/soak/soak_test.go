package soak

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/tests/netnstest"
	"github.com/sluicemesh/sluice/tests/sluicetest"
)

var duration = flag.Duration("duration", 0, "how long to soak, both backends together; 0: not at all")

func TestMain(m *testing.M) { os.Exit(netnstest.VerifyNoLeaks(m)) }

const ports = `{name: http, port: 80, targetPort: 8080}, {name: tcp-echo, port: 82, targetPort: 8082}`

// Addresses of the services.
const (
	web, web6       = "10.96.8.1", "fd00:96::81"
	anchor, anchor6 = "10.96.8.2", "fd00:96::82"
	shaky, shaky6   = "10.96.8.3", "fd00:96::83"
)

// TestSoak has two halves. In the first one the agent is killed and ended again
// and again. In the second one it lives, so that it can be seen whether it grows.
// In both, pods of a service are replaced and a proxy is killed.
func TestSoak(t *testing.T) {
	if *duration == 0 {
		t.Skip("make soak runs it")
	}
	half := *duration / 4
	if os.Getenv("BACKEND") != "" {
		half = *duration / 2
	}
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		s := newSoak(t, backend)
		began := time.Now()
		for round := 0; round < 2 || time.Since(began) < half; round++ {
			s.replaceAgent(round%2 == 0)
			s.roll()
			s.restartProxy()
		}
		s.roll() // what the last agent needs at first, it has then
		before := s.sample()
		for round := 0; round < 2 || time.Since(began) < 2*half; round++ {
			s.roll()
			s.restartProxy()
		}
		after := s.sample()
		s.load.finish()
		s.wantDrained()
		fmt.Printf("\n%s, %v:\n%s\n", backend, time.Since(began).Round(time.Second), s.table(before, after))
		s.judge(before, after)
	})
}

// A soak is a node with its pods, what happens to them, and their traffic.
type soak struct {
	*testing.T
	n              *sluicetest.Node
	client, anchor *sluicetest.Pod
	shaky          *sluicetest.Pod
	web            *member
	rolled         int
	killed, ended  int
	restarted      int
	load           *load
}

func newSoak(t *testing.T, backend string) *soak {
	s := &soak{T: t, n: sluicetest.New(t, backend)}
	s.n.Service(t, "web", web, web6, ports)
	s.n.Service(t, "anchor", anchor, anchor6, ports)
	s.n.Service(t, "shaky", shaky, shaky6, ports)
	s.anchor = s.n.Pod(t, "anchor", sluicetest.PodSpec{})
	s.shaky = s.n.Pod(t, "shaky", sluicetest.PodSpec{})
	for _, p := range []*sluicetest.Pod{s.anchor, s.shaky} {
		stop := serve(t, p)
		t.Cleanup(stop)
	}
	s.client = s.n.Pod(t, "client", sluicetest.PodSpec{})
	plain := s.n.Pod(t, "plain", sluicetest.PodSpec{Plain: true})
	s.web = s.join()
	for _, name := range []string{"web", "anchor", "shaky"} {
		s.client.WaitService(t, name, 80, 1)
		s.client.WaitService(t, name, 82, 1)
	}
	s.load = newLoad(t)
	for i, a := range []string{web, "[" + web6 + "]"} {
		s.load.start(fmt.Sprintf("http, kept connections, IPv%d", 4+2*i), nil, s.load.request(s.client, "http://"+a+"/", true))
		s.load.start(fmt.Sprintf("http, new connections, IPv%d", 4+2*i), nil, s.load.request(s.client, "http://"+a+"/", false))
	}
	s.load.start("tcp, 1 MiB streams", nil, stream(s.client, anchor+":82", 1<<20))
	s.load.start("tcp, one connection all the time", nil, s.longConversation(anchor+":82"))
	s.load.start("http, from a pod without a sidecar", nil, s.load.request(plain, "http://"+s.anchor.Addr4.String()+":8080/", false))
	s.load.start("http, to a proxy that is killed", []string{"proxy of shaky"}, s.load.request(s.client, "http://"+shaky+"/", false))
	s.load.start("tcp, past a proxy that is killed", []string{"proxy of shaky"}, stream(plain, s.shaky.Addr4.String()+":8082", 1<<16))
	return s
}

// A member is one pod of the service web.
type member struct {
	pod  *sluicetest.Pod
	stop func()
}

// apply writes the YAML of a pod of the service web.
func (s *soak) apply(name, metadata, ready string) {
	yaml := s.n.PodYAML(name, sluicetest.PodSpec{Metadata: ", labels: {app: web}" + metadata})
	s.n.Apply(s.T, "pod-"+name+".yaml", strings.TrimSuffix(yaml, "}")+fmt.Sprintf(", status: {conditions: [{type: Ready, status: %q}]}}", ready))
}

// join starts a pod of the service web.
func (s *soak) join() *member {
	name := fmt.Sprintf("web-%d", s.rolled)
	s.rolled++
	s.apply(name, "", "False")
	p := s.n.Sandbox(s.T, name)
	if err := p.Add(s.T); err != nil {
		s.Fatalf("CNI ADD of pod %s: %v", name, err)
	}
	s.Cleanup(func() {
		if m := s.web; m != nil && m.pod == p { // else it has left
			p.Del(s.T)
		}
	})
	p.StartEnvoy(s.T)
	m := &member{pod: p, stop: serve(s.T, p)}
	s.Cleanup(m.stop) // may be called again
	s.apply(name, "", "True")
	return m
}

// leave ends a pod as a cluster does: it leaves the endpoints first.
func (s *soak) leave(m *member) {
	m.pod.Envoy.Stop()
	m.stop()
	m.pod.Del(s.T)
	m.pod.Remove(s.T)
	if err := os.Remove(filepath.Join(s.n.Source, "pod-"+m.pod.Name+".yaml")); err != nil {
		s.Fatal(err)
	}
}

// roll replaces the pod of the service web.
func (s *soak) roll() {
	next := s.join()
	s.client.WaitService(s.T, "web", 80, 2)
	s.load.more(s.T, 50)
	s.apply(s.web.pod.Name, `, deletionTimestamp: "2026-01-01T00:00:00Z"`, "True")
	s.client.WaitService(s.T, "web", 80, 1)
	s.load.more(s.T, 50)
	s.leave(s.web)
	s.web = next
	s.load.more(s.T, 20)
}

// replaceAgent ends the agent, one way or the other, and starts the next.
func (s *soak) replaceAgent(kill bool) {
	if kill {
		s.n.KillAgent()
		s.killed++
	} else {
		s.n.EndAgent(s.T)
		s.ended++
	}
	s.load.more(s.T, 50)
	s.n.StartAgent(s.T)
	s.load.more(s.T, 50)
}

// restartProxy kills the proxy of shaky and starts it again.
func (s *soak) restartProxy() {
	over := s.load.cause("proxy of shaky")
	s.shaky.Envoy.Stop()
	s.load.more(s.T, 20)
	s.shaky.StartEnvoy(s.T)
	over()
	s.restarted++
	s.load.more(s.T, 20)
}

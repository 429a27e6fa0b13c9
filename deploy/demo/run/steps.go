package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"sigs.k8s.io/yaml"
)

// oneRequest follows one request through programs and Envoys.
func (n *node) oneRequest(ctx context.Context) error {
	n.out.heading("1. One request, hop by hop")
	const id = "demo-request-1"
	client := n.pod("client")
	// The cookie leads to a version of reviews that asks ratings.
	r, err := n.client(ctx, client, "-id="+id, "-cookie=user=tester")
	if err != nil {
		return err
	}
	if r.Failed > 0 {
		return fmt.Errorf("first request: %s", failures(r))
	}
	// How many requests each Envoy has seen then, in either direction.
	seen := map[string]int{"client": 1, "productpage": 3, "details-1": 1, "reviews-v2": 2, "ratings": 1}
	entries := map[string][]logEntry{}
	err = waitFor(ctx, "the access logs of the Envoys", nil, func() error {
		for name, want := range seen {
			if entries[name], err = accessLog(n.pod(name).envoy.log, id); err != nil {
				return err
			}
			if len(entries[name]) != want {
				return fmt.Errorf("that of pod %s has %d entries of the request, not %d", name, len(entries[name]), want)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	n.hop(entries, "client", "http://productpage:9080/", r.Local, r.Remote, *r.Last)
	return nil
}

// hop prints one call and then those that it led to: what the programs at both
// ends saw of their connections, and what their Envoys wrote into their access
// logs. All of that must fit together.
func (n *node) hop(entries map[string][]logEntry, caller, url string, local, remote netip.AddrPort, a answer) {
	from, to := n.pod(caller), n.pod(a.Host)
	vip := netip.AddrPortFrom(n.clusterIP(a.Service), 9080)
	var out, in logEntry
	for _, e := range entries[caller] {
		if e.Direction == "outbound" && e.Source == local {
			out = e
		}
	}
	for _, e := range entries[a.Host] {
		if e.Direction == "inbound" && e.UpstreamFrom == a.Peer {
			in = e
		}
	}
	n.out.line("%s calls %s", n.out.paint("1", caller), url)
	n.out.expect(remote == vip && local.Addr() == from.addr,
		"program %-11s connected from %s; getpeername() says %s", caller, local, remote)
	n.out.expect(out.Destination == vip,
		"Envoy   %-11s outbound: original destination %s, sent on to %s from %s", caller, out.Destination, out.Upstream, out.UpstreamFrom)
	n.out.expect(in.Destination == netip.AddrPortFrom(to.addr, 9080) && in.Source == out.UpstreamFrom && in.Source.Addr() == from.addr,
		"Envoy   %-11s inbound:  from %s, original destination %s, sent on to %s", a.Host, in.Source, in.Destination, in.Upstream)
	n.out.expect(a.Peer.IsValid() && a.Peer == in.UpstreamFrom,
		"program %-11s accepted from %s: %s %s -> %d", a.Host, a.Peer, in.Method, in.Path, in.Status)
	for _, c := range a.Calls {
		n.hop(entries, a.Host, c.URL, c.Local, c.Remote, c.Answer)
	}
}

func (n *node) clusterIP(service string) netip.Addr {
	for _, s := range n.services {
		if s.str("metadata", "name") == service {
			if a, err := netip.ParseAddr(s.str("spec", "clusterIP")); err == nil {
				return a
			}
		}
	}
	return netip.Addr{}
}

// A logEntry is what the demo shows of a line of the access log.
type logEntry struct {
	Direction    string
	Source       netip.AddrPort
	Destination  netip.AddrPort
	Upstream     netip.AddrPort
	UpstreamFrom netip.AddrPort `json:"upstream_from"`
	Method, Path string
	Status       int
	RequestID    string `json:"request_id"`
}

// accessLog returns the entries of an Envoy's access log that belong to a request.
func accessLog(path, id string) ([]logEntry, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read log of Envoy: %w", err)
	}
	var out []logEntry
	for _, line := range strings.Split(string(b), "\n") {
		var e logEntry
		// Other lines are Envoy's own, or not written to their end yet.
		if json.Unmarshal([]byte(line), &e) == nil && e.RequestID == id {
			out = append(out, e)
		}
	}
	return out, nil
}

// split sends 1,000 requests over a route with weights.
func (n *node) split(ctx context.Context) error {
	n.out.heading("2. A split of 90 to 10 over 1,000 requests")
	r, err := n.client(ctx, n.pod("client"), "-n=1000", "-c=8")
	if err != nil {
		return err
	}
	v1, v2, v3 := r.By["reviews v1"], r.By["reviews v2"], r.By["reviews v3"]
	// 1,000 draws at 10 % have a standard deviation of 9.5: four of them.
	n.out.expect(r.Failed == 0, "%s%s", summary(r), failures(r))
	n.out.expect(v1+v3 == 1000 && v2 == 0 && v3 >= 62 && v3 <= 138, "reviews v1 answered %d, v2 %d, v3 %d", v1, v2, v3)

	n.out.line("The same from a pod without a sidecar, to the pod's address; productpage's own calls are split all the same:")
	r, err = n.client(ctx, n.pod("outsider"), "-n=200", "-c=4", "-url="+n.productpageURL())
	if err != nil {
		return err
	}
	n.out.expect(r.Failed == 0, "%s%s; reviews v1 answered %d, v3 %d", summary(r), failures(r), r.By["reviews v1"], r.By["reviews v3"])
	return nil
}

// cookie shows that one user is led to another version.
func (n *node) cookie(ctx context.Context) error {
	n.out.heading("3. A cookie leads one user to another version")
	for _, c := range []struct {
		cookie string
		v2     int
	}{{"user=tester", 100}, {"lang=en; user=tester; theme=dark", 100}, {"user=somebody", 0}} {
		r, err := n.client(ctx, n.pod("client"), "-n=100", "-c=4", "-cookie="+c.cookie)
		if err != nil {
			return err
		}
		n.out.expect(r.Failed == 0 && r.By["reviews v2"] == c.v2, "Cookie: %-34s %d of %d answers from reviews v2%s",
			c.cookie, r.By["reviews v2"], r.Requests, failures(r))
	}
	return nil
}

// underLoad runs do while three clients send requests, and reports what became
// of those: one keeps its connections, one makes a connection for each request,
// which is redirected on its way out of the pod, and one does the same from a
// pod without a sidecar, to be redirected on the way in.
func (n *node) underLoad(ctx context.Context, do func(context.Context) error) ([]report, error) {
	client := n.pod("client")
	names := []string{"kept connections", "new connections", "new, no sidecar"}
	ends := []func() (report, error){
		n.load(ctx, client, "-c=4", "-pause=2ms"),
		n.load(ctx, client, "-c=2", "-pause=2ms", "-new-connections"),
		n.load(ctx, n.pod("outsider"), "-c=2", "-pause=2ms", "-new-connections", "-url="+n.productpageURL()),
	}
	err := pause(ctx, time.Second)
	if err == nil {
		err = do(ctx)
	}
	if err == nil {
		err = pause(ctx, time.Second)
	}
	var reports []report
	for i, end := range ends {
		r, endErr := end()
		err = errors.Join(err, endErr)
		if endErr == nil {
			n.out.expect(r.Failed == 0 && r.Requests > 0, "%-16s %s%s", names[i], summary(r), failures(r))
			reports = append(reports, r)
		}
	}
	return reports, err
}

// productpageURL leads to the pod itself: without a sidecar, and without the
// kube-proxy that the demo does not have, a service's address leads nowhere.
func (n *node) productpageURL() string {
	return "http://" + netip.AddrPortFrom(n.pod("productpage").addr, 9080).String() + "/"
}

// rollingChange replaces a pod under load.
func (n *node) rollingChange(ctx context.Context) error {
	n.out.heading("4. details-2 takes the place of details-1, under load")
	reports, err := n.underLoad(ctx, func(ctx context.Context) error {
		p, err := n.start(ctx, n.spare)
		if err != nil {
			return err
		}
		n.out.note("%s is ready at %s", p.name, p.addr)
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
		old := n.pod("details-1")
		if err := n.terminate(old); err != nil {
			return err
		}
		n.out.note("%s is terminating; it gets two seconds, as a preStop hook would give it", old.name)
		if err := pause(ctx, 2*time.Second); err != nil {
			return err
		}
		if err := n.end(ctx, old); err != nil {
			return err
		}
		n.out.note("%s is gone", old.name)
		return nil
	})
	if err != nil {
		return err
	}
	var first, second int
	for _, r := range reports {
		first += r.Hosts["details-1"]
		second += r.Hosts["details-2"]
	}
	n.out.expect(first > 0 && second > 0, "details-1 answered %d of them, details-2 %d", first, second)
	return nil
}

// agentKilled kills the agent under load and starts it again some time later.
func (n *node) agentKilled(ctx context.Context) error {
	n.out.heading("5. kill -9 of the agent, and a new agent, under load")
	var err error
	if n.firstAgent, err = scrape(ctx); err != nil {
		return err
	}
	_, err = n.underLoad(ctx, func(ctx context.Context) error {
		old := n.agent.cmd.Process.Pid
		if err := n.agent.cmd.Process.Signal(syscall.SIGKILL); err != nil {
			return fmt.Errorf("kill agent: %w", err)
		}
		<-n.agent.done
		n.out.note("agent %d is killed", old)
		if err := pause(ctx, 2*time.Second); err != nil {
			return err
		}
		began := time.Now()
		if err := n.startAgent(ctx); err != nil {
			return err
		}
		n.out.note("agent %d is ready %d ms after its start", n.agent.cmd.Process.Pid, time.Since(began).Milliseconds())
		return pause(ctx, time.Second)
	})
	if err != nil {
		return err
	}
	n.out.line("The new agent goes on serving changes: reviews is led to v3 alone.")
	if err := n.apply(object{
		"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
		"metadata": map[string]any{"name": "reviews", "namespace": "bookshop"},
		"spec": map[string]any{
			"parentRefs": []any{map[string]any{"group": "", "kind": "Service", "name": "reviews"}},
			"rules":      []any{map[string]any{"backendRefs": []any{map[string]any{"name": "reviews-v3", "port": 9080}}}},
		},
	}); err != nil {
		return err
	}
	began := time.Now()
	err = waitFor(ctx, "reviews to be v3 alone", nil, func() error {
		r, err := n.client(ctx, n.pod("client"), "-n=20")
		if err == nil && r.By["reviews v3"] != 20 {
			err = fmt.Errorf("%d of 20 answers are from v3%s", r.By["reviews v3"], failures(r))
		}
		return err
	})
	if err != nil {
		return err
	}
	n.out.expect(true, "20 of 20 answers are from v3, %d ms after the file had changed", time.Since(began).Milliseconds())
	return nil
}

// metrics prints what the agent counted: connections in the kernel, so that a
// restart loses none, and everything else since its start.
func (n *node) metrics(ctx context.Context) error {
	n.out.heading("6. What /metrics of the agent counted")
	now, err := scrape(ctx)
	if err != nil {
		return err
	}
	show := func(sums map[string]float64) {
		for _, k := range slices.Sorted(maps.Keys(sums)) {
			n.out.line("  %-96s %s", k, strconv.FormatFloat(sums[k], 'g', 6, 64))
		}
	}
	show(now)
	before := maps.Clone(n.firstAgent)
	maps.DeleteFunc(before, func(k string, _ float64) bool { _, again := now[k]; return again })
	n.out.line("and of the first agent, before it was killed, what the second has not met:")
	show(before)

	for _, direction := range []string{"outbound", "inbound"} {
		key := `sluice_connections_total{direction="` + direction + `",reason="captured",verdict="redirected"}`
		n.out.expect(now[key] >= n.firstAgent[key] && n.firstAgent[key] > 0,
			"%.0f %s connections redirected, %.0f of them before the kill -9", now[key], direction, n.firstAgent[key])
	}
	return nil
}

// scrape returns the agent's own metrics that are not zero, summed over pods to
// fit on a screen, without the buckets of histograms.
func scrape(ctx context.Context) (map[string]float64, error) {
	body, err := fetch(ctx, "http://"+agentAddr+"/metrics")
	if err != nil {
		return nil, err
	}
	sums := map[string]float64{}
	for _, line := range strings.Split(body, "\n") {
		name, labels, value, ok := sample(line)
		if !ok || value == 0 || !strings.HasPrefix(name, "sluice_") || strings.HasSuffix(name, "_bucket") {
			continue
		}
		delete(labels, "pod")
		delete(labels, "namespace")
		delete(labels, "workload")
		var l []string
		for _, k := range slices.Sorted(maps.Keys(labels)) {
			l = append(l, k+"="+strconv.Quote(labels[k]))
		}
		if len(l) > 0 {
			name += "{" + strings.Join(l, ",") + "}"
		}
		sums[name] += value
	}
	return sums, nil
}

// sample reads one line of the Prometheus text format; label values without
// escapes are all that the agent writes.
func sample(line string) (name string, labels map[string]string, value float64, ok bool) {
	i := strings.LastIndexByte(line, ' ')
	if i < 0 || line[0] == '#' {
		return "", nil, 0, false
	}
	value, err := strconv.ParseFloat(line[i+1:], 64)
	if err != nil {
		return "", nil, 0, false
	}
	name, rest, _ := strings.Cut(line[:i], "{")
	labels = map[string]string{}
	for _, pair := range strings.Split(strings.TrimSuffix(rest, "}"), `",`) {
		if k, v, ok := strings.Cut(pair, `="`); ok {
			labels[k] = strings.TrimSuffix(v, `"`)
		}
	}
	return name, labels, value, true
}

func summary(r report) string {
	return fmt.Sprintf("%d requests in %.1f s, %d failed, median %.1f ms, p99 %.1f ms", r.Requests, r.Elapsed.Seconds(), r.Failed,
		float64(r.P50.Microseconds())/1000, float64(r.P99.Microseconds())/1000)
}

// failures lists the distinct errors of a report, the most frequent first.
func failures(r report) string {
	kinds := slices.Collect(maps.Keys(r.Errors))
	sort.Slice(kinds, func(i, j int) bool { return r.Errors[kinds[i]] > r.Errors[kinds[j]] })
	var b strings.Builder
	for i, k := range kinds {
		if i == 5 {
			b.WriteString("; ...")
			break
		}
		fmt.Fprintf(&b, "; %d times: %.300s", r.Errors[k], k)
	}
	return b.String()
}

// copyOf returns the object under another name.
func copyOf(o object, name string) (object, error) {
	b, err := yaml.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("copy manifest: %w", err)
	}
	var c object
	if err := yaml.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("copy manifest: %w", err)
	}
	c.set("name", name, "metadata")
	return c, nil
}

// pause lets time pass, which is what some of the demo is about.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

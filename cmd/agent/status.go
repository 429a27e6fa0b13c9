package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/xds/server"
)

// A nodeStatus is what /status says, as JSON, and `sluice-agent status` prints.
type nodeStatus struct {
	Version string        `json:"version"`
	Node    string        `json:"node"`
	Ready   bool          `json:"ready"`
	Checks  []checkStatus `json:"checks"` // those of /readyz
	Pods    []podStatus   `json:"pods"`   // of this node that came through CNI or were found, sorted
}

type checkStatus struct {
	Mark string `json:"mark"` // see writeChecks
	Name string `json:"name"`
	Text string `json:"text"`
}

// A podStatus says what the agent did for one sandbox.
type podStatus struct {
	Namespace  string           `json:"namespace"`
	Name       string           `json:"name"`
	UID        string           `json:"uid"`
	Redirected bool             `json:"redirected"`
	Backend    redirect.Backend `json:"backend,omitempty"`
	// Accelerated are the places in which new connections are.
	Accelerated []redirect.Place `json:"accelerated,omitempty"`
	Sidecar     string           `json:"sidecar,omitempty"` // see sidecarState
	Problem     string           `json:"problem,omitempty"`
}

// podStatuses are those of all sandboxes.
func (a *agent) podStatuses(ctx context.Context, accelerated func(redirect.Accelerate) []redirect.Place) (pods []podStatus, err error) {
	_, problems := a.report()
	sidecars := map[string]server.PodStatus{}
	for _, s := range a.sidecars.Status() {
		sidecars[s.Pod.UID] = s
	}
	err = a.call(ctx, func() error {
		for _, box := range a.boxes.all() {
			p := podStatus{Namespace: box.Namespace, Name: box.Name, UID: box.PodUID, Problem: inOneLine(problems["pod "+box.Namespace+"/"+box.Name])}
			if s := a.pods[box.ContainerID]; s != nil && s.workload != nil {
				p.Redirected, p.Backend = true, a.backend.BackendOf(box.id())
				if p.Backend == redirect.BackendEBPF {
					p.Accelerated = accelerated(s.workload.Policy.Accelerate)
				}
				p.Sidecar = sidecarState(sidecars[box.id().String()])
			}
			pods = append(pods, p)
		}
		return nil
	})
	slices.SortFunc(pods, func(a, b podStatus) int {
		return strings.Compare(a.Namespace+"/"+a.Name+"/"+a.UID, b.Namespace+"/"+b.Name+"/"+b.UID)
	})
	return pods, err
}

// sidecarState says how far a sidecar is with what it is to know.
func sidecarState(s server.PodStatus) string {
	switch {
	case s.Streams == 0:
		return "not connected"
	case len(s.Rejected) > 0:
		return fmt.Sprintf("rejects %d", len(s.Rejected))
	case slices.ContainsFunc(s.Types, func(t server.TypeStatus) bool { return !t.Synced }):
		return "behind"
	default:
		return "synced"
	}
}

// statusHandler serves /status.
func (a *agent) statusHandler(node string, checks func() []check, accelerated func(redirect.Accelerate) []redirect.Place) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := nodeStatus{Version: version, Node: node, Ready: true}
		all := checks()
		ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
		defer cancel()
		var err error
		if s.Pods, err = a.podStatuses(ctx, accelerated); err != nil {
			all = append(all, check{name: "loop", err: err})
		}
		for _, c := range all {
			mark, text := c.line()
			s.Checks = append(s.Checks, checkStatus{mark, c.name, text})
			s.Ready = s.Ready && c.err == nil
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(s)
	})
}

// runStatus is `sluice-agent status`. It is an error if the node is not ready.
func runStatus(ctx context.Context, e env, args []string) error {
	var addr, output string
	fs := flags(e, "status")
	fs.StringVar(&addr, "http-addr", defaultHTTPAddr, "`address` at which the agent of this node serves, see run")
	fs.StringVar(&output, "output", "text", "text or json")
	if err := parse(fs, e, args); err != nil {
		return err
	}
	if output != "text" && output != "json" {
		_, _ = fmt.Fprintf(e.stderr, "--output %q: must be text or json\n", output)
		return errUsage
	}
	s, err := askStatus(ctx, addr)
	if err != nil {
		return fmt.Errorf("ask the agent of this node, see --http-addr: %w", err)
	}
	if output == "json" {
		enc := json.NewEncoder(e.stdout)
		enc.SetIndent("", "  ")
		err = enc.Encode(s)
	} else {
		err = s.print(e.stdout)
	}
	if err == nil && !s.Ready {
		err = errors.New("the node is not ready")
	}
	return err
}

func askStatus(ctx context.Context, addr string) (s nodeStatus, err error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return s, err
	}
	if host == "" || host == "0.0.0.0" || host == "::" {
		host = "localhost"
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+"/status", nil)
	if err != nil {
		return s, err
	}
	resp, err := (&http.Transport{}).RoundTrip(req) // no proxy, whatever the environment says
	if err != nil {
		return s, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return s, fmt.Errorf("%s answers %s", req.URL, resp.Status)
	}
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		return s, fmt.Errorf("read the answer of %s: %w", req.URL, err)
	}
	return s, nil
}

// print writes the status for people.
func (s nodeStatus) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintf(t, "node %s, sluice-agent %s\n", s.Node, s.Version)
	for _, c := range s.Checks {
		_, _ = fmt.Fprintf(t, "[%s]%s %s\n", c.Mark, c.Name, c.Text)
	}
	if len(s.Pods) > 0 {
		_, _ = fmt.Fprint(t, "\nNAMESPACE\tPOD\tREDIRECTED\tACCELERATED\tSIDECAR\tPROBLEM\n")
	}
	for _, p := range s.Pods {
		redirected, places := "no", make([]string, 0, len(p.Accelerated))
		if p.Redirected {
			redirected = string(p.Backend)
		}
		for _, place := range p.Accelerated {
			places = append(places, string(place))
		}
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", p.Namespace, p.Name, redirected, dash(strings.Join(places, ",")), dash(p.Sidecar), dash(p.Problem))
	}
	return t.Flush()
}

// dash stands for nothing, so that every column has a word.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/bpf"
	"github.com/sluicemesh/sluice/pkg/redirect/iptables"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/pkg/xds/server"
	"github.com/sluicemesh/sluice/pkg/xds/translate"
)

// runAgent is `sluice-agent run`.
func runAgent(ctx context.Context, e env, args []string) (err error) {
	c, err := parseConfig(e, args)
	if err != nil {
		return err
	}
	log := newLogger(e, c)
	log.Info("sluice-agent starts", "version", version, "node", c.node, "source", c.sourceDir, "backend", c.backend)

	store := podwatch.NewStore(podwatch.StoreOptions{})
	files, err := podwatch.NewFiles(podwatch.FilesOptions{Dir: c.sourceDir, Store: store, Log: log, Node: c.node})
	if err != nil {
		return fmt.Errorf("open source: %w", err)
	}
	if err := os.MkdirAll(c.kernel.stateDir, 0o755); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	unlock, err := lockState(c.kernel.stateDir)
	if err != nil {
		return err
	}
	defer unlock()
	chosen, err := openRedirection(c, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, chosen.Close()) }()
	translator, err := translate.New(translate.Options{IPv4Only: !hasIPv6()})
	if err != nil {
		return fmt.Errorf("set up translation: %w", err)
	}
	sidecars, err := server.New(server.Options{Log: log, Empty: translate.Empty, InNetns: netns.Do})
	if err != nil {
		return fmt.Errorf("set up xDS server: %w", err)
	}
	boxes, err := loadSandboxes(filepath.Join(c.kernel.stateDir, "sandboxes"))
	if boxes == nil {
		return err
	} else if err != nil {
		log.Warn("some sandboxes of an earlier agent are forgotten", "err", err)
	}
	for _, box := range boxes.all() {
		addrs, _ := box.network()
		files.SetPodAddrs(box.Namespace, box.Name, addrs)
	}

	a := &agent{
		log:   log,
		store: store,
		planner: planner{
			node: c.node, outboundPolicy: c.outboundPolicy,
			redirectDefault: redirect.DefaultPolicy(), excluded: c.excludeNamespaces,
		},
		redirector: chosen, translator: translator, sidecars: sidecars, setPodAddrs: files.SetPodAddrs,
		calls: make(chan func()), started: make(chan struct{}),
		boxes: boxes, pods: map[string]*podState{}, fed: map[podwatch.Key][]podwatch.Key{},
		problems: map[string]string{},
	}

	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		newBuildInfo(),
	)
	backend := func() (string, string) { return string(chosen.Backend()), chosen.Reason() }
	registry.MustRegister(newNodeMetrics(chosen, backend, a, func() int { return len(files.Problems()) }))
	if err := sidecars.Register(registry); err != nil {
		return err
	}
	cni := newCNIMetrics(registry)
	plugin, err := cniapi.NewServer(cniapi.ServerOptions{
		Socket: c.kernel.cniSocket, Handler: a, Log: log,
		Observe: func(verb string, code int, d time.Duration) {
			cni.requests.WithLabelValues(verb, strconv.Itoa(code)).Inc()
			cni.latency.WithLabelValues(verb).Observe(d.Seconds())
		},
	})
	if err != nil {
		return fmt.Errorf("set up CNI socket: %w", err)
	}
	checks := func() []check {
		backend, reason := backend()
		var documents []string
		for _, p := range files.Problems() {
			documents = append(documents, p.String())
		}
		return a.checks(backend, reason, documents)
	}

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return files.Run(ctx) })
	g.Go(func() error { return sidecars.Run(ctx) })
	g.Go(func() error { return a.Run(ctx) })
	g.Go(func() error { return plugin.Run(ctx) })
	g.Go(func() error { return serveHTTP(ctx, log, c.httpAddr, a.alive, checks, registry) })
	err = g.Wait()
	log.Info("sluice-agent ends; redirection stays in place")
	return err
}

// openRedirection opens the backend that the command line asks for. With auto
// it falls back to iptables once, and says why.
func openRedirection(c config, log *slog.Logger) (*redirect.Chosen, error) {
	chosen, err := redirect.Choose(redirect.Options{
		Node: c.backend,
		NewEBPF: func() (redirect.Redirector, error) {
			b, err := bpf.New(bpf.Options{PinDir: c.kernel.pinDir, Cgroup: c.kernel.cgroup, Log: log})
			if err != nil {
				return nil, err
			}
			return b, nil
		},
		NewIPTables: func() (redirect.Redirector, error) {
			b, err := iptables.New(iptables.Options{StateDir: iptablesState(c.kernel), Log: log})
			if err != nil {
				return nil, err
			}
			return b, nil
		},
		Left: func(b redirect.Backend) bool {
			dir := c.kernel.pinDir
			if b == redirect.BackendIPTables {
				dir = iptablesState(c.kernel)
			}
			entries, err := os.ReadDir(dir)
			return err == nil && len(entries) > 0
		},
		Log: log,
	})
	if err != nil {
		return nil, fmt.Errorf("open redirection backend %s: %w", c.backend, err)
	}
	return chosen, nil
}

// hasIPv6 says whether the kernel has IPv6 at all; with ipv6.disable=1 it has
// not, and an Envoy that is told to listen on an IPv6 address rejects that.
func hasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}

func iptablesState(k kernelConfig) string { return filepath.Join(k.stateDir, "iptables") }

// runUninstall is `sluice-agent uninstall`. It goes on after an error: as much
// as can be removed is removed. Beside an agent, which would put things back, it
// does nothing.
func runUninstall(ctx context.Context, e env, args []string) error {
	var k kernelConfig
	set := flags(e, "uninstall")
	k.register(set)
	if err := parse(set, e, args); err != nil {
		return err
	}
	switch unlock, err := lockState(k.stateDir); {
	case err == nil:
		defer unlock()
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	log := newLogger(e, config{logFormat: "text"})
	return errors.Join(
		bpf.Uninstall(ctx, bpf.Options{PinDir: k.pinDir, Cgroup: k.cgroup, Log: log}),
		iptables.Uninstall(ctx, iptables.Options{StateDir: iptablesState(k), Log: log}),
		removeSocket(k.cniSocket),
		removeState(k.stateDir), // last: the socket is in there unless told otherwise
	)
}

// runProbe is `sluice-agent probe`. It is an error if no backend can be had.
func runProbe(_ context.Context, e env, args []string) error {
	if err := parse(flags(e, "probe"), e, args); err != nil {
		return err
	}
	possible := false
	for _, b := range []struct {
		name  redirect.Backend
		probe func() error
	}{{redirect.BackendEBPF, bpf.Probe}, {redirect.BackendIPTables, func() error { return iptables.Probe(iptables.Options{}) }}} {
		verdict := "yes"
		if err := b.probe(); err != nil {
			verdict = "no: " + err.Error()
		} else {
			possible = true
		}
		if _, err := fmt.Fprintf(e.stdout, "%-8s  %s\n", b.name, verdict); err != nil {
			return err
		}
	}
	if !possible {
		return errors.New("this node can have no backend")
	}
	return nil
}

// runBootstrap is `sluice-agent bootstrap`.
func runBootstrap(_ context.Context, e env, args []string) error {
	if err := parse(flags(e, "bootstrap"), e, args); err != nil {
		return err
	}
	_, err := e.stdout.Write(xds.Bootstrap())
	return err
}

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
	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi/cniserver"
	"github.com/sluicemesh/sluice/pkg/podwatch/cniinstall"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/bpf"
	"github.com/sluicemesh/sluice/pkg/redirect/bpf/paircheck"
	"github.com/sluicemesh/sluice/pkg/redirect/iptables"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/pkg/xds/server"
	"github.com/sluicemesh/sluice/pkg/xds/translate"
)

const (
	// lockWait is how long an agent waits for its predecessor to end: one whose
	// DaemonSet was deleted and made again is still cleaning up.
	lockWait = 30 * time.Second
	// uninstallTimeout keeps the end of the agent within the grace period that
	// the chart gives it.
	uninstallTimeout = 20 * time.Second
)

// runAgent is `sluice-agent run`. When it ends because Sluice is removed from
// the cluster it leaves the node as it was before; else what it installed goes
// on working without it.
func runAgent(ctx context.Context, e env, args []string) error {
	c, err := parseConfig(e, args)
	if err != nil {
		return err
	}
	log := newLogger(e, c)
	log.Info("sluice-agent starts", "version", version, "node", c.node, "source", c.source(), "backend", c.backend)
	store := podwatch.NewStore(podwatch.StoreOptions{})
	from, err := openSource(c, store, log)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(c.kernel.stateDir, 0o755); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	var wait time.Duration
	if c.daemonSet != (objectName{}) {
		wait = lockWait
	}
	unlock, err := lockState(ctx, c.kernel.stateDir, wait, log)
	if err != nil {
		return err
	}
	defer unlock()
	removed := from.watchRemoval(ctx)
	err = serve(ctx, c, log, store, from)
	if removed() {
		log.Info("Sluice is being removed from the cluster: uninstalling it from this node")
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), uninstallTimeout)
		defer cancel()
		return errors.Join(err, uninstall(ctx, c.kernel, c.cni, c.proc, log))
	}
	log.Info("sluice-agent ends; redirection stays in place")
	return err
}

// serve does the agent's work until ctx ends.
func serve(ctx context.Context, c config, log *slog.Logger, store *podwatch.Store, from source) (err error) {
	chosen, err := openRedirection(c, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, chosen.Close()) }()
	translator, err := translate.New(translate.Options{IPv4Only: !hasIPv6()})
	if err != nil {
		return fmt.Errorf("set up translation: %w", err)
	}
	boxes, err := loadSandboxes(filepath.Join(c.kernel.stateDir, "sandboxes"))
	if boxes == nil {
		return err
	} else if err != nil {
		log.Warn("some sandboxes of an earlier agent are forgotten", "err", err)
	}
	for _, box := range boxes.all() {
		addrs, _ := box.network()
		from.setPodAddrs(box.Namespace, box.Name, addrs)
	}
	a := &agent{
		log:   log,
		store: store,
		planner: planner{
			node: c.node, outboundPolicy: c.outboundPolicy,
			redirectDefault: redirect.DefaultPolicy(), excluded: c.excludeNamespaces,
			namespaces: from.health != nil,
		},
		redirector: chosen, translator: translator, setPodAddrs: from.setPodAddrs, cutOff: from.cutOff,
		reporter: from.reporter, backend: chosen,
		lock: make(chan struct{}, 1), adding: make(chan struct{}, installers()), removing: make(chan struct{}, removers()), started: make(chan struct{}), failing: make(chan struct{}, 1),
		boxes: boxes, pods: map[string]*podState{}, awaiting: map[string]bool{}, fed: map[podwatch.Key][]podwatch.Key{},
		problems: map[string]string{}, proxyCgroups: map[string]string{},
	}
	if from.health != nil { // a directory's pods have no processes that could be found
		a.find = findIn(c.proc)
	}
	a.hostUID = func(userns uint64, uid uint32) (uint32, error) { return netns.HostUID(c.proc, userns, uid) }
	a.containers = nodeContainers{root: c.kernel.cgroup, proc: c.proc}
	a.drain = newDrainer().Drain
	sidecars, err := server.New(server.Options{
		Log: log, Empty: translate.Empty, InNetns: netns.Do,
		Refused: func(id string) { a.refused(ctx, id) },
		IsProxy: a.isProxy,
	})
	if err != nil {
		return fmt.Errorf("set up xDS server: %w", err)
	}
	a.sidecars = sidecars
	installer, err := c.installer(log)
	if err != nil {
		return err
	}

	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		newBuildInfo(),
	)
	registry.MustRegister(newAccelMetrics(chosen, c.accelerate, log))
	backend := func() (string, string) { return string(chosen.Backend()), chosen.Reason() }
	registry.MustRegister(newNodeMetrics(chosen, backend, a, func() int { return len(from.problems()) }))
	registry.MustRegister(newPartMetrics(a.parts(from, installer)))
	if err := sidecars.Register(registry); err != nil {
		return err
	}
	cni := newCNIMetrics(registry)
	plugin, err := cniserver.New(cniserver.Options{
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
		return append(a.checks(backend, reason, from, installer), accelChecks(chosen, c.accelerate)...)
	}

	status := a.statusHandler(c.node, checks, func(pod redirect.Accelerate) []redirect.Place {
		return acceleratedIn(chosen, c.accelerate, pod)
	})

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return from.run(ctx) })
	g.Go(func() error { return sidecars.Run(ctx) })
	g.Go(func() error { return a.Run(ctx) })
	g.Go(func() error { a.watchLinks(ctx); return nil })
	g.Go(func() error { return plugin.Run(ctx) })
	g.Go(func() error {
		return serveHTTP(ctx, log, c.httpAddr, a.alive, checks, status, registry, newProxies(a.targets))
	})
	if from.reporter != nil {
		g.Go(func() error { return from.reporter.Run(ctx) })
	}
	if installer != nil {
		g.Go(func() error { return installer.Run(ctx) })
	}
	err = g.Wait()
	a.background.Wait()
	return err
}

// parts are those of this agent that have metrics.
func (a *agent) parts(from source, installer *cniinstall.Installer) agentParts {
	p := agentParts{
		health: from.health,
		drains: func() (told, failed uint64) { return a.drained.told.Load(), a.drained.failed.Load() },
	}
	if from.reporter != nil {
		p.reports = from.reporter.Stats
	}
	if a.find != nil {
		p.adopted = func() int { return int(a.adopted.Load()) }
	}
	if installer != nil {
		p.installer = installer.Status
	}
	return p
}

// installer returns what puts the CNI plugin on the node, nil if that is not
// asked for.
func (c config) installer(log *slog.Logger) (*cniinstall.Installer, error) {
	if c.cni.confDir == "" {
		return nil, nil
	}
	o := c.cni.options(c.proc, log)
	o.Socket, o.ExcludeNamespaces = c.kernel.cniSocket, c.excludeNamespaces
	if o.Plugin == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find sluice-cni beside this program, or give --cni-plugin: %w", err)
		}
		o.Plugin = filepath.Join(filepath.Dir(self), cniinstall.PluginType)
	}
	i, err := cniinstall.New(o)
	if err != nil {
		return nil, fmt.Errorf("set up installation of the CNI plugin: %w", err)
	}
	return i, nil
}

func (c cniConfig) options(proc string, log *slog.Logger) cniinstall.Options {
	return cniinstall.Options{ConfDir: c.confDir, BinDir: c.binDir, Plugin: c.plugin, Proc: proc, Log: log}
}

// openRedirection opens the backend that the command line asks for. With auto
// it falls back to iptables once, and says why.
func openRedirection(c config, log *slog.Logger) (*redirect.Chosen, error) {
	chosen, err := redirect.Choose(redirect.Options{
		Node: c.backend,
		NewEBPF: func() (redirect.Redirector, error) {
			o := c.kernel.ebpf(c.proc, log)
			o.Accelerate, o.AccelerateCache = c.accelerate, filepath.Join(c.kernel.stateDir, "accelerate.json")
			b, err := bpf.New(o)
			if err != nil {
				return nil, err
			}
			return b, nil
		},
		NewIPTables: func() (redirect.Redirector, error) {
			b, err := iptables.New(c.kernel.iptables(c.proc, log))
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
	if c.accelerate == redirect.AccelerateOn && chosen.Backend() != redirect.BackendEBPF {
		return nil, errors.Join(fmt.Errorf("accelerate on: this node has no backend %s: %s", redirect.BackendEBPF, chosen.Reason()), chosen.Close())
	}
	return chosen, nil
}

// hasIPv6 says whether the kernel has IPv6 at all; with ipv6.disable=1 it has
// not, and an Envoy that is told to listen on an IPv6 address rejects that.
func hasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}

// ebpf are the options of the eBPF backend. What a container mounts ends with
// it, so there the bpffs must be the node's.
func (k kernelConfig) ebpf(proc string, log *slog.Logger) bpf.Options {
	return bpf.Options{PinDir: k.pinDir, Cgroup: k.cgroup, NoMount: inContainer(proc), Log: log}
}

// iptables are the options of the iptables backend. Paths in the kernel's cgroup
// match are those that the node sees: in a container not its own.
func (k kernelConfig) iptables(proc string, log *slog.Logger) iptables.Options {
	o := iptables.Options{StateDir: iptablesState(k), Cgroup: k.cgroup, Log: log}
	if inContainer(proc) {
		o.HostCgroupNS = filepath.Join(proc, "1/ns/cgroup")
	}
	return o
}

// inContainer says whether this agent runs in a container, which is told where
// the node's procfs is mounted, not in the node's own mount namespace.
func inContainer(proc string) bool { return filepath.Clean(proc) != "/proc" }

func iptablesState(k kernelConfig) string { return filepath.Join(k.stateDir, "iptables") }

// runUninstall is `sluice-agent uninstall`. Beside an agent, which would put
// things back, it does nothing.
func runUninstall(ctx context.Context, e env, args []string) error {
	var k kernelConfig
	var cni cniConfig
	set := flags(e, "uninstall")
	k.register(set)
	cni.register(set)
	proc := registerProc(set)
	if err := parse(set, e, args); err != nil {
		return err
	}
	log := newLogger(e, config{logFormat: "text"})
	switch unlock, err := lockState(ctx, k.stateDir, 0, log); {
	case err == nil:
		defer unlock()
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return uninstall(ctx, k, cni, *proc, log)
}

// uninstall removes everything that agents put onto the node. It goes on after
// an error: as much as can be removed is removed. The plugin goes first, so that
// no new pod asks for what is going away.
func uninstall(ctx context.Context, k kernelConfig, cni cniConfig, proc string, log *slog.Logger) error {
	var errs []error
	if cni.confDir != "" {
		errs = append(errs, cniinstall.Uninstall(ctx, cni.options(proc, log)))
	}
	return errors.Join(append(errs,
		bpf.Uninstall(ctx, k.ebpf(proc, log)),
		iptables.Uninstall(ctx, k.iptables(proc, log)),
		removeSocket(k.cniSocket),
		removeState(k.stateDir), // last: the socket is in there unless told otherwise
	)...)
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

// runPairCheck is `sluice-agent paircheck`, the process in which the agent tries
// acceleration.
func runPairCheck(_ context.Context, e env, args []string) error {
	if err := parse(flags(e, "paircheck"), e, args); err != nil {
		return err
	}
	return paircheck.Child(e.stdin, e.stdout)
}

// runBootstrap is `sluice-agent bootstrap`.
func runBootstrap(_ context.Context, e env, args []string) error {
	if err := parse(flags(e, "bootstrap"), e, args); err != nil {
		return err
	}
	_, err := e.stdout.Write(xds.Bootstrap())
	return err
}

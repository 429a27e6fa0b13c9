package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"strings"

	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/xds"
)

// sourceKubernetes is the --source that reads from the API server.
const sourceKubernetes = "kubernetes"

// defaultHTTPAddr is --http-addr where nothing else is said.
const defaultHTTPAddr = ":15090"

// A config is the command line of `sluice-agent run`, checked.
type config struct {
	sourceDir         string // empty: from Kubernetes
	kubeconfig        string
	daemonSet         objectName
	node              string
	backend           redirect.Backend
	accelerate        redirect.Accelerate
	outboundPolicy    xds.OutboundPolicy
	excludeNamespaces []string
	httpAddr          string
	proc              string
	kernel            kernelConfig
	cni               cniConfig
	logLevel          slog.Level
	logFormat         string
}

// An objectName names a namespaced object; the zero value names none.
type objectName struct{ namespace, name string }

// A cniConfig says where the CNI plugin is to be installed.
type cniConfig struct {
	confDir string
	binDir  string // both empty: nothing is installed
	plugin  string // what is installed; empty: sluice-cni beside the agent
}

func (c *cniConfig) register(fs *flag.FlagSet) {
	fs.StringVar(&c.confDir, "cni-conf-dir", "", "`directory` of the runtime's CNI configurations, to add the plugin to the chain; empty: nothing is installed")
	fs.StringVar(&c.binDir, "cni-bin-dir", "", "`directory` of the runtime's CNI plugins, to put the plugin into; empty: nothing is installed")
}

func registerProc(fs *flag.FlagSet) *string {
	return fs.String("proc", "/proc", "`directory` where the node's procfs is mounted, to look at the processes of pods")
}

// A kernelConfig says where an agent keeps what outlives it. uninstall needs it
// as well as run.
type kernelConfig struct {
	stateDir  string
	pinDir    string
	cgroup    string
	cniSocket string
}

func (k *kernelConfig) register(fs *flag.FlagSet) {
	fs.StringVar(&k.stateDir, "state-dir", "/run/sluice", "`directory` for what must outlive the agent but not the node's next boot")
	fs.StringVar(&k.pinDir, "pin-dir", "/sys/fs/bpf/sluice", "`directory` in a bpffs, mounted if need be, for pinned maps and links")
	fs.StringVar(&k.cgroup, "cgroup", "", "root `directory` of the cgroup v2 hierarchy; empty: found")
	fs.StringVar(&k.cniSocket, "cni-socket", cniapi.DefaultSocket, "unix socket `path` on which the CNI plugin asks")
}

// flags returns an empty flag set for a subcommand.
func flags(e env, name string) *flag.FlagSet {
	fs := flag.NewFlagSet("sluice-agent "+name, flag.ContinueOnError)
	fs.SetOutput(e.stderr)
	return fs
}

// parse reads the environment first and the arguments, which win, after it.
func parse(fs *flag.FlagSet, e env, args []string) error {
	var errs []error
	fs.VisitAll(func(f *flag.Flag) {
		name := "SLUICE_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if v := e.getenv(name); v != "" {
			if err := fs.Set(f.Name, v); err != nil {
				errs = append(errs, fmt.Errorf("environment variable %s=%q: %w", name, v, err))
			}
		}
	})
	if err := errors.Join(errs...); err != nil {
		_, _ = fmt.Fprintln(fs.Output(), err)
		return errUsage
	}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage
	}
	if fs.NArg() > 0 {
		_, _ = fmt.Fprintf(fs.Output(), "unexpected argument %q\n", fs.Arg(0))
		return errUsage
	}
	return nil
}

// parseConfig reads the command line of `run`. Every wrong value is named.
func parseConfig(e env, args []string) (config, error) {
	var c config
	var source, daemonSet, backend, outbound, exclude, level string
	fs := flags(e, "run")
	fs.StringVar(&source, "source", "", "where pods and services come from: kubernetes, or files:`DIRECTORY` of Kubernetes YAML, watched")
	fs.StringVar(&c.kubeconfig, "kubeconfig", "", "`file` that says how to reach the API server; empty: as a pod does")
	fs.StringVar(&daemonSet, "daemonset", "", "`NAMESPACE/NAME` of the DaemonSet that runs this agent: when that is deleted, the agent's end uninstalls; empty: never")
	fs.StringVar(&c.node, "node", "", "`name` of this node; empty: the host's name")
	fs.StringVar(&backend, "backend", string(redirect.BackendAuto), "redirection `backend`: auto, ebpf or iptables; auto takes ebpf where the node can")
	fs.StringVar((*string)(&c.accelerate), "accelerate", string(redirect.AccelerateOff), "`setting` for connections between sidecars of this node: auto (where it is right and faster), on (where it is right, else the agent does not start) or off")
	fs.StringVar(&outbound, "outbound-policy", string(xds.OutboundPassthrough), "what becomes of connections to unknown destinations: passthrough or block")
	fs.StringVar(&exclude, "exclude-namespaces", "kube-system", "comma-separated `namespaces` that are never redirected")
	fs.StringVar(&c.httpAddr, "http-addr", defaultHTTPAddr, "`address` of /healthz, /readyz, /status and /metrics")
	proc := registerProc(fs)
	fs.StringVar(&c.cni.plugin, "cni-plugin", "", "`file` of the CNI plugin that is installed; empty: sluice-cni beside sluice-agent")
	c.cni.register(fs)
	fs.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(&c.logFormat, "log-format", "text", "text or json")
	c.kernel.register(fs)
	if err := parse(fs, e, args); err != nil {
		return c, err
	}

	c.proc = *proc

	var errs []error
	wrong := func(name, value, allowed string) {
		errs = append(errs, fmt.Errorf("--%s %q: must be %s", name, value, allowed))
	}
	dir, isFiles := strings.CutPrefix(source, "files:")
	switch {
	case isFiles && dir != "":
		c.sourceDir = dir
	case source != sourceKubernetes:
		wrong("source", source, "kubernetes or files:DIRECTORY")
	}
	if daemonSet != "" {
		var ok bool
		c.daemonSet.namespace, c.daemonSet.name, ok = strings.Cut(daemonSet, "/")
		if !ok || c.daemonSet.namespace == "" || c.daemonSet.name == "" || strings.Contains(c.daemonSet.name, "/") {
			wrong("daemonset", daemonSet, "NAMESPACE/NAME")
		}
		if isFiles {
			wrong("daemonset", daemonSet, "empty with --source files:DIRECTORY")
		}
	}
	if (c.cni.confDir == "") != (c.cni.binDir == "") {
		errs = append(errs, errors.New("--cni-conf-dir and --cni-bin-dir: give both or none"))
	}
	switch c.backend = redirect.Backend(backend); c.backend {
	case redirect.BackendAuto, redirect.BackendEBPF, redirect.BackendIPTables:
	default:
		wrong("backend", backend, "auto, ebpf or iptables")
	}
	switch c.accelerate {
	case redirect.AccelerateAuto, redirect.AccelerateOn, redirect.AccelerateOff:
	default:
		wrong("accelerate", string(c.accelerate), "auto, on or off")
	}
	if c.accelerate == redirect.AccelerateOn && c.backend == redirect.BackendIPTables {
		errs = append(errs, errors.New("--accelerate on: not with --backend iptables, which cannot do it"))
	}
	var err error
	if c.outboundPolicy, err = parseOutboundPolicy(outbound); err != nil {
		wrong("outbound-policy", outbound, "passthrough or block")
	}
	for _, ns := range strings.Split(exclude, ",") {
		if ns = strings.TrimSpace(ns); ns != "" {
			c.excludeNamespaces = append(c.excludeNamespaces, ns)
		}
	}
	if err := c.logLevel.UnmarshalText([]byte(level)); err != nil {
		wrong("log-level", level, "debug, info, warn or error")
	}
	if c.logFormat != "text" && c.logFormat != "json" {
		wrong("log-format", c.logFormat, "text or json")
	}
	if c.node == "" {
		if c.node, err = e.hostname(); err != nil {
			errs = append(errs, fmt.Errorf("find the node's name, or give it as --node: %w", err))
		}
	}
	if len(errs) > 0 {
		_, _ = fmt.Fprintln(e.stderr, errors.Join(errs...))
		return c, errUsage
	}
	return c, nil
}

// source is --source again.
func (c config) source() string {
	if c.sourceDir == "" {
		return sourceKubernetes
	}
	return "files:" + c.sourceDir
}

func newLogger(e env, c config) *slog.Logger {
	o := &slog.HandlerOptions{Level: c.logLevel}
	if c.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(e.stderr, o))
	}
	return slog.New(slog.NewTextHandler(e.stderr, o))
}

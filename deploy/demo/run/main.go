package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

const usage = `usage: demo run [--backend auto|ebpf|iptables] [--keep]
       demo clean
       demo exec [--uid N] POD COMMAND...`

var errUsage = errors.New("wrong usage")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:])
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	case errors.Is(err, context.Canceled):
		fmt.Fprintln(os.Stderr, "demo: interrupted")
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errUsage
	}
	o, err := defaults()
	if err != nil {
		return err
	}
	fs := flag.NewFlagSet("demo "+args[0], flag.ContinueOnError)
	fs.StringVar(&o.backend, "backend", "auto", "redirection backend: auto, ebpf or iptables")
	fs.BoolVar(&o.keep, "keep", false, "leave everything running at the end")
	uid := fs.Int("uid", appUID, "user that exec runs the command as")
	if err := fs.Parse(args[1:]); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("network namespaces, mounts and eBPF need root: run as root, for example with sudo -E make demo")
	}
	switch args[0] {
	case "run":
		return runHost(ctx, o)
	case "node": // the part of run that is inside the node's network namespace
		return runNode(ctx, o)
	case "clean":
		return errors.Join(clean(o), removeLock())
	case "exec":
		if fs.NArg() < 2 {
			return errUsage
		}
		return enter(fs.Arg(0), *uid, fs.Args()[1:])
	}
	return errUsage
}

// Names of everything that the demo makes. Nothing of an installed Sluice has them.
const (
	prefix   = "sluice-demo-"
	nodeName = prefix + "node"
	stateDir = "/run/sluice-demo"
	netnsDir = "/run/netns"
	appUID   = 1000
	proxyUID = 1337
)

// options say where things are.
type options struct {
	backend   string
	keep      bool
	self      string // this program
	bin       string // sluice-agent, sluice-cni, bookshop
	cni       string // bridge, host-local, loopback
	envoy     string
	manifests string
}

func defaults() (options, error) {
	self, err := os.Executable()
	if err != nil {
		return options{}, fmt.Errorf("find own program: %w", err)
	}
	root := filepath.Dir(filepath.Dir(self))
	o := options{
		self: self, bin: filepath.Dir(self), cni: filepath.Join(root, ".tools/cni"),
		envoy: os.Getenv("SLUICE_ENVOY"), manifests: filepath.Join(root, "deploy/demo/manifests"),
	}
	if o.envoy == "" {
		o.envoy = filepath.Join(root, ".tools/envoy/envoy")
	}
	return o, nil
}

// check names what the demo needs and the machine lacks.
func (o options) check() error {
	var missing []string
	for _, p := range []string{
		o.bin + "/sluice-agent", o.bin + "/sluice-cni", o.bin + "/bookshop", o.envoy,
		o.cni + "/bridge", o.cni + "/host-local", o.cni + "/loopback", o.manifests,
	} {
		if _, err := os.Stat(p); err != nil {
			missing = append(missing, p)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("missing: %s (make demo brings them)", strings.Join(missing, ", "))
	}
	return nil
}

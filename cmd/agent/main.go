package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the linker.
var version = "dev"

// An env is all that the program takes from its surroundings.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	hostname       func() (string, error)
}

// A command is one subcommand. Its function gets the arguments after its name.
type command struct {
	name, summary string
	run           func(ctx context.Context, e env, args []string) error
}

func commands() []command {
	return []command{
		{"run", "redirect this node's pods and serve their sidecars", runAgent},
		{"uninstall", "remove everything that agents put into this node's kernel", runUninstall},
		{"probe", "tell which redirection backends this node can have, and why not", runProbe},
		{"status", "tell how the agent of this node and its pods are", runStatus},
		{"inject", "add the sidecar to Kubernetes YAML", runInject},
		{"bootstrap", "print the Envoy bootstrap that all sidecars share", runBootstrap},
		{"paircheck", "for the agent itself: try connections of its own namespace", runPairCheck},
		{"version", "print the version", runVersion},
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], env{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv, hostname: os.Hostname})
	stop()
	os.Exit(code)
}

// errUsage marks a command line that is not understood; what is wrong with it
// has been printed already.
var errUsage = errors.New("usage")

func run(ctx context.Context, args []string, e env) int {
	if len(args) > 0 {
		for _, c := range commands() {
			if c.name != args[0] {
				continue
			}
			switch err := c.run(ctx, e, args[1:]); {
			case errors.Is(err, flag.ErrHelp):
				return 0
			case errors.Is(err, errUsage):
				return 2
			case err != nil:
				_, _ = fmt.Fprintf(e.stderr, "sluice-agent %s: %v\n", c.name, err)
				return 1
			}
			return 0
		}
	}
	help := len(args) > 0 && (args[0] == "help" || args[0] == "-h" || args[0] == "--help")
	out, code := e.stderr, 2
	if help {
		out, code = e.stdout, 0
	} else if len(args) > 0 {
		_, _ = fmt.Fprintf(out, "sluice-agent: unknown command %q\n\n", args[0])
	}
	_, _ = fmt.Fprint(out, "Usage: sluice-agent COMMAND [flags]\n\nCommands:\n")
	for _, c := range commands() {
		_, _ = fmt.Fprintf(out, "  %-10s %s\n", c.name, c.summary)
	}
	_, _ = fmt.Fprint(out, "\nEvery flag of a command can be given as an environment variable:\n--state-dir is SLUICE_STATE_DIR. sluice-agent COMMAND --help lists them.\n")
	return code
}

func runVersion(_ context.Context, e env, args []string) error {
	if err := parse(flags(e, "version"), e, args); err != nil {
		return err
	}
	_, err := fmt.Fprintln(e.stdout, version)
	return err
}

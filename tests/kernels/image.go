package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/sluicemesh/sluice/tests/kernels/wire"
)

// A builder makes what all machines have in common.
type builder struct {
	// repo is the root of the repository, bin where programs are built.
	repo, bin string
}

// programs builds the programs that run in machines, static, and returns a tree
// with them and with the programs of this machine that tests call.
func (b builder) programs(ctx context.Context, packages []string) (tree, error) {
	t := tree{}
	for pkg, path := range map[string]string{
		"./tests/kernels/guest": "/init", "./tests/kernels/facts": factsProgram, "./cmd/agent": agentProgram,
	} {
		out := filepath.Join(b.bin, filepath.Base(path))
		if err := b.build(ctx, "build", out, pkg); err != nil {
			return nil, err
		}
		t.add(path, out)
	}
	for _, pkg := range packages {
		out := filepath.Join(b.bin, filepath.Base(testProgram(pkg)))
		if err := b.build(ctx, "test", out, "./"+pkg, "-c"); err != nil {
			return nil, err
		}
		t.add(testProgram(pkg), out)
		data := filepath.Join(b.repo, pkg, "testdata")
		if _, err := os.Stat(data); err == nil {
			if err := t.addDir(filepath.Join(sourceDir, pkg, "testdata"), data); err != nil {
				return nil, err
			}
		}
		t[filepath.Join(sourceDir, pkg, ".here")] = node{mode: 0o644} // makes the directory
	}
	t.add(filepath.Join(sourceDir, "go.mod"), filepath.Join(b.repo, "go.mod"))
	return t, addTools(t)
}

func (b builder) build(ctx context.Context, verb, out, pkg string, flags ...string) error {
	args := append([]string{verb, "-trimpath", "-ldflags=-s -w", "-o", out}, flags...)
	cmd := exec.CommandContext(ctx, "go", append(args, pkg)...)
	cmd.Dir = b.repo
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", pkg, err, msg)
	}
	return nil
}

// Where programs of the repository are in the machine.
const (
	factsProgram = "/usr/bin/facts"
	agentProgram = "/usr/bin/sluice-agent"
)

// addTools adds what tests call: iptables of both variants, and some programs of
// every node.
func addTools(t tree) error {
	for _, variant := range []string{"nft", "legacy"} {
		var names []string
		for _, family := range []string{"iptables", "ip6tables"} {
			for _, verb := range []string{"", "-save", "-restore"} {
				names = append(names, family+"-"+variant+verb)
				if variant == "nft" {
					names = append(names, family+verb) // as on Debian
				}
			}
		}
		path, err := findProgram("iptables-" + variant)
		if err != nil {
			return err
		}
		if err := t.addProgram(path, names...); err != nil {
			return err
		}
	}
	plugins := "/usr/lib/x86_64-linux-gnu/xtables"
	if err := t.addDir(plugins, plugins); err != nil {
		return fmt.Errorf("find matches of iptables: %w", err)
	}
	for _, name := range []string{"cat", "grep", "id", "nft", "readlink", "sh", "sleep"} {
		path, err := findProgram(name)
		if err != nil {
			return err
		}
		if err := t.addProgram(path, name); err != nil {
			return err
		}
	}
	return nil
}

// findProgram is exec.LookPath that also finds what only root has in PATH.
func findProgram(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	return exec.LookPath(filepath.Join("/usr/sbin", name))
}

// initramfs writes the file system of a machine with kernel k that runs steps.
func initramfs(path string, common tree, k kernel, steps []wire.Step) error {
	t := tree{}
	for p, n := range common {
		t[p] = n
	}
	modules, err := k.modules(wantedModules())
	if err != nil {
		return err
	}
	job := wire.Job{Steps: steps}
	for _, m := range modules {
		name := filepath.Base(m)
		t.add(filepath.Join(wire.ModuleDir, name), m)
		job.Modules = append(job.Modules, name)
	}
	b, err := json.Marshal(job)
	if err != nil {
		return fmt.Errorf("write job: %w", err)
	}
	t[wire.JobPath] = node{content: b, mode: 0o644}
	return t.write(path)
}

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// suite is the release of Debian whose packages the image consists of.
const suite = "trixie"

// What the image needs of Debian. With iptables comes what it needs itself;
// base-files gives no more than the release's name, by which scanners know
// whose packages they see.
const (
	wanted     = "iptables"
	identifier = "base-files"
)

// listsAge is how old package lists may be before they are fetched again.
const listsAge = 24 * time.Hour

// fetch returns the paths of the packages of the image, sorted by name, from the
// cache or else from the mirror.
func fetch(ctx context.Context, o options) ([]string, error) {
	for _, tool := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("find %s: the image consists of Debian packages, so that it is made on Debian or one of its kin, or from deploy/image/Dockerfile anywhere: %w", tool, err)
		}
	}
	if _, err := os.Stat(o.keyring); err != nil {
		return nil, fmt.Errorf("find Debian's keys (apt-get install debian-archive-keyring, or name them as -keyring): %w", err)
	}
	if err := o.findMirrors(ctx); err != nil {
		return nil, err
	}
	a := apt{dir: filepath.Join(o.cache, suite+"-"+o.arch)}
	if err := a.prepare(o); err != nil {
		return nil, fmt.Errorf("prepare package cache %s: %w", a.dir, err)
	}
	st, err := os.Stat(a.stamp())
	fresh := err == nil && time.Since(st.ModTime()) < listsAge
	if fresh {
		if debs, err := a.packages(ctx); err == nil {
			return debs, nil
		}
		// Packages that the lists name may be gone from the mirror by now.
	}
	if err := a.run(ctx, "update"); err != nil {
		return nil, fmt.Errorf("fetch package lists of Debian %s: %w", suite, err)
	}
	if err := os.WriteFile(a.stamp(), nil, 0o644); err != nil {
		return nil, err
	}
	return a.packages(ctx)
}

// findMirrors completes o with the mirrors from which this machine gets its own
// packages.
func (o *options) findMirrors(ctx context.Context) error {
	if o.mirror != "" && o.security != "" {
		return nil
	}
	// It needs no package lists and fetches nothing.
	out, err := exec.CommandContext(ctx, "apt-get", "--print-uris", "update").Output()
	if err != nil {
		return fmt.Errorf("ask apt for its mirrors, or give --mirror and --security-mirror: %w", err)
	}
	o.addMirrors(string(out))
	if o.mirror == "" || o.security == "" {
		return errors.New("apt of this machine names no mirror of Debian and of its security updates: give --mirror and --security-mirror")
	}
	return nil
}

// addMirrors takes the first mirror of each kind from the addresses of releases
// that apt prints. Mirrors of Debian are told from other sources by how their
// paths end.
func (o *options) addMirrors(uris string) {
	for _, line := range strings.Split(uris, "\n") {
		uri, _, ok := strings.Cut(strings.TrimPrefix(line, "'"), "/dists/")
		switch {
		case !ok || !strings.HasPrefix(uri, "http"):
		case strings.HasSuffix(uri, "/debian-security"):
			o.security = cmp.Or(o.security, uri)
		case strings.HasSuffix(uri, "/debian"):
			o.mirror = cmp.Or(o.mirror, uri)
		}
	}
}

// An apt is one that knows nothing of the machine that it runs on.
type apt struct {
	dir string
}

func (a apt) stamp() string { return filepath.Join(a.dir, "updated") }
func (a apt) debs() string  { return filepath.Join(a.dir, "cache", "archives") }

func (a apt) prepare(o options) error {
	for _, dir := range []string{"lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"} {
		if err := os.MkdirAll(filepath.Join(a.dir, dir), 0o755); err != nil {
			return err
		}
	}
	sources := fmt.Sprintf("deb [signed-by=%[1]s] %[2]s %[3]s main\ndeb [signed-by=%[1]s] %[4]s %[3]s-security main\n",
		o.keyring, o.mirror, suite, o.security)
	conf := strings.NewReplacer("DIR", a.dir, "ARCH", o.arch).Replace(`Dir "DIR";
Dir::State "DIR";
Dir::State::status "DIR/status";
Dir::State::lists "DIR/lists";
Dir::Cache "DIR/cache";
Dir::Etc "DIR/etc";
Dir::Etc::sourcelist "DIR/etc/sources.list";
Dir::Etc::sourceparts "-";
APT::Architecture "ARCH";
APT::Architectures { "ARCH"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
`)
	if old, err := os.ReadFile(filepath.Join(a.dir, "etc/sources.list")); err == nil && string(old) != sources {
		if err := os.Remove(a.stamp()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return errors.Join(
		os.WriteFile(filepath.Join(a.dir, "status"), nil, 0o644), // nothing is installed
		os.WriteFile(filepath.Join(a.dir, "etc/sources.list"), []byte(sources), 0o644),
		os.WriteFile(filepath.Join(a.dir, "apt.conf"), []byte(conf), 0o644),
	)
}

// packages returns the packages' paths, and downloads what is not there yet.
func (a apt) packages(ctx context.Context) ([]string, error) {
	all, err := a.closure(ctx, wanted)
	if err != nil {
		return nil, err
	}
	named, err := a.closure(ctx, identifier)
	if err != nil {
		return nil, err
	}
	for _, p := range named {
		if p.name == identifier && !slices.Contains(all, p) {
			all = append(all, p)
		}
	}
	var debs, lacking []string
	for _, p := range all {
		deb := filepath.Join(a.debs(), p.file())
		debs = append(debs, deb)
		if _, err := os.Stat(deb); err != nil {
			lacking = append(lacking, p.name+"="+p.version)
		}
	}
	if len(lacking) > 0 {
		if err := a.run(ctx, append([]string{"-qq", "download"}, lacking...)...); err != nil {
			return nil, fmt.Errorf("download packages: %w", err)
		}
	}
	slices.Sort(debs)
	return debs, nil
}

// A pkg is a package as apt would install it.
type pkg struct{ name, version, arch string }

// file is what apt calls the package's file.
func (p pkg) file() string {
	return p.name + "_" + strings.ReplaceAll(p.version, ":", "%3a") + "_" + p.arch + ".deb"
}

// closure returns what apt would install for a package where nothing is.
func (a apt) closure(ctx context.Context, name string) ([]pkg, error) {
	out, err := output(a.command(ctx, []string{"-s", "-qq", "install", name}))
	if err != nil {
		return nil, fmt.Errorf("find out what package %s needs: %w", name, err)
	}
	all := parseSimulation(out)
	if len(all) == 0 {
		return nil, fmt.Errorf("find out what package %s needs: apt-get names no package", name)
	}
	return all, nil
}

// parseSimulation reads lines like
//
//	Inst libmnl0 (1.0.5-3 Debian:13.7/stable [amd64]) []
func parseSimulation(out string) []pkg {
	var all []pkg
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 4 || f[0] != "Inst" {
			continue
		}
		end := strings.Index(line, "])")
		if end < 0 {
			continue
		}
		open := strings.LastIndex(line[:end], " [")
		if open < 0 {
			continue
		}
		all = append(all, pkg{name: f[1], version: strings.TrimPrefix(f[2], "("), arch: line[open+2 : end]})
	}
	return all
}

func (a apt) command(ctx context.Context, args []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Dir = a.debs() // where "download" puts files
	cmd.Env = append(os.Environ(), "APT_CONFIG="+filepath.Join(a.dir, "apt.conf"), "LC_ALL=C")
	return cmd
}

func (a apt) run(ctx context.Context, args ...string) error {
	out, err := a.command(ctx, args).CombinedOutput()
	if err != nil {
		return fmt.Errorf("run apt-get %s: %w: %s", strings.Join(args, " "), err, lastLine(out))
	}
	return nil
}

// output returns what cmd prints; what it says on stderr is in the error.
func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("run %s: %w: %s", strings.Join(cmd.Args, " "), err, lastLine(stderr.Bytes()))
	}
	return stdout.String(), nil
}

func lastLine(b []byte) string {
	b = bytes.TrimSpace(b)
	return string(b[bytes.LastIndexByte(b, '\n')+1:])
}

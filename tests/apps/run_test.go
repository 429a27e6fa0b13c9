package apps

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

const (
	// appUID is who servers and clients are.
	appUID = 1500
	// startDeadline bounds the preparation and the start of a server, runDeadline
	// a client.
	startDeadline = 120 * time.Second
	runDeadline   = 180 * time.Second
)

// A machine is what all containers of a test process have in common.
type machine struct {
	layers   []string
	have     map[string]bool   // applications whose packages are there
	packages map[string]string // of each application, to name them
	programs string
	tls      string            // prefix of the certificate
	dirs     map[string]string // of each application
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	repo := need.Repo(t)
	unpacked := filepath.Join(repo, ".tools", "apps")
	m := &machine{
		programs: filepath.Join(repo, "tests", "apps", "testdata"),
		have:     map[string]bool{}, packages: readPackages(t), dirs: map[string]string{},
	}
	have, err := os.ReadFile(filepath.Join(unpacked, "have"))
	if err == nil {
		for _, name := range strings.Fields(string(have)) {
			m.have[name] = true
		}
	} else if !os.IsNotExist(err) {
		t.Fatal(err)
	}
	users := m.dir(t, "users")
	write(t, filepath.Join(users, "etc", "passwd"), read(t, "/etc/passwd")+
		fmt.Sprintf("app:*:%d:%[1]d::/:/bin/sh\nsshd:*:%d:%[2]d::/run/sshd:/usr/sbin/nologin\n", appUID, appUID+1))
	write(t, filepath.Join(users, "etc", "group"), read(t, "/etc/group")+fmt.Sprintf("app:x:%d:\nsshd:x:%d:\n", appUID, appUID+1))
	// No name server is there to be asked for what /etc/hosts has not.
	write(t, filepath.Join(users, "etc", "nsswitch.conf"), "passwd: files\ngroup: files\nhosts: files\n")
	m.layers = []string{users, filepath.Join(unpacked, "root")}
	m.tls = filepath.Join(m.dir(t, "tls"), "server")
	writeCertificate(t, m.tls)
	return m
}

// readPackages returns the packages of each application.
func readPackages(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for line := range strings.Lines(read(t, "packages.txt")) {
		if name, packages, ok := strings.Cut(strings.TrimSpace(line), ": "); ok && name[0] != '#' {
			all[name] = packages
		}
	}
	return all
}

// need demands the packages of an application.
func (m *machine) need(t *testing.T, name string) {
	t.Helper()
	if !m.have[name] {
		need.Missing(t, fmt.Sprintf("Debian's packages %s (tests/setup/setup.sh apps)", m.packages[name]))
	}
}

// dir makes a directory that the application's user may write, and which goes
// with the test.
func (m *machine) dir(t *testing.T, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", name+"-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, appUID, appUID); err != nil {
		t.Fatal(err)
	}
	return dir
}

// container returns one of the application's, in which hosts is /etc/hosts.
func (m *machine) container(t *testing.T, a app, hosts, host string, port int, script string) container {
	t.Helper()
	layer := t.TempDir()
	write(t, filepath.Join(layer, "etc", "hosts"), hosts)
	return container{
		Layers: append([]string{layer}, m.layers...),
		UID:    appUID,
		Dir:    m.dirs[a.name],
		Env: []string{
			"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=" + m.dirs[a.name], "PYTHONDONTWRITEBYTECODE=1",
			"HOST=" + host, "PORT=" + strconv.Itoa(port), "TLS=" + m.tls, "PROGRAMS=" + m.programs,
		},
		Script: script,
	}
}

const localhost = "127.0.0.1 localhost pod\n::1 localhost\n"

// prepare fills the application's directory, which is there as long as owner.
func (m *machine) prepare(t, owner *testing.T, a app, ns netnstest.Namespace) {
	t.Helper()
	m.dirs[a.name] = m.dir(owner, a.name)
	if a.prepare != "" {
		if _, err := m.run(t, m.container(t, a, localhost, "localhost", a.port, a.prepare), ns, startDeadline); err != nil {
			t.Fatalf("prepare: %v", err)
		}
	}
}

// serve starts the application's server and returns how to end it.
func (m *machine) serve(t *testing.T, a app, ns netnstest.Namespace, port int) (stop func()) {
	t.Helper()
	c := m.container(t, a, localhost, "localhost", port, a.server)
	if a.root {
		c.UID = 0
	}
	cmd := c.command(t, ns)
	log, err := os.OpenFile(filepath.Join(t.TempDir(), "log"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Kill()
		if t.Failed() {
			t.Logf("server logged:\n%s", tail(read(t, log.Name())))
		}
		_ = log.Close()
	})
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // its log says why
		close(ended)
	}()
	ready := func() bool { return listens(t, ns, port) }
	if a.ready != "" {
		probe := m.container(t, a, localhost, "127.0.0.1", port, a.ready)
		ready = func() bool {
			_, err := m.run(t, probe, ns, startDeadline)
			return err == nil
		}
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(startDeadline); !ready(); {
		if time.Now().After(deadline) {
			t.Fatalf("the server is not ready after %v", startDeadline)
		}
		select {
		case <-ended:
			t.Fatal("the server has ended before it was ready")
		case <-tick.C:
		}
	}
	return cmd.Kill
}

// client runs the application's client against addr, and returns what it
// printed and how long it took.
func (m *machine) client(t *testing.T, a app, ns netnstest.Namespace, addr netip.Addr, port int) (string, time.Duration) {
	t.Helper()
	c := m.container(t, a, localhost+fmt.Sprintf("%s server\n", addr), "server", port, a.client)
	began := time.Now()
	out, err := m.run(t, c, ns, runDeadline)
	took := time.Since(began)
	if err != nil {
		t.Fatalf("client: %v", err)
	}
	for _, want := range a.want {
		if !regexp.MustCompile("(?m)" + want).MatchString(out) {
			t.Errorf("the client did not print %q, but:\n%s", want, tail(out))
		}
	}
	return out, took
}

// run runs a container to its end and returns what it printed.
func (m *machine) run(t *testing.T, c container, ns netnstest.Namespace, deadline time.Duration) (string, error) {
	t.Helper()
	cmd := c.command(t, ns)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	defer context.AfterFunc(ctx, cmd.Kill)()
	err := cmd.Wait()
	if ctx.Err() != nil {
		err = fmt.Errorf("killed: %w", ctx.Err())
	}
	if err != nil {
		return "", fmt.Errorf("%w\nit printed:\n%sand said:\n%s", err, tail(stdout.String()), tail(stderr.String()))
	}
	return stdout.String(), nil
}

// listens says whether somebody listens on the port in the namespace.
func listens(t *testing.T, ns netnstest.Namespace, port int) bool {
	t.Helper()
	listening := regexp.MustCompile(fmt.Sprintf(`(?m)^ *\d+: [0-9A-F]+:%04X [0-9A-F]+:0000 0A `, port))
	found := false
	err := ns.Do(func() error {
		for _, family := range []string{"tcp", "tcp6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + family)
			if err != nil {
				return err
			}
			found = found || listening.Match(b)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("look for listeners: %v", err)
	}
	return found
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// tail keeps the end of a long text.
func tail(s string) string {
	const most = 4 << 10
	if len(s) > most {
		s = "...\n" + s[len(s)-most:]
	}
	return s
}

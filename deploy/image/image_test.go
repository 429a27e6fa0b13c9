package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseSimulation(t *testing.T) {
	const out = `NOTE: This is only a simulation!
Inst gcc-14-base (14.2.0-19 Debian:13.7/stable [amd64])
Inst libgcc-s1 (14.2.0-19 Debian:13.7/stable [amd64]) []
Inst netbase (6.5 Debian:13.7/stable [all])
Inst x (1:2+b1 Debian:13.7/stable, Debian-Security:13/stable [arm64])
Conf gcc-14-base (14.2.0-19 Debian:13.7/stable [amd64])
`
	want := []pkg{
		{"gcc-14-base", "14.2.0-19", "amd64"},
		{"libgcc-s1", "14.2.0-19", "amd64"},
		{"netbase", "6.5", "all"},
		{"x", "1:2+b1", "arm64"},
	}
	got := parseSimulation(out)
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(pkg{})); diff != "" {
		t.Error(diff)
	}
	if f := got[3].file(); f != "x_1%3a2+b1_arm64.deb" {
		t.Errorf("file of a version with an epoch: %s", f)
	}
}

// debian is the tar of a package.
func debian(t *testing.T, entries ...tar.Header) *tar.Reader {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		body := []byte("body of " + h.Name)
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(body))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(body); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return tar.NewReader(&b)
}

func TestAddTar(t *testing.T) {
	f := files{}
	f.symlink("lib", "usr/lib")
	err := f.addTar(debian(
		t,
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		tar.Header{Name: "./lib/", Typeflag: tar.TypeDir, Mode: 0o755},
		tar.Header{Name: "./lib/x.so.1", Typeflag: tar.TypeReg, Mode: 0o644},
		tar.Header{Name: "./usr/sbin/tool", Typeflag: tar.TypeReg, Mode: 0o755},
		tar.Header{Name: "./usr/sbin/alias", Typeflag: tar.TypeSymlink, Linkname: "tool", Mode: 0o777},
		tar.Header{Name: "./usr/share/doc/p/copyright", Typeflag: tar.TypeReg, Mode: 0o644},
		tar.Header{Name: "./usr/share/doc/p/changelog.gz", Typeflag: tar.TypeReg, Mode: 0o644},
		tar.Header{Name: "./usr/share/man/man8/tool.8", Typeflag: tar.TypeReg, Mode: 0o644},
	), false)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"lib", "usr", "usr/lib", "usr/lib/x.so.1", "usr/sbin", "usr/sbin/alias", "usr/sbin/tool", "usr/share", "usr/share/doc", "usr/share/doc/p", "usr/share/doc/p/copyright"}
	if diff := cmp.Diff(want, f.paths()); diff != "" {
		t.Error(diff)
	}
	if f["lib"].mode&os.ModeSymlink == 0 {
		t.Error("a package's directory has taken the place of the link lib")
	}
	if err := f.addTar(debian(t, tar.Header{Name: "./dev/x", Typeflag: tar.TypeChar}), false); err == nil {
		t.Error("a device is accepted")
	}
}

// TestImage packs an image twice and reads it as a runtime does.
func TestImage(t *testing.T) {
	base, own := files{}, files{}
	base.dir("etc", 0o755)
	base.symlink("var/run", "../run")
	base["etc/a"] = file{mode: 0o600, body: []byte("a")}
	own["b"] = file{mode: 0o755, body: bytes.Repeat([]byte("b"), 1000)}
	o := options{arch: "arm64", name: "sluicemesh/sluice-agent:1,reg.example:5000/a:2", version: "v1", revision: "abc"}
	when := time.Unix(1700000000, 0).UTC()
	var packed [2][]byte
	for i := range packed {
		image, err := newImage(o, agentImage, when, base, own)
		if err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(t.TempDir(), "image.tar")
		if _, err := image.writeFile(out, when); err != nil {
			t.Fatal(err)
		}
		if packed[i], err = os.ReadFile(out); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(packed[0], packed[1]) {
		t.Error("the same files make two different images")
	}

	in := untar(t, bytes.NewReader(packed[0]))
	var index manifest
	unmarshal(t, in["index.json"], &index)
	var names []string
	for _, m := range index.Manifests {
		names = append(names, m.Annotations["io.containerd.image.name"])
		if m.Platform.Architecture != "arm64" || m.Digest != digest(in[blobName(m.Digest)]) {
			t.Errorf("manifest %+v", m)
		}
	}
	if diff := cmp.Diff([]string{"docker.io/sluicemesh/sluice-agent:1", "reg.example:5000/a:2"}, names); diff != "" {
		t.Error(diff)
	}
	var m manifest
	unmarshal(t, in[blobName(index.Manifests[0].Digest)], &m)
	var config imageConfig
	unmarshal(t, in[blobName(m.Config.Digest)], &config)
	if config.Config.Labels["org.opencontainers.image.version"] != "v1" || config.Config.Entrypoint[0] != "/usr/local/bin/sluice-agent" {
		t.Errorf("config %+v", config)
	}
	if len(m.Layers) != 2 || len(config.RootFS.DiffIDs) != 2 {
		t.Fatalf("%d layers, %d IDs", len(m.Layers), len(config.RootFS.DiffIDs))
	}
	for i, l := range m.Layers {
		z, err := gzip.NewReader(bytes.NewReader(in[blobName(l.Digest)]))
		if err != nil {
			t.Fatal(err)
		}
		raw, err := io.ReadAll(z)
		if err != nil || digest(raw) != config.RootFS.DiffIDs[i] {
			t.Errorf("layer %d is not what its ID says: %v", i, err)
		}
	}
	var docker []dockerImage
	unmarshal(t, in["manifest.json"], &docker)
	if len(docker) != 1 || len(docker[0].Layers) != 2 || in[docker[0].Config] == nil {
		t.Errorf("manifest.json %+v", docker)
	}
}

func untar(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		if all[h.Name], err = io.ReadAll(in); err != nil {
			t.Fatal(err)
		}
	}
}

func unmarshal(t *testing.T, b []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

// TestOwnFiles: a program for another architecture is refused, and one that is not
// there.
func TestOwnFiles(t *testing.T) {
	dir := t.TempDir()
	if _, err := ownFiles("amd64", "usr/local/bin/", filepath.Join(dir, "sluice-agent")); err == nil || !strings.Contains(err.Error(), "sluice-agent") {
		t.Errorf("without programs: %v", err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	other := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
	if err := checkProgram(self, other); err == nil || !strings.Contains(err.Error(), "is for") {
		t.Errorf("program of %s in an image for %s: %v", runtime.GOARCH, other, err)
	}
}

// TestProgramImage packs one program and looks what a runtime would start.
func TestProgramImage(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"go.mod": "module nothing\n", "main.go": "package main\n\nfunc main() {}\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", "nothing", ".")
	build.Dir, build.Env = dir, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=mod")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out := filepath.Join(dir, "image.tar")
	args := []string{"-arch", runtime.GOARCH, "-program", filepath.Join(dir, "nothing"), "-o", out, "-name", "a:1"}
	var text strings.Builder
	if err := run(t.Context(), args, &text, io.Discard); err != nil {
		t.Fatal(err)
	}
	packed, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	in := untar(t, bytes.NewReader(packed))
	var docker []dockerImage
	unmarshal(t, in["manifest.json"], &docker)
	var config imageConfig
	unmarshal(t, in[docker[0].Config], &config)
	if c := config.Config; c.User != "1000:1000" || !slices.Equal(c.Entrypoint, []string{"/nothing"}) {
		t.Errorf("config %+v", c)
	}
	z, err := gzip.NewReader(bytes.NewReader(in[docker[0].Layers[0]]))
	if err != nil {
		t.Fatal(err)
	}
	if layer := untar(t, z); len(layer) != 1 || layer["nothing"] == nil {
		t.Errorf("files %v", slices.Collect(maps.Keys(layer)))
	}
}

func TestCheckOptions(t *testing.T) {
	good := options{arch: "arm64", bin: "bin", out: "x.tar", name: "a:1", cache: "cache"}
	if err := good.check(nil); err != nil {
		t.Errorf("good options: %v", err)
	}
	for want, change := range map[string]func(*options){
		"-arch":       func(o *options) { o.arch = "mips" },
		"-bin":        func(o *options) { o.bin = "" },
		"-program:":   func(o *options) { o.program = "x" },
		"-rootfs:":    func(o *options) { o.bin, o.program, o.out, o.rootfs = "", "x", "", "dir" },
		"-cache":      func(o *options) { o.cache = "" },
		"-o and":      func(o *options) { o.rootfs = "dir" },
		`-name "a"`:   func(o *options) { o.name = "a" },
		`-name "b/c"`: func(o *options) { o.name = "a:1,b/c" },
	} {
		o := good
		change(&o)
		if err := o.check(nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %s", err, want)
		}
	}
	if err := good.check([]string{"more"}); err == nil {
		t.Error("a superfluous argument is accepted")
	}
}

func TestMirrors(t *testing.T) {
	var o options
	o.addMirrors("'http://node.example/repo/dists/nodistro/InRelease' a 0 \n'http://m.example/debian-security/dists/x-security/InRelease' b 0\n" +
		"'http://m.example/debian/dists/x/InRelease' c 0 \n'http://second.example/debian/dists/x/InRelease' d 0 \n'cdrom:[x]/debian/dists/x/InRelease' e 0\n")
	if o.mirror != "http://m.example/debian" || o.security != "http://m.example/debian-security" {
		t.Errorf("mirror %q, of security updates %q", o.mirror, o.security)
	}
	o = options{mirror: "http://mine/debian"}
	o.addMirrors("'http://m.example/debian/dists/x/InRelease' c 0 \n")
	if o.mirror != "http://mine/debian" || o.security != "" {
		t.Errorf("with an own one: mirror %q, of security updates %q", o.mirror, o.security)
	}
}

package main

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A kernel is one that "make setup-kernels" has unpacked.
type kernel struct {
	// name is how the table calls it: "6.1" or "newest".
	name string
	dir  string
	// release is what uname says of it, version its package's.
	release, version string
	// notServed says how it was told that the archive has none; "" if it has.
	notServed string
}

// openKernel looks at the kernel with that name in dir.
func openKernel(dir, name string) (kernel, error) {
	k := kernel{name: name, dir: filepath.Join(dir, name)}
	for file, to := range map[string]*string{"release": &k.release, "version": &k.version, "not-served": &k.notServed} {
		b, err := os.ReadFile(filepath.Join(k.dir, file))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return kernel{}, fmt.Errorf("read kernel: %w", err)
		}
		*to = strings.TrimSpace(string(b))
	}
	if k.notServed == "" && (k.release == "" || k.version == "") {
		return kernel{}, fmt.Errorf("kernel %s is not in %s", name, k.dir)
	}
	return k, nil
}

func (k kernel) image() string { return filepath.Join(k.dir, "vmlinuz") }

// wantedModules are those of nodes: what a pod's network is made of, and what
// both backends use of the kernel. A machine that has booted from a disk gets
// them by name when they are first used.
func wantedModules() []string {
	return []string{
		"crc32c_generic", "veth", "bridge", "sch_ingress", "cls_bpf", "inet_diag", "tcp_diag", "unix_diag", "tls",
		"nf_tables", "nft_compat", "nft_chain_nat", "nft_counter", "nft_ct", "nf_conntrack", "nf_nat",
		"ip_tables", "iptable_filter", "iptable_nat", "iptable_mangle", "iptable_raw", "ipt_REJECT",
		"ip6_tables", "ip6table_filter", "ip6table_nat", "ip6table_mangle", "ip6table_raw", "ip6t_REJECT",
		"xt_tcpudp", "xt_REDIRECT", "xt_nat", "xt_owner", "xt_multiport", "xt_mark", "xt_conntrack", "xt_cgroup",
		"xt_addrtype", "xt_comment",
	}
}

// modules returns the files of the wanted modules and of those that they
// depend on, each after its own. What the kernel has built in, or has not, is
// no file.
func (k kernel) modules(wanted []string) ([]string, error) {
	var ordered []string
	seen := map[string]bool{}
	var add func(name string, required bool) error
	add = func(name string, required bool) error {
		name = strings.ReplaceAll(name, "-", "_")
		if seen[name] {
			return nil
		}
		seen[name] = true
		path, err := k.module(name)
		if err != nil {
			return err
		}
		if path == "" {
			if required {
				return fmt.Errorf("find module %s of kernel %s: it is not there, and another one needs it", name, k.release)
			}
			return nil
		}
		needs, err := moduleNeeds(path)
		if err != nil {
			return err
		}
		for _, n := range needs {
			if err := add(n, true); err != nil {
				return err
			}
		}
		ordered = append(ordered, path)
		return nil
	}
	for _, name := range wanted {
		if err := add(name, false); err != nil {
			return nil, err
		}
	}
	return ordered, nil
}

// module returns the file of a module, "" if there is none. Its name has hyphens
// or underscores, as its source has.
func (k kernel) module(name string) (string, error) {
	files, err := filepath.Glob(filepath.Join(k.dir, "modules", "*.ko"))
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(files, func(f string) bool {
		return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(f), ".ko"), "-", "_") == name
	})
	if i < 0 {
		return "", nil
	}
	return files[i], nil
}

// moduleNeeds reads the names of the modules that one depends on.
func moduleNeeds(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", path, err)
	}
	defer func() { _ = f.Close() }()
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("read module %s: it has no section .modinfo", path)
	}
	info, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", path, err)
	}
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		if names, ok := bytes.CutPrefix(entry, []byte("depends=")); ok && len(names) > 0 {
			return strings.Split(string(names), ","), nil
		}
	}
	return nil, nil
}

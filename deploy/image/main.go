package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// options is the command line.
type options struct {
	arch     string // as Go and Debian call it
	bin      string // directory of sluice-agent and sluice-cni
	program  string // a program that is all of the image, in place of these
	cache    string
	mirror   string
	security string
	keyring  string
	out      string
	rootfs   string
	name     string
	version  string
	revision string
	epoch    int64
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var o options
	fs := flag.NewFlagSet("image", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.arch, "arch", "amd64", "`architecture` of the image: amd64 or arm64")
	fs.StringVar(&o.bin, "bin", "", "`directory` with sluice-agent and sluice-cni for that architecture")
	fs.StringVar(&o.program, "program", "", "static `program` to make an image of that holds nothing else, in place of the agent's; runs as user 1000")
	fs.StringVar(&o.cache, "cache", "", "`directory` for package lists and packages")
	fs.StringVar(&o.mirror, "mirror", "", "`address` of a Debian mirror; empty: the one that this machine uses")
	fs.StringVar(&o.security, "security-mirror", "", "`address` of a mirror of Debian's security updates; empty: the one that this machine uses")
	fs.StringVar(&o.keyring, "keyring", "/usr/share/keyrings/debian-archive-keyring.gpg", "`file` with Debian's keys")
	fs.StringVar(&o.out, "o", "", "image tar to write")
	fs.StringVar(&o.rootfs, "rootfs", "", "`directory` to unpack the files into, in place of an image")
	fs.StringVar(&o.name, "name", "", "name and tag of the image, comma-separated if there are several")
	fs.StringVar(&o.version, "version", "unknown", "version for the image's label")
	fs.StringVar(&o.revision, "revision", "unknown", "commit for the image's label")
	fs.Int64Var(&o.epoch, "epoch", 0, "seconds since 1970 for all times in the image")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if err := o.check(fs.Args()); err != nil {
		return err
	}

	when := time.Unix(o.epoch, 0).UTC()
	if o.program != "" {
		return programImage(o, when, stdout)
	}
	debs, err := fetch(ctx, o)
	if err != nil {
		return err
	}
	base, err := baseFiles(ctx, debs)
	if err != nil {
		return err
	}
	own, err := ownFiles(o.arch, "usr/local/bin/", filepath.Join(o.bin, "sluice-agent"), filepath.Join(o.bin, "sluice-cni"))
	if err != nil {
		return err
	}
	if o.rootfs != "" {
		return errors.Join(base.unpack(o.rootfs), own.unpack(o.rootfs))
	}
	image, err := newImage(o, agentImage, when, base, own)
	if err != nil {
		return err
	}
	size, err := image.writeFile(o.out, when)
	if err != nil {
		return err
	}
	const mb = 1e6
	_, err = fmt.Fprintf(stdout, "%s  linux/%s  %s  %.1f MB packed, %.1f MB unpacked (packages %.1f, Sluice %.1f)  %s\n",
		o.out, o.arch, image.digest, float64(size)/mb, float64(base.size()+own.size())/mb,
		float64(base.size())/mb, float64(own.size())/mb, o.name)
	return err
}

// programImage makes an image of one program.
func programImage(o options, when time.Time, stdout io.Writer) error {
	own, err := ownFiles(o.arch, "", o.program)
	if err != nil {
		return err
	}
	name := filepath.Base(o.program)
	image, err := newImage(o, purpose{name, "The program " + name + " and nothing else", "1000:1000", "/" + name}, when, own)
	if err != nil {
		return err
	}
	if _, err := image.writeFile(o.out, when); err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "%s  linux/%s  %s  %s\n", o.out, o.arch, image.digest, o.name)
	return err
}

func (o *options) check(rest []string) error {
	var errs []error
	wrong := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if len(rest) > 0 {
		wrong("unexpected argument %q", rest[0])
	}
	if _, ok := machines[o.arch]; !ok {
		wrong("-arch %q: must be amd64 or arm64", o.arch)
	}
	if (o.bin == "") == (o.program == "") {
		wrong("-bin and -program: name the directory with sluice-agent and sluice-cni, or one program")
	}
	if o.program != "" && o.rootfs != "" {
		wrong("-rootfs: goes with -bin")
	}
	if (o.out == "") == (o.rootfs == "") {
		wrong("-o and -rootfs: give one of them")
	}
	if o.out != "" {
		for name := range strings.SplitSeq(o.name, ",") {
			if base := name[strings.LastIndexByte(name, '/')+1:]; !strings.Contains(base, ":") {
				wrong("-name %q: must be NAME:TAG", name)
			}
		}
	}
	if o.cache == "" && o.program == "" {
		wrong("-cache: name a directory")
	}
	var err error
	if o.cache, err = filepath.Abs(o.cache); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

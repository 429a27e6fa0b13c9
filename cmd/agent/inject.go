package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/sluicemesh/sluice/deploy/helm"
	"github.com/sluicemesh/sluice/pkg/podwatch/inject"
)

// runInject is `sluice-agent inject`: what the chart's admission policy does to
// pods, done to YAML. Nothing is printed unless all of it is right.
func runInject(_ context.Context, e env, args []string) error {
	sources := inject.Sources{Sidecar: helm.Sidecar(), Bootstrap: helm.Bootstrap(), Values: helm.Values()}
	annotations, err := inject.Annotations(sources)
	if err != nil {
		return err
	}
	var files fileList
	var values string
	fs := flags(e, "inject")
	fs.Var(&files, "f", "`file` of Kubernetes YAML, - for standard input; may be given several times")
	fs.StringVar(&values, "values", "", "`file` of values of the Helm chart, for the defaults of the sidecar")
	namespace := fs.String("release-namespace", "sluice-system", "`namespace` that Sluice runs in, where nothing is injected")
	options := inject.Options{Set: make(map[string]string)}
	for _, a := range annotations {
		usage := fmt.Sprintf("`%s` for sidecars whose pod has no annotation sluice.dev/%s (default %q)", a.Wants, a.Name, a.Default)
		fs.Func(a.Name, usage, func(value string) error {
			options.Set[a.Name] = value
			return nil
		})
	}
	if err := parse(fs, e, args); err != nil {
		return err
	}
	if len(files) == 0 {
		_, _ = fmt.Fprintln(e.stderr, "-f is missing: want a file, or - for standard input")
		return errUsage
	}
	if values != "" {
		if options.Values, err = os.ReadFile(values); err != nil {
			return fmt.Errorf("read values: %w", err)
		}
	}
	options.ReleaseNamespace = *namespace
	injector, err := inject.New(sources, options)
	if err != nil {
		return err
	}
	return injectFiles(injector, e, files)
}

// injectFiles prints the files one after the other, with sidecars.
func injectFiles(injector *inject.Injector, e env, files []string) error {
	var out bytes.Buffer
	var notes []string
	var errs []error
	for _, name := range files {
		data, err := readInput(e, name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if name == "-" {
			name = "standard input"
		}
		result, err := injector.Inject(name, data)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if out.Len() > 0 {
			if !bytes.HasSuffix(out.Bytes(), []byte("\n")) {
				out.WriteByte('\n')
			}
			if !bytes.HasPrefix(result.YAML, []byte("---")) {
				out.WriteString("---\n")
			}
		}
		out.Write(result.YAML)
		notes = append(notes, result.Notes...)
	}
	for _, note := range notes {
		_, _ = fmt.Fprintln(e.stderr, note)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_, err := e.stdout.Write(out.Bytes())
	return err
}

func readInput(e env, name string) ([]byte, error) {
	if name != "-" {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read YAML: %w", err)
		}
		return data, nil
	}
	data, err := io.ReadAll(e.stdin)
	if err != nil {
		return nil, fmt.Errorf("read standard input: %w", err)
	}
	return data, nil
}

// A fileList is a flag that may be given several times.
type fileList []string

var _ flag.Value = (*fileList)(nil)

func (l *fileList) String() string { return strings.Join(*l, ",") }

// Set adds a file.
func (l *fileList) Set(name string) error {
	if name == "" {
		return errors.New("want a file, or - for standard input")
	}
	*l = append(*l, name)
	return nil
}

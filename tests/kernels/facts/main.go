package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/bpf"
	"github.com/sluicemesh/sluice/pkg/redirect/iptables"
	"github.com/sluicemesh/sluice/tests/kernels/wire"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: facts AGENT")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "facts:", err)
		os.Exit(1)
	}
}

func run(agent string) error {
	var f wire.Facts
	var err error
	if f.Backend, f.Reason, err = chosen(agent); err != nil {
		return err
	}
	programs, err := bpf.Verify()
	if err != nil {
		return err
	}
	for _, v := range programs {
		f.Programs = append(f.Programs, wire.Program{Name: v.Program, Instructions: v.Instructions, Refused: text(v.Err)})
	}
	f.Features = map[string]string{}
	for _, feature := range bpf.Features() {
		f.Features[feature.Name] = text(feature.Err)
	}
	f.IPTables = map[string]string{}
	for _, variant := range []string{iptables.VariantNFT, iptables.VariantLegacy} {
		err := iptables.Probe(iptables.Options{Variant: variant})
		if err != nil && !errors.Is(err, redirect.ErrNotSupported) {
			return err
		}
		f.IPTables[variant] = text(err)
	}
	return json.NewEncoder(os.Stdout).Encode(f)
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

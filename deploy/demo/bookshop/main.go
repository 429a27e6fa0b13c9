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

const usage = "usage: bookshop productpage|details|reviews|ratings|echo|client|load [flags]"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bookshop:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	fs := flag.NewFlagSet("bookshop "+args[0], flag.ContinueOnError)
	fs.SetOutput(stderr)
	if args[0] == "client" {
		return runClient(ctx, fs, args[1:], stdout)
	}
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("read host name: %w", err)
	}
	s := server{name: args[0], version: "v1", host: host, stdout: stdout}
	if s.name == "load" {
		return s.runLoad(ctx, fs, args[1:])
	}
	listen := fs.String("listen", ":9080", "`address` to serve on")
	version := fs.String("version", "v1", "version that answers name; reviews v1 does not ask ratings")
	details := fs.String("details", "http://details:9080", "`URL` of details, for productpage")
	reviews := fs.String("reviews", "http://reviews:9080", "`URL` of reviews, for productpage")
	ratings := fs.String("ratings", "ratings:9080", "`host:port` of ratings (gRPC), for reviews")
	if err := fs.Parse(args[1:]); err != nil {
		return err
	}
	s.version, s.listen = *version, *listen
	switch s.name {
	case "productpage":
		return s.serveHTTP(ctx, productpage(*details, *reviews))
	case "details":
		return s.serveHTTP(ctx, noCalls)
	case "reviews":
		if *version == "v1" {
			return s.serveHTTP(ctx, noCalls)
		}
		return s.serveReviews(ctx, *ratings)
	case "ratings":
		return s.serveRatings(ctx)
	case "echo":
		return s.serveEcho(ctx)
	}
	return fmt.Errorf("unknown program %q; %s", s.name, usage)
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"
)

// A Report is what client counted.
type Report struct {
	Requests int `json:"requests"`
	Failed   int `json:"failed"`
	// Errors are the distinct errors and how often they came.
	Errors map[string]int `json:"errors,omitempty"`
	// By counts the answers by "service version" of every server that took part.
	By map[string]int `json:"by"`
	// Hosts counts the answers by the host of every server that took part.
	Hosts map[string]int `json:"hosts"`
	// P50 and P99 are quantiles, Max the longest time of the requests that did not fail.
	P50     time.Duration `json:"p50"`
	P99     time.Duration `json:"p99"`
	Max     time.Duration `json:"max"`
	Elapsed time.Duration `json:"elapsed"`
	// Last is the last answer that came.
	Last *Answer `json:"last,omitempty"`
	// Local and Remote are the last connection's addresses as the client saw them.
	Local  string `json:"local"`
	Remote string `json:"remote"`

	times []time.Duration
}

// runClient sends requests until n are done or, with n 0, ctx ends; then it
// prints a Report as JSON.
func runClient(ctx context.Context, fs *flag.FlagSet, args []string, stdout io.Writer) error {
	url := fs.String("url", "http://productpage:9080/", "`URL` to get")
	n := fs.Int("n", 1, "requests in all; 0 means until SIGTERM")
	workers := fs.Int("c", 1, "requests at a time")
	fresh := fs.Bool("new-connections", false, "make a connection for each request")
	cookie := fs.String("cookie", "", "Cookie header to send")
	id := fs.String("id", "", "X-Request-Id header to send")
	pause := fs.Duration("pause", 0, "time between two requests of each worker")
	if err := fs.Parse(args); err != nil {
		return err
	}
	client := &http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{
		MaxIdleConnsPerHost: *workers, DisableKeepAlives: *fresh, IdleConnTimeout: 30 * time.Second,
	}}
	header := http.Header{}
	if *cookie != "" {
		header.Set("Cookie", *cookie)
	}
	if *id != "" {
		header.Set("X-Request-Id", *id)
	}

	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		todo  = *n
		total = Report{Errors: map[string]int{}, By: map[string]int{}, Hosts: map[string]int{}}
	)
	next := func() bool {
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() != nil || (*n > 0 && todo == 0) {
			return false
		}
		todo--
		return true
	}
	start := time.Now()
	for range *workers {
		wg.Go(func() {
			for next() {
				// A request that was begun is finished: the end of the load is no error.
				began := time.Now()
				c, err := get(&http.Request{Header: header}, client, *url)
				took := time.Since(began)
				mu.Lock()
				total.add(c, took, err)
				mu.Unlock()
				select {
				case <-time.After(*pause):
				case <-ctx.Done():
				}
			}
		})
	}
	wg.Wait()
	total.Elapsed = time.Since(start)
	total.finish()
	if err := json.NewEncoder(stdout).Encode(total); err != nil {
		return fmt.Errorf("print report: %w", err)
	}
	if total.Failed > 0 {
		return errors.New("requests failed")
	}
	return nil
}

func (r *Report) add(c Call, took time.Duration, err error) {
	r.Requests++
	if err != nil {
		r.Failed++
		r.Errors[err.Error()]++
		return
	}
	r.times = append(r.times, took)
	r.Last, r.Local, r.Remote = &c.Answer, c.Local, c.Remote
	r.count(c.Answer)
}

func (r *Report) count(a Answer) {
	r.By[a.Service+" "+a.Version]++
	r.Hosts[a.Host]++
	for _, c := range a.Calls {
		r.count(c.Answer)
	}
}

func (r *Report) finish() {
	if len(r.times) == 0 {
		return
	}
	slices.Sort(r.times)
	r.P50 = r.times[len(r.times)/2]
	r.P99 = r.times[len(r.times)*99/100]
	r.Max = r.times[len(r.times)-1]
}

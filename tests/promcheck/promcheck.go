package promcheck

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"
)

// A Prometheus is a running one. It may be used by several goroutines.
type Prometheus struct {
	// URL is its address, such as http://127.0.0.1:9090.
	URL string
	// Client reaches it; nil means http.DefaultClient.
	Client *http.Client
}

// A Sample is one series of an answer. Value is as Prometheus writes it.
type Sample struct {
	Labels map[string]string
	Value  string
}

// Query evaluates an expression now.
func (p Prometheus) Query(ctx context.Context, expr string) ([]Sample, error) {
	var data struct {
		ResultType string
		Result     []struct {
			Metric map[string]string
			Value  [2]any
		}
	}
	if err := p.get(ctx, "/api/v1/query?query="+url.QueryEscape(expr), &data); err != nil {
		return nil, fmt.Errorf("query %s: %w", expr, err)
	}
	if data.ResultType != "vector" {
		return nil, fmt.Errorf("query %s: the answer is a %s, not a vector", expr, data.ResultType)
	}
	out := make([]Sample, 0, len(data.Result))
	for _, r := range data.Result {
		value, _ := r.Value[1].(string)
		out = append(out, Sample{r.Metric, value})
	}
	return out, nil
}

// Targets returns an error unless at least want targets are scraped, all of them
// without an error.
func (p Prometheus) Targets(ctx context.Context, want int) error {
	var data struct {
		ActiveTargets []struct{ ScrapeURL, Health, LastError string }
	}
	if err := p.get(ctx, "/api/v1/targets?state=active", &data); err != nil {
		return fmt.Errorf("list targets: %w", err)
	}
	var errs []error
	if n := len(data.ActiveTargets); n < want {
		errs = append(errs, fmt.Errorf("%d targets, want %d", n, want))
	}
	for _, t := range data.ActiveTargets {
		if t.Health != "up" {
			errs = append(errs, fmt.Errorf("target %s is %s: %s", t.ScrapeURL, t.Health, t.LastError))
		}
	}
	return errors.Join(errs...)
}

func (p Prometheus) get(ctx context.Context, path string, data any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(p.URL, "/")+path, nil)
	if err != nil {
		return err
	}
	client := p.Client
	if client == nil {
		client = http.DefaultClient
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	answer := struct {
		Status, ErrorType, Error string
		Data                     any
	}{Data: data}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return fmt.Errorf("status %d: %w", resp.StatusCode, err)
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s: %s", answer.ErrorType, answer.Error)
	}
	return nil
}

// A PanelQuery is a query of a dashboard and how many series it gave.
type PanelQuery struct {
	Panel, Expr string
	// Series are those with a value that is a number.
	Series int
	// MayBeEmpty is set if the panel says what it shows when there is nothing to
	// be shown ("noValue"), as one does that is about trouble.
	MayBeEmpty bool
}

// Dashboard evaluates each query of the Grafana dashboard in file at the
// Prometheus at url, with all variables at "All". Queries that Prometheus
// refuses are one error, beside the others' answers.
func Dashboard(ctx context.Context, url, file string) ([]PanelQuery, error) {
	return Prometheus{URL: url}.Dashboard(ctx, file)
}

// Dashboard is the function Dashboard.
func (p Prometheus) Dashboard(ctx context.Context, file string) ([]PanelQuery, error) {
	queries, err := readDashboard(file)
	if err != nil {
		return nil, err
	}
	var errs []error
	for i := range queries {
		samples, err := p.Query(ctx, queries[i].Expr)
		if err != nil {
			errs = append(errs, fmt.Errorf("panel %s: %w", queries[i].Panel, err))
		}
		for _, s := range samples {
			if s.Value != "NaN" {
				queries[i].Series++
			}
		}
	}
	return queries, errors.Join(errs...)
}

// Empty names the queries that should have an answer and have none.
func Empty(queries []PanelQuery) error {
	var errs []error
	for _, q := range queries {
		if q.Series == 0 && !q.MayBeEmpty {
			errs = append(errs, fmt.Errorf("panel %s is empty: %s", q.Panel, q.Expr))
		}
	}
	return errors.Join(errs...)
}

// Poll calls check until it returns nil, and returns its last error when ctx ends
// before.
func Poll(ctx context.Context, check func() error) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// readDashboard returns the queries of panels and variables, without variables.
func readDashboard(file string) ([]PanelQuery, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read dashboard: %w", err)
	}
	var d struct {
		Templating struct {
			List []struct {
				Name, Type string
				Query      json.RawMessage
			}
		}
		Panels []struct {
			Title, Type string
			Targets     []struct{ Expr string }
			FieldConfig struct{ Defaults struct{ NoValue string } }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		return nil, fmt.Errorf("read dashboard %s: %w", file, err)
	}
	known := map[string]string{"__rate_interval": "1m"}
	var out []PanelQuery
	add := func(panel, expr string, mayBeEmpty bool) error {
		expr, err := expand(expr, known)
		if err != nil {
			return fmt.Errorf("read dashboard %s: %s: %w", file, panel, err)
		}
		out = append(out, PanelQuery{Panel: panel, Expr: expr, MayBeEmpty: mayBeEmpty})
		return nil
	}
	for _, v := range d.Templating.List {
		known[v.Name] = ".*"
		if v.Type != "query" {
			continue
		}
		var query struct{ Query string }
		if err := json.Unmarshal(v.Query, &query); err != nil {
			return nil, fmt.Errorf("read dashboard %s: variable %s: %w", file, v.Name, err)
		}
		parts := labelValues.FindStringSubmatch(query.Query)
		if parts == nil {
			return nil, fmt.Errorf("read dashboard %s: variable %s: %q is not label_values(metric, label)", file, v.Name, query.Query)
		}
		if err := add("variable "+v.Name, fmt.Sprintf(`count by (%s) (%s)`, parts[2], withLabel(parts[1], parts[2])), false); err != nil {
			return nil, err
		}
	}
	for _, p := range d.Panels {
		if p.Type != "row" && len(p.Targets) == 0 {
			return nil, fmt.Errorf("read dashboard %s: panel %s has no query", file, p.Title)
		}
		for _, t := range p.Targets {
			if err := add(p.Title, t.Expr, p.FieldConfig.Defaults.NoValue != ""); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// withLabel is the selector for series that have the label.
func withLabel(selector, label string) string {
	if inner, ok := strings.CutSuffix(selector, "}"); ok {
		return fmt.Sprintf(`%s, %s!=""}`, inner, label)
	}
	return fmt.Sprintf(`%s{%s!=""}`, selector, label)
}

var (
	labelValues = regexp.MustCompile(`^label_values\((.+), (\w+)\)$`)
	variable    = regexp.MustCompile(`\$(\w+)`)
)

// expand puts in the values of variables. Unknown ones are an error: Grafana
// would leave them as they are.
func expand(expr string, known map[string]string) (string, error) {
	var errs []error
	out := variable.ReplaceAllStringFunc(expr, func(name string) string {
		value, ok := known[name[1:]]
		if !ok {
			errs = append(errs, fmt.Errorf("unknown variable %s", name))
		}
		return value
	})
	return out, errors.Join(errs...)
}

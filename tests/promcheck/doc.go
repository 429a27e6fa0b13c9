// Package promcheck asks a real Prometheus whether it can use what Sluice gives
// it: whether every target is scraped without an error, and whether each query
// of the Grafana dashboard is one that it understands and has an answer to.
//
// Start runs a Prometheus of the test's own; what it needs is fetched by
// "tests/setup/setup.sh prometheus". Everything else takes any Prometheus by
// its address, that of a cluster for example.
package promcheck

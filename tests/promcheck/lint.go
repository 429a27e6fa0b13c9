package promcheck

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// Lint returns what promtool says against the metrics of a scrape whose names
// begin with prefix.
func Lint(ctx context.Context, tb testing.TB, scrape, prefix string) error {
	tb.Helper()
	var ours bytes.Buffer
	for line := range strings.Lines(scrape) {
		name := strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE ")
		if strings.HasPrefix(name, prefix) {
			ours.WriteString(line)
		}
	}
	if ours.Len() == 0 {
		return fmt.Errorf("no metric begins with %s", prefix)
	}
	return promtool(ctx, tb, ours.String(), "check", "metrics")
}

// promtool runs it with an input. Whatever it says is an error.
func promtool(ctx context.Context, tb testing.TB, input string, args ...string) error {
	tb.Helper()
	cmd := exec.CommandContext(ctx, Tool(tb, "promtool"), args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("promtool %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

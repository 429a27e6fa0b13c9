package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestChecksAreWritten(t *testing.T) {
	ok := check{name: "redirection", detail: "backend ebpf"}
	problem := check{name: "pod shop/web", detail: "bad annotation", problem: true}
	for name, test := range map[string]struct {
		checks []check
		code   int
		body   string
	}{
		"ready": {[]check{{name: "source"}, ok}, http.StatusOK, "[+]source ok\n[+]redirection ok (backend ebpf)\n"},
		"not ready": {
			[]check{{name: "source", err: errors.New("not read\nyet")}, ok},
			http.StatusServiceUnavailable,
			"[-]source not read; yet\n[+]redirection ok (backend ebpf)\n",
		},
		"ready with a problem": {[]check{ok, problem}, http.StatusOK, "[+]redirection ok (backend ebpf)\n[!]pod shop/web bad annotation\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			writeChecks(w, test.checks)
			if diff := cmp.Diff(test.body, w.Body.String()); w.Code != test.code || diff != "" {
				t.Errorf("status %d, want %d; body -want +got:\n%s", w.Code, test.code, diff)
			}
		})
	}
}

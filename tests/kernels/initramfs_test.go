package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestInitramfs reads an archive back by the format's description
// (Documentation/driver-api/early-userspace/buffer-format.rst of Linux).
func TestInitramfs(t *testing.T) {
	from := filepath.Join(t.TempDir(), "from")
	if err := os.WriteFile(from, []byte("12345"), 0o755); err != nil {
		t.Fatal(err)
	}
	tr := tree{
		"/usr/bin/program": {from: from},
		"/usr/bin/name":    {link: "/usr/bin/program"},
		"/job":             {content: []byte("do"), mode: 0o600},
	}
	path := filepath.Join(t.TempDir(), "cpio")
	if err := tr.write(path); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"job 100600 do", "usr 40755 ", "usr/bin 40755 ", "usr/bin/name 120777 /usr/bin/program", "usr/bin/program 100755 12345", "TRAILER!!! 0 ",
	}
	if diff := cmp.Diff(want, readArchive(t, b)); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
}

func readArchive(t *testing.T, b []byte) []string {
	t.Helper()
	var all []string
	aligned := func(n int) int { return (n + 3) &^ 3 }
	for at := 0; at < len(b); {
		var field [13]int
		if got := string(b[at : at+6]); got != "070701" {
			t.Fatalf("at %d: magic %q", at, got)
		}
		for i := range field {
			if _, err := fmt.Sscanf(string(b[at+6+8*i:at+14+8*i]), "%x", &field[i]); err != nil {
				t.Fatalf("at %d: field %d: %v", at, i, err)
			}
		}
		mode, size, nameLen := field[1], field[6], field[11]
		name := strings.TrimSuffix(string(b[at+110:at+110+nameLen]), "\x00")
		data := aligned(at + 110 + nameLen)
		all = append(all, fmt.Sprintf("%s %o %s", name, mode, b[data:data+size]))
		at = aligned(data + size)
	}
	return all
}

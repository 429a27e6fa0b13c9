package server

import "strings"

// A rejection is one resource of a response that a client rejected.
type rejection struct{ name, err string }

// parseNACK finds the resources that the text of an error names. Envoy answers
// for listeners
//
//	Error adding/updating listener(s) NAME: TEXT\nNAME: TEXT\n
//
// and for clusters
//
//	Error adding/updating cluster(s) NAME: TEXT, NAME: TEXT
//
// where TEXT may hold the separators, and the names of other resources, too.
// Therefore a name counts only if it is that of a resource of the response and
// stands at the beginning of an entry. Other types' errors name nothing.
func parseNACK(msg string, known func(name string) bool) []rejection {
	if _, rest, ok := strings.Cut(msg, "Error adding/updating "); ok {
		if _, entries, ok := strings.Cut(rest, "(s) "); ok {
			msg = entries
		}
	}
	var found []rejection
	from := 0 // of the last entry's text
	done := map[string]bool{}
	for at := 0; at < len(msg); {
		if name := nameAt(msg[at:], known); name != "" && !done[name] {
			if n := len(found); n > 0 {
				found[n-1].err = strings.Trim(msg[from:at], ", \n")
			}
			found = append(found, rejection{name: name})
			done[name] = true
			at += len(name) + len(": ")
			from = at
		}
		next := strings.IndexAny(msg[at:], "\n,")
		if next < 0 {
			break
		}
		at += next + 1
		if msg[at-1] == ',' && strings.HasPrefix(msg[at:], " ") {
			at++
		}
	}
	if n := len(found); n > 0 {
		found[n-1].err = strings.Trim(msg[from:], ", \n")
	}
	return found
}

// maxName bounds the search for the end of a name.
const maxName = 1024

// nameAt returns the longest known name that s begins with, before ": ".
func nameAt(s string, known func(string) bool) (name string) {
	s = s[:min(len(s), maxName)]
	for i := 0; ; {
		n := strings.Index(s[i:], ": ")
		if n < 0 {
			return name
		}
		if known(s[:i+n]) {
			name = s[:i+n]
		}
		i += n + 1
	}
}

// Package docs checks what the documents claim about the repository: that the
// tests they name are there, and that their links lead somewhere.
//
// It does not run commands that documents show, and does not judge their words.
//
// Its tests only read files of the repository.
//
// It has no functions for others.
package docs

// Package translate turns services and pods into Envoy's listeners, routes,
// clusters and endpoints. Each object is translated on its own, so that a
// change of one service costs one service's work, and what does not depend on
// the pod is the same bytes for all pods of the node.
//
// It serves nothing and remembers nothing; package server does.
//
// A Translator is read-only after New and safe for concurrent use. Equal input
// gives equal bytes, in this and in any later process of the same release.
//
// Every message is checked against Envoy's own constraints before it is
// returned. A part that cannot be translated is left out, or answered 500, and
// named in the error; the rest is returned beside that error.
package translate

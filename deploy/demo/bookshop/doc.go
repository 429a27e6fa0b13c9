// Bookshop is the programs of Sluice's demo in one binary: productpage, details,
// reviews and ratings, small servers that call each other over HTTP and gRPC;
// echo, a server that sends back what it gets; client, which puts load on them
// and counts; and load, which does so for as long as it runs, with requests on
// kept and on new connections and with streams to echo, and serves its counts.
//
// The programs are ordinary: they know nothing of Sluice, Envoy or any mesh and
// address each other by host name. Each answer says which process gave it, who
// had connected to it, and which addresses its own calls saw, so that the way
// of a request can be told from the answer alone.
//
// A server runs until SIGTERM, then finishes the requests that it has. It holds
// no state.
//
// A call that fails makes the caller answer 502 with the error's text.
package main

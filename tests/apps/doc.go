// Package apps runs real servers with their own clients: once directly, and
// then through two sidecar Envoys with Sluice, for each backend, and compares
// what the clients print. What passed is counted by both Envoys and by the agent.
//
// table_test.go has the applications: how a Service calls the port, how the
// server is started, what the client does and what it must print. Where the port
// is declared, it has that name in its Service, and is called over IPv4;
// undeclared, it has another number, no name, and is called over IPv6, so that
// the sidecars must find out what it speaks.
//
// Server and client run as in a container: with namespaces of their own for
// network, mounts and processes, and the packages of packages.txt laid over the
// machine's /usr and /etc, where they are not installed. So no service of the
// machine is started or touched, and what a server forks ends with it.
//
//	make test-apps                          # gets the packages, runs all of them
//	make test-apps APPS=redis,nats BACKEND=ebpf
package apps

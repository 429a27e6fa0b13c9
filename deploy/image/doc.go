// Command image makes the container image of the agent without a container
// engine and without an image registry: programs of Debian packages, and the two
// programs of Sluice, which the caller has built.
//
// With -program it makes an image of one static program and nothing else, which is
// what the bookshop's is.
//
// It does not build Go programs, does not push, and changes nothing of the
// machine's own apt: package lists and packages are kept in a directory of its
// own, where apt checks them against Debian's keys.
//
// What it writes is a tar that is an OCI layout and what "docker load" reads at
// once: "ctr images import" and "docker load" both take it. The same packages and
// programs give the same bytes. With -rootfs it unpacks the files into a directory
// instead, which is what the Dockerfile copies.
//
// Errors name the program, package or file, and what to install if a tool of
// Debian is missing.
package main

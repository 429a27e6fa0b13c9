// Package cniinstall puts the CNI plugin on a node and keeps it there: the
// binary in the directory of CNI plugins, and an entry for it at the end of the
// node's primary network configuration, the first valid one that the container
// runtime finds.
//
// It makes no network configuration of its own, changes nothing of others but
// that entry, and leaves everything in place when it ends: a plugin without an
// agent makes new pods wait, where a missing one would let them start without
// redirection. Uninstall takes both away again.
//
// Every file is written aside and renamed into place, so that at any moment,
// also after a kill, a runtime finds a configuration that is whole. Files beside
// the configurations are hidden from runtimes by their names, which end neither
// in .conf nor .conflist nor .json:
//
//	.sluice-cni-*.tmp    while a file is being written
//	NAME.sluice-saved    a single configuration that was turned into a list, as
//	                     it was, for Uninstall
//
// Nothing else is remembered: an entry that was made here says so itself
// (managedBy), so that an installer can go on where another one ended anywhere.
//
// An Installer may be used by several goroutines; Run may be called once. One
// Installer at a time may work in a directory.
//
// Errors are for people. Those of Run are few: ErrDirGone says that restarting
// the process helps, everything else is waited for and told by Status.
package cniinstall

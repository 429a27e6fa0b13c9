// Package kube tests Sluice as its users run it: installed by Helm on a real
// cluster, with real kubelets, runtimes and Envoys, under steady load.
//
// "make e2e" runs it: on the cluster that KUBECONFIG names, or on one of its own
// that run.sh makes. Without SLUICE_E2E its tests are skipped, in CI too: it
// changes a cluster, which nobody wants from a "go test ./...".
//
// The environment says what there is:
//
//	KUBECONFIG               the cluster; needs at least two nodes
//	SLUICE_E2E               must not be empty
//	SLUICE_E2E_BACKENDS      "ebpf iptables" unless given
//	SLUICE_E2E_AGENT_IMAGE   repository:tag of the agent, and a second tag of the
//	                         same image in SLUICE_E2E_AGENT_IMAGE_2: the upgrade
//	SLUICE_E2E_PROXY_IMAGE   Envoy
//	SLUICE_E2E_APP_IMAGE     deploy/demo/bookshop
//	SLUICE_E2E_HELM          helm, a file or a name in PATH
//	SLUICE_E2E_LAB           a program that gets at the nodes, see below; without
//	                         it what needs that is not run, and the table says so
//	SLUICE_E2E_SNAPSHOT      tests/chart/snapshot, built, where the lab can run it
//	SLUICE_E2E_OUT           directory for what a person wants to see of a failure
//	SLUICE_E2E_KEEP          leaves Sluice and the pods where they are
//	SLUICE_E2E_THROWAWAY     the cluster ends after an interrupt: nothing is taken
//	                         away from it then
//
// The lab is called as
//
//	LAB exec NODE COMMAND..        runs a command as root in the node's namespaces
//	LAB service NODE VERB DAEMON   start, stop or restart of containerd, kubelet,
//	                               or on the first node kube-apiserver
//	LAB off NODE, LAB on NODE      power
//	LAB unmask NODE, LAB mask NODE
//	                               before and after a pod with a user namespace, if
//	                               the node needs something for it
//
// Steady load (deploy/demo/bookshop load) runs on two nodes against both: HTTP on
// kept connections, a connection for each request, and TCP streams that never
// end. Each scenario is done under it, and what it counted meanwhile is the
// scenario's line in the table at the end. A request that failed, a connection
// that broke, and a server that was reached past its sidecar fail the scenario.
package kube

// Package podnetns finds the network namespaces of pods that are older than the
// agent: nobody tells those through CNI, so they are looked up in /proc by the
// cgroups of their processes.
//
// A namespace is taken only if it is not the node's own and carries the pod's
// addresses. It changes nothing and knows nothing of Kubernetes but how the
// kubelet and runtimes name cgroups: v1 and v2, driver systemd and cgroupfs.
//
// It needs CAP_SYS_PTRACE, because processes of other users do not show their
// namespaces without it, and what Options.InNetns needs, CAP_SYS_ADMIN.
//
// Functions may be called at once by several goroutines. Nothing stays open: what
// is found is a path and an inode. A path below /run/netns lives as long as the
// pod's sandbox; one in /proc as long as the process that it goes through, which
// is the pod's oldest: open it soon, and compare the inode then, for numbers of
// processes are used again.
//
// Of one pod, errors wrap ErrNotFound, ErrHostNetwork or ErrNotItsAddrs, or say
// what could not be read. They concern no other pod.
package podnetns

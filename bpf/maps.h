/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Every map. All are pinned by name and survive the agent. Their sizes here
 * are defaults that the agent may override before it creates them.
 */
#pragma once

#include "stats.h"

/*
 * key     netns cookie
 * value   what the hooks need to know of the pod
 * writer  agent; this entry turns redirection on, changes it and ends it
 * reader  every hook
 * full    Add fails, the pod is not redirected and not reported as such
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct sl_pod);
} pods SEC(".maps");

/*
 * key     address of a pod
 * value   netns cookie of the pod that has it
 * writer  agent
 * reader  tcx, sk_lookup: they see packets and have no cookie helper (6.12)
 * full    Add fails; sized twice as large as pods
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2048);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, union sl_addr);
	__type(value, __u64);
} pod_ips SEC(".maps");

/*
 * key     netns cookie
 * value   names of the pod, its namespace and interfaces
 * writer  agent, before anything else of the pod
 * reader  agent: List, Remove and takeover after a restart
 * full    Add fails; sized like pods
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct sl_meta);
} pod_meta SEC(".maps");

/*
 * key     policy id, direction, port
 * value   enum sl_match
 * writer  agent; a policy id is never written again after a pod uses it
 * reader  connect, tcx, sk_lookup
 * full    Add fails and the old policy stays
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sl_port_key);
	__type(value, enum sl_match);
} ports SEC(".maps");

/*
 * key     family, policy id, prefix of a destination
 * value   enum sl_match; the longest match carries the final answer
 * writer  agent; a policy id is never written again after a pod uses it
 * reader  connect
 * full    Add fails and the old policy stays
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sl_cidr_key);
	__type(value, enum sl_match);
} cidrs SEC(".maps");

/*
 * key     socket
 * value   where it was meant to go
 * writer  connect (the client's end), sockops (the proxy's end)
 * reader  sockops, getpeername, getsockopt
 * full    cannot be: it lives and dies with the socket. No memory: connect()
 *         is refused, because an unknown destination could not be reached
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sl_target);
} targets SEC(".maps");

/*
 * key     client end of a connection to the proxy that is being opened
 * value   where it was meant to go
 * writer  sockops: put when the SYN leaves, taken when the proxy's end is
 *         established, taken back when the client's end closes
 * reader  sockops
 * full    the proxy learns no destination and closes the connection: counted,
 *         never sent past the proxy
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct sl_flow_key);
	__type(value, struct sl_target);
} handover SEC(".maps");

/*
 * key     both ends of a connection of the node itself (a kubelet's probe)
 * value   1
 * writer  sockops: put when the SYN leaves, deleted when the socket closes,
 *         however it does: with SYN cookies the pod looks for a listener only
 *         when the client's end is established already
 * reader  tcx, sk_lookup: such a connection passes
 * full    the connection is captured like any other, and counted
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct sl_probe_key);
	__type(value, __u32);
} probes SEC(".maps");

/*
 * key     id of a cgroup that pods live below; 0: all of them are known
 * value   1
 * writer  agent
 * reader  host_connect: which process of the node is a pod's. Without key 0
 *         nobody can tell, and none is exempt
 * full    the agent takes key 0 away
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, __u64);
	__type(value, __u32);
} pod_cgroups SEC(".maps");

/*
 * key     netns cookie
 * value   id of the cgroup of the proxy's container
 * writer  agent, where it knows that
 * reader  connect: of the processes with the proxy's user only those in there
 *         or below are the proxy. Without an entry the user alone counts
 * full    Add fails; sized like pods
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u64);
} proxy_cgroups SEC(".maps");

/*
 * key     netns cookie, family
 * value   the proxy's socket that listens on the inbound port
 * writer  sockops, when it begins to listen. What that has missed: tcx, or where
 *         it may not, the iterator; the kernel removes a socket that closes
 * reader  tcx, sk_lookup
 * full    the SYN is dropped and counted; sized twice as large as pods
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 2048);
	__type(key, struct sl_listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

/*
 * key     netns cookie
 * value   counters per CPU
 * writer  the agent makes the entry, every hook counts in it
 * reader  agent
 * full    Add fails; sized like pods
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct sl_stats);
} stats SEC(".maps");

/*
 * key     name of a map
 * value   hash over the layout of its keys and values
 * writer  agent, when it has made the map
 * reader  agent: another build refuses maps that it would misread
 * full    New fails; far larger than the number of maps
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sl_name);
	__type(value, __u64);
} layouts SEC(".maps");

/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * What the loader sets before the programs are loaded, and the numbers that
 * the data plane shares with Envoy's configuration and with the agent.
 */
#pragma once

#include "headers/helpers.h"

#define SL_OUTBOUND_PORT 15001
#define SL_INBOUND_PORT 15006
#define SL_HEALTH_PORT 15021
#define SL_ADMIN_PORT 15000

/* The socket mark by which the agent is known on the admin port. */
#define SL_AGENT_MARK 0x51ce

/* Interfaces of a pod of one kind, captured or excluded. */
#define SL_MAX_IFS 8
/* lo, in every network namespace. */
#define SL_LOOPBACK_IF 1

/*
 * Whether the kernel has bpf_skc_to_mptcp_sock (5.19, with CONFIG_MPTCP).
 * Without it MPTCP sockets are captured as well, only getpeername() of such a
 * socket names the proxy.
 */
volatile const __u8 sl_have_mptcp = 0;

/* The cookie of the node's own network namespace; 0: not known, no process is exempt. */
volatile const __u64 sl_host_netns = 0;

/*
 * Whether tc programs may put sockets into a map (until Linux 7.2). Where not,
 * the agent looks for listeners that sockops has missed.
 */
volatile const __u8 sl_tc_may_register = 0;

/*
 * How deep the cgroup of a process may lie for a look whether it is a pod's. A
 * kubelet lies two levels below the root, in a container of its own five.
 */
#define SL_CGROUP_LEVELS 16

/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Every structure that crosses between the kernel's programs and the agent.
 * Fixed width, padding spelled out, network byte order marked by _be.
 */
#pragma once

#include "config.h"

/* An address; IPv4 as ::ffff:a.b.c.d. */
union sl_addr {
	__u8 byte[16];
	__be32 word_be[4];
};
_Static_assert(sizeof(union sl_addr) == 16, "sl_addr");

/* How a port or an address stands to the policy. */
enum sl_match {
	SL_MATCH_NONE = 0,
	SL_MATCH_INCLUDED = 1,
	SL_MATCH_EXCLUDED = 2,
};

enum sl_direction {
	SL_OUTBOUND = 0,
	SL_INBOUND = 1,
};

/* All that the hooks need to know of a pod beside its ports and CIDRs. */
struct sl_pod {
	__u64 policy; /* the id under which ports and cidrs hold its policy */
	__u64 digest; /* of the workload, for the agent */
	__u32 proxy_uid;
	__be32 ip4_be;		       /* 0: no IPv4 address */
	union sl_addr ip6;	       /* ::: no IPv6 address */
	__u32 captured_if[SL_MAX_IFS]; /* that have the filter, for the agent */
	__u32 excluded_if[SL_MAX_IFS];
	/* What holds for a port or an address that is in no map. */
	enum sl_match out_port;
	enum sl_match out_addr4;
	enum sl_match out_addr6;
	enum sl_match in_port;
	__u32 entries; /* in ports and cidrs, for the agent */
	__u32 pad;
};
_Static_assert(sizeof(struct sl_pod) == 128, "sl_pod");

/* What the agent wants to find again after a restart; no program reads it. */
struct sl_meta {
	__u64 netns_inode;
	__u8 uid[64];
	__u8 pod[320];
	__u8 netns[256];
	__u8 interfaces[SL_MAX_IFS][16]; /* in the order of captured_if */
};
_Static_assert(sizeof(struct sl_meta) == 776, "sl_meta");

/* The name of a map. */
struct sl_name {
	__u8 byte[16];
};
_Static_assert(sizeof(struct sl_name) == 16, "sl_name");

struct sl_port_key {
	__u64 policy;
	enum sl_direction direction;
	__u16 port; /* host byte order */
	__u16 pad;
};
_Static_assert(sizeof(struct sl_port_key) == 16, "sl_port_key");

/* Trie key: family and policy always match whole, then the address' prefix. */
struct sl_cidr_key {
	__u32 prefixlen;
	__u32 family;
	__u64 policy;
	union sl_addr addr;
};
_Static_assert(sizeof(struct sl_cidr_key) == 32, "sl_cidr_key");
#define SL_CIDR_KEY_BITS 224

/* A connection to the proxy, by its client end. */
struct sl_flow_key {
	__u64 netns;
	union sl_addr addr;
	__be16 port_be;
	__u8 pad[6];
};
_Static_assert(sizeof(struct sl_flow_key) == 32, "sl_flow_key");

enum sl_role {
	SL_DIALED = 1,	 /* the socket of an application that dialled */
	SL_ACCEPTED = 2, /* the socket that the proxy accepted */
	SL_PROBING = 3,	 /* the socket of a process of the node, which is exempt */
};

/* Where a connection was meant to go. */
struct sl_target {
	union sl_addr addr;
	__be16 port_be;
	__u8 role;
	__u8 pad;
};
_Static_assert(sizeof(struct sl_target) == 20, "sl_target");

/* A connection that a process of the node opens to a pod. */
struct sl_probe_key {
	union sl_addr client;
	union sl_addr pod;
	__be16 client_port_be;
	__be16 pod_port_be;
};
_Static_assert(sizeof(struct sl_probe_key) == 36, "sl_probe_key");

struct sl_listener_key {
	__u64 netns;
	__u32 family;
	__u32 pad;
};
_Static_assert(sizeof(struct sl_listener_key) == 16, "sl_listener_key");

/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* Addresses and keys; the only file that converts byte order. */
#pragma once

#include "maps.h"

static __always_inline union sl_addr sl_addr4(__be32 ip_be)
{
	union sl_addr a = {.word_be = {0, 0, bpf_htonl(0xffff), ip_be}};

	return a;
}

static __always_inline bool sl_is4(const union sl_addr *a)
{
	return !a->word_be[0] && !a->word_be[1] && a->word_be[2] == bpf_htonl(0xffff);
}

static __always_inline bool sl_is_zero(const union sl_addr *a)
{
	return !a->word_be[0] && !a->word_be[1] && !a->word_be[2] && !a->word_be[3];
}

static __always_inline bool sl_same(const union sl_addr *a, const union sl_addr *b)
{
	return a->word_be[0] == b->word_be[0] && a->word_be[1] == b->word_be[1] &&
	       a->word_be[2] == b->word_be[2] && a->word_be[3] == b->word_be[3];
}

/* ::n, a form that ::1 and the proxy's ::6 have. */
static __always_inline bool sl_is6_low(const union sl_addr *a, __u32 n)
{
	return !a->word_be[0] && !a->word_be[1] && !a->word_be[2] && a->word_be[3] == bpf_htonl(n);
}

/*
 * Whether a connection to or from this address stays in the namespace. The
 * kernel takes a destination of 0.0.0.0 or :: for loopback. ::6 is the address
 * that the proxy reaches the application from, as 127.0.0.6 is.
 */
static __always_inline bool sl_is_loopback(const union sl_addr *a)
{
	if (sl_is4(a))
		return !a->word_be[3] || (bpf_ntohl(a->word_be[3]) >> 24) == 127;
	return sl_is_zero(a) || sl_is6_low(a, 1) || sl_is6_low(a, 6);
}

/* Whether it is the address that the proxy reaches its own application from. */
static __always_inline bool sl_is_proxy_source(const union sl_addr *a)
{
	return (sl_is4(a) && a->word_be[3] == bpf_htonl(0x7f000006)) || sl_is6_low(a, 6);
}

/*
 * Fields of contexts and of struct bpf_sock are read whole and one by one: the
 * verifier rewrites each load, so the compiler must neither narrow nor merge
 * them nor choose between two addresses.
 */
#define sl_u32(field)                                                                              \
	({                                                                                         \
		__u32 v_ = (field);                                                                \
		asm volatile("" : "+r"(v_));                                                       \
		v_;                                                                                \
	})

/* The IPv6 address in a field of four words. */
#define sl_read6(field)                                                                            \
	({                                                                                         \
		union sl_addr a_;                                                                  \
		a_.word_be[0] = sl_u32((field)[0]);                                                \
		a_.word_be[1] = sl_u32((field)[1]);                                                \
		a_.word_be[2] = sl_u32((field)[2]);                                                \
		a_.word_be[3] = sl_u32((field)[3]);                                                \
		a_;                                                                                \
	})

static __always_inline union sl_addr sl_sock_source(struct bpf_sock *sk)
{
	if (sl_u32(sk->family) == AF_INET)
		return sl_addr4(sl_u32(sk->src_ip4));
	return sl_read6(sk->src_ip6);
}

/* The key under which the client's end publishes a connection. */
static __always_inline struct sl_flow_key sl_flow_local(struct bpf_sock_ops *ctx)
{
	struct sl_flow_key k = {};

	k.netns = bpf_get_netns_cookie(ctx);
	if (sl_u32(ctx->family) == AF_INET)
		k.addr = sl_addr4(sl_u32(ctx->local_ip4));
	else
		k.addr = sl_read6(ctx->local_ip6);
	k.port_be = bpf_htons((__u16)ctx->local_port);
	return k;
}

/* What a process of the node publishes of a connection to a pod. */
static __always_inline struct sl_probe_key sl_probe_local(struct bpf_sock_ops *ctx)
{
	struct sl_probe_key k = {};

	if (sl_u32(ctx->family) == AF_INET) {
		k.client = sl_addr4(sl_u32(ctx->local_ip4));
		k.pod = sl_addr4(sl_u32(ctx->remote_ip4));
	} else {
		k.client = sl_read6(ctx->local_ip6);
		k.pod = sl_read6(ctx->remote_ip6);
	}
	k.client_port_be = bpf_htons((__u16)ctx->local_port);
	k.pod_port_be = bpf_htons((__u16)bpf_ntohl(ctx->remote_port));
	return k;
}

/* The same key as sl_flow_local, seen from the proxy's end. */
static __always_inline struct sl_flow_key sl_flow_remote(struct bpf_sock_ops *ctx)
{
	struct sl_flow_key k = {};

	k.netns = bpf_get_netns_cookie(ctx);
	if (sl_u32(ctx->family) == AF_INET)
		k.addr = sl_addr4(sl_u32(ctx->remote_ip4));
	else
		k.addr = sl_read6(ctx->remote_ip6);
	/* On little endian the port sits in the upper half. */
	k.port_be = bpf_htons((__u16)bpf_ntohl(ctx->remote_port));
	return k;
}

/* Has the kernel tell when the socket closes. */
static __always_inline void sl_ask_for_states(struct bpf_sock_ops *ctx)
{
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Acceleration, as far as connect and sockops have part in it: they find the
 * two ends of connections between an application and its proxy, or between two
 * proxies, and make pairs of them. Both ends of a pair are in accel_socks before
 * a byte goes the short way, or neither is: the client comes first, waits in
 * accel_wait, and is taken out again if the server's end cannot join.
 */
#pragma once

#include "accel_maps.h"
#include "policy.h"

/* Whether the loader has acceleration; else all of this is dead code. */
volatile const __u8 sl_accelerate = 0;

/* The places in which this pod is accelerated, enum sl_place or-ed. */
static __always_inline __u32 sl_places(__u64 netns)
{
	enum sl_place *places = bpf_map_lookup_elem(&accel_pods, &netns);

	return places ? *places : 0;
}

/*
 * Whether a connection with these ends stays between an application and its
 * proxy: one that was led to the proxy's port, or that comes from the address
 * from which the proxy reaches its own application.
 */
static __always_inline bool sl_is_loopback_pair(const struct sl_pair_key *k)
{
	__u16 port = bpf_ntohs(k->server_port_be);

	if (sl_is_proxy_source(&k->client))
		return true;
	return (port == SL_OUTBOUND_PORT || port == SL_INBOUND_PORT) &&
	       sl_same(&k->client, &k->server);
}

/*
 * Whether a connection to this address and port reaches the proxy of another
 * accelerated pod of this node. A pod with excluded interfaces may be reached
 * past its proxy.
 */
static __always_inline bool sl_is_peer(const struct sl_pair_key *k)
{
	__u64 *netns = bpf_map_lookup_elem(&pod_ips, &k->server);
	struct sl_pod *pod = netns ? bpf_map_lookup_elem(&pods, netns) : 0;

	return pod && !pod->excluded_if[0] && (sl_places(*netns) & SL_PEER) &&
	       sl_inbound(pod, bpf_ntohs(k->server_port_be)) == SL_IN_CAPTURED;
}

/* Remembers that it is the proxy who dials with this socket. */
static __always_inline void sl_accel_dial(struct bpf_sock *sk, __u64 netns)
{
	struct sl_end none = {};

	if (sl_accelerate && (sl_places(netns) & SL_PEER))
		bpf_sk_storage_get(&accel_ends, sk, &none, BPF_SK_STORAGE_GET_F_CREATE);
}

static __always_inline struct sl_pair_key sl_pair_of(struct bpf_sock_ops *ctx, enum sl_side side)
{
	struct sl_pair_key k = {};
	union sl_addr local, remote;
	__be16 local_port = bpf_htons((__u16)ctx->local_port);
	__be16 remote_port = bpf_htons((__u16)bpf_ntohl(ctx->remote_port));

	if (sl_u32(ctx->family) == AF_INET) {
		local = sl_addr4(sl_u32(ctx->local_ip4));
		remote = sl_addr4(sl_u32(ctx->remote_ip4));
	} else {
		local = sl_read6(ctx->local_ip6);
		remote = sl_read6(ctx->remote_ip6);
	}
	k.client = side == SL_CLIENT ? local : remote;
	k.server = side == SL_CLIENT ? remote : local;
	k.client_port_be = side == SL_CLIENT ? local_port : remote_port;
	k.server_port_be = side == SL_CLIENT ? remote_port : local_port;
	return k;
}

/* Whether a socket may be an end: no MPTCP subflow, nothing was sent or received. */
static __always_inline bool sl_may_join(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk || ctx->data_segs_out || ctx->data_segs_in)
		return false;
	return !sl_have_mptcp || !bpf_skc_to_mptcp_sock(sk);
}

/*
 * Has the writer held back early, see SL_ACCEL_UNSENT. It stays so when the
 * socket has left its pair: plain TCP on one node hardly notices.
 */
static __always_inline bool sl_hold_early(struct bpf_sock_ops *ctx)
{
	__u32 unsent = SL_ACCEL_UNSENT, mss = ctx->mss_cache;

	if (unsent < 2 * mss)
		unsent = 2 * mss;
	return !bpf_setsockopt(ctx, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof(unsent));
}

/* Makes the socket an end. */
static __always_inline bool sl_join(struct bpf_sock_ops *ctx, struct sl_end *end)
{
	struct bpf_sock *sk = ctx->sk;
	struct sl_end *own;

	if (!sk || !sl_may_join(ctx))
		return false;
	own = bpf_sk_storage_get(&accel_ends, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!own)
		return false;
	*own = *end;
	if (!bpf_sock_hash_update(ctx, &accel_socks, end, BPF_NOEXIST)) {
		if (sl_hold_early(ctx)) {
			sl_ask_for_states(ctx);
			return true;
		}
		bpf_map_delete_elem(&accel_socks, end);
	}
	bpf_sk_storage_delete(&accel_ends, sk);
	return false;
}

/* Fills in where the client's connection belongs; false: nowhere. */
static __always_inline bool sl_find_place(struct bpf_sock_ops *ctx, struct sl_pair_key *k)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	__u32 places = sl_places(netns);
	struct bpf_sock *sk = ctx->sk;

	if (!places || !sk || !sl_accel_on())
		return false;
	*k = sl_pair_of(ctx, SL_CLIENT);
	if (sl_is_loopback_pair(k)) {
		k->netns = netns;
		return places & SL_LOOPBACK;
	}
	return (places & SL_PEER) && bpf_sk_storage_get(&accel_ends, sk, 0, 0) && sl_is_peer(k);
}

/* The client's end is established; the server's will be when our ACK arrives. */
static __always_inline void sl_accel_client(struct bpf_sock_ops *ctx)
{
	struct sl_end end = {.side = SL_CLIENT};
	struct sl_pair pair = {};
	struct sl_pair_key k;

	if (!sl_accelerate || !sl_find_place(ctx, &k))
		return;
	end.pair = bpf_get_socket_cookie(ctx);
	if (bpf_map_update_elem(&accel_pairs, &end.pair, &pair, BPF_NOEXIST)) {
		sl_accel_count(SL_ACCEL_FULL);
		return;
	}
	if (sl_join(ctx, &end)) {
		if (!bpf_map_update_elem(&accel_wait, &k, &end.pair, BPF_ANY))
			return;
		bpf_map_delete_elem(&accel_socks, &end);
		sl_accel_count(SL_ACCEL_FULL);
	}
	bpf_map_delete_elem(&accel_pairs, &end.pair);
}

/* The server's end is established, before anybody can have accepted it. */
static __always_inline void sl_accel_server(struct bpf_sock_ops *ctx)
{
	struct sl_end end = {.side = SL_SERVER}, client = {.side = SL_CLIENT};
	struct sl_pair_key k;
	struct sl_pair *pair;
	__u64 netns, *id;

	if (!sl_accelerate)
		return;
	netns = bpf_get_netns_cookie(ctx);
	if (!sl_places(netns))
		return;
	k = sl_pair_of(ctx, SL_SERVER);
	if (sl_is_loopback_pair(&k))
		k.netns = netns;
	id = bpf_map_lookup_elem(&accel_wait, &k);
	if (!id)
		return;
	end.pair = client.pair = *id;
	bpf_map_delete_elem(&accel_wait, &k);
	pair = bpf_map_lookup_elem(&accel_pairs, &end.pair);
	if (!pair)
		return;
	if (sl_join(ctx, &end)) {
		sl_accel_count(SL_ACCEL_JOINED);
		/* After this line either end may find the other. */
		__sync_fetch_and_add(&pair->joined, 1);
		return;
	}
	/* Nothing went the short way yet: the client's queue is empty. */
	bpf_map_delete_elem(&accel_socks, &client);
	bpf_map_delete_elem(&accel_pairs, &end.pair);
}

/* An end closes. The other one, if it is still there, finds no pair. */
static __always_inline void sl_accel_closed(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sl_pair_key k;
	struct sl_end *end;
	__u64 pair;

	if (!sl_accelerate || !sk)
		return;
	end = bpf_sk_storage_get(&accel_ends, sk, 0, 0);
	if (!end || !end->pair)
		return;
	pair = end->pair;
	if (end->side == SL_CLIENT) {
		k = sl_pair_of(ctx, SL_CLIENT);
		if (sl_is_loopback_pair(&k))
			k.netns = bpf_get_netns_cookie(ctx);
		bpf_map_delete_elem(&accel_wait, &k);
	}
	bpf_map_delete_elem(&accel_pairs, &pair);
}

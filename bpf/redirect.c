// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
/*
 * The data plane: steers the TCP connections of pods to their sidecar Envoy.
 *
 * Outbound: connect remembers where a socket wants to go and sends it to the
 * proxy on the pod's own address; sockops hands the destination over to the
 * socket that the proxy accepts; getsockopt and getpeername answer with it.
 * Inbound: sockops makes the proxy's listener known, tcx sees to it that it is,
 * sk_lookup gives it the connection. No packet is changed in either direction.
 * Probes: what a process of the node dials that belongs to no pod, above all
 * the kubelet, sockops publishes by both its ends, and tcx and sk_lookup let
 * it pass.
 *
 * A socket or packet that belongs to no pod of ours is left alone.
 */
#include "accel.h"

/* Licensed under the GPL too, which is the name that the kernel knows. */
char LICENSE[] SEC("license") = "GPL";

/* A function of its own, so that the object describes enum sl_reason to Go. */
static __noinline void sl_count(__u64 netns, enum sl_reason reason)
{
	struct sl_stats *s = bpf_map_lookup_elem(&stats, &netns);

	if (s)
		__sync_fetch_and_add(&s->count[reason], 1);
}

/* Keeps the destination with the socket, and with the MPTCP socket above it. */
static __always_inline bool sl_remember(struct bpf_sock *sk, const struct sl_target *target)
{
	struct sl_target *t = bpf_sk_storage_get(&targets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!t)
		return false;
	*t = *target;
	if (sl_have_mptcp) {
		struct mptcp_sock *msk = bpf_skc_to_mptcp_sock(sk);

		if (msk) {
			t = bpf_sk_storage_get(&targets, msk, 0, BPF_SK_STORAGE_GET_F_CREATE);
			if (t)
				*t = *target;
		}
	}
	return true;
}

static __always_inline void sl_forget(struct bpf_sock *sk)
{
	bpf_sk_storage_delete(&targets, sk);
	if (sl_have_mptcp) {
		struct mptcp_sock *msk = bpf_skc_to_mptcp_sock(sk);

		if (msk)
			bpf_sk_storage_delete(&targets, msk);
	}
}

/*
 * Whether the calling process is outside of the container of the pod's proxy;
 * not if the agent does not know which that is.
 */
static __always_inline bool sl_is_outsider(__u64 netns)
{
	__u64 *proxy = bpf_map_lookup_elem(&proxy_cgroups, &netns);

	if (!proxy)
		return false;
	for (int level = 1; level < SL_CGROUP_LEVELS; level++) {
		__u64 id = bpf_get_current_ancestor_cgroup_id(level);

		if (id == *proxy)
			return false;
		if (!id)
			break;
	}
	return true;
}

enum sl_connect_verdict {
	SL_CONNECT_DENY = 0, /* connect() fails with EPERM */
	SL_CONNECT_ALLOW = 1,
};

/*
 * Decides on a connect to dst. On SL_CONNECT_ALLOW with *port set the caller
 * must lead the socket to that port of the pod's own address *own.
 */
static __always_inline int sl_connect(struct bpf_sock_addr *ctx, const union sl_addr *dst,
				      union sl_addr *own, __u16 *port)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct sl_pod *pod = bpf_map_lookup_elem(&pods, &netns);
	struct sl_target target = {.addr = *dst, .port_be = ctx->user_port, .role = SL_DIALED};
	struct sl_dial dial = {.dst = *dst, .port = bpf_ntohs(ctx->user_port)};
	struct bpf_sock *sk = ctx->sk;
	enum sl_reason reason;

	if (!pod || !sk)
		return SL_CONNECT_ALLOW;
	dial.src = sl_sock_source(sk);
	dial.uid = bpf_get_current_uid_gid();
	dial.outsider = dial.uid == pod->proxy_uid && sl_is_outsider(netns);
	dial.mark = sl_u32(sk->mark);
	dial.bound_if = sl_u32(sk->bound_dev_if);
	reason = sl_outbound(pod, &dial);
	if (reason != SL_OUT_CAPTURED && reason != SL_OUT_SELF_CALL) {
		sl_count(netns, reason);
		if (reason == SL_OUT_PROXY)
			sl_accel_dial(sk, netns);
		/*
		 * The socket may have been led to the proxy before, in vain. But
		 * while the hook moves to another cgroup it runs twice, and the
		 * second run finds the proxy's port as the destination.
		 */
		if (dial.port != SL_OUTBOUND_PORT && dial.port != SL_INBOUND_PORT)
			sl_forget(sk);
		return reason == SL_OUT_ADMIN_PORT ? SL_CONNECT_DENY : SL_CONNECT_ALLOW;
	}
	if (!sl_remember(sk, &target)) {
		/* The proxy could not learn the destination: fail here. */
		sl_count(netns, SL_OUT_NO_MEMORY);
		return SL_CONNECT_DENY;
	}
	/* Counted when it is known how the connection ends: see sockops. */
	*own = sl_is4(dst) ? sl_addr4(pod->ip4_be) : pod->ip6;
	*port = reason == SL_OUT_CAPTURED ? SL_OUTBOUND_PORT : SL_INBOUND_PORT;
	return SL_CONNECT_ALLOW;
}

/* MPTCP sockets come as protocol 262 and would slip past a test for TCP. */
static __always_inline bool sl_is_tcp(struct bpf_sock_addr *ctx)
{
	return ctx->type == SOCK_STREAM &&
	       (ctx->protocol == IPPROTO_TCP || ctx->protocol == IPPROTO_MPTCP);
}

SEC("cgroup/connect4")
int sl_connect4(struct bpf_sock_addr *ctx)
{
	union sl_addr dst = sl_addr4(ctx->user_ip4), own;
	__u16 port = 0;
	int verdict;

	if (!sl_is_tcp(ctx))
		return SL_CONNECT_ALLOW;
	verdict = sl_connect(ctx, &dst, &own, &port);
	if (port) {
		ctx->user_ip4 = own.word_be[3];
		ctx->user_port = bpf_htons(port);
	}
	return verdict;
}

SEC("cgroup/connect6")
int sl_connect6(struct bpf_sock_addr *ctx)
{
	union sl_addr dst = sl_read6(ctx->user_ip6), own;
	__u16 port = 0;
	int verdict;

	if (!sl_is_tcp(ctx))
		return SL_CONNECT_ALLOW;
	verdict = sl_connect(ctx, &dst, &own, &port);
	if (port) {
		ctx->user_ip6[0] = own.word_be[0];
		ctx->user_ip6[1] = own.word_be[1];
		ctx->user_ip6[2] = own.word_be[2];
		ctx->user_ip6[3] = own.word_be[3];
		ctx->user_port = bpf_htons(port);
	}
	return verdict;
}

/*
 * Whether the calling process belongs to no pod: none of its cgroups is one
 * that pods live below. Not if it cannot be told.
 */
static __always_inline bool sl_in_no_pod(void)
{
	for (int level = 1; level < SL_CGROUP_LEVELS; level++) {
		/* 0 at the end of the process' path: the key that all are known. */
		__u64 id = bpf_get_current_ancestor_cgroup_id(level);
		bool found = bpf_map_lookup_elem(&pod_cgroups, &id);

		if (!id)
			return found;
		if (found)
			return false;
	}
	return false;
}

/* Marks the sockets with which processes of the node dial a pod of ours. */
static __always_inline void sl_host_connect(struct bpf_sock_addr *ctx, const union sl_addr *dst)
{
	struct sl_target target = {.addr = *dst, .port_be = ctx->user_port, .role = SL_PROBING};
	struct bpf_sock *sk = ctx->sk;

	if (!sk || !sl_is_tcp(ctx) || bpf_get_netns_cookie(ctx) != sl_host_netns)
		return;
	/* Out of memory: it is captured, as what is not exempt. */
	if (bpf_map_lookup_elem(&pod_ips, dst) && sl_in_no_pod())
		bpf_sk_storage_get(&targets, sk, &target, BPF_SK_STORAGE_GET_F_CREATE);
	else
		bpf_sk_storage_delete(&targets, sk); /* it may have dialled before */
}

SEC("cgroup/connect4")
int sl_host4(struct bpf_sock_addr *ctx)
{
	union sl_addr dst = sl_addr4(ctx->user_ip4);

	sl_host_connect(ctx, &dst);
	return SL_CONNECT_ALLOW;
}

SEC("cgroup/connect6")
int sl_host6(struct bpf_sock_addr *ctx)
{
	union sl_addr dst = sl_read6(ctx->user_ip6);

	sl_host_connect(ctx, &dst);
	return SL_CONNECT_ALLOW;
}

/* What is known of a socket in a role, or NULL. */
static __always_inline struct sl_target *sl_in_role(struct bpf_sock *sk, enum sl_role role)
{
	struct sl_target *t = sk ? bpf_sk_storage_get(&targets, sk, 0, 0) : 0;

	return t && t->role == role ? t : 0;
}

/* What a socket that was led to the proxy should see as its peer, or NULL. */
static __always_inline struct sl_target *sl_dialed(struct bpf_sock *sk)
{
	return sl_in_role(sk, SL_DIALED);
}

SEC("cgroup/getpeername4")
int sl_getpeername4(struct bpf_sock_addr *ctx)
{
	struct sl_target *t = sl_dialed(ctx->sk);

	if (t) {
		ctx->user_ip4 = t->addr.word_be[3];
		ctx->user_port = t->port_be;
	}
	return SL_CONNECT_ALLOW;
}

SEC("cgroup/getpeername6")
int sl_getpeername6(struct bpf_sock_addr *ctx)
{
	struct sl_target *t = sl_dialed(ctx->sk);

	if (t) {
		ctx->user_ip6[0] = t->addr.word_be[0];
		ctx->user_ip6[1] = t->addr.word_be[1];
		ctx->user_ip6[2] = t->addr.word_be[2];
		ctx->user_ip6[3] = t->addr.word_be[3];
		ctx->user_port = t->port_be;
	}
	return SL_CONNECT_ALLOW;
}

/* As sl_publish, for a process of the node that dials a pod. */
static __always_inline void sl_publish_probe(struct bpf_sock_ops *ctx)
{
	struct sl_probe_key k;
	__u64 *netns;
	__u32 one = 1;

	if (!sl_in_role(ctx->sk, SL_PROBING))
		return;
	k = sl_probe_local(ctx);
	if (bpf_map_update_elem(&probes, &k, &one, BPF_ANY)) {
		/* No room: it is captured, for that is what must not be missed. */
		netns = bpf_map_lookup_elem(&pod_ips, &k.pod);
		if (netns)
			sl_count(*netns, SL_IN_PROBES_FULL);
		return;
	}
	sl_ask_for_states(ctx);
}

/* The client's SYN is about to leave, so its port is known: publish. */
static __always_inline void sl_publish(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sl_target *t = sl_dialed(sk);
	struct sl_target accepted;
	struct sl_flow_key k;

	if (!t) {
		sl_publish_probe(ctx);
		return;
	}
	k = sl_flow_local(ctx);
	accepted = *t;
	accepted.role = SL_ACCEPTED;
	if (bpf_map_update_elem(&handover, &k, &accepted, BPF_ANY)) {
		/*
		 * Without a destination the proxy can only close the connection,
		 * which is what must happen: it must not get past the proxy.
		 */
		sl_count(k.netns, SL_OUT_HANDOVER_FULL);
		sl_forget(sk);
		return;
	}
	sl_ask_for_states(ctx);
}

/* The proxy has accepted the client. */
static __always_inline void sl_reached(struct bpf_sock_ops *ctx)
{
	if (!sl_dialed(ctx->sk))
		return;
	sl_count(bpf_get_netns_cookie(ctx), bpf_ntohl(ctx->remote_port) == SL_OUTBOUND_PORT
						    ? SL_OUT_CAPTURED
						    : SL_OUT_SELF_CALL);
}

/* The client's end closes: take back what the proxy has not taken. */
static __always_inline void sl_retract(struct bpf_sock_ops *ctx)
{
	struct sl_probe_key probe;
	struct sl_flow_key k;

	if (sl_in_role(ctx->sk, SL_PROBING)) {
		probe = sl_probe_local(ctx);
		bpf_map_delete_elem(&probes, &probe);
		return;
	}
	if (!sl_dialed(ctx->sk))
		return;
	k = sl_flow_local(ctx);
	bpf_map_delete_elem(&handover, &k);
	if (ctx->args[0] == BPF_TCP_SYN_SENT)
		sl_count(k.netns, SL_OUT_PROXY_DOWN);
}

/* The proxy's end is established: move the destination to its socket. */
static __always_inline void sl_take(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sl_target target, *t;
	struct sl_flow_key k;

	if (!sk || (ctx->local_port != SL_OUTBOUND_PORT && ctx->local_port != SL_INBOUND_PORT))
		return;
	k = sl_flow_remote(ctx);
	t = bpf_map_lookup_elem(&handover, &k);
	if (!t)
		return;
	target = *t;
	/* Out of memory: the proxy learns no destination and closes. */
	if (!sl_remember(sk, &target))
		sl_count(k.netns, SL_OUT_NO_MEMORY);
	bpf_map_delete_elem(&handover, &k);
}

/*
 * A socket begins to listen: if it can be the proxy's, it takes the place of the
 * one before. What is missed here, for want of memory or because the socket is
 * older than the pod's redirection, tc or the agent finds.
 */
static __always_inline void sl_listens(struct bpf_sock_ops *ctx)
{
	struct sl_listener_key k = {};
	struct bpf_sock *sk = ctx->sk;
	struct sl_listen listen;
	struct sl_pod *pod;

	if (!sk || ctx->local_port != SL_INBOUND_PORT)
		return;
	k.netns = bpf_get_netns_cookie(ctx);
	k.family = sl_u32(sk->family);
	pod = bpf_map_lookup_elem(&pods, &k.netns);
	if (!pod)
		return;
	listen.addr = sl_sock_source(sk);
	listen.family = k.family;
	listen.bound_if = sl_u32(sk->bound_dev_if);
	if (sl_is_inbound_listener(pod, &listen))
		bpf_sock_hash_update(ctx, &listeners, &k, BPF_ANY);
}

SEC("sockops")
int sl_sockops(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		sl_publish(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		sl_reached(ctx);
		sl_accel_client(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		sl_take(ctx);
		sl_accel_server(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->args[1] == BPF_TCP_CLOSE) {
			sl_retract(ctx);
			sl_accel_closed(ctx);
		}
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		sl_listens(ctx);
		break;
	}
	return SK_PASS;
}

/*
 * The original destination of a socket: what was remembered, else, for an
 * inbound connection that sk_lookup gave to the proxy, the local address.
 */
static __always_inline bool sl_original(struct bpf_sockopt *ctx, struct sl_target *out)
{
	struct bpf_sock *sk = ctx->sk;
	struct sl_target *t;
	struct sl_pod *pod;
	union sl_addr own;
	__u32 port;
	__u64 netns;

	if (!sk)
		return false;
	t = bpf_sk_storage_get(&targets, sk, 0, 0);
	if (t) {
		*out = *t;
		return t->role != SL_PROBING;
	}
	netns = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &netns);
	if (!pod || (__u32)bpf_get_current_uid_gid() != pod->proxy_uid)
		return false;
	port = sl_u32(sk->src_port);
	/* Dialled directly: there is no other destination than the proxy. */
	if (port == SL_OUTBOUND_PORT || port == SL_INBOUND_PORT)
		return false;
	out->addr = sl_sock_source(sk);
	out->port_be = bpf_htons((__u16)port);
	own = sl_is4(&out->addr) ? sl_addr4(pod->ip4_be) : pod->ip6;
	return sl_same(&out->addr, &own) && sl_u32(sk->state) != BPF_TCP_LISTEN;
}

/* Writes one 32-bit word of the answer; merged stores do not verify. */
#define SL_PUT(dst, val)                                                                           \
	do {                                                                                       \
		*(volatile typeof(dst) *)&(dst) = (val);                                           \
	} while (0)

static __always_inline void sl_answer4(struct bpf_sockopt *ctx, const struct sl_target *t)
{
	struct sockaddr_in *sa = ctx->optval;

	if ((void *)(sa + 1) > ctx->optval_end || ctx->optlen < (int)sizeof(*sa)) {
		SL_PUT(ctx->retval, -EINVAL);
		return;
	}
	sa->sin_family = AF_INET;
	sa->sin_port = t->port_be;
	sa->sin_addr = t->addr.word_be[3];
	__builtin_memset(sa->pad, 0, sizeof(sa->pad));
	SL_PUT(ctx->optlen, sizeof(*sa));
	SL_PUT(ctx->retval, 0);
}

static __always_inline void sl_answer6(struct bpf_sockopt *ctx, const struct sl_target *t)
{
	struct sockaddr_in6 *sa = ctx->optval;

	if ((void *)(sa + 1) > ctx->optval_end || ctx->optlen < (int)sizeof(*sa)) {
		SL_PUT(ctx->retval, -EINVAL);
		return;
	}
	sa->sin6_family = AF_INET6;
	sa->sin6_port = t->port_be;
	sa->sin6_flowinfo = 0;
	sa->sin6_addr[0] = t->addr.word_be[0];
	sa->sin6_addr[1] = t->addr.word_be[1];
	sa->sin6_addr[2] = t->addr.word_be[2];
	sa->sin6_addr[3] = t->addr.word_be[3];
	sa->sin6_scope_id = 0;
	SL_PUT(ctx->optlen, sizeof(*sa));
	SL_PUT(ctx->retval, 0);
}

enum {
	SL_SOCKOPT_RETURN = 1, /* getsockopt() returns what the context says */
};

SEC("cgroup/getsockopt")
int sl_getsockopt(struct bpf_sockopt *ctx)
{
	struct sl_target t = {};
	bool mapped;

	/* SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST have the same number. */
	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6))
		return SL_SOCKOPT_RETURN;
	if (!sl_original(ctx, &t))
		return SL_SOCKOPT_RETURN;
	mapped = sl_is4(&t.addr);
	if (ctx->level == SOL_IP) {
		/* An IPv6 address has no answer at this level: the kernel's stays. */
		if (mapped)
			sl_answer4(ctx, &t);
		return SL_SOCKOPT_RETURN;
	}
	/* A socket of AF_INET does not ask here; one of AF_INET6 gets ::ffff:a.b.c.d. */
	sl_answer6(ctx, &t);
	return SL_SOCKOPT_RETURN;
}

/* A SYN, as far as it matters here. */
struct sl_syn {
	struct bpf_sock_tuple tuple; /* with the inbound port as destination */
	__u32 family;
	__u16 port;
	struct sl_probe_key ends;
};

/*
 * Reads the packet's headers; false if it is no SYN of a connection. Headers
 * are read relative to the network header, so that devices without a link
 * layer work. A SYN behind IPv6 extension headers is not recognised, which is
 * safe: sk_lookup decides over it as well.
 */
static __always_inline bool sl_parse(struct __sk_buff *skb, struct sl_syn *syn)
{
	__u32 off = sizeof(struct ipv6hdr);
	struct tcphdr tcp;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET))
			return false;
		if (ip.protocol != IPPROTO_TCP || (ip.frag_off & bpf_htons(0x1fff)))
			return false;
		off = (ip.ihl_version & 0xf) * 4;
		syn->family = AF_INET;
		syn->ends.client = sl_addr4(ip.saddr);
		syn->ends.pod = sl_addr4(ip.daddr);
		syn->tuple.ipv4.saddr = ip.saddr;
		syn->tuple.ipv4.daddr = ip.daddr;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET))
			return false;
		if (ip.nexthdr != IPPROTO_TCP)
			return false;
		syn->family = AF_INET6;
		__builtin_memcpy(&syn->ends.client, ip.saddr, sizeof(ip.saddr));
		__builtin_memcpy(&syn->ends.pod, ip.daddr, sizeof(ip.daddr));
		__builtin_memcpy(syn->tuple.ipv6.saddr, ip.saddr, sizeof(ip.saddr));
		__builtin_memcpy(syn->tuple.ipv6.daddr, ip.daddr, sizeof(ip.daddr));
	} else {
		return false;
	}
	if (bpf_skb_load_bytes_relative(skb, off, &tcp, sizeof(tcp), BPF_HDR_START_NET))
		return false;
	if ((tcp.flags & (TCP_FLAG_SYN | TCP_FLAG_ACK)) != TCP_FLAG_SYN)
		return false;
	syn->port = bpf_ntohs(tcp.dest);
	syn->ends.client_port_be = tcp.source;
	syn->ends.pod_port_be = tcp.dest;
	if (syn->family == AF_INET) {
		syn->tuple.ipv4.sport = tcp.source;
		syn->tuple.ipv4.dport = bpf_htons(SL_INBOUND_PORT);
	} else {
		syn->tuple.ipv6.sport = tcp.source;
		syn->tuple.ipv6.dport = bpf_htons(SL_INBOUND_PORT);
	}
	return true;
}

/*
 * Whether a listener is known. The kernel has taken closed sockets out, not those
 * that were only shut down.
 */
static __always_inline bool sl_is_known(struct sl_listener_key *k)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, k);
	bool listens;

	if (!sk)
		return false;
	listens = sl_u32(sk->state) == BPF_TCP_LISTEN;
	bpf_sk_release(sk);
	return listens;
}

/*
 * Takes the SYN for a listener that is not known under its family. Where tc may
 * not make it known this SYN alone is given to it: the ACK that answers a SYN
 * cookie is dropped until the agent has found the listener.
 */
static __always_inline enum sl_reason sl_admit(struct __sk_buff *skb, struct sl_listener_key *k,
					       struct bpf_sock *sk)
{
	long err;

	if (sl_tc_may_register) {
		err = bpf_map_update_elem(&listeners, k, sk, BPF_ANY);
	} else {
		/* One that listens for both families is known as one of IPv6. */
		k->family = sl_u32(sk->family);
		err = sl_is_known(k) ? 0 : bpf_sk_assign(skb, sk, 0);
	}
	return err ? SL_IN_LISTENER_REFUSED : SL_IN_CAPTURED;
}

/* Sees to it that the SYN can reach the proxy's listener. */
static __always_inline enum sl_reason sl_find_listener(struct __sk_buff *skb, struct sl_syn *syn,
						       struct sl_listener_key *k)
{
	enum sl_reason reason = SL_IN_PROXY_DOWN;
	struct bpf_sock *sk;

	if (sl_is_known(k))
		return SL_IN_CAPTURED;
	if (syn->family == AF_INET)
		sk = bpf_skc_lookup_tcp(skb, &syn->tuple, sizeof(syn->tuple.ipv4),
					BPF_F_CURRENT_NETNS, 0);
	else
		sk = bpf_skc_lookup_tcp(skb, &syn->tuple, sizeof(syn->tuple.ipv6),
					BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return reason;
	if (sl_u32(sk->state) == BPF_TCP_LISTEN)
		reason = sl_admit(skb, k, sk);
	bpf_sk_release(sk);
	return reason;
}

/* Whether a process of the node that belongs to no pod opens this connection. */
static __always_inline bool sl_is_probe(const struct sl_probe_key *ends)
{
	return bpf_map_lookup_elem(&probes, ends);
}

SEC("tc")
int sl_ingress(struct __sk_buff *skb)
{
	struct sl_listener_key k = {};
	struct sl_syn syn = {};
	enum sl_reason reason;
	struct sl_pod *pod;
	__u64 *netns;

	if (!sl_parse(skb, &syn))
		return TCX_NEXT;
	netns = bpf_map_lookup_elem(&pod_ips, &syn.ends.pod);
	if (!netns)
		return TCX_NEXT;
	k.netns = *netns;
	k.family = syn.family;
	pod = bpf_map_lookup_elem(&pods, &k.netns);
	if (!pod)
		return TCX_NEXT;
	reason = sl_inbound(pod, syn.port);
	if (reason == SL_IN_CAPTURED && sl_is_probe(&syn.ends))
		reason = SL_IN_HOST_PROBE;
	if (reason != SL_IN_CAPTURED) {
		sl_count(k.netns, reason);
		return TCX_NEXT;
	}
	reason = sl_find_listener(skb, &syn, &k);
	sl_count(k.netns, reason);
	/* Without its proxy a pod must not be reached: the client tries again. */
	return reason == SL_IN_CAPTURED ? TCX_NEXT : TCX_DROP;
}

/* Both ends of a connection for which the kernel looks for a listener. */
static __always_inline struct sl_probe_key sl_lookup_ends(struct bpf_sk_lookup *ctx)
{
	struct sl_probe_key k = {};

	if (ctx->family == AF_INET) {
		k.pod = sl_addr4(sl_u32(ctx->local_ip4));
		k.client = sl_addr4(sl_u32(ctx->remote_ip4));
	} else {
		k.pod = sl_read6(ctx->local_ip6);
		k.client = sl_read6(ctx->remote_ip6);
	}
	k.pod_port_be = bpf_htons((__u16)ctx->local_port);
	k.client_port_be = ctx->remote_port;
	return k;
}

/* Gives the connection to the listener of the proxy in the namespace of k. */
static __always_inline enum sk_action sl_steer(struct bpf_sk_lookup *ctx, struct sl_listener_key *k)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, k);
	long err;

	if (!sk && k->family == AF_INET) {
		/* One that listens for both families; else the assignment fails. */
		k->family = AF_INET6;
		sk = bpf_map_lookup_elem(&listeners, k);
	}
	if (!sk) {
		/* Never the bare application in place of its proxy. */
		sl_count(k->netns, SL_IN_LISTENER_MISSING);
		return SK_DROP;
	}
	err = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	if (err) {
		sl_count(k->netns, SL_IN_ASSIGN_FAILED);
		return SK_DROP;
	}
	return SK_PASS;
}

/*
 * Gives a captured connection to the listener of the proxy. The kernel asks
 * whenever it looks for a listener: for a SYN, for the ACK that answers a SYN
 * cookie, for a SYN that meets a socket in TIME_WAIT.
 */
SEC("sk_lookup")
int sl_lookup(struct bpf_sk_lookup *ctx)
{
	struct sl_listener_key k = {.family = ctx->family};
	struct sl_probe_key ends;
	struct sl_pod *pod;
	__u64 *netns;

	/*
	 * What was led to the proxy arrives here, and bpf_skc_lookup_tcp in tcx
	 * asks here too: it must find the listener itself.
	 */
	if (ctx->protocol != IPPROTO_TCP || ctx->local_port == SL_INBOUND_PORT ||
	    ctx->local_port == SL_OUTBOUND_PORT)
		return SK_PASS;
	ends = sl_lookup_ends(ctx);
	netns = bpf_map_lookup_elem(&pod_ips, &ends.pod);
	if (!netns)
		return SK_PASS;
	k.netns = *netns;
	pod = bpf_map_lookup_elem(&pods, &k.netns);
	if (!pod)
		return SK_PASS;
	/* By address: self traffic names the pod's interface here, not lo. */
	if (sl_same(&ends.pod, &ends.client) || sl_is_loopback(&ends.client) ||
	    ctx->ingress_ifindex == SL_LOOPBACK_IF) {
		sl_count(k.netns, SL_IN_SELF);
		return SK_PASS;
	}
	/* One that is not known yet, made anew by somebody, is no way around the proxy. */
	if (sl_has_if(pod->excluded_if, ctx->ingress_ifindex)) {
		sl_count(k.netns, SL_IN_EXCLUDED_INTERFACE);
		return SK_PASS;
	}
	/* From here on tcx has counted, save for what fails closed below. */
	if (sl_inbound(pod, ctx->local_port) != SL_IN_CAPTURED || sl_is_probe(&ends))
		return SK_PASS;
	return sl_steer(ctx, &k);
}

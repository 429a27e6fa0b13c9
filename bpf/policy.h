/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Is this connection captured? One function each way, shared by all hooks.
 * They look at plain values only, so that a test can ask them anything.
 */
#pragma once

#include "sock.h"

/* A connection that a process of the pod opens. */
struct sl_dial {
	union sl_addr dst;
	union sl_addr src; /* that the socket is bound to, else zero */
	__u32 uid;
	__u32 mark;
	__u32 bound_if;
	__u16 port;
	__u16 outsider; /* not in the proxy's container, whatever its user */
};

/* A socket that listens on the inbound port. */
struct sl_listen {
	union sl_addr addr; /* that it is bound to */
	__u32 family;
	__u32 bound_if;
};

static __always_inline enum sl_match sl_port_match(const struct sl_pod *pod,
						   enum sl_direction direction, __u16 port)
{
	struct sl_port_key k = {.policy = pod->policy, .port = port, .direction = direction};
	enum sl_match *m = bpf_map_lookup_elem(&ports, &k);

	if (m)
		return *m;
	return direction == SL_OUTBOUND ? pod->out_port : pod->in_port;
}

static __always_inline enum sl_match sl_addr_match(const struct sl_pod *pod,
						   const union sl_addr *addr)
{
	struct sl_cidr_key k = {
		.prefixlen = SL_CIDR_KEY_BITS, .policy = pod->policy, .addr = *addr};
	bool v4 = sl_is4(addr);
	enum sl_match *m;

	k.family = v4 ? AF_INET : AF_INET6;
	m = bpf_map_lookup_elem(&cidrs, &k);
	if (m)
		return *m;
	return v4 ? pod->out_addr4 : pod->out_addr6;
}

static __always_inline bool sl_has_if(const __u32 *ifs, __u32 ifindex)
{
	for (int i = 0; i < SL_MAX_IFS; i++)
		if (ifs[i] == ifindex)
			return ifindex != 0;
	return false;
}

/* What policy says of a connection to a port of the pod. */
static __always_inline enum sl_reason sl_inbound(const struct sl_pod *pod, __u16 port)
{
	enum sl_match m;

	if (port == SL_INBOUND_PORT || port == SL_OUTBOUND_PORT)
		return SL_IN_PROXY_PORT;
	if (port == SL_HEALTH_PORT)
		return SL_IN_HEALTH_PORT;
	m = sl_port_match(pod, SL_INBOUND, port);
	if (m == SL_MATCH_EXCLUDED)
		return SL_IN_EXCLUDED_PORT;
	return m == SL_MATCH_INCLUDED ? SL_IN_CAPTURED : SL_IN_NOT_INCLUDED;
}

static __always_inline enum sl_reason sl_outbound(const struct sl_pod *pod, const struct sl_dial *d)
{
	bool proxy = d->uid == pod->proxy_uid && !d->outsider;
	bool v4 = sl_is4(&d->dst);
	union sl_addr own = v4 ? sl_addr4(pod->ip4_be) : pod->ip6;
	bool loopback = sl_is_loopback(&d->dst);
	enum sl_match by_port, by_addr;

	if (loopback || sl_same(&d->dst, &own)) {
		/* Who may talk to the admin interface may stop the proxy. */
		if (d->port == SL_ADMIN_PORT && !proxy && d->mark != SL_AGENT_MARK)
			return SL_OUT_ADMIN_PORT;
		if (loopback)
			return SL_OUT_LOOPBACK;
		/*
		 * The proxy has chosen its own pod as the endpoint of a service:
		 * that is an inbound connection, unless it comes from there.
		 */
		if (proxy && d->port != SL_ADMIN_PORT && !sl_is_proxy_source(&d->src) &&
		    sl_inbound(pod, d->port) == SL_IN_CAPTURED)
			return SL_OUT_SELF_CALL;
		return proxy ? SL_OUT_PROXY : SL_OUT_OWN_ADDRESS;
	}
	if (proxy)
		return SL_OUT_PROXY;
	if (v4 ? !pod->ip4_be : sl_is_zero(&pod->ip6))
		return SL_OUT_NO_ADDRESS;
	if (sl_has_if(pod->excluded_if, d->bound_if))
		return SL_OUT_EXCLUDED_INTERFACE;
	by_port = sl_port_match(pod, SL_OUTBOUND, d->port);
	if (by_port == SL_MATCH_EXCLUDED)
		return SL_OUT_EXCLUDED_PORT;
	by_addr = sl_addr_match(pod, &d->dst);
	if (by_addr == SL_MATCH_EXCLUDED)
		return SL_OUT_EXCLUDED_CIDR;
	if (by_port == SL_MATCH_INCLUDED || by_addr == SL_MATCH_INCLUDED)
		return SL_OUT_CAPTURED;
	return SL_OUT_NOT_INCLUDED;
}

/*
 * Whether the kernel would give that socket what is sent to the pod's own
 * address: one on loopback, or on one interface alone, is not the proxy's.
 */
static __always_inline bool sl_is_inbound_listener(const struct sl_pod *pod,
						   const struct sl_listen *l)
{
	bool v4 = l->family == AF_INET;
	union sl_addr own = v4 ? sl_addr4(pod->ip4_be) : pod->ip6;
	union sl_addr any = {};

	if (v4)
		any = sl_addr4(0);
	return !l->bound_if && (sl_same(&l->addr, &any) || sl_same(&l->addr, &own));
}

// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
/*
 * Makes listeners of proxies known that sockops has not seen begin to listen:
 * those that are older than the pod's redirection. An object of its own, because
 * it needs the kernel's BTF and only kernels on which tc may not do the same
 * need it.
 */
#include "headers/kernel.h"
#include "policy.h"

char LICENSE[] SEC("license") = "GPL";

static __always_inline union sl_addr sl_bound_addr(struct sock_common *sk)
{
	union sl_addr a;

	if (sk->skc_family == AF_INET)
		return sl_addr4(sk->skc_rcv_saddr);
	for (int i = 0; i < 4; i++)
		a.word_be[i] = sk->skc_v6_rcv_saddr.in6_u.u6_addr32[i];
	return a;
}

/* Sees each TCP socket of the namespace in which the agent has opened the iterator. */
SEC("iter/tcp")
int sl_listening(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct sl_listener_key k = {};
	struct sl_listen listen;
	struct sl_pod *pod;

	if (!sk || sk->skc_state != BPF_TCP_LISTEN || sk->skc_num != SL_INBOUND_PORT)
		return 0;
	k.netns = sk->skc_net.net->net_cookie;
	k.family = sk->skc_family;
	pod = bpf_map_lookup_elem(&pods, &k.netns);
	if (!pod)
		return 0;
	listen.addr = sl_bound_addr(sk);
	listen.family = k.family;
	listen.bound_if = sk->skc_bound_dev_if;
	/* One that is known already is as good: they are of one group, or of one proxy. */
	if (sl_is_inbound_listener(pod, &listen))
		bpf_map_update_elem(&listeners, &k, sk, BPF_NOEXIST);
	return 0;
}

// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
/* Asks the policy functions what they say of a connection. Never shipped. */
#include "../policy.h"

char LICENSE[] SEC("license") = "GPL";

/* What the test puts in the place of a packet. */
struct sl_question {
	__u64 netns;
	enum sl_direction direction;
	struct sl_dial dial;
};

static __noinline int sl_answer(const struct sl_pod *pod, const struct sl_question *q)
{
	struct sl_dial dial = q->dial;

	if (!pod)
		return SL_REASONS;
	return q->direction == SL_OUTBOUND ? sl_outbound(pod, &dial) : sl_inbound(pod, dial.port);
}

SEC("tc")
int sl_verdict(struct __sk_buff *skb)
{
	struct sl_question *data = (void *)(unsigned long)skb->data;
	struct sl_question q;

	if ((void *)(data + 1) > (void *)(unsigned long)skb->data_end)
		return SL_REASONS;
	q = *data;
	return sl_answer(bpf_map_lookup_elem(&pods, &q.netns), &q);
}

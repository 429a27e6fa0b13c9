// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
/*
 * Acceleration: what one end of a pair sends goes straight into the other's
 * queue, past both TCP stacks.
 *
 * The kernel bounds such a queue by nothing. Here each direction is counted,
 * what was sent and what the reader took. One that is too far ahead of its
 * reader goes by TCP, which holds the writer back. The reader takes what came
 * the short way before what TCP brings, so nothing is overtaken; back to the
 * short way a direction comes when its reader has taken everything, so that
 * again there is nothing to overtake.
 */
#include "accel_maps.h"
#include "headers/kernel.h"

char LICENSE[] SEC("license") = "GPL";

/*
 * What one direction of a pair may hold that its reader has not taken, in bytes.
 * With more it goes by TCP, which holds the writer back.
 */
volatile const __u32 sl_accel_budget = 0;

/* Sends a direction by TCP, from now on: nothing goes the short way. */
static __always_inline __u32 sl_slow(struct sl_pair *pair, __u32 side, enum sl_way way,
				     enum sl_accel_event why)
{
	pair->way[side] = way;
	sl_accel_count(why);
	return 0;
}

/*
 * How much of what this side sends now goes the short way; about the rest the
 * kernel asks again. Called under the lock of the sending socket, once or more
 * for each call of the sender.
 *
 * What a call sends is known when it returns: of what it hands over TCP may
 * refuse a part. While another thread's call has not returned nobody can tell
 * whether the reader has everything.
 */
static __always_inline __u32 sl_short(struct sl_pair *pair, __u32 side, __u32 size)
{
	__s64 queued = pair->sent[side] - pair->taken[side];
	__u64 caller = bpf_get_current_pid_tgid();
	__u32 budget = pair->taken[side] ? sl_accel_budget : SL_ACCEL_FIRST;

	if (pair->way[side] == SL_STUCK)
		return 0;
	queued += pair->during[side];
	if ((pair->caller[side] && pair->caller[side] != caller) || queued < 0 || pair->fixed[side])
		return sl_slow(pair, side, SL_STUCK, SL_ACCEL_STUCK);
	pair->caller[side] = caller;
	pair->during[side] += size;
	if (pair->way[side] == SL_SLOW) {
		if (queued || !pair->joined || !sl_accel_on())
			return 0;
		sl_accel_count(SL_ACCEL_CAUGHT);
		pair->way[side] = SL_SHORT;
	}
	if (!pair->joined)
		return sl_slow(pair, side, SL_SLOW, SL_ACCEL_EARLY);
	if (!queued)
		pair->messages[side] = 0;
	if (queued >= budget || ++pair->messages[side] > SL_ACCEL_MESSAGES)
		return sl_slow(pair, side, SL_SLOW, SL_ACCEL_BEHIND);
	if (!sl_accel_on()) {
		pair->way[side] = SL_SLOW;
		return 0;
	}
	if (size > budget - queued) {
		pair->during[side] -= size - (budget - queued);
		size = budget - queued;
	}
	return size;
}

SEC("sk_msg")
int sl_msg(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	struct sl_end *own = sk ? bpf_sk_storage_get(&accel_ends, sk, 0, 0) : 0;
	struct sl_end peer = {};
	struct sl_pair *pair;
	__u32 side, size;

	if (!own)
		return SK_PASS;
	side = own->side & 1;
	peer.pair = own->pair;
	peer.side = !side;
	pair = bpf_map_lookup_elem(&accel_pairs, &peer.pair);
	if (!pair)
		return SK_PASS; /* an end has closed */
	size = sl_short(pair, side, msg->size);
	/* 0 for all of it; else what was said of the first part were true of the next. */
	bpf_msg_apply_bytes(msg, size < msg->size ? size : 0);
	if (size) {
		if (bpf_msg_redirect_hash(msg, &accel_socks, &peer, BPF_F_INGRESS) == SK_PASS)
			return SK_PASS;
		sl_slow(pair, side, SL_SLOW, SL_ACCEL_GONE);
	}
	if (pair->way[side] == SL_STUCK)
		return SK_PASS;
	/*
	 * By TCP, as SK_PASS would. But if TCP refuses a part of what passes, the
	 * kernel (6.18) does not ask again about what the next call sends, which
	 * then were missing in the count.
	 */
	peer.side = side;
	if (bpf_msg_redirect_hash(msg, &accel_socks, &peer, 0) != SK_PASS)
		sl_slow(pair, side, SL_STUCK, SL_ACCEL_STUCK);
	return SK_PASS;
}

/*
 * Whether an application has fixed the size of the socket's receive buffer.
 *
 * What waits in the queue of the short way counts against that buffer, which
 * may then be full while TCP has promised room in it: segments are dropped, and
 * sent again 200 ms later. A buffer of no fixed size grows in time.
 */
static __always_inline bool sl_is_fixed(struct sock *sk)
{
	__u64 locks;

	locks = *((__u8 *)sk + __builtin_preserve_field_info(sk->sk_userlocks, SL_BYTE_OFFSET));
	locks <<= __builtin_preserve_field_info(sk->sk_userlocks, SL_LSHIFT);
	locks >>= __builtin_preserve_field_info(sk->sk_userlocks, SL_RSHIFT);
	return locks & SOCK_RCVBUF_LOCK;
}

/* The pair of a socket and its side in it; NULL if it is in none. */
static __always_inline struct sl_pair *sl_pair_of_sock(struct sock *sk, __u32 *side)
{
	struct sl_end *own = bpf_sk_storage_get(&accel_ends, sk, 0, 0);
	__u64 id;

	if (!own)
		return 0;
	id = own->pair;
	*side = own->side & 1;
	return bpf_map_lookup_elem(&accel_pairs, &id);
}

/* int sock_send_length(struct sock *sk, int ret, int flags): a call returns */
SEC("tp_btf/sock_send_length")
int sl_sent(__u64 *ctx)
{
	struct sock *sk = (struct sock *)ctx[0];
	struct sl_pair *pair;
	__u32 side = 0;
	int n = ctx[1];

	pair = sl_pair_of_sock(sk, &side);
	if (!pair)
		return 0;
	pair->fixed[!side] = sl_is_fixed(sk);
	if (n > 0)
		__sync_fetch_and_add(&pair->sent[side], n);
	if (pair->caller[side] == bpf_get_current_pid_tgid()) {
		pair->during[side] = 0;
		pair->caller[side] = 0;
	}
	return 0;
}

/* int sock_recv_length(struct sock *sk, int ret, int flags) */
SEC("tp_btf/sock_recv_length")
int sl_received(__u64 *ctx)
{
	struct sock *sk = (struct sock *)ctx[0];
	struct sl_pair *pair;
	__u32 side = 0;
	int n = ctx[1];

	if (n <= 0 || (ctx[2] & MSG_PEEK))
		return 0;
	pair = sl_pair_of_sock(sk, &side);
	if (!pair)
		return 0;
	pair->fixed[!side] = sl_is_fixed(sk);
	__sync_fetch_and_add(&pair->taken[!side], n);
	return 0;
}

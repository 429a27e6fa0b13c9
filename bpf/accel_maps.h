/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Types and maps of acceleration. Its programs are an object of their own,
 * which redirection can do without; the hooks that both share use these maps.
 */
#pragma once

#include "types.h"

/* Which pairs a pod's sockets may be in; flags. */
enum sl_place {
	SL_LOOPBACK = 1, /* an application and its own proxy */
	SL_PEER = 2,	 /* two proxies of this node */
};

/* Both ends of a connection. */
struct sl_pair_key {
	__u64 netns; /* 0: between two pods, whose addresses are unique on a node */
	union sl_addr client;
	union sl_addr server;
	__be16 client_port_be;
	__be16 server_port_be;
	__u32 pad;
};
_Static_assert(sizeof(struct sl_pair_key) == 48, "sl_pair_key");

enum sl_side {
	SL_CLIENT = 0,
	SL_SERVER = 1,
};

/* One end of a pair. Pair 0, which is none: a proxy's socket that dials. */
struct sl_end {
	__u64 pair;
	enum sl_side side;
	__u32 pad;
};
_Static_assert(sizeof(struct sl_end) == 16, "sl_end");

/* How a direction goes. */
enum sl_way {
	SL_SHORT = 0, /* from socket to socket */
	SL_SLOW,      /* by TCP until the reader has taken everything */
	SL_STUCK,     /* by TCP for ever */
};

/*
 * A pair. Index 0 is for what the client sends, 1 for what the server does. The
 * difference between sent and taken is in some queue, whichever way it went.
 */
struct sl_pair {
	__u64 sent[2];	 /* bytes, by calls that have returned */
	__u64 taken[2];	 /* bytes that the reader took */
	__u64 caller[2]; /* the thread that is sending; 0: none */
	__u32 during[2]; /* bytes that it has handed over since it began */
	enum sl_way way[2];
	__u32 messages[2]; /* that went the short way since the reader had everything */
	__u32 joined;	   /* both ends are in */
	__u8 fixed[2];	   /* the reader's receive buffer cannot grow */
	__u16 pad;
};
_Static_assert(sizeof(struct sl_pair) == 80, "sl_pair");

/*
 * How many messages one direction may hold that its reader has not taken: the
 * kernel (6.18) needs 1 KiB for each, however small it is.
 */
#define SL_ACCEL_MESSAGES 256

/* What a direction may hold before its reader's buffer is known. */
#define SL_ACCEL_FIRST (32 << 10)

/*
 * A writer is held back when it has handed over so much to TCP that TCP could
 * not send, whatever its buffer has room for. So little goes by TCP while a
 * reader is behind that it has taken everything soon after the writer wakes. Not
 * less, for a corked socket holds back as much as a segment for up to 200 ms.
 */
#define SL_ACCEL_UNSENT (16 << 10)

enum sl_accel_event {
	SL_ACCEL_JOINED, /* pairs */
	SL_ACCEL_FULL,	 /* pairs that found no room in a map */
	SL_ACCEL_EARLY,	 /* directions that began by TCP: the other end was not there yet */
	SL_ACCEL_BEHIND, /* changes to TCP: the reader was too far behind */
	SL_ACCEL_CAUGHT, /* changes from TCP: the reader had caught up */
	SL_ACCEL_GONE,	 /* changes to TCP: the other end has closed */
	SL_ACCEL_STUCK,	 /* directions that stay with TCP */
	SL_ACCEL_EVENTS,
};

/*
 * key     netns cookie
 * value   places, or-ed
 * writer  agent
 * reader  connect, sockops: whose sockets become pairs
 * full    the pod is not accelerated; sized like pods
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, enum sl_place);
} accel_pods SEC(".maps");

/*
 * key     pair and side
 * value   socket
 * writer  sockops; the kernel removes a socket that closes
 * reader  sk_msg
 * full    the pair is not accelerated, counted
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct sl_end);
	__type(value, __u64);
} accel_socks SEC(".maps");

/*
 * key     both ends of a connection whose client end is established
 * value   the pair's number
 * writer  sockops: put when the client's end is established, taken when the
 *         server's is or when the client's end closes
 * reader  sockops
 * full    the pair is not accelerated, counted
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sl_pair_key);
	__type(value, __u64);
} accel_wait SEC(".maps");

/*
 * key     number of a pair: the client's socket cookie
 * value   its state
 * writer  sockops makes and deletes it (whichever end closes first), sk_msg and
 *         the tracepoints count in it
 * reader  sk_msg; the agent, when it ends acceleration
 * full    the pair is not accelerated, counted
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct sl_pair);
} accel_pairs SEC(".maps");

/*
 * key     socket
 * value   the end of a pair that it is
 * writer  connect, sockops, the tracepoints
 * reader  sockops, sk_msg, the tracepoints
 * full    cannot be: it lives and dies with the socket. No memory: the pair is
 *         not accelerated
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sl_end);
} accel_ends SEC(".maps");

/*
 * key     0
 * value   1 when acceleration is on: else everything goes by TCP
 * writer  agent
 * reader  sockops, sk_msg
 * full    cannot be
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} accel_switch SEC(".maps");

/*
 * key     enum sl_accel_event
 * value   how often, per CPU
 * writer  sockops, sk_msg
 * reader  agent
 * full    cannot be
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u64);
} accel_events SEC(".maps");
_Static_assert(SL_ACCEL_EVENTS <= 16, "accel_events");

/* A function of its own, so that the object describes the enum to Go. */
static __noinline void sl_accel_count(enum sl_accel_event event)
{
	__u32 key = event;
	__u64 *n = bpf_map_lookup_elem(&accel_events, &key);

	if (n)
		*n += 1;
}

static __always_inline bool sl_accel_on(void)
{
	__u32 zero = 0;
	__u32 *on = bpf_map_lookup_elem(&accel_switch, &zero);

	return on && *on;
}

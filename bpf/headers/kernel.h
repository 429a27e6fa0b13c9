/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What Sluice reads of the kernel's own structures (include/net/sock.h,
 * include/net/net_namespace.h, include/uapi/linux/in6.h). Nothing but the names
 * counts: the loader puts in where a field is on the running kernel, from its BTF.
 */
#pragma once

#include "uapi.h"

/* What __builtin_preserve_field_info is asked for: where a bit field lies in this kernel. */
enum {
	SL_BYTE_OFFSET = 0,
	SL_LSHIFT = 4,
	SL_RSHIFT = 5,
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct net {
	__u64 net_cookie;
};

struct in6_addr {
	union {
		__be32 u6_addr32[4];
	} in6_u;
};

struct sock_common {
	__be32 skc_rcv_saddr;
	__u16 skc_num; /* host byte order */
	unsigned short skc_family;
	unsigned char skc_state;
	int skc_bound_dev_if;
	struct {
		struct net *net;
	} skc_net;
	struct in6_addr skc_v6_rcv_saddr;
};

struct sock {
	__u8 sk_userlocks : 4;
};

#pragma clang attribute pop

/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Counters: for each pod, how often each verdict was given for each reason.
 * The agent has the names (package bpf, counters.go); a test holds both lists
 * together.
 */
#pragma once

#include "types.h"

enum sl_reason {
	/* outbound, redirected */
	SL_OUT_CAPTURED,
	SL_OUT_SELF_CALL,
	/* outbound, bypassed */
	SL_OUT_PROXY,
	SL_OUT_LOOPBACK,
	SL_OUT_OWN_ADDRESS,
	SL_OUT_NO_ADDRESS,
	SL_OUT_EXCLUDED_INTERFACE,
	SL_OUT_EXCLUDED_PORT,
	SL_OUT_EXCLUDED_CIDR,
	SL_OUT_NOT_INCLUDED,
	/* outbound, denied */
	SL_OUT_ADMIN_PORT,
	SL_OUT_NO_MEMORY,
	SL_OUT_HANDOVER_FULL,
	SL_OUT_PROXY_DOWN,
	/* inbound, redirected */
	SL_IN_CAPTURED,
	/* inbound, bypassed */
	SL_IN_SELF,
	SL_IN_PROXY_PORT,
	SL_IN_HEALTH_PORT,
	SL_IN_EXCLUDED_INTERFACE,
	SL_IN_EXCLUDED_PORT,
	SL_IN_NOT_INCLUDED,
	/* inbound, denied */
	SL_IN_PROXY_DOWN,
	SL_IN_LISTENER_REFUSED,
	SL_IN_LISTENER_MISSING,
	SL_IN_ASSIGN_FAILED,
	/* Counters are pinned: what is new stands at the end. */
	SL_IN_HOST_PROBE,  /* inbound, bypassed */
	SL_IN_PROBES_FULL, /* inbound, redirected; counted as captured, too */
	SL_REASONS,
};

/* With room, so that another reason does not change the layout of the map. */
struct sl_stats {
	__u64 count[40];
};
_Static_assert(sizeof(struct sl_stats) == 40 * 8, "sl_stats");
_Static_assert(SL_REASONS <= 40, "sl_stats");

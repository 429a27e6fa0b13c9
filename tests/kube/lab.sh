#!/usr/bin/env bash
# The nodes of a cluster that ../shared/cluster/cluster.sh runs, for the tests of
# this package (doc.go says what a lab is):
#
#   lab.sh exec NODE COMMAND..
#   lab.sh service NODE start|stop|restart DAEMON
#   lab.sh off NODE | on NODE
#   lab.sh unmask NODE | mask NODE
#   lab.sh dualstack NODE    (run.sh alone calls this, before there are pods)
#
# CLUSTER_SH is cluster.sh, CLUSTER_DIR that cluster's directory.
set -euo pipefail

verb=$1 node=$2
shift 2
dir=$CLUSTER_DIR/nodes/$node
# shellcheck source=/dev/null
. "$CLUSTER_DIR/settings"
netns=$CLUSTER_NAME-$node
cgroup=$(awk '$3 == "cgroup2" {print $2; exit}' /proc/mounts)/$netns

die() {
	echo "lab.sh: $*" >&2
	exit 1
}

# off is what a power cut does: everything ends at once, and what is in memory is
# gone. The disk stays.
off() {
	local i
	echo 1 >"$cgroup/cgroup.kill"
	for ((i = 0; i < 200; i++)); do
		grep -q 'populated 1' "$cgroup/cgroup.events" || break
		sleep 0.05
	done
	grep -q 'populated 0' "$cgroup/cgroup.events" || die "processes of $node are left"
	find "$cgroup" -depth -type d -exec rmdir {} +
	rm -rf --one-file-system "${dir:?}/run"
	mkdir "$dir/run"
	ip -n "$netns" link del cni0 2>/dev/null || true
	ip netns exec "$netns" nft flush ruleset
	ip netns exec "$netns" conntrack -F >/dev/null 2>&1 || true
}

on() {
	mkdir -p "$cgroup"
	(
		echo "$BASHPID" >"$cgroup/cgroup.procs"
		export CLUSTER_DIR CLUSTER_CACHE CLUSTER_NODES CLUSTER_CGROUP CLUSTER_PIDNS CLUSTER_NAME CLUSTER_NODE_NET
		exec setsid nsenter --net="/run/netns/$netns" \
			unshare --mount --propagation private --uts --ipc --cgroup --pid --fork "$CLUSTER_SH" __node "$node"
	) </dev/null >>"$dir/log/init.log" 2>&1 &
}

# cluster.sh hides some files below /proc/sys from the kubelet by others. The
# kernel makes no /proc for a user namespace where one is hidden.
unmask() {
	"$CLUSTER_SH" node-exec "$node" sh -c 'awk "\$5 ~ /^\/proc\// {print \$5}" /proc/self/mountinfo | sort -r | while read -r m; do umount "$m"; done'
}

mask() {
	"$CLUSTER_SH" node-exec "$node" sh -c 'cd /run/kc-sysctl && for f in *; do mount --bind "$f" "/proc/sys/$(echo "$f" | tr . /)"; done'
}

# dualstack gives the pods of a node an IPv6 address each beside the other, and the
# node the ways to the pods of the other nodes.
dualstack() {
	local i=${node#node} net=fd51:${CLUSTER_POD_NET//./:} n
	ip netns exec "$netns" sysctl -qw net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.all.forwarding=1
	ip -n "$netns" addr add "$net:ff::$i/64" dev eth0 nodad
	for ((n = 1; n <= CLUSTER_NODES; n++)); do
		[ "$n" = "$i" ] || ip -n "$netns" route add "$net:$n::/64" via "$net:ff::$n"
	done
	sed -i -e 's#\("ranges": \[.*\]\)\]#\1, [{"subnet": "'"$net:$i"'::/64"}]]#' -e 's#{"dst": "0.0.0.0/0"}#&, {"dst": "::/0"}#' \
		"$dir"/cni/net.d/*.conflist
}

case $verb in
exec) exec "$CLUSTER_SH" node-exec "$node" "$@" ;;
service) exec "$CLUSTER_SH" service "$node" "$@" ;;
off | on | mask | unmask | dualstack) "$verb" ;;
*) die "no such verb: $verb" ;;
esac

#!/usr/bin/env bash
# Runs the tests of this package ("make e2e"). With KUBECONFIG on that cluster,
# which must be able to pull the images:
#
#   AGENT_IMAGE  repository:tag of the agent, by default the chart's
#   PROXY_IMAGE  Envoy, by default the chart's
#   APP_IMAGE    deploy/demo/bookshop
#
# Else on a cluster of its own, of two nodes, made by ../shared/cluster next to the
# repository and taken down at the end, also after a failure or an interrupt:
#
#   CLUSTER_DIR, CLUSTER_CACHE  its state, and what was built for it before
#   KEEP=1                      leaves it up, with Sluice, and says where
#
# It has three parts: the scenarios of this package, what needs a cluster of
# tests/chart and pkg/podwatch/inject, and of these apart, because it takes ten
# minutes, that the chart gives the agent no right too many. PARTS="scenarios chart
# rights" names those to run, BACKEND=ebpf or iptables the scenarios of one backend,
# RUN=REGEXP only those scenarios and no other part. OUT=DIRECTORY is for what is
# written about failures.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
repo=$PWD
out=$(realpath -m "${OUT:-bin/e2e}")
mkdir -p "$out"
parts=${PARTS:-}
if [ -z "$parts" ]; then
	parts=scenarios
	[ -n "${RUN:-}" ] || parts="scenarios chart rights"
fi
started=$SECONDS
own=
child=

say() { printf '[%4d s] %s\n' $((SECONDS - started)) "$*" >&2; }

finish() {
	local rc=$?
	trap - EXIT
	if [ -n "$own" ]; then
		if [ -n "${KEEP:-}" ]; then
			say "kept: export KUBECONFIG=$KUBECONFIG; take it down: CLUSTER_DIR=$CLUSTER_DIR $CLUSTER_SH down"
		else
			"$CLUSTER_SH" down >&2 || rc=1
			rm -rf "$CLUSTER_DIR"
		fi
	fi
	exit $rc
}
trap finish EXIT

# work runs a command so that a signal that only this shell gets ends it too.
work() {
	local rc=0
	"$@" &
	child=$!
	wait $child || rc=$?
	# An interrupted wait is not the command's end.
	while kill -0 $child 2>/dev/null; do wait $child || rc=$?; done
	child=
	return $rc
}
trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null; interrupted=1' INT TERM
interrupted=

step() {
	say "$1"
	shift
	work "$@"
	[ -z "$interrupted" ] || exit 130
}

appversion=$(sed -n 's/^appVersion: "\(.*\)"/\1/p' deploy/helm/sluice/Chart.yaml)
export SLUICE_E2E=1 SLUICE_E2E_BACKENDS="${BACKEND:-ebpf iptables}" SLUICE_E2E_OUT=$out SLUICE_E2E_KEEP=${KEEP:-} \
	SLUICE_E2E_AGENT_IMAGE=${AGENT_IMAGE:-sluicemesh/sluice-agent:$appversion} SLUICE_E2E_AGENT_IMAGE_2=${AGENT_IMAGE_2:-} \
	SLUICE_E2E_PROXY_IMAGE=${PROXY_IMAGE:-envoyproxy/envoy:v1.40.0} SLUICE_E2E_APP_IMAGE=${APP_IMAGE:-sluicemesh/bookshop:e2e} \
	SLUICE_E2E_HELM=$repo/.tools/bin/helm

step "helm, Prometheus" tests/setup/setup.sh helm prometheus
step "programs" make build
if [ -z "${KUBECONFIG:-}" ]; then
	CLUSTER_SH=$(realpath -m ../shared/cluster/cluster.sh)
	if [ ! -x "$CLUSTER_SH" ]; then
		echo "there is no cluster: set KUBECONFIG to one whose nodes can pull \$AGENT_IMAGE, \$PROXY_IMAGE and \$APP_IMAGE (see tests/kube/run.sh)" >&2
		exit 1
	fi
	if [ "$(id -u)" != 0 ]; then
		echo "making a cluster needs root; or set KUBECONFIG to one that there is" >&2
		exit 1
	fi
	export CLUSTER_SH CLUSTER_DIR=${CLUSTER_DIR:-/tmp/sluice-e2e} CLUSTER_CACHE=${CLUSTER_CACHE:-/tmp/cluster/cache} \
		CLUSTER_NAME=${CLUSTER_NAME:-se} CLUSTER_NODES=2 CLUSTER_NODE_NET=${CLUSTER_NODE_NET:-172.30.40} \
		CLUSTER_POD_NET=${CLUSTER_POD_NET:-10.240} CLUSTER_SVC_CIDR=${CLUSTER_SVC_CIDR:-10.140.0.0/16}
	own=1
	mkdir -p "$CLUSTER_DIR"
	audit=$CLUSTER_DIR/audit.log
	# Which requests the agents make is compared with what they may ask.
	cat >"$CLUSTER_DIR/audit.yaml" <<-'END'
		apiVersion: audit.k8s.io/v1
		kind: Policy
		rules:
		- {level: Metadata, omitStages: [RequestReceived], userGroups: ["system:serviceaccounts:sluice-system"]}
		- {level: None}
	END
	export CLUSTER_APISERVER_ARGS="${CLUSTER_APISERVER_ARGS:-} --audit-policy-file=$CLUSTER_DIR/audit.yaml --audit-log-path=$audit"
	step "cluster (built once: some minutes)" "$CLUSTER_SH" up
	export KUBECONFIG=$CLUSTER_DIR/kubeconfig PATH=$CLUSTER_CACHE/bin:$PATH
	# One node asks its plugins with STATUS whether they are ready, the other does
	# not: runtimes do so from this version of the specification on.
	sed -i 's/"cniVersion": *"1\.0\.0"/"cniVersion": "1.1.0"/' "$CLUSTER_DIR"/nodes/node2/cni/net.d/*.conflist
	for node in node1 node2; do tests/kube/lab.sh dualstack $node; done
	step "image of Envoy" "$(dirname "$CLUSTER_SH")/images.sh" load envoy
	step "image of the agent" make image OUT="$CLUSTER_DIR/agent.tar" IMAGE="$SLUICE_E2E_AGENT_IMAGE"
	export SLUICE_E2E_AGENT_IMAGE_2=${SLUICE_E2E_AGENT_IMAGE%:*}:next
	step "image of the next agent" make image OUT="$CLUSTER_DIR/next.tar" IMAGE="$SLUICE_E2E_AGENT_IMAGE_2" VERSION=next
	step "image of the bookshop" make image-bookshop OUT="$CLUSTER_DIR/app.tar" IMAGE="$SLUICE_E2E_APP_IMAGE"
	step "images onto the nodes" "$CLUSTER_SH" load-image "$CLUSTER_DIR"/{agent,next,app}.tar
	CGO_ENABLED=0 go build -o "$CLUSTER_DIR/snapshot" ./tests/chart/snapshot
	export SLUICE_E2E_LAB=$repo/tests/kube/lab.sh SLUICE_E2E_SNAPSHOT=$CLUSTER_DIR/snapshot SLUICE_E2E_THROWAWAY=1
fi
command -v kubectl >/dev/null || { echo "missing: kubectl" >&2; exit 1; }

case " $parts " in *" scenarios "*)
	go test -c -o "$out/kube.test" ./tests/kube
	say "scenarios"
	cd tests/kube
	work "$out/kube.test" -test.v -test.timeout 60m -test.run "^TestKube\$/./(${RUN:-.*})"
	cd "$repo"
	;;
esac

# charttests runs tests of tests/chart on the first node.
charttests() {
	local node
	node=$(kubectl get nodes -o jsonpath='{.items[0].metadata.name}')
	export SLUICE_NODE=$node SLUICE_PROXY_IMAGE=$SLUICE_E2E_PROXY_IMAGE
	export SLUICE_HELM_ARGS="--set image.repository=${SLUICE_E2E_AGENT_IMAGE%:*} --set image.tag=${SLUICE_E2E_AGENT_IMAGE##*:} --set proxy.image=$SLUICE_E2E_PROXY_IMAGE"
	if [ -n "$own" ]; then
		export SLUICE_NODE_EXEC="$CLUSTER_SH node-exec $node" SLUICE_AUDIT_LOG=$audit
	fi
	step "chart: $*" go test -count=1 -v -timeout 40m -run "^($(IFS='|' && echo "$*"))\$" ./tests/chart
}

case " $parts " in *" chart "*)
	step "injection" go test -count=1 -v -tags cluster -timeout 10m ./pkg/podwatch/inject
	charttests TestLife TestRequests TestStatusPolicy TestNamespaceLabel
	;;
esac
case " $parts " in *" rights "*) charttests TestRights ;; esac

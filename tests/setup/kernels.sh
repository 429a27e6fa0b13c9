#!/usr/bin/env bash
# Gets the kernels that tests/kernels boots, as packages of Debian: downloaded
# and unpacked into .tools/kernels/NAME, never installed. Arguments are names:
#
#   5.10 6.1 6.12   the kernel of Debian 11, 12, 13
#   newest          the newest that the archive has, experimental aside
#
# The machine's own apt knows the mirror, its proxy and its credentials; packages
# lists and everything else that apt writes are in a temporary directory. The
# lists' signatures are checked with the keyring of this machine's package
# debian-archive-keyring.
#
# In .tools/kernels/NAME: vmlinuz, modules/*.ko (networking alone), version (of
# the package) and release (what uname says). A release that the archive does not
# serve (any more) has only the file not-served, which says how that was told:
# the mirror, asked in the same minute, served this machine's own release, and for
# the other one it said that there is none (404). All else that is missing is an
# error.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
into=$PWD/.tools/kernels
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
tmp=
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM HUP

die() {
	printf 'setup: missing: kernel %s: %s\n' "$name" "$*" >&2
	exit 1
}

# suites prints where a kernel may come from: "main" or "security", then the suite.
suites() {
	case $1 in
	5.10) printf '%s\n' "main bullseye" "security bullseye-security" ;;
	6.1) printf '%s\n' "main bookworm" "security bookworm-security" ;;
	6.12) printf '%s\n' "main trixie" "security trixie-security" ;;
	newest) printf '%s\n' "main trixie-backports" "main sid" ;;
	esac
}

# site prints the URL of the mirror that this machine has for a suite.
site() {
	apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(SITE)' 'Created-By: Packages' |
		awk -v suite="$1" '$1 == suite && $2 == "main" {print $3; exit}'
}

# private_apt makes a configuration of apt that writes to $tmp alone: the
# machine's, without what it runs before and after.
private_apt() {
	mkdir -p "$tmp/lists/partial" "$tmp/cache/archives/partial"
	apt-config dump | grep -vE '^(APT::Update|DPkg)::' >"$tmp/apt.conf"
	cat >>"$tmp/apt.conf" <<-EOF
		Dir::Etc::main "/dev/null";
		Dir::Etc::parts "/dev/null";
		Dir::Etc::sourcelist "$tmp/sources.list";
		Dir::Etc::sourceparts "/dev/null";
		Dir::Etc::preferences "/dev/null";
		Dir::Etc::preferencesparts "/dev/null";
		Dir::State::lists "$tmp/lists";
		Dir::Cache "$tmp/cache";
		Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
		Acquire::Languages { "none"; };
		Acquire::Retries "3";
	EOF
	export APT_CONFIG=$tmp/apt.conf
}

# update reads the package lists of the given lines of suites. Where apt cannot
# have one it warns and ends well: that is an error here.
update() {
	printf '%s\n' "$@" | while read -r kind suite; do
		printf 'deb [arch=amd64 signed-by=%s] %s %s main\n' "$keyring" "${mirror[$kind]}" "$suite"
	done >"$tmp/sources.list"
	apt-get update >"$tmp/log" 2>&1 </dev/null && ! grep -qE '^(Err:|E: |W: (Failed|Some index|GPG error|An error))' "$tmp/log"
}

# unserved says whether the update of one suite has failed because the mirror says
# that it has no such suite, and for no other reason.
unserved() {
	grep -q 'does not have a Release file' "$tmp/log" &&
		awk '/^Err:/ {getline; if ($0 !~ /^ *404 +Not Found/) other = 1; else found = 1}
			END {exit !found || other}' "$tmp/log"
}

# newest_image prints version and name of the package that linux-image-amd64 of
# the highest version depends on.
newest_image() {
	local version best=
	while read -r version; do
		if [ -z "$best" ] || dpkg --compare-versions "$version" gt "$best"; then
			best=$version
		fi
	done < <(apt-cache madison linux-image-amd64 | awk '{print $3}')
	[ -n "$best" ] && apt-cache show "linux-image-amd64=$best" |
		sed -nE "s/^Depends:.*(linux-image-[0-9][^ ]*-amd64) .*/$best \\1/p" | head -n 1
}

get() {
	local dir=$into/$name line lines served version image release packages
	if [ -f "$dir/release" ]; then
		return 0
	fi
	printf 'setup: getting kernel %s (60 to 120 MB)\n' "$name" >&2
	rm -rf "$tmp" "$dir"
	tmp=$(mktemp -d)
	chmod 0755 "$tmp" # apt downloads as another user
	unset APT_CONFIG
	private_apt
	served=()
	mapfile -t lines < <(suites "$name")
	[ "${#lines[@]}" -gt 0 ] || die "there is no such name"
	for line in "${lines[@]}"; do
		if update "$line"; then
			served+=("$line")
		elif ! unserved || ! update "main $own"; then
			tail -n 5 "$tmp/log" >&2
			die "package lists of ${line#* } could not be read"
		fi
	done
	mkdir -p "$into"
	if [ "${#served[@]}" = 0 ]; then
		mkdir "$dir"
		printf 'the mirror serves %s and answers 404 for %s\n' "$own" "$(printf '%s, ' "${lines[@]#* }" | sed 's/, $//')" >"$dir/not-served"
		return 0
	fi
	update "${served[@]}" || die "package lists could not be read"
	read -r version image < <(newest_image) || die "no package linux-image-amd64 in ${served[*]#* }"
	release=${image#linux-image-}
	# Since 7.2 image and modules are packages of their own.
	packages=("$image=$version")
	if apt-cache show "linux-binary-$release=$version" >/dev/null 2>&1; then
		packages=("linux-binary-$release=$version" "linux-modules-$release=$version")
	fi
	if ! (cd "$tmp" && apt-get download "${packages[@]}") >"$tmp/log" 2>&1 </dev/null; then
		tail -n 5 "$tmp/log" >&2
		die "${packages[*]} could not be downloaded"
	fi
	unpack "$release"
	printf '%s\n' "$version" >"$tmp/kernel/version"
	printf '%s\n' "$release" >"$tmp/kernel/release"
	mv "$tmp/kernel" "$dir"
}

# unpack takes what is needed out of the packages in $tmp.
unpack() {
	local deb
	mkdir -p "$tmp/root" "$tmp/kernel/modules"
	for deb in "$tmp"/*.deb; do
		# Not every package has all of these.
		dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tmp/root" --wildcards \
			"*/vmlinuz*" "*/kernel/net/*" "*/kernel/lib/*" "*/kernel/crypto/*" "*/kernel/drivers/net/veth.ko*" 2>"$tmp/log" || true
	done
	find "$tmp/root" -name 'vmlinuz*' -type f -exec mv {} "$tmp/kernel/vmlinuz" \;
	find "$tmp/root" -name '*.ko' -exec mv -t "$tmp/kernel/modules" {} +
	find "$tmp/root" -name '*.ko.xz' -exec mv -t "$tmp/kernel/modules" {} +
	find "$tmp/kernel/modules" -name '*.ko.xz' -print0 | xargs -0 -r -n 50 -P 2 xz -d
	[ -s "$tmp/kernel/vmlinuz" ] && [ -s "$tmp/kernel/modules/veth.ko" ] || die "its packages have no vmlinuz or no module veth"
}

name=$*
for program in apt-get apt-cache apt-config dpkg-deb xz tar; do
	command -v "$program" >/dev/null || die "needs $program, on Debian"
done
[ -r "$keyring" ] || die "needs $keyring (Debian: apt-get install debian-archive-keyring)"
own=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
declare -A mirror
mirror[main]=$(site "$own")
mirror[security]=$(site "$own-security")
[ -n "${mirror[main]}" ] || die "apt of this machine has no mirror of Debian"
# Some machines have one mirror for all.
[ -n "${mirror[security]}" ] || mirror[security]=${mirror[main]%/}-security

for name in "$@"; do
	get
done

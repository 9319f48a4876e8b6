#!/usr/bin/env bash
# Installs the Debian packages that a goal needs and this machine lacks, and says which.
# usage: setup.sh build|lab ...     ("lab" is what demo, test and bench need beside a build)
set -euo pipefail

declare -A packages=(
  [build]="g++:g++ libclang-dev:/usr/lib/llvm-*/lib/libclang[-.][0-9s]* make:make python3:python3 git:git"
  [lab]="docker-registry:docker-registry busybox-static:/bin/busybox mmdebstrap:mmdebstrap skopeo:skopeo umoci:umoci runc:runc crun:crun curl:curl tcc:tcc openssl:openssl git:git libc6-dev:/usr/include/stdio.h"
)

present() { # a command's name, or a path pattern
  case $1 in
    /*) compgen -G "$1" >/dev/null ;;
    *) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
  esac
}

missing=()
for goal in "$@"; do
  for entry in ${packages[$goal]}; do
    present "${entry#*:}" || missing+=("${entry%%:*}")
  done
done
[ ${#missing[@]} -eq 0 ] && exit 0

command -v apt-get >/dev/null || { echo "kiln: this needs ${missing[*]}; install them (no apt-get here)" >&2; exit 1; }
if [ "$(id -u)" -eq 0 ]; then sudo=(env); else
  command -v sudo >/dev/null || { echo "kiln: this needs ${missing[*]}; run as root or install sudo" >&2; exit 1; }
  sudo=(sudo env)
fi
echo "kiln: installing ${missing[*]}"
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null

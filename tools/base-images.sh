#!/usr/bin/env bash
# Makes the base images that demo, test and bench pull, as OCI layouts under ~/.cache/kiln/images:
# busybox (Debian's static binary), tcc (busybox with a small C compiler, Debian's) and debian (bookworm's minimal
# packages, by mmdebstrap).
# usage: base-images.sh [busybox|tcc|debian ...]; prints the directory. Needs root for the owners in the layers.
set -euo pipefail
images=${KILN_IMAGES:-${XDG_CACHE_HOME:-$HOME/.cache}/kiln/images}
mkdir -p "$images"
path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

layout() { # name tag command: turns $work/rootfs into the layout $images/name
  local bundle=$work/bundle out=$work/layout
  umoci init --layout "$out"
  umoci new --image "$out:$2"
  umoci unpack --image "$out:$2" "$bundle"
  cp -a "$work/rootfs/." "$bundle/rootfs/"
  umoci repack --image "$out:$2" "$bundle"
  umoci config --image "$out:$2" --config.env "PATH=$path" --config.cmd "$3"
  umoci gc --layout "$out"
  mv "$out" "$images/$1"
}

busybox() {
  busybox_files
  layout busybox latest sh
}

tcc() {
  busybox_files
  # What the compiler loads, and what it needs for programs that use the C library.
  { dpkg -L tcc libc6-dev linux-libc-dev | grep -E '/(bin|lib|include)/' | grep -E '(libtcc1|libc_nonshared)\.a$|[^a]$'
    dpkg -L libc6 | grep '/ld-linux[^/]*$'
    ldd "$(type -P tcc)" | grep -o '/[^ ]*'; } | grep -v i386 | sort -u |
    while read -r path; do [ -d "$path" ] || realpath -s --relative-to=/ "$path"; done |
    tar -C / --dereference -cf - -T - | tar -C "$work/rootfs" -xf -
  ln -s tcc "$work/rootfs/usr/bin/cc"
  layout tcc latest sh
}

busybox_files() {
  local root=$work/rootfs
  mkdir -p "$root"/{bin,etc,proc,root,tmp,usr/bin,var}
  chmod 1777 "$root/tmp"
  cp /bin/busybox "$root/bin/busybox"
  for applet in $(/bin/busybox --list); do
    [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
  done
  ln -s /bin/env "$root/usr/bin/env"
  printf 'root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\napp:x:1000:1000:app:/home/app:/bin/sh\n' > "$root/etc/passwd"
  printf 'root:x:0:\ndaemon:x:1:\napp:x:1000:\nstaff:x:50:app\n' > "$root/etc/group"
}

debian() {
  echo "kiln: making a Debian base image with mmdebstrap (about a minute, once)" >&2
  mmdebstrap --quiet --variant=minbase bookworm "$work/debian.tar" >&2
  mkdir -p "$work/rootfs"
  tar -C "$work/rootfs" --numeric-owner --xattrs -xf "$work/debian.tar"
  layout debian bookworm bash
}

[ $# -gt 0 ] || set -- busybox debian
exec 9> "$images/.lock"
flock 9
for name in "$@"; do
  [ -d "$images/$name" ] && continue
  work=$(mktemp -d -p "$images")
  trap 'rm -rf "$work"' EXIT
  "$name" >&2
  rm -rf "$work"
done
echo "$images"

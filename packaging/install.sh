#!/bin/sh
# Installs proxyd from the folder that this script lies in. Nothing is fetched; pip and venv are not needed.
#
#   DESTDIR  put everything below this folder, for packaging (default: none)
#   PREFIX   (default: /usr/local)
#   PYTHON   the interpreter to run with (default: that of the right version in /usr/bin or PATH)
set -eu
umask 022

here=$(cd "$(dirname "$0")" && pwd)
DESTDIR=${DESTDIR:-}
PREFIX=${PREFIX:-/usr/local}
wanted=$(cat "$here/PYTHON")
entry=$(cat "$here/ENTRY") # module:function
home=$PREFIX/lib/proxyd

say() { printf '%s\n' "$*" >&2; }
fail() { say "install.sh: error: $*"; exit 1; }

case $PREFIX in /*) ;; *) fail "PREFIX must be an absolute path, got $PREFIX" ;; esac
if [ -z "${PYTHON:-}" ]; then
    for PYTHON in "/usr/bin/$wanted" "$(command -v "$wanted" || true)" "$(command -v python3 || true)"; do
        [ ! -x "$PYTHON" ] || break
    done
    [ -x "$PYTHON" ] || fail "$wanted was not found; install it, or name one: PYTHON=/path/to/$wanted $0"
fi
if [ -x "$PYTHON" ]; then
    ask='import sys; print("python%d.%d" % sys.version_info[:2], sys._base_executable)'
    answer=$("$PYTHON" -c "$ask") || fail "$PYTHON does not run"
    got=${answer%% *}
    [ "$got" = "$wanted" ] || fail "this build is for $wanted, and $PYTHON is $got; name another with PYTHON="
    PYTHON=${answer#* } # not a wrapper that chooses between versions
    case $PYTHON in
        /root/* | /home/*) say "warning: $PYTHON lies in a home folder: the systemd service may not run it" ;;
    esac
elif [ -z "$DESTDIR" ]; then
    fail "$PYTHON does not exist"
fi
[ -n "$DESTDIR" ] || [ "$(id -u)" = 0 ] || fail "run as root, or name a folder with DESTDIR="

# The new tree is made beside the old one, so that a running daemon is not served half of each.
new=$DESTDIR$home.new
rm -rf "$new"
mkdir -p "$new/bin" "$DESTDIR$PREFIX/bin"
cp -R "$here/lib" "$here/VERSION" "$here/LICENSE" "$new/"
cp "$here/uninstall.sh" "$new/"
ln -s "$PYTHON" "$new/bin/python3"
# What `python -m venv` would write; with it the interpreter finds lib/ by itself, in workers too.
printf 'home = %s\ninclude-system-site-packages = false\n' "$(dirname "$PYTHON")" >"$new/pyvenv.cfg"
cat >"$new/bin/proxyd" <<END
#!$home/bin/python3 -I
import sys
from ${entry%:*} import ${entry#*:}
sys.exit(${entry#*:}())
END
chmod 755 "$new/bin/proxyd" "$new/uninstall.sh"
old=$DESTDIR$home.old
rm -rf "$old"
[ ! -e "$DESTDIR$home" ] || mv "$DESTDIR$home" "$old"
mv "$new" "$DESTDIR$home"
rm -rf "$old"
ln -sfn ../lib/proxyd/bin/proxyd "$DESTDIR$PREFIX/bin/proxyd"

put() {  # put FILE FOLDER [NAME]: with the paths of this installation
    mkdir -p "$DESTDIR$2"
    sed "s#/usr/local/#$PREFIX/#g" "$1" >"$DESTDIR$2/${3:-$(basename "$1")}"
}
put "$here/systemd/proxyd.service" "$PREFIX/lib/systemd/system"
put "$here/systemd/sysctl.d/50-proxyd.conf" "$PREFIX/lib/sysctl.d"
put "$here/systemd/modules-load.d/proxyd.conf" "$PREFIX/lib/modules-load.d"
put "$here/systemd/sysusers.d/proxyd.conf" "$PREFIX/lib/sysusers.d"
for document in "$here"/docs/*.md; do
    put "$document" "$PREFIX/share/doc/proxyd"
done
for page in "$here"/man/*.1; do
    put "$page" "$PREFIX/share/man/man1"
done
put "$here/completion/proxyd" "$PREFIX/share/bash-completion/completions"
put "$here/completion/_proxyd" "$PREFIX/share/zsh/site-functions"
put "$here/completion/proxyd.fish" "$PREFIX/share/fish/vendor_completions.d"
# What is yours afterwards is never overwritten.
mkdir -p "$DESTDIR/etc/proxyd/manifests"
[ -e "$DESTDIR/etc/default/proxyd" ] || put "$here/config/proxyd.default" /etc/default proxyd
[ -e "$DESTDIR/etc/proxyd/manifests/README" ] || put "$here/manifests-README" /etc/proxyd/manifests README

[ -z "$DESTDIR" ] || exit 0

command -v nft >/dev/null || [ -x /usr/sbin/nft ] ||
    say "warning: the program nft was not found: VIPs will not be guarded; install nftables"
if [ -d /run/systemd/system ]; then
    systemd-sysusers "$PREFIX/lib/sysusers.d/proxyd.conf"
    systemctl daemon-reload
    systemctl try-restart proxyd.service
    /lib/systemd/systemd-sysctl "$PREFIX/lib/sysctl.d/50-proxyd.conf" || true
fi
say "installed $("$PREFIX/bin/proxyd" version) in $home; put manifests into /etc/proxyd/manifests, then:"
say "  systemctl enable --now proxyd"

#!/bin/sh
# Removes what install.sh installed. Your files in /etc/proxyd and /etc/default, and the state, stay.
set -eu

DESTDIR=${DESTDIR:-}
PREFIX=${PREFIX:-/usr/local}

if [ -z "$DESTDIR" ]; then
    [ "$(id -u)" = 0 ] || { echo "uninstall.sh: error: run as root, or name a folder with DESTDIR=" >&2; exit 1; }
    if [ -d /run/systemd/system ]; then
        systemctl disable --now proxyd.service 2>/dev/null || true
    fi
    # What a killed daemon may have left on the node.
    [ ! -x "$PREFIX/bin/proxyd" ] || "$PREFIX/bin/proxyd" cleanup || true
fi
rm -rf "$DESTDIR$PREFIX/lib/proxyd" "$DESTDIR$PREFIX/share/doc/proxyd"
rm -f "$DESTDIR$PREFIX/bin/proxyd" \
    "$DESTDIR$PREFIX"/share/man/man1/proxyd.1 "$DESTDIR$PREFIX"/share/man/man1/proxyd-*.1 \
    "$DESTDIR$PREFIX/share/bash-completion/completions/proxyd" \
    "$DESTDIR$PREFIX/share/zsh/site-functions/_proxyd" \
    "$DESTDIR$PREFIX/share/fish/vendor_completions.d/proxyd.fish" \
    "$DESTDIR$PREFIX/lib/systemd/system/proxyd.service" \
    "$DESTDIR$PREFIX/lib/sysctl.d/50-proxyd.conf" \
    "$DESTDIR$PREFIX/lib/modules-load.d/proxyd.conf" \
    "$DESTDIR$PREFIX/lib/sysusers.d/proxyd.conf"
if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi

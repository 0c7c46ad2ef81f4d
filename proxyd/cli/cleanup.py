"""`proxyd cleanup` removes what a killed proxyd left on the node."""

from __future__ import annotations

import argparse
import os

from proxyd.cli.env import FAILED, OK, CommandError, Env
from proxyd.control.admin.unix_socket import listening_pid
from proxyd.host.claim import claim_addresses
from proxyd.host.cleanup import remove_leftovers
from proxyd.host.kubechains import remove_userspace_chains
from proxyd.host.kubeproxy import Mode, kube_proxy_leftovers


def cleanup(args: argparse.Namespace, env: Env) -> int:
    """Remove leftovers. Exit code 1 if something could not be removed; standard error says why.

    Raises:
        CommandError: a daemon runs here, or netlink failed.
    """
    try:
        pid = listening_pid(args.admin_socket)
    except OSError:
        pid = None
    if pid is not None and not args.dry_run:
        who = f"pid {pid}" if pid else "a process outside this pid namespace"
        raise CommandError(
            f"proxyd is running ({who}, {args.admin_socket}); stop it first, or its VIPs would go away"
        )
    claim = None if args.dry_run else claim_addresses()
    if claim is None and not args.dry_run:
        raise CommandError("proxyd is running on this node; stop it first, or its VIPs would go away")
    try:
        removals = [remove_leftovers(dry_run=args.dry_run)]
        if args.kube_proxy:
            removals.append(remove_userspace_chains(dry_run=args.dry_run))
    except OSError as error:
        hint = "; run as root" if os.geteuid() else ""
        raise CommandError(f"cannot look for leftovers: {error.strerror or error}{hint}") from None
    finally:
        if claim is not None:
            claim.close()
    gone = [text for removal in removals for text in removal.gone]
    failures = [text for removal in removals for text in removal.failed]
    for text in gone:
        env.stdout.write(f"{'would remove' if args.dry_run else 'removed'} {text}\n")
    if not gone and not failures:
        env.stdout.write("nothing of proxyd is left on this node\n")
    for text in failures:
        env.say(f"proxyd: error: {text}")
    for leftover in kube_proxy_leftovers():
        if args.kube_proxy and args.dry_run and leftover.mode is Mode.USERSPACE:
            continue
        env.say(f"proxyd: warning: kube-proxy left {leftover}; `{leftover.removed_by}` removes it")
    return FAILED if failures else OK

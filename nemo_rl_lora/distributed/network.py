"""Where the processes of a run meet: at an address of their own node, never at all of its interfaces.

Contract: the first process opens the listening socket itself and hands it to torch.distributed's store, so that nobody
can take its port in between. gloo and NCCL are told the interface of the node's address; where the user told them
another one, it stays.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

_INTERFACE_OF = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}  # NCCL would take the name as a prefix


def interface_of(address: str) -> str:
    """The network interface of this machine that has the address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return name
    raise RuntimeError(f"no network interface of this node has the address {address}, which Ray gives it.")


def listen(address: str) -> socket.socket:
    """A socket that listens at the address, on a port that was free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.bind((address, 0))
    opened.listen(socket.SOMAXCONN)
    return opened


def join(
    *,
    rank: int,
    number: int,
    own: str,
    meeting: tuple[str, int],
    opened: socket.socket | None,
    start_seconds: float,
    step_seconds: float,
) -> None:
    """Start torch.distributed's default group.

    `own` is this node's address, `meeting` the address and port of the first process, and `opened` its socket, None in
    the others. A process waits `start_seconds` for the store, and `step_seconds` for the others in any later call.
    """
    for variable, form in _INTERFACE_OF.items():
        os.environ.setdefault(variable, form.format(interface_of(own)))
    store = dist.TCPStore(
        meeting[0],
        meeting[1],
        number,
        is_master=opened is not None,
        timeout=timedelta(seconds=start_seconds),
        wait_for_workers=False,
        master_listen_fd=None if opened is None else opened.detach(),
    )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # weights may be kept on the CPU
    dist.init_process_group(backend, store=store, rank=rank, world_size=number, timeout=timedelta(seconds=step_seconds))

"""What the command line needs beside the functions of `gc2ray`: it imports nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gc2ray.core.arguments import PriceKind, ReferenceLists
from gc2ray.core.errors import GivenUp, explain
from gc2ray.core.logs import LogForm, set_up, writes_json
from gc2ray.core.process import INTERRUPTED, Stopped, unexpected

if TYPE_CHECKING:
    from gc2ray.reporting.terminal import Terminal

__all__ = [
    "INTERRUPTED", "GivenUp", "LogForm", "PriceKind", "ReferenceLists", "Stopped", "explain",
    "follow", "set_up", "terminal", "unexpected", "writes_json",
]  # fmt: skip


def follow(address: str, submission_id: str, write: Callable[[str], object]) -> int:
    """Pass on what a submitted job prints until it ends; returns its exit code."""
    from gc2ray.runner.submit import JobServer

    return JobServer(address).follow(submission_id, write)


def terminal() -> Terminal:
    """Shows the results of these functions to people, as tables and progress bars."""
    from gc2ray.reporting.terminal import Terminal

    return Terminal()

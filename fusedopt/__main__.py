"""The command `fusedopt`, or `python -m fusedopt`: `doctor [--json]`, `cache show|clear`, `--version`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, doctor
from .compile import cache


def _cache(action: str) -> int:
    if action == "show":
        print(cache.show())
    else:
        print(f"{cache.configured()}: {cache.clear()} kernels removed")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    as_module = Path(sys.argv[0]).name == "__main__.py"
    parser = argparse.ArgumentParser(prog="python -m fusedopt" if as_module else "fusedopt")
    parser.add_argument("--version", action="version", version=f"fusedopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("doctor", help="what is installed, which backends work, and what to do")
    check.add_argument("--json", action="store_true", help="for programs")
    store = commands.add_parser("cache", help="the folder of compiled kernels")
    store.add_argument("action", choices=("show", "clear"))
    chosen = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have letters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = doctor.main(as_json=chosen.json) if chosen.command == "doctor" else _cache(chosen.action)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as in `fusedopt cache show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's exit says so once more
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())

"""The checks that are tests: pytest takes them to the device, and each test is an outcome in the part's log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .device import Device
from .jobs import DEVICE_LOST, Outcome, begin, begun, finish

FILES = (
    "tests/test_every_optimizer.py",
    "tests/step/test_dtypes_layouts.py",
    "tests/step/test_scaling.py",
    "tests/step/test_totals.py",
    "tests/step/test_drawing.py",
    "tests/step/test_externs.py",
    "tests/storage/test_storage.py::test_kernels_do_what_the_reference_does",
    "tests/storage/test_rows_in_blocks.py::test_they_fuse_and_are_as_the_reference_has_them",
)
SANITIZED = f"{FILES[0]}::test_nothing_outside_of_the_tensors_is_written"


def options(device: str) -> list[str]:
    """How pytest is called. Warnings of other packages are no errors here: their versions are those of the machine."""
    return ["--device", device, "-p", "no:cacheprovider", "-W", "default", "-W", "error:fusedopt", "-q"]


def do(device: Device, log: Path, share: int = 0, shares: int = 1) -> int:
    """Run the tests that the log does not have; ``share`` of ``shares`` processes' work. The exit status."""
    try:
        import pytest
    except ModuleNotFoundError as error:
        if share == 0 and not begun(log):
            begin(log, "pytest")
            finish(
                log, Outcome("pytest", "failed", f"{error}: none of the tests was run; make gpu installs it")
            )
        return 0

    plugin = Plugin(device, log, share, shares)
    arguments = [*FILES, *options(device.type), "--tb=short", "--continue-on-collection-errors"]
    status = int(pytest.main(arguments, plugins=[plugin]))
    done = {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}
    if begun(log):  # else none was found at all
        done.add(pytest.ExitCode.NO_TESTS_COLLECTED)
    return 0 if status in done else status


class Plugin:
    """Writes of each test what `jobs.do` writes of a job."""

    def __init__(self, device: Device, log: Path, share: int, shares: int) -> None:
        self.device, self.log, self.share, self.shares = device, log, share, shares

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        there = [i for i in items if not i.get_closest_marker("cpu_only")]
        some = (self.device.some([i for i in there if i.nodeid.startswith(file)]) for file in FILES)
        chosen = [item for found in some for item in found][self.share :: self.shares]
        before = begun(self.log)
        items[:] = [i for i in chosen if i.nodeid not in before]

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported; what other files have goes on."""
        if report.failed and self.share == 0 and report.nodeid not in begun(self.log):
            begin(self.log, report.nodeid)
            finish(self.log, Outcome(report.nodeid, "failed", report.longreprtext[-2000:]))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        begin(self.log, nodeid)
        self.outcome = Outcome(nodeid, "passed")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.outcome.seconds += report.duration
        if report.outcome != "passed":
            why = report.longrepr
            if isinstance(why, tuple):  # of what was skipped: file, line, reason
                why = why[2]
            elif crash := getattr(why, "reprcrash", None):
                why = crash.message
            self.outcome.status, self.outcome.detail = report.outcome, str(why)[:2000]

    def pytest_runtest_logfinish(self) -> None:
        finish(self.log, self.outcome)
        try:
            self.device.synchronize()
        except Exception:
            import pytest

            pytest.exit("the device is lost", returncode=DEVICE_LOST)

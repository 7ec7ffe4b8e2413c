"""Tables on the device: sent there when the host's have changed, in the order of the stream, without waiting."""

from __future__ import annotations

import numpy as np
import torch


class Upload:
    """A table on the device.

    While a CUDA graph is captured, nothing of it may be overwritten later: the copy that the graph makes has a target
    and a source of its own, which live as long as this. Not so if it is ``resident``: then captured launches read what
    is there at the time of their replay, and what is there has to be right when they are captured.
    """

    def __init__(self, device: torch.device, resident: bool = False) -> None:
        self.device, self.resident = device, resident
        self._sent: np.ndarray | None = None
        self._there: torch.Tensor | None = None
        self._captured: list[tuple[torch.Tensor, torch.Tensor]] = []

    def of(self, table: np.ndarray) -> torch.Tensor:
        """The table on the device, as it is on the host now."""
        same = self._sent is not None and same_words(self._sent, table)
        if capturing(self.device) and not (self.resident and same):
            return self._frozen(table)
        if self._there is None:
            self._there = torch.empty(table.shape, dtype=torch.from_numpy(table).dtype, device=self.device)
        if not same:
            self._there.copy_(self._staged(table), non_blocking=True)
            self._sent = table.copy()
        return self._there

    def _frozen(self, table: np.ndarray) -> torch.Tensor:
        """The table as it is now, for a graph."""
        if self.resident:
            raise RuntimeError(
                "this step's scalars are not on the device yet, and a step that is captured into a CUDA graph cannot "
                "send them. Remedy: do three steps before capturing, and upload this step's scalars"
            )
        staged = self._staged(table)
        there = torch.empty_like(staged, device=self.device).copy_(staged, non_blocking=True)
        self._captured.append((staged, there))
        return there

    def _staged(self, table: np.ndarray) -> torch.Tensor:
        """A copy that the host does not change; torch keeps pinned memory until it has been read."""
        staged = torch.from_numpy(table.copy())
        return staged.pin_memory() if self.device.type == "cuda" else staged


def same_words(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the last bit: 0.0 is not -0.0, and NaN is NaN."""
    return a.shape == b.shape and np.array_equal(a.view(np.int64), b.view(np.int64))


def capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

"""What rules have in common that find their learning rate as they go, by sums over all parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..optimizer.torch_face import TorchFace

if TYPE_CHECKING:
    from torch import Tensor


class FindsDistance(TorchFace):
    """An optimizer whose learning rate is in proportion to d, an estimate of how far the solution is."""

    _not_negative = ("d0", "d_coef", "growth_rate")

    @property
    def d(self) -> Tensor | float:
        """The estimate that the next step begins with: a 0-d tensor where the parameters are, or ``d0`` before a step.

        Every stepped parameter with elements has it in its state. To print it, or to compare it, waits for the device;
        ``step()`` never does.
        """
        # Kernels do not go over parameters without elements, whose numbers stay those that they began with.
        states = [state for p, state in self.state.of_parameters() if p.numel()]
        newest: dict[str, Any] = max(states, key=lambda state: state.get("step", 0), default={})
        return newest.get("d", self.param_groups[0]["d0"])


def check_d0(d0: float) -> None:
    """Raise ValueError unless the first estimate is above zero."""
    if not d0 > 0.0:
        raise ValueError(f"Invalid d0 value: {d0}; it must be above 0")

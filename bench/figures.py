"""Measured numbers and their bars."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes
    ----------
    value
        The number.
    unit
        Its unit, ``"×"`` for ratios taken in one run.
    at_most, at_least
        The bar, where there is one.
    """

    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None without a bar."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


Figures = dict[str, Figure]

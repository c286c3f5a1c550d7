"""Property-based accuracy tests for methods and backends of one's own: checks, Hypothesis strategies, and an oracle.

Needs Hypothesis: the extra ``verify``. Nothing else in kdecore imports it but the command `kdecore verify`.
"""

try:
    from kdecore.testing import strategies
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "hypothesis":
        raise
    raise ModuleNotFoundError(
        "kdecore.testing needs Hypothesis: pip install 'kdecore[verify]', or from a clone pip install '.[verify]'",
        name=error.name,
    ) from None

from kdecore.testing.backends import check_backend
from kdecore.testing.examples import Measured, PropertyFailed
from kdecore.testing.hostile import HOSTILE
from kdecore.testing.invariances import check_invariances
from kdecore.testing.oracle import exact_attention, masked_attention
from kdecore.testing.spectral import check_spectral_bound
from kdecore.testing.strategies import AttentionProblem
from kdecore.testing.unbiased import check_unbiased

__all__ = [
    "HOSTILE",
    "AttentionProblem",
    "Measured",
    "PropertyFailed",
    "check_backend",
    "check_invariances",
    "check_spectral_bound",
    "check_unbiased",
    "exact_attention",
    "masked_attention",
    "strategies",
]

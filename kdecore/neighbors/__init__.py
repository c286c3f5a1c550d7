"""Nadaraya–Watson regression and classification, and densities, as scikit-learn estimators over an index of training rows.

Needs scikit-learn: the extra ``sklearn``. Nothing else in kdecore imports it.
"""

try:
    from kdecore.neighbors.density import KernelDensity
    from kdecore.neighbors.estimators import KernelClassifier, KernelRegressor
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "sklearn":
        raise
    raise ModuleNotFoundError(
        "kdecore.neighbors needs scikit-learn: pip install 'kdecore[sklearn]', or from a clone pip install '.[sklearn]'",
        name=error.name,
    ) from None

__all__ = ["KernelClassifier", "KernelDensity", "KernelRegressor"]

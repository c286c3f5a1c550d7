"""The KDEformer paper's experiments, or stand-ins for them: `python -m bench.experiments NAME`, docs/experiments.md."""

EXPERIMENTS = {name: f"bench.experiments.{name}" for name in ("glove", "matching", "vision", "biggan", "t2t", "lra")}
"""Name → module, an `Experiment` of `bench.experiments.command`."""

"""Benchmarks: `python -m bench.run` measures, `python -m bench.compare A.json B.json` compares two runs."""

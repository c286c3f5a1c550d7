"""Compare two runs figure by figure: `python -m bench.compare OLD.json NEW.json`."""

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    """Print every figure of both files, and new over old; say so where the machines differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (arguments.old, arguments.new))
    for line in compared(old, new):
        print(line)


def compared(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the lines of the comparison of two records that `bench.run` wrote."""
    lines = [f"{old['measure']} → {new['measure']}"]
    if old["machine"]["cpu"] != new["machine"]["cpu"]:
        lines.append(f"different machines: {old['machine']['cpu']}, {new['machine']['cpu']}; only ratios (×) compare")
    for label in dict.fromkeys([*old["figures"], *new["figures"]]):
        before, after = (record["figures"].get(label) for record in (old, new))
        if before is None or after is None:
            lines.append(f"  {label:<52} only in the {'new' if before is None else 'old'} run")
            continue
        ratio = after["value"] / before["value"] if before["value"] else float("nan")
        lines.append(
            f"  {label:<52} {before['value']:>10.4g} → {after['value']:<10.4g} {after['unit']:<4} new/old {ratio:.3f}"
        )
    return lines


if __name__ == "__main__":
    main()

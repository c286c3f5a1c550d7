"""`scaled_nodes` in the simulator, against its reference."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.scaled_nodes import contract, cuda, reference
from tests.simulated.rows import DTYPES, stored
from tests.tolerances import assert_close
from tests.trees import scaling_problem


def compared(arguments, dtype):
    """Return results of the kernel for keys stored in a dtype, and of the reference for the same numbers in float64."""
    nodes, moment, *rates, scale, octaves = arguments
    number = "float64" if dtype == "float64" else "float32"
    xp, keys, wide_keys = stored(nodes.keys, dtype)
    others, rates = ([x.astype(number) for x in one] for one in (nodes[1:], rates))
    given = TreeNodes(keys, *map(xp.asarray, others)), *map(xp.asarray, (moment, *rates))
    found = cuda.scaled_nodes(xp, *given, scale, octaves)
    wide = TreeNodes(wide_keys, *(x.astype(np.float64) for x in others)), moment, *(x.astype(np.float64) for x in rates)
    expected = reference.scaled_nodes(host, *wide, scale, octaves)
    assert all(np.asarray(x).dtype == number for x in found)
    return [np.asarray(x) for x in found], expected, number


@pytest.mark.parametrize(
    ("n", "d", "p", "dtype"),
    [*((37, 11, 3, dtype) for dtype in DTYPES), (1, 1, 1, "float64"), (16, 8, 4, "float32"), (5, 3, 2, "float64")],
)
def test_scaled_nodes(rng, n, d, p, dtype):
    found, expected, number = compared(scaling_problem(rng, n, d, p), dtype)
    assert expected[0].any() == (n > 1)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, dtype=number)


@pytest.mark.parametrize("rows", [1, 5, 21])
def test_some_rows_of_many(rng, monkeypatch, rows):
    """53 keys, every 53rd, 11th and 3rd: one tile, and several of which the last one is not filled."""
    for name in ("FEWEST_LEAF_ROWS", "MOST_LEAF_ROWS"):
        monkeypatch.setattr(contract, name, rows)
    found, expected, number = compared(scaling_problem(rng, 53), "float64")
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, dtype=number)


@pytest.mark.parametrize("share", [0.0, 6.0])
def test_shares_end_where_the_contract_says(rng, share):
    nodes, moment, directions, half_norm, scale, octaves = scaling_problem(rng, 30)
    given = (moment, directions * 9.0, half_norm) if share == 0 else (moment, directions, half_norm * 1e-9)
    (spread, _), _, _ = compared((nodes, *given, scale, octaves), "float64")
    np.testing.assert_array_equal(spread, share * nodes.spread)


def test_a_group_that_is_not_finite_spoils_no_other(rng):
    given = scaling_problem(rng, 30)
    given[0].keys[0, -4:] = np.nan
    found, expected, number = compared(given, "float64")
    assert np.isnan(found[0][0]).all()
    assert_close(found[0][1], expected[0][1], dtype=number)
    assert_close(found[1], expected[1], dtype=number)


def test_more_directions_than_a_tile_has_rows_are_not_taken(rng):
    with pytest.raises(AssertionError):
        cuda.scaled_nodes(host, *scaling_problem(rng, 9, 6, 5))

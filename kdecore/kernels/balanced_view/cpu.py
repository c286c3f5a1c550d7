"""`balanced_view` in Numba for the CPU, a group a task.

No library of linear algebra is called: its threads would wait for more by spinning (bench/NOTES.md). Columns are made
orthonormal by Gram–Schmidt, in the inner product of a moment for whitening; eigenvectors are found by Jacobi's method.
Moments are divided by their sizes, on which the results depend by a factor alone, so that numbers of any unit stay in range.
"""

import math

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace, host
from kdecore.kernels.balanced_view.contract import ORTHOGONAL_ITERATIONS, RIDGE, SMALLEST_SQUARE, View
from kdecore.kernels.balanced_view.reference import view
from kdecore.kernels.project_rows.cpu import project_rows
from kdecore.kernels.runtime.jit import helper, kernel
from kdecore.kernels.runtime.threads import run_tasks

SWEEPS = 12
"""Of Jacobi rotations, at most: convergence is quadratic."""
SETTLED = 1e-30
"""Sweeps end where what is beside the diagonal is this part of it, squared."""
SMALLEST = 1e-300
"""Stands for the squared length of a column that vanished, which stays zero."""


def balanced_view(
    xp: Namespace, query_moment: Array, key_moment: Array, centre: Array, scale: float, p: int, like: Array
) -> View:
    """Follow `kdecore.kernels.balanced_view.contract.BalancedView`."""
    c, s = host_view(query_moment) * scale**2, host_view(key_moment)
    groups, d, _ = c.shape
    queries, keys = np.empty((2, groups, d, p))
    run_tasks(lambda first, last: balance(c, s, queries, keys, first, last), groups, chunk=1)
    found = view(host, c, queries, keys, host_view(centre), scale, host_view(like).dtype, project_rows)
    return View(*(from_host_like(xp, x, query_moment) for x in found))


@helper()
def normalised(moment, out):
    """Write a moment in units of its mean eigenvalue, with the ridge; return the unit, 1 where it is 0."""
    d = moment.shape[0]
    size = 0.0
    for i in range(d):
        size += moment[i, i] / d
    unit, ridge = (size, RIDGE) if size > 0.0 else (1.0, 1.0)
    for i in range(d):
        for j in range(d):
            out[i, j] = moment[i, j] / unit
        out[i, i] += ridge
    return unit


@helper()
def product(matrix, basis, out):
    """Write a symmetric matrix (d, d) times each row of the basis (p, d)."""
    p, d = basis.shape
    for j in range(p):
        for i in range(d):
            out[j, i] = 0.0
        for t in range(d):
            factor = basis[j, t]
            for i in range(d):
                out[j, i] += factor * matrix[t, i]


@helper(fastmath={"reassoc", "contract", "nsz"})
def inner(x, y):
    """Return the inner product of two rows."""
    total = 0.0
    for t in range(x.shape[0]):
        total += x[t] * y[t]
    return total


@helper()
def orthonormalise(basis, image):
    """Make rows orthonormal in the inner product xᵀ M y, where ``image`` (p, d) is M times the basis, and stays so."""
    p, d = basis.shape
    for j in range(p):
        # Twice is enough: nothing of the rows before is left but rounding.
        for _ in range(2):
            for i in range(j):
                along = inner(image[i], basis[j])
                for t in range(d):
                    basis[j, t] -= along * basis[i, t]
                    image[j, t] -= along * image[i, t]
        length = math.sqrt(max(inner(basis[j], image[j]), SMALLEST))
        for t in range(d):
            basis[j, t] /= length
            image[j, t] /= length


@helper()
def diagonalise(matrix, axes):
    """Turn a symmetric matrix into a diagonal one of its eigenvalues; write its eigenvectors to the columns of ``axes``."""
    p = matrix.shape[0]
    for i in range(p):
        for j in range(p):
            axes[i, j] = 1.0 if i == j else 0.0
    for _ in range(SWEEPS):
        beside, along = 0.0, 0.0
        for a in range(p):
            along += matrix[a, a] * matrix[a, a]
            for b in range(a):
                beside += matrix[a, b] * matrix[a, b]
        if not beside > SETTLED * along:
            break
        for a in range(p - 1):
            for b in range(a + 1, p):
                gap, twice = matrix[b, b] - matrix[a, a], 2.0 * matrix[a, b]
                reach = abs(gap) + math.sqrt(gap * gap + twice * twice)
                tangent = (twice if gap >= 0.0 else -twice) / (reach if reach > 0.0 else 1.0)
                cosine = 1.0 / math.sqrt(1.0 + tangent * tangent)
                sine = tangent * cosine
                for t in range(p):
                    first, second = matrix[t, a], matrix[t, b]
                    matrix[t, a], matrix[t, b] = cosine * first - sine * second, sine * first + cosine * second
                for t in range(p):
                    first, second = matrix[a, t], matrix[b, t]
                    matrix[a, t], matrix[b, t] = cosine * first - sine * second, sine * first + cosine * second
                for t in range(p):
                    first, second = axes[t, a], axes[t, b]
                    axes[t, a], axes[t, b] = cosine * first - sine * second, sine * first + cosine * second


@helper()
def largest_columns(c, s, basis):
    """Write the unit vectors where the product of two diagonals is largest, of equal ones the first, the largest first."""
    p, d = basis.shape
    basis[:] = 0.0
    for i in range(d):
        before = 0
        for j in range(d):
            mine, other = c[i, i] * s[i, i], c[j, j] * s[j, j]
            before += other > mine or (other == mine and j < i)
        if before < p:
            basis[before, i] = 1.0


@kernel()
def balance(query_moments, key_moments, queries, keys, first, last):
    """Write the views of groups first … last − 1; bases are rows here, one after another in memory."""
    _, d, p = queries.shape
    c, s = np.empty((2, d, d))
    basis, seen, image = np.empty((3, p, d))
    matrix, axes = np.empty((2, p, p))
    place = np.zeros(p, np.int64)
    for group in range(first, last):
        c_unit, s_unit = normalised(query_moments[group], c), normalised(key_moments[group], s)
        largest_columns(c, s, basis)
        for _ in range(ORTHOGONAL_ITERATIONS if p < d else 0):
            product(c, basis, seen)
            product(s, seen, basis)
            for j in range(p):
                for t in range(d):
                    seen[j, t] = basis[j, t]
            orthonormalise(basis, seen)
        product(c, basis, seen)
        orthonormalise(basis, seen)
        # Of columns that nearly depended on others little is left: multiplied again, rounding doesn't grow.
        product(c, basis, seen)
        product(s, seen, image)
        for a in range(p):
            for b in range(a, p):
                matrix[a, b] = matrix[b, a] = inner(seen[a], image[b])
        diagonalise(matrix, axes)
        for a in range(p):
            before = 0
            for b in range(p):
                before += matrix[b, b] < matrix[a, a] or (matrix[b, b] == matrix[a, a] and b < a)
            place[before] = a
        largest = matrix[place[p - 1], place[p - 1]]
        for j in range(p):
            axis, cubes = place[j], 0.0
            root = math.sqrt(math.sqrt(max(matrix[axis, axis], SMALLEST_SQUARE * largest)))
            # What the units of the moments come to in the end.
            root *= math.sqrt(math.sqrt(s_unit) / math.sqrt(c_unit))
            for t in range(d):
                of_query, of_key = 0.0, 0.0
                for a in range(p):
                    of_query += basis[a, t] * axes[a, axis]
                    of_key += seen[a, t] * axes[a, axis]
                cubes += of_query * of_query * of_query
                queries[group, t, j], keys[group, t, j] = of_query * root, of_key / root
            if cubes < 0.0:
                for t in range(d):
                    queries[group, t, j] *= -1.0
                    keys[group, t, j] *= -1.0

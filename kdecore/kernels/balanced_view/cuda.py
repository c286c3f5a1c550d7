"""`balanced_view` in Numba CUDA: a thread block a group, everything in one launch.

In float64, as the contract is. Moments are divided by their sizes, on which the results depend by a factor alone, and so
numbers of any unit stay in range. A basis is made orthonormal by Gram–Schmidt, once: near dependence costs it some
orthogonality, but not its span, on which alone the results depend. In the inner product of a moment the same steps whiten
it. Eigenvectors are found by Jacobi's method, in rounds of disjoint rotations.

On paper, 16 heads, d = 64, p = 16: 1.3 MB moved, 0.4 µs at 3.0 TB/s, and 30 MFLOP are nothing; what counts is latency, here
at 1.7 GHz. 11 products of a moment, which stays in L1, and a basis, each 64 steps of five loads by 8 warps, 3,000 cycles: 20
µs. 5 orthonormalisations of 16 columns, each column four products, 32 reads of shared memory, a division and two barriers,
500 cycles: 24 µs. 8 sweeps of 15 rounds, each two square roots, two divisions and two barriers, 700 cycles: 50 µs. With 430
barriers in all that is 0.1 ms, for as many groups at once as there are multiprocessors.
"""

import math

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace, accumulation_dtype, dtype_name
from kdecore.kernels.balanced_view.contract import (
    MOST_COLUMNS,
    MOST_ROWS,
    ORTHOGONAL_ITERATIONS,
    RIDGE,
    SMALLEST_SQUARE,
    View,
)
from kdecore.kernels.runtime.cuda_jit import cuda_kernel, launch

THREADS = 256
ROWS, COLUMNS = MOST_ROWS, MOST_COLUMNS
PAIRS = COLUMNS // 2
TOGETHER = 4
"""Columns of a product that a thread computes at once, from one read of the moment."""
PARTS = THREADS // COLUMNS
"""Partial sums of a sum over rows."""
SWEEPS = 8
"""Of Jacobi rotations; quadratic convergence leaves nothing to do after six or seven."""
SMALLEST = 1e-300
"""Stands for the squared length of a column that vanished, which stays zero."""
TINY = {"THREADS": 32, "PARTS": 2}
"""What tests in the simulator put in their place."""


def balanced_view(
    xp: Namespace, query_moment: Array, key_moment: Array, centre: Array, scale: float, p: int, like: Array
) -> View:
    """Follow `kdecore.kernels.balanced_view.contract.BalancedView`, within its `numba_cuda_limit`."""
    groups, d, _ = query_moment.shape
    assert d <= ROWS
    assert p <= COLUMNS
    images = xp.empty((2, groups, d, COLUMNS), dtype=xp.float64, device=query_moment.device)
    dtype = accumulation_dtype(xp, dtype_name(like))
    queries, keys, of_centre, half_norm = found = View(
        *(xp.empty(shape, dtype=dtype, device=like.device) for shape in (*[(groups, d, p)] * 2, (groups, 1, p), (groups,)))
    )
    scale = float(scale)
    launch(balance, groups, THREADS, query_moment, key_moment, centre, scale, images, queries, keys, of_centre, half_norm)
    return found


@cuda.jit(device=True)
def size_and_ridge(diagonal, d):
    """Return the mean of a diagonal, and what of it is added to all eigenvalues; 1 and 1 where it is 0."""
    total = 0.0
    for i in range(d):
        total += diagonal[i]
    return (total / d, RIDGE) if total > 0.0 else (1.0, 1.0)


@cuda.jit(device=True)
def choose_columns(weights, d, p, basis):
    """Write the unit vectors of the p largest weights, of equal ones the first, the largest first; and columns of zeros."""
    thread = cuda.threadIdx.x
    for task in range(thread, d * COLUMNS, THREADS):
        basis[task // COLUMNS, task % COLUMNS] = 0.0
    cuda.syncthreads()
    for i in range(thread, d, THREADS):
        before = 0
        for j in range(d):
            before += weights[j] > weights[i] or (weights[j] == weights[i] and j < i)
        if before < p:
            basis[i, before] = 1.0
    cuda.syncthreads()


@cuda.jit(device=True)
def multiply(moment, unit, ridge, basis, image):
    """Write (moment times unit + ridge) times a basis."""
    d = moment.shape[0]
    for task in range(cuda.threadIdx.x, d * (COLUMNS // TOGETHER), THREADS):
        # Neighbouring threads take neighbouring rows: columns, as they lie in memory, since the moment is symmetric.
        row, column = task % d, task // d * TOGETHER
        w, x, y, z = 0.0, 0.0, 0.0, 0.0
        for t in range(d):
            number = moment[t, row]
            w += number * basis[t, column]
            x += number * basis[t, column + 1]
            y += number * basis[t, column + 2]
            z += number * basis[t, column + 3]
        image[row, column] = w * unit + ridge * basis[row, column]
        image[row, column + 1] = x * unit + ridge * basis[row, column + 1]
        image[row, column + 2] = y * unit + ridge * basis[row, column + 2]
        image[row, column + 3] = z * unit + ridge * basis[row, column + 3]
    cuda.syncthreads()


@cuda.jit(device=True)
def sum_parts(sums, column):
    """Return the sum of a column of partial sums."""
    total = 0.0
    for part in range(PARTS):
        total += sums[part, column]
    return total


@cuda.jit(device=True)
def orthonormalise(basis, image, d, p, sums):
    """Make p columns orthonormal, in the inner product xᵀ M y where ``image`` is M times the basis, or the basis itself."""
    column, part = cuda.threadIdx.x % COLUMNS, cuda.threadIdx.x // COLUMNS
    length = 1.0
    for j in range(p):
        total = 0.0
        if j <= column < p:
            for t in range(part, d, PARTS):
                total += basis[t, j] * image[t, column]
        sums[part, column] = total
        cuda.syncthreads()
        square = max(sum_parts(sums, j), SMALLEST)
        if column == j:
            length = math.sqrt(square)
        elif j < column < p:
            along = sum_parts(sums, column) / square
            for t in range(part, d, PARTS):
                basis[t, column] -= along * basis[t, j]
        cuda.syncthreads()
    for t in range(part, d, PARTS):
        basis[t, column] /= length
    cuda.syncthreads()


@cuda.jit(device=True)
def pair_of(number, turn):
    """Return the two of `COLUMNS` players that meet in a turn of a tournament, by the number of their pair."""
    others = COLUMNS - 1
    if number == 0:
        return others, turn
    ahead, behind = turn + number, turn - number
    return ahead if ahead < others else ahead - others, behind if behind >= 0 else behind + others


@cuda.jit(device=True)
def diagonalise(matrix, axes, rotations):
    """Turn a symmetric matrix into a diagonal one of its eigenvalues; ``axes``, the unit matrix, into its eigenvectors."""
    thread = cuda.threadIdx.x
    for step in range(SWEEPS * (COLUMNS - 1)):
        turn = step % (COLUMNS - 1)
        for number in range(thread, PAIRS, THREADS):
            a, b = pair_of(number, turn)
            gap, twice = matrix[b, b] - matrix[a, a], 2.0 * matrix[a, b]
            reach = abs(gap) + math.sqrt(gap * gap + twice * twice)
            tangent = (twice if gap >= 0.0 else -twice) / (reach if reach > 0.0 else 1.0)
            cosine = 1.0 / math.sqrt(1.0 + tangent * tangent)
            rotations[number, 0], rotations[number, 1] = cosine, tangent * cosine
        cuda.syncthreads()
        # The four numbers where the rows of a pair meet the columns of a pair depend on no others.
        for task in range(thread, PAIRS * (PAIRS + COLUMNS), THREADS):
            left, right = task // PAIRS, task % PAIRS
            k, m = pair_of(right, turn)
            cosine, sine = rotations[right, 0], rotations[right, 1]
            if left < PAIRS:
                a, b = pair_of(left, turn)
                c, s = rotations[left, 0], rotations[left, 1]
                ak, am, bk, bm = matrix[a, k], matrix[a, m], matrix[b, k], matrix[b, m]
                ak, bk = c * ak - s * bk, s * ak + c * bk
                am, bm = c * am - s * bm, s * am + c * bm
                matrix[a, k], matrix[a, m] = cosine * ak - sine * am, sine * ak + cosine * am
                matrix[b, k], matrix[b, m] = cosine * bk - sine * bm, sine * bk + cosine * bm
            else:
                row = left - PAIRS
                first, second = axes[row, k], axes[row, m]
                axes[row, k], axes[row, m] = cosine * first - sine * second, sine * first + cosine * second
        cuda.syncthreads()


@cuda_kernel(
    "float64[:, :, ::1], float64[:, :, ::1], float64[:, ::1], float64, float64[:, :, :, ::1], number[:, :, ::1], "
    "number[:, :, ::1], number[:, :, ::1], number[::1]",
    THREADS,
)
def balance(query_moments, key_moments, centres, scale, images, queries, keys, of_centres, half_norms):
    """Write the view of a group."""
    thread, group = cuda.threadIdx.x, cuda.blockIdx.x
    d, p = queries.shape[1], queries.shape[2]
    c, s, seen, image = query_moments[group], key_moments[group], images[0, group], images[1, group]
    basis = cuda.shared.array((ROWS, COLUMNS), np.float64)
    diagonals = cuda.shared.array((2, ROWS), np.float64)
    sums = cuda.shared.array((PARTS, COLUMNS), np.float64)
    matrix = cuda.shared.array((COLUMNS, COLUMNS), np.float64)
    axes = cuda.shared.array((COLUMNS, COLUMNS), np.float64)
    rotations = cuda.shared.array((PAIRS, 2), np.float64)
    place = cuda.shared.array(COLUMNS, np.int32)
    for i in range(thread, d, THREADS):
        diagonals[0, i], diagonals[1, i] = c[i, i] * scale * scale, s[i, i]
    cuda.syncthreads()
    c_size, c_ridge = size_and_ridge(diagonals[0], d)
    s_size, s_ridge = size_and_ridge(diagonals[1], d)
    c_unit, s_unit = scale * scale / c_size, 1.0 / s_size
    if thread == 0:
        # Of a moment of 0 the size that stands for it is none.
        half_norms[group] = 0.5 * c_size if c_ridge != 1.0 else 0.0
    cuda.syncthreads()
    for i in range(thread, d, THREADS):
        diagonals[0, i] = (diagonals[1, i] * s_unit + s_ridge) * (diagonals[0, i] / c_size + c_ridge)
    cuda.syncthreads()
    choose_columns(diagonals[0], d, p, basis)
    if p < d:
        for _ in range(ORTHOGONAL_ITERATIONS):
            multiply(c, c_unit, c_ridge, basis, image)
            multiply(s, s_unit, s_ridge, image, basis)
            orthonormalise(basis, basis, d, p, sums)
    multiply(c, c_unit, c_ridge, basis, seen)
    orthonormalise(basis, seen, d, p, sums)
    multiply(c, c_unit, c_ridge, basis, seen)
    multiply(s, s_unit, s_ridge, seen, image)
    for task in range(thread, COLUMNS * COLUMNS, THREADS):
        a, b = task // COLUMNS, task % COLUMNS
        low, high, total = min(a, b), max(a, b), 0.0
        for t in range(d):
            total += seen[t, low] * image[t, high]
        matrix[a, b], axes[a, b] = total, 1.0 if a == b else 0.0
        # Numbers that are not finite have no order: all places are to hold something.
        place[b] = b
    cuda.syncthreads()
    diagonalise(matrix, axes, rotations)
    for a in range(thread, p, THREADS):
        before = 0
        for b in range(p):
            before += matrix[b, b] < matrix[a, a] or (matrix[b, b] == matrix[a, a] and b < a)
        place[before] = a
    cuda.syncthreads()
    column, part = thread % COLUMNS, thread // COLUMNS
    cubes, along, from_axis = 0.0, 0.0, 0
    if column < p:
        from_axis = place[column]
        largest = matrix[place[p - 1], place[p - 1]]
        root = math.sqrt(math.sqrt(max(matrix[from_axis, from_axis], SMALLEST_SQUARE * largest)))
        # What the sizes of the moments come to in the end.
        root *= math.sqrt(math.sqrt(s_size) / math.sqrt(c_size))
        for t in range(part, d, PARTS):
            of_query, of_key = 0.0, 0.0
            for a in range(p):
                of_query += basis[t, a] * axes[a, from_axis]
                of_key += seen[t, a] * axes[a, from_axis]
            cubes += of_query * of_query * of_query
            queries[group, t, column], keys[group, t, column] = of_query * root * scale, of_key / root
            along += centres[group, t] * (of_key / root)
    sums[part, column] = cubes
    cuda.syncthreads()
    turned = column < p and sum_parts(sums, column) < 0.0
    if turned:
        for t in range(part, d, PARTS):
            queries[group, t, column] = -queries[group, t, column]
            keys[group, t, column] = -keys[group, t, column]
    cuda.syncthreads()
    sums[part, column] = along
    cuda.syncthreads()
    if part == 0 and column < p:
        total = sum_parts(sums, column)
        of_centres[group, 0, column] = -total if turned else total

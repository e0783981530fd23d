"""The kernels in Triton: what runs on a GPU, or interpreted on the CPU.

A tile is ROWS by COLS values of a tensor of n·c·s values. If the tensor is channels last, rows are
positions and columns are channels. If it is contiguous, columns are positions, and rows are the
samples of one channel in the reductions, images of any channels in the elementwise kernels.

Only vectors of one value per channel are float64. Sums over a batch are made in float32, in as many
lanes as a tile has values, each with the rounding error of its last addition (Kahan), and the lanes
are added up in float64. A reduction is split into parts that are merged in their order, so that
results are the same from run to run.
"""

import triton
import triton.language as tl

# ruff: noqa: N803 -- Triton's own kernels write constants of the compilation in capitals


# What Triton itself has decorated, such as tl.sum, is interpreted only if all of Triton is.
@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _add(total, error, value):
    """Return a sum plus a value, and the error of that, given the error of the sum."""
    corrected = value - error
    new = total + corrected
    return new, (new - total) - corrected


@triton.jit
def _reduced_tile(
    tile, block, rows, c, s, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return the offsets of a tile's values, which of them exist, and how many of a channel."""
    if CHANNELS_LAST:
        top = tile * tl.full((), ROWS, tl.int64)
        row = top + tl.arange(0, ROWS)
        col = block * COLS + tl.arange(0, COLS)
        offsets = row[:, None] * c + col[None, :]
        exists = (row < rows)[:, None] & (col < c)[None, :]
        count = tl.minimum(rows - top, ROWS)
    else:
        across = (s + COLS - 1) // COLS
        top = (tile // across) * tl.full((), ROWS, tl.int64)
        left = (tile % across) * COLS
        row = top + tl.arange(0, ROWS)
        col = left + tl.arange(0, COLS)
        offsets = (row[:, None] * c + block) * s + col[None, :]
        exists = (row < rows)[:, None] & (col < s)[None, :]
        count = tl.minimum(rows - top, ROWS) * tl.minimum(s - left, COLS)
    return offsets, exists, count


@triton.jit
def _along_channels(vector, CHANNELS_LAST: tl.constexpr):
    """Return a vector with one value per channel, or per row of a tile, to meet a tile."""
    if CHANNELS_LAST:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def _lanes(total, error, CHANNELS_LAST: tl.constexpr):
    """Return the sum over a tile's lanes: per column if channels last, else one value."""
    exact = total.to(tl.float64) - error.to(tl.float64)
    if CHANNELS_LAST:
        return tl.reduce(exact, 0, _plus)
    else:
        return tl.reduce(tl.reduce(exact, 1, _plus), 0, _plus)


@triton.jit
def _mean(values, count, CHANNELS_LAST: tl.constexpr):
    """Return about the mean of a tile's values, 0 where none exists; to be summed about."""
    share = values / count.to(tl.float32)
    if CHANNELS_LAST:
        return tl.reduce(share, 0, _plus)[None, :]
    else:
        return tl.reduce(tl.reduce(share, 1, _plus), 0, _plus)


@triton.jit
def local_moments(
    x, parts, rows, c, s, tiles, tiles_per_part,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write the moments of each part of x, 2c + 1 values: count, means, M2.

    Sums about the mean of the part's first tile, which is near enough to the mean of the part.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    first = part * tiles_per_part
    offsets, exists, count = _reduced_tile(first, block, rows, c, s, CHANNELS_LAST, ROWS, COLS)
    values = tl.load(x + offsets, exists, 0.0).to(tl.float32)
    shift = _mean(values, count, CHANNELS_LAST)
    total = tl.where(exists, values - shift, 0.0)
    square = total * total
    total_error = tl.full((ROWS, COLS), 0.0, tl.float32)
    square_error = tl.full((ROWS, COLS), 0.0, tl.float32)
    counted = count.to(tl.int64)
    for tile in range(first + 1, tl.minimum(first + tiles_per_part, tiles)):
        offsets, exists, count = _reduced_tile(tile, block, rows, c, s, CHANNELS_LAST, ROWS, COLS)
        values = tl.load(x + offsets, exists, 0.0).to(tl.float32)
        deviation = tl.where(exists, values - shift, 0.0)
        total, total_error = _add(total, total_error, deviation)
        square, square_error = _add(square, square_error, deviation * deviation)
        counted += count
    n = counted.to(tl.float64)
    sum_1 = _lanes(total, total_error, CHANNELS_LAST)
    sum_2 = _lanes(square, square_error, CHANNELS_LAST)
    offset = sum_1 / n
    m2 = sum_2 - sum_1 * offset
    m2 = tl.where(m2 < 0, 0.0, m2)  # and NaN stays
    out = parts + part.to(tl.int64) * (2 * c + 1)
    if block == 0:
        tl.store(out, n)
    if CHANNELS_LAST:
        channel = block * COLS + tl.arange(0, COLS)
        mean = tl.reshape(shift, (COLS,)).to(tl.float64) + offset
        tl.store(out + 1 + channel, mean, channel < c)
        tl.store(out + 1 + c + channel, m2, channel < c)
    else:
        tl.store(out + 1 + block, shift.to(tl.float64) + offset)
        tl.store(out + 1 + c + block, m2)


@triton.jit
def merge(parts, number, c, packed, BLOCK: tl.constexpr):
    """Write the moments of the union of so many batches, given one after the other.

    Chan, Golub and LeVeque (1979), equation 2.1, in the order of the batches.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < c
    count = tl.load(parts)
    mean = tl.load(parts + 1 + channel, exists, 0.0)
    m2 = tl.load(parts + 1 + c + channel, exists, 0.0)
    other = parts
    for _ in range(1, number):
        other += 2 * c + 1
        n = tl.load(other)
        mean_n = tl.load(other + 1 + channel, exists, 0.0)
        m2_n = tl.load(other + 1 + c + channel, exists, 0.0)
        both = count + n
        share = n / tl.where(both > 1, both, 1.0)
        delta = mean_n - mean
        m2 += m2_n + delta * delta * count * share
        moved = tl.where(n == 0, mean, mean + delta * share)
        mean = tl.where(count == 0, mean_n, moved)
        count = both
    if tl.program_id(0) == 0:
        tl.store(packed, count)
    tl.store(packed + 1 + channel, mean, exists)
    tl.store(packed + 1 + c + channel, m2, exists)


@triton.jit
def statistics(packed, c, result, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """Write what normalizes, 2c + 1 values, given moments: count, means, 1/√(M2/count + eps)."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < c
    count = tl.load(packed)
    m2 = tl.load(packed + 1 + c + channel, exists, 0.0)
    variance = m2 / tl.where(count > 1, count, 1.0)
    if tl.program_id(0) == 0:
        tl.store(result, count)
    tl.store(result + 1 + channel, tl.load(packed + 1 + channel, exists, 0.0), exists)
    tl.store(result + 1 + c + channel, 1.0 / tl.sqrt(variance + tl.full((), EPS, tl.float64)), exists)


@triton.jit
def update_running(
    packed, c, running_mean, running_var, tracked,
    MOMENTUM: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move running statistics towards moments; one program, as all need the number tracked."""
    count = tl.load(packed)
    seen = count > 0
    number = tl.load(tracked) + seen.to(tl.int64)
    tl.store(tracked, number)
    share = tl.full((), MOMENTUM, tl.float64)  # an argument would be rounded to float32
    if AVERAGE:
        share = 1.0 / tl.maximum(number, 1).to(tl.float64)
    for start in range(0, c, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        exists = channel < c
        mean = tl.load(packed + 1 + channel, exists, 0.0)
        m2 = tl.load(packed + 1 + c + channel, exists, 0.0)
        variance = m2 / tl.where(count > 2, count - 1, 1.0)
        old_mean = tl.load(running_mean + channel, exists, 0.0).to(tl.float64)
        old_var = tl.load(running_var + channel, exists, 0.0).to(tl.float64)
        new_mean = tl.where(seen, old_mean * (1 - share) + mean * share, old_mean)
        new_var = tl.where(seen, old_var * (1 - share) + variance * share, old_var)
        tl.store(running_mean + channel, new_mean.to(running_mean.dtype.element_ty), exists)
        tl.store(running_var + channel, new_var.to(running_var.dtype.element_ty), exists)


@triton.jit
def _coefficients(norm, weight, bias, channel, c, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """Return mean, invstd and weight in float64, and head, scale, offset in float32.

    y = (x − head)·scale + offset; head is what float32 can hold of the mean.
    """
    exists = channel < c
    mean = tl.load(norm + 1 + channel, exists, 0.0)
    invstd = tl.load(norm + 1 + c + channel, exists, 0.0)
    factor = invstd
    if WEIGHT:
        factor = invstd * tl.load(weight + channel, exists, 0.0).to(tl.float64)
    head = mean.to(tl.float32)
    rest = mean - head.to(tl.float64)
    offset = -rest * factor
    if BIAS:
        offset += tl.load(bias + channel, exists, 0.0).to(tl.float64)
    return rest, invstd, factor, head, factor.to(tl.float32), offset.to(tl.float32)


@triton.jit
def _elementwise_tile(
    rows, c, s, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return the offsets of this program's tile, which values exist, and their channels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    if CHANNELS_LAST:
        width = c
        channel = col
    else:
        width = s
        channel = (row % c).to(tl.int32)
    offsets = row[:, None] * width + col[None, :]
    exists = (row < rows)[:, None] & (col < width)[None, :]
    return offsets, exists, channel


@triton.jit
def normalize(
    x, residual, norm, weight, bias, y, rows, c, s,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write y = (x − mean)·invstd·weight + bias + residual, or max(y, 0)."""
    offsets, exists, channel = _elementwise_tile(rows, c, s, CHANNELS_LAST, ROWS, COLS)
    _, _, _, head, scale, offset = _coefficients(norm, weight, bias, channel, c, WEIGHT, BIAS)
    values = tl.load(x + offsets, exists, 0.0).to(tl.float32)
    result = tl.fma(
        values - _along_channels(head, CHANNELS_LAST),
        tl.broadcast_to(_along_channels(scale, CHANNELS_LAST), (ROWS, COLS)),
        tl.broadcast_to(_along_channels(offset, CHANNELS_LAST), (ROWS, COLS)),
    )
    if RESIDUAL:
        result += tl.load(residual + offsets, exists, 0.0).to(tl.float32)
    if RELU:
        result = tl.where(result <= 0, 0.0, result)  # so that NaN passes
    tl.store(y + offsets, result.to(y.dtype.element_ty), exists)


@triton.jit
def backward_reduce(
    dy, x, norm, weight, bias, parts, rows, c, s, tiles, tiles_per_part,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write Σdy and Σdy·(x − head) of each part, 2c values."""
    block, part = tl.program_id(0), tl.program_id(1)
    if CHANNELS_LAST:
        channel = block * COLS + tl.arange(0, COLS)
    else:
        channel = block + tl.full((1,), 0, tl.int32)
    _, _, _, head, scale, offset = _coefficients(norm, weight, bias, channel, c, WEIGHT, BIAS)
    head, scale, offset = head[None, :], scale[None, :], offset[None, :]
    total = tl.full((ROWS, COLS), 0.0, tl.float32)
    total_error = tl.full((ROWS, COLS), 0.0, tl.float32)
    product = tl.full((ROWS, COLS), 0.0, tl.float32)
    product_error = tl.full((ROWS, COLS), 0.0, tl.float32)
    first = part * tiles_per_part
    for tile in range(first, tl.minimum(first + tiles_per_part, tiles)):
        offsets, exists, _ = _reduced_tile(tile, block, rows, c, s, CHANNELS_LAST, ROWS, COLS)
        gradient = tl.load(dy + offsets, exists, 0.0).to(tl.float32)
        deviation = tl.load(x + offsets, exists, 0.0).to(tl.float32) - head
        if RELU:
            y = tl.fma(
                deviation,
                tl.broadcast_to(scale, (ROWS, COLS)),
                tl.broadcast_to(offset, (ROWS, COLS)),
            )
            gradient = tl.where(y <= 0, 0.0, gradient)
        # Where nothing exists, the deviation is −head, and may be infinite.
        times = tl.where(exists, gradient * deviation, 0.0)
        total, total_error = _add(total, total_error, gradient)
        product, product_error = _add(product, product_error, times)
    sum_1 = _lanes(total, total_error, CHANNELS_LAST)
    sum_2 = _lanes(product, product_error, CHANNELS_LAST)
    out = parts + part.to(tl.int64) * (2 * c)
    if CHANNELS_LAST:
        tl.store(out + channel, sum_1, channel < c)
        tl.store(out + c + channel, sum_2, channel < c)
    else:
        tl.store(out + block, sum_1)
        tl.store(out + c + block, sum_2)


@triton.jit
def backward_sums(
    parts, number, norm, c, sums, dweight, dbias,
    DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write Σdy and Σdy·x̂ of all parts, 2c values, and the same, rounded, for the parameters."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < c
    total = tl.full((BLOCK,), 0.0, tl.float64)
    product = tl.full((BLOCK,), 0.0, tl.float64)
    for _ in range(number):
        total += tl.load(parts + channel, exists, 0.0)
        product += tl.load(parts + c + channel, exists, 0.0)
        parts += 2 * c
    rest, invstd, _, _, _, _ = _coefficients(norm, norm, norm, channel, c, False, False)
    product = (product - rest * total) * invstd
    tl.store(sums + channel, total, exists)
    tl.store(sums + c + channel, product, exists)
    if DWEIGHT:
        tl.store(dweight + channel, product.to(dweight.dtype.element_ty), exists)
    if DBIAS:
        tl.store(dbias + channel, total.to(dbias.dtype.element_ty), exists)


@triton.jit
def backward_input(
    dy, x, norm, weight, bias, sums, dx, rows, c, s,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write dx = weight·invstd·(dy − Σdy/count − x̂·Σdy·x̂/count), a count of 0 being 1."""
    offsets, exists, channel = _elementwise_tile(rows, c, s, CHANNELS_LAST, ROWS, COLS)
    rest, invstd, factor, head, scale, offset = _coefficients(
        norm, weight, bias, channel, c, WEIGHT, BIAS
    )
    count = tl.load(norm)
    count = tl.where(count > 1, count, 1.0)
    mean_dy = tl.load(sums + channel, channel < c, 0.0) / count
    slope = invstd * tl.load(sums + c + channel, channel < c, 0.0) / count
    by_x = _along_channels((-factor * slope).to(tl.float32), CHANNELS_LAST)
    constant = _along_channels((factor * (rest * slope - mean_dy)).to(tl.float32), CHANNELS_LAST)
    by_dy = tl.broadcast_to(_along_channels(scale, CHANNELS_LAST), (ROWS, COLS))
    gradient = tl.load(dy + offsets, exists, 0.0).to(tl.float32)
    deviation = tl.load(x + offsets, exists, 0.0).to(tl.float32) - _along_channels(
        head, CHANNELS_LAST
    )
    if RELU:
        y = tl.fma(
            deviation,
            by_dy,
            tl.broadcast_to(_along_channels(offset, CHANNELS_LAST), (ROWS, COLS)),
        )
        gradient = tl.where(y <= 0, 0.0, gradient)
    result = gradient * by_dy + (deviation * by_x + constant)
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), exists)

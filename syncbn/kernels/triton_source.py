"""The kernels in Triton: what runs on a GPU, or interpreted on the CPU.

A tile is ROWS by COLS values of a tensor of n·c·s values. If the tensor is channels last, rows are
positions and columns are channels. If it is contiguous, columns are positions and rows are the
samples of one channel in the reductions; in the elementwise kernels a tile is ROWS·COLS neighbors,
`rows` is the number of all values, and COLS how many a thread loads at once.

Triton loads several values at once if it knows that they start at a multiple of their size. Of an
integer argument it learns only whether 16 divides it; hence ALIGN, a power of two that divides the
length of what lies together, c or s.

Only vectors of one value per channel are float64. Sums over a batch are made in float32, in as many
lanes as a tile has values: a lane adds up GROUP values, and then these sums, each with the rounding
error of the last addition (Kahan); the lanes are added up in float64. A reduction is split into
parts, which another kernel adds up, always in the same order: results are the same from run to run.
"""

import triton
import triton.language as tl

# ruff: noqa: N803, ANN001, ANN201, ANN202, SIM102, SIM108 -- arguments have no Python types; constants of
# the compilation are written in capitals, as in Triton's own kernels, and ask by an if of their own
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false


# What Triton itself has decorated, such as tl.sum, is interpreted only if all of Triton is.
@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _maximum(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _add(total, error, value):
    """Return a sum plus a value, and the error of that, given the error of the sum."""
    corrected = value - error
    new = total + corrected
    return new, (new - total) - corrected


@triton.jit
def _reduced_tile(
    tile, block, rows, c, s,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Return the offsets of a tile's values, which of them exist, and how many of a channel."""
    if CHANNELS_LAST:
        c = c // ALIGN * ALIGN
        top = tile * tl.full((), ROWS, tl.int64)
        row = top + tl.arange(0, ROWS)
        col = block * COLS + tl.arange(0, COLS)
        offsets = row[:, None] * c + col[None, :]
        exists = (row < rows)[:, None] & (col < c)[None, :]
        count = tl.minimum(rows - top, ROWS)
    else:
        s = s // ALIGN * ALIGN
        across = (s - 1) // COLS + 1  # s + COLS may be beyond 2^31
        top = (tile // across) * tl.full((), ROWS, tl.int64)
        left = (tile % across) * COLS
        row = top + tl.arange(0, ROWS)
        col = left + tl.arange(0, COLS)
        offsets = (row[:, None] * c + block) * s + col[None, :]
        exists = (row < rows)[:, None] & (col < s)[None, :]
        count = tl.minimum(rows - top, ROWS) * tl.minimum(s - left, COLS)
    return offsets, exists, count


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


@triton.jit(do_not_specialize=["tiles", "tiles_per_part"])
def local_moments(
    x, parts, rows, c, s, tiles, tiles_per_part,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the moments of each part of x, 2c + 1 values: count, means, M2.

    Sums about the mean of the part's first tile, which is near enough to the mean of the part.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tiles)
    offsets, exists, count = _reduced_tile(
        first, block, rows, c, s, CHANNELS_LAST, ROWS, COLS, ALIGN
    )
    values = tl.load(x + offsets, exists, 0.0).to(tl.float32)
    shift = _mean(values, count, CHANNELS_LAST)
    total = tl.where(exists, values - shift, 0.0)
    square = total * total
    total_error = tl.full((ROWS, COLS), 0.0, tl.float32)
    square_error = tl.full((ROWS, COLS), 0.0, tl.float32)
    counted = count.to(tl.int64)
    for group in range(first + 1, last, GROUP):
        group_total = tl.full((ROWS, COLS), 0.0, tl.float32)
        group_square = tl.full((ROWS, COLS), 0.0, tl.float32)
        for number in tl.static_range(GROUP):  # pyright: ignore[reportGeneralTypeIssues] -- a loop of Triton's
            tile = group + number
            offsets, exists, count = _reduced_tile(
                tile, block, rows, c, s, CHANNELS_LAST, ROWS, COLS, ALIGN
            )
            exists = exists & (tile < last)
            values = tl.load(x + offsets, exists, 0.0).to(tl.float32)
            deviation = tl.where(exists, values - shift, 0.0)
            group_total += deviation
            group_square += deviation * deviation
            counted += tl.where(tile < last, count, 0)
        total, total_error = _add(total, total_error, group_total)
        square, square_error = _add(square, square_error, group_square)
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
def _stamp(shift, c, STAMPED: tl.constexpr):
    """Return a hash of the leading means of the latest batch; see `syncbn.moments.stamp_of`."""
    channel = tl.arange(0, STAMPED)
    words = tl.load(shift + channel, channel < c, 0.0).to(tl.int64, bitcast=True)
    mixed = (words ^ (words >> 32)) * (2 * channel + 1).to(tl.int64)
    mixed = tl.reduce(mixed, 0, _plus) * tl.full((), -7046029254386353131, tl.int64)
    return ((mixed >> 12) & tl.full((), 2**52 - 1, tl.int64)).to(tl.float64)


@triton.jit(do_not_specialize=["number", "mark"])
def merge(
    batches, number, stride, c, shift, packed, slot, mark,
    STAMP: tl.constexpr, MARK: tl.constexpr, CHECK: tl.constexpr, MOVE: tl.constexpr,
    STAMPED: tl.constexpr, BATCHES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the moments of the union of so many batches, 2c + 1 values: count, means, M2.

    With n and m the batches' counts and means, mean = Σn·m/Σn and M2 = ΣM2 + Σn·(m − mean)².

    With STAMP, the moments are followed by a stamp, made of the shift's STAMPED leading values.
    With CHECK, the batches have a stamp each: count and means are NaN unless all that are not 0 are
    equal. With MOVE, the shift is set to the mean. With MARK, `mark` is written to the slot, for
    the host to see how far the device is.
    """
    row = tl.arange(0, BATCHES)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < c
    near = tl.load(batches + 1 + channel, exists, 0.0)
    count = tl.full((BATCHES,), 0.0, tl.float64)
    total = tl.full((BATCHES, CHANNELS), 0.0, tl.float64)
    for start in range(0, number, BATCHES):
        batch = batches + (start + row).to(tl.int64) * stride
        there = start + row < number
        n = tl.load(batch, there, 0.0)
        at = there[:, None] & exists[None, :]
        mean = tl.load(batch[:, None] + 1 + channel[None, :], at, 0.0)
        # An empty batch must not drag the mean towards its placeholder 0.
        total += tl.where((n == 0)[:, None], 0.0, n[:, None] * (mean - near[None, :]))
        count += n
    n_all = tl.reduce(count, 0, _plus)
    merged = near + tl.reduce(total, 0, _plus) / tl.where(n_all > 1, n_all, 1.0)
    square = tl.full((BATCHES, CHANNELS), 0.0, tl.float64)
    for start in range(0, number, BATCHES):
        batch = batches + (start + row).to(tl.int64) * stride
        there = start + row < number
        n = tl.load(batch, there, 0.0)
        at = there[:, None] & exists[None, :]
        mean = tl.load(batch[:, None] + 1 + channel[None, :], at, 0.0)
        m2 = tl.load(batch[:, None] + 1 + c + channel[None, :], at, 0.0)
        delta = mean - merged[None, :]
        square += tl.where((n == 0)[:, None], 0.0, m2 + n[:, None] * delta * delta)
    if CHECK:
        largest = tl.full((BATCHES,), 0.0, tl.float64)
        for start in range(0, number, BATCHES):
            there = start + row < number
            stamp = tl.load(batches + (start + row).to(tl.int64) * stride + 2 * c + 1, there, 0.0)
            largest = tl.where(stamp > largest, stamp, largest)
        expected = tl.reduce(largest, 0, _maximum)
        others = tl.full((BATCHES,), 0, tl.int32)
        for start in range(0, number, BATCHES):
            there = start + row < number
            stamp = tl.load(batches + (start + row).to(tl.int64) * stride + 2 * c + 1, there, 0.0)
            others += tl.where((stamp == 0) | (stamp == expected), 0, 1)
        n_all = tl.where(tl.reduce(others, 0, _plus) == 0, n_all, float("nan"))
        merged = tl.where(n_all == n_all, merged, float("nan"))
    if MOVE:
        nothing = tl.where(n_all > 0, 0.0, 1.0)
        moved = exists & (merged - merged == nothing)  # i.e. finite, and there are samples
        tl.store(shift + channel, merged, moved)
    if tl.program_id(0) == 0:
        tl.store(packed, n_all)
        if STAMP:
            stamp = tl.full((), 0.0, tl.float64)
            if STAMPED > 0:
                stamp = _stamp(shift, c, STAMPED)
            tl.store(packed + 2 * c + 1, stamp)
        if MARK:
            tl.store(slot, mark)
    tl.store(packed + 1 + channel, merged, exists)
    tl.store(packed + 1 + c + channel, tl.reduce(square, 0, _plus), exists)


@triton.jit
def _double(first, second, third):
    """Return the float64 that is (first + second)·third², given float32."""
    zero = tl.full((), 0.0, tl.float64)
    return ((zero + first) + (zero + second)) * (zero + third) * (zero + third)


@triton.jit
def _affine(mean, invstd, weight, bias, channel, exists, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """Return rest and factor in float64, and head, scale, offset in float32.

    y = (x − head)·scale + offset; head is what float32 can hold of the mean, rest what is left.
    """
    factor = invstd
    if WEIGHT:
        factor = invstd * tl.load(weight + channel, exists, 0.0).to(tl.float64)
    head = mean.to(tl.float32)
    rest = mean - head.to(tl.float64)
    offset = -rest * factor
    if BIAS:
        offset += tl.load(bias + channel, exists, 0.0).to(tl.float64)
    return rest, factor, head, factor.to(tl.float32), offset.to(tl.float32)


@triton.jit
def statistics(
    packed, weight, bias, c, result, vectors, eps, eps_rest, eps_scale,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what normalizes, given moments, and what `normalize` needs of each channel.

    The former is 2c + 1 values: count, means, 1/√(M2/count + eps); for the latter, see
    `coefficients`. eps is given as three float32, because arguments have no more: see `_double`.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < c
    count = tl.load(packed)
    mean = tl.load(packed + 1 + channel, exists, 0.0)
    m2 = tl.load(packed + 1 + c + channel, exists, 0.0)
    variance = m2 / tl.where(count > 1, count, 1.0)
    invstd = 1.0 / tl.sqrt(variance + _double(eps, eps_rest, eps_scale))
    if tl.program_id(0) == 0:
        tl.store(result, count)
    tl.store(result + 1 + channel, mean, exists)
    tl.store(result + 1 + c + channel, invstd, exists)
    _, _, head, scale, offset = _affine(mean, invstd, weight, bias, channel, exists, WEIGHT, BIAS)
    tl.store(vectors + channel, head, exists)
    tl.store(vectors + c + channel, scale, exists)
    tl.store(vectors + 2 * c + channel, offset, exists)


@triton.jit
def update_running(
    packed, c, running_mean, running_var, tracked, momentum, momentum_rest, momentum_scale,
    AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move running statistics towards moments; one program, as all need the number tracked.

    The momentum is given as two float32, as eps is.
    """
    count = tl.load(packed)
    seen = count > 0
    number = tl.load(tracked) + seen.to(tl.int64)
    tl.debug_barrier()  # one thread stores what all of them load
    tl.store(tracked, number)
    share = _double(momentum, momentum_rest, momentum_scale)
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
    """Return rest, invstd and factor in float64, and head, scale, offset in float32.

    The mean is head + rest, and the factor invstd·weight; see `_affine`.
    """
    exists = channel < c
    mean = tl.load(norm + 1 + channel, exists, 0.0)
    invstd = tl.load(norm + 1 + c + channel, exists, 0.0)
    rest, factor, head, scale, offset = _affine(
        mean, invstd, weight, bias, channel, exists, WEIGHT, BIAS
    )
    return rest, invstd, factor, head, scale, offset


@triton.jit
def coefficients(
    norm, weight, bias, sums, c, result,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what the elementwise kernels need of each channel, in float32.

    head, scale, offset; and for the gradient, head, scale, offset, by_x, constant, such that
    dx = dy·scale + (x − head)·by_x + constant. To compute this in float64 for each value would take
    longer than to read the value.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < c
    rest, invstd, factor, head, scale, offset = _coefficients(
        norm, weight, bias, channel, c, WEIGHT, BIAS
    )
    tl.store(result + channel, head, exists)
    tl.store(result + c + channel, scale, exists)
    tl.store(result + 2 * c + channel, offset, exists)
    if BACKWARD:
        count = tl.load(norm)
        count = tl.where(count > 1, count, 1.0)
        mean_dy = tl.load(sums + channel, exists, 0.0) / count
        slope = invstd * tl.load(sums + c + channel, exists, 0.0) / count
        by_x = -factor * slope
        constant = factor * (rest * slope - mean_dy)
        tl.store(result + 3 * c + channel, by_x.to(tl.float32), exists)
        tl.store(result + 4 * c + channel, constant.to(tl.float32), exists)


@triton.jit
def _elementwise_tile(
    rows, c, s,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Return the offsets of this program's tile, which values exist, and for `_of_values` the rest.

    That is the channels of the columns if channels last; else those of the rows' first values,
    those of the images after them, and which values are not yet of these.
    """
    if CHANNELS_LAST:
        row = tl.program_id(0) * tl.full((), ROWS, tl.int64) + tl.arange(0, ROWS)
        channel = tl.program_id(1) * COLS + tl.arange(0, COLS)
        offsets = row[:, None] * c + channel[None, :]
        exists = (row < rows)[:, None] & (channel < c)[None, :]
        return offsets, exists, channel, channel, exists
    else:
        first = tl.program_id(0).to(rows.dtype) * (ROWS * COLS)  # a short division if they are few
        row = tl.arange(0, ROWS) * COLS
        col = tl.arange(0, COLS)
        offsets = first.to(tl.int64) + row[:, None] + col[None, :]
        exists = offsets < rows // COLS * COLS
        image = first // s
        # Unsigned, because a tile may end beyond 2^31 in an image.
        if s.dtype == tl.int64:
            size = s.to(tl.uint64)
        else:
            size = s.to(tl.uint32)
        position = (first - image * s).to(size.dtype) + row.to(size.dtype)
        images = (image % c).to(tl.int32) + (position // size).to(tl.int32)
        before = tl.minimum(size - position % size, COLS).to(tl.int32)
        inside = col[None, :] < before[:, None]
        return offsets, exists, images % c, (images + 1) % c, inside


@triton.jit
def _of_values(
    vector, c, channel, following, inside,
    CHANNELS_LAST: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Return a vector with one value per channel for the values of a tile."""
    if CHANNELS_LAST:
        return tl.load(vector + channel, channel < c, 0.0)[None, :]
    elif ALIGN >= COLS:
        return tl.load(vector + channel)[:, None]  # each row is of one image
    else:
        here, after = tl.load(vector + channel), tl.load(vector + following)
        return tl.where(inside, here[:, None], after[:, None])


@triton.jit
def normalize(
    x, residual, vectors, y, rows, c, s,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Write y = (x − head)·scale + offset + residual, or max(y, 0); see `coefficients`."""
    if CHANNELS_LAST:
        c = c // ALIGN * ALIGN
    offsets, exists, channel, following, inside = _elementwise_tile(
        rows, c, s, CHANNELS_LAST, ROWS, COLS, ALIGN
    )
    head = _of_values(vectors, c, channel, following, inside, CHANNELS_LAST, COLS, ALIGN)
    scale = _of_values(vectors + c, c, channel, following, inside, CHANNELS_LAST, COLS, ALIGN)
    offset = _of_values(vectors + 2 * c, c, channel, following, inside, CHANNELS_LAST, COLS, ALIGN)
    result = tl.fma(
        tl.load(x + offsets, exists, 0.0).to(tl.float32) - head,
        tl.broadcast_to(scale, (ROWS, COLS)),
        tl.broadcast_to(offset, (ROWS, COLS)),
    )
    if RESIDUAL:
        result += tl.load(residual + offsets, exists, 0.0).to(tl.float32)
    if RELU:
        result = tl.where(result <= 0, 0.0, result)  # so that NaN passes
    tl.store(y + offsets, result.to(y.dtype.element_ty), exists)


@triton.jit(do_not_specialize=["tiles", "tiles_per_part"])
def backward_reduce(
    dy, x, output, masked, norm, weight, bias, parts, rows, c, s, tiles, tiles_per_part,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, MASK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write Σdy and Σdy·(x − head) of each part, 2c values.

    With MASK, dy counts as 0 if the output is not more than 0, and is written so too.
    """
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
    last = tl.minimum(first + tiles_per_part, tiles)
    for group in range(first, last, GROUP):
        group_total = tl.full((ROWS, COLS), 0.0, tl.float32)
        group_product = tl.full((ROWS, COLS), 0.0, tl.float32)
        for number in tl.static_range(GROUP):  # pyright: ignore[reportGeneralTypeIssues] -- a loop of Triton's
            tile = group + number
            offsets, exists, _count = _reduced_tile(
                tile, block, rows, c, s, CHANNELS_LAST, ROWS, COLS, ALIGN
            )
            exists = exists & (tile < last)
            gradient = tl.load(dy + offsets, exists, 0.0).to(tl.float32)
            if MASK:
                kept = tl.load(output + offsets, exists, 0.0)
                gradient = tl.where(kept <= 0, 0.0, gradient)
                tl.store(masked + offsets, gradient.to(masked.dtype.element_ty), exists)
            deviation = tl.load(x + offsets, exists, 0.0).to(tl.float32) - head
            if RELU:
                y = tl.fma(
                    deviation,
                    tl.broadcast_to(scale, (ROWS, COLS)),
                    tl.broadcast_to(offset, (ROWS, COLS)),
                )
                gradient = tl.where(y <= 0, 0.0, gradient)
            group_total += gradient
            # Where nothing exists, the deviation is −head, and may be infinite.
            group_product += tl.where(exists, gradient * deviation, 0.0)
        total, total_error = _add(total, total_error, group_total)
        product, product_error = _add(product, product_error, group_product)
    sum_1 = _lanes(total, total_error, CHANNELS_LAST)
    sum_2 = _lanes(product, product_error, CHANNELS_LAST)
    out = parts + part.to(tl.int64) * (2 * c)
    if CHANNELS_LAST:
        tl.store(out + channel, sum_1, channel < c)
        tl.store(out + c + channel, sum_2, channel < c)
    else:
        tl.store(out + block, sum_1)
        tl.store(out + c + block, sum_2)


@triton.jit(do_not_specialize=["number", "mark"])
def backward_sums(
    parts, number, norm, c, sums, dweight, dbias, slot, mark,
    DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, MARK: tl.constexpr,
    BATCHES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write Σdy and Σdy·x̂ of all parts, 2c values, and the same, rounded, for the parameters.

    With MARK, `mark` is written to the slot, for the host to see how far the device is.
    """
    row = tl.arange(0, BATCHES)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < c
    totals = tl.full((BATCHES, CHANNELS), 0.0, tl.float64)
    products = tl.full((BATCHES, CHANNELS), 0.0, tl.float64)
    for start in range(0, number, BATCHES):
        part = parts + (start + row).to(tl.int64) * (2 * c)
        at = (start + row < number)[:, None] & exists[None, :]
        totals += tl.load(part[:, None] + channel[None, :], at, 0.0)
        products += tl.load(part[:, None] + c + channel[None, :], at, 0.0)
    total, product = tl.reduce(totals, 0, _plus), tl.reduce(products, 0, _plus)
    rest, invstd, _, _, _, _ = _coefficients(norm, norm, norm, channel, c, False, False)
    product = (product - rest * total) * invstd
    tl.store(sums + channel, total, exists)
    tl.store(sums + c + channel, product, exists)
    if DWEIGHT:
        tl.store(dweight + channel, product.to(dweight.dtype.element_ty), exists)
    if DBIAS:
        tl.store(dbias + channel, total.to(dbias.dtype.element_ty), exists)
    if MARK:  # decided while compiling, and hence by itself
        if tl.program_id(0) == 0:
            tl.store(slot, mark)


@triton.jit(do_not_specialize=["mark"])
def backward_input(
    dy, x, vectors, dx, rows, c, s, slot, mark, RELU: tl.constexpr, MARK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Write dx = dy·scale + (x − head)·by_x + constant, dy being 0 where the ReLU's output is.

    With MARK, `mark` is written to the slot, for the host to see how far the device is.
    """
    if MARK:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(slot, mark)
    if CHANNELS_LAST:
        c = c // ALIGN * ALIGN
    offsets, exists, channel, following, inside = _elementwise_tile(
        rows, c, s, CHANNELS_LAST, ROWS, COLS, ALIGN
    )
    head = _of_values(vectors, c, channel, following, inside, CHANNELS_LAST, COLS, ALIGN)
    scale = _of_values(vectors + c, c, channel, following, inside, CHANNELS_LAST, COLS, ALIGN)
    by_x = _of_values(vectors + 3 * c, c, channel, following, inside, CHANNELS_LAST, COLS, ALIGN)
    constant = _of_values(
        vectors + 4 * c, c, channel, following, inside, CHANNELS_LAST, COLS, ALIGN
    )
    scale = tl.broadcast_to(scale, (ROWS, COLS))
    gradient = tl.load(dy + offsets, exists, 0.0).to(tl.float32)
    deviation = tl.load(x + offsets, exists, 0.0).to(tl.float32) - head
    if RELU:
        offset = _of_values(
            vectors + 2 * c, c, channel, following, inside, CHANNELS_LAST, COLS, ALIGN
        )
        y = tl.fma(deviation, scale, tl.broadcast_to(offset, (ROWS, COLS)))
        gradient = tl.where(y <= 0, 0.0, gradient)
    result = gradient * scale + (deviation * by_x + constant)
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), exists)

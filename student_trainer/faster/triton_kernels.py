"""A Triton kernel that turns the output layer's products into the gradient of `kl` or `ce`, in place, one program per row.

It computes what `kd.student_trainer.losses.row_kernels` computes with torch, and reads and writes each product as often as that
needs: once for the sums, once more for the gradient, which is written over it. Products stay in the type in which the matrix
product made them; arithmetic is in float32 (float64 for float64). Bias, scale and soft cap of the model are applied on the way.
Traffic, and what Liger's kernel for cross-entropy has: `benchmarks/traffic.py`.

Outcomes are the kept ids and everything else as one. The sum over everything else must not be a difference of sums, which would
lose all digits where the student is sure. So the products of the kept ids are read first and replaced by -inf, and are given
their gradients at the end. A product that is -inf has no probability.

Only CUDA runs this, or Triton's interpreter (TRITON_INTERPRET=1, before the first import of triton).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logit(product, bias, columns, inside, SCALE: tl.constexpr, CAP: tl.constexpr):
    """The model's logit of a product; -inf stays -inf. `inside` is the mask of `columns`, or None."""
    value = product
    if bias is not None:
        value += tl.load(bias + columns, mask=inside).to(product.dtype)
    if SCALE != 1.0:
        value = value * SCALE
    if CAP is not None:
        shrunk = tl.exp(-2.0 * tl.abs(value) / CAP)
        bent = CAP * (1.0 - shrunk) / (1.0 + shrunk)
        value = tl.where(value < 0.0, -bent, bent)
    return tl.where(product == float("-inf"), product, value)


@triton.jit
def _logits(
    products,
    column_stride,
    bias,
    columns,
    columns_in_all,
    WIDE: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The logits of some columns of a row; -inf beyond the last column."""
    pointers = products + columns.to(tl.int64) * column_stride
    if MASKED:
        inside = columns < columns_in_all
        product = tl.load(pointers, mask=inside, other=float("-inf")).to(WIDE)
        return _logit(product, bias, columns, inside, SCALE, CAP)
    else:
        return _logit(tl.load(pointers).to(WIDE), bias, columns, None, SCALE, CAP)


@triton.jit
def _of_product(gradient, logit, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Gradient of a logit -> gradient of its product."""
    if CAP is not None:
        bent = logit / CAP
        gradient = tl.where(logit == float("-inf"), 0.0, gradient * (1.0 - bent * bent))
    if SCALE != 1.0:
        gradient = gradient * SCALE
    return gradient


@triton.jit
def _add_exponentials(top, total, values):
    """A running sum Σ exp(value - top) and its top, with more values; values of -inf add nothing."""
    higher = tl.maximum(top, tl.max(values, axis=0))
    return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(values - higher), axis=0)


@triton.jit
def _joined(top, total, other_top, other_total):
    """Log of two such sums together."""
    higher = tl.maximum(top, other_top)
    return higher + tl.log(total * tl.exp(top - higher) + other_total * tl.exp(other_top - higher))


@triton.jit
def gradient_rows(
    products,  # [n, V], becomes the gradient
    row_stride,
    column_stride,
    bias,  # [V], or None
    gold_ids,  # [n]
    ids,  # [E]; None for cross-entropy alone, and so are the next four
    probabilities,  # [E]
    rest_probabilities,  # [n]
    starts,  # [n + 1]
    logits_of_ids,  # [E], to write in
    divergences,  # [n], to write in
    cross_entropies,  # [n], to write in
    columns_in_all,  # V
    WIDE: tl.constexpr,
    KD_WEIGHT: tl.constexpr,
    CE_WEIGHT: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows times columns may be more than 2^31
    products += row * row_stride
    lowest = tl.full([], -3.4e38, WIDE)  # below every logit, and no difference from it is NaN
    nothing = tl.full([], 0.0, WIDE)
    kd_weight, ce_weight = tl.full([], KD_WEIGHT, WIDE), tl.full([], CE_WEIGHT, WIDE)
    temperature = tl.full([], TEMPERATURE, WIDE)
    TEMPERED: tl.constexpr = TEMPERATURE != 1.0

    gold = tl.load(gold_ids + row)
    there = (gold >= 0) & (gold < columns_in_all)
    chosen = tl.load(products + gold * column_stride, mask=there, other=float("nan")).to(WIDE)
    chosen = _logit(chosen, bias, gold, there, SCALE, CAP)
    gold = tl.where(there, gold, -1).to(tl.int32)
    tl.debug_barrier()  # every thread has read `chosen` before anything is written

    # the kept ids' logits are put aside, and their products become -inf
    head_top, head_total, plain_top, plain_total = lowest, nothing, lowest, nothing
    if ids is not None:
        first = tl.load(starts + row)
        count = tl.load(starts + row + 1) - first
        ids += first
        probabilities += first
        logits_of_ids += first
        for start in range(0, count, ENTRIES):
            entries = start + tl.arange(0, ENTRIES)
            inside = entries < count
            column = tl.load(ids + entries, mask=inside, other=0).to(tl.int64)
            valid = inside & (column >= 0) & (column < columns_in_all)
            pointers = products + column * column_stride
            product = tl.load(pointers, mask=valid, other=float("nan")).to(WIDE)  # an id outside V makes the loss NaN
            logit = _logit(product, bias, column, valid, SCALE, CAP)
            tl.store(logits_of_ids + entries, logit, mask=inside)
            tl.store(pointers, float("-inf"), mask=valid)
            logit = tl.where(inside, logit, float("-inf"))
            head_top, head_total = _add_exponentials(head_top, head_total, logit / temperature)
            if TEMPERED:
                plain_top, plain_total = _add_exponentials(plain_top, plain_total, logit)
        tl.debug_barrier()  # they are -inf for every thread

    # first pass: the sums over everything else. Only the last block has a mask: the others are read 16 bytes at a time
    rest_top, rest_total = lowest, nothing
    whole = columns_in_all // BLOCK * BLOCK
    for MASKED in tl.static_range(2):
        for start in range(whole if MASKED else 0, columns_in_all if MASKED else whole, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = _logits(products, column_stride, bias, columns, columns_in_all, WIDE, SCALE, CAP, MASKED)
            rest_top, rest_total = _add_exponentials(rest_top, rest_total, logits / temperature)
            if TEMPERED:
                plain_top, plain_total = _add_exponentials(plain_top, plain_total, logits)
    log_z = _joined(head_top, head_total, rest_top, rest_total)
    plain_log_z = plain_top + tl.log(plain_total) if TEMPERED else log_z
    tl.store(cross_entropies + row, plain_log_z - chosen)

    # the divergence: its value, and g = d value / d log q summed over all outcomes
    divergence, sum_of_g, g_of_rest = nothing, nothing, nothing
    log_q_of_rest = rest_top + tl.log(rest_total) - log_z
    if ids is not None:
        for start in range(0, count, ENTRIES):
            entries = start + tl.arange(0, ENTRIES)
            inside = entries < count
            p = tl.load(probabilities + entries, mask=inside, other=0.0).to(WIDE)
            logit = tl.load(logits_of_ids + entries, mask=inside, other=0.0)
            part = tl.where(p == 0.0, 0.0, p * (tl.log(p) - (logit / temperature - log_z)))
            divergence += tl.sum(part, axis=0)
            sum_of_g -= tl.sum(p, axis=0)
        p_rest = tl.load(rest_probabilities + row).to(WIDE)
        present = (rest_total != 0.0) & (p_rest != 0.0)  # where all ids are kept there is nothing else
        divergence += tl.where(present, p_rest * (tl.log(p_rest) - log_q_of_rest), 0.0)
        g_of_rest = tl.where(rest_total != 0.0, -p_rest, 0.0)
        sum_of_g += g_of_rest
        tl.store(divergences + row, divergence)

    # second pass: the gradient of everything else, and of the gold id if it is there
    weight = kd_weight / temperature
    slope = -weight * sum_of_g if TEMPERED else ce_weight - weight * sum_of_g
    of_rest = weight * g_of_rest + tl.exp(log_q_of_rest) * slope
    factor = tl.where(rest_total == 0.0, 0.0, of_rest / rest_total)
    WITH_PLAIN: tl.constexpr = TEMPERED and CE_WEIGHT != 0.0
    for MASKED in tl.static_range(2):
        for start in range(whole if MASKED else 0, columns_in_all if MASKED else whole, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = _logits(products, column_stride, bias, columns, columns_in_all, WIDE, SCALE, CAP, MASKED)
            gradient = factor * tl.exp(logits / temperature - rest_top)
            if WITH_PLAIN:
                gradient += ce_weight * tl.exp(logits - plain_log_z)
            gradient = tl.where(columns == gold, gradient - ce_weight, gradient)
            gradient = _of_product(gradient, logits, SCALE, CAP).to(products.dtype.element_ty)
            pointers = products + columns.to(tl.int64) * column_stride
            if MASKED:
                tl.store(pointers, gradient, mask=columns < columns_in_all)
            else:
                tl.store(pointers, gradient)

    if ids is not None:
        tl.debug_barrier()  # nothing is written over the kept ids any more
        for start in range(0, count, ENTRIES):
            entries = start + tl.arange(0, ENTRIES)
            inside = entries < count
            column = tl.load(ids + entries, mask=inside, other=-1).to(tl.int64)
            valid = (column >= 0) & (column < columns_in_all)
            p = tl.load(probabilities + entries, mask=inside, other=0.0).to(WIDE)
            logit = tl.load(logits_of_ids + entries, mask=inside, other=0.0)
            gradient = tl.exp(logit / temperature - log_z) * slope - weight * p
            if WITH_PLAIN:
                gradient += ce_weight * tl.exp(logit - plain_log_z)
            gradient = tl.where(column == gold, gradient - ce_weight, gradient)
            gradient = _of_product(gradient, logit, SCALE, CAP)
            tl.store(products + column * column_stride, gradient.to(products.dtype.element_ty), mask=valid)

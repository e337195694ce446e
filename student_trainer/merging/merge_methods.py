"""Ways to merge models of one architecture, as pure functions of one tensor's values in every model.

Shapes: M models, `values [M, ...]`, `base [...]`, result `[...]`; float64 in and out, rounded once when it is stored. No
function knows which tensor it is given: what concerns whole models (the thresholds and the majority of Ties, the norms of Fisher)
is measured before (`merge_statistics`) and handed in. Where the reference's implementation (FusionBench, GPT-2) differs from a
paper, the function says so. `method_registry.MERGE_METHODS` lists the methods by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from kd.common.extras import needed


def average(values: Tensor) -> Tensor:
    """The mean. Equal models merge to themselves, exactly: a sum of M equal float32 numbers is exact in float64.

    Wortsman et al. 2022, Model soups, arXiv:2203.05482.
    """
    return values.mean(dim=0)


def task_arithmetic(values: Tensor, base: Tensor, *, scaling: float) -> Tensor:
    """base + scaling * sum of task vectors (values - base). 0 is the base; 1/M is `average`.

    Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089.
    """
    return base + scaling * (values - base).sum(dim=0)


def trimmed(values: Tensor, base: Tensor, thresholds: Tensor) -> Tensor:
    """Task vectors `[M, ...]`, 0 where their size in float32 is below the model's threshold `[M]`."""
    vectors = values - base
    return vectors.where(vectors.float().abs() >= thresholds.view(-1, *[1] * base.dim()), 0.0)


def ties(
    values: Tensor, base: Tensor, *, thresholds: Tensor, majority: float, elect: str = "sum", scaling: float
) -> Tensor:
    """Trim task vectors, elect a sign for each entry, merge what agrees with it; base + scaling * merged.

    thresholds  [M]: smallest |entry| that is kept, over a model's whole task vector (`kth_magnitude`)
    majority    sign of the sum of the signs of all entries; an entry whose sum is 0 takes it
    elect       sum (the reference), mean (the paper) or max of the entries that agree

    One model that keeps everything is task arithmetic. Yadav et al. 2023, TIES-Merging, arXiv:2306.01708.
    """
    vectors = trimmed(values, base, thresholds)
    signs = vectors.sum(dim=0).sign()
    signs = signs.where(signs != 0, majority)
    agreeing = vectors.where(torch.where(signs > 0, vectors > 0, vectors < 0), 0.0)
    merged = ELECTIONS[elect](agreeing)
    return base + scaling * merged


def _mean_of_kept(agreeing: Tensor) -> Tensor:
    return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)


def _largest(agreeing: Tensor) -> Tensor:
    """Entries that agree have one sign or are 0: the sum has the sign, the largest of them the size."""
    return agreeing.abs().amax(dim=0) * agreeing.sum(dim=0).sign()


ELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda agreeing: agreeing.sum(dim=0),
    "mean": _mean_of_kept,
    "max": _largest,
}


def fisher_average(values: Tensor, information: Tensor, *, weights: Tensor, minimal: float = 1e-6) -> Tensor:
    """Mean weighted entry by entry by each model's Fisher information: sum w F v / sum w F, F = information + minimal.

    information  [M, ...] diagonal Fisher information, at least 0
    weights      [M] of the models (`fisher_weights`)

    Equal information and weights give `average`. Matena and Raffel 2022, arXiv:2111.09832.
    """
    weighted = weights.view(-1, *[1] * (values.dim() - 1)) * (information + minimal)
    return (weighted * values).sum(dim=0) / weighted.sum(dim=0)


def fisher_weights(norms: Sequence[float], *, normalize: bool = True, minimal: float = 1e-6) -> Tensor:
    """`[M]` weights of the models: equal, or in inverse proportion to the L2 norms of their Fisher information."""
    if not normalize:
        return torch.full((len(norms),), 1.0 / len(norms), dtype=torch.float64)
    inverse = 1.0 / (torch.tensor(norms, dtype=torch.float64) + minimal)
    return inverse / inverse.sum() / len(norms)


def regmean(values: Tensor, grams: Iterable[Tensor], *, off_diagonal: float = 0.6) -> Tensor:
    """The linear map that comes nearest to the map of every model on the inputs of that model.

    values        [M, in, out] weights
    grams         M matrices [in, in], X^T X of the layer's inputs; read one at a time
    off_diagonal  factor of their off-diagonal entries: 1 = the least-squares solution, 0 = a mean weighted by row

        argmin_W sum_m |X_m W - X_m W_m|^2  =  (sum G_m)^-1 sum G_m W_m

    Solved for W minus the mean of W_m: inputs that no model ever saw leave the mean as it is, and equal models merge to
    themselves exactly. Jin et al. 2023, Dataless knowledge fusion, arXiv:2212.09849.
    """
    mean = values.mean(dim=0)
    total = torch.zeros((mean.shape[0],) * 2, dtype=values.dtype)
    pull = torch.zeros_like(mean)
    for gram, value in zip(grams, values, strict=True):
        shrunk = gram * off_diagonal
        shrunk.diagonal().copy_(gram.diagonal())
        total += shrunk
        pull += shrunk @ (value - mean)
    factor, failed = torch.linalg.cholesky_ex(total)
    if int(failed):  # an input that was always 0, or fewer tokens than inputs at off_diagonal = 1
        inverse: Tensor = torch.linalg.pinv(total, hermitian=True)
        return mean + inverse @ pull
    return mean + torch.cholesky_solve(pull, factor)


def dare(values: Tensor, base: Tensor, *, density: float, scaling: float, seed: int) -> Tensor:
    """Task arithmetic on task vectors of which a share `density` of the entries is drawn, divided by it: the same on average.

    The drawing is peft's (`peft.utils.merge_utils.dare_linear`). Yu et al. 2024, arXiv:2311.03099.
    """
    with needed("peft", "dare"):
        from peft.utils.merge_utils import dare_linear
    vectors = list(values - base)
    if density >= 1:  # of which peft warns
        return base + scaling * torch.stack(vectors).sum(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn: Tensor = dare_linear(vectors, torch.ones(len(vectors), dtype=base.dtype), density)
    return base + scaling * drawn

"""Trainable scores for methods that learn a mask. The scores decide which weights are kept."""

from typing import Any

import torch
from torch import Tensor, nn

from robsparse.sparsity.masks import top_k_mask


class Scored(nn.Module):
    """A parametrisation of a weight with a trainable score for each entry of the weight."""

    score: nn.Parameter


class _StraightThroughTopK(torch.autograd.Function):
    """0/1 mask of the k largest |score|. The backward pass gives its gradient to |score|."""

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, k: int, pattern: str | None) -> Tensor:
        return top_k_mask(magnitude, k, pattern).to(magnitude.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def straight_through_mask(score: Tensor, k: int, pattern: str | None = None) -> Tensor:
    """Return the 0/1 mask of the k largest |score|. Its gradient goes to |score| unchanged.

    With an N:M pattern, these are selected among the N largest |score| of each group.

    Source: Ramanujan et al., CVPR 2020 (edge-popup); inspire-group/hydra, behaviour of its layers.
    """
    return _StraightThroughTopK.apply(score.abs(), k, pattern)


def scaled_scores(weight: Tensor) -> Tensor:
    """Return scores sqrt(6 / fan_in) * w / max|w|, which rank weights by magnitude.

    If all weights are 0, all scores are 0.

    Source: HYDRA (Sehwag et al., NeurIPS 2020), equation 3.
    """
    fan_in = weight[0].numel()
    weight = weight.detach()
    largest = weight.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)
    return (6 / fan_in) ** 0.5 * weight / largest

"""Square: a random search without gradients, with the settings of AutoAttack.

Source: Andriushchenko et al., ECCV 2020, through the package pyautoattack.
"""

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn


def random_search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    eps: float,
    queries: int,
    restarts: int,
    seed: int,
) -> Tensor:
    """Return adversarial images x_NCHW within eps. An image without any is unchanged."""
    cuda = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        search = SquareAttack(
            model,
            p_init=0.8,
            n_queries=queries,
            eps=eps,
            norm=norm,
            n_restarts=restarts,
            seed=seed,
            verbose=False,
            device=x.device,
            resc_schedule=False,
        )
        with torch.no_grad():
            return search.perturb(x, y)

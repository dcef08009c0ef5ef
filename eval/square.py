"""Square: a random search that uses only the outputs of the network.

Source: Andriushchenko et al., ECCV 2020, with the package pyautoattack and AutoAttack's settings.
"""

from pydantic import PositiveInt
from torch import Tensor, nn

from robsparse.evaluation.attacks import AttackContext, Outcome
from robsparse.evaluation.random_search import random_search
from robsparse.evaluation.tally import AttackProgress, Tally, in_batches
from robsparse.schema import AttackParams

LABEL = "Square"


class Params(AttackParams):
    """Budget of the search.

    queries: forward passes for each image and restart.
    restarts: number of searches for each image.
    """

    queries: PositiveInt = 5000
    restarts: PositiveInt = 1


def passes(params: Params) -> tuple[int, int]:
    """Return forward-and-backward passes and forward-only passes for an image that stays robust."""
    return 0, params.queries * params.restarts


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> Outcome:
    """Return which images are robust against the search."""
    tally = Tally(x_NCHW, y_N, context)
    progress = AttackProgress("Square", len(y_N), context.report)

    def work(where: slice) -> None:
        x, y = x_NCHW[where].to(context.device), y_N[where].to(context.device)
        found = random_search(
            model,
            x,
            y,
            norm=context.norm,
            eps=context.eps,
            queries=params.queries,
            restarts=params.restarts,
            seed=context.seed,
        )
        tally.record(model, where, found)
        progress.update(where.stop, int(tally.robust.sum()))

    in_batches(len(y_N), context.batch_size, work, context.report)
    progress.close(int(tally.robust.sum()), len(y_N))
    return tally.outcome({"steps": params.queries, "restarts": params.restarts})

"""The latency of a network: the time of one image, on the device of the evaluation."""

import statistics
import timeit

import torch
from torch import Tensor, nn
from torch.utils import benchmark

from robsparse.fast import folding

WARM_UP, REPEATS = 10, 101


def latency_ms(network: nn.Module, images_NCHW: Tensor, *, folded: bool) -> float:
    """Return the median time in milliseconds of the logits of a single image.

    It is measured on the folded view if `folded`, with the threads of this process, and after some
    passes that do not count. Other work of the machine makes it longer.

    Args:
        network: a network in eval mode.
        images_NCHW: images on the device of the network. The first one is timed.
        folded: use the folded view, as the attacks do.
    """
    run = folding.folded_view(network, images_NCHW) if folded else network
    image = images_NCHW[:1].contiguous()
    with torch.no_grad():
        # The timer waits for the device.
        timer = timeit.Timer(lambda: run(image), timer=benchmark.timer)
        seconds = timer.repeat(WARM_UP + REPEATS, number=1)
    return 1000 * statistics.median(seconds[WARM_UP:])

"""The optimiser of the training loop."""

import inspect

import torch


class SGD(torch.optim.SGD):
    """`torch.optim.SGD` with the same numbers, which does not load the compiler of torch.

    The methods of torch's optimisers are wrapped, so that `torch.compile` leaves them out. The
    wrappers import the compiler when they are first called, which takes a second in every training
    job. Here the methods are used without them, so this optimiser must not be compiled.
    """

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))

"""Adam that does not import PyTorch's compiler.

The methods of PyTorch's optimizers are decorated so that ``torch.compile`` leaves them alone, and the decorators import ``torch._dynamo``
when they are first called: 2.6 seconds of a process that compiles nothing. ``train.compile`` compiles the loss, and no optimizer.
"""

from __future__ import annotations

from inspect import unwrap

import torch
from torch.optim import Adam


class PlainAdam(Adam):
    """``torch.optim.Adam`` with its methods undecorated: the same steps, bit for bit. Gradients of a step itself cannot be had."""

    add_param_group = unwrap(Adam.add_param_group)
    load_state_dict = unwrap(Adam.load_state_dict)
    state_dict = unwrap(Adam.state_dict)
    zero_grad = unwrap(Adam.zero_grad)
    step = torch.no_grad()(unwrap(Adam.step))

"""Adam without PyTorch's compiler: the steps of Adam, and no import of the compiler by a training."""

from __future__ import annotations

import subprocess
import sys

import torch

from graphhash.nn.plain_adam import PlainAdam

TRAINING = """
import sys
import torch
from graphhash.nn.row_adam import RowAdam

layer = torch.nn.Linear(3, 2)
optimizer = RowAdam(layer.parameters(), [], lr=0.1, weight_decay=0.01)
for _ in range(2):
    optimizer.zero_grad(set_to_none=True)
    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""


def test_a_training_does_not_import_the_compiler():
    subprocess.run([sys.executable, "-c", TRAINING], check=True)


def test_steps_are_those_of_adam_bit_for_bit():
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2)]
    ours = PlainAdam([weights[0]], lr=0.1, weight_decay=0.01, fused=True)
    theirs = torch.optim.Adam([weights[1]], lr=0.1, weight_decay=0.01, fused=True)
    for number in range(5):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            optimizer.zero_grad(set_to_none=True)
            (weight - 0.3 * number).pow(4).sum().backward()
            optimizer.step()
    assert torch.equal(*weights)
    theirs.load_state_dict(ours.state_dict())
    assert str(theirs.state_dict()) == str(ours.state_dict())

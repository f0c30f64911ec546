"""Networks as a user writes them, and modules of them to import by name."""

from __future__ import annotations

from pathlib import Path

# A network without buffers, so that its parameters are all of its state.
SMALL = '''
"""A user's networks."""
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, image_size, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.drop = nn.Dropout(0.5)
        self.time = nn.Linear(1, width)
        self.head = nn.Linear(width * image_size**2, num_classes)

    def forward(self, x, t):
        h = self.norm(self.conv(x))
        h = h + self.time(t[:, None].to(x.dtype) / 1000)[:, :, None, None]
        return self.head(self.drop(h.relu()).view(len(x), -1))


def build(num_classes, image_size, width=8):
    return Net(num_classes, image_size, width)
'''


def write_module(folder: Path, name: str, text: str = SMALL) -> str:
    """Write a module into a folder, and return the --classifier of its function `build`."""
    (folder / f"{name}.py").write_text(text)
    return f"{name}:build"

"""The diphone classifier while it trains: classes share the weights of their two phonemes.

The weights of class (previous p, current c) are residual[p, c] + previous[p] + current[c]. With the
residual at zero, the distribution of the current phoneme alone is that of a phoneme classifier, so
frequent and rare classes learn from each other from the first step. Where a model leaves the run,
the three are added up to the `out.weight` and `out.bias` of a plain classifier.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..labels.diphones import N_DIPHONES
from ..labels.phonemes import N_PHONEMES

LANES = 8  # half-precision products on GPUs want a multiple of it; 1681 is none
PREFIX = "out."  # of the classifier's names in a model's state dict
PLAIN_NAMES = (f"{PREFIX}weight", f"{PREFIX}bias")


class FactoredClassifier(nn.Module):
    """Logits [..., 1681] of hidden states [..., n_inputs].

    The rows of `current` start Xavier-uniform, all else at zero: a phoneme classifier to which
    every previous phoneme is as likely as the others.
    """

    def __init__(self, n_inputs: int) -> None:
        super().__init__()
        self.residual = nn.Linear(n_inputs, N_DIPHONES)
        self.previous = nn.Linear(n_inputs, N_PHONEMES)
        self.current = nn.Linear(n_inputs, N_PHONEMES)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.current.weight)

    @property
    def weight(self) -> torch.Tensor:
        """[1681, n_inputs] weights of the plain classifier that computes the same."""
        return _fold(self.residual.weight, self.previous.weight, self.current.weight)

    @property
    def bias(self) -> torch.Tensor:
        """[1681] biases of the plain classifier that computes the same."""
        return _fold(self.residual.bias, self.previous.bias, self.current.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight, self.bias)


def _fold(residual: torch.Tensor, previous: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    by_pair = residual.unflatten(0, (N_PHONEMES, N_PHONEMES))
    return (by_pair + previous.unsqueeze(1) + current).flatten(0, 1)


def frame_logits(classifier: nn.Linear | FactoredClassifier, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [N, >= C] of hidden states [N, n_inputs].

    On a GPU there are columns beyond the classes, up to a multiple of 8, whose probability is 0.
    """
    weight, bias = classifier.weight, classifier.bias
    beyond = -len(bias) % LANES if hidden.is_cuda else 0
    if beyond:
        weight = F.pad(weight, (0, 0, 0, beyond))
        bias = F.pad(bias, (0, beyond), value=-torch.inf)
    return F.linear(hidden, weight, bias)


def folded(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model by the public baseline's names, its classifier a plain one."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    classifier = model.out
    if isinstance(classifier, FactoredClassifier):
        weights = {name: v for name, v in weights.items() if not name.startswith(PREFIX)}
        with torch.no_grad():
            weights |= zip(PLAIN_NAMES, (classifier.weight, classifier.bias), strict=True)
    return weights


def unfolded(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a model with a plain diphone classifier, for one whose classifier is factored.

    All of it becomes residual: the folded classifier is the given one, to the bit.
    """
    given = dict(weights)
    for plain in PLAIN_NAMES:
        name, residual = plain.removeprefix(PREFIX), given.pop(plain)
        shared = residual.new_zeros(N_PHONEMES, *residual.shape[1:])
        given |= {
            f"{PREFIX}residual.{name}": residual,
            f"{PREFIX}previous.{name}": shared,
            f"{PREFIX}current.{name}": shared.clone(),
        }
    return given

"""Multinomial logistic regression by L-BFGS, on the device of its features, a block of rows at a time.

M   training features       Q   features to classify       D   their width       C   number of classes
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

#: The largest entry of the mean loss's gradient at which a fit ends. At scikit-learn's default, 1e-4, a weak penalty is
#: told apart from none by up to half a point.
TOLERANCE = 3e-6
MAX_ITERATIONS = 1000
#: Steps that L-BFGS remembers, as scipy does.
HISTORY = 10


class LogisticRegression:
    """Linear scores of classes, `s(x) = W z + b`, with z the features at mean 0 and variance 1 in training.

    W and b minimise `sum_i -log softmax(s(x_i))_{y_i} + |W|^2 / (2 strength)`, as scikit-learn's `LogisticRegression`
    with `C=strength` does behind a `StandardScaler`. `fit` starts where the last one ended: a path from a strong
    penalty to a weak one costs little more than its last fit. Only (block, C) scores are formed.

    Args:
        features: (M, D), of any floating-point type; scaled in float32.
        labels: (M,) class indices below `num_classes`, on the same device.
        num_classes: C.
        block: rows at a time.

    Attributes:
        weight, bias: W, (C, D), and b, (C,); 0 before the first fit.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, *, block: int = 16_384) -> None:
        features = features.float()
        self.mean = features.mean(0)
        deviation = features.std(0, correction=0)
        self.deviation = torch.where(deviation > 0, deviation, 1)
        self._features, self._labels, self._block = self._scaled(features), labels, block
        self.weight = features.new_zeros(num_classes, features.shape[1])
        self.bias = features.new_zeros(num_classes)

    def fit(self, strength: float) -> "LogisticRegression":
        """Move W and b to the minimum at a penalty of this inverse strength; returns itself."""
        parameters = [self.weight.requires_grad_(), self.bias.requires_grad_()]
        solver = torch.optim.LBFGS(
            parameters, max_iter=MAX_ITERATIONS, tolerance_grad=TOLERANCE, history_size=HISTORY,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            solver.zero_grad()
            return self._mean_loss(strength)

        solver.step(loss)
        self.weight, self.bias = (parameter.detach() for parameter in parameters)
        return self

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """(Q,) the class with the largest score of each of (Q, D) features."""
        rows = features.float().split(self._block)
        return torch.cat([torch.addmm(self.bias, self._scaled(part), self.weight.T).argmax(1) for part in rows])

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of (Q, D) features whose class, of (Q,), is predicted."""
        return (self.predict(features) == labels).double().mean().item()

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation

    def _mean_loss(self, strength: float) -> Tensor:
        """The objective over M, whose gradient is left in the parameters."""
        total = self.weight.square().sum() / (2 * strength * len(self._labels))
        total.backward()
        for x, y in zip(self._features.split(self._block), self._labels.split(self._block), strict=True):
            loss = cross_entropy(torch.addmm(self.bias, x, self.weight.T), y, reduction="sum") / len(self._labels)
            loss.backward()
            total = total.detach() + loss.detach()
        return total.detach()

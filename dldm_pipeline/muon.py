"""Muon in float32: the optimizer of both training scripts, for the weights of convolutions and linear layers.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the step is scaled as in Liu et al.,
"Muon is Scalable for LLM Training", 2025.
`torch.optim.Muon` takes matrices only and works in bfloat16, which most processors emulate slowly.
"""

from collections.abc import Iterable

import torch

STEPS = 3  # Muon's five take longer, to lift small singular values further


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix (rows, columns) whose singular values are about 1, by Newton-Schulz iteration.

    Every iterate is a polynomial of the first one's Gram matrix times that first one, so only Gram matrices are multiplied:
    two fifths of the work where a matrix is nine times as long as high, as those of 3x3 convolutions are.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    gram, product = x @ x.T, None
    for step in range(STEPS):
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        product = factor if product is None else factor @ product
        if step < STEPS - 1:
            gram = factor @ gram @ factor
    x = product @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised, weight by weight; a convolution counts as the matrix (out, in * kernel).

    Args:
        params: weights with two or more dimensions.
        lr: of the size that AdamW would take.
        momentum: of the gradient, Nesterov's form.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float = 2e-3, momentum: float = 0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]).flatten(1))
                # 0.2 is the usual root mean square of an AdamW step, so learning rates mean the same.
                scale = 0.2 * max(update.shape) ** 0.5
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def make_optimizers(model: torch.nn.Module, lr: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the weights of convolutions and linear layers with eight or more inputs and outputs, AdamW for the rest."""
    matrices, others = [], []
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                continue
            is_matrix = isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and name == "weight"
            (matrices if is_matrix and min(p.flatten(1).shape) >= 8 else others).append(p)
    return Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

"""The optimizer of the trainings: Muon for weights of convolutions and linear layers, AdamW for everything else.

`torch.optim.Muon` takes matrices only and works in bfloat16, which most processors emulate slowly.
"""

from collections.abc import Callable

import torch

STEPS = 3  # Muon's five lift small singular values further and take longer


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix (rows, columns) whose singular values are about 1, by Newton-Schulz iteration.

    Every iterate is a polynomial of the first one's Gram matrix times the first one, so only Gram matrices are multiplied.
    This takes two fifths of the work where a matrix is nine times as long as high, as those of 3x3 convolutions are.
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


class MuonAdamW(torch.optim.AdamW):
    """Muon for weights with eight or more inputs and outputs, AdamW without weight decay for all other parameters.

    Muon's step is the momentum (Nesterov's form), orthogonalised weight by weight; a convolution counts as the matrix
    (out, in * kernel). Its size is scaled to the usual root mean square of an AdamW step, so one learning rate serves both.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scale as in Liu et al., "Muon is
    Scalable for LLM Training", 2025.

    Args:
        model: its parameters with `requires_grad` are trained.
        lr: learning rate.
        momentum: of Muon.
    """

    def __init__(self, model: torch.nn.Module, lr: float, momentum: float = 0.9):
        matrices, others = [], []
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                is_matrix = isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and name == "weight"
                if p.requires_grad:
                    (matrices if is_matrix and min(p.flatten(1).shape) >= 8 else others).append(p)
        groups = [{"params": matrices, "momentum": momentum}, {"params": others, "momentum": None}]
        super().__init__(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["momentum"] is not None else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(
                        {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
                    )  # AdamW expects a step
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]).flatten(1))
                p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)
                p.grad = None  # AdamW passes over what has no gradient
        super().step(closure)

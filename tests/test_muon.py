from copy import deepcopy

import torch

from dldm_pipeline.muon import make_optimizers, orthogonalize


def test_singular_values_become_about_one():
    torch.manual_seed(0)
    for shape in ((16, 48), (48, 16), (32, 32)):
        matrix = torch.randn(shape) * torch.logspace(0, -2, shape[1])
        result = orthogonalize(matrix)
        assert result.shape == shape
        values = torch.linalg.svdvals(result)
        assert values.max() < 1.3 and values.median() > 0.6
        # The direction is kept: the inner product with the matrix is nearly its nuclear norm, the most it can be.
        assert (result * matrix).sum() > 0.6 * torch.linalg.svdvals(matrix).sum()


def test_every_parameter_has_one_optimizer_and_the_loss_falls():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.SiLU(),
        torch.nn.GroupNorm(4, 16), torch.nn.Conv2d(16, 1, 3, padding=1),
    )  # fmt: skip
    optimizers = make_optimizers(model, lr=5e-3)
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert any(p is model[2].weight for p in optimizers[0].param_groups[0]["params"])

    x = torch.randn(8, 1, 8, 8)
    target = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_state_is_saved_and_restored():
    torch.manual_seed(0)
    model, copy = (torch.nn.Linear(8, 8) for _ in range(2))
    copy.load_state_dict(model.state_dict())
    (muon, _), (other, _) = make_optimizers(model, 1e-2), make_optimizers(copy, 1e-2)
    for step in range(4):
        if step == 2:
            copy.load_state_dict(model.state_dict())
            other.load_state_dict(deepcopy(muon.state_dict()))
        for net, optimizer in ((model, muon), (copy, other)):
            if net is copy and step < 2:
                continue
            net(torch.ones(1, 8) * (step + 1)).square().sum().backward()
            optimizer.step()
            net.zero_grad()
    assert torch.equal(model.weight, copy.weight)

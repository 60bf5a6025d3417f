from copy import deepcopy

import torch

from dldm_pipeline.optimization import MuonAdamW, orthogonalize


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


def test_every_trained_parameter_is_in_one_group_and_the_loss_falls():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.SiLU(),
        torch.nn.GroupNorm(4, 16), torch.nn.Conv2d(16, 1, 3, padding=1),
    )  # fmt: skip
    model[4].requires_grad_(False)
    optimizer = MuonAdamW(model, lr=5e-3)
    matrices, others = (group["params"] for group in optimizer.param_groups)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, [*matrices, *others])) == sorted(map(id, trained))
    assert [p.shape for p in matrices] == [(16, 1, 3, 3), (16, 16, 3, 3)]  # the last one has a single output

    x = torch.randn(8, 1, 8, 8)
    target = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def step(model, optimizer, x):
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_adamw_steps_are_those_of_adamw():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)  # four outputs: too few for Muon
    reference = deepcopy(model)
    ours = MuonAdamW(model, 1e-2)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for x in torch.randn(3, 2, 8):
        step(model, ours, x)
        step(reference, theirs, x)
    assert torch.equal(model.weight, reference.weight)


def test_muons_step_follows_the_gradient_with_momentum_at_the_size_of_an_adamw_step():
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 32, bias=False)
    optimizer, before, gradient = MuonAdamW(model, 1e-2), model.weight.detach().clone(), torch.randn(32, 32)
    model.weight.grad = gradient.clone()
    optimizer.step()
    step = before - model.weight.detach()
    torch.testing.assert_close(step.square().mean().sqrt(), torch.tensor(0.2 * 1e-2), rtol=0.2, atol=0)
    torch.testing.assert_close(step / step.norm(), orthogonalize(gradient) / orthogonalize(gradient).norm())
    # The gradient of before still moves the weight.
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros(32, 32)
    optimizer.step()
    assert ((before - model.weight.detach()) * gradient).sum() > 0


def test_state_is_saved_and_restored():
    torch.manual_seed(0)
    model, copy = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    first, second = MuonAdamW(model, 1e-2), MuonAdamW(copy, 1e-2)
    for i in range(4):
        if i == 2:
            copy.load_state_dict(model.state_dict())
            second.load_state_dict(deepcopy(first.state_dict()))
        step(model, first, torch.ones(1, 8) * (i + 1))
        step(copy, second, torch.ones(1, 8) * (i + 1))
    assert torch.equal(model.weight, copy.weight) and torch.equal(model.bias, copy.bias)

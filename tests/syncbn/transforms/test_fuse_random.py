"""Random models, which compute the same when they are fused."""

import copy
import linecache
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.support.step import results_of_step

C = 3
# Each takes two tensors of one shape and gives a third, or changes what it is given.
_NEW = (
    *("{a} + {b}", "{b} + {a}", "torch.add({a}, {b})", "{a}.add({b})", "{a} - {b}"),
    *("torch.relu({a})", "functional.relu({a})", "{a}.relu()", "self.relu({a})", "{a} * 0.5"),
    *("self.bn0({a})", "self.bn1({a})", "self.bn2({a})", "self.shortcut({a})", "self.conv({a})"),
    *("self.child({a})", "{a}.view(-1).view({b}.shape)", "{a}.detach()", "{a}.transpose(0, 2)"),
    "{a} + self.bn1.running_mean.view(1, -1, 1)",
    "self.bn0.running_var.view(1, -1, 1).expand_as({a})",
    "{a}.transpose(0, 2).contiguous().transpose(0, 2)",
    "{a}[:, :1]",
    "{a} * self.scale",
    "torch.empty_like({a}).copy_({b})",
)
_CHANGES = (
    *("{a} += {b}", "{a}.add_({b})", "{a} *= 0.5", "{a}.relu_()", "torch.relu_({a})"),
    *("self.relu_({a})", "functional.relu({a}, inplace=True)", "{a}.copy_({b})"),
    *("torch.add({a}, 100, out={a})", "{a}.view(-1).add_(1)", "{a}.data.add_(1)"),
    *("{a}[:, :1].mul_(2)", "{a}[:, :1] = 1", "torch._foreach_add_([{a}], 1.0)", "{a}.zero_()"),
    *("self.scale.data.add_(1)", "self.bn0.running_mean.add_(1)", "{a}.unsqueeze_(0).squeeze_(0)"),
    "{a}.transpose_(0, 2)",
)
# What `fuse` looks for; anything may stand in between.
_PATTERNS = (
    ("{c} = self.bn{n}({a})", "{c} = {c} + {b}", "{c} = torch.relu({c})"),
    ("{c} = self.bn{n}({a})", "{c} = {b} + {c}", "{c} = self.relu({c})"),
    ("{c} = self.bn{n}({a})", "{c} += {b}", "{c} = self.relu_({c})"),
    ("{c} = self.bn{n}({a})", "{b} += {c}", "{c} = {b}.relu()"),
    ("{c} = self.bn{n}({a})", "{c} = {c}.relu_()"),
    ("{c} = self.shortcut({a})", "{c} = self.bn{n}({b}).add_({c})"),
)


def _line(choose: random.Random, names: list[str]) -> str:
    """Return a statement about two of the names, which may give a new one."""
    given = {"a": choose.choice(names), "b": choose.choice(names)}
    if choose.random() < 0.4:
        return choose.choice(_CHANGES).format(**given)
    line = choose.choice(_NEW).format(**given)
    name = choose.choice([*names, f"t{len(names)}"])
    if name not in names:
        names.append(name)
    return f"{name} = {line}"


def _source(choose: random.Random) -> str:
    names = ["x", "z"]
    lines = ["x = x * 1.0", "z = z * 2.0"]
    for _ in range(choose.randint(1, 3)):
        lines += [_line(choose, names) for _ in range(choose.randint(0, 2))]
        given = {"a": choose.choice(names), "b": choose.choice(names), "c": f"t{len(names)}"}
        for part in choose.choice(_PATTERNS):
            lines.append(part.format(n=choose.randrange(3), **given))
            if choose.random() < 0.15:
                lines.append(_line(choose, [*names]))
        names.append(given["c"])
    used = choose.sample(names, choose.randint(1, len(names)))
    lines.append("return " + " + ".join(f"{choose.randint(1, 9)} * {name}" for name in used))
    return "def forward(self, x, z):\n" + "".join(f"    {line}\n" for line in lines)


class _Child(nn.Module):
    """Calls a layer that its parent calls too."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x) + x)


class _Net(nn.Module):
    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.bn0, self.bn1, self.bn2 = (syncbn.SyncBatchNorm(C) for _ in range(3))
        self.conv = nn.Conv1d(C, C, 1)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv1d(C, C, 1), syncbn.SyncBatchNorm(C))
        self.child = _Child(self.bn1)
        self.scale = nn.Parameter(torch.ones(1))
        if choose.random() < 0.2:
            self.bn2 = self.bn0
        for parameter in self.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))


def _model(seed: int) -> tuple[nn.Module, str]:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    source, file = _source(choose), f"<random {seed}>"
    scope: dict[str, Any] = {"__name__": __name__, "torch": torch}
    scope["functional"] = nn.functional
    linecache.cache[file] = len(source), None, source.splitlines(True), file
    exec(compile(source, file, "exec"), scope)
    return type("Random", (_Net,), {"forward": scope["forward"]})(choose).double(), source


def compare(seed: int) -> str:
    """Compare a random model with what `fuse` makes of it; return what has been compared."""
    model, source = _model(seed)
    x, z = torch.randn(2, 4, C, 4, dtype=torch.float64)
    fusion = syncbn.fuse(model)
    for name in ("named_parameters", "named_buffers", "named_modules"):
        ours, theirs = getattr(fusion.model, name)(), getattr(model, name)()
        assert [each for each, _ in ours] == [each for each, _ in theirs]
    whole = copy.deepcopy(fusion.model)
    try:
        truth = results_of_step(model, x, z)
    except (RuntimeError, syncbn.errors.SyncBNError):
        return "refused"  # such as a change of what the backward pass needs
    for each in (fusion.model, whole):
        results = results_of_step(each, x, z)
        torch.testing.assert_close(
            results, truth, rtol=1e-9, atol=1e-9, msg=lambda m: f"{m}\n{source}"
        )
        assert results[0].stride() == truth[0].stride(), source
    return "kept" if type(fusion.model) is type(model) else "fused"


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_models_compute_the_same(first: int) -> None:
    compared = Counter(compare(seed) for seed in range(first, first + 100))
    assert compared["fused"] > 10
    assert compared["kept"] > 10

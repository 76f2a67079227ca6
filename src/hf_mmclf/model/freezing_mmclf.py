"""Where a backbone of which only the end trains is cut, and its two halves.

Pushed to the Hub as code, so it imports third-party packages only and stands alone.
"""

import copy
from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel


def through(backbone: nn.Module, boundary: str) -> Iterator[nn.Module]:
    """Yields what a backbone registers up to the end of the sub-module `boundary`.

    timm and transformers register in the order of execution, so this is what runs before the cut. A container of
    `boundary` comes too, since parameters of its own (position embeddings, say) are used before its children; so
    only look at each yielded module itself, not at its children.
    """
    modules = list(backbone.named_modules())
    last = max(i for i, (name, _) in enumerate(modules) if name == boundary or name.startswith(f"{boundary}."))
    yield from (module for _, module in modules[: last + 1])


def frozen_image_modules(backbone: nn.Module, unfrozen: int | None) -> list[nn.Module]:
    """The frozen modules when the last `unfrozen` stages (of timm's `feature_info`) train; `None`: all train."""
    if not unfrozen:
        return [] if unfrozen is None else list(backbone.modules())
    ends = [info["module"] for info in backbone.feature_info]
    if unfrozen >= len(ends):
        name = type(backbone).__name__
        raise ValueError(
            f"unfrozen_image_stages is {unfrozen}, but {name} has {len(ends)} stages with the stem; "
            f"give 0 to {len(ends) - 1}, or None to train all"
        )
    return list(through(backbone, ends[-unfrozen - 1]))


def pooling_modules(backbone: nn.Module) -> list[nn.Module]:
    """What of a timm backbone comes after the last feature map: its head's norm, say."""
    classifier = backbone.pretrained_cfg.get("classifier") or ()
    names = [classifier] if isinstance(classifier, str) else classifier
    found = [
        getattr(backbone, name, None) for name in (*(name.split(".")[0] for name in names), "fc_norm", "attn_pool")
    ]
    return [module for module in found if isinstance(module, nn.Module)]


def frozen_text_modules(backbone: PreTrainedModel, unfrozen: int | None) -> list[nn.Module]:
    """The frozen modules when the last `unfrozen` layers train; `None`: all train."""
    if not unfrozen:
        return [] if unfrozen is None else list(backbone.modules())
    count = backbone.config.num_hidden_layers
    kind = type(backbone).__name__
    lists = [name for name, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"{kind} has no list of {count} layers; give unfrozen_text_layers 0 or None")
    if unfrozen >= count:
        raise ValueError(
            f"unfrozen_text_layers is {unfrozen}, but {kind} has {count} layers; give 0 to {count - 1}, or None"
        )
    return list(through(backbone, f"{lists[0]}.{count - unfrozen - 1}"))


class Passed(nn.Module):
    """Stands where a half of a backbone has nothing to do: the first tensor of numbers comes out as it is."""

    def forward(self, *args, **kwargs):
        tensors = (value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        return next(value for value in tensors if value.is_floating_point())


def halves(backbone: nn.Module, frozen: Collection[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """
    A partly frozen backbone up to its cut, and from there on.

    Both have the modules and parameters of `backbone` itself, not copies; only the containers around the cut are made
    anew. Whether their chain is the whole can be known by trial alone: see [`cut_works`].
    """
    frozen = set(map(id, frozen))
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    first, second = dict(shared), dict(shared)
    for module in backbone.modules():
        inside = {id(part) in frozen for part in module.modules()}
        if len(inside) == 1:
            first[id(module)] = module if inside == {True} else Passed()
            second[id(module)] = Passed() if inside == {True} else module
    return copy.deepcopy(backbone, first), copy.deepcopy(backbone, second)


@torch.no_grad()
def cut(
    backbone: nn.Module,
    frozen: Collection[nn.Module],
    run: Callable[[nn.Module], torch.Tensor],
    resume: Callable[[nn.Module, torch.Tensor], torch.Tensor],
) -> tuple[nn.Module, nn.Module] | None:
    """
    The [`halves`] of a backbone, if one after the other they give what the whole gives; else, or if not a part but all
    or nothing of it is frozen, `None`.

    Args:
        backbone (`nn.Module`): Stays as it is.
        frozen (`Collection[nn.Module]`): The modules before the cut.
        run (`Callable`): The output of a backbone, and of a first half, for some input.
        resume (`Callable`): The output of a second half for what the first half has given.
    """
    if not 0 < len(frozen) < sum(1 for _ in backbone.modules()):
        return None
    memo: dict[int, object] = {}
    probe = copy.deepcopy(backbone, memo).eval()
    try:
        first, second = halves(probe, [memo[id(module)] for module in frozen])
        works = torch.allclose(resume(second, run(first)), run(probe), rtol=1e-3, atol=1e-4)
    except (StopIteration, RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        works = False  # a backbone that asks more of its parts than to pass on one tensor
    return halves(backbone, frozen) if works else None

import pytest
import timm
import torch
from torch.nn import functional as F

from hf_mmclf.model.backbones_mmclf import finer_stages, image_tokens, image_width

# of each: arguments, and the sub-modules whose outputs are the last maps of the finer resolutions
SMALL = {
    "densenet121": (
        dict(growth_rate=8, block_config=(1, 1, 1, 1)),
        ["features.norm0", "features.denseblock1", "features.denseblock2", "features.denseblock3"],
    ),
    "resnet18": (dict(layers=[1, 1, 1, 1], channels=[8, 8, 16, 16]), ["act1", "layer1", "layer2", "layer3"]),
    "convnext_atto": (dict(depths=[1, 1, 1, 1], dims=[8, 8, 16, 24]), ["stages.0", "stages.1", "stages.2"]),
    "swin_tiny_patch4_window7_224": (
        dict(img_size=64, depths=(1, 1, 1, 1), embed_dim=8, num_heads=(1, 1, 2, 2), window_size=2),
        ["layers.0", "layers.1", "layers.2"],
    ),
    "efficientnet_lite0": (dict(), ["blocks.0", "blocks.1", "blocks.2", "blocks.4"]),
    "vit_tiny_patch16_224": (dict(img_size=64, embed_dim=24, depth=2, num_heads=2), []),  # one resolution
}


@pytest.mark.parametrize("name", SMALL)
def test_stages_are_the_cells_with_what_finer_maps_have_there(name):
    args, modules = SMALL[name]
    backbone = timm.create_model(name, num_classes=0, **args).eval()
    caught = {}
    for module in modules:
        backbone.get_submodule(module).register_forward_hook(
            lambda _, inputs, output, module=module: caught.__setitem__(module, output)
        )
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        cells = image_tokens(backbone, pixels, "spatial")
        tokens = image_tokens(backbone, pixels, "stages")
        assert image_tokens(backbone, pixels, "pooled").shape == (2, 1, image_width(backbone, "pooled"))
    assert cells.shape == (2, *tokens.shape[1:2], image_width(backbone, "spatial"))
    assert tokens.shape[2] == image_width(backbone, "stages")
    torch.testing.assert_close(tokens[..., : cells.shape[2]], cells)
    side = int(cells.shape[1] ** 0.5)
    start = cells.shape[2]
    for module, width in zip(modules, finer_stages(backbone).values(), strict=True):
        finer = caught[module] if caught[module].shape[1] == width else caught[module].permute(0, 3, 1, 2)
        scale = finer.shape[2] // side
        assert scale > 1
        expected = F.avg_pool2d(finer, scale).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens[..., start : start + width], expected, atol=1e-5, rtol=1e-5)
        start += width
    assert start == tokens.shape[2]


def test_stages_of_a_backbone_that_ends_in_a_row_of_tokens():
    backbone = timm.create_model("levit_128s", num_classes=0).eval()
    with pytest.raises(
        ValueError, match="image_tokens is 'stages', but LevitDistilled ends in no feature map; give 'spatial'"
    ):
        image_tokens(backbone, torch.randn(1, 3, 224, 224), "stages")

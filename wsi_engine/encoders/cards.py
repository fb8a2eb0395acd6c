"""The table of encoders: every named encoder is a row of literals. Nothing here imports torch, timm or Numba.

Sources: the model pages on the hub named by ``source``, and the papers they cite; docs/encoders.md says
which details could not be checked there. A network is built from its row with fresh weights; weights are
loaded afterwards and must fit it name by name, so a wrong row fails and never gives wrong features quietly.
"""

from __future__ import annotations

from wsi_engine.encoders.base import EncoderCard

TEXTURE = "texture"
"""Name of the built-in encoder."""

HALF = (0.5, 0.5, 0.5)
H_OPTIMUS_MEAN = (0.707223, 0.578729, 0.703617)
H_OPTIMUS_STD = (0.211883, 0.230117, 0.177517)

IMAGENET_ENCODERS = (
    EncoderCard(
        name="resnet50",  # cut after layer3 and averaged, as CLAM does; any tile size
        builder="timm",
        architecture="resnet50.tv_in1k",
        options=(("features_only", True), ("out_indices", (3,))),
        input_px=0,
        interpolation="bilinear",
        pooling="mean",
        dim=1024,
        licence="BSD-3-Clause",
        source="timm/resnet50.tv_in1k",
    ),
    EncoderCard(
        name="vit_tiny_patch16_224",
        builder="timm",
        architecture="vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        input_px=224,
        mean=HALF,
        std=HALF,
        pooling="cls",
        dim=192,
        licence="Apache-2.0",
        source="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    ),
    EncoderCard(
        name="vit_small_patch16_224",
        builder="timm",
        architecture="vit_small_patch16_224.augreg_in21k_ft_in1k",
        input_px=224,
        mean=HALF,
        std=HALF,
        pooling="cls",
        dim=384,
        licence="Apache-2.0",
        source="timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
    ),
    EncoderCard(
        name="vit_base_patch16_224",
        builder="timm",
        architecture="vit_base_patch16_224.augreg2_in21k_ft_in1k",
        input_px=224,
        mean=HALF,
        std=HALF,
        pooling="cls",
        dim=768,
        licence="Apache-2.0",
        source="timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
    ),
    EncoderCard(
        name="vit_small_patch16_224.dino",
        builder="timm",
        architecture="vit_small_patch16_224.dino",
        input_px=224,
        pooling="cls",
        dim=384,
        licence="Apache-2.0",
        source="timm/vit_small_patch16_224.dino",
    ),
    EncoderCard(
        name="vit_base_patch16_224.dino",
        builder="timm",
        architecture="vit_base_patch16_224.dino",
        input_px=224,
        pooling="cls",
        dim=768,
        licence="Apache-2.0",
        source="timm/vit_base_patch16_224.dino",
    ),
)

PATHOLOGY_ENCODERS = (
    EncoderCard(
        name="uni",
        builder="timm",
        architecture="vit_large_patch16_224",
        options=(("init_values", 1e-5), ("dynamic_img_size", True)),
        input_px=224,
        interpolation="bilinear",
        mpp=0.5,
        pooling="cls",
        dim=1024,
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        source="MahmoodLab/UNI",
    ),
    EncoderCard(
        name="uni2-h",
        builder="timm",
        architecture="vit_giant_patch14_224",
        options=(
            ("img_size", 224),
            ("patch_size", 14),
            ("depth", 24),
            ("num_heads", 24),
            ("embed_dim", 1536),
            ("mlp_ratio", 5.33334),
            ("mlp_layer", "SwiGLUPacked"),
            ("act_layer", "silu"),
            ("reg_tokens", 8),
            ("no_embed_class", True),
            ("init_values", 1e-5),
            ("dynamic_img_size", True),
        ),
        input_px=224,
        interpolation="bilinear",
        mpp=0.5,
        pooling="cls",
        dim=1536,
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        source="MahmoodLab/UNI2-h",
    ),
    EncoderCard(
        name="virchow",
        builder="timm",
        architecture="vit_huge_patch14_224",
        options=(
            ("img_size", 224),
            ("mlp_ratio", 5.3375),
            ("mlp_layer", "SwiGLUPacked"),
            ("act_layer", "silu"),
            ("init_values", 1e-5),
            ("global_pool", ""),
            ("dynamic_img_size", True),
        ),
        input_px=224,
        mpp=0.5,
        pooling="cls+mean",
        dim=2560,
        licence="Apache-2.0",
        gated=True,
        source="paige-ai/Virchow",
    ),
    EncoderCard(
        name="virchow2",  # trained at several scales, 0.25 to 2 mpp
        builder="timm",
        architecture="vit_huge_patch14_224",
        options=(
            ("img_size", 224),
            ("mlp_ratio", 5.3375),
            ("mlp_layer", "SwiGLUPacked"),
            ("act_layer", "silu"),
            ("reg_tokens", 4),
            ("init_values", 1e-5),
            ("global_pool", ""),
            ("dynamic_img_size", True),
        ),
        input_px=224,
        pooling="cls+mean",
        dim=2560,
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        source="paige-ai/Virchow2",
    ),
    EncoderCard(
        name="prov-gigapath",
        builder="timm",
        architecture="vit_giant_patch14_dinov2",
        options=(
            ("img_size", 224),
            ("patch_size", 16),
            ("embed_dim", 1536),
            ("depth", 40),
            ("num_heads", 24),
            ("mlp_ratio", 5.33334),
            ("init_values", 1e-5),
        ),
        input_px=224,
        resize_px=256,
        mpp=0.5,
        pooling="cls",
        dim=1536,
        licence="Apache-2.0",
        gated=True,
        source="prov-gigapath/prov-gigapath",
    ),
    EncoderCard(
        name="h-optimus-0",
        builder="timm",
        architecture="vit_giant_patch14_reg4_dinov2",
        options=(("img_size", 224), ("init_values", 1e-5), ("global_pool", "token")),
        input_px=224,
        mean=H_OPTIMUS_MEAN,
        std=H_OPTIMUS_STD,
        mpp=0.5,
        pooling="cls",
        dim=1536,
        licence="Apache-2.0",
        gated=True,
        source="bioptimus/H-optimus-0",
    ),
    EncoderCard(
        name="h-optimus-1",
        builder="timm",
        architecture="vit_giant_patch14_reg4_dinov2",
        options=(("img_size", 224), ("init_values", 1e-5), ("global_pool", "token")),
        input_px=224,
        mean=H_OPTIMUS_MEAN,
        std=H_OPTIMUS_STD,
        mpp=0.5,
        pooling="cls",
        dim=1536,
        licence="non-commercial research",
        gated=True,
        source="bioptimus/H-optimus-1",
    ),
    EncoderCard(
        name="midnight",  # published for transformers; trained at several scales
        builder="timm",
        architecture="vit_giant_patch14_dinov2",
        options=(("img_size", 224), ("init_values", 1e-5)),
        input_px=224,
        interpolation="bilinear",
        mean=HALF,
        std=HALF,
        pooling="cls+mean",
        dim=3072,
        licence="MIT",
        source="kaiko-ai/midnight",
    ),
    EncoderCard(
        name="phikon-v2",  # published for transformers
        builder="timm",
        architecture="vit_large_patch16_224",
        options=(("init_values", 1e-5),),
        input_px=224,
        mpp=0.5,
        pooling="cls",
        dim=1024,
        licence="Owkin non-commercial",
        source="owkin/phikon-v2",
    ),
    EncoderCard(
        name="kaiko-vit-s16",  # this family was trained at several scales
        builder="timm",
        architecture="vit_small_patch16_224",
        options=(("dynamic_img_size", True),),
        input_px=224,
        interpolation="bilinear",
        mean=HALF,
        std=HALF,
        pooling="cls",
        dim=384,
        licence="Kaiko non-commercial",
        source="1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms",
    ),
    EncoderCard(
        name="kaiko-vit-s8",
        builder="timm",
        architecture="vit_small_patch8_224",
        options=(("dynamic_img_size", True),),
        input_px=224,
        interpolation="bilinear",
        mean=HALF,
        std=HALF,
        pooling="cls",
        dim=384,
        licence="Kaiko non-commercial",
        source="1aurent/vit_small_patch8_224.kaiko_ai_towards_large_pathology_fms",
    ),
    EncoderCard(
        name="kaiko-vit-b16",
        builder="timm",
        architecture="vit_base_patch16_224",
        options=(("dynamic_img_size", True),),
        input_px=224,
        interpolation="bilinear",
        mean=HALF,
        std=HALF,
        pooling="cls",
        dim=768,
        licence="Kaiko non-commercial",
        source="1aurent/vit_base_patch16_224.kaiko_ai_towards_large_pathology_fms",
    ),
    EncoderCard(
        name="kaiko-vit-b8",
        builder="timm",
        architecture="vit_base_patch8_224",
        options=(("dynamic_img_size", True),),
        input_px=224,
        interpolation="bilinear",
        mean=HALF,
        std=HALF,
        pooling="cls",
        dim=768,
        licence="Kaiko non-commercial",
        source="1aurent/vit_base_patch8_224.kaiko_ai_towards_large_pathology_fms",
    ),
    EncoderCard(
        name="kaiko-vit-l14",  # its positions are those of 518 px; timm resamples them for 224
        builder="timm",
        architecture="vit_large_patch14_reg4_dinov2",
        options=(("img_size", 518), ("dynamic_img_size", True)),
        input_px=224,
        interpolation="bilinear",
        mean=HALF,
        std=HALF,
        pooling="cls",
        dim=1024,
        licence="Kaiko non-commercial",
        source="1aurent/vit_large_patch14_reg4_224.kaiko_ai_towards_large_pathology_fms",
    ),
)

DEEP_ENCODERS = IMAGENET_ENCODERS + PATHOLOGY_ENCODERS


def list_encoders() -> tuple[EncoderCard, ...]:
    """Cards of all named encoders: the built-in one, then those trained on ImageNet, then on pathology."""
    from wsi_engine.encoders.texture import TEXTURE_CARD  # noqa: PLC0415  # its card lives beside it

    return (TEXTURE_CARD, *DEEP_ENCODERS)


def find_card(name: str) -> EncoderCard | None:
    """The card of a network of the table, or None."""
    return next((card for card in DEEP_ENCODERS if card.name == name), None)

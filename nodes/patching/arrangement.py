"""Which models can be sparse: where their self-attention is, and how it arranges a sequence."""

from __future__ import annotations

from dataclasses import dataclass

WAN, HUNYUAN = "comfy.ldm.wan.model", "comfy.ldm.hunyuan_video.model"
H3, COSMOS = "comfy.ldm.minimax.model", "comfy.ldm.cosmos.predict2"
LTX, LTXAV = "comfy.ldm.lightricks.model", "comfy.ldm.lightricks.av_model"
KANDINSKY, COGVIDEO = "comfy.ldm.kandinsky5.model", "comfy.ldm.cogvideo.model"
MOCHI = "comfy.ldm.genmo.joint_model.asymm_models_joint"
Identity = tuple[str, str]  # a class's module and name


@dataclass(frozen=True)
class Arrangement:
    """A class of models.

    layers: lists of blocks, and the module in a block that is its self-attention; "" is the block
    itself, where that makes no other attention call. after: conditionings of a model call whose
    tokens follow the video's. guides: one of whose tokens lie behind the video as frames of the
    latent. text_first: everything else stands in front. images: the same class makes single images
    too, for which nothing is gained.
    """

    layers: tuple[tuple[str, str], ...] = (("blocks", "self_attn"),)
    after: tuple[str, ...] = ()
    guides: str = ""
    text_first: bool = False
    images: bool = False


LTX_LIKE = Arrangement((("transformer_blocks", "attn1"),), guides="keyframe_idxs")
# Exact classes, by module and name: a subclass may arrange its tokens in another way, and older
# versions of ComfyUI have fewer of them. A model's `ref_conv` shows that a frame of
# reference tokens comes first.
ARRANGEMENTS: dict[Identity, Arrangement] = {
    # T2V, I2V, Fun, Phantom, 5B, A14B
    (WAN, "WanModel"): Arrangement(after=("context_latents",)),
    (WAN, "VaceWanModel"): Arrangement(),
    (WAN, "CameraWanModel"): Arrangement(),
    (WAN, "WanModel_S2V"): Arrangement(after=("reference_latent", "reference_motion")),
    (WAN, "HumoWanModel"): Arrangement(after=("reference_latent",)),
    # Its references are frames of the grid.
    (WAN, "SCAILWanModel"): Arrangement(after=("pose_latents",)),
    (WAN, "SCAIL2WanModel"): Arrangement(after=("pose_latents",)),
    ("comfy.ldm.wan.model_animate", "AnimateWanModel"): Arrangement(),
    ("comfy.ldm.wan.model_wandancer", "WanDancerModel"): Arrangement(),
    (HUNYUAN, "HunyuanVideo"): Arrangement(
        (("double_blocks", ""), ("single_blocks", "")), text_first=True
    ),
    # Text, keyframes, references and audio, then the video.
    (H3, "MiniMaxH3Model"): Arrangement((("blocks", "attn"),), text_first=True),
    (LTX, "LTXVModel"): LTX_LIKE,
    (LTXAV, "LTXAVModel"): LTX_LIKE,
    (KANDINSKY, "Kandinsky5"): Arrangement(
        (("visual_transformer_blocks", "self_attention"),), images=True
    ),
    (COSMOS, "MiniTrainDIT"): Arrangement(images=True),
    (MOCHI, "AsymmDiTJoint"): Arrangement((("blocks", "attn"),), after=("num_tokens",)),
    (COGVIDEO, "CogVideoXTransformer3DModel"): Arrangement((("blocks", ""),), text_first=True),
}
WHY_NOT: dict[Identity, str] = {
    ("comfy.ldm.wan.ar_model", "CausalWanModel"): (
        "it generates a few frames at a time, from cached keys"
    ),
    # Where its patches are flat.
    (HUNYUAN, "HunyuanVideo"): "HunyuanImage generates single images",
    ("comfy.ldm.seedvr.model", "NaDiT"): "its attention already looks at windows of the video",
    # Newer than 0.30.
    ("comfy.ldm.wan.model_animate2", "WanAnimate2Model"): (
        "it attends frame by frame, each with a frame of the pose beside all keys"
    ),
}

"""Every video model that can be sparse, as a tiny model with its conditionings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch

from support.host.sampling import conditioning, k_sample, load_model

EVEN, ODD = (5, 16, 16), (3, 15, 17)  # 5 x 8 x 8 and 3 x 8 x 9 tokens
ODD_GRID = (3, 14, 18)  # 3 x 7 x 9 tokens, for models that fail at odd latents by themselves
EVEN_15, ODD_15 = (5, 8, 8), (3, 7, 9)  # HunyuanVideo 1.5 takes every latent pixel for a token


@dataclass(frozen=True)
class Variant:
    """One row of the matrix.

    file: the tiny checkpoint. calls: self-attention calls of one model call. extra: conditionings
    besides the text, for a latent `(T, H, W)`. dense: the reason why all of it stays dense. even,
    odd: latents to sample. control: how many of the calls are VACE's control blocks. trained:
    whether adapters of Wan fit. apart: the model itself cannot take both conditionings in one
    batch. needs: what ComfyUI must have, as (attribute of comfy.model_base, a word in it). sound:
    shape of the sound's latent, which is packed with the video's. text: width of the text's
    features. guides: frames that the conditionings put behind the video.
    """

    file: str
    calls: int = 2
    channels: int = 16
    extra: Callable[[tuple[int, int, int]], dict] = lambda latent: {}
    dense: str | None = None
    even: tuple[int, ...] = EVEN
    odd: tuple[int, ...] = ODD
    control: int = 0
    trained: bool = True
    apart: bool = False
    needs: tuple[str, str] | None = None
    sound: tuple[int, ...] | None = None
    text: int = 768
    guides: int = 0

    def missing(self) -> str | None:
        """Why this ComfyUI cannot run it; None where it can."""
        import comfy.model_base

        holder, word = self.needs or ("WAN21", "")
        found = getattr(comfy.model_base, holder, None)
        return (
            None
            if found and word in inspect.getsource(found)
            else f"this ComfyUI has no {holder} with {word}"
        )

    def model(self):
        return load_model(self.file)

    def sample(
        self, model, latent: tuple[int, ...], cfg: float, steps: int = 2, seed: int = 1
    ) -> torch.Tensor:
        """Sample with the stock KSampler, the same texts every time.

        seed: of the noise, or what stands for it.
        """
        frames, *sides = latent
        start = noise(100 + seed, 1, self.channels, frames + self.guides, *sides)
        # Texts of two lengths stay apart.
        extra, other_text = (self.extra(latent), 24 if self.apart else 20)
        positive = conditioning(1, width=self.text, **extra)
        negative = conditioning(2, other_text, self.text, **extra)
        settings = dict(seed=seed, steps=steps, cfg=cfg)
        if self.sound is not None:  # which keeps its noise: the seed is that of the video's start
            start = nested(start, noise(99, *self.sound))
            settings |= dict(seed=1, denoise=0.5)
        if self.guides:  # frames that are given, and stay as they are
            start[:, :, frames:] = noise(98, 1, self.channels, self.guides, *sides)
            settings["mask"] = torch.ones(1, 1, frames + self.guides, 1, 1)
            settings["mask"][:, :, frames:] = 0
        found = k_sample(model, positive, negative, start, **settings)
        return torch.cat([x.flatten() for x in found.unbind()]) if self.sound else found


def nested(*latents: torch.Tensor):
    """Latents of several kinds, as samplers take them together."""
    from comfy.nested_tensor import NestedTensor

    return NestedTensor(list(latents))


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(latent, channels: int = 16) -> dict:
    return {
        "concat_latent_image": noise(7, 1, channels, *latent),
        "concat_mask": torch.ones(1, 1, *latent),
    }


def seen(width: int, tokens: int = 257) -> dict:
    """What a CLIP vision encoder saw."""
    features = noise(9, 1, tokens, width)
    return {
        "clip_vision_output": SimpleNamespace(
            penultimate_hidden_states=features, last_hidden_state=features
        )
    }


def reference(latent, frames: int = 1) -> torch.Tensor:
    return noise(4, 1, 16, frames, *latent[1:])


def pooled(latent) -> dict:
    return {"pooled_output": noise(8, 1, 768)}


def controls(count: int) -> Callable:
    """VACE with so many control videos."""
    return lambda latent: {
        "vace_frames": [noise(20 + i, 1, 32, *latent) for i in range(count)],
        "vace_mask": [torch.ones(1, 64, *latent)] * count,
        "vace_strength": [1.0, 0.5][:count],
    }


def speech(latent) -> dict:
    return {
        "audio_embed": noise(5, 1, 25, 1024, 4 * latent[0]),
        "reference_latents": [reference(latent)],
        "reference_motion": noise(6, 1, 16, 19, *latent[1:]),
        "control_video": noise(7, 1, 16, *latent),
    }


def scail(latent) -> dict:
    pose = (latent[0], latent[1] // 2, latent[2] // 2)
    return {"reference_latents": [reference(latent)], "pose_video_latent": noise(6, 1, 16, *pose)}


def identities(latent) -> dict:
    masks = torch.zeros(1, latent[0] + 1, 28, *latent[1:])
    return scail(latent) | {
        "ref_mask_28ch": masks,
        "driving_mask_28ch": masks[:, 1:, :, : latent[1] // 2, : latent[2] // 2],
        "ref_mask_flag": True,
    }


def everything_15(latent) -> dict:
    return {**pooled(latent), "conditioning_byt5small": noise(6, 1, 12, 1472), **seen(1152, 729)}


def words(count: int = 20) -> Callable:
    """LTX takes a mask of the text's tokens."""
    return lambda latent: {"attention_mask": torch.ones(1, count, dtype=torch.long)}


def keyframes(latent) -> dict:
    """H3: the first frame of the video, as rows before it."""
    key = {
        "resolved_frame_index": 0,
        "latent": noise(4, 1, 24, 1, *(-(-x // 2) * 2 for x in latent[1:])),
    }
    return {"minimax_keyframes": [key], "minimax_frame_count": 17}


def references(latent) -> dict:
    """H3: an image and a sound to go by."""
    return {
        "minimax_refs": [
            {"kind": "image", "latent_h": 8, "latent_w": 8, "latent": noise(4, 1, 24, 1, 8, 8)},
            {"kind": "audio", "ref_audio_t": 3, "audio_latent": noise(5, 1, 32, 2, 3)},
        ]
    }


def guide(latent) -> dict:
    """LTX: one frame to go by, at the start of the video, behind it in the sequence."""
    frames, height, width = latent
    places = torch.stack(
        torch.meshgrid(
            torch.zeros(1), 32.0 * torch.arange(height), 32.0 * torch.arange(width), indexing="ij"
        )
    ).flatten(1)
    return {
        **words()(latent),
        "keyframe_idxs": torch.stack((places, places + 32), -1)[None],
    }


hunyuan = partial(Variant, calls=4, extra=pooled, odd=ODD_GRID, trained=False)
hunyuan_15 = partial(Variant, channels=32, extra=pooled, even=EVEN_15, odd=ODD_15, trained=False)
h3 = partial(
    Variant,
    "tiny_minimax_h3",
    channels=24,
    sound=(1, 32, 2, 10),
    trained=False,
    needs=("MiniMaxH3", ""),
)
ltx = partial(
    Variant,
    channels=128,
    even=EVEN_15,
    odd=ODD_15,
    extra=words(),
    trained=False,
    needs=("LTXV", ""),
)
cogvideo = partial(Variant, trained=False, needs=("CogVideoX", ""))

VARIANTS = {
    "Wan 2.1 T2V": Variant("tiny_wan21_t2v"),
    "Wan 2.1 I2V": Variant("tiny_wan21_i2v", extra=lambda latent: {**image(latent), **seen(1280)}),
    "Wan 2.2 T2V A14B": Variant("tiny_wan22_t2v_high_noise"),
    "Wan 2.2 I2V A14B": Variant("tiny_wan22_i2v", extra=image),
    "Wan 2.2 TI2V 5B": Variant("tiny_wan22_ti2v_5b", channels=48),
    "Wan FlowRVS": Variant("tiny_wan21_flow_rvs", needs=("WAN21_FlowRVS", "")),
    "Wan Fun Control with a reference": Variant(
        "tiny_wan22_fun_control_ref",
        odd=ODD_GRID,
        extra=lambda latent: {"reference_latents": [reference(latent)]},
    ),
    "Wan Phantom": Variant(
        "tiny_wan21_t2v", extra=lambda latent: {"time_dim_concat": reference(latent, 2)}
    ),
    "Wan with in-context references": Variant(
        "tiny_wan21_t2v",
        needs=("WAN21", "context_latents"),
        extra=lambda latent: {"context_latents": [reference(latent), reference(latent)]},
    ),
    "Wan VACE": Variant("tiny_wan21_vace", 3, control=1, extra=controls(1), odd=ODD_GRID),
    "Wan VACE, two controls": Variant(
        "tiny_wan21_vace", 4, control=2, extra=controls(2), odd=ODD_GRID
    ),
    "Wan Fun Camera": Variant(
        "tiny_wan22_camera",
        odd=ODD_GRID,
        extra=lambda latent: {
            **image(latent),
            "camera_conditions": noise(3, 1, 24, latent[0], 8 * latent[1], 8 * latent[2]),
        },
    ),
    "Wan S2V": Variant("tiny_wan22_s2v", extra=speech, odd=(3, 16, 24)),
    "Wan HuMo": Variant(
        "tiny_wan21_humo",
        odd=ODD_GRID,
        extra=lambda latent: {
            "reference_latents": [reference(latent)],
            "audio_embed": noise(5, 1, latent[0], 8, 5, 1280),
        },
    ),
    "Wan Animate, without a face": Variant(
        "tiny_wan22_animate",
        5,
        odd=ODD_GRID,
        extra=lambda latent: {
            **image(latent),
            **seen(1280),
            "pose_video_latent": noise(6, 1, 16, latent[0] - 1, *latent[1:]),
        },
    ),
    "Wan SCAIL": Variant("tiny_wan21_scail", extra=scail),
    "Wan SCAIL-2, animation": Variant(
        "tiny_wan21_scail2", extra=identities, needs=("WAN21_SCAIL2", ""), odd=ODD_GRID
    ),
    "WanDancer": Variant(
        "tiny_wan22_wandancer",
        needs=("WAN22_WanDancer", ""),
        apart=True,
        extra=lambda latent: {
            **image(latent),
            **seen(1280),
            "audio_embed": noise(5, 1, 8 * latent[0], 35),
            "fps": 30.0,
        },
    ),
    "HunyuanVideo T2V": hunyuan("tiny_hunyuan_t2v"),
    "HunyuanVideo I2V": hunyuan("tiny_hunyuan_i2v"),
    "HunyuanVideo I2V, token replacement": hunyuan(
        "tiny_hunyuan_i2v", extra=lambda latent: {**pooled(latent), "guiding_frame_index": 0}
    ),
    "HunyuanVideo with a reference latent": hunyuan(
        "tiny_hunyuan_t2v",
        extra=lambda latent: {**pooled(latent), "ref_latent": reference(latent)},
        apart=True,
    ),
    "SkyReels I2V": hunyuan("tiny_hunyuan_skyreels_i2v"),
    "HunyuanVideo 1.5 T2V": hunyuan_15("tiny_hunyuan15_t2v"),
    "HunyuanVideo 1.5 I2V with glyphs": hunyuan_15("tiny_hunyuan15_t2v", extra=everything_15),
    "HunyuanVideo 1.5 upscaler": hunyuan_15("tiny_hunyuan15_sr"),
    "MiniMax H3": h3(),
    "MiniMax H3 with a keyframe": h3(extra=keyframes),
    "MiniMax H3 with references": h3(extra=references),
    "LTX-Video": ltx("tiny_ltxv"),
    "LTX-Video with a guide": ltx("tiny_ltxv", extra=guide, guides=1),
    "LTX-2": ltx("tiny_ltx2", extra=words(1024), sound=(1, 8, 12, 16)),
    "Kandinsky 5": Variant("tiny_kandinsky5", text=3584, extra=pooled, odd=ODD_GRID, trained=False),
    "Cosmos Predict2": Variant("tiny_cosmos_predict2", odd=ODD_GRID, trained=False),
    "Mochi": Variant(
        "tiny_mochi",
        channels=12,
        odd=ODD_GRID,
        extra=words(),
        trained=False,
    ),
    "CogVideoX": cogvideo("tiny_cogvideox"),
    "CogVideoX 1.5": cogvideo("tiny_cogvideox15", even=(6, 16, 16), odd=(5, 15, 17)),
    "Wan causal (Self-Forcing)": Variant(
        "tiny_wan21_causal",
        trained=False,
        dense="CausalWanModel cannot be sparse: it generates a few frames at a time, from cached keys",
        needs=("WAN21_CausalAR", ""),
    ),
    "HunyuanImage 2.1": Variant(
        "tiny_hunyuan_image",
        4,
        channels=64,
        even=(16, 16),
        odd=(15, 17),
        trained=False,
        dense="HunyuanVideo cannot be sparse: HunyuanImage generates single images",
    ),
}

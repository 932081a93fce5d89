"""Test-only nodes for what has one size in ComfyUI, far too large for a test.

A custom node of one file: support/data/tiny_files.py puts it into a test server's custom_nodes, and
workflow.py puts these nodes in the place of the loaders of such files.
"""

import zlib

import torch

WORDS, POOLED = 20, 768


class TinyTextEncoder:
    """CLIP: noise instead of a text's features, the same for the same text."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "load", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"width": ("INT", {"default": 3584, "max": 8192})}}

    def load(self, width):
        return (_Noise(width),)


class _Noise:
    def __init__(self, width):
        self.width = width

    def tokenize(self, text, **_):
        return text

    def encode_from_tokens_scheduled(self, text):
        seed = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        features = torch.randn(1, WORDS, self.width, generator=seed)
        pooled = torch.randn(1, POOLED, generator=seed)
        return [[features, {"pooled_output": pooled}]]


class TinyMiniMaxH3VAE:
    """VAE: MiniMax H3's shapes, for pictures and for sound."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "load", ("VAE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        return (_Shapes(),)


class _Shapes:
    audio_sample_rate = 32000

    def encode(self, pixels):
        """(1, H, W, 3), one picture -> (1, 24, 1, H/16, W/16)."""
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 16)
        return small.repeat(1, 8, 1, 1)[:, :, None] * 2 - 1

    def decode(self, latent):
        """A video of 5k + 2 latents -> 17k + 5 frames; sound (1, 32, 2, T) -> (1, 800 T, 2)."""
        if latent.ndim == 4:
            return 0.1 * latent.mean(1).repeat_interleave(800, -1).tanh().movedim(1, -1)
        frames = (latent.shape[2] - 2) // 5 * 17 + 5
        size = frames, 16 * latent.shape[3], 16 * latent.shape[4]
        video = torch.nn.functional.interpolate(latent[:, :3].float(), size)
        return (video.tanh() / 2 + 0.5).movedim(1, -1)


NODE_CLASS_MAPPINGS = {each.__name__: each for each in (TinyTextEncoder, TinyMiniMaxH3VAE)}

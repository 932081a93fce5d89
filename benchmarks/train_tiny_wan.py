"""Train the tiny Wan of these benchmarks: `python -m benchmarks.train_tiny_wan [--out FOLDER]`.

ComfyUI's own Wan class, 5 layers of 3 heads of 64 channels, 3.1 million weights, learns to make
moving shapes (moving_shapes.py) from captions, by flow matching: first short clips, then long ones.
Needs a ComfyUI (COMFYUI_PATH, and ROPESLR_TEST_BASE for its models). An interrupted training goes
on from its last checkpoint, FOLDER/training.pt; the same seed gives the same training, as far as
the machine's arithmetic does. The result, half-precision weights that stock nodes load and a record
of how they were made, replaces benchmarks/data/tiny_wan.{safetensors,json}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from . import ROOT, commit
from .moving_shapes import CAPTIONS, CHANNELS, latents

DATA = ROOT / "benchmarks" / "data"
GRID = (8, 24, 32)  # latent frames, height, width: 8 x 12 x 16 = 1,536 tokens
MODEL: dict[str, Any] = dict(dim=192, ffn_dim=576, num_heads=3, num_layers=5, text_dim=768)
NO_TEXT = 0.15  # how often a clip goes without its caption, for classifier-free guidance


@dataclass(frozen=True)
class Material:
    """What a model learns to make. draw: captions, grid, generator -> clips (B, C, T, H, W).

    noise: mean and spread of its log-odds.
    """

    channels: int
    captions: tuple[str, ...]
    draw: Callable[[list[str], tuple[int, int, int], torch.Generator], Tensor]
    short: tuple[int, int, int]  # grid of the first clips
    noise: tuple[float, float]


# Captions only count where nearly all is noise.
CLIPS = Material(CHANNELS, CAPTIONS, latents, (2, 24, 32), noise=(0.9, 1.3))


@dataclass(frozen=True)
class Settings:
    """What decides the weights."""

    seed: int = 0
    short_steps: int = 1600
    full_steps: int = 1900
    short_batch: int = 8
    full_batch: int = 2
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01

    @property
    def steps(self) -> int:
        return self.short_steps + self.full_steps

    def rate(self, step: int) -> float:
        """Warm-up, plateau, and a cosine over the last 45 %."""
        fall = max(0.0, (step / self.steps - 0.55) / 0.45)
        decay = max(0.03, 0.5 * (1 + math.cos(math.pi * fall)))
        return self.learning_rate * min(1.0, (step + 1) / 60) * decay


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short-steps", type=int, default=Settings.short_steps)
    parser.add_argument("--full-steps", type=int, default=Settings.full_steps)
    options = parser.parse_args()
    settings = Settings(options.seed, options.short_steps, options.full_steps)
    options.out.mkdir(parents=True, exist_ok=True)
    with comfy_in_training():
        training = Training(settings, CLIPS, captions_as_features())
        training.run(options.out / "training.pt")
        save(training, options.out)


@contextmanager
def comfy_in_training():
    """ComfyUI on the CPU, with the switch of core's Train LoRA: RoPE has gradients then."""
    import comfy_host

    comfy_host.boot()
    import comfy.model_management

    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = False


def captions_as_features() -> dict[str, Tensor]:
    """Caption -> (77, 768), by the tiny text encoder and stock nodes; "" is no caption."""
    import os

    import comfy_host
    import tiny_models

    tiny_models.make(
        Path(os.environ["ROPESLR_TEST_BASE"]) / "models", ["text_encoders/tiny_clip_l.pt"]
    )
    (clip,) = comfy_host.run_node("CLIPLoader", clip_name="tiny_clip_l.pt", type="wan")
    found = {}
    for caption in (*CAPTIONS, ""):
        (conditioning,) = comfy_host.run_node("CLIPTextEncode", clip=clip, text=caption)
        found[caption] = conditioning[0][0][0].clone()  # made in inference mode
    return found


class Training:
    """The model, its average, the optimiser, and how far they are."""

    def __init__(self, settings: Settings, material: Material, features: dict[str, Tensor]) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.material, self.features = settings, material, features
        self.model = new_model(material.channels, features)
        self.average = new_model(material.channels, features).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.97), weight_decay=settings.weight_decay
        )
        self.done, self.losses = 0, list[dict[str, Any]]()
        self.seconds = 0.0  # of this process's processors

    def run(self, checkpoint: Path, every: int = 200) -> None:
        """Train to the end, from the checkpoint if there is one."""
        if checkpoint.exists():
            self.load(torch.load(checkpoint, weights_only=True))
        progress = tqdm(total=self.settings.steps, initial=self.done, unit="step")
        while self.done < self.settings.steps:
            started = time.process_time()
            loss = self.step()
            self.done += 1
            self.seconds += time.process_time() - started
            progress.update()
            progress.set_postfix(loss=f"{loss:.3f}")
            if self.done % every == 0 or self.done == self.settings.steps:
                losses = [round(x, 4) for x in self.validate()]
                blind = round(sum(self.validate(captions=False)) / len(losses), 4)
                entry = {"step": self.done, "validation": losses, "without captions": blind}
                self.losses.append(entry)
                mean = sum(losses) / len(losses)
                progress.write(f"step {self.done}: loss {mean:.4f}, without captions {blind:.4f}")
                torch.save(self.state(), checkpoint)
        progress.close()

    def step(self) -> float:
        """One step; its clips, noise and times depend on the seed and its number only."""
        settings = self.settings
        short = self.done < settings.short_steps
        generator = torch.Generator().manual_seed(1_000_003 * settings.seed + self.done)
        clips, captions = draw_clips(settings, self.material, short, generator)
        context = torch.stack([self.features[caption] for caption in captions])
        mean, spread = self.material.noise
        sigma = torch.sigmoid(mean + spread * torch.randn(len(clips), generator=generator))
        noise = torch.randn(clips.shape, generator=generator)
        loss = flow_loss(self.model, clips, noise, sigma, context).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.done)
        self.optimizer.step()
        keep = min(0.995, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.model.parameters()):
                mean.lerp_(now, 1 - keep)
        return loss.item()

    @torch.no_grad()
    def validate(self, captions: bool = True) -> list[float]:
        """The average's loss on clips that training does not see, at six times."""
        generator = torch.Generator().manual_seed(987_654_321)
        known = self.material.captions
        texts = [known[i * len(known) // 4] for i in range(4)]
        clips = self.material.draw(texts, GRID, generator)
        context = torch.stack([self.features[text if captions else ""] for text in texts])
        noise = torch.randn(clips.shape, generator=generator)
        return [
            flow_loss(self.average, clips, noise, torch.full((len(clips),), sigma), context)
            .mean()
            .item()
            for sigma in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)
        ]

    def state(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "seconds": self.seconds,
            "losses": self.losses,
        }

    def load(self, state: dict[str, Any]) -> None:
        if state["settings"] != asdict(self.settings):
            raise SystemExit(
                f"The checkpoint is of a training with {state['settings']}, this one has "
                f"{asdict(self.settings)}: name another folder with --out, or delete it."
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.seconds, self.losses = state["done"], state["seconds"], state["losses"]


def new_model(channels: int, features: dict[str, Tensor]) -> Any:
    """ComfyUI's Wan class with PyTorch's own initial weights; its layers make none.

    What tells captions apart is a tenth of their features: the first layer centres and widens it.
    """
    import comfy.ldm.wan.model
    import comfy.ops

    model: Any = comfy.ldm.wan.model.WanModel(
        model_type="t2v",
        in_dim=channels,
        out_dim=channels,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
        **MODEL,
    )
    width = MODEL["dim"]
    for module in model.modules():
        own = {torch.nn.Linear, torch.nn.Conv3d} & set(type(module).__mro__)
        for kind in own:
            kind.reset_parameters(module)
        if isinstance(module, torch.nn.RMSNorm | torch.nn.LayerNorm) and module.weight is not None:
            torch.nn.init.ones_(module.weight)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                torch.nn.init.zeros_(bias)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("modulation"):
                weight.normal_(std=width**-0.5)
                if name.startswith("blocks"):
                    weight[:, [2, 5]] += 0.5  # the branches' gates
        model.time_projection[1].weight.normal_(std=0.02)
        model.time_projection[1].bias.zero_()
        texts = torch.stack(list(features.values()))
        first = model.text_embedding[0]
        if len(texts) > 1:
            first.weight.div_((texts - texts.mean(dim=0)).std())
        first.bias.copy_(-first.weight @ texts.mean(dim=(0, 1)))
        model.head.head.weight.zero_()
        model.head.head.bias.zero_()
    return model


def draw_clips(
    settings: Settings, material: Material, short: bool, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Clips (B, C, T, H, W) and their captions, some of them taken away."""
    count, grid = (settings.short_batch, material.short) if short else (settings.full_batch, GRID)
    chosen = torch.randint(len(material.captions), (count,), generator=generator).tolist()
    captions = [material.captions[each] for each in chosen]
    clips = material.draw(captions, grid, generator)
    told = (torch.rand(count, generator=generator) >= NO_TEXT).tolist()
    return clips, [caption if tell else "" for caption, tell in zip(captions, told)]


def flow_loss(
    model: torch.nn.Module, clips: Tensor, noise: Tensor, sigma: Tensor, context: Tensor
) -> Tensor:
    """Squared error of the velocity, noise - clip: -> (B,)."""
    at = sigma.view(-1, 1, 1, 1, 1)
    velocity = model(
        (1 - at) * clips + at * noise,
        1000 * sigma,
        context,
        transformer_options={"optimized_attention_override": attend},
    )
    return (velocity - (noise - clips)).square().mean((1, 2, 3, 4))


def attend(
    original: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any
) -> Tensor:
    """PyTorch's attention, which has gradients, in the place of ComfyUI's: (B, L, H * D)."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def save(training: Training, folder: Path) -> None:
    """Weights in half precision, and the record."""
    from importlib.metadata import version

    weights = {
        name: weight.half().contiguous() for name, weight in training.average.state_dict().items()
    }
    # Sizes that ComfyUI does not read off the weights.
    sizes = {"text_dim": MODEL["text_dim"], "num_heads": MODEL["num_heads"]}
    save_file(
        weights,
        folder / "tiny_wan.safetensors",
        {"config": json.dumps({"transformer": sizes})},
    )
    record = {
        "made_by": "python -m benchmarks.train_tiny_wan",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "settings": asdict(training.settings),
        "model": MODEL,
        "weights": sum(weight.numel() for weight in weights.values()),
        "processor_minutes": round(training.seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "safetensors": version("safetensors"),
        "losses": training.losses,
    }
    (folder / "tiny_wan.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {folder / 'tiny_wan.safetensors'}: {record['weights']:,} weights")


if __name__ == "__main__":
    main()

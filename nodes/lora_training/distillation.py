"""The loss: how far the sparse model with the LoRA is from the same model, dense and without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...training import Example
from ...training.crowd import SHARDED
from ..patching.model_info import blocks
from ..patching.patch import RUNS, Runs
from .graph import without_inference_tensors
from .lora import TrainedLora
from .shards import spread

PROMPT, NEGATIVE = "prompt {}", "the negative"


class Distillation(comfy.samplers.Sampler):
    """Stands where a sampler does, inside a sampling run of ComfyUI's own, and trains instead."""

    def __init__(self, work: Callable[[Velocity], None], lora: TrainedLora, data: Data) -> None:
        self._work, self._lora, self._data = work, lora, data

    def sample(  # ComfyUI's own signature
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Hand the loss to whoever wants to work with it."""
        base = model_wrap.inner_model
        without_inference_tensors(base)
        if SHARDED.get():
            spread(blocks(base.diffusion_model), noise.device)
        self._lora.to(noise.device)
        model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        velocity = Velocity(model, extra_args, denoise_mask, self._lora, self._data)
        # Backward passes run blocks again: the LoRA has to be there whenever the teacher is not.
        with self._lora.applied(model_wrap.model_patcher):
            self._work(velocity)
        return torch.zeros_like(noise)


class Trajectory(NamedTuple):
    """What a sampler went through, and the video that came out.

    states `(S, C, T, H, W)` float16, in the model's own units, at S falling noise levels. video
    `(1, C, T, H, W)`, as samplers hand it on. S is 0 of a sampler that makes its own steps.
    """

    levels: tuple[float, ...]
    states: Tensor
    video: Tensor

    @classmethod
    def unknown(cls, video: Tensor) -> Trajectory:
        """Of a video of which no more is known."""
        return cls((), video[:0].half(), video)

    def at(self, level: float) -> Tensor:
        """The state `(1, C, T, H, W)` at a level; between two of them, on the line that joins them.

        That line is where Euler's method would have stopped.
        """
        if level in self.levels:
            return self.states[self.levels.index(level)][None].float()
        after = next((i for i, each in enumerate(self.levels) if each < level), 0)
        after = min(max(after, 1), len(self.levels) - 1)
        high, low = self.levels[after - 1], self.levels[after]
        share = (high - level) / (high - low)
        return torch.lerp(self.states[after - 1].float(), self.states[after].float(), share)[None]


@dataclass(frozen=True)
class Data:
    """What the loss is measured on.

    videos: those without states get noise. Of video i prompt number `prompts[i]`. negative: whether
    every second example is of the negative conditioning. blank: what a mask keeps parts of.
    """

    videos: Sequence[Trajectory]
    prompts: Sequence[int]
    negative: bool = False
    blank: Tensor | None = None


class Velocity:
    """Squared error of the student's velocity, as a share of the teacher's square. Source: ours.

    A velocity is (x - x0) / sigma, by the denoised latent x0.
    """

    def __init__(
        self,
        model: Any,
        extra_args: dict[str, Any],
        mask: Tensor | None,
        lora: TrainedLora,
        data: Data,
    ) -> None:
        self._model, self._extra, self._mask = model, extra_args, mask
        self._lora, self._data = lora, data
        guider = model.inner_model
        self.guider, self._base = guider, guider.inner_model
        options = extra_args["model_options"]
        self._run = options["transformer_options"][RUNS].main
        self._dense = _without_run(options, self._base)
        self._device = next(iter(lora.parameters.values())).device
        self._targets: dict[tuple, Tensor] = {}

    def loss(self, example: Example) -> Tensor:
        """See `Problem.loss`."""
        asked = self._asked(example)
        self._run.training.number = example.number
        extra = {**self._extra, "model_options": self._dense} if example.dense else self._extra
        return self._distance(self._predict(asked.x, asked.sigma, extra), asked)

    def untrained_loss(self, example: Example) -> Tensor:
        """See `Problem.untrained_loss`."""
        asked = self._asked(example)
        self._run.training.number = example.number
        with self._lora.removed(self.guider.model_patcher):
            return self._distance(self._predict(asked.x, asked.sigma, self._extra), asked)

    def _predict(self, x: Tensor, sigma: Tensor, extra: dict[str, Any]) -> Tensor:
        return self._model(x, sigma, self._mask, **extra)

    def _asked(self, example: Example) -> _Asked:
        """The noisy latent, its noise level, and what the teacher says."""
        video, level = self._data.videos[example.latent], example.level
        noise = torch.randn(
            video.video.shape, generator=torch.Generator().manual_seed(example.seed)
        ).to(self._device)
        sigma = torch.tensor([level], device=self._device)
        gone_through = bool(video.levels) and not example.fresh
        if gone_through:
            x = video.at(level).to(self._device)
        else:
            clean = self._clean(video.video, noise)
            x = self._base.model_sampling.noise_scaling(sigma, noise, clean, False)
        self._model.noise, self._model.latent_image = noise, self._clean(self._data.blank, noise)
        negative = self._data.negative and bool(example.number % 2)
        key = NEGATIVE if negative else PROMPT.format(self._data.prompts[example.latent])
        self.guider.conds["positive"] = self.guider.conds[key]
        again = (gone_through or example.number < 0) and not SHARDED.get()
        known = (key, example.latent, level) if again else None
        return _Asked(x, sigma, self._target(known, x, sigma))

    def _target(self, known: tuple | None, x: Tensor, sigma: Tensor) -> Tensor:
        """What the teacher says. known: under which name it will be asked for again."""
        if known in self._targets:
            return self._targets[known].to(x)
        with torch.no_grad(), self._lora.removed(self.guider.model_patcher):
            target = self._predict(x, sigma, {**self._extra, "model_options": self._dense})
        rounded = target.to(torch.float16)  # in either case, so that it is the same whenever asked
        if known is not None:
            self._targets[known] = rounded.cpu()
        return rounded.to(target)

    def _clean(self, latent: Tensor | None, like: Tensor) -> Tensor:
        """A latent in the model's own units."""
        if latent is None or not torch.count_nonzero(latent):
            return torch.zeros_like(like)
        return self._base.process_latent_in(latent.to(like))

    def _distance(self, found: Tensor, asked: _Asked) -> Tensor:
        # Both are sigma times as long as the velocities.
        velocity = (asked.x - asked.target).float()
        return (found - asked.target).float().square().mean() / velocity.square().mean()


class _Asked(NamedTuple):
    """One example: noisy latent, noise level `(1,)`, and the teacher's denoised latent."""

    x: Tensor
    sigma: Tensor
    target: Tensor


def _without_run(options: dict[str, Any], base_model: Any) -> dict[str, Any]:
    """Options of a model call that no sampling run of this pack takes part in."""
    own = options["transformer_options"]
    return {**options, "transformer_options": {**own, RUNS: Runs(None, {base_model: None})}}


def interrupt_if_asked() -> None:
    """Raise where a person has pressed the button."""
    comfy.model_management.throw_exception_if_processing_interrupted()

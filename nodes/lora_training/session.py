"""One training from beginning to end: checks, rehearsal, videos, table, loop, files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import comfy.model_management
import comfy.utils
import torch
from comfy_extras.nodes_train import TrainGuider
from torch import Tensor

from ...attention import SparsePlan
from ...attention.adapters import Adapter, shown, write_safetensors
from ...training import (
    Ended,
    Example,
    Material,
    Outcome,
    State,
    Training,
    TrainSettings,
    outcome_of,
    write_state,
)
from ...training.crowd import SHARDED, rank_and_size
from ..patching.full_schedule import step_schedule
from ..patching.install import install
from ..patching.model_info import ModelInfo, blocks, model_info
from ..patching.patch import KEY, SparsePatch, clear
from . import comparison, data, memory
from .distillation import NEGATIVE, PROMPT, Data, Distillation, Trajectory, Velocity
from .files import Files, LoraFacts, claim
from .graph import checkpointed, detached, training_mode
from .lora import TrainedLora, as_file
from .progress import Progress, clock

logger = logging.getLogger(__name__)

CANNOT = "This model cannot be trained for sparse attention: {why}."
NO_GRADIENT = (
    "No gradient reaches the LoRA: something between it and the output of {model} cannot be "
    "differentiated, quantised weights for one. Load the model in bf16 or fp16 (weight_dtype "
    "default)."
)
FAILED = "A first step of training failed ({error}). {advice}"
IN_PLACE = "This model needs gradient_checkpointing: its blocks write into their own inputs."
SMALLER = (
    "Switch on gradient_checkpointing and offloading, or make the video smaller or shorter. "
    "Nothing was trained yet."
)
LOOK = (
    "This ComfyUI may compute a part of this model in a way that knows no gradients, or another "
    "node on the MODEL may; try without those."
)
PART_OF_SCHEDULE = (
    "The sigmas go from {first:.3f} to {last:.3f}: they are one expert's part of a schedule, which "
    "alone makes no video. Connect finished videos as latents: those of both experts' samplers."
)
NOTHING_SPARSE = (
    "With these settings no step would be sparse, so there is nothing to train for. Raise "
    "sparsity, or connect sigmas with more than one step."
)
OUT_OF_MEMORY = "Out of memory after {step} steps; what was learned is saved. {advice}"
COMPARING = "Sampling video {} of {} to compare"
NOT_COMPARED = "held-out videos could not be sampled, so only single steps are known to be closer"
MANY = "RoPeSLR: {count} processes train together; this is number {rank}"


@dataclass(frozen=True)
class Asked:
    """What a person asks of a training, beside the settings of the loop.

    given: finished videos `(1, C, T, H, W)`, with prompts one for each or one for all; empty: make
    `samples` of them. existing: a LoRA to begin with, and the steps that it had.
    """

    model: Any
    use: data.Use
    plan: SparsePlan
    settings: TrainSettings
    given: Sequence[Tensor] = ()
    samples: int = 12
    rank: int = 8
    dtype: torch.dtype | None = None  # to compute in; None: the model's own
    lora_dtype: torch.dtype = torch.bfloat16
    checkpoints: bool = True
    offloading: bool = False
    existing: dict[str, Tensor] | None = None
    name: str = "sparse_lora"
    keep_last: int = 2
    resume: bool = True
    node_id: str | None = None


class Trained(NamedTuple):
    """lora: as ComfyUI's nodes take it. errors: (step, held-out error as a share of no LoRA's)."""

    lora: dict[str, Tensor]
    losses: list[float]
    errors: list[tuple[int, float]]
    steps: int
    adapter: Adapter | None
    report: str


def train_sparse_lora(asked: Asked) -> Trained:
    """Train, save, and say how it went.

    Raises ValueError, MemoryError or OSError before anything is trained, where something is wrong
    with what is asked; afterwards nothing is lost by an exception.
    """
    with torch.inference_mode(False):
        return _Session(asked).run()


class _Session:
    """All that one training needs; made for it."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.base = _prepared(asked.model, asked.dtype)
        self.info = _supported(self.base)
        self.use = replace(
            asked.use,
            prompts=[detached(each) for each in asked.use.prompts],
            negative=None if asked.use.negative is None else detached(asked.use.negative),
        )
        self.given = [each.detach().clone().float() for each in asked.given]
        self.levels = self._levels()
        self.lora = TrainedLora(self.base.model, self.info, asked.rank, asked.settings.seed)
        if asked.existing is not None:
            self.lora.load(asked.existing)
        self.facts = self._facts()
        self.files, self.state = claim(asked.name, self.facts, asked.resume)
        room = (8 + asked.keep_last) * self.lora.bytes
        if rank_and_size()[0] == 0:
            self.files.check_room(room)
        self.progress = Progress(asked.settings.steps, asked.node_id)

    def run(self) -> Trained:
        """See `train_sparse_lora`."""
        asked, (rank, size) = self.asked, rank_and_size()
        over = None if self.state is None else outcome_of(self.state, asked.settings)
        if over is not None and self.state is not None:
            table = self.files.read_adapter()
            self._compare(over, self.state, table)
            return self._finish(over, self.state, table, self._lora_facts(table))
        if size > 1:
            logger.info(MANY.format(count=size, rank=rank))
        shape = (1, *self.use.blank.shape[1:])
        told = memory.state_memory(self.base, self.info, self.lora, shape, asked.checkpoints)
        self.progress.say(f"Rehearsing one step: {told}")
        self._rehearse()
        videos = self._videos()
        table = self.files.read_adapter() if self.state is not None else None
        if table is None:
            table = self._table()
        prompts = [i % len(self.use.prompts) for i in range(len(videos))]
        negative = self.use.negative is not None and self.use.cfg != 1.0
        found = Data(videos, prompts, negative, self.use.blank)
        facts = self._lora_facts(table)
        outcome, state = self._train(found, table, facts)
        state.apart = []  # those of fewer steps say nothing of these
        self._compare(outcome, state, table)
        return self._finish(outcome, state, table, facts)

    def _levels(self) -> list[float]:
        """Noise levels of the steps that are sparse in the use."""
        sampling = self.base.get_model_object("model_sampling")
        sigmas = [float(each) for each in self.use.sigmas]
        whole = sigmas[0] >= 0.98 * float(sampling.sigma_max) and sigmas[-1] <= 0.0
        if not whole and not self.given:
            raise ValueError(PART_OF_SCHEDULE.format(first=sigmas[0], last=sigmas[-1]))
        plan = self._plan().resolve(self._own_adapter())
        schedule = step_schedule(plan, self.use.sigmas, whole, sampling)
        levels = [each for each in sigmas if each > 0 and schedule.dense_reason(each) is None]
        if sigmas[-1] > 0:  # where the part of another expert begins
            levels = [each for each in levels if each > sigmas[-1]]
        if not levels or plan.sparsity == 0 or plan.backend == "dense":
            raise ValueError(NOTHING_SPARSE)
        return levels

    def _weight(self, level: float) -> float:
        """How much an error of the velocity moves the denoised latent at a noise level, squared.

        Measured on the tiny Wan: more than half of what samples lose is lost in the first fifth of
        the steps.
        """
        flow = float(self.base.get_model_object("model_sampling").sigma_max) <= 1.0
        return level**2 if flow else level**2 / (1.0 + level**2)

    def _plan(self, training: str = "dense") -> SparsePlan:
        """That of the MODEL's own node, if it has one, with what was asked here."""
        return replace(self.asked.plan, training=training, min_tokens=0, strict=False)

    def _own_adapter(self) -> Adapter | None:
        patch: SparsePatch | None = self.asked.model.get_attachment(KEY)
        adapter = None if patch is None else patch.plan.adapter
        fits = adapter is not None and self.asked.plan.method in ("auto", adapter.info.method)
        return adapter if fits else None

    def _facts(self) -> dict[str, Any]:
        """Whatever decides what comes out, but for how long it is trained."""
        asked, settings, use = self.asked, self.asked.settings, self.use
        names = ("batch_size", "grad_accumulation_steps", "learning_rate", "optimizer", "seed")
        plan = self._plan()
        asks = {
            name: getattr(plan, name) for name in ("method", "sparsity", "allocation", "key_block")
        }
        return {
            **{name: getattr(settings, name) for name in names},
            **asks,
            "rank": asked.rank,
            "model": f"{self.info.name}, {self.info.num_layers} layers",
            "size": list(use.blank.shape[1:]),
            "sigmas": [round(float(each), 5) for each in use.sigmas],
            "cfg": use.cfg,
            "training_dtype": str(asked.dtype),
            "prompts": data.digest(use.prompts, use.negative),
            "videos": data.digest(self.given) if self.given else asked.samples,
            "existing_lora": None if asked.existing is None else data.digest(asked.existing),
        }

    def _rehearse(self) -> None:
        """One example, forward and backward, before hours are spent on getting there."""
        noise = torch.randn(self.use.blank.shape, generator=torch.Generator().manual_seed(0))
        sparse = install(self.base, self._plan("sparse"), None, self._own_adapter())
        level = self.levels[len(self.levels) // 2]

        def work(velocity: Velocity) -> None:
            velocity.loss(Example(1, 0, level, 0)).backward()

        with _in_words(self.asked):
            self._inside_a_run(sparse, work, Data([Trajectory.unknown(noise)], [0]))
        parameters = self.lora.parameters.values()
        if not any(each.grad is not None and bool(each.grad.any()) for each in parameters):
            raise ValueError(NO_GRADIENT.format(model=self.info.name))
        for each in parameters:
            each.grad = None
        device = next(iter(parameters)).device
        self.progress.say(f"One step works{memory.peak(device)}")

    def _videos(self) -> list[Trajectory]:
        if self.given:
            return [Trajectory.unknown(each) for each in self.given]
        count, seed = self.asked.samples, self.asked.settings.seed
        steps = ProgressSteps(self.progress, "Making video {} of {} to learn from", count)
        with torch.inference_mode():
            made = data.own_samples(self.base, self.use, count, seed, steps)
        return [Trajectory(levels, *(x.clone() for x in rest)) for levels, *rest in made]

    def _table(self) -> Adapter | None:
        sparse = install(self.base, self._plan(), None, self._own_adapter())
        first = min(data.TABLE_RUNS, len(self.given) or data.TABLE_RUNS)
        starts = [
            (i % len(self.use.prompts), self.given[i] if self.given else None) for i in range(first)
        ]
        steps = ProgressSteps(self.progress, "Finding out what heads need, {} of {}", first)
        with torch.inference_mode():
            return data.learn_table(sparse, self.use, starts, self.asked.settings.seed, steps)

    def _lora_facts(self, table: Adapter | None) -> LoraFacts:
        plan = self._plan().resolve(table or self._own_adapter())
        return LoraFacts(
            plan.method,
            plan.sparsity,
            plan.allocation,
            plan.key_tokens,
            plan.query_tokens,
            plan.block_order,
            self.files.adapter.name if table is not None else "",
            self.info.name,
        )

    def _train(self, found: Data, table: Adapter | None, facts: LoraFacts) -> tuple[Outcome, State]:
        asked = self.asked
        sparse = install(self.base, self._plan("sparse"), None, table or self._own_adapter())
        material = Material(
            len(found.videos),
            self.levels,
            asked.settings.seed,
            [self._weight(x) for x in self.levels],
        )
        result: list[tuple[Outcome, State]] = []

        def save(state: State) -> None:
            tensors = as_file(state.parameters, asked.rank, asked.lora_dtype)
            self.files.save_adapter(table, facts.sentence())
            self.files.save_on_the_way(state, tensors, facts, asked.keep_last)

        def work(velocity: Velocity) -> None:
            self.progress.on_save = save
            training = Training(
                velocity, self.lora.parameters, material, asked.settings, self.progress
            )
            training.begin_with(self.state or State(self.facts))
            self.progress.begin(training)
            try:
                result.append((training.run(), training.state))
            except torch.cuda.OutOfMemoryError as error:
                step = training.state.step
                raise MemoryError(OUT_OF_MEMORY.format(step=step, advice=SMALLER)) from error

        self._inside_a_run(sparse, work, found)
        return result[0]

    def _inside_a_run(self, sparse: Any, work: Callable[[Velocity], None], found: Data) -> None:
        """Let `work` have the loss, with the model loaded as a sampler would find it."""
        asked, prompts = self.asked, self.use.prompts
        conditions = {PROMPT.format(i): prompts[i] for i in sorted(set(found.prompts))}
        if found.negative and self.use.negative is not None:
            conditions[NEGATIVE] = self.use.negative
        guider = TrainGuider(sparse, offloading=asked.offloading)
        guider.inner_set_conds({"positive": prompts[0], **conditions})
        inner = blocks(sparse.model.diffusion_model) if asked.checkpoints else ()
        blank = self.use.blank
        with training_mode(), checkpointed(inner):
            guider.sample(
                torch.zeros_like(blank),
                torch.zeros_like(blank),
                Distillation(work, self.lora, found),
                self.use.sigmas.clone(),
                denoise_mask=None if self.use.mask is None else self.use.mask.clone(),
                disable_pbar=True,
                seed=0,
            )

    def _compare(self, outcome: Outcome, state: State, table: Adapter | None) -> None:
        """Sample held-out videos with the LoRA and without, once; given ones have no beginning."""
        settled = bool(state.apart) or outcome.error >= 1.0
        count, seed = self.asked.samples, self.asked.settings.seed
        first = Material(count, self.levels).trained_on
        held = range(first, min(count, first + comparison.MOST))
        if settled or self.given or not held or SHARDED.get() or rank_and_size()[0] > 0:
            return
        tensors = as_file(outcome.parameters, self.asked.rank, torch.float32)
        adapter = table or self._own_adapter()
        try:
            with torch.inference_mode():
                sparse = [
                    install(model, self._plan(), None, adapter)
                    for model in (self.base, comparison.with_lora(self.base, tensors))
                ]
                steps = ProgressSteps(self.progress, COMPARING, len(held))
                videos = data.own_videos(self.base, self.use, count, seed, held)
                state.apart = comparison.compare(sparse, self.use, videos, seed, steps)
            write_state(state, self.files.state)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception:  # what is trained must not be lost by it
            logger.warning("RoPeSLR: %s", NOT_COMPARED, exc_info=True)

    def _finish(
        self, outcome: Outcome, state: State, table: Adapter | None, facts: LoraFacts
    ) -> Trained:
        asked = self.asked
        tensors = as_file(outcome.parameters, asked.rank, asked.lora_dtype)
        better = outcome.error < 1.0 and not _worse(state)
        if better and rank_and_size()[0] == 0:
            write_safetensors(tensors, self.files.lora, facts.header())
        if not better:  # one that changes nothing, whatever it began with
            tensors = {
                key: torch.zeros_like(each) if key.endswith("lora_up.weight") else each
                for key, each in tensors.items()
            }
        report = _report(outcome, state, self.files if better else None, facts)
        self.progress.say(report)
        return Trained(tensors, state.losses, state.errors, state.step, table, report)


class ProgressSteps:
    """Tells how far a stage before the training is, and stops where a person wants it."""

    def __init__(self, progress: Progress, text: str, count: int) -> None:
        self._progress, self._text, self._count = progress, text, count
        self._bar = comfy.utils.ProgressBar(count)

    def __call__(self, done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(done)
        self._progress.say(self._text.format(done + 1, self._count))


def _prepared(model: Any, dtype: torch.dtype | None) -> Any:
    """A clone that samples densely, without this pack."""
    base = model.clone()
    clear(base)
    if dtype is not None:
        base.set_model_compute_dtype(dtype)
    return base


def _supported(model: Any) -> ModelInfo:
    info = model_info(model.model.diffusion_model)
    if info.unsupported:
        raise ValueError(CANNOT.format(why=info.unsupported))
    return info


@contextlib.contextmanager
def _in_words(asked: Asked) -> Any:
    """What a first step can run into."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(FAILED.format(error="out of memory", advice=SMALLER)) from error
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:  # whatever a model or another pack says about gradients
        in_place = "inplace" in str(error) and not asked.checkpoints
        first_line = shown(str(error).partition("\n")[0], limit=200)
        advice = IN_PLACE if in_place else LOOK
        raise ValueError(FAILED.format(error=first_line, advice=advice)) from error


def _worse(state: State) -> bool:
    """Whether videos are further from the teacher's with the LoRA than without."""
    return bool(state.apart) and comparison.gain(state.apart) < comparison.NO_WORSE


def _report(outcome: Outcome, state: State, files: Files | None, facts: LoraFacts) -> str:
    """How it went, in a few sentences."""
    text = (
        f"{state.step} steps in {clock(state.seconds)} ({outcome.ended.value}). Held-out error: "
        f"{100 * outcome.error:.1f} % of that without the LoRA, lowest at step {outcome.step}."
    )
    if state.apart:
        closer = comparison.gain(state.apart)
        text += (
            f" {len(state.apart)} videos that it was not trained on, sampled with it and without: "
            f"{abs(closer):.1f} dB {'closer to' if closer >= 0 else 'further from'} dense ones."
        )
    if files is None:
        return (
            f"{text} No LoRA was better than none: the one returned changes nothing, and none was "
            "saved as finished. Train for longer, on more videos, or with a lower learning_rate."
        )
    if outcome.ended is Ended.RISES:
        text += " Later ones were worse, and are not used."
    return f"{text} Saved as {files.lora.name} in {files.loras}. {facts.sentence()}"

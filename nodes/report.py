"""RoPeSLR Report: what the last run did, in words and as a picture, and which method fits."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import folder_paths
import numpy
import torch
from comfy_api.latest import io, ui

from ..attention.compare import MethodComparison
from .patching import RunReport, last_report
from .patching import compare as comparison

logger = logging.getLogger(__name__)

COMPARE = ("off", "this method", "all methods")
NO_RUN = (
    "No run to report: this MODEL has not been sampled through a RoPeSLR Sparse Attention node. "
    "Connect the MODEL that goes into the sampler, and the sampler's LATENT."
)
NOT_ASKED = "No comparison: compare is off. Set it to this method or all methods."
NO_POSITIVE = "No comparison: connect the sampler's positive conditioning."
NOTHING_TO_COMPARE = "No comparison: no attention of this model can be sparse at these settings."
NO_MATPLOTLIB = "The picture needs matplotlib: pip install matplotlib."
NOT_DRAWN = "The picture could not be drawn; the log says why. A newer matplotlib may help."


class RoPeSLRReport(io.ComfyNode):
    """LATENT + MODEL -> LATENT, IMAGE, STRING about the last run of that MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RoPeSLRReport",
            display_name="RoPeSLR Report",
            category="RoPeSLR",
            description=(
                "Shows what the last run did: sparse and dense calls with reasons, density by "
                "layer and step, cost by part. compare also measures the error of this method, or "
                "of every method, against dense attention."
            ),
            search_aliases=["sparse attention report", "compare methods"],
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip=(
                        "From the sampler, so that this node runs after it. Passed through "
                        "unchanged."
                    ),
                ),
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The MODEL that went into that sampler, after RoPeSLR Sparse Attention."
                    ),
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The sampler's positive conditioning. Only needed for compare.",
                ),
                io.Combo.Input(
                    "compare",
                    options=list(COMPARE),
                    default="off",
                    tooltip=(
                        "off: only the last run. this method, all methods: also measures the error "
                        "against dense attention, by adding noise to the finished latent and "
                        "running the model once more. Takes about one step, and one more per "
                        "method. Needs positive."
                    ),
                ),
                io.Float.Input(
                    "at",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "Point of the schedule to compare at: 0 is pure noise, 1 the finished "
                        "video, which is the worst place to judge how heads share the blocks."
                    ),
                ),
                io.Int.Input(
                    "layer",
                    default=0,
                    min=0,
                    max=999,
                    tooltip=(
                        "Layer whose block map is drawn, counted from 0. Too large a number means "
                        "the last."
                    ),
                ),
                io.Int.Input(
                    "head",
                    default=0,
                    min=0,
                    max=999,
                    tooltip=(
                        "Head whose block map is drawn, counted from 0. Too large a number means "
                        "the last."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(),
                io.Image.Output(display_name="report"),
                io.String.Output(display_name="text"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        latent: dict,
        model: Any,
        compare: str,
        at: float,
        layer: int,
        head: int,
        positive: list | None = None,
    ) -> io.NodeOutput:
        """Tell about the last run of MODEL; never fails a graph whose video is finished."""
        report = last_report(model)
        if report is None:
            return io.NodeOutput(latent, _written(NO_RUN), NO_RUN, ui=ui.PreviewText(NO_RUN))
        found, remark = None, NOT_ASKED if positive is not None else ""
        if compare != "off":
            request = comparison.Request(compare == "all methods", at, layer, head)
            found, remark = _compare(model, latent, positive, request)
        text = "\n".join(filter(None, (report.summary(), _time(report), _table(found), remark)))
        try:
            image = _drawn(report, found)
        except ImportError:
            text += f"\n{NO_MATPLOTLIB}"
            image = _written(text)
        except Exception:  # a very old matplotlib, for one; the video is finished
            logger.warning("RoPeSLR: the report could not be drawn", exc_info=True)
            text += f"\n{NOT_DRAWN}"
            image = _written(text)
        return io.NodeOutput(latent, image, text, ui=ui.PreviewImage(image, cls=cls))


def _drawn(report: RunReport, found: MethodComparison | None) -> torch.Tensor:
    """The picture."""
    with _matplotlib_folder(os.path.join(folder_paths.get_temp_directory(), "matplotlib")):
        from .figure import draw

        return draw(report, found)


@contextlib.contextmanager
def _matplotlib_folder(folder: str) -> Iterator[None]:
    """Let matplotlib keep its caches among ComfyUI's temporary files instead of the home folder.

    It knows no other way than this variable, and reads it once, when it is first used.
    """
    name = "MPLCONFIGDIR"
    if name in os.environ or "matplotlib" in sys.modules:
        yield
        return
    os.environ[name] = folder
    try:
        yield
    finally:
        del os.environ[name]


def _compare(
    model: Any, latent: dict, positive: list | None, request: comparison.Request
) -> tuple[MethodComparison | None, str]:
    """What a comparison found, or why there is none."""
    if positive is None:
        return None, NO_POSITIVE
    try:
        with torch.inference_mode():
            found = comparison.compare(model, latent, positive, request)
    except Exception as error:  # the video is finished: a report must not cost it
        logger.warning("RoPeSLR: the comparison failed", exc_info=True)
        return None, f"No comparison: it failed ({type(error).__name__}: {error})."
    return found, "" if found is not None else NOTHING_TO_COMPARE


def _time(report: RunReport) -> str:
    spent = report.attention_seconds
    if not spent or not report.seconds:
        return ""
    both = sum(spent.values())
    share = 100 * both / report.seconds
    return (
        f"Time in self-attention: {both:.1f} s of {report.seconds:.1f} s ({share:.0f} %), "
        f"sparse {spent['sparse']:.1f} s, dense {spent['dense']:.1f} s.{_each(report)}"
    )


def _each(report: RunReport) -> str:
    """One call against one, where there were both."""
    one = report.call_seconds or {}
    if not (one.get("sparse") and one.get("dense")):
        return ""
    return (
        f" Median call: sparse {1000 * one['sparse']:,.1f} ms, dense {1000 * one['dense']:,.1f} "
        f"ms: {one['dense'] / one['sparse']:.2f} times as fast."
    )


def _table(found: MethodComparison | None) -> str:
    """The methods with their errors, best first."""
    if found is None:
        return ""
    rows = []
    for name, errors in found.errors.items():
        if errors:
            relative = [each.relative for each in errors.values()]
            absolute = sum(each.absolute for each in errors.values()) / len(errors)
            rows.append((sum(relative) / len(errors), max(relative), absolute, name))
    rows.sort()
    lines = [
        "Error against dense attention, as a share of it: mean over layers, worst layer; mean in "
        "the units of the outputs; FLOPs saved:"
    ]
    lines += [
        f"  {name:12} {mean:.3f}  {worst:.3f}  {absolute:.4g}  {100 * found.saved[name]:.1f} %"
        for mean, worst, absolute, name in rows
    ]
    if len(rows) > 1:
        lines.append(f"Closest to dense on this model at this sparsity: {rows[0][-1]}.")
    if found.learns:
        lines.append(
            "Heads kept as many blocks as was measured at this point of the schedule. The finished "
            "latent (at = 1) is the worst place to judge that."
        )
    return "\n".join(lines)


def _written(text: str) -> torch.Tensor:
    """A text as an IMAGE `(1, H, W, 3)`, for when there is nothing to draw or to draw with."""
    from PIL import Image, ImageDraw

    paragraphs = text.split("\n")
    lines = [line for each in paragraphs for line in textwrap.wrap(each, 90) or [""]]
    image = Image.new("RGB", (720, 40 + 18 * len(lines)), "white")
    ImageDraw.Draw(image).multiline_text((20, 20), "\n".join(lines), fill="black", spacing=6)
    return torch.from_numpy(numpy.asarray(image).astype(numpy.float32) / 255)[None]

"""Few-Step Sigmas: the noise levels that released few-step checkpoints were distilled for."""

from __future__ import annotations

import torch
from comfy_api.latest import io

# Rectified-flow times, 1 = noise. The inner ones are t of arctan(sigma) = 1.5, 1.4, 1.0 in both
# families.
SPARK_START, TURBO_T2V_START, TURBO_I2V_START = 1600 / 1601, 80 / 81, 200 / 201
BOUNDARY = 0.875  # between SparkWan 2.2's experts
INNER = (0.933781, 0.852895, 0.608979)
EIGHT = (0.933781, 0.852895, 0.782708, 0.690833, 0.583052, 0.457197, 0.297157)

PRESETS: dict[str, tuple[float, ...]] = {
    **{
        f"SparkWan 2.1, {n} step{'s' * (n > 1)}": (SPARK_START, *INNER[: n - 1], 0.0)
        for n in (1, 2, 3, 4)
    },
    "SparkWan 2.1, 8 steps": (SPARK_START, *EIGHT, 0.0),
    "SparkWan 2.2 high noise, 1 step": (SPARK_START, BOUNDARY),
    "SparkWan 2.2 high noise, 2 steps": (SPARK_START, INNER[0], BOUNDARY),
    "SparkWan 2.2 low noise, 2 steps": (BOUNDARY, 0.608979, 0.0),
    "SparkWan 2.2 low noise, 3 steps": (BOUNDARY, 0.720057, 0.507301, 0.0),
    "SparkWan 2.2 low noise, 4 steps": (BOUNDARY, 0.720057, 0.507301, 0.297157, 0.0),
    **{
        f"TurboWan 2.1 T2V, {n} step{'s' * (n > 1)}": (TURBO_T2V_START, *INNER[: n - 1], 0.0)
        for n in (1, 2, 3, 4)
    },
    # The high-noise expert runs while the time is 0.9 or more: two steps; the low-noise expert the
    # rest.
    "TurboWan 2.2 I2V high noise, of 3 or 4 steps": (TURBO_I2V_START, *INNER[:2]),
    "TurboWan 2.2 I2V low noise, of 3 steps": (INNER[1], 0.0),
    "TurboWan 2.2 I2V low noise, of 4 steps": (*INNER[1:], 0.0),
}


class RoPeSLRFewStepSigmas(io.ComfyNode):
    """A preset -> SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RoPeSLRFewStepSigmas",
            display_name="Few-Step Sigmas",
            category="RoPeSLR",
            description=(
                "The noise levels (sigmas) that SparkWan and TurboWan checkpoints were distilled "
                "for. Connect to SamplerCustom with CFG 1 and sampler euler (SparkWan) or lcm "
                "(TurboWan). Replaces the scheduler; ModelSamplingSD3 is not needed. Wan 2.2: one "
                "sampler per expert, the second without added noise."
            ),
            search_aliases=["sparkwan sigmas", "turbowan sigmas", "few step schedule"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="SparkWan 2.1, 4 steps",
                    tooltip=(
                        "Checkpoint family and number of steps. Fewer is faster. Each family was "
                        "trained for 1 to 4 steps (SparkWan also 8)."
                    ),
                )
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, preset: str) -> io.NodeOutput:
        """The preset's levels as float32 `(steps + 1,)`."""
        return io.NodeOutput(torch.tensor(PRESETS[preset], dtype=torch.float32))

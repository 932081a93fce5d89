"""The shipped workflows, described.

`python dev.py workflows` writes workflows/*.json from this file.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import tomllib

from graph_file import NOTE, Graph, Group, Model, Node, object_info, render
from rewrite import quiet, rewrite

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "workflows"
WAN21 = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
WAN22 = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/"
HUNYUAN = "https://huggingface.co/Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files/"
HUNYUAN15 = "https://huggingface.co/Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files/"
H3 = "https://huggingface.co/Comfy-Org/MiniMax-H3/resolve/main/"
H3_LORA = "minimax_h3_fl2v_turbo_4step_v0.1_768p_sla_comfyui_bf16"
H3_SLA = "https://huggingface.co/lightx2v/Minimax-h3-Turbo-SLA/resolve/main/"
LTX2 = "https://huggingface.co/Comfy-Org/ltx-2/resolve/main/split_files/"
LTX23 = "https://huggingface.co/Comfy-Org/ltx-2.3/resolve/main/split_files/"
LTX23_FILE = "ltx-2.3-22b-dev-fp8.safetensors"
LTX23_LORA = "ltx_2.3_22b_distilled_1.1_lora_dynamic_fro09_avg_rank_111_bf16.safetensors"
KANDINSKY = "https://huggingface.co/kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s/resolve/main/model/"
SPARK = "SparkWan2.1-T2V-1.3B-480P-0.90Sparsity"

MODELS = {
    model.name: model
    for model in (
        Model(WAN21 + "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", "diffusion_models"),
        Model(
            WAN21 + "diffusion_models/wan2.1_i2v_480p_14B_fp8_scaled.safetensors",
            "diffusion_models",
        ),
        Model(WAN21 + "diffusion_models/wan2.1_vace_1.3B_fp16.safetensors", "diffusion_models"),
        Model(WAN21 + "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders"),
        Model(WAN21 + "clip_vision/clip_vision_h.safetensors", "clip_vision"),
        Model(WAN21 + "vae/wan_2.1_vae.safetensors", "vae"),
        Model(
            WAN22 + "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
            "diffusion_models",
        ),
        Model(
            WAN22 + "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
            "diffusion_models",
        ),
        Model(WAN22 + "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors", "diffusion_models"),
        Model(WAN22 + "vae/wan2.2_vae.safetensors", "vae"),
        Model(
            HUNYUAN + "diffusion_models/hunyuan_video_t2v_720p_bf16.safetensors", "diffusion_models"
        ),
        Model(HUNYUAN + "text_encoders/clip_l.safetensors", "text_encoders"),
        Model(HUNYUAN + "text_encoders/llava_llama3_fp8_scaled.safetensors", "text_encoders"),
        Model(HUNYUAN + "vae/hunyuan_video_vae_bf16.safetensors", "vae"),
        Model(
            HUNYUAN15 + "diffusion_models/hunyuanvideo1.5_720p_t2v_fp16.safetensors",
            "diffusion_models",
        ),
        Model(HUNYUAN15 + "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors", "text_encoders"),
        Model(HUNYUAN15 + "text_encoders/byt5_small_glyphxl_fp16.safetensors", "text_encoders"),
        Model(HUNYUAN15 + "vae/hunyuanvideo15_vae_fp16.safetensors", "vae"),
        Model(
            H3 + "diffusion_models/minimax_h3_fl2va_pruned_int8_convrot.safetensors",
            "diffusion_models",
        ),
        Model(H3 + "text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors", "text_encoders"),
        Model(H3 + "vae/minimax_h3_video_vae_int8_convrot.safetensors", "vae"),
        Model(H3 + "vae/minimax_h3_audio_vae_fp32.safetensors", "vae"),
        Model(f"{H3_SLA}{H3_LORA}.safetensors", "loras"),
        Model(
            f"https://huggingface.co/Lightricks/LTX-2.3-fp8/resolve/main/{LTX23_FILE}",
            "checkpoints",
        ),
        Model(f"{LTX23}loras/{LTX23_LORA}", "loras"),
        Model(LTX2 + "text_encoders/gemma_3_12B_it_fp4_mixed.safetensors", "text_encoders"),
        Model(
            "https://huggingface.co/Lightricks/LTX-2.3/resolve/main/"
            "ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
            "latent_upscale_models",
        ),
        Model(KANDINSKY + "kandinsky5lite_t2v_sft_5s.safetensors", "diffusion_models"),
        Model(
            f"https://huggingface.co/alibabagroup/{SPARK}/resolve/main/{SPARK}.pth",
            "diffusion_models",
        ),
    )
}

FOX = (
    "a red fox runs through fresh snow at sunrise, golden light, slow camera pan, detailed fur, "
    "cinematic"
)
BOAT = (
    "a small wooden boat drifts on a misty mountain lake at dawn, ripples, soft light, slow dolly "
    "shot, cinematic"
)
CITY = (
    "a tram glides through a rainy city street at night, neon signs mirrored in the wet asphalt, "
    "people with umbrellas cross behind it, steady camera, cinematic"
)
STORM = (
    "a lighthouse on a rocky coast in a storm at dusk, waves break against the rocks and throw up "
    "spray, the beam of light sweeps through rain, the camera circles slowly. Sound: heavy surf, "
    "wind, distant thunder"
)
COOK = (
    "a cook tosses vegetables in a pan over a high flame in a busy restaurant kitchen, steam and "
    "sparks, close up, handheld camera, cinematic"
)
STREET = (
    "a street musician plays the violin under a bridge on a rainy evening, people walk by, "
    "reflections of street lamps in the puddles, slow push in. Sound: a slow violin melody, rain, "
    "footsteps"
)
WAKE = (
    "the scene of <Picture 1> comes alive: gentle wind, small natural movements, soft light, the "
    "camera moves slowly closer. Sound: quiet surroundings, a light breeze"
)
MOVE = (
    "the scene comes alive: gentle wind, the subject turns its head and looks around, soft natural "
    "light, slow zoom"
)
AVOID = "blurry, static, overexposed, low quality, jpeg artifacts, subtitles, deformed"
NOTE_WIDTH, NOTE_LETTERS, FILES_WIDTH = 440, 78, 410
GREEN, RED, BROWN = ("#232", "#353"), ("#322", "#533"), ("#432", "#653")

SLIDER = (
    "## The slider to move\n\n**sparsity** on *RoPeSLR Sparse Attention* is the share of "
    "attention that is **not** computed: 0.90 computes one block in ten. Lower is closer to the "
    "dense video, higher is faster. Leave the other settings as they are."
)
EXPECT = (
    "## What to expect\n\nThe first step runs dense, because it sets the composition. All later "
    "steps run sparse. At the end the log shows sparse and dense calls, the reason for each dense "
    "one, and the work saved. Large and long videos gain most. Below 4096 tokens everything runs "
    "dense, because there is nothing to gain."
)
COMPARE = (
    "To compare, set *backend* of the RoPeSLR node to *dense* and queue again with the same seed. "
    "Its panel then shows the time of dense attention. Bypassing the node (Ctrl+B) gives the video "
    "that you would get without it."
)
COMPARE_BOTH = (
    "To compare, set *backend* of **both** RoPeSLR nodes to *dense* and queue again with the same "
    "seed. Their panels then show the time of dense attention. Bypassing both (Ctrl+B) gives the "
    "video that you would get without them."
)


def sparse(
    key: str = "sparse", model: str = "shift", title: str | None = None, **links: str
) -> Node:
    """The pack's main node, with the defaults of its schema."""
    return Node(key, "RoPeSLRSparseAttention", links={"model": model, **links}, title=title)


def shift(model: str = "unet", value: float = 8.0, key: str = "shift") -> Node:
    return Node(key, "ModelSamplingSD3", {"shift": value}, {"model": model})


def unet(name: str, key: str = "unet", title: str | None = None) -> Node:
    return Node(key, "UNETLoader", {"unet_name": name}, title=title, width=FILES_WIDTH)


def wan_text_and_vae(vae: str = "wan_2.1_vae.safetensors") -> tuple[Node, Node]:
    clip = {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"}
    return Node("clip", "CLIPLoader", clip), Node("vae", "VAELoader", {"vae_name": vae})


def prompts(positive: str, negative: str | None = AVOID) -> Group:
    """The prompts; no negative one at CFG 1, where none is computed."""
    text = Node(
        "positive",
        "CLIPTextEncode",
        {"text": positive},
        {"clip": "clip"},
        "Prompt",
        height=190,
        colors=GREEN,
    )
    if negative is None:
        other = Node(
            "negative",
            "ConditioningZeroOut",
            links={"conditioning": "positive"},
            title="No negative prompt",
        )
    else:
        other = Node(
            "negative",
            "CLIPTextEncode",
            {"text": negative},
            {"clip": "clip"},
            "Negative prompt",
            height=130,
            colors=RED,
        )
    return Group("Prompt", (text, other))


def size(width: int, height: int, length: int, kind: str = "EmptyHunyuanLatentVideo") -> Group:
    return Group(
        "Size and length",
        (Node("latent", kind, {"width": width, "height": height, "length": length}),),
    )


def sampler(
    steps: int,
    cfg: float,
    name: str = "uni_pc",
    key: str = "sampler",
    scheduler: str = "simple",
    **links: str,
) -> Node:
    links = {
        "model": "sparse",
        "positive": "positive",
        "negative": "negative",
        "latent_image": "latent",
    } | links
    values = {"seed": 42, "steps": steps, "cfg": cfg, "sampler_name": name, "scheduler": scheduler}
    return Node(key, "KSampler", values, links)


def decode(samples: str = "sampler", key: str = "decode", title: str | None = None) -> Node:
    return Node(key, "VAEDecode", links={"samples": samples, "vae": "vae"}, title=title)


def video(name: str, fps: float, images: str = "decode", **links: str) -> tuple[Group, ...]:
    """The last column; links: of the sound, if there is one."""
    save = Node(
        "save", "SaveVideo", {"filename_prefix": f"video/ropeslr_{name}"}, {"video": "video"}
    )
    create = Node("video", "CreateVideo", {"fps": fps}, {"images": images, **links})
    return (Group("Video", (create, save)),)


def start_image(bypassed: bool = False, title: str = "Start image") -> Node:
    """example.png lies in the input folder of every ComfyUI."""
    return Node(
        "image", "LoadImage", {"image": "example.png"}, title=title, height=330, bypassed=bypassed
    )


def graph(
    name: str,
    title: str,
    story: str,
    *columns: tuple[Group, ...],
    advice: str = f"{SLIDER}\n\n{EXPECT}\n\n{COMPARE}",
) -> Graph:
    """A graph with its read-me in front: story, downloads, and advice on settings and results."""
    nodes = [node for column in columns for group in column for node in group.nodes]
    used = [value for node in nodes for value in node.values.values()]
    wanted = [value for node in nodes if node.bypassed for value in node.values.values()]
    files = [MODELS[value] for value in dict.fromkeys(map(str, used)) if value in MODELS]
    downloads = "\n".join(
        f"* [{each.name}]({each.url}) into **models/{each.directory}**"
        + (" (if wanted)" if each.name in wanted else "")
        for each in files
    )
    text = (
        f"# {title}\n\n{story}\n\n## What to download\n\nComfyUI offers to download missing files "
        f"when you open the workflow. By hand:\n\n{downloads}\n\n{advice}"
    )
    note = Node(
        "read_me",
        NOTE,
        {"text": text},
        title="Read me",
        height=_tall(text),
        width=NOTE_WIDTH,
        colors=BROWN,
    )
    return Graph(name, ((Group(None, (note,)),), *columns))


def _tall(text: str) -> int:
    """About the height a note needs: its lines, and the room of headings and paragraphs."""
    lines = [line for line in text.split("\n") if line]
    shown = [re.sub(r"\]\(\S*\)", "", line) for line in lines]  # a link's address is not shown
    rows = sum(-(-len(line) // NOTE_LETTERS) for line in shown)
    return (
        80 + 12 * rows + 10 * sum(not line.startswith("* ") for line in lines) + 8 * text.count("#")
    )


def wan21_t2v() -> Graph:
    return graph(
        "wan2.1_t2v",
        "Wan 2.1 text to video",
        "The smallest Wan: a good first run. **RoPeSLR Sparse Attention** goes between the model "
        "and the sampler; LoRAs go before or after it.",
        (
            Group("Models", (unet("wan2.1_t2v_1.3B_fp16.safetensors"), *wan_text_and_vae())),
            size(832, 480, 81),
        ),
        (prompts(FOX),),
        (Group("Sparse attention", (shift(), sparse())),),
        (Group("Sampling", (sampler(30, 6.0), decode())),),
        video("wan2.1_t2v", 16.0),
    )


def wan21_i2v() -> Graph:
    look = Node("clip_vision", "CLIPVisionLoader", {"clip_name": "clip_vision_h.safetensors"})
    seen = Node(
        "seen",
        "CLIPVisionEncode",
        {"crop": "none"},
        {"clip_vision": "clip_vision", "image": "image.IMAGE"},
    )
    latent = Node(
        "latent",
        "WanImageToVideo",
        {"width": 832, "height": 480, "length": 81},
        {
            "positive": "positive",
            "negative": "negative",
            "vae": "vae",
            "clip_vision_output": "seen",
            "start_image": "image.IMAGE",
        },
    )
    taken = {name: f"latent.{name}" for name in ("positive", "negative")} | {
        "latent_image": "latent.latent"
    }
    return graph(
        "wan2.1_i2v",
        "Wan 2.1 image to video",
        "Choose a picture in *Start image* and describe what should happen. Match *width* and "
        "*height* to its shape; the rest is cropped.",
        (
            Group(
                "Models",
                (unet("wan2.1_i2v_480p_14B_fp8_scaled.safetensors"), *wan_text_and_vae(), look),
            ),
            Group("Picture", (start_image(),)),
        ),
        (prompts(MOVE), Group("Picture and size", (seen, latent))),
        (Group("Sparse attention", (shift(), sparse())),),
        (Group("Sampling", (sampler(20, 6.0, **taken), decode())),),
        video("wan2.1_i2v", 16.0),
    )


def expert(key: str, start: int, end: int, latent: str) -> Node:
    """One of the two samplers; the second goes on from the noise that the first leaves."""
    first = start == 0
    values = {
        "add_noise": "enable" if first else "disable",
        "noise_seed": 42,
        "steps": 20,
        "cfg": 3.5,
        "sampler_name": "euler",
        "scheduler": "simple",
        "start_at_step": start,
        "end_at_step": end,
        "return_with_leftover_noise": "enable" if first else "disable",
    }
    links = {
        "model": f"sparse_{key}",
        "positive": "positive",
        "negative": "negative",
        "latent_image": latent,
    }
    return Node(f"sampler_{key}", "KSamplerAdvanced", values, links, f"Sampler, {key} noise")


def wan22_a14b() -> Graph:
    files = [
        unet(
            f"wan2.2_t2v_{key}_noise_14B_fp8_scaled.safetensors",
            f"unet_{key}",
            f"Model, {key} noise",
        )
        for key in ("high", "low")
    ]
    high, low = (
        (
            Group(
                f"Sparse attention, {key} noise",
                (
                    shift(f"unet_{key}", 8.0, f"shift_{key}"),
                    sparse(f"sparse_{key}", f"shift_{key}"),
                ),
            ),
        )
        for key in ("high", "low")
    )
    return graph(
        "wan2.2_a14b_t2v",
        "Wan 2.2 text to video, two experts",
        "Wan 2.2 A14B is two models: one for high noise, which runs the first half of the steps, "
        "and one for low noise. **Each has its own RoPeSLR node.** Steps are counted over both "
        "samplers, so *dense_first_steps* means the first steps of the whole run; give both nodes "
        "the same value.",
        (Group("Models", (*files, *wan_text_and_vae())), size(832, 480, 81)),
        (prompts(CITY),),
        high,
        low,
        (
            Group(
                "Sampling",
                (expert("high", 0, 10, "latent"), expert("low", 10, 10000, "sampler_high")),
            ),
        ),
        (Group("Decoding", (decode("sampler_low"),)), *video("wan2.2_a14b_t2v", 16.0)),
        advice=f"{SLIDER}\n\n{EXPECT}\n\n{COMPARE_BOTH}",
    )


def wan22_5b() -> Graph:
    latent = Node(
        "latent",
        "Wan22ImageToVideoLatent",
        {"width": 1280, "height": 704, "length": 121},
        {"vae": "vae", "start_image": "image.IMAGE"},
    )
    return graph(
        "wan2.2_5b",
        "Wan 2.2 5B, text or image to video",
        "Text to video as it is. For image to video, turn on *Start image* (select it, Ctrl+B) "
        "and choose a picture.",
        (
            Group(
                "Models",
                (
                    unet("wan2.2_ti2v_5B_fp16.safetensors"),
                    *wan_text_and_vae("wan2.2_vae.safetensors"),
                ),
            ),
            Group("Picture, if wanted", (start_image(bypassed=True),)),
        ),
        (prompts(BOAT), Group("Size and length", (latent,))),
        (Group("Sparse attention", (shift(), sparse())),),
        (Group("Sampling", (sampler(20, 5.0), decode())),),
        video("wan2.2_5b", 24.0),
    )


def wan21_vace() -> Graph:
    control = Node(
        "control",
        "WanVaceToVideo",
        {"width": 832, "height": 480, "length": 81},
        {
            "positive": "positive",
            "negative": "negative",
            "vae": "vae",
            "reference_image": "image.IMAGE",
        },
    )
    taken = {name: f"control.{name}" for name in ("positive", "negative")} | {
        "latent_image": "control.latent"
    }
    trim = Node(
        "trim",
        "TrimVideoLatent",
        links={"samples": "sampler", "trim_amount": "control.trim_latent"},
    )
    return graph(
        "wan2.1_vace",
        "Wan 2.1 VACE, reference to video",
        "The picture in *Reference image* shows the subject of the video. For a control video "
        "(depth, pose, edges) or a mask, use the inputs *control_video* and *control_masks* of "
        "**WanVaceToVideo**. VACE's control blocks run sparse too.",
        (
            Group("Models", (unet("wan2.1_vace_1.3B_fp16.safetensors"), *wan_text_and_vae())),
            Group("Picture", (start_image(title="Reference image"),)),
        ),
        (prompts(MOVE), Group("Control and size", (control,))),
        (Group("Sparse attention", (shift(), sparse())),),
        (Group("Sampling", (sampler(20, 6.0, **taken), trim, decode("trim"))),),
        video("wan2.1_vace", 16.0),
    )


def hunyuan_t2v() -> Graph:
    clip = Node(
        "clip",
        "DualCLIPLoader",
        {
            "clip_name1": "clip_l.safetensors",
            "clip_name2": "llava_llama3_fp8_scaled.safetensors",
            "type": "hunyuan_video",
        },
    )
    sampling = (
        Node("noise", "RandomNoise", {"noise_seed": 42}),
        Node("guider", "BasicGuider", links={"model": "sparse", "conditioning": "guidance"}),
        Node("euler", "KSamplerSelect", {"sampler_name": "euler"}),
        Node("steps", "BasicScheduler", {"scheduler": "simple", "steps": 20}, {"model": "sparse"}),
        Node(
            "sampler",
            "SamplerCustomAdvanced",
            links={
                "noise": "noise",
                "guider": "guider",
                "sampler": "euler",
                "sigmas": "steps",
                "latent_image": "latent",
            },
        ),
        Node(
            "decode",
            "VAEDecodeTiled",
            {"tile_size": 256},
            {"samples": "sampler.output", "vae": "vae"},
        ),
    )
    text = Node(
        "positive",
        "CLIPTextEncode",
        {"text": CITY},
        {"clip": "clip"},
        "Prompt",
        height=190,
        colors=GREEN,
    )
    guidance = Node("guidance", "FluxGuidance", {"guidance": 6.0}, {"conditioning": "positive"})
    return graph(
        "hunyuanvideo_t2v",
        "HunyuanVideo text to video",
        "HunyuanVideo takes guidance as an input, so there is no negative prompt. Text tokens are "
        "always kept and dense; only attention within the video is sparse.",
        (
            Group(
                "Models",
                (
                    unet("hunyuan_video_t2v_720p_bf16.safetensors"),
                    clip,
                    Node("vae", "VAELoader", {"vae_name": "hunyuan_video_vae_bf16.safetensors"}),
                ),
            ),
            size(848, 480, 73),
        ),
        (Group("Prompt", (text, guidance)),),
        (Group("Sparse attention", (shift(value=7.0), sparse())),),
        (Group("Sampling", sampling),),
        video("hunyuanvideo_t2v", 24.0),
    )


def hunyuan15_t2v() -> Graph:
    clip = Node(
        "clip",
        "DualCLIPLoader",
        {
            "clip_name1": "qwen_2.5_vl_7b_fp8_scaled.safetensors",
            "clip_name2": "byt5_small_glyphxl_fp16.safetensors",
            "type": "hunyuan_video_15",
        },
    )
    return graph(
        "hunyuanvideo1.5_t2v",
        "HunyuanVideo 1.5 text to video",
        "Every latent pixel is a token: five seconds of 720p are more than 100,000, so attention "
        "takes most of the time. Lower *width* and *height* for a first try.",
        (
            Group(
                "Models",
                (
                    unet("hunyuanvideo1.5_720p_t2v_fp16.safetensors"),
                    clip,
                    Node("vae", "VAELoader", {"vae_name": "hunyuanvideo15_vae_fp16.safetensors"}),
                ),
            ),
            size(1280, 720, 121, "EmptyHunyuanVideo15Latent"),
        ),
        (prompts(BOAT, ""),),
        (Group("Sparse attention", (shift(value=7.0), sparse())),),
        (Group("Sampling", (sampler(20, 6.0, "euler"), decode())),),
        video("hunyuanvideo1.5_t2v", 24.0),
    )


def sparkwan() -> Graph:
    sampling = (
        Node("sigmas", "RoPeSLRFewStepSigmas"),
        Node("euler", "KSamplerSelect", {"sampler_name": "euler"}),
        Node(
            "sampler",
            "SamplerCustom",
            {"noise_seed": 42, "cfg": 1.0},
            {
                "model": "sparse",
                "positive": "positive",
                "negative": "negative",
                "sampler": "euler",
                "sigmas": "sigmas",
                "latent_image": "latent",
            },
        ),
        decode("sampler.output"),
    )
    return graph(
        "sparkwan_few_step",
        "SparkWan: four steps, trained sparse",
        "A Wan 2.1 that was trained with sparse attention (RoLA) and distilled to four steps. "
        "**Load Sparse Checkpoint** outputs the model and its sparse-attention weights; connect "
        "both to the RoPeSLR node. **Few-Step Sigmas** replaces the scheduler. Keep CFG at 1 and "
        "the sampler at euler. For TurboWan, choose its sigmas and the sampler lcm.",
        (
            Group(
                "Models",
                (
                    Node(
                        "checkpoint",
                        "RoPeSLRLoadSparseCheckpoint",
                        {"checkpoint": f"{SPARK}.pth"},
                        width=FILES_WIDTH,
                    ),
                    *wan_text_and_vae(),
                ),
            ),
            size(832, 480, 81),
        ),
        (prompts(FOX, None),),
        (
            Group(
                "Sparse attention",
                (sparse(model="checkpoint.MODEL", adapter="checkpoint.adapter"),),
            ),
        ),
        (Group("Sampling", sampling),),
        video("sparkwan_few_step", 16.0),
        advice=(
            "## The setting that matters\n\nKeep **sparsity** on *RoPeSLR Sparse Attention* at the "
            "value in the file's name: the model was trained with it. Leave the other settings as "
            "they are.\n\n## What to expect\n\nEvery step runs sparse, including the first. At the "
            "end the log shows what ran sparse and the work saved."
        ),
    )


def adapter_on_stock() -> Graph:
    return graph(
        "adapter_on_stock_model",
        "An adapter on a stock model",
        "**Load RoPeSLR Adapter** lists the files in **models/ropeslr**: trained sparse-attention "
        "weights for a model you already have. None have been published for stock models yet. The "
        "first entry, *none (training-free)*, runs without weights, so this workflow works before "
        "you have any. An adapter for another model stops with an error that names both.",
        (
            Group(
                "Models",
                (
                    unet("wan2.1_t2v_1.3B_fp16.safetensors"),
                    *wan_text_and_vae(),
                    Node("adapter", "RoPeSLRLoadAdapter"),
                ),
            ),
            size(832, 480, 81),
        ),
        (prompts(BOAT),),
        (Group("Sparse attention", (shift(), sparse(adapter="adapter"))),),
        (Group("Sampling", (sampler(30, 6.0), decode())),),
        video("adapter_on_stock_model", 16.0),
    )


TRAINING_TAKES = (
    "## Training takes long\n\nCount on the time of about 90 dense videos of this size: 24 are "
    "made to learn from, and each of 300 training steps takes about as long as 4 sampling steps. "
    "These figures are counted, not measured. To find out first whether it runs on your card, set "
    '*steps* to 16, *samples* to 6 and *name* to "try".\n\nStop it whenever you like: what was '
    "learned is saved. Queue again with the same settings, and it goes on. Only the videos to "
    "learn from are made anew if it was stopped while it made them, or if ComfyUI was restarted."
)
BOTH_SLIDERS = (
    "## The slider to move\n\n**sparsity** stands on *Train Sparse LoRA* and on *RoPeSLR Sparse "
    "Attention*: it is the share of attention that is **not** computed. The LoRA fits the value "
    "that it was trained with, so give both nodes the same. *cfg* stands on *Train Sparse LoRA* "
    "and on *SamplerCustom*; the same goes for it.\n\nPrompts 1 to 4 are what it learns from. "
    "Choose such as you will use, and join more with further *Conditioning (Combine)* nodes."
)
TRAINING_GIVES = (
    "## What to expect\n\nThe line under *Train Sparse LoRA* shows the time left and the "
    "**held-out error**: how far sparse is from dense on videos that it does not learn from. Below "
    "100 % the LoRA helps; where it never gets there, it changes nothing, and none is saved as "
    "finished. The graph below shows the loss, which jumps, because every step has other "
    "examples. The video is of prompt 1, with noise that was not trained on. To see what the LoRA "
    "does, set *strength_model* of *Load LoRA Model* to 0 and queue again: ComfyUI keeps what was "
    "trained."
)
TRAINED_ONCE = (
    "## Later\n\nTrain once; other workflows need only the two files. Remove *Train Sparse LoRA*, "
    "*Load LoRA Model* and *Plot Loss Graph*. Load **models/loras/sparse_lora.safetensors** with "
    "any LoRA loader at strength 1, and **sparse_lora.safetensors** with *Load RoPeSLR Adapter*, "
    "which you connect to *adapter*. With another *name*, the files have that."
)


def train_sparse_lora() -> Graph:
    """Two parts with the same latent, noise levels and sampler: a training, and a video with it."""

    def text(key: str, title: str, words: str, colors: tuple[str, str]) -> Node:
        links = {"clip": "clip"}
        return Node(key, "CLIPTextEncode", {"text": words}, links, title, height=130, colors=colors)

    def join(key: str, first: str, second: str) -> Node:
        links = {"conditioning_1": first, "conditioning_2": second}
        return Node(key, "ConditioningCombine", links=links)

    cfg = {"cfg": 6.0}
    alike = {"negative": "negative", "sampler": "kind", "sigmas": "sigmas"}
    words = (
        text("positive", "Prompt 1, also of the video", FOX, GREEN),
        text("prompt_2", "Prompt 2", BOAT, GREEN),
        text("prompt_3", "Prompt 3", CITY, GREEN),
        text("prompt_4", "Prompt 4", COOK, GREEN),
        text("negative", "Negative prompt", AVOID, RED),
    )
    # Each entry of a conditioning is a prompt for the training, so that combining makes a list.
    together = (
        join("first", "positive", "prompt_2"),
        join("last", "prompt_3", "prompt_4"),
        join("prompts", "first", "last"),
    )
    levels = Node("sigmas", "BasicScheduler", {"scheduler": "simple"}, {"model": "shift"})
    train = Node(
        "train",
        "RoPeSLRTrainSparseLoRA",
        {
            "steps": 300,
            "batch_size": 2,
            "rank": 16,
            "learning_rate": 0.001,
            "samples": 24,
            **cfg,
        },
        {"model": "shift", "latents": "latent", "positive": "prompts", **alike},
    )
    lora = Node("lora", "LoraModelLoader", links={"model": "shift", "lora": "train.lora"})
    sampler = Node(
        "sampler",
        "SamplerCustom",
        {"noise_seed": 42, **cfg},
        {"model": "sparse", "positive": "positive", "latent_image": "latent", **alike},
    )
    return graph(
        "train_sparse_lora",
        "Train a sparse LoRA, then use it",
        "A LoRA that makes sparse attention look more like dense attention, trained on your own "
        "card for your model, sampler and size. **Train Sparse LoRA** makes videos of your prompts "
        "with the dense model, learns from them, and saves a LoRA and an adapter. The nodes to the "
        "right of it then make a video with both. Nothing but the model is downloaded.",
        (
            Group("Models", (unet("wan2.1_t2v_1.3B_fp16.safetensors"), *wan_text_and_vae())),
            size(832, 480, 81),
        ),
        (Group("Prompts to learn from", words),),
        (
            Group("All prompts", together),
            Group(
                "The same for both",
                (shift(), Node("kind", "KSamplerSelect", {"sampler_name": "euler"}), levels),
            ),
        ),
        (
            Group("Training", (train,)),
            Group("Loss", (Node("loss", "LossGraphNode", links={"loss": "train.loss_map"}),)),
        ),
        (
            Group(
                "Sparse attention with the LoRA",
                (lora, sparse(model="lora", adapter="train.adapter")),
            ),
        ),
        (Group("Sampling", (sampler, decode("sampler.output"))),),
        video("train_sparse_lora", 16.0),
        advice=f"{TRAINING_TAKES}\n\n{BOTH_SLIDERS}\n\n{TRAINING_GIVES}\n\n{TRAINED_ONCE}",
    )


def dense_vs_sparse() -> Graph:
    seed = Group("The same for both", (Node("seed", "PrimitiveInt", {"value": 42}, title="Seed"),))
    samplers = (
        Group(
            "Dense",
            (
                replace(
                    sampler(30, 6.0, key="dense", model="shift", seed="seed"),
                    title="Sampler, dense",
                ),
                decode("dense", "decode_dense", "Decode, dense"),
            ),
        ),
        Group(
            "Sparse",
            (
                replace(sampler(30, 6.0, seed="seed"), title="Sampler, sparse"),
                decode("sampler", "decode_sparse", "Decode, sparse"),
            ),
        ),
    )
    stitch = Node(
        "stitch",
        "ImageStitch",
        links={"image1": "decode_dense", "image2": "decode_sparse"},
        title="Side by side",
    )
    report = Node(
        "report",
        "RoPeSLRReport",
        {"compare": "all methods"},
        {"latent": "sampler", "model": "sparse", "positive": "positive"},
        title="Which method suits this model?",
        width=620,
        height=560,
    )
    return graph(
        "dense_vs_sparse",
        "Dense against sparse",
        "The same model, seed and prompts, sampled without and with the RoPeSLR node. The video "
        "shows **dense on the left, sparse on the right**. ComfyUI caches the dense result, so "
        "moving a slider recomputes only the sparse half. Give both samplers the same steps and "
        "cfg.\n\n**RoPeSLR Report** draws what the sparse run did, and every method's error "
        "against dense attention on this model. That takes a few extra steps; set *compare* to "
        "off to skip it.",
        (
            Group("Models", (unet("wan2.1_t2v_1.3B_fp16.safetensors"), *wan_text_and_vae())),
            size(832, 480, 81),
            seed,
        ),
        (prompts(FOX),),
        (Group("Sparse attention", (shift(), sparse())),),
        samplers,
        (Group("Side by side", (stitch,)), *video("dense_vs_sparse", 16.0, "stitch")),
        (Group("Report", (report,)),),
        advice=(
            f"{SLIDER}\n\n## What to expect\n\nAt 0.90 look for small differences in fine texture "
            "and fast motion. The progress bar shows each sampler's time; the first run also loads "
            "the model, so compare the second. The log shows the work saved."
        ),
    )


def minimax_h3_t2v() -> Graph:
    lora = Node(
        "lora",
        "LoraLoaderModelOnly",
        {"lora_name": f"{H3_LORA}.safetensors"},
        {"model": "unet"},
        "Turbo-SLA LoRA",
        width=FILES_WIDTH,
        bypassed=True,
    )
    shift = Node(
        "shift",
        "MiniMaxH3SigmaShift",
        {"shift_video": 6.0, "shift_audio": 3.0},
        {"model": "lora"},
        bypassed=True,
    )
    return graph(
        "minimax_h3_t2v",
        "MiniMax H3 text to video",
        "MiniMax H3 makes a video and its sound together. Describe both in the prompt. *length* "
        "counts frames, 24 a second; the model makes 17k + 5 of them, such as 124, 243 or 362.",
        (*minimax_h3_files(), Group("Four steps, if wanted", (lora, shift))),
        (minimax_h3_prompt(STORM, 864, 480),),
        (Group("Sparse attention", (sparse(),)),),
        (minimax_h3_sampling(),),
        (sound_and_pictures(), *video("minimax_h3_t2v", 24.0, audio="decode_sound")),
        advice=(
            f"{SLIDER}\n\n{EXPECT} Text and sound always attend exactly.\n\n{H3_GAIN}\n\n"
            f"{COMPARE}\n\n{H3_FOUR_STEPS}"
        ),
    )


def minimax_h3_i2v() -> Graph:
    return graph(
        "minimax_h3_i2v",
        "MiniMax H3 image to video",
        "Choose a picture in *Start image*; in the prompt it is `<Picture 1>`. Describe what "
        "happens and what it sounds like. Match *width* and *height* to the picture's shape, or it "
        "is stretched. For a last frame too, connect a second picture to *last_frame*.",
        (*minimax_h3_files(), Group("Picture", (start_image(),))),
        (minimax_h3_prompt(WAKE, 640, 640, first_frame="image.IMAGE"),),
        (Group("Sparse attention", (sparse(model="unet"),)),),
        (minimax_h3_sampling(),),
        (sound_and_pictures(), *video("minimax_h3_i2v", 24.0, audio="decode_sound")),
        advice=(
            f"{SLIDER}\n\n{EXPECT} Text, sound and the given frames always attend exactly.\n\n"
            f"{H3_GAIN}\n\n{COMPARE}"
        ),
    )


H3_GAIN = (
    "By count of operations, attention is about 37 % of a step at this size, so a step becomes "
    "**at most 1.5 times** faster. At 1344 x 768 it is at most 2 times for 124 frames, 2.8 times "
    "for 243 and 3.5 times for 362. These figures are counted, not measured."
)
H3_FOUR_STEPS = (
    "## Four steps\n\n*Turbo-SLA* by lightx2v is a LoRA for four steps, trained with 85 % of "
    "attention left out, for videos of 768 pixels on the short side. To try it, turn on both nodes "
    "of its group (select them, Ctrl+B), set *steps* to 4 and the sampler to euler. The panel of "
    "the RoPeSLR node then offers what it was trained with: click *Use its settings* (top-k plain, "
    "sparsity 0.85, raster order, blocks of 64, every head alike, no dense step). In addition, "
    "text and sound stay exact. We have not opened this file, so whether it loads and how it looks "
    "is untested."
)


def minimax_h3_files() -> tuple[Group, ...]:
    clip = {"clip_name": "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors", "type": "minimax"}
    files = (
        unet("minimax_h3_fl2va_pruned_int8_convrot.safetensors"),
        Node("clip", "CLIPLoader", clip),
        Node("vae", "VAELoader", {"vae_name": "minimax_h3_video_vae_int8_convrot.safetensors"}),
        Node(
            "sound_vae",
            "VAELoader",
            {"vae_name": "minimax_h3_audio_vae_fp32.safetensors"},
            title="Load VAE, sound",
        ),
    )
    return (Group("Models", files),)


def minimax_h3_prompt(text: str, width: int, height: int, **frames: str) -> Group:
    node = Node(
        "latent",
        "MiniMaxH3ImageToVideo",
        {"prompt": text, "width": width, "height": height, "length": 124},
        {"clip": "clip", "vae": "vae", **frames},
        height=420,
        colors=GREEN,
    )
    return Group("Prompt, size and length", (node,))


def minimax_h3_sampling() -> Group:
    return Group(
        "Sampling",
        (
            Node("noise", "RandomNoise", {"noise_seed": 42}),
            Node(
                "guider",
                "BasicGuider",
                links={"model": "sparse", "conditioning": "latent.positive"},
            ),
            Node("kind", "KSamplerSelect", {"sampler_name": "res_multistep"}),
            Node(
                "sigmas",
                "BasicScheduler",
                {"scheduler": "simple", "steps": 20},
                {"model": "sparse"},
            ),
            custom_sampler("latent.LATENT"),
        ),
    )


def sound_and_pictures() -> Group:
    sound = Node(
        "decode_sound",
        "VAEDecodeAudio",
        links={"samples": "sampler.output", "vae": "sound_vae"},
    )
    return Group("Decoding", (decode("sampler.output"), sound))


def custom_sampler(latent: str, key: str = "sampler", title: str | None = None, **parts) -> Node:
    """The advanced sampler; parts: nodes that it takes others from than those with these keys."""
    links = {"noise": "noise", "guider": "guider", "sampler": "kind", "sigmas": "sigmas"} | parts
    return Node(key, "SamplerCustomAdvanced", links=links | {"latent_image": latent}, title=title)


def ltx2_two_stage() -> Graph:
    def stage(number: int, seed: int, levels: str, *nodes: Node, latent: str) -> Group:
        key, title = f"sampler_{number}", f"Sampler, stage {number}"
        parts = {"noise": f"noise_{number}", "sigmas": f"sigmas_{number}"}
        own = (
            Node(f"noise_{number}", "RandomNoise", {"noise_seed": seed}),
            Node(f"sigmas_{number}", "ManualSigmas", {"sigmas": levels}),
            custom_sampler(latent, key, title, **parts),
            Node(
                f"parts_{number}",
                "LTXVSeparateAVLatent",
                links={"av_latent": f"{key}.output"},
            ),
        )
        return Group(f"Stage {number}", (*nodes, *own))

    def joined(number: int, pictures: str, sound: str) -> Node:
        links = {"video_latent": pictures, "audio_latent": sound}
        return Node(f"both_{number}", "LTXVConcatAVLatent", links=links)

    files = (
        Node("checkpoint", "CheckpointLoaderSimple", {"ckpt_name": LTX23_FILE}, width=FILES_WIDTH),
        Node(
            "lora",
            "LoraLoaderModelOnly",
            {"lora_name": LTX23_LORA, "strength_model": 0.5},
            {"model": "checkpoint.MODEL"},
            "Distilled LoRA",
            width=FILES_WIDTH,
        ),
        Node(
            "clip",
            "LTXAVTextEncoderLoader",
            {
                "text_encoder": "gemma_3_12B_it_fp4_mixed.safetensors",
                "ckpt_name": LTX23_FILE,
            },
        ),
        Node("sound_vae", "LTXVAudioVAELoader", {"ckpt_name": LTX23_FILE}),
        Node(
            "upscaler",
            "LatentUpscaleModelLoader",
            {"model_name": "ltx-2.3-spatial-upscaler-x2-1.1.safetensors"},
        ),
    )
    half = (
        Node("frames", "PrimitiveInt", {"value": 121}, title="Frames (8k + 1)"),
        Node(
            "pictures",
            "EmptyLTXVLatentVideo",
            {"width": 640, "height": 352, "length": 121},
            {"length": "frames"},
            "Half of width and height",
        ),
        Node(
            "sound",
            "LTXVEmptyLatentAudio",
            {"frame_rate": 25.0, "frames_number": 121},
            {"audio_vae": "sound_vae", "frames_number": "frames"},
        ),
    )
    text = prompts(STREET, None)
    rate = Node(
        "rate",
        "LTXVConditioning",
        {"frame_rate": 25.0},
        {"positive": "positive", "negative": "negative"},
    )
    guided = {"model": "sparse", "positive": "rate.positive", "negative": "rate.negative"}
    both = (
        Node("guider", "CFGGuider", {"cfg": 1.0}, guided),
        Node("kind", "KSamplerSelect", {"sampler_name": "euler"}),
    )
    larger = Node(
        "larger",
        "LTXVLatentUpsampler",
        links={
            "samples": "parts_1.video_latent",
            "upscale_model": "upscaler",
            "vae": "checkpoint.VAE",
        },
    )
    tiles = {"tile_size": 768, "overlap": 64, "temporal_size": 4096, "temporal_overlap": 4}
    decoding = (
        Node(
            "decode",
            "VAEDecodeTiled",
            tiles,
            {"samples": "parts_2.video_latent", "vae": "checkpoint.VAE"},
        ),
        Node(
            "decode_sound",
            "LTXVAudioVAEDecode",
            links={"samples": "parts_2.audio_latent", "audio_vae": "sound_vae"},
        ),
    )
    return graph(
        "ltx2_two_stage_t2v",
        "LTX-2.3 text to video, two stages",
        "LTX-2.3 makes a video and its sound together: eight steps at half of the width and "
        "height, then three at full size. **One RoPeSLR node serves both stages**, which use the "
        "same model. *Half of width and height* is the size of stage 1; the video has twice as "
        "much each way.",
        (Group("Models", files), Group("Size and length", half)),
        (replace(text, nodes=(*text.nodes, rate)),),
        (Group("Sparse attention", (sparse(model="lora"),)), Group("For both stages", both)),
        (
            stage(
                1,
                42,
                "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0",
                joined(1, "pictures", "sound"),
                latent="both_1",
            ),
        ),
        (
            stage(
                2,
                42,
                "0.85, 0.7250, 0.4219, 0.0",
                larger,
                joined(2, "larger", "parts_1.audio_latent"),
                latent="both_2",
            ),
        ),
        (
            Group("Decoding", decoding),
            *video("ltx2_two_stage_t2v", 25.0, audio="decode_sound"),
        ),
        advice=f"{SLIDER}\n\n{LTX2_EXPECT}\n\n{COMPARE}",
    )


LTX2_EXPECT = (
    "## What to expect\n\n**At this size little is gained.** Stage 1 has 3,520 tokens, fewer than "
    "*min_tokens* (4096), and runs dense. Stage 2 has 14,080 and runs sparse from its first step, "
    "because the composition is set by then; the panel's estimate is for this stage. Attention is "
    "about 30 % of its steps, so a step becomes **at most 1.4 times** faster. At 1920 x 1088 (960 "
    "x 544 in stage 1) that is at most 1.9 times for 121 frames, 2.6 for 249 and 3.7 for 497. "
    "These figures are by count of operations, not measured.\n\nSound, and all attention between "
    "sound, text and video, stays dense. The log has a line for each stage; the panel shows the "
    "last."
)


def kandinsky5_t2v() -> Graph:
    clip = Node(
        "clip",
        "DualCLIPLoader",
        {
            "clip_name1": "qwen_2.5_vl_7b_fp8_scaled.safetensors",
            "clip_name2": "clip_l.safetensors",
            "type": "kandinsky5",
        },
    )
    latent = Node(
        "latent",
        "Kandinsky5ImageToVideo",
        {"width": 768, "height": 512, "length": 121},
        {"positive": "positive", "negative": "negative", "vae": "vae"},
    )
    taken = {name: f"latent.{name}" for name in ("positive", "negative")} | {
        "latent_image": "latent.latent"
    }
    return graph(
        "kandinsky5_t2v",
        "Kandinsky 5 Lite text to video",
        "A small model with long sequences: attention is most of its work, which is where the node "
        "helps. This file is for five seconds at about 768 x 512. For ten seconds, load the 10 s "
        "model, set *length* to 241 and use sides that 128 divides.",
        (
            Group(
                "Models",
                (
                    unet("kandinsky5lite_t2v_sft_5s.safetensors"),
                    clip,
                    Node("vae", "VAELoader", {"vae_name": "hunyuan_video_vae_bf16.safetensors"}),
                ),
            ),
        ),
        (prompts(BOAT, ""), Group("Size and length", (latent,))),
        (Group("Sparse attention", (shift(value=5.0), sparse())),),
        (
            Group(
                "Sampling",
                (sampler(50, 5.0, "euler_ancestral", scheduler="beta", **taken), decode()),
            ),
        ),
        video("kandinsky5_t2v", 24.0),
        advice=f"{SLIDER}\n\n{EXPECT}\n\n{KANDINSKY_GAIN}\n\n{COMPARE}",
    )


KANDINSKY_GAIN = (
    "By count of operations, attention is about 79 % of a step at this size (48,000 tokens), so a "
    "step becomes **at most 3.4 times** faster, and at most 4.8 times for ten seconds. These "
    "figures are counted, not measured."
)


GRAPHS = {
    each.name: each
    for each in (
        wan21_t2v(),
        wan21_i2v(),
        wan22_a14b(),
        wan22_5b(),
        wan21_vace(),
        hunyuan_t2v(),
        hunyuan15_t2v(),
        sparkwan(),
        adapter_on_stock(),
        dense_vs_sparse(),
        minimax_h3_t2v(),
        minimax_h3_i2v(),
        ltx2_two_stage(),
        kandinsky5_t2v(),
        train_sparse_lora(),
    )
}


def workflows() -> dict[str, dict]:
    """Every workflow by its name, in the UI format."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = object_info()
    return {name: render(each, info, MODELS, project["version"]) for name, each in GRAPHS.items()}


def text_of(workflow: dict) -> str:
    """A workflow as it stands in its file."""
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    quiet()
    found = [
        rewrite(FOLDER / f"{name}.json", text_of(graph)) for name, graph in workflows().items()
    ]
    if not any(found):
        print("nothing to change: every workflow is as it is described")


if __name__ == "__main__":
    main()

"""The Doctor node, inside ComfyUI."""

import pytest

import comfy_host


def test_it_tells_about_this_machine_with_no_model_at_all():
    comfy_host.pack()
    (text,) = comfy_host.run_node("RoPeSLRDoctor", width=128, height=128, length=17, seconds=1)
    import comfyui_version

    assert text.startswith(f"ComfyUI: {comfyui_version.__version__}, dense attention by attention_")
    assert text.count(", right") == 4 and "320 tokens" in text


def test_the_size_is_counted_in_tokens_of_the_model():
    (text,) = comfy_host.run_node(
        "RoPeSLRDoctor", model_kind="Wan 2.2 5B", width=256, height=256, length=17, seconds=1
    )
    assert "320 tokens" in text


@pytest.mark.parametrize(
    "kind, size, grid",
    [
        ("Wan 2.1, Wan 2.2 14B", (832, 480, 81), (21, 30, 52)),
        ("MiniMax H3", (1344, 768, 124), (37, 24, 42)),
        ("LTX-2, LTX-Video", (1280, 704, 121), (16, 22, 40)),
        ("Kandinsky 5, Cosmos Predict2", (768, 512, 121), (31, 32, 48)),
        ("Mochi", (848, 480, 163), (28, 30, 53)),
        ("CogVideoX", (720, 480, 49), (13, 30, 45)),
        ("CogVideoX 1.5", (1360, 768, 81), (11, 48, 85)),
    ],
)
def test_every_kind_of_model_cuts_a_video_in_its_own_way(kind, size, grid):
    comfy_host.pack()
    assert comfy_host.module(".nodes.doctor").TOKENS[kind].grid(*size) == grid

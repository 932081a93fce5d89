"""The Doctor node, inside ComfyUI."""

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

"""What the tests share. host: inside ComfyUI; data: inputs and files; oracle: slow answers that are surely right."""

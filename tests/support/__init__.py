"""What the tests share.

Host: inside ComfyUI; data: inputs and files; oracle: slow answers that are surely right.
"""

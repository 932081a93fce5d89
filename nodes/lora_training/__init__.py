"""From a MODEL, prompts and latents to a LoRA that was trained through sparse attention."""

from .session import Asked, Trained, train_sparse_lora

__all__ = ["Asked", "Trained", "train_sparse_lora"]

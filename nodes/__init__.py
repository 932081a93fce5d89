"""What a person sees, and everything that touches ComfyUI."""

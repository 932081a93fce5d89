"""What tests share: host (inside ComfyUI), data (inputs and files), oracle (slow, sure answers)."""

"""Helpers for what runs inside a real ComfyUI: models, samplers, compiled models."""

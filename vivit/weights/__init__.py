"""Weights in and out: Scenic and Hugging Face checkpoints, image ViTs as a start, and this project's own file."""

from .huggingface import hf_config, hf_state_dict, load_hf, save_hf
from .image_vit import image_vit_of, init_from_image_vit, read_image_vit, resize_temporal_position
from .native import load, load_into, save
from .scenic import load_scenic, read_scenic, scenic_config

__all__ = [
    "hf_config",
    "hf_state_dict",
    "image_vit_of",
    "init_from_image_vit",
    "load",
    "load_hf",
    "load_into",
    "load_scenic",
    "read_image_vit",
    "read_scenic",
    "resize_temporal_position",
    "save",
    "save_hf",
    "scenic_config",
]

"""Model folders: where they are, reading and writing them as other tools do, and the Hub."""

from distill.hub.card import model_card, push_to_hub
from distill.hub.checkpoint import check_checkpoint, local_folder, resolve_checkpoint
from distill.hub.files import atomic_folder, atomic_write_text
from distill.hub.layouts import CrossEncoderLayout, Dense, EncoderLayout, Encoders
from distill.hub.multi_vector import MultiVectorLayout, read_multi_vector, write_multi_vector
from distill.hub.own import load_heads, read_own, write_own
from distill.hub.reading import read_cross_encoder, read_encoder, read_encoders
from distill.hub.writing import Side, write_cross_encoder, write_encoder, write_two_encoders

__all__ = [
    "CrossEncoderLayout",
    "Dense",
    "EncoderLayout",
    "Encoders",
    "MultiVectorLayout",
    "Side",
    "atomic_folder",
    "atomic_write_text",
    "check_checkpoint",
    "load_heads",
    "local_folder",
    "model_card",
    "push_to_hub",
    "read_cross_encoder",
    "read_encoder",
    "read_encoders",
    "read_multi_vector",
    "read_own",
    "resolve_checkpoint",
    "write_cross_encoder",
    "write_encoder",
    "write_multi_vector",
    "write_own",
    "write_two_encoders",
]

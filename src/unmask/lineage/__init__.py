"""The ancestry of models: stage records, checkpoint directories, and the chain that they form."""

from unmask.lineage.card import model_card
from unmask.lineage.chain import Layer, Lineage, load_layers, open_layers
from unmask.lineage.checkpoint import Checkpoint
from unmask.lineage.record import Record, Reference
from unmask.lineage.write import write_checkpoint

__all__ = [
    "Checkpoint",
    "Layer",
    "Lineage",
    "Record",
    "Reference",
    "load_layers",
    "model_card",
    "open_layers",
    "write_checkpoint",
]

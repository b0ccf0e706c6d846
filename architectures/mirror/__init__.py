"""Mirror maps: what turns dual parameters, which are trained, into those a model computes with."""

from architectures.mirror.base import MirrorMap, NoOptions
from architectures.mirror.block_iaf import BlockIAF
from architectures.mirror.diagonal import Diagonal
from architectures.mirror.layer_iaf import LayerIAF
from architectures.mirror.legendre import Legendre

__all__ = ["BlockIAF", "Diagonal", "LayerIAF", "Legendre", "MirrorMap", "NoOptions"]

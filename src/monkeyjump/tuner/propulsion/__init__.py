"""Propulsion (Kowsher et al., 2024): scale each output of a projection, nothing else."""

from monkeyjump.tuner.propulsion.config import PropulsionConfig
from monkeyjump.tuner.propulsion.layer import PropulsionLayer
from monkeyjump.tuner.propulsion.model import PropulsionModel

__all__ = ["PropulsionConfig", "PropulsionLayer", "PropulsionModel"]

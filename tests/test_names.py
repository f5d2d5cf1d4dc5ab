"""The names that the command line shows are those of the tables behind them."""

import ast
import inspect
from pathlib import Path
from typing import get_args

import shiftaddvit_jax as sav
from shiftaddvit_jax import names, qmc
from shiftaddvit_jax.bench.models import PEERS
from shiftaddvit_jax.calibrate.choice import Proxy
from shiftaddvit_jax.costs.energy import FORMATS
from shiftaddvit_jax.nn import attention
from shiftaddvit_jax.nn.primitives import LAYER_CHOICES, AttentionPrecision, PerformerFeatures, Rotation
from shiftaddvit_jax.ops.implementation import Implementation
from shiftaddvit_jax.ops.precision import CONV_GENERAL_DILATED, DOT_GENERAL, Precision
from shiftaddvit_jax.pictures.gallery import PICTURES
from shiftaddvit_jax.robustness import design
from shiftaddvit_jax.train import writers


def test_every_table_has_the_names_that_help_shows():
    assert tuple(attention._KINDS) == names.ATTENTION_KINDS
    assert tuple(PICTURES) == names.PICTURES
    assert tuple(PEERS) == names.PEERS
    assert tuple(FORMATS) == names.NUMBER_FORMATS
    assert tuple(DOT_GENERAL) == tuple(CONV_GENERAL_DILATED) == get_args(Precision) == names.PRECISIONS
    assert get_args(AttentionPrecision) == names.ATTENTION_PRECISIONS
    assert tuple(attention.DRAW_FEATURES) == get_args(PerformerFeatures) == names.PERFORMER_FEATURES
    assert tuple(attention.ROTATIONS) == get_args(Rotation) == names.ROTATIONS
    assert get_args(get_args(Implementation)[0]) == names.IMPLEMENTATIONS
    assert get_args(Proxy) == names.PROXIES
    assert tuple(LAYER_CHOICES) == names.LAYER_CHOICES
    assert tuple(writers.OPEN) == names.WRITERS
    assert tuple(design.UNITS) == tuple(names.PERTURBATIONS)
    assert (
        tuple(design.RULES)
        == tuple(design.RANDOMIZATIONS)
        == (*qmc.distributions.POINTS, "iid")
        == names.POINTS
    )
    assert set().union(*design.RULES.values()) == set(names.STOPPING_RULES)
    assert set().union(*design.RANDOMIZATIONS.values()) == set(names.RANDOMIZATIONS)
    assert set(names.PAPER_MODELS) <= set(sav.list_models())


def test_type_checkers_see_what_the_package_has():
    """The imports for type checkers, ``__all__`` and the table of modules are one list."""
    (checked,) = (node for node in ast.parse(Path(sav.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {name.name: node.module for node in checked.body for name in node.names}
    assert seen == {name: f"shiftaddvit_jax.{module}" for name, module in sav._MODULE_OF.items()}
    assert sorted(seen) == sav.__all__ == sorted(sav.__all__)
    assert all(
        inspect.isroutine(it) or inspect.isclass(it) for it in (getattr(sav, name) for name in sav.__all__)
    )

"""ShiftAddViT in JAX: pretrained vision transformers reparameterized into shifts and adds."""

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shiftaddvit_jax.balance import balance_routers
    from shiftaddvit_jax.calibrate import calibrate
    from shiftaddvit_jax.checkpoints import (
        export_bundle,
        list_pretrained,
        load_model,
        load_pretrained,
        open_source,
        push_to_hub,
        save_model,
        save_onnx,
        save_pretrained,
        save_safetensors,
    )
    from shiftaddvit_jax.classifier import Classifier, from_pretrained
    from shiftaddvit_jax.heads import replace_head
    from shiftaddvit_jax.models import create_model, features, init_variables, list_models
    from shiftaddvit_jax.pack import pack
    from shiftaddvit_jax.reparameterize import (
        learn_hashes,
        redraw_features,
        reparameterization_report,
        reparameterize,
    )
    from shiftaddvit_jax.to_nnx import to_nnx

__version__ = "0.2.0"

__all__ = [
    "Classifier",
    "balance_routers",
    "calibrate",
    "create_model",
    "export_bundle",
    "features",
    "from_pretrained",
    "init_variables",
    "learn_hashes",
    "list_models",
    "list_pretrained",
    "load_model",
    "load_pretrained",
    "open_source",
    "pack",
    "push_to_hub",
    "redraw_features",
    "reparameterization_report",
    "reparameterize",
    "replace_head",
    "save_model",
    "save_onnx",
    "save_pretrained",
    "save_safetensors",
    "to_nnx",
]

# Each is imported when it is first asked for: `shiftaddvit --help` needs no JAX.
_MODULE_OF = {
    **dict.fromkeys(
        (
            "export_bundle",
            "list_pretrained",
            "load_model",
            "load_pretrained",
            "open_source",
            "push_to_hub",
            "save_model",
            "save_onnx",
            "save_pretrained",
            "save_safetensors",
        ),
        "checkpoints",
    ),
    **dict.fromkeys(("Classifier", "from_pretrained"), "classifier"),
    **dict.fromkeys(("create_model", "features", "init_variables", "list_models"), "models"),
    "balance_routers": "balance",
    "calibrate": "calibrate",
    "pack": "pack",
    "replace_head": "heads",
    "to_nnx": "to_nnx",
    **dict.fromkeys(
        ("learn_hashes", "redraw_features", "reparameterization_report", "reparameterize"), "reparameterize"
    ),
}
_PACKAGES = (
    "bench",
    "checkpoints",
    "costs",
    "data",
    "models",
    "nn",
    "novel_views",
    "ops",
    "pictures",
    "qmc",
    "robustness",
    "search",
    "train",
)


def __getattr__(name: str):
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    elif name in _PACKAGES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({"__version__", *__all__, *_PACKAGES})


class _Package(types.ModuleType):
    """A package whose `pack`, `reparameterize` and the like stay functions when such modules load."""

    def __setattr__(self, name, value):
        if not (name in _MODULE_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

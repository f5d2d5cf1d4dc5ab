"""Models for the Hugging Face Hub: a folder as its tools expect it, and the upload of one.

What transformers has a model for is written in its format, so that it loads there too: dense models with
softmax attention. Everything else is in the canonical packed format.
"""

from pathlib import Path

from shiftaddvit_jax.checkpoints.bundle import CONFIG, WEIGHTS, write_portable
from shiftaddvit_jax.checkpoints.configs import transformers_config
from shiftaddvit_jax.checkpoints.preprocessing import to_transformers
from shiftaddvit_jax.checkpoints.pretrained import save_safetensors
from shiftaddvit_jax.checkpoints.source import Source, describe_source
from shiftaddvit_jax.checkpoints.weights import first_line
from shiftaddvit_jax.files import whole_folder, write_json
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.pack import unpack

CARD = "README.md"


def save_pretrained(source: Source, folder: str | Path) -> None:
    """Write a model into a folder as the Hub has it, whole or not at all.

    The folder gets ``config.json``, ``model.safetensors``, ``preprocessor_config.json`` and, unless it has
    one, a model card ``README.md``. `open_source` and `from_pretrained` read it.

    Args:
      source: the model with its pixels and classes, such as ``classifier.source``.
      folder: where it goes; it may be there already, with such files alone.

    Raises:
      ValueError: other files in the folder, or weights that can't be packed.
    """
    folder = Path(folder).resolve()
    ours = {CONFIG, WEIGHTS, "preprocessor_config.json", CARD}
    others = (
        sorted(path.name for path in folder.iterdir() if path.name not in ours) if folder.is_dir() else []
    )
    if others:
        raise ValueError(f"{folder} has other files, such as {others[0]}; choose another folder")
    card = (folder / CARD).read_text() if (folder / CARD).is_file() else model_card(source)
    about = describe_source(source)
    model, variables = source.model, source.variables
    with whole_folder(folder) as temporary:
        config = transformers_config(model, source.class_names)
        if config is not None:
            write_json(temporary / CONFIG, config | {"preprocessing": about["preprocessing"]})
            plain = unpack(model, variables) if is_packed(variables["params"]) else variables
            save_safetensors(model, plain, temporary / WEIGHTS)
        else:
            write_portable(temporary, model, variables, about)
        write_json(temporary / "preprocessor_config.json", to_transformers(source.preprocessing))
        (temporary / CARD).write_text(card)


def push_to_hub(
    source: Source,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model by shiftaddvit_jax",
) -> str:
    """Upload what `save_pretrained` writes, and return the commit's address.

    Args:
      source: the model with its pixels and classes, such as ``classifier.source``.
      repo_id: ``"ORG/NAME"``; the repository is made if it is not there.
      private: whether a new repository is; by default as its organization says.
      token: of access, by default the one that `hf auth login` keeps.
      revision: the branch, by default the main one.
      commit_message: of the commit.

    Raises:
      ValueError: a repository that can't be made or written, such as without a token.
    """
    import tempfile

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_pretrained(source, folder)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision
            )
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
            raise ValueError(f"{repo_id} can't be uploaded: {first_line(error)}") from None
    return commit.commit_url


def model_card(source: Source) -> str:
    """What a person reads first: what the model is, what it is good for, how to run it."""
    model, about = source.model, source.about or {}
    kinds = ", ".join(
        f"{name} {' '.join(dict.fromkeys(getattr(model, name)))}"
        for name in ("attention", "mlp", "projections")
    )
    shown = ", ".join(source.class_names[:10]) + (", ..." if len(source.class_names) > 10 else "")
    accuracy = f"\nTop-1 on its own test images: {about['top1']:.2%}.\n" if "top1" in about else ""
    return f"""---
library_name: shiftaddvit_jax
pipeline_tag: image-classification
tags:
- shiftaddvit
- jax
- {model.variant}
---

# {model.variant}

A vision transformer ({kinds}) for {len(source.class_names)} classes: {shown}.
{accuracy}
```python
import shiftaddvit_jax as sav

classifier = sav.from_pretrained("hf:ORG/NAME")  # this repository
classifier("image.jpg")
```
"""

"""Sharing on the Hub: models written as a whole, model cards, and uploads in one commit.

`DLDMPipeline.save_pretrained` puts the modules beside the weights that load a pipeline without this package.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError
from yaml import YAMLError

from dldm_pipeline.data.files import write_text

# What an output folder holds that is not uploaded: checkpoints, logs, hidden files, pickles.
PRIVATE_NAMES = ("checkpoint-*", "logs", "validation", ".*", "*.bin", "*.pt", "*.ckpt", "*.pkl")

CARD_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ description }}
{% for caption, name in images.items() %}
![{{ caption }}]({{ name }})

*{{ caption }}*
{% endfor %}
{%- for heading, kind, rows in tables if rows %}
## {{ heading }}

| {{ kind }} | value |
|---|---|
{%- for name, value in rows.items() %}
| {{ name }} | {{ show(value) }} |
{%- endfor %}
{% endfor %}
{%- for heading, text in sections.items() %}
## {{ heading }}

{{ text }}
{% endfor %}
## Intended use and limits

Research: augmentation, method development, teaching. The images are synthetic and show no real patient. **Not for \
diagnosis**, nor for any other clinical decision. The model reproduces its training data: their scanners, populations, \
lesions and biases. Check what you generate before you train on it.
"""


def write_model_card(
    folder: str | os.PathLike,
    title: str,
    description: str,
    figures: dict[str, float | int | str | None],
    training: dict[str, Any],
    images: dict[str, str] | None = None,
    tags: Sequence[str] = (),
    training_data: str | None = None,
    sections: dict[str, str] | None = None,
    license: str = "apache-2.0",
) -> Path:
    """Write `README.md`, the model card of a folder, with intended use and limits, and return its path.

    Figures and training settings are written as tables, and into the card's metadata, where programs find them:
    `ModelCard.load(path).data.eval_results`, and [`read_card_data`].

    Args:
        folder: The model's folder.
        title: First heading.
        description: What the model is, in Markdown.
        figures: Measured on held-out subjects: name to value; those that are `None` are left out.
        training: Arguments and other facts of the training: name to value; those that are `None` are left out.
        images: Caption to file name inside `folder`; the Hub also shows them beside the card.
        tags: Added to the common ones.
        training_data: What the model was trained on, in Markdown.
        sections: Heading to Markdown, after the tables.
        license: The Hub's name of the licence.
    """
    figures, training = (
        {name: _plain(value) for name, value in rows.items() if value is not None} for rows in (figures, training)
    )
    images = images or {}
    task = {"task_type": "unconditional-image-generation", "dataset_type": "held-out-subjects"}
    results = [
        EvalResult(**task, dataset_name="held-out subjects", metric_type=name, metric_name=name, metric_value=value)
        for name, value in figures.items()
    ]
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        tags=["medical", "mri", "brain", "synthetic-data", *tags],
        widget=[{"text": caption, "output": {"url": name}} for caption, name in images.items()] or None,
        model_name=title,
        eval_results=results or None,
        training_data=training_data,
        training=training or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD_TEMPLATE,
        title=title,
        description=description,
        images=images,
        tables=[("Figures on held-out subjects", "figure", figures), ("Training", "setting", training)],
        sections=({"Training data": training_data} if training_data else {}) | (sections or {}),
        show=_show,
    )
    path = Path(folder) / "README.md"
    write_text(path, str(card))
    return path


def read_card_data(folder: str | os.PathLike) -> CardData:
    """The metadata of a folder's model card: empty without one; [`write_model_card`] adds `training_data`, `training`.

    Raises:
        ValueError: If the YAML at the top of `README.md` is broken.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        return CardData()
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data
    except (ValueError, YAMLError) as error:
        raise ValueError(f"{path}: its YAML cannot be read ({error}); correct it, or delete the file.") from error


def _plain(value: Any) -> bool | int | float | str:
    """A value that YAML can hold; numbers of NumPy and PyTorch become Python's."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, bool | int | float | str) else str(value)


def _show(value: bool | int | float | str) -> str:
    """A value as the card's tables show it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def write_pretrained(save: Callable[[Path], Any], folder: str | os.PathLike) -> None:
    """Write a model under a temporary name first, then move its files into `folder`.

        write_pretrained(pipeline.save_pretrained, "outputs/mine")

    Args:
        save: Writes a `save_pretrained` folder; called with a temporary folder.
        folder: The final place, made if it is missing. Other files there (checkpoints, logs) stay.

    Raises:
        OSError: If `folder` cannot be written or the disk is full; an earlier model in `folder` is then unchanged.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            save(Path(temporary))
            for path in Path(temporary).rglob("config.json"):
                config = json.loads(path.read_text(encoding="utf-8"))
                # diffusers notes the folder that a component came from; others should not see it.
                if config.pop("_name_or_path", None) is not None:
                    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
            for entry in sorted(Path(temporary).iterdir()):
                target = folder / entry.name
                if entry.is_dir() and target.is_dir():
                    shutil.rmtree(target)
                entry.replace(target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write the model to {folder}: {error}") from error


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    repo_type: str = "model",
    revision: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload a folder to the Hub in one commit, and return the commit's address. If it fails, no file there has changed.

    The repository and the branch are created if they do not exist. Weights and data shards that are in the repository but
    not in `folder` are deleted in the same commit, because a reader would take them for part of the new ones.

    Args:
        folder: Folder to upload, without what `PRIVATE_NAMES` lists.
        repo_id: "owner/name", or "name" for your own.
        repo_type: `"model"` or `"dataset"`.
        revision: Branch, by default "main".
        private: Create a private repository.
        token: With write access; by default the one you logged in with.

    Raises:
        ValueError: If `private` is asked for and the repository exists and is public.
        OSError: If the upload failed.
    """
    api = HfApi(token=token)
    try:
        # Private from the start, or not at all: what was public for a moment may have been copied.
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise ValueError(f"{repo_id} exists and is public; make it private on the Hub, or name another repository.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            revision=revision,
            folder_path=folder,
            commit_message=f"Upload {repo_type}",
            ignore_patterns=[pattern for name in PRIVATE_NAMES for pattern in (name, f"{name}/*")],
            delete_patterns=["*.safetensors*", "*.parquet", "*.bin", "*.pt", "*.ckpt", "*.pkl"],
        )
    except ValueError:
        raise
    except Exception as error:  # the errors of the network and of the Hub have no class in common
        raise OSError(
            f"uploading {folder} to {repo_id} failed: {error}; check the connection and your token, and run it again."
        ) from error
    return str(commit.commit_url)

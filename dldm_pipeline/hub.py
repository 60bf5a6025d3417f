"""Sharing on the Hub: model cards, and uploads in one commit.

What makes a pipeline load without this package is put beside its weights by `DLDMPipeline.save_pretrained`.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

# What lies in an output folder and is not for others: checkpoints, logs, hidden files, pickles.
PRIVATE_NAMES = ("checkpoint-*", "logs", "validation", ".*", "*.bin", "*.pt", "*.ckpt", "*.pkl")

CARD_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ description }}
{% if widget %}
<Gallery />
{% endif %}
{%- for caption, name in images.items() %}
![{{ caption }}]({{ name }})

*{{ caption }}*
{% endfor %}
{%- for heading, (kind, rows) in tables.items() if rows %}
## {{ heading }}

| {{ kind }} | value |
|---|---|
{%- for name, value in rows.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}
{% endfor %}
{%- for heading, text in sections.items() %}
## {{ heading }}

{{ text }}
{% endfor %}
## Intended use and limits

Research: augmentation, method development, teaching. The images are synthetic and mark no real patient. **Not for \
diagnosis**, nor for any other clinical decision. The model shows what its training data show: their scanners, their \
populations, their lesions, and their biases. Check what you generate before you train on it.
"""


def write_model_card(
    folder: str | Path,
    title: str,
    description: str,
    figures: dict[str, float | int | str],
    training: dict[str, Any],
    images: dict[str, str] | None = None,
    tags: Sequence[str] = (),
    library_name: str = "diffusers",
    sections: dict[str, str] | None = None,
    widget: dict[str, str] | None = None,
    license: str = "apache-2.0",
) -> Path:
    """Write `README.md`, the model card of a folder, with intended use and limits.

    Args:
        folder: the model's folder.
        title: first heading.
        description: Markdown, what it is and what it was trained on.
        figures: measured on held-out subjects; name to value.
        training: arguments worth knowing; name to value.
        images: caption to file name inside `folder`.
        tags: added to the common ones.
        library_name: what the Hub files it under.
        sections: heading to Markdown, after the tables.
        widget: caption to file name inside `folder`, the pictures that the Hub shows beside the model.
        license: the Hub's name of the licence.

    Returns:
        The file.
    """
    data = ModelCardData(
        license=license,
        library_name=library_name,
        tags=["medical", "mri", "brain", "synthetic-data", *tags],
        widget=[{"text": text, "output": {"url": url}} for text, url in (widget or {}).items()] or None,
    )
    tables = {"Figures on held-out subjects": ("figure", figures), "Training": ("setting", training)}
    card = ModelCard.from_template(
        data,
        template_str=CARD_TEMPLATE,
        title=title,
        description=description.strip(),
        images=images or {},
        tables={
            heading: (kind, {name: _show(value) for name, value in rows.items() if value is not None})
            for heading, (kind, rows) in tables.items()
        },
        sections=sections or {},
    )
    path, temporary = Path(folder) / "README.md", Path(folder) / ".README.md.tmp"
    temporary.write_text(str(card), encoding="utf-8")
    temporary.replace(path)
    return path


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    repo_type: str = "model",
    revision: str | None = None,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload",
) -> str:
    """Upload a folder to the Hub in one commit: all of it arrives, or the repository stays as it was.

    The repository and the branch are made where they do not exist. Weights and data shards that are there and not in
    `folder` are deleted in the same commit, as a reader would take old ones for part of the new.

    Args:
        folder: to upload; what is in `PRIVATE_NAMES` stays here.
        repo_id: "owner/name", or "name" for your own.
        repo_type: "model" or "dataset".
        revision: branch, by default "main".
        private: make the new repository private.
        token: with write access; by default the one you logged in with.
        commit_message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if `private` is asked for and the repository is there and public.
        OSError: if the upload failed.
    """
    api, made_branch = HfApi(token=token), False
    try:
        # Private from the start, or not at all: what was public for a moment may have been copied.
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise ValueError(f"{repo_id} exists and is public; make it private on the Hub, or name another repository.")
        branches = [branch.name for branch in api.list_repo_refs(repo_id, repo_type=repo_type).branches]
        if revision is not None and revision not in branches:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type)
            made_branch = True
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            revision=revision,
            folder_path=folder,
            commit_message=commit_message,
            ignore_patterns=[pattern for name in PRIVATE_NAMES for pattern in (name, f"{name}/*")],
            delete_patterns=["*.safetensors*", "*.parquet", "*.bin", "*.pt", "*.ckpt", "*.pkl"],
        )
    except BaseException as error:
        if made_branch:
            with suppress(Exception):
                api.delete_branch(repo_id, branch=revision, repo_type=repo_type)
        if isinstance(error, ValueError) or not isinstance(error, Exception):
            raise
        # Any error of the network's or the Hub's, which have no class in common.
        raise OSError(
            f"uploading {folder} to {repo_id} failed: {error}; check the connection and your token, and run it again."
        ) from error
    return str(commit.commit_url)

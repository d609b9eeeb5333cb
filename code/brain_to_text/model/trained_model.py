"""A trained model wherever it lies: a folder, a `model.tar.gz`, or either of them on S3.

Nothing is unpacked to disk and no pickled code runs.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import TrainingConfig
from ..config_reader import config_from_dict, read_document
from ..errors import CheckpointError, StorageError, short_repr
from ..labels.diphones import LABEL_FORMS, LabelForm
from ..log_lines import rows_of_log
from ..storage.locations import is_s3
from ..storage.store import gunzipped, open_store
from .rnn_model import GRUDecoder, load_public_state_dict, without_wrappers
from .weights_file import load_verified

CHECKPOINTS = ("checkpoint/best_checkpoint", "best_checkpoint")
# name → where it may lie, in a folder or an archive; an uncompressed model lies below output/model
_PLACES: Mapping[str, tuple[str, ...]] = {
    "best_checkpoint": (*CHECKPOINTS, "output/model/checkpoint/best_checkpoint"),
    "args.yaml": ("checkpoint/args.yaml", "args.yaml", "output/model/checkpoint/args.yaml"),
    "training_log": ("training_log", "output/model/training_log"),
}
_ARCHIVES = ("output/model.tar.gz", "model.tar.gz")


@dataclass(frozen=True)
class ModelArtefact:
    """What a training run left.

    Attributes:
        location: where it was read from.
        config: the run's resolved configuration.
        sessions: in day-layer order.
        weights: the state dict, on the CPU.
        step: training steps behind the weights, where known.
        metrics: rows by kind, "train" and "validation", from metrics.jsonl or the log's lines.
        label_form: of the diphone labels it was trained on, where known.
    """

    location: str
    config: TrainingConfig
    sessions: tuple[str, ...]
    weights: Mapping[str, torch.Tensor]
    step: int | None
    metrics: Mapping[str, list[dict[str, Any]]]
    label_form: LabelForm | None = None

    def build(self, device: torch.device | str = "cpu") -> GRUDecoder:
        """The model in evaluation mode.

        Raises:
            CheckpointError: the weights do not fit the configuration.
        """
        with torch.device("meta"):  # takes no memory, whatever args.yaml describes
            model = GRUDecoder(self.config, n_days=len(self.sessions))
        weights = {name: value.float() for name, value in self.weights.items()}
        misfits = load_public_state_dict(model, weights, assign=True)
        if misfits:
            raise CheckpointError(
                f"The weights of {self.location} do not fit its args.yaml: {misfits[0]} "
                "Evaluate the folder exactly as the training run left it."
            )
        return model.to(device).eval()


def open_model(location: str | Path) -> ModelArtefact:
    """Read a model folder, a model.tar.gz, or either below an `s3://` URL.

    Args:
        location: a folder with checkpoint/best_checkpoint (ours or the public baseline's), a
            model.tar.gz, a folder or prefix that holds one as output/model.tar.gz, or an `s3://`
            URL of any of these.

    Raises:
        CheckpointError: no model there, or a damaged one.
        StorageError: the place cannot be read.
        ConfigError: its args.yaml has settings that cannot work here.
    """
    location = str(location)
    files, args, content = _read(location)
    weights, sessions = _weights(content, location), _sessions(content, args, location)
    if not args:
        raise CheckpointError(
            f"{location} holds no checkpoint/args.yaml: keep the file that training wrote beside "
            "best_checkpoint."
        )
    config = config_from_dict(args, f" in args.yaml of {location}")
    if sessions is None:
        raise CheckpointError(
            f"{location} does not say which sessions its day layers belong to: list them as "
            "dataset.sessions in checkpoint/args.yaml."
        )
    config.dataset.sessions = list(sessions)
    # widths that args.yaml leaves to the data are those of the day layers
    width = next((len(w) for name, w in weights.items() if "day_weights." in name), None)
    config.dataset.neural_dim = config.dataset.neural_dim or width
    config.model.n_input_features = config.model.n_input_features or width
    form, step = content.get("label_form"), content.get("step")
    return ModelArtefact(
        location=location,
        config=config,
        sessions=sessions,
        weights=weights,
        step=step if isinstance(step, int) else None,
        metrics=rows_of_log(files.get("training_log", b"").decode("utf-8", "replace")),
        label_form=form if form in LABEL_FORMS else None,
    )


def initial_weights(
    location: str | Path,
) -> tuple[dict[str, torch.Tensor], tuple[str, ...] | None]:
    """Weights to start another run from, and the sessions of their day layers.

    The sessions, in the order of the layers, are those that the checkpoint names, else those of an
    args.yaml beside it (the public baseline names them only there); None if neither does.

    Args:
        location: a best_checkpoint file, or anything that `open_model` takes.

    Returns:
        (weights by name, without the prefixes that wrappers leave; the sessions or None).

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or sessions that do not fit the layers.
        StorageError: the place cannot be read.
    """
    location = str(location)
    _, args, content = _read(location)
    weights = without_wrappers(_weights(content, location))
    sessions = _sessions(content, args, location)
    if sessions is None:
        return weights, None
    layers = sum(name.startswith("day_weights.") for name in weights)
    if layers != len(sessions):
        raise CheckpointError(
            f"{location} has day layers for {layers} sessions but names {len(sessions)} "
            f"({sessions[0]} … {sessions[-1]}), so nobody knows whose they are: put the args.yaml "
            "of that very training run beside it."
        )
    return weights, sessions


# --- what lies where ------------------------------------------------------------------------------


def _read(location: str) -> tuple[dict[str, bytes], dict[str, Any], dict[str, Any]]:
    """The files of a model by name, what args.yaml holds, and what the checkpoint holds."""
    files = _files(location)
    if "best_checkpoint" not in files:
        raise CheckpointError(
            f"{location} holds no checkpoint/best_checkpoint: give a model folder, a "
            "model.tar.gz, or the s3:// URL of one."
        )
    name = location if location.endswith("best_checkpoint") else f"{location}/best_checkpoint"
    content = load_verified(io.BytesIO(files.pop("best_checkpoint")), name)
    if not isinstance(content, dict):
        raise _no_weights(location, f"a {type(content).__name__}")
    args = read_document(files.get("args.yaml", b""), f"args.yaml of {location}")
    return files, args, content


def _files(location: str) -> dict[str, bytes]:
    """What there is of best_checkpoint (also when a file of another name was given), args.yaml and
    training_log."""
    if not location:
        raise StorageError(
            "--model is empty: give a model folder, a model.tar.gz, or an s3:// URL."
        )
    folder, _, name = location.rpartition("/")
    if location.endswith(".tar.gz"):
        return _untar(open_store(folder or ".").read(name), location)
    places = dict(_PLACES)
    if name == "best_checkpoint" if is_s3(location) else Path(location).is_file():
        above, _, last = folder.rpartition("/")
        location = above if last == "checkpoint" else folder
        places["best_checkpoint"] = (f"checkpoint/{name}" if last == "checkpoint" else name,)
    elif not is_s3(location) and not Path(location).is_dir():
        raise StorageError(
            f"{location} does not exist: give a model folder, a model.tar.gz, or the s3:// URL of "
            "one."
        )
    store = open_store(location or ".")
    files = _first_of_each(places, store.exists, store.read)
    if "best_checkpoint" not in files:
        for archive in filter(store.exists, _ARCHIVES):
            return _untar(store.read(archive), f"{location.rstrip('/')}/{archive}")
    return files


def _untar(data: bytes, location: str) -> dict[str, bytes]:
    """The files of a model archive that matter here, in memory.

    Raises:
        CheckpointError, DataError: damaged.
    """
    advice = "download or copy it again"
    wanted = {key for keys in _PLACES.values() for key in keys}
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(gunzipped(data, location, advice))) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if name in wanted and member.isreg():
                    members[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{location} is damaged ({reason}): {advice}.") from error
    return _first_of_each(_PLACES, members.__contains__, members.__getitem__)


def _first_of_each(
    places: Mapping[str, tuple[str, ...]],
    exists: Callable[[str], bool],
    read: Callable[[str], bytes],
) -> dict[str, bytes]:
    """The content of each file at the first of its places where there is one."""
    found = {name: next(filter(exists, keys), None) for name, keys in places.items()}
    return {name: read(key) for name, key in found.items() if key is not None}


def _sessions(
    content: dict[str, Any], args: dict[str, Any], location: str
) -> tuple[str, ...] | None:
    """The sessions of the day layers, None where nothing lists them.

    Raises:
        CheckpointError: something else than distinct names.
    """
    dataset = args.get("dataset")
    in_args = dataset.get("sessions") if isinstance(dataset, dict) else None
    listed = content.get("sessions") or in_args
    if not listed:
        return None
    names = tuple(listed) if isinstance(listed, (list, tuple)) else ()
    if not all(isinstance(name, str) for name in names) or len(set(names)) < max(len(names), 1):
        raise CheckpointError(
            f"The sessions of {location} must be a list of different names, and "
            f"{short_repr(listed)} is not: give the checkpoint and args.yaml of a training run."
        )
    return names


def _weights(content: dict[str, Any], location: str) -> dict[str, torch.Tensor]:
    weights = content.get("model_state_dict", content)
    if not isinstance(weights, dict) or not weights:
        raise _no_weights(location, "no model_state_dict")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _no_weights(location, f"{short_repr(name)} as {type(value).__name__}")
        if value.is_meta or not value.is_floating_point() or value.layout != torch.strided:
            what = f"{value.dtype}, {value.layout} on {value.device}"
            raise _no_weights(location, f"{short_repr(name)} as {what}")
        if not value.isfinite().all():
            raise CheckpointError(
                f"The checkpoint of {location} holds values in {short_repr(name)} that are no "
                "finite numbers, so it decodes nothing: the run diverged; give an earlier "
                "checkpoint."
            )
    return weights


def _no_weights(location: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint of {location} holds {found} where a state dict of tensors must be: give "
        "the best_checkpoint that a training run wrote."
    )

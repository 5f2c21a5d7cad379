"""Checkpoints that are whole or not there.

A checkpoint is written to `tmp.step-N` beside its place and renamed to `step-N` once every byte is on disk; then the
symlink `latest` is swapped. A process killed at any moment, or a disk that fills up, leaves the older checkpoints and
`latest` as they were, and at most a `tmp.` folder that the next save removes.

    checkpoints/step-20/params      float32 masters of what learns, restorable alone (serving) and on any mesh
                        optimizer   optimizer state and step
                        critic      where there is one: its parameters, optimizer state and counters
                        extra       JSON: data position, seed, history, whatever the loop needs to go on
    checkpoints/latest -> step-20
    checkpoints/best   -> step-10       of the newest job, by held-out reward; not there without held-out tasks

Where several models are trained together, `step-20` holds a folder for each, by name, with these three in it.
"""

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from agent_lightning.exceptions import InvalidConfigError, TrainingError
from lightning_jax.rl.update import TrainState

_STEP = re.compile(r"step-([0-9]+)")
_TEMPORARY = "tmp."


def save(
    folder: str | os.PathLike,
    step: int,
    state: TrainState | Mapping[str, TrainState],
    extra: dict[str, Any],
    *,
    max_to_keep: int | None = None,
) -> Path:
    """Writes `folder/step-N`, makes it the latest, and then removes the oldest ones. One writer per folder.

    Args:
        folder: made if it is not there.
        step: N, of the training loop; an existing checkpoint of this step is replaced.
        state: the learner's; or several models' by name, which are saved together or not at all.
        extra: anything JSON.
        max_to_keep: how many checkpoints to leave, this one included and `best` not counted; None for all. The disk
            needs room for one more.

    Raises:
        TrainingError: it could not be written (a full disk, most often). Older checkpoints are as they were.
    """
    folder = Path(folder).absolute()
    final, temporary = folder / f"step-{step}", folder / f"{_TEMPORARY}step-{step}"
    states = state if isinstance(state, Mapping) else {"": state}
    extra = json.loads(json.dumps(extra))  # fails here, not halfway, on what JSON cannot hold
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            _remove_temporaries(folder)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            for item, state in states.items():
                checkpointer.save(temporary / item, args=_saved(state, extra))
        if jax.process_index() == 0:
            _put_in_place(temporary, final)
            _point("latest", final)
            _remove_oldest(folder, max_to_keep)
    except Exception as error:  # Orbax and TensorStore raise OSError, ValueError and RuntimeError for a full disk
        if jax.process_index() == 0:
            _remove_temporaries(folder)
        whole = latest(folder)
        raise TrainingError(
            f"could not write checkpoint {final}: {error}",
            hint=f"{_free_space(folder)}; the newest whole checkpoint is {whole or 'none'}",
        ) from error
    return final


def latest(folder: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint in a folder of checkpoints, or None."""
    linked = _linked(folder, "latest")
    if linked is not None:
        return linked
    steps = all_steps(folder)  # killed between the two renames of a replacement, or copied without links
    return steps[-1] if steps else None


def best(folder: str | os.PathLike) -> Path | None:
    """The checkpoint that `mark_best` was last given, or None."""
    return _linked(folder, "best")


def mark_best(path: Path) -> None:
    """Points `best`, beside a checkpoint, to it; it is kept for as long as `best` does."""
    _point("best", path)


def unmark_best(folder: str | os.PathLike) -> None:
    """Takes `best` away: what a new job finds there is another's."""
    link = Path(folder, "best")
    if link.is_symlink():
        link.unlink(missing_ok=True)


def resolve(folder: str | os.PathLike, name: str) -> Path:
    """The checkpoint that a user means.

    Args:
        folder: the run's folder of checkpoints.
        name: `latest`, `best` or `step-N`, or a path that ends in one of these, such as those in a result. The path
            itself need not be this machine's: a client's copy of `step-N` stands for the one it was made from.

    Raises:
        InvalidConfigError: there is none of that name, with those there are; or the path is another run's.
    """
    folder = Path(folder).absolute()
    path = Path(name)
    is_checkpoint = _STEP.fullmatch(path.resolve().name) and [*path.glob("params"), *path.glob("*/params")]
    if path.is_absolute() and is_checkpoint and path.resolve().parent != folder.resolve():
        raise InvalidConfigError(
            f"checkpoint {name} is not of this run, which keeps its own in {folder}",
            hint="start a server in that run's work directory",
        )
    found = None
    if path.name == "latest":
        found = latest(folder)
    elif path.name == "best":
        found = best(folder)
    elif _STEP.fullmatch(path.name) and (folder / path.name).is_dir():
        found = folder / path.name
    if found is None:
        there = [step.name for step in all_steps(folder)]
        there += [link for link, target in (("latest", latest(folder)), ("best", best(folder))) if target]
        hint = f"there are {', '.join(there)}" if there else "none has been saved yet"
        if path.name == "best" and there:
            hint += "; the best is known once held-out tasks (test_file) were evaluated"
        raise InvalidConfigError(f"there is no checkpoint {name!r} in {folder}", hint=hint)
    return found


def all_steps(folder: str | os.PathLike) -> list[Path]:
    """The whole checkpoints of a folder, in the order of their steps; none if there is no such folder."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.is_dir() and _STEP.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """N of `step-N`."""
    return int(_STEP.fullmatch(path.name)[1])


def restore(
    path: str | os.PathLike, abstract_state: TrainState, *, item: str | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """Reads a checkpoint.

    Args:
        path: `step-N`, `latest`, or the folder that holds them.
        abstract_state: of `jax.ShapeDtypeStruct`, as `Learner.abstract_state` gives; its shardings may be another
            mesh's than the one the checkpoint was written on.
        item: the model's name in a checkpoint of several; None in one of a single model.

    Returns:
        The state, to the bit as it was saved, and `extra`.

    Raises:
        InvalidConfigError: there is no checkpoint, or it is another model's or optimizer's.
    """
    found = _find(path, item)
    _check_shapes(found, abstract_state.params)
    optimizer = {"opt_state": abstract_state.opt_state, "step": abstract_state.step}
    _check_shapes(found, optimizer, "optimizer")
    wanted = abstract_state.critic
    if wanted is not None and not (found / "critic").is_dir():
        raise InvalidConfigError(
            f"checkpoint {found} holds no critic, which algorithm.name 'ppo' needs",
            hint="resume with the algorithm it was made with, or choose another workdir",
        )
    if wanted is not None:
        _check_shapes(found, wanted, "critic")
    items = _restore(
        found,
        params=ocp.args.StandardRestore(abstract_state.params),
        optimizer=ocp.args.StandardRestore(optimizer),
        **({} if wanted is None else {"critic": ocp.args.StandardRestore(wanted)}),
        extra=ocp.args.JsonRestore(),
    )
    critic = None if wanted is None else items.critic
    return TrainState(params=items.params, critic=critic, **items.optimizer), items.extra


def restore_params(path: str | os.PathLike, abstract_params: Any, *, item: str | None = None) -> Any:
    """Reads the parameters alone, in the dtypes and shardings of a tree of `jax.ShapeDtypeStruct`; see `restore`."""
    found = _find(path, item)
    _check_shapes(found, abstract_params)
    return _restore(found, params=ocp.args.StandardRestore(abstract_params)).params


def read_extra(path: str | os.PathLike, *, item: str | None = None) -> dict[str, Any]:
    """Reads `extra` alone; see `restore`."""
    return _restore(_find(path, item), extra=ocp.args.JsonRestore()).extra


def _saved(state: TrainState, extra: dict[str, Any]) -> ocp.args.Composite:
    return ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "step": state.step}),
        **({} if state.critic is None else {"critic": ocp.args.StandardSave(state.critic)}),
        extra=ocp.args.JsonSave(extra),
    )


def _find(path: str | os.PathLike, item: str | None = None) -> Path:
    """The checkpoint, or its part, that a path names: itself, the one it links to, or the newest in that folder."""
    path = Path(path).absolute()
    found = path.resolve() if _STEP.fullmatch(path.resolve().name) and path.is_dir() else latest(path)
    if found is None:
        raise InvalidConfigError(f"there is no checkpoint at {path}", hint="give a step-N folder or the one above it")
    part = found / item if item else found
    if not (part / "params").is_dir():
        models = sorted(folder.parent.name for folder in found.glob("*/params"))
        raise InvalidConfigError(
            f"checkpoint {found} holds {f'no model {item!r}' if item else 'no parameters of a single model'}",
            hint=f"it holds the models {', '.join(models)}" if models else "it was made with a single model",
        )
    return part


def _check_shapes(found: Path, wanted: Any, item: str = "params") -> None:
    """Raises where another model's or optimizer's arrays are stored; Orbax would say so in the middle of reading."""
    with _damage_said(found):
        stored = _stored_shapes(found / item, (found / item / "_METADATA").stat().st_ctime_ns)
    wanted = _shapes(ocp.tree.serialize_tree(wanted, keep_empty_nodes=True))  # named as what is stored
    if stored != wanted:
        kind = "optimizer" if item == "optimizer" else "model"
        raise InvalidConfigError(
            f"checkpoint {found} cannot be restored, for it is another {kind}'s: it holds "
            f"{sorted(stored - wanted)[:3]} where this {kind} has {sorted(wanted - stored)[:3]}",
            hint=f"resume with the {kind} settings it was made with, or choose another workdir",
        )


@functools.lru_cache(maxsize=16)  # TensorStore leaks 60 KB and more whenever it is asked
def _stored_shapes(folder: Path, changed_ns: int) -> set[tuple[str, tuple[int, ...]]]:
    return _shapes(ocp.StandardCheckpointHandler().metadata(folder).tree)


def _shapes(tree: Any) -> set[tuple[str, tuple[int, ...]]]:
    return {(jax.tree_util.keystr(path), tuple(leaf.shape)) for path, leaf in jax.tree.leaves_with_path(tree)}


def _restore(found: Path, **items: Any) -> Any:
    # Each process reads by itself: Orbax would wait for all others, and exports are process 0's alone.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    with _damage_said(found), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(found, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _damage_said(found: Path) -> Iterator[None]:
    """Raises InvalidConfigError where a file of a checkpoint cannot be read."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # there is no room for it
        raise
    except Exception as error:  # Orbax and TensorStore raise ValueError, KeyError, OSError and bare ones
        step = found if _STEP.fullmatch(found.name) else found.parent
        others = [path for path in all_steps(step.parent) if path != step]
        problem = str(error.__cause__ or error).partition(" [tensorstore_spec")[0]
        raise InvalidConfigError(
            f"checkpoint {step} is damaged: {problem}",
            hint=f"remove it, and {others[-1].name} is the newest" if others else "choose another workdir",
        ) from error


def _linked(folder: str | os.PathLike, name: str) -> Path | None:
    """The checkpoint that a link names; None without the link, or if what it names is gone."""
    folder = Path(folder).absolute()
    link = folder / name
    return folder / os.readlink(link) if link.is_symlink() and link.is_dir() else None


def _put_in_place(temporary: Path, final: Path) -> None:
    if final.exists():  # a directory cannot be renamed onto another
        replaced = final.with_name(f"{_TEMPORARY}replaced-{final.name}")
        os.rename(final, replaced)
    os.rename(temporary, final)
    _sync_folder(final.parent)
    _remove_temporaries(final.parent)


def _point(name: str, final: Path) -> None:
    """Swaps the link `name` beside a checkpoint, so that it names one at every moment."""
    link, place = final.with_name(f"{_TEMPORARY}{name}"), final.with_name(name)
    _remove_temporaries(final.parent)  # of a process that was killed here
    link.symlink_to(final.name)
    if place.is_dir() and not place.is_symlink():  # of a copy that followed links
        os.rename(place, final.with_name(f"{_TEMPORARY}copied-{name}"))
    os.replace(link, place)
    _sync_folder(final.parent)


def _remove_oldest(folder: Path, max_to_keep: int | None) -> None:
    for path in all_steps(folder)[: -max_to_keep if max_to_keep else 0]:
        # The latest is among them when a run that began anew in this folder counts from a lower step.
        if path not in (latest(folder), best(folder)):
            os.rename(path, path.with_name(f"{_TEMPORARY}old-{path.name}"))  # never seen half removed
    _remove_temporaries(folder)


def _remove_temporaries(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free there"
    except OSError as error:
        return f"the folder cannot be read ({error})"

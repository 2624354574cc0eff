"""Checkpoint files that are whole or not there.

`torch.save` to the file that a run resumes from leaves half a file where it is killed meanwhile,
and `torch.load` does not notice a byte that changed on the disk. These two do: the file of
`save_checkpoint` takes the place of the last one only when it is complete and on the disk, and
`load_checkpoint` checks every byte of it before anything is loaded.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Generator


def save_checkpoint(path: str | os.PathLike[str], **objects: Any) -> None:
    """Write one file that holds `objects`, or leave the file of that name as it is.

    A process that is killed at any moment leaves the old file or the new one. Beside it there can
    be the beginning of a new one, ``<name>.tmp``, which the next call overwrites; so only one
    process at a time may save to a path (on several ranks: one path each).

    Args:
        path: in an existing folder. An ordinary file of `torch.save`, usually ``.pt``.
        objects: what has a ``state_dict`` (model, optimizer, scheduler, scaler) is saved by it, a
            `torch.Generator` by its state, anything else as it is: tensors, numbers, strings, and
            lists, tuples and dictionaries of such.

    Raises:
        ValueError: there are no objects, or `torch.load` could not read one of them with
            ``weights_only=True``.
        OSError: the file cannot be written.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> save_checkpoint("run.pt", model=model, step=7)
        >>> saved = load_checkpoint("run.pt")
        >>> model.load_state_dict(saved["model"])
    """
    if not objects:
        raise ValueError("there is nothing to save: give objects by name, as in model=model")
    content = {name: _content(value) for name, value in objects.items()}

    def write(file: IO[bytes]) -> None:
        before = torch.serialization.get_crc32_options()
        # without them `load_checkpoint` could not tell a damaged file
        torch.serialization.set_crc32_options(True)
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch's writer fails over what it could not write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise _not_plain(path, error) from error
        finally:
            torch.serialization.set_crc32_options(before)

    def check(written: Path) -> None:
        try:
            # maps the tensors, reads what describes them
            torch.load(written, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise _not_plain(path, error) from error

    replace_file(path, write, check)


def load_checkpoint(
    path: str | os.PathLike[str], map_location: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Read a file of `save_checkpoint`, once to check it and once for its content.

    Nothing is loaded into anything: give each part to the ``load_state_dict`` (a generator:
    ``set_state``) of the object that it came from. The model's goes before the optimizer's.

    Args:
        path: the file.
        map_location: the device for the tensors.

    Returns:
        What was saved, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, incomplete or no checkpoint; says which.
    """
    path = Path(path)
    advice = "resume from an earlier file or start anew"
    with path.open("rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()
        except Exception as error:
            # a changed byte can ask for any offset, compression, password or encoding
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is incomplete, or no checkpoint: "
                f"{_reason(error)}; {advice}"
            ) from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of its part {damaged} differs; {advice}")
    try:
        saved = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}; {advice}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} holds a {type(saved).__name__}, no objects by name; {advice}")
    return saved


def replace_file(
    path: str | os.PathLike[str],
    write: Callable[[IO[bytes]], object],
    check: Callable[[Path], None] = lambda written: None,
) -> None:
    """Write a file beside `path`, and put it in the place of `path` when it is on the disk.

    Args:
        path: a link is followed.
        write: writes to the open file.
        check: raises if the closed file must not take the place of `path`.

    Raises:
        OSError: the file cannot be written; `path` is as it was.
    """
    target = Path(os.path.realpath(path))
    # of one name, so that killed processes leave no more than one behind
    beside = target.with_name(target.name + ".tmp")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        check(beside)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # the new name is in the folder, which is a file of its own
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _content(value: Any) -> Any:
    if isinstance(value, Generator):
        return value.get_state()
    return value.state_dict() if hasattr(value, "state_dict") else value


def _not_plain(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(
        f"{path} was not written, since it would not load again ({_reason(error)}): save tensors, "
        "numbers, strings and containers of them, or give objects whose state_dict holds such"
    )


def _reason(error: Exception) -> str:
    """What an error says, without the paragraphs in which torch.load wraps it."""
    text = str(error)
    inner = text.partition("WeightsUnpickler error: ")[2] or text
    return inner.strip().partition("\n")[0].partition(". ")[0] or type(error).__name__

"""ImageNet's images in memory, from folders or zip archives; labels are the 1,000 class indices of a pretrained head.

An image's class is its wnid (``n01440764``): the name of a folder above it, or its own. The indices are the places of the
sorted wnids of ILSVRC 2012, in which every published 1,000-class head is ordered.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from dualprune.errors import DualpruneError, FormatError, suggest
from dualprune.files import listing_sha256

_WNID = re.compile(r"n\d{8}")
_IMAGES = (".jpeg", ".jpg", ".png")
_ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet's own validation folder has the classes in here


@cache
def wnids() -> tuple[str, ...]:
    """Return the 1,000 wnids of ILSVRC 2012, sorted: a class's place is its index."""
    return tuple((resources.files(__package__) / "imagenet_wnids.txt").read_text(encoding="ascii").split())


def class_indices(found: Sequence[str], where: str) -> dict[str, int]:
    """Return the index of each wnid in `found`.

    Raises:
        DualpruneError: a name is none of the 1,000; `where` says who has it.
    """
    index = {wnid: i for i, wnid in enumerate(wnids())}
    if unknown := sorted(set(found) - set(index)):
        near = suggest(unknown[0], wnids())
        raise DualpruneError(
            f"{where}: {len(unknown)} of {len(set(found))} classes are none of ImageNet's 1,000 wnids (n01440764, …): "
            f"{', '.join(unknown[:4])}{near}; a head of your own takes data 'imagefolder' without classes"
        )
    return {wnid: index[wnid] for wnid in sorted(set(found))}


@dataclass(frozen=True)
class ImageTree:
    """The images under a folder or in a zip archive.

    Attributes:
        place: the folder or archive.
        files: (path inside it, wnid) of each image, sorted.
    """

    place: Path
    files: tuple[tuple[str, str], ...]

    @property
    def classes(self) -> set[str]:
        """The wnids that have an image."""
        return {wnid for _, wnid in self.files}

    def only(self, classes: set[str]) -> ImageTree:
        """Return the images of some classes.

        Raises:
            DualpruneError: there are none.
        """
        files = tuple((path, wnid) for path, wnid in self.files if wnid in classes)
        if not files:
            raise DualpruneError(f"{self.place} has no image of the {len(classes)} classes {', '.join(sorted(classes)[:3])}, …")
        return ImageTree(self.place, files)

    def sha256(self) -> str:
        """Return a hash of the images' names and sizes; nothing is decoded."""
        if not self.place.is_file():
            return listing_sha256(self.place, [self.place / path for path, _ in self.files])
        with zipfile.ZipFile(self.place) as archive:
            listed = [(path, archive.getinfo(path).file_size) for path, _ in self.files]
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    def labels(self) -> Tensor:
        """Return the class index of each image: int64."""
        index = class_indices([wnid for _, wnid in self.files], str(self.place))
        return torch.tensor([index[wnid] for _, wnid in self.files])

    def decode(self, size: int, indices: Sequence[int] | None = None) -> Tensor:
        """Return the images, or those at `indices`: uint8 (images, 3, size, size), the middle square scaled to `size`.

        Raises:
            FormatError: a file is truncated or no image.
        """
        chosen = range(len(self.files)) if indices is None else indices
        images = np.empty((len(chosen), size, size, 3), np.uint8)
        with _opened(self.place) as read:
            for row, i in zip(images, chosen, strict=True):
                row[:] = _square(read, f"{self.place}: {self.files[i][0]}", self.files[i][0], size)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def image_tree(place: Path) -> ImageTree:
    """List the images under a folder or in a zip archive.

    Raises:
        FormatError: it is damaged, holds no image, or an image's class cannot be told.
    """
    with _opened(place) as read:
        paths = sorted(_archived(place) if place.is_file() else _in_folder(place))
        images = [p for p in paths if p.lower().endswith(_IMAGES)]
        notes = next((p for p in paths if PurePosixPath(p).name == _ANNOTATIONS), None)
        annotated = _annotations(read(notes)) if notes else {}
    if not images:
        raise FormatError(f"{place} holds no image ({', '.join(_IMAGES)}) at all")
    return ImageTree(place, tuple((path, _wnid(path, annotated, place)) for path in images))


def _wnid(path: str, annotated: Mapping[str, str], place: Path) -> str:
    parts = PurePosixPath(path)
    for name in (*reversed(parts.parent.parts), parts.stem, parts.stem.partition("_")[0]):
        if _WNID.fullmatch(name):
            return name
    if parts.name in annotated:
        return annotated[parts.name]
    raise FormatError(f"{place}: {path} lies in no folder named after a wnid (n01440764) and is not named after one")


def _annotations(content: bytes) -> dict[str, str]:
    rows = (line.split() for line in content.decode("utf-8", "replace").splitlines())
    return {row[0]: row[1] for row in rows if len(row) > 1}


def _archived(place: Path) -> list[str]:
    with zipfile.ZipFile(place) as archive:
        return [name for name in archive.namelist() if not name.endswith("/") and not _hidden(PurePosixPath(name))]


def _in_folder(place: Path) -> list[str]:
    inside = (path.relative_to(place) for path in place.rglob("*") if path.is_file())
    return [path.as_posix() for path in inside if not _hidden(PurePosixPath(path.as_posix()))]


def _hidden(path: PurePosixPath) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


@contextmanager
def _opened(place: Path) -> Iterator[Callable[[str], bytes]]:
    """Give a function that reads a file of a folder or an archive."""
    if not place.is_file():
        yield lambda path: (place / path).read_bytes()
        return
    try:
        with zipfile.ZipFile(place) as archive:
            yield archive.read
    except zipfile.BadZipFile as error:
        raise FormatError(f"{place} is not a whole zip archive: {error}") from error


def _square(read: Callable[[str], bytes], where: str, path: str, size: int) -> np.ndarray:
    """Decode one image into uint8 (size, size, 3)."""
    from PIL import Image

    from dualprune.tasks.image_files import UNREADABLE

    try:
        with Image.open(io.BytesIO(read(path))) as image:
            pixels = image.convert("RGB")
    except (*UNREADABLE, zlib.error, zipfile.BadZipFile) as error:
        raise FormatError(f"{where} is not a readable image: {error}") from error
    side = min(pixels.size)
    left, top = (pixels.width - side) // 2, (pixels.height - side) // 2
    box = (left, top, left + side, top + side)
    # cut before scaling: resize(box=…) also looks at pixels outside the box
    return np.asarray(pixels.crop(box).resize((size, size), Image.Resampling.BICUBIC))

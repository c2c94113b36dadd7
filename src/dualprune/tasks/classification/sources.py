"""Data sets by name: where they are looked for, how they are read, and what is said of one that is missing or damaged."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from dualprune.errors import DataNotFoundError, DualpruneError, FormatError, suggest
from dualprune.tasks.classification.data import ArrayDataset, Augment, Batch, FolderDataset, Interpolation, at_least_one
from dualprune.tasks.classification.draws import draw, others, stratified
from dualprune.tasks.classification.imagenet import ImageTree, class_indices, image_tree, wnids


@dataclass(frozen=True)
class _Known:
    """A data set that is looked for on disk."""

    shape: tuple[int, int, int]  # height, width, channels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment
    torchvision: str  # the class there
    npz: tuple[str, ...]
    folders: tuple[str, ...]  # with idx files, or torchvision's batches
    system: tuple[str, ...] = ()


_KNOWN = {
    "mnist": _Known((28, 28, 1), (0.1307,), (0.3081,), "shift", "MNIST", ("mnist.npz",), ("MNIST/raw", "MNIST", "mnist", "")),
    "fashion-mnist": _Known(
        (28, 28, 1),
        (0.2860,),
        (0.3530,),
        "crop-flip",
        "FashionMNIST",
        ("fashion-mnist.npz", "fashion_mnist.npz"),
        ("FashionMNIST/raw", "FashionMNIST", "fashion-mnist", ""),
        ("/usr/share/datasets/fashion-mnist",),  # Debian's package dataset-fashion-mnist
    ),
    "cifar10": _Known(
        (32, 32, 3),
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        "crop-flip",
        "CIFAR10",
        ("cifar10.npz", "cifar-10.npz"),
        ("cifar-10-batches-py", ""),
    ),
}
_KEYS = ("x_train", "y_train", "x_test", "y_test")
_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_Arrays = tuple["np.ndarray[Any, Any]", ...]


def load_data(name: str, root: str | Path | None = None, **options: Any) -> ArrayDataset | FolderDataset:
    """Load a data set by name.

    Args:
        name: "digits" (embedded in scikit-learn), "mnist", "fashion-mnist", "cifar10", "imagefolder", "tinyimagenet" or
            "imagenet-sample".
        root: a file or folder to look in; None looks in the folders of the environment variable DUALPRUNE_DATA
            (several are separated as in PATH), then in ``data``.
        **options: digits: `test_fraction`, `subset`, `seed`. mnist, fashion-mnist, cifar10: `download` (through
            torchvision, into the first folder), `mean`, `std`, `subset`, `seed`. imagefolder: `image_size`, `workers`,
            `mean`, `std`, `classes`, `crop`, `interpolation`. tinyimagenet: `image_size`, `mean`, `std`, `subset`, `seed`.
            imagenet-sample: `image_size`, `mean`, `std`. See docs/data.md.

    Raises:
        DataNotFoundError: nothing was found; says where it looked and how to get the data.
        FormatError: a file is truncated, damaged or not what its name promises.
        DualpruneError: no such data set or option.
    """
    if name not in _LOADERS:
        raise DualpruneError(f"no data set {name!r}{suggest(name, _LOADERS)}; there are {', '.join(_LOADERS)}")
    loader = _LOADERS[name]
    accepted = [key for key in inspect.signature(loader).parameters if key not in ("name", "root")]
    for key in options:
        if key not in accepted:
            raise DualpruneError(f"{name} has no option {key!r}{suggest(key, accepted)}; it has {', '.join(accepted)}")
    _check_types(name, options, get_type_hints(loader))
    return loader(name=name, root=root, **options)


def _check_types(name: str, options: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    for key, value in options.items():
        if get_origin(hints[key]) is Literal:  # the loader names the choices
            continue
        try:
            TypeAdapter(hints[key], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise DualpruneError(f"{name}: option {key}: {said[:1].lower()}{said[1:]}, got {value!r}") from None


def trees_sha256(name: str, root: str | Path | None = None) -> str | None:
    """Return a hash of what a data set is that is decoded whole, by its files' names and sizes; None for any other.

    Raises:
        DataNotFoundError: nothing was found.
    """
    if name not in _TREES:
        return None
    return hashlib.sha256(" ".join(tree.sha256() for tree in _TREES[name](name, root)).encode()).hexdigest()


def _load_digits(
    name: str, root: str | Path | None, test_fraction: float = 0.25, seed: int = 0, subset: int | None = None
) -> ArrayDataset:
    """1,797 handwritten digits of 8×8 pixels, split by a fixed, stratified draw."""
    if root is not None:
        raise DualpruneError(f"digits come with scikit-learn and have no root, got {str(root)!r}")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DualpruneError("digits need scikit-learn; pip install 'dualprune[run]'") from error
    pixels, labels = load_digits(return_X_y=True)
    # levels 0…16 become 0…240
    x = torch.from_numpy(pixels).mul(15).to(torch.uint8).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    test = stratified(y, test_fraction, seed)
    train = others(test, len(y))
    train = train[draw(y[train], subset, seed)]
    mean, std = (0.2873,), (0.3539,)
    return ArrayDataset(name, x[train], y[train], x[test], y[test], 10, mean, std, "none", "scikit-learn")


def _load_known(
    name: str,
    root: str | Path | None,
    download: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    subset: int | None = None,
    seed: int = 0,
) -> ArrayDataset:
    known = _KNOWN[name]
    found = _find(known, _places(known, root))
    if found is None and download:
        _download(known, _roots(root)[0])
        found = _find(known, _places(known, root))
    if found is None:
        raise _not_found(name, known, root)
    place, reader = found
    x_train, y_train, x_test, y_test = reader(place)
    images, labels = _as_images(x_train, known.shape, f"{place}: x_train"), _as_labels(y_train, f"{place}: y_train")
    # without a subset the arrays are taken as they are: no copy, and a count that does not fit is found by ArrayDataset
    drawn = slice(None) if subset is None else draw(labels, subset, seed)
    return ArrayDataset(
        name,
        images[drawn],
        labels[drawn],
        _as_images(x_test, known.shape, f"{place}: x_test"),
        _as_labels(y_test, f"{place}: y_test"),
        num_classes=10,
        mean=tuple(mean or known.mean),
        std=tuple(std or known.std),
        augment=known.augment,
        source=str(place),
    )


def _roots(root: str | Path | None) -> list[Path]:
    if root is not None:
        return [Path(root)]
    given = [Path(part) for part in os.environ.get("DUALPRUNE_DATA", "").split(os.pathsep) if part]
    return list(dict.fromkeys([*given, Path("data")]))


def _places(known: _Known, root: str | Path | None) -> list[Path]:
    """Files and folders that may hold the data, the first to be looked at first."""
    places: list[Path] = []
    for top in _roots(root):
        if top.is_file():
            places.append(top)
        else:
            places += [top / file for file in known.npz] + [top / folder for folder in known.folders]
    return places + ([Path(folder) for folder in known.system] if root is None else [])


def _find(known: _Known, places: Sequence[Path]) -> tuple[Path, Callable[[Path], _Arrays]] | None:
    for place in places:
        if place.is_file():
            return place, _read_npz
        if known.torchvision == "CIFAR10":
            if (place / "data_batch_1").is_file():
                return place, _read_cifar10
        elif any(_idx_file(place, stem) for stem in _IDX):
            return place, _read_idx_folder
    return None


def _not_found(name: str, known: _Known, root: str | Path | None) -> DataNotFoundError:
    places = "".join(f"\n  {place}" for place in _places(known, root))
    fetch = f"import torchvision; torchvision.datasets.{known.torchvision}('data', download=True)"
    debian = "\n  or: apt install dataset-fashion-mnist" if known.system else ""
    return DataNotFoundError(
        f"{name} was not found. Looked for an .npz archive or a folder of its files at{places}\n"
        f'To get it: python -c "{fetch}"\n'
        f"  or: the option download=true{debian}\n"
        "To use what you have: point root, or the environment variable DUALPRUNE_DATA, at its file or folder."
    )


def _torchvision_class(known: _Known) -> Any:
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        raise DualpruneError(
            f"reading {known.torchvision} as torchvision leaves it needs torchvision; pip install 'dualprune[run]'"
        ) from error
    return getattr(datasets, known.torchvision)


def _download(known: _Known, folder: Path) -> None:
    try:
        _torchvision_class(known)(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise DualpruneError(f"torchvision could not download {known.torchvision} into {folder}: {error}") from error


def _read_npz(path: Path) -> _Arrays:
    """Read a Keras-style archive; objects in it, which would need pickle, are refused."""
    if not zipfile.is_zipfile(path):
        raise FormatError(f"{path} is not a whole .npz archive; if it was downloaded, download it again")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in _KEYS if key not in archive.files]
            if missing:
                has = ", ".join(archive.files) or "nothing"
                raise FormatError(f"{path}: expected arrays {', '.join(_KEYS)}, it has {has}")
            return tuple(archive[key] for key in _KEYS)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is damaged: {error}") from error


def _idx_file(folder: Path, stem: str) -> Path | None:
    names = (f"{stem}-ubyte", f"{stem}-ubyte.gz", f"{stem.replace('-idx', '.idx')}-ubyte")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx_folder(folder: Path) -> _Arrays:
    files = {stem: _idx_file(folder, stem) for stem in _IDX}
    missing = [f"{stem}-ubyte[.gz]" for stem, file in files.items() if file is None]
    if missing:
        raise FormatError(f"{folder} has some of the four idx files but not {', '.join(missing)}")
    return tuple(_read_idx(file) for file in files.values() if file is not None)


def _read_idx(path: Path) -> np.ndarray[Any, Any]:
    """Read unsigned bytes in the idx format: 0 0 8 ndim, big-endian uint32 sizes, then the bytes."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise FormatError(f"{path} is a damaged gzip file: {error}") from error
    dims = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * dims
    if not 1 <= dims <= 4 or len(content) < start:
        raise FormatError(f"{path} is not an idx file of unsigned bytes; it begins with {content[:4].hex() or 'nothing'}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dims, 4))
    if len(content) != start + math.prod(shape):
        kind = "truncated" if len(content) < start + math.prod(shape) else "too long"
        raise FormatError(f"{path} is {kind}: {shape} needs {start + math.prod(shape)} bytes, it has {len(content)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _read_cifar10(folder: Path) -> _Arrays:
    """Read torchvision's folder through torchvision, which checks the digests of the files before it unpickles them."""
    dataset = _torchvision_class(_KNOWN["cifar10"])
    if folder.resolve().name != dataset.base_folder:
        raise FormatError(f"{folder}: torchvision reads these files from a folder named {dataset.base_folder}; rename it")
    try:
        train, test = (dataset(folder.resolve().parent, train=train, download=False) for train in (True, False))
    except RuntimeError as error:
        raise FormatError(f"{folder} is incomplete or damaged ({error}); delete it and download again") from error
    return train.data, np.asarray(train.targets), test.data, np.asarray(test.targets)


def _as_images(array: np.ndarray[Any, Any], shape: tuple[int, int, int], where: str) -> Tensor:
    """From (n, height, width[, channels]) to a uint8 tensor (n, channels, height, width)."""
    expected = [shape, shape[:2]] if shape[2] == 1 else [shape]
    if array.dtype != np.uint8 or array.shape[1:] not in expected:
        sizes = ", ".join(map(str, shape))
        raise FormatError(f"{where} should be uint8 of shape (n, {sizes}), got {array.dtype} {array.shape}")
    return torch.from_numpy(array.reshape(-1, *shape)).permute(0, 3, 1, 2).contiguous()


def _as_labels(array: np.ndarray[Any, Any], where: str) -> Tensor:
    """From (n,) or (n, 1) of any integers to int64 (n,)."""
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.shape[1:] not in ((), (1,)):
        raise FormatError(f"{where} should be whole numbers of shape (n,), got {array.dtype} {array.shape}")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def _load_folder(
    name: str,
    root: str | Path | None,
    image_size: int = 224,
    workers: int = 4,
    mean: Sequence[float] = FolderDataset.mean,
    std: Sequence[float] = FolderDataset.std,
    classes: str | None = None,
    crop: float = FolderDataset.crop,
    interpolation: Interpolation = FolderDataset.interpolation,
) -> FolderDataset:
    """The layout of torchvision's ImageFolder: train/CLASS/image.jpg and val/CLASS/image.jpg.

    With classes="imagenet" the folders are wnids, as many as there are, and labels are those of the 1,000-class head.
    """
    if classes not in (None, "imagenet"):
        raise DualpruneError(f"classes is 'imagenet', or left out for the folders' own; got {classes!r}")
    at_least_one("image_size", image_size)
    if not 0 < crop <= 1:
        raise DualpruneError(f"crop is the share of the resized image that is cut out, in (0, 1], got {crop}")
    known = get_args(Interpolation)
    if interpolation not in known:
        raise DualpruneError(f"interpolation is {' or '.join(known)}, got {interpolation!r}{suggest(interpolation, known)}")
    for top in _roots(root):
        if (top / "train").is_dir() and (top / "val").is_dir():
            break
    else:
        tried = ", ".join(str(top / part) for top in _roots(root) for part in ("train", "val"))
        raise DataNotFoundError(f"{name} needs the folders train/CLASS/… and val/CLASS/…; looked for {tried}; give root")
    (train, names), (test, others) = _scan(top / "train"), _scan(top / "val")
    unknown = sorted(set(others) - set(names))
    if unknown:
        raise DualpruneError(f"{top / 'val'} has classes that {top / 'train'} has not: {', '.join(unknown[:4])}")
    label = class_indices(names, str(top / "train")) if classes else {key: i for i, key in enumerate(names)}
    return FolderDataset(
        name,
        tuple((path, label[names[old]]) for path, old in train),
        tuple((path, label[others[old]]) for path, old in test),
        wnids() if classes else names,
        image_size,
        tuple(mean),
        tuple(std),
        workers,
        source=str(top),
        crop=crop,
        interpolation=interpolation,
    )


def _scan(folder: Path) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """(path, label) of each image and the names of the classes, sorted."""
    try:
        from torchvision.datasets import ImageFolder
    except ModuleNotFoundError as error:
        raise DualpruneError("image folders need torchvision; pip install 'dualprune[run]'") from error
    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:
        raise FormatError(f"{folder}: {error}") from error
    return tuple(found.samples), tuple(found.classes)


def _load_tiny(
    name: str,
    root: str | Path | None,
    image_size: int = 64,
    mean: Sequence[float] = FolderDataset.mean,
    std: Sequence[float] = FolderDataset.std,
    subset: int | None = None,
    seed: int = 0,
) -> ArrayDataset:
    """Tiny ImageNet, or some of its classes: the test images are those of val/ whose class has training images."""
    at_least_one("image_size", image_size)
    train, test = _tiny_trees(name, root)
    labels = train.labels()
    drawn = draw(labels, subset, seed)
    x_train = train.decode(image_size, drawn.tolist())
    return _of_imagenet(name, (x_train, labels[drawn]), test, image_size, mean, std)


def _tiny_trees(name: str, root: str | Path | None) -> tuple[ImageTree, ImageTree]:
    tops = [top / folder for top in _roots(root) for folder in ("tinyimagenet", "tiny-imagenet-200", "")]
    found = next((pair for top in tops if (pair := _pair(top))), None)
    if found is None:
        raise DataNotFoundError(
            f"{name} needs a folder or one zip archive of training images and one of validation images, train… and val…; "
            f"looked in {', '.join(map(str, tops))}; give root, or set DUALPRUNE_DATA to the folder that holds tinyimagenet"
        )
    train = image_tree(found[0])
    return train, image_tree(found[1]).only(train.classes)


def _pair(top: Path) -> tuple[Path, Path] | None:
    """The training and the validation images in a folder: train/ and val/, or the archives train*.zip and val*.zip."""
    places: list[Path] = []
    for part in ("train", "val"):
        archives = [] if (top / part).is_dir() else sorted(top.glob(f"{part}*.zip"))
        if len(archives) > 1:
            raise DualpruneError(f"{top} has {len(archives)} archives {part}*.zip, expected one: {archives[0].name}, …")
        places += [top / part] if (top / part).is_dir() else archives
    return (places[0], places[1]) if len(places) == 2 else None


def _load_sample(
    name: str,
    root: str | Path | None,
    image_size: int = 256,
    mean: Sequence[float] = FolderDataset.mean,
    std: Sequence[float] = FolderDataset.std,
) -> ArrayDataset:
    """A folder of ImageNet images named after their wnid, for measuring only: there are no training images."""
    at_least_one("image_size", image_size)
    (tree,) = _sample_trees(name, root)
    nothing = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    return _of_imagenet(name, nothing, tree, image_size, mean, std)


def _sample_trees(name: str, root: str | Path | None) -> tuple[ImageTree]:
    folders = [Path(root)] if root is not None else [top / "imagenet1k_sample" for top in _roots(None)]
    place = next((folder for folder in folders if folder.is_dir()), None)
    if place is None:
        tried = ", ".join(map(str, folders))
        raise DataNotFoundError(f"{name} is a folder of images named WNID.jpg; looked for {tried}; give root")
    return (image_tree(place),)


def _of_imagenet(
    name: str, train: Batch, test: ImageTree, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> ArrayDataset:
    x_test, y_test, source = test.decode(image_size), test.labels(), str(test.place.parent)
    fields: dict[str, Any] = {"augment": "crop-flip", "source": source, "measured_only": not len(train[1])}
    return ArrayDataset(name, *train, x_test, y_test, len(wnids()), tuple(mean), tuple(std), **fields)


_LOADERS: dict[str, Callable[..., ArrayDataset | FolderDataset]] = {
    "digits": _load_digits,
    **dict.fromkeys(_KNOWN, _load_known),
    "imagefolder": _load_folder,
    "tinyimagenet": _load_tiny,
    "imagenet-sample": _load_sample,
}
_TREES: dict[str, Callable[[str, str | Path | None], tuple[ImageTree, ...]]] = {
    "tinyimagenet": _tiny_trees,
    "imagenet-sample": _sample_trees,
}

"""A Hugging Face model pruned layer by layer from a text file: what `dualprune layerwise` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualprune.errors import DualpruneError
from dualprune.files import write_json
from dualprune.layerwise import prune_layerwise

HEADS = ("LMHeadModel", "ForCausalLM")  # ends of the names of classes that predict the next token
HELD_OUT = 0.1  # the end of the text, which perplexity is measured on
LONGEST = 2048  # tokens in a window, where neither the caller nor the model says less


def prune_pretrained(
    name: str,
    data: Path,
    out: Path,
    *,
    method: str = "slr",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    blocks: str | None = None,
    ignore: str | Iterable[str] = (),
    refit: bool | None = None,
    samples: int = 128,
    length: int | None = None,
    measured: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    note: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Prune a pretrained model and save it, with its tokenizer, as a folder that `from_pretrained` reads.

    Args:
        name: a folder, or a name of the Hugging Face hub.
        data: a text file in UTF-8. Calibration windows are drawn from its first nine tenths; the rest measures perplexity.
        out: the folder to write; beside the model there is ``layerwise.json`` with the figures returned.
        method: as for `prune_layerwise`, and so are the next five.
        sparsity: fraction of each layer's weights that go.
        pattern: as text.
        blocks: glob over module names.
        ignore: globs over weights or layers that stay as they are.
        refit: whether least squares on the support follow.
        samples: calibration windows.
        length: tokens in a window, at least 2 and at most what the model can see; None: that, 2,048 at most.
        measured: windows at most that perplexity is measured on.
        seed: draws the calibration windows.
        device: where it is computed.
        note: told what happens, a line at a time.

    Returns:
        model, method, pattern, sparsity (of the pruned layers), block_sparsity (of all weights of the blocks), kept, total,
        error, and perplexity_dense and perplexity_pruned, which are None for a model without a language-modelling head; layers
        and untouched, the figures of each.

    Raises:
        DualpruneError: transformers is missing, the model or the text cannot be read or is too short, a number is out of its
            range, or as `prune_layerwise`.
    """
    for what, number in (("samples", samples), ("measured", measured)):
        if number < 1:
            raise DualpruneError(f"{what} is a number of windows, at least 1, got {number}")
    transformers = _transformers()
    if out.resolve() == Path(name).resolve():
        raise DualpruneError(f"--out {out} is the model itself, which is never written over: name another folder")
    text = _read(data)
    tokenizer, model = _load(transformers, name)
    model = model.to(device).eval()
    ids = _tokens(tokenizer, text)
    held = ids[round(len(ids) * (1 - HELD_OUT)) :]
    calibration = ids[: len(ids) - len(held)]
    length = _length(length, model)
    if min(len(calibration), len(held)) <= length:
        raise DualpruneError(
            f"{data} has {len(ids):,} tokens, too few for windows of {length}: give more text, or a smaller --length"
        )
    starts = torch.randint(len(calibration) - length, (samples,), generator=torch.Generator().manual_seed(seed))
    batches = [calibration[start : start + length][None] for start in starts.tolist()]
    tests = list(held[: len(held) // length * length].view(-1, length)[:measured].split(1))

    has_head = type(model).__name__.endswith(HEADS)
    dense = perplexity(model, tests) if has_head else None
    report = prune_layerwise(
        model, batches, method, sparsity=sparsity, pattern=pattern, blocks=blocks, ignore=ignore, refit=refit, note=note
    )
    if report.untouched:
        note(str(report).splitlines()[-1])
    pruned = perplexity(model, tests) if has_head else None
    result: dict[str, Any] = {
        "model": Path(name).name,
        "method": report.method,
        "pattern": pattern,
        "sparsity": report.sparsity,
        "block_sparsity": report.block_sparsity,
        "kept": report.kept,
        "total": report.total,
        "error": report.error,
        "perplexity_dense": dense,
        "perplexity_pruned": pruned,
        "samples": samples,
        "length": length,
        "seed": seed,
        "layers": [vars(layer) for layer in report.layers],
        "untouched": [vars(layer) for layer in report.untouched],
    }
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_json(out / "layerwise.json", result)
    return result


@torch.no_grad()
def perplexity(model: nn.Module, windows: list[Tensor]) -> float:
    """Return exp of the mean loss of every token but the first of each window, (1, length); infinite where it overflows."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for ids in windows:
        ids = ids.to(device)
        scores = model(input_ids=ids, use_cache=False).logits.float()
        total += float(F.cross_entropy(scores[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(min(total / count, 700.0))


def _length(asked: int | None, model: Any) -> int:
    """Return the tokens in a window: as asked, if the model can see so many."""
    sees = _positions(model)
    if asked is None:
        return min(LONGEST, sees or LONGEST)
    if asked < 2:
        raise DualpruneError(f"length is at least 2 tokens, one to predict the other from, got {asked}")
    if sees is not None and asked > sees:
        raise DualpruneError(f"the model sees {sees} tokens, fewer than windows of {asked}: pass a smaller length, or none")
    return asked


def _positions(model: Any) -> int | None:
    """Return how many tokens the model has positions for; None where it does not say (XLNet says -1)."""
    sees = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(sees, int) or sees < 1:
        return None
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == sees)
    unused = max((1 + m.padding_idx for m in tables if m.padding_idx is not None), default=0)
    return sees - unused  # RoBERTa and its kin count from behind the padding's position


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DualpruneError(f"this needs transformers ({error}): pip install 'dualprune[transformers]'") from error
    return transformers


def _load(transformers: Any, name: str) -> tuple[Any, Any]:
    """Return the tokenizer and the model, of the class it was saved by, with that class's head and names."""
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, str((getattr(config, "architectures", None) or [""])[0]), None)
        known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        loader: Any = kind if known else transformers.AutoModel
        return transformers.AutoTokenizer.from_pretrained(name), loader.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DualpruneError(f"cannot load the model {name!r}: {reason}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DualpruneError(f"cannot read the text {str(path)!r}: {error}") from error


def _tokens(tokenizer: Any, text: str) -> Tensor:
    """Return the tokens of the whole text, (n,); the tokenizer's warning about its length is beside the point here."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)

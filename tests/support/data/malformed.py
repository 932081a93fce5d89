"""Files that are wrong as people meet them: cut off, misshapen, incomplete, foreign, malicious."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.data import checkpoints
from support.data.adapters import adapters, rola_adapter, ropeslr_adapter, sla_adapter

Write = Callable[[Path], None]
INTEGERS = ("num_layers", "num_heads", "head_dim", "rank")
HEADERS = (
    ("format_version", "2"),
    ("method", "magic"),
    ("block_q", "96"),
    ("block_k", "24"),
    ("block_order", "hilbert"),
    ("sparsity", "nan"),
    ("sparsity", "1.0"),
    ("sparsity", "much"),
    ("act", "gelu"),
    ("pe", "rotary"),
    ("fusion", "sum"),
    ("rope_axes", "16,56,56"),
    ("noise_levels", "0.5,0.1"),
    ("noise_levels", "0.5,high"),
    ("pe_grid", "3,x"),
)


class Evil:
    """Unpickled without care, it creates the file that MARK names."""

    MARK = ""

    def __init__(self, how: str = "open") -> None:
        self.how = how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.MARK}",)
        if self.how == "eval":
            return eval, (f"open({self.MARK!r}, 'w').close()",)
        return open, (self.MARK, "w")


def cases() -> Iterator[tuple[str, str, Write, str]]:
    """(name, ending, writer, a word that the error must hold) of every malformed file."""
    yield from _adapters()
    yield from _released()
    yield from _pickles()
    yield from _no_checkpoints()


def _adapters():
    made = {
        "ropeslr": ropeslr_adapter(2, 2, 16, rank=6),
        "rola": rola_adapter(2, 2, 16, rank=6),
        "sla": sla_adapter(2, 2, 16),
    }
    for method, adapter in made.items():
        header, tensors = adapter.info.header(), adapter.tensors()

        def write(header: dict, tensors: dict) -> Write:
            return lambda path: save_file(
                {k: x.contiguous() for k, x in tensors.items()}, path, header
            )

        for cut in (0, 4, 8, 60, 400, -1, -40):
            yield (
                f"{method} cut at {cut}",
                ".safetensors",
                _cut(write(header, tensors), cut),
                "safetensors",
            )
        for field in INTEGERS:
            for value in ("", "two", "-1", "99999", "3.5"):
                yield (
                    f"{method} {field}={value}",
                    ".safetensors",
                    write(header | {field: value}, tensors),
                    field,
                )
            # SLA's weights do not tell the others.
            if method != "sla" or field in ("num_layers", "head_dim"):
                yield (
                    f"{method} {field}=7",
                    ".safetensors",
                    write(header | {field: "7"}, tensors),
                    "",
                )
            rest = {key: value for key, value in header.items() if key != field}
            yield f"{method} without {field}", ".safetensors", write(rest, tensors), field
        if method == "sla":
            yield "sla act=elu", ".safetensors", write(header | {"act": "elu"}, tensors), "act"
        for field, value in HEADERS if method == "ropeslr" else HEADERS[:3]:
            yield (
                f"{method} {field}={value}",
                ".safetensors",
                write(header | {field: value}, tensors),
                field,
            )
        optional = (
            ("channel_scale", "gate_slope", "gate_bias", "gate_weight")
            if method == "ropeslr"
            else ()
        )
        last = "blocks.1.self_attn"
        for key in (key for key in tensors if key.startswith(last)):
            tensor, short = tensors[key], key.removeprefix(f"{last}.").split(".")[-1]
            if short not in optional:
                rest = {name: x for name, x in tensors.items() if name != key}
                yield f"{method} without {key}", ".safetensors", write(header, rest), last
            for kind, wrong in _wrong(tensor):
                yield (
                    f"{method} {kind} {key}",
                    ".safetensors",
                    write(header, tensors | {key: wrong}),
                    last,
                )
        without_layer = {key: x for key, x in tensors.items() if not key.startswith(last)}
        yield (
            f"{method} without a layer",
            ".safetensors",
            write(header, without_layer),
            "num_layers",
        )
        gap = {key.replace("blocks.1.", "blocks.5."): x for key, x in tensors.items()}
        yield f"{method} with a gap", ".safetensors", write(header, gap), "blocks.1"
        far = {key.replace("blocks.1.", f"blocks.{10**15}."): x for key, x in tensors.items()}
        yield f"{method} with layer 10^15", ".safetensors", write(header, far), "blocks.1"
        for extra in (
            "blocks.0.self_attn.extra",
            "../../etc/passwd",
            "blocks.0.ffn.0.weight",
            "",
            "blocks.-1.channel_scale",
        ):
            more = write(header, tensors | {extra: torch.ones(1)})
            yield f"{method} with the key {extra!r}", ".safetensors", more, "unexpected key"
        yield f"{method} without header", ".safetensors", write({}, tensors), ""
        yield (
            f"{method} of another format",
            ".safetensors",
            write(header | {"format": "lora"}, tensors),
            "",
        )


def _released():
    stock = checkpoints.wan_weights(256, 2, 512)
    for family, weights in (
        ("sparkwan", checkpoints.sparkwan()),
        ("turbowan", checkpoints.turbowan()),
    ):

        def write(weights: dict[str, Tensor], prefix: str = "net.") -> Write:
            return lambda path: checkpoints.save(weights, path, prefix)

        for cut in (0, 10, 1000, 200_000, -1, -2000):
            yield f"{family} .pth cut at {cut}", ".pth", _cut(write(weights), cut), ""
            yield f"{family} cut at {cut}", ".safetensors", _cut(write(weights), cut), "safetensors"
        for name in weights:  # each one, but for the sparse ones of all blocks but the last
            if name not in stock and name.startswith("blocks.0."):
                continue
            rest = {key: x for key, x in weights.items() if key != name}
            said = name if name in stock and name != "patch_embedding.weight" else ""
            yield f"{family} without {name}", ".safetensors", write(rest), said
        rest = {key: x for key, x in weights.items() if "cross_attn.v" not in key}
        yield f"{family} without any cross_attn.v", ".safetensors", write(rest), "cross_attn.v"
        for name in (
            "patch_embedding.weight",
            "blocks.0.self_attn.q.weight",
            "blocks.1.self_attn.v.weight",
            "blocks.1.ffn.0.weight",
            "blocks.0.ffn.2.bias",
            "time_projection.1.weight",
            "head.modulation",
            *(name for name in weights if name.startswith("blocks.0.") and "proj_" in name),
        ):
            for kind, wrong in _wrong(weights[name], shapes_only="proj_" not in name):
                yield f"{family} {kind} {name}", ".safetensors", write(weights | {name: wrong}), ""
        broken = weights["head.modulation"].clone()
        broken[0, 0, 3] = torch.nan
        yield (
            f"{family} NaN in the model",
            ".pth",
            write(weights | {"head.modulation": broken}),
            "NaN",
        )
        both = weights | checkpoints.rola_weights(256, 2) | checkpoints.sla_weights(2)
        yield f"{family} of two methods", ".safetensors", write(both), "both"
        small = checkpoints.quantised(weights)
        scale = "blocks.0.ffn.0.scale"
        yield (
            f"{family} int8 without factors",
            ".pth",
            write({k: x for k, x in small.items() if k != scale}),
            "scale",
        )
        yield (
            f"{family} int8 with wrong factors",
            ".pth",
            write(small | {scale: torch.ones(1, 1)}),
            "scale",
        )
        flat = small | {
            "blocks.0.norm3.int8_weight": torch.ones(256, dtype=torch.int8),
            "blocks.0.norm3.scale": torch.ones(2),
        }
        del flat["blocks.0.norm3.weight"]
        yield f"{family} int8 that is no matrix", ".pth", write(flat), "expected a matrix"
        nan = small[scale] * torch.nan
        yield f"{family} int8 with NaN factors", ".pth", write(small | {scale: nan}), "NaN"


def _pickles():
    weights = checkpoints.sparkwan()
    for how in ("open", "system", "eval"):
        yield (
            f"code by {how}",
            ".pth",
            lambda path, how=how: torch.save({**weights, "x": Evil(how)}, path),
            "nothing was executed",
        )
        yield (
            f"code by {how}, bare",
            ".pth",
            lambda path, how=how: path.write_bytes(pickle.dumps(Evil(how))),
            "",
        )
        yield (
            f"code by {how}, old format",
            ".pth",
            lambda path, how=how: torch.save(
                {"state_dict": {"net.x": Evil(how)}}, path, _use_new_zipfile_serialization=False
            ),
            "before 2020",
        )
    loop: dict = {}
    loop["model"] = loop
    yield (
        "a table that holds itself",
        ".pth",
        lambda path: torch.save(loop, path),
        "patch_embedding",
    )
    name = "blocks.0.self_attn.proj_q.weight"
    odd = {
        "a number that claims to be a terabyte": torch.ones(1).expand(10**6, 10**6),
        "a sparse tensor": torch.eye(4).to_sparse(),
        "a tensor without numbers": torch.empty(64, 128, device="meta"),
    }
    for kind, tensor in odd.items():
        yield (
            kind,
            ".pth",
            lambda path, x=tensor: torch.save({**weights, name: x}, path),
            "no plain tensor",
        )
    yield (
        "a whole module",
        ".pth",
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        "torch.nn.modules.linear.Linear",
    )
    yield (
        "code named safetensors",
        ".safetensors",
        lambda path: path.write_bytes(pickle.dumps(Evil())),
        "safetensors",
    )


def _no_checkpoints():
    stock = checkpoints.wan_weights(256, 1, 512)
    yield "a stock model", ".pth", lambda path: checkpoints.save(stock, path), "no weights of RoLA"
    other = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4)}
    yield "another model", ".safetensors", lambda path: save_file(other, path), ""
    yield "a list", ".pth", lambda path: torch.save([torch.ones(2)], path), ""
    yield "a tensor", ".pth", lambda path: torch.save(torch.ones(2), path), ""
    yield "an empty table", ".pth", lambda path: torch.save({}, path), ""
    yield (
        "numbers for names",
        ".pth",
        lambda path: torch.save({1: torch.ones(2), 2: torch.ones(2)}, path),
        "",
    )
    for ending in (".pth", ".safetensors"):
        yield (
            f"text as {ending}",
            ending,
            lambda path: path.write_text("<html>404 not found</html>"),
            "",
        )
        yield f"nothing as {ending}", ending, lambda path: path.write_bytes(b""), ""
        yield f"zeros as {ending}", ending, lambda path: path.write_bytes(bytes(4096)), ""
        yield f"a folder as {ending}", ending, lambda path: path.mkdir(), "is a folder"
        yield f"no file {ending}", ending, lambda path: None, "no such file"
    header = struct.pack("<Q", 1 << 40) + b"{}"
    yield (
        "a header of a terabyte",
        ".safetensors",
        lambda path: path.write_bytes(header),
        "safetensors",
    )
    odd = b'{"x": {"dtype": "F32", "shape": [1e9], "data_offsets": [0, 4]}}'
    yield (
        "a shape that is no number",
        ".safetensors",
        lambda path: path.write_bytes(struct.pack("<Q", len(odd)) + odd + bytes(4)),
        "safetensors",
    )


def _cut(write: Write, at: int) -> Write:
    def cut(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[:at])

    return cut


def _wrong(tensor: Tensor, shapes_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    yield (
        "one row more",
        torch.cat((tensor, tensor[:1])) if tensor.shape[0] > 1 else torch.cat((tensor,) * 3),
    )
    yield "one dimension more", tensor[None, None]
    yield "empty", tensor[:0]
    if shapes_only:
        return
    for name, value in (("NaN", torch.nan), ("infinite", torch.inf)):
        broken = tensor.clone()
        broken.view(-1)[-1] = value
        yield name, broken
    yield "whole numbers", tensor.to(torch.int32)


def read(path: Path):
    """Read a file as its kind is read: an adapter, or a released checkpoint and all it holds."""
    if path.suffix == ".safetensors" and path.is_file() and adapters.files.is_adapter(path):
        return adapters.read_adapter(path)
    checkpoint = adapters.open_checkpoint(path)
    return checkpoint.adapter(), checkpoint.backbone()


# Files that are expensive, or that lie about what they hold. Each is made when it is asked for.


def write_header(path: Path, header: dict, size: int = 0) -> Path:
    """A safetensors file of this header and `size` zeros, which take no space on the disk."""
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return path


def many_keys(path: Path, count: int) -> Path:
    """An adapter by its header, with far more tensors than any."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    info = sla_adapter(1, 2, 16).info.header()
    return write_header(path, {"__metadata__": info} | {f"{i}.proj_q": empty for i in range(count)})


def large_checkpoint(path: Path, side: int) -> Path:
    """One matrix of `side` x `side`, as a whole checkpoint would have."""
    size = 4 * side * side
    entry = {"dtype": "F32", "shape": [side, side], "data_offsets": [0, size]}
    return write_header(path, {"blocks.0.self_attn.proj_q.weight": entry}, size)


def large_adapter(path: Path, side: int) -> Path:
    """An adapter whose header is right but for one matrix, which is far too large."""
    made = sla_adapter(1, 2, 16)
    weight, bias = (key for key in made.tensors())
    size = 4 * side * side
    return write_header(
        path,
        {
            "__metadata__": made.info.header(),
            weight: {"dtype": "F32", "shape": [side, side], "data_offsets": [0, size]},
            bias: {"dtype": "F32", "shape": [16], "data_offsets": [size, size + 64]},
        },
        size + 64,
    )


def zip_bomb(path: Path, size: int) -> Path:
    """A .pth of a few hundred kilobytes whose pickle unpacks to `size` bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x/data.pkl", "w", force_zip64=True) as file:
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))
        archive.writestr("x/version", "3\n")
    return path


def deflated(path: Path, weights: dict[str, Tensor]) -> Path:
    """A .pth that somebody has packed again: the same members, compressed."""
    plain = checkpoints.save(weights, path.with_name("plain.pth"))
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    plain.unlink()
    return path


def painted_pickle(path: Path) -> Path:
    """A .pth whose pickle asks for an object with escape codes in its name."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02c\x1b[31mmodule\n\x07name\n.")
        archive.writestr("x/version", "3\n")
    return path

"""Seeded mutations that know the structure of their files: JSON trees, safetensors, archives of torch, lines."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from typing import Any

import zstandard

# Values that replace others in JSON trees.
ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64 + 1,
    10**400,
    0.5,
    -0.0,
    1e308,
    1e-42,
    float("nan"),
    float("inf"),
    "",
    "x" * 1000,
    "../../etc/passwd",
    "\ud800",
    "<script>alert(1)</script>",
    [],
    {},
    [[]],
    [None],
    {"": None},
    [1, 2, 3],
]

# Bytes that replace a whole document.
_ODD_TEXTS = [
    b"",
    b" \n",
    b"null",
    b"7",
    b"[]",
    b'"text"',
    b"{}{}",
    b"{} x",
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"[" * 3000,
    b'{"a":' * 3000 + b"1" + b"}" * 3000,
    b"1" * 5000,
    b'{"a": 1' + b"0" * 400 + b"}",
    b'{"a": "\\ud800"}',
    b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
    b"<!doctype html><html></html>",
]


def mutate_json(content: bytes, random: random.Random) -> bytes:
    """Return a JSON document with one to three things changed within its tree, or as text."""
    if random.random() < 0.15:
        return random.choice(_ODD_TEXTS)
    if random.random() < 0.25:
        return mutate_bytes(content, random)
    tree = json.loads(content)
    for _ in range(random.randint(1, 3)):
        tree = _mutate_tree(tree, random)
    text = json.dumps(tree)
    if random.random() < 0.05:
        text = text.replace("{", '{"twice": 1, "twice": 2, ', 1)
    encoding = "utf-16" if random.random() < 0.03 else "utf-8-sig" if random.random() < 0.03 else "utf-8"
    return text.encode(encoding)


def mutate_lines(content: bytes, random: random.Random) -> bytes:
    """Return JSON lines with some of them changed, swapped, doubled, dropped or cut."""
    lines = content.splitlines(keepends=True)
    index = random.randrange(len(lines))
    kind = random.randrange(5)
    if kind == 0:
        lines[index] = mutate_json(lines[index], random) + b"\n"
    elif kind == 1:
        del lines[index]
    elif kind == 2:
        lines.insert(random.randrange(len(lines) + 1), lines[index])
    elif kind == 3:
        other = random.randrange(len(lines))
        lines[index], lines[other] = lines[other], lines[index]
    else:
        return mutate_bytes(content, random)
    return b"".join(lines)


def mutate_bytes(content: bytes, random: random.Random) -> bytes:
    """Return bytes with bits flipped, cut, doubled, filled or lengthened."""
    if not content:
        return b"x"
    data = bytearray(content)
    place, length = random.randrange(len(data)), random.choice((1, 2, 8, 64, 1000))
    kind = random.randrange(6)
    if kind == 0:
        data[place] ^= 1 << random.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        del data[place : place + length]
    elif kind == 3:
        data[place:place] = data[place : place + length]
    elif kind == 4:
        data[place : place + length] = bytes([random.choice((0, 255, 127))]) * len(data[place : place + length])
    else:
        data += random.randbytes(length)
    return bytes(data)


def mutate_safetensors(content: bytes, random: random.Random) -> bytes:
    """Return a safetensors file with its header's tree, its values or its length changed."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    kind = random.randrange(10)
    if kind == 0:
        return mutate_bytes(content, random)
    if kind == 1:
        return random.choice(_ODD_TEXTS)
    if kind == 7:
        return _mutate_frame(header, names, data, random)
    if kind == 2:
        header = _mutate_tree(header, random)
    elif kind == 3:  # Change a value of one tensor.
        start, stop = header[_one_of_a_kind(names, random)]["data_offsets"]
        _change_value(data, start, stop, random)
    elif kind == 4:  # Exchange two tensors.
        one, other = random.choices(names, k=2)
        header[one], header[other] = header[other], header[one]
    elif kind == 5:
        header[random.choice(names)]["dtype"] = random.choice(
            ["F8_E8M0", "BF16", "I8", "U8", "F16", "I32", "C64", "?"]
        )
    elif kind == 8:  # Flip a bit of a scale, a bias, a norm's weight, codes or features, each kind as often.
        start, stop = header[_one_of_a_kind(names, random)]["data_offsets"]
        data[start + random.randrange(stop - start)] ^= 1 << random.randrange(8)
    elif kind == 9:  # Exchange two tensors of one shape.
        one = random.choice(names)
        alike = [name for name in names if all(header[name][key] == header[one][key] for key in ("shape", "dtype"))]
        other = random.choice(alike)
        header[one], header[other] = header[other], header[one]
    else:
        return random.choice((b"\xff" * 8, (2**40).to_bytes(8, "little"), bytes(8))) + content[8:]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def _one_of_a_kind(names: list[str], random: random.Random) -> str:
    """Return a name, of each ending and of biases and norms as often as of others, which outnumber them."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return random.choice(kinds[random.choice(sorted(kinds))])


def _mutate_frame(header: dict[str, Any], names: list[str], data: bytearray, random: random.Random) -> bytes:
    """Return the file with one tensor replaced by another zstd frame: with or without checksum or size, or longer."""
    tensors = {name: bytes(data[slice(*header[name]["data_offsets"])]) for name in names}
    chosen = random.choice([name for name in names if name.endswith(".codes")] or names)
    try:
        raw = bytearray(zstandard.ZstdDecompressor().decompress(tensors[chosen]))
    except zstandard.ZstdError:  # The tensor is not compressed.
        raw = bytearray(tensors[chosen])
    if random.random() < 0.5:
        raw[random.randrange(len(raw))] ^= 1
    if random.random() < 0.2:
        raw = raw[:-1] if random.random() < 0.5 else raw + bytes(random.choice((1, 10**7)))
    checksum, size = random.random() < 0.5, random.random() < 0.8
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=checksum, write_content_size=size)
    tensors[chosen] = compressor.compress(bytes(raw))
    if random.random() < 0.1:
        tensors[chosen] *= 2
    start = 0
    for name in names:
        header[name]["data_offsets"] = [start, start + len(tensors[name])]
        start += len(tensors[name])
    header[chosen].update(dtype="U8", shape=[len(tensors[chosen])])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensors[name] for name in names)


def mutate_quantization_config(content: bytes, random: random.Random) -> bytes:
    """Return a config.json with one to three things changed within what this package reads of it."""
    config = json.loads(content)
    if random.random() < 0.2:  # Another number of bits, whose codes may take as many bytes.
        layers = config["quantization_config"]["layers"]
        layers[random.choice(sorted(layers))]["bits"] = random.randint(1, 8)
        return json.dumps(config).encode()
    for _ in range(random.randint(1, 3)):
        changed = _mutate_tree(config["quantization_config"], random)
        if isinstance(changed, dict) and changed.get("quant_method") == "bitsfusion":
            config["quantization_config"] = changed
    return json.dumps(config).encode()


def mutate_archive(content: bytes, random: random.Random) -> bytes:
    """Return a file of `torch.save` with bytes changed, or with a record changed and its checksum made to fit."""
    if random.random() < 0.4:
        return mutate_bytes(content, random)
    if random.random() < 0.1:
        return random.choice(_ODD_TEXTS)
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(result, "w") as changed:
        names = archive.namelist()
        chosen = random.choice(names)
        for name in names:
            data = bytearray(archive.read(name))
            if name == chosen:
                if random.random() < 0.1:
                    continue
                if data and random.random() < 0.7:
                    _change_value(data, 0, len(data), random)
                else:
                    data = bytearray(mutate_bytes(bytes(data), random))
            changed.writestr(name, bytes(data))
    return result.getvalue()


def _change_value(data: bytearray, start: int, stop: int, random: random.Random) -> None:
    place = start + random.randrange(stop - start) // 4 * 4
    value = random.choice((float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1.0, 3e38, 1e38, 1e-42))
    single, half = struct.pack("<f", value), struct.pack("<e", min(max(value, -1.0), 1.0))
    new = random.choice((single, single[2:], half, random.randbytes(4)))  # The second one is the value in bf16.
    new = new[: stop - place]
    data[place : place + len(new)] = new


def _mutate_tree(tree: Any, random: random.Random) -> Any:
    """Return a copy with one node replaced, dropped, renamed, doubled or swapped."""
    tree = copy.deepcopy(tree)
    nodes = [(tree, None)]
    places: list[tuple[Any, Any]] = []
    while nodes:
        node, _ = nodes.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            nodes.append((node[key], None))
    if not places or random.random() < 0.03:
        return random.choice(ODD_VALUES)
    # Half of the choices are of the few values at the top, which those of many layers outnumber.
    parent, key = random.choice(places if random.random() < 0.5 else places[: max(1, len(tree))])
    kind = random.randrange(7)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[random.choice(["", "odd", "\ud800", "x" * 300])] = parent.pop(key)
    elif kind == 2 and isinstance(parent[key], (int, float)) and not abs(parent[key]) > 1e300:
        parent[key] = parent[key] * random.choice((-1, 2, 10**6, 0.5)) + random.choice((0, 1))
    elif kind == 3:
        other, place = random.choice(places)
        if place in other if isinstance(other, dict) else place < len(other):
            parent[key] = copy.deepcopy(other[place])
    else:
        parent[key] = random.choice(ODD_VALUES if kind > 4 else _as_other_types(parent[key]))
    return tree


def _as_other_types(value: Any) -> list[Any]:
    """Return what a careless writer makes of a value: a number as a text, a whole number as 2.0, a flag as 1."""
    if isinstance(value, (dict, list)):
        return [[value], list(value), json.dumps(value)]
    is_small = isinstance(value, int) and abs(value) < 1e300  # Greater ones are no floats.
    as_numbers = [int(value), float(value), bool(value)] if is_small else []
    return [[value], str(value), *as_numbers]

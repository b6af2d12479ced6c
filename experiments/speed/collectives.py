"""What a compiled program sends from device to device."""

import re

import numpy as np

_TYPE_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "f64": 8,
}
_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
)


def collective_bytes(hlo: str, num_devices: int) -> dict[str, int]:
    """Bytes that each device sends in one run of a compiled program: {kind of collective: bytes}.

    By the ring algorithms over the n devices of a group: an all-reduce of x bytes sends 2 (n - 1) / n x; an
    all-gather or all_to_all whose result has x bytes (n - 1) / n x; a reduce-scatter (n - 1) times its
    result. A loop's body counts once. num_devices: of the program, for collectives over all of them.
    """
    sent = {}
    for line in hlo.splitlines():
        if not (match := _COLLECTIVE.search(line)):
            continue
        shapes, kind = match.groups()
        size = sum(
            _TYPE_BYTES[dtype] * int(np.prod([int(x) for x in dims.split(",") if x], dtype=np.int64))
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        group = _group_size(line) or num_devices
        share = (group - 1) / group
        factor = {"all-reduce": 2 * share, "reduce-scatter": group - 1, "collective-permute": 1}
        sent[kind] = sent.get(kind, 0) + round(size * factor.get(kind, share))
    return sent


def _group_size(line: str) -> int:
    """Devices that take part together; 0 where the line does not say, which means all."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    return 0

"""Bytes that a compiled program sends between devices."""

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
    """Returns {kind of collective: bytes that each device sends in one run of the compiled program}.

    Assumes ring algorithms over the n devices of a group: an all-reduce of x bytes sends 2 (n - 1) / n x; an
    all-gather or all-to-all whose result has x bytes sends (n - 1) / n x; a reduce-scatter sends (n - 1)
    times its result. The body of a loop counts once. num_devices: the devices of the program, for
    collectives that name no group.
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
    """The number of devices in a group; 0 if the line names no group, which means all devices."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    return 0

"""What several devices would make of a step: a model on paper, printed as a table. Nothing here is measured.

    python bench/scale.py                        # Qwen2.5 1.5B to 0.5B, ddp and fsdp, 8,192 to 524,288 tokens a step
    python bench/scale.py --tokens 65536 --utilisation 0.3 --peak 209.5 --memory 0.936
    python bench/scale.py --json                 # the same rows as JSON

Formulas and assumptions: docs/scale.md. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

GIGA, TERA = 1e9, 1e12
WINDOW = 512
"""Tokens of one window: what a batch is divided into."""
WORLDS = (1, 2, 4, 8, 16, 32, 64)
PAYS = 1.5
"""Twice the devices pay while they give so many times the speed."""
_BUCKET = 25 * 2**20
_MESSAGES = 3 * 24 + 28
"""A step of fsdp: two gathers and one scatter for each layer of the student, one gather for each of the teacher."""


@dataclass(frozen=True)
class Models:
    """Parameters of both; a tied head counts once."""

    student: float = 494.0e6
    student_head: float = 136.1e6
    teacher: float = 1_543.7e6
    teacher_head: float = 233.4e6

    @property
    def flops(self) -> float:
        """Of one token: forward and backward of the student, forward of the teacher."""
        return 6 * self.student + 2 * self.teacher


@dataclass(frozen=True)
class Link:
    """Between two devices, one direction: bytes a second, and seconds of one message."""

    name: str
    bandwidth: float
    latency: float


LINKS = (
    Link("NVLink", 450 * GIGA, 5e-6),
    Link("InfiniBand", 50 * GIGA, 10e-6),
    Link("Ethernet 100", 12.5 * GIGA, 30e-6),
    Link("Ethernet 10", 1.25 * GIGA, 30e-6),
)


@dataclass(frozen=True)
class Device:
    """FLOP a second at best, the part of it that a step reaches alone, and bytes a second of its memory."""

    peak: float = 989 * TERA
    utilisation: float = 0.4
    memory: float = 3_350 * GIGA

    @property
    def rate(self) -> float:
        """FLOP a second that a step reaches."""
        return self.peak * self.utilisation


@dataclass(frozen=True)
class Row:
    """One step on so many devices; seconds."""

    way: str
    link: str
    tokens: int
    devices: int
    compute: float
    optimizer: float
    network: float
    exposed: float
    """Of the network's time what no computation hides."""
    step: float
    speedup: float = 1.0
    """Against one device that holds everything."""

    @property
    def efficiency(self) -> float:
        """Of the devices' speed what is left."""
        return self.speedup / self.devices


def step(way: str, models: Models, device: Device, link: Link, tokens: int, devices: int) -> Row:
    """One step of `tokens` tokens, divided among `devices`, each taking its part at once."""
    part = tokens / devices
    # Few tokens do not fill a device: it reads every weight once a pass whatever their number.
    reads = (2 * models.teacher + 3 * 2 * models.student) / device.memory
    compute = max(part * models.flops / device.rate, reads)
    backward = compute * 4 * models.student / models.flops
    # AdamW reads weight, gradient and two moments, and writes three of them: 28 bytes a parameter in float32.
    optimizer = 28 * models.student / device.memory / (devices if way == "fsdp" else 1)
    ring = (devices - 1) / devices
    hops = 2 * math.ceil(math.log2(devices)) if devices > 1 else 0
    if way == "ddp":
        early, late = 4 * (models.student - models.student_head), 4 * models.student_head
        messages = math.ceil(4 * models.student / _BUCKET) if devices > 1 else 0
        # A tied head's gradient is whole when the backward pass reaches the embedding: at its very end.
        hidden = 2 * ring * early / link.bandwidth
        open_ = 2 * ring * late / link.bandwidth
        network = hidden + open_ + messages * hops * link.latency
        exposed = open_ + max(0.0, network - open_ - backward)
    else:
        # Gathered in float32 for the forward and again for the backward pass, scattered once; the teacher in bf16.
        layers = ring * (3 * 4 * models.student + 2 * models.teacher) / link.bandwidth
        # The loss gathers both heads once more, when nothing else is there to compute, and scatters one gradient.
        open_ = ring * (2 * 4 * models.student_head + 2 * models.teacher_head) / link.bandwidth
        network = layers + open_ + _MESSAGES * hops / 2 * link.latency
        exposed = open_ + max(0.0, network - open_ - compute)
    return Row(way, link.name, tokens, devices, compute, optimizer, network, exposed, compute + optimizer + exposed)


def rows(
    models: Models, device: Device, tokens: Sequence[int], worlds: Sequence[int] = WORLDS, links: Sequence[Link] = LINKS
) -> list[Row]:
    """Every step that a batch of whole windows allows, with its speed-up."""
    found = []
    for size in tokens:
        alone = step("ddp", models, device, links[0], size, 1).step
        for way in ("ddp", "fsdp"):
            for link in links:
                for devices in worlds:
                    if devices > 1 and size // WINDOW % devices == 0:
                        row = step(way, models, device, link, size, devices)
                        found.append(Row(**{**asdict(row), "speedup": alone / row.step}))
    return found


def pays_to(found: Sequence[Row]) -> int:
    """The most devices of one way, link and size for which each doubling gave `PAYS` times the speed; 1: none does."""
    best, speed = 1, 1.0
    for row in sorted(found, key=lambda row: row.devices):
        if row.devices != 2 * best or row.speedup < PAYS * speed:
            break
        best, speed = row.devices, row.speedup
    return best


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8_192, 65_536, 524_288], help="of one step")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64], help="columns; see also `pays to`")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of one device in bf16, dense")
    parser.add_argument("--utilisation", type=float, default=0.4, help="part of it that one device reaches alone")
    parser.add_argument("--memory", type=float, default=3.35, help="TB/s of one device's memory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    models, device = Models(), Device(options.peak * TERA, options.utilisation, options.memory * TERA)
    found = rows(models, device, options.tokens, sorted({*WORLDS, *options.devices}))
    if options.json:
        print(json.dumps([asdict(row) | {"efficiency": row.efficiency} for row in found], indent=1))
        return
    print(
        f"{models.flops / GIGA:.2f} GFLOP a token, {options.peak:g} TFLOP/s x {options.utilisation:g}; calculated, "
        "not measured"
    )
    heads = "".join(f"{f'{n} devices: step (exposed), speed-up':>40}" for n in options.devices)
    print(f"{'tokens':>8} {'way':<5}{'link':<14}{heads}  pays to")
    for size in options.tokens:
        alone = step("ddp", models, device, LINKS[0], size, 1)
        print(f"{size:>8,} one device: {1e3 * alone.step:,.1f} ms")
        for way in ("ddp", "fsdp"):
            for link in LINKS:
                same = [row for row in found if (row.tokens, row.way, row.link) == (size, way, link.name)]
                cells = ""
                for devices in options.devices:
                    row = next((row for row in same if row.devices == devices), None)
                    told = "the batch does not divide"
                    if row is not None:
                        told = f"{1e3 * row.step:,.1f} ms ({1e3 * row.exposed:,.1f}), {row.speedup:.1f} x"
                    cells += f"{told:>40}"
                print(f"{'':>8} {way:<5}{link.name:<14}{cells}  {pays_to(same)}")


if __name__ == "__main__":
    main()
